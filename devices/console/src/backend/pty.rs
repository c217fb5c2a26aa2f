//! A pseudo-terminal. The kernel does not tell the master's side when somebody opens the other one, but it does tell who
//! watches the file: so a client that only looks is noticed, too.
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::fs::{Mode, OFlags, inotify};
use rustix::pty::OpenptFlags;
use rustix::termios::OptionalActions;

use super::{Host, Output, Presence, is_hung_up};
use crate::control::Size;

/// The master's side.
#[derive(Debug)]
pub(crate) struct Pty {
    master: Arc<OwnedFd>,
    /// Openings and closings of the other side.
    notices: OwnedFd,
    _link: Option<Link>,
}

/// A symbolic link, removed at the end.
#[derive(Debug)]
struct Link {
    path: PathBuf,
    target: PathBuf,
}

impl Pty {
    pub(crate) fn open(link: Option<&Path>) -> io::Result<Host> {
        let master = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        rustix::pty::grantpt(&master)?;
        rustix::pty::unlockpt(&master)?;
        rustix::io::ioctl_fionbio(&master, true)?;
        let name = rustix::pty::ptsname(&master, Vec::new())?;
        let path = PathBuf::from(name.to_str().map_err(io::Error::other)?);
        {
            // Opened and closed once: from then on its absence can be seen. The guest has its own line discipline: two
            // would echo twice.
            let other =
                rustix::fs::open(&path, OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC, Mode::empty())?;
            let mut settings = rustix::termios::tcgetattr(&other)?;
            settings.make_raw();
            rustix::termios::tcsetattr(&other, OptionalActions::Now, &settings)?;
        }
        let notices = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        let events = inotify::WatchFlags::OPEN | inotify::WatchFlags::CLOSE;
        inotify::add_watch(&notices, &path, events)?;
        let link = link.map(|link| Link::new(link, &path)).transpose()?;
        let master = Arc::new(master);
        let pty = Pty { master: master.clone(), notices, _link: link };
        let place = path.display().to_string();
        let (size, presence) = (Size::default(), Presence::Pty(pty));
        Ok(Host { presence, input: Some(master), output: Output::Nobody, size, place })
    }

    /// Whether somebody has the other side open.
    pub(crate) fn is_open(&self) -> bool {
        !is_hung_up(self.master.as_fd())
    }

    /// To write to, while somebody is there.
    pub(crate) fn output(&self) -> Output {
        Output::To(self.master.clone())
    }

    /// What there is to watch.
    pub(crate) fn notices(&self) -> BorrowedFd<'_> {
        self.notices.as_fd()
    }

    /// Takes the notices: that there were some is all that they say.
    pub(crate) fn take_notices(&self) {
        let mut buffer = [0; 4096];
        while rustix::io::read(&self.notices, &mut buffer).is_ok_and(|count| count > 0) {}
    }

    /// The size that the other side has set.
    pub(crate) fn size(&self) -> Size {
        size_of(self.master.as_fd())
    }
}

/// The size of a terminal; unknown if it is none.
pub(super) fn size_of(terminal: BorrowedFd<'_>) -> Size {
    rustix::termios::tcgetwinsize(terminal)
        .map(|size| Size { cols: size.ws_col, rows: size.ws_row })
        .unwrap_or_default()
}

impl Link {
    /// A link that another process has left is replaced, a file is not.
    fn new(path: &Path, target: &Path) -> io::Result<Link> {
        if std::fs::symlink_metadata(path).is_ok_and(|meta| meta.is_symlink()) {
            std::fs::remove_file(path)?;
        }
        std::os::unix::fs::symlink(target, path)?;
        Ok(Link { path: path.to_owned(), target: target.to_owned() })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        if std::fs::read_link(&self.path).is_ok_and(|target| target == self.target) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
