//! Both rings against the plain driver: random shapes, completion order, batches, restarts. What was added comes back
//! once, with the length and the bytes that the device gave it.
use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;

use super::driver::{AVAIL, DATA, FAR, crowded_memory, memory};
use super::*;

#[derive(Clone, Debug)]
enum Op {
    /// Lengths of readable and writable elements, and how many of all are direct (if both kinds are possible).
    Add(Vec<u32>, Vec<u32>, usize),
    Pop,
    /// Which of the chains that are out, and how much of it is written.
    Complete(usize, u32),
    Drop(usize),
    Unpop,
    Publish,
    Arm,
    Collect,
    Interrupt(u16),
    Restart,
    Remap,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let lens = || prop::collection::vec(prop_oneof![4 => 1u32..20, 1 => Just(0)], 0..4);
    let op = prop_oneof![
        8 => (lens(), lens(), 0usize..8).prop_map(|(r, w, d)| Op::Add(r, w, d)),
        8 => Just(Op::Pop),
        6 => (any::<usize>(), prop_oneof![Just(u32::MAX), 0u32..40]).prop_map(|(i, n)| Op::Complete(i, n)),
        1 => any::<usize>().prop_map(Op::Drop),
        1 => Just(Op::Unpop),
        4 => Just(Op::Publish),
        1 => Just(Op::Arm),
        4 => Just(Op::Collect),
        1 => any::<u16>().prop_map(Op::Interrupt),
        1 => Just(Op::Restart),
        1 => Just(Op::Remap),
    ];
    prop::collection::vec(op, 1..200)
}

struct Buffer {
    message: Vec<u8>,
    writable: Vec<Elem>,
}

/// A chain that the device has, and its driver's id.
struct Held {
    chain: Chain,
    id: u16,
}

struct World {
    driver: Driver,
    queue: Queue,
    memory: vm_memory::GuestMemoryMmap,
    /// By id: what the driver made available.
    buffers: HashMap<u16, Buffer>,
    /// Available and not popped, in order.
    available: VecDeque<u16>,
    held: Vec<Held>,
    /// With IN_ORDER: popped and not used, in order.
    order: VecDeque<u16>,
    /// By id: length that the device completed with.
    completed: HashMap<u16, u32>,
    /// In the order of completion, not yet due because of IN_ORDER or not published.
    done: Vec<u16>,
    /// What the driver must find next.
    due: VecDeque<(u16, u32)>,
    serial: u8,
}

impl World {
    fn new(packed: bool, size: u16, features: Features) -> World {
        let mut driver = driver(packed, size, features);
        // Both ways to walk a chain, each with half of the features' sets.
        let quick = features.bits().count_ones().is_multiple_of(2);
        let memory = if quick { memory() } else { crowded_memory() };
        driver.ram = GuestRam::new(&memory);
        let queue = driver.queue();
        World {
            driver,
            queue,
            memory,
            buffers: HashMap::new(),
            available: VecDeque::new(),
            held: Vec::new(),
            order: VecDeque::new(),
            completed: HashMap::new(),
            done: Vec::new(),
            due: VecDeque::new(),
            serial: 0,
        }
    }

    fn in_order(&self) -> bool {
        self.driver.features.contains(Features::IN_ORDER)
    }

    fn add(&mut self, readable: &[u32], writable: &[u32], direct: usize) {
        let count = readable.len() + writable.len();
        if count == 0 || count > usize::from(self.driver.size) {
            return;
        }
        // Each buffer has memory of its own; some of it in another region.
        self.serial = self.serial.wrapping_add(1);
        let base = if self.serial.is_multiple_of(3) { FAR } else { DATA };
        let mut at = base + 0x100 * (u64::from(self.serial) % 128);
        let mut message = Vec::new();
        let mut elems = Vec::new();
        for len in readable {
            let bytes: Vec<u8> = (0..*len).map(|i| self.serial ^ i as u8).collect();
            self.driver.write(at, &bytes);
            message.extend(bytes);
            elems.push(r(at, *len));
            at += u64::from(*len);
        }
        for len in writable {
            elems.push(w(at, *len));
            at += u64::from(*len);
        }
        let indirect = self.driver.features.contains(Features::INDIRECT_DESC);
        let direct = match (indirect, self.driver.packed) {
            (false, _) => count,
            (true, true) => {
                if direct.is_multiple_of(2) {
                    0
                } else {
                    count
                }
            }
            (true, false) => direct.min(count),
        };
        let (direct, table) = elems.split_at(direct);
        let Some(id) = self.driver.add(direct, table) else { return };
        let writable = elems.into_iter().filter(|elem| elem.write).collect();
        self.buffers.insert(id, Buffer { message, writable });
        self.available.push_back(id);
    }

    fn pop(&mut self) {
        let Some(chain) = self.queue.pop() else {
            assert!(self.available.is_empty());
            assert_eq!(self.queue.fault(), None);
            return;
        };
        let id = self.available.pop_front().expect("popped what was not made available");
        assert_eq!(self.queue.id(&chain), Some(ChainId(id)));
        self.order.push_back(id);
        self.check(&chain, id);
        self.held.push(Held { chain, id });
    }

    fn check(&self, chain: &Chain, id: u16) {
        let buffer = &self.buffers[&id];
        let mut message = vec![0; self.queue.reader(chain).remaining() as usize];
        self.queue.reader(chain).read_exact(&mut message).unwrap();
        assert_eq!(message, buffer.message);
        let room: u64 = buffer.writable.iter().map(|elem| u64::from(elem.len)).sum();
        assert_eq!(self.queue.writer(chain).remaining(), room);
    }

    fn complete(&mut self, which: usize, written: u32) {
        if self.held.is_empty() {
            return;
        }
        let Held { chain, id } = self.held.remove(which % self.held.len());
        self.check(&chain, id);
        let mut writer = self.queue.writer(&chain);
        let room = writer.remaining() as u32;
        let data = vec![id as u8 ^ 0xa5; written.min(room) as usize];
        assert_eq!(writer.write(&data), data.len());
        self.completed.insert(id, written.min(room));
        self.done.push(id);
        self.queue.add_used(chain, written);
    }

    fn drop_one(&mut self, which: usize) {
        if self.held.is_empty() {
            return;
        }
        let Held { chain, id } = self.held.remove(which % self.held.len());
        drop(chain);
        // Swept at the next publication, which is now, so that the order stays simple.
        self.completed.insert(id, 0);
        self.done.push(id);
        self.queue.outstanding();
    }

    fn publish(&mut self) {
        let before = self.queue.state().used;
        let due: Vec<u16> = if self.in_order() {
            let mut due = Vec::new();
            while let Some(id) = self.order.front().copied().filter(|id| self.done.contains(id)) {
                self.order.pop_front();
                self.done.retain(|done| *done != id);
                due.push(id);
            }
            due
        } else {
            let due = std::mem::take(&mut self.done);
            self.order.retain(|id| !due.contains(id));
            due
        };
        let interrupt = self.queue.publish();
        let after = self.queue.state().used;
        assert_eq!(interrupt, self.interrupt_wanted(before, after, !due.is_empty()));
        for id in due {
            let len = self.completed.remove(&id).unwrap();
            self.due.push_back((id, len));
        }
    }

    /// Position by position, from what the driver asked for.
    fn interrupt_wanted(&self, mut from: RingPos, to: RingPos, any: bool) -> bool {
        let driver = &self.driver;
        if !driver.features.contains(Features::EVENT_IDX) {
            return any;
        }
        let event = if driver.packed {
            if driver.u16_at(AVAIL + 2) == 0 {
                return any;
            }
            driver.u16_at(AVAIL)
        } else {
            driver.u16_at(AVAIL + 4 + 2 * u64::from(driver.size))
        };
        let mut passed = false;
        let mut first = true;
        while any && (first || from != to) {
            first = false;
            let position = if driver.packed { from.index | (u16::from(from.wrap) << 15) } else { from.index };
            passed |= position == event;
            from.index = from.index.wrapping_add(1);
            if driver.packed && from.index == driver.size {
                from = RingPos { index: 0, wrap: !from.wrap };
            }
        }
        passed
    }

    fn collect(&mut self) {
        let used = self.driver.used();
        let due: Vec<_> = self.due.drain(..).collect();
        assert_eq!(used, due);
        for (id, len) in used {
            let buffer = self.buffers.remove(&id).unwrap();
            let mut left = len;
            for elem in buffer.writable {
                let part = left.min(elem.len);
                let bytes = self.driver.read(elem.addr, part as usize);
                assert!(bytes.iter().all(|byte| *byte == id as u8 ^ 0xa5));
                left -= part;
            }
        }
    }

    fn interrupt_at(&mut self, pick: u16) {
        // Near the positions that matter, and far.
        let size = self.driver.size;
        let position = if self.driver.packed {
            (pick % size) | (pick & 0x8000)
        } else {
            self.driver.next_used.wrapping_add(pick % (size + 2))
        };
        self.driver.want_interrupt_at(position);
    }

    fn restart(&mut self) {
        self.publish();
        let queue = std::mem::replace(&mut self.queue, driver(false, 1, Features::empty()).queue());
        let state = queue.into_state();
        let held = std::mem::take(&mut self.held);
        self.queue = self.driver.queue_from(Some(state)).unwrap();
        for Held { chain, id } in held {
            drop(chain);
            let chain = self.queue.adopt(ChainId(id)).unwrap();
            self.check(&chain, id);
            self.held.push(Held { chain, id });
        }
        assert_eq!(self.queue.unclaimed(), 0);
    }

    fn run(&mut self, op: &Op) {
        match op {
            Op::Add(readable, writable, direct) => self.add(readable, writable, *direct),
            Op::Pop => self.pop(),
            Op::Complete(which, written) => self.complete(*which, *written),
            Op::Drop(which) => self.drop_one(*which),
            Op::Unpop => {
                // The one that was popped last, if it is still out.
                if let Some(last) = self.held.pop() {
                    let latest = self.order.back() == Some(&last.id);
                    match self.queue.unpop(last.chain) {
                        Ok(()) => {
                            assert!(latest);
                            self.order.pop_back();
                            self.available.push_front(last.id);
                        }
                        Err(chain) => self.held.push(Held { chain, id: last.id }),
                    }
                }
            }
            Op::Publish => self.publish(),
            Op::Arm => {
                let more = self.queue.arm();
                assert_eq!(more, !self.available.is_empty());
                self.queue.disarm();
            }
            Op::Collect => self.collect(),
            Op::Interrupt(pick) => self.interrupt_at(*pick),
            Op::Restart => self.restart(),
            Op::Remap => {
                self.driver.ram = GuestRam::new(&self.memory);
                self.queue.set_ram(&self.driver.ram).unwrap();
            }
        }
        assert_eq!(self.queue.fault(), None);
    }

    fn finish(&mut self) {
        self.publish();
        self.collect();
        while !self.available.is_empty() {
            self.pop();
        }
        while !self.held.is_empty() {
            self.complete(0, 5);
        }
        self.publish();
        self.collect();
        assert_eq!((self.driver.out(), self.queue.outstanding()), (0, 0));
        let counters = self.queue.counters();
        assert_eq!(counters.foreign, 0);
        assert_eq!(self.queue.old_snapshots(), 0);
    }
}

fn run(packed: bool, size: u16, features: u8, ops: &[Op]) {
    let mut bits = Features::empty();
    for (bit, feature) in
        [Features::INDIRECT_DESC, Features::EVENT_IDX, Features::IN_ORDER].into_iter().enumerate()
    {
        if features & (1 << bit) != 0 {
            bits |= feature;
        }
    }
    let mut world = World::new(packed, size, bits);
    for op in ops {
        world.run(op);
    }
    world.finish();
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn split_ring_agrees_with_the_model(bits in 0u32..6, features in 0u8..8, ops in ops()) {
        run(false, 1 << bits, features, &ops);
    }

    #[test]
    fn packed_ring_agrees_with_the_model(size in 1u16..24, features in 0u8..8, ops in ops()) {
        run(true, size, features, &ops);
    }
}

/// Beyond all wrap-arounds: the split index, with and without everything negotiated, and packed laps.
#[test]
fn wrap_arounds_of_indices_and_rings() {
    for (packed, size, chains) in
        [(false, 64, 67_000), (false, 4, 3000), (true, 3, 3000), (true, 7, 3000), (true, 256, 3000)]
    {
        for features in (0..8).filter(|features| chains < 10_000 || [0, 7].contains(features)) {
            let mut bits = Features::empty();
            for (bit, feature) in
                [Features::INDIRECT_DESC, Features::EVENT_IDX, Features::IN_ORDER].into_iter().enumerate()
            {
                if features & (1 << bit) != 0 {
                    bits |= feature;
                }
            }
            let mut world = World::new(packed, size, bits);
            let rounds = chains / usize::from(size.min(100));
            for round in 0..rounds {
                for i in 0..size.min(100) {
                    world.add(&[1], &[2], usize::from(i));
                }
                while !world.available.is_empty() {
                    world.pop();
                }
                if features & 2 != 0 {
                    world.interrupt_at(round as u16 ^ (round as u16) << 13);
                }
                while !world.held.is_empty() {
                    world.complete(round, 2);
                }
                world.publish();
                world.collect();
            }
            world.finish();
        }
    }
}
