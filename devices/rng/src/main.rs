//! The entropy device as a vhost-user daemon: from the command line to devices.
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use vhost_device::{CommonArgs, EXIT_USAGE, Identity, LimitArgs};
use virtio_rng::{Entropy, RateLimit, Rng};

const IDENTITY: Identity = Identity::new("vhost-device-rng", "rng", env!("CARGO_PKG_VERSION"));

/// Gives guests random bytes (virtio entropy device) over vhost-user
#[derive(clap::Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    /// File, character device or named pipe to take bytes from [default: the kernel's generator, as /dev/urandom]
    #[arg(short = 'f', long, visible_alias = "filename", value_name = "PATH")]
    rng_source: Option<PathBuf>,

    /// Period of --max-bytes in milliseconds
    #[arg(short, long, value_name = "MS", default_value_t = 65536)]
    period: u64,

    /// Most bytes in a period, divided evenly among the guests [default: no limit]
    #[arg(short, long, value_name = "BYTES", conflicts_with = "rate_limit")]
    max_bytes: Option<u64>,

    /// INSECURE, for tests: bytes from a generator that gives the same for the same N
    #[arg(long, value_name = "N", conflicts_with = "rng_source")]
    seed: Option<u64>,

    #[command(flatten)]
    limit: LimitArgs,

    #[command(flatten)]
    common: CommonArgs,
}

impl Args {
    /// The source, and the limit for all guests together.
    fn check(&self) -> Result<(Entropy, LimitArgs), Box<dyn std::error::Error>> {
        // The period is checked even if nothing is limited.
        let limit = RateLimit::new(self.max_bytes.unwrap_or(u64::MAX), Duration::from_millis(self.period))?;
        let limit = LimitArgs { rate_limit: self.limit.rate_limit.or(self.max_bytes.map(|_| limit)) };
        limit.check(&self.common)?;
        let entropy = match (self.seed, &self.rng_source) {
            (Some(seed), _) => Entropy::insecure_seeded(seed),
            (None, Some(path)) => Entropy::open(path)?,
            (None, None) => Entropy::kernel()?,
        };
        Ok((entropy, limit))
    }
}

fn main() -> ExitCode {
    let args: Args = vhost_device::parse(&IDENTITY);
    let (entropy, limit) = match args.check() {
        Ok(checked) => checked,
        Err(error) => {
            eprintln!("{}: {error}", IDENTITY.name);
            return ExitCode::from(EXIT_USAGE);
        }
    };
    vhost_device::run(&args.common, IDENTITY, |guest| {
        Ok(Rng::new(&entropy, guest.0, limit.of(guest, &args.common)?)?)
    })
}
