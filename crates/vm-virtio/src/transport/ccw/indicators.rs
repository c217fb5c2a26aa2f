//! Indicators: bits in guest memory that tell which queue, or that the configuration, has news (4.3.2.6, 4.3.3.1).
//!
//! The byte that holds a bit is changed in one access. A reset forgets every indicator, and whoever is about to set one is
//! through when it returns (4.3.3.3.1).
use crate::memory::GuestBuf;
use crate::transport::registers::Signals;
use crate::{Access, DirtyLog, GuestAddress, GuestRam, Interrupt};
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

/// How interrupts reach the guest. Called from lanes: must not block.
pub trait ChannelInterrupts: Send + Sync {
    /// An unsolicited I/O interrupt of the device's subchannel: it becomes status pending with alert status, unless
    /// something is pending there already.
    fn subchannel(&self);
    /// An adapter interrupt of this interruption subclass (0 to 7).
    fn adapter(&self, isc: u8);
}

/// Where the driver wants to hear of queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
    /// 64 bits, and interrupts of the subchannel.
    Classic(u64),
    /// A summary byte, a bit for each queue from this one on, and adapter interrupts.
    Adapter { summary: u64, area: u64, bit: u64, isc: u8 },
}

struct Byte {
    buf: GuestBuf,
    addr: u64,
}

impl Byte {
    fn pin(ram: &GuestRam, addr: u64, len: u64) -> Option<Byte> {
        Some(Byte { buf: ram.pin(GuestAddress(addr), len, Access::Write).ok()?, addr })
    }

    /// Sets bits in byte `at` of the area; what was there before.
    fn set(&self, at: u64, bits: u8, log: Option<&Arc<DirtyLog>>) -> Option<u8> {
        let mut left = usize::try_from(at).ok()?;
        for segment in self.buf.segments() {
            if left < segment.len() {
                let before = segment.fetch_or(left, bits);
                if let Some(log) = log {
                    log.mark(self.addr.checked_add(at)?, 1);
                }
                return before;
            }
            left -= segment.len();
        }
        None
    }
}

enum Route {
    Classic(Byte),
    Adapter { summary: Byte, area: Byte, bit: u64, isc: u8 },
}

#[derive(Default)]
struct Routes {
    ram: Option<GuestRam>,
    log: Option<Arc<DirtyLog>>,
    place: Option<Place>,
    route: Option<Route>,
    config: Option<u64>,
    config_route: Option<Byte>,
}

/// The indicators of a device.
pub(super) struct Indicators {
    queues: AtomicU64,
    routes: RwLock<Routes>,
    up: Arc<dyn ChannelInterrupts>,
}

impl Indicators {
    pub(super) fn new(up: Arc<dyn ChannelInterrupts>) -> Self {
        Indicators { queues: AtomicU64::new(0), routes: RwLock::default(), up }
    }

    /// How many queues the device has, before a driver can see it.
    pub(super) fn set_queues(&self, count: usize) {
        self.queues.store(count as u64, Ordering::Relaxed);
    }

    fn read(&self) -> RwLockReadGuard<'_, Routes> {
        self.routes.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Routes> {
        self.routes.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Memory changed: indicators are where they were, unless there is no memory any more.
    pub(super) fn set_ram(&self, ram: GuestRam) {
        let mut routes = self.write();
        routes.route = routes.place.and_then(|place| self.resolve(&ram, place));
        routes.config_route = routes.config.and_then(|addr| Byte::pin(&ram, addr, 8));
        routes.ram = Some(ram);
    }

    pub(super) fn ram(&self) -> GuestRam {
        self.read().ram.clone().unwrap_or_else(GuestRam::empty)
    }

    pub(super) fn set_log(&self, log: Option<Arc<DirtyLog>>) {
        self.write().log = log;
    }

    pub(super) fn log(&self) -> Option<Arc<DirtyLog>> {
        self.read().log.clone()
    }

    fn resolve(&self, ram: &GuestRam, place: Place) -> Option<Route> {
        match place {
            Place::Classic(addr) => Some(Route::Classic(Byte::pin(ram, addr, 8)?)),
            Place::Adapter { summary, area, bit, isc } => {
                let first = bit / 8;
                let bytes = bit.checked_add(self.queues.load(Ordering::Relaxed))?.div_ceil(8) - first;
                let area = Byte::pin(ram, area.checked_add(first)?, bytes.max(1))?;
                Some(Route::Adapter { summary: Byte::pin(ram, summary, 1)?, area, bit: bit % 8, isc })
            }
        }
    }

    /// Where queues are told of. `None`: it is not memory, nothing changes.
    pub(super) fn set_place(&self, place: Option<Place>) -> Option<()> {
        let mut routes = self.write();
        let route = match (place, &routes.ram) {
            (None, _) => None,
            (Some(place), Some(ram)) => Some(self.resolve(ram, place)?),
            (Some(_), None) => return None,
        };
        (routes.place, routes.route) = (place, route);
        Some(())
    }

    /// Where changes of the configuration are told of; 0 is nowhere. `None`: it is not memory, nothing changes.
    pub(super) fn set_config(&self, addr: u64) -> Option<()> {
        let mut routes = self.write();
        let (config, route) = match (addr, &routes.ram) {
            (0, _) => (None, None),
            (addr, Some(ram)) => (Some(addr), Some(Byte::pin(ram, addr, 8)?)),
            _ => return None,
        };
        (routes.config, routes.config_route) = (config, route);
        Some(())
    }

    /// Where queues and the configuration are told of.
    pub(super) fn places(&self) -> (Option<Place>, Option<u64>) {
        let routes = self.read();
        (routes.place, routes.config)
    }

    fn queue(&self, queue: u16) {
        let routes = self.read();
        let log = routes.log.as_ref();
        match &routes.route {
            // 64 bits, big-endian: queue 0 is the last bit. There is none for queues beyond.
            Some(Route::Classic(bits)) => {
                let set = (queue < 64).then(|| bits.set(u64::from(7 - queue / 8), 1 << (queue % 8), log));
                if set.flatten().is_some() {
                    self.up.subchannel();
                }
            }
            // Counted from the left.
            Some(Route::Adapter { summary, area, bit, isc }) => {
                let bit = bit + u64::from(queue);
                let set = area.set(bit / 8, 0x80 >> (bit % 8), log);
                // 4.3.3.1.2.1: who has not looked since the last interrupt needs no other.
                if set.is_some() && summary.set(0, 1, log) == Some(0) {
                    self.up.adapter(*isc);
                }
            }
            _ => {}
        }
        if let Some(log) = log {
            log.signal();
        }
    }
}

impl Signals for Indicators {
    fn config_changed(&self) {
        let routes = self.read();
        if let Some(bits) = &routes.config_route
            && bits.set(7, 1, routes.log.as_ref()).is_some()
        {
            self.up.subchannel();
        }
    }

    fn mute(&self) {
        let mut routes = self.write();
        (routes.place, routes.route) = (None, None);
        (routes.config, routes.config_route) = (None, None);
    }

    fn unmute(&self) {}
}

/// The interrupt of one queue.
pub(super) struct QueueIndicator {
    pub(super) indicators: Arc<Indicators>,
    pub(super) queue: u16,
}

impl Interrupt for QueueIndicator {
    fn signal(&self) {
        self.indicators.queue(self.queue);
    }
}
