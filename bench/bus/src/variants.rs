//! The same ranges and devices, behind our dispatch and behind that of others.
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use peer_vm_device::device_manager::{IoManager as PeerManager, MmioManager as _};
use vm_device::bus::{MmioAddress, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_device::dispatch::VcpuIo;

/// Distance and size of ranges: between two of them is a hole.
const STRIDE: u64 = 0x2000;
pub const SIZE: u64 = 0x1000;

/// Where range number `at` begins.
pub fn base(at: usize) -> u64 {
    0xd000_0000 + at as u64 * STRIDE
}

/// Stores what is written. Lines of its own, so that two devices share none.
#[derive(Default)]
#[repr(align(128))]
pub struct Register(AtomicU32);

impl Register {
    fn write(&self, data: &[u8]) {
        if let Ok(data) = data.try_into() {
            self.0.store(u32::from_le_bytes(data), Ordering::Relaxed);
        }
    }
}

impl vm_device::DeviceMmio for Register {
    fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: MmioAddress, _: u64, data: &[u8]) {
        self.write(data);
    }
}

impl peer_vm_device::DeviceMmio for Register {
    fn mmio_read(&self, _: peer_vm_device::bus::MmioAddress, _: u64, _: &mut [u8]) {}
    fn mmio_write(&self, _: peer_vm_device::bus::MmioAddress, _: u64, data: &[u8]) {
        self.write(data);
    }
}

/// A sequence of addresses in random order, that wraps.
pub struct Addresses(Vec<u64>);

impl Addresses {
    pub fn new(ranges: usize) -> Addresses {
        let mut state = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            // xorshift64
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state
        };
        Addresses(
            (0..4096).map(|_| base((next() % ranges as u64) as usize) + next() % (SIZE / 4) * 4).collect(),
        )
    }

    /// Only range number `at`.
    pub fn one(at: usize) -> Addresses {
        Addresses((0..4096).map(|i| base(at) + i % (SIZE / 4) * 4).collect())
    }
}

/// Somebody who accesses.
pub trait Access: Send {
    fn run(&mut self, addresses: &Addresses, accesses: usize);
}

fn each(addresses: &Addresses, accesses: usize, mut write: impl FnMut(u64, &[u8; 4])) {
    for (address, value) in addresses.0.iter().cycle().take(accesses).zip(0u32..) {
        write(*address, &value.to_le_bytes());
    }
}

/// A range's first and last address, and its device.
type Row = (u64, u64, Arc<dyn vm_device::DeviceMmio + Send + Sync>);

/// What is the least that a dispatcher has to do.
pub struct Array(pub Vec<Row>);

impl Array {
    pub fn new(ranges: usize) -> Array {
        Array((0..ranges).map(|at| Array::row(at, Arc::new(Register::default()))).collect())
    }

    pub fn row(at: usize, device: Arc<Register>) -> Row {
        (base(at), base(at) + SIZE - 1, device)
    }
}

impl Access for Array {
    fn run(&mut self, addresses: &Addresses, accesses: usize) {
        each(addresses, accesses, |address, data| {
            let behind = self.0.partition_point(|row| row.0 <= address);
            let (first, last, device) = &self.0[behind - 1];
            assert!(address + 3 <= *last);
            device.mmio_write(MmioAddress(*first), address - first, data);
        });
    }
}

impl Access for VcpuIo {
    fn run(&mut self, addresses: &Addresses, accesses: usize) {
        each(addresses, accesses, |address, data| {
            self.mmio_write(MmioAddress(address), data).expect("a device");
        });
    }
}

/// Ours without a handle.
pub struct Shared(pub Arc<IoManager>);

impl Access for Shared {
    fn run(&mut self, addresses: &Addresses, accesses: usize) {
        each(addresses, accesses, |address, data| {
            self.0.mmio_write(MmioAddress(address), data).expect("a device");
        });
    }
}

/// rust-vmm's, as it can be used while nothing changes.
struct Peer(PeerManager);

impl Access for Peer {
    fn run(&mut self, addresses: &Addresses, accesses: usize) {
        each(addresses, accesses, |address, data| {
            self.0.mmio_write(peer_vm_device::bus::MmioAddress(address), data).expect("a device");
        });
    }
}

/// rust-vmm's, as it has to be used where devices come and go.
pub struct LockedPeer(pub Arc<Mutex<PeerManager>>);

impl Access for LockedPeer {
    fn run(&mut self, addresses: &Addresses, accesses: usize) {
        each(addresses, accesses, |address, data| {
            let manager = self.0.lock().expect("not poisoned");
            manager.mmio_write(peer_vm_device::bus::MmioAddress(address), data).expect("a device");
        });
    }
}

pub fn ours(ranges: usize) -> IoManager {
    let mut manager = IoManager::new();
    for at in 0..ranges {
        register(&mut manager, at, Arc::new(Register::default()));
    }
    manager
}

pub fn register(manager: &mut IoManager, at: usize, device: Arc<Register>) {
    manager.register_mmio(range(at), device).expect("it is free");
}

pub fn range(at: usize) -> MmioRange {
    MmioRange::new(MmioAddress(base(at)), SIZE).expect("it is one")
}

pub fn peer(ranges: usize) -> PeerManager {
    let mut manager = PeerManager::new();
    for at in 0..ranges {
        register_peer(&mut manager, at, Arc::new(Register::default()));
    }
    manager
}

pub fn register_peer(manager: &mut PeerManager, at: usize, device: Arc<Register>) {
    let base = peer_vm_device::bus::MmioAddress(base(at));
    let range = peer_vm_device::bus::MmioRange::new(base, SIZE).expect("it is one");
    manager.register_mmio(range, device).expect("it is free");
}

/// The array, ours with a handle, ours without, rust-vmm's, rust-vmm's in a `Mutex`.
pub fn all(ranges: usize) -> Vec<Box<dyn Access>> {
    let manager = Arc::new(ours(ranges));
    vec![
        Box::new(Array::new(ranges)),
        Box::new(manager.vcpu()),
        Box::new(Shared(manager)),
        Box::new(Peer(peer(ranges))),
        Box::new(LockedPeer(Arc::new(Mutex::new(peer(ranges))))),
    ]
}
