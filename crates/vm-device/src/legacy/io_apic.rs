//! An I/O APIC (82093AA) for hypervisors that have local APICs only, such as KVM's split interrupt chip: each pin's interrupt is a
//! message to a local APIC.
//!
//! A pin is an [`IrqLine`] and an entry of the redirection table. While the entry is not masked the line's trigger file is the
//! [controller](MessageController)'s, so an interrupt goes from the device to the vCPU without a call in here. While it is masked,
//! signals stay in the file, as of [`Messages`](crate::interrupt::Messages): what comes meanwhile comes late, but is not lost, of
//! edges either, which real hardware would lose.
//!
//! A level-triggered interrupt ends at the local APIC, and the hypervisor tells its vector (KVM: `KVM_EXIT_IOAPIC_EOI`):
//! [`IoApic::end_of_interrupt`] raises the lines again that are still asserted.
//!
//! Not here: Remote IRR and Delivery Status read as 0, as if interrupts were always delivered at once and ended; polarity has no
//! meaning, since lines are asserted or not; there is no EOI register, which version 0x11 does not have.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use device_state::StateError;
use serde::{Deserialize, Serialize};

use crate::bus::{DeviceMmio, MmioAddress, MmioAddressOffset};
use crate::interrupt::{IrqLine, MessageAction, MessageChange, MessageController, MsiMessage, Trigger};
use crate::sync::{Mutex, lock};

/// How many pins there are.
pub const IO_APIC_PINS: u8 = 24;

/// Bytes that its registers take.
pub const IO_APIC_LEN: u64 = 0x20;

// Where the two registers are that a guest sees, 3.1.
const SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;

// What it selects, 3.2.
const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
const TABLE: u8 = 0x10;

/// This version, and the number of the last entry.
const VERSION_VALUE: u32 = 0x11 | (IO_APIC_PINS as u32 - 1) << 16;
const ID_BITS: u32 = 0x0f00_0000;

/// Of an entry, 3.2.4: what a guest may write. Reserved bits, Delivery Status (12) and Remote IRR (14) are 0.
const WRITABLE: u64 = 0xff00_0000_0001_afff;
const LOGICAL: u64 = 1 << 11;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;

/// Where local APICs take messages (Intel SDM 3A, 11.11.1).
const MESSAGES: u64 = 0xfee0_0000;

/// What an entry of the redirection table sends.
fn message(entry: u64) -> MsiMessage {
    let destination = entry >> 56;
    let logical = u64::from(entry & LOGICAL != 0) << 2;
    // Vector and delivery mode are where they are in a message (11.11.2), and so is the trigger mode; what is sent is an assertion.
    let assert = u64::from(entry & LEVEL != 0) << 14;
    MsiMessage {
        address: MESSAGES | destination << 12 | logical,
        data: u32::try_from(entry & (LEVEL | 0x7ff) | assert).unwrap_or_default(),
    }
}

/// A line cannot be connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum IoApicError {
    /// There are [`IO_APIC_PINS`].
    #[error("an I/O APIC has no pin {0}")]
    NoPin(u8),
    /// It has a line. Lines are shared by their sources.
    #[error("pin {0} of the I/O APIC has a line already")]
    Taken(u8),
}

struct Pin {
    entry: u64,
    line: Option<IrqLine>,
    /// What the controller was told.
    delivered: Option<MsiMessage>,
}

struct Registers {
    select: u8,
    id: u32,
    pins: Vec<Pin>,
}

/// An I/O APIC. Registers for the bus, lines for devices.
pub struct IoApic {
    controller: Arc<dyn MessageController>,
    first: u32,
    registers: Mutex<Registers>,
    failures: AtomicU64,
}

impl std::fmt::Debug for IoApic {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { controller: _, first, registers, failures } = self;
        let entries: Vec<u64> = lock(registers).pins.iter().map(|pin| pin.entry).collect();
        f.debug_struct("IoApic")
            .field("first", first)
            .field("entries", &entries)
            .field("failures", failures)
            .finish_non_exhaustive()
    }
}

impl IoApic {
    /// As after power-on: all pins are masked, and none has a line. At the controller its pins have the numbers from `first` on; of
    /// KVM's split chip it has to be 0, and as many pins as here have to be reserved, or ends of interrupt are not told.
    pub fn new(controller: Arc<dyn MessageController>, first: u32) -> IoApic {
        let pin = |_| Pin { entry: MASKED, line: None, delivered: None };
        let pins = (0..IO_APIC_PINS).map(pin).collect();
        IoApic {
            controller,
            first,
            registers: Mutex::new(Registers { select: 0, id: 0, pins }),
            failures: AtomicU64::new(0),
        }
    }

    /// Puts a line on a pin, for good.
    ///
    /// # Errors
    /// There is no such pin, or it has a line.
    pub fn connect(&self, pin: u8, line: &IrqLine) -> Result<(), IoApicError> {
        let mut registers = lock(&self.registers);
        let place = registers.pins.get_mut(usize::from(pin)).ok_or(IoApicError::NoPin(pin))?;
        if place.line.is_some() {
            return Err(IoApicError::Taken(pin));
        }
        place.line = Some(line.clone());
        self.settle(pin, place);
        Ok(())
    }

    /// The guest has ended the interrupt with this vector at a local APIC: level-triggered lines that are still asserted interrupt
    /// again.
    pub fn end_of_interrupt(&self, vector: u8) {
        for pin in &lock(&self.registers).pins {
            if pin.entry & LEVEL != 0 && pin.entry & 0xff == u64::from(vector) {
                pin.line.as_ref().map(IrqLine::resampled);
            }
        }
    }

    /// How often the controller refused what the guest had programmed.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// As after power-on: all pins are masked, and edges that nobody took are forgotten.
    pub fn reset(&self) {
        let mut registers = lock(&self.registers);
        registers.select = 0;
        registers.id = 0;
        for (number, pin) in (0..).zip(&mut registers.pins) {
            pin.entry = MASKED;
            self.settle(number, pin);
            if let Some(line) = &pin.line {
                line.trigger().take();
                // What a level-triggered line still wants it gets when it is unmasked.
                if line.trigger_mode() == Trigger::Level {
                    line.resampled();
                }
            }
        }
    }

    /// What is to be saved. What waits in lines is theirs.
    pub fn save(&self) -> IoApicState {
        let registers = lock(&self.registers);
        let entries = registers.pins.iter().map(|pin| pin.entry).collect();
        IoApicState { select: registers.select, id: registers.id, entries }
    }

    /// Takes over what was saved.
    ///
    /// # Errors
    /// It is none of an I/O APIC; nothing has changed then.
    pub fn restore(&self, state: &IoApicState) -> Result<(), StateError> {
        let IoApicState { select, id, entries } = state;
        let mut registers = lock(&self.registers);
        if entries.len() != registers.pins.len() {
            return Err(StateError::refused("another number of pins"));
        }
        if id & !ID_BITS != 0 || entries.iter().any(|entry| entry & !WRITABLE != 0) {
            return Err(StateError::refused("reserved bits of an I/O APIC"));
        }
        (registers.select, registers.id) = (*select, *id);
        for ((number, pin), entry) in (0..).zip(&mut registers.pins).zip(entries) {
            pin.entry = *entry;
            self.settle(number, pin);
        }
        Ok(())
    }

    /// Tells the controller what has changed of a pin.
    fn settle(&self, number: u8, pin: &mut Pin) {
        let Some(line) = &pin.line else { return };
        let wanted = (pin.entry & MASKED == 0).then(|| message(pin.entry));
        if wanted == pin.delivered {
            return;
        }
        let change = MessageChange {
            number: self.first.wrapping_add(number.into()),
            event: line.trigger(),
            action: wanted.map_or(MessageAction::Hold, MessageAction::Deliver),
        };
        let done: io::Result<()> = self.controller.apply(&[change]);
        match done {
            Ok(()) => pin.delivered = wanted,
            Err(_) => drop(self.failures.fetch_add(1, Ordering::Relaxed)),
        }
    }

    fn read(&self) -> u32 {
        let registers = lock(&self.registers);
        match registers.select {
            ID | ARBITRATION => registers.id,
            VERSION => VERSION_VALUE,
            select => match half(select) {
                Some((number, high)) => {
                    let entry = registers.pins.get(number).map_or(0, |pin| pin.entry);
                    u32::try_from(if high { entry >> 32 } else { entry & u64::from(u32::MAX) })
                        .unwrap_or_default()
                }
                None => 0,
            },
        }
    }

    fn write(&self, value: u32) {
        let mut registers = lock(&self.registers);
        match registers.select {
            ID => registers.id = value & ID_BITS,
            select => {
                let Some((number, high)) = half(select) else { return };
                let Some(pin) = registers.pins.get_mut(number) else { return };
                let (kept, new) = if high {
                    (pin.entry & u64::from(u32::MAX), u64::from(value) << 32)
                } else {
                    (pin.entry & !u64::from(u32::MAX), u64::from(value))
                };
                pin.entry = kept | new & WRITABLE;
                // There are fewer than 256.
                self.settle(u8::try_from(number).unwrap_or(u8::MAX), pin);
            }
        }
    }
}

/// The entry that a register belongs to, and whether it is its upper half.
fn half(select: u8) -> Option<(usize, bool)> {
    let at = select.checked_sub(TABLE)?;
    Some((usize::from(at / 2), at % 2 == 1))
}

/// What is saved of an [`IoApic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    select: u8,
    id: u32,
    entries: Vec<u64>,
}

impl DeviceMmio for IoApic {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let value = match offset {
            SELECT => lock(&self.registers).select.into(),
            // 3.1.2: 32 bits at once.
            WINDOW if data.len() == 4 => self.read(),
            _ => 0,
        };
        data.fill(0);
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        match (offset, data) {
            // 3.1.1: 8 bits count; others are reserved.
            (SELECT, &[select, ..]) => lock(&self.registers).select = select,
            (WINDOW, &[a, b, c, d]) => self.write(u32::from_le_bytes([a, b, c, d])),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests;
