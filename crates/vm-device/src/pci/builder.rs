//! Describes a function, piece by piece; each is checked when it is added.
use std::sync::Arc;

use super::bar::{Bar, BarKind, ROM_BAR, Space};
use super::capability::{Capability, ExtendedCapability, Lists, Watched};
use super::config::{ConfigSpace, Rule, TYPE_0, TYPE_1};
use super::express::{self, Place, PortKind};
use super::function::Function;
use super::interrupts::{Interrupts, Mechanism, Pin};
use super::regs::*;
use super::slot::Slot;
use super::{PciDevice, PciError};
use crate::interrupt::Messages;

/// Most vectors of MSI.
const MAX_MSI: u16 = 32;
/// Most vectors of MSI-X.
const MAX_MSIX: u16 = 2048;

/// What a function calls itself: PCI Local Bus 3.0, 6.2.1 and 6.2.4.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Identity {
    /// Vendor ID.
    pub vendor: u16,
    /// Device ID.
    pub device: u16,
    /// Revision ID.
    pub revision: u8,
    /// Class code, 24 bits: base class, sub-class, programming interface.
    pub class: u32,
    /// Subsystem vendor ID; bridges have none.
    pub subsystem_vendor: u16,
    /// Subsystem ID; bridges have none.
    pub subsystem: u16,
}

/// Where the MSI-X structures are, PCI Local Bus 3.0, 6.8.2.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsixLayout {
    /// How many vectors: 1 to 2048.
    pub vectors: u16,
    /// The BAR of the table, which has 16 bytes for each vector.
    pub table_bar: u8,
    /// Where the table begins in it; a multiple of 8.
    pub table_offset: u32,
    /// The BAR of the pending bits, which are 8 bytes for each 64 vectors.
    pub pending_bar: u8,
    /// Where the pending bits begin in it; a multiple of 8.
    pub pending_offset: u32,
}

impl MsixLayout {
    fn table_len(&self) -> u64 {
        u64::from(self.vectors) * 16
    }

    fn pending_len(&self) -> u64 {
        u64::from(self.vectors.div_ceil(64)) * 8
    }

    pub(super) fn table(&self) -> Part {
        Part { bar: self.table_bar, from: self.table_offset.into(), len: self.table_len() }
    }

    pub(super) fn pending(&self) -> Part {
        Part { bar: self.pending_bar, from: self.pending_offset.into(), len: self.pending_len() }
    }
}

/// A part of a BAR.
#[derive(Clone, Copy)]
pub(super) struct Part {
    bar: u8,
    from: u64,
    len: u64,
}

impl Part {
    pub(super) fn overlaps(&self, bar: u8, offset: u64, len: u64) -> bool {
        let end = |from: u64, len: u64| from.saturating_add(len);
        self.bar == bar && self.from < end(offset, len) && offset < end(self.from, self.len)
    }

    /// Where in this part an access is, if all of it is.
    pub(super) fn offset_of(&self, offset: u64, len: u64) -> Option<u64> {
        let within = offset.checked_sub(self.from)?;
        (within.checked_add(len)? <= self.len).then_some(within)
    }
}

/// Describes a function, piece by piece; each is checked when it is added.
///
/// ```
/// use vm_device::pci::{BarKind, Capability, FunctionBuilder, Identity, Pin};
///
/// let identity = Identity { vendor: 0x1b36, device: 0x0005, class: 0x00ff00, ..Identity::default() };
/// let mut builder = FunctionBuilder::new("test device", identity);
/// builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000)?;
/// builder.pin(Pin::A);
/// let at = builder.capability(&Capability::new(Capability::VENDOR, [4, 0]))?;
/// assert_eq!(at, 0x40);
/// # Ok::<(), vm_device::pci::PciError>(())
/// ```
pub struct FunctionBuilder {
    pub(super) name: String,
    pub(super) config: ConfigSpace,
    lists: Lists,
    pub(super) bars: Vec<Bar>,
    pub(super) rom: Option<Arc<[u8]>>,
    pub(super) watched: Vec<Watched>,
    pub(super) express: Option<u16>,
    pin: Option<Pin>,
    pub(super) msi: Option<(u16, u16)>,
    pub(super) msix: Option<(u16, MsixLayout)>,
}

impl FunctionBuilder {
    /// A function with a type 0 header. The name is for people.
    pub fn new(name: impl Into<String>, identity: Identity) -> FunctionBuilder {
        let mut builder = FunctionBuilder::with(name.into(), identity, TYPE_0);
        builder.config.define(SUBSYSTEM_VENDOR, &identity.subsystem_vendor.to_le_bytes());
        builder.config.define(SUBSYSTEM, &identity.subsystem.to_le_bytes());
        builder
    }

    /// A bridge, with a type 1 header, 64-bit prefetchable and 16-bit I/O windows.
    pub(crate) fn bridge(name: String, identity: Identity) -> FunctionBuilder {
        let mut builder = FunctionBuilder::with(name, Identity { class: 0x06_0400, ..identity }, TYPE_1);
        builder.config.define(HEADER_TYPE, &[1]);
        // All windows closed, or a guest that enables the bridge first would open them over the first MiB.
        builder.config.define(IO_BASE, &[0xf0, 0x00]);
        builder.config.define(MEMORY_BASE, &[0xf0, 0xff, 0x00, 0x00]);
        builder.config.define(PREFETCH_BASE, &[0xf1, 0xff, 0x01, 0x00]);
        builder
    }

    fn with(name: String, identity: Identity, rules: &[Rule]) -> FunctionBuilder {
        let mut config = ConfigSpace::new(CONVENTIONAL);
        config.rules(rules);
        config.define(VENDOR_ID, &identity.vendor.to_le_bytes());
        config.define(DEVICE_ID, &identity.device.to_le_bytes());
        let class = identity.class << 8 | u32::from(identity.revision);
        config.define(REVISION, &class.to_le_bytes());
        FunctionBuilder {
            name,
            config,
            lists: Lists::new(),
            bars: Vec::new(),
            rom: None,
            watched: Vec::new(),
            express: None,
            pin: None,
            msi: None,
            msix: None,
        }
    }

    /// Adds a BAR; one of 64 bits takes the next number, too.
    ///
    /// # Errors
    /// A number that there is not or that is taken; a size that is no power of two, or too small or large for its kind.
    pub fn bar(&mut self, index: u8, kind: BarKind, size: u64) -> Result<(), PciError> {
        let bar = Bar::new(index, kind, size)?;
        let wanted = bar.registers();
        if self.bars.iter().any(|other| {
            let taken = other.registers();
            taken.start < wanted.end && wanted.start < taken.end
        }) {
            return Err(PciError::BarTaken(index));
        }
        bar.define(&mut self.config);
        self.bars.push(bar);
        Ok(())
    }

    /// Adds an expansion ROM with this content, padded to a power of two from 2 KiB to 16 MiB. The guest cannot write it.
    ///
    /// # Errors
    /// It is too large, or there is one already.
    pub fn rom(&mut self, image: impl Into<Arc<[u8]>>) -> Result<(), PciError> {
        let image = image.into();
        if self.rom.is_some() {
            return Err(PciError::BarTaken(ROM_BAR));
        }
        let size = u64::try_from(image.len()).ok().and_then(u64::checked_next_power_of_two).unwrap_or(0);
        let bar = Bar::rom(size.max(2048))?;
        bar.define(&mut self.config);
        self.bars.push(bar);
        self.rom = Some(image);
        Ok(())
    }

    /// Adds a capability behind those that there are, and says where.
    ///
    /// # Errors
    /// There is no room left below byte 256.
    pub fn capability(&mut self, capability: &Capability) -> Result<u8, PciError> {
        let (at, watched) = self.lists.add(&mut self.config, capability)?;
        self.watched.extend(watched);
        Ok(at)
    }

    /// Adds an extended capability, and says where. The function needs [`express`](Self::express), too, or its guest does
    /// not look for it.
    ///
    /// # Errors
    /// There is no room left.
    pub fn extended_capability(&mut self, capability: &ExtendedCapability) -> Result<u16, PciError> {
        self.lists.add_extended(&mut self.config, capability)
    }

    /// Makes it a PCI Express function: with that capability, function level reset, and 4096 bytes of configuration space.
    ///
    /// # Errors
    /// There is no room left, or it is one already.
    pub fn express(&mut self) -> Result<(), PciError> {
        if self.express.is_some() {
            return Err(PciError::Twice(CAP_EXPRESS));
        }
        let at = self.capability(&express::capability())?;
        self.config.grow(EXTENDED);
        self.express = Some(at.into());
        express::place(&mut self.config, at.into(), Place::Integrated);
        Ok(())
    }

    /// Gives it an interrupt pin.
    pub fn pin(&mut self, pin: Pin) {
        self.pin = Some(pin);
        self.config.define(INTERRUPT_PIN, &[pin as u8]);
    }

    /// Adds MSI with so many vectors: 1, 2, 4, 8, 16 or 32. 64-bit addresses and masks.
    ///
    /// # Errors
    /// Another number, no room left, or it has MSI or MSI-X already.
    pub fn msi(&mut self, vectors: u16) -> Result<(), PciError> {
        if self.mechanism().is_some() {
            return Err(PciError::Twice(CAP_MSI));
        }
        if !vectors.is_power_of_two() || vectors > MAX_MSI {
            return Err(PciError::VectorCount(vectors));
        }
        // Multiple message capable, 64-bit, masks.
        let control = (vectors.trailing_zeros() as u16) << 1 | 1 << 7 | 1 << 8;
        let mut body = vec![0; 22];
        body.splice(..2, control.to_le_bytes());
        let masks = u32::MAX >> (32 - u32::from(vectors));
        let rules = [
            Rule { at: MSI_CONTROL, width: 2, write: 0x71, clear: 0 },
            Rule { at: MSI_ADDRESS, width: 4, write: !3, clear: 0 },
            Rule { at: MSI_ADDRESS_HIGH, width: 4, write: u32::MAX, clear: 0 },
            Rule { at: MSI_DATA, width: 2, write: 0xffff, clear: 0 },
            Rule { at: MSI_MASK, width: 4, write: masks, clear: 0 },
        ];
        let at = self.capability(&Capability::new(CAP_MSI, body).rules(&rules))?;
        self.msi = Some((at.into(), vectors));
        Ok(())
    }

    /// Adds MSI-X. Accesses to its table and pending bits do not reach the device.
    ///
    /// # Errors
    /// The structures are not inside of memory BARs that were added before, are not aligned or overlap; 0 or more than 2048
    /// vectors; no room left, or it has MSI or MSI-X already.
    pub fn msix(&mut self, layout: MsixLayout) -> Result<(), PciError> {
        if self.mechanism().is_some() {
            return Err(PciError::Twice(CAP_MSIX));
        }
        if !(1..=MAX_MSIX).contains(&layout.vectors) {
            return Err(PciError::VectorCount(layout.vectors));
        }
        let (table, pending) = (layout.table(), layout.pending());
        for part in [table, pending] {
            let fits = |bar: &Bar| {
                let memory =
                    bar.index == part.bar && bar.kind.space() == Space::Memory && bar.index != ROM_BAR;
                memory && part.from + part.len <= bar.size
            };
            if part.from % 8 != 0 || !self.bars.iter().any(fits) {
                return Err(PciError::MsixPlace);
            }
        }
        if table.overlaps(pending.bar, pending.from, pending.len) {
            return Err(PciError::MsixPlace);
        }
        let mut body = Vec::with_capacity(10);
        body.extend((layout.vectors - 1).to_le_bytes());
        body.extend((layout.table_offset | u32::from(layout.table_bar)).to_le_bytes());
        body.extend((layout.pending_offset | u32::from(layout.pending_bar)).to_le_bytes());
        let control = u32::from(MSIX_ENABLE | MSIX_MASK_ALL);
        let at = self.capability(&Capability::new(CAP_MSIX, body).writable(MSIX_CONTROL, 2, control))?;
        self.msix = Some((at.into(), layout));
        Ok(())
    }

    /// How many vectors its MSI or MSI-X has: so many [`build`](Self::build) needs.
    pub fn vectors(&self) -> u16 {
        self.mechanism().map_or(0, |(_, vectors)| vectors)
    }

    fn mechanism(&self) -> Option<(Mechanism, u16)> {
        let msix = self.msix.map(|(at, layout)| (Mechanism::Msix(at), layout.vectors));
        msix.or(self.msi.map(|(at, vectors)| (Mechanism::Msi(at), vectors)))
    }

    /// Makes the function: with messages for its vectors, if it has any, and the device that is given the function's
    /// interrupts.
    ///
    /// # Errors
    /// Another number of messages than vectors.
    pub fn build(
        self,
        messages: Option<Messages>,
        device: impl FnOnce(&Interrupts) -> Arc<dyn PciDevice>,
    ) -> Result<Function, PciError> {
        let interrupts = Interrupts::new(self.pin, messages, self.mechanism())?;
        let device = device(&interrupts);
        Ok(Function::of(self, interrupts, Some(device), None, None))
    }

    /// Makes the bridge.
    pub(crate) fn build_port(
        mut self,
        kind: PortKind,
        number: Option<u16>,
        messages: Messages,
    ) -> Result<Function, PciError> {
        self.express()?;
        self.msi(1)?;
        self.pin(Pin::A);
        let interrupts = Interrupts::new(self.pin, Some(messages), self.mechanism())?;
        let slot = match self.express {
            Some(at) => {
                express::place(&mut self.config, at, Place::Port(kind, number));
                kind.has_link().then(|| Slot::new(&mut self.config, at, number.is_some()))
            }
            None => None,
        };
        Ok(Function::of(self, interrupts, None, Some(kind), slot))
    }
}
