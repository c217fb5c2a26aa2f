//! A driver of virtio over channel I/O (4.3): channel programs of format 1, byte by byte.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use vm_memory::{GuestAddress, GuestMemoryBackend, VolatileMemory};
use vm_virtio::transport::ccw::{Ccw, ChannelInterrupts, Program};
use vm_virtio::{Features, QueueConfig, Status, VirtioDevice};

use super::{Heard, TransportDriver};
use crate::TestRam;

/// A subchannel, as the driver reaches it.
pub trait Subchannel {
    /// START SUBCHANNEL with CCWs of format 1, and what the status says then: of the device, of the subchannel.
    fn start(&self, address: u32) -> (u8, u8);
    /// DIAGNOSE 0x500, subcode 3.
    fn diagnose(&self, data: u64) -> i64;
}

impl<D: VirtioDevice> Subchannel for Arc<Ccw<D>> {
    fn start(&self, address: u32) -> (u8, u8) {
        let program = Program { address, format1: true, wide_addresses: false, small_blocks: false };
        let ending = Ccw::start(self, program).expect("an idle subchannel");
        (ending.device, ending.subchannel)
    }

    fn diagnose(&self, data: u64) -> i64 {
        self.notify(data)
    }
}

/// Interrupts that are pending.
#[derive(Debug, Default)]
pub struct TestChannel {
    subchannel: AtomicBool,
    adapter: AtomicBool,
}

impl TestChannel {
    /// Takes the interrupt of the subchannel.
    pub fn take_subchannel(&self) -> bool {
        self.subchannel.swap(false, Ordering::SeqCst)
    }

    /// Takes the adapter interrupt.
    pub fn take_adapter(&self) -> bool {
        self.adapter.swap(false, Ordering::SeqCst)
    }
}

/// The interruption subclass that drivers here use.
pub const ISC: u8 = 3;

impl ChannelInterrupts for TestChannel {
    fn subchannel(&self) {
        self.subchannel.store(true, Ordering::SeqCst);
    }

    fn adapter(&self, isc: u8) {
        assert_eq!(isc, ISC, "the subclass that the driver set");
        self.adapter.store(true, Ordering::SeqCst);
    }
}

// Where things are in the driver's page.
const CCW: u64 = 0;
const QUEUES: u64 = 1024;
const CONFIG: u64 = 1032;
const SUMMARY: u64 = 1040;
const AREA: u64 = 1048;
const DATA: u64 = 2048;

/// Of the adapter's bits, the first that is this device's.
const FIRST_BIT: u64 = 13;

/// The driver.
pub struct CcwDriver<S> {
    subchannel: S,
    interrupts: Arc<TestChannel>,
    ram: TestRam,
    page: u64,
    /// Adapter interrupts rather than classic ones.
    adapter: bool,
    has_indicators: bool,
}

impl<S: Subchannel> CcwDriver<S> {
    /// A driver that has selected revision 2.
    ///
    /// # Panics
    /// If the device refuses it.
    pub fn new(subchannel: S, interrupts: Arc<TestChannel>, ram: &TestRam, adapter: bool) -> Self {
        let page = ram.alloc(4096 - 64, 4096).0;
        let driver =
            CcwDriver { subchannel, interrupts, ram: ram.clone(), page, adapter, has_indicators: false };
        assert!(driver.command(0x83, &mut [0, 2, 0, 0]), "revision 2");
        driver
    }

    /// One command, with this data, which is then what the device made of it. Whether it ended well.
    pub fn command(&self, code: u8, data: &mut [u8]) -> bool {
        let at = GuestAddress(self.page + DATA);
        self.ram.write(at, data);
        let mut ccw = vec![code, 0];
        ccw.extend((data.len() as u16).to_be_bytes());
        ccw.extend((at.0 as u32).to_be_bytes());
        self.ram.write(GuestAddress(self.page + CCW), &ccw);
        let ending = self.subchannel.start((self.page + CCW) as u32);
        self.ram.read(at, data);
        ending == (0x0c, 0)
    }

    /// Reads and clears. The device may set bits at the same time: none of them is lost.
    fn take_bytes<const N: usize>(&self, at: u64) -> [u8; N] {
        let bytes = self.ram.memory().get_slice(GuestAddress(self.page + at), N).expect("the driver's page");
        std::array::from_fn(|at| {
            bytes.get_atomic_ref::<AtomicU8>(at).expect("within it").swap(0, Ordering::SeqCst)
        })
    }

    fn set_indicators(&mut self) {
        if std::mem::replace(&mut self.has_indicators, true) {
            return;
        }
        let _: [u8; 64] = self.take_bytes(QUEUES);
        if self.adapter {
            let mut area = Vec::new();
            [self.page + SUMMARY, self.page + AREA, FIRST_BIT]
                .iter()
                .for_each(|n| area.extend(n.to_be_bytes()));
            area.push(ISC);
            assert!(self.command(0x73, &mut area));
        } else {
            assert!(self.command(0x43, &mut (self.page + QUEUES).to_be_bytes()));
        }
        assert!(self.command(0x53, &mut (self.page + CONFIG).to_be_bytes()));
    }
}

impl<S: Subchannel> TransportDriver for CcwDriver<S> {
    fn offered(&mut self) -> Features {
        let word = |index: u8| {
            let mut data = [0, 0, 0, 0, index];
            assert!(self.command(0x12, &mut data));
            let [a, b, c, d, _] = data;
            u128::from(u32::from_le_bytes([a, b, c, d])) << (32 * index)
        };
        Features::from_bits_retain((0..4).map(word).fold(0, |all, word| all | word))
    }

    fn choose(&mut self, features: Features) {
        for index in 0..4u8 {
            let [a, b, c, d] = ((features.bits() >> (32 * index)) as u32).to_le_bytes();
            // A refusal shows in the status.
            self.command(0x11, &mut [a, b, c, d, index]);
        }
    }

    fn status(&mut self) -> Status {
        let mut data = [0];
        assert!(self.command(0x72, &mut data));
        Status::from_bits_retain(data[0])
    }

    fn write_status(&mut self, status: Status) {
        if status.is_empty() {
            self.has_indicators = false;
            // Where lanes are stepped it is not over yet; the status tells.
            self.command(0x33, &mut []);
            return;
        }
        if status.contains(Status::DRIVER_OK) {
            self.set_indicators();
        }
        self.command(0x31, &mut [status.bits()]);
    }

    fn queue_max(&mut self, queue: u16) -> u16 {
        let [a, b] = queue.to_be_bytes();
        let mut data = [a, b, 0xff, 0xff];
        assert!(self.command(0x32, &mut data));
        u16::from_be_bytes([data[2], data[3]])
    }

    fn start_queue(&mut self, queue: u16, config: &QueueConfig) -> bool {
        let mut data = Vec::new();
        data.extend(config.desc.0.to_be_bytes());
        data.extend([0xff; 4]);
        data.extend(queue.to_be_bytes());
        data.extend(config.size.to_be_bytes());
        data.extend(config.driver.0.to_be_bytes());
        data.extend(config.device.0.to_be_bytes());
        self.command(0x13, &mut data)
    }

    fn notify(&mut self, queue: u16) {
        self.subchannel.diagnose(u64::from(queue));
    }

    fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let mut data = vec![0; (offset + len) as usize];
        // Behind the end of the space there is nothing, and a longer count is wrong.
        self.command(0x22, &mut data);
        data.split_off(offset as usize)
    }

    fn interrupt(&mut self) -> Heard {
        let mut heard = Heard::default();
        if self.interrupts.take_adapter() {
            let _: [u8; 1] = self.take_bytes(SUMMARY);
            let bits = u128::from_be_bytes(self.take_bytes(AREA));
            // Counted from the left.
            heard.queues |= (((bits << FIRST_BIT) >> 64) as u64).reverse_bits();
        }
        if self.interrupts.take_subchannel() {
            heard.queues |= u64::from_be_bytes(self.take_bytes(QUEUES));
            heard.config |= u64::from_be_bytes(self.take_bytes(CONFIG)) & 1 != 0;
        }
        heard
    }
}
