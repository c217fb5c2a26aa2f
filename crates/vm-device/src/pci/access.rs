//! The two ways by which a guest reaches configuration space: a pair of ports, and memory.
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::RootComplex;
use crate::bus::{
    DeviceMmio, DevicePio, MmioAddress, MmioAddressOffset, MmioRange, PioAddress, PioAddressOffset, PioRange,
};

/// The first port of [`ConfigPorts`].
pub const CONFIG_ADDRESS: u16 = 0xcf8;

/// Bytes of memory that the functions of one bus have in [`ConfigMemory`].
pub const ECAM_BUS: u64 = 1 << 20;

/// Bits of the address register that exist: enable, bus, device, function, double word.
pub(crate) const ADDRESS_BITS: u32 = 0x80ff_fffc;
const ENABLE: u32 = 1 << 31;

/// Configuration space by ports 0xcf8 (address) and 0xcfc (data), PCI Local Bus 3.0, 3.2.2.3.2. Reaches the first 256 bytes of
/// each function.
///
/// * The address register exists for accesses of a double word only. Others at its ports are usual I/O: they go to a device
///   that was given by [`beside`](Self::beside) (a PC has its reset control at 0xcf9), or nowhere.
/// * The data register may be accessed by 1, 2 and 4 bytes, at the bytes of the double word that the address names. Without the
///   enable bit it is nowhere.
pub struct ConfigPorts {
    root: RootComplex,
    beside: Option<Arc<dyn DevicePio + Send + Sync>>,
}

impl ConfigPorts {
    /// Ports for this root complex.
    pub fn new(root: RootComplex) -> ConfigPorts {
        ConfigPorts { root, beside: None }
    }

    /// What answers to accesses at 0xcf8 to 0xcfb that are not the address register's.
    pub fn beside(mut self, device: Arc<dyn DevicePio + Send + Sync>) -> ConfigPorts {
        self.beside = Some(device);
        self
    }

    /// All of its ports: 0xcf8 to 0xcff.
    pub fn range() -> PioRange {
        // Neither empty nor beyond the last port.
        PioRange::new(PioAddress(CONFIG_ADDRESS), 8).unwrap_or(PioRange::unit(PioAddress(CONFIG_ADDRESS)))
    }

    /// The function and offset that the data register leads to, `at` bytes behind its first port.
    fn target(&self, at: u16) -> Option<(u8, u8, u8, u16)> {
        let address = self.root.inner.address.load(Ordering::Relaxed);
        let [register, device_function, bus, _] = address.to_le_bytes();
        let place = (bus, device_function >> 3, device_function & 7, u16::from(register) + at);
        (address & ENABLE != 0).then_some(place)
    }
}

impl DevicePio for ConfigPorts {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match (offset, &mut *data, offset.checked_sub(4)) {
            (0, [_, _, _, _], _) => {
                data.copy_from_slice(&self.root.inner.address.load(Ordering::Relaxed).to_le_bytes());
            }
            (_, _, Some(at)) => match self.target(at) {
                Some((bus, device, function, offset)) => {
                    self.root.config_read(bus, device, function, offset, data);
                }
                None => data.fill(0xff),
            },
            _ => match &self.beside {
                Some(device) => device.pio_read(base, offset, data),
                None => data.fill(0xff),
            },
        }
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (offset, data, offset.checked_sub(4)) {
            (0, &[a, b, c, d], _) => {
                let address = u32::from_le_bytes([a, b, c, d]) & ADDRESS_BITS;
                self.root.inner.address.store(address, Ordering::Relaxed);
            }
            (_, _, Some(at)) => {
                if let Some((bus, device, function, offset)) = self.target(at) {
                    self.root.config_write(bus, device, function, offset, data);
                }
            }
            _ => {
                if let Some(device) = &self.beside {
                    device.pio_write(base, offset, data);
                }
            }
        }
    }
}

/// Configuration space in memory, PCI Express Base 5.0, 7.2.2: 4096 bytes for each function, 1 MiB for each bus.
pub struct ConfigMemory {
    root: RootComplex,
}

impl ConfigMemory {
    /// The memory for this root complex.
    pub fn new(root: RootComplex) -> ConfigMemory {
        ConfigMemory { root }
    }

    /// All of it, if the first byte of the root bus's is at `base`.
    ///
    /// # Errors
    /// It would leave the address space.
    pub fn range(&self, base: MmioAddress) -> Result<MmioRange, crate::bus::Error> {
        MmioRange::new(base, self.root.buses() * ECAM_BUS)
    }

    fn target(&self, offset: u64) -> Option<(u8, u8, u8, u16)> {
        let bus = u8::try_from(offset / ECAM_BUS).ok()?.checked_add(self.root.inner.first_bus)?;
        let [low, high, place, _, ..] = offset.to_le_bytes();
        let device = (place & 0xf) << 1 | high >> 7;
        Some((bus, device, high >> 4 & 7, u16::from_le_bytes([low, high & 0xf])))
    }
}

impl DeviceMmio for ConfigMemory {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match self.target(offset) {
            Some((bus, device, function, offset)) => {
                self.root.config_read(bus, device, function, offset, data)
            }
            None => data.fill(0xff),
        }
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Some((bus, device, function, offset)) = self.target(offset) {
            self.root.config_write(bus, device, function, offset, data);
        }
    }
}
