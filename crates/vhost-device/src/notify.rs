//! Telling who started the daemon that its sockets accept connections: systemd's `NOTIFY_SOCKET` and `--ready-fd`.
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};

/// What is written when the daemon is ready, to either place.
const READY: &[u8] = b"READY=1\n";
/// What systemd is told when the daemon begins to end.
const STOPPING: &[u8] = b"STOPPING=1\n";

/// Where readiness is announced. Failing to do so is logged and nothing more: the device works without.
#[derive(Debug, Default)]
pub(crate) struct Announcer {
    socket: Option<SocketAddr>,
    fd: Option<OwnedFd>,
}

impl Announcer {
    /// `socket` is the value of `NOTIFY_SOCKET`: a path, or an abstract name that starts with `@`.
    pub(crate) fn new(socket: Option<&OsStr>, fd: Option<OwnedFd>) -> Announcer {
        let socket = socket.filter(|name| !name.is_empty()).and_then(|name| match address(name) {
            Ok(address) => Some(address),
            Err(error) => {
                tracing::warn!(?name, %error, "NOTIFY_SOCKET cannot be used; readiness is not announced there");
                None
            }
        });
        Announcer { socket, fd }
    }

    /// All sockets accept connections.
    pub(crate) fn ready(&mut self) {
        self.tell(READY);
        if let Some(fd) = self.fd.take()
            && let Err(error) = File::from(fd).write_all(READY)
        {
            tracing::warn!(%error, "readiness could not be written to --ready-fd");
        }
    }

    /// The daemon ends.
    pub(crate) fn stopping(&mut self) {
        self.tell(STOPPING);
    }

    fn tell(&self, text: &[u8]) {
        let Some(address) = &self.socket else { return };
        let sent = UnixDatagram::unbound().and_then(|socket| {
            // A manager that does not read must not hold the device up.
            socket.set_nonblocking(true)?;
            socket.send_to_addr(text, address)
        });
        if let Err(error) = sent {
            tracing::warn!(%error, "the service manager could not be told");
        }
    }
}

fn address(name: &OsStr) -> io::Result<SocketAddr> {
    match name.as_bytes() {
        [b'@', name @ ..] => SocketAddr::from_abstract_name(name),
        [b'/', ..] => SocketAddr::from_pathname(name),
        _ => {
            Err(io::Error::new(io::ErrorKind::InvalidInput, "neither an absolute path nor an abstract name"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use super::*;
    use virtio_testkit::daemon::TempDir;

    #[test]
    fn peers_all_daemons_readiness_is_announced_on_a_path_and_an_abstract_name() {
        let dir = TempDir::new();
        let path = dir.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("vhost-device-test-{}", std::process::id());
        let by_name = SocketAddr::from_abstract_name(&name).unwrap();
        let by_name = UnixDatagram::bind_addr(&by_name).unwrap();
        for (socket, value) in [(by_path, path.into_os_string()), (by_name, format!("@{name}").into())] {
            let mut announcer = Announcer::new(Some(&value), None);
            announcer.ready();
            announcer.stopping();
            let mut buffer = [0; 64];
            let n = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], READY);
            let n = socket.recv(&mut buffer).unwrap();
            assert_eq!(&buffer[..n], STOPPING);
        }
    }

    #[test]
    fn the_ready_descriptor_gets_one_line_and_is_closed() {
        let (mut reader, writer) = io::pipe().unwrap();
        let mut announcer = Announcer::new(None, Some(writer.into()));
        announcer.ready();
        announcer.ready();
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        assert_eq!(text, "READY=1\n");
    }

    #[test]
    fn a_manager_that_is_gone_stops_nothing() {
        Announcer::new(Some(OsStr::new("/no/such/socket")), None).ready();
        Announcer::new(Some(OsStr::new("relative")), None).ready();
        Announcer::new(Some(OsStr::new("")), None).ready();
        let (reader, writer) = io::pipe().unwrap();
        drop(reader);
        Announcer::new(None, Some(writer.into())).ready();
    }
}
