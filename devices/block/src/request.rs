//! What a chain asks for (5.2.6): the header, where the status goes, and whether it makes sense.
//!
//! However the driver has cut it into descriptors (2.7.4.1): the header is the first 16 device-readable bytes, the status
//! the last device-writable byte, data what is between. Everything is read once; what is answered here never reaches the
//! disk.
use vm_virtio::Features;
use vm_virtio::queue::Reader;
use zerocopy::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::SECTOR;
use crate::config::{MAX_DISCARD_SECTORS, MAX_RANGES, MAX_WRITE_ZEROES_SECTORS};

/// Bytes of the header.
pub(crate) const HEADER: usize = 16;
/// Bytes of an id (GET_ID).
pub(crate) const ID: usize = 20;
/// The one flag of a range: zeros may deallocate.
const UNMAP: u32 = 1;

/// The device's features of 5.2.3 that are offered at all.
pub(crate) mod feature {
    use vm_virtio::Features;

    pub(crate) const SIZE_MAX: Features = Features::from_bits_retain(1 << 1);
    pub(crate) const SEG_MAX: Features = Features::from_bits_retain(1 << 2);
    pub(crate) const GEOMETRY: Features = Features::from_bits_retain(1 << 4);
    pub(crate) const RO: Features = Features::from_bits_retain(1 << 5);
    pub(crate) const BLK_SIZE: Features = Features::from_bits_retain(1 << 6);
    pub(crate) const FLUSH: Features = Features::from_bits_retain(1 << 9);
    pub(crate) const TOPOLOGY: Features = Features::from_bits_retain(1 << 10);
    pub(crate) const CONFIG_WCE: Features = Features::from_bits_retain(1 << 11);
    pub(crate) const MQ: Features = Features::from_bits_retain(1 << 12);
    pub(crate) const DISCARD: Features = Features::from_bits_retain(1 << 13);
    pub(crate) const WRITE_ZEROES: Features = Features::from_bits_retain(1 << 14);
}

/// `VIRTIO_BLK_S_*`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    Ok = 0,
    IoErr = 1,
    Unsupp = 2,
}

/// `struct virtio_blk_req` without data and status.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Header {
    kind: U32,
    reserved: U32,
    sector: U64,
}

/// `struct virtio_blk_discard_write_zeroes`.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable)]
#[repr(C)]
struct Segment {
    sector: U64,
    num_sectors: U32,
    flags: U32,
}

/// A range to discard or to fill with zeros, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Range {
    pub(crate) offset: u64,
    pub(crate) len: u64,
    pub(crate) unmap: bool,
}

/// What of the disk and of what was negotiated decides whether a request makes sense.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Terms {
    /// In sectors.
    pub(crate) capacity: u64,
    pub(crate) read_only: bool,
    /// `write_zeroes_may_unmap`.
    pub(crate) unmaps: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
}

impl Terms {
    pub(crate) fn new(read_only: bool, unmaps: bool, negotiated: Features) -> Terms {
        Terms {
            capacity: 0,
            read_only,
            unmaps,
            discard: negotiated.contains(feature::DISCARD),
            write_zeroes: negotiated.contains(feature::WRITE_ZEROES),
        }
    }

    /// The bytes of `sectors` sectors from `sector` on, if the disk has them.
    fn place(&self, sector: u64, sectors: u64) -> Option<(u64, u64)> {
        let end = sector.checked_add(sectors)?;
        if end > self.capacity {
            return None;
        }
        Some((sector.checked_mul(SECTOR)?, sectors.checked_mul(SECTOR)?))
    }
}

/// What is to be done.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Asked {
    /// Nothing: there is no place for a status.
    Nothing,
    /// This status, and nothing else.
    Refused(Status),
    /// Fill the device-writable part but for the status, from this byte on.
    Read {
        offset: u64,
        len: u64,
    },
    /// Write what is behind the header, from this byte on.
    Write {
        offset: u64,
        len: u64,
    },
    Flush,
    GetId,
    Discard(Vec<Range>),
    WriteZeroes(Vec<Range>),
}

/// Reads a request: `readable` from its first byte on, `writable` bytes to write.
pub(crate) fn parse(mut readable: Reader<'_>, writable: u64, terms: &Terms) -> Asked {
    if writable == 0 {
        return Asked::Nothing;
    }
    let Ok(header) = readable.read_obj::<Header>() else { return Asked::Refused(Status::IoErr) };
    let sector = header.sector.get();
    let transfer = |len: u64| match len % SECTOR {
        0 => terms.place(sector, len / SECTOR),
        _ => None,
    };
    let refused = Asked::Refused(Status::IoErr);
    match header.kind.get() {
        0 => transfer(writable - 1).map_or(refused, |(offset, len)| Asked::Read { offset, len }),
        // RO: no write of any kind, before it matters what was negotiated.
        1 | 11 | 13 if terms.read_only => refused,
        1 => transfer(readable.remaining()).map_or(refused, |(offset, len)| Asked::Write { offset, len }),
        4 => Asked::Flush,
        8 => Asked::GetId,
        11 if terms.discard => match ranges(readable, terms, 0, MAX_DISCARD_SECTORS) {
            Ok(ranges) => Asked::Discard(ranges),
            Err(status) => Asked::Refused(status),
        },
        13 if terms.write_zeroes => match ranges(readable, terms, UNMAP, MAX_WRITE_ZEROES_SECTORS) {
            Ok(ranges) => Asked::WriteZeroes(ranges),
            Err(status) => Asked::Refused(status),
        },
        _ => Asked::Refused(Status::Unsupp),
    }
}

/// The ranges of a request: all of them make sense, or none is touched.
fn ranges(mut data: Reader<'_>, terms: &Terms, flags: u32, longest: u32) -> Result<Vec<Range>, Status> {
    let len = data.remaining();
    let each = size_of::<Segment>() as u64;
    let count = len / each;
    if count == 0 || !len.is_multiple_of(each) || count > u64::from(MAX_RANGES) {
        return Err(Status::IoErr);
    }
    let mut ranges = Vec::with_capacity(count as usize);
    let mut status = Ok(());
    while let Ok(segment) = data.read_obj::<Segment>() {
        if segment.flags.get() & !flags != 0 {
            // 5.2.6.2: whatever else is wrong.
            return Err(Status::Unsupp);
        }
        let sectors = segment.num_sectors.get();
        let place = terms.place(segment.sector.get(), sectors.into()).filter(|_| sectors <= longest);
        let Some((offset, len)) = place else {
            status = Err(Status::IoErr);
            continue;
        };
        ranges.push(Range { offset, len, unmap: terms.unmaps && segment.flags.get() & UNMAP != 0 });
    }
    status.map(|()| ranges)
}
