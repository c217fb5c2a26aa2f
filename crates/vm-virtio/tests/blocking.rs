//! Blocking calls of a device on the host's pool: what hangs there holds up neither lane, nor reset, nor another guest.
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use reactor::{BlockingPool, Desk, Interest, Mail, Readiness, Token};
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::{
    Chain, DeviceError, DeviceType, Features, Lane, QueueSpec, Status, Stop, StopError, VirtioDevice, Worker,
};

const SOON: Duration = Duration::from_secs(20);
const RESULTS: Token = Token::new(0);

/// Closed until it is opened: what a call waits for.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
    fn wait(&self) {
        drop(self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap());
    }
}

/// A device that asks a backend that blocks, for every request.
struct Slow {
    pool: BlockingPool,
    gate: Arc<Gate>,
}

struct SlowWorker {
    desk: Desk<u32>,
    gate: Arc<Gate>,
    /// In the order in which they were submitted; the pool gives each desk here one thread, so results are, too.
    held: Vec<Chain>,
}

impl VirtioDevice for Slow {
    type Worker = SlowWorker;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "q", max_size: 64, lane: 0 }]
    }
    fn workers(&mut self, _: &[Mail<()>]) -> Result<Vec<SlowWorker>, DeviceError> {
        Ok(vec![SlowWorker { desk: self.pool.desk(4)?, gate: self.gate.clone(), held: Vec::new() }])
    }
    fn reset(&mut self, workers: &mut [SlowWorker]) {
        for worker in workers {
            worker.desk.forget();
            worker.held.clear();
        }
    }
}

impl Worker for SlowWorker {
    type Msg = ();
    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        Ok(lane.reactor.watch(self.desk.as_fd(), RESULTS, Interest::READ_EDGE)?)
    }
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        // What the desk has no room for stays in the ring until there is a result.
        while self.desk.outstanding() < 4
            && let Some(chain) = queue.pop()
        {
            let gate = self.gate.clone();
            let job = move || {
                gate.wait();
                7
            };
            match self.desk.submit(job) {
                Ok(()) => self.held.push(chain),
                // Calls from before a reset still hang.
                Err(_) => queue.add_used(chain, 0),
            }
        }
        Ok(())
    }
    fn queue_stop(&mut self, number: u16, how: Stop, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(number) else { return };
        if how == Stop::Discard {
            self.desk.forget();
            self.held.drain(..).for_each(|chain| queue.discard(chain));
        }
    }
    fn source_ready(&mut self, _: Token, _: Readiness, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        while let Some(result) = self.desk.take() {
            let Some(queue) = lane.queues.get(0) else { continue };
            queue.add_used(self.held.remove(0), result.unwrap_or(0));
        }
        self.queue_ready(0, lane)
    }
}

fn host(pool: &BlockingPool, layout: RingLayout) -> (MemoryHost<Slow>, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let device = Slow { pool: pool.clone(), gate: gate.clone() };
    (MemoryHost::builder(device).layout(layout).start(), gate)
}

fn pool() -> BlockingPool {
    // A desk gets half of them.
    BlockingPool::new(NonZeroUsize::new(2).unwrap())
}

fn request(host: &mut MemoryHost<Slow>) -> u16 {
    let buffer = host.ram().writable(8);
    let id = host.ring(0).add(&[buffer]);
    host.kick(0);
    host.step();
    id
}

#[track_caller]
fn answered(host: &mut MemoryHost<Slow>, id: u16) {
    let mut used = None;
    assert!(host.run_until(SOON, |host| {
        used = used.or_else(|| host.ring(0).used());
        used.is_some()
    }));
    assert_eq!(used.map(|used| used.id), Some(id));
}

#[test]
fn results_complete_requests_and_the_rest_waits_in_the_ring() {
    for layout in RingLayout::ALL {
        let (mut host, gate) = host(&pool(), layout);
        let ids: Vec<u16> = (0..10).map(|_| request(&mut host)).collect();
        host.step();
        assert_eq!(host.ring(0).used(), None);
        gate.open();
        ids.into_iter().for_each(|id| answered(&mut host, id));
    }
}

#[test]
fn policy_7_a_call_that_hangs_does_not_hold_up_a_reset() {
    let pool = pool();
    let (mut hanging, gate) = host(&pool, RingLayout::Split);
    for _ in 0..6 {
        request(&mut hanging);
    }
    // The status reads 0, which it would not at the deadline.
    hanging.reset();
    assert_eq!(hanging.engine().failures().stuck.load(Ordering::Relaxed), 0);
    hanging.initialise();
    // Another guest of the same pool notices nothing.
    let (mut other, open) = host(&pool, RingLayout::Packed);
    open.open();
    for _ in 0..5 {
        let id = request(&mut other);
        answered(&mut other, id);
    }
    // And when the backend is back, the guest that was reset works, too.
    gate.open();
    let id = request(&mut hanging);
    answered(&mut hanging, id);
}

#[test]
fn policy_7_a_drain_whose_call_hangs_is_stuck_at_its_deadline() {
    let (mut host, gate) = host(&pool(), RingLayout::Split);
    request(&mut host);
    let deadline = Instant::now() + Duration::from_millis(50);
    let stop = host.engine().stop(0, Stop::Drain, Some(deadline));
    assert!(matches!(host.finish(stop), Err(StopError::Stuck(_))));
    assert!(host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
    gate.open();
}

#[test]
fn policy_7_a_device_whose_calls_hang_ends_at_once() {
    let (mut host, gate) = host(&pool(), RingLayout::Split);
    request(&mut host);
    drop(host);
    gate.open();
}
