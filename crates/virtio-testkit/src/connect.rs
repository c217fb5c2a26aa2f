//! Connecting to a back-end, not for ever.
use std::io;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use vhost_user::{Error, FrontendEndpoint};

/// Connects to a vhost-user socket, waiting at most `patience` for somebody to listen on it and to have room for the
/// connection.
pub fn connect(path: impl AsRef<Path>, patience: Duration) -> Result<FrontendEndpoint, Error> {
    let address = SocketAddrUnix::new(path.as_ref()).map_err(io::Error::from)?;
    let deadline = Instant::now() + patience;
    loop {
        // A blocking one would wait without an end while the queue of connections is full.
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(io::Error::from)?;
        match rustix::net::connect(&socket, &address) {
            Ok(()) => return Ok(FrontendEndpoint::new(UnixStream::from(socket))),
            Err(Errno::NOENT | Errno::CONNREFUSED | Errno::AGAIN | Errno::INTR)
                if Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(error) => return Err(Error::Io(error.into())),
        }
    }
}
