//! The VMM's side of shared memory regions: what a back-end asks it to map it really maps, and the guest can look.
use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;

use vhost_user::{Answer, BackendRequest, ObjectId};
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};

/// The shared memory regions of a device and the objects of a VM.
#[derive(Default)]
pub struct SharedMemory {
    /// Sizes by id.
    regions: BTreeMap<u8, u64>,
    mappings: BTreeMap<(u8, u64), MmapRegion<()>>,
    objects: BTreeMap<ObjectId, OwnedFd>,
}

impl SharedMemory {
    /// Regions of these ids and sizes, as `GET_SHMEM_CONFIG` tells them.
    pub fn new(regions: &[(u8, u64)]) -> SharedMemory {
        SharedMemory { regions: regions.iter().copied().collect(), ..SharedMemory::default() }
    }

    /// Another device of the VM exports an object.
    pub fn export(&mut self, object: ObjectId, file: OwnedFd) {
        self.objects.insert(object, file);
    }

    /// What the front-end answers to a request of the back-end, once it is carried out. Requests about anything else are
    /// done.
    pub fn carry_out(&mut self, request: BackendRequest) -> Answer {
        let done = match request {
            BackendRequest::ShmemMap { range, fd, fd_offset, writable } => {
                self.map((range.shmid, range.offset), range.len, fd, fd_offset, writable)
            }
            BackendRequest::ShmemUnmap(range) => {
                let at = (range.shmid, range.offset);
                // "The given range shall correspond to the entirety of a valid mapped region."
                let whole = self.mappings.get(&at).is_some_and(|map| map.size() as u64 == range.len);
                whole && self.mappings.remove(&at).is_some()
            }
            BackendRequest::SharedObjectLookup(id) => {
                match self.objects.get(&id).and_then(|file| file.try_clone().ok()) {
                    Some(file) => return Answer::Fd(file),
                    None => false,
                }
            }
            _ => true,
        };
        if done { Answer::Done } else { Answer::Failed }
    }

    fn map(&mut self, at: (u8, u64), len: u64, fd: OwnedFd, offset: u64, writable: bool) -> bool {
        let (region, start) = at;
        let Some(end) = start.checked_add(len) else { return false };
        let fits = self.regions.get(&region).is_some_and(|size| end <= *size);
        // "Mapping over an already existing map is not allowed."
        let taken = self
            .mappings
            .iter()
            .any(|((of, first), map)| *of == region && *first < end && start < first + map.size() as u64);
        if !fits || taken {
            return false;
        }
        let prot = if writable { libc::PROT_READ | libc::PROT_WRITE } else { libc::PROT_READ };
        let file = FileOffset::new(File::from(fd), offset);
        match MmapRegion::build(Some(file), len as usize, prot, libc::MAP_SHARED) {
            Ok(map) => self.mappings.insert(at, map).is_none(),
            Err(_) => false,
        }
    }

    /// The device is reset: nothing is mapped any more.
    pub fn reset(&mut self) {
        self.mappings.clear();
    }

    /// Mappings that there are.
    pub fn mappings(&self) -> usize {
        self.mappings.len()
    }

    fn find(&self, region: u8, offset: u64) -> Option<(&MmapRegion<()>, usize)> {
        let ((of, start), map) = self.mappings.range(..=(region, offset)).next_back()?;
        let within = (*of == region).then_some(offset - start)?;
        (within < map.size() as u64).then_some((map, within as usize))
    }

    /// The byte that the guest reads there; none: nothing is mapped.
    pub fn read(&self, region: u8, offset: u64) -> Option<u8> {
        let (map, within) = self.find(region, offset)?;
        map.as_volatile_slice().read_obj(within).ok()
    }

    /// The guest writes a byte.
    ///
    /// # Panics
    /// If nothing is mapped there.
    pub fn write(&self, region: u8, offset: u64, byte: u8) {
        let (map, within) = self.find(region, offset).expect("a mapping");
        map.as_volatile_slice().write_obj(byte, within).expect("within the mapping");
    }
}
