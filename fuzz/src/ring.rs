//! A driver that writes anything into a ring, against a queue and a device that does everything a device can do.
//!
//! Checked: the queue touches nothing but its areas and the writable segments of chains that it handed out; every
//! segment is memory; a fault stays, and stops popping but not completing; chains out, popped and ended agree with a count
//! of our own; what is published is what was completed; a queue that asks to be looked at again has something; pages that
//! the device wrote are in the log. The region of what is in flight belongs to somebody hostile, too.
use vm_virtio::queue::{ChainId, HeldChain, QueueCounters};
use vm_virtio::{Chain, Features, GuestAddress, InflightRegion, Queue, QueueConfig, QueueState, RingPos};

use crate::bytes::Bytes;
use crate::guarded::{Guarded, Shared};

/// Where the rings are; each has room for the largest size below.
const DESC: u64 = 0x1000;
const DRIVER: u64 = 0x1800;
const DEVICE: u64 = 0x1c00;
/// Indirect tables, 16 of 256 bytes.
const TABLES: u64 = 0x2000;
/// More entries than this find nothing new.
const LARGEST: u16 = 64;
/// Bytes that the device reads or writes of one chain.
const ENOUGH: usize = 256;

/// A split ring.
pub fn ring_split(data: &[u8]) {
    run(data, false);
}

/// A packed ring.
pub fn ring_packed(data: &[u8]) {
    run(data, true);
}

struct World<'a> {
    bytes: Bytes<'a>,
    memory: Guarded,
    features: Features,
    packed: bool,
    config: QueueConfig,
    queue: Queue,
    held: Vec<Chain>,
    /// Where the queue keeps what is in flight.
    inflight: Option<(Shared, InflightRegion)>,
    log: Option<Shared>,
    /// Chains were written and then not completed: what the log says of them is not certain.
    unlogged: bool,
    /// What the queue should have counted, since it was made.
    popped: u64,
    completed: u64,
    discarded: u64,
    /// Split without IN_ORDER: completions that are not published, and where the used index is then.
    unpublished: u16,
    used: u16,
    /// The driver's position in the available ring, for chains that make sense.
    next: u16,
    wrap: bool,
}

fn run(data: &[u8], packed: bool) {
    let mut bytes = Bytes::new(data);
    let choice = bytes.u8();
    let mut features = Features::VERSION_1;
    for (bit, feature) in
        [Features::INDIRECT_DESC, Features::EVENT_IDX, Features::IN_ORDER].into_iter().enumerate()
    {
        features.set(feature, choice & 1 << bit != 0);
    }
    features.set(Features::RING_PACKED, packed);
    let size = bytes.u8();
    let size = if packed { 1 + u16::from(size) % LARGEST } else { 1 << (size % 7) };
    let config = QueueConfig {
        size,
        desc: GuestAddress(DESC),
        driver: GuestAddress(DRIVER),
        device: GuestAddress(DEVICE),
    };
    let memory = Guarded::new();
    let n = usize::from(size);
    memory.open(DEVICE, if packed { 4 } else { 6 + 8 * n });
    if packed {
        memory.open(DESC, 16 * n);
    }
    let inflight = (choice & 8 != 0).then(|| {
        let len = InflightRegion::bytes_for(size);
        let shared = Shared::new(len);
        let region = InflightRegion::new(shared.memory(), 0, len).expect("a region");
        (shared, region)
    });
    let log = (choice & 16 != 0).then(|| Shared::new(8));
    let region = inflight.as_ref().map(|(_, region)| region);
    let queue = Queue::tracked(config, &memory.ram(), features, None, region).expect("a sound configuration");
    let mut world = World {
        bytes,
        memory,
        features,
        packed,
        config,
        queue,
        held: Vec::new(),
        inflight,
        log,
        unlogged: false,
        popped: 0,
        completed: 0,
        discarded: 0,
        unpublished: 0,
        used: 0,
        next: 0,
        wrap: true,
    };
    world.log();
    while !world.bytes.is_empty() {
        world.step();
        world.check();
    }
    world.end();
}

impl World<'_> {
    fn step(&mut self) {
        match self.bytes.below(20) {
            0 | 1 => self.scribble(),
            2..=5 => self.add(),
            6..=8 => self.pop(),
            9 => self.read(),
            10 => self.write(),
            11 | 12 => self.complete(),
            13 => self.publish(),
            14 => self.arm(),
            15 => self.give_back(),
            16 => {
                let budget = self.bytes.of([0, 1, 3, u32::MAX]);
                self.queue.set_budget(budget);
            }
            17 => match self.bytes.bool() {
                true => self.queue.close(),
                false => self.queue.open(),
            },
            18 => self.move_memory(),
            _ => self.restart(),
        }
    }

    fn log(&mut self) {
        if let Some(log) = &self.log {
            self.queue.set_log(Some(log.log()), Some(GuestAddress(DEVICE)));
        }
    }

    /// The driver, or whoever shares the region of what is in flight, writes anything, anywhere.
    fn scribble(&mut self) {
        if let Some((shared, _)) = &self.inflight
            && self.bytes.u8() < 64
        {
            let at = usize::from(self.bytes.u16() % 0x800);
            let len = 1 + self.bytes.below(8);
            shared.write(at, self.bytes.take(len));
            return;
        }
        let base = self.bytes.of([DESC, DRIVER, DEVICE, TABLES, 0]);
        let offset = u64::from(self.bytes.u16() % 0x1100);
        let len = 1 + self.bytes.below(16);
        let data = self.bytes.take(len);
        self.memory.write(base + offset, data);
    }

    fn addr(&mut self) -> u64 {
        let base = self.bytes.of([0x3000, 0x1ff0, 0x3ff0, 0x1_0000, DESC, DRIVER, DEVICE, TABLES]);
        match self.bytes.u8() {
            0xff => self.bytes.u64(),
            0xfe => base.wrapping_sub(8),
            offset => base + u64::from(offset) * 4,
        }
    }

    fn len(&mut self) -> u32 {
        match self.bytes.u8() {
            0xff => self.bytes.u32(),
            0xfe => u32::MAX,
            len => u32::from(len),
        }
    }

    /// A descriptor: 16 bytes that mostly make sense.
    fn desc(&mut self, at: u64, third: u16, fourth: u16) {
        let (addr, len) = (self.addr(), self.len());
        self.memory.write(at, &addr.to_le_bytes());
        self.memory.write(at + 8, &len.to_le_bytes());
        self.memory.write(at + 12, &third.to_le_bytes());
        self.memory.write(at + 14, &fourth.to_le_bytes());
    }

    /// Flags of an element: now and then a wrong one.
    fn flags(&mut self, last: bool) -> u16 {
        let flags = self.bytes.u8();
        match flags {
            0xf0.. => u16::from(flags & 7),
            _ => u16::from(flags & 2) | u16::from(!last),
        }
    }

    /// A chain of up to four elements, direct or in a table, made available.
    fn add(&mut self) {
        let count = 1 + self.bytes.below(4) as u16;
        let indirect = self.bytes.bool();
        let size = self.config.size;
        let id = u16::from(self.bytes.u8());
        if indirect {
            let table = TABLES + 0x100 * u64::from(id % 16);
            for n in 0..count {
                let flags = self.flags(n + 1 == count);
                let (third, fourth) = if self.packed { (id, flags) } else { (flags, n + 1) };
                self.desc(table + 16 * u64::from(n), third, fourth);
            }
            let len = match self.bytes.u8() {
                0xff => self.bytes.u32(),
                _ => 16 * u32::from(count),
            };
            let slot = if self.packed { self.next } else { id % size };
            let at = DESC + 16 * u64::from(slot);
            self.memory.write(at, &table.to_le_bytes());
            self.memory.write(at + 8, &len.to_le_bytes());
            self.finish(at, slot, id, 4);
            return;
        }
        if self.packed {
            // The first becomes available last; a queue that looks in between is one of the hostile ways.
            for _ in 0..count {
                let (slot, last) = (self.next, count == 1);
                let flags = self.flags(last);
                let at = DESC + 16 * u64::from(slot);
                self.desc(at, id, 0);
                self.finish(at, slot, id, flags);
            }
            return;
        }
        let head = id % size;
        for n in 0..count {
            let slot = (head + n) % size;
            let flags = self.flags(n + 1 == count);
            let next = if self.bytes.u8() < 0xf0 { (slot + 1) % size } else { self.bytes.u16() };
            self.desc(DESC + 16 * u64::from(slot), flags, next);
        }
        self.offer(head);
    }

    /// Makes the descriptor at `at` available, with these flags.
    fn finish(&mut self, at: u64, slot: u16, id: u16, flags: u16) {
        if !self.packed {
            self.memory.write(at + 12, &flags.to_le_bytes());
            self.offer(slot);
            return;
        }
        let turn = if self.wrap { 1 << 7 } else { 1 << 15 };
        self.memory.write(at + 12, &id.to_le_bytes());
        self.memory.write(at + 14, &(flags | turn).to_le_bytes());
        self.next += 1;
        if self.next == self.config.size {
            (self.next, self.wrap) = (0, !self.wrap);
        }
    }

    fn offer(&mut self, head: u16) {
        let at = DRIVER + 4 + 2 * u64::from(self.next % self.config.size);
        self.memory.write(at, &head.to_le_bytes());
        self.next = self.next.wrapping_add(1);
        self.memory.write(DRIVER + 2, &self.next.to_le_bytes());
    }

    fn pop(&mut self) {
        let stopped = self.queue.fault().is_some() || self.queue.is_closed();
        let Some(chain) = self.queue.pop() else { return };
        assert!(!stopped, "popped from a queue that is closed or faulted");
        self.popped += 1;
        self.look(&chain);
        self.held.push(chain);
        assert!(self.held.len() <= usize::from(self.config.size), "more chains than entries");
    }

    fn look(&self, chain: &Chain) {
        let mut bytes = 0;
        for (segments, writable) in [(self.queue.readable(chain), false), (self.queue.writable(chain), true)]
        {
            for segment in segments {
                bytes += segment.len() as u64;
                self.memory.check_segment(segment, writable);
            }
        }
        assert!(bytes <= 1 << 32, "2.7.5.2");
        assert!(self.queue.id(chain).is_some());
    }

    fn pick(&mut self) -> Option<usize> {
        if self.held.is_empty() { None } else { Some(self.bytes.below(self.held.len())) }
    }

    fn read(&mut self) {
        let Some(at) = self.pick() else { return };
        let skip = self.bytes.below(64);
        let mut reader = self.queue.reader(&self.held[at]);
        let room = reader.remaining();
        let skipped = reader.skip(skip);
        let mut data = [0; ENOUGH];
        let read = reader.read(&mut data);
        assert_eq!(reader.remaining(), room - (skipped + read) as u64);
    }

    fn write(&mut self) {
        let Some(at) = self.pick() else { return };
        let (skip, len) = (self.bytes.below(64), self.bytes.below(ENOUGH));
        let mut writer = self.queue.writer(&self.held[at]);
        let room = writer.remaining();
        let skipped = writer.skip(skip);
        let written = writer.write(&[0xdd; ENOUGH][..len]);
        assert_eq!(writer.remaining(), room - (skipped + written) as u64);
    }

    fn complete(&mut self) {
        let Some(at) = self.pick() else { return };
        let written = self.len();
        let chain = self.held.swap_remove(at);
        self.queue.add_used(chain, written);
        self.ended();
    }

    fn ended(&mut self) {
        self.completed += 1;
        self.unpublished = self.unpublished.wrapping_add(1);
    }

    fn give_back(&mut self) {
        match self.bytes.below(3) {
            0 => {
                let Some(at) = self.pick() else { return };
                drop(self.held.swap_remove(at));
                // Swept when the queue looks next, which our check makes it do.
                self.ended();
            }
            1 => {
                let Some(at) = self.pick() else { return };
                let chain = self.held.swap_remove(at);
                self.queue.discard(chain);
                self.discarded += 1;
            }
            _ => {
                let Some(chain) = self.held.pop() else { return };
                match self.queue.unpop(chain) {
                    Ok(()) => {
                        self.popped -= 1;
                        self.unlogged = true;
                    }
                    Err(chain) => self.held.push(chain),
                }
            }
        }
    }

    fn publish(&mut self) {
        // Takes back what was dropped.
        self.queue.outstanding();
        self.queue.publish();
        let news = std::mem::take(&mut self.unpublished);
        if !self.packed && !self.features.contains(Features::IN_ORDER) && news > 0 {
            self.used = self.used.wrapping_add(news);
            assert_eq!(self.memory.read_u16(DEVICE + 2), self.used, "the used index");
        }
    }

    fn arm(&mut self) {
        if self.bytes.bool() {
            self.queue.disarm();
            return;
        }
        if self.queue.arm() {
            assert!(self.queue.has_available(), "asks to be looked at, and has nothing");
        }
    }

    fn move_memory(&mut self) {
        self.publish();
        let ram = if self.bytes.bool() { self.memory.fresh_ram() } else { self.memory.ram() };
        self.queue.set_ram(&ram).expect("the rings are still there");
    }

    /// The queue ends, or its process is killed; its successor gets its state, or one that somebody made up.
    fn restart(&mut self) {
        let kind = self.bytes.below(3);
        if kind > 0 {
            self.publish();
        }
        let state = match kind {
            1 => self.queue.state(),
            2 => self.made_up(),
            _ => QueueState::new(),
        };
        let region = self.inflight.as_ref().map(|(_, region)| region);
        let state_of =
            |queue: &Queue| queue.state().held.into_iter().filter(|chain| chain.completed.is_none());
        let made = Queue::tracked(self.config, &self.memory.ram(), self.features, Some(state), region);
        let Ok(mut queue) = made else {
            // A region that was tried is not the old queue's any more; a queue without one goes on.
            if region.is_some() {
                self.inflight = None;
                self.start_over();
            }
            return;
        };
        self.unlogged = true;
        self.held.clear();
        for chain in state_of(&queue) {
            self.held.extend(queue.adopt(chain.id));
        }
        queue.drop_unclaimed();
        self.queue = queue;
        self.log();
        self.held.iter().for_each(|chain| self.look(chain));
        self.recount();
    }

    /// A reset: a queue of its own again, nothing in flight.
    fn start_over(&mut self) {
        self.unlogged = true;
        self.held.clear();
        let queue = Queue::new(self.config, &self.memory.ram(), self.features, None);
        self.queue = queue.expect("a sound configuration");
        self.log();
        self.recount();
    }

    /// Takes the queue's word for what a state brought in.
    fn recount(&mut self) {
        self.queue.outstanding();
        let counters = self.queue.counters();
        (self.popped, self.completed, self.discarded) =
            (counters.popped, counters.completed, counters.discarded);
        self.unpublished = 0;
        self.queue.publish();
        if !self.packed {
            self.used = self.queue.state().used.index;
        }
    }

    fn made_up(&mut self) -> QueueState {
        let pos = |bytes: &mut Bytes<'_>| RingPos { index: bytes.u16(), wrap: bytes.bool() };
        let (avail, used) = (pos(&mut self.bytes), pos(&mut self.bytes));
        let count = self.bytes.below(8);
        let held = (0..count)
            .map(|_| HeldChain {
                id: ChainId(u16::from(self.bytes.u8())),
                descs: self.bytes.u16() % 8,
                readable: (0..self.bytes.below(3)).map(|_| (GuestAddress(self.addr()), self.len())).collect(),
                writable: (0..self.bytes.below(3)).map(|_| (GuestAddress(self.addr()), self.len())).collect(),
                completed: self.bytes.bool().then(|| self.len()),
            })
            .collect();
        QueueState { avail, used, held }
    }

    fn check(&mut self) {
        let fault = self.queue.fault().cloned();
        assert_eq!(self.queue.outstanding(), self.held.len(), "chains out");
        let QueueCounters { popped, completed, discarded, foreign, .. } = self.queue.counters();
        assert_eq!((popped, discarded, foreign), (self.popped, self.discarded, 0), "counters");
        assert_eq!(completed, self.completed, "completed");
        assert_eq!(self.queue.fault(), fault.as_ref());
    }

    fn end(mut self) {
        // A stopped queue takes completions.
        while let Some(chain) = self.held.pop() {
            self.queue.add_used(chain, 0);
            self.ended();
        }
        self.publish();
        self.check();
        self.queue.into_state();
        self.memory.check_untouched(self.log.as_ref().filter(|_| !self.unlogged));
    }
}
