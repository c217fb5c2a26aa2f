//! Sockets that clients connect to: Unix and TCP, one client at a time, the next ones wait in the listen queue.
use std::io;
use std::net::TcpListener;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Clients that may wait for the one that is there.
const WAITING: i32 = 8;

/// A bound socket; a Unix socket's path is removed with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: OwnedFd,
    bound: Bound,
}

#[derive(Debug)]
enum Bound {
    Tcp(String),
    /// The path, and which file it was.
    Unix(PathBuf, (u64, u64)),
}

impl Listener {
    /// Listens on a path, for this user alone: who connects sits at the guest's console. What a process that was killed
    /// has left there is replaced.
    pub(crate) fn unix(path: &Path) -> io::Result<Listener> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
        let address = SocketAddrUnix::new(path)?;
        match rustix::net::bind(&socket, &address) {
            Err(Errno::ADDRINUSE) if is_abandoned(path) => {
                std::fs::remove_file(path)?;
                rustix::net::bind(&socket, &address)?;
            }
            result => result?,
        }
        // Nobody can connect before it listens.
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        rustix::net::listen(&socket, WAITING)?;
        let meta = std::fs::symlink_metadata(path)?;
        Ok(Listener { socket, bound: Bound::Unix(path.to_owned(), (meta.dev(), meta.ino())) })
    }

    pub(crate) fn tcp(host: &str, port: u16) -> io::Result<Listener> {
        let host = host.trim_start_matches('[').trim_end_matches(']');
        let listener = TcpListener::bind((host, port))?;
        listener.set_nonblocking(true)?;
        let place = format!("tcp:{}", listener.local_addr()?);
        Ok(Listener { socket: listener.into(), bound: Bound::Tcp(place) })
    }

    pub(crate) fn place(&self) -> String {
        match &self.bound {
            Bound::Tcp(place) => place.clone(),
            Bound::Unix(path, _) => format!("unix:{}", path.display()),
        }
    }

    /// Whether the end of a client's sending can be told from its end: not over TCP, where both are the same on the wire.
    pub(crate) fn can_half_close(&self) -> bool {
        matches!(self.bound, Bound::Unix(..))
    }

    /// The next client, if one waits.
    pub(crate) fn accept(&self) -> io::Result<Option<OwnedFd>> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        loop {
            match rustix::net::accept_with(&self.socket, flags) {
                Ok(client) => {
                    if let Bound::Tcp(_) = self.bound {
                        // A keystroke is not worth a delay; without this it merely has one.
                        let _ = rustix::net::sockopt::set_tcp_nodelay(&client, true);
                    }
                    return Ok(Some(client));
                }
                Err(Errno::AGAIN) => return Ok(None),
                // It was gone before it got here.
                Err(Errno::INTR | Errno::CONNABORTED | Errno::PROTO) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Bound::Unix(path, file) = &self.bound
            && std::fs::symlink_metadata(path).is_ok_and(|meta| (meta.dev(), meta.ino()) == *file)
        {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// A socket that nobody listens on.
fn is_abandoned(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_ok_and(|meta| meta.file_type().is_socket())
        && UnixStream::connect(path).is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
}
