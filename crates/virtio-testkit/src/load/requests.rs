//! What is asked of a device under load.
use vm_memory::{Bytes, VolatileSlice};

use crate::{Buf, TestRam};

/// A kind of request. Each slot of a load holds one request at a time, in buffers that are its own.
pub trait Requests {
    /// The elements of the request in this slot, asked for once.
    fn chain(&mut self, slot: usize, ram: &TestRam) -> Vec<Buf>;

    /// Fills in the next request. `buffers` are the elements of its chain.
    fn prepare(&mut self, slot: usize, buffers: &[VolatileSlice<'_>]);

    /// Looks at the answer, of which the device says that it wrote `written` bytes.
    ///
    /// # Errors
    /// What is wrong with it.
    fn check(&mut self, slot: usize, written: u32, buffers: &[VolatileSlice<'_>]) -> Result<(), String>;
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

    fn check(&mut self, slot: usize, written: u32, buffers: &[VolatileSlice<'_>]) -> Result<(), String> {
        if written == 0 || written > self.size {
            return Err(format!("{written} bytes for a buffer of {}", self.size));
        }
        if written < TELLING {
            return Ok(());
        }
        let begins = buffers.first().and_then(|buffer| buffer.read_obj::<u64>(0).ok()).unwrap_or(0);
        let last = self.last.get_mut(slot).map(|last| std::mem::replace(last, begins));
        if last == Some(begins) { Err("the same bytes as before".to_owned()) } else { Ok(()) }
    }
}
