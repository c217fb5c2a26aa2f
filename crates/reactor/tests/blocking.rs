//! The pool for blocking calls: what hangs, panics or floods it is nobody else's trouble.
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use reactor::{BlockingPool, Desk, Event, Interest, JobPanicked, Reactor, Token};
use std::os::fd::AsFd;

/// For what should happen soon; long, because test machines are slow.
const SOON: Duration = Duration::from_secs(20);

/// Opens once; those who wait are counted.
#[derive(Default)]
struct Gate(Mutex<(bool, usize)>, Condvar);

impl Gate {
    fn open(&self) {
        self.0.lock().unwrap().0 = true;
        self.1.notify_all();
    }
    fn wait(&self) {
        let mut state = self.0.lock().unwrap();
        state.1 += 1;
        self.1.notify_all();
        drop(self.1.wait_while(state, |(open, _)| !*open).unwrap());
    }
    /// Until so many wait.
    fn reached(&self, count: usize) {
        let state = self.0.lock().unwrap();
        let (state, _) = self.1.wait_timeout_while(state, SOON, |(_, waiting)| *waiting < count).unwrap();
        assert!(state.1 >= count, "{} of {count} begun", state.1);
    }
}

fn pool(threads: usize) -> BlockingPool {
    BlockingPool::new(NonZeroUsize::new(threads).unwrap())
}

/// The next result, waited for as a lane does.
#[track_caller]
fn next<T: Send + 'static>(desk: &mut Desk<T>) -> Result<T, JobPanicked> {
    let mut reactor = Reactor::new().unwrap();
    reactor.watch(desk.as_fd(), Token::new(0), Interest::READ_EDGE).unwrap();
    let deadline = Instant::now() + SOON;
    loop {
        if let Some(result) = desk.take() {
            return result;
        }
        assert!(Instant::now() < deadline, "no result");
        reactor.wait(Some(SOON)).unwrap();
        while let Some(event) = reactor.next() {
            assert!(matches!(event, Event::Ready { .. }));
        }
    }
}

#[test]
fn results_come_back_through_the_reactor() {
    let pool = pool(2);
    let mut desk = pool.desk(8).unwrap();
    for i in 0..8 {
        desk.submit(move || i * i).unwrap();
    }
    assert_eq!(desk.outstanding(), 8);
    let mut squares: Vec<i32> = (0..8).map(|_| next(&mut desk).unwrap()).collect();
    squares.sort_unstable();
    assert_eq!(squares, [0, 1, 4, 9, 16, 25, 36, 49]);
    assert_eq!((desk.outstanding(), desk.take()), (0, None));
}

#[test]
fn jobs_of_a_desk_begin_in_their_order() {
    let pool = pool(1);
    let mut desk = pool.desk(100).unwrap();
    for i in 0..100 {
        desk.submit(move || i).unwrap();
    }
    let order: Vec<i32> = (0..100).map(|_| next(&mut desk).unwrap()).collect();
    assert_eq!(order, (0..100).collect::<Vec<_>>());
}

#[test]
fn a_desk_has_room_for_so_many_jobs_and_returns_the_rest() {
    let (pool, gate) = (pool(2), Arc::new(Gate::default()));
    let mut desk = pool.desk(3).unwrap();
    for _ in 0..3 {
        let gate = gate.clone();
        desk.submit(move || gate.wait()).unwrap();
    }
    let precious = String::from("not lost");
    let refused = desk.submit(move || drop(precious)).unwrap_err();
    (refused.0)();
    // Giving up is no way around the bound: one of them has begun and is still there.
    gate.reached(1);
    desk.forget();
    assert_eq!(desk.outstanding(), 0);
    desk.submit(|| ()).unwrap();
    desk.submit(|| ()).unwrap();
    assert!(desk.submit(|| ()).is_err());
    gate.open();
    next(&mut desk).unwrap();
    next(&mut desk).unwrap();
    assert_eq!(desk.take(), None, "what was given up is not heard of");
}

#[test]
fn policy_7_a_desk_whose_calls_hang_leaves_the_others_their_threads() {
    let (pool, gate) = (pool(4), Arc::new(Gate::default()));
    let mut hanging = pool.desk(100).unwrap();
    for _ in 0..100 {
        let gate = gate.clone();
        hanging.submit(move || gate.wait()).unwrap();
    }
    gate.reached(2);
    let mut other = pool.desk(10).unwrap();
    for round in 0..50 {
        other.submit(move || round).unwrap();
        assert_eq!(next(&mut other), Ok(round));
    }
    // Neither desk nor pool wait for what hangs.
    hanging.forget();
    drop(hanging);
    other.submit(|| 7).unwrap();
    assert_eq!(next(&mut other), Ok(7));
    drop((other, pool));
    gate.open();
}

#[test]
fn policy_5_a_job_that_panics_is_a_result_and_its_thread_goes_on() {
    let pool = pool(1);
    let mut desk = pool.desk(4).unwrap();
    desk.submit(|| panic!("told to panic")).unwrap();
    assert_eq!(next(&mut desk), Err::<u8, _>(JobPanicked));
    desk.submit(|| 5).unwrap();
    assert_eq!(next(&mut desk), Ok(5));
}

#[test]
fn what_never_begins_is_dropped_with_its_desk() {
    struct Counted(Arc<AtomicUsize>);
    impl Drop for Counted {
        fn drop(&mut self) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }
    let (pool, gate, dropped) = (pool(1), Arc::new(Gate::default()), Arc::new(AtomicUsize::new(0)));
    let mut desk = pool.desk(10).unwrap();
    let first = gate.clone();
    desk.submit(move || first.wait()).unwrap();
    gate.reached(1);
    for _ in 0..5 {
        let counted = Counted(dropped.clone());
        desk.submit(move || drop(counted)).unwrap();
    }
    drop(desk);
    assert_eq!(dropped.load(Ordering::SeqCst), 5);
    gate.open();
}

#[test]
fn threads_start_when_they_are_needed_and_no_more_than_allowed() {
    let (pool, gate) = (pool(3), Arc::new(Gate::default()));
    let mut desks: Vec<Desk<()>> = (0..5).map(|_| pool.desk(2).unwrap()).collect();
    for desk in &mut desks {
        for _ in 0..2 {
            let gate = gate.clone();
            desk.submit(move || gate.wait()).unwrap();
        }
    }
    gate.reached(3);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(gate.0.lock().unwrap().1, 3, "three threads, three calls");
    gate.open();
    for desk in &mut desks {
        next(desk).unwrap();
        next(desk).unwrap();
    }
}
