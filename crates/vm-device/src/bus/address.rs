//! Addresses on the two buses, which cannot be mistaken for each other.
use std::ops::{Add, Sub};

/// What can be done with an address on a bus.
pub trait BusAddress: Add<Self::V, Output = Self> + Copy + Eq + Ord + Sub<Output = Self::V> {
    /// The number that an address, an offset and a size are.
    type V: Add<Output = Self::V> + Copy + From<u8> + PartialEq + Ord + Sub<Output = Self::V> + TryFrom<usize>;

    /// The address as a number.
    fn value(&self) -> Self::V;

    /// The address so far behind this one, unless that is outside of the address space.
    fn checked_add(&self, value: Self::V) -> Option<Self>;
}

/// A distance in MMIO space, in bytes.
pub type MmioAddressOffset = u64;

/// An address in MMIO space: a guest-physical address.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MmioAddress(pub MmioAddressOffset);

/// A distance in port I/O space, in bytes.
pub type PioAddressOffset = u16;

/// An address in port I/O space: a port.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PioAddress(pub PioAddressOffset);

macro_rules! bus_address {
    ($address:ident, $offset:ty) => {
        /// Must not leave the address space: see [`BusAddress::checked_add`] for sums that may.
        impl Add<$offset> for $address {
            type Output = Self;

            fn add(self, offset: $offset) -> Self {
                $address(self.0 + offset)
            }
        }

        /// The distance from the lower to the higher address; must not be asked for the other way round.
        impl Sub for $address {
            type Output = $offset;

            fn sub(self, lower: Self) -> $offset {
                self.0 - lower.0
            }
        }

        impl BusAddress for $address {
            type V = $offset;

            #[inline]
            fn value(&self) -> $offset {
                self.0
            }

            #[inline]
            fn checked_add(&self, value: $offset) -> Option<Self> {
                self.0.checked_add(value).map($address)
            }
        }
    };
}

bus_address!(MmioAddress, MmioAddressOffset);
bus_address!(PioAddress, PioAddressOffset);
