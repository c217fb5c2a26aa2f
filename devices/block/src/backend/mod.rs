//! What a disk's bytes are kept in: [`Image`], and how one is opened.
//!
//! The trait is the whole of what a format has to do: calls that may block, from any thread, several at a time. Where they
//! are made is `io`'s business: on threads of the host's pool, or, if the bytes lie one to one in a file
//! ([`Image::raw`]), by the lane itself and through io_uring. An error is an error of that one request; no call changes
//! anything beyond its range.
mod lock;
mod memory;
mod null;
mod payload;
#[cfg(feature = "qcow2")]
mod qcow2;
mod raw;
pub(crate) mod syscall;

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

pub use memory::MemoryImage;
pub use null::NullImage;
pub use payload::Payload;
pub(crate) use payload::Room;
#[cfg(feature = "qcow2")]
pub use qcow2::Qcow2Image;
pub use raw::RawFile;

/// What a device has to know of an image before the first request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Bytes of the disk; what is beyond the last whole block is not reached.
    pub bytes: u64,
    /// Least unit that can be read and written without more work than that, in bytes: a power of two from 512 on.
    pub block: u32,
    /// Unit that the storage works in, in bytes: a power of two, not less than `block`.
    pub physical: u32,
    /// Whether ranges can be given back to the storage.
    pub discards: bool,
}

/// Where a request for zeros or a discard asks whether it is still wanted, between steps.
pub type StillWanted<'a> = &'a dyn Fn() -> bool;

/// A disk's bytes. Offsets and lengths are bytes, lie within the disk and are multiples of 512.
pub trait Image: Send + Sync + 'static {
    /// Size and blocks, as they are when it is opened.
    fn geometry(&self) -> Geometry;

    /// Fills all of `to` from `offset` on.
    fn read(&self, offset: u64, to: &mut Payload) -> io::Result<()>;

    /// Writes all of `from`; with `stable` it is on the storage when this returns.
    fn write(&self, offset: u64, from: &mut Payload, stable: bool) -> io::Result<()>;

    /// Everything that was written before is on the storage when this returns. Once that has failed, it is not known what
    /// was lost, so it fails until [`Image::forget_losses`].
    fn flush(&self) -> io::Result<()>;

    /// The bytes are not needed any more and may be anything. [`io::ErrorKind::Unsupported`] if that cannot be told.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// The bytes read as zeros when this returns; with `unmap` they may be given back to the storage. Works in bounded
    /// steps and gives up between two of them when it is not wanted any more.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, wanted: StillWanted<'_>) -> io::Result<()>;

    /// Makes the disk this large, if that is possible, or looks how large it has become. Returns the size in bytes.
    fn resize(&self, bytes: Option<u64>) -> io::Result<u64>;

    /// The guest starts over: see [`Image::flush`].
    fn forget_losses(&self) {}

    /// Whether a call may take a while. If not, lanes make it themselves.
    fn blocks(&self) -> bool {
        true
    }

    /// The file in which the disk's bytes are at their own offsets, if there is one.
    fn raw(&self) -> Option<&RawFile> {
        None
    }
}

/// What the bytes of a file mean. Stated, never guessed: a guest that can write to a raw disk could make it look like
/// any other format, with other files of the host behind it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "daemon", derive(clap::ValueEnum))]
#[non_exhaustive]
pub enum Format {
    /// The disk's bytes themselves: a file or a block device.
    #[default]
    Raw,
    /// A qcow2 image of version 2 or 3.
    #[cfg(feature = "qcow2")]
    Qcow2,
    /// No file at all: a disk without contents, whose size (bytes, or with K, M, G behind) is in the path's place.
    Null,
}

/// How an image is opened.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OpenOptions {
    /// What is in the file.
    pub format: Format,
    /// Nothing is ever written.
    pub read_only: bool,
    /// The host does not cache (`O_DIRECT`).
    pub direct: bool,
    /// Nobody who cooperates can write to it meanwhile, or read it if we write (QEMU's byte-range locks).
    pub lock: bool,
}

/// An image that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OpenError {
    /// The file cannot be opened.
    #[error("cannot open {}: {error}; name a file or block device that this user can {}", path.display(), if *read_only { "read" } else { "read and write, or add --read-only" })]
    Open {
        /// The path as given.
        path: PathBuf,
        /// Whether it would be read only.
        read_only: bool,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// It is nothing to keep a disk in.
    #[error("{} is {what}; name a file or a block device", path.display())]
    NotAnImage {
        /// The path as given.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
    /// Somebody else uses it.
    #[error("{} is used by another process ({what}); end that, or start with --lock off if both can cope", path.display())]
    Locked {
        /// The path as given.
        path: PathBuf,
        /// What of it is taken.
        what: &'static str,
    },
    /// It cannot be locked.
    #[error("cannot lock {}: {error}; start with --lock off if nobody else uses it", path.display())]
    NoLock {
        /// The path as given.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// What is in it is not what it was said to be, or is not allowed.
    #[error("cannot use the image {}: {why}", path.display())]
    BadImage {
        /// The path of it, or of the one of its layers that is meant.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Not a single block.
    #[error("{} has {bytes} bytes, less than a block of {block}; make it larger, e.g. with truncate -s", path.display())]
    TooSmall {
        /// The path as given.
        path: PathBuf,
        /// Its size in bytes.
        bytes: u64,
        /// The size of a block in bytes.
        block: u32,
    },
}

/// Opens an image that has no file behind it.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn open(path: &Path, options: OpenOptions) -> Result<Arc<dyn Image>, OpenError> {
    open_over(path, options, &[])
}

/// Opens an image that may name files below these folders as those behind it.
///
/// # Errors
/// [`OpenError`]; nothing is left behind then.
pub fn open_over(
    path: &Path,
    options: OpenOptions,
    backing: &[PathBuf],
) -> Result<Arc<dyn Image>, OpenError> {
    // Only images of that format have anything behind them.
    #[cfg(not(feature = "qcow2"))]
    let _ = backing;
    let image: Arc<dyn Image> = match options.format {
        Format::Raw => Arc::new(RawFile::open(path, options)?),
        #[cfg(feature = "qcow2")]
        Format::Qcow2 => Arc::new(Qcow2Image::open(path, options, backing)?),
        Format::Null => {
            let bytes = path.to_str().and_then(null::parse_size);
            let why = "a disk of this format has no file, but a size: bytes, or with K, M or G behind";
            let bad = || OpenError::BadImage { path: path.to_owned(), why: why.to_owned() };
            Arc::new(NullImage::new(bytes.ok_or_else(bad)?))
        }
    };
    let Geometry { bytes, block, .. } = image.geometry();
    if bytes < u64::from(block) {
        return Err(OpenError::TooSmall { path: path.to_owned(), bytes, block });
    }
    Ok(image)
}
