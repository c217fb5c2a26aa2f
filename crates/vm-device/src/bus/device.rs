//! What a device has to do to be on a bus.
//!
//! A vCPU calls while its guest waits, and several vCPUs may call at once: that is why these take `&self`. A device that
//! needs `&mut self` implements [`MutDevicePio`] or [`MutDeviceMmio`] and goes into a `Mutex`.
use std::sync::{Arc, Mutex};

use super::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};

/// A device in port I/O space.
///
/// ```
/// use std::sync::atomic::{AtomicU8, Ordering};
/// use vm_device::DevicePio;
/// use vm_device::bus::{PioAddress, PioAddressOffset};
///
/// /// The port that firmware reports its progress to.
/// struct PostCode(AtomicU8);
///
/// impl DevicePio for PostCode {
///     fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
///         data.fill(self.0.load(Ordering::Relaxed));
///     }
///
///     fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
///         if let [code, ..] = data {
///             self.0.store(*code, Ordering::Relaxed);
///         }
///     }
/// }
/// ```
pub trait DevicePio {
    /// The guest reads `data.len()` bytes, at `offset` behind the `base` of one of the device's ranges.
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]);

    /// The guest writes `data`, at `offset` behind the `base` of one of the device's ranges.
    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]);
}

/// A device in MMIO space.
///
/// ```
/// use vm_device::DeviceMmio;
/// use vm_device::bus::{MmioAddress, MmioAddressOffset};
///
/// /// A ROM that is read by exits.
/// struct Rom(Vec<u8>);
///
/// impl DeviceMmio for Rom {
///     fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
///         for (at, byte) in (offset..).zip(data) {
///             let here = usize::try_from(at).ok().and_then(|at| self.0.get(at));
///             *byte = here.copied().unwrap_or(0xff);
///         }
///     }
///
///     fn mmio_write(&self, _base: MmioAddress, _offset: MmioAddressOffset, _data: &[u8]) {}
/// }
/// ```
pub trait DeviceMmio {
    /// The guest reads `data.len()` bytes, at `offset` behind the `base` of one of the device's ranges.
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]);

    /// The guest writes `data`, at `offset` behind the `base` of one of the device's ranges.
    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]);
}

/// A [`DevicePio`] once it is in a `Mutex`.
///
/// ```
/// use std::sync::Mutex;
/// use vm_device::bus::{PioAddress, PioAddressOffset};
/// use vm_device::{DevicePio, MutDevicePio};
///
/// /// What was written to a debug port.
/// #[derive(Default)]
/// struct DebugPort(Vec<u8>);
///
/// impl MutDevicePio for DebugPort {
///     fn pio_read(&mut self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
///         data.fill(0xe9);
///     }
///
///     fn pio_write(&mut self, _base: PioAddress, _offset: PioAddressOffset, data: &[u8]) {
///         if self.0.len() + data.len() <= 4096 {
///             self.0.extend_from_slice(data);
///         }
///     }
/// }
///
/// let port = Mutex::new(DebugPort::default());
/// DevicePio::pio_write(&port, PioAddress(0xe9), 0, b"boot");
/// assert_eq!(port.into_inner().unwrap().0, b"boot");
/// ```
pub trait MutDevicePio {
    /// As [`DevicePio::pio_read`].
    fn pio_read(&mut self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]);

    /// As [`DevicePio::pio_write`].
    fn pio_write(&mut self, base: PioAddress, offset: PioAddressOffset, data: &[u8]);
}

/// A [`DeviceMmio`] once it is in a `Mutex`.
///
/// ```
/// use std::sync::Mutex;
/// use vm_device::bus::{MmioAddress, MmioAddressOffset};
/// use vm_device::{DeviceMmio, MutDeviceMmio};
///
/// /// A register that counts how often it was read.
/// struct Counter(u8);
///
/// impl MutDeviceMmio for Counter {
///     fn mmio_read(&mut self, _base: MmioAddress, _offset: MmioAddressOffset, data: &mut [u8]) {
///         self.0 = self.0.wrapping_add(1);
///         data.fill(self.0);
///     }
///
///     fn mmio_write(&mut self, _base: MmioAddress, _offset: MmioAddressOffset, _data: &[u8]) {
///         self.0 = 0;
///     }
/// }
///
/// let counter = Mutex::new(Counter(0));
/// let mut data = [0; 1];
/// counter.mmio_read(MmioAddress(0x1000), 0, &mut data);
/// assert_eq!(data, [1]);
/// ```
pub trait MutDeviceMmio {
    /// As [`DeviceMmio::mmio_read`].
    fn mmio_read(&mut self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]);

    /// As [`DeviceMmio::mmio_write`].
    fn mmio_write(&mut self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]);
}

impl<T: DevicePio + ?Sized> DevicePio for Arc<T> {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        T::pio_read(self, base, offset, data);
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        T::pio_write(self, base, offset, data);
    }
}

impl<T: DeviceMmio + ?Sized> DeviceMmio for Arc<T> {
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        T::mmio_read(self, base, offset, data);
    }

    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        T::mmio_write(self, base, offset, data);
    }
}

/// A device that panicked while it was locked is gone for all who share it: it reads as ones.
impl<T: MutDevicePio + ?Sized> DevicePio for Mutex<T> {
    fn pio_read(&self, base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        match self.lock() {
            Ok(mut device) => device.pio_read(base, offset, data),
            Err(_) => data.fill(0xff),
        }
    }

    fn pio_write(&self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        if let Ok(mut device) = self.lock() {
            device.pio_write(base, offset, data);
        }
    }
}

/// A device that panicked while it was locked is gone for all who share it: it reads as ones.
impl<T: MutDeviceMmio + ?Sized> DeviceMmio for Mutex<T> {
    fn mmio_read(&self, base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        match self.lock() {
            Ok(mut device) => device.mmio_read(base, offset, data),
            Err(_) => data.fill(0xff),
        }
    }

    fn mmio_write(&self, base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        if let Ok(mut device) = self.lock() {
            device.mmio_write(base, offset, data);
        }
    }
}
