//! A virtio device whose other half is any vhost-user back-end: our own daemons, QEMU's storage daemon, virtiofsd. A VMM
//! that has our transports gets their devices like those that it links in.
//!
//! The rings are [delegated](vm_virtio::delegated): the back-end gets them with the guest's memory and the VMM's own files for
//! kicks and interrupts, so that the proxy adds nothing to the path of a request.
//!
//! | module | what for |
//! |---|---|
//! | [`ProxyOptions`] (`options.rs`) | what the VMM decides |
//! | `offer.rs` | what a back-end offers, and whether it can take the place of another |
//! | `target.rs` | what is wanted of it, what it was told, what came of it |
//! | `link.rs`, `transfer.rs` | a connection: the messages, in their order |
//! | [`ProxyWorker`] (`worker.rs`) | between lane and link: what is wanted, losing and finding back-ends |
//! | `state.rs` | what is saved |
//!
//! A back-end that dies is looked for until it is back; then everything is negotiated again, rings go on, and what was in
//! flight is taken again from the buffer that is kept here (`VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD`). The device needs a reset
//! if it stays away too long, if another one comes in its place, or if requests are lost for want of that buffer.
#![deny(missing_docs, unsafe_op_in_unsafe_fn)]
#![forbid(unsafe_code)]
mod error;
mod link;
mod offer;
mod options;
mod state;
mod target;
mod transfer;
mod worker;

use std::fmt;
use std::io;
use std::num::NonZeroUsize;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

use reactor::{BlockingPool, Mail};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost_user::{BackendListener, FrontendEndpoint, ProtocolFeatures};
use vm_virtio::{
    ConfigSpace, ConfigWriter, DeviceError, DeviceState, DeviceType, Features, QueueSpec, StateError,
    VirtioDevice,
};

pub use error::ProxyError;
use link::Link;
use offer::{Fresh, Offer};
pub use options::{ConfigSource, MAX_QUEUES, ProxyOptions};
use state::ProxyV1;
use target::Write;
pub use worker::{ConfigWrite, ProxyMsg, ProxyWorker};

/// Makes connections to the back-end. Must not block.
type Connector = Box<dyn Fn() -> io::Result<UnixStream> + Send + Sync>;

/// What happened to a back-end so far (failure policy 8: every failure is counted).
#[derive(Debug, Default)]
pub struct ProxyStats {
    /// Whether there is a connection now.
    pub connected: AtomicBool,
    /// Connections that were negotiated.
    pub connections: AtomicU64,
    /// Connections that were lost, and attempts that failed.
    pub losses: AtomicU64,
    /// Writes to the configuration space that the back-end refused.
    pub refused_writes: AtomicU64,
    /// Writes to the configuration space that came faster than they could be passed on.
    pub dropped_writes: AtomicU64,
}

/// What the device and its worker know.
pub(crate) struct Shared {
    options: ProxyOptions,
    connector: Connector,
    pool: BlockingPool,
    /// Of the first back-end, which the driver goes by.
    first: Arc<Offer>,
    stats: Arc<ProxyStats>,
}

impl Shared {
    fn connect(&self) -> Result<Fresh, ProxyError> {
        connect(&self.connector, &self.options)
    }
}

fn connect(connector: &Connector, options: &ProxyOptions) -> Result<Fresh, ProxyError> {
    let stream = connector().map_err(ProxyError::Connect)?;
    Offer::ask(FrontendEndpoint::new(stream), options)
}

/// A device that is served by a back-end.
pub struct Proxy {
    shared: Arc<Shared>,
    config: Arc<ConfigSpace>,
    /// Until there is a worker.
    begin: Option<(Link, Option<BackendListener>)>,
    mail: Option<Mail<ProxyMsg>>,
}

impl Proxy {
    /// The device behind the back-end that listens on this socket. Waits for its answers, no longer than
    /// [`ProxyOptions::patience`]: features, queues and configuration have to be known from the beginning on.
    ///
    /// # Errors
    /// Nobody listens; what is there is no back-end, or none for these options.
    pub fn connect(path: impl AsRef<Path>, options: ProxyOptions) -> Result<Proxy, ProxyError> {
        let address =
            SocketAddrUnix::new(path.as_ref()).map_err(|error| ProxyError::Connect(error.into()))?;
        Proxy::with(
            move || {
                // A blocking one would wait without an end while the listener's queue is full.
                let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
                let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                rustix::net::connect(&socket, &address)?;
                Ok(UnixStream::from(socket))
            },
            options,
        )
    }

    /// The same, with connections from wherever they come: `connector` is called now, and again whenever one was lost. It
    /// must not block, and is called on threads of the pool.
    ///
    /// # Errors
    /// As [`Proxy::connect`].
    pub fn with(
        connector: impl Fn() -> io::Result<UnixStream> + Send + Sync + 'static,
        options: ProxyOptions,
    ) -> Result<Proxy, ProxyError> {
        options.check()?;
        let connector: Connector = Box::new(connector);
        let Fresh { endpoint, offer, channel } = connect(&connector, &options)?;
        let config = Arc::new(ConfigSpace::new(offer.config.clone()));
        let pool = options.pool.clone().unwrap_or_else(|| BlockingPool::new(NonZeroUsize::MIN));
        let stats = Arc::new(ProxyStats::default());
        let first = Arc::new(offer);
        let link = Link::new(endpoint, first.clone(), None);
        let shared = Arc::new(Shared { options, connector, pool, first, stats });
        Ok(Proxy { shared, config, begin: Some((link, channel)), mail: None })
    }

    /// What happened to the back-end so far; stays readable beside the engine.
    pub fn stats(&self) -> Arc<ProxyStats> {
        self.shared.stats.clone()
    }

    /// Whether pages that the back-end writes can be logged, for a live migration. The log then has to have a file
    /// ([`SharedMemory::file`](vm_virtio::memory::SharedMemory::file)); without either, [`Engine::log`](vm_virtio::Engine::log)
    /// makes the device need a reset.
    pub fn can_log(&self) -> bool {
        self.shared.first.logs
    }

    fn pass_on(&self, write: Write) {
        let message = ProxyMsg::Write(ConfigWrite(write));
        if self.mail.as_ref().is_some_and(|mail| mail.send(message).is_err()) {
            self.shared.stats.dropped_writes.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        }
    }
}

impl fmt::Debug for Proxy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Proxy").field("offer", &self.shared.first).finish_non_exhaustive()
    }
}

impl VirtioDevice for Proxy {
    type Worker = ProxyWorker;

    fn device_type(&self) -> DeviceType {
        self.shared.options.device_type
    }

    fn features(&self) -> Features {
        self.shared.first.features - Features::NOT_A_DEVICES
    }

    fn ring_features(&self) -> Features {
        // A ring is reset by stopping it. What else a host can carry stays with it: kicks have no data here, and neither
        // SUSPEND nor translations are passed on.
        self.shared.first.features & (Features::RING | Features::RING_RESET)
    }

    fn queues(&self, _features: Features) -> Vec<QueueSpec> {
        let max_size = self.shared.options.queue_size;
        (0..self.shared.first.queues).map(|_| QueueSpec { name: "proxied", max_size, lane: 0 }).collect()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    fn write_config(&mut self, offset: u32, data: &[u8], by: ConfigWriter) {
        let migration = by == ConfigWriter::Migration;
        if migration && !matches!(self.config.set(offset, data), Ok(true)) {
            // The same as here, most likely: back-ends need not know how to be told.
            return;
        }
        let fixed = matches!(self.shared.options.config, ConfigSource::Fixed(_));
        if !fixed && self.shared.first.protocol.contains(ProtocolFeatures::CONFIG) {
            self.pass_on(Write { offset, data: data.to_vec(), migration });
        }
    }

    fn workers(&mut self, mail: &[Mail<ProxyMsg>]) -> Result<Vec<ProxyWorker>, DeviceError> {
        let (link, channel) =
            self.begin.take().ok_or_else(|| DeviceError::new("the worker was made before"))?;
        self.mail = mail.first().cloned();
        let worker = ProxyWorker::new(self.shared.clone(), self.config.clone(), link, channel)?;
        self.shared.stats.connections.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        Ok(vec![worker])
    }

    fn save(&self, workers: &[ProxyWorker]) -> Result<DeviceState, StateError> {
        if !self.shared.options.stateless
            && !self.shared.first.protocol.contains(ProtocolFeatures::DEVICE_STATE)
        {
            return Err(StateError::Unsupported);
        }
        let worker = workers.first().ok_or(StateError::Unsupported)?;
        DeviceState::encode(state::VERSION, &ProxyV1 { backend: worker.saved()? })
    }

    fn restore(&mut self, workers: &mut [ProxyWorker], state: &DeviceState) -> Result<(), StateError> {
        let worker = workers.first_mut().ok_or(StateError::Unsupported)?;
        let ProxyV1 { backend } = state.decode(state::VERSION)?;
        if backend.is_some() && !self.shared.first.protocol.contains(ProtocolFeatures::DEVICE_STATE) {
            return Err(StateError::refused(
                "the back-end here cannot take the state of the one that was saved",
            ));
        }
        worker.load(backend);
        Ok(())
    }

    fn reset(&mut self, workers: &mut [ProxyWorker]) {
        workers.iter_mut().for_each(ProxyWorker::reset);
        // It has a lane again when it reads this.
        let _ = self.mail.as_ref().map(|mail| mail.send(ProxyMsg::Reset));
    }
}
