//! Base address registers and the expansion ROM's: what a function wants of the address spaces, and where the guest put it.
//!
//! Sizing needs no code: the address bits below the size are read-only zeros, so a guest that writes ones reads the size
//! (PCI Local Bus 3.0, 6.2.5.1).
use super::PciError;
use super::config::{ConfigSpace, Rule};
use super::regs::*;

/// The number that the expansion ROM has among a function's BARs, which have 0 to 5.
pub const ROM_BAR: u8 = 6;

/// An address space that BARs lie in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Space {
    /// Ports, with addresses of 16 bits.
    Io,
    /// Memory.
    Memory,
}

/// What a base address register asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BarKind {
    /// Ports; 4 to 256 bytes.
    Io,
    /// Memory below 4 GiB; 16 bytes to 2 GiB.
    Memory32 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
    /// Memory anywhere, in two registers; 16 bytes to 2^63.
    Memory64 {
        /// Reads have no side effects.
        prefetchable: bool,
    },
}

impl BarKind {
    /// The space that it lies in.
    pub fn space(self) -> Space {
        match self {
            BarKind::Io => Space::Io,
            _ => Space::Memory,
        }
    }

    /// Its read-only low bits, PCI Local Bus 3.0, 6.2.5.1.
    fn flags(self) -> u32 {
        match self {
            BarKind::Io => 1,
            BarKind::Memory32 { prefetchable } => u32::from(prefetchable) << 3,
            BarKind::Memory64 { prefetchable } => 4 | u32::from(prefetchable) << 3,
        }
    }

    fn sizes(self) -> std::ops::RangeInclusive<u64> {
        match self {
            BarKind::Io => 4..=256,
            BarKind::Memory32 { .. } => 16..=1 << 31,
            BarKind::Memory64 { .. } => 16..=1 << 63,
        }
    }
}

/// A base address register of some function: its number (0 to 5, or [`ROM_BAR`]) and what it asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bar {
    pub(crate) index: u8,
    pub(crate) kind: BarKind,
    /// In bytes, a power of two.
    pub(crate) size: u64,
    /// Offset of the register.
    at: u16,
}

/// A range that a function answers to now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) bar: u8,
    pub(crate) space: Space,
    pub(crate) base: u64,
    /// In bytes, not 0; `base + (size - 1)` does not overflow.
    pub(crate) size: u64,
}

impl Bar {
    /// A BAR 0 to 5, not yet in any configuration space.
    pub(crate) fn new(index: u8, kind: BarKind, size: u64) -> Result<Bar, PciError> {
        let last = if matches!(kind, BarKind::Memory64 { .. }) { 4 } else { 5 };
        if index > last {
            return Err(PciError::BarIndex(index));
        }
        if !size.is_power_of_two() || !kind.sizes().contains(&size) {
            return Err(PciError::BarSize { bar: index, size });
        }
        Ok(Bar { index, kind, size, at: BAR0 + 4 * u16::from(index) })
    }

    /// The expansion ROM of a type 0 function: 2 KiB to 16 MiB, PCI Local Bus 3.0, 6.2.5.2.
    pub(crate) fn rom(size: u64) -> Result<Bar, PciError> {
        if !size.is_power_of_two() || !(1 << 11..=1 << 24).contains(&size) {
            return Err(PciError::BarSize { bar: ROM_BAR, size });
        }
        Ok(Bar { index: ROM_BAR, kind: BarKind::Memory32 { prefetchable: false }, size, at: ROM })
    }

    /// The registers that it takes.
    pub(crate) fn registers(&self) -> std::ops::Range<u8> {
        let count = if matches!(self.kind, BarKind::Memory64 { .. }) { 2 } else { 1 };
        self.index..self.index + count
    }

    /// Puts the register into a configuration space.
    pub(crate) fn define(&self, config: &mut ConfigSpace) {
        let address = !(self.size - 1);
        let low = address as u32;
        let write = match self.kind {
            _ if self.index == ROM_BAR => low & 0xffff_f800 | ROM_ENABLE,
            BarKind::Io => low & !3,
            _ => low & !15,
        };
        config.define(self.at, &self.kind.flags().to_le_bytes());
        config.rule(&Rule { at: self.at, width: 4, write, clear: 0 });
        if matches!(self.kind, BarKind::Memory64 { .. }) {
            let write = (address >> 32) as u32;
            config.rule(&Rule { at: self.at + 4, width: 4, write, clear: 0 });
        }
    }

    /// Where it is, if the function decodes it: `COMMAND` says so, for a ROM its own enable bit as well, and the range ends
    /// within the space.
    pub(crate) fn claim(&self, config: &ConfigSpace) -> Option<Claim> {
        let command = config.u16(COMMAND);
        let low = config.u32(self.at);
        let (enable, base, end) = match self.kind {
            BarKind::Io => (COMMAND_IO, u64::from(low & !3), 0xffff),
            BarKind::Memory32 { .. } if self.index == ROM_BAR => {
                (COMMAND_MEMORY, u64::from(low & 0xffff_f800), u64::from(u32::MAX))
            }
            BarKind::Memory32 { .. } => (COMMAND_MEMORY, u64::from(low & !15), u64::from(u32::MAX)),
            BarKind::Memory64 { .. } => {
                let high = u64::from(config.u32(self.at + 4)) << 32;
                (COMMAND_MEMORY, high | u64::from(low & !15), u64::MAX)
            }
        };
        let on = command & enable != 0 && (self.index != ROM_BAR || low & ROM_ENABLE != 0);
        let fits = base.checked_add(self.size - 1).is_some_and(|last| last <= end);
        (on && fits).then_some(Claim { bar: self.index, space: self.kind.space(), base, size: self.size })
    }
}

#[cfg(test)]
mod tests {
    use super::super::config::TYPE_0;
    use super::*;

    fn with(bar: &Bar) -> ConfigSpace {
        let mut config = ConfigSpace::new(CONVENTIONAL);
        config.rules(TYPE_0);
        bar.define(&mut config);
        config
    }

    #[test]
    fn pci_6_2_5_1_a_guest_that_writes_ones_reads_the_size_and_the_kind() {
        let memory64 = BarKind::Memory64 { prefetchable: true };
        for (kind, size, low, high) in [
            (BarKind::Io, 4, 0xffff_fffd, 0),
            (BarKind::Io, 256, 0xffff_ff01, 0),
            (BarKind::Memory32 { prefetchable: false }, 16, 0xffff_fff0, 0),
            (BarKind::Memory32 { prefetchable: true }, 1 << 31, 0x8000_0008, 0),
            (memory64, 1 << 14, 0xffff_c00c, u32::MAX),
            (memory64, 1 << 40, 0x0000_000c, 0xffff_ff00),
            (memory64, 1 << 63, 0x0000_000c, 0x8000_0000),
        ] {
            let mut config = with(&Bar::new(2, kind, size).unwrap());
            config.write(0x18, &[0xff; 4]);
            config.write(0x1c, &[0xff; 4]);
            assert_eq!((config.u32(0x18), config.u32(0x1c)), (low, high), "{kind:?} {size:#x}");
        }
        let mut config = with(&Bar::rom(1 << 16).unwrap());
        config.write(ROM, &[0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(config.u32(ROM), 0xffff_0000);
    }

    #[test]
    fn pci_6_2_5_registers_and_sizes_that_cannot_be_are_refused() {
        let memory64 = BarKind::Memory64 { prefetchable: false };
        assert!(matches!(Bar::new(5, memory64, 1 << 12), Err(PciError::BarIndex(5))));
        assert!(matches!(Bar::new(6, BarKind::Io, 8), Err(PciError::BarIndex(6))));
        for (kind, size) in [(BarKind::Io, 0), (BarKind::Io, 512), (memory64, 24), (memory64, 8)] {
            assert!(matches!(Bar::new(0, kind, size), Err(PciError::BarSize { .. })), "{kind:?} {size}");
        }
        assert!(Bar::rom(1024).is_err());
        assert!(Bar::rom(1 << 25).is_err());
    }

    #[test]
    fn pci_6_2_2_nothing_is_decoded_while_command_says_no() {
        let bar = Bar::new(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
        let mut config = with(&bar);
        config.write(BAR0, &0xe000_0000_u32.to_le_bytes());
        assert_eq!(bar.claim(&config), None);
        config.write(COMMAND, &[1]);
        assert_eq!(bar.claim(&config), None, "only I/O");
        config.write(COMMAND, &[2]);
        let claim = Claim { bar: 0, space: Space::Memory, base: 0xe000_0000, size: 0x1000 };
        assert_eq!(bar.claim(&config), Some(claim));
        let rom = Bar::rom(0x1000).unwrap();
        rom.define(&mut config);
        config.write(ROM, &0xe100_0000_u32.to_le_bytes());
        assert_eq!(rom.claim(&config), None);
        config.write(ROM, &0xe100_0001_u32.to_le_bytes());
        assert_eq!(rom.claim(&config).unwrap().base, 0xe100_0000);
        config.write(COMMAND, &[0]);
        assert_eq!(rom.claim(&config), None);
    }

    #[test]
    fn pci_a_range_beyond_its_space_is_not_decoded() {
        let bar = Bar::new(0, BarKind::Io, 16).unwrap();
        let mut config = with(&bar);
        config.write(COMMAND, &[3]);
        config.write(BAR0, &0x1_0000_u32.to_le_bytes());
        assert_eq!(bar.claim(&config), None);
        config.write(BAR0, &0xfff0_u32.to_le_bytes());
        assert_eq!(bar.claim(&config).unwrap().base, 0xfff0);
        // The last range of the space, whose end is 2^64, is one.
        let bar = Bar::new(0, BarKind::Memory64 { prefetchable: false }, 1 << 20).unwrap();
        let mut config = with(&bar);
        config.write(COMMAND, &[3]);
        config.write(BAR0, &[0xff; 4]);
        config.write(BAR0 + 4, &[0xff; 4]);
        assert_eq!(bar.claim(&config).unwrap().base, u64::MAX - 0xf_ffff);
    }
}
