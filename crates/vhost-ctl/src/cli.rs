//! The command line.
use std::path::PathBuf;
use std::time::Duration;

use vhost_device::logging::LogLevel;

/// Shows and changes what vhost-device daemons do
#[derive(Debug, clap::Parser)]
#[command(
    name = "vhost-ctl",
    version,
    after_help = "Exit codes: 0, done; 1, refused or failed; 2, the command line or scenario makes no sense, nothing \
                  was changed; 3, a daemon cannot be reached."
)]
pub(crate) struct Args {
    /// Control socket of a daemon (its --control-socket); repeat it for several daemons
    #[arg(short, long = "socket", value_name = "PATH", required = true)]
    pub(crate) sockets: Vec<PathBuf>,

    /// Only guest N of each daemon
    #[arg(short, long, value_name = "N")]
    pub(crate) guest: Option<u32>,

    /// Let set and call change several guests at once
    #[arg(long)]
    pub(crate) all: bool,

    /// How long a daemon may take to answer, in seconds
    #[arg(long, value_name = "S", default_value = "10", value_parser = seconds)]
    pub(crate) timeout: Duration,

    #[command(subcommand)]
    pub(crate) command: Command,
}

/// What to do.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Command {
    /// How daemons and their guests are
    Status {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Counters since the daemon began
    Stats {
        /// As JSON
        #[arg(long, conflicts_with = "prometheus")]
        json: bool,
        /// As Prometheus text, that of all daemons in one
        #[arg(long)]
        prometheus: bool,
    },
    /// Rates of all queues, again and again
    Top {
        /// Time between two tables, in seconds
        #[arg(short, long, value_name = "S", default_value = "1", value_parser = seconds)]
        interval: Duration,
        /// End after N tables
        #[arg(short = 'n', long, value_name = "N")]
        count: Option<u64>,
        /// One table
        #[arg(long, conflicts_with = "count")]
        once: bool,
    },
    /// What can be read, set and called
    List,
    /// The value of a property, or of all
    Get {
        /// Its name
        property: Option<String>,
    },
    /// Change a property
    Set {
        /// Its name
        property: String,
        /// Its new value
        value: String,
    },
    /// Have the device carry out one of its commands
    Call {
        /// Its name
        command: String,
        /// Arguments, as NAME=VALUE
        #[arg(value_name = "NAME=VALUE")]
        arguments: Vec<String>,
    },
    /// Print a property, and again whenever it changes
    Watch {
        /// Its name
        property: String,
        /// Time between two looks, in milliseconds
        #[arg(short, long, value_name = "MS", default_value_t = 1000)]
        interval_ms: u64,
        /// End after N lines
        #[arg(short = 'n', long, value_name = "N")]
        count: Option<u64>,
    },
    /// How much is logged, or log more or less from now on
    LogLevel {
        /// The new level
        level: Option<LogLevel>,
    },
    /// Carry out a file of time-stamped steps; see the README of vhost-ctl
    Run {
        /// The file
        scenario: PathBuf,
        /// Check it only
        #[arg(long)]
        check: bool,
    },
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| format!("{text:?} is not a number of seconds"))?;
    match Duration::try_from_secs_f64(seconds) {
        Ok(time) if !time.is_zero() && seconds <= 86_400.0 => Ok(time),
        _ => Err("give more than 0 and at most 86400 seconds".into()),
    }
}
