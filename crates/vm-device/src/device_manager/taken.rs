//! What was taken from the allocator for one device: all of it goes back when this is dropped.
use vm_memory::GuestAddress;

use super::{IoResource, IoType, IrqResource};
use crate::bus::{self, BusRange, MmioAddress, PioAddress};
use crate::dispatch::IoRange;
use crate::resources::{Pool, Request, ResourceError, SystemAllocator};

const PAGE: u64 = 0x1000;

#[derive(Debug)]
pub(super) struct Taken {
    allocator: SystemAllocator,
    ranges: Vec<(Pool, u64, u64)>,
    pub(super) id: u32,
    pub(super) resources: Vec<IoResource>,
    pub(super) irq: Option<u32>,
}

impl Taken {
    /// Everything, or nothing.
    pub(super) fn take(
        allocator: &SystemAllocator,
        wanted: &[IoResource],
        irq: Option<IrqResource>,
    ) -> Result<Taken, ResourceError> {
        let id = allocator.allocate_instance_id()?;
        let mut taken =
            Taken { allocator: allocator.clone(), ranges: Vec::new(), id, resources: Vec::new(), irq: None };
        for wanted in wanted {
            let pool = match wanted.io_type {
                IoType::Pio => Pool::Pio,
                IoType::Mmio | IoType::PhysicalMmio => Pool::Mmio,
            };
            let request = Request::new(wanted.size);
            let request = match (wanted.addr, pool) {
                (Some(addr), _) => request.at(addr.0),
                // Registers are decoded by the low bits of the address: as PCI aligns ports.
                (None, Pool::Pio) => request.align(wanted.size.checked_next_power_of_two().unwrap_or(1)),
                (None, _) => request.align(PAGE),
            };
            let base = allocator.allocate_in(pool, &request)?;
            taken.ranges.push((pool, base, wanted.size));
            taken.resources.push(IoResource { addr: Some(GuestAddress(base)), ..*wanted });
        }
        if let Some(IrqResource(wanted)) = irq {
            taken.irq = Some(allocator.allocate_irq(wanted)?);
        }
        Ok(taken)
    }

    /// The ranges that cause exits.
    pub(super) fn exits(&self) -> Result<Vec<IoRange>, bus::Error> {
        let mut exits = Vec::new();
        for resource in &self.resources {
            let base = resource.addr.map_or(0, |addr| addr.0);
            match resource.io_type {
                IoType::Pio => exits.push(ports(base, resource.size)?),
                IoType::Mmio => exits.push(BusRange::new(MmioAddress(base), resource.size)?.into()),
                IoType::PhysicalMmio => (),
            }
        }
        Ok(exits)
    }
}

/// All 65536 ports at once are more than a range of ports can count.
fn ports(base: u64, size: u64) -> Result<IoRange, bus::Error> {
    let number = |value| u16::try_from(value).map_err(|_| bus::Error::InvalidRange);
    Ok(BusRange::new(PioAddress(number(base)?), number(size)?)?.into())
}

impl Drop for Taken {
    fn drop(&mut self) {
        // The allocator is shared: somebody else may have given back what is ours. There is nothing to do about it here.
        for (pool, base, size) in self.ranges.drain(..) {
            let _ = self.allocator.free_in(pool, base, size);
        }
        if let Some(irq) = self.irq.take() {
            let _ = self.allocator.free_irq(irq);
        }
        let _ = self.allocator.free_instance_id(self.id);
    }
}
