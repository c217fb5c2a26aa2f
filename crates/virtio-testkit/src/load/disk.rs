//! What is asked of a block device under load (virtio 5.2.6): reads and writes, at random or one after the other.
//!
//! What is read is looked at, and what was written has to be there at the end. For that a [`Disk`] holds in the first
//! eight bytes of each sector where the sector is, and in the last eight the number of the write that it is from. Two
//! requests in flight never write the same block, so it is known which write was the last.
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU32, AtomicU64, Ordering};

use vm_memory::VolatileSlice;
use vm_virtio::Features;

use super::ring::field;
use super::{LoadError, Requests};
use crate::{Buf, TestRam, VhostUserDriver};

const SECTOR: u64 = 512;
/// In the place of a sector on top of its number: an empty disk shows it nowhere.
const PLACE: u64 = 0xb10c_0000_0000_0000;
// Of 5.2.3 and 5.2.6.
const F_SIZE_MAX: u32 = 1;
const F_RO: u32 = 5;
const IN: u32 = 0;
const OUT: u32 = 1;
/// What the device has to overwrite.
const NO_STATUS: u8 = 0xff;

/// An image that the one who measures made, removed at the end.
#[derive(Debug)]
pub struct Disk {
    path: PathBuf,
    bytes: u64,
    /// Numbers that writes have had.
    loads: AtomicU64,
}

impl Disk {
    /// Makes an image of this many bytes, whole MiB, and has it written out.
    ///
    /// # Errors
    /// The file system's.
    pub fn make(path: &Path, bytes: u64) -> io::Result<Disk> {
        let file = OpenOptions::new().write(true).create_new(true).open(path)?;
        let disk = Disk { path: path.to_owned(), bytes, loads: AtomicU64::new(1) };
        let mut piece = vec![0; PIECE];
        for start in (0..bytes).step_by(PIECE) {
            for (sector, bytes) in (start / SECTOR..).zip(piece.chunks_exact_mut(SECTOR as usize)) {
                bytes.iter_mut().for_each(|byte| *byte = sector as u8);
                put(bytes, 0, PLACE | sector);
                put(bytes, SECTOR as usize - 8, 0);
            }
            file.write_all_at(&piece, start)?;
        }
        file.sync_all()?;
        Ok(disk)
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

/// What is written and read at once.
const PIECE: usize = 1 << 20;

fn put(bytes: &mut [u8], at: usize, value: u64) {
    if let Some(place) = bytes.get_mut(at..at + 8) {
        place.copy_from_slice(&value.to_le_bytes());
    }
}

fn get(bytes: &[u8], at: usize) -> u64 {
    let place = bytes.get(at..at + 8).and_then(|place| place.try_into().ok());
    place.map_or(0, u64::from_le_bytes)
}

/// What is done to the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reads anywhere.
    RandomRead,
    /// Writes anywhere.
    RandomWrite,
    /// Reads one after the other.
    Read,
    /// Writes one after the other.
    Write,
}

impl Access {
    /// All of them.
    pub const ALL: [Access; 4] = [Access::RandomRead, Access::RandomWrite, Access::Read, Access::Write];

    /// As `fio` calls it.
    pub const fn name(self) -> &'static str {
        match self {
            Access::RandomRead => "randread",
            Access::RandomWrite => "randwrite",
            Access::Read => "read",
            Access::Write => "write",
        }
    }

    fn writes(self) -> bool {
        matches!(self, Access::RandomWrite | Access::Write)
    }

    fn random(self) -> bool {
        matches!(self, Access::RandomRead | Access::RandomWrite)
    }
}

/// The load of one queue, which has a part of the disk to itself.
#[derive(Debug)]
pub struct BlockRequests {
    access: Access,
    /// Bytes of a request.
    size: u32,
    disk: Option<Arc<Disk>>,
    /// The disk's, if the device need not tell.
    capacity: Option<u64>,
    /// Of all queues.
    part: (u64, u64),
    /// First sector of the part, and how many requests fit into it.
    first: u64,
    blocks: u64,
    slots: u64,
    /// The block of each slot's request.
    under_way: Vec<u64>,
    next: u64,
    random: u64,
    /// Above the number of a write: that of this load.
    load: u64,
    /// By block: the number of its last write.
    written: Vec<u32>,
    /// Most bytes of a descriptor.
    longest: u32,
}

impl BlockRequests {
    /// Requests of `size` bytes, whole sectors, for queue `part.0` of `part.1`. Without a disk of one's own what is read is
    /// not looked at.
    pub fn new(access: Access, size: u32, disk: Option<Arc<Disk>>, part: (u16, u16)) -> BlockRequests {
        let load = disk.as_ref().map_or(0, |disk| disk.loads.fetch_add(1, Ordering::Relaxed));
        BlockRequests {
            access,
            size: size.max(SECTOR as u32) / SECTOR as u32 * SECTOR as u32,
            capacity: disk.as_ref().map(|disk| disk.bytes),
            disk,
            part: (u64::from(part.0), u64::from(part.1.max(1))),
            first: 0,
            blocks: 0,
            slots: 0,
            under_way: Vec::new(),
            next: 0,
            random: 0x9e37_79b9_7f4a_7c15 ^ load << 20 ^ u64::from(part.0) << 40,
            load: load << 32,
            written: Vec::new(),
            longest: u32::MAX,
        }
    }

    /// For a device without a configuration space: the bytes of its disk.
    #[must_use]
    pub fn with_capacity(mut self, bytes: u64) -> BlockRequests {
        self.capacity = Some(bytes);
        self
    }

    fn sectors(&self) -> u64 {
        u64::from(self.size) / SECTOR
    }

    fn first_sector(&self, block: u64) -> u64 {
        self.first + block * self.sectors()
    }

    fn choose(&mut self, slot: u64) -> u64 {
        if !self.access.random() {
            let block = self.next;
            self.next = if block + 1 < self.blocks { block + 1 } else { 0 };
            return block;
        }
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        // Those of other slots are theirs.
        let rows = self.blocks / self.slots;
        let row = (u128::from(self.random) * u128::from(rows)) >> 64;
        row as u64 * self.slots + slot
    }
}

/// Calls `f` with each sector of a request's data: the slice it is in and where.
fn each_sector(buffers: &[VolatileSlice<'_>], mut f: impl FnMut(&VolatileSlice<'_>, usize) -> bool) -> bool {
    let data = buffers.get(1..buffers.len().saturating_sub(1)).unwrap_or_default();
    data.iter().all(|buffer| (0..buffer.len()).step_by(SECTOR as usize).all(|at| f(buffer, at)))
}

impl Requests for BlockRequests {
    fn negotiated(&mut self, driver: &mut VhostUserDriver) -> Result<(), LoadError> {
        let bytes = match self.capacity {
            Some(bytes) => bytes,
            None => {
                get(&driver.endpoint().get_config(0, 8, 0).map_err(crate::DriverError::from)?, 0) * SECTOR
            }
        };
        if self.access.writes() && driver.features().contains(Features::from(1 << F_RO)) {
            return Err(LoadError::NotOffered("a disk that can be written"));
        }
        if driver.features().contains(Features::from(1 << F_SIZE_MAX)) {
            let config = driver.endpoint().get_config(0, 12, 0).map_err(crate::DriverError::from)?;
            let size_max = (get(&config, 4) >> 32) as u32;
            // Whole sectors in each, so that none is in two pieces.
            self.longest = (size_max / SECTOR as u32 * SECTOR as u32).max(SECTOR as u32);
        }
        let share = bytes / SECTOR / self.part.1;
        self.first = share * self.part.0;
        self.blocks = share / self.sectors();
        if self.access.writes() {
            self.written = vec![0; usize::try_from(self.blocks).unwrap_or(0)];
        }
        Ok(())
    }

    fn chain(&mut self, slot: usize, ram: &TestRam) -> Vec<Buf> {
        self.slots = self.slots.max(slot as u64 + 1);
        self.under_way.resize(self.slots as usize, 0);
        let header = ram.alloc(16, 16);
        let kind = if self.access.writes() { OUT } else { IN };
        ram.write(header, &u64::from(kind).to_le_bytes());
        let mut chain = vec![Buf::readable(header, 16)];
        let mut left = self.size;
        while left > 0 {
            let len = left.min(self.longest);
            let addr = ram.alloc(u64::from(len), SECTOR);
            // Sectors that are written carry more than their two fields.
            ram.write(addr, &vec![slot as u8; len as usize]);
            chain.push(if self.access.writes() {
                Buf::readable(addr, len)
            } else {
                Buf::writable(addr, len)
            });
            left -= len;
        }
        chain.push(Buf::writable(ram.alloc(1, 1), 1));
        chain
    }

    fn prepare(&mut self, slot: usize, buffers: &[VolatileSlice<'_>]) {
        let block = self.choose(slot as u64);
        if let Some(under_way) = self.under_way.get_mut(slot) {
            *under_way = block;
        }
        let (Some(header), Some(status)) = (buffers.first(), buffers.last()) else { return };
        let mut sector = self.first_sector(block);
        field::<AtomicU64>(header, 8).store(sector.to_le(), Ordering::Relaxed);
        field::<AtomicU8>(status, 0).store(NO_STATUS, Ordering::Relaxed);
        if !self.access.writes() {
            return;
        }
        let mut number = self.load;
        if let Some(count) = self.written.get_mut(usize::try_from(block).unwrap_or(usize::MAX)) {
            *count += 1;
            number |= u64::from(*count);
        }
        each_sector(buffers, |buffer, at| {
            field::<AtomicU64>(buffer, at).store((PLACE | sector).to_le(), Ordering::Relaxed);
            field::<AtomicU64>(buffer, at + SECTOR as usize - 8).store(number.to_le(), Ordering::Relaxed);
            sector += 1;
            true
        });
    }

    fn check(&mut self, slot: usize, written: u32, buffers: &[VolatileSlice<'_>]) -> Result<u64, String> {
        let block = self.under_way.get(slot).copied().unwrap_or(0);
        let first = self.first_sector(block);
        let status =
            buffers.last().map_or(NO_STATUS, |status| field::<AtomicU8>(status, 0).load(Ordering::Relaxed));
        if status != 0 {
            return Err(format!("status {status} for {} bytes at sector {first}", self.size));
        }
        let whole = if self.access.writes() { 1 } else { self.size + 1 };
        if written > whole {
            return Err(format!("{written} bytes written, of {whole}"));
        }
        if self.access.writes() || self.disk.is_none() {
            return Ok(u64::from(self.size));
        }
        let mut sector = first;
        let good = each_sector(buffers, |buffer, at| {
            let place = u64::from_le(field::<AtomicU64>(buffer, at).load(Ordering::Relaxed));
            // What is there from the last time has to be overwritten the next time.
            field::<AtomicU32>(buffer, at).store(0, Ordering::Relaxed);
            sector += 1;
            place == PLACE | (sector - 1)
        });
        if good { Ok(u64::from(self.size)) } else { Err(format!("sector {} has other contents", sector - 1)) }
    }

    fn verify(&mut self) -> Result<(), String> {
        let (Some(disk), true) = (&self.disk, self.access.writes()) else { return Ok(()) };
        let failed = |error: io::Error| format!("{}: {error}", disk.path.display());
        let file = File::open(&disk.path).map_err(failed)?;
        let mut bytes = vec![0; self.size as usize];
        for (block, count) in (0..).zip(&self.written).filter(|(_, count)| **count > 0) {
            let first = self.first_sector(block);
            file.read_exact_at(&mut bytes, first * SECTOR).map_err(failed)?;
            for (sector, bytes) in (first..).zip(bytes.chunks_exact(SECTOR as usize)) {
                let seen = (get(bytes, 0), get(bytes, SECTOR as usize - 8));
                if seen != (PLACE | sector, self.load | u64::from(*count)) {
                    return Err(format!("write {count} of sector {sector} is lost: {seen:x?} is there"));
                }
            }
        }
        Ok(())
    }
}
