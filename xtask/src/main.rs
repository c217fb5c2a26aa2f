//! The project's own commands: `cargo xtask demo`, `test`, `lab`, `bench`.
//!
//! This crate builds and runs things; what a guest is and how one is started is in the `backplane-tests` crate.

use std::process::ExitCode;

use backplane_tests::interrupt;
use clap::{Parser, Subcommand};

mod command;
mod error;
mod lab;
mod progress;

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
        #[arg(long, value_name = "URL", conflicts_with = "offline")]
        debian_mirror: Option<String>,
        /// Make everything again, also what is there
        #[arg(long, conflicts_with = "offline")]
        fresh: bool,
        /// Only print the lab's folder
        #[arg(long, exclusive = true)]
        path: bool,
    },
}

fn main() -> ExitCode {
    interrupt::catch();
    match run(Arguments::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            match interrupt::caught() {
                Some(signal) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(1)),
                None => ExitCode::FAILURE,
            }
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Lab { path: true, .. } => {
            println!("{}", lab::folder()?.display());
            Ok(())
        }
        Task::Lab { offline, debian_mirror, fresh, .. } => {
            lab::ensure(&lab::Options { offline, mirror: debian_mirror, fresh }).map(|_| ())
        }
    }
}
