//! `vhost-probe`: looks at a vhost-user back-end from outside, whoever wrote it.
//!
//! Everything that a back-end does is a finding, never the end of the probe: each step has a deadline, and nothing that
//! arrives is trusted.
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Parser, Subcommand};

mod bench;
mod check;
mod features;
mod names;
mod table;

/// Looks at a vhost-user back-end: what it offers, whether it keeps the rules, how fast it is.
#[derive(Parser)]
#[command(name = "vhost-probe", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Show what a back-end offers: features, protocol features, queues, memory slots, configuration space
    Features(features::Options),
    /// Check a back-end against the rules of virtio and vhost-user
    ///
    /// Each rule is a line: kept, broken and how, or not applicable and why. Succeeds if none is broken. Every line begins
    /// with a new connection and resets the device: not for one that a virtual machine uses.
    Check(check::Options),
    Bench(Box<bench::Arguments>),
    #[command(hide = true)]
    Floor(bench::FloorArguments),
}

/// Whom to look at, and how to say what was seen.
#[derive(Args)]
struct Target {
    /// The socket that the back-end listens on
    path: PathBuf,

    /// The type of the device, which vhost-user does not tell
    #[arg(long, value_name = "TYPE", value_parser = names::device)]
    device: Option<&'static names::Device>,

    /// How long the back-end may take for one answer
    #[arg(long, value_name = "MS", default_value = "2000", value_parser = milliseconds)]
    timeout: Duration,

    /// Print JSON instead of tables
    #[arg(long)]
    json: bool,
}

fn milliseconds(text: &str) -> Result<Duration, String> {
    match text.parse() {
        Ok(value @ 1..=3_600_000) => Ok(Duration::from_millis(value)),
        _ => Err("a number of milliseconds from 1 to 3600000".to_owned()),
    }
}

fn main() -> ExitCode {
    match Arguments::parse().task {
        Task::Features(options) => features::run(&options),
        Task::Check(options) => check::run(&options),
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Floor(arguments) => bench::serve_floor(&arguments),
    }
}
