//! Descriptors that another process handed to this one: `--fd N`, `--ready-fd N`, systemd's `LISTEN_FDS`.
//!
//! Invariant: a number becomes an owned descriptor at most once, and only if it was inherited. Everything that Rust
//! opens is close-on-exec, and what is close-on-exec cannot have been inherited; so a number without that flag came
//! from outside, and taking it sets the flag. This module holds the `unsafe` that this needs.
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::fs::OFlags;
use rustix::io::{Errno, FdFlags};
use rustix::net::{AddressFamily, SocketType, sockopt};

use crate::listen::Endpoint;

/// First descriptor of systemd's socket activation (`SD_LISTEN_FDS_START`).
const LISTEN_FDS_START: RawFd = 3;

/// A descriptor number that cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum FdError {
    /// 0, 1 and 2 keep their usual meaning (vhost-user, "Backend program conventions").
    #[error("descriptor {0} is standard input, output or error; pass the file under a number from 3 up")]
    Standard(RawFd),
    /// No such number.
    #[error("{0} is not a descriptor number; pass a number from 3 up")]
    Negative(RawFd),
    /// Nothing was passed under that number.
    #[error(
        "descriptor {0} is not open; let the parent pass it without close-on-exec (in a shell: `{0}<>file`)"
    )]
    NotOpen(RawFd),
    /// The number belongs to this process itself, or was named twice.
    #[error("descriptor {0} was not inherited or is already in use; name each passed descriptor once")]
    NotInherited(RawFd),
    /// Not a socket.
    #[error("descriptor {0} is not a socket; pass a connected or listening Unix stream socket")]
    NotSocket(RawFd),
    /// A socket that vhost-user cannot run over.
    #[error(
        "descriptor {0} is not a Unix stream socket, and only those can carry descriptors; pass one of those"
    )]
    NotUnixStream(RawFd),
    /// Neither connected nor listening.
    #[error(
        "socket {0} is neither connected nor listening; connect it, or call listen() on it, before passing it"
    )]
    Idle(RawFd),
    /// Not open for writing.
    #[error("descriptor {0} is not open for writing; pass the writing end")]
    NotWritable(RawFd),
}

/// Checks that `fd` is an inherited descriptor beyond the standard ones.
fn inherited<'a>(fd: RawFd) -> Result<BorrowedFd<'a>, FdError> {
    match fd {
        i32::MIN..=-1 => return Err(FdError::Negative(fd)),
        0..=2 => return Err(FdError::Standard(fd)),
        _ => {}
    }
    // SAFETY: the number is not -1. It may be closed; every use below is a system call that then reports EBADF.
    let borrowed = unsafe { BorrowedFd::borrow_raw(fd) };
    match rustix::io::fcntl_getfd(borrowed) {
        Err(_) => Err(FdError::NotOpen(fd)),
        Ok(flags) if flags.contains(FdFlags::CLOEXEC) => Err(FdError::NotInherited(fd)),
        Ok(_) => Ok(borrowed),
    }
}

/// Takes a descriptor that [`inherited`] accepted.
fn take(borrowed: BorrowedFd<'_>, fd: RawFd) -> Result<OwnedFd, FdError> {
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC).map_err(|_| FdError::NotOpen(fd))?;
    // SAFETY: the descriptor is open and was inherited, so no object of this process owns it; from now on it is
    // close-on-exec, so `inherited` refuses it and this is its only owner.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// What an inherited socket is, without taking it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Listening,
    Connected,
}

fn socket_kind(borrowed: BorrowedFd<'_>, fd: RawFd) -> Result<Kind, FdError> {
    let domain = sockopt::socket_domain(borrowed).map_err(|errno| match errno {
        Errno::BADF => FdError::NotOpen(fd),
        _ => FdError::NotSocket(fd),
    })?;
    let stream = sockopt::socket_type(borrowed).map_err(|_| FdError::NotSocket(fd))?;
    if domain != AddressFamily::UNIX || stream != SocketType::STREAM {
        return Err(FdError::NotUnixStream(fd));
    }
    if sockopt::socket_acceptconn(borrowed).map_err(|_| FdError::NotSocket(fd))? {
        return Ok(Kind::Listening);
    }
    // A peer that is gone already still counts: its end of file is noticed when it is served.
    rustix::net::getpeername(borrowed).map_err(|_| FdError::Idle(fd)).map(|_| Kind::Connected)
}

/// Checks all of `fds` before taking the first, then takes them.
pub(crate) fn sockets(fds: &[RawFd]) -> Result<Vec<Endpoint>, FdError> {
    let mut checked = Vec::with_capacity(fds.len());
    for (i, &fd) in fds.iter().enumerate() {
        let borrowed = inherited(fd)?;
        if fds[..i].contains(&fd) {
            return Err(FdError::NotInherited(fd));
        }
        checked.push((fd, borrowed, socket_kind(borrowed, fd)?));
    }
    checked
        .into_iter()
        .map(|(fd, borrowed, kind)| {
            let owned = take(borrowed, fd)?;
            Ok(match kind {
                Kind::Listening => Endpoint::Listener(UnixListener::from(owned)),
                Kind::Connected => Endpoint::Connected(UnixStream::from(owned)),
            })
        })
        .collect()
}

/// The descriptors of systemd's protocol: `count` numbers from 3 up.
pub(crate) fn activation_fds(count: u32) -> Vec<RawFd> {
    (LISTEN_FDS_START..).take(count as usize).collect()
}

/// Takes the descriptor of `--ready-fd`.
pub(crate) fn ready_fd(fd: RawFd) -> Result<OwnedFd, FdError> {
    let borrowed = inherited(fd)?;
    let flags = rustix::fs::fcntl_getfl(borrowed).map_err(|_| FdError::NotOpen(fd))?;
    if !flags.intersects(OFlags::WRONLY | OFlags::RDWR) {
        return Err(FdError::NotWritable(fd));
    }
    take(borrowed, fd)
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsFd, IntoRawFd};

    use super::*;

    /// Gives a descriptor away as a parent process would: without close-on-exec.
    fn pass(fd: impl Into<OwnedFd>) -> RawFd {
        let fd: OwnedFd = fd.into();
        rustix::io::fcntl_setfd(fd.as_fd(), FdFlags::empty()).unwrap();
        fd.into_raw_fd()
    }

    #[test]
    fn a_connected_and_a_listening_socket_are_told_apart() {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        let dir = virtio_testkit::daemon::TempDir::new();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let fds = [pass(ours), pass(listener)];
        let endpoints = sockets(&fds).unwrap();
        assert!(matches!(endpoints[..], [Endpoint::Connected(_), Endpoint::Listener(_)]));
        assert_eq!(sockets(&fds[..1]).unwrap_err(), FdError::NotInherited(fds[0]), "owned once only");
    }

    #[test]
    fn numbers_that_are_no_vhost_user_socket_are_refused_and_stay_untouched() {
        assert_eq!(sockets(&[-1]).unwrap_err(), FdError::Negative(-1));
        assert_eq!(sockets(&[1]).unwrap_err(), FdError::Standard(1));
        assert_eq!(sockets(&[1_000_000]).unwrap_err(), FdError::NotOpen(1_000_000));

        let own = std::fs::File::open("/dev/null").unwrap().into_raw_fd();
        assert_eq!(sockets(&[own]).unwrap_err(), FdError::NotInherited(own));
        let file = pass(std::fs::File::open("/dev/null").unwrap());
        assert_eq!(sockets(&[file]).unwrap_err(), FdError::NotSocket(file));
        let datagram = pass(std::os::unix::net::UnixDatagram::unbound().unwrap());
        assert_eq!(sockets(&[datagram]).unwrap_err(), FdError::NotUnixStream(datagram));
        let idle = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
        let idle = pass(idle);
        assert_eq!(sockets(&[idle]).unwrap_err(), FdError::Idle(idle));

        let (ours, _theirs) = UnixStream::pair().unwrap();
        let good = pass(ours);
        assert!(sockets(&[good, idle]).is_err());
        assert!(sockets(&[good, good]).is_err());
        assert!(sockets(&[good]).is_ok(), "a refused list takes nothing");
    }

    #[test]
    fn the_ready_descriptor_must_be_writable() {
        let reader = pass(std::fs::File::open("/dev/null").unwrap());
        assert_eq!(ready_fd(reader).unwrap_err(), FdError::NotWritable(reader));
        let writer = pass(std::fs::OpenOptions::new().write(true).open("/dev/null").unwrap());
        assert!(ready_fd(writer).is_ok());
        assert_eq!(ready_fd(1).unwrap_err(), FdError::Standard(1));
    }

    #[test]
    fn activation_descriptors_start_at_three() {
        assert_eq!(activation_fds(3), [3, 4, 5]);
        assert!(activation_fds(0).is_empty());
    }
}
