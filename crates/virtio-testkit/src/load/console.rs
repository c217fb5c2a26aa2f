//! A console's output, and who takes it at the other end.
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fs::FallocateFlags;
use vm_memory::VolatileSlice;

use super::{LoadError, Requests, pin_current_thread};
use crate::{Buf, TestRam, VhostUserDriver};

/// Where a reader finds a console's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlet {
    /// Nobody has to take it: it goes to a device that keeps nothing.
    File,
    /// A file that is there, of a file system that can give room back, and that is removed at the end.
    Kept(PathBuf),
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port of this machine.
    Tcp(u16),
}

/// How long the socket may be away, and the last bytes under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// Bytes that a file may take before its room is given back; its length stays.
const ROOM: u64 = 64 << 20;

/// Output of port 0: one device-readable buffer a request.
#[derive(Debug)]
pub struct ConsoleOutput {
    size: u32,
    outlet: Outlet,
    sent: u64,
    taken: Arc<AtomicU64>,
    file: Option<File>,
    /// Bytes of the file that take no room any more.
    emptied: u64,
}

impl ConsoleOutput {
    /// Buffers of `size` bytes. Who reads does so on the driver's CPU: it is part of what a byte costs.
    pub fn new(size: u32, outlet: Outlet) -> ConsoleOutput {
        ConsoleOutput { size, outlet, sent: 0, taken: Arc::default(), file: None, emptied: 0 }
    }

    /// Gives back the room of what has been written.
    fn empty(&mut self) -> Result<(), String> {
        let Some(file) = &self.file else { return Ok(()) };
        let how = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(file, how, self.emptied, self.sent - self.emptied)
            .map_err(|error| format!("giving room back: {error}"))?;
        self.emptied = self.sent;
        Ok(())
    }

    fn came_out(&self) -> Result<u64, String> {
        match &self.file {
            Some(file) => file.metadata().map(|of| of.len()).map_err(|error| error.to_string()),
            None if self.outlet == Outlet::File => Ok(self.sent),
            None => Ok(self.taken.load(Ordering::Relaxed)),
        }
    }

    fn connect(&self) -> std::io::Result<Option<Box<dyn Read + Send>>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let connected = match &self.outlet {
                Outlet::File | Outlet::Kept(_) => return Ok(None),
                Outlet::Unix(path) => {
                    UnixStream::connect(path).map(|stream| Box::new(stream) as Box<dyn Read + Send>)
                }
                Outlet::Tcp(port) => TcpStream::connect(("127.0.0.1", *port))
                    .map(|stream| Box::new(stream) as Box<dyn Read + Send>),
            };
            match connected {
                Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(5)),
                connected => return connected.map(Some),
            }
        }
    }
}

impl Requests for ConsoleOutput {
    fn negotiated(&mut self, _driver: &mut VhostUserDriver) -> Result<(), LoadError> {
        if let Outlet::Kept(path) = &self.outlet {
            let file = OpenOptions::new().write(true).open(path);
            self.file = Some(file.map_err(|error| LoadError::System("opening the console's file", error))?);
        }
        let reader = self.connect().map_err(|error| LoadError::System("connecting to the console", error))?;
        let Some(mut reader) = reader else { return Ok(()) };
        let taken = self.taken.clone();
        // It ends with the back-end.
        thread::spawn(move || {
            let _ = pin_current_thread();
            let mut buffer = vec![0; 256 << 10];
            while let Ok(count) = reader.read(&mut buffer)
                && count > 0
            {
                taken.fetch_add(count as u64, Ordering::Relaxed);
            }
        });
        Ok(())
    }

    fn chain(&mut self, slot: usize, ram: &TestRam) -> Vec<Buf> {
        let text: Vec<u8> = (0..self.size).map(|at| b' ' + ((at as usize + slot) % 95) as u8).collect();
        vec![ram.readable(&text)]
    }

    fn prepare(&mut self, _slot: usize, _buffers: &[VolatileSlice<'_>]) {}

    /// The length is not looked at: "some devices put the total descriptor length there" (5.3.6.3). The conformance suite does.
    fn check(&mut self, _slot: usize, _written: u32, _: &[VolatileSlice<'_>]) -> Result<u64, String> {
        self.sent += u64::from(self.size);
        if self.sent - self.emptied >= ROOM {
            self.empty()?;
        }
        Ok(u64::from(self.size))
    }

    fn verify(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let taken = self.came_out()?;
            if taken == self.sent {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(format!("{taken} of {} bytes came out", self.sent));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for ConsoleOutput {
    fn drop(&mut self) {
        if let Outlet::Kept(path) = &self.outlet {
            let _ = std::fs::remove_file(path);
        }
    }
}
