//! State out and in: what a successor gets, and what it refuses.
use super::driver::{DATA, END};
use super::*;

fn at(index: u16, wrap: bool) -> RingPos {
    RingPos { index, wrap }
}

#[test]
fn a_successor_adopts_the_chains_that_were_out() {
    for packed in LAYOUTS {
        for features in [Features::empty(), Features::IN_ORDER] {
            let mut driver = driver(packed, 8, Features::INDIRECT_DESC | features);
            let mut queue = driver.queue();
            driver.write(DATA, b"hello world");
            let ids = [
                driver.add(&[r(DATA, 5), r(DATA + 5, 6), w(DATA + 100, 8)], &[]).unwrap(),
                driver.add(&[w(DATA + 200, 8)], &[]).unwrap(),
                driver.add(&[], &[r(DATA, 11), w(DATA + 300, 8)]).unwrap(),
                driver.add(&[w(DATA + 400, 8)], &[]).unwrap(),
            ];
            let mut chains: Vec<Chain> = queue.iter().collect();
            // Completed out of order: with IN_ORDER it is held back, and must not be lost.
            queue.add_used(chains.remove(1), 4);
            let state = queue.into_state();
            drop(chains);
            let completed = state.held.iter().filter(|chain| chain.completed.is_some()).count();
            assert_eq!(completed, usize::from(features == Features::IN_ORDER));

            let mut queue = driver.queue_from(Some(state.clone())).unwrap();
            assert_eq!(queue.state(), state);
            assert_eq!((queue.outstanding(), queue.unclaimed()), (3, 3));
            assert!(queue.pop().is_none());
            assert_eq!(queue.fault(), None);
            assert!(queue.adopt(ChainId(0x77)).is_none());
            for id in [ids[3], ids[0], ids[2]] {
                let chain = queue.adopt(ChainId(id)).unwrap();
                assert!(queue.adopt(ChainId(id)).is_none(), "each once");
                let mut text = vec![0; queue.reader(&chain).remaining() as usize];
                queue.reader(&chain).read_exact(&mut text).unwrap();
                assert!(text.is_empty() || text == b"hello world");
                queue.writer(&chain).write_all(b"answered").unwrap();
                queue.add_used(chain, 8);
            }
            queue.publish();
            let mut used = driver.used();
            used.sort_unstable();
            let mut expected = vec![(ids[0], 8), (ids[1], 4), (ids[2], 8), (ids[3], 8)];
            expected.sort_unstable();
            assert_eq!(used, expected);
            assert_eq!(driver.read(DATA + 300, 8), b"answered");
        }
    }
}

#[test]
fn chains_that_nobody_adopts_go_back_with_length_0() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        let id = driver.add(&[w(DATA, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        let state = queue.into_state();
        drop(chain);
        let mut queue = driver.queue_from(Some(state)).unwrap();
        queue.drop_unclaimed();
        assert_eq!(queue.outstanding(), 0);
        queue.publish();
        assert_eq!(driver.used(), [(id, 0)]);
    }
}

#[test]
fn ending_a_queue_publishes_what_was_completed() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let mut queue = driver.queue();
        let id = driver.add(&[w(DATA, 8)], &[]).unwrap();
        let chain = queue.pop().unwrap();
        queue.add_used(chain, 2);
        let state = queue.into_state();
        assert!(state.held.is_empty());
        assert_eq!(state.avail, state.used);
        assert_eq!(driver.used(), [(id, 2)]);
    }
}

fn held(id: u16, descs: u16) -> HeldChain {
    HeldChain {
        id: ChainId(id),
        descs,
        readable: vec![],
        writable: vec![(GuestAddress(DATA), 8)],
        completed: None,
    }
}

#[track_caller]
fn refused(packed: bool, features: Features, state: QueueState) -> QueueError {
    let driver = driver(packed, 8, features);
    driver.queue_from(Some(state)).map(|_| ()).unwrap_err()
}

fn wrong(error: QueueError) -> bool {
    matches!(error, QueueError::State(_))
}

#[test]
fn restoring_refuses_positions_that_contradict_themselves() {
    let none = Features::empty();
    let state = |avail, used, held| QueueState { avail, used, held };
    let s = |index| at(index, true);
    // Split: at most as many held chains as the distance, and that is at most a lap.
    assert!(wrong(refused(false, none, state(s(9), s(0), vec![]))));
    assert!(wrong(refused(false, none, state(s(0), s(1), vec![]))));
    assert!(wrong(refused(false, none, state(s(0), s(0), vec![held(0, 1)]))));
    let nine = (0..9).map(|id| held(id % 8, 1)).collect();
    assert!(wrong(refused(false, none, state(s(9), s(0), nine))));
    assert!(wrong(refused(false, none, state(s(1), s(0), vec![held(8, 1)]))));
    assert!(wrong(refused(false, none, state(s(1), s(0), vec![held(1, 2)]))));
    assert!(wrong(refused(false, none, state(s(2), s(0), vec![held(3, 1), held(3, 1)]))));
    // Packed: at most as many descriptors of held chains as the distance; at most a lap.
    let p = at;
    assert!(wrong(refused(true, none, state(p(8, true), p(0, true), vec![]))));
    assert!(wrong(refused(true, none, state(p(0, true), p(8, true), vec![]))));
    assert!(wrong(refused(true, none, state(p(0, true), p(1, true), vec![]))));
    assert!(wrong(refused(true, none, state(p(3, true), p(1, true), vec![held(0, 3)]))));
    assert!(wrong(refused(true, none, state(p(1, true), p(1, true), vec![held(0, 0)]))));
    assert!(wrong(refused(true, none, state(p(2, false), p(1, true), vec![held(0, 9)]))));
    let many = (0..5).map(|id| held(id, u16::MAX)).collect();
    assert!(wrong(refused(true, none, state(p(3, true), p(1, true), many))));
    let nine = (0..9).map(|id| held(id, 1)).collect();
    assert!(wrong(refused(true, none, state(p(1, false), p(0, true), nine))));
    // A whole ring in flight is fine.
    let driver = driver(true, 8, none);
    let state = state(p(3, false), p(3, true), vec![held(0, 5), held(1, 3)]);
    assert_eq!(driver.queue_from(Some(state.clone())).unwrap().state(), state);
}

#[test]
fn restoring_goes_on_behind_chains_that_a_killed_back_end_lost() {
    for packed in LAYOUTS {
        let mut driver = driver(packed, 8, Features::empty());
        let lost = driver.add(&[w(DATA, 8)], &[]).unwrap();
        let next = driver.add(&[w(DATA, 8)], &[]).unwrap();
        assert_ne!(lost, next);
        let state = QueueState { avail: at(1, true), used: at(0, true), held: vec![] };
        let mut queue = driver.queue_from(Some(state)).unwrap();
        let chain = queue.pop().unwrap();
        assert_eq!(queue.id(&chain), Some(ChainId(next)));
        queue.add_used(chain, 3);
        assert!(queue.pop().is_none());
        assert_eq!(queue.fault(), None);
        let state = queue.into_state();
        assert_eq!((state.avail, state.used), (at(2, true), at(1, true)));
    }
}

#[test]
fn restoring_refuses_chains_that_cannot_be() {
    for packed in LAYOUTS {
        let none = Features::empty();
        let with = |change: &dyn Fn(&mut HeldChain)| {
            let mut chain = held(0, 1);
            change(&mut chain);
            QueueState { avail: at(1, true), used: at(0, true), held: vec![chain] }
        };
        let error = refused(packed, none, with(&|c| c.readable = vec![(GuestAddress(END), 4)]));
        assert_eq!(error, QueueError::Unmapped { addr: END, len: 4 });
        let error = refused(packed, none, with(&|c| c.writable = vec![(GuestAddress(u64::MAX), 4)]));
        assert_eq!(error, QueueError::Unmapped { addr: u64::MAX, len: 4 });
        let error = refused(packed, none, with(&|c| c.writable = vec![(GuestAddress(DATA), 4); 9]));
        assert_eq!(error, QueueError::ChainTooLong);
        assert!(wrong(refused(packed, none, with(&|c| c.completed = Some(0)))));
        assert!(wrong(refused(packed, Features::IN_ORDER, with(&|c| c.completed = Some(9)))));
    }
}

#[test]
fn common_2_4_1_a_queue_that_is_given_up_marks_nothing_used_for_chains_that_are_dropped() {
    for packed in LAYOUTS {
        for features in [Features::empty(), Features::IN_ORDER] {
            let mut driver = driver(packed, 8, features);
            let mut queue = driver.queue();
            driver.add(&[w(DATA, 8)], &[]).unwrap();
            driver.add(&[w(DATA, 8)], &[]).unwrap();
            let chains: Vec<Chain> = queue.iter().collect();
            queue.give_up();
            drop(chains);
            assert_eq!(queue.outstanding(), 0);
            assert!(!queue.publish());
            assert_eq!(driver.used(), []);
            assert_eq!((queue.counters().discarded, queue.counters().swept), (2, 0));
        }
    }
}
