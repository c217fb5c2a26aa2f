//! `vhost-probe`: looks at a vhost-user back-end from outside, whoever wrote it.
//!
//! Everything that a back-end does is a finding, never the end of the probe: each step has a deadline, and nothing that
//! arrives is trusted.
use std::process::ExitCode;

use clap::{Parser, Subcommand};

mod bench;

/// Looks at a vhost-user back-end: what it offers, whether it keeps the rules, how fast it is.
#[derive(Parser)]
#[command(name = "vhost-probe", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    Bench(Box<bench::Arguments>),
    #[command(hide = true)]
    Floor(bench::FloorArguments),
}

fn main() -> ExitCode {
    match Arguments::parse().task {
        Task::Bench(arguments) => bench::run(&arguments),
        Task::Floor(arguments) => bench::serve_floor(&arguments),
    }
}
