//! What a lane knows of one queue beside the queue itself, and the types of its life cycle.
use crate::device::Stop;
use crate::engine::QueueResetError;
use crate::lane::command::WaitFor;
use crate::lane::delegated::Delegated;
use crate::lane::tally::{QueueTotals, Tally};
use crate::queue::Miss;
use crate::ticket::Completer;
use crate::{GuestAddress, GuestRam, QueueError, QueueState};
use rustix::fd::{AsFd, BorrowedFd, OwnedFd};
use rustix::fs::{FileType, OFlags};
use rustix::io::Errno;
use std::io::{self, IoSliceMut};
use std::sync::Arc;
use std::time::Instant;

/// How a driver's notifications (kicks) reach a queue.
#[derive(Debug)]
pub enum Kick {
    /// An eventfd that becomes readable, or a pipe (vhost-user, "Support for platforms other than Linux").
    Fd(OwnedFd),
    /// [`crate::Engine::kick`].
    Manual,
    /// Not at all: the lane looks into the ring by itself, every [`POLL_INTERVAL`](crate::lane::POLL_INTERVAL).
    Poll,
}

impl Kick {
    /// Whether kicks pile up until they are read: an eventfd counts them, a pipe has room for some thousands. Such a
    /// file is made non-blocking.
    pub(super) fn piles_up(&self) -> io::Result<bool> {
        let Kick::Fd(fd) = self else { return Ok(false) };
        let piles_up = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode).is_fifo();
        if piles_up {
            let flags = rustix::fs::fcntl_getfl(fd)?;
            rustix::fs::fcntl_setfl(fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(piles_up)
    }

    /// Takes what has piled up, as much as a pipe usually holds: if there is more, the next kick comes here again.
    pub(super) fn take(&self) {
        let Kick::Fd(fd) = self else { return };
        let mut piece = [0; 4096];
        for _ in 0..16 {
            // NOWAIT, because the peer can take back what was made non-blocking, and what there was to read. Kernels
            // before 6.4 do not have it for pipes.
            let nowait = rustix::io::ReadWriteFlags::NOWAIT;
            let read = match rustix::io::preadv2(fd, &mut [IoSliceMut::new(&mut piece)], u64::MAX, nowait) {
                Err(Errno::OPNOTSUPP) => rustix::io::read(fd, &mut piece),
                read => read,
            };
            if read.is_ok_and(|read| read == piece.len()) {
                continue;
            }
            return;
        }
    }
}

/// How a queue's used-buffer notifications reach the driver.
pub trait Interrupt: Send + Sync {
    /// Notifies. Must not block.
    fn signal(&self);
    /// The file behind it, if it is one.
    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}

/// The interrupt of a queue; none: the driver polls.
pub type Call = Option<Arc<dyn Interrupt>>;

/// An [`Interrupt`] that is an eventfd.
#[derive(Debug)]
pub struct EventFd(OwnedFd);

impl EventFd {
    /// Takes the file and makes it non-blocking, so that a peer who never reads cannot hold a lane.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = rustix::fs::fcntl_getfl(&fd)?;
        if !flags.contains(OFlags::NONBLOCK) {
            rustix::fs::fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        }
        Ok(EventFd(fd))
    }
}

impl Interrupt for EventFd {
    fn signal(&self) {
        // Full means that a notification is pending already; anything else is the peer's loss.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}

/// A queue cannot be started.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The device has no queue of that number.
    #[error("the device has no queue {0}")]
    NoSuchQueue(u16),
    /// It runs already.
    #[error("queue {0} is already started")]
    Started(u16),
    /// It is larger than the device allows.
    #[error("queue {queue} would have {size} entries, the device allows {max}")]
    TooLarge {
        /// The queue.
        queue: u16,
        /// The size asked for.
        size: u16,
        /// The largest there may be.
        max: u16,
    },
    /// Its ring is not acceptable.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// The kick file cannot be watched.
    #[error("the kick file cannot be watched")]
    Kick(#[source] io::Error),
    /// A reset is under way.
    #[error("the device is being reset")]
    Resetting,
    /// The lane's thread is gone.
    #[error("the device is shutting down")]
    Gone,
}

/// A queue did not stop as asked.
#[derive(Debug, thiserror::Error)]
pub enum StopError {
    /// The queue is not started.
    #[error("queue {0} is not started")]
    NotStarted(u16),
    /// Chains were still out at the deadline (or the worker had failed): they were given up and the device needs a
    /// reset. The queue is stopped all the same.
    #[error("a queue was stopped with requests still out")]
    Stuck(QueueState),
    /// The lane's thread is gone.
    #[error("the device is shutting down")]
    Gone,
}

pub(super) struct Stopping {
    pub(super) how: Stop,
    pub(super) deadline: Instant,
    pub(super) asked: Asked,
}

/// Who asked for a stop.
pub(super) enum Asked {
    /// The host, who wants to know where it ended.
    Host(Completer<Result<QueueState, StopError>>),
    /// The driver, who resets this queue.
    Driver(Completer<Result<(), QueueResetError>>),
    /// Nobody: it is part of the device's reset.
    Reset,
}

/// Somebody waits for a range to be let go.
pub(super) struct Release {
    pub(super) first: u64,
    pub(super) last: u64,
    pub(super) deadline: Instant,
    pub(super) _done: Arc<Completer<()>>,
}

pub(super) struct Ring {
    pub(super) index: u16,
    pub(super) kick: Kick,
    /// Kicks have to be read.
    pub(super) piles_up: bool,
    pub(super) call: Call,
    pub(super) enabled: bool,
    /// Where its Device Area is for the log of dirty pages.
    pub(super) logged: Option<GuestAddress>,
    /// The driver broke the ring's rules.
    pub(super) faulted: bool,
    /// To be served in this turn.
    pub(super) ready: bool,
    /// Kicks are asked for.
    pub(super) armed: bool,
    /// The interrupt was exchanged while the lane was suspended: one is due when it is resumed.
    pub(super) unheard: bool,
    pub(super) stopping: Option<Stopping>,
    /// A memory change that waits for the old chains.
    pub(super) moving: Option<(GuestRam, Arc<Completer<()>>)>,
    /// Those that wait for chains to be gone from a range.
    pub(super) releasing: Vec<Release>,
    /// The translation that was asked for last.
    pub(super) asked: Option<Miss>,
    /// It is served elsewhere.
    pub(super) delegated: Option<Delegated>,
    pub(super) tally: Tally,
}

impl Ring {
    pub(super) fn new(index: u16, totals: Arc<QueueTotals>) -> Self {
        Ring {
            index,
            kick: Kick::Manual,
            piles_up: false,
            call: None,
            enabled: false,
            logged: None,
            faulted: false,
            ready: false,
            armed: false,
            unheard: false,
            stopping: None,
            moving: None,
            releasing: Vec::new(),
            asked: None,
            delegated: None,
            tally: Tally::new(totals),
        }
    }

    /// Back to the state before the queue was started. What the front-end set beside the ring (enable, call) stays:
    /// vhost-user keeps it over a stop. So do totals.
    pub(super) fn stopped(&mut self) {
        let Ring {
            index: _,
            kick,
            piles_up,
            call: _,
            enabled: _,
            logged: _,
            faulted,
            ready,
            armed,
            unheard,
            stopping,
            moving,
            releasing,
            asked,
            delegated,
            tally: _,
        } = self;
        *kick = Kick::Manual;
        *piles_up = false;
        *faulted = false;
        *ready = false;
        *armed = false;
        *unheard = false;
        *stopping = None;
        *moving = None;
        releasing.clear();
        *asked = None;
        *delegated = None;
    }

    /// What the driver or front-end set beside the ring goes in a reset.
    pub(super) fn forget_driver(&mut self) {
        self.enabled = false;
        self.call = None;
        self.logged = None;
    }

    /// Whether nothing but the device's state keeps the ring from being served.
    pub(super) fn may_serve(&self) -> bool {
        self.enabled && self.may_finish()
    }

    /// The same for what was taken before: a ring that is disabled takes nothing new, but finishes.
    pub(super) fn may_finish(&self) -> bool {
        !self.faulted && self.stopping.is_none() && self.moving.is_none()
    }
}

impl WaitFor {
    /// Whether a change may take place with this many chains out.
    pub(super) fn satisfied(self, outstanding: usize) -> bool {
        self != WaitFor::OldChainsGone || outstanding == 0
    }
}
