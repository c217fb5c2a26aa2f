//! Ranges of addresses. One that exists is neither empty nor does it leave the address space.
use std::cmp::Ordering;

use super::{BusAddress, Error, MmioAddress, PioAddress};

/// An interval of a bus's address space.
///
/// Two ranges are *equal*, and ordered, by their first address alone: that is what a bus needs, on which no two ranges
/// overlap. Whether two ranges are the same is a matter of [`base`](Self::base) and [`size`](Self::size).
#[derive(Clone, Copy, Debug)]
pub struct BusRange<A: BusAddress> {
    base: A,
    size: A::V,
}

/// A range in MMIO space.
pub type MmioRange = BusRange<MmioAddress>;

/// A range in port I/O space.
pub type PioRange = BusRange<PioAddress>;

impl<A: BusAddress> BusRange<A> {
    /// So many bytes from this address on. The last one may be the last of the address space.
    ///
    /// # Errors
    /// [`Error::InvalidRange`] if it is empty or leaves the address space.
    pub fn new(base: A, size: A::V) -> Result<Self, Error> {
        if size == 0.into() || base.checked_add(size - 1.into()).is_none() {
            return Err(Error::InvalidRange);
        }
        Ok(BusRange { base, size })
    }

    /// This one address.
    pub fn unit(base: A) -> Self {
        BusRange { base, size: 1.into() }
    }

    /// The first address.
    pub fn base(&self) -> A {
        self.base
    }

    /// How many addresses, at least one.
    pub fn size(&self) -> A::V {
        self.size
    }

    /// The last address.
    pub fn last(&self) -> A {
        self.base + (self.size - 1.into())
    }

    /// Whether there is an address in both.
    pub fn overlaps(&self, other: &BusRange<A>) -> bool {
        self.base <= other.last() && other.base <= self.last()
    }
}

impl<A: BusAddress> PartialEq for BusRange<A> {
    fn eq(&self, other: &Self) -> bool {
        self.base == other.base
    }
}

impl<A: BusAddress> Eq for BusRange<A> {}

impl<A: BusAddress> PartialOrd for BusRange<A> {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl<A: BusAddress> Ord for BusRange<A> {
    fn cmp(&self, other: &Self) -> Ordering {
        self.base.cmp(&other.base)
    }
}
