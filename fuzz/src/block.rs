//! A driver that sends anything to a disk in memory. Checked: no panic; whatever of it is not a broken ring comes back; a
//! length is not more than there is room for; a status is one of three; nothing is written but into the device-writable
//! elements of chains that are out; the image is asked for nothing that it has not; a read-only disk never changes, and no disk
//! grows.
use std::sync::Arc;

use virtio_block::backend::{Image, MemoryImage};
use virtio_block::{Block, Options};
use vm_virtio::device::ConfigWriter;
use vm_virtio::{Features, Status};

use crate::bytes::Bytes;
use crate::stepped::{SIZE, Stepped};

const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x1400;
const DEVICE: u64 = 0x1800;
/// What the driver's elements are in.
const DATA: u64 = 0x2000;
const MEMORY: u64 = 0x8000;
const DISK: usize = 8192;

struct Guest {
    device: Stepped<Block>,
    next: u16,
    seen: u16,
}

impl Guest {
    fn start(&mut self, without: Features) {
        self.device.negotiate(without);
        self.device.write(DRIVER, &[0; 0x400]);
        self.device.write(DEVICE, &[0; 0x400]);
        (self.next, self.seen) = (0, 0);
        self.device.start(0, [DESC, DRIVER, DEVICE]);
        self.device.ready();
    }

    fn restart(&mut self, without: Features) {
        self.device.reset();
        self.start(without);
    }
}

/// An element: where, how long, for whom.
type Element = (u64, u32, bool);

/// A chain that is mostly a request: a header, data, a status, cut anywhere; sometimes anything.
fn chain(bytes: &mut Bytes<'_>, guest: &Guest) -> Vec<Element> {
    let count = 1 + bytes.below(usize::from(SIZE) - 1);
    let turn = bytes.below(count + 1);
    let mut at = DATA;
    let mut chain = Vec::new();
    for n in 0..count {
        let len = match bytes.below(8) {
            0 => u32::from(bytes.u8()),
            1 => u32::from(bytes.u16()) & 0xfff,
            2 | 3 => 16,
            4 | 5 => 512,
            6 => 1,
            _ => 1024,
        };
        let len = len.min((MEMORY - at) as u32);
        let (addr, len) = if bytes.u8() == 0 { (bytes.u64(), bytes.u32()) } else { (at, len) };
        at += u64::from(len).min(MEMORY - at);
        chain.push((addr, len, n >= turn));
    }
    // The header lies where the first elements are, mostly sensible.
    let kind = bytes.of([0u32, 1, 4, 8, 11, 13, 14, 0xffff_ffff]);
    let sector = if bytes.bool() { u64::from(bytes.u8()) % 20 } else { bytes.u64() };
    guest.device.write(DATA, &[&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat());
    for range in 0..bytes.below(4) as u64 {
        let (sector, sectors) = (u64::from(bytes.u8()) % 20, u32::from(bytes.u8()) % 8);
        let flags = u32::from(bytes.u8() & 3);
        let range_bytes = [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat();
        guest.device.write(DATA + 16 + 16 * range, &range_bytes);
    }
    chain
}

/// Requests of any kind.
pub fn block(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let choice = bytes.u8();
    let read_only = choice & 1 != 0;
    let before: Vec<u8> = (0..DISK).map(|at| (at / 512 + at % 7) as u8).collect();
    let image = Arc::new(MemoryImage::new(before.clone()));
    let options = Options { read_only, serial: "fuzz".into(), ..Options::new(Options::own_pool()) };
    let Ok(device) = Block::new(Arc::clone(&image) as Arc<dyn Image>, options) else { return };
    let mut guest = Guest { device: Stepped::new(device, MEMORY), next: 0, seen: 0 };
    // Any of the device's features may be left out.
    let without = Features::from_bits_retain(u128::from(bytes.u16()));
    guest.start(without);
    while !bytes.is_empty() {
        match bytes.u8() % 16 {
            0 => {
                guest.restart(without);
                continue;
            }
            1 => {
                let (offset, value) = (u32::from(bytes.u8()) % 60, bytes.u8());
                let _ = guest.device.engine.write_config(offset, &[value], ConfigWriter::Driver);
                continue;
            }
            _ => {}
        }
        let chain = chain(&mut bytes, &guest);
        for (n, (addr, len, writable)) in (0u16..).zip(&chain) {
            let last = usize::from(n) + 1 == chain.len();
            let flags = u16::from(!last) | u16::from(*writable) << 1;
            let desc =
                [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &(n + 1).to_le_bytes()];
            guest.device.write(DESC + 16 * u64::from(n), &desc.concat());
        }
        guest.device.write(DRIVER + 4 + 2 * u64::from(guest.next % SIZE), &[0, 0]);
        guest.next = guest.next.wrapping_add(1);
        guest.device.write(DRIVER + 2, &guest.next.to_le_bytes());
        let shadow = guest.device.read(0, MEMORY as usize);
        guest.device.engine.kick(0);
        guest.device.turn();
        guest.device.turn();
        if guest.device.engine.status().contains(Status::DEVICE_NEEDS_RESET) {
            // A ring that names no memory, or no bytes: its own rules are the other targets' business.
            guest.restart(without);
            continue;
        }
        check(&mut guest, &chain, &shadow);
        let failed = guest.device.engine.stats(0).map_or(0, |stats| stats.requests.failed);
        assert_eq!(failed, 0, "the image was asked for what it has not");
        let now = image.bytes();
        assert_eq!(now.len(), DISK);
        assert!(!read_only || now == before, "a read-only disk was written to");
    }
    guest.device.reset();
}

/// The chain is back, and nothing was written that was not the device's to write.
fn check(guest: &mut Guest, chain: &[Element], shadow: &[u8]) {
    let used = guest.device.number(DEVICE + 2);
    assert_eq!(used, guest.seen.wrapping_add(1), "each request is answered at once");
    let entry = guest.device.read(DEVICE + 4 + 8 * u64::from(guest.seen % SIZE), 8);
    guest.seen = used;
    let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
    let room: u64 =
        chain.iter().filter(|(_, _, writable)| *writable).map(|(_, len, _)| u64::from(*len)).sum();
    assert!(u64::from(len) <= room, "more than there was room for");
    let now = guest.device.read(0, MEMORY as usize);
    let last = chain.iter().rfind(|(_, len, writable)| *writable && *len > 0);
    if let Some((addr, len, _)) = last {
        let status = now[(addr + u64::from(*len) - 1) as usize];
        assert!(status <= 2, "no status: {status}");
    }
    // What the driver had there, and what the device may have changed of it.
    let mut expected = shadow.to_vec();
    let ours = (DEVICE, 0x400, true);
    for (addr, len, _) in chain.iter().chain([&ours]).filter(|(_, len, writable)| *writable && *len > 0) {
        let range = *addr as usize..(*addr + u64::from(*len)) as usize;
        expected[range.clone()].copy_from_slice(&now[range]);
    }
    assert!(now == expected, "something was written that is not the device's to write");
}
