//! Queues behind an IOMMU: what a missing translation stops, and what not.
use super::driver::{AVAIL, DATA, DESC, TABLES, USED};
use super::*;
use crate::memory::iotlb::{Rights, Translation};

const ALL: Rights = Rights { read: true, write: true };
const READ: Rights = Rights { read: true, write: false };
const WRITE_ONLY: Rights = Rights { read: false, write: true };

/// The same addresses on both sides, for these ranges.
fn view(driver: &Driver, ranges: &[(u64, u64, Rights)]) -> GuestRam {
    let to = |(iova, len, rights): &(u64, u64, Rights)| Translation {
        iova: *iova,
        len: *len,
        addr: GuestAddress(*iova),
        rights: *rights,
    };
    driver.ram.translated(ranges.iter().map(to)).unwrap()
}

const RINGS: [(u64, u64, Rights); 3] = [(DESC, 0x1000, ALL), (AVAIL, 0x1000, ALL), (USED, 0x1000, ALL)];

fn with(more: &[(u64, u64, Rights)]) -> Vec<(u64, u64, Rights)> {
    RINGS.iter().chain(more).copied().collect()
}

fn queue(driver: &Driver, ranges: &[(u64, u64, Rights)]) -> Result<Queue, QueueError> {
    Queue::new(driver.config, &view(driver, ranges), driver.features, None)
}

fn all() -> impl Iterator<Item = (bool, Features)> {
    let features = [Features::empty(), Features::IN_ORDER];
    LAYOUTS.into_iter().flat_map(move |packed| features.map(|features| (packed, features)))
}

fn missing(iova: u64, write: bool, denied: bool) -> Option<Miss> {
    Some(Miss { iova, write, denied })
}

#[test]
fn a_ring_that_is_not_translated_is_a_miss_and_no_fault_of_the_driver() {
    for (packed, features) in all() {
        let driver = driver(packed, 8, features);
        let mut have = Vec::new();
        for range in RINGS {
            let error = queue(&driver, &have).unwrap_err();
            let write = range.0 == USED || (packed && range.0 == DESC);
            assert_eq!(error, QueueError::Miss(Miss { iova: range.0, write, denied: false }));
            have.push(range);
        }
        queue(&driver, &have).unwrap();
        let denied = [(DESC, 0x1000, READ), (AVAIL, 0x1000, READ), (USED, 0x1000, READ)];
        assert!(matches!(queue(&driver, &denied), Err(QueueError::Miss(Miss { denied: true, .. }))));
    }
}

#[test]
fn a_buffer_that_is_missing_stops_popping_and_nothing_else() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, Features::INDIRECT_DESC | features);
        let mut queue = queue(&driver, &with(&[(DATA, 0x1000, ALL)])).unwrap();
        driver.add(&[r(DATA, 8), w(DATA + 8, 8)], &[]).unwrap();
        driver.add(&[r(DATA + 0xffc, 8), w(DATA + 0x8000, 8)], &[]).unwrap();
        driver.add(&[], &[r(DATA, 4)]).unwrap();
        let first = queue.pop().unwrap();
        assert!(queue.pop().is_none() && queue.fault().is_none());
        assert_eq!(queue.miss(), missing(DATA + 0x1000, false, false));
        assert!(!queue.has_available() && !queue.arm() && !queue.budget_spent());
        queue.set_budget(10);
        assert!(queue.pop().is_none());
        queue.add_used(first, 8);
        queue.publish();
        assert_eq!(driver.used().len(), 1, "completions go on");
        for (range, next) in [
            ((DATA, 0x2000, ALL), missing(DATA + 0x8000, true, false)),
            ((DATA, 0x9000, READ), missing(DATA + 0x8000, true, true)),
            ((DATA, 0x9000, ALL), None),
        ] {
            queue.set_ram(&view(&driver, &with(&[range]))).unwrap();
            queue.set_budget(10);
            let popped = queue.pop();
            assert_eq!(queue.miss(), next);
            assert_eq!(popped.is_some(), next.is_none());
            drop(popped);
        }
        // The third has a table elsewhere.
        queue.publish();
        assert!(queue.pop().is_none());
        assert!(matches!(queue.miss(), Some(Miss { iova, write: false, .. }) if iova >= TABLES));
        queue.set_ram(&view(&driver, &with(&[(DATA, 0x9000, ALL), (TABLES, 0x1_0000, READ)]))).unwrap();
        queue.set_budget(10);
        assert!(queue.pop().is_some() && queue.fault().is_none());
    }
}

#[test]
fn completions_are_withheld_while_the_ring_is_missing() {
    for (packed, features) in all() {
        for ends in [false, true] {
            let mut driver = driver(packed, 8, features);
            let full = view(&driver, &with(&[(DATA, 0x4000, ALL)]));
            let mut queue = Queue::new(driver.config, &full, driver.features, None).unwrap();
            for page in 0..3 {
                driver.add(&[w(DATA + page * 0x1000, 8)], &[]).unwrap();
            }
            let chains: Vec<Chain> = queue.iter().collect();
            let error = queue.set_ram(&view(&driver, &[(DATA, 0x4000, ALL)])).unwrap_err();
            assert!(matches!(error, QueueError::Miss(_)) && queue.fault().is_none());
            let areas = |driver: &Driver| [DESC, AVAIL, USED].map(|area| driver.read(area, 0x1000));
            let before = areas(&driver);
            let mut chains = chains.into_iter();
            queue.add_used(chains.next().unwrap(), 1);
            queue.add_used(chains.next().unwrap(), 2);
            drop(chains);
            assert!(!queue.publish() && !queue.arm() && queue.pop().is_none());
            queue.disarm();
            assert!(areas(&driver) == before, "nothing was touched");
            assert_eq!(queue.outstanding(), 0);
            if ends {
                let state = queue.into_state();
                assert!(state.held.is_empty());
            } else {
                queue.set_ram(&full).unwrap();
                assert_eq!(queue.miss(), None);
                queue.publish();
                driver.add(&[w(DATA, 8)], &[]).unwrap();
                queue.set_budget(1);
                assert!(queue.pop().is_some());
            }
            let lengths: Vec<u32> = driver.used().into_iter().map(|(_, len)| len).collect();
            assert_eq!(lengths, [1, 2, 0]);
        }
    }
}

#[test]
fn what_is_out_in_a_range_is_known_until_it_ends_or_is_forgiven() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, features);
        let full = view(&driver, &with(&[(DATA, 0x4000, ALL)]));
        let mut queue = Queue::new(driver.config, &full, driver.features, None).unwrap();
        driver.add(&[r(DATA + 0x1ff8, 8), w(DATA + 0x3000, 8)], &[]).unwrap();
        assert!(!queue.holds(0, u64::MAX));
        let chain = queue.pop().unwrap();
        // By its own snapshot, whatever became of the memory.
        queue.set_ram(&view(&driver, &RINGS)).unwrap();
        for (first, last, holds) in [
            (0, u64::MAX, true),
            (DATA + 0x1000, DATA + 0x1fff, true),
            (DATA + 0x2000, DATA + 0x2fff, false),
            (DATA + 0x3007, DATA + 0x3007, true),
            (DATA + 0x3008, u64::MAX, false),
            (0, DATA + 0x1ff7, false),
        ] {
            assert_eq!(queue.holds(first, last), holds, "{first:#x} to {last:#x}");
        }
        queue.forgive();
        assert!(!queue.holds(0, u64::MAX));
        queue.set_ram(&full).unwrap();
        driver.add(&[w(DATA, 8)], &[]).unwrap();
        let other = queue.pop().unwrap();
        assert!(queue.holds(DATA, DATA) && !queue.holds(DATA + 0x3000, DATA + 0x3000));
        queue.add_used(chain, 0);
        queue.add_used(other, 0);
        assert!(!queue.holds(0, u64::MAX));
    }
}

/// What need not be read is not: a device-writable buffer is not even asked to be readable.
#[test]
fn split_2_7_5_1_packed_2_8_15_buffers_are_accessed_in_their_direction_only() {
    for (packed, features) in all() {
        let mut driver = driver(packed, 8, Features::INDIRECT_DESC | features);
        let ranges = [(DATA, 0x1000, READ), (DATA + 0x1000, 0x1000, WRITE_ONLY), (TABLES, 0x1_0000, READ)];
        let mut queue = queue(&driver, &with(&ranges)).unwrap();
        driver.write(DATA, &[3; 8]);
        let elems = [r(DATA, 8), w(DATA + 0x1000, 8)];
        driver.add(&elems, &[]).unwrap();
        driver.add(&[], &elems).unwrap();
        for _ in 0..2 {
            let chain = queue.pop().unwrap();
            let (mut reader, mut writer) = queue.split(&chain);
            assert_eq!(
                (reader.remaining(), writer.remaining()),
                (8, 8),
                "each has its own part, and no more"
            );
            assert_eq!(reader.read_obj::<[u8; 8]>().unwrap(), [3; 8]);
            writer.write_all(&[4; 8]).unwrap();
            queue.add_used(chain, 8);
        }
        queue.publish();
        assert_eq!(driver.used().len(), 2);
        assert_eq!((driver.read(DATA, 8), driver.read(DATA + 0x1000, 8)), (vec![3; 8], vec![4; 8]));
        // The other way around neither can be had.
        for (elem, write) in [(w(DATA, 8), true), (r(DATA + 0x1000, 8), false)] {
            let mut queue = Queue::new(
                driver.config,
                &view(&driver, &with(&ranges)),
                driver.features,
                Some(queue.state()),
            )
            .unwrap();
            let mut again = super::driver(packed, 8, features);
            (again.ram, again.next_avail, again.avail_wrap) =
                (driver.ram.clone(), driver.next_avail, driver.avail_wrap);
            again.add(&[elem], &[]).unwrap();
            assert!(queue.pop().is_none());
            assert_eq!(queue.miss(), missing(elem.addr, write, true));
        }
    }
}
