//! `vhost-ctl`: shows and changes what vhost-device daemons do, over their control sockets.
//!
//! | module | what for |
//! |---|---|
//! | `cli` | the command line |
//! | `client` | one control socket |
//! | `daemons` | several of them: which guests are meant |
//! | `status`, `stats`, `top` | what is shown |
//! | `change` | properties, commands, the log's level |
//! | `scenario` | files of steps: parsed and checked, then carried out |
//! | `table` | columns, and numbers for people |
//!
//! # Exit codes
//!
//! | code | meaning |
//! |---|---|
//! | 0 | done |
//! | 1 | a daemon or device refused or failed, an expectation was not met |
//! | 2 | the command line or a scenario makes no sense; nothing was changed |
//! | 3 | a daemon cannot be reached, or hung up |
mod change;
mod cli;
mod client;
mod daemons;
mod scenario;
mod stats;
mod status;
mod table;
mod top;

use std::io::Write;
use std::process::ExitCode;

use clap::Parser;

use cli::{Args, Command};
use daemons::Daemons;

/// Why a command did not do what it should.
#[derive(Debug, thiserror::Error)]
enum Failure {
    /// Exit code 1.
    #[error("{0}")]
    Refused(String),
    /// Exit code 2.
    #[error("{0}")]
    Usage(String),
    /// Exit code 3.
    #[error("{0}")]
    Unreachable(String),
    /// Nobody reads what is written: in order, as for any filter.
    #[error("nobody reads the output")]
    Output(#[from] std::io::Error),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Failure::Refused(_) => 1,
            Failure::Usage(_) => 2,
            Failure::Unreachable(_) => 3,
            Failure::Output(error) if error.kind() == std::io::ErrorKind::BrokenPipe => 0,
            Failure::Output(_) => 1,
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    // Not with `print!`, which panics if nobody reads.
    let mut out = std::io::stdout().lock();
    match run(&args, &mut out) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if failure.code() != 0 {
                let _ = writeln!(std::io::stderr(), "vhost-ctl: {failure}");
            }
            ExitCode::from(failure.code())
        }
    }
}

fn run(args: &Args, out: &mut dyn Write) -> Result<(), Failure> {
    if let Command::Run { scenario, check } = &args.command {
        return scenario::run(args, scenario, *check, out);
    }
    let mut daemons = Daemons::connect(args)?;
    match &args.command {
        Command::Status { json } => status::show(&mut daemons, *json, out),
        Command::Stats { json, prometheus } => stats::show(&mut daemons, *json, *prometheus, out),
        Command::Top { interval, count, once } => {
            top::show(&mut daemons, *interval, if *once { Some(1) } else { *count }, out)
        }
        Command::List => change::list(&mut daemons, out),
        Command::Get { property } => change::get(&mut daemons, property.as_deref(), out),
        Command::Set { property, value } => change::set(&mut daemons, property, value, out),
        Command::Call { command, arguments } => change::call(&mut daemons, command, arguments, out),
        Command::Watch { property, interval_ms, count } => {
            change::watch(&mut daemons, property, *interval_ms, *count, out)
        }
        Command::LogLevel { level } => change::log_level(&mut daemons, *level, out),
        Command::Run { .. } => Ok(()),
    }
}
