//! What is counted of a device's queues: each number against what a driver did, over stops, resets and starts.
use reactor::Mail;
use std::sync::{Arc, Mutex};
use std::time::Duration;
use virtio_testkit::{Buf, RingDriver, RingLayout, TestRam};
use vm_virtio::lane::QueueStats;
use vm_virtio::{
    Chain, DeviceError, DeviceType, Engine, EngineOptions, Features, HostEvent, HostEvents, Interrupt, Kick,
    Lane, LaneRunner, QueueSpec, QueueStart, Status, Stop, Ticket, VirtioDevice, WaitFor, Worker,
};

struct Deaf;

impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

struct Bell;

impl Interrupt for Bell {
    fn signal(&self) {}
}

/// What becomes of the next request.
#[derive(Clone, Copy)]
enum Fate {
    Answer,
    Refuse,
    Fail,
    Drop,
    Keep,
}

struct Device(Arc<Mutex<Fate>>);

struct Server {
    fate: Arc<Mutex<Fate>>,
    kept: Vec<Chain>,
}

impl VirtioDevice for Device {
    type Worker = Server;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "a", max_size: 64, lane: 0 }, QueueSpec { name: "b", max_size: 64, lane: 0 }]
    }
    fn workers(&mut self, _: &[Mail<()>]) -> Result<Vec<Server>, DeviceError> {
        Ok(vec![Server { fate: self.0.clone(), kept: vec![] }])
    }
    fn reset(&mut self, workers: &mut [Server]) {
        workers.iter_mut().for_each(|worker| worker.kept.clear());
    }
}

impl Worker for Server {
    type Msg = ();
    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(queue) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            match *self.fate.lock().unwrap() {
                Fate::Answer => {
                    let read = queue.reader(&chain).read(&mut [0; 64]);
                    queue.note_read(read as u64);
                    let written = queue.writer(&chain).write(&[1; 8]) as u32;
                    queue.add_used(chain, written);
                    self.kept.drain(..).for_each(|chain| queue.add_used(chain, 0));
                }
                Fate::Refuse => {
                    queue.note_refused();
                    queue.add_used(chain, 0);
                }
                Fate::Fail => {
                    queue.note_failed();
                    queue.add_used(chain, 0);
                }
                Fate::Drop => drop(chain),
                Fate::Keep => self.kept.push(chain),
            }
        }
        Ok(())
    }
    fn queue_stop(&mut self, queue: u16, how: Stop, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(queue) else { return };
        for chain in self.kept.drain(..) {
            match how {
                Stop::Drain => queue.add_used(chain, 0),
                Stop::Discard => queue.discard(chain),
            }
        }
    }
}

struct Rig {
    engine: Engine<Device>,
    lane: LaneRunner<Server>,
    ram: TestRam,
    ring: RingDriver,
    layout: RingLayout,
    fate: Arc<Mutex<Fate>>,
}

impl Rig {
    fn new(layout: RingLayout) -> Rig {
        let fate = Arc::new(Mutex::new(Fate::Answer));
        let (engine, mut lanes) =
            Engine::new(Device(fate.clone()), EngineOptions::new(Arc::new(Deaf))).unwrap();
        let ram = TestRam::new(&[(0, 0x10_0000)]);
        let ring = RingDriver::new(&ram, layout, 64, layout.features());
        let mut rig = Rig { engine, lane: lanes.remove(0), ram, ring, layout, fate };
        rig.bring_up();
        rig
    }

    fn bring_up(&mut self) {
        let memory = self.engine.memory(self.ram.ram(), WaitFor::NewRequests);
        self.done(memory);
        self.engine.set_driver_features(self.layout.features()).unwrap();
        self.status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        self.start();
        self.status(Status::DRIVER_OK);
        assert!(self.engine.status().contains(Status::DRIVER_OK));
    }

    fn start(&mut self) {
        self.ring = RingDriver::new(&self.ram, self.layout, 64, self.layout.features());
        let start = QueueStart {
            config: self.ring.queue_config(),
            state: None,
            inflight: None,
            kick: Kick::Manual,
            call: Some(Arc::new(Bell)),
        };
        let ticket = self.engine.start(0, start);
        self.done(ticket).unwrap();
        let ticket = self.engine.enable(0, true);
        self.done(ticket);
    }

    fn status(&mut self, status: Status) {
        let ticket = self.engine.set_status(status);
        self.done(ticket);
    }

    fn done<T>(&mut self, mut ticket: Ticket<T>) -> T {
        for _ in 0..100 {
            self.step();
            if let Some(value) = ticket.try_take() {
                return value;
            }
        }
        panic!("the ticket does not end");
    }

    fn step(&mut self) {
        self.lane.turn(Some(Duration::ZERO));
    }

    /// So many requests of 5 readable and 16 writable bytes, with one kick.
    fn ask(&mut self, requests: usize, fate: Fate) {
        *self.fate.lock().unwrap() = fate;
        let bufs: [Buf; 2] = [self.ram.readable(b"12345"), self.ram.writable(16)];
        for _ in 0..requests {
            self.ring.add(&bufs);
        }
        self.engine.kick(0);
        self.step();
        self.ring.drain();
    }

    fn stats(&self) -> QueueStats {
        self.engine.stats(0).unwrap()
    }
}

#[test]
fn each_kind_of_end_has_its_number() {
    for layout in RingLayout::ALL {
        let mut rig = Rig::new(layout);
        rig.ask(3, Fate::Answer);
        rig.ask(4, Fate::Refuse);
        rig.ask(5, Fate::Fail);
        rig.ask(6, Fate::Drop);
        rig.ask(2, Fate::Keep);
        let stats = rig.stats();
        let requests = stats.requests;
        assert_eq!((requests.popped, requests.completed), (20, 18));
        assert_eq!((requests.refused, requests.failed, requests.swept), (4, 5, 6));
        assert_eq!((requests.bytes_read, requests.bytes_written), (3 * 5, 3 * 8), "{layout:?}");
        assert_eq!((stats.out, stats.most_at_once, stats.kicks), (2, 6, 5));
        assert!(stats.interrupts >= 1 && stats.turns >= 5);
        assert_eq!(rig.engine.stats(1), Some(QueueStats::default()), "the other queue did nothing");
        assert_eq!(rig.engine.stats(2), None);
    }
}

#[test]
fn totals_go_on_over_stop_and_reset() {
    for layout in RingLayout::ALL {
        let mut rig = Rig::new(layout);
        rig.ask(3, Fate::Answer);
        rig.ask(2, Fate::Keep);
        let stop = rig.engine.stop(0, Stop::Drain, None);
        rig.done(stop).unwrap();
        let stopped = rig.stats();
        assert_eq!((stopped.requests.popped, stopped.requests.completed, stopped.out), (5, 5, 0));

        rig.start();
        rig.ask(1, Fate::Answer);
        rig.ask(4, Fate::Keep);
        rig.status(Status::empty());
        let reset = rig.stats().requests;
        assert_eq!((reset.popped, reset.completed, reset.discarded), (10, 6, 4), "{layout:?}");

        rig.bring_up();
        rig.ask(7, Fate::Answer);
        let stats = rig.stats();
        assert_eq!((stats.requests.popped, stats.requests.completed, stats.requests.discarded), (17, 13, 4));
        assert_eq!(stats.requests.bytes_written, (3 + 1 + 7) * 8);
        assert_eq!((stats.out, stats.most_at_once), (0, 7));
    }
}

#[test]
fn samples_of_latency_stand_for_every_request() {
    let mut rig = Rig::new(RingLayout::Split);
    // A request that is kept while others come: its sample is over when it is.
    rig.ask(1, Fate::Keep);
    assert_eq!(rig.stats().latency.count(), 0, "nothing has ended");
    rig.ask(1, Fate::Answer);
    let kept = rig.stats().latency;
    assert_eq!(kept.count(), 2);
    for round in 1..=100 {
        rig.ask(3, Fate::Answer);
        let latency = rig.stats().latency;
        // What ended since the last sample is not sampled yet: less than eight turns of three.
        let ended = 2 + round * 3;
        assert!(latency.count() <= ended && latency.count() + 24 > ended, "{latency:?} after {ended}");
        assert!(latency.sum >= kept.sum && latency.max >= kept.max && latency.sum >= latency.max);
    }
}

#[test]
fn a_broken_ring_is_counted_with_its_queue_and_what_was_counted_stays() {
    let mut rig = Rig::new(RingLayout::Split);
    rig.ask(3, Fate::Answer);
    let bad = Buf { addr: vm_virtio::GuestAddress(0xdead_0000_0000), ..rig.ram.writable(16) };
    rig.ring.add(&[bad]);
    rig.engine.kick(0);
    rig.step();
    let stats = rig.stats();
    assert_eq!((stats.faults, stats.requests.completed), (1, 3));
    rig.status(Status::empty());
    rig.bring_up();
    rig.ask(1, Fate::Answer);
    assert_eq!((rig.stats().faults, rig.stats().requests.completed), (1, 4));
}
