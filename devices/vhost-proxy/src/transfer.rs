//! The back-end's own state (vhost-user, "Migrating back-end state"): through a pipe, within the exchange's time, and not more
//! than a state has. What it says is the back-ends' business.
//!
//! The channel may be the back-end's own, and whoever holds the same open file can make it block again. So each step says by
//! itself that it does not wait.
use std::io::{self, IoSlice, IoSliceMut};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use device_state::{MAX_STATE, StateError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, OFlags};
use rustix::io::{Errno, ReadWriteFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user::{Error, FrontendEndpoint, MigrationPhase, TransferDirection};

use crate::ProxyError;
use crate::offer::timed;

/// Bytes that are moved at once.
const PIECE: usize = 64 << 10;

/// Asks for the state. No ring runs.
pub(crate) fn save(endpoint: &mut FrontendEndpoint, deadline: Instant) -> Result<Vec<u8>, ProxyError> {
    let channel = begin(endpoint, TransferDirection::Save, deadline)?;
    let mut state = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        match channel.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => state.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(Errno::AGAIN) => channel.wait(PollFlags::IN, deadline)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        if state.len() as u64 > MAX_STATE {
            return Err(StateError::TooLarge(state.len() as u64).into());
        }
    }
    timed(endpoint, deadline)?.check_device_state()?;
    Ok(state)
}

/// Gives it a state. No ring runs. What it does not like it refuses.
pub(crate) fn load(
    endpoint: &mut FrontendEndpoint,
    state: &[u8],
    deadline: Instant,
) -> Result<(), ProxyError> {
    let channel = begin(endpoint, TransferDirection::Load, deadline)?;
    let mut rest = state;
    while !rest.is_empty() {
        match channel.write(rest.get(..rest.len().min(PIECE)).unwrap_or_default()) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::AGAIN) => channel.wait(PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            // It has read enough to refuse it, which it says next.
            Err(Errno::PIPE) => break,
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    // The end of file.
    drop(channel);
    timed(endpoint, deadline)?.check_device_state()?;
    Ok(())
}

/// SET_DEVICE_STATE_FD: our end of the channel.
fn begin(
    endpoint: &mut FrontendEndpoint,
    direction: TransferDirection,
    deadline: Instant,
) -> Result<Channel, ProxyError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    let (ours, theirs) = match direction {
        TransferDirection::Save => (reader, writer),
        TransferDirection::Load => (writer, reader),
    };
    let timed = timed(endpoint, deadline)?;
    let better = timed.set_device_state_fd(direction, MigrationPhase::Stopped, theirs.as_fd())?;
    Channel::new(better.unwrap_or(ours)).map_err(|error| io::Error::from(error).into())
}

/// Our end.
struct Channel {
    file: OwnedFd,
    /// A pipe or socket, which can be asked not to wait each time. Other files are ready whenever they are asked.
    stream: bool,
}

impl Channel {
    fn new(file: OwnedFd) -> Result<Channel, Errno> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK)?;
        Ok(Channel { file, stream: kind.is_fifo() || kind.is_socket() })
    }

    /// Kernels before 6.4 cannot be asked: there it has to do that the file does not block.
    fn read(&self, piece: &mut [u8]) -> Result<usize, Errno> {
        if self.stream {
            let pieces = &mut [IoSliceMut::new(piece)];
            match rustix::io::preadv2(&self.file, pieces, u64::MAX, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP) => {}
                read => return read,
            }
        }
        rustix::io::read(&self.file, piece)
    }

    /// As [`Channel::read`].
    fn write(&self, piece: &[u8]) -> Result<usize, Errno> {
        if self.stream {
            let pieces = &[IoSlice::new(piece)];
            match rustix::io::pwritev2(&self.file, pieces, u64::MAX, ReadWriteFlags::NOWAIT) {
                Err(Errno::OPNOTSUPP) => {}
                written => return written,
            }
        }
        rustix::io::write(&self.file, piece)
    }

    fn wait(&self, flags: PollFlags, deadline: Instant) -> Result<(), ProxyError> {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        match poll(&mut [PollFd::new(&self.file, flags)], Some(&timeout)) {
            Ok(0) => Err(Error::TimedOut.into()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(error) => Err(io::Error::from(error).into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::sync::mpsc::{Receiver, channel};
    use std::thread::JoinHandle;
    use std::time::Duration;

    use vhost_user::{Answer, BackendEndpoint, FrontendRequest as R, ProtocolFeatures, Received};

    use super::*;

    /// A back-end that answers like this, and how it ends.
    fn backend(mut answer: impl FnMut(R) -> Answer + Send + 'static) -> (FrontendEndpoint, JoinHandle<()>) {
        let (near, far) = UnixStream::pair().unwrap();
        let thread = std::thread::spawn(move || {
            let mut endpoint = BackendEndpoint::new(far).unwrap();
            endpoint.set_protocol_features(ProtocolFeatures::all());
            loop {
                match endpoint.receive() {
                    Ok(Some(Received { request, ticket })) => {
                        endpoint.reply(ticket, answer(request)).unwrap();
                    }
                    Ok(None) => drop(poll(&mut [PollFd::new(&endpoint, PollFlags::IN)], None)),
                    Err(_) => return,
                }
            }
        });
        let mut endpoint = FrontendEndpoint::new(near);
        endpoint.set_protocol_features(ProtocolFeatures::DEVICE_STATE).unwrap();
        (endpoint, thread)
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    fn pattern(len: usize) -> Vec<u8> {
        (0..len).map(|at| (at % 251) as u8).collect()
    }

    /// Of a thread that reads or writes everything.
    fn received(file: OwnedFd) -> Receiver<Vec<u8>> {
        let (sender, receiver) = channel();
        std::thread::spawn(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut std::fs::File::from(file), &mut all).unwrap();
            sender.send(all)
        });
        receiver
    }

    /// SET_DEVICE_STATE_FD: the back-end may use the channel that it was given, or return one of its own: "the front-end must
    /// then discard its channel and use the one provided by the back-end".
    #[test]
    fn either_sides_channel_is_used() {
        // More than a pipe holds.
        let state = pattern(1 << 20);
        for own in [false, true] {
            let sent = state.clone();
            let mut loaded = None;
            let (told, tells) = channel();
            let (mut endpoint, thread) = backend(move |request| match request {
                R::SetDeviceStateFd { direction: TransferDirection::Save, fd, .. } => {
                    let sent = sent.clone();
                    let (writer, answer) = match own {
                        false => (fd, Answer::Done),
                        true => {
                            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                            (writer, Answer::Fd(reader))
                        }
                    };
                    std::thread::spawn(move || {
                        io::Write::write_all(&mut std::fs::File::from(writer), &sent).unwrap();
                    });
                    answer
                }
                R::SetDeviceStateFd { fd, .. } => {
                    let (reader, answer) = match own {
                        false => (fd, Answer::Done),
                        true => {
                            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                            (reader, Answer::Fd(writer))
                        }
                    };
                    loaded = Some(received(reader));
                    answer
                }
                R::CheckDeviceState => {
                    if let Some(loaded) = loaded.take() {
                        told.send(loaded.recv().unwrap()).unwrap();
                    }
                    Answer::Done
                }
                _ => Answer::Done,
            });
            assert!(save(&mut endpoint, soon()).unwrap() == state, "own: {own}");
            load(&mut endpoint, &state, soon()).unwrap();
            assert!(tells.recv().unwrap() == state, "own: {own}");
            drop(endpoint);
            thread.join().unwrap();
        }
    }

    /// Not even if it makes its channel block all the time.
    #[test]
    fn policy_7_a_back_end_that_makes_its_channel_block_is_given_up_at_the_deadline() {
        // Often, since it depends on who is first.
        for save_it in [true, false].repeat(10) {
            // The other end stays open, and nothing comes through it.
            let (keep, _kept) = channel();
            let (mut endpoint, _thread) = backend(move |request| {
                if !matches!(request, R::SetDeviceStateFd { .. }) {
                    return Answer::Done;
                }
                let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).unwrap();
                let (kept, given) = if save_it { (writer, reader) } else { (reader, writer) };
                keep.send(kept).unwrap();
                let same = given.try_clone().unwrap();
                let (begin, begun) = channel();
                std::thread::spawn(move || {
                    for _ in 0..100_000 {
                        rustix::fs::fcntl_setfl(&same, OFlags::empty()).unwrap();
                        let _ = begin.send(());
                    }
                });
                begun.recv().unwrap();
                Answer::Fd(given)
            });
            let (sender, outcome) = channel();
            std::thread::spawn(move || {
                let deadline = Instant::now() + Duration::from_millis(30);
                let outcome = match save_it {
                    true => save(&mut endpoint, deadline).map(|_| ()),
                    false => load(&mut endpoint, &pattern(1 << 20), deadline),
                };
                sender.send(outcome)
            });
            let outcome = outcome.recv_timeout(Duration::from_secs(30)).expect("it ends");
            assert!(matches!(outcome, Err(ProxyError::Protocol(Error::TimedOut))), "{outcome:?}");
        }
    }
}
