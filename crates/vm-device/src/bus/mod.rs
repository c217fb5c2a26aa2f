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
    /// In ascending order, each block and all of them. None is empty, so there are not more than ranges. Not one vector: of a
    /// thousand ranges, half had to move for each new one. Not a tree of the standard library: its search takes longer than
    /// moving what is in a block.
    blocks: Vec<Block<A, D>>,
    len: usize,
}

#[derive(Clone)]
struct Block<A: BusAddress, D> {
    /// Where its first range begins.
    first: A,
    /// At most [`BLOCK`].
    ranges: Vec<(BusRange<A>, D)>,
}

/// A full block is split; one at the end stays, and the next one begins.
const BLOCK: usize = 64;

impl<A: BusAddress, D> Default for Bus<A, D> {
    fn default() -> Self {
        Bus { blocks: Vec::new(), len: 0 }
    }
}

impl<A: BusAddress, D> Bus<A, D> {
    /// An empty bus.
    pub fn new() -> Self {
        Self::default()
    }

    /// The range that has this address, and what it belongs to.
    pub fn device(&self, addr: A) -> Option<(&BusRange<A>, &D)> {
        let (block, at) = self.before(addr)?;
        let (range, device) = self.blocks.get(block)?.ranges.get(at)?;
        (addr <= range.last()).then_some((range, device))
    }

    /// As [`device`](Self::device), to change what the range belongs to.
    pub fn device_mut(&mut self, addr: A) -> Option<(&BusRange<A>, &mut D)> {
        let (block, at) = self.before(addr)?;
        let (range, device) = self.blocks.get_mut(block)?.ranges.get_mut(at)?;
        (addr <= range.last()).then_some((range, device))
    }

    /// Gives a range to a device.
    ///
    /// # Errors
    /// [`Error::DeviceOverlap`] if a part of it is taken.
    pub fn register(&mut self, range: BusRange<A>, device: D) -> Result<(), Error> {
        // Ranges do not overlap each other, so the one that begins last before the end of the new one also ends last.
        let (block, at) = match self.before(range.last()) {
            None => (0, 0),
            Some((block, at)) => {
                let before = self.blocks.get(block).and_then(|block| block.ranges.get(at));
                if before.is_some_and(|(taken, _)| taken.last() >= range.base()) {
                    return Err(Error::DeviceOverlap);
                }
                (block, at + 1)
            }
        };
        self.insert(block, at, range, device);
        self.len += 1;
        Ok(())
    }

    fn insert(&mut self, place: usize, at: usize, range: BusRange<A>, device: D) {
        let first = range.base();
        match self.blocks.get_mut(place) {
            Some(Block { ranges, .. }) if ranges.len() >= BLOCK && at < ranges.len() => {
                let mut rest = Vec::with_capacity(BLOCK);
                rest.extend(ranges.drain(BLOCK / 2..));
                if let Some((middle, _)) = rest.first() {
                    let rest = Block { first: middle.base(), ranges: rest };
                    self.blocks.insert(place + 1, rest);
                }
                match at.checked_sub(BLOCK / 2) {
                    None | Some(0) => self.insert(place, at, range, device),
                    Some(at) => self.insert(place + 1, at, range, device),
                }
            }
            Some(block) if block.ranges.len() < BLOCK => {
                block.first = block.first.min(first);
                block.ranges.insert(at, (range, device));
            }
            // The first of all, or behind a full block.
            full => {
                let place = if full.is_some() { place + 1 } else { place };
                let mut ranges = Vec::with_capacity(if place == 0 { 1 } else { BLOCK });
                ranges.push((range, device));
                self.blocks.insert(place, Block { first, ranges });
            }
        }
    }

    /// Takes away the range that has this address.
    pub fn deregister(&mut self, addr: A) -> Option<(BusRange<A>, D)> {
        let (place, at) = self.before(addr)?;
        let block = self.blocks.get_mut(place)?;
        block.ranges.get(at).filter(|(range, _)| addr <= range.last())?;
        let gone = block.ranges.remove(at);
        self.len -= 1;
        match block.ranges.first() {
            Some((range, _)) => block.first = range.base(),
            None => drop(self.blocks.remove(place)),
        }
        Some(gone)
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
        self.blocks.iter().flat_map(|block| &block.ranges).map(|(range, device)| (range, device))
    }

    /// What ranges belong to, to change it.
    pub(crate) fn devices_mut(&mut self) -> impl Iterator<Item = &mut D> {
        self.blocks.iter_mut().flat_map(|block| &mut block.ranges).map(|(_, device)| device)
    }

    /// The number of ranges.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there is no range.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The last range that begins at or before this address: its block, and its place there.
    fn before(&self, addr: A) -> Option<(usize, usize)> {
        let behind = match self.blocks.last() {
            // Most are registered in ascending order.
            Some(last) if last.first <= addr => self.blocks.len(),
            _ => self.blocks.partition_point(|block| block.first <= addr),
        };
        let block = behind.checked_sub(1)?;
        let ranges = &self.blocks.get(block)?.ranges;
        let behind = match ranges.last() {
            Some((last, _)) if last.base() <= addr => ranges.len(),
            _ => ranges.partition_point(|(range, _)| range.base() <= addr),
        };
        Some((block, behind.checked_sub(1)?))
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    fn check(bus: &Bus<PioAddress, u32>, model: &BTreeMap<u16, (u16, u32)>) {
        let known: Vec<_> =
            bus.iter().map(|(range, device)| (range.base().0, range.size(), *device)).collect();
        let expected: Vec<_> = model.iter().map(|(base, (size, device))| (*base, *size, *device)).collect();
        assert_eq!((known, bus.len()), (expected, model.len()));
        for Block { first, ranges } in &bus.blocks {
            assert_eq!(Some(*first), ranges.first().map(|(range, _)| range.base()), "none is empty");
            assert!(ranges.len() <= BLOCK);
        }
    }

    proptest! {
        /// Several blocks, that are split, grow and vanish, against a tree.
        #[test]
        fn many_ranges_are_where_they_were_put(
            steps in proptest::collection::vec((any::<u16>(), 1..200u16, 0..4u8), 1..300),
            all in any::<bool>(),
        ) {
            let mut bus = Bus::new();
            let mut model: BTreeMap<u16, (u16, u32)> = BTreeMap::new();
            for (device, (base, size, step)) in (0..).zip(steps) {
                let holder = model.range(..=base).next_back().map(|(first, (size, device))| (*first, *size, *device));
                let holder = holder.filter(|(first, size, _)| base - first < *size);
                prop_assert_eq!(bus.device(PioAddress(base)).map(|(_, device)| *device), holder.map(|(.., device)| device));
                if step == 0 && !all {
                    let gone = bus.deregister(PioAddress(base)).map(|(range, device)| (range.base().0, range.size(), device));
                    prop_assert_eq!(gone, holder);
                    holder.map(|(first, ..)| model.remove(&first));
                } else if let Ok(range) = PioRange::new(PioAddress(base), size) {
                    let overlaps = holder.is_some() || model.range(base..=range.last().0).next().is_some();
                    prop_assert_eq!(bus.register(range, device).is_err(), overlaps);
                    if !overlaps {
                        model.insert(base, (size, device));
                    }
                }
            }
            check(&bus, &model);
            for base in model.clone().into_keys() {
                prop_assert!(bus.deregister(PioAddress(base)).is_some());
                model.remove(&base);
            }
            check(&bus, &model);
            prop_assert!(bus.is_empty() && bus.blocks.is_empty());
        }
    }

    #[test]
    fn blocks_are_full_when_ranges_come_in_ascending_order() {
        let mut bus = Bus::new();
        for at in 0..1000 {
            bus.register(PioRange::new(PioAddress(at * 8), 8).unwrap(), at).unwrap();
        }
        assert_eq!(bus.blocks.len(), 1000_usize.div_ceil(BLOCK));
        assert!((0..8000).all(|port| bus.device(PioAddress(port)).is_some_and(|(_, at)| *at == port / 8)));
    }
}
