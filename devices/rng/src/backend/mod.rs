//! Where random bytes come from.
//!
//! Invariants of every source: no byte is handed out twice; what is handed out never is anything else than the
//! source's bytes; [`Source::fill`] does not block; "nothing now" is an answer of its own, never zero bytes.
mod file;
mod kernel;
mod seeded;
mod syscall;

use std::io;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use vm_virtio::{Segment, StateError};

use crate::state::{SeededV1, other_source};

use file::SharedFile;

/// A source that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The kernel's generator does not answer.
    #[error("the kernel gives no random bytes (getrandom): {0}; name a source with --rng-source")]
    Kernel(#[source] io::Error),
    /// The file cannot be opened.
    #[error("cannot open {}: {error}; name a file or device that this user can read", path.display())]
    Open {
        /// The path as given.
        path: PathBuf,
        /// What the system said.
        #[source]
        error: io::Error,
    },
    /// It is nothing to read bytes from.
    #[error("{} is {what}; name a file, a character device or a named pipe", path.display())]
    NotASource {
        /// The path as given.
        path: PathBuf,
        /// What it is.
        what: &'static str,
    },
}

/// A source, opened once for all guests of a process.
pub struct Entropy(Kind);

enum Kind {
    Kernel,
    File(SharedFile),
    Seeded(u64),
}

impl Entropy {
    /// The kernel's generator: what `/dev/urandom` gives, without the file.
    pub fn kernel() -> Result<Entropy, OpenError> {
        kernel::check().map_err(OpenError::Kernel)?;
        Ok(Entropy(Kind::Kernel))
    }

    /// A file, character device or named pipe. `/dev/urandom` and `/dev/random` are the kernel's generator.
    ///
    /// A file is handed out from its beginning to its end, each byte once and to one guest; then requests wait until
    /// it has grown.
    pub fn open(path: &Path) -> Result<Entropy, OpenError> {
        match SharedFile::open(path)? {
            Some(file) => Ok(Entropy(Kind::File(file))),
            None => Entropy::kernel(),
        }
    }

    /// What it is, for whoever operates the device.
    pub fn name(&self) -> String {
        match &self.0 {
            Kind::Kernel => "the kernel's generator".into(),
            Kind::File(file) => file.path().display().to_string(),
            Kind::Seeded(_) => "a seeded generator, INSECURE".into(),
        }
    }

    /// ChaCha20 with a key made of `seed`, a stream of its own for each guest, from its beginning after each reset.
    /// **No secret**: for tests that have to be repeatable.
    pub fn insecure_seeded(seed: u64) -> Entropy {
        Entropy(Kind::Seeded(seed))
    }

    /// The source for one guest.
    pub(crate) fn source(&self, guest: u32) -> io::Result<Source> {
        Ok(match &self.0 {
            Kind::Kernel => Source::Kernel(kernel::KernelSource::new()),
            Kind::File(file) => Source::File(file.source()?),
            Kind::Seeded(seed) => Source::Seeded(Box::new(seeded::SeededSource::new(*seed, guest))),
        })
    }
}

/// When to ask a source again that had nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Again {
    /// When its file is readable; after this time if that cannot be watched.
    Readable(Duration),
    /// After this time.
    After(Duration),
}

/// What became of a request for bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filled {
    /// So many bytes were written, from the start of the buffers on: at least one.
    Bytes(usize),
    /// The buffers are not memory any more.
    Fault,
    /// There is nothing now. Nothing was written, nothing is lost.
    NotYet(Again),
}

/// The source of one guest.
pub(crate) enum Source {
    Kernel(kernel::KernelSource),
    File(file::FileSource),
    Seeded(Box<seeded::SeededSource>),
}

impl Source {
    /// Writes up to `limit` (not 0) bytes to the buffers (not none), in order.
    pub(crate) fn fill(&mut self, buffers: &[Segment], limit: usize) -> Filled {
        match self {
            Source::Kernel(source) => source.fill(buffers, limit),
            Source::File(source) => source.fill(buffers, limit),
            Source::Seeded(source) => source.fill(buffers, limit),
        }
    }

    /// The file whose readiness [`Again::Readable`] means.
    pub(crate) fn file(&self) -> Option<BorrowedFd<'_>> {
        match self {
            Source::File(source) => Some(source.file()),
            Source::Kernel(_) | Source::Seeded(_) => None,
        }
    }

    /// What a successor has to know. The kernel and files have nothing: their bytes are handed out once, by whomever.
    pub(crate) fn save(&self) -> Option<SeededV1> {
        match self {
            Source::Seeded(source) => Some(source.save()),
            Source::Kernel(_) | Source::File(_) => None,
        }
    }

    pub(crate) fn restore(&mut self, state: Option<SeededV1>) -> Result<(), StateError> {
        match (self, state) {
            (Source::Seeded(source), Some(state)) => source.restore(&state),
            (Source::Kernel(_) | Source::File(_), None) => Ok(()),
            _ => Err(other_source()),
        }
    }

    /// The guest is reset.
    pub(crate) fn reset(&mut self) {
        match self {
            Source::Kernel(source) => source.reset(),
            // What was read is gone: going back would hand it out again.
            Source::File(_) => {}
            Source::Seeded(source) => source.reset(),
        }
    }
}

/// The parts of the buffers that `limit` bytes reach into: each with the number of bytes that go there.
fn pieces(buffers: &[Segment], limit: usize) -> impl Iterator<Item = (&Segment, usize)> {
    buffers
        .iter()
        .scan(limit, |left, buffer| {
            let part = buffer.len().min(*left);
            *left -= part;
            Some((buffer, part))
        })
        .take_while(|(_, part)| *part > 0)
}
