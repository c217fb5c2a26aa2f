//! The kernel's generator through getrandom(2).
//!
//! Large requests are written by the kernel straight into guest memory. Small ones come out of a pool that is filled
//! by one system call for many of them; bytes leave the pool once and are wiped as they go.
use std::io;
use std::time::Duration;

use vm_virtio::Segment;
use zeroize::Zeroize;

use super::{Again, Filled, pieces, syscall};

const POOL: usize = 4096;
/// Above this, generating the bytes takes so long that the system call does not matter.
const SMALL: usize = 1024;
/// How long to wait for a kernel that has just booted and not seen enough events yet.
const BOOT: Duration = Duration::from_millis(100);

/// Asks once whether the system call works; that it has nothing yet is fine.
pub(super) fn check() -> io::Result<()> {
    match syscall::random(&mut [0; 1]) {
        Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
        _ => Ok(()),
    }
}

pub(crate) struct KernelSource {
    /// The bytes from `next` on have not been handed out; those before are zero.
    pool: Box<[u8; POOL]>,
    next: usize,
}

impl KernelSource {
    pub(super) fn new() -> KernelSource {
        KernelSource { pool: Box::new([0; POOL]), next: POOL }
    }

    pub(super) fn fill(&mut self, buffers: &[Segment], limit: usize) -> Filled {
        let wanted: usize = pieces(buffers, limit).map(|(_, part)| part).sum();
        let mut done = 0;
        for (buffer, part) in pieces(buffers, limit) {
            let result =
                if wanted <= SMALL { self.take_from_pool(buffer, part) } else { direct(buffer, part) };
            let error = match result {
                Ok(written) => {
                    done += written;
                    if written == part {
                        continue;
                    }
                    None
                }
                Err(error) => Some(error),
            };
            // What is there is an answer; only with nothing at all the reason matters.
            return match error {
                _ if done > 0 => Filled::Bytes(done),
                Some(error) if error.raw_os_error() == Some(libc::EFAULT) => Filled::Fault,
                _ => Filled::NotYet(Again::After(BOOT)),
            };
        }
        Filled::Bytes(done)
    }

    /// Bytes of the pool. Fewer than asked for if the kernel has no more.
    fn take_from_pool(&mut self, buffer: &Segment, len: usize) -> io::Result<usize> {
        let mut done = 0;
        while done < len {
            if self.next == POOL {
                match self.refill() {
                    Err(_) if done > 0 => break,
                    result => result?,
                }
            }
            let end = POOL.min(self.next + len - done);
            let bytes = &mut self.pool[self.next..end];
            buffer.write(done, bytes);
            bytes.zeroize();
            done += end - self.next;
            self.next = end;
        }
        Ok(done)
    }

    fn refill(&mut self) -> io::Result<()> {
        let mut have = 0;
        while have < POOL {
            match syscall::random(&mut self.pool[have..]) {
                Ok(more) => have += more,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => {
                    self.reset();
                    return Err(error);
                }
            }
        }
        self.next = 0;
        Ok(())
    }

    /// Forgets what was not handed out.
    pub(super) fn reset(&mut self) {
        self.pool.zeroize();
        self.next = POOL;
    }
}

impl Drop for KernelSource {
    fn drop(&mut self) {
        self.pool.zeroize();
    }
}

/// The kernel writes to guest memory. Fewer bytes than asked for if it cannot go on.
fn direct(buffer: &Segment, len: usize) -> io::Result<usize> {
    let mut done = 0;
    while done < len {
        match syscall::random_into(buffer, done, len - done) {
            Ok(written) => done += written,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) if done > 0 => break,
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
