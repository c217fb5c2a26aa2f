//! virtio-mmio, version 2 (virtio 1.4, 4.2): a device behind 256 bytes of registers and its configuration space.
//!
//! | what the driver does wrong | what happens |
//! |---|---|
//! | reads or writes a register with another width than 32 bits, or not aligned | reads 0, ignored |
//! | reads a write-only register, a reserved one, or behind the configuration space | reads 0 |
//! | writes to a read-only or reserved register, or behind the configuration space | ignored |
//! | sets up a queue before FEATURES_OK, while it is ready or does not exist | ignored |
//! | makes a queue ready that cannot be: its size | QueueReady stays 0 |
//! | the same: its addresses | QueueReady stays 0, DEVICE_NEEDS_RESET |
//!
//! Each of them counts in [`Mmio::ignored`]. `ADMIN_VQ` is not allowed on this transport (4.2.5) and not offered.
use super::interrupt::{CONFIG, EVENTS, Events, USED};
use super::registers::{QueueRegisters, Registers, Signals};
use super::{Ignored, Line, Notifier, Options, TransportError};
use crate::device::VirtioDevice;
use crate::{DeviceType, Engine, EngineError, Features, GuestAddress, Interrupt, LaneRunner, Status};
use device_state::StateError;
use serde::{Deserialize, Serialize};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

/// The first bytes of the registers: "virt".
pub const MAGIC: u32 = 0x7472_6976;
/// The version of the layout.
pub const VERSION: u32 = 2;
/// Where the configuration space begins.
pub const CONFIG_SPACE: u64 = 0x100;

/// What this transport carries of [`Features::CARRIED`].
const CARRIED: Features = Features::NOTIFICATION_DATA.union(Features::RING_RESET).union(Features::SUSPEND);

/// Where QueueNotify is: the address of an ioeventfd.
const QUEUE_NOTIFY: u64 = 0x050;

/// The interrupt of all queues, and of configuration changes.
struct Single(Events);

impl Interrupt for Single {
    fn signal(&self) {
        self.0.signal(USED);
    }
}

impl Signals for Single {
    fn config_changed(&self) {
        self.0.signal(CONFIG);
    }
    fn mute(&self) {
        self.0.mute();
    }
    fn unmute(&self) {
        self.0.unmute();
    }
}

/// What the driver selects before it accesses.
#[derive(Default)]
struct Selectors {
    device_features: AtomicU32,
    driver_features: AtomicU32,
    queue: AtomicU32,
    shared_memory: AtomicU32,
}

/// Version 1 of what is saved of the transport.
#[derive(Serialize, Deserialize)]
struct MmioV1 {
    device_features_sel: u32,
    driver_features_sel: u32,
    queue_sel: u32,
    shm_sel: u32,
    interrupt_status: u32,
}

/// A device behind virtio-mmio registers.
pub struct Mmio<D: VirtioDevice> {
    registers: Registers<D>,
    interrupt: Arc<Single>,
    device: DeviceType,
    vendor: u32,
    selected: Selectors,
    /// Where shared memory regions are.
    places: Mutex<Vec<(u8, GuestAddress)>>,
}

/// A transport and the runners of its device's lanes.
pub type MmioAndLanes<D> = (Mmio<D>, Vec<LaneRunner<<D as VirtioDevice>::Worker>>);

impl<D: VirtioDevice> Mmio<D> {
    /// Puts a device behind registers. `vendor` is what VendorID says; `line` is its interrupt.
    ///
    /// # Errors
    /// Those of [`Engine::new`].
    pub fn new(
        device: D,
        options: Options,
        vendor: u32,
        line: Arc<dyn Line>,
    ) -> Result<MmioAndLanes<D>, EngineError> {
        let interrupt = Arc::new(Single(Events::new(line)));
        let (registers, lanes) =
            Registers::new(device, options, CARRIED, interrupt.clone(), |_| interrupt.clone())?;
        let device = registers.engine().device_type();
        let (selected, places) = (Selectors::default(), Mutex::default());
        Ok((Mmio { registers, interrupt, device, vendor, selected, places }, lanes))
    }

    /// The device's engine: memory, suspension and statistics are the VMM's business.
    #[inline]
    pub fn engine(&self) -> &Engine<D> {
        self.registers.engine()
    }

    /// Bytes that the registers take: 256 and the configuration space.
    pub fn size(&self) -> u64 {
        CONFIG_SPACE + self.engine().config().len() as u64
    }

    /// Accesses that had no effect.
    pub fn ignored(&self) -> &Ignored {
        &self.registers.ignored
    }

    /// For ioeventfds, one a queue: nothing without [`Kicks::Files`](super::Kicks::Files). They work for drivers without
    /// `NOTIFICATION_DATA`; the values of others do not match and come as writes.
    pub fn notifiers(&self) -> impl Iterator<Item = Notifier<'_>> {
        self.registers.kick_files().map(|(queue, fd)| Notifier {
            queue,
            offset: QUEUE_NOTIFY,
            width: 4,
            value: Some(u32::from(queue)),
            fd,
        })
    }

    /// For interrupts of the level kind behind an irqfd: the guest ended an interrupt, and the line is low unless this
    /// raises it again.
    pub fn renew_interrupt(&self) {
        if self.interrupt.0.pending() != 0 {
            self.interrupt.0.settle();
        }
    }

    /// Resets the device, as a reset of the machine does.
    pub fn reset(&self) {
        self.registers.reset();
        self.select(&MmioV1 {
            device_features_sel: 0,
            driver_features_sel: 0,
            queue_sel: 0,
            shm_sel: 0,
            interrupt_status: 0,
        });
    }

    /// Where in the guest's address space the VMM has put a shared memory region (2.10); `None` takes it out of the driver's
    /// sight, as it is in the beginning. Regions that the device does not have are not there wherever they are put.
    pub fn place_shared_memory(&self, id: u8, base: Option<GuestAddress>) {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        places.retain(|(other, _)| *other != id);
        places.extend(base.map(|base| (id, base)));
    }

    /// Base and length of the selected shared memory region: all ones if there is none.
    fn shared_memory(&self) -> (u64, u64) {
        let selected = self.selected.shared_memory.load(Ordering::Relaxed);
        let regions = self.engine().shared_memory().iter();
        let region = regions.copied().find(|region| u32::from(region.id) == selected);
        let places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let place = region.and_then(|region| places.iter().find(|(id, _)| *id == region.id));
        match (region, place) {
            (Some(region), Some((_, base))) => (base.0, region.size),
            _ => (u64::MAX, u64::MAX),
        }
    }

    /// The driver reads `data.len()` bytes at `offset` from the beginning of the registers.
    #[inline]
    pub fn read(&self, offset: u64, data: &mut [u8]) {
        match (<&mut [u8; 4]>::try_from(&mut *data), self.plain_register(offset)) {
            (Ok(data), Some(value)) => *data = value.to_le_bytes(),
            _ => self.read_other(offset, data),
        }
    }

    /// Out of the way of [`Mmio::read`], which costs no more than what it does then.
    #[inline(never)]
    fn read_other(&self, offset: u64, data: &mut [u8]) {
        if offset >= CONFIG_SPACE {
            return self.read_config(offset - CONFIG_SPACE, data);
        }
        match (<&mut [u8; 4]>::try_from(&mut *data), self.register(offset)) {
            (Ok(data), Some(value)) => *data = value.to_le_bytes(),
            _ => {
                data.fill(0);
                self.registers.ignored.note();
            }
        }
    }

    /// The driver writes `data` at `offset` from the beginning of the registers.
    #[inline]
    pub fn write(&self, offset: u64, data: &[u8]) {
        match <[u8; 4]>::try_from(data) {
            Ok(bytes) if self.set_plain_register(offset, u32::from_le_bytes(bytes)) => {}
            _ => self.write_other(offset, data),
        }
    }

    #[inline(never)]
    fn write_other(&self, offset: u64, data: &[u8]) {
        if offset >= CONFIG_SPACE {
            return self.write_config(offset - CONFIG_SPACE, data);
        }
        match data.try_into() {
            Ok(bytes) => self.set_register(offset, u32::from_le_bytes(bytes)),
            Err(_) => self.registers.ignored.note(),
        }
    }

    /// Registers whose value is there without further ado, among them those that drivers read all the time.
    #[inline]
    fn plain_register(&self, offset: u64) -> Option<u32> {
        Some(match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => self.device.0,
            0x00c => self.vendor,
            0x044 => {
                u32::from(self.registers.glance(self.selected.queue.load(Ordering::Relaxed))?.is_ready())
            }
            0x060 => self.interrupt.0.pending(),
            0x070 => u32::from(self.registers.status().bits()),
            0x0fc => self.engine().config().generation(),
            _ => return None,
        })
    }

    /// The other ones.
    fn register(&self, offset: u64) -> Option<u32> {
        let registers = &self.registers;
        let queue = || self.selected.queue.load(Ordering::Relaxed);
        Some(match offset {
            0x010 => registers.device_features(self.selected.device_features.load(Ordering::Relaxed)),
            0x034 => u32::from(registers.queue_max(queue())),
            // Of a queue that ends.
            0x044 => u32::from(registers.queue(queue()).is_ready()),
            0x0b0 => low(self.shared_memory().1),
            0x0b4 => high(self.shared_memory().1),
            0x0b8 => low(self.shared_memory().0),
            0x0bc => high(self.shared_memory().0),
            0x0c0 => u32::from(registers.queue(queue()).is_resetting()),
            _ => return None,
        })
    }

    /// Registers that take a value without further ado, among them the acknowledgement of interrupts. False: it is another.
    #[inline]
    fn set_plain_register(&self, offset: u64, value: u32) -> bool {
        match offset {
            0x014 => self.selected.device_features.store(value, Ordering::Relaxed),
            0x024 => self.selected.driver_features.store(value, Ordering::Relaxed),
            0x030 => self.selected.queue.store(value, Ordering::Relaxed),
            0x064 => self.interrupt.0.acknowledge(value),
            0x0ac => self.selected.shared_memory.store(value, Ordering::Relaxed),
            _ => return false,
        }
        true
    }

    /// The other ones.
    fn set_register(&self, offset: u64, value: u32) {
        let registers = &self.registers;
        let queue = self.selected.queue.load(Ordering::Relaxed);
        let set_queue = |change: fn(&mut QueueRegisters, u32)| {
            registers.set_queue(queue, |registers| change(registers, value));
        };
        match offset {
            QUEUE_NOTIFY => {
                registers.notify(value);
            }
            0x020 => {
                registers.set_driver_features(self.selected.driver_features.load(Ordering::Relaxed), value);
            }
            0x038 => set_queue(|queue, value| queue.size = value),
            0x044 => match value {
                0 => registers.disable(queue),
                1 => {
                    registers.enable(queue);
                }
                _ => registers.ignored.note(),
            },
            0x070 => match u8::try_from(value) {
                Ok(status) => registers.set_status(Status::from_bits_retain(status)),
                Err(_) => registers.ignored.note(),
            },
            0x080 => set_queue(|queue, value| set_low(&mut queue.desc, value)),
            0x084 => set_queue(|queue, value| set_high(&mut queue.desc, value)),
            0x090 => set_queue(|queue, value| set_low(&mut queue.driver, value)),
            0x094 => set_queue(|queue, value| set_high(&mut queue.driver, value)),
            0x0a0 => set_queue(|queue, value| set_low(&mut queue.device, value)),
            0x0a4 => set_queue(|queue, value| set_high(&mut queue.device, value)),
            0x0c0 if value == 1 => registers.reset_queue(queue),
            _ => registers.ignored.note(),
        }
    }

    /// 4.2.2.2: 8 bit wide fields in 8 bits, 16 bit wide ones in 16, others in 32. Which they are is not known here, so
    /// that any of these widths is fine; nothing else.
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        if !matches!(data.len(), 1 | 2 | 4) {
            data.fill(0);
            return self.registers.ignored.note();
        }
        self.registers.read_config(offset, data);
    }

    fn write_config(&self, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 1 | 2 | 4) {
            return self.registers.ignored.note();
        }
        self.registers.write_config(offset, data);
    }

    /// Saves the device and its registers. It has to be at rest ([`Engine::suspend`], or the driver has suspended it); it
    /// may go on afterwards. Waits for lanes: they run on other threads.
    ///
    /// # Errors
    /// While a queue is being stopped, and those of [`Engine::save`].
    pub fn save(&self) -> Result<Vec<u8>, TransportError> {
        let selected = &self.selected;
        let own = MmioV1 {
            device_features_sel: selected.device_features.load(Ordering::Relaxed),
            driver_features_sel: selected.driver_features.load(Ordering::Relaxed),
            queue_sel: selected.queue.load(Ordering::Relaxed),
            shm_sel: selected.shared_memory.load(Ordering::Relaxed),
            interrupt_status: self.interrupt.0.pending(),
        };
        self.registers.save(1, &own)
    }

    /// Restores what [`Mmio::save`] returned, into a transport whose device is new or reset and has its memory
    /// ([`Engine::memory`]). The queues run afterwards, and the line is high if it was. Waits for lanes: they run on other
    /// threads.
    ///
    /// # Errors
    /// Whatever is wrong with the state, which is not trusted: the device is reset then.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), TransportError> {
        self.registers.restore(bytes, 1, |own: MmioV1| {
            if own.interrupt_status & !EVENTS != 0 {
                return Err(StateError::refused("it has events that there are none of").into());
            }
            self.select(&own);
            self.interrupt.0.restore(own.interrupt_status);
            Ok(())
        })
    }

    fn select(&self, own: &MmioV1) {
        self.selected.device_features.store(own.device_features_sel, Ordering::Relaxed);
        self.selected.driver_features.store(own.driver_features_sel, Ordering::Relaxed);
        self.selected.queue.store(own.queue_sel, Ordering::Relaxed);
        self.selected.shared_memory.store(own.shm_sel, Ordering::Relaxed);
    }
}

fn low(value: u64) -> u32 {
    (value & u64::from(u32::MAX)) as u32
}

fn high(value: u64) -> u32 {
    (value >> 32) as u32
}

pub(super) fn set_low(field: &mut u64, value: u32) {
    *field = *field & !u64::from(u32::MAX) | u64::from(value);
}

pub(super) fn set_high(field: &mut u64, value: u32) {
    *field = *field & u64::from(u32::MAX) | u64::from(value) << 32;
}
