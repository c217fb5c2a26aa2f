//! The configuration space (5.2.4): what the driver reads before its first request, and the one byte that it writes.
use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{Immutable, IntoBytes};

use crate::SECTOR;
use crate::backend::Geometry;

/// Most bytes of a segment of a request that the driver is told of (`size_max`). Longer ones are served as well.
pub(crate) const SIZE_MAX: u32 = 1 << 20;

/// Most sectors of one range to discard: 1 GiB.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 21;

/// Most sectors of one range to fill with zeros: 32 MiB, since they may have to be written.
pub(crate) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 16;

/// Most ranges in one request to discard or to fill with zeros.
pub(crate) const MAX_RANGES: u32 = 32;

/// Heads and sectors of a disk that has neither.
const HEADS: u8 = 16;
const SECTORS: u8 = 63;

/// Where the driver writes.
pub(crate) const WRITEBACK: u32 = 32;

/// `struct virtio_blk_config` up to the last field of the features that are offered.
#[derive(Clone, Copy, IntoBytes, Immutable)]
#[repr(C)]
struct BlkConfig {
    capacity: U64,
    size_max: U32,
    seg_max: U32,
    cylinders: U16,
    heads: u8,
    sectors: u8,
    blk_size: U32,
    physical_block_exp: u8,
    alignment_offset: u8,
    min_io_size: U16,
    opt_io_size: U32,
    writeback: u8,
    unused0: u8,
    num_queues: U16,
    max_discard_sectors: U32,
    max_discard_seg: U32,
    discard_sector_alignment: U32,
    max_write_zeroes_sectors: U32,
    max_write_zeroes_seg: U32,
    write_zeroes_may_unmap: u8,
    unused1: [u8; 3],
}

const _: () = assert!(size_of::<BlkConfig>() == 60);

/// What is told of a device, besides its size.
#[derive(Clone, Copy)]
pub(crate) struct Told {
    /// Of the image. `block` is what the driver is to use.
    pub(crate) geometry: Geometry,
    pub(crate) num_queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) writeback: bool,
    pub(crate) discard: bool,
    pub(crate) write_zeroes: bool,
}

/// Most segments of a request: what fits in a ring without indirect descriptors beside header and status, also in one of
/// 128 entries, as QEMU makes them if it is not told otherwise.
fn seg_max(queue_size: u16) -> u32 {
    u32::from(queue_size.min(128)).saturating_sub(2).max(1)
}

/// The bytes that depend on the size: capacity and geometry. Each with its offset.
pub(crate) fn of_capacity(sectors: u64) -> [(u32, [u8; 8]); 2] {
    let cylinders = sectors / (u64::from(HEADS) * u64::from(SECTORS));
    let cylinders = u16::try_from(cylinders).unwrap_or(u16::MAX).to_le_bytes();
    let seg_and_geometry = [cylinders[0], cylinders[1], HEADS, SECTORS, 0, 0, 0, 0];
    [(0, sectors.to_le_bytes()), (16, seg_and_geometry)]
}

/// Sectors of a disk of so many bytes, in whole blocks.
pub(crate) fn sectors(bytes: u64, block: u32) -> u64 {
    (bytes - bytes % u64::from(block)) / SECTOR
}

impl Told {
    /// The whole space for a disk of so many sectors.
    pub(crate) fn bytes(&self, capacity: u64) -> Vec<u8> {
        let Geometry { block, physical, .. } = self.geometry;
        let blocks = physical / block;
        let only = |offered: bool, value: u32| U32::new(if offered { value } else { 0 });
        let [_, (_, geometry)] = of_capacity(capacity);
        let config = BlkConfig {
            capacity: U64::new(capacity),
            size_max: U32::new(SIZE_MAX),
            seg_max: U32::new(seg_max(self.queue_size)),
            cylinders: U16::from_bytes([geometry[0], geometry[1]]),
            heads: HEADS,
            sectors: SECTORS,
            blk_size: U32::new(block),
            physical_block_exp: blocks.trailing_zeros() as u8,
            alignment_offset: 0,
            min_io_size: U16::new(u16::try_from(blocks).unwrap_or(1)),
            opt_io_size: U32::ZERO,
            writeback: u8::from(self.writeback),
            unused0: 0,
            num_queues: U16::new(self.num_queues),
            max_discard_sectors: only(self.discard, MAX_DISCARD_SECTORS),
            max_discard_seg: only(self.discard, MAX_RANGES),
            discard_sector_alignment: only(self.discard, physical / SECTOR as u32),
            max_write_zeroes_sectors: only(self.write_zeroes, MAX_WRITE_ZEROES_SECTORS),
            max_write_zeroes_seg: only(self.write_zeroes, MAX_RANGES),
            // 5.2.6.2: clear if and only if zeroing never deallocates.
            write_zeroes_may_unmap: u8::from(self.discard && self.write_zeroes),
            unused1: [0; 3],
        };
        config.as_bytes().to_vec()
    }
}
