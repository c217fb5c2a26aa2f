//! What the lanes of one device share with each other and with the device. No lock is among it, unless the guest's rate is
//! limited: the limit is the guest's, not a lane's, and what it slows down does not mind.
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_virtio::ConfigSpace;
use vm_virtio::limit::{Limiter, RateLimit};

use crate::backend::Image;
use crate::config::{self, Told};

pub(crate) struct Shared {
    pub(crate) image: Arc<dyn Image>,
    pub(crate) read_only: bool,
    /// Zeros may give ranges back to the storage.
    pub(crate) unmaps: bool,
    /// Bytes of a block, as the driver is told.
    pub(crate) block: u32,
    pub(crate) config: Arc<ConfigSpace>,
    /// In sectors.
    capacity: AtomicU64,
    /// The writeback register.
    writeback: AtomicBool,
    is_limited: AtomicBool,
    limiter: Mutex<Option<Limiter>>,
}

impl Shared {
    pub(crate) fn new(
        image: Arc<dyn Image>,
        config: Arc<ConfigSpace>,
        told: &Told,
        read_only: bool,
        capacity: u64,
        limit: Option<RateLimit>,
    ) -> Shared {
        Shared {
            image,
            read_only,
            unmaps: told.discard,
            block: told.geometry.block,
            config,
            capacity: AtomicU64::new(capacity),
            writeback: AtomicBool::new(false),
            is_limited: AtomicBool::new(limit.is_some()),
            limiter: Mutex::new(limit.map(Limiter::new)),
        }
    }

    #[inline]
    pub(crate) fn capacity(&self) -> u64 {
        self.capacity.load(Ordering::Relaxed)
    }

    /// The disk has so many bytes now. Whether the driver has to be told.
    pub(crate) fn set_size(&self, bytes: u64) -> bool {
        let capacity = config::sectors(bytes, self.block);
        self.capacity.store(capacity, Ordering::Relaxed);
        let mut changed = false;
        for (offset, field) in config::of_capacity(capacity) {
            // Of the second, four bytes are the geometry.
            let len = if offset == 0 { 8 } else { 4 };
            changed |= self.config.set(offset, field.get(..len).unwrap_or(&[])).unwrap_or(false);
        }
        changed
    }

    #[inline]
    pub(crate) fn writeback(&self) -> bool {
        self.writeback.load(Ordering::Relaxed)
    }

    /// The writeback register takes a value. Not a change that the driver is told of: it is the one who changes it, or
    /// it is about to read it.
    pub(crate) fn set_writeback(&self, writeback: bool) {
        self.writeback.store(writeback, Ordering::Relaxed);
        let _ = self.config.set(config::WRITEBACK, &[writeback.into()]);
    }

    /// The limit, if there is one.
    #[inline]
    pub(crate) fn limiter(&self) -> Option<MutexGuard<'_, Option<Limiter>>> {
        if self.is_limited.load(Ordering::Relaxed) { Some(self.lock()) } else { None }
    }

    fn lock(&self) -> MutexGuard<'_, Option<Limiter>> {
        self.limiter.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Another limit, or none.
    pub(crate) fn set_limit(&self, limit: Option<RateLimit>) {
        let mut limiter = self.lock();
        match (limiter.as_mut(), limit) {
            (Some(limiter), Some(limit)) => limiter.change(limit),
            (_, limit) => *limiter = limit.map(Limiter::new),
        }
        self.is_limited.store(limit.is_some(), Ordering::Relaxed);
    }
}
