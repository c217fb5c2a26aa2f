//! The common configuration structure (4.1.4.3).
use super::Pci;
use crate::device::VirtioDevice;
use crate::transport::mmio::{set_high, set_low};
use crate::transport::registers::QueueRegisters;
use crate::{Features, Status};
use std::sync::atomic::Ordering;

impl<D: VirtioDevice> Pci<D> {
    fn queue_select(&self) -> u32 {
        u32::from(self.selected.queue.load(Ordering::Relaxed))
    }

    fn has(&self, feature: Features) -> bool {
        self.engine().driver_features().contains(feature)
    }

    /// A field; `None` if there is none of that width.
    pub(super) fn common(&self, offset: u64, width: usize) -> Option<u64> {
        let registers = &self.registers;
        let queue = self.queue_select();
        let set = || registers.queue(queue).unwrap_or_default();
        let exists = registers.queue_max(queue) != 0;
        let area = |at: u64, of: fn(&QueueRegisters) -> u64| {
            let value = of(&set());
            match (offset - at, width) {
                (0, 8) => Some(value),
                (0, 4) => Some(value & u64::from(u32::MAX)),
                (4, 4) => Some(value >> 32),
                _ => None,
            }
        };
        Some(match (offset, width) {
            (0, 4) => self.selected.device_feature.load(Ordering::Relaxed).into(),
            (4, 4) => registers.device_features(self.selected.device_feature.load(Ordering::Relaxed)).into(),
            (8, 4) => self.selected.driver_feature.load(Ordering::Relaxed).into(),
            (12, 4) => registers.driver_features(self.selected.driver_feature.load(Ordering::Relaxed)).into(),
            (16, 2) => self.signals.config_vector().into(),
            (18, 2) => self.queues.into(),
            (20, 1) => registers.status().bits().into(),
            (21, 1) => self.lock().shown.into(),
            (22, 2) => queue.into(),
            // What does not fit was not taken.
            (24, 2) => set().size.into(),
            (26, 2) => self.signals.queue_vector(queue).into(),
            (28, 2) => u64::from(registers.is_ready(queue)),
            (30, 2) => {
                if exists {
                    queue.into()
                } else {
                    0
                }
            }
            (32..40, _) => return area(32, |queue| queue.desc),
            (40..48, _) => return area(40, |queue| queue.driver),
            (48..56, _) => return area(48, |queue| queue.device),
            // The trivial case of 4.1.4.3: the index, since each queue has an address of its own.
            (56, 2) => {
                if exists && self.has(Features::NOTIF_CONFIG_DATA) {
                    queue.into()
                } else {
                    0
                }
            }
            (58, 2) => u64::from(registers.is_queue_resetting(queue)),
            // No administration virtqueues.
            (60 | 62, 2) => 0,
            _ => return None,
        })
    }

    /// The driver writes a field.
    pub(super) fn set_common(&self, offset: u64, width: usize, value: u64) {
        let registers = &self.registers;
        let queue = self.queue_select();
        // As wide as the access.
        let (low, short) = ((value & u64::from(u32::MAX)) as u32, (value & 0xffff) as u16);
        let area = |at: u64, of: fn(&mut QueueRegisters) -> &mut u64| match (offset - at, width) {
            (0, 8) => registers.set_queue(queue, |queue| *of(queue) = value),
            (0, 4) => registers.set_queue(queue, |queue| set_low(of(queue), low)),
            (4, 4) => registers.set_queue(queue, |queue| set_high(of(queue), low)),
            _ => registers.ignored.note(),
        };
        match (offset, width) {
            (0, 4) => self.selected.device_feature.store(low, Ordering::Relaxed),
            (8, 4) => self.selected.driver_feature.store(low, Ordering::Relaxed),
            (12, 4) => {
                registers.set_driver_features(self.selected.driver_feature.load(Ordering::Relaxed), low);
            }
            (16, 2) => self.signals.set_config_vector(short),
            (20, 1) => registers.set_status(Status::from_bits_retain((value & 0xff) as u8)),
            (22, 2) => self.selected.queue.store(short, Ordering::Relaxed),
            (24, 2) if self.may_have(queue, short) => {
                registers.set_queue(queue, |queue| queue.size = short.into());
            }
            (26, 2) => {
                if !self.signals.set_queue_vector(queue, short) {
                    registers.ignored.note();
                } else if self.signals.file(queue).is_some() {
                    registers.renew_call(queue);
                }
            }
            (28, 2) if short == 1 => {
                registers.enable(queue);
            }
            (32..40, _) => area(32, |queue| &mut queue.desc),
            (40..48, _) => area(40, |queue| &mut queue.driver),
            (48..56, _) => area(48, |queue| &mut queue.device),
            (58, 2) if short == 1 => registers.reset_queue(queue),
            _ => registers.ignored.note(),
        }
    }

    /// 4.1.4.3.1: without packed rings, the size reads as a power of two.
    fn may_have(&self, queue: u32, size: u16) -> bool {
        (1..=self.registers.queue_max(queue)).contains(&size)
            && (size.is_power_of_two() || self.has(Features::RING_PACKED))
    }
}
