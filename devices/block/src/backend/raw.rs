//! A raw disk: a file or block device whose bytes are the disk's.
//!
//! Lanes read and write it without the trait: by a system call if that takes no waiting, else by io_uring. What waits here
//! in any case is `flush`, `discard`, `write_zeroes` and `resize`.
use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{AtFlags, FallocateFlags, StatxFlags};
use rustix::io::Errno;

use super::{Geometry, Image, OpenError, OpenOptions, Payload, StillWanted, lock, syscall};

/// Where zeros have to be written, as many at once.
const STEP: u64 = 1 << 20;

/// File systems that live in memory: TMPFS_MAGIC, RAMFS_MAGIC, HUGETLBFS_MAGIC of `linux/magic.h`.
const IN_MEMORY: [u64; 3] = [0x0102_1994, 0x8584_58f6, 0x9584_58f6];

/// What direct transfers have to be multiples of, in bytes: powers of two.
#[derive(Clone, Copy, Debug)]
struct Alignment {
    offset: u32,
    memory: u32,
}

/// A raw disk.
pub struct RawFile {
    file: File,
    /// With direct transfers: the same file for those that are not aligned. The kernel keeps both coherent.
    cached: Option<(File, Alignment)>,
    is_device: bool,
    in_memory: bool,
    read_only: bool,
    geometry: Geometry,
    /// A flush failed: what was written before may be gone, and the kernel says so once only.
    lost: AtomicBool,
}

impl RawFile {
    pub(super) fn open(path: &Path, options: OpenOptions) -> Result<RawFile, OpenError> {
        let OpenOptions { read_only, direct, lock, .. } = options;
        let failed = |error| OpenError::Open { path: path.to_owned(), read_only, error };
        let not_an_image = |what| OpenError::NotAnImage { path: path.to_owned(), what };
        // Before it is opened, which would wait for the other end of a pipe.
        let kind = std::fs::metadata(path).map_err(failed)?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            let what = match kind {
                kind if kind.is_dir() => "a directory",
                kind if kind.is_char_device() => "a character device",
                kind if kind.is_fifo() => "a pipe",
                kind if kind.is_socket() => "a socket",
                _ => "neither a file nor a block device",
            };
            return Err(not_an_image(what));
        }
        let open = |flags| {
            File::options().read(true).write(!read_only).custom_flags(flags).open(path).map_err(failed)
        };
        let file = open(if direct { libc::O_DIRECT } else { 0 })?;
        if lock {
            lock::lock(file.as_fd(), path, read_only)?;
        }
        let is_device = kind.is_block_device();
        let bytes = size(&file, is_device).map_err(failed)?;
        let (mut block, mut physical) = (512, 4096);
        if is_device {
            block = rustix::fs::ioctl_blksszget(&file).map_err(|error| failed(error.into()))?;
            physical = rustix::fs::ioctl_blkpbszget(&file).map_err(|error| failed(error.into()))?;
        }
        let mut cached = None;
        if direct {
            let alignment = alignment(&file, block);
            // Not `block`, which says where partitions are: that does not depend on how the host reads the file.
            physical = physical.max(alignment.offset);
            cached = Some((open(0)?, alignment));
        }
        let block = if block.is_power_of_two() { block.clamp(512, 1 << 16) } else { 512 };
        let physical = if physical.is_power_of_two() { physical.max(block) } else { block };
        let in_memory = rustix::fs::fstatfs(&file)
            .is_ok_and(|fs| u64::try_from(fs.f_type).is_ok_and(|kind| IN_MEMORY.contains(&kind)));
        // A block device is asked when it happens; what it says then is the request's status.
        let discards = !read_only && (is_device || punches(&file, bytes));
        let geometry = Geometry { bytes, block, physical, discards };
        let lost = AtomicBool::new(false);
        Ok(RawFile { file, cached, is_device, in_memory: in_memory && !is_device, read_only, geometry, lost })
    }

    /// Any file, for tests of what can hang.
    #[cfg(test)]
    pub(crate) fn of(file: File) -> RawFile {
        let geometry = Geometry { bytes: 1 << 20, block: 512, physical: 512, discards: false };
        let lost = AtomicBool::new(false);
        let (is_device, in_memory, read_only) = (false, false, false);
        RawFile { file, cached: None, is_device, in_memory, read_only, geometry, lost }
    }

    /// Whether the host caches what is read and written.
    pub(crate) fn is_cached(&self) -> bool {
        self.cached.is_none()
    }

    pub(crate) fn is_device(&self) -> bool {
        self.is_device
    }

    /// Whether nothing is behind the cache that could be waited for.
    pub(crate) fn is_in_memory(&self) -> bool {
        self.in_memory && self.cached.is_none()
    }

    pub(crate) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether a transfer can be made on [`RawFile::file`].
    pub(crate) fn takes(&self, offset: u64, payload: &Payload) -> bool {
        let Some((_, Alignment { offset: unit, memory })) = &self.cached else { return true };
        let unit = u64::from(*unit) - 1;
        (offset | payload.left()) & unit == 0 && payload.is_aligned(*memory as usize)
    }

    fn file_for(&self, offset: u64, payload: &Payload) -> BorrowedFd<'_> {
        match &self.cached {
            Some((cached, _)) if !self.takes(offset, payload) => cached.as_fd(),
            _ => self.file.as_fd(),
        }
    }

    /// What a flush comes to before it is begun: an error once another one failed.
    pub(crate) fn check_losses(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) { Err(Errno::IO.into()) } else { Ok(()) }
    }

    /// What a flush came to.
    pub(crate) fn note_flush(&self, result: &io::Result<()>) {
        if result.is_err() {
            self.lost.store(true, Ordering::SeqCst);
        }
    }

    /// Zeros by writing them, a step at a time.
    fn write_zeros(&self, offset: u64, len: u64, wanted: StillWanted<'_>) -> io::Result<()> {
        let file = self.cached.as_ref().map_or(&self.file, |(cached, _)| cached).as_fd();
        let mut done = 0;
        while done < len {
            if !wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let part = STEP.min(len - done);
            let mut zeros = Payload::from_bytes(vec![0; part as usize]);
            write_all(file, offset + done, &mut zeros, 0)?;
            done += part;
        }
        Ok(())
    }
}

fn size(file: &File, is_device: bool) -> io::Result<u64> {
    // Of a device the metadata does not tell; nobody else uses the position.
    let mut file = file;
    if is_device { file.seek(SeekFrom::End(0)) } else { Ok(file.metadata()?.size()) }
}

/// What direct transfers demand. Where nobody says it, pages are taken everywhere.
fn alignment(file: &File, block: u32) -> Alignment {
    let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let known = stat.ok().filter(|stat| {
        stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0
            && stat.stx_dio_offset_align.is_power_of_two()
            && stat.stx_dio_mem_align.is_power_of_two()
    });
    known.map_or(Alignment { offset: block.max(4096), memory: 4096 }, |stat| Alignment {
        offset: stat.stx_dio_offset_align.max(block),
        memory: stat.stx_dio_mem_align,
    })
}

/// Whether the file system gives ranges back. Asked behind the end, where there is nothing to give back.
fn punches(file: &File, end: u64) -> bool {
    let beyond = end.next_multiple_of(4096);
    rustix::fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, beyond, 4096).is_ok()
}

/// Whether it is the storage that cannot do a thing, not the attempt that failed.
fn unsupported(error: Errno) -> bool {
    matches!(error, Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY)
}

fn read_all(file: BorrowedFd<'_>, mut offset: u64, to: &mut Payload) -> io::Result<()> {
    while to.left() > 0 {
        match syscall::read(file, offset, to, 0) {
            // Shorter than it was: what is not there any more is not zeros.
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(done) => offset += done as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_all(
    file: BorrowedFd<'_>,
    mut offset: u64,
    from: &mut Payload,
    flags: libc::c_int,
) -> io::Result<()> {
    while from.left() > 0 {
        match syscall::write(file, offset, from, flags) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(done) => offset += done as u64,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

impl Image for RawFile {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read(&self, offset: u64, to: &mut Payload) -> io::Result<()> {
        read_all(self.file_for(offset, to), offset, to)
    }

    fn write(&self, offset: u64, from: &mut Payload, stable: bool) -> io::Result<()> {
        let flags = if stable { libc::RWF_DSYNC } else { 0 };
        write_all(self.file_for(offset, from), offset, from, flags)
    }

    fn flush(&self) -> io::Result<()> {
        self.check_losses()?;
        let result = rustix::fs::fdatasync(&self.file).map_err(io::Error::from);
        self.note_flush(&result);
        result
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let result = if self.is_device {
            syscall::discard(self.file(), offset, len)
        } else {
            let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            rustix::fs::fallocate(&self.file, how, offset, len).map_err(io::Error::from)
        };
        result.map_err(|error| match Errno::from_io_error(&error) {
            Some(errno) if unsupported(errno) => io::ErrorKind::Unsupported.into(),
            _ => error,
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, wanted: StillWanted<'_>) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        for how in [unmap.then_some(punch), Some(zero)].into_iter().flatten() {
            match rustix::fs::fallocate(&self.file, how, offset, len) {
                Ok(()) => return Ok(()),
                // A block device has no smaller unit than its blocks (EINVAL).
                Err(error) if unsupported(error) || error == Errno::INVAL => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.write_zeros(offset, len, wanted)
    }

    fn resize(&self, bytes: Option<u64>) -> io::Result<u64> {
        match bytes {
            Some(_) if self.read_only || self.is_device => return Err(io::ErrorKind::Unsupported.into()),
            Some(bytes) => self.file.set_len(bytes)?,
            None => {}
        }
        size(&self.file, self.is_device)
    }

    fn forget_losses(&self) {
        self.lost.store(false, Ordering::SeqCst);
    }

    fn raw(&self) -> Option<&RawFile> {
        Some(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> OpenOptions {
        OpenOptions { format: super::super::Format::Raw, read_only: false, direct: false, lock: false }
    }

    fn file(bytes: &[u8]) -> (virtio_testkit::daemon::TempDir, RawFile) {
        let directory = virtio_testkit::daemon::TempDir::new();
        let path = directory.join("disk");
        std::fs::write(&path, bytes).unwrap();
        let file = RawFile::open(&path, options()).unwrap();
        (directory, file)
    }

    /// The kernel tells of lost writes once. Whoever flushes after that must not hear that all is well.
    #[test]
    fn a_flush_that_failed_is_not_forgotten_until_the_guest_starts_over() {
        let (_directory, file) = file(&[0; 512]);
        file.flush().unwrap();
        file.note_flush(&Err(Errno::IO.into()));
        assert!(file.flush().is_err() && file.check_losses().is_err());
        file.note_flush(&Ok(()));
        assert!(file.flush().is_err());
        file.forget_losses();
        file.flush().unwrap();
    }

    #[test]
    fn zeros_that_have_to_be_written_are_written_in_steps_that_can_be_given_up() {
        let bytes = vec![1; 3 << 20];
        let (directory, file) = file(&bytes);
        let steps = std::cell::Cell::new(0);
        let two = || {
            steps.set(steps.get() + 1);
            steps.get() <= 2
        };
        let error = file.write_zeros(512, (3 << 20) - 1024, &two).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::Interrupted);
        let now = std::fs::read(directory.join("disk")).unwrap();
        let zeros = now.iter().filter(|byte| **byte == 0).count() as u64;
        assert_eq!(zeros, 2 * STEP);
        file.write_zeros(512, (3 << 20) - 1024, &|| true).unwrap();
        let now = std::fs::read(directory.join("disk")).unwrap();
        assert!(now[512..(3 << 20) - 512].iter().all(|byte| *byte == 0));
        assert!(now[..512] == bytes[..512] && now[(3 << 20) - 512..] == bytes[..512]);
    }

    #[test]
    fn direct_transfers_are_made_of_whole_blocks_and_the_rest_goes_through_the_cache() {
        let (_directory, mut file) = file(&[7; 8192]);
        let alignment = Alignment { offset: 4096, memory: 512 };
        file.cached = Some((file.file.try_clone().unwrap(), alignment));
        let payload = |len: usize| Payload::from_bytes(vec![0; len]);
        assert!(!file.takes(512, &payload(4096)) && !file.takes(0, &payload(512)));
        let mut unaligned = Payload::from_bytes(vec![0; 4096 + 512 + 1]);
        unaligned.advance(1);
        unaligned.read(&mut [0; 511]);
        assert!(!file.takes(0, &unaligned), "not all of it");
        file.read(512, &mut payload(512)).unwrap();
    }
}
