//! Whether an image is sound enough to be written to.
//!
//! The library finds free room by the image's reference counts. If those are nonsense it may look for ever, or so deep that
//! the stack ends, which no process survives; so what holds the counts together is looked at first: their table and blocks
//! are in the file, no block is there twice, and header, tables and blocks count as used. This bounds the search by the size
//! of the file. Mappings and data are the guest's own loss. Names are those of QEMU's `docs/interop/qcow2.rst`.
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};

/// Bytes of the header that are of interest: those of version 3.
const HEADER: usize = 104;
/// More entries no table has (32 MiB), as for QEMU.
const TABLE: u64 = 4 << 20;
/// Bits of an entry of the refcount table that are an offset.
const OFFSET: u64 = !0x1ff;

struct Counts<'f> {
    file: &'f File,
    bytes: u64,
    cluster_bits: u32,
    /// Bits of a count.
    width: u64,
    /// Offset of each refcount block; 0 where there is none.
    blocks: Vec<u64>,
}

fn bad(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

fn be<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    bytes.get(at..at + N).and_then(|bytes| bytes.try_into().ok()).unwrap_or([0; N])
}

/// Looks at the image in `file`, which ends at no less than a header's first 72 bytes.
pub(super) fn sound(file: &File) -> io::Result<()> {
    let bytes = file.metadata()?.size();
    let mut header = [0; HEADER];
    // An image of version 2 may be that small; what is behind it is not looked at then.
    let len = usize::try_from(bytes).map_or(HEADER, |bytes| bytes.min(HEADER));
    file.read_exact_at(header.get_mut(..len).unwrap_or_default(), 0)?;
    let number = |at| u64::from(u32::from_be_bytes(be(&header, at)));
    let offset = |at| u64::from_be_bytes(be(&header, at));
    let cluster_bits = u32::from_be_bytes(be(&header, 20));
    if !(9..=21).contains(&cluster_bits) {
        return Err(bad("a size of clusters that there is not"));
    }
    let order = if number(4) >= 3 { number(96) } else { 4 };
    if order > 6 {
        return Err(bad("a size of reference counts that there is not"));
    }
    let mut counts = Counts { file, bytes, cluster_bits, width: 1 << order, blocks: Vec::new() };
    let (table, clusters) = (offset(48), number(56));
    let entries = clusters << (cluster_bits - 3);
    if entries > TABLE {
        return Err(bad("a table of reference counts that is too long"));
    }
    counts.load(table, entries)?;
    counts.used("the header", 0, 1)?;
    counts.used("the table of reference counts", table, clusters)?;
    for block in counts.blocks.iter().copied().filter(|block| *block != 0) {
        counts.used("a block of reference counts", block, 1)?;
    }
    let (l1, l1_bytes) = (offset(40), number(36).saturating_mul(8));
    if l1_bytes > 8 * TABLE {
        return Err(bad("an L1 table that is too long"));
    }
    // The library would enlarge it at the first write, cluster by cluster, however large the disk claims to be.
    let each_l2 = (1u64 << cluster_bits) * (1 << (cluster_bits - 3));
    if offset(24).div_ceil(each_l2) > number(36) {
        return Err(bad("an L1 table that is too short for the disk"));
    }
    counts.used("the L1 table", l1, l1_bytes.div_ceil(1 << cluster_bits))
}

impl Counts<'_> {
    /// A piece of the file of whole clusters, or what of the last one there is.
    fn piece(&self, what: &str, at: u64, clusters: u64) -> io::Result<()> {
        let end = clusters.checked_mul(1 << self.cluster_bits).and_then(|len| at.checked_add(len));
        if at & ((1 << self.cluster_bits) - 1) != 0 {
            return Err(bad(format!("{what} begins within a cluster")));
        }
        // The file may end within its last cluster.
        let most = self.bytes.next_multiple_of(1 << self.cluster_bits);
        if end.is_none_or(|end| end > most) {
            return Err(bad(format!("{what} is not within the file")));
        }
        Ok(())
    }

    fn load(&mut self, table: u64, entries: u64) -> io::Result<()> {
        self.piece("the table of reference counts", table, (entries * 8).div_ceil(1 << self.cluster_bits))?;
        let mut raw = vec![0; usize::try_from(entries * 8).map_err(io::Error::other)?];
        read_or_zeros(self.file, &mut raw, table)?;
        let mut seen = HashSet::new();
        for entry in raw.chunks_exact(8) {
            let block = u64::from_be_bytes(be(entry, 0)) & OFFSET;
            if block != 0 {
                self.piece("a block of reference counts", block, 1)?;
                if !seen.insert(block) {
                    return Err(bad("a block of reference counts that is there twice"));
                }
            }
            self.blocks.push(block);
        }
        Ok(())
    }

    /// Whether clusters count as used.
    fn used(&self, what: &str, at: u64, clusters: u64) -> io::Result<()> {
        self.piece(what, at, clusters)?;
        let each = (8 << self.cluster_bits) / self.width;
        let first = at >> self.cluster_bits;
        for cluster in first..first + clusters {
            let block =
                usize::try_from(cluster / each).ok().and_then(|index| self.blocks.get(index)).copied();
            let block = block.filter(|block| *block != 0);
            let block = block.ok_or_else(|| bad(format!("{what} has no reference count")))?;
            let bit = cluster % each * self.width;
            let mut raw = [0; 8];
            let raw = raw.get_mut(..self.width.div_ceil(8) as usize).unwrap_or_default();
            read_or_zeros(self.file, raw, block + bit / 8)?;
            // Counts below a byte begin at its lowest bit.
            let mask = if self.width < 8 { ((1 << self.width) - 1) << (bit % 8) } else { 0xff };
            if raw.iter().all(|byte| byte & mask == 0) {
                return Err(bad(format!("{what} counts as free")));
            }
        }
        Ok(())
    }
}

/// What is behind the end reads as zeros, as it does in the library.
fn read_or_zeros(file: &File, mut to: &mut [u8], mut at: u64) -> io::Result<()> {
    while !to.is_empty() {
        match file.read_at(to, at) {
            Ok(0) => {
                to.fill(0);
                return Ok(());
            }
            Ok(count) => {
                at += count as u64;
                to = to.get_mut(count..).unwrap_or_default();
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
