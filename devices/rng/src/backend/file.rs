//! A file, character device or named pipe as the source.
//!
//! All guests read through one open file, whose position is theirs together: each byte goes to one of them, once.
//! Reads never wait: devices and pipes are opened non-blocking, regular files are read as far as the page cache
//! reaches while the kernel is told to fetch the rest.
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::fs::{Advice, FileType, Mode, OFlags, SeekFrom, fadvise, fstat, major, minor, open, seek};
use rustix::io::Errno;
use vm_virtio::Segment;

use super::{Again, Filled, OpenError, syscall};

/// Until a file is looked at again that had ended or failed.
const ENDED: Duration = Duration::from_millis(500);
/// Until a device is asked again that cannot be watched.
const UNWATCHED: Duration = Duration::from_millis(10);
/// Until the page cache is asked again.
const FETCHING: Duration = Duration::from_millis(1);
/// Looks into the page cache before the file is read the ordinary way, for file systems that never let us know.
const PATIENCE: u32 = 200;
/// Between two warnings about the same source.
const WARNINGS: Duration = Duration::from_secs(60);

/// The open file of all guests.
pub(super) struct SharedFile {
    file: OwnedFd,
    path: Arc<PathBuf>,
    regular: bool,
}

impl SharedFile {
    /// Opens a source; none: it is the kernel's generator under one of its names.
    pub(super) fn open(path: &Path) -> Result<Option<SharedFile>, OpenError> {
        let failed = |error: Errno| OpenError::Open { path: path.to_owned(), error: error.into() };
        let not_a_source = |what| Err(OpenError::NotASource { path: path.to_owned(), what });
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
        let file = open(path, flags, Mode::empty()).map_err(failed)?;
        let stat = fstat(&file).map_err(failed)?;
        let regular = match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => true,
            FileType::CharacterDevice => match (major(stat.st_rdev), minor(stat.st_rdev)) {
                // /dev/random and /dev/urandom.
                (1, 8 | 9) => return Ok(None),
                _ => false,
            },
            FileType::Fifo => false,
            FileType::Directory => return not_a_source("a directory"),
            FileType::BlockDevice => return not_a_source("a block device"),
            _ => return not_a_source("no file to read from"),
        };
        Ok(Some(SharedFile { file, path: Arc::new(path.to_owned()), regular }))
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    pub(super) fn source(&self) -> io::Result<FileSource> {
        // A duplicate shares the position.
        let file = File::from(self.file.try_clone()?);
        Ok(FileSource {
            file,
            path: Arc::clone(&self.path),
            cached: self.regular,
            regular: self.regular,
            misses: 0,
            warned: None,
        })
    }
}

pub(crate) struct FileSource {
    file: File,
    path: Arc<PathBuf>,
    regular: bool,
    /// Only what is in the page cache is read.
    cached: bool,
    /// Looks into the page cache in vain, one after another.
    misses: u32,
    warned: Option<Instant>,
}

impl FileSource {
    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    pub(super) fn fill(&mut self, buffers: &[Segment], limit: usize) -> Filled {
        loop {
            let error = match syscall::read_into(self.file.as_fd(), buffers, limit, self.cached) {
                Ok(0) => {
                    self.warn("has no more bytes");
                    return Filled::NotYet(Again::After(ENDED));
                }
                Ok(bytes) => {
                    self.misses = 0;
                    return Filled::Bytes(bytes);
                }
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EINTR) => {}
                Some(libc::EOPNOTSUPP) if self.cached => self.cached = false,
                Some(libc::EAGAIN) if self.regular && self.cached => {
                    self.fetch(limit);
                    return Filled::NotYet(Again::After(FETCHING));
                }
                Some(libc::EAGAIN) => return Filled::NotYet(Again::Readable(UNWATCHED)),
                Some(libc::EFAULT) => return Filled::Fault,
                _ => {
                    self.warn(&format!("cannot be read: {error}"));
                    return Filled::NotYet(Again::After(ENDED));
                }
            }
        }
    }

    /// Has the kernel bring the next bytes into the page cache.
    fn fetch(&mut self, bytes: usize) {
        self.misses += 1;
        if self.misses >= PATIENCE {
            self.cached = false;
        }
        // Advice: if it is not taken, the patience above ends.
        if let Ok(position) = seek(&self.file, SeekFrom::Current(0)) {
            let _ = fadvise(&self.file, position, std::num::NonZeroU64::new(bytes as u64), Advice::WillNeed);
        }
    }

    /// Failure policy 8: visible, at a bounded rate.
    fn warn(&mut self, what: &str) {
        let now = Instant::now();
        if self.warned.is_none_or(|last| now.duration_since(last) >= WARNINGS) {
            self.warned = Some(now);
            tracing::warn!("entropy source {} {what}: the guest's requests wait", self.path.display());
        }
    }
}
