//! A driver that keeps both queues of a [`Puppet`](crate::puppet::Puppet) busy while its VMM moves it from machine to machine:
//! for tests of transports.
//!
//! The device answers with numbers that count on in its state. So a request that is lost or done twice is a number that is
//! missing or not the next one. The driver looks at a queue only when an interrupt says so: a lost one shows as well.
use std::collections::VecDeque;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use virtio_testkit::transport::{RegisterAccess, Subchannel, TransportDriver};
use virtio_testkit::{Buf, RingDriver, RingLayout, TestRam};
use vm_virtio::{Features, Status};

/// A device behind a transport, with memory and with lanes on threads.
pub(crate) trait Movable: Send + Sync {
    type State;
    fn suspend(&self);
    fn save(&self) -> Self::State;
    fn restore(&self, state: &Self::State);
    /// Brings interrupts that wait in the machine to the driver.
    fn deliver(&self) {}
}

/// Where the driver finds its device, whatever machine that is in. An access is within one machine.
pub(crate) struct Place<M>(Arc<RwLock<M>>);

impl<M> Clone for Place<M> {
    fn clone(&self) -> Self {
        Place(self.0.clone())
    }
}

impl<M> Place<M> {
    pub(crate) fn new(machine: M) -> Self {
        Place(Arc::new(RwLock::new(machine)))
    }

    pub(crate) fn now(&self) -> RwLockReadGuard<'_, M> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<M: RegisterAccess> RegisterAccess for Place<M> {
    fn load(&self, offset: u64, data: &mut [u8]) {
        self.now().load(offset, data);
    }

    fn store(&self, offset: u64, data: &[u8]) {
        self.now().store(offset, data);
    }
}

impl<M: Subchannel> Subchannel for Place<M> {
    fn start(&self, address: u32) -> (u8, u8) {
        self.now().start(address)
    }

    fn diagnose(&self, data: u64) -> i64 {
        self.now().diagnose(data)
    }
}

const SIZE: u16 = 16;
const MOVES: u64 = 25;

/// One queue, as the driver sees it.
struct Queue {
    ring: RingDriver,
    idle: Vec<Buf>,
    /// In the order in which they were submitted.
    under_way: VecDeque<(u16, Buf)>,
    answered: u64,
}

impl Queue {
    fn new(ram: &TestRam, layout: RingLayout, features: Features) -> Queue {
        let idle = (0..SIZE).map(|_| ram.writable(8)).collect();
        let ring = RingDriver::new(ram, layout, SIZE, features);
        Queue { ring, idle, under_way: VecDeque::new(), answered: 0 }
    }

    /// As many as said, unless there is no room. Whether the device is to be notified.
    fn submit(&mut self, count: u64) -> bool {
        let mut any = false;
        for _ in 0..count {
            let Some(buf) = self.idle.pop() else { break };
            self.under_way.push_back((self.ring.add(&[buf]), buf));
            any = true;
        }
        any && self.ring.kick_wanted()
    }

    /// Takes what is answered: each request once, in order, with the next number.
    fn take(&mut self, ram: &TestRam) {
        while let Some(used) = self.ring.used() {
            let (id, buf) = self.under_way.pop_front().expect("a request that was made");
            self.answered += 1;
            assert_eq!((used.id, used.len), (id, 8));
            assert_eq!(ram.contents(&buf), self.answered.to_le_bytes(), "lost, or done twice");
            self.idle.push(buf);
        }
    }
}

/// Moves the device from machine to machine while the driver submits, and checks every answer. `successor` makes the next
/// machine, with the same memory and a new device.
pub(crate) fn moves_under_traffic<M: Movable>(
    ram: &TestRam,
    layout: RingLayout,
    place: &Place<M>,
    driver: &mut dyn TransportDriver,
    successor: impl Fn(&M) -> M + Sync,
) {
    let packed = if layout == RingLayout::Packed { Features::RING_PACKED } else { Features::empty() };
    let features = Features::VERSION_1 | packed;
    driver.write_status(Status::empty());
    let mut status = Status::ACKNOWLEDGE | Status::DRIVER;
    driver.write_status(status);
    driver.choose(features);
    status |= Status::FEATURES_OK;
    driver.write_status(status);
    assert_eq!(driver.status(), status);
    let mut queues = [0, 1].map(|_| Queue::new(ram, layout, features));
    for (number, queue) in (0..).zip(&queues) {
        assert!(driver.start_queue(number, &queue.ring.queue_config()));
    }
    status |= Status::DRIVER_OK;
    driver.write_status(status);

    let (place, successor) = (place.clone(), &successor);
    // Answers of the queue that has got fewest.
    let least = &AtomicU64::new(0);
    std::thread::scope(|scope| {
        let mover = place.clone();
        let vmm = scope.spawn(move || {
            for round in 0..MOVES {
                // Each machine serves both queues, however busy the CPUs are. The driver finds out if nothing goes on.
                while least.load(Ordering::Relaxed) <= round {
                    std::thread::sleep(Duration::from_micros(50));
                }
                std::thread::sleep(Duration::from_micros(round * 731 % 1500));
                mover.now().suspend();
                // Still a driver's turn: its CPUs stop only now. Memory it can write to all the time.
                std::thread::sleep(Duration::from_micros(round * 97 % 300));
                let mut here = mover.0.write().unwrap_or_else(PoisonError::into_inner);
                let state = here.save();
                here.deliver();
                let next = successor(&here);
                next.restore(&state);
                *here = next;
            }
        });
        let mut round = 0u64;
        let mut progress = (0, Instant::now());
        loop {
            let over = vmm.is_finished();
            for (number, queue) in (0..).zip(&mut queues) {
                round += 1;
                if !over && queue.submit(round * 5 % 7) {
                    driver.notify(number);
                }
            }
            place.now().deliver();
            let heard = driver.interrupt();
            for (number, queue) in queues.iter_mut().enumerate() {
                if heard.queues >> number & 1 != 0 {
                    queue.take(ram);
                }
            }
            if over && queues.iter().all(|queue| queue.under_way.is_empty()) {
                break;
            }
            let answered = queues.iter().map(|queue| queue.answered).sum::<u64>();
            if answered != progress.0 {
                progress = (answered, Instant::now());
                least.store(queues.iter().map(|queue| queue.answered).min().unwrap_or(0), Ordering::Relaxed);
            }
            if progress.1.elapsed() > Duration::from_secs(30) {
                // Lets the mover end.
                least.store(u64::MAX, Ordering::Relaxed);
                panic!("requests or interrupts are lost");
            }
            if heard.queues == 0 {
                std::thread::yield_now();
            }
        }
        vmm.join().expect("every move succeeds");
    });
    assert!(queues.iter().all(|queue| queue.answered >= MOVES), "there was traffic");
    assert_eq!(driver.status(), status);
}
