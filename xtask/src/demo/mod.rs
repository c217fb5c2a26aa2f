//! `cargo xtask demo`: a Linux guest whose devices are served by our daemons, shown in a table.

mod table;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use backplane_tests::daemon::Daemon;
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::Lab;
use backplane_tests::scratch::Scratch;
use backplane_tests::virtio::{self, Device};

use crate::command;
use crate::error::{Error, Result};
use crate::lab;
use crate::progress::{Step, clock};
use crate::workspace::Workspace;

const SCRIPT: &str = include_str!("guest.sh");
/// Blocks of 20000 bits that rngtest looks at, and how many of them may look odd: a perfect source fails about one
/// in 1250, so that more than five in a thousand happen once in some hundred thousand demos.
const BLOCKS: u32 = 1000;
const ALLOWED: u32 = 5;
/// Random bytes shown as they are.
const SAMPLE: usize = 16;
/// What is written to the disk, and from there through the console and the socket.
const MIB: usize = 16;
/// What the host still waits for after the guest's end: bytes that are on their way.
const LATE: Duration = Duration::from_secs(10);

/// The devices, in the order of the table.
const PARTS: [Part; 4] = [
    Part { name: "entropy", id: virtio::RNG, daemon: "vhost-device-rng", qemu: "vhost-user-rng-pci" },
    Part {
        name: "disk",
        id: virtio::BLOCK,
        daemon: "vhost-device-block",
        qemu: "vhost-user-blk-pci,packed=on",
    },
    // QEMU has no console by that name; port 0 and one more have three pairs of queues.
    Part {
        name: "console",
        id: 3,
        daemon: "vhost-device-console",
        qemu: "vhost-user-test-device-pci,virtio-id=3,num_vqs=6,vq_size=128,config_size=12",
    },
    Part { name: "socket", id: 19, daemon: "vhost-device-vsock", qemu: "vhost-user-vsock-pci,packed=on" },
];

/// A device of the guest.
struct Part {
    name: &'static str,
    /// The virtio device type.
    id: u32,
    daemon: &'static str,
    /// QEMU's device.
    qemu: &'static str,
}

/// What the host's ends of the devices are.
struct Host {
    scratch: Scratch,
    /// What came through the guest's socket.
    received: Receiver<io::Result<Vec<u8>>>,
}

impl Host {
    fn new() -> io::Result<Self> {
        let scratch = Scratch::new()?;
        File::create(scratch.join("disk"))?.set_len(64 << 20)?;
        let listener = UnixListener::bind(scratch.join("vm_1000"))?;
        let (sender, received) = mpsc::channel();
        // Waits for ever if the guest does not come; nobody waits for it.
        thread::spawn(move || {
            let mut all = Vec::new();
            let read = listener.accept().and_then(|(mut stream, _)| stream.read_to_end(&mut all));
            // Without a receiver the demo is over.
            let _ = sender.send(read.map(|_| all));
        });
        Ok(Self { scratch, received })
    }

    fn arguments(&self, part: &Part) -> Vec<String> {
        let path = |name: &str| self.scratch.join(name).display().to_string();
        match part.name {
            // A queue for each of the two CPUs, which QEMU wants if it is not told otherwise.
            "disk" => vec!["--blk-file".to_owned(), path("disk"), "--num-queues".to_owned(), "2".to_owned()],
            "console" => vec![
                "--port".to_owned(),
                "backend=null".to_owned(),
                "--port".to_owned(),
                format!("name=demo,backend=file:{}", path("port")),
            ],
            "socket" => vec!["--uds-path".to_owned(), path("vm")],
            _ => Vec::new(),
        }
    }

    /// Whether the same bytes came by both ways, all of them.
    fn compare(&self) -> Result<()> {
        let by_console = self.scratch.join("port");
        let by_console = fs::read(&by_console).map_err(|e| Error::file("read", &by_console, &e))?;
        let failed = |why: String| Error::new("the guest's data did not arrive", why);
        let by_socket =
            self.received.recv_timeout(LATE).map_err(|e| failed(format!("by the socket: {e}")))?;
        let by_socket = by_socket.map_err(|e| failed(format!("by the socket: {e}")))?;
        for (way, bytes) in [("console", &by_console), ("socket", &by_socket)] {
            if bytes.len() != MIB << 20 {
                return Err(failed(format!("{} of {} bytes by the {way}", bytes.len(), MIB << 20)));
            }
        }
        if by_console == by_socket { Ok(()) } else { Err(failed("console and socket differ".to_owned())) }
    }
}

/// Runs it; whether the devices did well.
pub(crate) fn run() -> Result<bool> {
    let begun = Instant::now();
    let lab = lab::ensure(&lab::Options::default())?;
    let workspace = Workspace::read()?;
    let programs = workspace.build(&PARTS.map(|part| part.daemon.to_owned()))?;
    let mut step = Step::start("guest", "booting Linux and using its devices");
    let host = Host::new().map_err(|e| failed(Failure::io("set up the host's side")(e)))?;
    let mut daemons = start(&programs, &host)?;
    let outcome = boot(&lab, &daemons, &mut step).map_err(|error| {
        failed(PARTS.iter().zip(&daemons).fold(error, |e, (part, d)| e.with_log(part.daemon, &d.stderr())))
    })?;
    let peaks: Vec<_> = daemons.iter().map(Daemon::peak_kib).collect();
    for (part, daemon) in PARTS.iter().zip(&mut daemons) {
        daemon.stop().map_err(failed)?;
        if daemon.socket().exists() {
            let what = format!("{} left its socket behind", part.daemon);
            return Err(Error::new(what, daemon.socket().display().to_string()));
        }
    }
    host.compare()?;
    step.done("booted, used and powered off");

    let seen = Seen::read(&outcome)?;
    let version = command::output(Command::new(&lab.qemu).arg("--version"))?;
    let qemu =
        version.split("version ").nth(1).and_then(|rest| rest.split_whitespace().next()).unwrap_or("?");
    println!(
        "\nLinux {} under QEMU {qemu}, software emulation; each device is a process of its own.\n",
        seen.kernel
    );
    let mut rows = vec![
        ["DEVICE", "LINUX", "RING", "WHAT THE GUEST DID", "SERVED BY", "LISTENS AFTER", "MEMORY"]
            .map(str::to_owned),
    ];
    let mut all_run = true;
    for ((part, daemon), peak) in PARTS.iter().zip(&daemons).zip(peaks) {
        let device = outcome.devices().into_iter().find(|device| device.id == part.id);
        let device = device
            .ok_or_else(|| Error::new(format!("the guest has no {}", part.name), "its kernel lists none"))?;
        all_run &= device.status == virtio::RUNNING;
        rows.push([
            part.name.to_owned(),
            driver(&device),
            if device.has(virtio::RING_PACKED) { "packed" } else { "split" }.to_owned(),
            seen.did(part.name),
            part.daemon.to_owned(),
            format!("{:.1} ms", daemon.ready_after.as_secs_f64() * 1e3),
            peak.map_or("?".to_owned(), |kib| format!("{:.1} MiB", kib as f64 / 1024.0)),
        ]);
    }
    table::print(&rows);
    println!("\nA sample of /dev/hwrng ({}): {}", seen.source, seen.sample);
    println!("Boot {:.1} s, devices {:.1} s, all {}.", seen.booted, seen.testing, clock(begun.elapsed()));
    let good = seen.bad <= ALLOWED && seen.good + seen.bad == BLOCKS;
    if !good {
        eprintln!("error: more than {ALLOWED} blocks of the guest's random bytes did not pass the test");
    }
    if !all_run {
        eprintln!("error: a driver does not run its device");
    }
    Ok(good && all_run)
}

fn start(programs: &Path, host: &Host) -> Result<Vec<Daemon>> {
    let mut daemons = Vec::new();
    for part in &PARTS {
        let daemon = Daemon::of(part.daemon, programs.join(part.daemon)).map_err(failed)?;
        let mut daemon = daemon.args(host.arguments(part));
        daemon.start().map_err(failed)?;
        daemons.push(daemon);
    }
    Ok(daemons)
}

fn boot(lab: &Lab, daemons: &[Daemon], step: &mut Step) -> std::result::Result<Outcome, Failure> {
    let script = format!("BLOCKS={BLOCKS} SAMPLE={SAMPLE} MIB={MIB}\n{SCRIPT}");
    let guest = Guest::new(lab).limit(Duration::from_secs(300)).script(&script);
    let devices = PARTS.iter().zip(daemons);
    let guest = devices.fold(guest, |guest, (part, daemon)| guest.vhost_user(part.qemu, &daemon.socket()));
    guest.start()?.wait_while(|| step.tick())?.success()
}

/// What the script told.
struct Seen {
    kernel: String,
    source: String,
    sample: String,
    bits: u64,
    good: u32,
    bad: u32,
    /// Bytes of the file on the disk.
    disk: u64,
    port: String,
    cid: String,
    booted: f64,
    testing: f64,
}

impl Seen {
    fn read(outcome: &Outcome) -> Result<Self> {
        let told = |key: &str| outcome.told(key).unwrap_or_default().to_owned();
        fn number<T: std::str::FromStr>(name: &str, text: &str) -> Result<T> {
            let why = || Error::new("cannot read the guest's report", format!("{name} is {text:?}"));
            text.parse().map_err(|_| why())
        }
        let booted: f64 = number("booted", &told("booted"))?;
        Ok(Self {
            kernel: told("kernel"),
            source: told("source"),
            sample: told("sample"),
            bits: number("bits", &told("bits"))?,
            good: number("good", &told("good"))?,
            bad: number("bad", &told("bad"))?,
            disk: number("disk", &told("disk"))?,
            port: told("console"),
            cid: told("socket"),
            booted,
            testing: number::<f64>("tested", &told("tested"))? - booted,
        })
    }

    /// What was done with a device, and how it went.
    fn did(&self, device: &str) -> String {
        match device {
            "entropy" => {
                let bytes = table::grouped(self.bits / 8 + SAMPLE as u64);
                format!("read {bytes} bytes: {} of {BLOCKS} blocks pass rngtest", self.good)
            }
            "disk" => format!("ext4; wrote {} MiB, the same after a remount", self.disk >> 20),
            "console" => format!("{MIB} MiB by port \"demo\" ({}) to a file: the same", self.port),
            _ => format!("{MIB} MiB from CID {} to a Unix socket: the same", self.cid),
        }
    }
}

fn driver(device: &Device) -> String {
    match device.status {
        virtio::RUNNING => device.driver.clone(),
        other => format!("not running: status {other:#x}, driver {:?}", device.driver),
    }
}

fn failed(failure: Failure) -> Error {
    // Whoever pressed Ctrl-C does not want to read logs.
    if let Err(stopped) = command::stop_if_interrupted() {
        return stopped;
    }
    Error::new("the demo failed", failure.to_string())
}
