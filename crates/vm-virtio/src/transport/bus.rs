//! Transports on the buses of `vm_device`, and its interrupt lines (cargo feature `vm-device`).
use super::Line;
use super::mmio::Mmio;
use crate::device::VirtioDevice;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset};
use vm_device::interrupt::IrqSource;

impl<D: VirtioDevice> DeviceMmio for Mmio<D> {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.write(offset, data);
    }
}

impl Line for IrqSource {
    fn set(&self, high: bool) {
        if high && self.is_asserted() {
            // News on a line that is up already: an edge, where edges count.
            IrqSource::set(self, false);
        }
        IrqSource::set(self, high);
    }
}
