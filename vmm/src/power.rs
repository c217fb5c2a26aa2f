//! Power: the registers by which a guest turns the machine off (ACPI 6.5, 4.8.3: PM1 event and control blocks) and resets it
//! (4.8.3.6), and who is told.
//!
//! There are no power events, so nothing is ever pending; the enable bits are kept, since ACPI's drivers read them back.

use std::io;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU16, Ordering};

use vm_device::DevicePio;
use vm_device::bus::{PioAddress, PioAddressOffset};
use vm_device::interrupt::Event;

/// Offsets of the blocks.
pub(crate) const EVENTS: u16 = 0;
pub(crate) const CONTROL: u16 = 4;
pub(crate) const RESET: u16 = 6;
/// How many ports there are.
pub(crate) const PORTS: u16 = 8;
/// What is written to [`RESET`].
pub(crate) const RESET_VALUE: u8 = 1;
/// The sleep type of "soft off", as the `_S5` object says.
pub(crate) const SOFT_OFF: u8 = 5;

/// ACPI mode is on.
const SCI_ENABLED: u16 = 1;
const SLEEP_ENABLE: u16 = 1 << 13;

/// How a run of the machine ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Off,
    Reset,
}

#[derive(Debug)]
pub(crate) struct Power {
    enabled: AtomicU16,
    ended: Mutex<Option<End>>,
    told: Event,
}

impl Power {
    pub(crate) fn new() -> io::Result<Power> {
        Ok(Power { enabled: AtomicU16::new(0), ended: Mutex::new(None), told: Event::new()? })
    }

    /// The run is to end. The first who says so counts.
    pub(crate) fn end(&self, how: End) {
        self.ended.lock().unwrap_or_else(|broken| broken.into_inner()).get_or_insert(how);
        self.told.signal();
    }

    /// Whether the run is to end.
    pub(crate) fn ended(&self) -> Option<End> {
        *self.ended.lock().unwrap_or_else(|broken| broken.into_inner())
    }

    /// Signalled when it is.
    pub(crate) fn event(&self) -> &Event {
        &self.told
    }

    /// For the next run.
    pub(crate) fn reset(&self) {
        *self.ended.lock().unwrap_or_else(|broken| broken.into_inner()) = None;
        self.enabled.store(0, Ordering::Relaxed);
        self.told.take();
    }
}

impl DevicePio for Power {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        data.fill(0);
        let value = match offset {
            2 => self.enabled.load(Ordering::Relaxed),
            CONTROL => SCI_ENABLED,
            _ => 0,
        };
        data.iter_mut().zip(value.to_le_bytes()).for_each(|(to, byte)| *to = byte);
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        match (offset, data) {
            (2, &[low, high]) => self.enabled.store(u16::from_le_bytes([low, high]), Ordering::Relaxed),
            (CONTROL, &[low, high]) => {
                let control = u16::from_le_bytes([low, high]);
                if control & SLEEP_ENABLE != 0 && control >> 10 & 7 == u16::from(SOFT_OFF) {
                    self.end(End::Off);
                }
            }
            (RESET, &[RESET_VALUE]) => self.end(End::Reset),
            _ => {}
        }
    }
}
