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

use super::bar::{Bar, Claim, ROM_BAR};
use super::bridge::{self, Window};
use super::builder::{FunctionBuilder, MsixLayout};
use super::capability::Watched;
use super::config::ConfigSpace;
use super::express::{self, Place, PortKind};
use super::interrupts::{Interrupts, SavedInterrupts};
use super::regs::*;
use super::slot::{Outcome, Slot};
use super::{CapabilityAccess, PciDevice};
use crate::interrupt::Messages;
use crate::sync::{Mutex, lock};

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
    /// A call of the device has panicked where no bus catches it; it is not called any more.
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
    /// A function as it was described. Of a bridge: its kind, and the slot if its lower side is a link.
    pub(crate) fn of(
        builder: FunctionBuilder,
        interrupts: Interrupts,
        device: Option<Arc<dyn PciDevice>>,
        kind: Option<PortKind>,
        slot: Option<Slot>,
    ) -> Function {
        // The bus of a switch is always there, a link comes up.
        let open = kind.is_some() && slot.is_none();
        Function {
            name: builder.name,
            inside: Mutex::new(Inside { config: builder.config, slot, notified: false }),
            bars: builder.bars,
            rom: builder.rom,
            watched: builder.watched,
            express: builder.express,
            msi: builder.msi.map(|(at, _)| at),
            msix: builder.msix,
            interrupts,
            device,
            bridge: kind.map(|kind| Bridge { kind, buses: AtomicU16::new(0) }),
            link: AtomicBool::new(open),
            failed: AtomicBool::new(false),
        }
    }

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

    /// Whether its device panicked when it was told of something, or in a watched capability; then it is not called any more
    /// and reads as ones. Panics in BARs are caught by the bus.
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
        if let Ok(at) = u8::try_from(watched.at) {
            // A device that panics must not take all of configuration space with it.
            self.call(|device| call(device, CapabilityAccess { at, offset, bytes }));
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

    fn working_device(&self) -> Option<&dyn PciDevice> {
        self.device.as_deref().filter(|_| !self.has_failed())
    }

    /// Calls the device from where no bus catches what it throws.
    pub(crate) fn call(&self, what: impl FnOnce(&dyn PciDevice)) {
        let Some(device) = self.working_device() else { return };
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| what(device)));
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
        match self.working_device() {
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
        if let Some(device) = self.working_device() {
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
