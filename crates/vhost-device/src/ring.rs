//! What a front-end said about one ring, and what that makes of it (vhost-user, "Ring states").
//!
//! A ring is *started* while it has a kick (SET_VRING_KICK or VRING_KICK until GET_VRING_BASE), *enabled* or not beside that, and
//! *running* while the engine serves it. A started ring is not running while something that it needs is missing, for
//! example while its memory slot is being exchanged; it runs as soon as that is there.
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use vhost_user::VringAddr;
use vm_virtio::queue::Miss;
use vm_virtio::{
    Call, EventFd, GuestAddress, GuestRam, Interrupt, Kick, QueueConfig, QueueError, QueueState, RingPos,
    StartError,
};

use crate::inband::InBandCall;
use crate::memory::MemoryTable;
use crate::task::TaskWaker;

/// `VHOST_VRING_F_LOG` of SET_VRING_ADDR's flags.
const F_LOG: u32 = 1;

/// Why a started ring does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RingError {
    /// SET_VRING_NUM or SET_VRING_ADDR has not come.
    #[error("its size or addresses are not set")]
    Incomplete,
    /// SET_VRING_NUM was refused.
    #[error("it cannot have {0} entries")]
    Size(u32),
    /// No memory region has it; one may come.
    #[error("its {area} at user address {user:#x} is in no memory region")]
    Unmapped { area: &'static str, user: u64 },
    /// The used ring cannot be read, or the base is no position.
    #[error(transparent)]
    Position(#[from] QueueError),
    /// The device refuses the features that were set.
    #[error("the features that were set are not acceptable")]
    Features,
    /// The engine refuses it.
    #[error(transparent)]
    Start(#[from] StartError),
    /// A descriptor cannot be duplicated.
    #[error("its kick descriptor cannot be used: {0}")]
    Kick(#[from] io::Error),
}

impl RingError {
    /// The translation that is missing.
    pub(crate) fn miss(&self) -> Option<Miss> {
        match self {
            RingError::Position(QueueError::Miss(miss))
            | RingError::Start(StartError::Queue(QueueError::Miss(miss))) => Some(*miss),
            _ => None,
        }
    }

    /// Whether a later message may bring what is missing.
    pub(crate) fn may_heal(&self) -> bool {
        matches!(self, RingError::Incomplete | RingError::Unmapped { .. })
    }
}

/// Where a ring goes on when it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Position {
    /// From the beginning.
    Start,
    /// At the value of SET_VRING_BASE, or of the last GET_VRING_BASE.
    Base(u32),
    /// Exactly where the engine stopped it, to change something under it.
    At(QueueState),
}

/// What SET_VRING_NUM said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Size {
    /// Nothing so far.
    Unset,
    /// Something that was refused. The ring must not run with another size than the driver's.
    Refused(u32),
    /// A size that the device can have.
    Set(u16),
}

/// The base of a ring that has not been used (virtio 1.4, 2.7.13 and 2.8.1).
pub(crate) fn first_base(packed: bool) -> u32 {
    QueueState::new().to_vring_base(packed)
}

/// One ring of a connection.
pub(crate) struct Ring {
    /// SET_VRING_NUM.
    pub(crate) size: Size,
    /// SET_VRING_ADDR.
    pub(crate) addr: Option<VringAddr>,
    /// SET_VRING_BASE.
    pub(crate) position: Position,
    /// GET_VRING_BASE was answered, with nothing left in flight: a base that is set now is where the ring goes on,
    /// whatever its in-flight region says.
    pub(crate) told: bool,
    /// SET_VRING_KICK: present while the ring is started.
    pub(crate) kick: Option<KickFile>,
    /// SET_VRING_CALL.
    pub(crate) call: Notify,
    /// SET_VRING_ERR.
    pub(crate) err: Notify,
    /// Its interrupts as messages, where they are.
    pub(crate) in_band: Option<Arc<InBandCall>>,
    /// SET_VRING_ENABLE.
    pub(crate) enabled: bool,
    /// With what the engine serves it.
    pub(crate) running: Option<QueueConfig>,
    /// The translation without which it cannot start.
    pub(crate) asked: Option<Miss>,
}

impl Default for Ring {
    fn default() -> Self {
        Ring {
            size: Size::Unset,
            addr: None,
            position: Position::Start,
            told: false,
            kick: None,
            call: Notify::Unsaid,
            err: Notify::Unsaid,
            in_band: None,
            enabled: false,
            running: None,
            asked: None,
        }
    }
}

/// Where a ring's interrupts or errors go.
pub(crate) enum Notify {
    /// Nothing was said: over the channel with INBAND_NOTIFICATIONS, else nowhere.
    Unsaid,
    /// Nowhere: the front-end polls, or does not want to know.
    Nowhere,
    /// To this file, which is preferred to messages.
    File(Arc<EventFd>),
}

impl Notify {
    /// What SET_VRING_CALL or SET_VRING_ERR says.
    pub(crate) fn new(fd: Option<OwnedFd>) -> io::Result<Notify> {
        Ok(match fd {
            Some(fd) => Notify::File(Arc::new(EventFd::new(fd)?)),
            None => Notify::Nowhere,
        })
    }
}

/// How a front-end announces buffers.
pub(crate) enum KickFile {
    /// With VRING_KICK, the first of which has started the ring.
    InBand,
    /// Through a file.
    Fd(OwnedFd),
    /// Not at all: poll.
    Poll,
}

impl KickFile {
    /// The engine's own handle; this one is kept for starting the ring again.
    pub(crate) fn for_engine(&self) -> io::Result<Kick> {
        Ok(match self {
            KickFile::Fd(fd) => Kick::Fd(fd.try_clone()?),
            KickFile::Poll => Kick::Poll,
            KickFile::InBand => Kick::Manual,
        })
    }
}

impl Ring {
    /// The interrupt for the engine. `in_band`: what to wake for messages, where notifications are messages.
    pub(crate) fn call(&mut self, in_band: Option<&Arc<TaskWaker>>) -> Call {
        match (&self.call, in_band) {
            (Notify::File(file), _) => Some(file.clone() as Arc<dyn Interrupt>),
            (Notify::Unsaid, Some(waker)) => {
                let call = self.in_band.get_or_insert_with(|| InBandCall::new(waker.clone()));
                Some(call.clone() as Arc<dyn Interrupt>)
            }
            (Notify::Unsaid, None) | (Notify::Nowhere, _) => None,
        }
    }

    /// Size and guest addresses, translated by `memory`. Each area has to be in one region.
    pub(crate) fn place(&self, memory: &MemoryTable, packed: bool) -> Result<QueueConfig, RingError> {
        let size = match self.size {
            Size::Unset => return Err(RingError::Incomplete),
            Size::Refused(size) => return Err(RingError::Size(size)),
            Size::Set(size) => size,
        };
        let addr = self.addr.as_ref().ok_or(RingError::Incomplete)?;
        let n = u64::from(size);
        // The lengths of 2.7 (with event fields, which are part of the areas in any case) and of 2.8.10.1.
        let (driver_len, device_len) = if packed { (4, 4) } else { (6 + 2 * n, 6 + 8 * n) };
        let find = |area, user, len| -> Result<GuestAddress, RingError> {
            // What is missing there, the engine says.
            if memory.is_translated() {
                return Ok(GuestAddress(user));
            }
            memory.translate(user, len).ok_or(RingError::Unmapped { area, user })
        };
        Ok(QueueConfig {
            size,
            desc: find("descriptor area", addr.desc, 16 * n)?,
            driver: find("driver area", addr.avail, driver_len)?,
            device: find("device area", addr.used, device_len)?,
        })
    }

    /// Where the front-end wants writes to the device area logged: guest-physical, or an IOVA like the ring's.
    pub(crate) fn logged(&self, translated: bool) -> Option<GuestAddress> {
        let addr = self.addr.as_ref().filter(|addr| addr.flags & F_LOG != 0)?;
        Some(GuestAddress(if translated { addr.used } else { addr.log }))
    }

    /// Where the ring goes on. The used index of a split ring is not part of the base: it is what stands in guest
    /// memory (VHOST_USER_SET_VRING_BASE).
    pub(crate) fn state(
        &self,
        config: &QueueConfig,
        ram: &GuestRam,
        packed: bool,
    ) -> Result<Option<QueueState>, RingError> {
        let base = match &self.position {
            Position::At(state) => return Ok(Some(state.clone())),
            Position::Base(base) => *base,
            Position::Start if packed => return Ok(None),
            Position::Start => first_base(packed),
        };
        let mut state = QueueState::from_vring_base(base, packed)?;
        if !packed {
            // 2.7.8: flags, idx. The area was just found in memory as a whole.
            let mut used = [0; 2];
            let idx = GuestAddress(config.device.0.saturating_add(2));
            ram.read(idx, &mut used).map_err(QueueError::from)?;
            state.used = RingPos { index: u16::from_le_bytes(used), wrap: true };
        }
        Ok(Some(state))
    }

    /// The value for GET_VRING_BASE of a ring that is not running.
    pub(crate) fn base(&self, packed: bool) -> u32 {
        match &self.position {
            Position::Start => first_base(packed),
            Position::Base(base) => *base,
            Position::At(state) => state.to_vring_base(packed),
        }
    }

    /// A device reset: stopped, disabled, back to the beginning (VHOST_USER_RESET_DEVICE). What belongs to the
    /// connection rather than to the device's state stays: sizes, addresses, call and error files.
    pub(crate) fn reset(&mut self) {
        let Ring {
            size: _,
            addr: _,
            position,
            told,
            kick,
            call: _,
            err: _,
            in_band: _,
            enabled,
            running,
            asked,
        } = self;
        *position = Position::Start;
        *told = false;
        *kick = None;
        *enabled = false;
        *running = None;
        *asked = None;
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::MemfdFlags;
    use vhost_user::MemoryRegion;

    use super::*;

    const USER: u64 = 0x7fff_0000_0000;
    const GUEST: u64 = 0x4000_0000;

    fn memory() -> MemoryTable {
        let fd = rustix::fs::memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 0x1_0000).unwrap();
        let region = MemoryRegion { guest_addr: GUEST, size: 0x1_0000, user_addr: USER, mmap_offset: 0 };
        MemoryTable::replace(vec![(region, fd)]).unwrap()
    }

    fn ring(size: u16) -> Ring {
        let addr = VringAddr {
            desc: USER + 0x1000,
            avail: USER + 0x2000,
            used: USER + 0x3000,
            ..VringAddr::default()
        };
        Ring { size: Size::Set(size), addr: Some(addr), ..Ring::default() }
    }

    #[test]
    fn user_addresses_become_guest_addresses() {
        let config = ring(8).place(&memory(), false).unwrap();
        assert_eq!(config.size, 8);
        assert_eq!(config.desc, GuestAddress(GUEST + 0x1000));
        assert_eq!(config.driver, GuestAddress(GUEST + 0x2000));
        assert_eq!(config.device, GuestAddress(GUEST + 0x3000));
    }

    #[test]
    fn a_ring_that_lacks_something_says_so_and_may_heal() {
        let bare = Ring { addr: None, ..ring(8) };
        assert!(matches!(bare.place(&memory(), false), Err(RingError::Incomplete)));
        let error = ring(8).place(&MemoryTable::empty(), false).unwrap_err();
        assert!(matches!(error, RingError::Unmapped { area: "descriptor area", .. }) && error.may_heal());
        // The last bytes of each area count: 4096 descriptors fill the region beyond its end.
        assert!(ring(4096).place(&memory(), false).is_err());
        let mut at_end = ring(8);
        at_end.addr.as_mut().unwrap().used = USER + 0x1_0000 - (6 + 8 * 8);
        assert!(at_end.place(&memory(), false).is_ok());
        at_end.addr.as_mut().unwrap().used += 1;
        assert!(at_end.place(&memory(), false).is_err());
        at_end.addr.as_mut().unwrap().used = USER + 0x1_0000 - 4;
        assert!(at_end.place(&memory(), true).is_ok(), "packed event suppression has four bytes");
        assert!(!RingError::Features.may_heal());
    }

    #[test]
    fn a_split_base_takes_the_used_index_from_guest_memory() {
        let memory = memory();
        let mut ring = ring(8);
        let config = ring.place(&memory, false).unwrap();
        memory.ram().write(GuestAddress(GUEST + 0x3002), &7u16.to_le_bytes()).unwrap();
        ring.position = Position::Base(9);
        let state = ring.state(&config, memory.ram(), false).unwrap().unwrap();
        assert_eq!((state.avail.index, state.used.index), (9, 7));
        assert_eq!(ring.base(false), 9);
        ring.position = Position::Base(0x1_0000);
        assert!(ring.state(&config, memory.ram(), false).is_err(), "16 bits are an index");
    }

    #[test]
    fn a_packed_base_holds_both_positions() {
        let memory = memory();
        let mut ring = ring(8);
        let config = ring.place(&memory, true).unwrap();
        ring.position = Position::Base(0x0003_8005);
        let state = ring.state(&config, memory.ram(), true).unwrap().unwrap();
        assert_eq!(
            (state.avail, state.used),
            (RingPos { index: 5, wrap: true }, RingPos { index: 3, wrap: false })
        );
        assert_eq!(ring.base(true), 0x0003_8005);
        assert_eq!(Ring::default().base(true), 0x8000_8000);
        assert_eq!(Ring::default().base(false), 0);
    }

    #[test]
    fn a_reset_keeps_what_is_the_connections() {
        let mut ring = ring(8);
        ring.position = Position::Base(3);
        ring.enabled = true;
        ring.kick = Some(KickFile::Poll);
        ring.reset();
        assert!(ring.size != Size::Unset && ring.addr.is_some());
        assert!(!ring.enabled && ring.kick.is_none() && ring.position == Position::Start);
    }
}
