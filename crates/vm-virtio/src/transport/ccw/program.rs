//! Channel programs: chains of channel-command words in guest memory, and how they end (z/Architecture, chapter 15).
//!
//! Both formats of CCWs, command and data chaining, TIC, SLI, skipping and indirect data addresses (both formats).
//! Not: suspension, modified indirect addresses (MIDA), reading backward; their flags and commands end a program
//! as they do on channels that lack them. An intermediate interruption (PCI) is told with the ending status.
//!
//! A program is the guest's: it ends after [`LONGEST`] CCWs, whatever it says.
use crate::{DirtyLog, GuestAddress, GuestRam};
use std::sync::Arc;

/// Channel end and device end: how an operation ends well.
pub const ENDED: u8 = 0x0c;
/// Device status: unit check. What it is about is in the sense bytes.
pub const UNIT_CHECK: u8 = 0x02;
/// Subchannel status: program-controlled interruption.
pub const PROGRAM_CONTROLLED: u8 = 0x80;
/// Subchannel status: incorrect length.
pub const INCORRECT_LENGTH: u8 = 0x40;
/// Subchannel status: program check.
pub const PROGRAM_CHECK: u8 = 0x20;

/// Most CCWs of one program.
pub const LONGEST: usize = 256;

const CHAIN_DATA: u8 = 0x80;
const CHAIN_COMMAND: u8 = 0x40;
const SUPPRESS_LENGTH: u8 = 0x20;
const SKIP: u8 = 0x10;
const INTERRUPT: u8 = 0x08;
const INDIRECT: u8 = 0x04;
/// Suspension and modified indirect addresses.
const UNSUPPORTED: u8 = 0x03;

const TRANSFER_IN_CHANNEL: u8 = 0x08;

/// What of an operation-request block matters here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Program {
    /// Address of the first CCW.
    pub address: u32,
    /// CCWs are of format 1 (ORB, F).
    pub format1: bool,
    /// Indirect data addresses have 64 bits (ORB, H).
    pub wide_addresses: bool,
    /// Blocks of wide indirect addresses have 2 KiB instead of 4 (ORB, T).
    pub small_blocks: bool,
}

/// How a program ended: fields of the subchannel-status word.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ending {
    /// Device status.
    pub device: u8,
    /// Subchannel status.
    pub subchannel: u8,
    /// What is left of the last CCW's count.
    pub residual: u16,
    /// The CCW address: 8 behind the last CCW that was used.
    pub address: u32,
}

/// What a control unit makes of a command.
pub(super) enum Reply {
    /// It is done, with so many bytes, and there were no more.
    Done(u32),
    /// It is done with so many bytes, and would have gone on.
    More(u32),
    /// The count is not what the command needs: nothing was done.
    WrongLength,
    /// A unit check, with this first sense byte.
    Check(u8),
    /// An address that is no memory.
    Fault,
}

/// A control unit: gets the commands of a program one after the other.
pub(super) trait ControlUnit {
    fn command(&mut self, code: u8, data: &Data<'_>) -> Reply;
}

/// A CCW.
struct Ccw {
    command: u8,
    flags: u8,
    count: u16,
    address: u32,
}

/// A piece of the area that a command works on.
struct Piece {
    address: u64,
    len: u32,
    /// Nothing is written.
    skip: bool,
}

/// The data of one command, over all CCWs that are chained for it.
pub(super) struct Data<'a> {
    ram: &'a GuestRam,
    log: Option<&'a Arc<DirtyLog>>,
    pieces: Vec<Piece>,
    len: u32,
    /// Of each CCW: where its bytes end, and its flags.
    parts: Vec<(u32, u8)>,
    format1: bool,
}

impl Data<'_> {
    /// Bytes that the guest gave for it.
    pub(super) fn len(&self) -> u32 {
        self.len
    }

    /// Whether the guest wants no check of the length.
    pub(super) fn suppresses_length(&self) -> bool {
        self.parts.last().is_some_and(|(_, flags)| flags & SUPPRESS_LENGTH != 0)
    }

    /// Walks over the part of the pieces from `offset` on, `len` bytes. `None` if there are fewer.
    fn walk(
        &self,
        offset: u32,
        len: usize,
        mut each: impl FnMut(u64, &Piece, usize) -> Option<()>,
    ) -> Option<()> {
        let mut skip = u64::from(offset);
        let mut left = len;
        for piece in &self.pieces {
            let size = u64::from(piece.len);
            if skip >= size {
                skip -= size;
                continue;
            }
            let now = usize::try_from(size - skip).ok()?.min(left);
            if now > 0 {
                each(piece.address.checked_add(skip)?, piece, now)?;
            }
            left -= now;
            skip = 0;
        }
        (left == 0).then_some(())
    }

    /// Reads what the guest sends. `None` if it is not memory, or less.
    pub(super) fn read(&self, offset: u32, data: &mut [u8]) -> Option<()> {
        let len = data.len();
        let mut rest = data;
        self.walk(offset, len, |address, _, now| {
            let (head, tail) = std::mem::take(&mut rest).split_at_mut_checked(now)?;
            self.ram.read(GuestAddress(address), head).ok()?;
            rest = tail;
            Some(())
        })
    }

    /// Writes what the guest gets. `None` if it is not memory, or less.
    pub(super) fn write(&self, offset: u32, data: &[u8]) -> Option<()> {
        let mut rest = data;
        self.walk(offset, data.len(), |address, piece, now| {
            let (head, tail) = rest.split_at_checked(now)?;
            rest = tail;
            if piece.skip {
                return Some(());
            }
            self.ram.write(GuestAddress(address), head).ok()?;
            if let Some(log) = self.log {
                log.mark(address, now as u64);
                log.signal();
            }
            Some(())
        })
    }

    /// What is left of the count of the CCW in which a transfer of so many bytes ended; and its flags.
    fn residual(&self, moved: u32) -> (u16, u8) {
        for (end, flags) in &self.parts {
            if moved <= *end {
                // At most one CCW's count, unless it ended before: then the largest there is.
                return (u16::try_from(end - moved).unwrap_or(u16::MAX), *flags);
            }
        }
        (0, self.parts.last().map_or(0, |(_, flags)| *flags))
    }
}

struct Channel<'a> {
    program: Program,
    ram: &'a GuestRam,
    log: Option<&'a Arc<DirtyLog>>,
    next: u32,
    used: usize,
    /// PCI was asked for.
    controlled: u8,
}

/// Runs a program.
pub(super) fn run(
    program: Program,
    ram: &GuestRam,
    log: Option<&Arc<DirtyLog>>,
    unit: &mut dyn ControlUnit,
) -> Ending {
    let mut channel = Channel { program, ram, log, next: program.address, used: 0, controlled: 0 };
    let mut first = true;
    loop {
        let Some((code, chained, data)) = channel.command(first) else {
            return channel.end(0, PROGRAM_CHECK, 0);
        };
        first = false;
        let reply = unit.command(code, &data);
        let (moved, more) = match reply {
            Reply::Done(moved) => (moved, false),
            Reply::More(moved) => (moved, true),
            Reply::WrongLength => {
                return channel.end(ENDED, INCORRECT_LENGTH, data.residual(0).0);
            }
            Reply::Check(_) => return channel.end(ENDED | UNIT_CHECK, 0, data.residual(0).0),
            Reply::Fault => return channel.end(0, PROGRAM_CHECK, data.residual(0).0),
        };
        let (residual, flags) = data.residual(moved);
        let wrong = more || moved != data.len();
        // SLI says nothing while data is chained.
        let suppressed = flags & (SUPPRESS_LENGTH | CHAIN_DATA) == SUPPRESS_LENGTH;
        // A command without data ends at once, and format 0 cannot say a count of 0.
        let immediate = moved == 0 && !more && !data.format1;
        if wrong && !suppressed && !immediate {
            return channel.end(ENDED, INCORRECT_LENGTH, residual);
        }
        if !chained {
            return channel.end(ENDED, 0, residual);
        }
    }
}

impl<'a> Channel<'a> {
    fn end(&self, device: u8, subchannel: u8, residual: u16) -> Ending {
        Ending { device, subchannel: subchannel | self.controlled, residual, address: self.next }
    }

    /// Fetches a CCW; TIC is followed, unless it is the first or follows another.
    fn fetch(&mut self, may_transfer: bool) -> Option<Ccw> {
        let ccw = self.fetch_one()?;
        // Format 0 ignores the left half of the code.
        let transfers = match self.program.format1 {
            true => ccw.command == TRANSFER_IN_CHANNEL,
            false => ccw.command & 0x0f == TRANSFER_IN_CHANNEL,
        };
        if !transfers {
            return Some(ccw);
        }
        if !may_transfer || (self.program.format1 && (ccw.flags != 0 || ccw.count != 0)) {
            return None;
        }
        self.next = ccw.address;
        self.fetch(false)
    }

    fn fetch_one(&mut self) -> Option<Ccw> {
        let at = self.next;
        self.next = at.wrapping_add(8);
        self.used += 1;
        // Double words; 31 bits of address, in format 0 24.
        let limit = if self.program.format1 { 0x8000_0000 } else { 0x0100_0000 };
        if self.used > LONGEST || !at.is_multiple_of(8) || at >= limit {
            return None;
        }
        let mut bytes = [0; 8];
        self.ram.read(GuestAddress(u64::from(at)), &mut bytes).ok()?;
        let [a, b, c, d, e, f, g, h] = bytes;
        let ccw = if self.program.format1 {
            let (count, address) = (u16::from_be_bytes([c, d]), u32::from_be_bytes([e, f, g, h]));
            Ccw { command: a, flags: b, count, address }
        } else {
            let (count, address) = (u16::from_be_bytes([g, h]), u32::from_be_bytes([0, b, c, d]));
            Ccw { command: a, flags: e, count, address }
        };
        (ccw.address < 0x8000_0000).then_some(ccw)
    }

    /// The next command: its code, whether another is chained to it, and its data.
    fn command(&mut self, first: bool) -> Option<(u8, bool, Data<'a>)> {
        let mut ccw = self.fetch(!first)?;
        let code = ccw.command;
        // xxxx 0000 is no command, xxxx 1000 none but TIC.
        if code & 0x0f == 0 || code & 0x0f == 8 {
            return None;
        }
        let mut data = Data {
            ram: self.ram,
            log: self.log,
            pieces: Vec::new(),
            len: 0,
            parts: Vec::new(),
            format1: self.program.format1,
        };
        loop {
            let chains = ccw.flags & CHAIN_DATA != 0;
            let is_part = chains || !data.parts.is_empty();
            if ccw.flags & UNSUPPORTED != 0 || (ccw.count == 0 && (is_part || !self.program.format1)) {
                return None;
            }
            if ccw.flags & INTERRUPT != 0 {
                self.controlled = PROGRAM_CONTROLLED;
            }
            self.append(&ccw, &mut data)?;
            data.parts.push((data.len, ccw.flags));
            if !chains {
                return Some((code, ccw.flags & CHAIN_COMMAND != 0, data));
            }
            // The command of a CCW to which data is chained means nothing.
            ccw = self.fetch(true)?;
        }
    }

    /// The area of one CCW.
    fn append(&self, ccw: &Ccw, data: &mut Data<'_>) -> Option<()> {
        let count = u32::from(ccw.count);
        let skip = ccw.flags & SKIP != 0;
        let address = u64::from(ccw.address);
        data.len = data.len.checked_add(count)?;
        if ccw.flags & INDIRECT == 0 {
            if count > 0 {
                data.pieces.push(Piece { address, len: count, skip });
            }
            return Some(());
        }
        let wide = self.program.wide_addresses;
        let block = if wide && !self.program.small_blocks { 4096u32 } else { 2048 };
        let size = if wide { 8 } else { 4 };
        if !address.is_multiple_of(size) {
            return None;
        }
        let mut left = count;
        for index in 0.. {
            if left == 0 {
                break;
            }
            let at = GuestAddress(address.checked_add(index * size)?);
            let start = if wide {
                let mut bytes = [0; 8];
                self.ram.read(at, &mut bytes).ok()?;
                u64::from_be_bytes(bytes)
            } else {
                let mut bytes = [0; 4];
                self.ram.read(at, &mut bytes).ok()?;
                u64::from(u32::from_be_bytes(bytes))
            };
            if !wide && start >= 0x8000_0000 {
                return None;
            }
            let into = (start % u64::from(block)) as u32;
            // Only the first may begin within its block.
            if index > 0 && into != 0 {
                return None;
            }
            let len = left.min(block - into);
            data.pieces.push(Piece { address: start, len, skip });
            left -= len;
        }
        Some(())
    }
}
