//! The image is locked against who would spoil it, in the way QEMU does it (its `block/file-posix.c`), so that each of us
//! keeps off what the other has.
//!
//! Locks are on single bytes of the file, shared, and of the open file description: they end with it, whoever else opens
//! the file. Byte 100 + n says "somebody does n", byte 200 + n says "somebody does not bear that others do n"; n are the
//! permissions of QEMU's block layer. Who comes sets both kinds first and looks then whether what it does is not borne, or
//! what it does not bear is done; so of two who come at once at least one sees the other.
use std::io;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::time::{Duration, Instant};

use super::{OpenError, syscall};

/// "Does n".
const DOES: i64 = 100;
/// "Does not bear that others do n".
const BEARS_NOT: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// How long a lock of somebody else is waited for. Who was killed, or has closed the file, may have it for a moment more: the
/// kernel's own threads let go of what an io_uring worked on only after its request was answered and its process is gone.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// Locks the file: a reader bears no writer, a writer neither writers nor (by their own choice) readers. Blocks for a second
/// at most.
pub(super) fn lock(file: BorrowedFd<'_>, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let no_lock = |error| OpenError::NoLock { path: path.to_owned(), error };
    let deadline = Instant::now() + PATIENCE;
    while let Some(what) = try_lock(file, read_only).map_err(no_lock)? {
        if Instant::now() >= deadline {
            return Err(OpenError::Locked { path: path.to_owned(), what });
        }
        // Nobody is kept off by who has nothing.
        unlock(file, read_only).map_err(no_lock)?;
        std::thread::sleep(PAUSE);
    }
    Ok(())
}

/// What it does, and what it does not bear.
fn permissions(read_only: bool) -> (&'static [i64], [i64; 2]) {
    let does: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] };
    (does, [WRITE, RESIZE])
}

fn unlock(file: BorrowedFd<'_>, read_only: bool) -> io::Result<()> {
    let (does, bears_not) = permissions(read_only);
    does.iter().try_for_each(|n| syscall::unlock(file, DOES + n))?;
    bears_not.iter().try_for_each(|n| syscall::unlock(file, BEARS_NOT + n))
}

/// What of it is taken, if it is.
fn try_lock(file: BorrowedFd<'_>, read_only: bool) -> io::Result<Option<&'static str>> {
    let (does, bears_not) = permissions(read_only);
    for n in does {
        syscall::lock(file, DOES + n)?;
    }
    for n in bears_not {
        syscall::lock(file, BEARS_NOT + n)?;
    }
    for n in does {
        if syscall::is_locked(file, BEARS_NOT + n)? {
            return Ok(Some("it does not bear what this device does"));
        }
    }
    for n in bears_not {
        if syscall::is_locked(file, DOES + n)? {
            return Ok(Some("it writes"));
        }
    }
    Ok(None)
}
