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

use super::{OpenError, syscall};

/// "Does n".
const DOES: i64 = 100;
/// "Does not bear that others do n".
const BEARS_NOT: i64 = 200;

const CONSISTENT_READ: i64 = 0;
const WRITE: i64 = 1;
const RESIZE: i64 = 3;

/// Locks the file: a reader bears no writer, a writer neither writers nor (by their own choice) readers.
pub(super) fn lock(file: BorrowedFd<'_>, path: &Path, read_only: bool) -> Result<(), OpenError> {
    let taken =
        try_lock(file, read_only).map_err(|error| OpenError::NoLock { path: path.to_owned(), error })?;
    taken.map_or(Ok(()), |what| Err(OpenError::Locked { path: path.to_owned(), what }))
}

/// What of it is taken, if it is.
fn try_lock(file: BorrowedFd<'_>, read_only: bool) -> io::Result<Option<&'static str>> {
    let does: &[i64] = if read_only { &[CONSISTENT_READ] } else { &[CONSISTENT_READ, WRITE, RESIZE] };
    let bears_not = [WRITE, RESIZE];
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
