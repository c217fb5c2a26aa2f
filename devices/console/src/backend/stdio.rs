//! This process's standard input and output. A terminal is put into raw mode, and what was there before comes back at every
//! end that a process can have a say in (`terminal.rs`).
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use rustix::fs::{FileType, Mode, OFlags};

use super::pty::size_of;
use super::terminal::{RawMode, Resizes};
use super::{Host, Output, Presence};
use crate::control::Size;

/// Keys that are read ahead of the guest; about as many wait in the terminal after that.
const TYPED: usize = 4096;

/// Ctrl-A: what follows is for us. The same as QEMU's.
const ESCAPE: u8 = 1;

/// The terminal, if it is one.
#[derive(Debug)]
pub(crate) struct Stdio {
    terminal: Option<Terminal>,
    /// Whether the last key was the escape.
    escaped: bool,
    /// What was typed, for the guest.
    typed: VecDeque<u8>,
    _flags: Vec<KeptFlags>,
}

#[derive(Debug)]
struct Terminal {
    fd: Arc<OwnedFd>,
    resizes: Resizes,
    _raw: RawMode,
}

impl Stdio {
    pub(crate) fn open() -> io::Result<Host> {
        let mut flags = Vec::new();
        let input = Arc::new(own(rustix::stdio::stdin(), OFlags::RDONLY, &mut flags)?);
        let output = Arc::new(own(rustix::stdio::stdout(), OFlags::WRONLY, &mut flags)?);
        let terminal = if rustix::termios::isatty(&input) {
            Some(Terminal {
                resizes: Resizes::new()?,
                _raw: RawMode::enter(input.as_fd())?,
                fd: input.clone(),
            })
        } else {
            None
        };
        let size = terminal.as_ref().map_or(Size::default(), |terminal| size_of(terminal.fd.as_fd()));
        let presence =
            Presence::Stdio(Stdio { terminal, escaped: false, typed: VecDeque::new(), _flags: flags });
        Ok(Host { presence, input: Some(input), output: Output::To(output), size, place: "stdio".into() })
    }

    /// Whether keys are pressed here: then [`Self::keys`] has to look at the input.
    pub(crate) fn is_terminal(&self) -> bool {
        self.terminal.is_some()
    }

    /// Tells when the terminal's size may have changed.
    pub(crate) fn resizes(&self) -> Option<&Resizes> {
        self.terminal.as_ref().map(|terminal| &terminal.resizes)
    }

    pub(crate) fn size(&self) -> Option<Size> {
        self.terminal.as_ref().map(|terminal| size_of(terminal.fd.as_fd()))
    }

    /// Whether more keys can be typed ahead of the guest.
    pub(crate) fn has_room(&self) -> bool {
        self.typed.len() < TYPED
    }

    /// Keys were pressed. Our own are taken out: Ctrl-A x asks this process to end, Ctrl-A Ctrl-A is one Ctrl-A.
    pub(crate) fn type_keys(&mut self, keys: &[u8]) {
        for key in keys {
            match (std::mem::take(&mut self.escaped), *key) {
                (false, ESCAPE) => self.escaped = true,
                (true, b'x') => {
                    // As if it had come from outside, so that there is one way to end.
                    let _ = rustix::process::kill_process(
                        rustix::process::getpid(),
                        rustix::process::Signal::TERM,
                    );
                }
                (_, key) => self.typed.push_back(key),
            }
        }
    }

    /// What was typed and the guest does not have yet.
    pub(crate) fn typed(&self) -> [&[u8]; 2] {
        let (first, second) = self.typed.as_slices();
        [first, second]
    }

    /// The guest has the oldest `count` keys.
    pub(crate) fn taken(&mut self, count: usize) {
        self.typed.drain(..count.min(self.typed.len()));
    }
}

/// A descriptor of our own for one that others may share: it must not block, and theirs must not stop to.
fn own(fd: BorrowedFd<'_>, access: OFlags, kept: &mut Vec<KeptFlags>) -> io::Result<OwnedFd> {
    let is_file = rustix::fs::fstat(fd).is_ok_and(|stat| {
        let kind = FileType::from_raw_mode(stat.st_mode);
        kind == FileType::RegularFile
    });
    if is_file {
        // It never blocks, and opened anew it would begin at its start.
        return Ok(rustix::io::fcntl_dupfd_cloexec(fd, 3)?);
    }
    let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
    let flags = access | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    if let Ok(own) = rustix::fs::open(&path, flags, Mode::empty()) {
        return Ok(own);
    }
    // A socket, or another user's terminal: shared after all, and put back at the end.
    let own = rustix::io::fcntl_dupfd_cloexec(fd, 3)?;
    let before = rustix::fs::fcntl_getfl(&own)?;
    rustix::fs::fcntl_setfl(&own, before | OFlags::NONBLOCK)?;
    kept.push(KeptFlags { fd: rustix::io::fcntl_dupfd_cloexec(fd, 3)?, before });
    Ok(own)
}

/// Flags to put back.
#[derive(Debug)]
struct KeptFlags {
    fd: OwnedFd,
    before: OFlags,
}

impl Drop for KeptFlags {
    fn drop(&mut self) {
        let _ = rustix::fs::fcntl_setfl(&self.fd, self.before);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn our_own_keys_do_not_reach_the_guest() {
        let mut stdio = Stdio { terminal: None, escaped: false, typed: VecDeque::new(), _flags: Vec::new() };
        let mut filter = |text: &[u8]| {
            stdio.type_keys(text);
            let typed = stdio.typed().concat();
            stdio.taken(typed.len());
            typed
        };
        assert_eq!(filter(b"abc"), b"abc");
        assert_eq!(filter(b"a\x01\x01b"), b"a\x01b");
        // Half of it in one read, half in the next. An unknown key after the escape is a key.
        assert_eq!(filter(b"a\x01"), b"a");
        assert_eq!(filter(b"\x01c"), b"\x01c");
        assert_eq!(filter(b"\x01qx"), b"qx");
        assert!(stdio.has_room());
        stdio.type_keys(&[b'a'; TYPED]);
        assert!(!stdio.has_room());
    }
}
