//! Memory that a front-end shares beside guest memory: what is in flight, and the log of dirty pages.
use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

use super::Poison;
use vm_memory::{FileOffset, MmapRegion};

/// A contiguous area that others may write at any time; mapped as long as this lives.
pub struct SharedMemory {
    base: NonNull<u8>,
    len: usize,
    poison: Arc<Poison>,
    /// What another process can map, and where in it the area begins.
    file: Option<(Arc<File>, u64)>,
    /// What unmaps the area when it is dropped.
    _keep: Box<dyn Any + Send + Sync>,
}

// SAFETY: the pointer is an address only; what it points at is shared anyway and is accessed through volatile or
// atomic operations, from any thread.
unsafe impl Send for SharedMemory {}
// SAFETY: as above.
unsafe impl Sync for SharedMemory {}

impl SharedMemory {
    /// # Safety
    /// `base` must be valid for reads and writes of `len` bytes, by volatile and atomic accesses, until `keep` is
    /// dropped.
    pub unsafe fn new(
        base: NonNull<u8>,
        len: usize,
        poison: Arc<Poison>,
        keep: Box<dyn Any + Send + Sync>,
    ) -> SharedMemory {
        SharedMemory { base, len, poison, file: None, _keep: keep }
    }

    /// Memory of this process, zeroed and aligned to eight bytes: for hosts that share it with nobody, and for tests.
    pub fn private(len: usize) -> SharedMemory {
        let words: Box<[AtomicU64]> = (0..len.div_ceil(8)).map(|_| AtomicU64::new(0)).collect();
        // Atomics may be written through a shared reference; an empty slice has an address, too.
        let base = NonNull::from(&*words).cast();
        SharedMemory { base, len, poison: Arc::default(), file: None, _keep: Box::new(words) }
    }

    /// Memory of this process, zeroed, that can be shared by its [file](Self::file). `len` is not 0.
    pub fn memfd(len: usize) -> io::Result<SharedMemory> {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = Arc::new(File::from(rustix::fs::memfd_create("backplane-shared", flags)?));
        file.set_len(len as u64)?;
        let mapped = MmapRegion::<()>::from_file(FileOffset::from_arc(file.clone(), 0), len);
        let mapped = mapped.map_err(io::Error::other)?;
        let base = NonNull::new(mapped.as_ptr()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        // SAFETY: the mapping has `len` bytes, may be read and written, and lives as long as `mapped`.
        let area = unsafe { SharedMemory::new(base, len, Arc::default(), Box::new(mapped)) };
        Ok(area.with_file(file, 0))
    }

    /// The area is the part of this file that begins at `offset`: whoever gets the file shares it.
    pub fn with_file(mut self, file: Arc<File>, offset: u64) -> SharedMemory {
        self.file = Some((file, offset));
        self
    }

    /// The file that the area is part of, and where it begins there; none if nobody said so.
    pub fn file(&self) -> Option<(&Arc<File>, u64)> {
        self.file.as_ref().map(|(file, offset)| (file, *offset))
    }

    /// Where the area is in this process.
    pub fn as_ptr(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    /// Length in bytes.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Whether the file behind it was truncated: what was read from it or written to it is void (failure policy 6).
    pub fn is_poisoned(&self) -> bool {
        self.poison.is_set()
    }
}

impl fmt::Debug for SharedMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{}", self.base, self.len)
    }
}
