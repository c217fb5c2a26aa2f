//! A guest that accesses the registers of a transport in any way, with any memory behind them; lanes are stepped, so that an
//! input means the same each time.
//!
//! Checked: nothing panics; each access and each channel program ends; nothing is written but to the guest's memory; after a
//! reset the device works again for a driver that keeps the rules.
use std::sync::Arc;
use std::time::Duration;

use virtio_rng::{Entropy, Rng, RngWorker};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vm_virtio::transport::ccw::{Ccw, ChannelInterrupts, Program};
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::{FunctionInterrupts, Pci};
use vm_virtio::transport::{Kicks, Line, Options};
use vm_virtio::{GuestRam, HostEvent, HostEvents, LaneRunner, Status, WaitFor};

use crate::bytes::Bytes;

/// Guest memory: small, so that addresses hit it.
const SIZE: u64 = 0x8000;
/// Vectors of the PCI function.
const VECTORS: u16 = 3;

struct Nobody;

impl HostEvents for Nobody {
    fn event(&self, _: HostEvent) {}
}

impl Line for Nobody {
    fn set(&self, _: bool) {}
}

impl ChannelInterrupts for Nobody {
    fn subchannel(&self) {}
    fn adapter(&self, isc: u8) {
        assert!(isc < 8);
    }
}

impl FunctionInterrupts for Nobody {
    fn uses_messages(&self) -> bool {
        true
    }
    fn message(&self, vector: u16) {
        assert!(vector < VECTORS);
    }
    fn set_intx(&self, _: bool) {}
}

fn device() -> Rng {
    Rng::new(&Entropy::insecure_seeded(1), 0, None).expect("an entropy device")
}

fn options(bytes: &mut Bytes<'_>) -> Options {
    let mut options = Options::new(Arc::new(Nobody));
    options.patience = Duration::ZERO;
    options.kicks = if bytes.bool() { Kicks::Files } else { Kicks::Calls };
    options
}

/// Memory with a few bytes of the input in it.
fn memory(bytes: &mut Bytes<'_>) -> GuestMemoryMmap {
    let memory = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), SIZE as usize)]).expect("memory");
    for _ in 0..bytes.below(8) {
        let at = u64::from(bytes.u16()) % (SIZE - 64);
        memory.write_slice(bytes.take(64), GuestAddress(at)).expect("in range");
    }
    memory
}

fn settle(lanes: &mut [LaneRunner<RngWorker>]) {
    for _ in 0..1000 {
        if !lanes.iter_mut().fold(false, |worked, lane| lane.turn(Some(Duration::ZERO)) | worked) {
            return;
        }
    }
    panic!("the lanes do not come to rest");
}

/// A value as drivers write it, or any.
fn value(bytes: &mut Bytes<'_>) -> u64 {
    match bytes.below(4) {
        0 => bytes.u8().into(),
        1 => u64::from(bytes.u16()) % SIZE,
        2 => {
            [0, 1, 3, 11, 15, 16, 64, 0x1000, 0x2000, 0x3000, u64::from(u32::MAX), u64::MAX][bytes.below(12)]
        }
        _ => bytes.u64(),
    }
}

/// virtio-mmio.
pub fn transport_mmio(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let options = options(&mut bytes);
    let memory = memory(&mut bytes);
    let (mmio, mut lanes) = Mmio::new(device(), options, 0, Arc::new(Nobody)).expect("a transport");
    drop(mmio.engine().memory(GuestRam::new(&memory), WaitFor::NewRequests));
    while !bytes.is_empty() {
        let offset = match bytes.below(8) {
            0 => bytes.u64(),
            _ => u64::from(bytes.u8() & !3) + if bytes.below(16) == 0 { 1 } else { 0 },
        };
        let width = bytes.of([4, 4, 4, 4, 1, 2, 8, 0]);
        if bytes.bool() {
            mmio.write(offset, &value(&mut bytes).to_le_bytes()[..width]);
        } else {
            mmio.read(offset, &mut [0; 8][..width]);
        }
        if bytes.bool() {
            settle(&mut lanes);
        }
    }
    let load = |offset| {
        let mut word = [0; 4];
        mmio.read(offset, &mut word);
        u32::from_le_bytes(word)
    };
    let store = |offset, value: u32| mmio.write(offset, &value.to_le_bytes());
    store(0x70, 0);
    settle(&mut lanes);
    assert_eq!((load(0x70), load(0x60)), (0, 0));
    [1, 3].into_iter().for_each(|status| store(0x70, status));
    store(0x24, 1);
    store(0x20, 1);
    store(0x70, 11);
    store(0x30, 0);
    for (at, value) in [(0x38, 4), (0x80, 0x1000), (0x90, 0x2000), (0xa0, 0x3000), (0x44, 1), (0x70, 15)] {
        store(at, value);
    }
    ring(&memory);
    settle(&mut lanes);
    store(0x50, 0);
    settle(&mut lanes);
    served(&memory);
    assert_eq!((load(0x70), load(0x60)), (15, 1));
}

/// One writable buffer in a split ring of 4 entries at 0x1000, 0x2000, 0x3000.
fn ring(memory: &GuestMemoryMmap) {
    let write = |at: u64, bytes: &[u8]| memory.write_slice(bytes, GuestAddress(at)).expect("in range");
    [0x1000, 0x2000, 0x3000].into_iter().for_each(|at| write(at, &[0; 64]));
    write(0x1000, &[0, 0x40, 0, 0, 0, 0, 0, 0, 64, 0, 0, 0, 2, 0, 0, 0]);
    write(0x2000, &[0, 0, 1, 0, 0, 0]);
}

fn served(memory: &GuestMemoryMmap) {
    let mut used = [0; 2];
    memory.read_slice(&mut used, GuestAddress(0x3002)).expect("in range");
    assert_eq!(used, [1, 0], "a device that was reset works");
}

/// The structures of virtio over PCI, and the window.
pub fn transport_pci(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let options = options(&mut bytes);
    let memory = memory(&mut bytes);
    let (pci, mut lanes) = Pci::new(device(), options, VECTORS).expect("a transport");
    pci.connect(Arc::new(Nobody));
    drop(pci.engine().memory(GuestRam::new(&memory), WaitFor::NewRequests));
    while !bytes.is_empty() {
        let offset = match bytes.below(8) {
            0 => bytes.u64(),
            1 => 0x1000 + u64::from(bytes.u8()),
            _ => u64::from(bytes.u8() % 72),
        };
        let width = bytes.of([4, 4, 2, 2, 1, 1, 8, 0]);
        match bytes.below(4) {
            0 => pci.read(offset, &mut [0; 8][..width]),
            1 => {
                pci.window_read(4, bytes.take(20));
            }
            2 => pci.window_write(4, bytes.take(20)),
            _ => pci.write(offset, &value(&mut bytes).to_le_bytes()[..width]),
        }
        if bytes.bool() {
            settle(&mut lanes);
        }
    }
    let store = |offset, width: usize, value: u64| pci.write(offset, &value.to_le_bytes()[..width]);
    let status = || {
        let mut byte = [0];
        pci.read(20, &mut byte);
        byte[0]
    };
    store(20, 1, 0);
    settle(&mut lanes);
    assert_eq!(status(), 0);
    [1, 3].into_iter().for_each(|status| store(20, 1, status));
    store(8, 4, 1);
    store(12, 4, 1);
    store(20, 1, 11);
    store(22, 2, 0);
    store(24, 2, 4);
    for (at, area) in [(32, 0x1000), (40, 0x2000), (48, 0x3000)] {
        store(at, 8, area);
    }
    store(28, 2, 1);
    store(20, 1, 15);
    ring(&memory);
    store(0x1000, 2, 0);
    settle(&mut lanes);
    served(&memory);
    assert_eq!(status(), 15);
}

/// Channel programs.
pub fn transport_ccw(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let options = options(&mut bytes);
    let memory = memory(&mut bytes);
    let (ccw, mut lanes) = Ccw::new(device(), options, Arc::new(Nobody)).expect("a transport");
    drop(ccw.memory(GuestRam::new(&memory), WaitFor::NewRequests));
    while !bytes.is_empty() {
        match bytes.below(8) {
            0 => ccw.set_enabled(bytes.bool()),
            1 => {
                let _ = ccw.notify(value(&mut bytes));
            }
            2 => memory
                .write_slice(bytes.take(32), GuestAddress(u64::from(bytes.u16()) % (SIZE - 64)))
                .expect("in range"),
            _ => {
                // A command that makes sense more often than not.
                let code = bytes.of([
                    0x11, 0x12, 0x13, 0x21, 0x22, 0x31, 0x32, 0x33, 0x43, 0x53, 0x72, 0x73, 0x83, 0xe4, 0x04,
                    0x03,
                ]);
                let address = (u64::from(bytes.u16()) % (SIZE - 64)) & !7;
                let mut word = [code, bytes.u8() & 0xf4, 0, bytes.u8() % 40, 0, 0, 0, 0];
                word[6..].copy_from_slice(&bytes.u16().to_be_bytes());
                memory.write_slice(&word, GuestAddress(address)).expect("in range");
                let choice = bytes.u8();
                let program = Program {
                    address: address as u32 + u32::from(choice & 4),
                    format1: choice & 3 != 0,
                    wide_addresses: choice & 8 != 0,
                    small_blocks: choice & 16 != 0,
                };
                let _ = ccw.start(program);
            }
        }
        if bytes.bool() {
            settle(&mut lanes);
        }
    }
    ccw.reset();
    settle(&mut lanes);
    let command = |code: u8, data: &[u8]| {
        memory.write_slice(data, GuestAddress(0x100)).expect("in range");
        let word = [code, 0, 0, data.len() as u8, 0, 0, 1, 0];
        memory.write_slice(&word, GuestAddress(0)).expect("in range");
        let program = Program { address: 0, format1: true, wide_addresses: false, small_blocks: false };
        let ending = ccw.start(program).expect("idle");
        assert_eq!((ending.device, ending.subchannel), (0x0c, 0), "{code:#x}");
    };
    command(0x83, &[0, 2, 0, 0]);
    [1, 3].into_iter().for_each(|status| command(0x31, &[status]));
    command(0x11, &[1, 0, 0, 0, 1]);
    command(0x31, &[11]);
    let mut queue = [0; 32];
    (queue[6], queue[15], queue[22], queue[30]) = (0x10, 4, 0x20, 0x30);
    ring(&memory);
    command(0x13, &queue);
    command(0x31, &[15]);
    settle(&mut lanes);
    served(&memory);
    assert_eq!(ccw.engine().status(), Status::from_bits_retain(15));
}
