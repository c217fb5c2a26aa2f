//! Unix sockets of the host, in the layout that Firecracker, Cloud Hypervisor and rust-vmm share.
//!
//! A connection of the guest to port P of the host goes to `<path>_<P>`, of the type that the guest wants. A client on
//! the host connects to `<path>` (STREAM) or `<path>.seqpacket` (SEQPACKET) and says `CONNECT <port>\n`; it hears
//! `OK <its port>\n` when the guest has accepted, or its connection ends.
use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, sockopt};

use super::{Dialed, HostError, Listener, socket_type};
use crate::packet::Kind;

/// Longest path of a socket in bytes: `sun_path` is 108 bytes with the terminating zero.
pub(super) const PATH_MAX: usize = 107;
/// What is appended at most: `_4294967295`, or `.seqpacket`.
const SUFFIX_MAX: usize = 11;
/// Clients that may wait to be accepted.
const BACKLOG: i32 = 1024;
/// Longest CONNECT line: with `CONNECT `, ten digits, the end of the line, and something to spare.
pub(crate) const LINE_MAX: usize = 32;

/// The file of a listener, removed with it unless it is another one by then.
pub(super) struct SocketFile {
    path: PathBuf,
    identity: Option<(u64, u64)>,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if self.identity.is_some() && identity(&self.path) == self.identity {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    std::fs::symlink_metadata(path).ok().map(|meta| (meta.dev(), meta.ino()))
}

fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    PathBuf::from(name)
}

fn new_socket(kind: Kind) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    rustix::net::socket_with(AddressFamily::UNIX, socket_type(kind), flags, None)
}

pub(super) fn listen(path: &Path) -> Result<Vec<Listener>, HostError> {
    if path.as_os_str().is_empty() || path.as_os_str().as_bytes().len() > PATH_MAX - SUFFIX_MAX {
        return Err(HostError::TooLong { path: path.to_owned() });
    }
    Ok(vec![bind(path, Kind::Stream)?, bind(&with_suffix(path, ".seqpacket"), Kind::SeqPacket)?])
}

fn bind(path: &Path, kind: Kind) -> Result<Listener, HostError> {
    let failed = |source| HostError::System { name: format!("{path:?}"), source };
    let address = SocketAddrUnix::new(path).map_err(failed)?;
    let socket = new_socket(kind).map_err(failed)?;
    match rustix::net::bind(&socket, &address) {
        Err(Errno::ADDRINUSE) => {
            make_way(path, kind, &address)?;
            rustix::net::bind(&socket, &address).map_err(failed)?;
        }
        other => other.map_err(failed)?,
    }
    let file = SocketFile { path: path.to_owned(), identity: identity(path) };
    rustix::net::listen(&socket, BACKLOG).map_err(failed)?;
    Ok(Listener { socket, kind, port: None, _file: Some(file) })
}

/// Removes a socket that nobody listens on: its owner was killed. Nothing else is touched.
fn make_way(path: &Path, kind: Kind, address: &SocketAddrUnix) -> Result<(), HostError> {
    let failed = |source| HostError::System { name: format!("{path:?}"), source };
    if !std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket()) {
        return Err(HostError::NotSocket(path.to_owned()));
    }
    let probe = new_socket(kind).map_err(failed)?;
    match rustix::net::connect(&probe, address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => {
            let _ = std::fs::remove_file(path);
            Ok(())
        }
        _ => Err(HostError::InUse(path.to_owned())),
    }
}

pub(super) fn dial(path: &Path, kind: Kind, port: u32, longest_message: u32) -> Dialed {
    let connected = || {
        let address = SocketAddrUnix::new(with_suffix(path, &format!("_{port}")))?;
        let socket = new_socket(kind)?;
        if kind == Kind::SeqPacket {
            set_longest_message(&socket, longest_message);
        }
        rustix::net::connect(&socket, &address)?;
        Ok(socket)
    };
    match connected() {
        Ok(socket) => Dialed::Connected(socket),
        // Its listener has not accepted those that came before; a Unix socket does not connect later by itself.
        Err(Errno::AGAIN) => Dialed::Busy,
        Err(error) => Dialed::Refused(error),
    }
}

/// A message has to fit into the sender's buffer; the kernel doubles what it is told, and keeps 32 bytes (unix(7) does
/// not say so, its code does).
pub(super) fn set_longest_message(socket: &OwnedFd, longest: u32) {
    let _ = sockopt::set_socket_send_buffer_size(socket, longest as usize);
}

pub(super) fn longest_message(wanted: u32) -> u32 {
    let found = new_socket(Kind::SeqPacket).and_then(|socket| {
        set_longest_message(&socket, wanted);
        sockopt::socket_send_buffer_size(socket.as_fd())
    });
    u32::try_from(found.unwrap_or(0).saturating_sub(64)).unwrap_or(u32::MAX).max(4096)
}

/// The port of a CONNECT line and its length; none yet; or nonsense.
pub(crate) fn connect_line(bytes: &[u8]) -> Result<Option<(u32, usize)>, ()> {
    const WORD: &[u8] = b"CONNECT ";
    let Some(end) = bytes.iter().take(LINE_MAX).position(|byte| *byte == b'\n') else {
        let prefix = bytes.len().min(WORD.len());
        let plausible = bytes.len() < LINE_MAX && bytes.get(..prefix) == WORD.get(..prefix);
        return if plausible { Ok(None) } else { Err(()) };
    };
    let line = bytes.get(..end).ok_or(())?;
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    let digits = line.strip_prefix(WORD).ok_or(())?;
    if digits.is_empty() || !digits.iter().all(u8::is_ascii_digit) {
        return Err(());
    }
    let port = std::str::from_utf8(digits).ok().and_then(|digits| digits.parse().ok()).ok_or(())?;
    Ok(Some((port, end + 1)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn connect_lines() {
        assert_eq!(connect_line(b"CONNECT 52\n"), Ok(Some((52, 11))));
        assert_eq!(connect_line(b"CONNECT 52\r\nhello"), Ok(Some((52, 12))));
        assert_eq!(connect_line(b"CONNECT 4294967295\nCONNECT 1\n"), Ok(Some((u32::MAX, 19))));
        for some in [&b""[..], b"C", b"CONNECT", b"CONNECT ", b"CONNECT 5"] {
            assert_eq!(connect_line(some), Ok(None), "{some:?}");
        }
        let long = vec![b'1'; 1 << 20];
        for nonsense in [
            &b"\n"[..],
            b"GET / HTTP/1.1\r\n",
            b"connect 5\n",
            b"CONNECT\n",
            b"CONNECT \n",
            b"CONNECT -1\n",
            b"CONNECT +1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"CONNECT 5\0\n",
            b"CONNECT 000000000000000000000000000000000000001\n",
            &long,
        ] {
            assert_eq!(connect_line(nonsense), Err(()), "{:?}", &nonsense[..nonsense.len().min(40)]);
        }
    }
}
