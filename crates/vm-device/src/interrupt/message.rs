//! Interrupts that are messages: MSI and MSI-X (PCI Local Bus 3.0, 6.8).
//!
//! [`Messages`] are all vectors of one function: what the guest programs, masks and asks. A device has [`Message`]s, each an
//! [`Event`] that it signals.
//!
//! A masked vector's event is taken off the [controller](MessageController), so a signal stays in it: *pending* is nothing but
//! "signalled and not taken". When the vector is unmasked, the controller gets the event back, and has to look into it. That holds
//! for whoever signals, in whichever process, and there is no moment in which an interrupt could be lost or sent twice.

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::Event;
use super::event::any_signalled;

/// Bytes of an entry of the MSI-X table, 6.8.2.
const ENTRY: u64 = 16;

/// What an interrupt writes, and where.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct MsiMessage {
    /// Where to: a multiple of 4.
    pub address: u64,
    /// What.
    pub data: u32,
}

/// What a controller is told about one vector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MessageAction {
    /// From now on each signal of the event, and one that is in it already, is this message. Also when it was another one
    /// before.
    Deliver(MsiMessage),
    /// Signals stay in the event.
    Hold,
    /// As `Hold`, and the number may be given to another vector.
    Forget,
}

/// One change for a [`MessageController`].
#[derive(Clone, Copy, Debug)]
pub struct MessageChange<'a> {
    /// The vector's number at the controller; with KVM its GSI.
    pub number: u32,
    /// The vector's event. The same number always comes with the same event until it is forgotten.
    pub event: &'a Event,
    /// What to do.
    pub action: MessageAction,
}

/// What carries messages to vCPUs: KVM (`vm_device::kvm::KvmInterrupts`), or a VMM's own interrupt controller.
pub trait MessageController: Send + Sync {
    /// Makes these changes.
    ///
    /// Called while a vCPU waits that has written the table, and never with the same number from two threads at once. When it
    /// returns from `Hold` or `Forget`, no signal is taken out of the event any more.
    ///
    /// # Errors
    /// Whatever the reason is; nothing was changed.
    fn apply(&self, changes: &[MessageChange<'_>]) -> io::Result<()>;
}

/// Why vectors could not be made or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MessagesError {
    /// A function has 1 to 2048 vectors (6.8.2), with numbers of 32 bits.
    #[error("{count} message interrupts with numbers from {first} on are not possible")]
    Count {
        /// First number.
        first: u32,
        /// How many.
        count: u32,
    },
    /// No more files.
    #[error("cannot make an eventfd: {0}")]
    Event(#[source] io::Error),
    /// A state of a function with another number of vectors.
    #[error("the state has {found} vectors, the function {expected}")]
    State {
        /// Vectors of the state.
        found: usize,
        /// Vectors of the function.
        expected: usize,
    },
}

/// What the guest programmed with an MSI capability, 6.8.1.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MsiControl {
    /// MSI Enable.
    pub enabled: bool,
    /// Message Address, with its upper half.
    pub address: u64,
    /// Message Data.
    pub data: u16,
    /// How many vectors the guest has given the function, as the exponent of two that is in Multiple Message Enable.
    pub multiple: u8,
    /// Mask Bits.
    pub mask: u32,
}

/// One vector of a saved function.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct VectorState {
    /// Its message.
    pub message: MsiMessage,
    /// Its own mask bit.
    pub masked: bool,
    /// An interrupt waits for the vector to be unmasked.
    pub pending: bool,
}

/// All of a saved function.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MessagesState {
    /// MSI Enable or MSI-X Enable.
    pub enabled: bool,
    /// MSI-X Function Mask.
    pub mask_all: bool,
    /// In order.
    pub vectors: Vec<VectorState>,
}

#[derive(Debug)]
struct Shared {
    events: Vec<Event>,
    /// For devices, which have to choose between a line and messages.
    enabled: AtomicBool,
}

/// A device's end of one vector. A clone is the same vector.
#[derive(Clone, Debug)]
pub struct Message {
    shared: Arc<Shared>,
    index: u16,
}

impl Message {
    /// Interrupts the guest; if the vector is masked, as soon as it is not. Never blocks. If messages are not
    /// [enabled](Self::is_enabled), nothing happens.
    pub fn signal(&self) {
        if let Some(event) = self.event() {
            event.signal();
        }
    }

    /// Which of the function's vectors it is, from 0.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// Whether the guest has enabled messages. If not, the function's line is in use.
    pub fn is_enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Acquire)
    }

    /// The eventfd behind it, for those who signal by themselves.
    pub fn event(&self) -> Option<&Event> {
        self.shared.events.get(usize::from(self.index))
    }

    /// Its descriptor.
    pub fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.event().map(Event::as_fd)
    }
}

#[derive(Clone, Copy, Debug)]
struct Vector {
    message: MsiMessage,
    masked: bool,
    /// What the controller was told.
    delivered: Option<MsiMessage>,
}

/// As after reset, 6.8.2.9.
const RESET: Vector = Vector { message: MsiMessage { address: 0, data: 0 }, masked: true, delivered: None };

impl Vector {
    /// Its four double words in the table.
    fn bytes(&self) -> [u8; 16] {
        let MsiMessage { address, data } = self.message;
        (u128::from(address) | u128::from(data) << 64 | u128::from(self.masked) << 96).to_le_bytes()
    }

    fn set_bytes(&mut self, bytes: [u8; 16]) {
        let [a0, a1, a2, a3, a4, a5, a6, a7, d0, d1, d2, d3, control, ..] = bytes;
        self.message = MsiMessage {
            // 6.8.2.4: bits 1 and 0 are zero.
            address: u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7]) & !3,
            data: u32::from_le_bytes([d0, d1, d2, d3]),
        };
        // 6.8.2.7: the other bits of Vector Control are reserved.
        self.masked = control & 1 != 0;
    }
}

#[derive(Debug)]
struct Table {
    enabled: bool,
    mask_all: bool,
    vectors: Vec<Vector>,
}

/// All message interrupts of one function; the function's end, of which there is one.
///
/// After power-on messages are disabled and each vector is masked. Dropping it takes all vectors off the controller.
pub struct Messages {
    shared: Arc<Shared>,
    first: u32,
    controller: Arc<dyn MessageController>,
    /// Held while the controller is told, so that it is told in the order of the writes.
    table: Mutex<Table>,
    failures: AtomicU64,
}

impl std::fmt::Debug for Messages {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { shared: _, first, controller: _, table, failures } = self;
        f.debug_struct("Messages")
            .field("first", first)
            .field("table", table)
            .field("failures", failures)
            .finish_non_exhaustive()
    }
}

impl Messages {
    /// `count` vectors (1 to 2048) that have the numbers from `first` on at the controller.
    ///
    /// # Errors
    /// See [`MessagesError`].
    pub fn new(
        controller: Arc<dyn MessageController>,
        first: u32,
        count: u32,
    ) -> Result<Self, MessagesError> {
        if !(1..=2048).contains(&count) || first.checked_add(count).is_none() {
            return Err(MessagesError::Count { first, count });
        }
        let events: io::Result<Vec<Event>> = (0..count).map(|_| Event::new()).collect();
        let events = events.map_err(MessagesError::Event)?;
        let vectors = vec![RESET; events.len()];
        Ok(Self {
            shared: Arc::new(Shared { events, enabled: AtomicBool::new(false) }),
            first,
            controller,
            table: Mutex::new(Table { enabled: false, mask_all: false, vectors }),
            failures: AtomicU64::new(0),
        })
    }

    /// How many vectors there are.
    pub fn count(&self) -> u16 {
        // At most 2048.
        u16::try_from(self.shared.events.len()).unwrap_or(u16::MAX)
    }

    /// The device's end of one.
    pub fn vector(&self, index: u16) -> Option<Message> {
        (index < self.count()).then(|| Message { shared: self.shared.clone(), index })
    }

    /// The device's ends of all, in order.
    pub fn vectors(&self) -> Vec<Message> {
        (0..self.count()).map(|index| Message { shared: self.shared.clone(), index }).collect()
    }

    /// Whether the guest has enabled messages.
    pub fn is_enabled(&self) -> bool {
        self.shared.enabled.load(Ordering::Acquire)
    }

    /// How often the controller refused something: a vector that could not be connected stays silent, what it has to say is
    /// pending, and the next write to it tries again.
    pub fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// Bytes of the MSI-X table.
    pub fn table_size(&self) -> u64 {
        u64::from(self.count()) * ENTRY
    }

    /// Bytes of the MSI-X pending bit array: whole quad words.
    pub fn pba_size(&self) -> u64 {
        u64::from(self.count()).div_ceil(64) * 8
    }

    /// The guest reads the MSI-X table, `offset` bytes from its beginning. What is behind the table reads as zeros.
    ///
    /// Any width and place is served; the standard leaves all but aligned double and quad words undefined (6.8.2).
    pub fn table_read(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        for (at, byte) in (0..).zip(data) {
            *byte = locate(offset, at)
                .and_then(|(entry, at)| table.vectors.get(entry)?.bytes().get(at).copied())
                .unwrap_or(0);
        }
    }

    /// The guest writes the MSI-X table, `offset` bytes from its beginning. What is behind the table is ignored.
    pub fn table_write(&self, offset: u64, data: &[u8]) {
        let mut table = self.lock();
        let mut touched = BTreeSet::new();
        for (at, byte) in (0..).zip(data) {
            let Some((entry, at)) = locate(offset, at) else { break };
            let Some(vector) = table.vectors.get_mut(entry) else { break };
            let mut bytes = vector.bytes();
            if let Some(old) = bytes.get_mut(at) {
                *old = *byte;
            }
            vector.set_bytes(bytes);
            touched.insert(entry);
        }
        self.tell(&mut table, touched);
    }

    /// The guest reads the MSI-X pending bits, `offset` bytes from their beginning. They cannot be written.
    pub fn pba_read(&self, offset: u64, data: &mut [u8]) {
        let table = self.lock();
        let mut known: Option<(u64, u64)> = None;
        for (at, byte) in (0..).zip(data) {
            let Some(at) = offset.checked_add(at) else {
                *byte = 0;
                continue;
            };
            let word = at / 8;
            let bits = match known {
                Some((which, bits)) if which == word => bits,
                _ => self.pending_word(&table, word),
            };
            known = Some((word, bits));
            *byte = bits.to_le_bytes().into_iter().nth((at % 8) as usize).unwrap_or(0);
        }
    }

    /// The guest wrote Message Control of an MSI-X capability: MSI-X Enable and Function Mask (6.8.2.3).
    pub fn set_msix_control(&self, enabled: bool, mask_all: bool) {
        let mut table = self.lock();
        table.mask_all = mask_all;
        self.enable(&mut table, enabled);
        let all = 0..table.vectors.len();
        self.tell(&mut table, all);
    }

    /// The guest wrote an MSI capability; this is what it holds now. Vectors that the guest has not given to the function stay
    /// silent (6.8.1.3).
    pub fn set_msi(&self, control: &MsiControl) {
        let mut table = self.lock();
        table.mask_all = false;
        // Up to 32 vectors; larger exponents are reserved.
        let given = 1_u32 << control.multiple.min(5);
        for (index, vector) in (0_u32..).zip(&mut table.vectors) {
            let masked = control.mask.checked_shr(index).is_none_or(|mask| mask & 1 != 0);
            vector.masked = index >= given || masked;
            vector.message = MsiMessage {
                address: control.address & !3,
                // 6.8.1.6: the function modifies the low bits of the data.
                data: u32::from(control.data) & !(given - 1) | index & (given - 1),
            };
        }
        self.enable(&mut table, control.enabled);
        let all = 0..table.vectors.len();
        self.tell(&mut table, all);
    }

    /// The Pending Bits of an MSI capability: those of the first 32 vectors.
    pub fn msi_pending(&self) -> u32 {
        let table = self.lock();
        (self.pending_word(&table, 0) & u64::from(u32::MAX)) as u32
    }

    /// As after power-on. What is pending is gone.
    pub fn reset(&self) {
        let mut table = self.lock();
        table.mask_all = false;
        for vector in &mut table.vectors {
            let Vector { message, masked, delivered: _ } = RESET;
            (vector.message, vector.masked) = (message, masked);
        }
        self.enable(&mut table, false);
        let all = 0..table.vectors.len();
        self.tell(&mut table, all);
        self.drain();
    }

    /// All that a successor has to know. Devices should be quiet.
    pub fn save(&self) -> MessagesState {
        let table = self.lock();
        let vectors = (0_u64..).zip(&table.vectors).map(|(index, vector)| VectorState {
            message: vector.message,
            masked: vector.masked,
            pending: self.pending_word(&table, index / 64) >> (index % 64) & 1 != 0,
        });
        MessagesState { enabled: table.enabled, mask_all: table.mask_all, vectors: vectors.collect() }
    }

    /// Becomes what was saved; pending interrupts are pending again, or sent if their vectors are not masked.
    ///
    /// # Errors
    /// [`MessagesError::State`]; nothing was changed.
    pub fn restore(&self, state: &MessagesState) -> Result<(), MessagesError> {
        let mut table = self.lock();
        let (found, expected) = (state.vectors.len(), table.vectors.len());
        if found != expected {
            return Err(MessagesError::State { found, expected });
        }
        table.mask_all = state.mask_all;
        for (vector, saved) in table.vectors.iter_mut().zip(&state.vectors) {
            let MsiMessage { address, data } = saved.message;
            vector.message = MsiMessage { address: address & !3, data };
            vector.masked = saved.masked;
        }
        self.enable(&mut table, state.enabled);
        for (event, saved) in self.shared.events.iter().zip(&state.vectors) {
            if saved.pending {
                event.signal();
            }
        }
        let all = 0..table.vectors.len();
        self.tell(&mut table, all);
        Ok(())
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        // A controller that panics leaves a table that is valid; what it was not told it is told at the next write.
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn enable(&self, table: &mut Table, enabled: bool) {
        if enabled && !table.enabled {
            // A function does not remember what it would have sent while it had no messages.
            self.drain();
        }
        table.enabled = enabled;
        self.shared.enabled.store(enabled, Ordering::Release);
    }

    fn drain(&self) {
        for event in &self.shared.events {
            event.take();
        }
    }

    /// The pending bits of 64 vectors.
    fn pending_word(&self, table: &Table, word: u64) -> u64 {
        let from = usize::try_from(word).ok().and_then(|word| word.checked_mul(64));
        let (Some(from), true) = (from, table.enabled) else { return 0 };
        let held = table
            .vectors
            .iter()
            .skip(from)
            .take(64)
            .enumerate()
            .fold(0, |bits, (index, vector)| bits | u64::from(vector.delivered.is_none()) << index);
        if held == 0 { 0 } else { held & any_signalled(self.shared.events.iter().skip(from)) }
    }

    /// Tells the controller what has changed of these vectors.
    fn tell(&self, table: &mut Table, vectors: impl IntoIterator<Item = usize>) {
        let live = table.enabled && !table.mask_all;
        let mut which = Vec::new();
        let mut changes = Vec::new();
        for index in vectors {
            let (Some(vector), Some(event)) = (table.vectors.get(index), self.shared.events.get(index))
            else {
                continue;
            };
            let wanted = (live && !vector.masked).then_some(vector.message);
            if wanted != vector.delivered {
                let action = wanted.map_or(MessageAction::Hold, MessageAction::Deliver);
                which.push(index);
                changes.push(MessageChange { number: self.number(index), event, action });
            }
        }
        if changes.is_empty() {
            return;
        }
        let all = self.controller.apply(&changes).is_ok();
        for (index, change) in which.into_iter().zip(changes) {
            let Some(vector) = table.vectors.get_mut(index) else { continue };
            // One message that the controller does not like is not to silence the others.
            if all || self.controller.apply(&[change]).is_ok() {
                vector.delivered = match change.action {
                    MessageAction::Deliver(message) => Some(message),
                    MessageAction::Hold | MessageAction::Forget => None,
                };
                continue;
            }
            self.failures.fetch_add(1, Ordering::Relaxed);
            let hold = MessageChange { action: MessageAction::Hold, ..change };
            if vector.delivered.is_some() && self.controller.apply(&[hold]).is_ok() {
                vector.delivered = None;
            }
        }
    }

    fn number(&self, index: usize) -> u32 {
        // `new` has seen that all fit.
        self.first.saturating_add(u32::try_from(index).unwrap_or(u32::MAX))
    }
}

impl Drop for Messages {
    fn drop(&mut self) {
        let changes: Vec<MessageChange<'_>> = self
            .shared
            .events
            .iter()
            .enumerate()
            .map(|(index, event)| MessageChange {
                number: self.number(index),
                event,
                action: MessageAction::Forget,
            })
            .collect();
        // Nothing more can be done about an error; the controller counts its own.
        let _ = self.controller.apply(&changes);
    }
}

/// Entry of the table, and byte in the entry.
fn locate(offset: u64, at: u64) -> Option<(usize, usize)> {
    let at = offset.checked_add(at)?;
    Some((usize::try_from(at / ENTRY).ok()?, (at % ENTRY) as usize))
}

#[cfg(test)]
mod tests;
