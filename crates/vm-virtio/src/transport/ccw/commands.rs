//! The commands of the control unit: the basic ones, and virtio's (4.3.1.1, 4.3.2).
//!
//! | command | what it does |
//! |---|---|
//! | NO-OPERATION, BASIC SENSE, SENSE ID | always |
//! | SET_VIRTIO_REV | once, until the subchannel is enabled again |
//! | others | with the revision that has them; a refusal leaves everything as it was |
use super::indicators::{Indicators, Place};
use super::program::{ControlUnit, Data, Reply};
use super::{CONTROL_UNIT, Kind, Remembered};
use crate::device::VirtioDevice;
use crate::transport::registers::Registers;
use crate::{Features, Status};

const NO_OPERATION: u8 = 0x03;
const BASIC_SENSE: u8 = 0x04;
const SENSE_ID: u8 = 0xe4;
const WRITE_FEAT: u8 = 0x11;
const READ_FEAT: u8 = 0x12;
const SET_VQ: u8 = 0x13;
const WRITE_CONF: u8 = 0x21;
const READ_CONF: u8 = 0x22;
const WRITE_STATUS: u8 = 0x31;
const READ_VQ_CONF: u8 = 0x32;
const VDEV_RESET: u8 = 0x33;
const SET_IND: u8 = 0x43;
const SET_CONF_IND: u8 = 0x53;
const READ_STATUS: u8 = 0x72;
const SET_IND_ADAPTER: u8 = 0x73;
const SET_VIRTIO_REV: u8 = 0x83;

/// The revisions that there are (4.3.2.1).
pub(super) const REVISIONS: std::ops::RangeInclusive<u16> = 1..=2;

/// Sense: the command is refused.
const COMMAND_REJECT: u8 = 0x80;
/// Sense: the device does not work.
const EQUIPMENT_CHECK: u8 = 0x10;

/// Sense bytes that a device has.
const SENSE_BYTES: usize = 32;
/// Bytes of SENSE ID, with those of the extended part that are zero.
const ID_BYTES: usize = 256;

/// The command is refused.
const REJECT: Reply = Reply::Check(COMMAND_REJECT);

/// The control unit while a program runs.
pub(super) struct Unit<'a, D: VirtioDevice> {
    pub(super) registers: &'a Registers<D>,
    pub(super) indicators: &'a Indicators,
    pub(super) memory: &'a mut Remembered,
}

impl<D: VirtioDevice> ControlUnit for Unit<'_, D> {
    fn command(&mut self, code: u8, data: &Data<'_>) -> Reply {
        let reply = match code {
            NO_OPERATION => return Reply::Done(0),
            BASIC_SENSE => return self.sense(data),
            SENSE_ID => self.sense_id(data),
            SET_VIRTIO_REV => self.set_revision(data),
            _ => match self.memory.revision {
                // 4.3.2.1.3
                None => REJECT,
                Some(revision) => self.virtio(code, revision, data),
            },
        };
        self.memory.sense = if let Reply::Check(sense) = reply { sense } else { 0 };
        reply
    }
}

/// Sends as much of this as the guest wants.
fn send(data: &Data<'_>, bytes: &[u8]) -> Reply {
    let wanted = usize::try_from(data.len()).unwrap_or(usize::MAX);
    let now = bytes.get(..wanted).unwrap_or(bytes);
    if data.write(0, now).is_none() {
        return Reply::Fault;
    }
    let moved = now.len() as u32;
    if now.len() < bytes.len() { Reply::More(moved) } else { Reply::Done(moved) }
}

/// A command block of a fixed size: what the guest sends of it, or what is wrong (4.3.1.3).
fn block<const N: usize>(data: &Data<'_>) -> Result<[u8; N], Reply> {
    let have = usize::try_from(data.len()).unwrap_or(usize::MAX);
    match (have.cmp(&N), data.suppresses_length()) {
        (std::cmp::Ordering::Less, true) => return Err(REJECT),
        (std::cmp::Ordering::Equal, _) | (std::cmp::Ordering::Greater, true) => {}
        _ => return Err(Reply::WrongLength),
    }
    let mut bytes = [0; N];
    data.read(0, &mut bytes).map(|()| bytes).ok_or(Reply::Fault)
}

/// A command that succeeds or is refused.
fn done(moved: usize, accepted: bool) -> Reply {
    if accepted { Reply::Done(moved as u32) } else { REJECT }
}

fn be16(bytes: [u8; 2]) -> u16 {
    u16::from_be_bytes(bytes)
}

/// A field of a block, which is there: blocks have constant sizes.
fn field<const N: usize, const L: usize>(block: &[u8; L], at: usize) -> [u8; N] {
    let mut bytes = [0; N];
    if let Some(field) = block.get(at..).and_then(|rest| rest.first_chunk::<N>()) {
        bytes = *field;
    }
    bytes
}

impl<D: VirtioDevice> Unit<'_, D> {
    fn sense(&mut self, data: &Data<'_>) -> Reply {
        let mut bytes = [0; SENSE_BYTES];
        bytes[0] = std::mem::take(&mut self.memory.sense);
        send(data, &bytes)
    }

    fn sense_id(&self, data: &Data<'_>) -> Reply {
        let mut bytes = [0; ID_BYTES];
        let [high, low] = CONTROL_UNIT.to_be_bytes();
        let model = (self.registers.engine().device_type().0 & 0xff) as u8;
        bytes[..4].copy_from_slice(&[0xff, high, low, model]);
        send(data, &bytes)
    }

    fn set_revision(&mut self, data: &Data<'_>) -> Reply {
        // Revision and length, and then as much as that says: no revision has any.
        let head: [u8; 4] = match block(data) {
            Ok(head) => head,
            Err(reply) => return reply,
        };
        let (revision, length) = (be16(field(&head, 0)), be16(field(&head, 2)));
        // 4.3.2.1.1
        if self.memory.revision.is_some() || !REVISIONS.contains(&revision) || length != 0 {
            return REJECT;
        }
        self.memory.revision = Some(revision);
        Reply::Done(4)
    }

    fn virtio(&mut self, code: u8, revision: u16, data: &Data<'_>) -> Reply {
        let outcome = match code {
            READ_FEAT => self.read_features(data),
            WRITE_FEAT => self.write_features(data),
            READ_CONF => Ok(self.read_config(data)),
            WRITE_CONF => self.write_config(data),
            READ_STATUS if revision >= 2 => {
                block::<1>(data).map(|_| match data.write(0, &[self.registers.status().bits()]) {
                    Some(()) => Reply::Done(1),
                    None => Reply::Fault,
                })
            }
            WRITE_STATUS => block(data).map(|[status]| self.write_status(status)),
            VDEV_RESET => Ok(self.reset()),
            READ_VQ_CONF => self.read_queue(data),
            SET_VQ => block(data).map(|block| self.set_queue(&block)),
            SET_IND => block(data).map(|addr| self.set_indicators(u64::from_be_bytes(addr))),
            SET_CONF_IND => {
                let placed = |addr| self.indicators.set_config(u64::from_be_bytes(addr));
                block(data).map(|addr| placed(addr).map_or(Reply::Fault, |()| Reply::Done(8)))
            }
            SET_IND_ADAPTER => block(data).map(|block| self.set_adapter_indicators(&block)),
            _ => Ok(REJECT),
        };
        outcome.unwrap_or_else(|reply| reply)
    }

    fn read_features(&self, data: &Data<'_>) -> Result<Reply, Reply> {
        let [.., word] = block::<5>(data)?;
        let bits = self.registers.device_features(u32::from(word));
        Ok(data.write(0, &bits.to_le_bytes()).map_or(Reply::Fault, |()| Reply::Done(5)))
    }

    fn write_features(&self, data: &Data<'_>) -> Result<Reply, Reply> {
        let [a, b, c, d, word] = block(data)?;
        let bits = u32::from_le_bytes([a, b, c, d]);
        Ok(done(5, self.registers.set_driver_features(u32::from(word), bits)))
    }

    /// The beginning of the space, as much as the guest wants.
    fn read_config(&self, data: &Data<'_>) -> Reply {
        let config = self.registers.engine().config();
        let wanted = usize::try_from(data.len()).unwrap_or(usize::MAX);
        let mut bytes = vec![0; config.len().min(wanted)];
        config.read(0, &mut bytes);
        match data.write(0, &bytes) {
            Some(()) => Reply::Done(bytes.len() as u32),
            None => Reply::Fault,
        }
    }

    fn write_config(&self, data: &Data<'_>) -> Result<Reply, Reply> {
        let size = self.registers.engine().config().len();
        let have = usize::try_from(data.len()).unwrap_or(usize::MAX);
        if have > size && !data.suppresses_length() {
            return Err(Reply::WrongLength);
        }
        let mut bytes = vec![0; size.min(have)];
        data.read(0, &mut bytes).ok_or(Reply::Fault)?;
        self.registers.write_config(0, &bytes);
        Ok(Reply::Done(bytes.len() as u32))
    }

    /// 4.3.2.3.2: all of it, or nothing and a refusal.
    fn write_status(&mut self, status: u8) -> Reply {
        let status = Status::from_bits_retain(status);
        if status.is_empty() {
            return match self.reset() {
                Reply::Done(_) => Reply::Done(1),
                other => other,
            };
        }
        let old = self.registers.status();
        // Set by the device: what it is now. SUSPEND and DRIVER_OK take each other's place (3.4).
        let devices_own = Status::DEVICE_NEEDS_RESET | Status::SUSPEND | Status::DRIVER_OK;
        let takes_back = !status.contains(old - devices_own);
        let early = status.intersects(Status::DRIVER_OK | Status::SUSPEND)
            && !(old | status).contains(Status::FEATURES_OK);
        let invents =
            status.contains(Status::DEVICE_NEEDS_RESET) && !old.contains(Status::DEVICE_NEEDS_RESET);
        let suspends = status.contains(Status::SUSPEND) && !old.contains(Status::SUSPEND);
        let live = old.contains(Status::DRIVER_OK);
        let may_suspend = self.registers.engine().driver_features().contains(Features::SUSPEND);
        if takes_back || early || invents || (suspends && !(live && may_suspend)) {
            return REJECT;
        }
        if status.contains(Status::FEATURES_OK) && !old.contains(Status::FEATURES_OK) {
            self.registers.set_status(old | Status::FEATURES_OK);
            if !self.registers.status().contains(Status::FEATURES_OK) {
                return REJECT;
            }
        }
        self.registers.set_status(status);
        done(1, self.registers.status().contains(status - devices_own))
    }

    /// 4.3.3.3.1: done before the command ends well.
    fn reset(&mut self) -> Reply {
        self.registers.reset();
        self.memory.kind = None;
        if self.registers.status().is_empty() { Reply::Done(0) } else { Reply::Check(EQUIPMENT_CHECK) }
    }

    fn read_queue(&self, data: &Data<'_>) -> Result<Reply, Reply> {
        let [high, low, ..] = block::<4>(data)?;
        let max = self.registers.queue_max(u32::from(be16([high, low])));
        Ok(data.write(2, &max.to_be_bytes()).map_or(Reply::Fault, |()| Reply::Done(4)))
    }

    /// Descriptor Area, 4 bytes that are ignored (4.3.2.2.1), index, size, Driver Area, Device Area. Linux sets size 0
    /// when it lets go of a queue, also after a reset.
    fn set_queue(&self, block: &[u8; 32]) -> Reply {
        let (queue, size) = (u32::from(be16(field(block, 12))), be16(field(block, 14)));
        let address = |at| u64::from_be_bytes(field(block, at));
        let max = self.registers.queue_max(queue);
        if max == 0 || size > max {
            return REJECT;
        }
        if size == 0 {
            self.registers.disable(queue);
            return if self.registers.queue(queue).is_ready() {
                Reply::Check(EQUIPMENT_CHECK)
            } else {
                Reply::Done(32)
            };
        }
        if self.registers.queue(queue).is_ready() {
            return REJECT;
        }
        self.registers.set_queue(queue, |registers| {
            registers.size = u32::from(size);
            (registers.desc, registers.driver, registers.device) = (address(0), address(16), address(24));
        });
        done(32, self.registers.enable(queue))
    }

    fn set_indicators(&mut self, addr: u64) -> Reply {
        // 4.3.2.6.1
        if self.memory.kind == Some(Kind::Adapter) {
            return REJECT;
        }
        if self.indicators.set_place((addr != 0).then_some(Place::Classic(addr))).is_none() {
            return Reply::Fault;
        }
        self.memory.kind = Some(Kind::Classic);
        Reply::Done(8)
    }

    fn set_adapter_indicators(&mut self, block: &[u8; 25]) -> Reply {
        let address = |at| u64::from_be_bytes(field(block, at));
        let (summary, area, bit) = (address(0), address(8), address(16));
        let [isc] = field(block, 24);
        // 4.3.2.6.3.1
        if self.memory.kind == Some(Kind::Classic) || isc > 7 {
            return REJECT;
        }
        let place = (area != 0).then_some(Place::Adapter { summary, area, bit, isc });
        if self.indicators.set_place(place).is_none() {
            return Reply::Fault;
        }
        self.memory.kind = Some(Kind::Adapter);
        Reply::Done(25)
    }
}
