//! Hosts any virtio device as a vhost-user daemon.
//!
//! A device is written against `vm-virtio`; this crate gives it a command line, sockets, the vhost-user protocol and
//! the manners of a daemon. A whole one:
//!
//! ```no_run
//! # use std::process::ExitCode;
//! # use vm_virtio::device::{DeviceError, Lane, QueueSpec, VirtioDevice, Worker};
//! # use vm_virtio::{DeviceType, Features};
//! # struct Null;
//! # impl Worker for Null {
//! #     type Msg = ();
//! #     fn queue_ready(&mut self, _: u16, _: &mut Lane<'_>) -> Result<(), DeviceError> { Ok(()) }
//! # }
//! # impl VirtioDevice for Null {
//! #     type Worker = Null;
//! #     fn device_type(&self) -> DeviceType { DeviceType(42) }
//! #     fn features(&self) -> Features { Features::empty() }
//! #     fn queues(&self, _: Features) -> Vec<QueueSpec> { vec![] }
//! #     fn workers(&mut self, _: &[reactor::Mail<()>]) -> Result<Vec<Null>, DeviceError> { Ok(vec![Null]) }
//! # }
//! use clap::Parser;
//! use vhost_device::{CommonArgs, Identity};
//!
//! const IDENTITY: Identity = Identity::new("vhost-device-null", "null", env!("CARGO_PKG_VERSION"));
//!
//! #[derive(Parser)]
//! #[command(name = IDENTITY.name, version)]
//! struct Args {
//!     #[command(flatten)]
//!     common: CommonArgs,
//! }
//!
//! fn main() -> ExitCode {
//!     let args: Args = vhost_device::parse(&IDENTITY);
//!     vhost_device::run(&args.common, IDENTITY, |_guest| Ok(Null))
//! }
//! ```
//!
//! # What a daemon does
//!
//! * Each guest has a socket, a device and a thread per lane of the device; guests share nothing but the process. With
//!   `--threads` they share a pool of threads: for many guests that are mostly idle.
//! * The socket is there from before readiness is announced (`NOTIFY_SOCKET`, `--ready-fd`) until the end, over any
//!   number of front-ends. One at a time: a second one is turned away after a moment.
//! * A device keeps its state when its front-end goes, and loses it with RESET_DEVICE, SET_STATUS(0), or when a driver
//!   begins from scratch.
//! * SIGTERM and SIGINT: requests that were taken are finished, sockets are removed. That takes at most 3 seconds, or up
//!   to 5 more if a front-end has just asked for the same. A second signal ends at once.
//! * A front-end's mistakes end its own connection at most.
//!
//! # Exit codes
//!
//! | code | meaning |
//! |---|---|
//! | 0 | ended by SIGTERM or SIGINT, by the end of all connections that were passed with `--fd`, or had only to print something |
//! | 1 | failed while it ran: a device could not be made, a socket is in use, requests were given up by a second signal |
//! | 2 | the command line makes no sense |
//!
//! # Where what is
//!
//! | module | what for |
//! |---|---|
//! | [`cli`] | the common command line and its checks |
//! | [`inherit`], [`listen`] | inherited sockets and others |
//! | `daemon`, `task` | threads, main loop, signals |
//! | `guest` | a device and the front-ends that come and go |
//! | `session` | one connection: messages to calls of the engine |
//! | `ring`, `memory`, `mapping` | what a front-end said about rings and memory |
//! | [`control`] | the control socket: status, counters, commands |
//! | `inband` | interrupts as messages |
//! | [`logging`], `notify`, `capabilities` | what the outside gets to see |
use std::error::Error;
use std::io::Write;
use std::process::ExitCode;
use std::rc::Rc;

use listen::ListenError;
use logging::Logging;
use vm_virtio::device::{DeviceError, VirtioDevice};

mod capabilities;
pub mod cli;
pub mod control;
mod daemon;
mod events;
mod guest;
mod inband;
mod inflight;
pub mod inherit;
mod limit;
pub mod listen;
pub mod logging;
mod mapping;
mod memory;
mod notify;
mod ring;
mod session;
mod sigbus;
mod signals;
mod task;
mod upcalls;

pub use cli::{CommonArgs, UsageError};
pub use daemon::{Daemon, DaemonError, DaemonOptions, GuestIndex, Stopper};
pub use limit::LimitArgs;
pub use listen::Endpoint;
pub use memory::MEMORY_SLOTS;

/// Exit code of a daemon that failed while it ran.
pub const EXIT_FAILURE: u8 = 1;
/// Exit code of a daemon whose command line makes no sense; clap uses the same.
pub const EXIT_USAGE: u8 = 2;

/// Who a daemon is.
#[derive(Clone, Copy, Debug)]
pub struct Identity {
    /// Name of the program, e.g. `vhost-device-rng`.
    pub name: &'static str,
    /// The back-end type of `--print-capabilities`: `VHostUserBackendType` of `vhost-user.json`, or a name of our own
    /// for a device that the schema does not know.
    pub kind: &'static str,
    /// Version of the program.
    pub version: &'static str,
    /// Features of `--print-capabilities`, for types for which the schema defines some.
    pub capabilities: &'static [&'static str],
}

impl Identity {
    /// A daemon without features in `--print-capabilities`.
    pub const fn new(name: &'static str, kind: &'static str, version: &'static str) -> Self {
        Identity { name, kind, version, capabilities: &[] }
    }
}

/// Parses the command line, or ends the process: with usage errors (exit code 2), `--help` and `--version`, and
/// `--print-capabilities`, which is obeyed whatever else the command line says ("Backend program conventions").
pub fn parse<A: clap::Parser>(identity: &Identity) -> A {
    if cli::wants_capabilities(std::env::args_os()) {
        std::process::exit(print_capabilities(identity).into());
    }
    A::parse()
}

/// Not with `print!`, which panics if nobody reads.
fn print_capabilities(identity: &Identity) -> u8 {
    let json = capabilities::to_json(identity);
    match std::io::stdout().write_all(json.as_bytes()) {
        Ok(()) => 0,
        Err(_) => EXIT_FAILURE,
    }
}

enum Failure {
    Usage(UsageError),
    Daemon(DaemonError),
}

impl From<UsageError> for Failure {
    fn from(error: UsageError) -> Self {
        Failure::Usage(error)
    }
}

impl From<DaemonError> for Failure {
    fn from(error: DaemonError) -> Self {
        Failure::Daemon(error)
    }
}

/// Runs a daemon: `make` makes the device of each guest. Returns when the daemon was asked to end, with the exit code
/// for `main`.
///
/// Call it once, before anything that uses inherited descriptors or starts threads: `--fd` and socket activation pass
/// descriptors by number, and SIGTERM and SIGINT are blocked from here on in this thread and those that it starts.
pub fn run<D, F>(args: &CommonArgs, identity: Identity, make: F) -> ExitCode
where
    D: VirtioDevice,
    F: FnMut(GuestIndex) -> Result<D, DeviceError>,
{
    if args.print_capabilities {
        return ExitCode::from(print_capabilities(&identity));
    }
    let logging = Rc::new(logging::init(args.log_level));
    let outcome = try_run(args, &identity, &logging, make);
    for line in logging.leftovers() {
        eprintln!("{}: {line}", identity.name);
    }
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure::Usage(error)) => {
            eprintln!("{}: {error}", identity.name);
            // A socket that somebody else listens on is no mistake of the command line.
            let in_use = matches!(
                error,
                UsageError::Path(ListenError::InUse(_)) | UsageError::Control(ListenError::InUse(_))
            );
            ExitCode::from(if in_use { EXIT_FAILURE } else { EXIT_USAGE })
        }
        Err(Failure::Daemon(error)) => {
            eprintln!("{}: {}", identity.name, with_causes(&error));
            ExitCode::from(EXIT_FAILURE)
        }
    }
}

fn try_run<D, F>(
    args: &CommonArgs,
    identity: &Identity,
    logging: &Rc<Logging>,
    make: F,
) -> Result<(), Failure>
where
    D: VirtioDevice,
    F: FnMut(GuestIndex) -> Result<D, DeviceError>,
{
    let environment = cli::Environment::of_process();
    let plan = args.plan(&environment)?;
    listen::raise_descriptor_limit();
    // Before the first thread, which inherits what is blocked.
    let signals = signals::Signals::new().map_err(|error| DaemonError::System("receive signals", error))?;
    let options = DaemonOptions { without: plan.without, spin: plan.spin, threads: plan.threads };
    let mut daemon = Daemon::new(plan.endpoints, options, make)?;
    if let Some(path) = &plan.control_socket {
        let plane = control::Plane::new(*identity, logging.clone());
        daemon.control = Some(control::Server::bind(path, plane).map_err(DaemonError::Listen)?);
    }
    daemon.signals = Some(signals);
    daemon.announcer = notify::Announcer::new(environment.notify_socket.as_deref(), plan.ready_fd);
    tracing::info!(guests = args.guest_count(), "{} {} serves", identity.name, identity.version);
    Ok(daemon.serve()?)
}

/// An error with its causes, as far as its own text does not hold them.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
