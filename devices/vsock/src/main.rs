//! The socket device as a vhost-user daemon: from the command line to devices.
mod guests;

use std::path::PathBuf;
use std::process::ExitCode;

use guests::{Guest, UsageError};
use vhost_device::{CommonArgs, EXIT_USAGE, Identity};
use virtio_vsock::{Exchange, Settings, Vsock};

const IDENTITY: Identity = Identity::new("vhost-device-vsock", "vsock", env!("CARGO_PKG_VERSION"));

/// Connects AF_VSOCK sockets of guests to the host and to each other (virtio socket device) over vhost-user
#[derive(clap::Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    #[command(flatten)]
    guest: Guest,

    /// A guest with everything of its own, as guest-cid=3,socket=/tmp/vhost3.sock,uds-path=/tmp/vm3.vsock[,groups=a+b]
    /// (the names of the options, with - or _); repeat it for several guests
    #[arg(long = "vm", value_name = "KEY=VALUE,...", conflicts_with = "config")]
    vms: Vec<String>,

    /// YAML file with a list `vms:` of guests, each with the keys of --vm
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    #[command(flatten)]
    common: CommonArgs,
}

impl Args {
    /// The settings of each guest; puts their sockets into the common options.
    fn check(&mut self) -> Result<Vec<Settings>, UsageError> {
        let vms = match &self.config {
            Some(path) => guests::read(path)?,
            None => self.vms.iter().map(|text| guests::parse(text)).collect::<Result<_, _>>()?,
        };
        if vms.is_empty() && self.config.is_none() {
            let count = self.common.guest_count();
            let is_numbered = self.common.socket_count.is_some() || count > 1;
            return (0..count).map(|index| self.guest.settings(is_numbered.then_some(index))).collect();
        }
        if self.guest.is_given() {
            return Err(UsageError::Both);
        }
        for vm in &vms {
            self.common.socket_paths.push(vm.socket.clone().ok_or(UsageError::NoSocket)?);
        }
        vms.iter().map(|vm| vm.guest.settings(None)).collect()
    }
}

fn main() -> ExitCode {
    let mut args: Args = vhost_device::parse(&IDENTITY);
    let settings = match args.check() {
        Ok(settings) => settings,
        Err(error) => {
            eprintln!("{}: {error}", IDENTITY.name);
            return ExitCode::from(EXIT_USAGE);
        }
    };
    let exchange = Exchange::new();
    let mut settings = settings.into_iter();
    vhost_device::run(&args.common, IDENTITY, |_guest| {
        let settings =
            settings.next().ok_or_else(|| vm_virtio::DeviceError::new("a guest without settings"))?;
        Vsock::new(settings, &exchange).map_err(vm_virtio::DeviceError::new)
    })
}
