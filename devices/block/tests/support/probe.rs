//! An image that tells what was asked of it, and fails or hangs on demand.
#![allow(dead_code, reason = "each test binary uses what it needs")]
use std::io;
use std::sync::{Arc, Condvar, Mutex};

use virtio_block::backend::{Geometry, Image, MemoryImage, Payload, StillWanted};

/// A call of the device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Call {
    Read(u64),
    Write { offset: u64, stable: bool },
    Flush,
    Discard(u64, u64),
    Zeroes { offset: u64, len: u64, unmap: bool },
}

#[derive(Default)]
struct State {
    calls: Vec<Call>,
    /// What the next calls come to.
    fails: Option<i32>,
    /// Calls on this offset wait.
    hangs_at: Option<u64>,
    panics: bool,
}

/// The image, and the test's hand on it.
#[derive(Clone)]
pub(crate) struct Probe(Arc<(MemoryImage, Mutex<State>, Condvar, bool)>);

impl Probe {
    /// `blocks`: whether the device has to take its calls elsewhere.
    pub(crate) fn new(bytes: Vec<u8>, blocks: bool) -> Probe {
        Probe(Arc::new((MemoryImage::new(bytes), Mutex::default(), Condvar::new(), blocks)))
    }

    pub(crate) fn image(&self) -> Arc<dyn Image> {
        Arc::new(self.clone())
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.0.0.bytes()
    }

    pub(crate) fn calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.0.1.lock().unwrap().calls)
    }

    /// From here on calls end with this error number, or well again.
    pub(crate) fn fail(&self, error: Option<i32>) {
        self.0.1.lock().unwrap().fails = error;
    }

    pub(crate) fn panic(&self, panics: bool) {
        self.0.1.lock().unwrap().panics = panics;
    }

    pub(crate) fn hang(&self, at: Option<u64>) {
        self.0.1.lock().unwrap().hangs_at = at;
        self.0.2.notify_all();
    }

    fn call(&self, call: Call) -> io::Result<()> {
        let mut state = self.0.1.lock().unwrap();
        state.calls.push(call.clone());
        let at = match call {
            Call::Read(offset) | Call::Write { offset, .. } => Some(offset),
            _ => None,
        };
        while at.is_some() && state.hangs_at == at {
            state = self.0.2.wait(state).unwrap();
        }
        let (fails, panics) = (state.fails, state.panics);
        drop(state);
        assert!(!panics, "as the test wants it");
        fails.map_or(Ok(()), |error| Err(io::Error::from_raw_os_error(error)))
    }
}

impl Image for Probe {
    fn geometry(&self) -> Geometry {
        self.0.0.geometry()
    }

    fn read(&self, offset: u64, to: &mut Payload) -> io::Result<()> {
        self.call(Call::Read(offset))?;
        self.0.0.read(offset, to)
    }

    fn write(&self, offset: u64, from: &mut Payload, stable: bool) -> io::Result<()> {
        self.call(Call::Write { offset, stable })?;
        self.0.0.write(offset, from, stable)
    }

    fn flush(&self) -> io::Result<()> {
        self.call(Call::Flush)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.call(Call::Discard(offset, len))?;
        self.0.0.discard(offset, len)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool, wanted: StillWanted<'_>) -> io::Result<()> {
        self.call(Call::Zeroes { offset, len, unmap })?;
        self.0.0.write_zeroes(offset, len, unmap, wanted)
    }

    fn resize(&self, bytes: Option<u64>) -> io::Result<u64> {
        self.0.0.resize(bytes)
    }

    fn blocks(&self) -> bool {
        self.0.3
    }
}
