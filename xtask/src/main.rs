//! The project's own commands: `cargo xtask demo`, `test`, `lab`, `bench`, `fuzz`.
//!
//! This crate builds and runs things; what a guest is and how one is started is in the `backplane-tests` crate.

use std::process::ExitCode;

use backplane_tests::interrupt;
use clap::{Parser, Subcommand};

mod bench;
mod command;
mod demo;
mod error;
mod fuzz;
mod lab;
mod progress;
mod tally;
mod test;
mod workspace;

use error::Result;

/// Backplane's own commands.
///
/// Start with `cargo xtask demo`: it boots a Linux guest whose devices are served by our daemons.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Boot a Linux guest that uses our devices, and show how it went
    ///
    /// Gets the guest lab first if it is not there (see `lab`), and builds the daemons. Succeeds if the disk gave back what was
    /// written, console and socket carried the same to the host, and at most 5 of 1000 blocks of random bits look odd to rngtest.
    Demo,
    /// Build everything and run all tests, those in a guest too
    ///
    /// Ends with a summary and the line "N passed, N failed, N skipped".
    Test {
        /// Only tests whose name contains this
        filter: Option<String>,
        /// Fail if a test is skipped that is not listed in tests/allowed-skips.txt (so does CI=true)
        #[arg(long)]
        deny_skips: bool,
        /// Leave out the tests that boot a guest
        #[arg(long)]
        no_guest: bool,
    },
    /// Measure our speed beside that of others; without a name, list what there is to measure
    Bench {
        /// What to measure
        #[arg(value_parser = bench::NAMES.map(|(name, _)| name))]
        name: Option<String>,
        /// Arguments for the benchmark itself
        #[arg(last = true)]
        arguments: Vec<String>,
    },
    /// Look for bytes that break a promise, with a fuzzer
    ///
    /// Installs cargo-fuzz if it is not there. Uses a nightly compiler if there is one. What it finds goes below the
    /// target folder (fuzz/found); a plain `cargo test` replays the inputs in fuzz/corpus.
    Fuzz {
        /// Only this target; without it all, one after the other
        target: Option<String>,
        /// How long for each target
        #[arg(long, value_name = "N", default_value_t = 60)]
        seconds: u64,
    },
    /// Get what guest tests need: QEMU, a guest kernel, the guest's tools
    ///
    /// Everything is kept in a folder outside the source tree ($XDG_CACHE_HOME/backplane/lab, usually below
    /// ~/.cache; BACKPLANE_LAB names another). The first time takes 10 to 20 minutes, most of it to compile a kernel, and
    /// 5 GB of disk space for that while. Nothing of it is installed on this machine; compilers that are missing
    /// are, and it says which.
    Lab {
        /// Do not use the network: fail with a list of what is missing
        #[arg(long)]
        offline: bool,
        /// Debian mirror to fetch from, instead of the one that this machine's apt uses
        #[arg(long, value_name = "URL", value_parser = mirror, conflicts_with = "offline")]
        debian_mirror: Option<String>,
        /// Make everything again, also what is there
        #[arg(long, conflicts_with = "offline")]
        fresh: bool,
        /// Only print the lab's folder
        #[arg(long, exclusive = true)]
        path: bool,
    },
}

/// An address that apt can be given.
fn mirror(text: &str) -> std::result::Result<String, String> {
    let scheme = ["http://", "https://", "file:/", "mirror+file:/"];
    if scheme.iter().any(|start| text.starts_with(start)) && !text.contains(char::is_whitespace) {
        return Ok(text.trim_end_matches('/').to_owned());
    }
    Err("not an address of a mirror; write it as http://HOST/debian".to_owned())
}

fn main() -> ExitCode {
    interrupt::catch();
    match run(Arguments::parse().task) {
        Ok(true) => ExitCode::SUCCESS,
        // What went wrong has been said.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("error: {error}");
            match interrupt::caught() {
                Some(signal) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn run(task: Task) -> Result<bool> {
    match task {
        Task::Demo => demo::run(),
        Task::Test { filter, deny_skips, no_guest } => {
            test::run(&test::Options { filter, deny_skips, no_guest })
        }
        Task::Bench { name: Some(name), arguments } => bench::run(&name, &arguments),
        Task::Bench { name: None, .. } => bench::list(),
        Task::Fuzz { target, seconds } => fuzz::run(target.as_deref(), seconds),
        Task::Lab { path: true, .. } => {
            println!("{}", lab::folder()?.display());
            Ok(true)
        }
        Task::Lab { offline, debian_mirror, fresh, .. } => {
            lab::ensure(&lab::Options { offline, mirror: debian_mirror, fresh }).map(|_| true)
        }
    }
}
