//! Two guests of one process that send anything to each other: headers that lie, data before and after its time, credit that
//! is none. Checked: no panic and no endless turn; whatever is sent comes back with length 0; what is received is a whole
//! packet of a known operation to that guest, no longer than its buffer.
use std::collections::HashMap;

use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_virtio::Features;

use crate::bytes::Bytes;
use crate::stepped::{SIZE, Stepped};

/// Bytes of a ring's parts, and of all of a queue's buffers.
const QUEUE: u64 = 0x8000;
const DRIVER: u64 = 0x400;
const DEVICE: u64 = 0x800;
const DATA: u64 = 0x1000;
const HEADER: usize = 44;
/// What a guest sends at most, and receives at most, in one buffer.
const BUFFER: u64 = 1024;

struct Guest {
    cid: u64,
    device: Stepped<Vsock>,
    /// For each queue: what was made available, and what was seen used.
    next: [u16; 2],
    seen: [u16; 2],
    /// Sizes of receive buffers by descriptor.
    sizes: [u32; SIZE as usize],
    /// For each flow (peer's port, own port): bytes that were received.
    received: HashMap<(u32, u32), u32>,
}

impl Guest {
    fn new(cid: u64, exchange: &Exchange) -> Guest {
        let device = Vsock::new(Settings::new(cid, HostSide::Nobody), exchange).expect("a device");
        let device = Stepped::new(device, 3 * QUEUE);
        let (next, seen, sizes) = ([0; 2], [0; 2], [0; SIZE as usize]);
        Guest { cid, device, next, seen, sizes, received: HashMap::new() }
    }

    fn start(&mut self, without: Features) {
        self.device.negotiate(without);
        self.device.write(0, &vec![0; 3 * QUEUE as usize]);
        (self.next, self.seen) = ([0; 2], [0; 2]);
        self.received.clear();
        for queue in 0..2u16 {
            let base = u64::from(queue) * QUEUE;
            self.device.start(queue, [base, base + DRIVER, base + DEVICE]);
        }
        self.device.ready();
    }

    /// Makes a buffer of one element available; false: the ring is full.
    fn offer(&mut self, queue: usize, data: &[u8], len: u32, writable: bool) -> bool {
        if self.next[queue].wrapping_sub(self.seen[queue]) >= SIZE {
            return false;
        }
        let slot = self.next[queue] % SIZE;
        let base = queue as u64 * QUEUE;
        let addr = base + DATA + u64::from(slot) * BUFFER;
        self.device.write(addr, data);
        let flags = if writable { 2u16 } else { 0 };
        let desc = [&addr.to_le_bytes()[..], &len.to_le_bytes(), &flags.to_le_bytes(), &[0; 2]].concat();
        self.device.write(base + u64::from(slot) * 16, &desc);
        self.device.write(base + DRIVER + 4 + 2 * u64::from(slot), &slot.to_le_bytes());
        self.next[queue] = self.next[queue].wrapping_add(1);
        self.device.write(base + DRIVER + 2, &self.next[queue].to_le_bytes());
        if writable {
            self.sizes[usize::from(slot)] = len;
        }
        self.device.engine.kick(queue as u16);
        true
    }

    /// Looks at what came back.
    fn look(&mut self) {
        for queue in 0..2 {
            let base = queue as u64 * QUEUE;
            let used = self.device.number(base + DEVICE + 2);
            while self.seen[queue] != used {
                let entry = self.device.read(base + DEVICE + 4 + 8 * u64::from(self.seen[queue] % SIZE), 8);
                let id = u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]]);
                let len = u32::from_le_bytes([entry[4], entry[5], entry[6], entry[7]]);
                self.seen[queue] = self.seen[queue].wrapping_add(1);
                assert!(id < u32::from(SIZE), "a chain that was made available");
                if queue == 1 {
                    assert_eq!(len, 0, "nothing is written to what is sent");
                } else if len > 0 {
                    self.check(id, len);
                }
            }
        }
    }

    fn check(&mut self, id: u32, len: u32) {
        assert!(len <= self.sizes[id as usize], "within the buffer");
        let bytes = self.device.read(DATA + u64::from(id) * BUFFER, len as usize);
        assert!(bytes.len() >= HEADER, "a whole header");
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        assert_eq!(word(24) as usize, bytes.len() - HEADER, "as much payload as is said");
        let op = word(28) >> 16;
        assert!((1..=7).contains(&op), "a known operation");
        assert_eq!((u64::from(word(8)), word(12)), (self.cid, 0), "to this guest");
        let received = self.received.entry((word(16), word(20))).or_default();
        match op {
            1 | 3 => *received = 0,
            _ => *received = received.wrapping_add(word(24)),
        }
    }

    /// A packet that is mostly about one of a few flows.
    fn packet(&mut self, bytes: &mut Bytes<'_>, other: u64) {
        let (own, peer) = (u32::from(bytes.u8() & 1), u32::from(bytes.u8() & 1) + 10);
        let (own, peer) = if self.cid == 3 { (own, peer) } else { (peer, own) };
        let kind = bytes.of([1u16, 1, 1, 1, 2, 2, 2, 9]);
        let op = bytes.of([1u16, 2, 5, 5, 4, 6, 7, 3]);
        let op = if bytes.u8() == 0 { bytes.u16() } else { op };
        let len = match bytes.below(8) {
            0 => 0,
            7 => bytes.u32(),
            _ => u32::from(bytes.u8()),
        };
        let given = (len as usize).min(BUFFER as usize - HEADER);
        let given = if bytes.u8() < 8 { bytes.below(given + 1) } else { given };
        // Counters that a flow can have: nothing taken yet, or everything.
        let received = self.received.get(&(peer, own)).copied().unwrap_or(0);
        let forwarded = if bytes.bool() { received } else { 0 };
        let alloc = bytes.of([0u32, 100, 1000, 65536]);
        let src = if bytes.u8() == 0 { bytes.u64() } else { self.cid };
        let dst = if bytes.u8() < 4 { bytes.u64() & 0xff } else { other };
        let packet = [
            &src.to_le_bytes()[..],
            &dst.to_le_bytes(),
            &own.to_le_bytes(),
            &peer.to_le_bytes(),
            &len.to_le_bytes(),
            &kind.to_le_bytes(),
            &op.to_le_bytes(),
            &u32::from(bytes.u8() & 3).to_le_bytes(),
            &alloc.to_le_bytes(),
            &forwarded.to_le_bytes(),
            &vec![0xab; given],
        ]
        .concat();
        let cut = if bytes.u8() == 0 { bytes.below(HEADER) + 1 } else { packet.len() };
        self.offer(1, &packet[..cut], cut as u32, false);
    }
}

/// Packets of any kind between two guests.
pub fn vsock(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let exchange = Exchange::new();
    let mut guests = [Guest::new(3, &exchange), Guest::new(4, &exchange)];
    let without = Features::from_bits_retain(u128::from(bytes.u8() & 4));
    guests.iter_mut().for_each(|guest| guest.start(without));
    for _ in 0..400 {
        if bytes.is_empty() {
            break;
        }
        let which = usize::from(bytes.bool());
        let other = guests[1 - which].cid;
        let guest = &mut guests[which];
        match bytes.below(8) {
            0..4 => guest.packet(&mut bytes, other),
            4..7 => {
                let len = if bytes.u8() < 32 { u32::from(bytes.u8()) } else { 512 };
                guest.offer(0, &[], len.max(1), true);
            }
            _ if bytes.u8() == 0 => {
                guest.device.reset();
                guest.start(without);
            }
            _ => {}
        }
        for _ in 0..2 {
            guests.iter_mut().for_each(|guest| guest.device.turn());
        }
        guests.iter_mut().for_each(Guest::look);
    }
}
