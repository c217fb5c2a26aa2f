//! Where a guest's front-end connects, and the socket file behind it.
//!
//! A listener is bound once and stays bound until the daemon ends: between two front-ends there is no moment without
//! a socket. A socket file that nobody listens on (its owner was killed) is replaced, one with a live listener is
//! refused, and what is not a socket is never touched. On the way out a file is removed only if it is still the one
//! that was bound here.
use std::ffi::OsString;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

/// Longest path of a socket in bytes: `sun_path` is 108 bytes with the terminating zero.
const PATH_MAX: usize = 107;

/// Connections of control clients that may wait to be accepted.
const BACKLOG: i32 = 128;

/// How long a directory may be locked by another daemon that binds its socket there. That takes far below a millisecond,
/// unless the machine stands still in the middle of it.
const LOCKED: Duration = Duration::from_secs(2);

/// Where one guest's front-end comes from.
#[derive(Debug)]
pub enum Endpoint {
    /// A socket to be bound under this path.
    Path(PathBuf),
    /// A listening socket that the parent process made; its file, if any, is the parent's.
    Listener(UnixListener),
    /// A connection that exists already; the guest is over when it ends.
    Connected(UnixStream),
}

/// A socket path that cannot be used, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// No path at all.
    #[error("the socket path is empty; name a file, e.g. --socket-path /run/vm/device.sock")]
    Empty,
    /// The kernel's address is too short for it.
    #[error("socket path {path:?} has {len} bytes and a socket address holds {PATH_MAX}; use a shorter path")]
    TooLong {
        /// The path as given, with the guest's number.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// The directory does not exist.
    #[error("directory {0:?} of the socket does not exist; create it first")]
    NoDirectory(PathBuf),
    /// The parent is something else.
    #[error("{0:?} is not a directory; name a socket inside an existing directory")]
    NotDirectory(PathBuf),
    /// The directory does not let this user create files.
    #[error("directory {0:?} does not let this user create a socket; change its permissions or use another")]
    NotWritable(PathBuf),
    /// The name exists and is not a socket.
    #[error("{0:?} exists and is not a socket; remove it or choose another path")]
    NotSocket(PathBuf),
    /// Somebody serves that socket.
    #[error("another process listens on {0:?}; stop it or choose another path")]
    InUse(PathBuf),
    /// Any other refusal of the system.
    #[error("cannot {action} socket {path:?}: {source}")]
    System {
        /// What was attempted.
        action: &'static str,
        /// The socket.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
}

impl ListenError {
    fn system(action: &'static str, path: &Path, source: impl Into<io::Error>) -> Self {
        ListenError::System { action, path: path.to_owned(), source: source.into() }
    }
}

/// The path of guest `index`: exact without a count, with the number appended when a count is given (also of 1).
pub(crate) fn guest_path(base: &Path, index: Option<u32>) -> PathBuf {
    let Some(index) = index else { return base.to_owned() };
    let mut name = OsString::from(base);
    name.push(index.to_string());
    PathBuf::from(name)
}

/// Says why a socket could not be bound to `path`, without creating anything.
pub(crate) fn check(path: &Path) -> Result<(), ListenError> {
    let bytes = path.as_os_str().as_bytes();
    if bytes.is_empty() {
        return Err(ListenError::Empty);
    }
    if bytes.len() > PATH_MAX {
        return Err(ListenError::TooLong { path: path.to_owned(), len: bytes.len() });
    }
    let parent = parent(path);
    match std::fs::metadata(parent) {
        Ok(meta) if !meta.is_dir() => return Err(ListenError::NotDirectory(parent.to_owned())),
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(ListenError::NoDirectory(parent.to_owned()));
        }
        Err(error) if error.kind() == io::ErrorKind::NotADirectory => {
            return Err(ListenError::NotDirectory(parent.to_owned()));
        }
        Err(error) => return Err(ListenError::system("look for", path, error)),
    }
    let wanted = rustix::fs::Access::WRITE_OK | rustix::fs::Access::EXEC_OK;
    if rustix::fs::access(parent, wanted).is_err() {
        return Err(ListenError::NotWritable(parent.to_owned()));
    }
    occupied(path).map(|_stale| ())
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        // The root has no parent; it is a directory and refused as such.
        None => path,
        Some(_) => Path::new("."),
    }
}

/// Whether a stale socket is in the way: `Ok(true)` if so, an error if something is there that must stay.
fn occupied(path: &Path) -> Result<bool, ListenError> {
    // A name with a slash at its end can only be a directory.
    if path.as_os_str().as_bytes().ends_with(b"/") {
        return Err(ListenError::NotSocket(path.to_owned()));
    }
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(ListenError::system("look for", path, error)),
        Ok(meta) if !meta.file_type().is_socket() => Err(ListenError::NotSocket(path.to_owned())),
        Ok(_) => is_live(path).map(|live| !live).and_then(|stale| match stale {
            true => Ok(true),
            false => Err(ListenError::InUse(path.to_owned())),
        }),
    }
}

/// Whether a process has the socket at `path` open: only then is a connection not refused outright.
fn is_live(path: &Path) -> Result<bool, ListenError> {
    let fail = |errno: Errno| ListenError::system("probe", path, errno);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let probe =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(fail)?;
    let address = SocketAddrUnix::new(path).map_err(fail)?;
    match rustix::net::connect(&probe, &address) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        // Connected, a full backlog, a datagram socket, no permission: somebody's.
        _ => Ok(true),
    }
}

/// A listening socket, and the file to remove with it.
#[derive(Debug)]
pub(crate) struct Listener {
    socket: UnixListener,
    #[expect(dead_code, reason = "held for its drop")]
    file: Option<SocketFile>,
}

/// A socket file that this process made: removed on drop if it is still the same.
#[derive(Debug)]
struct SocketFile {
    path: PathBuf,
    device: u64,
    inode: u64,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let same = std::fs::symlink_metadata(&self.path)
            .is_ok_and(|meta| meta.dev() == self.device && meta.ino() == self.inode);
        if same && let Err(error) = std::fs::remove_file(&self.path) {
            tracing::warn!(path = ?self.path, %error, "the socket stays behind");
        }
    }
}

/// Keeps two daemons that start at once from taking each other's socket for a stale one. Advisory, and not vital: a
/// directory that cannot be locked, or that somebody keeps locked for [`LOCKED`], is used without.
fn lock_directory(path: &Path) -> Option<File> {
    let directory = File::open(parent(path)).ok()?;
    let deadline = Instant::now() + LOCKED;
    loop {
        match rustix::fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => return Some(directory),
            Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(1));
            }
            Err(_) => return None,
        }
    }
}

impl Listener {
    /// Binds `path`, replacing a stale socket.
    pub(crate) fn bind(path: &Path) -> Result<Listener, ListenError> {
        Listener::bind_as(path, |path| UnixListener::bind(path))
    }

    fn bind_as(
        path: &Path,
        bind: impl FnOnce(&Path) -> io::Result<UnixListener>,
    ) -> Result<Listener, ListenError> {
        check(path)?;
        let _lock = lock_directory(path);
        if occupied(path)? {
            tracing::info!(?path, "replacing a socket that nobody listens on");
            std::fs::remove_file(path).map_err(|error| ListenError::system("replace", path, error))?;
        }
        let socket = bind(path).map_err(|error| ListenError::system("listen on", path, error))?;
        // From here on the file is ours to remove, whatever fails.
        let file = std::fs::symlink_metadata(path)
            .map(|meta| SocketFile { path: path.to_owned(), device: meta.dev(), inode: meta.ino() })
            .map_err(|error| ListenError::system("find", path, error))?;
        let listener = Listener { socket, file: Some(file) };
        listener.socket.set_nonblocking(true).map_err(|error| ListenError::system("prepare", path, error))?;
        Ok(listener)
    }

    /// As [`Listener::bind`], for this user alone: the file has mode 0600 from the moment when it is there.
    pub(crate) fn bind_private(path: &Path) -> Result<Listener, ListenError> {
        Listener::bind_as(path, |path| {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
            // Linux makes the file with the mode of the socket itself (unix(7): subject to the umask).
            rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
            rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
            rustix::net::listen(&socket, BACKLOG)?;
            Ok(UnixListener::from(socket))
        })
    }

    /// Takes a socket that listens already; its file belongs to who made it.
    pub(crate) fn adopt(socket: UnixListener) -> io::Result<Listener> {
        socket.set_nonblocking(true)?;
        Ok(Listener { socket, file: None })
    }

    /// The next connection, or `None` if nobody waits.
    pub(crate) fn accept(&self) -> io::Result<Option<UnixStream>> {
        match self.socket.accept() {
            Ok((stream, _)) => Ok(Some(stream)),
            Err(error) => match error.kind() {
                // The client went away again, or a signal came: nobody waits, so far as this call can tell.
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(error),
            },
        }
    }
}

impl std::os::fd::AsFd for Listener {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Raises the soft limit of open descriptors to the hard one: with a few hundred memory slots and some queues per
/// guest, the customary 1024 are soon used up.
pub(crate) fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        // Refused means: the limit stays, and exhaustion is an error of the guest that meets it.
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio_testkit::daemon::TempDir;

    fn error(path: impl AsRef<Path>) -> ListenError {
        Listener::bind(path.as_ref()).map(|_| ()).unwrap_err()
    }

    #[test]
    fn paths_that_cannot_work_are_refused_before_anything_is_created() {
        let dir = TempDir::new();
        assert!(matches!(check(Path::new("")), Err(ListenError::Empty)));
        let long = dir.path().join("x".repeat(108));
        assert!(matches!(check(&long), Err(ListenError::TooLong { len, .. }) if len > PATH_MAX));
        assert!(matches!(check(&dir.path().join("no/such")), Err(ListenError::NoDirectory(_))));
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(check(&file.join("below")), Err(ListenError::NotDirectory(_))));
        assert!(matches!(check(&file), Err(ListenError::NotSocket(_))));
        assert!(matches!(check(dir.path()), Err(ListenError::NotSocket(_))));
        assert!(matches!(check(Path::new("/")), Err(ListenError::NotSocket(_))));
        assert!(matches!(check(&dir.path().join("name/")), Err(ListenError::NotSocket(_))));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn the_longest_path_that_fits_is_accepted() {
        let dir = TempDir::new();
        let room = PATH_MAX - dir.path().as_os_str().len() - 1;
        let path = dir.path().join("y".repeat(room));
        let _listener = Listener::bind(&path).unwrap();
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn a_file_that_is_no_socket_is_never_removed() {
        let dir = TempDir::new();
        let file = dir.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(matches!(error(&file), ListenError::NotSocket(_)));
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&file, &link).unwrap();
        assert!(matches!(error(&link), ListenError::NotSocket(_)));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }

    #[test]
    fn a_stale_socket_is_replaced_and_a_live_one_refused() {
        let dir = TempDir::new();
        let path = dir.path().join("s");
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "std leaves the file behind");
        let live = Listener::bind(&path).unwrap();
        assert!(matches!(error(&path), ListenError::InUse(_)));
        UnixStream::connect(&path).unwrap();
        assert!(live.accept().unwrap().is_some(), "the live one was not disturbed");
    }

    #[test]
    fn a_live_datagram_socket_is_left_alone() {
        let dir = TempDir::new();
        let path = dir.path().join("s");
        let _owner = std::os::unix::net::UnixDatagram::bind(&path).unwrap();
        assert!(matches!(error(&path), ListenError::InUse(_)));
    }

    #[test]
    fn the_file_goes_with_the_listener_unless_it_is_another_by_now() {
        let dir = TempDir::new();
        let path = dir.path().join("s");
        drop(Listener::bind(&path).unwrap());
        assert!(!path.exists());

        let first = Listener::bind(&path).unwrap();
        std::fs::rename(&path, dir.path().join("moved")).unwrap();
        let second = Listener::bind(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn numbers_are_appended_only_when_a_count_is_given() {
        let base = Path::new("/run/vm/rng.sock");
        assert_eq!(guest_path(base, None), base);
        assert_eq!(guest_path(base, Some(0)), Path::new("/run/vm/rng.sock0"));
        assert_eq!(guest_path(base, Some(12)), Path::new("/run/vm/rng.sock12"));
    }
}
