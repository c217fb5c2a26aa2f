//! The log of dirty pages: what a queue marks in it, and when.
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::driver::{BORDER, DATA, DESC, FAR, FAR_LEN, region};
use super::*;
use crate::lane::Interrupt;
use crate::memory::{DirtyLog, LOG_PAGE, SharedMemory};

/// Has the pages of all regions.
struct Log(Arc<SharedMemory>, Arc<Count>);

#[derive(Default)]
struct Count(AtomicU32);

impl Interrupt for Count {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
}

impl Log {
    fn new() -> Log {
        let pages = (FAR + FAR_LEN as u64) / LOG_PAGE;
        Log(Arc::new(SharedMemory::private(pages as usize / 8)), Arc::default())
    }

    fn log(&self) -> Option<Arc<DirtyLog>> {
        Some(Arc::new(DirtyLog::new(self.0.clone(), Some(self.1.clone()))))
    }

    /// The pages that were marked since the last call, as addresses.
    fn take(&self) -> Vec<u64> {
        let mut found = Vec::new();
        for at in 0..self.0.len() {
            // SAFETY: within the area; nobody else is at it.
            let byte = unsafe { self.0.as_ptr().add(at).replace(0) };
            found.extend(
                (0..8).filter(|bit| byte & (1 << bit) != 0).map(|bit| (at as u64 * 8 + bit) * LOG_PAGE),
            );
        }
        found
    }
}

fn all() -> impl Iterator<Item = (bool, Features)> {
    LAYOUTS
        .into_iter()
        .flat_map(|packed| [Features::empty(), Features::IN_ORDER].map(|features| (packed, features)))
}

#[test]
fn the_whole_writable_part_of_a_chain_is_marked_when_it_ends() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, Features::INDIRECT_DESC | features);
        let (mut queue, log) = (driver.queue(), Log::new());
        queue.set_log(log.log(), None);
        let elements = [r(DATA, 16), w(DATA + 0x2ff0, 0x20), w(FAR, 8), w(BORDER - 8, 16)];
        driver.add(&[], &elements).unwrap();
        driver.add(&[w(DATA + 0x8000, 1)], &[]).unwrap();
        let chains: Vec<Chain> = queue.iter().collect();
        queue.publish();
        assert_eq!(log.take(), [0u64; 0], "nothing has ended");
        let expected = [DATA + 0x2000, DATA + 0x3000, BORDER - LOG_PAGE, BORDER, FAR].as_slice();
        for (chain, pages) in chains.into_iter().zip([expected, &[DATA + 0x8000]]) {
            queue.add_used(chain, 0);
            assert_eq!(log.take(), pages, "before anybody hears of it, however little was written");
        }
        queue.publish();
        assert_eq!(log.take(), [0u64; 0], "the ring is not logged");
        queue.signal_log();
        queue.signal_log();
        assert_eq!(log.1.0.load(Ordering::Relaxed), 1);
    }
}

#[test]
fn chains_that_are_dropped_or_given_up_are_marked() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, features);
        let (mut queue, log) = (driver.queue(), Log::new());
        queue.set_log(log.log(), None);
        for page in 0..2 {
            driver.add(&[w(DATA + page * LOG_PAGE, 8)], &[]).unwrap();
        }
        let mut chains: Vec<Chain> = queue.iter().collect();
        drop(chains.remove(0));
        queue.publish();
        assert_eq!(log.take(), [DATA]);
        queue.discard(chains.remove(0));
        assert_eq!(log.take(), [DATA + LOG_PAGE]);
    }
}

/// A log that comes while requests are out has them all; one that went has none.
#[test]
fn the_log_of_the_moment_counts() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, features);
        let (mut queue, former, log) = (driver.queue(), Log::new(), Log::new());
        queue.set_log(former.log(), None);
        for page in 0..3 {
            driver.add(&[w(DATA + page * LOG_PAGE, 8)], &[]).unwrap();
        }
        let mut chains: Vec<Chain> = queue.iter().collect();
        queue.set_log(log.log(), None);
        queue.add_used(chains.remove(0), 8);
        queue.set_log(None, None);
        queue.add_used(chains.remove(0), 8);
        queue.set_log(log.log(), None);
        queue.add_used(chains.remove(0), 8);
        queue.publish();
        assert_eq!(log.take(), [DATA, DATA + 2 * LOG_PAGE]);
        assert_eq!(former.take(), [0u64; 0]);
        assert_eq!(driver.used().len(), 3, "order and number do not depend on the log");
    }
}

/// The addresses are those of the snapshot that the chain is from, also when that has gone.
#[test]
fn a_chain_of_memory_that_is_gone_is_marked_where_it_was() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, features);
        let (mut queue, log) = (driver.queue(), Log::new());
        driver.add(&[w(FAR + 0x3000, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        let low = Arc::new(region(0, BORDER as usize));
        // The rings are where they were, with other bytes.
        let mut bytes = vec![0; BORDER as usize];
        driver.ram.read(GuestAddress(0), &mut bytes).unwrap();
        let ram = GuestRam::from_regions([low]).unwrap();
        ram.write(GuestAddress(0), &bytes).unwrap();
        queue.set_ram(&ram).unwrap();
        queue.set_log(log.log(), None);
        queue.add_used(chain, 8);
        assert_eq!(log.take(), [FAR + 0x3000]);
        assert_eq!(queue.old_snapshots(), 0);
    }
}

/// A split ring: the used ring where the front-end says it is. A packed one: its Device Area there, and the
/// descriptors where they are.
#[test]
fn rings_are_marked_if_they_are_to_be() {
    let said = FAR + 0x5000;
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, Features::EVENT_IDX | features);
        let (mut queue, log) = (driver.queue(), Log::new());
        let expected = if packed { vec![DESC, said] } else { vec![said] };
        queue.set_log(log.log(), Some(GuestAddress(said)));
        assert_eq!(log.take(), expected, "from the start");
        queue.publish();
        assert_eq!(log.take(), [0u64; 0], "nothing was published");
        driver.add(&[r(DATA, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, 0);
        assert_eq!(log.take(), [0u64; 0]);
        queue.publish();
        assert_eq!(log.take(), expected, "with the used entry");
        queue.arm();
        assert_eq!(log.take(), expected, "with the event");
        queue.disarm();
        assert_eq!(log.take(), expected);
        queue.set_log(log.log(), None);
        queue.arm();
        assert_eq!(log.take(), [0u64; 0]);
    }
}

#[test]
fn a_log_that_is_too_short_gets_what_it_has_room_for() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, features);
        let mut queue = driver.queue();
        let area = Arc::new(SharedMemory::private(1));
        queue.set_log(Some(Arc::new(DirtyLog::new(area, None))), Some(GuestAddress(u64::MAX)));
        driver.add(&[w(FAR, 8), w(DATA, 0x1_0000)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, 8);
        queue.publish();
        assert_eq!(driver.used().len(), 1);
    }
}
