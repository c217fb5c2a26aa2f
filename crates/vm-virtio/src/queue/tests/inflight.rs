//! In-flight tracking: a process that dies between any two stores, and its successor. Nothing is lost, nothing is given
//! back twice, and what was in flight comes first, in its order.
use std::collections::HashMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::super::stores::death;
use super::driver::DATA;
use super::*;
use crate::memory::SharedMemory;

/// What driver and device do, one after the other.
#[derive(Clone, Copy, Debug)]
enum Op {
    /// The driver makes so many buffers available, of different shapes.
    Add(u32),
    Pop(u32),
    /// The device is done with one of those that are out: this one, counted around.
    Complete(usize),
    /// It just drops it.
    Drop(usize),
    Unpop,
    Publish,
    /// The driver takes what is used.
    Collect,
}

use Op::{Add, Collect, Complete, Drop, Pop, Publish, Unpop};

/// A driver, and the memory that survives.
struct World {
    driver: Driver,
    region: Arc<SharedMemory>,
    /// The next buffer's number.
    next: u32,
    /// By the driver's id: number, and length that it must have when it is used.
    out: HashMap<u16, u32>,
    used: Vec<u32>,
}

/// Numbers are read from the buffer by the device, which writes eight bytes made of them.
const PLACE: u64 = 64;

fn answer(number: u32) -> [u8; 8] {
    (u64::from(number) | 0xabcd << 32).to_le_bytes()
}

impl World {
    fn new(packed: bool, size: u16, features: Features) -> World {
        World {
            driver: driver(packed, size, features),
            region: Arc::new(SharedMemory::private(InflightRegion::bytes_for(size))),
            next: 0,
            out: HashMap::new(),
            used: Vec::new(),
        }
    }

    fn region(&self) -> InflightRegion {
        InflightRegion::new(self.region.clone(), 0, self.region.len()).unwrap()
    }

    fn queue(&self) -> Result<Queue, QueueError> {
        Queue::tracked(self.driver.config, &self.driver.ram, self.driver.features, None, Some(&self.region()))
    }

    /// As far as there is room.
    fn add(&mut self) {
        let at = DATA + PLACE * u64::from(self.next % 1024);
        self.driver.write(at, &self.next.to_le_bytes());
        self.driver.write(at + 32, &[0; 16]);
        let elems = [r(at, 2), r(at + 2, 2), w(at + 32, 4), w(at + 36, 4)];
        let indirect = self.driver.features.contains(Features::INDIRECT_DESC);
        let (joined, halves) = ([r(at, 4), w(at + 32, 8)], [r(at, 4), w(at + 32, 4), w(at + 36, 4)]);
        let id = match self.next % 4 {
            0 if indirect => self.driver.add(&[], &elems),
            1 => self.driver.add(&halves, &[]),
            2 if indirect && !self.driver.packed => self.driver.add(&elems[..1], &elems[1..]),
            _ => self.driver.add(&joined, &[]),
        };
        if let Some(id) = id {
            assert_eq!(self.out.insert(id, self.next), None);
            self.next += 1;
        }
    }

    fn collect(&mut self) {
        for (id, len) in self.driver.used() {
            let number = self.out.remove(&id).expect("it was out");
            let bytes = self.driver.read(DATA + PLACE * u64::from(number % 1024) + 32, 8);
            // A chain that the device dropped went back without an answer.
            if len > 0 {
                assert_eq!((len, &bytes[..]), (8, &answer(number)[..]), "of {number}");
            }
            self.used.push(number);
        }
    }

    /// All have been used, each once.
    fn finish(mut self) {
        self.collect();
        assert!(self.out.is_empty(), "lost: {:?}", self.out);
        self.used.sort_unstable();
        assert!(self.used.iter().copied().eq(0..self.next), "{:?}", self.used);
        assert_eq!(self.driver.out(), 0);
    }
}

/// A device, until its process dies.
struct Device {
    queue: Queue,
    held: Vec<(u32, Chain)>,
    /// Numbers of what was popped, and not put back.
    popped: Vec<u32>,
}

impl Device {
    /// `None`: it did not live to see its queue.
    fn new(world: &World) -> Option<Device> {
        let queue = world.queue();
        if death::is_here() {
            return None;
        }
        Some(Device { queue: queue.unwrap(), held: Vec::new(), popped: Vec::new() })
    }

    fn pop(&mut self, world: &World) {
        let Some(chain) = self.queue.pop() else {
            assert_eq!(self.queue.fault(), None);
            return;
        };
        let mut number = [0; 4];
        self.queue.reader(&chain).read_exact(&mut number).unwrap();
        let number = u32::from_le_bytes(number);
        let id = self.queue.id(&chain).unwrap();
        assert_eq!(world.out.get(&id.0), Some(&number), "{number} is not the device's");
        assert!(self.popped.last().is_none_or(|last| *last < number), "{number} after {:?}", self.popped);
        self.popped.push(number);
        self.held.push((number, chain));
    }

    fn complete(&mut self, which: usize) {
        if !self.held.is_empty() {
            let (number, chain) = self.held.remove(which % self.held.len());
            self.queue.writer(&chain).write_all(&answer(number)).unwrap();
            self.queue.add_used(chain, 8);
        }
    }

    /// Whether the process is alive afterwards.
    fn run(&mut self, world: &mut World, op: Op) -> bool {
        match op {
            Add(count) => (0..count).for_each(|_| world.add()),
            Pop(count) => (0..count).for_each(|_| self.pop(world)),
            Complete(which) => self.complete(which),
            Drop(which) => {
                if !self.held.is_empty() {
                    drop(self.held.remove(which % self.held.len()));
                }
            }
            Unpop => {
                if let Some((number, chain)) = self.held.pop() {
                    match self.queue.unpop(chain) {
                        Ok(()) => assert_eq!(self.popped.pop(), Some(number)),
                        Err(chain) => self.held.push((number, chain)),
                    }
                }
            }
            Publish => {
                self.queue.publish();
            }
            Collect => world.collect(),
        }
        !death::is_here()
    }

    /// Finishes everything, two at a time, the later one first. Whether the process is alive afterwards.
    fn finish(&mut self, world: &mut World) -> bool {
        loop {
            if !(self.run(world, Pop(2)) && self.run(world, Collect)) {
                return false;
            }
            if self.held.is_empty() {
                return self.run(world, Publish);
            }
            let ops = [Complete(1), Complete(0), Publish];
            if !ops.into_iter().all(|op| self.run(world, op)) {
                return false;
            }
        }
    }
}

/// Lets the process die after so many stores of `ops`, and so many of its successor. Whether the first and the second
/// death came.
fn killed(mut world: World, ops: &[Op], first: u64, second: u64) -> (bool, bool) {
    let mut device = Device::new(&world).unwrap();
    death::after(first);
    let _ = ops.iter().all(|op| device.run(&mut world, *op));
    let came = death::came();
    drop(device);
    world.add();

    death::after(second);
    if let Some(mut device) = Device::new(&world) {
        device.finish(&mut world);
        drop(device);
    }
    let again = death::came();
    world.add();
    let mut device = Device::new(&world).unwrap();
    assert!(device.finish(&mut world));
    drop(device);
    world.finish();
    (came, again)
}

const FEATURES: [Features; 4] = [
    Features::empty(),
    Features::INDIRECT_DESC,
    Features::IN_ORDER,
    Features::INDIRECT_DESC.union(Features::IN_ORDER).union(Features::EVENT_IDX),
];

/// A world whose ring was used for so many buffers before.
fn used_before(packed: bool, size: u16, features: Features, laps: u32) -> World {
    let mut world = World::new(packed, size, features);
    let mut device = Device::new(&world).unwrap();
    for _ in 0..laps {
        for op in [Add(3), Pop(3), Complete(1), Publish, Complete(1), Complete(0), Publish, Collect] {
            device.run(&mut world, op);
        }
    }
    assert!(world.out.is_empty());
    world
}

/// Batches of one and of several, out of order, over the end of the ring, full and empty rings; old chains whose
/// descriptors the driver writes over in the ring.
const SCRIPTS: [&[Op]; 6] = [
    &[Add(3), Pop(1), Complete(0), Publish, Pop(2), Complete(1), Complete(0), Publish, Collect],
    &[
        Add(4),
        Pop(3),
        Complete(1),
        Pop(1),
        Complete(2),
        Publish,
        Complete(0),
        Collect,
        Add(2),
        Pop(2),
        Publish,
    ],
    &[Add(9), Pop(9), Complete(1), Complete(1), Complete(0), Publish, Collect, Add(9), Pop(9), Complete(2)],
    &[Add(3), Pop(2), Unpop, Complete(0), Unpop, Pop(2), Publish, Unpop, Pop(1), Drop(0), Publish, Publish],
    &[Add(9), Pop(9), Drop(0), Complete(0), Drop(0), Complete(0), Drop(0), Complete(0), Publish, Publish],
    &[
        Add(3),
        Pop(3),
        Complete(1),
        Publish,
        Collect,
        Add(2),
        Pop(1),
        Complete(1),
        Publish,
        Collect,
        Add(2),
        Pop(2),
        Complete(0),
        Publish,
        Collect,
        Add(1),
        Pop(1),
        Complete(0),
        Complete(0),
        Publish,
    ],
];

/// The heart of it. Every point at which the process can die, and every one at which its successor can: while it
/// takes over, and while it works.
#[test]
fn inflight_killed_between_every_two_stores_of_pop_put_and_publish() {
    for packed in LAYOUTS {
        for features in FEATURES {
            for (script, ops) in (0u32..).zip(SCRIPTS) {
                // From the beginning, and so that the ring's end is met: in the middle of a batch, too.
                for laps in [0, 1 + script] {
                    let size = if packed { 7 } else { 8 };
                    let world = || used_before(packed, size, features, laps);
                    let mut first = 0;
                    while killed(world(), ops, first, u64::MAX).0 {
                        let mut second = 0;
                        while laps > 0 && killed(world(), ops, first, second).1 {
                            second += 1;
                        }
                        first += 1;
                    }
                    assert!(first > 2, "{first} stores");
                }
            }
        }
    }
}

/// Of a split queue, the successor needs all 64 bits of the used index, and finds them by the latest pop.
#[test]
fn inflight_goes_on_behind_a_chain_that_was_put_back_after_the_used_index_went_around() {
    let mut world = World::new(false, 8, Features::empty());
    let mut device = Device::new(&world).unwrap();
    for op in [Add(3), Pop(3), Complete(0), Complete(0), Complete(0), Publish, Collect] {
        device.run(&mut world, op);
    }
    // All others are with one head only.
    let mut cycle = |world: &mut World, back: bool| {
        world.driver.add(&[r(DATA, 8)], &[]).unwrap();
        let chain = device.queue.pop().unwrap();
        if back {
            device.queue.unpop(chain).unwrap();
        } else {
            device.queue.add_used(chain, 0);
            device.queue.publish();
            assert_eq!(world.driver.used().len(), 1);
        }
    };
    (0..0x1_0010).for_each(|_| cycle(&mut world, false));
    cycle(&mut world, true);
    drop(device);
    let mut queue = world.queue().unwrap();
    assert!(!queue.resubmits());
    let chain = queue.pop().unwrap();
    queue.add_used(chain, 0);
    assert!(queue.pop().is_none());
    queue.publish();
    assert_eq!((world.driver.used().len(), world.driver.out()), (1, 0));
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (1u32..4).prop_map(Add),
        4 => (1u32..4).prop_map(Pop),
        6 => any::<usize>().prop_map(Complete),
        1 => any::<usize>().prop_map(Drop),
        1 => Just(Unpop),
        4 => Just(Publish),
        3 => Just(Collect),
    ];
    prop::collection::vec(op, 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Lives of one process after the other, each with its end.
    #[test]
    fn inflight_agrees_with_the_model_over_many_deaths(
        packed: bool,
        size in 1u16..12,
        features in 0usize..4,
        lives in prop::collection::vec((ops(), 0u64..80), 1..8),
    ) {
        // Chains have up to three descriptors of the ring.
        let size = if packed { size + 3 } else { (size + 3).next_power_of_two() };
        let mut world = World::new(packed, size, FEATURES[features]);
        for (ops, stores) in lives {
            death::after(stores);
            if let Some(mut device) = Device::new(&world) {
                let _ = ops.iter().all(|op| device.run(&mut world, *op));
            }
            death::came();
        }
        let mut device = Device::new(&world).unwrap();
        prop_assert!(device.finish(&mut world));
        drop(device);
        world.finish();
    }
}

/// Kills a process that has three chains out, in both layouts. Of a packed ring, two of them are older than one that was used,
/// so that they come again; the third one is in the ring as if it had not been popped, as are all where order matters.
fn with_three_out(packed: bool, features: Features) -> World {
    with_three_of(8, packed, features)
}

/// How many of the three come again.
fn comes_again(packed: bool, features: Features) -> usize {
    match (packed, features.contains(Features::IN_ORDER)) {
        (false, _) => 3,
        (true, false) => 2,
        (true, true) => 0,
    }
}

fn with_three_of(size: u16, packed: bool, features: Features) -> World {
    let mut world = World::new(packed, size, features);
    let mut device = Device::new(&world).unwrap();
    let used = if comes_again(packed, features) == 2 { 2 } else { 0 };
    for op in [Add(3), Pop(3), Complete(used), Publish, Collect, Add(1), Pop(1)] {
        device.run(&mut world, op);
    }
    assert_eq!(device.held.len(), world.out.len());
    world
}

#[test]
fn inflight_comes_again_within_the_budget_and_only_while_the_queue_is_open() {
    for (packed, features) in LAYOUTS.into_iter().flat_map(|packed| FEATURES.map(|bits| (packed, bits))) {
        let mut world = with_three_of(16, packed, features);
        world.add();
        let mut queue = world.queue().unwrap();
        assert_eq!((queue.outstanding(), queue.fault()), (0, None));
        assert!(queue.has_available() && queue.arm() && !queue.drained() && !queue.budget_spent());
        queue.close();
        assert!(queue.pop().is_none() && !queue.has_available() && !queue.arm());
        queue.open();
        queue.set_budget(2);
        let chains: Vec<Chain> = queue.iter().collect();
        assert_eq!(chains.len(), 2);
        assert!(queue.budget_spent() && !queue.drained());
        // Across the border between what comes again and what is new, and back.
        queue.set_budget(2);
        let again = queue.pop().unwrap();
        let new = queue.pop().unwrap();
        let (again_id, new_id) = (queue.id(&again), queue.id(&new));
        queue.unpop(new).unwrap();
        queue.unpop(again).unwrap();
        assert_eq!(queue.outstanding(), 2);
        queue.set_budget(9);
        let again: Vec<Chain> = queue.iter().collect();
        assert_eq!(again.iter().map(|chain| queue.id(chain)).collect::<Vec<_>>(), [again_id, new_id]);
        assert!(queue.drained());
        for chain in chains.into_iter().chain(again) {
            let number = u32::from_le_bytes(queue.reader(&chain).read_obj().unwrap());
            queue.writer(&chain).write_all(&answer(number)).unwrap();
            queue.add_used(chain, 8);
        }
        queue.publish();
        assert_eq!(queue.fault(), None);
        drop(queue);
        world.finish();
    }
}

/// A state that is taken before the chains came again has them, too.
#[test]
fn inflight_is_part_of_a_state_whether_it_came_again_or_not() {
    for (packed, features) in LAYOUTS.into_iter().flat_map(|packed| FEATURES.map(|bits| (packed, bits))) {
        let world = with_three_out(packed, features);
        let mut queue = world.queue().unwrap();
        let before = queue.state();
        let again = comes_again(packed, features);
        let chains: Vec<Chain> = queue.iter().take(again).collect();
        assert_eq!(queue.state(), before);
        assert_eq!(before.held.len(), again);
        drop(queue);
        drop(chains);
        let mut successor = world.driver.queue_from(Some(before)).unwrap();
        assert_eq!(successor.unclaimed(), again);
        assert_eq!(successor.iter().count(), 3 - again);
        assert_eq!(successor.fault(), None);
    }
}

#[test]
fn inflight_a_queue_that_was_reset_leaves_nothing_to_take_again() {
    for packed in LAYOUTS {
        let world = with_three_out(packed, Features::empty());
        let mut queue = world.queue().unwrap();
        let first = queue.pop().unwrap();
        queue.give_up();
        let again = comes_again(packed, Features::empty());
        assert_eq!(queue.iter().count(), 3 - again, "nor does the queue itself");
        queue.discard(first);
        drop(queue);
        // The driver starts over with another ring.
        let mut fresh = World { region: world.region.clone(), ..World::new(packed, 8, Features::empty()) };
        let mut device = Device::new(&fresh).unwrap();
        assert!(device.run(&mut fresh, Add(2)) && device.finish(&mut fresh));
        drop(device);
        fresh.finish();
    }
}

#[test]
fn inflight_begins_only_when_nothing_is_out() {
    for packed in LAYOUTS {
        let mut world = World::new(packed, 8, Features::empty());
        let mut queue = world.driver.queue();
        world.add();
        let _chain = queue.pop().unwrap();
        let error = Queue::tracked(
            world.driver.config,
            &world.driver.ram,
            world.driver.features,
            Some(queue.state()),
            Some(&world.region()),
        );
        assert_eq!(error.unwrap_err(), QueueError::Inflight(InflightError::Unknown));
    }
}

impl World {
    fn word(&self, at: usize) -> u64 {
        // SAFETY: within the region, which nobody else is at.
        unsafe { self.region.as_ptr().cast::<u64>().add(at).read() }
    }

    fn set_word(&self, at: usize, word: u64) {
        // SAFETY: as above.
        unsafe { self.region.as_ptr().cast::<u64>().add(at).write(word) }
    }
}

/// What a changed word is refused with.
#[track_caller]
fn refused(packed: bool, at: usize, change: impl Fn(u64) -> u64, expected: InflightError) {
    let world = with_three_out(packed, Features::empty());
    world.set_word(at, change(world.word(at)));
    assert_eq!(world.queue().unwrap_err(), QueueError::Inflight(expected));
}

#[test]
fn inflight_refuses_regions_that_contradict_themselves() {
    use InflightError as E;
    for packed in LAYOUTS {
        let ours = if packed { 4 } else { 3 };
        refused(packed, 0, |_| 5, E::Format { version: ours, features: 5 });
        for version in (1..6).filter(|version| *version != ours) {
            let change = |word| word - u64::from(ours) + u64::from(version);
            refused(packed, 1, change, E::Format { version, features: 0 });
        }
        refused(packed, 1, |word| word + (1 << 16), E::QueueSize(9));
        let world = World::new(packed, 8, Features::empty());
        assert_eq!(InflightRegion::new(world.region.clone(), 1, 256).unwrap_err(), E::Place, "alignment");
        assert_eq!(InflightRegion::new(world.region.clone(), 64, 512).unwrap_err(), E::Place);
        assert_eq!(InflightRegion::new(world.region.clone(), usize::MAX, 64).unwrap_err(), E::Place);
        assert_eq!(InflightRegion::new(world.region.clone(), 0, 56).unwrap_err(), E::Place);
        let small = InflightRegion::new(world.region.clone(), 0, 128).unwrap();
        let queue =
            Queue::tracked(world.driver.config, &world.driver.ram, world.driver.features, None, Some(&small));
        let needed = if packed { 32 + 16 * 8 } else { 16 + 16 * 8 };
        assert_eq!(queue.unwrap_err(), QueueError::Inflight(E::TooSmall { len: 128, needed }));
    }
    // The places for lists that are saved come last.
    let world = World::new(true, 8, Features::empty());
    let small = InflightRegion::new(world.region.clone(), 0, 448).unwrap();
    let queue =
        Queue::tracked(world.driver.config, &world.driver.ram, world.driver.features, None, Some(&small));
    assert_eq!(queue.unwrap_err(), QueueError::Inflight(E::TooSmall { len: 448, needed: 32 + 56 * 8 }));
}

#[test]
fn inflight_refuses_a_split_region_of_another_time_or_with_numbers_that_cannot_be() {
    use InflightError as E;
    let heads = |world: &World| -> Vec<usize> {
        (0..8).map(|i| 2 + 2 * i).filter(|at| world.word(at + 1) == u64::MAX).collect()
    };
    let world = with_three_out(false, Features::empty());
    let out = heads(&world);
    assert_eq!(out.len(), 3);
    let latest = *out.iter().max_by_key(|at| world.word(**at)).unwrap();
    // Three are out, so that the used index is three behind the latest; or four, if it was killed within a pop. But not
    // more than one more than the queue has entries, and not less than are out.
    world.set_word(latest, world.word(latest) + 1);
    assert!(world.queue().is_ok());
    refused(false, latest, |word| word + 7, E::Behind(10));
    refused(false, latest, |word| word - 1, E::Behind(2));
    let world = with_three_out(false, Features::empty());
    let other = *out.iter().find(|at| **at != latest).unwrap();
    world.set_word(other, world.word(latest));
    assert_eq!(world.queue().unwrap_err(), QueueError::Inflight(E::Number));
    refused(false, latest, |_| 1 << 62, E::Value("popped"));
    refused(false, latest + 1, |_| 1 << 62, E::Value("done"));
    // As many out as there are entries, but not popped so late.
    let world = with_three_out(false, Features::empty());
    for at in 0..8 {
        world.set_word(3 + 2 * at, u64::MAX);
    }
    assert_eq!(world.queue().unwrap_err(), QueueError::Inflight(E::Behind(3)));
}

#[test]
fn inflight_refuses_a_packed_region_whose_positions_and_lists_cannot_be() {
    use InflightError as E;
    // The used positions.
    for at in [2, 3] {
        refused(true, at, |_| 0, E::Value("used position"));
        refused(true, at, |_| 1 << 62, E::Value("used position"));
        refused(true, at, |word| word + 20, E::Value("used position"));
    }
    // States, of lists in the ring and of those that were saved.
    refused(true, 4, |_| 1 << 62, E::Value("state"));
    refused(true, 20, |_| 1 << 62, E::Value("state"));
    // A successor saves those that it takes over.
    let saved = || {
        let world = with_three_out(true, Features::empty());
        drop(world.queue().unwrap());
        let lists: Vec<usize> = (0..8).map(|i| 20 + 5 * i).filter(|at| world.word(*at) == u64::MAX).collect();
        (world, lists)
    };
    let refused = |change: &dyn Fn(&World, &[usize]), expected: E| {
        let (world, lists) = saved();
        assert_eq!(lists.len(), 2);
        change(&world, &lists);
        assert_eq!(world.queue().unwrap_err(), QueueError::Inflight(expected));
    };
    refused(&|world, at| world.set_word(at[0] + 1, world.word(at[1] + 1)), E::Number);
    refused(&|world, at| world.set_word(at[0] + 1, world.word(2) + 8), E::Value("saved list"));
    refused(&|world, at| world.set_word(at[0] + 2, 1), E::Value("saved list"));
    refused(&|world, at| world.set_word(at[0] + 2, 8 | 2 << 16), E::Lists);
    // Into another one, and in a circle.
    refused(&|world, at| world.set_word(at[0] + 2, ((at[1] as u64 - 20) / 5) | (3 << 16)), E::Lists);
    refused(&|world, at| world.set_word(at[0] + 2, ((at[0] as u64 - 20) / 5) | (3 << 16)), E::Lists);
    // One that is said to have been saved, or to have been used before, and that nobody knows of.
    let moved = |position| position | 1 << 63;
    for state in [moved, |position| position - 1] {
        let world = with_three_out(true, Features::empty());
        let used = world.word(2).max(world.word(3));
        world.set_word(4 + used as usize % 8, state(used));
        assert_eq!(world.queue().unwrap_err(), QueueError::Inflight(E::Lists));
    }
}

/// The ring tells what is in flight: the region changes where a batch is published, and nowhere else.
#[test]
fn inflight_stores_nothing_for_packed_lists_that_are_used_in_order() {
    let mut world = used_before(true, 7, Features::empty(), 2);
    let mut device = Device::new(&world).unwrap();
    let words = |world: &World| (0..4 + 7).map(|at| world.word(at)).collect::<Vec<u64>>();
    let before = words(&world);
    device.run(&mut world, Add(3));
    for op in [Pop(3), Complete(0), Complete(0)] {
        device.run(&mut world, op);
        assert_eq!(words(&world), before, "{op:?}");
    }
    device.run(&mut world, Publish);
    assert_eq!(words(&world).iter().zip(&before).filter(|(now, before)| now != before).count(), 1);
    assert!(device.finish(&mut world));
    drop(device);
    world.finish();
}

/// A chain that comes back from a region is as untrusted as one from the ring.
#[test]
fn inflight_faults_the_queue_if_a_descriptor_in_the_region_breaks_a_rule() {
    let unmapped = QueueError::Unmapped { addr: 0xffff_ffff_0000, len: 4 };
    let length = QueueError::State("a list in flight has another length than it says");
    // Of the oldest list's first place: address; or id, flags and length.
    let cases: [(usize, u64, QueueError); 4] = [
        (4, 0xffff_ffff_0000, unmapped),
        (3, 4 | u64::from(INDIRECT | NEXT) << 48, QueueError::IndirectInList),
        (3, 4 | u64::from(INDIRECT) << 48, QueueError::IndirectInList),
        (3, 4, length),
    ];
    for (word, value, expected) in cases {
        let world = with_three_out(true, Features::empty());
        drop(world.queue().unwrap());
        let lists = (0..8)
            .map(|i| 20 + 5 * i)
            .filter(|at| world.word(*at) == u64::MAX && world.word(at + 2) >> 16 > 1);
        let oldest = lists.min_by_key(|at| world.word(at + 1)).unwrap();
        world.set_word(oldest + word, value);
        let mut queue = world.queue().unwrap();
        let popped = queue.iter().count();
        assert_eq!((queue.fault(), popped), (Some(&expected), 0));
        assert!(queue.state().held.len() < 2, "left out");
    }
}

/// Serves whatever the queue has, and looks whether it stays within guest memory and its own bounds.
fn serve(world: &World, queue: &mut Queue) {
    let mut held = Vec::new();
    for _ in 0..3 {
        while let Some(chain) = queue.pop() {
            for segment in queue.readable(&chain).iter().chain(queue.writable(&chain)) {
                let ram = world.driver.ram.directory();
                let start = ram.guest_address(segment.as_ptr()).expect("within guest memory");
                let last = segment.as_ptr().wrapping_add(segment.len() - 1);
                assert_eq!(ram.guest_address(last), Some(start + segment.len() as u64 - 1));
            }
            held.push(chain);
            assert!(held.len() <= usize::from(queue.size()));
        }
        if let Some(chain) = held.pop() {
            let _ = queue.unpop(chain).map_err(|chain| queue.add_used(chain, 1));
        }
        held.drain(..).for_each(|chain| queue.add_used(chain, 8));
        queue.publish();
        queue.state();
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// A region that a front-end made up, or changed.
    #[test]
    fn inflight_takes_no_harm_from_what_is_in_a_region(
        packed: bool,
        features in 0usize..4,
        death in prop::option::of(0u64..60),
        changes in prop::collection::vec(
            (0usize..64, prop_oneof![any::<u64>(), 0u64..12, (0u64..12).prop_map(|n| n << 16),
                (0u64..12).prop_map(|n| n << 32), (0u64..12).prop_map(|n| n << 48)], 0u8..3),
            0..12,
        ),
    ) {
        let mut world = with_three_out(packed, FEATURES[features]);
        if let Some(stores) = death {
            death::after(stores);
            if let Some(mut device) = Device::new(&world) {
                device.finish(&mut world);
            }
            death::came();
        }
        for (at, word, how) in changes {
            if at < world.region.len() / 8 {
                world.set_word(at, match how { 0 => word, 1 => world.word(at) ^ word, _ => world.word(at) | word });
            }
        }
        if let Ok(mut queue) = world.queue() {
            serve(&world, &mut queue);
            drop(queue);
            // What it has made of it is a region again.
            match world.queue() {
                Ok(mut queue) => serve(&world, &mut queue),
                Err(error) => prop_assert!(matches!(error, QueueError::Inflight(_)), "{}", error),
            }
        }
    }
}

/// While the front-end writes to it.
#[test]
fn policy_8_inflight_regions_scribbled_over_by_another_thread() {
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    for packed in LAYOUTS {
        let mut world = with_three_out(packed, Features::INDIRECT_DESC);
        let stop = AtomicBool::new(false);
        let region = world.region.clone();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (mut x, words) = (0x9e37_79b9_7f4a_7c15u64, region.len() / 8);
                while !stop.load(Ordering::Relaxed) {
                    x ^= x << 13;
                    x ^= x >> 7;
                    x ^= x << 17;
                    // SAFETY: within the region, and aligned.
                    let word =
                        unsafe { AtomicU64::from_ptr(region.as_ptr().cast::<u64>().add(x as usize % words)) };
                    word.fetch_xor(1 << (x >> 32 & 63), Ordering::Relaxed);
                }
            });
            for _ in 0..200 {
                world.set_word(1, 0);
                for _ in 0..3 {
                    if let Ok(mut queue) = world.queue() {
                        world.driver.add(&[r(DATA, 8)], &[]);
                        serve(&world, &mut queue);
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}
