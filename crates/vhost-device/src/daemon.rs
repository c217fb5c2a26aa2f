//! The daemon: a device per guest, a thread per lane or a pool of them for all, one main thread for all sockets.
//!
//! Nothing blocks the main thread: what a lane has to do is waited for by the guest's own task. The process ends when
//! it is told to, or when all guests were given connections and those are over.
use std::cell::{Cell, RefCell};
use std::io;
use std::num::NonZeroUsize;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use reactor::{Event, Interest, Reactor, SpinPolicy, Token};
use vm_virtio::device::{DeviceError, VirtioDevice};
use vm_virtio::lane::run_in_pool;
use vm_virtio::{Engine, EngineError, EngineOptions, Features, LaneRunner};

use crate::control;
use crate::events::Events;
use crate::guest::{Guest, Host, Source, Tokens};
use crate::listen::{Endpoint, ListenError, Listener};
use crate::notify::Announcer;
use crate::signals::Signals;
use crate::task::{Task, TaskWaker, Watch};
use crate::upcalls::Upcalls;

/// How long lanes may take to notice that they are to end.
const LANES_END: Duration = Duration::from_secs(1);

// Beyond the tokens of all guests.
const WAKER: Token = Token::host(u32::MAX);
const SIGNALS: Token = Token::host(u32::MAX - 1);
const END: Token = Token::host(u32::MAX - 2);

/// How long guests may take to end: a request of a front-end and the end of its connection have deadlines, but a lane
/// that hangs keeps none (failure policy 7).
const GUESTS_END: Duration = Duration::from_secs(9);

/// Which guest of a daemon: counted from 0, in the order of the sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GuestIndex(pub u32);

/// What the host of a device decides.
#[derive(Clone, Copy, Debug)]
pub struct DaemonOptions {
    /// Features to withhold from guests.
    pub without: Features,
    /// Longest time to poll a queue before its thread sleeps; zero never polls.
    pub spin: Duration,
    /// Threads that carry the lanes of all guests together, without polling; none: each lane has its own.
    pub threads: Option<NonZeroUsize>,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        DaemonOptions { without: Features::empty(), spin: Duration::ZERO, threads: None }
    }
}

/// A daemon that cannot go on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DaemonError {
    /// The device of a guest cannot be made.
    #[error("guest {guest}: {source}")]
    Device {
        /// The guest's number.
        guest: u32,
        /// What the device says.
        source: DeviceError,
    },
    /// The engine refuses the device.
    #[error("guest {guest}: {source}")]
    Engine {
        /// The guest's number.
        guest: u32,
        /// What the engine says.
        source: EngineError,
    },
    /// No socket.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// The system refuses what every daemon needs.
    #[error("cannot {0}: {1}")]
    System(&'static str, #[source] io::Error),
    /// Asked to end twice: requests were given up.
    #[error("asked to end twice, requests that were not finished are given up")]
    Interrupted,
    /// A lane hangs in a device's code, or in a file of its front-end.
    #[error("a guest did not end in time, requests that were not finished are given up")]
    Stuck,
}

/// Ends a daemon from another thread.
#[derive(Clone, Debug)]
pub struct Stopper {
    asked: Arc<AtomicU32>,
    waker: reactor::Waker,
}

impl Stopper {
    /// The first time: requests are finished, connections and sockets closed. The second time: at once.
    pub fn stop(&self) {
        self.asked.fetch_add(1, Ordering::SeqCst);
        self.waker.wake();
    }

    fn asked(&self) -> u32 {
        self.asked.load(Ordering::SeqCst)
    }
}

struct Prepared<D: VirtioDevice> {
    engine: Engine<D>,
    lanes: Vec<LaneRunner<D::Worker>>,
    events: Arc<Events>,
    upcalls: Arc<Upcalls>,
    waker: Arc<TaskWaker>,
    socket: Socket,
    /// Where the socket was made, if it was.
    path: Option<PathBuf>,
}

/// What a guest's front-ends come from.
enum Socket {
    Listener(Listener),
    Connected(UnixStream),
}

impl Socket {
    fn open(endpoint: Endpoint) -> Result<Socket, DaemonError> {
        Ok(match endpoint {
            Endpoint::Path(path) => Socket::Listener(Listener::bind(&path)?),
            Endpoint::Listener(socket) => Socket::Listener(
                Listener::adopt(socket)
                    .map_err(|error| DaemonError::System("use an inherited socket", error))?,
            ),
            Endpoint::Connected(stream) => Socket::Connected(stream),
        })
    }
}

/// Devices with their sockets, ready to be served.
///
/// [`run`](crate::run) is all that most daemons need; this is for those that get their sockets in another way, and for
/// tests.
pub struct Daemon<D: VirtioDevice> {
    threads: Option<NonZeroUsize>,
    guests: Vec<Prepared<D>>,
    stopper: Stopper,
    pub(crate) signals: Option<Signals>,
    pub(crate) announcer: Announcer,
    pub(crate) control: Option<control::Server>,
}

impl<D: VirtioDevice> Daemon<D> {
    /// Makes a device for each endpoint, and then the sockets, so that a device that cannot be made leaves none
    /// behind. They accept connections from here on; who connects before [`Daemon::serve`] waits.
    pub fn new(
        endpoints: Vec<Endpoint>,
        options: DaemonOptions,
        mut make: impl FnMut(GuestIndex) -> Result<D, DeviceError>,
    ) -> Result<Daemon<D>, DaemonError> {
        let pool = options.threads;
        let waker = reactor::Waker::new().map_err(|error| DaemonError::System("make an eventfd", error))?;
        let mut devices = Vec::with_capacity(endpoints.len());
        for guest in (0..).take(endpoints.len()) {
            let device = make(GuestIndex(guest)).map_err(|source| DaemonError::Device { guest, source })?;
            let task = TaskWaker::new(waker.clone());
            let events = Events::new(task.clone());
            let upcalls = Upcalls::new(task.clone());
            let spin = SpinPolicy { limit: options.spin };
            let options = EngineOptions {
                without: options.without,
                // The front-end translates for the IOMMU: IOTLB messages.
                carried: Features::ACCESS_PLATFORM,
                spin,
                upcalls: Some(upcalls.clone()),
                ..EngineOptions::new(events.clone())
            };
            let (engine, lanes) =
                Engine::new(device, options).map_err(|source| DaemonError::Engine { guest, source })?;
            devices.push((engine, lanes, events, upcalls, task));
        }
        let mut guests = Vec::with_capacity(devices.len());
        for ((engine, lanes, events, upcalls, waker), endpoint) in devices.into_iter().zip(endpoints) {
            let path = if let Endpoint::Path(path) = &endpoint { Some(path.clone()) } else { None };
            let socket = Socket::open(endpoint)?;
            guests.push(Prepared { engine, lanes, events, upcalls, waker, socket, path });
        }
        let stopper = Stopper { asked: Arc::default(), waker };
        Ok(Daemon {
            threads: pool,
            guests,
            stopper,
            signals: None,
            announcer: Announcer::default(),
            control: None,
        })
    }

    /// Ends the daemon from elsewhere.
    pub fn stopper(&self) -> Stopper {
        self.stopper.clone()
    }

    /// Serves all guests on this thread and the lanes' own, until the daemon is asked to end.
    ///
    /// # Errors
    ///
    /// [`DaemonError::System`] if threads or watches cannot be had; [`DaemonError::Interrupted`].
    pub fn serve(self) -> Result<(), DaemonError> {
        let Daemon { threads: pool, guests, stopper, signals, mut announcer, mut control } = self;
        let system = |what| move |error| DaemonError::System(what, error);
        let mut reactor = Reactor::new().map_err(system("make a reactor"))?;
        reactor
            .watch(stopper.waker.as_fd(), WAKER, Interest::READ_EDGE)
            .map_err(system("watch an eventfd"))?;
        if let Some(signals) = &signals {
            reactor
                .watch(signals.as_fd(), SIGNALS, Interest::READ_EDGE)
                .map_err(system("watch for signals"))?;
        }
        let host = Rc::new(Host {
            reactor: Rc::new(RefCell::new(reactor)),
            stopping: Cell::new(false),
            guests: guests.len(),
        });
        let mut threads = Vec::new();
        let mut pooled = Vec::new();
        let mut tasks = Vec::with_capacity(guests.len());
        for (index, prepared) in (0..).zip(guests) {
            if pool.is_some() {
                pooled.extend(prepared.lanes);
            } else {
                for lane in prepared.lanes {
                    threads.push(spawn(index, lane).map_err(system("start a thread"))?);
                }
            }
            let source = match prepared.socket {
                Socket::Listener(listener) => {
                    let watch = Watch::new(&host.reactor, Tokens::of(index).listener(), listener.as_fd())
                        .map_err(system("watch a socket"))?;
                    Source::Listener(listener, watch)
                }
                Socket::Connected(stream) => Source::Connected(stream),
            };
            let Prepared { engine, events, upcalls, waker, path, .. } = prepared;
            let guest = Rc::new(Guest::new(index, engine, events, upcalls, host.clone(), path));
            if let Some(control) = &mut control {
                control.plane().add(guest.clone());
            }
            tasks.push(Task::new(waker, guest.serve(source)));
        }
        if let Some(count) = pool {
            threads = run_in_pool(pooled, count).map_err(system("start a thread"))?;
        }
        if let Some(control) = &mut control {
            control
                .start(&host.reactor, stopper.waker.clone())
                .map_err(system("watch the control socket"))?;
        }
        announcer.ready();
        let served = main_loop(&host, &mut tasks, &stopper, signals.as_ref(), &mut announcer, &mut control);
        // Ends connections, removes sockets, and ends the lanes with the engines.
        drop((tasks, control));
        if served.is_ok() {
            join(threads);
        }
        served
    }
}

fn spawn<W: vm_virtio::device::Worker>(guest: u32, lane: LaneRunner<W>) -> io::Result<JoinHandle<()>> {
    let name = format!("guest{guest}-lane{}", lane.index());
    std::thread::Builder::new().name(name).spawn(move || lane.run())
}

/// Waits for the lanes to end, but not for one that hangs in a device's code.
fn join(threads: Vec<JoinHandle<()>>) {
    let deadline = Instant::now() + LANES_END;
    while threads.iter().any(|thread| !thread.is_finished()) {
        if Instant::now() > deadline {
            tracing::error!("a device does not end; its thread is abandoned");
            return;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn main_loop(
    host: &Host,
    tasks: &mut [Task],
    stopper: &Stopper,
    signals: Option<&Signals>,
    announcer: &mut Announcer,
    control: &mut Option<control::Server>,
) -> Result<(), DaemonError> {
    loop {
        if let Some(control) = control {
            control.turn();
        }
        for task in tasks.iter_mut() {
            task.run();
        }
        if tasks.iter().all(Task::is_over) {
            return Ok(());
        }
        if let Err(error) = host.reactor.borrow_mut().wait(None) {
            return Err(DaemonError::System("wait for events", error));
        }
        // Not in the loop's condition: handling an event may use the reactor.
        let next = || host.reactor.borrow_mut().next();
        while let Some(event) = next() {
            match event {
                // Nothing is registered with this one.
                Event::Ready { token: WAKER, .. } | Event::Registered { .. } => {}
                Event::Timer { token: END } => return Err(DaemonError::Stuck),
                Event::Ready { token: SIGNALS, .. } => {
                    while let Some(signal) = signals.and_then(Signals::take) {
                        tracing::info!("ending on {}", signal.name());
                        stopper.asked.fetch_add(1, Ordering::SeqCst);
                    }
                }
                Event::Ready { token, .. } | Event::Timer { token } if control::Server::owns(token) => {
                    control.iter_mut().for_each(|control| control.event(token));
                }
                Event::Ready { token, .. } | Event::Timer { token } => {
                    if let Some(task) = tasks.get(Tokens::guest(token)) {
                        task.waker().mark();
                    }
                }
            }
        }
        match stopper.asked() {
            0 => {}
            1 if host.stopping.replace(true) => {}
            1 => {
                announcer.stopping();
                host.reactor.borrow_mut().set_timer(END, Instant::now() + GUESTS_END);
                tasks.iter().for_each(|task| task.waker().mark());
            }
            _ => return Err(DaemonError::Interrupted),
        }
    }
}
