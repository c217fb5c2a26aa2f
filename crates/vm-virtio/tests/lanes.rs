//! Lanes in trouble: devices and drivers that could keep a lane from resting, or from going on.

use reactor::{Interest, Mail, Readiness, SpinPolicy, Token};
use std::collections::VecDeque;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};
use virtio_testkit::{RingDriver, RingLayout, TestRam};
use vm_virtio::memory::SharedMemory;
use vm_virtio::upcall::{Responder, UpcallError, UpcallHandler, UpcallId, UpcallRequest, UpcallResult};
use vm_virtio::{
    Call, Chain, ConfigSpace, ConfigWriter, DeviceError, DeviceType, Engine, EngineOptions, Features,
    GuestRam, HostEvent, HostEvents, InflightRegion, Interrupt, Kick, Lane, LaneRunner, Queue, QueueConfig,
    QueueSpec, QueueStart, Session, StartError, Status, Stop, Ticket, VirtioDevice, WaitFor, Worker,
};

/// For what should happen soon; long, because test machines are slow.
const SOON: Duration = Duration::from_secs(30);

type Ready = Box<dyn FnMut(u16, &mut Lane<'_>) -> Result<(), DeviceError> + Send>;

struct W {
    ready: Ready,
    fail_mail: bool,
    file: Option<std::fs::File>,
}
type Mails = Arc<Mutex<Vec<Mail<()>>>>;

struct D {
    workers: Option<Vec<W>>,
    mail: Mails,
}

impl VirtioDevice for D {
    type Worker = W;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "a", max_size: 64, lane: 0 }, QueueSpec { name: "b", max_size: 64, lane: 0 }]
    }
    fn workers(&mut self, mail: &[Mail<()>]) -> Result<Vec<W>, DeviceError> {
        *self.mail.lock().unwrap() = mail.to_vec();
        Ok(self.workers.take().unwrap())
    }
}
impl Worker for W {
    type Msg = ();
    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if let Some(file) = &self.file {
            lane.reactor.watch(file.as_fd(), Token::new(0), Interest::READ)?;
        }
        Ok(())
    }
    fn queue_ready(&mut self, q: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        (self.ready)(q, lane)
    }
    fn queue_stop(&mut self, _: u16, _: Stop, _: &mut Lane<'_>) {}
    fn message(&mut self, _: (), _: &mut Lane<'_>) -> Result<(), DeviceError> {
        if self.fail_mail { Err(DeviceError::new("bad")) } else { Ok(()) }
    }
    fn source_ready(&mut self, _: Token, _: Readiness, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        Err(DeviceError::new("source"))
    }
}
struct Ear;
impl HostEvents for Ear {
    fn event(&self, _: HostEvent) {}
}

fn worker(ready: Ready) -> W {
    W { ready, fail_mail: false, file: None }
}
struct Rig {
    engine: Engine<D>,
    lanes: Vec<LaneRunner<W>>,
    ram: TestRam,
    rings: Vec<RingDriver>,
    mail: Mails,
}
fn rig(w: W, size: u16, spin: Duration) -> Rig {
    let mail = Arc::new(Mutex::new(vec![]));
    let mut options = EngineOptions::new(Arc::new(Ear));
    options.spin = SpinPolicy { limit: spin };
    let (engine, lanes) = Engine::new(D { workers: Some(vec![w]), mail: mail.clone() }, options).unwrap();
    let ram = TestRam::new(&[(0, 0x10_0000)]);
    let f = RingLayout::Split.features();
    let rings = vec![
        RingDriver::new(&ram, RingLayout::Split, size, f),
        RingDriver::new(&ram, RingLayout::Split, size, f),
    ];
    Rig { engine, lanes, ram, rings, mail }
}
/// A rig whose worker keeps every chain, and what it keeps.
fn holding_rig() -> (Rig, Arc<Mutex<Vec<Chain>>>) {
    let held: Arc<Mutex<Vec<Chain>>> = Arc::default();
    let keep = held.clone();
    let ready = move |q, lane: &mut Lane<'_>| {
        let queue = lane.queues.get(q).unwrap();
        keep.lock().unwrap().extend(queue.iter());
        Ok(())
    };
    (rig(worker(Box::new(ready)), 8, Duration::ZERO), held)
}

impl Rig {
    fn step(&mut self) {
        for l in &mut self.lanes {
            l.turn(Some(Duration::ZERO));
        }
    }
    fn done<T>(&mut self, mut t: Ticket<T>) -> Option<T> {
        for _ in 0..100 {
            self.step();
            if let Some(v) = t.try_take() {
                return Some(v);
            }
        }
        None
    }
    fn up(&mut self, calls: Vec<Call>) {
        let t = self.engine.memory(self.ram.ram(), WaitFor::NewRequests);
        self.done(t).unwrap();
        self.engine.set_driver_features(RingLayout::Split.features()).unwrap();
        let t = self.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK);
        self.done(t).unwrap();
        for (i, call) in calls.into_iter().enumerate() {
            self.start(i as u16, call);
        }
        let t = self.engine.set_status(Status::DRIVER_OK);
        self.done(t).unwrap();
    }
    fn start(&mut self, q: u16, call: Call) {
        let t = self.engine.start(
            q,
            QueueStart {
                config: self.rings[q as usize].queue_config(),
                state: None,
                inflight: None,
                kick: Kick::Manual,
                call,
            },
        );
        self.done(t).unwrap().unwrap();
        let t = self.engine.enable(q, true);
        self.done(t).unwrap();
    }
}
fn within(what: &str, f: impl FnOnce() + Send + 'static) {
    let (tx, rx) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        f();
        tx.send(()).unwrap()
    });
    assert!(rx.recv_timeout(SOON).is_ok(), "hangs: {what}");
}

#[test]
fn policy_5_a_failed_lane_rests_although_it_has_mail() {
    within("a failed lane with mail", || {
        let mut w = worker(Box::new(|_, _| Ok(())));
        w.fail_mail = true;
        let mut r = rig(w, 8, Duration::ZERO);
        r.up(vec![None]);
        r.mail.lock().unwrap()[0].send(()).unwrap();
        r.step();
    });
}

#[test]
fn a_polling_lane_sleeps_while_its_worker_leaves_a_buffer() {
    let calls = Arc::new(AtomicU64::new(0));
    let c = calls.clone();
    let mut r = rig(
        worker(Box::new(move |_, _| {
            c.fetch_add(1, SeqCst);
            Ok(())
        })),
        8,
        Duration::from_micros(50),
    );
    r.up(vec![None]);
    let buf = r.ram.writable(8);
    r.rings[0].add(&[buf]);
    r.engine.kick(0);
    let lane = r.lanes.pop().unwrap();
    let t = std::thread::spawn(move || lane.run());
    std::thread::sleep(Duration::from_millis(500));
    let n = calls.load(SeqCst);
    r.engine.shutdown();
    t.join().unwrap();
    assert!(n < 100, "{n} calls of queue_ready in half a second for one kick");
}

#[test]
fn a_chain_put_back_after_the_ring_was_empty_does_not_keep_the_lane_awake() {
    within("unpop after None", || {
        let mut r = rig(
            worker(Box::new(move |q, lane| {
                let queue = lane.queues.get(q).unwrap();
                let Some(first) = queue.pop() else { return Ok(()) };
                assert!(queue.pop().is_none());
                queue.unpop(first).unwrap();
                Ok(())
            })),
            8,
            Duration::ZERO,
        );
        r.up(vec![None]);
        let buf = r.ram.writable(8);
        r.rings[0].add(&[buf]);
        r.engine.kick(0);
        r.step();
    });
}

struct Adder(Mutex<VecDeque<Box<dyn FnOnce() + Send>>>);
impl Interrupt for Adder {
    fn signal(&self) {
        if let Some(f) = self.0.lock().unwrap().pop_front() {
            f()
        }
    }
}

#[test]
fn no_wake_up_is_lost_after_a_dropped_chain_with_all_slots_taken() {
    let held: Arc<Mutex<Vec<Chain>>> = Arc::default();
    let h = held.clone();
    let popped = Arc::new(AtomicUsize::new(0));
    let p = popped.clone();
    let mut r = rig(
        worker(Box::new(move |q, lane| {
            let queue = lane.queues.get(q).unwrap();
            while let Some(chain) = queue.pop() {
                p.fetch_add(1, SeqCst);
                let mut held = h.lock().unwrap();
                if held.len() < 3 { held.push(chain) } else { drop(chain) }
            }
            Ok(())
        })),
        4,
        Duration::ZERO,
    );
    let adder = Arc::new(Adder(Mutex::default()));
    r.up(vec![Some(adder.clone())]);
    let bufs: Vec<_> = (0..5).map(|_| r.ram.writable(8)).collect();
    for b in &bufs[..4] {
        r.rings[0].add(&[*b]);
    }
    assert!(r.rings[0].kick_wanted());
    // On the interrupt the driver (another CPU) reuses the buffer at once, and kicks if it is asked to.
    let ring = Arc::new(Mutex::new(r.rings.remove(0)));
    let kicked = Arc::new(AtomicBool::new(false));
    let (ring2, kicked2, buf) = (ring.clone(), kicked.clone(), bufs[4]);
    adder.0.lock().unwrap().push_back(Box::new(move || {
        let mut ring = ring2.lock().unwrap();
        assert!(ring.used().is_some());
        ring.add(&[buf]);
        kicked2.store(ring.kick_wanted(), SeqCst);
    }));
    r.engine.kick(0);
    r.step();
    if kicked.load(SeqCst) {
        r.engine.kick(0);
        r.step();
    }
    assert_eq!(popped.load(SeqCst), 5, "kicked: {}", kicked.load(SeqCst));
}

/// The worker's file stays ready and nobody reads it any more.
#[test]
fn policy_5_a_failed_lane_sleeps_although_its_workers_file_is_ready() {
    let mut w = worker(Box::new(|_, _| Ok(())));
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut &theirs, b"x").unwrap();
    w.file = Some(std::fs::File::from(std::os::fd::OwnedFd::from(ours)));
    let mut r = rig(w, 8, Duration::ZERO);
    let lane = &mut r.lanes[0];
    assert!(lane.turn(Some(SOON)), "the file is ready and the worker fails");
    for _ in 0..3 {
        assert!(!lane.turn(Some(Duration::from_millis(20))), "nothing to do");
    }
}

#[test]
fn a_queue_does_not_start_while_a_reset_is_under_way() {
    let (mut r, held) = holding_rig();
    r.up(vec![None]);
    let buf = r.ram.writable(8);
    r.rings[0].add(&[buf]);
    r.engine.kick(0);
    r.step();
    let mut reset = r.engine.reset();
    r.step();
    let start = r.engine.start(
        1,
        QueueStart {
            config: r.rings[1].queue_config(),
            state: None,
            inflight: None,
            kick: Kick::Manual,
            call: None,
        },
    );
    assert!(matches!(r.done(start), Some(Err(StartError::Resetting))));
    held.lock().unwrap().clear();
    let end = Instant::now() + SOON;
    while Instant::now() < end {
        r.step();
        if reset.try_take().is_some() {
            return;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    panic!("the reset does not end");
}

/// A queue that goes on where another one was killed, stopped before it had a turn: what it knows to be in flight is
/// finished like what it took itself. The ring's position alone would not bring it back. Most front-ends disable a ring
/// before they stop it.
#[test]
fn inflight_requests_are_finished_when_the_queue_stops_at_once() {
    for disabled in [false, true] {
        inflight_requests_are_finished(disabled);
    }
}

fn inflight_requests_are_finished(disabled: bool) {
    let held: Arc<Mutex<Vec<Chain>>> = Arc::default();
    let keep = held.clone();
    let ready = move |q, lane: &mut Lane<'_>| {
        let queue = lane.queues.get(q).unwrap();
        match q {
            0 => keep.lock().unwrap().extend(queue.iter()),
            _ => {
                while let Some(chain) = queue.pop() {
                    queue.add_used(chain, 8);
                }
            }
        }
        Ok(())
    };
    let mut r = rig(worker(Box::new(ready)), 8, Duration::ZERO);
    r.up(vec![]);
    let memory = Arc::new(SharedMemory::private(InflightRegion::bytes_for(8)));
    // Both have the same ring. The first one never comes to an end.
    let start = |r: &Rig, queue| {
        let region = InflightRegion::new(memory.clone(), 0, memory.len()).unwrap();
        let (config, kick) = (r.rings[0].queue_config(), Kick::Manual);
        let start = QueueStart { config, state: None, inflight: Some(region), kick, call: None };
        (r.engine.start(queue, start), r.engine.enable(queue, true))
    };
    let (started, _) = start(&r, 0);
    r.done(started).unwrap().unwrap();
    let buffers: Vec<_> = (0..3).map(|_| r.ram.writable(8)).collect();
    for buffer in &buffers[..2] {
        r.rings[0].add(&[*buffer]);
    }
    r.engine.kick(0);
    r.step();
    assert_eq!(held.lock().unwrap().len(), 2);
    // New, and none of its business any more.
    r.rings[0].add(&[buffers[2]]);
    let (started, _) = start(&r, 1);
    if disabled {
        drop(r.engine.enable(1, false));
    }
    let stopped = r.engine.stop(1, Stop::Drain, None);
    let state = r.done(stopped).unwrap().unwrap();
    assert!(started.wait().is_ok());
    assert_eq!((state.avail.index, state.used.index, state.held.len()), (2, 2, 0));
    assert_eq!(r.rings[0].drain().len(), 2);
}

#[test]
fn common_2_4_1_a_status_that_reads_0_takes_the_next_write() {
    let mut lost = 0;
    let mut r = rig(worker(Box::new(|_, _| Ok(()))), 8, Duration::ZERO);
    r.up(vec![None]);
    let lane = r.lanes.pop().unwrap();
    let t = std::thread::spawn(move || lane.run());
    for _ in 0..20000 {
        r.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER).wait();
        let reset = r.engine.reset();
        // 2.4.2: a driver that has written 0 waits until the status reads 0.
        // Closely, but not for as long as a CPU that has other things to do leaves it to us.
        let mut looks = 0;
        while !r.engine.status().is_empty() {
            looks += 1;
            if looks % 1000 == 0 { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        r.engine.set_status(Status::ACKNOWLEDGE).wait();
        if !r.engine.status().contains(Status::ACKNOWLEDGE) {
            lost += 1
        }
        reset.wait();
    }
    r.engine.shutdown();
    t.join().unwrap();
    assert_eq!(lost, 0, "of 20000");
}

#[test]
fn policy_2_a_chain_dropped_on_another_thread_wakes_its_lane() {
    let (tx, rx) = std::sync::mpsc::channel::<Chain>();
    let tx = Mutex::new(tx);
    let mut r = rig(
        worker(Box::new(move |q, lane| {
            let queue = lane.queues.get(q).unwrap();
            while let Some(chain) = queue.pop() {
                tx.lock().unwrap().send(chain).unwrap()
            }
            Ok(())
        })),
        8,
        Duration::ZERO,
    );
    r.up(vec![None]);
    let buf = r.ram.writable(8);
    r.rings[0].add(&[buf]);
    r.engine.kick(0);
    let lane = r.lanes.pop().unwrap();
    let t = std::thread::spawn(move || lane.run());
    let chain = rx.recv().unwrap();
    // Asleep by then, most likely.
    std::thread::sleep(Duration::from_millis(100));
    drop(chain);
    let end = Instant::now() + SOON;
    while r.rings[0].used().is_none() {
        assert!(Instant::now() < end, "not given back");
        std::thread::sleep(Duration::from_millis(1));
    }
    r.engine.shutdown();
    t.join().unwrap();
}

#[test]
fn completions_stay_in_the_memory_they_were_made_for() {
    use vm_memory::*;
    let mem = || {
        let m: GuestMemoryMmap =
            GuestMemoryMmap::from_ranges(&[(vm_memory::GuestAddress(0), 0x10000)]).unwrap();
        m
    };
    let (a, b) = (GuestRam::new(&mem()), GuestRam::new(&mem()));
    let config = QueueConfig {
        size: 4,
        desc: GuestAddress(0),
        driver: GuestAddress(0x1000),
        device: GuestAddress(0x2000),
    };
    for ram in [&a, &b] {
        ram.write(GuestAddress(0), &[0x00, 0x30, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 2, 0, 0, 0]).unwrap();
        ram.write(GuestAddress(0x1000), &[0, 0, 1, 0, 0, 0]).unwrap();
    }
    let mut queue = Queue::new(config, &a, Features::VERSION_1, None).unwrap();
    let chain = queue.pop().unwrap();
    queue.add_used(chain, 5);
    // As the lane does before it moves to other memory.
    queue.publish();
    queue.set_ram(&b).unwrap();
    queue.publish();
    let mut used = [0; 12];
    a.read(GuestAddress(0x2000), &mut used).unwrap();
    assert_eq!(used[2..4], [1, 0]);
    assert_eq!(used[8], 5, "idx is published, the entry is in the old memory");
}

#[test]
fn an_interrupt_that_went_to_the_old_file_of_a_disabled_ring_is_repeated() {
    #[derive(Default)]
    struct Bell(AtomicUsize);
    impl Interrupt for Bell {
        fn signal(&self) {
            self.0.fetch_add(1, SeqCst);
        }
    }
    let (mut r, held) = holding_rig();
    let (old, new) = (Arc::new(Bell::default()), Arc::new(Bell::default()));
    r.up(vec![Some(old.clone())]);
    let buf = r.ram.writable(8);
    r.rings[0].add(&[buf]);
    r.engine.kick(0);
    r.step();
    let t = r.engine.enable(0, false);
    r.done(t).unwrap();
    held.lock().unwrap().clear();
    r.step();
    assert_eq!(old.0.load(SeqCst), 1, "completed while disabled");
    let t = r.engine.set_call(0, Some(new.clone()));
    r.done(t).unwrap();
    let t = r.engine.enable(0, true);
    r.done(t).unwrap();
    r.step();
    assert!(new.0.load(SeqCst) > 0, "the old file was not listened to any more");
}

/// Where a [`Bomb`] goes off, and whether it panics or says that it failed, which not all methods can.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Fuse(&'static str, bool);

/// A device whose methods fail, one at a time: two lanes, of which only the first one does.
struct Bomb(Arc<Mutex<Fuse>>, Mails, Option<std::fs::File>);

struct Charge {
    fuse: Arc<Mutex<Fuse>>,
    file: Option<std::fs::File>,
    asks: bool,
}

fn goes_off(fuse: &Mutex<Fuse>, place: &str) -> Result<(), DeviceError> {
    // The lock is not held when it panics.
    let fuse = *fuse.lock().unwrap();
    match fuse {
        Fuse(here, true) if here == place => panic!("in {place}"),
        Fuse(here, false) if here == place => Err(DeviceError::new("told to fail")),
        _ => Ok(()),
    }
}

impl VirtioDevice for Bomb {
    type Worker = Charge;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn check_features(&self, _: Features) -> bool {
        goes_off(&self.0, "check_features").is_ok()
    }
    fn write_config(&mut self, _: u32, _: &[u8], _: ConfigWriter) {
        goes_off(&self.0, "write_config").unwrap();
    }
    fn config(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::new(vec![0; 4]))
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "a", max_size: 64, lane: 0 }, QueueSpec { name: "b", max_size: 64, lane: 1 }]
    }
    fn workers(&mut self, mail: &[Mail<()>]) -> Result<Vec<Charge>, DeviceError> {
        *self.1.lock().unwrap() = mail.to_vec();
        let first = Charge { fuse: self.0.clone(), file: self.2.take(), asks: true };
        let dud = Arc::new(Mutex::new(Fuse("", true)));
        Ok(vec![first, Charge { fuse: dud, file: None, asks: false }])
    }
}

impl Worker for Charge {
    type Msg = ();
    fn attached(&mut self, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        if let Some(file) = &self.file {
            lane.reactor.watch(file.as_fd(), Token::new(0), Interest::READ)?;
        }
        goes_off(&self.fuse, "attached")
    }
    fn activated(&mut self, _: &Session, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        lane.reactor.set_timer(Token::new(1), Instant::now());
        if self.asks {
            lane.up.look_up([0; 16]).unwrap();
        }
        goes_off(&self.fuse, "activated")
    }
    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        goes_off(&self.fuse, "queue_ready")?;
        let Some(queue) = lane.queues.get(queue) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            queue.add_used(chain, 0);
        }
        Ok(())
    }
    fn queue_stop(&mut self, _: u16, _: Stop, _: &mut Lane<'_>) {
        goes_off(&self.fuse, "queue_stop").unwrap();
    }
    fn suspend(&mut self, _: &mut Lane<'_>) {
        goes_off(&self.fuse, "suspend").unwrap();
    }
    fn keeps(&self, _: u16) -> usize {
        goes_off(&self.fuse, "keeps").map_or(0, |()| 0)
    }
    fn source_ready(&mut self, _: Token, _: Readiness, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        lane.reactor.unwatch(Token::new(0));
        goes_off(&self.fuse, "source_ready")
    }
    fn timer(&mut self, _: Token, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        goes_off(&self.fuse, "timer")
    }
    fn message(&mut self, _: (), _: &mut Lane<'_>) -> Result<(), DeviceError> {
        goes_off(&self.fuse, "message")
    }
    fn upcall_done(&mut self, _: UpcallId, _: UpcallResult, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        goes_off(&self.fuse, "upcall_done")
    }
    fn flush(&mut self, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        goes_off(&self.fuse, "flush")
    }
    fn poll(&mut self, _: &mut Lane<'_>) -> bool {
        goes_off(&self.fuse, "poll").is_err()
    }
}

/// Knows no object.
struct NoObjects;
impl UpcallHandler for NoObjects {
    fn request(&self, _: UpcallRequest, responder: Responder) {
        responder.respond(Err(UpcallError::Refused));
    }
    fn reset(&self) {}
}

/// All that happens to a device, with a method that fails on the way. The lane's own thread is this test's.
fn life_with(fuse: Fuse) {
    let here = Arc::new(Mutex::new(fuse));
    let mails = Mails::default();
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    std::io::Write::write_all(&mut &theirs, b"x").unwrap();
    let file = std::fs::File::from(std::os::fd::OwnedFd::from(ours));
    let mut options = EngineOptions::new(Arc::new(Ear));
    options.spin = SpinPolicy { limit: Duration::from_micros(50) };
    options.upcalls = Some(Arc::new(NoObjects));
    let (engine, mut lanes) = Engine::new(Bomb(here.clone(), mails.clone(), Some(file)), options).unwrap();
    let ram = TestRam::new(&[(0, 0x10_0000)]);
    let features = RingLayout::Split.features();
    let mut rings = [8, 8].map(|size| RingDriver::new(&ram, RingLayout::Split, size, features));
    let mut turns = |count| {
        for _ in 0..count {
            // The second lane only when it has something to do: nothing wakes it else.
            lanes[0].turn(Some(Duration::from_millis(1)));
            lanes[1].turn(Some(Duration::ZERO));
        }
    };
    let bring_up = |rings: &[RingDriver; 2], turns: &mut dyn FnMut(usize)| {
        drop(engine.memory(ram.ram(), WaitFor::NewRequests));
        engine.set_driver_features(features).unwrap();
        drop(engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK));
        for (queue, ring) in (0..).zip(rings) {
            let (config, kick) = (ring.queue_config(), Kick::Manual);
            let start = QueueStart { config, state: None, inflight: None, kick, call: None };
            drop((engine.start(queue, start), engine.enable(queue, true)));
        }
        drop(engine.set_status(Status::DRIVER_OK));
        turns(3);
    };
    let works = |queue: u16, ring: &mut RingDriver, turns: &mut dyn FnMut(usize)| {
        ring.add(&[ram.writable(8)]);
        engine.kick(queue);
        turns(2);
        ring.used().is_some()
    };
    bring_up(&rings, &mut turns);
    if fuse.0 != "check_features" {
        works(0, &mut rings[0], &mut turns);
        let _ = mails.lock().unwrap()[0].send(());
        turns(3);
        let suspension = engine.suspend();
        turns(3);
        drop((suspension, engine.resume()));
        turns(3);
        drop(engine.stop(0, Stop::Drain, None));
        turns(3);
        engine.write_config(0, &[1], ConfigWriter::Driver).unwrap();
    }
    // Whether a lane spins before it sleeps depends on how long it slept before.
    for _ in 0..1000 {
        if engine.failures().worker_failures.load(SeqCst) > 0 {
            break;
        }
        turns(1);
    }
    assert_eq!(engine.failures().worker_failures.load(SeqCst), 1, "{fuse:?}");
    assert!(engine.status().contains(Status::DEVICE_NEEDS_RESET), "{fuse:?}");
    if fuse.0 != "check_features" {
        assert!(works(1, &mut rings[1], &mut turns), "{fuse:?}: the other lane goes on");
    }
    *here.lock().unwrap() = Fuse("", true);
    let reset = engine.reset();
    turns(4);
    drop(reset);
    assert_eq!(engine.status(), Status::empty(), "{fuse:?}");
    rings.iter_mut().for_each(RingDriver::restart);
    bring_up(&rings, &mut turns);
    assert!(works(0, &mut rings[0], &mut turns) && works(1, &mut rings[1], &mut turns), "{fuse:?}");
}

#[test]
fn policy_5_a_device_may_fail_and_panic_wherever_it_is_called() {
    for place in
        ["attached", "activated", "queue_ready", "source_ready", "timer", "message", "upcall_done", "flush"]
    {
        life_with(Fuse(place, false));
        life_with(Fuse(place, true));
    }
    // These cannot say that they failed.
    for place in ["queue_stop", "suspend", "keeps", "poll", "write_config", "check_features"] {
        life_with(Fuse(place, true));
    }
}

/// A device that always has something to tell itself, and to ask of a host that answers at once.
struct Chatter(Mails);

struct Chatterbox(Mails);

impl VirtioDevice for Chatter {
    type Worker = Chatterbox;
    fn device_type(&self) -> DeviceType {
        DeviceType(42)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "a", max_size: 64, lane: 0 }]
    }
    fn workers(&mut self, mail: &[Mail<()>]) -> Result<Vec<Chatterbox>, DeviceError> {
        *self.0.lock().unwrap() = mail.to_vec();
        Ok(vec![Chatterbox(self.0.clone())])
    }
}

impl Worker for Chatterbox {
    type Msg = ();
    fn activated(&mut self, _: &Session, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = self.0.lock().unwrap()[0].send(());
        lane.up.look_up([0; 16]).map(drop).map_err(DeviceError::new)
    }
    fn message(&mut self, (): (), _: &mut Lane<'_>) -> Result<(), DeviceError> {
        let _ = self.0.lock().unwrap()[0].send(());
        Ok(())
    }
    fn upcall_done(&mut self, _: UpcallId, _: UpcallResult, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        lane.up.look_up([0; 16]).map(drop).map_err(DeviceError::new)
    }
    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(queue) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            queue.add_used(chain, 0);
        }
        Ok(())
    }
}

#[test]
fn policy_8_messages_and_answers_without_end_keep_no_queue_waiting() {
    within("a turn with messages or answers without end", || {
        let mut options = EngineOptions::new(Arc::new(Ear));
        options.upcalls = Some(Arc::new(NoObjects));
        let (engine, mut lanes) = Engine::new(Chatter(Mails::default()), options).unwrap();
        let ram = TestRam::new(&[(0, 0x10_0000)]);
        let features = RingLayout::Split.features();
        let mut ring = RingDriver::new(&ram, RingLayout::Split, 8, features);
        drop(engine.memory(ram.ram(), WaitFor::NewRequests));
        engine.set_driver_features(features).unwrap();
        drop(engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK));
        let (config, kick) = (ring.queue_config(), Kick::Manual);
        drop(engine.start(0, QueueStart { config, state: None, inflight: None, kick, call: None }));
        drop(engine.enable(0, true));
        drop(engine.set_status(Status::DRIVER_OK));
        for _ in 0..3 {
            ring.add(&[ram.writable(8)]);
            engine.kick(0);
            // A turn with a time-out (not zero) is exactly one.
            lanes[0].turn(Some(Duration::from_millis(1)));
            assert!(ring.used().is_some());
        }
    });
}
