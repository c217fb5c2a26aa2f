//! What every owner of a bus can do, whatever its devices are.
use crate::bus::{self, BusManager, DeviceMmio, DevicePio, MmioAddress, MmioRange, PioAddress, PioRange};

/// Registration and access in port I/O space. [`IoManager`](super::IoManager) has it, and every
/// [`BusManager<PioAddress>`](BusManager) whose devices answer.
pub trait PioManager {
    /// What is registered.
    type D: DevicePio;

    /// The range that has this address, and its device.
    fn pio_device(&self, addr: PioAddress) -> Option<(&PioRange, &Self::D)>;

    /// Reads from the device that has this address. If none has, `data` is filled with ones.
    ///
    /// # Errors
    /// See [`bus::Error`].
    fn pio_read(&self, addr: PioAddress, data: &mut [u8]) -> Result<(), bus::Error>;

    /// Writes to the device that has this address.
    ///
    /// # Errors
    /// See [`bus::Error`].
    fn pio_write(&self, addr: PioAddress, data: &[u8]) -> Result<(), bus::Error>;

    /// Gives this range to a device.
    ///
    /// # Errors
    /// [`bus::Error::DeviceOverlap`] if a part of it is taken.
    fn register_pio(&mut self, range: PioRange, device: Self::D) -> Result<(), bus::Error>;

    /// Takes away the range that has this address.
    fn deregister_pio(&mut self, addr: PioAddress) -> Option<(PioRange, Self::D)>;
}

/// Registration and access in MMIO space. [`IoManager`](super::IoManager) has it, and every
/// [`BusManager<MmioAddress>`](BusManager) whose devices answer.
pub trait MmioManager {
    /// What is registered.
    type D: DeviceMmio;

    /// The range that has this address, and its device.
    fn mmio_device(&self, addr: MmioAddress) -> Option<(&MmioRange, &Self::D)>;

    /// Reads from the device that has this address. If none has, `data` is filled with ones.
    ///
    /// # Errors
    /// See [`bus::Error`].
    fn mmio_read(&self, addr: MmioAddress, data: &mut [u8]) -> Result<(), bus::Error>;

    /// Writes to the device that has this address.
    ///
    /// # Errors
    /// See [`bus::Error`].
    fn mmio_write(&self, addr: MmioAddress, data: &[u8]) -> Result<(), bus::Error>;

    /// Gives this range to a device.
    ///
    /// # Errors
    /// [`bus::Error::DeviceOverlap`] if a part of it is taken.
    fn register_mmio(&mut self, range: MmioRange, device: Self::D) -> Result<(), bus::Error>;

    /// Takes away the range that has this address.
    fn deregister_mmio(&mut self, addr: MmioAddress) -> Option<(MmioRange, Self::D)>;
}

impl<T> PioManager for T
where
    T: BusManager<PioAddress>,
    T::D: DevicePio,
{
    type D = <T as BusManager<PioAddress>>::D;

    fn pio_device(&self, addr: PioAddress) -> Option<(&PioRange, &Self::D)> {
        self.bus().device(addr)
    }

    fn pio_read(&self, addr: PioAddress, data: &mut [u8]) -> Result<(), bus::Error> {
        let (range, device) = self.bus().check_access(addr, data.len()).inspect_err(|_| data.fill(0xff))?;
        device.pio_read(range.base(), addr - range.base(), data);
        Ok(())
    }

    fn pio_write(&self, addr: PioAddress, data: &[u8]) -> Result<(), bus::Error> {
        let (range, device) = self.bus().check_access(addr, data.len())?;
        device.pio_write(range.base(), addr - range.base(), data);
        Ok(())
    }

    fn register_pio(&mut self, range: PioRange, device: Self::D) -> Result<(), bus::Error> {
        self.bus_mut().register(range, device)
    }

    fn deregister_pio(&mut self, addr: PioAddress) -> Option<(PioRange, Self::D)> {
        self.bus_mut().deregister(addr)
    }
}

impl<T> MmioManager for T
where
    T: BusManager<MmioAddress>,
    T::D: DeviceMmio,
{
    type D = <T as BusManager<MmioAddress>>::D;

    fn mmio_device(&self, addr: MmioAddress) -> Option<(&MmioRange, &Self::D)> {
        self.bus().device(addr)
    }

    fn mmio_read(&self, addr: MmioAddress, data: &mut [u8]) -> Result<(), bus::Error> {
        let (range, device) = self.bus().check_access(addr, data.len()).inspect_err(|_| data.fill(0xff))?;
        device.mmio_read(range.base(), addr - range.base(), data);
        Ok(())
    }

    fn mmio_write(&self, addr: MmioAddress, data: &[u8]) -> Result<(), bus::Error> {
        let (range, device) = self.bus().check_access(addr, data.len())?;
        device.mmio_write(range.base(), addr - range.base(), data);
        Ok(())
    }

    fn register_mmio(&mut self, range: MmioRange, device: Self::D) -> Result<(), bus::Error> {
        self.bus_mut().register(range, device)
    }

    fn deregister_mmio(&mut self, addr: MmioAddress) -> Option<(MmioRange, Self::D)> {
        self.bus_mut().deregister(addr)
    }
}
