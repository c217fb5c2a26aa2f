//! Indirect tables (2.7.5.3, 2.8.7): descriptors anywhere in guest memory, in one piece of the host's or several.
use super::error::QueueError;
use super::gather::{Gather, walk};
use super::ring_mem::Desc;
use super::{INDIRECT, NEXT, WRITE};
use crate::memory::{Access, Directory, copy, load_u64};

/// A table that was checked to be in guest memory, without regard to alignment.
enum Table<'a> {
    /// In one piece: host address and number of descriptors.
    Whole(*const u8, u32),
    /// Across regions.
    Pieces(&'a Directory, u64, u32),
}

impl<'a> Table<'a> {
    #[inline(always)]
    fn new(directory: &'a Directory, addr: u64, len: u32) -> Result<Table<'a>, QueueError> {
        if len == 0 || !len.is_multiple_of(16) {
            return Err(QueueError::IndirectLength(len));
        }
        match directory.lookup(addr, len, Access::Read) {
            Some(host) => Ok(Table::Whole(host, len / 16)),
            None => Self::slow(directory, addr, len),
        }
    }

    #[cold]
    #[inline(never)]
    fn slow(directory: &'a Directory, addr: u64, len: u32) -> Result<Table<'a>, QueueError> {
        if let Some(host) = directory.contiguous(addr, u64::from(len), Access::Read) {
            return Ok(Table::Whole(host, len / 16));
        }
        directory.pieces(addr, u64::from(len), Access::Read, |_, _| Ok::<(), QueueError>(()))?;
        Ok(Table::Pieces(directory, addr, len / 16))
    }

    fn len(&self) -> u32 {
        match self {
            Table::Whole(_, len) | Table::Pieces(_, _, len) => *len,
        }
    }

    /// Reads a descriptor, once; `None` beyond the end.
    #[inline(always)]
    fn get(&self, index: u32) -> Option<Desc> {
        match *self {
            Table::Whole(host, len) if index < len => {
                let at = host.wrapping_add(index as usize * 16);
                // SAFETY: the directory found `len` descriptors of 16 bytes mapped and readable at `host`, and the
                // snapshot is borrowed.
                Some(unsafe { Desc::new(load_u64(at), load_u64(at.wrapping_add(8))) })
            }
            Table::Pieces(directory, addr, len) if index < len => Self::get_pieces(directory, addr, index),
            _ => None,
        }
    }

    #[cold]
    #[inline(never)]
    fn get_pieces(directory: &Directory, addr: u64, index: u32) -> Option<Desc> {
        let mut bytes = [0; 16];
        let mut rest = &mut bytes[..];
        let at = addr + u64::from(index) * 16;
        directory
            .pieces(at, 16, Access::Read, |host, len| {
                let (now, later) = std::mem::take(&mut rest).split_at_mut(len);
                // SAFETY: the directory says that `len` bytes are mapped and readable at `host`.
                unsafe { copy(host, now.as_mut_ptr(), len) };
                rest = later;
                Ok::<(), QueueError>(())
            })
            .ok()?;
        let (addr, word) = bytes.split_at(8);
        Some(Desc::new(u64::from_le_bytes(addr.try_into().ok()?), u64::from_le_bytes(word.try_into().ok()?)))
    }
}

/// The rest of a split ring's chain, if that is all of it: its table starts at index 0 and goes on by `next` (2.7.5.3).
#[inline(always)]
pub(super) fn split(mut chain: Gather<'_>, addr: u64, len: u32) -> Result<(), QueueError> {
    let table = Table::new(chain.directory(), addr, len)?;
    let Table::Whole(host, len) = table else { return split_any(chain, &table) };
    let get = |index| Table::Whole(host, len).get(u32::from(index));
    // There is a first one, the length is not 0.
    let first = get(0).ok_or(QueueError::IndirectLength(0))?;
    match walk(&mut chain, first, get)? {
        None => chain.finish(),
        Some(_) => Err(QueueError::NestedIndirect),
    }
}

/// The same behind other elements of the chain.
#[cold]
#[inline(never)]
pub(super) fn split_behind(chain: Gather<'_>, addr: u64, len: u32) -> Result<(), QueueError> {
    let table = Table::new(chain.directory(), addr, len)?;
    split_any(chain, &table)
}

#[cold]
#[inline(never)]
fn split_any(mut chain: Gather<'_>, table: &Table<'_>) -> Result<(), QueueError> {
    let mut index = 0;
    loop {
        let Some(desc) = table.get(u32::from(index)) else { return Err(QueueError::Next(index)) };
        let flags = desc.split_flags();
        if flags & INDIRECT != 0 {
            return Err(QueueError::NestedIndirect);
        }
        chain.add_any(desc, flags & WRITE != 0)?;
        if flags & NEXT == 0 {
            return chain.finish();
        }
        index = desc.split_next();
    }
}

/// All of a packed ring's chain: the elements of its table, in order; only WRITE counts (2.8.7).
#[inline(always)]
pub(super) fn packed(mut chain: Gather<'_>, addr: u64, len: u32) -> Result<(), QueueError> {
    let table = Table::new(chain.directory(), addr, len)?;
    let Table::Whole(host, len) = table else { return packed_any(chain, &table) };
    let get = |index| Table::Whole(host, len).get(index);
    // Both loops end after as many elements as the queue has entries at most, by the chain's own limit.
    let mut index = 0;
    let mut desc = loop {
        match get(index) {
            Some(desc) if desc.packed_flags() & WRITE == 0 => chain.add_readable(desc)?,
            Some(desc) => break desc,
            None => return chain.finish(),
        }
        index += 1;
    };
    chain.turn();
    loop {
        chain.add_writable(desc)?;
        index += 1;
        desc = match get(index) {
            Some(desc) if desc.packed_flags() & WRITE != 0 => desc,
            Some(_) => return Err(QueueError::ReadableAfterWritable),
            None => return chain.finish(),
        };
    }
}

#[cold]
#[inline(never)]
fn packed_any(mut chain: Gather<'_>, table: &Table<'_>) -> Result<(), QueueError> {
    for index in 0..table.len() {
        let Some(desc) = table.get(index) else { break };
        chain.add_any(desc, desc.packed_flags() & WRITE != 0)?;
    }
    chain.finish()
}
