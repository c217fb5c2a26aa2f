//! Memory that a payload names (gpu resources, shared files, media buffers): it stays mapped however the guest's
//! memory map changes.
use super::{Access, GuestRam, MemFault, Segment, Segs};

/// A range of guest memory together with the snapshot that keeps it mapped.
#[derive(Debug)]
pub struct GuestBuf {
    // Declared `'static` for want of a lifetime that means "as long as `_ram`"; only lent out for that of `self`.
    segments: Segs<'static>,
    len: u64,
    _ram: GuestRam,
}

impl GuestBuf {
    pub(super) fn new(ram: GuestRam, addr: u64, len: u64, access: Access) -> Result<GuestBuf, MemFault> {
        let mut segments = Segs::new();
        segments.append(ram.directory(), addr, len, access)?;
        Ok(GuestBuf { segments, len, _ram: ram })
    }

    /// The pieces of host memory, in order.
    pub fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// Length in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }
}
