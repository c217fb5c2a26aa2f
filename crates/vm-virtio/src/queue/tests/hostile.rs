//! Rings that change under our hands: nothing panics, loops or leaves guest memory, whatever is read (failure policy 8).
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::driver::{AVAIL, DATA, DESC, TABLES, USED};
use super::*;

/// A generator that is good enough for scribbling.
struct Scribbler(u64);

impl Scribbler {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// A descriptor that is likely to be followed somewhere.
    fn desc(&mut self, driver: &Driver, at: u64) {
        let (x, y) = (self.next(), self.next());
        let addr = match x % 8 {
            0 => x,
            1 => TABLES + (x >> 8) % 0x100,
            _ => DATA + (x >> 8) % 0x1000,
        };
        let len = [0, 16, 32, 64, y as u32, 8][(x >> 32) as usize % 6];
        let flags = (y >> 16) as u16 & (7 | 0x8080);
        let next = (y >> 32) as u16 % 20;
        if driver.packed {
            driver.desc_at(at, addr, len, next, flags);
        } else {
            driver.desc_at(at, addr, len, flags, next);
        }
    }
}

fn served(queue: &mut Queue, ram: &GuestRam, parked: &mut Vec<Chain>) {
    while let Some(chain) = queue.pop() {
        for segment in queue.readable(&chain).iter().chain(queue.writable(&chain)) {
            let start = ram.directory().guest_address(segment.as_ptr()).expect("within guest memory");
            let last = segment.as_ptr().wrapping_add(segment.len() - 1);
            assert_eq!(ram.directory().guest_address(last), Some(start + segment.len() as u64 - 1));
        }
        let mut bytes = [0; 64];
        queue.reader(&chain).read(&mut bytes);
        queue.writer(&chain).write(&bytes);
        if parked.len() < 3 {
            parked.push(chain);
        } else {
            queue.add_used(chain, 64);
        }
        if queue.counters().popped.is_multiple_of(7) {
            queue.publish();
            parked.clear();
        }
    }
    queue.publish();
    queue.arm();
    parked.clear();
    queue.publish();
}

#[test]
fn policy_8_rings_scribbled_over_by_another_thread() {
    for packed in LAYOUTS {
        for in_order in [Features::empty(), Features::IN_ORDER] {
            let size = if packed { 13 } else { 16 };
            let offered = Features::INDIRECT_DESC | Features::EVENT_IDX | in_order;
            let driver = Arc::new(driver(packed, size, offered));
            let ram = driver.ram.clone();
            let (config, features) = (driver.config, driver.features);
            let scribble = move |scribbler: &mut Scribbler| {
                let x = scribbler.next();
                match x % 8 {
                    0 if !packed => driver.put_u16(AVAIL + 2, (x >> 8) as u16 % 40),
                    1 => driver.put_u16(AVAIL + (x >> 8) % 40 / 2 * 2, (x >> 16) as u16 % 20),
                    2 => driver.put_u16(USED + (x >> 8) % 80 / 2 * 2, (x >> 16) as u16),
                    3..5 => scribbler.desc(&driver, TABLES + (x >> 8) % 64 * 4),
                    _ => scribbler.desc(&driver, DESC + (x >> 8) % u64::from(size) * 16),
                }
            };
            let stop = Arc::new(AtomicBool::new(false));
            let (stopping, theirs) = (Arc::clone(&stop), scribble.clone());
            let guest = thread::spawn(move || {
                let mut scribbler = Scribbler(0x9e37_79b9_7f4a_7c15);
                while !stopping.load(Ordering::Relaxed) {
                    theirs(&mut scribbler);
                }
            });
            let mut scribbler = Scribbler(0xd1b5_4a32_d192_ed03);
            let start = Instant::now();
            let mut faults = std::collections::HashSet::new();
            let mut popped = 0;
            while start.elapsed() < Duration::from_millis(300) || popped < 20 || faults.len() < 4 {
                assert!(start.elapsed() < Duration::from_secs(60), "{popped} {faults:?}");
                let mut queue = Queue::new(config, &ram, features, None).unwrap();
                let mut parked = Vec::new();
                for _ in 0..20 {
                    served(&mut queue, &ram, &mut parked);
                    // What does not change is only refused again, and on a busy machine the other thread may seldom run.
                    scribble(&mut scribbler);
                }
                popped += queue.counters().popped;
                faults.extend(queue.fault().map(std::mem::discriminant));
                let state = queue.into_state();
                drop(parked);
                let _ = Queue::new(config, &ram, features, Some(state));
            }
            stop.store(true, Ordering::Relaxed);
            guest.join().unwrap();
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn policy_8_any_bytes_in_rings_and_tables(
        packed in any::<bool>(),
        bits in any::<u8>(),
        seed in 1u64..,
        rounds in 1usize..60,
        size in 1u16..40,
    ) {
        let mut features = Features::empty();
        for (bit, feature) in [Features::INDIRECT_DESC, Features::EVENT_IDX, Features::IN_ORDER].into_iter().enumerate() {
            if bits & (1 << bit) != 0 {
                features |= feature;
            }
        }
        let size = if packed { size } else { size.next_power_of_two() };
        let mut driver = driver(packed, size, features);
        if seed.is_multiple_of(2) {
            driver.ram = GuestRam::new(&super::driver::crowded_memory());
        }
        let mut scribbler = Scribbler(seed);
        let mut queue = driver.queue();
        let mut parked = Vec::new();
        for _ in 0..rounds {
            for i in 0..u64::from(size) {
                scribbler.desc(&driver, DESC + 16 * i);
                scribbler.desc(&driver, TABLES + 16 * i);
                if !packed {
                    driver.put_u16(AVAIL + 4 + 2 * i, scribbler.next() as u16 % (size + size / 8));
                }
            }
            if !packed {
                let ahead = scribbler.next() as u16 % (size + 1);
                driver.put_u16(AVAIL + 2, queue.state().avail.index.wrapping_add(ahead));
            }
            served(&mut queue, &driver.ram, &mut parked);
            if queue.fault().is_some() {
                parked.clear();
                queue = driver.queue();
            }
        }
    }
}
