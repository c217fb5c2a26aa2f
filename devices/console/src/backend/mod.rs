//! The host's side of a port: files to read from and write to, and who tells when somebody is there.
//!
//! Nothing here blocks. Output goes from guest memory to the file, and input back, by one system call for many pieces. A
//! backend that fails costs the data at hand, never the device (failure policy 3).
mod pty;
mod socket;
mod stdio;
pub(crate) mod syscall;
mod terminal;

use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use crate::control::Size;
use crate::spec::Target;
pub(crate) use pty::Pty;
pub(crate) use socket::Listener;
pub(crate) use stdio::Stdio;
use syscall::Pieces;

/// A host's side that cannot be had.
#[derive(Debug, thiserror::Error)]
#[error("cannot open {target}: {source}; {advice}")]
pub struct OpenError {
    target: String,
    #[source]
    source: io::Error,
    advice: &'static str,
}

/// Where output goes.
#[derive(Clone, Debug)]
pub(crate) enum Output {
    /// Nobody is there: it is kept for who comes.
    Nobody,
    /// It is thrown away, as asked for.
    Nowhere,
    /// To this file.
    To(Arc<OwnedFd>),
}

/// Who decides whether somebody is there.
#[derive(Debug)]
pub(crate) enum Presence {
    /// Always: files.
    Always,
    /// Who connects.
    Socket(Listener),
    /// Who has the other end of the terminal open.
    Pty(Pty),
    /// Always: this process's own.
    Stdio(Stdio),
}

/// The host's side of a port as it was opened.
#[derive(Debug)]
pub(crate) struct Host {
    pub(crate) presence: Presence,
    pub(crate) input: Option<Arc<OwnedFd>>,
    pub(crate) output: Output,
    pub(crate) size: Size,
    /// Where it is, for people: a terminal's path, an address.
    pub(crate) place: String,
}

impl Host {
    /// Opens it. Does not block.
    pub(crate) fn open(target: &Target) -> Result<Host, OpenError> {
        let always = |output| Host {
            presence: Presence::Always,
            input: None,
            output,
            size: Size::default(),
            place: target.to_string(),
        };
        let (opened, advice) = match target {
            Target::Null => return Ok(always(Output::Nowhere)),
            Target::File(path) => (
                open_file(path).map(|file| always(Output::To(Arc::new(file)))),
                "name a file that can be written",
            ),
            Target::Stdio => (Stdio::open(), "start the daemon with open standard input and output"),
            Target::Pty(link) => {
                (Pty::open(link.as_deref()), "is devpts mounted, and the link's place free?")
            }
            Target::Unix(path) => {
                (Listener::unix(path).map(Host::of_listener), "name a path that nobody listens on")
            }
            Target::Tcp(host, port) => (
                Listener::tcp(host, *port).map(Host::of_listener),
                "name an address of this machine that is free",
            ),
        };
        opened.map_err(|source| OpenError { target: target.to_string(), source, advice })
    }

    fn of_listener(listener: Listener) -> Host {
        let place = listener.place();
        let presence = Presence::Socket(listener);
        Host { presence, input: None, output: Output::Nobody, size: Size::default(), place }
    }
}

fn open_file(path: &Path) -> io::Result<OwnedFd> {
    // A named pipe is opened for both: for writing alone it would have to have a reader.
    let is_fifo = std::fs::metadata(path).is_ok_and(|meta| meta.file_type().is_fifo());
    let mut options = OpenOptions::new();
    options
        .append(true)
        .create(true)
        .read(is_fifo)
        .mode(0o600)
        .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY);
    options.open(path).map(OwnedFd::from)
}

/// How a write ended.
#[derive(Debug)]
pub(crate) enum Wrote {
    Bytes(usize),
    /// Nothing goes in at the moment.
    Full,
    /// Who was there is gone.
    Gone,
    /// The guest's memory is gone (failure policy 6).
    Fault,
    Failed(io::Error),
}

/// How a read ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Got {
    Bytes(usize),
    Nothing,
    /// There will be no more.
    End,
    /// The guest's memory is gone (failure policy 6).
    Fault,
}

fn wrote(result: io::Result<usize>) -> Wrote {
    match result {
        // Nothing is written of nothing only; a file that takes no byte and says no more is full.
        Ok(0) => Wrote::Full,
        Ok(count) => Wrote::Bytes(count),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN | libc::EINTR) => Wrote::Full,
            Some(libc::EFAULT) => Wrote::Fault,
            Some(libc::EPIPE | libc::ECONNRESET | libc::ETIMEDOUT | libc::ENOTCONN) => Wrote::Gone,
            _ => Wrote::Failed(error),
        },
    }
}

fn got(result: io::Result<usize>) -> Got {
    match result {
        Ok(0) => Got::End,
        Ok(count) => Got::Bytes(count),
        Err(error) => match error.raw_os_error() {
            Some(libc::EAGAIN) => Got::Nothing,
            Some(libc::EFAULT) => Got::Fault,
            // EIO of a terminal whose other end is closed, errors of a connection: it gives nothing any more.
            _ => Got::End,
        },
    }
}

/// Writes guest memory.
pub(crate) fn write_guest(file: &OwnedFd, pieces: &Pieces<'_>) -> Wrote {
    wrote(syscall::write_from(file.as_fd(), pieces))
}

/// Writes our own memory.
pub(crate) fn write_own(file: &OwnedFd, slices: &[io::IoSlice<'_>]) -> Wrote {
    wrote(rustix::io::writev(file, slices).map_err(io::Error::from))
}

/// Reads into guest memory.
pub(crate) fn read_guest(file: &OwnedFd, pieces: &Pieces<'_>) -> Got {
    loop {
        match syscall::read_into(file.as_fd(), pieces) {
            Err(error) if error.raw_os_error() == Some(libc::EINTR) => {}
            result => return got(result),
        }
    }
}

/// Reads into our own memory.
pub(crate) fn read_own(file: &OwnedFd, bytes: &mut [u8]) -> Got {
    loop {
        match rustix::io::read(file, &mut *bytes) {
            Err(Errno::INTR) => {}
            result => return got(result.map_err(io::Error::from)),
        }
    }
}

/// Whether the other side of a file is gone for both directions.
pub(crate) fn is_hung_up(file: BorrowedFd<'_>) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::from_borrowed_fd(file, PollFlags::empty())];
    let known = poll(&mut fds, Some(&now)).is_ok();
    known && fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR))
}

/// What a read of a socket would find.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// Bytes, now or later.
    Bytes,
    /// The end.
    End,
}

/// Looks at the next byte of a socket without taking it.
pub(crate) fn next_is(socket: &OwnedFd) -> Next {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    match rustix::net::recv(socket, &mut [0; 1], flags) {
        Ok((count, _)) if count > 0 => Next::Bytes,
        Err(Errno::AGAIN | Errno::INTR) => Next::Bytes,
        _ => Next::End,
    }
}
