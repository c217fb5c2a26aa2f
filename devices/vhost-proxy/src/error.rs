//! Why a proxy cannot be made, or cannot go on.
use std::io;

use device_state::StateError;
use vhost_user::Error;

/// Something is wrong with the back-end, or between it and this device.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ProxyError {
    /// Nobody listens, or no connection is to be had now.
    #[error("cannot connect to the back-end")]
    Connect(#[source] io::Error),
    /// No files or threads left, most likely.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The back-end is gone, too slow, says nonsense, or refuses a message.
    #[error("the back-end: {0}")]
    Protocol(#[from] Error),
    /// It has no `VERSION_1`, and there is no other interface here (virtio 1.4, 6.2).
    #[error("the back-end does not offer VERSION_1")]
    Legacy,
    /// It has fewer queues than the device is to have.
    #[error("the back-end has {has} queues, not {wanted}")]
    Queues {
        /// What it has.
        has: u64,
        /// What there has to be.
        wanted: u16,
    },
    /// A queue count or size that no vhost-user device can have.
    #[error("{0} is impossible")]
    Options(&'static str),
    /// Its configuration space cannot be read.
    #[error("the back-end does not answer for its configuration space")]
    Config,
    /// A back-end that came back is another one than before: going on would break the driver.
    #[error("the back-end that came back has other {0}")]
    Changed(&'static str),
    /// It did not accept the features at FEATURES_OK.
    #[error("the back-end does not accept the driver's features")]
    Features,
    /// It has less room for memory regions than the guest has of them.
    #[error("the guest's memory has {regions} regions, the back-end takes {slots}")]
    Slots {
        /// Regions with a file.
        regions: usize,
        /// What the back-end takes.
        slots: u64,
    },
    /// A ring is in memory that has no file behind it, or across two regions.
    #[error("the ring of queue {queue} is not in one region of memory that can be shared")]
    RingMemory {
        /// The queue.
        queue: u16,
    },
    /// Memory at addresses that no user address can stand for.
    #[error("the memory region at {0:#x} is too high")]
    High(u64),
    /// A back-end died with requests that nobody knows any more: it does not track what is in flight.
    #[error("the back-end was lost with requests of queue {queue}, and does not track them")]
    Lost {
        /// The queue.
        queue: u16,
    },
    /// The log of dirty pages has no file that could be shared, or the back-end cannot log.
    #[error("pages that the back-end writes cannot be logged: {0}")]
    Log(&'static str),
    /// The back-end's state is no state, or too large.
    #[error(transparent)]
    State(#[from] StateError),
}

impl ProxyError {
    /// Whether another attempt with the same or another process can succeed without the driver's help.
    pub(crate) fn may_heal(&self) -> bool {
        match self {
            ProxyError::Connect(_) | ProxyError::Io(_) => true,
            // It says so itself, and would again.
            ProxyError::Protocol(error) => !matches!(error, Error::Refused { .. } | Error::Argument(_)),
            _ => false,
        }
    }
}
