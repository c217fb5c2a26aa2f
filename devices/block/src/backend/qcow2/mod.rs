//! A disk in a qcow2 image, through the `imago` crate. Its calls block, so they are made on the host's pool.
//!
//! Image files are input like any other: what is wrong with one is an error. The format library is not ours; if it panics over
//! an image, the image is given up ([`Qcow2Image::broken`]) and nothing else.
//!
//! * **Layers.** The header of an image names the file behind it. Whoever wrote the image, a guest or its former owner, could
//!   name any file of the host there, so a backing file is opened only below a folder that was allowed for that, only in the
//!   format that the header states (a format that is guessed is the guest's choice), and only so many of them deep.
//!   External data files are not opened at all.
//! * **Counts.** Before an image is written to, what its reference counts stand on is looked at ([`check`]): over nonsense the
//!   library can fail in a way that no process survives.
//! * **What was answered is in the file.** The library keeps tables in memory. If this process is killed, the guest goes on
//!   and is told of no loss; so the tables are written (not synced) before a request that changed them is answered.
//! * **Bytes go through memory of our own**: the library wants slices, and guest memory has none.
mod check;

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{PoisonError, RwLock};

use imago::file::File as ImagoFile;
use imago::format::PreallocateMode;
use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{FormatAccess, StorageOpenOptions};

use super::{Geometry, Image, OpenError, OpenOptions, Payload, StillWanted, lock};

/// Images over one another, at most: a chain that ends in itself has no end.
const LAYERS: usize = 16;
/// Bytes that are copied at once.
const PIECE: u64 = 1 << 20;
/// Bytes of zeros between two looks at whether they are still wanted.
const STEP: u64 = 64 << 20;

type Access = FormatAccess<ImagoFile>;

/// A disk in a qcow2 image.
pub struct Qcow2Image {
    /// Discarding breaks what others may have looked up, so it is exclusive; all else goes side by side.
    /// There until the end.
    access: RwLock<Option<Access>>,
    geometry: Geometry,
    read_only: bool,
    broken: AtomicBool,
    /// A flush failed: it is not known what was lost.
    lost: AtomicBool,
}

/// Why a layer cannot be used.
fn unusable(path: &Path, why: impl Into<String>) -> OpenError {
    OpenError::BadImage { path: path.to_owned(), why: why.into() }
}

impl Qcow2Image {
    pub(super) fn open(
        path: &Path,
        options: OpenOptions,
        backing: &[PathBuf],
    ) -> Result<Qcow2Image, OpenError> {
        let allowed = backing.iter().map(|folder| {
            std::fs::canonicalize(folder).map_err(|error| OpenError::Open {
                path: folder.clone(),
                read_only: true,
                error,
            })
        });
        let allowed = allowed.collect::<Result<Vec<_>, _>>()?;
        let access = guarded(|| Ok(top(path, options, &allowed)))
            .unwrap_or_else(|error| Err(unusable(path, error.to_string())))?;
        let geometry = Geometry {
            bytes: access.size(),
            block: 512,
            physical: 4096,
            // Ranges of an image of version 2 cannot be given back; then a request is told so.
            discards: !options.read_only,
        };
        let (broken, lost) = (AtomicBool::new(false), AtomicBool::new(false));
        let read_only = options.read_only;
        Ok(Qcow2Image { access: RwLock::new(Some(access)), geometry, read_only, broken, lost })
    }

    /// Whether the library has panicked over it. Every call is an error then.
    pub fn is_broken(&self) -> bool {
        self.broken.load(Ordering::SeqCst)
    }

    fn guard<T>(&self, call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
        if self.is_broken() {
            return Err(io::Error::other("the image is given up after an earlier failure"));
        }
        guarded(call).inspect_err(|error| {
            if error.get_ref().is_some_and(|inner| inner.is::<Panicked>()) {
                self.broken.store(true, Ordering::SeqCst);
            }
        })
    }

    /// Side by side with others.
    fn shared<T>(&self, call: impl FnOnce(&Access) -> io::Result<T>) -> io::Result<T> {
        self.guard(|| {
            let access = self.access.read().unwrap_or_else(PoisonError::into_inner);
            call(access.as_ref().ok_or(Panicked)?)
        })
    }

    /// Alone.
    fn exclusive<T>(&self, call: impl FnOnce(&mut Access) -> io::Result<T>) -> io::Result<T> {
        self.guard(|| {
            let mut access = self.access.write().unwrap_or_else(PoisonError::into_inner);
            call(access.as_mut().ok_or(Panicked)?)
        })
    }

    /// After a change: so that it is there for whoever opens the image if this process ends now.
    fn settle(access: &Access, stable: bool) -> io::Result<()> {
        access.flush()?;
        if stable { access.sync() } else { Ok(()) }
    }

    fn write_zeros(&self, offset: u64, len: u64) -> io::Result<()> {
        self.shared(|access| {
            let zeros = vec![0; PIECE.min(len) as usize];
            let mut done = 0;
            while done < len {
                let part = PIECE.min(len - done);
                access.write(zeros.get(..part as usize).unwrap_or_default(), offset + done)?;
                done += part;
            }
            Qcow2Image::settle(access, false)
        })
    }
}

/// The library panicked.
#[derive(Debug, thiserror::Error)]
#[error("the image confuses the format library")]
struct Panicked;

impl From<Panicked> for io::Error {
    fn from(panicked: Panicked) -> io::Error {
        io::Error::other(panicked)
    }
}

impl Drop for Qcow2Image {
    fn drop(&mut self) {
        let access = self.access.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        // The library writes its tables when it is dropped; not those that a panic has left behind.
        if self.broken.load(Ordering::SeqCst) {
            std::mem::forget(access);
        } else {
            let _ = guarded(|| {
                drop(access);
                Ok(())
            });
        }
    }
}

/// A call into the library, whose panics are errors.
fn guarded<T>(call: impl FnOnce() -> io::Result<T>) -> io::Result<T> {
    // Whatever a panic leaves behind is not used again: `broken` is looked at first.
    catch_unwind(AssertUnwindSafe(call)).unwrap_or_else(|_| Err(io::Error::other(Panicked)))
}

/// The image itself, over whatever is behind it.
fn top(path: &Path, options: OpenOptions, allowed: &[PathBuf]) -> Result<Access, OpenError> {
    let file = file(path, options.read_only, options)?;
    if !options.read_only {
        // Not through `file`: with direct transfers, only whole blocks can be read there.
        let cached = File::open(path).map_err(|error| unusable(path, error.to_string()))?;
        check::sound(&cached).map_err(|error| unusable(path, format!("it is corrupt: {error}")))?;
    }
    qcow2(path, file, options.read_only, options, allowed, 1)
}

fn file(path: &Path, read_only: bool, options: OpenOptions) -> Result<ImagoFile, OpenError> {
    let failed = |error| OpenError::Open { path: path.to_owned(), read_only, error };
    // Before it is opened, which would wait for the other end of a pipe.
    if !std::fs::metadata(path).map_err(failed)?.is_file() {
        return Err(OpenError::NotAnImage { path: path.to_owned(), what: "not a file" });
    }
    let flags = if options.direct { libc::O_DIRECT } else { 0 };
    let file = File::options().read(true).write(!read_only).custom_flags(flags).open(path).map_err(failed)?;
    if options.lock {
        lock::lock(file.as_fd(), path, read_only)?;
    }
    let known = StorageOpenOptions::new().write(!read_only).direct(options.direct).filename(path);
    ImagoFile::from_open_file(file, known).map_err(failed)
}

fn qcow2(
    path: &Path,
    file: ImagoFile,
    read_only: bool,
    options: OpenOptions,
    allowed: &[PathBuf],
    layer: usize,
) -> Result<Access, OpenError> {
    let bad = |error: io::Error| unusable(path, error.to_string());
    let mut image = Qcow2::<ImagoFile>::open_image(file, !read_only).map_err(bad)?;
    if image.requires_external_data_file() {
        return Err(unusable(path, "its data is in another file, which is not supported"));
    }
    image.set_data_file(None);
    let backing = match image.implicit_backing_file() {
        None => None,
        Some(name) => {
            if layer >= LAYERS {
                return Err(unusable(
                    path,
                    format!("it is the {layer}th layer and has another one behind it"),
                ));
            }
            let behind = backing_path(path, name, allowed)?;
            let file = self::file(&behind, true, options)?;
            match image.implicit_backing_format().map(String::as_str) {
                Some("qcow2") => Some(qcow2(&behind, file, true, options, allowed, layer + 1)?),
                Some("raw" | "file") => {
                    let raw = Raw::open_image(file, false);
                    Some(FormatAccess::new(raw.map_err(|error| unusable(&behind, error.to_string()))?))
                }
                Some(other) => {
                    return Err(unusable(path, format!("the format of its backing file is {other:?}")));
                }
                None => {
                    // Of an image of version 2 the library does not read it.
                    let why = "it does not state the format of its backing file in a way that is read \
                               (qemu-img amend -o compat=1.1, qemu-img rebase -u -F FORMAT)";
                    return Err(unusable(path, why));
                }
            }
        }
    };
    image.set_backing(backing);
    Ok(FormatAccess::new(image))
}

/// Where a backing file is: names are relative to the image that has them. Links are followed before it is asked whether
/// that is allowed.
fn backing_path(image: &Path, name: &str, allowed: &[PathBuf]) -> Result<PathBuf, OpenError> {
    let path = image.parent().unwrap_or(Path::new("")).join(name);
    let failed = |error| OpenError::Open { path: path.clone(), read_only: true, error };
    let real = std::fs::canonicalize(&path).map_err(failed)?;
    if !allowed.iter().any(|folder| real.starts_with(folder)) {
        let why = format!(
            "its backing file {} is not below a folder that was allowed; if it may be read, name its folder with \
             --backing-dir",
            real.display()
        );
        return Err(unusable(image, why));
    }
    Ok(real)
}

impl Image for Qcow2Image {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn read(&self, mut offset: u64, to: &mut Payload) -> io::Result<()> {
        self.shared(|access| {
            let mut piece = vec![0; PIECE.min(to.left()) as usize];
            while to.left() > 0 {
                piece.truncate(PIECE.min(to.left()) as usize);
                access.read(&mut piece, offset)?;
                offset += to.write(&piece) as u64;
            }
            Ok(())
        })
    }

    fn write(&self, mut offset: u64, from: &mut Payload, stable: bool) -> io::Result<()> {
        self.shared(|access| {
            let mut piece = vec![0; PIECE.min(from.left()) as usize];
            while from.left() > 0 {
                piece.truncate(PIECE.min(from.left()) as usize);
                let count = from.read(&mut piece);
                access.write(&piece, offset)?;
                offset += count as u64;
            }
            Qcow2Image::settle(access, stable)
        })
    }

    fn flush(&self) -> io::Result<()> {
        if self.lost.load(Ordering::SeqCst) {
            return Err(io::Error::other("an earlier flush failed"));
        }
        if self.read_only {
            return Ok(());
        }
        let result = self.shared(|access| Qcow2Image::settle(access, true));
        if result.is_err() {
            self.lost.store(true, Ordering::SeqCst);
        }
        result
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.exclusive(|access| {
            access.discard_to_any(offset, len)?;
            Qcow2Image::settle(access, false)
        })
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, wanted: StillWanted<'_>) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            if !wanted() {
                return Err(io::ErrorKind::Interrupted.into());
            }
            let (at, part) = (offset + done, STEP.min(len - done));
            let result = if unmap {
                self.exclusive(|access| {
                    access.discard_to_zero(at, part)?;
                    Qcow2Image::settle(access, false)
                })
            } else {
                self.shared(|access| {
                    access.write_zeroes(at, part)?;
                    Qcow2Image::settle(access, false)
                })
            };
            match result {
                // Images of version 2 have no mark for zeros.
                Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                    let mut written = 0;
                    while written < part {
                        if !wanted() {
                            return Err(io::ErrorKind::Interrupted.into());
                        }
                        let piece = PIECE.min(part - written);
                        self.write_zeros(at + written, piece)?;
                        written += piece;
                    }
                }
                other => other?,
            }
            done += part;
        }
        Ok(())
    }

    fn resize(&self, bytes: Option<u64>) -> io::Result<u64> {
        let Some(bytes) = bytes else { return self.shared(|access| Ok(access.size())) };
        if self.read_only {
            return Err(io::ErrorKind::Unsupported.into());
        }
        self.exclusive(|access| {
            access.resize(bytes, PreallocateMode::None)?;
            Qcow2Image::settle(access, true)?;
            Ok(access.size())
        })
    }

    fn forget_losses(&self) {
        self.lost.store(false, Ordering::SeqCst);
    }
}
