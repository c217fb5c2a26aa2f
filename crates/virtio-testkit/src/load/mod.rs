//! A driver that is fast instead of strict: it measures what a vhost-user back-end costs.
//!
//! [`LoadSession`] sets a back-end up through [`VhostUserDriver`], in QEMU's order, and then takes the rings that are to be
//! loaded over with a driver of its own that makes no more checks than a guest's: one thread keeps `depth` requests in
//! each of them, takes used buffers in batches, kicks when the back-end wants it, and asks for interrupts only before it
//! sleeps. A used entry that names nothing in flight, a wrong answer, a back-end that ends or does not answer are errors,
//! never a hang. What is asked of a device is its own file: [`Requests`].
//!
//! Measured per round: requests and bytes, latency (one reading of the clock for each batch: a request begins when its
//! batch is put into the ring and ends when the driver sees it used), CPU time of the whole back-end process from its
//! threads' `schedstat`, kicks and interrupts. Figures mean something only beside those of a [`floor`] from the same run.
mod console;
mod disk;
pub mod floor;
mod histogram;
mod placement;
mod requests;
mod ring;
pub mod sockets;

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::time::Timespec;
use vhost_user::FrontendEndpoint;
use vm_memory::{GuestMemoryBackend, VolatileSlice};
use vm_virtio::Features;

use crate::{Buf, DriverError, RingLayout, TestRam, VhostUserDriver, VhostUserOptions};

pub use console::{ConsoleOutput, Outlet};
pub use disk::{Access, BlockRequests, Disk};
pub use histogram::Histogram;
pub use placement::{Placement, PlacementError, Process, pin_current_thread};
pub use requests::{Entropy, Requests};

use ring::FastRing;

/// How long a socket may be away.
const LISTENING: Duration = Duration::from_secs(2);

/// How a back-end is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// The layout of the ring.
    pub layout: RingLayout,
    /// Requests in flight in each loaded ring, at least 1.
    pub depth: u16,
    /// Rings that the driver sets up, loaded or not.
    pub queues: u16,
    /// Entries of each ring. A power of two, room for `depth` requests.
    pub queue_size: u16,
    /// Which CPUs driver and back-end run on.
    pub placement: Placement,
    /// Ring features that the driver does not take though they are offered.
    pub without: Features,
    /// How long the back-end may take for an answer.
    pub patience: Duration,
}

impl Default for LoadOptions {
    /// One request at a time in one split ring of 256, on one CPU, with five seconds for each.
    fn default() -> LoadOptions {
        LoadOptions {
            layout: RingLayout::Split,
            depth: 1,
            queues: 1,
            queue_size: 256,
            placement: Placement::Same,
            without: Features::empty(),
            patience: Duration::from_secs(5),
        }
    }
}

/// A load cannot be run, or the back-end did not stand it.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The back-end does not have what was asked for; nothing is wrong with it.
    #[error("{0} is not offered")]
    NotOffered(&'static str),
    /// The protocol, or a rule of virtio at set-up.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// The process cannot be found, pinned or read.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The requests do not fit into the ring.
    #[error("{depth} requests of {each} descriptors do not fit into a ring of {size}")]
    Depth {
        /// Requests in flight.
        depth: u16,
        /// Descriptors of one.
        each: usize,
        /// Entries of the ring.
        size: u16,
    },
    /// The back-end broke a rule while it was loaded.
    #[error("the back-end broke a rule: {0}")]
    Broken(String),
    /// An answer is not what was asked for.
    #[error("wrong answer: {0}")]
    Answer(String),
    /// Nothing came.
    #[error("no answer within {0:?} with {1} requests in flight")]
    Silent(Duration, usize),
    /// The back-end went away.
    #[error("the back-end closed the connection with {0} requests in flight")]
    Gone(usize),
    /// The system.
    #[error("{0}: {1}")]
    System(&'static str, #[source] std::io::Error),
}

fn system(what: &'static str) -> impl Fn(Errno) -> LoadError {
    move |error| LoadError::System(what, error.into())
}

/// What one round of load showed.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// Requests that were answered.
    pub requests: u64,
    /// Bytes that the requests were about.
    pub bytes: u64,
    /// From the first request to the last answer.
    pub elapsed: Duration,
    /// How long each request took.
    pub latency: Histogram,
    /// CPU time of all threads of the back-end's process.
    pub backend_cpu: Duration,
    /// CPU time of the driver's thread. On one CPU, both together are what requests take if nobody else is on it.
    pub driver_cpu: Duration,
    /// Notifications of the driver.
    pub kicks: u64,
    /// Notifications of the back-end.
    pub interrupts: u64,
}

impl Round {
    /// Requests in a second.
    pub fn rate(&self) -> f64 {
        self.requests as f64 / self.elapsed.as_secs_f64().max(f64::MIN_POSITIVE)
    }

    /// A sum, for each request.
    pub fn per_request(&self, sum: f64) -> f64 {
        sum / (self.requests as f64).max(1.0)
    }

    /// Microseconds of CPU time for each request, the driver's and the back-end's.
    pub fn both_us(&self) -> f64 {
        self.per_request((self.backend_cpu + self.driver_cpu).as_secs_f64() * 1e6)
    }

    /// Microseconds of the back-end's CPU time for each request.
    pub fn backend_us(&self) -> f64 {
        self.per_request(self.backend_cpu.as_secs_f64() * 1e6)
    }
}

/// A request in a slot of its own.
struct Slot<'m> {
    chain: Vec<Buf>,
    buffers: Vec<VolatileSlice<'m>>,
    since: Instant,
    busy: bool,
}

/// A ring under load.
struct Load<'m, R> {
    queue: u16,
    requests: R,
    ring: FastRing<'m>,
    slots: Vec<Slot<'m>>,
    in_flight: usize,
}

/// A back-end under load.
pub struct LoadSession<'m, R> {
    driver: VhostUserDriver,
    process: Process,
    options: LoadOptions,
    loads: Vec<Load<'m, R>>,
    /// Watches the call files edge-triggered, so that nobody has to read them, and the socket for its end.
    events: OwnedFd,
    lost: bool,
}

/// The key of the socket among the events; a call file's is that of its load.
const SOCKET: u64 = u64::MAX;

/// How many events are taken at once.
const EVENTS: usize = 8;

/// Where a back-end is.
#[derive(Debug)]
pub enum Target {
    /// It listens there.
    Path(PathBuf),
    /// It holds the other end, and is the process of this number.
    Connected(UnixStream, u32),
}

impl<'m, R: Requests> LoadSession<'m, R> {
    /// Connects, negotiates and starts. `ram` is the guest's memory, for this session alone; `loads` are the numbers of
    /// the rings to load, each with what is asked there.
    ///
    /// # Errors
    /// [`LoadError::NotOffered`] for a layout or a number of rings that the back-end does not have; others for one that
    /// fails.
    pub fn open(
        target: Target,
        ram: &'m TestRam,
        options: LoadOptions,
        mut loads: Vec<(u16, R)>,
    ) -> Result<Self, LoadError> {
        let (mut endpoint, known) = match target {
            Target::Path(path) => (connect(&path)?, None),
            Target::Connected(socket, pid) => (FrontendEndpoint::new(socket), Some(pid)),
        };
        let mut wanted = VhostUserOptions::new(options.layout);
        wanted.ram = ram.clone();
        wanted.queue_size = options.queue_size;
        wanted.queues = Some(u32::from(options.queues));
        wanted.without = options.without;
        endpoint.set_timeout(options.patience);
        let mut driver = VhostUserDriver::attach(endpoint, wanted)?;
        if !driver.features().contains(Features::VERSION_1) {
            return Err(LoadError::NotOffered("VIRTIO_F_VERSION_1"));
        }
        if options.layout == RingLayout::Packed && !driver.features().contains(Features::RING_PACKED) {
            return Err(LoadError::NotOffered("VIRTIO_F_RING_PACKED"));
        }
        if driver.queues() < usize::from(options.queues) {
            return Err(LoadError::NotOffered("that many queues"));
        }
        for (_, requests) in &mut loads {
            requests.negotiated(&mut driver)?;
        }
        driver.start()?;
        let process = Process::behind(driver.endpoint().stream(), known)?;
        let events = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(system("epoll"))?;
        let edge = epoll::EventFlags::IN | epoll::EventFlags::ET;
        for (key, (queue, _)) in (0..).zip(&loads) {
            let (call, key) = (driver.call_fd(usize::from(*queue)), epoll::EventData::new_u64(key));
            epoll::add(&events, call, key, edge).map_err(system("epoll"))?;
        }
        let ends = epoll::EventFlags::RDHUP | epoll::EventFlags::ET;
        let (stream, key) = (driver.endpoint().stream(), epoll::EventData::new_u64(SOCKET));
        epoll::add(&events, stream, key, ends).map_err(system("epoll"))?;
        let loads =
            loads.into_iter().map(|(queue, requests)| Load::new(&mut driver, ram, &options, queue, requests));
        let loads = loads.collect::<Result<_, _>>()?;
        Ok(LoadSession { driver, process, options, loads, events, lost: false })
    }

    /// What was negotiated.
    pub fn features(&self) -> Features {
        self.driver.features()
    }

    /// The back-end's process.
    pub fn pid(&self) -> u32 {
        self.process.id()
    }

    /// Its resident memory in KiB, without the guest's.
    ///
    /// # Errors
    /// It is gone.
    pub fn resident_kib(&self) -> Result<u64, LoadError> {
        Ok(self.process.resident_kib()?)
    }

    /// Looks at what the requests of all rounds should have left behind.
    ///
    /// # Errors
    /// What is missing.
    pub fn verify(&mut self) -> Result<(), LoadError> {
        let mut loads = self.loads.iter_mut();
        loads.try_for_each(|load| load.requests.verify().map_err(LoadError::Answer))
    }

    /// Loads the back-end for `length`, then waits for what is in flight. Pins this thread and the back-end.
    ///
    /// # Errors
    /// The session is of no use after one.
    pub fn round(&mut self, length: Duration) -> Result<Round, LoadError> {
        self.options.placement.apply(&self.process)?;
        let mut round = Round::default();
        self.interrupts();
        let interrupts = self.interrupts();
        let (cpu, own) = (self.process.cpu_time()?, placement::own_cpu_time());
        let start = Instant::now();
        let end = start + length;
        let mut now = start;
        for load in &mut self.loads {
            for slot in 0..load.slots.len() {
                load.submit(slot, now);
            }
            load.kick(&self.driver, &mut round);
        }
        loop {
            let (mut busy, mut more) = (false, false);
            for load in &mut self.loads {
                let mut batch = 0;
                while let Some((slot, written)) = load.ring.next_used().map_err(LoadError::Broken)? {
                    if batch == 0 {
                        now = Instant::now();
                    }
                    batch += 1;
                    load.finish(slot, written, now, &mut round)?;
                    if now < end {
                        load.submit(slot, now);
                    }
                }
                if batch > 0 {
                    load.kick(&self.driver, &mut round);
                }
                busy |= load.in_flight > 0;
                more |= batch > 0 || (load.in_flight > 0 && load.ring.arm());
            }
            if !busy {
                break;
            }
            if !more {
                self.wait()?;
            }
        }
        round.elapsed = now - start;
        round.driver_cpu = placement::own_cpu_time().saturating_sub(own);
        round.backend_cpu = self.process.cpu_time()?.saturating_sub(cpu);
        round.interrupts = self.interrupts() - interrupts;
        Ok(round)
    }

    /// Of all loaded rings so far.
    fn interrupts(&mut self) -> u64 {
        self.loads.iter().map(|load| self.driver.interrupts(usize::from(load.queue))).sum()
    }

    fn in_flight(&self) -> usize {
        self.loads.iter().map(|load| load.in_flight).sum()
    }

    /// Sleeps until the back-end interrupts.
    fn wait(&mut self) -> Result<(), LoadError> {
        if self.lost {
            return Err(LoadError::Gone(self.in_flight()));
        }
        let patience = self.options.patience;
        let limit = Timespec {
            tv_sec: patience.as_secs().min(i32::MAX as u64) as i64,
            tv_nsec: i64::from(patience.subsec_nanos()),
        };
        let mut events =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; EVENTS];
        match epoll::wait(&self.events, &mut events, Some(&limit)) {
            Ok(0) => Err(LoadError::Silent(patience, self.in_flight())),
            Ok(count) => {
                for key in events.iter().take(count).map(|event| event.data.u64()) {
                    match usize::try_from(key).ok().and_then(|at| self.loads.get_mut(at)) {
                        Some(load) => load.ring.woke(),
                        // What was used before the end is still taken.
                        None => self.lost = true,
                    }
                }
                Ok(())
            }
            Err(Errno::INTR) => Ok(()),
            Err(error) => Err(system("epoll")(error)),
        }
    }
}

impl<'m, R: Requests> Load<'m, R> {
    fn new(
        driver: &mut VhostUserDriver,
        ram: &'m TestRam,
        options: &LoadOptions,
        queue: u16,
        mut requests: R,
    ) -> Result<Self, LoadError> {
        let chains: Vec<Vec<Buf>> =
            (0..options.depth.max(1)).map(|slot| requests.chain(usize::from(slot), ram)).collect();
        let features = driver.features();
        let config = driver.ring(usize::from(queue)).queue_config();
        let each = chains.iter().map(|chain| ring::descriptors(chain, features)).max().unwrap_or(1);
        let room = usize::from(options.queue_size) / each.max(1);
        if usize::from(options.depth) > room {
            return Err(LoadError::Depth { depth: options.depth, each, size: options.queue_size });
        }
        let ring = FastRing::new(ram, options.layout, &config, features, &chains);
        let slots = chains
            .into_iter()
            .map(|chain| Slot {
                buffers: chain.iter().map(|buf| area(ram, buf.addr, u64::from(buf.len))).collect(),
                chain,
                since: Instant::now(),
                busy: false,
            })
            .collect();
        Ok(Load { queue, requests, ring, slots, in_flight: 0 })
    }

    fn submit(&mut self, at: usize, now: Instant) {
        let Some(slot) = self.slots.get_mut(at) else { return };
        self.requests.prepare(at, &slot.buffers);
        slot.since = now;
        slot.busy = true;
        self.in_flight += 1;
        self.ring.push(at, &slot.chain);
    }

    fn finish(&mut self, at: usize, written: u32, now: Instant, round: &mut Round) -> Result<(), LoadError> {
        let slot = self.slots.get_mut(at).filter(|slot| slot.busy);
        let slot =
            slot.ok_or_else(|| LoadError::Broken(format!("request {at} was used, but is not in flight")))?;
        slot.busy = false;
        self.in_flight -= 1;
        round.bytes += self.requests.check(at, written, &slot.buffers).map_err(LoadError::Answer)?;
        round.requests += 1;
        round.latency.add(now - slot.since);
        Ok(())
    }

    fn kick(&mut self, driver: &VhostUserDriver, round: &mut Round) {
        self.ring.publish();
        if self.ring.kick_wanted() {
            round.kicks += 1;
            driver.kick_anyway(usize::from(self.queue));
        }
    }
}

/// Some back-ends take their socket away between two front-ends.
fn connect(path: &Path) -> Result<FrontendEndpoint, DriverError> {
    let deadline = Instant::now() + LISTENING;
    loop {
        match FrontendEndpoint::connect(path) {
            Err(_) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(5)),
            result => return Ok(result?),
        }
    }
}

/// A piece of guest memory, for as long as that lives.
fn area(ram: &TestRam, addr: vm_memory::GuestAddress, len: u64) -> VolatileSlice<'_> {
    ram.memory().get_slice(addr, usize::try_from(len).unwrap_or(usize::MAX)).expect("a range in guest memory")
}
