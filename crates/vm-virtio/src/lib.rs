//! Virtio devices: guest memory, virtqueues, the traits a device implements and the engine that runs it.
//!
//! A device implements [`VirtioDevice`] and one [`Worker`] per lane; the [`Engine`] owns everything that virtio
//! demands of *every* device: negotiation, the status machine, the life of queues, reset, faults. A host (the daemon
//! host `vhost-device`, or a transport inside a VMM) translates registers or messages into calls of the engine and
//! decides which threads carry the lanes.
//!
//! | module | what for |
//! |---|---|
//! | [`memory`] | [`GuestRam`]: an immutable snapshot of guest memory, volatile segments |
//! | [`queue`] | [`Queue`]: split and packed virtqueues, chains, readers and writers |
//! | [`device`] | [`VirtioDevice`], [`Worker`]: what a device writes |
//! | [`delegated`] | queues that another process or the kernel serves |
//! | [`lane`] | [`LaneRunner`]: kicks, publishing, arming, budgets, faults of a set of queues |
//! | [`limit`] | [`RateLimit`](limit::RateLimit): bytes and operations in a period |
//! | [`engine`] | [`Engine`]: status machine, feature rules, queue life cycle, reset |
//! | [`upcall`], [`shared_memory`] | what workers ask of their host; regions of shared memory |
//! | [`host_request`], [`controls`] | what a host asks of a device beyond virtio; properties and commands |
//! | [`transport`] | what a driver sees inside a VMM: virtio-mmio |
//! | [`features`], [`status`], [`config`] | feature bits, status bits, configuration space |

pub mod config;
pub mod controls;
pub mod delegated;
pub mod device;
pub mod engine;
pub mod features;
pub mod host_request;
pub mod lane;
pub mod limit;
pub mod memory;
pub mod queue;
pub mod shared_memory;
pub mod status;
mod ticket;
pub mod transport;
pub mod upcall;

pub use config::{ConfigError, ConfigSpace};
pub use device::{
    ConfigWriter, DeviceError, DeviceState, HostEvent, HostEvents, Lane, QueueSpec, Queues, Session,
    StateError, Stop, VirtioDevice, Worker,
};
pub use engine::{
    Engine, EngineAndLanes, EngineError, EngineOptions, FeatureError, Notification, QueueResetError,
    QueueStart, SavedQueue, SnapshotError, SuspendError,
};
pub use features::{DeviceType, Features};
pub use host_request::{HostError, HostFile, HostReply, HostRequest, HostRequests, ObjectId};
pub use lane::{Call, EventFd, Interrupt, Kick, LaneRunner, StartError, StopError, WaitFor};
pub use memory::{Access, DirtyLog, GuestAddress, GuestRam, MemFault, Segment};
pub use queue::{Chain, InflightError, InflightRegion, Queue, QueueConfig, QueueError, QueueState, RingPos};
pub use shared_memory::{Mappings, ShmRange, ShmRegion};
pub use status::Status;
pub use ticket::Ticket;
pub use upcall::{
    Responder, Upcall, UpcallError, UpcallHandler, UpcallId, UpcallReply, UpcallRequest, UpcallResult,
};
