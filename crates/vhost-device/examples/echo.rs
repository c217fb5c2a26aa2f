//! A whole daemon: a device that gives back what it is sent. The tests of the process (signals, exit codes, inherited
//! descriptors) run it; it is also the smallest example of a `main`.
use std::process::ExitCode;

use clap::Parser;
use vhost_device::{CommonArgs, Identity};

#[path = "../tests/support/echo.rs"]
mod echo;

const IDENTITY: Identity = Identity::new("vhost-device-echo", "echo", env!("CARGO_PKG_VERSION"));

/// vhost-user device that gives back what it is sent
#[derive(Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,

    /// Bytes of configuration space
    #[arg(long, default_value_t = 8)]
    config_size: usize,
}

fn main() -> ExitCode {
    let args: Args = vhost_device::parse(&IDENTITY);
    vhost_device::run(&args.common, IDENTITY, |_guest| Ok(echo::Echo::new(args.config_size)))
}
