//! A function's interrupts: INTx, and MSI or MSI-X (PCI Local Bus 3.0, 2.2.6 and 6.8).
//!
//! [`Interrupts`] is what a device holds. It may signal from any thread; writes to configuration space arrive from vCPUs. Table,
//! masks and pending bits are [`Messages`]'s; here is what configuration space says of them:
//!
//! * A function that may send messages does not drive its pin (6.8.3.3): with MSI or MSI-X enabled INTx is silent.
//! * A message is a write to memory (6.8.1.3): while the function is no bus master, all vectors are as if masked.
//! * The status bit says what the device wants of its pin, whatever is enabled (6.2.3).
//!
//! Locks: configuration space, then one of those here. None is held while a device is called.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use device_state::StateError;
use serde::{Deserialize, Serialize};

use super::PciError;
use super::config::ConfigSpace;
use super::regs::*;
use crate::interrupt::{
    IrqLine, IrqSource, Message, Messages, MessagesState, MsiControl, MsiMessage, VectorState,
};
use crate::sync::{Mutex, lock};

/// An interrupt pin.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pin {
    /// INTA#, the one that a function alone on its device uses.
    A = 1,
    /// INTB#.
    B,
    /// INTC#.
    C,
    /// INTD#.
    D,
}

/// The pin of a function.
#[derive(Default)]
struct Intx {
    /// What the device wants.
    wanted: bool,
    /// Whether `COMMAND` and the message mechanisms let it.
    allowed: bool,
    /// The line of the root complex that the pin is wired to, by its number there; nothing while the guest cannot see the
    /// function.
    wire: Option<(usize, IrqSource)>,
}

impl Intx {
    fn settle(&self) {
        if let Some((_, source)) = &self.wire {
            source.set(self.wanted && self.allowed);
        }
    }
}

/// Which capability a function's messages have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mechanism {
    /// At this offset.
    Msi(u16),
    Msix(u16),
}

/// What the guest has said of messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Control {
    Msi(MsiControl),
    Msix { enabled: bool, mask_all: bool },
}

impl Control {
    fn of(mechanism: Mechanism, config: &ConfigSpace) -> Control {
        let master = config.u16(COMMAND) & COMMAND_MASTER != 0;
        match mechanism {
            Mechanism::Msi(at) => {
                let control = config.u16(at + MSI_CONTROL);
                let high = u64::from(config.u32(at + MSI_ADDRESS_HIGH)) << 32;
                Control::Msi(MsiControl {
                    enabled: control & MSI_ENABLE != 0,
                    address: high | u64::from(config.u32(at + MSI_ADDRESS)),
                    data: config.u16(at + MSI_DATA),
                    // Three bits, 6.8.1.3.
                    multiple: (control >> 4 & 7) as u8,
                    mask: if master { config.u32(at + MSI_MASK) } else { u32::MAX },
                })
            }
            Mechanism::Msix(at) => {
                let control = config.u16(at + MSIX_CONTROL);
                let mask_all = control & MSIX_MASK_ALL != 0 || !master;
                Control::Msix { enabled: control & MSIX_ENABLE != 0, mask_all }
            }
        }
    }

    fn enabled(self) -> bool {
        match self {
            Control::Msi(MsiControl { enabled, .. }) | Control::Msix { enabled, .. } => enabled,
        }
    }

    fn tell(self, messages: &Messages) {
        match self {
            Control::Msi(control) => messages.set_msi(&control),
            Control::Msix { enabled, mask_all } => messages.set_msix_control(enabled, mask_all),
        }
    }
}

/// Messages and their capability.
struct Sender {
    messages: Messages,
    mechanism: Mechanism,
    /// What the messages were told last.
    told: Mutex<Option<Control>>,
}

struct Shared {
    pin: Option<Pin>,
    intx: Mutex<Intx>,
    sender: Option<Sender>,
    master: AtomicBool,
}

/// A function's interrupts, as its device holds them.
#[derive(Clone)]
pub struct Interrupts(Arc<Shared>);

impl std::fmt::Debug for Interrupts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mechanism = self.0.sender.as_ref().map(|sender| sender.mechanism);
        f.debug_struct("Interrupts").field("pin", &self.0.pin).field("messages", &mechanism).finish()
    }
}

impl Interrupts {
    pub(crate) fn new(
        pin: Option<Pin>,
        messages: Option<Messages>,
        mechanism: Option<(Mechanism, u16)>,
    ) -> Result<Interrupts, PciError> {
        let (wanted, given) = (mechanism.map_or(0, |(_, n)| n), messages.as_ref().map_or(0, Messages::count));
        if wanted != given {
            return Err(PciError::Vectors { wanted, given });
        }
        let sender = messages.zip(mechanism).map(|(messages, (mechanism, _))| Sender {
            messages,
            mechanism,
            told: Mutex::new(None),
        });
        let intx = Intx { allowed: true, ..Intx::default() };
        Ok(Interrupts(Arc::new(Shared {
            pin,
            intx: Mutex::new(intx),
            sender,
            master: AtomicBool::new(false),
        })))
    }

    /// Drives the pin, or lets go of it. While the guest uses messages nothing is seen of it but the status bit.
    pub fn set_intx(&self, high: bool) {
        let mut intx = lock(&self.0.intx);
        intx.wanted = high;
        intx.settle();
    }

    /// The device's end of one vector of MSI or MSI-X.
    pub fn message(&self, vector: u16) -> Option<Message> {
        self.0.sender.as_ref()?.messages.vector(vector)
    }

    /// Whether the guest has enabled MSI or MSI-X. If not, the pin is in use.
    pub fn uses_messages(&self) -> bool {
        self.0.sender.as_ref().is_some_and(|sender| sender.messages.is_enabled())
    }

    /// Whether the guest lets the function write to memory: without it a device must not touch the guest's.
    pub fn is_bus_master(&self) -> bool {
        self.0.master.load(Ordering::Acquire)
    }

    /// How often the interrupt controller refused a message that the guest had programmed.
    pub fn failures(&self) -> u64 {
        self.0.sender.as_ref().map_or(0, |sender| sender.messages.failures())
    }

    pub(crate) fn messages(&self) -> Option<&Messages> {
        self.0.sender.as_ref().map(|sender| &sender.messages)
    }

    pub(crate) fn signal(&self, vector: u16) {
        if let Some(message) = self.message(vector) {
            message.signal();
        }
    }

    pub(crate) fn pin(&self) -> Option<Pin> {
        self.0.pin
    }

    pub(crate) fn intx_wanted(&self) -> bool {
        lock(&self.0.intx).wanted
    }

    /// Wires the pin to a line, given with its number; or takes the function from the guest's sight.
    pub(crate) fn connect(&self, line: Option<(usize, &IrqLine)>) {
        let mut intx = lock(&self.0.intx);
        if intx.wire.as_ref().map(|(number, _)| *number) != line.map(|(number, _)| number) {
            // The old one is let go of when it is dropped.
            intx.wire = line.map(|(number, line)| (number, line.source()));
            intx.settle();
        }
    }

    /// Takes over what the guest wrote to configuration space.
    pub(crate) fn update(&self, config: &ConfigSpace) {
        let command = config.u16(COMMAND);
        self.0.master.store(command & COMMAND_MASTER != 0, Ordering::Release);
        let mut messages = false;
        if let Some(sender) = &self.0.sender {
            let control = Control::of(sender.mechanism, config);
            messages = control.enabled();
            let mut told = lock(&sender.told);
            if *told != Some(control) {
                *told = Some(control);
                control.tell(&sender.messages);
            }
        }
        let mut intx = lock(&self.0.intx);
        intx.allowed = command & COMMAND_INTX_DISABLE == 0 && !messages;
        intx.settle();
    }

    /// As after power-on. Configuration space is reset by then.
    pub(crate) fn reset(&self, config: &ConfigSpace) {
        if let Some(sender) = &self.0.sender {
            sender.messages.reset();
            *lock(&sender.told) = None;
        }
        lock(&self.0.intx).wanted = false;
        self.update(config);
    }

    pub(crate) fn save(&self) -> SavedInterrupts {
        let vectors = self.messages().map(|messages| messages.save().vectors).unwrap_or_default();
        let vector = |vector: &VectorState| {
            let MsiMessage { address, data } = vector.message;
            (address, data, vector.masked, vector.pending)
        };
        SavedInterrupts { intx: self.intx_wanted(), vectors: vectors.iter().map(vector).collect() }
    }

    pub(crate) fn check(&self, saved: &SavedInterrupts) -> Result<(), StateError> {
        if saved.vectors.len() != self.messages().map_or(0, |messages| usize::from(messages.count())) {
            return Err(StateError::refused("another number of interrupt vectors"));
        }
        if saved.intx && self.0.pin.is_none() {
            return Err(StateError::refused("an interrupt of a function without a pin"));
        }
        if saved.vectors.iter().any(|(address, ..)| address & 3 != 0) {
            return Err(StateError::refused("reserved bits in the address of a message"));
        }
        Ok(())
    }

    /// Takes over what was [checked](Self::check). Configuration space is restored by then. What was pending is sent if it
    /// may be by now.
    pub(crate) fn restore(&self, saved: &SavedInterrupts, config: &ConfigSpace) {
        if let Some(sender) = &self.0.sender {
            let vector = |&(address, data, masked, pending): &(u64, u32, bool, bool)| VectorState {
                message: MsiMessage { address, data },
                masked,
                pending,
            };
            let vectors = saved.vectors.iter().map(vector).collect();
            let control = Control::of(sender.mechanism, config);
            let mask_all = matches!(control, Control::Msix { mask_all: true, .. });
            sender.messages.reset();
            // As many vectors as were checked; there is no other way for it to fail.
            let restored =
                sender.messages.restore(&MessagesState { enabled: control.enabled(), mask_all, vectors });
            debug_assert!(restored.is_ok());
            *lock(&sender.told) = None;
        }
        lock(&self.0.intx).wanted = saved.intx;
        self.update(config);
    }
}

/// What is saved of a function's interrupts beside configuration space: whether the pin is wanted; address and data of each
/// vector, whether it is masked, and pending.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedInterrupts {
    intx: bool,
    vectors: Vec<(u64, u32, bool, bool)>,
}
