//! Where a queue is and how large: may change until it becomes a [`Queue`](super::Queue), and is frozen from then on.
use super::error::{QueueArea, QueueError};
use super::ring_mem::Area;
use crate::memory::{Access, GuestAddress, GuestRam, MemFault};

/// Largest number of entries, split and packed (2.7, 2.8).
pub const MAX_QUEUE_SIZE: u16 = 32768;

/// Size and addresses of a queue, as the driver set them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QueueConfig {
    /// Number of entries: a power of two up to 32768 (split), or anything from 1 to 32768 (packed).
    pub size: u16,
    /// Descriptor Area: descriptor table or descriptor ring; aligned to 16.
    pub desc: GuestAddress,
    /// Driver Area: available ring (aligned to 2) or driver event suppression (aligned to 4).
    pub driver: GuestAddress,
    /// Device Area: used ring or device event suppression; aligned to 4.
    pub device: GuestAddress,
}

/// The areas of a queue in host memory: each checked for length and alignment.
pub(super) struct Areas {
    pub(super) desc: Area,
    pub(super) driver: Area,
    pub(super) device: Area,
}

impl QueueConfig {
    /// Resolves the areas: the tables in 2.7 and 2.8.10.1.
    pub(super) fn resolve(&self, ram: &GuestRam, packed: bool) -> Result<Areas, QueueError> {
        let size = u64::from(self.size);
        if self.size == 0 || self.size > MAX_QUEUE_SIZE || (!packed && !self.size.is_power_of_two()) {
            return Err(QueueError::Size(self.size));
        }
        if ram.is_poisoned() {
            return Err(QueueError::Poisoned);
        }
        let area = |area, addr: GuestAddress, len: u64, align: u64| {
            // The host's alignment is what the accesses need. It differs from the guest's if a region was mapped
            // at an odd offset of its file.
            if !addr.0.is_multiple_of(align) {
                return Err(QueueError::Misaligned { area, addr: addr.0 });
            }
            let access = if matches!(area, QueueArea::Driver) { Access::Read } else { Access::Write };
            let access = if matches!(area, QueueArea::Descriptor) && !packed { Access::Read } else { access };
            let Some(host) = ram.directory().contiguous(addr.0, len, access) else {
                return match ram.directory().pieces(addr.0, len, access, |_, _| Ok::<(), MemFault>(())) {
                    Err(miss @ MemFault::Miss { .. }) => Err(miss.into()),
                    _ => Err(QueueError::AreaUnmapped { area, addr: addr.0, len }),
                };
            };
            if !(host as u64).is_multiple_of(align) {
                return Err(QueueError::Misaligned { area, addr: addr.0 });
            }
            Ok(Area::new(host, len))
        };
        // The event fields of split rings are part of the areas even if the feature was not negotiated (2.7).
        let (driver, driver_align, device) = if packed { (4, 4, 4) } else { (6 + 2 * size, 2, 6 + 8 * size) };
        Ok(Areas {
            desc: area(QueueArea::Descriptor, self.desc, 16 * size, 16)?,
            driver: area(QueueArea::Driver, self.driver, driver, driver_align)?,
            device: area(QueueArea::Device, self.device, device, 4)?,
        })
    }
}
