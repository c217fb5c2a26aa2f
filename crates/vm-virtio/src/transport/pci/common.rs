//! The common configuration structure (4.1.4.3).
use super::Pci;
use crate::device::VirtioDevice;
use crate::transport::mmio::{set_high, set_low};
use crate::transport::registers::{QueueRegisters, Seen};
use crate::{Features, Status};
use std::sync::atomic::Ordering;

impl<D: VirtioDevice> Pci<D> {
    #[inline]
    fn queue_select(&self) -> u32 {
        u32::from(self.selected.queue.load(Ordering::Relaxed))
    }

    /// The selected queue; without the lock there is none to see while it ends.
    #[inline]
    fn queue<const LOCK: bool>(&self) -> Option<Seen<'_>> {
        let queue = self.queue_select();
        if LOCK { Some(self.registers.queue(queue)) } else { self.registers.glance(queue) }
    }

    /// The selected queue, if it exists.
    #[inline]
    fn existing_queue(&self) -> Option<u16> {
        let queue = self.selected.queue.load(Ordering::Relaxed);
        (queue < self.queues).then_some(queue)
    }

    fn has(&self, feature: Features) -> bool {
        self.engine().driver_features().contains(feature)
    }

    /// The driver reads a field. Whether there is one of that width; without `LOCK` those that take a lock are not.
    #[inline]
    pub(super) fn read_common<const LOCK: bool>(&self, offset: u64, data: &mut [u8]) -> bool {
        let Some((value, width)) = self.field::<LOCK>(offset) else { return false };
        let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
        match (width, data) {
            (1, [one]) => *one = a,
            (2, [one, two]) => (*one, *two) = (a, b),
            // Also the lower half of an address.
            (4 | 8, [one, two, three, four]) => (*one, *two, *three, *four) = (a, b, c, d),
            (8, data @ [_, _, _, _, _, _, _, _]) => data.copy_from_slice(&[a, b, c, d, e, f, g, h]),
            _ => return false,
        }
        true
    }

    /// Value and width of a field.
    #[inline]
    fn field<const LOCK: bool>(&self, offset: u64) -> Option<(u64, u8)> {
        let selected = &self.selected;
        Some(match offset {
            0 => (selected.device_feature.load(Ordering::Relaxed).into(), 4),
            4 => {
                let word = selected.device_feature.load(Ordering::Relaxed);
                (self.registers.device_features(word).into(), 4)
            }
            8 => (selected.driver_feature.load(Ordering::Relaxed).into(), 4),
            12 if LOCK => {
                let word = selected.driver_feature.load(Ordering::Relaxed);
                (self.registers.driver_features(word).into(), 4)
            }
            16 => (self.signals.config_vector().into(), 2),
            18 => (self.queues.into(), 2),
            20 => (self.registers.status().bits().into(), 1),
            21 => (self.generation.get().shown.into(), 1),
            22 => (self.queue_select().into(), 2),
            // What does not fit was not taken.
            24 => (self.queue::<LOCK>()?.size().into(), 2),
            26 => (self.signals.queue_vector(self.queue_select()).into(), 2),
            28 => (self.queue::<LOCK>()?.is_ready().into(), 2),
            // The trivial case of 4.1.4.3: the index, since each queue has an address of its own.
            30 => (self.existing_queue().unwrap_or_default().into(), 2),
            32 => (self.queue::<LOCK>()?.desc(), 8),
            36 => (self.queue::<LOCK>()?.desc() >> 32, 4),
            40 => (self.queue::<LOCK>()?.driver(), 8),
            44 => (self.queue::<LOCK>()?.driver() >> 32, 4),
            48 => (self.queue::<LOCK>()?.device(), 8),
            52 => (self.queue::<LOCK>()?.device() >> 32, 4),
            56 if LOCK => {
                let told = self.has(Features::NOTIF_CONFIG_DATA);
                (self.existing_queue().filter(|_| told).unwrap_or_default().into(), 2)
            }
            58 => (self.queue::<LOCK>()?.is_resetting().into(), 2),
            // No administration virtqueues.
            60 | 62 => (0, 2),
            _ => return None,
        })
    }

    /// The driver writes a field that only selects. Whether it is one.
    #[inline]
    pub(super) fn select_common(&self, offset: u64, data: &[u8]) -> bool {
        if let (22, Ok(data)) = (offset, data.try_into()) {
            self.selected.queue.store(u16::from_le_bytes(data), Ordering::Relaxed);
            return true;
        }
        let select = match offset {
            0 => &self.selected.device_feature,
            8 => &self.selected.driver_feature,
            _ => return false,
        };
        let Ok(data) = data.try_into() else { return false };
        select.store(u32::from_le_bytes(data), Ordering::Relaxed);
        true
    }

    /// The driver writes another field.
    pub(super) fn write_common(&self, offset: u64, data: &[u8]) {
        let registers = &self.registers;
        let queue = self.queue_select();
        let known = match *data {
            [status] if offset == 20 => {
                registers.set_status(Status::from_bits_retain(status));
                true
            }
            [low, high] => self.set_field_16(offset, u16::from_le_bytes([low, high])),
            [a, b, c, d] => self.set_field_32(offset, u32::from_le_bytes([a, b, c, d])),
            [a, b, c, d, e, f, g, h] => {
                let value = u64::from_le_bytes([a, b, c, d, e, f, g, h]);
                area(offset).is_some_and(|(area, half)| {
                    half == 0 && {
                        registers.set_queue(queue, |queue| *area(queue) = value);
                        true
                    }
                })
            }
            _ => false,
        };
        if !known {
            registers.ignored.note();
        }
    }

    fn set_field_16(&self, offset: u64, value: u16) -> bool {
        let registers = &self.registers;
        let queue = self.queue_select();
        match (offset, value) {
            (16, vector) => self.signals.set_config_vector(vector),
            (24, size) if self.may_have(queue, size) => {
                registers.set_queue(queue, |queue| queue.size = size.into());
            }
            (26, vector) => {
                if !self.signals.set_queue_vector(queue, vector) {
                    return false;
                }
                if self.signals.file(queue).is_some() {
                    registers.renew_call(queue);
                }
            }
            (28, 1) => {
                registers.enable(queue);
            }
            (58, 1) => registers.reset_queue(queue),
            _ => return false,
        }
        true
    }

    fn set_field_32(&self, offset: u64, value: u32) -> bool {
        match (offset, area(offset)) {
            (12, _) => {
                let word = self.selected.driver_feature.load(Ordering::Relaxed);
                self.registers.set_driver_features(word, value);
            }
            (_, Some((area, half))) => {
                let set = if half == 0 { set_low } else { set_high };
                self.registers.set_queue(self.queue_select(), |queue| set(area(queue), value));
            }
            _ => return false,
        }
        true
    }

    /// 4.1.4.3.1: without packed rings, the size reads as a power of two.
    fn may_have(&self, queue: u32, size: u16) -> bool {
        (1..=self.registers.queue_max(queue)).contains(&size)
            && (size.is_power_of_two() || self.has(Features::RING_PACKED))
    }
}

/// One of the addresses of a queue.
type Area = fn(&mut QueueRegisters) -> &mut u64;

/// Which address of a queue is at this offset, and which half of it.
fn area(offset: u64) -> Option<(Area, u64)> {
    let area: Area = match offset {
        32 | 36 => |queue| &mut queue.desc,
        40 | 44 => |queue| &mut queue.driver,
        48 | 52 => |queue| &mut queue.device,
        _ => return None,
    };
    Some((area, offset / 4 % 2))
}
