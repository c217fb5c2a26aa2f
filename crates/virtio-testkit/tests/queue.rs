//! The ring drivers against `vm_virtio::Queue`, both layouts: the queue has to satisfy an oracle that was written
//! without it. Random operations in random shapes first, then what randomness reaches seldom.
use std::collections::{HashMap, VecDeque};

use proptest::prelude::*;
use virtio_testkit::{Buf, Interrupts, RingDriver, RingLayout, Shape, TestRam, Used};
use vm_memory::GuestAddress;
use vm_virtio::{Chain, Features, Queue, RingPos};

/// A driver, a queue, and what each buffer has to come back with.
struct Pair {
    ram: TestRam,
    ring: RingDriver,
    queue: Queue,
    /// Chains that were made available and not popped, in order.
    available: VecDeque<Request>,
    /// What the device holds.
    held: Vec<(Request, Chain)>,
    /// What the device gave back, by id: expected length, expected contents.
    done: HashMap<u16, (Request, u32)>,
    serial: u8,
}

#[derive(Clone)]
struct Request {
    id: u16,
    chain: Vec<Buf>,
    sent: Vec<u8>,
    serial: u8,
}

impl Request {
    fn writable(&self) -> u32 {
        self.chain.iter().filter(|buf| buf.writable).map(|buf| buf.len).sum()
    }
}

/// What the device answers to what it read.
fn answer(sent: &[u8], len: usize) -> Vec<u8> {
    let seed = sent.iter().fold(17u8, |sum, byte| sum.wrapping_mul(31).wrapping_add(*byte));
    (0..len).map(|i| seed.wrapping_add(i as u8)).collect()
}

impl Pair {
    fn new(layout: RingLayout, size: u16, features: Features, start: RingPos) -> Pair {
        let ram = TestRam::spread(3, 1 << 20);
        let mut ring = RingDriver::start_at(&ram, layout, size, features, start);
        let state = Some(ring.queue_state());
        let queue = Queue::new(ring.queue_config(), &ram.ram(), features, state).expect("a legal ring");
        let (available, held, done) = Default::default();
        Pair { ram, ring, queue, available, held, done, serial: 0 }
    }

    fn fresh(layout: RingLayout, size: u16, features: Features) -> Pair {
        Pair::new(layout, size, features, RingPos { index: 0, wrap: true })
    }

    /// Offers one chain with elements of these lengths, as many of them readable. False: no room.
    fn offer(&mut self, lens: &[u32], readable: usize, shape: Shape) -> bool {
        let (reads, writes) = lens.split_at(readable.min(lens.len()));
        let mut sent = Vec::new();
        let mut chain = Vec::new();
        for len in reads {
            self.serial = self.serial.wrapping_add(1);
            let data: Vec<u8> = (0..*len).map(|i| self.serial ^ i as u8).collect();
            chain.push(self.ram.readable(&data));
            sent.extend(data);
        }
        chain.extend(writes.iter().map(|len| self.ram.writable(*len)));
        let Ok(id) = self.ring.stage(&chain, shape) else {
            chain.iter().for_each(|buf| self.ram.free(buf.addr));
            return false;
        };
        self.available.push_back(Request { id, chain, sent, serial: self.serial });
        true
    }

    /// The device takes what is next and reads it.
    fn pop(&mut self) -> bool {
        let Some(chain) = self.queue.pop() else { return false };
        let request = self.available.pop_front().expect("what was popped was available");
        let mut reader = self.queue.reader(&chain);
        let mut read = vec![0; request.sent.len()];
        reader.read_exact(&mut read).expect("all that is readable");
        assert_eq!((&read, reader.remaining()), (&request.sent, 0), "request {}", request.serial);
        let writable: u64 = self.queue.writer(&chain).remaining();
        assert_eq!(writable, u64::from(request.writable()));
        self.held.push((request, chain));
        true
    }

    /// The device answers one of those that it holds.
    fn complete(&mut self, which: usize, len: u32) {
        if self.held.is_empty() {
            return;
        }
        let at = which % self.held.len();
        let (request, chain) = self.held.remove(at);
        let len = len.min(request.writable());
        self.queue.writer(&chain).write_all(&answer(&request.sent, len as usize)).expect("room");
        self.queue.add_used(chain, len);
        self.done.insert(request.id, (request, len));
    }

    /// The driver takes what is used and compares.
    fn take(&mut self) -> usize {
        let taken = self.ring.drain();
        for Used { id, len, skipped } in &taken {
            let (request, expected) = self.done.remove(id).expect("the device completed it");
            assert_eq!(*len, expected, "request {} (skipped: {skipped})", request.serial);
            let written = self.ram.written(&request.chain);
            let (head, tail) = written.split_at(*len as usize);
            assert_eq!(head, answer(&request.sent, head.len()));
            assert!(tail.iter().all(|byte| *byte == 0x5a), "nothing behind len is touched");
            request.chain.iter().for_each(|buf| self.ram.free(buf.addr));
        }
        taken.len()
    }

    /// The device publishes; it would interrupt exactly when the driver is owed it.
    fn publish(&mut self) {
        let interrupt = self.queue.publish();
        assert_eq!(
            interrupt,
            self.ring.interrupt_owed(),
            "an interrupt exactly when the driver's event is passed"
        );
        self.ring.check_untouched().unwrap();
    }

    /// Everything that is out comes back.
    fn finish(&mut self) {
        self.ring.publish();
        while self.pop() {}
        assert!(self.queue.fault().is_none(), "{:?}", self.queue.fault());
        assert!(self.available.is_empty(), "all that was available was popped");
        while !self.held.is_empty() {
            self.complete(0, u32::MAX);
        }
        self.publish();
        self.take();
        assert_eq!((self.ring.in_flight(), self.done.len(), self.queue.outstanding()), (0, 0, 0));
        self.ring.check_untouched().unwrap();
        let ended = self.queue.state();
        let expected = self.ring.queue_state();
        assert_eq!((ended.avail, ended.used), (expected.avail, expected.used));
    }
}

#[derive(Debug, Clone)]
enum Op {
    Offer { lens: Vec<u32>, readable: usize, shape: u8 },
    Publish,
    Pop,
    Unpop,
    Complete { which: usize, len: u32 },
    Give,
    Take,
    Interrupts(u8),
    Restart,
}

fn op() -> impl Strategy<Value = Op> {
    let lens = prop::collection::vec(prop_oneof![4 => 1u32..40, 1 => Just(0u32), 1 => 200u32..5000], 1..6);
    prop_oneof![
        6 => (lens, 0usize..6, any::<u8>()).prop_map(|(lens, readable, shape)| Op::Offer { lens, readable, shape }),
        4 => Just(Op::Publish),
        6 => Just(Op::Pop),
        1 => Just(Op::Unpop),
        6 => (any::<usize>(), prop_oneof![Just(u32::MAX), 0u32..300])
            .prop_map(|(which, len)| Op::Complete { which, len }),
        4 => Just(Op::Give),
        4 => Just(Op::Take),
        1 => any::<u8>().prop_map(Op::Interrupts),
        1 => Just(Op::Restart),
    ]
}

fn run(layout: RingLayout, size: u16, features: Features, start: RingPos, ops: &[Op]) {
    let mut pair = Pair::new(layout, size, features, start);
    let indirect = features.contains(Features::INDIRECT_DESC);
    for op in ops {
        match op {
            Op::Offer { lens, readable, shape } => {
                let lens = &lens[..lens.len().min(usize::from(size))];
                let shape = match shape % 3 {
                    1 if indirect => Shape::Indirect,
                    2 if indirect && layout == RingLayout::Split => Shape::Mixed(lens.len() / 2),
                    _ => Shape::Direct,
                };
                pair.offer(lens, *readable, shape);
            }
            Op::Publish => {
                pair.ring.publish();
                // A kick is wanted at most if there is something new; that it comes when the queue sleeps is
                // a test of its own.
                pair.ring.kick_wanted();
            }
            Op::Pop => {
                pair.pop();
            }
            Op::Unpop => {
                if let Some((request, chain)) = pair.held.pop() {
                    match pair.queue.unpop(chain) {
                        Ok(()) => pair.available.push_front(request),
                        Err(chain) => pair.held.push((request, chain)),
                    }
                }
            }
            Op::Complete { which, len } => pair.complete(*which, *len),
            Op::Give => pair.publish(),
            Op::Take => {
                pair.take();
            }
            Op::Interrupts(mode) => pair.ring.set_interrupts(match mode % 3 {
                0 => Interrupts::Always,
                1 => Interrupts::Never,
                _ => Interrupts::After(u16::from(mode / 3) % size + 1),
            }),
            Op::Restart => {
                // Stop and start: the state has to be enough.
                while !pair.held.is_empty() {
                    pair.complete(0, 7);
                }
                pair.publish();
                let (config, state) = (pair.ring.queue_config(), pair.queue.state());
                pair.queue =
                    Queue::new(config, &pair.ram.ram(), features, Some(state)).expect("its own state");
            }
        }
    }
    pair.finish();
}

fn features(layout: RingLayout, bits: u8) -> Features {
    let optional = [Features::INDIRECT_DESC, Features::EVENT_IDX, Features::IN_ORDER];
    let without = layout.features() - Features::INDIRECT_DESC - Features::EVENT_IDX;
    let chosen = optional.iter().enumerate().filter(|(i, _)| bits & (1 << i) != 0);
    chosen.fold(without, |set, (_, feature)| set | *feature)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn split_random(
        log in 0u32..7, bits in 0u8..8, start in prop_oneof![Just(0u16), any::<u16>()],
        ops in prop::collection::vec(op(), 0..160),
    ) {
        let start = RingPos { index: start, wrap: true };
        run(RingLayout::Split, 1 << log, features(RingLayout::Split, bits), start, &ops);
    }

    #[test]
    fn packed_random(
        size in 1u16..40, bits in 0u8..8, index in any::<u16>(), wrap in any::<bool>(),
        ops in prop::collection::vec(op(), 0..160),
    ) {
        let start = RingPos { index: index % size, wrap };
        run(RingLayout::Packed, size, features(RingLayout::Packed, bits), start, &ops);
    }
}

/// All four feature sets of a layout, and a size.
fn each(mut test: impl FnMut(RingLayout, u16, Features)) {
    for layout in RingLayout::ALL {
        let sizes: &[u16] = if layout == RingLayout::Split { &[1, 8, 256] } else { &[1, 7, 256] };
        for size in sizes {
            for bits in 0..8 {
                test(layout, *size, features(layout, bits));
            }
        }
    }
}

#[test]
fn c2_7_5_3_2_every_shape_of_a_chain() {
    each(|layout, size, features| {
        for readable in 0..=4usize {
            for (lens, direct) in [(&[3u32, 0, 5, 4096][..], 2), (&[1][..], 0), (&[9, 9][..], 1)] {
                let shapes = [Shape::Direct, Shape::Indirect, Shape::Mixed(direct)];
                for shape in shapes {
                    let indirect = features.contains(Features::INDIRECT_DESC);
                    let mixed = matches!(shape, Shape::Mixed(_)) && layout == RingLayout::Packed;
                    let fits = lens.len() <= usize::from(size);
                    if !fits || mixed || (shape != Shape::Direct && !indirect) {
                        continue;
                    }
                    let mut pair = Pair::fresh(layout, size, features);
                    assert!(pair.offer(lens, readable, shape));
                    pair.finish();
                }
            }
        }
    });
}

#[test]
fn indices_wrap_many_times() {
    each(|layout, size, features| {
        // A full ring at once wherever it stands: split indices pass 65535, each packed slot is met by each length.
        let split = layout == RingLayout::Split;
        let start = RingPos { index: if split { 65_000 } else { 0 }, wrap: true };
        let mut pair = Pair::new(layout, size, features, start);
        for round in 0..if split { 2 + 1000 / u32::from(size) } else { 100 } {
            let lens = vec![1; 1 + round as usize % usize::from(size.min(3))];
            while pair.offer(&lens, 0, Shape::Direct) {}
            pair.ring.publish();
            while pair.pop() {}
            while !pair.held.is_empty() {
                pair.complete(round as usize, 1);
            }
            assert_eq!(pair.queue.publish(), pair.ring.interrupt_owed(), "round {round}");
            assert!(pair.take() > 0);
        }
        pair.finish();
    });
}

#[test]
fn c2_7_10_a_sleeping_device_is_kicked() {
    each(|layout, size, features| {
        let mut pair = Pair::fresh(layout, size, features);
        for round in 0..3 * u32::from(size) + 5 {
            // Asleep: the next buffer needs a kick.
            assert!(!pair.queue.arm(), "nothing is there");
            assert!(pair.offer(&[1], 0, Shape::Direct));
            pair.ring.publish();
            assert!(pair.ring.kick_wanted(), "round {round}: armed");
            // Awake and looking: no kick.
            pair.queue.disarm();
            while pair.pop() {}
            pair.complete(0, 1);
            pair.publish();
            assert_eq!(pair.take(), 1);
            assert!(pair.offer(&[1], 0, Shape::Direct));
            pair.ring.publish();
            assert!(!pair.ring.kick_wanted(), "round {round}: not asked for");
            // Arming finds what came meanwhile.
            assert!(pair.queue.arm(), "round {round}: the race between the last look and the arming");
            while pair.pop() {}
            pair.complete(0, 1);
            pair.publish();
            assert_eq!(pair.take(), 1);
        }
    });
}

#[test]
fn c2_7_7_2_a_batch_is_interrupted_once_where_the_driver_asked() {
    each(|layout, size, features| {
        if size < 7 || !features.contains(Features::EVENT_IDX) {
            return;
        }
        let mut pair = Pair::fresh(layout, size, features);
        for _ in 0..20 {
            pair.ring.set_interrupts(Interrupts::After(4));
            for _ in 0..6 {
                assert!(pair.offer(&[1], 0, Shape::Direct));
            }
            pair.ring.publish();
            while pair.pop() {}
            let mut interrupts = Vec::new();
            for _ in 0..6 {
                pair.complete(0, 1);
                interrupts.push(pair.queue.publish());
                assert_eq!(interrupts.last(), Some(&pair.ring.interrupt_owed()));
            }
            assert_eq!(interrupts, [false, false, false, true, false, false]);
            assert_eq!(pair.take(), 6);
        }
    });
}

#[test]
fn c2_7_9_in_order_is_kept_although_the_device_is_not() {
    each(|layout, size, features| {
        if size < 7 || !features.contains(Features::IN_ORDER) {
            return;
        }
        let mut pair = Pair::fresh(layout, size, features);
        for round in 0..50usize {
            for _ in 0..5 {
                assert!(pair.offer(&[4], 0, Shape::Direct));
            }
            pair.ring.publish();
            while pair.pop() {}
            // The last first; the fourth only partly.
            pair.complete(4, 4);
            pair.complete(3, 1 + round as u32 % 4);
            pair.complete(1, 4);
            pair.publish();
            assert_eq!(pair.take(), 0, "the first is not done");
            pair.complete(0, 4);
            pair.publish();
            assert_eq!(pair.take(), 2);
            pair.complete(0, 4);
            pair.publish();
            assert_eq!(pair.take(), 3);
        }
        pair.finish();
    });
}

#[test]
fn a_buffer_may_lie_across_adjacent_regions() {
    for layout in RingLayout::ALL {
        let page = 0x1000;
        let ram = TestRam::new(&[(0x10000, page), (0x11000, page), (0x12000, page), (0x20000, 16 * page)]);
        // Taken from the allocator, so that the ring lies elsewhere.
        let pages: Vec<u64> = (0..3).map(|_| ram.alloc(page - 16, 16).0).collect();
        assert_eq!(pages, [0x10000, 0x11000, 0x12000]);
        let features = layout.features();
        let mut ring = RingDriver::new(&ram, layout, 4, features);
        let mut queue = Queue::new(ring.queue_config(), &ram.ram(), features, None).unwrap();
        let data: Vec<u8> = (0..0x1800u32).map(|i| i as u8).collect();
        let (from, to) = (GuestAddress(0x10100), GuestAddress(0x11900));
        ram.write(from, &data);
        let id = ring.add(&[Buf::readable(from, 0x1800), Buf::writable(to, 0x1700)]);
        let chain = queue.pop().unwrap();
        assert_eq!((queue.readable(&chain).len(), queue.writable(&chain).len()), (2, 2));
        let mut read = vec![0; data.len()];
        queue.reader(&chain).read_exact(&mut read).unwrap();
        assert_eq!(read, data);
        queue.add_used(chain, 0);
        queue.publish();
        assert_eq!(ring.used(), Some(Used { id, len: 0, skipped: false }));
    }
}

#[test]
fn a_dropped_chain_goes_back_empty() {
    each(|layout, size, features| {
        let mut pair = Pair::fresh(layout, size, features);
        assert!(pair.offer(&[16], 0, Shape::Direct));
        pair.ring.publish();
        drop(pair.queue.pop().unwrap());
        pair.queue.publish();
        assert_eq!(pair.ring.drain().iter().map(|used| used.len).collect::<Vec<_>>(), [0]);
        pair.ring.check_untouched().unwrap();
    });
}
