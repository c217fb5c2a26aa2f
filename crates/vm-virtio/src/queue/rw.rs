//! Reading and writing the bytes of a chain without regard to how they are split into descriptors (2.7.4.1).
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::memory::Segment;

/// The chain has fewer bytes left than were asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} bytes wanted, {left} are left in the chain")]
pub struct ShortChain {
    /// How many bytes were wanted.
    pub wanted: usize,
    /// How many there are.
    pub left: u64,
}

/// A position in a list of segments.
#[derive(Clone)]
struct Position<'a> {
    segments: &'a [Segment],
    /// Bytes of the first segment that are behind us: less than its length.
    offset: usize,
}

impl<'a> Position<'a> {
    fn left(&self) -> u64 {
        self.segments
            .iter()
            .map(|segment| segment.len() as u64)
            .sum::<u64>()
            .saturating_sub(self.offset as u64)
    }

    /// Moves on by `count` bytes if they are in one segment, as they mostly are: that, and the offset in it.
    #[inline(always)]
    fn within(&mut self, count: usize) -> Option<(&'a Segment, usize)> {
        let (first, rest) = self.segments.split_first()?;
        let offset = self.offset;
        let left = first.len() - offset;
        if count < left {
            self.offset += count;
        } else if count == left {
            (self.segments, self.offset) = (rest, 0);
        } else {
            return None;
        }
        Some((first, offset))
    }

    /// Moves on by up to `count` bytes, calling `piece` for each segment's part: its offset, and the parts' so far.
    #[inline(always)]
    fn step(&mut self, count: usize, mut piece: impl FnMut(&'a Segment, usize, usize, usize)) -> usize {
        let mut done = 0;
        while done < count {
            let Some((first, rest)) = self.segments.split_first() else { break };
            let part = (first.len() - self.offset).min(count - done);
            piece(first, self.offset, done, part);
            done += part;
            self.offset += part;
            if self.offset >= first.len() {
                self.segments = rest;
                self.offset = 0;
            }
        }
        done
    }

    fn iovecs(&self) -> impl Iterator<Item = libc::iovec> + use<'a> {
        let mut offset = self.offset;
        self.segments.iter().map(move |segment| {
            let mut iovec = segment.as_iovec();
            iovec.iov_base = iovec.iov_base.cast::<u8>().wrapping_add(offset).cast();
            iovec.iov_len -= offset;
            offset = 0;
            iovec
        })
    }
}

/// Reads the device-readable part of a chain, from its start on.
#[derive(Clone)]
pub struct Reader<'a>(Position<'a>);

impl<'a> Reader<'a> {
    #[inline]
    pub(super) fn new(segments: &'a [Segment]) -> Reader<'a> {
        Reader(Position { segments, offset: 0 })
    }

    /// Bytes that are left.
    pub fn remaining(&self) -> u64 {
        self.0.left()
    }

    /// Reads as much as there is, up to the length of `data`; returns how much that was.
    #[inline]
    pub fn read(&mut self, data: &mut [u8]) -> usize {
        let count = data.len();
        if let Some((segment, offset)) = self.0.within(count) {
            return segment.read(offset, data);
        }
        self.0.step(count, |segment, offset, done, part| {
            if let Some(data) = data.get_mut(done..done + part) {
                segment.read(offset, data);
            }
        })
    }

    /// Fills `data`, or reads nothing if there is less.
    #[inline]
    pub fn read_exact(&mut self, data: &mut [u8]) -> Result<(), ShortChain> {
        let before = self.0.clone();
        if self.read(data) < data.len() {
            self.0 = before;
            return Err(ShortChain { wanted: data.len(), left: self.remaining() });
        }
        Ok(())
    }

    /// Reads a structure as it lies in memory; nothing if there is less.
    #[inline]
    pub fn read_obj<T: FromBytes + IntoBytes>(&mut self) -> Result<T, ShortChain> {
        let mut value = T::new_zeroed();
        self.read_exact(value.as_mut_bytes())?;
        Ok(value)
    }

    /// Passes over up to `count` bytes; returns over how many.
    pub fn skip(&mut self, count: usize) -> usize {
        self.0.step(count, |_, _, _, _| {})
    }

    /// What is left, for a system call. What the kernel does with it must end before the chain is completed.
    pub fn iovecs(&self) -> impl Iterator<Item = libc::iovec> + use<'a> {
        self.0.iovecs()
    }
}

/// Writes the device-writable part of a chain, from its start on.
pub struct Writer<'a> {
    position: Position<'a>,
    written: u64,
}

impl<'a> Writer<'a> {
    #[inline]
    pub(super) fn new(segments: &'a [Segment]) -> Writer<'a> {
        Writer { position: Position { segments, offset: 0 }, written: 0 }
    }

    /// Bytes that there is room left for.
    pub fn remaining(&self) -> u64 {
        self.position.left()
    }

    /// How far from the start it is: what to complete the chain with, if nothing was skipped.
    pub fn written(&self) -> u32 {
        u32::try_from(self.written).unwrap_or(u32::MAX)
    }

    /// Writes as much of `data` as there is room for; returns how much that was.
    #[inline]
    pub fn write(&mut self, data: &[u8]) -> usize {
        if let Some((segment, offset)) = self.position.within(data.len()) {
            self.written += data.len() as u64;
            return segment.write(offset, data);
        }
        let done = self.position.step(data.len(), |segment, offset, done, part| {
            if let Some(data) = data.get(done..done + part) {
                segment.write(offset, data);
            }
        });
        self.written += done as u64;
        done
    }

    /// Writes all of `data`, or nothing if there is less room.
    #[inline]
    pub fn write_all(&mut self, data: &[u8]) -> Result<(), ShortChain> {
        let left = self.remaining();
        if left < data.len() as u64 {
            return Err(ShortChain { wanted: data.len(), left });
        }
        self.write(data);
        Ok(())
    }

    /// Writes a structure as it lies in memory; nothing if there is less room.
    #[inline]
    pub fn write_obj<T: IntoBytes + Immutable>(&mut self, value: &T) -> Result<(), ShortChain> {
        self.write_all(value.as_bytes())
    }

    /// Passes over up to `count` bytes, which something else has written or will write; returns over how many. They
    /// count as written.
    pub fn skip(&mut self, count: usize) -> usize {
        let done = self.position.step(count, |_, _, _, _| {});
        self.written += done as u64;
        done
    }

    /// The room that is left, for a system call; [`Self::skip`] what it wrote. What the kernel does with it must end
    /// before the chain is completed.
    pub fn iovecs(&self) -> impl Iterator<Item = libc::iovec> + use<'a> {
        self.position.iovecs()
    }
}
