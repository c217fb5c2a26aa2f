//! Dispatch: what many vCPUs do at once while devices come, move and go.
//!
//! [`IoManager`](crate::device_manager::IoManager) and [`DeviceManager`](crate::device_manager::DeviceManager) own the
//! buses of a machine. From either come
//!
//! * a [`VcpuIo`] for each vCPU's thread, which answers the guest's accesses. It has the table of ranges at hand, and takes
//!   the new one when there is one. It takes no lock that another vCPU could hold, and writes to no memory that another
//!   one uses; only while a device is being removed do the vCPUs that leave a device look who waits, behind a lock.
//! * an [`IoSpace`], to plug in devices at any time and from anywhere, a device's own callback included: a guest moves the
//!   BARs of a PCI device by writing to one. What comes out is a [`Registration`], by which the device's ranges are
//!   changed all at once or not at all, and the device is taken out.
//!
//! A device that was removed is dropped when no vCPU is inside of it. [`Registration::remove`] waits for that. From inside
//! of a device's callback nothing waits (two vCPUs could wait for each other): the device cannot be reached any more, and
//! whichever vCPU leaves it last drops it.
//!
//! A device that panics is not called any more: its ranges read as ones, each access to them is [`Error::DeviceFailed`],
//! the others go on.
//!
//! ```
//! use std::sync::{Arc, Mutex};
//! use vm_device::MutDevicePio;
//! use vm_device::bus::{Error, PioAddress, PioAddressOffset, PioRange};
//! use vm_device::device_manager::IoManager;
//! use vm_device::dispatch::{IoDevice, IoRange, Removal};
//!
//! struct Scratch(u8);
//!
//! impl MutDevicePio for Scratch {
//!     fn pio_read(&mut self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
//!         data.fill(self.0);
//!     }
//!     fn pio_write(&mut self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
//!         self.0 = data.first().copied().unwrap_or(0);
//!     }
//! }
//!
//! let manager = IoManager::new();
//! let space = manager.space();
//! let mut vcpu = manager.vcpu();
//! # std::thread::scope(|scope| { scope.spawn(move || {
//! // In a vCPU's thread, for the whole life of the machine:
//! let mut data = [0];
//! assert_eq!(vcpu.pio_read(PioAddress(0x80), &mut data), Err(Error::DeviceNotFound));
//! assert_eq!(data, [0xff]);
//!
//! // Anywhere, meanwhile:
//! let range = |base| IoRange::from(PioRange::new(PioAddress(base), 4).unwrap());
//! let scratch = IoDevice::pio(Arc::new(Mutex::new(Scratch(7))));
//! let registration = space.register(scratch, &[range(0x80)]).unwrap();
//! assert!(vcpu.pio_read(PioAddress(0x80), &mut data).is_ok());
//! assert_eq!(data, [7]);
//!
//! registration.set_ranges(&[range(0x90)]).unwrap();
//! assert!(vcpu.pio_write(PioAddress(0x80), &[1]).is_err());
//! assert!(vcpu.pio_write(PioAddress(0x93), &[1]).is_ok());
//! assert!(matches!(registration.remove(), Removal::Done));
//! assert_eq!(vcpu.counts().unclaimed, 2);
//! # }); });
//! ```
use std::sync::Arc;

#[cfg(doc)]
use crate::bus::Error;
use crate::bus::{DeviceMmio, DevicePio, MmioRange, PioRange};

mod barrier;
mod gate;
#[cfg(all(test, loom))]
mod gate_loom;
mod space;
mod table;
mod vcpu;

pub use space::{IoSpace, REMOVAL_PATIENCE, Registration, Removal, Removed};
pub use vcpu::{Counts, VcpuIo};

pub(crate) use vcpu::Io;

/// A device as it is registered: it answers in port I/O space, in MMIO space, or in both.
#[derive(Clone)]
pub struct IoDevice {
    pub(crate) pio: Option<Arc<dyn DevicePio + Send + Sync>>,
    pub(crate) mmio: Option<Arc<dyn DeviceMmio + Send + Sync>>,
}

impl IoDevice {
    /// One with ports.
    pub fn pio(device: Arc<dyn DevicePio + Send + Sync>) -> IoDevice {
        IoDevice { pio: Some(device), mmio: None }
    }

    /// One in memory.
    pub fn mmio(device: Arc<dyn DeviceMmio + Send + Sync>) -> IoDevice {
        IoDevice { pio: None, mmio: Some(device) }
    }

    /// One with both.
    pub fn both<T: DevicePio + DeviceMmio + Send + Sync + 'static>(device: Arc<T>) -> IoDevice {
        IoDevice { pio: Some(device.clone()), mmio: Some(device) }
    }
}

/// A range in one of the two address spaces. Unlike [`BusRange`](crate::bus::BusRange)s, two are equal if they are the same.
#[derive(Clone, Copy, Debug)]
pub enum IoRange {
    /// Ports.
    Pio(PioRange),
    /// Memory.
    Mmio(MmioRange),
}

impl From<PioRange> for IoRange {
    fn from(range: PioRange) -> IoRange {
        IoRange::Pio(range)
    }
}

impl From<MmioRange> for IoRange {
    fn from(range: MmioRange) -> IoRange {
        IoRange::Mmio(range)
    }
}

impl PartialEq for IoRange {
    fn eq(&self, other: &IoRange) -> bool {
        match (self, other) {
            (IoRange::Pio(one), IoRange::Pio(other)) => one == other && one.size() == other.size(),
            (IoRange::Mmio(one), IoRange::Mmio(other)) => one == other && one.size() == other.size(),
            _ => false,
        }
    }
}

impl Eq for IoRange {}
