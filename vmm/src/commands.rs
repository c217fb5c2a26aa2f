//! What can be asked of the machine while its guest runs: lines that come through a named pipe.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::str::FromStr;

use rustix::fs::{Mode, OFlags};

use crate::Result;
use crate::virtio::DeviceSpec;

/// Longest line.
const MAX_LINE: usize = 4096;

/// One line.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Command {
    /// `plug SLOT DEVICE`
    Plug(usize, DeviceSpec),
    /// `unplug SLOT`: the guest is asked to let go of what is in it.
    Unplug(usize),
    /// `pull SLOT`: the guest is not asked.
    Pull(usize),
    /// `show`: the PCI devices, with the addresses that the guest has given them.
    Show,
    /// `off`
    Off,
}

impl FromStr for Command {
    type Err = String;

    fn from_str(line: &str) -> std::result::Result<Command, String> {
        let slot = |text: &str| text.parse().map_err(|_| format!("{text:?} is no slot"));
        match line.split_whitespace().collect::<Vec<_>>()[..] {
            ["plug", number, device] => Ok(Command::Plug(slot(number)?, device.parse()?)),
            ["unplug", number] => Ok(Command::Unplug(slot(number)?)),
            ["pull", number] => Ok(Command::Pull(slot(number)?)),
            ["show"] => Ok(Command::Show),
            ["off"] => Ok(Command::Off),
            _ => Err("commands are plug SLOT DEVICE, unplug SLOT, pull SLOT, show and off".to_owned()),
        }
    }
}

pub(crate) struct Commands {
    pipe: File,
    /// The beginning of a line.
    partial: Vec<u8>,
}

impl Commands {
    pub(crate) fn open(path: &Path) -> Result<Commands> {
        // For writing, too, so that it does not end when a writer does.
        let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let pipe = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|error| format!("{}: {error}; make it with mkfifo", path.display()))?;
        Ok(Commands { pipe: pipe.into(), partial: Vec::new() })
    }

    /// The whole lines that have come.
    pub(crate) fn read(&mut self) -> Result<Vec<String>> {
        let mut room = [0; 4096];
        loop {
            match self.pipe.read(&mut room) {
                Ok(0) => break,
                Ok(len) => self.partial.extend(room.iter().take(len)),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error.into()),
            }
            if self.partial.len() > MAX_LINE {
                break;
            }
        }
        let whole = self.partial.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
        let rest = self.partial.split_off(whole);
        let lines = String::from_utf8_lossy(&self.partial).lines().map(str::to_owned).collect();
        self.partial = rest;
        if self.partial.len() > MAX_LINE {
            self.partial.clear();
        }
        Ok(lines)
    }
}

impl AsFd for Commands {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_and_refused() {
        assert_eq!("plug 2 rng".parse(), Ok(Command::Plug(2, "rng".parse().unwrap())));
        assert_eq!(" unplug  1 ".parse(), Ok(Command::Unplug(1)));
        assert_eq!("pull 1".parse(), Ok(Command::Pull(1)));
        for bad in ["", "plug", "plug x rng", "plug 1", "plug 1 net", "unplug", "show 1"] {
            assert!(bad.parse::<Command>().is_err(), "{bad}");
        }
    }
}
