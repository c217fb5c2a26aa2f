//! Queues that somebody else serves: another process (vhost-user), or the kernel (vhost).
//!
//! A worker with [`Worker::DELEGATES`](crate::Worker::DELEGATES) serves no ring itself. Its lane checks where a ring is,
//! hands all of it to [`Worker::queue_delegated`](crate::Worker::queue_delegated), and touches neither ring nor buffers:
//! kicks and interrupts go to and fro without it, through the host's own files. Where the host has none (registers that are
//! callbacks), the lane bridges with an eventfd. What is changed while the ring is away comes by
//! [`Worker::delegation_changed`](crate::Worker::delegation_changed), and the order counts as carried out when the worker
//! drops its [`Waiting`].
//!
//! The way back: [`Worker::queue_stop`](crate::Worker::queue_stop), answered by [`Queues::give_back`](crate::Queues::give_back)
//! at any later time. A stop, reset or suspension waits for it until its deadline; then the queue counts as stuck (failure
//! policy 7), and `queue_stop` comes once more, with [`Stop::Discard`](crate::Stop::Discard): nobody waits for this queue any
//! more, whoever has it must not go on. After a suspension the queue is handed over again, in the state in which it came back.
use crate::ticket::Completer;
use crate::{DirtyLog, GuestAddress, GuestRam, QueueConfig, QueueState};
use rustix::fd::OwnedFd;
use std::fmt;
use std::sync::Arc;

/// A ring, as it is handed over.
#[derive(Debug)]
pub struct QueueParts {
    /// Size and addresses; each area is in one piece of `ram`.
    pub config: QueueConfig,
    /// Where it goes on. Nothing is held.
    pub state: QueueState,
    /// An eventfd that the driver's kicks arrive at. None: there are no kicks, the ring has to be polled.
    pub kick: Option<OwnedFd>,
    /// An eventfd for interrupts. None: nobody wants any.
    pub call: Option<OwnedFd>,
    /// Whether buffers may be taken from it.
    pub enabled: bool,
    /// Guest memory.
    pub ram: GuestRam,
    /// Where pages that are written have to be marked.
    pub log: Option<Arc<DirtyLog>>,
    /// What is written in the ring is to be marked, too: the guest-physical address of its Device Area.
    pub logged: Option<GuestAddress>,
}

/// What is changed under whoever serves the rings.
#[derive(Debug)]
pub enum Change {
    /// Guest memory is another; also if no queue is away.
    Memory(GuestRam),
    /// The log of dirty pages is another; also if no queue is away.
    Log(Option<Arc<DirtyLog>>),
    /// What is written in the ring is logged, or no more. See [`QueueParts::logged`].
    LogRing {
        /// The queue.
        queue: u16,
        /// The guest-physical address of its Device Area.
        logged: Option<GuestAddress>,
    },
    /// The queue is enabled or disabled.
    Enabled {
        /// The queue.
        queue: u16,
        /// Whether it is enabled now.
        on: bool,
    },
    /// Interrupts go elsewhere. See [`QueueParts::call`]. The lane has sent one already.
    Call {
        /// The queue.
        queue: u16,
        /// The eventfd.
        call: Option<OwnedFd>,
    },
}

/// Somebody waits until this is dropped.
pub struct Waiting {
    _done: Arc<Completer<()>>,
}

impl Waiting {
    pub(crate) fn new(done: Arc<Completer<()>>) -> Waiting {
        Waiting { _done: done }
    }
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Waiting")
    }
}
