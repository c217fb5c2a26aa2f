//! `vhost-probe bench`: how fast back-ends are, beside each other and beside floors, in one run.
//!
//! Machines differ and are noisy, so no figure stands alone. For each case (load, layout, placement, queues, depth, size) all
//! contenders are set up at once and take turns, one short round each; compared are the rounds that ran beside each
//! other. The floors ([`virtio_testkit::load::floor`]) are processes of their own, driven through their sockets like
//! any back-end. What is particular to a type of device is in [`device`].
mod contender;
mod device;
mod plot;
mod report;

use std::any::Any;
use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use virtio_testkit::load::{LoadError, LoadOptions, LoadSession, Placement, Requests, Round};
use virtio_testkit::{RingLayout, TestRam};
use vm_virtio::Features;

use contender::{Backend, Contender, Spawned};
pub(crate) use contender::{FloorArguments, serve_floor};
use device::Device;
use report::{Case, Outcome, Report};

/// Measure how fast back-ends are
///
/// Drives each back-end as a guest's driver does and prints requests a second, latency, CPU time of the back-end's
/// process, kicks and interrupts, beside the least that any back-end could do (the floors: a bare ring walk, and one that
/// makes one system call for each request). Back-ends take turns in short rounds. Only the ratios mean something; those
/// with driver and back-end on the same CPU are the stable ones. What is read from disks that this program made is looked at,
/// and what was written to them has to be there at the end.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Sockets of back-ends, each with a name for the table if you like
    #[arg(required_unless_present = "spawn", value_name = "[NAME=]PATH")]
    backends: Vec<Backend>,

    /// A back-end to start anew for each case: {} stands for the path of its socket (or its beginning, if it appends a 0)
    ///
    /// For block devices {disk} stands for the path of an image that is made for it, {queues} for the number of queues. For consoles {backend}
    /// stands for where output goes, as our daemon's --port has it, {tcp} for a TCP port.
    /// Words are separated by spaces; nothing is quoted. For example: --spawn "ours=vhost-device-rng --socket-path {}"
    #[arg(long, value_name = "NAME=COMMAND")]
    spawn: Vec<Spawned>,

    /// Type of the devices
    #[arg(long, value_name = "TYPE", value_parser = device::by_name, default_value = "rng")]
    device: &'static dyn Device,

    /// Kinds of load; for blk: randread, randwrite, read, write; for console, by where its output goes: file (the null
    /// device), shm and disk (files in memory and in --disk-dir), unix, tcp
    #[arg(long, value_delimiter = ',', value_name = "KIND")]
    load: Vec<String>,

    /// Queues that are loaded at the same time, by one thread
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=16), default_value = "1")]
    queues: Vec<u16>,

    /// Layouts of the ring
    #[arg(long, value_delimiter = ',', value_name = "LAYOUT", value_parser = layout, default_value = "split,packed")]
    layout: Vec<RingLayout>,

    /// CPUs: driver and back-end on the same one, or on two (cross)
    #[arg(long, value_delimiter = ',', value_name = "PLACE", value_parser = placement, default_value = "same,cross")]
    placement: Vec<Placement>,

    /// Requests in flight in each queue
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=32768), default_value = "1,32")]
    depth: Vec<u16>,

    /// Bytes of a request [default: 64 for rng and console, 4096 for blk]
    #[arg(long, value_delimiter = ',', value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1 << 24))]
    size: Vec<u32>,

    /// Where images for {disk} are made [default: the folder for temporary files]
    #[arg(long, value_name = "FOLDER")]
    disk_dir: Option<PathBuf>,

    /// Their size in MiB
    #[arg(long, value_name = "MIB", value_parser = clap::value_parser!(u32).range(1..=1 << 20), default_value = "256")]
    disk_mib: u32,

    /// Write to disks that are not made for that, too: what is on them is lost
    #[arg(long)]
    overwrite: bool,

    /// Microseconds that the floors look at their rings before they sleep
    #[arg(long, value_name = "US", default_value = "0")]
    floor_poll_us: u64,

    /// Entries of the ring, a power of two
    #[arg(long, value_name = "N", value_parser = queue_size, default_value = "256")]
    queue_size: u16,

    /// Rounds of each back-end
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..), default_value = "6")]
    rounds: u32,

    /// Length of a round in milliseconds
    #[arg(long, value_name = "MS", value_parser = clap::value_parser!(u64).range(1..=60_000), default_value = "200")]
    round_ms: u64,

    /// Features that the driver does not take: event-idx, indirect
    #[arg(long, value_delimiter = ',', value_name = "FEATURE", value_parser = feature)]
    without: Vec<Features>,

    /// Leave the floors out
    #[arg(long)]
    no_floors: bool,

    /// Write all figures as JSON to this file (- for standard output, in place of the table)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,

    /// Draw the figures into this SVG file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

fn layout(text: &str) -> Result<RingLayout, String> {
    match text {
        "split" => Ok(RingLayout::Split),
        "packed" => Ok(RingLayout::Packed),
        _ => Err("layouts are split and packed".to_owned()),
    }
}

fn placement(text: &str) -> Result<Placement, String> {
    match text {
        "same" => Ok(Placement::Same),
        "cross" => Ok(Placement::Cross),
        _ => Err("placements are same and cross".to_owned()),
    }
}

fn feature(text: &str) -> Result<Features, String> {
    match text {
        "event-idx" => Ok(Features::EVENT_IDX),
        "indirect" => Ok(Features::INDIRECT_DESC),
        _ => Err("features that can be left out are event-idx and indirect".to_owned()),
    }
}

fn queue_size(text: &str) -> Result<u16, String> {
    let size = text.parse::<u16>().ok().filter(|size| size.is_power_of_two() && *size <= 32768);
    size.ok_or_else(|| "a ring has a power of two of entries, 1 to 32768".to_owned())
}

/// Runs all cases. Success if every back-end stood them all.
pub(crate) fn run(arguments: &Arguments) -> ExitCode {
    let kinds = arguments.device.kinds();
    if let Some(kind) = arguments.load.iter().find(|kind| !kinds.contains(&kind.as_str())) {
        eprintln!("vhost-probe: {kind} is no load for {}: {}", arguments.device.name(), kinds.join(", "));
        return ExitCode::from(2);
    }
    let mut contenders = Vec::new();
    let floors = arguments.device.floors(arguments);
    if !arguments.no_floors {
        contenders.extend(floors.iter().copied().map(Contender::Floor));
    }
    contenders.extend(arguments.backends.iter().cloned().map(Contender::Backend));
    contenders.extend(arguments.spawn.iter().cloned().map(Contender::Spawned));
    let to_stdout = arguments.json.as_ref().is_some_and(|path| path.as_os_str() == "-");
    let names = contenders.iter().map(Contender::name).collect();
    let mut report = Report::new(names, floors.last().copied().unwrap_or_default());
    let mut shelf = arguments.device.shelf();
    for case in cases(arguments) {
        let outcomes = measure(&case, arguments, &contenders, &mut *shelf);
        report.add(case, outcomes);
        if !to_stdout && let Err(error) = io::stdout().write_all(report.last_table().as_bytes()) {
            return failed("standard output", &error);
        }
    }
    if let Some(path) = &arguments.json {
        let text = report.json();
        let written = if to_stdout { io::stdout().write_all(text.as_bytes()) } else { fs::write(path, text) };
        if let Err(error) = written {
            return failed(&path.display().to_string(), &error);
        }
    }
    if let Some(path) = &arguments.svg
        && let Err(error) = fs::write(path, plot::svg(&report))
    {
        return failed(&path.display().to_string(), &error);
    }
    if report.all_stood() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn failed(what: &str, error: &io::Error) -> ExitCode {
    eprintln!("vhost-probe: cannot write to {what}: {error}");
    ExitCode::FAILURE
}

fn cases(arguments: &Arguments) -> Vec<Case> {
    let device = arguments.device;
    let first = device.kinds().iter().take(if arguments.load.is_empty() { 1 } else { 0 });
    let loads: Vec<&str> = arguments.load.iter().map(String::as_str).chain(first.copied()).collect();
    let sizes = if arguments.size.is_empty() { vec![device.size()] } else { arguments.size.clone() };
    let mut cases = Vec::new();
    for placement in arguments.placement.iter().copied() {
        for kind in &loads {
            for size in sizes.iter().copied() {
                for queues in arguments.queues.iter().copied() {
                    for depth in arguments.depth.iter().copied() {
                        for layout in arguments.layout.iter().copied() {
                            let kind = (*kind).to_owned();
                            cases.push(Case { kind, layout, placement, queues, depth, size });
                        }
                    }
                }
            }
        }
    }
    cases
}

/// Regions of a guest's memory, and the least size of one.
const REGIONS: usize = 2;
const REGION: u64 = 8 << 20;

/// What is measured: everybody's load goes through one type.
type Session<'m> = LoadSession<'m, Box<dyn Requests>>;

/// One case: everybody set up, then turns.
fn measure(
    case: &Case,
    arguments: &Arguments,
    contenders: &[Contender],
    shelf: &mut dyn Any,
) -> Vec<Outcome> {
    // A buffer takes up to four times its size with its guard, rounded; they go round the regions.
    let requests = u64::from(case.depth) * u64::from(case.queues);
    let room = (u64::from(case.size) * requests * 4).next_power_of_two();
    let rams: Vec<TestRam> = contenders.iter().map(|_| TestRam::spread(REGIONS, REGION.max(room))).collect();
    let mut processes = Vec::new();
    let mut sessions: Vec<Result<Session<'_>, LoadError>> = Vec::new();
    for (contender, ram) in contenders.iter().zip(&rams) {
        let setting = arguments.device.setting(case, arguments, contender.who(), shelf);
        let session = setting.and_then(|setting| {
            let options = LoadOptions {
                layout: case.layout,
                depth: case.depth,
                queues: setting.queues,
                queue_size: arguments.queue_size,
                placement: case.placement,
                without: arguments.without.iter().copied().collect(),
                ..LoadOptions::default()
            };
            let target = contender.target(case, arguments, &setting, &mut processes)?;
            let mut session = LoadSession::open(target, ram, options, setting.loads)?;
            // Caches, branch predictors and the back-end's first page faults.
            session.round(Duration::from_millis(arguments.round_ms.min(50)))?;
            Ok(session)
        });
        sessions.push(session);
    }
    let mut rounds: Vec<Vec<Round>> = contenders.iter().map(|_| Vec::new()).collect();
    for turn in 0..arguments.rounds as usize {
        for step in 0..sessions.len() {
            // Nobody always runs after the same neighbour's warm or cold caches.
            let at = (turn + step) % sessions.len();
            let (Some(slot), Some(rounds)) = (sessions.get_mut(at), rounds.get_mut(at)) else { continue };
            let Ok(session) = slot else { continue };
            match session.round(Duration::from_millis(arguments.round_ms)) {
                Ok(round) => rounds.push(round),
                Err(error) => *slot = Err(error),
            }
        }
    }
    let outcome = |(session, rounds): (Result<Session<'_>, LoadError>, Vec<Round>)| {
        let ended = session.and_then(|mut session| session.verify().and_then(|()| session.resident_kib()));
        Outcome::new(ended, rounds)
    };
    sessions.into_iter().zip(rounds).map(outcome).collect()
}
