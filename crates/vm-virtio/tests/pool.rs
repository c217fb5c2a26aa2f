//! Many lanes on few threads: nobody waits for another's failure, panic, greed or hanging.
use std::num::NonZeroUsize;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reactor::{Mail, Token};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::OwnedFd;
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_virtio::lane::run_in_pool;
use vm_virtio::{
    DeviceError, DeviceType, Engine, EngineOptions, Features, HostEvent, HostEvents, Kick, Lane, LaneRunner,
    QueueSpec, QueueStart, Status, VirtioDevice, WaitFor, Worker,
};

/// For what should happen soon; long, because test machines are slow.
const SOON: Duration = Duration::from_secs(20);

/// Opens once.
#[derive(Default)]
struct Gate(Mutex<bool>, Condvar);

impl Gate {
    fn open(&self) {
        *self.0.lock().unwrap() = true;
        self.1.notify_all();
    }
    fn wait(&self) {
        let _open = self.1.wait_while(self.0.lock().unwrap(), |open| !*open).unwrap();
    }
}

#[derive(Clone)]
enum Kind {
    Echo,
    /// Panics at the first request.
    Panic,
    /// Fails at the first request.
    Fail,
    /// Hangs at the first request until the gate opens.
    Hang(Arc<Gate>, Arc<AtomicBool>),
    /// Has something to do all the time.
    Busy,
}

struct Device(Kind);

impl VirtioDevice for Device {
    type Worker = Server;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "q", max_size: 16, lane: 0 }]
    }
    fn workers(&mut self, _: &[Mail<()>]) -> Result<Vec<Server>, DeviceError> {
        Ok(vec![Server(self.0.clone())])
    }
}

struct Server(Kind);

impl Worker for Server {
    type Msg = ();
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            match &self.0 {
                Kind::Echo | Kind::Busy => {}
                Kind::Panic => panic!("told to panic"),
                Kind::Fail => return Err(DeviceError::new("told to fail")),
                Kind::Hang(gate, hangs) => {
                    hangs.store(true, Ordering::SeqCst);
                    gate.wait();
                }
            }
            queue.add_used(chain, 0);
        }
        if matches!(self.0, Kind::Busy) {
            lane.reactor.set_timer(Token::new(0), Instant::now());
        }
        Ok(())
    }
    fn timer(&mut self, token: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        lane.reactor.set_timer(token, Instant::now());
        Ok(())
    }
}

struct Deaf;
impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

struct Guest {
    engine: Engine<Device>,
    ram: TestRam,
    ring: RingDriver,
    kick: OwnedFd,
}

impl Guest {
    fn new(kind: Kind, lanes: &mut Vec<LaneRunner<Server>>) -> Guest {
        let (engine, lane) = Engine::new(Device(kind), EngineOptions::new(Arc::new(Deaf))).unwrap();
        lanes.extend(lane);
        let ram = TestRam::new(&[(0, 0x1_0000)]);
        let ring = RingDriver::new(&ram, RingLayout::Split, 16, RingLayout::Split.features());
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        Guest { engine, ram, ring, kick }
    }

    fn start(&mut self, polled: bool) {
        drop(self.engine.memory(self.ram.ram(), WaitFor::NewRequests));
        drop(self.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER));
        self.engine.set_driver_features(RingLayout::Split.features()).unwrap();
        drop(self.engine.set_status(Status::FEATURES_OK));
        let kick = if polled { Kick::Poll } else { Kick::Fd(self.kick.try_clone().unwrap()) };
        let config = self.ring.queue_config();
        let start =
            self.engine.start(0, QueueStart { config, state: None, inflight: None, kick, call: None });
        drop(self.engine.enable(0, true));
        let ready = self.engine.set_status(Status::DRIVER_OK);
        start.wait().unwrap();
        ready.wait();
    }

    fn submit(&mut self) {
        let buffer = self.ram.writable(8);
        self.ring.add(&[buffer]);
        rustix::io::write(&self.kick, &1u64.to_ne_bytes()).unwrap();
    }

    #[track_caller]
    fn answered(&mut self) {
        eventually("an answer", || self.ring.used().is_some());
    }

    #[track_caller]
    fn works(&mut self) {
        self.submit();
        self.answered();
    }

    #[track_caller]
    fn needs_reset(&self) {
        eventually("a failure", || self.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    }
}

#[track_caller]
fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn pool(kinds: &[(usize, Kind)], threads: usize) -> (Vec<Guest>, Vec<JoinHandle<()>>) {
    let mut lanes = Vec::new();
    let mut guests: Vec<Guest> = kinds
        .iter()
        .flat_map(|(count, kind)| vec![kind.clone(); *count])
        .map(|kind| Guest::new(kind, &mut lanes))
        .collect();
    let threads = run_in_pool(lanes, NonZeroUsize::new(threads).unwrap()).unwrap();
    guests.iter_mut().for_each(|guest| guest.start(false));
    (guests, threads)
}

fn end(guests: Vec<Guest>, threads: Vec<JoinHandle<()>>) {
    drop(guests);
    eventually("the threads end", || threads.iter().all(JoinHandle::is_finished));
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn a_hundred_devices_on_three_threads() {
    let (mut guests, threads) = pool(&[(100, Kind::Echo)], 3);
    assert_eq!(threads.len(), 3);
    for _ in 0..20 {
        guests.iter_mut().for_each(Guest::submit);
        guests.iter_mut().for_each(Guest::answered);
    }
    // Orders reach them too: a reset, and the whole way up again.
    for guest in &mut guests {
        guest.engine.reset().wait();
        guest.ring.restart();
        guest.start(false);
        guest.works();
    }
    end(guests, threads);
}

#[test]
fn rings_without_a_kick_are_looked_at() {
    let (mut guests, threads) = pool(&[(2, Kind::Echo)], 1);
    guests[0].engine.reset().wait();
    guests[0].ring.restart();
    guests[0].start(true);
    for _ in 0..3 {
        let buffer = guests[0].ram.writable(8);
        guests[0].ring.add(&[buffer]);
        guests[0].answered();
    }
    guests[1].works();
    end(guests, threads);
}

#[test]
fn policy_5_a_panic_or_failure_of_one_lane_is_nobody_elses() {
    let (mut guests, threads) = pool(&[(1, Kind::Panic), (1, Kind::Fail), (20, Kind::Echo)], 2);
    guests[0].submit();
    guests[1].submit();
    guests[0].needs_reset();
    guests[1].needs_reset();
    guests[2..].iter_mut().for_each(Guest::works);
    // And a reset brings them back as far as they go.
    for guest in &mut guests[..2] {
        guest.engine.reset().wait();
        assert_eq!(guest.engine.status(), Status::empty());
        guest.ring.restart();
        guest.start(false);
    }
    end(guests, threads);
}

#[test]
fn policy_8_a_busy_lane_keeps_nobody_waiting_even_on_one_thread() {
    let (mut guests, threads) = pool(&[(3, Kind::Busy), (20, Kind::Echo)], 1);
    guests[..3].iter_mut().for_each(Guest::works);
    for _ in 0..5 {
        guests.iter_mut().for_each(Guest::works);
    }
    end(guests, threads);
}

#[test]
fn policy_7_a_lane_that_hangs_costs_its_thread_and_no_other_lane() {
    let (gate, hangs) = (Arc::new(Gate::default()), Arc::new(AtomicBool::new(false)));
    let (mut guests, threads) = pool(&[(1, Kind::Hang(gate.clone(), hangs.clone())), (50, Kind::Echo)], 2);
    guests[0].submit();
    eventually("it hangs", || hangs.load(Ordering::SeqCst));
    for _ in 0..5 {
        // Also those whose events lay ready when it began to hang.
        guests[1..].iter_mut().for_each(Guest::submit);
        guests[1..].iter_mut().for_each(Guest::answered);
    }
    // Orders and kicks for the hanging lane wait with it.
    guests[0].submit();
    let stop = guests[0].engine.stop(0, vm_virtio::Stop::Drain, None);
    guests[1..].iter_mut().for_each(Guest::works);
    gate.open();
    assert!(stop.wait().is_ok());
    guests[0].answered();
    end(guests, threads);
}

#[test]
fn a_pool_of_nothing_ends_at_once() {
    assert!(run_in_pool(Vec::<LaneRunner<Server>>::new(), NonZeroUsize::MIN).unwrap().is_empty());
}
