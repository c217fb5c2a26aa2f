//! The virtio block device (type 2, virtio 1.4 section 5.2): a disk, on as many queues as the VMM wants, each with a lane of
//! its own.
//!
//! | module | what for |
//! |---|---|
//! | [`Image`] (`backend/`) | what the disk's bytes are kept in: a file, a block device, memory |
//! | `request.rs` | what a chain asks for, and whether it makes sense |
//! | `io/` | how a request gets to the image: by the lane, by io_uring, by a thread that may block |
//! | [`BlockWorker`] (`worker.rs`) | serves one queue |
//! | `config.rs` | the configuration space |
//! | `shared.rs`, `state.rs`, `controls.rs` | what lanes share; what is saved; what an operator sees and changes |
//!
//! Offered are RO, FLUSH, CONFIG_WCE, TOPOLOGY, BLK_SIZE, SEG_MAX, SIZE_MAX, GEOMETRY, MQ, DISCARD and WRITE_ZEROES, and
//! nothing else: no zones, no secure erase, no lifetime.
//!
//! A write is on the storage before it is answered unless the driver has said that it flushes: by FLUSH, or by the writeback
//! register (5.2.6.2). Requests are answered in whatever order they are done; a flush covers what was answered before it
//! came, so it waits for nothing but the image.
pub mod backend;
mod config;
mod controls;
mod io;
mod request;
mod shared;
mod state;
mod worker;

use std::num::NonZeroUsize;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use reactor::{BlockingPool, Mail};
use vm_virtio::controls::{ControlRequest, Controls};
use vm_virtio::limit::RateLimit;
use vm_virtio::{
    ConfigSpace, ConfigWriter, DeviceError, DeviceState, DeviceType, Features, HostError, HostReply,
    QueueSpec, StateError, VirtioDevice,
};

use config::Told;
use request::{ID, feature};
use shared::Shared;
use worker::Setup;

pub use backend::{Format, Image, OpenError};
pub use io::Aio;
pub use worker::{BlockWorker, Order};

/// Bytes of a sector: the unit of the standard, whatever the disk's blocks are.
pub const SECTOR: u64 = 512;

/// Most queues of a disk.
pub const MAX_QUEUES: u16 = 64;
/// Entries of a queue, at most.
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// What a disk is like, beyond its image.
#[derive(Clone, Debug)]
pub struct Options {
    /// The guest cannot write.
    pub read_only: bool,
    /// What GET_ID tells, at most 20 bytes of ASCII.
    pub serial: String,
    /// Queues, 1 to [`MAX_QUEUES`].
    pub num_queues: u16,
    /// Most entries of a queue: a power of two from 4 to [`MAX_QUEUE_SIZE`].
    pub queue_size: u16,
    /// Bytes of a block as the guest is told: a power of two from 512 to 65536. None: as the image is.
    pub block_size: Option<u32>,
    /// Each write is on the storage before it is answered, unless the guest chooses otherwise by CONFIG_WCE.
    pub write_through: bool,
    /// The guest may give ranges back, if the image can.
    pub discard: bool,
    /// How requests get to the image.
    pub aio: Aio,
    /// What the guest gets in a period.
    pub limit: Option<RateLimit>,
    /// What the operator is told that the image is.
    pub name: String,
    /// Threads for what may block: those of the whole process.
    pub pool: BlockingPool,
}

impl Options {
    /// One queue of 256 entries, writable, with everything that the image can.
    pub fn new(pool: BlockingPool) -> Options {
        Options {
            read_only: false,
            serial: String::new(),
            num_queues: 1,
            queue_size: 256,
            block_size: None,
            write_through: false,
            discard: true,
            aio: Aio::Auto,
            limit: None,
            name: String::new(),
            pool,
        }
    }

    /// A pool for a device that has nobody to share one with.
    pub fn own_pool() -> BlockingPool {
        BlockingPool::new(const { NonZeroUsize::new(8).unwrap() })
    }

    /// Whether they make sense for this image.
    ///
    /// # Errors
    /// The first that does not.
    pub fn check(&self, image: &dyn Image) -> Result<(), OptionsError> {
        let geometry = image.geometry();
        if !(1..=MAX_QUEUES).contains(&self.num_queues) {
            return Err(OptionsError::NumQueues(self.num_queues));
        }
        if !self.queue_size.is_power_of_two() || !(4..=MAX_QUEUE_SIZE).contains(&self.queue_size) {
            return Err(OptionsError::QueueSize(self.queue_size));
        }
        if self.serial.len() > ID || !self.serial.bytes().all(|byte| matches!(byte, b' '..=b'~')) {
            return Err(OptionsError::Serial(self.serial.clone()));
        }
        if let Some(size) = self.block_size {
            if !size.is_power_of_two() || !(512..=1 << 16).contains(&size) {
                return Err(OptionsError::BlockSize(size));
            }
            if size < geometry.block {
                return Err(OptionsError::SmallBlocks { size, least: geometry.block });
            }
            if u64::from(size) > geometry.bytes {
                return Err(OptionsError::LargeBlocks { size, bytes: geometry.bytes });
            }
        }
        Ok(())
    }
}

/// Options that make no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum OptionsError {
    /// No, or too many queues.
    #[error("{0} queues are not between 1 and {MAX_QUEUES}; use a number in that range")]
    NumQueues(u16),
    /// No size of a queue.
    #[error("a queue of {0} entries is none; use a power of two between 4 and {MAX_QUEUE_SIZE}")]
    QueueSize(u16),
    /// No serial number.
    #[error("the serial number {0:?} is not up to {ID} printable ASCII characters; shorten it")]
    Serial(String),
    /// No size of a block.
    #[error("a block of {0} bytes is none; use a power of two between 512 and 65536")]
    BlockSize(u32),
    /// Smaller than what the storage has.
    #[error("blocks of {size} bytes are less than the {least} that the image has; use at least those")]
    SmallBlocks {
        /// What was asked for.
        size: u32,
        /// What there is.
        least: u32,
    },
    /// Not a single one fits.
    #[error("a block of {size} bytes is more than the {bytes} bytes of the image; use a smaller one")]
    LargeBlocks {
        /// What was asked for.
        size: u32,
        /// Bytes of the image.
        bytes: u64,
    },
}

/// The disk of one guest.
pub struct Block {
    features: Features,
    num_queues: u16,
    queue_size: u16,
    write_through: bool,
    shared: Arc<Shared>,
    /// CONFIG_WCE was negotiated: the driver may write the register.
    has_register: AtomicBool,
    workers: Vec<BlockWorker>,
    controls: controls::Operator,
}

impl Block {
    /// A disk that has its bytes in `image`.
    ///
    /// # Errors
    /// Options that make no sense, see [`Options::check`].
    pub fn new(image: Arc<dyn Image>, options: Options) -> Result<Block, OptionsError> {
        options.check(&*image)?;
        let geometry = image.geometry();
        let block = options.block_size.unwrap_or(geometry.block);
        let discard = options.discard && !options.read_only && geometry.discards;
        let told = Told {
            geometry: backend::Geometry { block, physical: geometry.physical.max(block), ..geometry },
            num_queues: options.num_queues,
            queue_size: options.queue_size,
            writeback: !options.write_through,
            discard,
            write_zeroes: !options.read_only,
        };
        let capacity = config::sectors(geometry.bytes, block);
        if capacity * SECTOR != geometry.bytes {
            let lost = geometry.bytes - capacity * SECTOR;
            tracing::warn!(
                image = options.name,
                "the last {lost} bytes are no whole block: the guest has not got them"
            );
        }
        let config = Arc::new(ConfigSpace::new(told.bytes(capacity)));
        let shared = Arc::new(Shared::new(image, config, &told, options.read_only, capacity, options.limit));
        shared.set_writeback(!options.write_through);
        let mut serial = [0; ID];
        serial.iter_mut().zip(options.serial.bytes()).for_each(|(to, from)| *to = from);
        let setup = Setup {
            shared: Arc::clone(&shared),
            serial,
            aio: options.aio,
            queue_size: options.queue_size,
            write_through: options.write_through,
            pool: options.pool,
        };
        let workers = (0..options.num_queues).map(|queue| BlockWorker::new(queue, setup.clone())).collect();
        Ok(Block {
            features: features(&told, options.read_only),
            num_queues: options.num_queues,
            queue_size: options.queue_size,
            write_through: options.write_through,
            has_register: AtomicBool::new(false),
            workers,
            controls: controls::Operator::new(options.name, Arc::clone(&shared), options.limit),
            shared,
        })
    }
}

/// What is offered. FLUSH always (5.2.5.2).
fn features(told: &Told, read_only: bool) -> Features {
    let mut features = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::GEOMETRY
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE;
    features.set(feature::RO, read_only);
    features.set(feature::MQ, told.num_queues > 1);
    features.set(feature::DISCARD, told.discard);
    features.set(feature::WRITE_ZEROES, told.write_zeroes);
    features
}

impl VirtioDevice for Block {
    type Worker = BlockWorker;

    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> Features {
        self.features
    }

    fn check_features(&self, driver: Features) -> bool {
        let has_register = driver.contains(feature::CONFIG_WCE);
        self.has_register.store(has_register, Ordering::Relaxed);
        if has_register && !driver.contains(feature::FLUSH) {
            // 5.2.5.2. Otherwise it stays: a front-end that comes back negotiates again for a driver that goes on.
            self.shared.set_writeback(false);
        }
        true
    }

    fn queues(&self, features: Features) -> Vec<QueueSpec> {
        let count = if features.contains(feature::MQ) { self.num_queues } else { 1 };
        (0..count).map(|lane| QueueSpec { name: "requestq", max_size: self.queue_size, lane }).collect()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::clone(&self.shared.config)
    }

    fn write_config(&mut self, offset: u32, data: &[u8], by: ConfigWriter) {
        let at = config::WRITEBACK.checked_sub(offset).and_then(|at| usize::try_from(at).ok());
        let Some(value) = at.and_then(|at| data.get(at)) else { return };
        // Everything else is the image's, wherever it is: a state of another disk is not this one's.
        if by == ConfigWriter::Migration || self.has_register.load(Ordering::Relaxed) {
            self.shared.set_writeback(*value != 0);
        }
    }

    fn controls(&self) -> Controls {
        controls::list()
    }

    fn control(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        self.controls.carry_out(request)
    }

    fn workers(&mut self, mail: &[Mail<Order>]) -> Result<Vec<BlockWorker>, DeviceError> {
        self.controls.attach(mail);
        if self.workers.is_empty() {
            return Err(DeviceError::new("the workers were made before"));
        }
        Ok(std::mem::take(&mut self.workers))
    }

    fn save(&self, _workers: &[BlockWorker]) -> Result<DeviceState, StateError> {
        let now = Instant::now();
        let limit = self.shared.limiter().and_then(|limiter| Some(limiter.as_ref()?.save(now)));
        DeviceState::encode(state::VERSION, &state::BlockV1 { limit })
    }

    fn restore(&mut self, _workers: &mut [BlockWorker], state: &DeviceState) -> Result<(), StateError> {
        let state::BlockV1 { limit } = state.decode(state::VERSION)?;
        // A limit that only one of both has is the host's to decide.
        if let (Some(saved), Some(mut limiter)) = (limit, self.shared.limiter())
            && let Some(limiter) = limiter.as_mut()
        {
            limiter.restore(&saved, Instant::now());
        }
        Ok(())
    }

    fn reset(&mut self, workers: &mut [BlockWorker]) {
        workers.iter_mut().for_each(BlockWorker::reset);
        self.has_register.store(false, Ordering::Relaxed);
        self.shared.set_writeback(!self.write_through);
        self.shared.image.forget_losses();
    }
}
