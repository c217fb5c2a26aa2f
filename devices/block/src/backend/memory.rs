//! A disk in memory: for tests and fuzzers, and for a VMM that wants one.
use std::io;
use std::sync::{PoisonError, RwLock};

use super::{Geometry, Image, Payload, StillWanted};

/// A disk whose bytes are gone with it. No call blocks for longer than it takes to copy.
pub struct MemoryImage(RwLock<Vec<u8>>);

impl MemoryImage {
    /// A disk of these bytes.
    pub fn new(bytes: Vec<u8>) -> MemoryImage {
        MemoryImage(RwLock::new(bytes))
    }

    /// The bytes as they are now.
    pub fn bytes(&self) -> Vec<u8> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn change(&self, offset: u64, len: u64, change: impl FnOnce(&mut [u8])) -> io::Result<()> {
        let mut bytes = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let range = range(offset, len)?;
        change(bytes.get_mut(range).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }
}

fn range(offset: u64, len: u64) -> io::Result<std::ops::Range<usize>> {
    let end = offset.checked_add(len).and_then(|end| usize::try_from(end).ok());
    let start = usize::try_from(offset).ok();
    start.zip(end).map(|(start, end)| start..end).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

impl Image for MemoryImage {
    fn geometry(&self) -> Geometry {
        let bytes = self.0.read().unwrap_or_else(PoisonError::into_inner).len() as u64;
        Geometry { bytes, block: 512, physical: 512, discards: true }
    }

    fn read(&self, offset: u64, to: &mut Payload) -> io::Result<()> {
        let bytes = self.0.read().unwrap_or_else(PoisonError::into_inner);
        to.write(bytes.get(range(offset, to.left())?).ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write(&self, offset: u64, from: &mut Payload, _stable: bool) -> io::Result<()> {
        self.change(offset, from.left(), |bytes| {
            from.read(bytes);
        })
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Anything but what was there: who reads it after that has a mistake that shows.
        self.change(offset, len, |bytes| bytes.fill(0xd5))
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool, _: StillWanted<'_>) -> io::Result<()> {
        self.change(offset, len, |bytes| bytes.fill(0))
    }

    fn resize(&self, bytes: Option<u64>) -> io::Result<u64> {
        let mut disk = self.0.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(bytes) = bytes {
            let bytes = usize::try_from(bytes).map_err(|_| io::ErrorKind::InvalidInput)?;
            let more = bytes.saturating_sub(disk.len());
            disk.try_reserve(more).map_err(|_| io::ErrorKind::OutOfMemory)?;
            disk.resize(bytes, 0);
        }
        Ok(disk.len() as u64)
    }

    fn blocks(&self) -> bool {
        false
    }
}
