//! What a back-end is to be brought to, and what it was told so far.
//!
//! The worker only says what it wants ([`Target`]); [`Link`](crate::link::Link) compares that with what this back-end knows
//! ([`Told`]) and sends what is missing. A back-end that has just come back knows nothing, so the same code starts a device,
//! follows its changes and brings it back after a loss.
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_user::InflightArea;
use vm_virtio::memory::FileRegion;
use vm_virtio::{DirtyLog, Features, GuestAddress, GuestRam, QueueConfig, QueueState, Stop};

/// The buffer of what is in flight, kept here: its contents are the back-ends'.
#[derive(Debug)]
pub(crate) struct Inflight {
    pub(crate) area: InflightArea,
    pub(crate) file: OwnedFd,
}

/// What is wanted of one ring.
#[derive(Clone, Debug)]
pub(crate) struct Ring {
    /// Of this hand-over: no two have the same.
    pub(crate) serial: u64,
    pub(crate) config: QueueConfig,
    /// Where it went over.
    pub(crate) state: QueueState,
    /// A back-end may have served it since.
    pub(crate) ran: bool,
    pub(crate) kick: Option<Arc<OwnedFd>>,
    /// With a number that changes with it.
    pub(crate) call: (u64, Option<Arc<OwnedFd>>),
    pub(crate) err: Arc<OwnedFd>,
    pub(crate) enabled: bool,
    pub(crate) logged: Option<GuestAddress>,
    /// It is to be stopped.
    pub(crate) stop: Option<Stop>,
}

/// A write to the configuration space that is to be passed on.
#[derive(Clone, Debug)]
pub(crate) struct Write {
    pub(crate) offset: u32,
    pub(crate) data: Vec<u8>,
    /// By whoever restores a migrated device.
    pub(crate) migration: bool,
}

/// What is wanted of the back-end.
#[derive(Clone)]
pub(crate) struct Target {
    /// Changes with every reset of the device.
    pub(crate) epoch: u64,
    /// Between DRIVER_OK and reset.
    pub(crate) session: Option<Features>,
    pub(crate) ram: GuestRam,
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// By number.
    pub(crate) rings: Vec<Option<Ring>>,
    pub(crate) inflight: Option<Arc<Inflight>>,
    /// Entries of each queue that a new one has to have room for.
    pub(crate) inflight_size: u16,
    /// A state to begin with.
    pub(crate) load: Option<Arc<Vec<u8>>>,
    /// The state is wanted once all rings are stopped.
    pub(crate) save: bool,
    pub(crate) writes: Vec<Write>,
    /// The configuration space, and the status, are to be read again.
    pub(crate) refresh: bool,
}

/// What a back-end was told of one ring that it has.
#[derive(Clone, Debug)]
pub(crate) struct ToldRing {
    pub(crate) serial: u64,
    pub(crate) call: u64,
    pub(crate) enabled: bool,
    pub(crate) logged: Option<GuestAddress>,
}

/// What a back-end was told.
#[derive(Default)]
pub(crate) struct Told {
    /// The reset after which all of this was said; none: nothing was, and it may have come from another front-end.
    pub(crate) epoch: Option<u64>,
    /// SET_FEATURES.
    pub(crate) features: Option<u64>,
    pub(crate) regions: Vec<FileRegion>,
    pub(crate) log: Option<Arc<DirtyLog>>,
    /// SET_INFLIGHT_FD.
    pub(crate) tracks: bool,
    /// DRIVER_OK.
    pub(crate) ready: bool,
    pub(crate) rings: Vec<Option<ToldRing>>,
}

/// What came of it.
#[derive(Default)]
pub(crate) struct Report {
    /// Rings that are stopped: number, serial, where.
    pub(crate) stopped: Vec<(u16, u64, QueueState)>,
    /// A new buffer of what is in flight.
    pub(crate) inflight: Option<Arc<Inflight>>,
    /// The configuration space, read again.
    pub(crate) config: Option<Vec<u8>>,
    /// The state of the back-end.
    pub(crate) state: Option<Vec<u8>>,
    /// It took the state it was given.
    pub(crate) loaded: bool,
    /// It says that it needs a reset.
    pub(crate) needs_reset: bool,
    /// Writes to the configuration space that it refused.
    pub(crate) refused_writes: u64,
}

impl Report {
    pub(crate) fn has_stopped(&self, queue: u16, serial: u64) -> bool {
        self.stopped.iter().any(|(number, ring, _)| (*number, *ring) == (queue, serial))
    }
}
