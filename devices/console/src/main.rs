//! The console device as a vhost-user daemon: from the command line to devices.
use std::process::ExitCode;

use vhost_device::{CommonArgs, EXIT_USAGE, GuestIndex, Identity};
use virtio_console::{Console, PortSpec, QUEUE_SIZE, Target};

const IDENTITY: Identity = Identity::new("vhost-device-console", "console", env!("CARGO_PKG_VERSION"));

/// Where a guest's only console is, in rust-vmm's words
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Backend {
    /// This terminal; one guest. Ctrl-A x ends the daemon
    Nested,
    /// A TCP port of this machine for each guest
    Network,
}

/// Gives guests consoles and serial ports (virtio console device) over vhost-user
#[derive(clap::Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    /// A port: backend=stdio|pty|pty:LINK|unix:PATH|tcp:PORT|tcp:HOST:PORT|file:PATH|null, with name=NAME, console=on|off (on for
    /// ports without a name) and buffer=BYTES (65536); repeat it for more, up to 31
    #[arg(long = "port", value_name = "KEY=VALUE,...", conflicts_with_all = ["backend", "tcp_port"])]
    ports: Vec<PortSpec>,

    /// Ports that there can be in all, for those that are added later [default: as many as there are]
    #[arg(long, value_name = "N", default_value_t = 0, hide_default_value = true)]
    max_ports: u32,

    /// One console, instead of --port
    #[arg(short, long, value_enum, default_value_t = Backend::Nested)]
    backend: Backend,

    /// First TCP port of --backend network; each further guest has the next one
    #[arg(short = 'p', long, value_name = "PORT", default_value_t = 12345)]
    tcp_port: u16,

    /// Most entries of a queue, a power of two
    #[arg(short = 'q', long, value_name = "N", default_value_t = QUEUE_SIZE)]
    max_queue_size: u16,

    #[command(flatten)]
    common: CommonArgs,
}

impl Args {
    /// The ports of each guest.
    fn check(&self) -> Result<Vec<Vec<PortSpec>>, String> {
        let ports = match (self.ports.is_empty(), self.backend) {
            (false, _) => self.ports.clone(),
            (true, Backend::Nested) => vec![PortSpec::console(Target::Stdio)],
            (true, Backend::Network) => {
                vec![PortSpec::console(Target::Tcp("127.0.0.1".into(), self.tcp_port))]
            }
        };
        let stdio = ports.iter().filter(|port| port.target == Target::Stdio).count();
        if stdio > 1 {
            return Err("two ports have standard input and output; give them to one of them".into());
        }
        let guests = self.common.guest_count();
        // rust-vmm's daemon counts TCP ports even if the sockets are not counted; the first guest's number is 0.
        let network = self.ports.is_empty() && self.backend == Backend::Network;
        if self.common.socket_count.is_none() && guests == 1 && !network {
            return Ok(vec![ports]);
        }
        if stdio > 0 && guests > 1 {
            return Err(
                "several guests cannot share standard input and output; give each a pty, a socket or a file"
                    .into(),
            );
        }
        let of_guest = |guest| {
            let numbered = |port: &PortSpec| match port.target {
                Target::Stdio => Ok(port.clone()),
                _ => port.of_guest(guest).ok_or_else(|| {
                    format!("guest {guest} has no TCP port left for {}; begin with a lower one", port.target)
                }),
            };
            ports.iter().map(numbered).collect()
        };
        (0..guests).map(of_guest).collect()
    }
}

fn main() -> ExitCode {
    let args: Args = vhost_device::parse(&IDENTITY);
    let ports = match args.check() {
        Ok(ports) => ports,
        Err(error) => {
            eprintln!("{}: {error}", IDENTITY.name);
            return ExitCode::from(EXIT_USAGE);
        }
    };
    vhost_device::run(&args.common, IDENTITY, |GuestIndex(guest)| {
        let ports =
            usize::try_from(guest).ok().and_then(|guest| ports.get(guest)).map_or(&[][..], Vec::as_slice);
        let console =
            Console::new(ports, args.max_ports, args.max_queue_size).map_err(vm_virtio::DeviceError::new)?;
        for (id, place) in console.places() {
            tracing::info!("guest {guest}: port {id} is {place}");
        }
        Ok(console)
    })
}
