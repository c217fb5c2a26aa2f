//! A driver of virtio-mmio version 2 (4.2), by the register table of 4.2.2.
use std::sync::Arc;

use vm_virtio::transport::mmio::Mmio;
use vm_virtio::{Features, QueueConfig, Status, VirtioDevice};

use super::{Heard, TransportDriver};

/// How a driver reaches registers.
pub trait RegisterAccess {
    /// A load of `data.len()` bytes.
    fn load(&self, offset: u64, data: &mut [u8]);
    /// A store.
    fn store(&self, offset: u64, data: &[u8]);
}

impl<D: VirtioDevice> RegisterAccess for Arc<Mmio<D>> {
    fn load(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn store(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

/// The driver.
pub struct MmioDriver<R> {
    registers: R,
    line: Box<dyn Fn() -> bool>,
}

impl<R: RegisterAccess> MmioDriver<R> {
    /// A driver of these registers. `line` tells whether the interrupt is high.
    pub fn new(registers: R, line: impl Fn() -> bool + 'static) -> Self {
        MmioDriver { registers, line: Box::new(line) }
    }

    /// Loads a register.
    pub fn load(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.registers.load(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    /// Stores to a register.
    pub fn store(&self, offset: u64, value: u32) {
        self.registers.store(offset, &value.to_le_bytes());
    }

    fn store_pair(&self, offset: u64, value: u64) {
        self.store(offset, (value & 0xffff_ffff) as u32);
        self.store(offset + 4, (value >> 32) as u32);
    }
}

impl<R: RegisterAccess> TransportDriver for MmioDriver<R> {
    fn offered(&mut self) -> Features {
        let words = (0..4).map(|word| {
            self.store(0x014, word);
            u128::from(self.load(0x010)) << (word * 32)
        });
        Features::from_bits_retain(words.fold(0, |all, word| all | word))
    }

    fn choose(&mut self, features: Features) {
        // Linux writes the upper word first.
        for word in [1, 0, 2, 3] {
            self.store(0x024, word);
            self.store(0x020, (features.bits() >> (word * 32)) as u32);
        }
    }

    fn status(&mut self) -> Status {
        Status::from_bits_retain(self.load(0x070) as u8)
    }

    fn write_status(&mut self, status: Status) {
        self.store(0x070, u32::from(status.bits()));
    }

    fn queue_max(&mut self, queue: u16) -> u16 {
        self.store(0x030, u32::from(queue));
        self.load(0x034) as u16
    }

    fn start_queue(&mut self, queue: u16, config: &QueueConfig) -> bool {
        self.store(0x030, u32::from(queue));
        if self.load(0x044) != 0 || self.load(0x034) < u32::from(config.size) {
            return false;
        }
        self.store(0x038, u32::from(config.size));
        self.store_pair(0x080, config.desc.0);
        self.store_pair(0x090, config.driver.0);
        self.store_pair(0x0a0, config.device.0);
        self.store(0x044, 1);
        self.load(0x044) == 1
    }

    fn reset_queue(&mut self, queue: u16) {
        self.store(0x030, u32::from(queue));
        self.store(0x0c0, 1);
    }

    fn is_queue_resetting(&mut self, queue: u16) -> bool {
        self.store(0x030, u32::from(queue));
        self.load(0x0c0) != 0
    }

    fn notify(&mut self, queue: u16) {
        self.store(0x050, u32::from(queue));
    }

    fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        loop {
            let before = self.load(0x0fc);
            let mut bytes = vec![0; len as usize];
            let mut at = 0;
            while at < bytes.len() {
                // As wide as alignment allows.
                let start = u64::from(offset) + at as u64;
                let left = bytes.len() - at;
                let width = [4, 2, 1]
                    .into_iter()
                    .find(|n| left >= *n && start.is_multiple_of(*n as u64))
                    .unwrap_or(1);
                self.registers.load(0x100 + start, &mut bytes[at..at + width]);
                at += width;
            }
            if self.load(0x0fc) == before {
                return bytes;
            }
        }
    }

    fn interrupt(&mut self) -> Heard {
        if !(self.line)() {
            return Heard::default();
        }
        let status = self.load(0x060);
        self.store(0x064, status);
        Heard { queues: if status & 1 != 0 { !0 } else { 0 }, config: status & 2 != 0 }
    }
}
