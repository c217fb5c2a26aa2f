//! virtio over PCI (virtio 1.4, 4.1), without the legacy interface: the structures behind one BAR, and the capabilities that
//! say where they are.
//!
//! ```text
//! 0x0000  common configuration (4.1.4.3), 64 bytes
//! 0x0040  ISR status (4.1.4.5), 1 byte
//! 0x1000  notifications (4.1.4.4), 4 bytes a queue
//! behind  device-specific configuration (4.1.4.6), at the next page
//! ```
//!
//! `pci::function` (cargo feature `vm-device`) puts all that on a bus of `vm_device::pci`. Nothing else in here knows a PCI bus: the VMM gives accesses of the BAR ([`Pci::read`], [`Pci::write`]) and of the window in
//! configuration space ([`Pci::window_read`]), puts the [capabilities](Pci::capabilities) into configuration space, and carries
//! interrupts ([`FunctionInterrupts`]).
//!
//! | what the driver does wrong | what happens |
//! |---|---|
//! | accesses a field with another width than its own (64-bit fields: 64 bits, or each half) | reads 0, ignored |
//! | writes a read-only field, or a queue's out of the order of 3.1.1 | ignored |
//! | maps an event to a vector that there is not | the field reads NO_VECTOR |
//! | writes a queue size that the queue cannot have | ignored |
//! | writes 0 to `queue_enable` | ignored |
//!
//! `ADMIN_VQ` and `SR_IOV` are not offered: the engine has no admin queue.
mod common;
#[cfg(feature = "vm-device")]
pub mod function;
mod signals;

pub use signals::{FunctionInterrupts, NO_VECTOR};

use super::registers::Registers;
use super::{Ignored, Notifier, Options, TransportError};
use crate::device::VirtioDevice;
use crate::shared_memory::ShmRegion;
use crate::{Engine, EngineError, Features, LaneRunner};
use device_state::StateError;
use serde::{Deserialize, Serialize};
use signals::PciSignals;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering};

/// The vendor of all virtio devices (4.1.2).
pub const VENDOR: u16 = 0x1af4;
/// Device IDs are this and the type of the device (4.1.2).
pub const FIRST_DEVICE: u16 = 0x1040;

/// Where the structures are in the BAR.
const COMMON_LEN: u64 = 64;
const ISR: u64 = 0x40;
const NOTIFY: u64 = 0x1000;
/// Bytes between the notification addresses of two queues.
const MULTIPLIER: u64 = 4;
const PAGE: u64 = 0x1000;

/// What this transport carries of [`Features::CARRIED`].
const CARRIED: Features = Features::NOTIFICATION_DATA
    .union(Features::NOTIF_CONFIG_DATA)
    .union(Features::RING_RESET)
    .union(Features::SUSPEND);

/// Kinds of structures: `cfg_type` (4.1.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
enum Kind {
    Common = 1,
    Notify = 2,
    Isr = 3,
    Device = 4,
    Window = 5,
    SharedMemory = 8,
    Vendor = 9,
}

/// One virtio structure capability, as it is in configuration space but for the first two bytes: identifier (0x09) and
/// pointer to the next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PciCapability {
    /// From `cap_len` on.
    pub body: Vec<u8>,
    /// The window into BARs (4.1.4.9): the driver may write it, and accesses of its last four bytes have effects
    /// ([`Pci::window_read`], [`Pci::window_write`]).
    pub is_window: bool,
}

impl PciCapability {
    fn new(kind: Kind, bar: u8, id: u8, offset: u64, length: u64, extra: &[u8]) -> PciCapability {
        let len = 16 + extra.len();
        let mut body = vec![len as u8, kind as u8, bar, id, 0, 0];
        body.extend(((offset & u64::from(u32::MAX)) as u32).to_le_bytes());
        body.extend(((length & u64::from(u32::MAX)) as u32).to_le_bytes());
        body.extend(extra);
        PciCapability { body, is_window: kind == Kind::Window }
    }

    /// A shared memory region (2.10, 4.1.4.7) that the VMM has at `offset` of a BAR of its own.
    pub fn shared_memory(region: ShmRegion, bar: u8, offset: u64) -> PciCapability {
        let high = |value: u64| ((value >> 32) as u32).to_le_bytes();
        let extra = [high(offset), high(region.size)].concat();
        PciCapability::new(Kind::SharedMemory, bar, region.id, offset, region.size, &extra)
    }

    /// Data of a vendor (4.1.4.8). `None` for virtio's own vendor, or more than there is room for. Padded to a multiple of 4.
    pub fn vendor(vendor: u16, data: &[u8]) -> Option<PciCapability> {
        let len = data.len().checked_add(6)?.next_multiple_of(4);
        if vendor == VENDOR || len > 128 {
            return None;
        }
        let mut body = vec![len as u8, Kind::Vendor as u8];
        body.extend(vendor.to_le_bytes());
        body.extend(data);
        body.resize(len - 2, 0);
        Some(PciCapability { body, is_window: false })
    }
}

/// What the driver selects before it accesses.
#[derive(Default)]
struct Selectors {
    device_feature: AtomicU32,
    driver_feature: AtomicU32,
    queue: AtomicU16,
}

/// The generation that drivers see has 8 bits: it changes when what they read has (4.1.4.3.1).
#[derive(Clone, Copy, Default, Serialize, Deserialize)]
struct Generation {
    shown: u8,
    /// Of the configuration space, when it was read last.
    read: u32,
}

/// A generation that all CPUs of the guest change. One word: who reads the configuration space after another did either sees
/// the new `shown`, or makes it.
#[derive(Default)]
struct SharedGeneration(AtomicU64);

impl SharedGeneration {
    fn get(&self) -> Generation {
        let word = self.0.load(Ordering::Acquire);
        Generation { shown: (word >> 32 & 0xff) as u8, read: (word & u64::from(u32::MAX)) as u32 }
    }

    fn set(&self, Generation { shown, read }: Generation) {
        self.0.store(u64::from(shown) << 32 | u64::from(read), Ordering::Release);
    }

    /// The configuration space was read, and had this generation.
    fn note(&self, read: u32) {
        let next = |word: u64| {
            let changed = word & u64::from(u32::MAX) != u64::from(read);
            let shown = (word >> 32).wrapping_add(1) & 0xff;
            changed.then_some(shown << 32 | u64::from(read))
        };
        // Nothing to do if it fails: it is the same generation.
        let _ = self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, next);
    }
}

/// Version 1 of what is saved of the transport.
#[derive(Serialize, Deserialize)]
struct PciV1 {
    device_feature_select: u32,
    driver_feature_select: u32,
    queue_select: u16,
    isr: u32,
    config_vector: u16,
    queue_vectors: Vec<u16>,
    generation: Generation,
}

/// A device behind the structures of virtio over PCI.
pub struct Pci<D: VirtioDevice> {
    registers: Registers<D>,
    signals: Arc<PciSignals>,
    selected: Selectors,
    generation: SharedGeneration,
    queues: u16,
}

/// A transport and the runners of its device's lanes.
pub type PciAndLanes<D> = (Pci<D>, Vec<LaneRunner<<D as VirtioDevice>::Worker>>);

impl<D: VirtioDevice> Pci<D> {
    /// Puts a device behind a BAR. `vectors`: entries of the function's MSI-X table, 0 if it has none. Interrupts go nowhere
    /// before [`Pci::connect`].
    ///
    /// # Errors
    /// Those of [`Engine::new`].
    pub fn new(device: D, options: Options, vectors: u16) -> Result<PciAndLanes<D>, EngineError> {
        let signals = Arc::new(PciSignals::new(vectors));
        let (registers, lanes) =
            Registers::new(device, options, CARRIED, signals.clone(), |queue| signals.queue(queue))?;
        // Checked by the engine.
        let queues = registers.engine().queues().len() as u16;
        signals.set_queues(queues);
        let (selected, generation) = (Selectors::default(), SharedGeneration::default());
        Ok((Pci { registers, signals, selected, generation, queues }, lanes))
    }

    /// Where interrupts go. Once; what follows is ignored.
    pub fn connect(&self, function: Arc<dyn FunctionInterrupts>) {
        self.signals.connect(function);
    }

    /// The device's engine: memory, suspension and statistics are the VMM's business.
    pub fn engine(&self) -> &Engine<D> {
        self.registers.engine()
    }

    /// Accesses that had no effect.
    pub fn ignored(&self) -> &Ignored {
        &self.registers.ignored
    }

    /// The PCI device ID (4.1.2); `None` for types that there is no room for.
    pub fn device_id(&self) -> Option<u16> {
        FIRST_DEVICE.checked_add(u16::try_from(self.engine().device_type().0).ok()?)
    }

    /// Entries of the function's MSI-X table.
    pub fn vectors(&self) -> u16 {
        self.signals.table_size()
    }

    fn notify_len(&self) -> u64 {
        (u64::from(self.queues) * MULTIPLIER).max(MULTIPLIER)
    }

    /// Where the device-specific configuration begins.
    fn device_config(&self) -> u64 {
        NOTIFY + self.notify_len().next_multiple_of(PAGE)
    }

    /// Size of the BAR in bytes: a power of two.
    pub fn bar_size(&self) -> u64 {
        let config = self.engine().config().len() as u64;
        (self.device_config() + config).next_power_of_two()
    }

    /// The capabilities of the structures (4.1.4), which are in this BAR; in this order. Those of shared memory and vendors are
    /// the VMM's to add.
    pub fn capabilities(&self, bar: u8) -> Vec<PciCapability> {
        let at = |kind, offset, length, extra: &[u8]| PciCapability::new(kind, bar, 0, offset, length, extra);
        let mut all = vec![
            at(Kind::Common, 0, COMMON_LEN, &[]),
            at(Kind::Notify, NOTIFY, self.notify_len(), &(MULTIPLIER as u32).to_le_bytes()),
            at(Kind::Isr, ISR, 1, &[]),
        ];
        let config = self.engine().config().len() as u64;
        if config != 0 {
            all.push(at(Kind::Device, self.device_config(), config, &[]));
        }
        all.push(PciCapability::new(Kind::Window, 0, 0, 0, 0, &[0; 4]));
        all
    }

    /// For ioeventfds, one a queue, by offset in the BAR: nothing without [`Kicks::Files`](super::Kicks::Files). Each queue
    /// has an address of its own, so that any value and width will do. They have to follow the BAR when the guest moves it.
    pub fn notifiers(&self) -> impl Iterator<Item = Notifier<'_>> {
        self.registers.kick_files().map(|(queue, fd)| Notifier {
            queue,
            offset: NOTIFY + u64::from(queue) * MULTIPLIER,
            width: 0,
            value: None,
            fd,
        })
    }

    /// The driver reads `data.len()` bytes at `offset` of the BAR.
    #[inline]
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        if self.read_common::<false>(offset, data) {
            return;
        }
        match (offset, &mut *data) {
            // Nothing to acknowledge.
            (ISR, [isr]) if self.signals.pending() == 0 => *isr = 0,
            _ => self.read_other(offset, data),
        }
    }

    /// Out of the way of [`Pci::read`], which costs no more than what it does then.
    #[inline(never)]
    fn read_other(&self, offset: u64, data: &mut [u8]) {
        if let (ISR, [isr, beyond @ ..]) = (offset, &mut *data) {
            // 4.1.4.5: reading it is the acknowledgement.
            *isr = self.signals.take();
            return beyond.fill(0);
        }
        data.fill(0);
        if self.read_common::<true>(offset, data) {
        } else if let Some(at) = offset.checked_sub(self.device_config()) {
            self.read_config(at, data);
        } else if offset < NOTIFY {
            self.registers.ignored.note();
        }
        // 4.1.4.4 says nothing of reads of notification addresses.
    }

    /// The driver writes `data` at `offset` of the BAR.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) {
        if !self.select_common(offset, data) {
            self.write_other(offset, data);
        }
    }

    #[inline(never)]
    fn write_other(&self, offset: u64, data: &[u8]) {
        if let Some(at) = offset.checked_sub(NOTIFY)
            && at < self.notify_len()
        {
            // The address is the queue; what is written says no more (4.1.5.2).
            match u16::try_from(at / MULTIPLIER) {
                Ok(queue) if matches!(data.len(), 2 | 4) && at % MULTIPLIER == 0 => {
                    self.registers.kick(queue)
                }
                _ => self.registers.ignored.note(),
            }
        } else if offset < COMMON_LEN {
            self.write_common(offset, data);
        } else if let Some(at) = offset.checked_sub(self.device_config())
            && matches!(data.len(), 1 | 2 | 4)
        {
            self.registers.write_config(at, data);
        } else {
            self.registers.ignored.note();
        }
    }

    fn read_config(&self, at: u64, data: &mut [u8]) {
        let (Ok(at), 1 | 2 | 4) = (u32::try_from(at), data.len()) else {
            return self.registers.ignored.note();
        };
        self.generation.note(self.engine().config().read(at, data));
    }

    /// Where the window of 4.1.4.9 is: `capability` is the whole capability as it is in configuration space. `None` if that
    /// is no access of this BAR.
    fn window(&self, bar: u8, capability: &[u8]) -> Option<(u64, usize)> {
        let word = |at: usize| Some(u32::from_le_bytes(*capability.get(at..)?.first_chunk()?));
        let (offset, length) = (u64::from(word(8)?), word(12)?);
        let fits = *capability.get(4)? == bar && matches!(length, 1 | 2 | 4);
        let aligned = fits && offset.is_multiple_of(u64::from(length));
        (aligned && offset < self.bar_size()).then_some((offset, length as usize))
    }

    /// The driver reads `pci_cfg_data` of the window (4.1.4.9.1); see [`Pci::window_write`].
    pub fn window_read(&self, bar: u8, capability: &[u8]) -> [u8; 4] {
        let mut data = [0; 4];
        match self.window(bar, capability) {
            Some((offset, length)) => self.read(offset, data.get_mut(..length).unwrap_or_default()),
            None => self.registers.ignored.note(),
        }
        data
    }

    /// The driver wrote `pci_cfg_data` of the window: that is a write to the BAR, if the fields of the capability say so.
    /// `bar` is the one with the structures, `capability` the whole capability with what was written.
    pub fn window_write(&self, bar: u8, capability: &[u8]) {
        let data = capability.get(16..20).unwrap_or_default();
        match self.window(bar, capability) {
            Some((offset, length)) => self.write(offset, data.get(..length).unwrap_or_default()),
            None => self.registers.ignored.note(),
        }
    }

    /// Resets the device, as a reset of the function or the machine does.
    pub fn reset(&self) {
        self.registers.reset();
        self.select(0, 0, 0);
    }

    fn select(&self, device_feature: u32, driver_feature: u32, queue: u16) {
        self.selected.device_feature.store(device_feature, Ordering::Relaxed);
        self.selected.driver_feature.store(driver_feature, Ordering::Relaxed);
        self.selected.queue.store(queue, Ordering::Relaxed);
    }

    /// Saves the device and its registers; configuration space and MSI-X table are the function's. It has to be at rest
    /// ([`Engine::suspend`]); it may go on afterwards. Waits for lanes: they run on other threads.
    ///
    /// # Errors
    /// While a queue is being reset, and those of [`Engine::save`].
    pub fn save(&self) -> Result<Vec<u8>, TransportError> {
        let (config_vector, queue_vectors) = self.signals.vectors();
        let own = PciV1 {
            device_feature_select: self.selected.device_feature.load(Ordering::Relaxed),
            driver_feature_select: self.selected.driver_feature.load(Ordering::Relaxed),
            queue_select: self.selected.queue.load(Ordering::Relaxed),
            isr: self.signals.pending(),
            config_vector,
            queue_vectors,
            generation: self.generation.get(),
        };
        self.registers.save(1, &own)
    }

    /// Restores what [`Pci::save`] returned, into a transport whose device is new or reset and has its memory
    /// ([`Engine::memory`]); configuration space and MSI-X table are restored before. Waits for lanes: they run on other
    /// threads.
    ///
    /// # Errors
    /// Whatever is wrong with the state, which is not trusted: the device is reset then.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), TransportError> {
        self.registers.restore(bytes, 1, |own: PciV1| {
            if !self.signals.restore(own.isr, own.config_vector, &own.queue_vectors) {
                return Err(StateError::refused("it has vectors or events that there are none of").into());
            }
            self.select(own.device_feature_select, own.driver_feature_select, own.queue_select);
            self.generation.set(own.generation);
            Ok(())
        })
    }
}
