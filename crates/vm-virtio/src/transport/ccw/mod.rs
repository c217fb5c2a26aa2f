//! virtio over channel I/O (virtio 1.4, 4.3): a device behind a subchannel of an s390 machine.
//!
//! The VMM has the channel subsystem: subchannels, their status, pending interrupts. It hands over what START SUBCHANNEL got
//! ([`Ccw::start`]), the enabling of the subchannel ([`Ccw::set_enabled`]) and DIAGNOSE 0x500 ([`Ccw::notify`]), and gets
//! [interrupts](ChannelInterrupts) in return.
//!
//! * The device is not transitional: revisions 1 and 2, and no command of virtio before one of them is selected.
//! * A command whose count is too large without SLI is not carried out, unless it only reads.
//! * Not on this transport (4.3.4), and not offered: `ADMIN_VQ`, `RING_RESET`, shared memory regions.
//! * Classic indicators have 64 bits: queues beyond are notified through adapter interrupts only.
//! * READ_CONF and WRITE_CONF take a smaller count, too, as the beginning of the space: Linux asks for as much as it needs.
mod commands;
mod indicators;
mod program;

pub use indicators::ChannelInterrupts;
pub use program::{
    ENDED, Ending, INCORRECT_LENGTH, LONGEST, PROGRAM_CHECK, PROGRAM_CONTROLLED, Program, UNIT_CHECK,
};

use super::registers::Registers;
use super::{Ignored, Notifier, Options, TransportError};
use crate::device::VirtioDevice;
use crate::{DirtyLog, Engine, EngineError, Features, GuestRam, LaneRunner, Ticket, WaitFor};
use commands::Unit;
use device_state::StateError;
use indicators::{Indicators, Place, QueueIndicator};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex, TryLockError};

/// The control unit's type.
pub const CONTROL_UNIT: u16 = 0x3832;
/// The type of the channel path.
pub const CHANNEL_PATH: u8 = 0x32;

/// What this transport carries of [`Features::CARRIED`].
const CARRIED: Features = Features::NOTIFICATION_DATA.union(Features::SUSPEND);

/// The subchannel that DIAGNOSE 0x500 names in its second register: bits 0 to 31 are ignored (4.3.3.2.1).
pub fn subchannel_id(gpr2: u64) -> u32 {
    (gpr2 & u64::from(u32::MAX)) as u32
}

/// What the control unit remembers between commands.
#[derive(Default)]
pub(super) struct Remembered {
    revision: Option<u16>,
    /// The first sense byte.
    sense: u8,
    /// Which kind of indicators was set up since the last reset; the other is refused.
    kind: Option<Kind>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    Classic,
    Adapter,
}

/// Version 1 of what is saved of the transport.
#[derive(Serialize, Deserialize)]
struct CcwV1 {
    revision: Option<u16>,
    sense: u8,
    kind: Option<Kind>,
    place: Option<Place>,
    config: Option<u64>,
}

/// A device behind a subchannel.
pub struct Ccw<D: VirtioDevice> {
    registers: Registers<D>,
    indicators: Arc<Indicators>,
    memory: Mutex<Remembered>,
}

/// A transport and the runners of its device's lanes.
pub type CcwAndLanes<D> = (Ccw<D>, Vec<LaneRunner<<D as VirtioDevice>::Worker>>);

impl<D: VirtioDevice> Ccw<D> {
    /// Puts a device behind a subchannel.
    ///
    /// # Errors
    /// Those of [`Engine::new`].
    pub fn new(
        device: D,
        options: Options,
        interrupts: Arc<dyn ChannelInterrupts>,
    ) -> Result<CcwAndLanes<D>, EngineError> {
        let indicators = Arc::new(Indicators::new(interrupts));
        let call = |queue| -> Arc<dyn crate::Interrupt> {
            Arc::new(QueueIndicator { indicators: indicators.clone(), queue })
        };
        let (registers, lanes) = Registers::new(device, options, CARRIED, indicators.clone(), call)?;
        indicators.set_queues(registers.engine().queues().len());
        Ok((Ccw { registers, indicators, memory: Mutex::default() }, lanes))
    }

    /// The device's engine. Memory and log have to go through [`Ccw::memory`] and [`Ccw::log`].
    pub fn engine(&self) -> &Engine<D> {
        self.registers.engine()
    }

    /// Notifications that named no queue, and features that came too late.
    pub fn ignored(&self) -> &Ignored {
        &self.registers.ignored
    }

    /// Guest memory changed: as [`Engine::memory`], and for channel programs and indicators.
    pub fn memory(&self, ram: GuestRam, wait: WaitFor) -> Ticket<()> {
        self.indicators.set_ram(ram.clone());
        self.engine().memory(ram, wait)
    }

    /// As [`Engine::log`], and for what channel programs and indicators write.
    pub fn log(&self, log: Option<Arc<DirtyLog>>) -> Ticket<()> {
        self.indicators.set_log(log.clone());
        self.engine().log(log)
    }

    /// For ioeventfds, one a queue: the value is that of the third register of DIAGNOSE 0x500. They work for drivers without
    /// `NOTIFICATION_DATA`.
    pub fn notifiers(&self) -> impl Iterator<Item = Notifier<'_>> {
        let files = self.registers.kick_files();
        files.map(|(queue, fd)| Notifier { queue, offset: 0, width: 0, value: Some(u32::from(queue)), fd })
    }

    /// The guest enabled or disabled the subchannel: the revision is unset (4.3.2.1.1).
    pub fn set_enabled(&self, _enabled: bool) {
        self.lock().revision = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Remembered> {
        self.memory.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Resets the device, as a reset of the machine does.
    pub fn reset(&self) {
        self.registers.reset();
        *self.lock() = Remembered::default();
    }

    /// Runs a channel program. `None` while another one runs: the subchannel is busy (condition code 2).
    pub fn start(&self, program: Program) -> Option<Ending> {
        let mut memory = match self.memory.try_lock() {
            Ok(memory) => memory,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return None,
        };
        let (ram, log) = (self.indicators.ram(), self.indicators.log());
        let mut unit = Unit { registers: &self.registers, indicators: &self.indicators, memory: &mut memory };
        Some(program::run(program, &ram, log.as_ref(), &mut unit))
    }

    /// DIAGNOSE 0x500, subcode 3: `data` is the third register. Returns what the second one gets: a cookie, which is of no
    /// use, or a negative number if that names no queue.
    pub fn notify(&self, data: u64) -> i64 {
        match u32::try_from(data) {
            Ok(value) if self.registers.notify(value) => 0,
            _ => -22,
        }
    }

    /// Saves the device and what its control unit remembers. It has to be at rest ([`Engine::suspend`]); it may go on
    /// afterwards. Waits for lanes: they run on other threads.
    ///
    /// # Errors
    /// Those of [`Engine::save`].
    pub fn save(&self) -> Result<Vec<u8>, TransportError> {
        let memory = self.lock();
        let (place, config) = self.indicators.places();
        let Remembered { revision, sense, kind } = *memory;
        self.registers.save(1, &CcwV1 { revision, sense, kind, place, config })
    }

    /// Restores what [`Ccw::save`] returned, into a transport whose device is new or reset and has its
    /// [memory](Ccw::memory). Waits for lanes: they run on other threads.
    ///
    /// # Errors
    /// Whatever is wrong with the state, which is not trusted: the device is reset then.
    pub fn restore(&self, bytes: &[u8]) -> Result<(), TransportError> {
        let mut installed = false;
        let outcome = self.registers.restore(bytes, 1, |own: CcwV1| {
            installed = true;
            let CcwV1 { revision, sense, kind, place, config } = own;
            let kind_fits = match place {
                None => true,
                Some(Place::Classic(_)) => kind == Some(Kind::Classic),
                Some(Place::Adapter { isc, .. }) => kind == Some(Kind::Adapter) && isc < 8,
            };
            let revision_fits = revision.is_none_or(|revision| commands::REVISIONS.contains(&revision));
            let placed = self.indicators.set_place(place).is_some()
                && self.indicators.set_config(config.unwrap_or(0)).is_some();
            if !kind_fits || !revision_fits || !placed {
                return Err(StateError::refused("its revision or indicators are impossible").into());
            }
            *self.lock() = Remembered { revision, sense, kind };
            Ok(())
        });
        if installed && outcome.is_err() {
            *self.lock() = Remembered::default();
        }
        outcome
    }
}
