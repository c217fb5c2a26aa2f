//! A VMM in small around a proxied device - engine, a thread for its lane, rings in memory, eventfds - and back-ends for it:
//! daemons in processes of their own, and doubles that do what no back-end should.
#![allow(dead_code, unreachable_pub, reason = "each test binary uses what it needs")]
pub mod double;

use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost_proxy::{ConfigSource, Proxy, ProxyOptions, ProxyStats};
use virtio_testkit::daemon::TempDir;
use virtio_testkit::{Buf, RingDriver, RingLayout, TestRam, Used};
use vm_virtio::{
    Call, DeviceType, Engine, EngineOptions, EventFd, Features, HostEvent, HostEvents, Interrupt, Kick,
    QueueStart, QueueState, Status, Stop, StopError, WaitFor,
};

/// Longer than anything takes.
pub const SOON: Duration = Duration::from_secs(30);

/// The back-end of this crate's example, on a socket that outlives it.
pub struct Backend {
    directory: Arc<TempDir>,
    args: Vec<String>,
    child: Option<Child>,
}

impl Backend {
    pub fn start(args: &[&str]) -> Backend {
        let directory = Arc::new(TempDir::new());
        let args = args.iter().map(|arg| (*arg).to_owned()).collect();
        let mut backend = Backend { directory, args, child: None };
        backend.restart();
        backend
    }

    pub fn socket(&self) -> PathBuf {
        self.directory.join("backend.sock")
    }

    /// Starts it (again) and waits for its word that it is ready.
    pub fn restart(&mut self) {
        self.restart_with(&[]);
    }

    pub fn restart_with(&mut self, more: &[&str]) {
        self.kill();
        let mut program = std::env::current_exe().expect("this test");
        program.pop();
        program.pop();
        program.push("examples/backend");
        assert!(program.exists(), "no {program:?}: run `cargo build -p vhost-proxy --examples` first");
        let script = r#"exec "$0" --ready-fd 3 --log-level "${PROXY_TEST_LOG:-error}" "$@" 3>&1 >&2"#;
        let mut command = Command::new("/bin/sh");
        command.args(["-c", script]).arg(program).arg("--socket-path").arg(self.socket());
        command.args(&self.args).args(more).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("the back-end starts");
        let mut word = [0; 7];
        child.stdout.as_mut().expect("a pipe").read_exact(&mut word).expect("it gets ready");
        assert_eq!(&word, b"READY=1");
        self.child = Some(child);
    }

    /// SIGKILL.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().expect("our child");
            child.wait().expect("our child");
        }
    }

    /// SIGSTOP: it is there, and does nothing.
    pub fn freeze(&self) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().expect("it runs"));
        rustix::process::kill_process(pid, rustix::process::Signal::STOP).expect("our child");
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.kill();
    }
}

/// What the host hears.
#[derive(Default)]
pub struct Ear(Mutex<Vec<HostEvent>>);

impl HostEvents for Ear {
    fn event(&self, event: HostEvent) {
        self.0.lock().unwrap().push(event);
    }
}

impl Ear {
    pub fn count(&self, wanted: impl Fn(&HostEvent) -> bool) -> usize {
        self.0.lock().unwrap().iter().filter(|event| wanted(event)).count()
    }

    pub fn reasons(&self) -> Vec<String> {
        let events = self.0.lock().unwrap();
        let reason = |event: &HostEvent| match event {
            HostEvent::NeedsReset { reason, .. } => Some(reason.clone()),
            _ => None,
        };
        events.iter().filter_map(reason).collect()
    }
}

/// An interrupt that is no file.
#[derive(Default)]
pub struct Bell(pub AtomicUsize);

impl Interrupt for Bell {
    fn signal(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }
}

/// One queue as the guest has it.
pub struct Line {
    pub ring: RingDriver,
    pub kick: OwnedFd,
    pub call: OwnedFd,
    pub bell: Arc<Bell>,
    pub interrupts: u64,
}

/// The usual options for the echo device of the example.
pub fn echo_options() -> ProxyOptions {
    ProxyOptions { config: ConfigSource::Backend(vec![8]), ..ProxyOptions::new(DeviceType(63)) }
}

pub fn entropy_options() -> ProxyOptions {
    ProxyOptions::new(DeviceType::ENTROPY)
}

/// How a guest is set up.
pub struct Setup {
    pub layout: RingLayout,
    pub ram: TestRam,
    pub size: u16,
    pub start: vm_virtio::RingPos,
    pub without: Features,
    /// Features to take where they are offered, besides the usual ones.
    pub with: Features,
    /// Kicks and interrupts are calls, not files.
    pub bridged: bool,
    pub carried: Features,
}

impl Setup {
    pub fn new(layout: RingLayout) -> Setup {
        Setup {
            layout,
            ram: TestRam::spread(2, 8 << 20),
            size: 64,
            start: vm_virtio::RingPos::START,
            without: Features::empty(),
            with: Features::empty(),
            bridged: false,
            carried: Features::empty(),
        }
    }
}

/// A guest with a proxied device.
pub struct Guest {
    pub engine: Engine<Proxy>,
    lane: Option<JoinHandle<()>>,
    pub ram: TestRam,
    pub lines: Vec<Line>,
    pub ear: Arc<Ear>,
    pub stats: Arc<ProxyStats>,
    pub features: Features,
    bridged: bool,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.engine.shutdown();
        if let Some(lane) = self.lane.take() {
            lane.join().expect("the lane ends");
        }
    }
}

pub fn event_file() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd")
}

pub fn counted(file: &OwnedFd) -> u64 {
    let mut count = [0; 8];
    rustix::io::read(file, &mut count).map_or(0, |_| u64::from_ne_bytes(count))
}

pub fn readable(file: &OwnedFd, patience: Duration) -> bool {
    let timeout = Timespec { tv_sec: patience.as_secs() as i64, tv_nsec: patience.subsec_nanos().into() };
    poll(&mut [PollFd::new(file, PollFlags::IN)], Some(&timeout)).is_ok_and(|ready| ready > 0)
}

impl Guest {
    /// Nothing negotiated yet.
    pub fn new(proxy: Proxy, setup: Setup) -> Guest {
        let ear = Arc::new(Ear::default());
        let mut options = EngineOptions::new(ear.clone());
        options.carried = setup.carried;
        let stats = proxy.stats();
        let (engine, mut lanes) = Engine::new(proxy, options).expect("a device that the engine takes");
        let runner = lanes.pop().expect("one lane");
        assert!(lanes.is_empty(), "one lane");
        let lane = Some(std::thread::spawn(move || runner.run()));
        let own = engine.offered() - Features::NOT_A_DEVICES;
        let wanted = (own | setup.layout.features() | setup.carried | setup.with) - setup.without;
        let features = engine.offered() & wanted;
        assert_eq!(features.contains(Features::RING_PACKED), setup.layout == RingLayout::Packed);
        let line = |_| Line {
            ring: RingDriver::start_at(&setup.ram, setup.layout, setup.size, features, setup.start),
            kick: event_file(),
            call: event_file(),
            bell: Arc::default(),
            interrupts: 0,
        };
        let lines = engine.queues().iter().map(line).collect();
        Guest { engine, lane, ram: setup.ram, lines, ear, stats, features, bridged: setup.bridged }
    }

    /// Everything runs.
    pub fn running(proxy: Proxy, setup: Setup) -> Guest {
        let mut guest = Guest::new(proxy, setup);
        guest.bring_up();
        guest
    }

    pub fn echo(socket: &Path, layout: RingLayout) -> Guest {
        let proxy = Proxy::connect(socket, echo_options()).expect("a back-end");
        Guest::running(proxy, Setup::new(layout))
    }

    pub fn bring_up(&mut self) {
        self.negotiate();
        (0..self.lines.len()).for_each(|queue| self.start(queue, None));
        self.ready();
    }

    pub fn negotiate(&mut self) {
        self.engine.set_status(Status::ACKNOWLEDGE).wait();
        self.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER).wait();
        self.engine.set_driver_features(self.features).expect("features that are offered");
        self.engine.set_status(Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK).wait();
        assert!(self.engine.status().contains(Status::FEATURES_OK));
        self.engine.memory(self.ram.ram(), WaitFor::NewRequests).wait();
    }

    pub fn ready(&mut self) {
        self.engine.set_status(self.engine.status() | Status::DRIVER_OK).wait();
        assert!(self.engine.status().contains(Status::DRIVER_OK));
    }

    pub fn start(&mut self, queue: usize, state: Option<QueueState>) {
        let line = &self.lines[queue];
        let config = line.ring.queue_config();
        let kick = match self.bridged {
            true => Kick::Manual,
            false => Kick::Fd(line.kick.try_clone().expect("a descriptor")),
        };
        let call: Call = match self.bridged {
            true => Some(line.bell.clone()),
            false => Some(Arc::new(
                EventFd::new(line.call.try_clone().expect("a descriptor")).expect("an eventfd"),
            )),
        };
        let start = QueueStart { config, state, inflight: None, kick, call };
        self.engine.start(queue as u16, start).wait().expect("a ring that starts");
        self.engine.enable(queue as u16, true).wait();
    }

    pub fn stop(&mut self, queue: usize) -> Result<QueueState, StopError> {
        self.engine.stop(queue as u16, Stop::Drain, Some(Instant::now() + SOON)).wait()
    }

    pub fn reset(&mut self) {
        self.engine.set_status(Status::empty()).wait();
        assert_eq!(self.engine.status(), Status::empty(), "2.4.1; {:?}", self.ear.reasons());
        self.lines.iter_mut().for_each(|line| line.ring.restart());
    }

    pub fn kick(&mut self, queue: usize) {
        if !self.lines[queue].ring.kick_wanted() {
            return;
        }
        match self.bridged {
            true => self.engine.kick(queue as u16),
            false => drop(rustix::io::write(&self.lines[queue].kick, &1u64.to_ne_bytes())),
        }
    }

    /// Makes a request available: what the device reads, and room for its answer.
    pub fn submit(&mut self, queue: usize, request: &[u8], room: u32) -> (u16, Vec<Buf>) {
        let mut chain = Vec::new();
        if !request.is_empty() {
            chain.push(self.ram.readable(request));
        }
        if room > 0 {
            chain.push(self.ram.writable(room));
        }
        let id = self.lines[queue].ring.add(&chain);
        self.kick(queue);
        (id, chain)
    }

    /// Waits for a used buffer, by interrupts alone: one that does not come is found out.
    pub fn wait_used(&mut self, queue: usize, patience: Duration) -> Option<Used> {
        let deadline = Instant::now() + patience;
        loop {
            let line = &mut self.lines[queue];
            if let Some(used) = line.ring.used() {
                return Some(used);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            if self.bridged {
                let before = line.bell.0.load(Ordering::SeqCst);
                if line.ring.glance().is_some() {
                    continue;
                }
                while line.bell.0.load(Ordering::SeqCst) == before && Instant::now() < deadline {
                    std::thread::sleep(Duration::from_millis(1));
                }
            } else if readable(&line.call, left) {
                line.interrupts += counted(&line.call);
            }
        }
    }

    /// One request and its answer.
    pub fn ask(&mut self, queue: usize, request: &[u8], room: u32) -> Vec<u8> {
        let (id, chain) = self.submit(queue, request, room);
        let used = self.wait_used(queue, SOON);
        let used = used.unwrap_or_else(|| panic!("no answer; {:?}, {:?}", self.ear.reasons(), self.stats));
        assert_eq!(used.id, id);
        let mut answer = self.ram.written(&chain);
        chain.iter().for_each(|buf| self.ram.free(buf.addr));
        answer.truncate(used.len as usize);
        answer
    }

    /// The echo device answers.
    pub fn works(&mut self) {
        for queue in 0..self.lines.len() {
            assert_eq!(self.ask(queue, b"are you there", 64), b"are you there");
        }
    }

    /// A request that the back-end has taken for certain, since it has answered one that came behind, and keeps.
    pub fn held(&mut self, queue: usize, request: &[u8]) -> u16 {
        let (id, _) = self.submit(queue, request, 64);
        self.works_on(queue);
        id
    }

    pub fn works_on(&mut self, queue: usize) {
        assert_eq!(self.ask(queue, b"still there", 64), b"still there");
    }

    pub fn needs_reset(&self) -> bool {
        self.engine.status().contains(Status::DEVICE_NEEDS_RESET)
    }

    /// The status comes first and the host's events behind it, from another thread: who looks at these waits for the last.
    pub fn failure_is_told(&self) -> bool {
        self.needs_reset() && self.ear.count(|event| matches!(event, HostEvent::NeedsReset { .. })) > 0
    }
}

/// Waits for something that comes without a notification.
#[track_caller]
pub fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !holds() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// Whether the file can still be used by `fd`, for tests of what is closed.
pub fn is_open(fd: impl AsFd) -> bool {
    rustix::io::fcntl_getfd(fd).is_ok()
}
