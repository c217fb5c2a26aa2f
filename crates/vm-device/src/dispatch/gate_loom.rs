//! The gate under loom, which runs each of these in every order that threads and memory allow, up to a number of switches
//! between threads.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release -p vm-device --lib --target-dir target/loom loom`
//!
//! Loom has no membarrier(2): the light barrier is a full one here, which is what the system call makes of it. Each test is also
//! run as where the kernel does not help.
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::time::Duration;

use loom::cell::UnsafeCell;
use loom::sync::atomic::AtomicUsize;
use loom::thread;

use super::barrier::Barrier;
use super::gate::{Closed, Gate};

const LONG: Duration = Duration::from_secs(60);

/// Whoever is in a room reads this; whoever drops it writes. Loom finds out if these meet.
struct Inside(UnsafeCell<bool>);

// SAFETY: loom checks it.
unsafe impl Sync for Inside {}
// SAFETY: loom checks it.
unsafe impl Send for Inside {}

impl Inside {
    fn new() -> Arc<Inside> {
        Arc::new(Inside(UnsafeCell::new(true)))
    }

    fn look(&self) {
        // SAFETY: loom checks it.
        self.0.with(|alive| assert!(unsafe { *alive }, "gone"));
    }

    fn end(&self) {
        // SAFETY: loom checks it.
        self.0.with_mut(|alive| unsafe { *alive = false });
    }
}

/// Tells when it is dropped. The test keeps what is inside, so that a look at it is never one at freed memory.
struct Owner {
    inside: Arc<Inside>,
    dropped: Arc<AtomicUsize>,
}

impl Drop for Owner {
    fn drop(&mut self) {
        self.inside.end();
        self.dropped.fetch_add(1, SeqCst);
    }
}

/// Leads to one room or none.
struct Map {
    room: Option<NonNull<Owner>>,
    owner: Owner,
}

// SAFETY: the gate says when the room may be looked at.
unsafe impl Send for Map {}
// SAFETY: as above.
unsafe impl Sync for Map {}

fn owner() -> (Owner, Arc<Inside>, Arc<AtomicUsize>) {
    let (inside, dropped) = (Inside::new(), Arc::new(AtomicUsize::new(0)));
    (Owner { inside: inside.clone(), dropped: dropped.clone() }, inside, dropped)
}

fn map(room: Option<&Arc<Owner>>) -> Map {
    Map { room: room.map(|room| NonNull::from(&**room)), owner: owner().0 }
}

type TestGate = Gate<(), Map, Owner>;

/// Enters the room if there is one; whether there was.
fn visit(gate: &TestGate, then: impl FnOnce(&TestGate)) -> bool {
    let pass = gate.take_pass(|()| None);
    let find = |map: &Map| {
        map.owner.inside.look();
        map.room.map(|room| (room, ()))
    };
    // SAFETY: the pass is ours, and is left and given back below.
    let found = unsafe {
        match gate.enter_at_once(pass, find) {
            Some(found) => Ok(found),
            None => gate.enter(pass, |map| find(map).ok_or(())),
        }
    };
    let there = found.is_ok();
    if let Ok((room, ())) = found {
        room.inside.look();
        then(gate);
        room.inside.look();
        gate.leave(pass);
    }
    // SAFETY: as above.
    unsafe { gate.return_pass(pass, true) };
    there
}

fn close(gate: &TestGate, room: Arc<Owner>, patience: Duration) -> Closed {
    let mut keeper = gate.keeper();
    gate.publish(&mut keeper, map(None));
    drop(keeper);
    gate.close(room, patience)
}

/// With and without the kernel's help.
fn check(test: impl Fn(fn() -> Barrier) + Send + Sync + 'static) {
    let test = Arc::new(test);
    for barrier in [Barrier::new, Barrier::without_kernel] {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        let test = test.clone();
        builder.check(move || test(barrier));
    }
}

#[test]
fn loom_a_closed_room_is_quiet() {
    check(|barrier| {
        let (room, inside, dropped) = owner();
        let room = Arc::new(room);
        let gate: Arc<TestGate> = Arc::new(Gate::with_barrier((), map(Some(&room)), barrier()));
        let visitor = thread::spawn({
            let gate = gate.clone();
            move || {
                visit(&gate, |_| ());
                visit(&gate, |_| ())
            }
        });
        // The visitor may get the pass that this thread had: still this thread is not inside.
        visit(&gate, |_| ());
        assert!(matches!(close(&gate, room, LONG), Closed::Quiet));
        assert_eq!(dropped.load(Relaxed), 1, "it is gone when closing returns");
        visitor.join().unwrap();
        assert!(!visit(&gate, |_| ()), "found later");
        drop(inside);
    });
}

#[test]
fn loom_a_room_that_is_closed_from_inside_is_dropped_by_who_leaves_last() {
    check(|barrier| {
        let (room, inside, dropped) = owner();
        let room = Arc::new(room);
        let gate: Arc<TestGate> = Arc::new(Gate::with_barrier((), map(Some(&room)), barrier()));
        let other = thread::spawn({
            let gate = gate.clone();
            move || visit(&gate, |_| ())
        });
        let count = dropped.clone();
        visit(&gate, move |gate| {
            assert!(matches!(close(gate, room, LONG), Closed::Later));
            assert_eq!(count.load(Relaxed), 0);
        });
        other.join().unwrap();
        assert_eq!(dropped.load(Relaxed), 1);
        drop(inside);
    });
}

#[test]
fn loom_a_deferred_close_ends_with_the_visit() {
    check(|barrier| {
        let (room, inside, dropped) = owner();
        let room = Arc::new(room);
        let gate: Arc<TestGate> = Arc::new(Gate::with_barrier((), map(Some(&room)), barrier()));
        let visitor = thread::spawn({
            let gate = gate.clone();
            move || visit(&gate, |_| ())
        });
        let _ = close(&gate, room, Duration::ZERO);
        visitor.join().unwrap();
        assert_eq!(dropped.load(Relaxed), 1, "nobody is left to drop it");
        drop(inside);
    });
}

#[test]
fn loom_a_map_is_not_freed_while_it_is_read() {
    check(|barrier| {
        let (room, inside, _) = owner();
        let room = Arc::new(room);
        let gate: Arc<TestGate> = Arc::new(Gate::with_barrier((), map(Some(&room)), barrier()));
        let visitor = thread::spawn({
            let gate = gate.clone();
            move || {
                assert!(visit(&gate, |_| ()));
                assert!(visit(&gate, |_| ()));
            }
        });
        for _ in 0..2 {
            let mut keeper = gate.keeper();
            gate.publish(&mut keeper, map(Some(&room)));
            gate.free_maps(&mut keeper);
        }
        visitor.join().unwrap();
        drop((gate, room, inside));
    });
}
