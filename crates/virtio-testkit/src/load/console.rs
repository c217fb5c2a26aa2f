//! A console's output, and who takes it at the other end.
use std::io::Read;
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::{LoadError, Requests, pin_current_thread};
use crate::{Buf, TestRam, VhostUserDriver};

/// Where a reader finds a console's output.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outlet {
    /// Nobody has to take it: it goes to a file.
    File,
    /// A Unix socket.
    Unix(PathBuf),
    /// A TCP port of this machine.
    Tcp(u16),
}

/// How long the socket may be away, and the last bytes under way.
const PATIENCE: Duration = Duration::from_secs(5);

/// Output of port 0: one device-readable buffer a request.
#[derive(Debug)]
pub struct ConsoleOutput {
    size: u32,
    outlet: Outlet,
    sent: u64,
    taken: Arc<AtomicU64>,
}

impl ConsoleOutput {
    /// Buffers of `size` bytes. Who reads does so on the driver's CPU: it is part of what a byte costs.
    pub fn new(size: u32, outlet: Outlet) -> ConsoleOutput {
        ConsoleOutput { size, outlet, sent: 0, taken: Arc::default() }
    }

    fn connect(&self) -> std::io::Result<Option<Box<dyn Read + Send>>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let connected = match &self.outlet {
                Outlet::File => return Ok(None),
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
        Ok(u64::from(self.size))
    }

    fn verify(&mut self) -> Result<(), String> {
        let deadline = Instant::now() + PATIENCE;
        while self.outlet != Outlet::File && self.taken.load(Ordering::Relaxed) != self.sent {
            if Instant::now() > deadline {
                let taken = self.taken.load(Ordering::Relaxed);
                return Err(format!("{taken} of {} bytes came out", self.sent));
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }
}
