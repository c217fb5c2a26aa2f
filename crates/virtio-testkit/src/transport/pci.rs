//! A driver of virtio over PCI (4.1): finds the structures by their capabilities, accesses fields as 4.1.3.1 demands.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use vm_virtio::transport::Line;
use vm_virtio::transport::pci::{FunctionInterrupts, Pci};
use vm_virtio::{Features, QueueConfig, Status, VirtioDevice};

use super::{Heard, RegisterAccess, TestLine, TransportDriver};

impl<D: VirtioDevice> RegisterAccess for Arc<Pci<D>> {
    fn load(&self, offset: u64, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn store(&self, offset: u64, data: &[u8]) {
        self.write(offset, data);
    }
}

/// Vectors of [`TestFunction`].
pub const VECTORS: u16 = 8;

/// A function with MSI-X and a pin, and somebody who looks at them.
#[derive(Debug, Default)]
pub struct TestFunction {
    messages: AtomicBool,
    vectors: [AtomicU64; VECTORS as usize],
    pin: TestLine,
}

impl TestFunction {
    /// The guest enables or disables MSI-X.
    pub fn enable_messages(&self, on: bool) {
        self.messages.store(on, Ordering::SeqCst);
    }

    /// Messages of a vector since the last call.
    pub fn take(&self, vector: u16) -> u64 {
        self.vectors[usize::from(vector)].swap(0, Ordering::SeqCst)
    }

    /// Whether the pin is asserted, for a guest without MSI-X.
    pub fn intx(&self) -> bool {
        self.pin.is_high() && !self.uses_messages()
    }
}

impl FunctionInterrupts for TestFunction {
    fn uses_messages(&self) -> bool {
        self.messages.load(Ordering::SeqCst)
    }

    fn message(&self, vector: u16) {
        self.vectors[usize::from(vector)].fetch_add(1, Ordering::SeqCst);
    }

    fn set_intx(&self, high: bool) {
        self.pin.set(high);
    }
}

/// Where a structure is.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    offset: u64,
    length: u64,
}

/// The driver.
pub struct PciDriver<R> {
    registers: R,
    function: Arc<TestFunction>,
    messages: bool,
    common: Place,
    isr: Place,
    notify: Place,
    multiplier: u64,
    device: Option<Place>,
}

impl<R: RegisterAccess> PciDriver<R> {
    /// A driver that has found these capabilities, each from its first byte on, all of them in one BAR. `messages`: it uses
    /// MSI-X.
    ///
    /// # Panics
    /// If a structure is missing or where it cannot be.
    pub fn new(registers: R, function: Arc<TestFunction>, capabilities: &[Vec<u8>], messages: bool) -> Self {
        let word = |bytes: &[u8], at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
        let of_kind = |kind: u8| capabilities.iter().find(|bytes| bytes[0] == 9 && bytes[3] == kind);
        let place = |bytes: &Vec<u8>| {
            assert!(usize::from(bytes[2]) >= 16 && bytes[4] <= 5);
            Place { offset: word(bytes, 8).into(), length: word(bytes, 12).into() }
        };
        let common = place(of_kind(1).expect("a common configuration"));
        assert!(common.offset % 4 == 0 && common.length >= 56);
        let notify_capability = of_kind(2).expect("notifications");
        let (notify, multiplier) = (place(notify_capability), word(notify_capability, 16));
        assert!(
            notify.offset % 4 == 0
                && multiplier % 4 == 0
                && (multiplier == 0 || multiplier.is_power_of_two())
        );
        assert!(of_kind(5).is_some_and(|bytes| bytes[2] >= 20), "a window");
        let isr = place(of_kind(3).expect("an ISR status"));
        let device = of_kind(4).map(place);
        assert!(device.is_none_or(|device| device.offset % 4 == 0));
        function.enable_messages(messages);
        let multiplier = multiplier.into();
        PciDriver { registers, function, messages, common, isr, notify, multiplier, device }
    }

    /// Loads a field of the common configuration.
    pub fn load(&self, at: u64, width: usize) -> u32 {
        let mut bytes = [0; 4];
        self.registers.load(self.common.offset + at, &mut bytes[..width]);
        u32::from_le_bytes(bytes)
    }

    /// Stores to a field of the common configuration.
    pub fn store(&self, at: u64, width: usize, value: u32) {
        self.registers.store(self.common.offset + at, &value.to_le_bytes()[..width]);
    }
}

impl<R: RegisterAccess> TransportDriver for PciDriver<R> {
    fn offered(&mut self) -> Features {
        let words = (0..4u32).map(|word| {
            self.store(0, 4, word);
            u128::from(self.load(4, 4)) << (word * 32)
        });
        Features::from_bits_retain(words.fold(0, |all, word| all | word))
    }

    fn choose(&mut self, features: Features) {
        for word in 0..4u32 {
            self.store(8, 4, word);
            self.store(12, 4, (features.bits() >> (word * 32)) as u32);
        }
    }

    fn status(&mut self) -> Status {
        Status::from_bits_retain(self.load(20, 1) as u8)
    }

    fn write_status(&mut self, status: Status) {
        if status.contains(Status::DRIVER_OK) && self.messages {
            self.store(16, 2, 0);
            assert_eq!(self.load(16, 2), 0, "the vector is mapped");
        }
        self.store(20, 1, status.bits().into());
    }

    fn queue_max(&mut self, queue: u16) -> u16 {
        if u32::from(queue) >= self.load(18, 2) {
            return 0;
        }
        self.store(22, 2, queue.into());
        self.load(24, 2) as u16
    }

    fn start_queue(&mut self, queue: u16, config: &QueueConfig) -> bool {
        self.store(22, 2, queue.into());
        if self.load(28, 2) != 0 || self.load(24, 2) < u32::from(config.size) {
            return false;
        }
        self.store(24, 2, config.size.into());
        for (at, addr) in [(32, config.desc.0), (40, config.driver.0), (48, config.device.0)] {
            self.store(at, 4, (addr & 0xffff_ffff) as u32);
            self.store(at + 4, 4, (addr >> 32) as u32);
        }
        if self.messages {
            self.store(26, 2, u32::from(queue) + 1);
            assert_eq!(self.load(26, 2), u32::from(queue) + 1, "the vector is mapped");
        }
        self.store(28, 2, 1);
        self.load(28, 2) == 1
    }

    fn reset_queue(&mut self, queue: u16) {
        self.store(22, 2, queue.into());
        self.store(58, 2, 1);
    }

    fn is_queue_resetting(&mut self, queue: u16) -> bool {
        self.store(22, 2, queue.into());
        self.load(58, 2) != 0
    }

    fn notify(&mut self, queue: u16) {
        self.store(22, 2, queue.into());
        let at = u64::from(self.load(30, 2)) * self.multiplier;
        assert!(at + 4 <= self.notify.length);
        self.registers.store(self.notify.offset + at, &queue.to_le_bytes());
    }

    fn config(&mut self, offset: u32, len: u32) -> Vec<u8> {
        let Some(device) = self.device else { return vec![0; len as usize] };
        loop {
            let before = self.load(21, 1);
            let mut bytes = vec![0; len as usize];
            for (at, byte) in (u64::from(offset)..).zip(&mut bytes) {
                self.registers.load(device.offset + at, std::slice::from_mut(byte));
            }
            if self.load(21, 1) == before {
                return bytes;
            }
        }
    }

    fn interrupt(&mut self) -> Heard {
        let mut heard = Heard::default();
        if self.messages {
            heard.config = self.function.take(0) > 0;
            for queue in 0..VECTORS - 1 {
                heard.queues |= u64::from(self.function.take(queue + 1) > 0) << queue;
            }
        } else if self.function.intx() {
            let mut isr = [0];
            self.registers.load(self.isr.offset, &mut isr);
            heard.queues = if isr[0] & 1 != 0 { !0 } else { 0 };
            heard.config = isr[0] & 2 != 0;
        }
        heard
    }

    fn own_features(&self) -> Features {
        Features::NOTIF_CONFIG_DATA
    }
}
