//! `vhost-probe bench`: how fast back-ends are, beside each other and beside floors, in one run.
//!
//! Machines differ and are noisy, so no figure stands alone. For each case (layout, placement, depth, size) all
//! contenders are set up at once and take turns, one short round each; compared are the rounds that ran beside each
//! other. The floors ([`virtio_testkit::load::floor`]) are processes of their own, driven through their sockets like
//! any back-end.
mod contender;
mod plot;
mod report;

use std::fs;
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use virtio_testkit::load::{Entropy, LoadError, LoadOptions, LoadSession, Placement, Round};
use virtio_testkit::{RingLayout, TestRam};
use vm_virtio::Features;

use contender::{Backend, Contender, Spawned};
pub(crate) use contender::{FloorArguments, serve_floor};
use report::{Case, Outcome, Report};

/// Measure how fast back-ends are
///
/// Drives each back-end as a guest's driver does and prints requests a second, latency, CPU time of the back-end's
/// process, kicks and interrupts, beside the least that any back-end could do (the floors: a bare ring walk, and one that
/// makes one system call for each request). Back-ends take turns in short rounds. Only the ratios mean something; those
/// with driver and back-end on the same CPU are the stable ones.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Sockets of entropy devices, each with a name for the table if you like
    #[arg(required_unless_present = "spawn", value_name = "[NAME=]PATH")]
    backends: Vec<Backend>,

    /// A back-end to start anew for each case: {} stands for the path of its socket (or its beginning, if it appends a 0)
    ///
    /// Words are separated by spaces; nothing is quoted. For example: --spawn "ours=vhost-device-rng --socket-path {}"
    #[arg(long, value_name = "NAME=COMMAND")]
    spawn: Vec<Spawned>,

    /// Layouts of the ring
    #[arg(long, value_delimiter = ',', value_name = "LAYOUT", value_parser = layout, default_value = "split,packed")]
    layout: Vec<RingLayout>,

    /// CPUs: driver and back-end on the same one, or on two (cross)
    #[arg(long, value_delimiter = ',', value_name = "PLACE", value_parser = placement, default_value = "same,cross")]
    placement: Vec<Placement>,

    /// Requests in flight
    #[arg(long, value_delimiter = ',', value_name = "N", value_parser = clap::value_parser!(u16).range(1..=32768), default_value = "1,32")]
    depth: Vec<u16>,

    /// Bytes of a request
    #[arg(long, value_delimiter = ',', value_name = "BYTES", value_parser = clap::value_parser!(u32).range(1..=1 << 24), default_value = "64")]
    size: Vec<u32>,

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
    let mut contenders = Vec::new();
    if !arguments.no_floors {
        contenders.extend(Contender::floors());
    }
    contenders.extend(arguments.backends.iter().cloned().map(Contender::Backend));
    contenders.extend(arguments.spawn.iter().cloned().map(Contender::Spawned));
    let to_stdout = arguments.json.as_ref().is_some_and(|path| path.as_os_str() == "-");
    let mut report = Report::new(contenders.iter().map(Contender::name).collect());
    for case in cases(arguments) {
        let outcomes = measure(&case, arguments, &contenders);
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
    let mut cases = Vec::new();
    for placement in &arguments.placement {
        for size in &arguments.size {
            for depth in &arguments.depth {
                for layout in &arguments.layout {
                    cases.push(Case { layout: *layout, placement: *placement, depth: *depth, size: *size });
                }
            }
        }
    }
    cases
}

/// Regions of a guest's memory, and the least size of one.
const REGIONS: usize = 2;
const REGION: u64 = 8 << 20;

/// One case: everybody set up, then turns.
fn measure(case: &Case, arguments: &Arguments, contenders: &[Contender]) -> Vec<Outcome> {
    // A buffer takes up to four times its size with its guard, rounded; they go round the regions.
    let room = (u64::from(case.size) * u64::from(case.depth) * 4).next_power_of_two();
    let rams: Vec<TestRam> = contenders.iter().map(|_| TestRam::spread(REGIONS, REGION.max(room))).collect();
    let options = LoadOptions {
        layout: case.layout,
        depth: case.depth,
        queue_size: arguments.queue_size,
        placement: case.placement,
        without: arguments.without.iter().copied().collect(),
        ..LoadOptions::default()
    };
    let mut processes = Vec::new();
    let mut sessions: Vec<Result<LoadSession<'_, Entropy>, LoadError>> = Vec::new();
    for (contender, ram) in contenders.iter().zip(&rams) {
        let session = contender.target(&mut processes).and_then(|target| {
            let mut session = LoadSession::open(target, ram, options, Entropy::new(case.size))?;
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
    let results = sessions.into_iter().zip(rounds);
    results.map(|(session, rounds)| Outcome::new(session.err(), rounds)).collect()
}
