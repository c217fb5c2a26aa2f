//! Which regions of guest memory another process can map: what a vhost-user back-end is told of the map.
use std::fmt;
use std::fs::File;
use std::sync::Arc;

use vm_memory::bitmap::Bitmap;
use vm_memory::{GuestAddress, GuestMemoryRegion, GuestRegionMmap};

/// A region of guest memory with a file behind it. Says nothing of rights: they are the file's.
#[derive(Clone)]
pub struct FileRegion {
    /// First guest address.
    pub addr: GuestAddress,
    /// Length in bytes, not 0.
    pub len: u64,
    /// The file.
    pub file: Arc<File>,
    /// Where in the file the region begins, in bytes.
    pub offset: u64,
}

impl FileRegion {
    pub(super) fn of<B: Bitmap>(region: &GuestRegionMmap<B>) -> Option<FileRegion> {
        let window = region.file_offset().filter(|_| region.len() > 0)?;
        let (file, offset) = (window.arc().clone(), window.start());
        Some(FileRegion { addr: region.start_addr(), len: region.len(), file, offset })
    }

    /// The address behind its last byte; none if that is the end of the address space.
    pub fn end(&self) -> Option<u64> {
        self.addr.0.checked_add(self.len)
    }
}

/// The same part of the same open file, at the same place.
impl PartialEq for FileRegion {
    fn eq(&self, other: &FileRegion) -> bool {
        (self.addr, self.len, self.offset) == (other.addr, other.len, other.offset)
            && Arc::ptr_eq(&self.file, &other.file)
    }
}

impl Eq for FileRegion {}

impl fmt::Debug for FileRegion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}+{:#x} at {:#x} of {:?}", self.addr.0, self.len, self.offset, self.file)
    }
}
