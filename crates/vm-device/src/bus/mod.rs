//! Buses: which range of addresses belongs to which device.
//!
//! Addresses are typed ([`PioAddress`], [`MmioAddress`]), ranges are checked when they are made ([`BusRange`]), devices
//! answer to accesses ([`DevicePio`], [`DeviceMmio`]). A [`Bus`] maps ranges that do not overlap to anything. It has one
//! owner; what many vCPUs dispatch from is in [`dispatch`](crate::dispatch).
mod address;
mod device;
mod range;

pub use address::{BusAddress, MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
pub use device::{DeviceMmio, DevicePio, MutDeviceMmio, MutDevicePio};
pub use range::{BusRange, MmioRange, PioRange};

/// What can go wrong on a bus.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// No range of a device has all bytes of the access. A read is filled with ones.
    #[error("no device has this address")]
    DeviceNotFound,
    /// A range overlaps one that is registered already.
    #[error("the range overlaps that of a device")]
    DeviceOverlap,
    /// An access cannot have so many bytes in this address space. A read is filled with ones.
    #[error("an access cannot have {0} bytes")]
    InvalidAccessLength(usize),
    /// A range or an access is empty, or leaves the address space. A read is filled with ones.
    #[error("the range is empty or leaves the address space")]
    InvalidRange,
    /// The device panicked, now or in an earlier access, and is not called any more. A read is filled with ones.
    #[error("the device has failed")]
    DeviceFailed,
    /// A range of ports for a device that only knows memory, or the other way round.
    #[error("the device is not made for this bus")]
    WrongBus,
    /// The owner of the buses is gone.
    #[error("the buses are gone")]
    Closed,
}

/// A bus in MMIO space.
pub type MmioBus<D> = Bus<MmioAddress, D>;

/// A bus in port I/O space.
pub type PioBus<D> = Bus<PioAddress, D>;

/// Ranges that do not overlap, and to what each belongs.
///
/// ```
/// use vm_device::bus::{Bus, Error, PioAddress, PioRange};
///
/// let mut bus = Bus::new();
/// bus.register(PioRange::new(PioAddress(0x3f8), 8)?, "serial port")?;
/// let (range, device) = bus.device(PioAddress(0x3fd)).expect("inside of the range");
/// assert_eq!((range.base(), *device), (PioAddress(0x3f8), "serial port"));
///
/// // An access must be within one range.
/// assert!(bus.check_access(PioAddress(0x3fc), 4).is_ok());
/// assert_eq!(bus.check_access(PioAddress(0x3fd), 4), Err(Error::DeviceNotFound));
/// # Ok::<(), Error>(())
/// ```
#[derive(Clone)]
pub struct Bus<A: BusAddress, D> {
    /// In ascending order. Not a tree: there are a few thousand at most, and moving them is cheaper than that.
    ranges: Vec<(BusRange<A>, D)>,
}

impl<A: BusAddress, D> Default for Bus<A, D> {
    fn default() -> Self {
        Bus { ranges: Vec::new() }
    }
}

impl<A: BusAddress, D> Bus<A, D> {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// The range that has this address, and what it belongs to.
    pub fn device(&self, addr: A) -> Option<(&BusRange<A>, &D)> {
        let (range, device) = self.ranges.get(self.at(addr)?)?;
        Some((range, device))
    }

    /// As [`device`](Self::device), to change what the range belongs to.
    pub fn device_mut(&mut self, addr: A) -> Option<(&BusRange<A>, &mut D)> {
        let at = self.at(addr)?;
        let (range, device) = self.ranges.get_mut(at)?;
        Some((range, device))
    }

    /// Gives a range to a device.
    ///
    /// # Errors
    /// [`Error::DeviceOverlap`] if a part of it is taken.
    pub fn register(&mut self, range: BusRange<A>, device: D) -> Result<(), Error> {
        let behind = self.behind(range.last());
        // Ranges do not overlap each other, so the one that begins last before the end of the new one also ends last.
        let before = behind.checked_sub(1).and_then(|at| self.ranges.get(at));
        if before.is_some_and(|(taken, _)| taken.last() >= range.base()) {
            return Err(Error::DeviceOverlap);
        }
        self.ranges.insert(behind, (range, device));
        Ok(())
    }

    /// Takes away the range that has this address.
    pub fn deregister(&mut self, addr: A) -> Option<(BusRange<A>, D)> {
        let at = self.at(addr)?;
        Some(self.ranges.remove(at))
    }

    /// The range that has all bytes of an access, and what it belongs to.
    ///
    /// # Errors
    /// * [`Error::InvalidAccessLength`]: more bytes than can be counted in this address space.
    /// * [`Error::InvalidRange`]: no bytes, or beyond the end of the address space.
    /// * [`Error::DeviceNotFound`]: no range has all of them.
    pub fn check_access(&self, addr: A, len: usize) -> Result<(&BusRange<A>, &D), Error> {
        let access = access(addr, len)?;
        self.device(addr).filter(|(range, _)| access.last() <= range.last()).ok_or(Error::DeviceNotFound)
    }

    /// All ranges in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = (&BusRange<A>, &D)> {
        self.ranges.iter().map(|(range, device)| (range, device))
    }

    /// What ranges belong to, to change it.
    pub(crate) fn devices_mut(&mut self) -> impl Iterator<Item = &mut D> {
        self.ranges.iter_mut().map(|(_, device)| device)
    }

    /// The number of ranges.
    pub fn len(&self) -> usize {
        self.ranges.len()
    }

    /// Whether there is no range.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// How many ranges begin at or before this address.
    fn behind(&self, addr: A) -> usize {
        match self.ranges.last() {
            // Most are registered in ascending order.
            Some((last, _)) if last.base() <= addr => self.ranges.len(),
            _ => self.ranges.partition_point(|(range, _)| range.base() <= addr),
        }
    }

    /// Which range has this address.
    fn at(&self, addr: A) -> Option<usize> {
        let at = self.behind(addr).checked_sub(1)?;
        self.ranges.get(at).filter(|(range, _)| addr <= range.last()).map(|_| at)
    }
}

/// The bytes of an access as a range.
#[inline]
pub(crate) fn access<A: BusAddress>(addr: A, len: usize) -> Result<BusRange<A>, Error> {
    BusRange::new(addr, A::V::try_from(len).map_err(|_| Error::InvalidAccessLength(len))?)
}

/// Who owns a bus. Who does so for ports or memory, with devices that answer, gets
/// [`PioManager`](crate::device_manager::PioManager) or [`MmioManager`](crate::device_manager::MmioManager) with it.
pub trait BusManager<A: BusAddress> {
    /// What ranges belong to.
    type D;

    /// The bus.
    fn bus(&self) -> &Bus<A, Self::D>;

    /// The bus, to change it.
    fn bus_mut(&mut self) -> &mut Bus<A, Self::D>;
}
