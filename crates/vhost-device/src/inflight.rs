//! The buffer for what is in flight (vhost-user, "Inflight I/O tracking"): one region for each ring, which the queues write
//! and which the front-end keeps for the successor of a daemon that was killed.
//!
//! The front-end does not look into it; the next daemon of this program does. Each ring has the space that the larger of
//! the two formats needs for the size that the front-end says, whatever layout and size the driver chooses then.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SealFlags};
use vhost_user::InflightArea;
use vm_virtio::InflightRegion;
use vm_virtio::memory::SharedMemory;

use crate::mapping::{Budget, MapError, map_beside};

/// A buffer that cannot be made or used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum InflightFault {
    /// No buffer is of this shape.
    #[error("the device has not {queues} queues of {size} entries")]
    Shape { queues: u16, size: u16 },
    /// It was made by somebody else.
    #[error(
        "the buffer has {actual:#x} bytes at offset {offset:#x}, the rings need {needed:#x}, aligned to eight bytes"
    )]
    TooShort { actual: u64, offset: u64, needed: u64 },
    /// There is no memory for it.
    #[error("no memory: {0}")]
    Memory(#[from] io::Error),
    /// The file cannot be mapped.
    #[error(transparent)]
    Map(#[from] MapError),
}

/// What the device has room for.
#[derive(Clone, Copy)]
pub(crate) struct Most {
    pub(crate) queues: usize,
    pub(crate) size: u16,
}

/// Bytes for these rings.
fn bytes_for(queues: u16, size: u16, most: Most) -> Result<u64, InflightFault> {
    if queues == 0 || size == 0 || usize::from(queues) > most.queues || size > most.size {
        return Err(InflightFault::Shape { queues, size });
    }
    Ok(InflightRegion::bytes_for(size) as u64 * u64::from(queues))
}

/// GET_INFLIGHT_FD: makes a buffer, of zeros and of a size that nobody can change.
pub(crate) fn allocate(asked: InflightArea, most: Most) -> Result<(InflightArea, OwnedFd), InflightFault> {
    let InflightArea { num_queues, queue_size, .. } = asked;
    let size = bytes_for(num_queues, queue_size, most)?;
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = rustix::fs::memfd_create("inflight", flags).map_err(io::Error::from)?;
    rustix::fs::ftruncate(&file, size).map_err(io::Error::from)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(io::Error::from)?;
    Ok((InflightArea { mmap_size: size, mmap_offset: 0, num_queues, queue_size }, file))
}

/// The buffer of a connection.
pub(crate) struct Inflight {
    memory: Arc<SharedMemory>,
    queues: u16,
    size: u16,
}

impl Inflight {
    /// SET_INFLIGHT_FD: takes a buffer over, which may have been another daemon's.
    pub(crate) fn map(
        area: InflightArea,
        file: &OwnedFd,
        most: Most,
        budget: &Arc<Budget>,
    ) -> Result<Inflight, InflightFault> {
        let InflightArea { mmap_size: actual, mmap_offset: offset, num_queues: queues, queue_size: size } =
            area;
        let needed = bytes_for(queues, size, most)?;
        if actual < needed || !offset.is_multiple_of(8) {
            return Err(InflightFault::TooShort { actual, offset, needed });
        }
        let memory = Arc::new(map_beside(file.as_fd(), offset, needed, budget)?);
        Ok(Inflight { memory, queues, size })
    }

    /// The part of a ring, if it has one.
    pub(crate) fn region(&self, ring: usize) -> Option<InflightRegion> {
        let len = InflightRegion::bytes_for(self.size);
        // The mapping is as long as all of them.
        InflightRegion::new(self.memory.clone(), ring.checked_mul(len)?, len).ok()
    }

    /// Whether a ring has nothing to go on with.
    pub(crate) fn is_fresh(&self, ring: usize) -> bool {
        self.region(ring).is_none_or(|region| region.is_fresh())
    }

    /// A ring does not go on with what is in its region, and does not run.
    pub(crate) fn clear(&self, ring: usize) {
        if let Some(region) = self.region(ring) {
            region.clear();
        }
    }

    /// The device was reset: no ring goes on.
    pub(crate) fn clear_all(&self) {
        (0..usize::from(self.queues)).for_each(|ring| self.clear(ring));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOST: Most = Most { queues: 2, size: 256 };

    fn area(num_queues: u16, queue_size: u16) -> InflightArea {
        InflightArea { num_queues, queue_size, ..InflightArea::default() }
    }

    #[test]
    fn a_buffer_has_the_rings_one_after_the_other_and_keeps_its_size() {
        let (area, file) = allocate(area(2, 16), MOST).unwrap();
        assert_eq!((area.mmap_offset, area.mmap_size), (0, 2 * InflightRegion::bytes_for(16) as u64));
        assert!(rustix::fs::ftruncate(&file, 0).is_err());
        assert!(rustix::fs::ftruncate(&file, 1 << 20).is_err());
        let inflight = Inflight::map(area, &file, MOST, &Budget::share(1)).unwrap();
        assert!(inflight.region(0).is_some() && inflight.region(1).is_some());
        assert!(inflight.region(2).is_none() && inflight.region(usize::MAX).is_none());
        assert!((0..3).all(|ring| inflight.is_fresh(ring)));
        inflight.clear_all();
    }

    #[test]
    fn buffers_of_other_shapes_are_refused() {
        let shape =
            |queues, size| matches!(allocate(area(queues, size), MOST), Err(InflightFault::Shape { .. }));
        assert!(shape(0, 16) && shape(1, 0) && shape(3, 16) && shape(1, 257) && shape(u16::MAX, u16::MAX));
        let (good, file) = allocate(area(2, 16), MOST).unwrap();
        let map = |area| Inflight::map(area, &file, MOST, &Budget::share(1)).map(|_| ()).unwrap_err();
        assert!(matches!(map(InflightArea { num_queues: 0, ..good }), InflightFault::Shape { .. }));
        assert!(matches!(map(InflightArea { queue_size: 300, ..good }), InflightFault::Shape { .. }));
        let short = InflightArea { mmap_size: good.mmap_size - 1, ..good };
        assert!(matches!(map(short), InflightFault::TooShort { .. }));
        let odd = InflightArea { mmap_offset: 4, ..good };
        assert!(matches!(map(odd), InflightFault::TooShort { .. }));
        // More than the file has, wherever it begins and however much is claimed.
        let long = InflightArea { queue_size: 256, mmap_size: u64::MAX, ..good };
        assert!(matches!(map(long), InflightFault::Map(MapError::FileTooShort { .. })));
        for mmap_offset in [8, 1 << 40, u64::MAX - 7] {
            assert!(matches!(map(InflightArea { mmap_offset, ..good }), InflightFault::Map(_)));
        }
        let pipe = OwnedFd::from(io::pipe().unwrap().0);
        assert!(Inflight::map(good, &pipe, MOST, &Budget::share(1)).is_err());
    }
}
