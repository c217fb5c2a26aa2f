//! Migrating the device's state (vhost-user, "Migrating back-end state").
//!
//! The channel is always a pipe of our own, which the document allows instead of the front-end's: whoever holds the same
//! open file can make it block under us, and theirs can be anything. Our end of our pipe is known to be a pipe, is ours
//! alone and never blocks.
//!
//! A transfer goes on while the connection does, whenever there is room or data, and other guests have their turns.
//! It is over when all bytes are written or the end of file is read, or with an error: a front-end that does not read or
//! write in time, more bytes than a state has, a beginning that is none. CHECK_DEVICE_STATE waits for that, and loads
//! what was read.
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use device_state::{HEADER, Header, StateError};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user::{Answer, TransferDirection};
use vm_virtio::SnapshotError;
use vm_virtio::device::VirtioDevice;

use super::{Refused, Session};
use crate::guest::{Host, Tokens};
use crate::task::Watch;

/// How long a transfer may take. The largest state goes through a pipe in a fraction of a second.
const PATIENCE: Duration = Duration::from_secs(20);

/// Bytes that are moved at once.
const PIECE: usize = 64 << 10;
/// Pieces that are moved before other guests get a turn.
const TURN: u32 = 16;

/// A state that is not transferred or taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TransferError {
    /// Rings run.
    #[error("the device's state can be transferred only while all rings are stopped")]
    Running,
    /// CHECK_DEVICE_STATE without a transfer.
    #[error("no transfer was begun")]
    None,
    /// The other end did not keep up.
    #[error("the transfer did not end within {} seconds", PATIENCE.as_secs())]
    Timeout,
    /// The daemon ends.
    #[error("the daemon ends")]
    Stopping,
    /// The pipe failed: most likely the other end was closed.
    #[error("the transfer failed: {0}")]
    Pipe(#[from] Errno),
    /// Not a state.
    #[error(transparent)]
    State(#[from] StateError),
    /// Not one that the device can be in, or no state that it can give.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
    /// The connection has set other features than the saved device had.
    #[error("the state is of a device with other features than this connection has set")]
    Features,
}

/// A transfer under way, or over.
pub(super) struct Transfer {
    content: Content,
    /// Closed when it is over, which tells the front-end.
    pipe: Option<Pipe>,
    deadline: Instant,
    outcome: Option<Result<(), TransferError>>,
}

/// Our end, and what brings the task back to it.
struct Pipe {
    file: OwnedFd,
    _watch: Watch,
    host: Rc<Host>,
    tokens: Tokens,
}

enum Content {
    /// So many of these bytes are written.
    Save(Vec<u8>, usize),
    /// These are read.
    Load(Vec<u8>),
}

impl Transfer {
    /// A transfer and the front-end's end of its pipe.
    fn new(content: Content, host: &Rc<Host>, tokens: Tokens) -> io::Result<(Transfer, OwnedFd)> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let (ours, theirs) = match content {
            Content::Save(..) => (writer, reader),
            Content::Load(_) => (reader, writer),
        };
        // Front-ends expect a file that blocks.
        rustix::fs::fcntl_setfl(&theirs, rustix::fs::fcntl_getfl(&theirs)? - OFlags::NONBLOCK)?;
        let watch = Watch::new(&host.reactor, tokens.transfer(), ours.as_fd())?;
        let deadline = Instant::now() + PATIENCE;
        host.reactor.borrow_mut().set_timer(tokens.transfer(), deadline);
        let pipe = Some(Pipe { file: ours, _watch: watch, host: host.clone(), tokens });
        Ok((Transfer { content, pipe, deadline, outcome: None }, theirs))
    }

    /// Moves what can be moved without waiting. True when it is over.
    pub(super) fn advance(&mut self, context: &Context<'_>) -> bool {
        if let (None, Some(pipe)) = (&self.outcome, &self.pipe) {
            self.outcome = match self.content.advance(&pipe.file) {
                Ok(Poll::Ready(())) => Some(Ok(())),
                Err(error) => Some(Err(error)),
                Ok(Poll::Pending) if Instant::now() >= self.deadline => Some(Err(TransferError::Timeout)),
                Ok(Poll::Pending) => None,
            };
            if self.outcome.is_none() && self.content.may_go_on(&pipe.file) {
                context.waker().wake_by_ref();
            }
        }
        if self.outcome.is_some() {
            self.pipe = None;
        }
        self.outcome.is_some()
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        if let Ok(mut reactor) = self.host.reactor.try_borrow_mut() {
            reactor.cancel_timer(self.tokens.transfer());
        }
    }
}

impl Content {
    fn advance(&mut self, pipe: &OwnedFd) -> Result<Poll<()>, TransferError> {
        for _ in 0..TURN {
            let moved = match self {
                Content::Save(bytes, done) => {
                    let rest = bytes.get(*done..).unwrap_or(&[]);
                    if rest.is_empty() {
                        return Ok(Poll::Ready(()));
                    }
                    rustix::io::write(pipe, &rest[..rest.len().min(PIECE)]).map(|written| *done += written)
                }
                Content::Load(bytes) => {
                    let mut piece = [0; PIECE];
                    match rustix::io::read(pipe, &mut piece) {
                        Ok(0) => return Ok(Poll::Ready(())),
                        Ok(read) => {
                            bytes.extend(&piece[..read]);
                            check_beginning(bytes)?;
                            Ok(())
                        }
                        Err(error) => Err(error),
                    }
                }
            };
            match moved {
                Ok(()) | Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => return Ok(Poll::Pending),
                Err(error) => return Err(error.into()),
            }
        }
        Ok(Poll::Pending)
    }

    /// Whether the pipe is ready now: it was left so after a turn, and reports nothing new.
    fn may_go_on(&self, pipe: &OwnedFd) -> bool {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let wanted = if matches!(self, Content::Save(..)) { PollFlags::OUT } else { PollFlags::IN };
        let at_once = Timespec { tv_sec: 0, tv_nsec: 0 };
        poll(&mut [PollFd::new(pipe, wanted)], Some(&at_once)).is_ok_and(|ready| ready > 0)
    }
}

/// Nothing is collected that cannot be a state, and not more than one.
fn check_beginning(bytes: &[u8]) -> Result<(), StateError> {
    if bytes.len() < HEADER {
        return Ok(());
    }
    let header = Header::parse(bytes)?;
    if (bytes.len() - HEADER) as u64 > header.length { Err(StateError::Trailing) } else { Ok(()) }
}

impl<D: VirtioDevice> Session<'_, D> {
    /// SET_DEVICE_STATE_FD: begins a transfer in place of a former one. The answer has our channel.
    pub(super) async fn begin_transfer(&mut self, direction: TransferDirection) -> Result<Answer, Refused> {
        self.transfer = None;
        if !self.is_suspended() {
            return Err(TransferError::Running.into());
        }
        let content = match direction {
            TransferDirection::Save => {
                let state = self.guest.engine.save().await.map_err(TransferError::from)?;
                Content::Save(state, 0)
            }
            TransferDirection::Load => Content::Load(Vec::new()),
        };
        let (transfer, theirs) = Transfer::new(content, &self.guest.host, self.guest.tokens())?;
        self.transfer = Some(transfer);
        Ok(Answer::Fd(theirs))
    }

    /// CHECK_DEVICE_STATE: waits for the end of the transfer and takes over what was loaded.
    pub(super) async fn check_transfer(&mut self) -> Result<(), Refused> {
        let Some(mut transfer) = self.transfer.take() else { return Err(TransferError::None.into()) };
        poll_fn(|context| {
            if self.guest.host.stopping.get() && transfer.outcome.is_none() {
                transfer.outcome = Some(Err(TransferError::Stopping));
            }
            if transfer.advance(context) { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
        transfer.outcome.unwrap_or(Err(TransferError::None))?;
        match transfer.content {
            Content::Save(..) => Ok(()),
            Content::Load(bytes) => Ok(self.load(&bytes).await?),
        }
    }

    /// Takes over a state. What is refused leaves a reset device.
    async fn load(&mut self, bytes: &[u8]) -> Result<(), TransferError> {
        if !self.is_suspended() {
            return Err(TransferError::Running);
        }
        self.guest.reset().await;
        let engine = &self.guest.engine;
        let queues = engine.restore(bytes).await?;
        // Saved by a front-end's wish there are none: its rings were stopped. It starts them where it wants.
        drop(queues);
        let restored = engine.driver_features();
        if self.acked.is_some_and(|acked| acked != restored) {
            self.guest.reset().await;
            return Err(TransferError::Features);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::io::{Read, Write};
    use std::task::Waker;

    use super::*;

    fn host() -> Rc<Host> {
        let reactor = Rc::new(RefCell::new(reactor::Reactor::new().unwrap()));
        Rc::new(Host { reactor, stopping: Cell::new(false), guests: 1 })
    }

    fn begin(content: Content) -> (Transfer, std::fs::File) {
        let (transfer, theirs) = Transfer::new(content, &host(), Tokens::of(0)).unwrap();
        (transfer, theirs.into())
    }

    fn advance(transfer: &mut Transfer) -> bool {
        transfer.advance(&Context::from_waker(Waker::noop()))
    }

    #[test]
    fn policy_7_who_does_not_read_is_given_up_at_the_deadline() {
        let (mut transfer, mut theirs) = begin(Content::Save(vec![7; 1 << 20], 0));
        assert!(!advance(&mut transfer), "a pipe holds less");
        assert!(transfer.deadline > Instant::now(), "there is time");
        transfer.deadline = Instant::now();
        assert!(advance(&mut transfer));
        assert!(matches!(transfer.outcome, Some(Err(TransferError::Timeout))));
        let mut rest = Vec::new();
        theirs.read_to_end(&mut rest).expect("closed at our end");
        assert!(rest.len() < 1 << 20);
    }

    #[test]
    fn policy_7_who_does_not_write_is_given_up_at_the_deadline() {
        let (mut transfer, mut theirs) = begin(Content::Load(Vec::new()));
        theirs.write_all(b"BKPL").unwrap();
        assert!(!advance(&mut transfer));
        transfer.deadline = Instant::now();
        assert!(advance(&mut transfer));
        assert!(matches!(transfer.outcome, Some(Err(TransferError::Timeout))));
        assert!(theirs.write_all(b"STAT").is_err(), "closed at our end");
    }

    #[test]
    fn what_cannot_be_a_state_is_refused_while_it_comes() {
        let (mut transfer, mut theirs) = begin(Content::Load(Vec::new()));
        theirs.write_all(&[0; HEADER]).unwrap();
        assert!(advance(&mut transfer), "without waiting for the end");
        assert!(matches!(transfer.outcome, Some(Err(TransferError::State(StateError::Magic)))));
    }

    #[test]
    fn the_front_ends_end_blocks_and_ours_does_not() {
        let (transfer, theirs) = begin(Content::Load(Vec::new()));
        let ours = &transfer.pipe.as_ref().unwrap().file;
        assert!(rustix::fs::fcntl_getfl(ours).unwrap().contains(OFlags::NONBLOCK));
        assert!(!rustix::fs::fcntl_getfl(&theirs).unwrap().contains(OFlags::NONBLOCK));
    }
}
