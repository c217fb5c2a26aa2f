//! A PC's two 8259A, as much as there has to be of them: their mask registers, by which Linux finds out whether the interrupts 0 to 15
//! of a PC are there at all. Nothing ever comes through these controllers; the I/O APIC has the same interrupts.

use std::sync::atomic::{AtomicU8, Ordering};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};

/// The first ports of both, with two ports each.
pub(crate) const PLACES: [u16; 2] = [0x20, 0xa0];
pub(crate) const PORTS: u16 = 2;

const MASK: PioAddressOffset = 1;

#[derive(Default)]
pub(crate) struct Pic {
    mask: AtomicU8,
}

impl DevicePio for Pic {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(if offset == MASK { self.mask.load(Ordering::Relaxed) } else { 0 });
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let (MASK, &[mask]) = (offset, data) {
            self.mask.store(mask, Ordering::Relaxed);
        }
    }
}
