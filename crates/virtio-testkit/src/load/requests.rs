//! What is asked of a device under load.
use vm_memory::{Bytes, VolatileSlice};

use super::LoadError;
use crate::{Buf, TestRam, VhostUserDriver};

/// A kind of request. Each slot of a load holds one request at a time, in buffers that are its own.
pub trait Requests {
    /// Looks at what was negotiated and at the configuration, before the device is started.
    ///
    /// # Errors
    /// The device does not have what the requests need.
    fn negotiated(&mut self, _driver: &mut VhostUserDriver) -> Result<(), LoadError> {
        Ok(())
    }

    /// The elements of the request in this slot, asked for once.
    fn chain(&mut self, slot: usize, ram: &TestRam) -> Vec<Buf>;

    /// Fills in the next request. `buffers` are the elements of its chain.
    fn prepare(&mut self, slot: usize, buffers: &[VolatileSlice<'_>]);

    /// Looks at the answer, of which the device says that it wrote `written` bytes. Returns how many bytes the request was
    /// about.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&mut self, slot: usize, written: u32, buffers: &[VolatileSlice<'_>]) -> Result<u64, String>;

    /// Looks at what all requests together should have left behind. Nothing is in flight.
    ///
    /// # Errors
    /// What is missing.
    fn verify(&mut self) -> Result<(), String> {
        Ok(())
    }
}

impl Requests for Box<dyn Requests> {
    fn negotiated(&mut self, driver: &mut VhostUserDriver) -> Result<(), LoadError> {
        (**self).negotiated(driver)
    }

    fn chain(&mut self, slot: usize, ram: &TestRam) -> Vec<Buf> {
        (**self).chain(slot, ram)
    }

    fn prepare(&mut self, slot: usize, buffers: &[VolatileSlice<'_>]) {
        (**self).prepare(slot, buffers);
    }

    fn check(&mut self, slot: usize, written: u32, buffers: &[VolatileSlice<'_>]) -> Result<u64, String> {
        (**self).check(slot, written, buffers)
    }

    fn verify(&mut self) -> Result<(), String> {
        (**self).verify()
    }
}

/// Random bytes: one device-writable buffer.
#[derive(Clone, Debug)]
pub struct Entropy {
    size: u32,
    /// By slot: how the last answer began.
    last: Vec<u64>,
}

impl Entropy {
    /// Buffers of `size` bytes.
    pub fn new(size: u32) -> Entropy {
        Entropy { size, last: Vec::new() }
    }
}

/// Below this many bytes two random answers may well be the same.
const TELLING: u32 = 8;

impl Requests for Entropy {
    fn chain(&mut self, slot: usize, ram: &TestRam) -> Vec<Buf> {
        self.last.resize(self.last.len().max(slot + 1), 0x5a5a_5a5a_5a5a_5a5a);
        vec![ram.writable(self.size)]
    }

    fn prepare(&mut self, _slot: usize, _buffers: &[VolatileSlice<'_>]) {}

    fn check(&mut self, slot: usize, written: u32, buffers: &[VolatileSlice<'_>]) -> Result<u64, String> {
        if written == 0 || written > self.size {
            return Err(format!("{written} bytes for a buffer of {}", self.size));
        }
        if written < TELLING {
            return Ok(u64::from(written));
        }
        let begins = buffers.first().and_then(|buffer| buffer.read_obj::<u64>(0).ok()).unwrap_or(0);
        let last = self.last.get_mut(slot).map(|last| std::mem::replace(last, begins));
        if last == Some(begins) {
            return Err("the same bytes as before".to_owned());
        }
        Ok(u64::from(written))
    }
}
