//! A PCI function: configuration space, BARs, capabilities and interrupts around a device, or around a bridge.
//!
//! [`FunctionBuilder`] makes it, [`Function`] serves accesses. What a write to configuration space means for others (the
//! address map, what is behind a bridge) comes back as [`Effects`], for [`RootComplex`](super::RootComplex) to carry out.
//!
//! Lock: `inside` is held while registers change, never while a device is called.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use device_state::StateError;
use serde::{Deserialize, Serialize};

use super::bar::{Bar, BarKind, Claim, ROM_BAR, Space};
use super::bridge::{self, Window};
use super::capability::{Capability, ExtendedCapability, Lists, Watched};
use super::config::{ConfigSpace, Rule, TYPE_0, TYPE_1};
use super::express::{self, Place, PortKind};
use super::interrupts::{Interrupts, Mechanism, Pin, SavedInterrupts};
use super::regs::*;
use super::slot::{Outcome, Slot};
use super::{CapabilityAccess, PciDevice, PciError};
use crate::interrupt::Messages;
use crate::sync::{Mutex, lock};

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

    fn table(&self) -> Part {
        Part { bar: self.table_bar, from: self.table_offset.into(), len: self.table_len() }
    }

    fn pending(&self) -> Part {
        Part { bar: self.pending_bar, from: self.pending_offset.into(), len: self.pending_len() }
    }
}

/// A part of a BAR.
#[derive(Clone, Copy)]
struct Part {
    bar: u8,
    from: u64,
    len: u64,
}

impl Part {
    fn overlaps(&self, bar: u8, offset: u64, len: u64) -> bool {
        let end = |from: u64, len: u64| from.saturating_add(len);
        self.bar == bar && self.from < end(offset, len) && offset < end(self.from, self.len)
    }

    /// Where in this part an access is, if all of it is.
    fn offset_of(&self, offset: u64, len: u64) -> Option<u64> {
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
    name: String,
    config: ConfigSpace,
    lists: Lists,
    bars: Vec<Bar>,
    rom: Option<Arc<[u8]>>,
    watched: Vec<Watched>,
    express: Option<u16>,
    pin: Option<Pin>,
    msi: Option<(u16, u16)>,
    msix: Option<(u16, MsixLayout)>,
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
        builder.config.define(PREFETCH_BASE, &[1, 0, 1, 0]);
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
        Ok(self.finish(interrupts, Some(device), None))
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
        Ok(self.finish(interrupts, None, Some(Bridge { kind, buses: AtomicU16::new(0) }).zip(Some(slot))))
    }

    fn finish(
        self,
        interrupts: Interrupts,
        device: Option<Arc<dyn PciDevice>>,
        bridge: Option<(Bridge, Option<Slot>)>,
    ) -> Function {
        let (bridge, slot) = match bridge {
            Some((bridge, slot)) => (Some(bridge), slot),
            None => (None, None),
        };
        let open = bridge.is_some() && slot.is_none();
        Function {
            name: self.name,
            inside: Mutex::new(Inside { config: self.config, slot, notified: false }),
            bars: self.bars,
            rom: self.rom,
            watched: self.watched,
            express: self.express,
            msi: self.msi.map(|(at, _)| at),
            msix: self.msix,
            interrupts,
            device,
            bridge,
            link: AtomicBool::new(open),
            failed: AtomicBool::new(false),
        }
    }
}

struct Inside {
    config: ConfigSpace,
    /// Of a bridge whose lower side is a link.
    slot: Option<Slot>,
    /// Whether the guest was interrupted for the slot's events that are there.
    notified: bool,
}

struct Bridge {
    kind: PortKind,
    /// Secondary and subordinate bus number, for routing without a lock.
    buses: AtomicU16,
}

/// A PCI function.
pub struct Function {
    name: String,
    inside: Mutex<Inside>,
    bars: Vec<Bar>,
    rom: Option<Arc<[u8]>>,
    watched: Vec<Watched>,
    express: Option<u16>,
    msi: Option<u16>,
    msix: Option<(u16, MsixLayout)>,
    interrupts: Interrupts,
    device: Option<Arc<dyn PciDevice>>,
    bridge: Option<Bridge>,
    /// Whether what is behind this bridge can be reached.
    link: AtomicBool,
    /// A call of the device, outside of an access, has panicked.
    failed: AtomicBool,
}

impl std::fmt::Debug for Function {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Function").field("name", &self.name).finish_non_exhaustive()
    }
}

/// What a write to configuration space leads to.
#[derive(Default)]
pub(crate) struct Effects {
    /// Ranges are decoded, or windows open, other than before.
    pub(crate) decode: bool,
    /// The function was told to reset itself.
    pub(crate) reset: bool,
    /// All that is behind the bridge is reset.
    pub(crate) secondary_reset: bool,
    pub(crate) slot: Outcome,
    /// A watched capability, as it is after the write, and the offset of the write in it.
    watched: Option<(Watched, u16, Vec<u8>)>,
}

impl Function {
    /// The name that it was given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its interrupts.
    pub fn interrupts(&self) -> &Interrupts {
        &self.interrupts
    }

    /// Its device; bridges have none.
    pub fn device(&self) -> Option<&Arc<dyn PciDevice>> {
        self.device.as_ref()
    }

    /// Whether its device panicked when it was told of something. Panics in accesses are the bus's.
    pub fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    pub(crate) fn bars(&self) -> &[Bar] {
        &self.bars
    }

    pub(crate) fn port_kind(&self) -> Option<PortKind> {
        self.bridge.as_ref().map(|bridge| bridge.kind)
    }

    /// Secondary and subordinate bus number.
    pub(crate) fn buses(&self) -> (u8, u8) {
        let buses = self.bridge.as_ref().map_or(0, |bridge| bridge.buses.load(Ordering::Acquire));
        let [secondary, subordinate] = buses.to_le_bytes();
        (secondary, subordinate)
    }

    pub(crate) fn link_is_up(&self) -> bool {
        self.link.load(Ordering::Acquire)
    }

    /// Gives it its place in the tree.
    pub(crate) fn place(&self, integrated: bool, multifunction: bool) {
        let mut inside = lock(&self.inside);
        if let (Some(at), None) = (self.express, &self.bridge) {
            let place = if integrated { Place::Integrated } else { Place::Endpoint };
            express::place(&mut inside.config, at, place);
        }
        let header = inside.config.u8(HEADER_TYPE) & !HEADER_MULTIFUNCTION;
        let multifunction = if multifunction { HEADER_MULTIFUNCTION } else { 0 };
        inside.config.define(HEADER_TYPE, &[header | multifunction]);
    }

    /// The ranges that it answers to now, were there no bridges above it.
    pub(crate) fn claims(&self) -> Vec<Claim> {
        self.claims_of(&lock(&self.inside).config)
    }

    fn claims_of(&self, config: &ConfigSpace) -> Vec<Claim> {
        self.bars.iter().filter_map(|bar| bar.claim(config)).collect()
    }

    /// What a bridge lets through.
    pub(crate) fn windows(&self) -> Vec<Window> {
        bridge::windows(&lock(&self.inside).config)
    }

    fn decoding(&self, config: &ConfigSpace) -> (Vec<Claim>, Vec<Window>) {
        let windows = if self.bridge.is_some() { bridge::windows(config) } else { Vec::new() };
        (self.claims_of(config), windows)
    }

    fn watched_at(&self, offset: u16, len: usize) -> Option<Watched> {
        let (from, to) = (usize::from(offset), usize::from(offset) + len);
        let meets =
            |watched: &&Watched| from < usize::from(watched.at + watched.len) && usize::from(watched.at) < to;
        self.watched.iter().find(meets).copied()
    }

    /// Tells the device of an access to a watched capability; `offset` is in configuration space.
    fn tell(
        &self,
        watched: Watched,
        bytes: &[u8],
        offset: u16,
        call: impl FnOnce(&dyn PciDevice, CapabilityAccess<'_>),
    ) {
        // Accesses stay in a double word and capabilities begin at one, so none begins before its capability.
        let offset = offset.saturating_sub(watched.at);
        if let (Some(device), Ok(at)) = (&self.device, u8::try_from(watched.at)) {
            call(&**device, CapabilityAccess { at, offset, bytes });
        }
    }

    /// The guest reads configuration space.
    pub(crate) fn config_read(&self, offset: u16, data: &mut [u8]) {
        let mut inside = lock(&self.inside);
        let config = &mut inside.config;
        if offset & !3 == COMMAND {
            config.set_bits(STATUS, STATUS_INTERRUPT, self.interrupts.intx_wanted());
        }
        if let Some(at) = self.msi.filter(|at| offset & !3 == at + MSI_PENDING) {
            let pending = self.interrupts.messages().map_or(0, Messages::msi_pending);
            config.put(at + MSI_PENDING, &pending.to_le_bytes());
        }
        config.read(offset, data);
        let watched = self.watched_at(offset, data.len());
        let watched = watched.filter(|_| super::config::is_valid(offset.into(), data.len()));
        let watched = watched.map(|watched| (watched, config.bytes(watched.at, watched.len)));
        drop(inside);
        if let Some((watched, bytes)) = watched {
            self.tell(watched, &bytes, offset, |device, access| device.capability_read(access, data));
        }
    }

    /// The guest writes configuration space. [`config_written`](Self::config_written) has to follow when the effects are
    /// carried out.
    pub(crate) fn config_write(&self, offset: u16, data: &[u8]) -> Effects {
        let mut effects = Effects::default();
        let mut inside = lock(&self.inside);
        let Inside { config, slot, .. } = &mut *inside;
        let writable = config.is_writable(offset, data.len());
        let header = offset < HEADER_END && writable;
        let before = header.then(|| (self.decoding(config), config.u16(BRIDGE_CONTROL)));
        if !config.write(offset, data) {
            return effects;
        }
        if let Some((decoding, control)) = before {
            effects.decode = decoding != self.decoding(config);
            let rises = !control & config.u16(BRIDGE_CONTROL) & BRIDGE_RESET != 0;
            effects.secondary_reset = self.bridge.is_some() && rises;
        }
        if writable {
            effects.reset = self.bridge.is_none() && self.wrote_flr(offset, data);
            if let Some(slot) = slot {
                effects.slot = slot.written(config, offset, data.len());
                self.link.store(slot.link_is_up(config), Ordering::Release);
            }
            self.registers_changed(&mut inside);
        }
        let watched = self.watched_at(offset, data.len());
        effects.watched = watched.map(|watched| {
            let bytes = inside.config.bytes(watched.at, watched.len);
            (watched, offset, bytes)
        });
        effects
    }

    /// Tells the device of a write to a watched capability.
    pub(crate) fn config_written(&self, effects: &Effects, data: &[u8]) {
        if let Some((watched, offset, bytes)) = &effects.watched {
            self.tell(*watched, bytes, *offset, |device, access| device.capability_write(access, data));
        }
    }

    /// Whether a write has the bit for a function level reset, which reads as 0.
    fn wrote_flr(&self, offset: u16, data: &[u8]) -> bool {
        let Some(at) = self.express else { return false };
        let high = at + EXP_DEVICE_CONTROL + 1;
        let byte = high.checked_sub(offset).and_then(|n| data.get(usize::from(n)));
        byte.is_some_and(|byte| u16::from(*byte) << 8 & DEVICE_CONTROL_FLR != 0)
    }

    /// Brings up to date what follows from the registers.
    fn registers_changed(&self, inside: &mut Inside) {
        let Inside { config, slot, notified } = inside;
        if let Some(bridge) = &self.bridge {
            let buses = u16::from_le_bytes([config.u8(SECONDARY), config.u8(SUBORDINATE)]);
            bridge.buses.store(buses, Ordering::Release);
        }
        self.interrupts.update(config);
        if let Some(slot) = slot {
            let interrupt = slot.interrupt(config);
            self.interrupts.set_intx(interrupt);
            // By message once for each time that the condition becomes true, 6.7.3.4.
            if interrupt && !*notified {
                self.interrupts.signal(0);
            }
            *notified = interrupt;
        }
    }

    /// Does something to the port's slot, and tells the guest.
    pub(crate) fn with_slot(&self, act: impl FnOnce(&mut Slot, &mut ConfigSpace) -> Outcome) -> Outcome {
        let mut inside = lock(&self.inside);
        let Inside { config, slot, .. } = &mut *inside;
        let Some(slot) = slot else { return Outcome::default() };
        let outcome = act(slot, config);
        self.link.store(slot.link_is_up(config), Ordering::Release);
        self.registers_changed(&mut inside);
        outcome
    }

    /// Reads something of the port's slot.
    pub(crate) fn slot<T>(&self, look: impl FnOnce(&Slot, &ConfigSpace) -> T) -> Option<T> {
        let inside = lock(&self.inside);
        inside.slot.as_ref().map(|slot| look(slot, &inside.config))
    }

    /// As after power-on, the device too.
    pub(crate) fn reset(&self) -> Outcome {
        let mut inside = lock(&self.inside);
        let Inside { config, slot, .. } = &mut *inside;
        config.reset();
        let outcome = slot.as_mut().map(|slot| slot.reset(config)).unwrap_or_default();
        if let Some(slot) = slot {
            self.link.store(slot.link_is_up(config), Ordering::Release);
        }
        self.interrupts.reset(config);
        inside.notified = false;
        self.registers_changed(&mut inside);
        drop(inside);
        self.call(|device| device.reset());
        outcome
    }

    /// Calls the device from outside of an access, where no bus catches what it throws.
    pub(crate) fn call(&self, what: impl FnOnce(&dyn PciDevice)) {
        let Some(device) = &self.device else { return };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| what(&**device)));
        if let Err(thrown) = result {
            self.failed.store(true, Ordering::Relaxed);
            // What was thrown may panic again when it is dropped.
            std::mem::forget(thrown);
        }
    }

    /// The guest reads a BAR.
    pub(crate) fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        let len = data.len() as u64;
        if bar == ROM_BAR {
            let image = usize::try_from(offset).ok().and_then(|at| self.rom.as_deref()?.get(at..));
            data.fill(0xff);
            data.iter_mut().zip(image.unwrap_or(&[])).for_each(|(byte, image)| *byte = *image);
            return;
        }
        if let (Some((_, layout)), Some(messages)) = (&self.msix, self.interrupts.messages()) {
            let (table, pending) = (layout.table(), layout.pending());
            if table.overlaps(bar, offset, len) {
                return match table.offset_of(offset, len) {
                    Some(offset) => messages.table_read(offset, data),
                    None => data.fill(0xff),
                };
            }
            if pending.overlaps(bar, offset, len) {
                return match pending.offset_of(offset, len) {
                    Some(offset) => messages.pba_read(offset, data),
                    None => data.fill(0xff),
                };
            }
        }
        match &self.device {
            Some(device) => device.bar_read(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// The guest writes a BAR.
    pub(crate) fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        let len = data.len() as u64;
        if bar == ROM_BAR {
            return;
        }
        if let (Some((_, layout)), Some(messages)) = (&self.msix, self.interrupts.messages()) {
            let table = layout.table();
            if table.overlaps(bar, offset, len) {
                if let Some(offset) = table.offset_of(offset, len) {
                    messages.table_write(offset, data);
                }
                return;
            }
            if layout.pending().overlaps(bar, offset, len) {
                return;
            }
        }
        if let Some(device) = &self.device {
            device.bar_write(bar, offset, data);
        }
    }

    pub(crate) fn save(&self) -> SavedFunction {
        let inside = lock(&self.inside);
        SavedFunction {
            config: inside.config.save(),
            interrupts: self.interrupts.save(),
            asked_back: inside.slot.as_ref().is_some_and(Slot::asked_back),
            notified: inside.notified,
        }
    }

    pub(crate) fn check(&self, saved: &SavedFunction) -> Result<(), StateError> {
        let inside = lock(&self.inside);
        inside.config.check(&saved.config)?;
        self.interrupts.check(&saved.interrupts)?;
        if (saved.asked_back || saved.notified) && !inside.slot.as_ref().is_some_and(Slot::hot_plug) {
            return Err(StateError::refused("hot plug of a function without a slot"));
        }
        Ok(())
    }

    /// Takes over what was [checked](Self::check).
    pub(crate) fn restore(&self, saved: &SavedFunction) {
        let mut inside = lock(&self.inside);
        let Inside { config, slot, notified } = &mut *inside;
        config.restore(&saved.config);
        self.interrupts.restore(&saved.interrupts, config);
        if let Some(slot) = slot {
            slot.restored(config, saved.asked_back);
            self.link.store(slot.link_is_up(config), Ordering::Release);
        }
        *notified = saved.notified;
        self.registers_changed(&mut inside);
    }
}

/// What is saved of a function; its device saves for itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedFunction {
    config: Vec<u8>,
    interrupts: SavedInterrupts,
    asked_back: bool,
    notified: bool,
}
