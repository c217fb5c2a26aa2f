//! A back-end for this crate's tests: a daemon of our own, to be killed, restarted, and asked for odd things.
use std::process::ExitCode;

use clap::Parser;
use vhost_device::{CommonArgs, Identity};
use virtio_rng::{Entropy, Rng};

#[path = "../../../crates/vhost-device/tests/support/echo.rs"]
mod echo;

const IDENTITY: Identity = Identity::new("vhost-device-backend", "backend", env!("CARGO_PKG_VERSION"));

/// vhost-user device for tests: gives back what it is sent
#[derive(Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// The entropy device instead
    #[arg(long)]
    entropy: bool,

    /// Its seed
    #[arg(long, default_value_t = 7)]
    seed: u64,

    /// Number of queues
    #[arg(long, default_value_t = 1)]
    queues: u16,

    /// Bytes of configuration space
    #[arg(long, default_value_t = 8)]
    config_size: usize,
}

fn main() -> ExitCode {
    let args: Args = vhost_device::parse(&IDENTITY);
    if args.entropy {
        return vhost_device::run(&args.common, IDENTITY, |guest| {
            Ok(Rng::new(&Entropy::insecure_seeded(args.seed), guest.0, None)?)
        });
    }
    vhost_device::run(&args.common, IDENTITY, |_guest| {
        Ok(echo::Echo::new(args.config_size).queues(args.queues, args.queues).savable())
    })
}
