//! A whole daemon in this process: a front-end that sends anything to its vhost-user socket, a client that sends anything to
//! its control socket. Checked: the daemon lives and answers the next one, in time; no panic reaches a thread's end.
//!
//! The daemon serves one guest with an entropy device, for as long as the process lives: what an input leaves behind, the
//! next one finds.
use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use vhost_device::{CommonArgs, Identity};
use vhost_user::{F_PROTOCOL_FEATURES, FrontendCode, FrontendEndpoint, ProtocolFeatures};
use virtio_rng::{Entropy, Rng};
use vm_virtio::{DeviceError, Features};

use crate::bytes::Bytes;
use crate::wire::{message, send};

/// A daemon that has not answered by then hangs. It may finish a stop that has a deadline of five seconds.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Parser)]
struct Arguments {
    #[command(flatten)]
    common: CommonArgs,
}

struct Sockets {
    device: PathBuf,
    control: PathBuf,
}

fn daemon() -> &'static Sockets {
    static DAEMON: OnceLock<Sockets> = OnceLock::new();
    DAEMON.get_or_init(|| {
        let folder = std::env::temp_dir().join(format!("backplane-fuzz-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        remove_at_the_end(&folder);
        let sockets = Sockets { device: folder.join("device"), control: folder.join("control") };
        let arguments = Arguments::parse_from([
            "fuzz".as_ref(),
            "--log-level=off".as_ref(),
            "--socket-path".as_ref(),
            sockets.device.as_os_str(),
            "--control-socket".as_ref(),
            sockets.control.as_os_str(),
        ]);
        thread::spawn(move || {
            let entropy = Entropy::insecure_seeded(1);
            const IDENTITY: Identity = Identity::new("fuzz", "rng", "0");
            let code = vhost_device::run(&arguments.common, IDENTITY, |guest| {
                Rng::new(&entropy, guest.0, None).map_err(DeviceError::new)
            });
            eprintln!("the daemon ended: {code:?}");
            std::process::abort();
        });
        connect(&sockets.control);
        sockets
    })
}

/// Whatever ends this process - an input that aborts it for one - closes the pipe, and the shell at its other end removes the
/// folder.
fn remove_at_the_end(folder: &Path) {
    let mut shell = Command::new("/bin/sh");
    shell.args(["-c", r#"read word; rm -rf "$0""#]).arg(folder);
    shell.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null()).process_group(0);
    // Never dropped.
    static SHELL: OnceLock<Child> = OnceLock::new();
    SHELL.get_or_init(|| shell.spawn().expect("a shell"));
}

fn connect(path: &PathBuf) -> UnixStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
        }
        thread::sleep(Duration::from_millis(1));
    }
}

/// Files that a front-end can send.
struct Files {
    memory: OwnedFd,
    event: OwnedFd,
    socket: UnixStream,
    /// The other end of it.
    _other: UnixStream,
}

impl Files {
    fn new() -> Files {
        let memory = memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
        ftruncate(&memory, 0x4000).expect("its size");
        let event = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let (socket, other) = UnixStream::pair().expect("sockets");
        Files { memory, event, socket, _other: other }
    }

    fn of(&self, bytes: &mut Bytes<'_>) -> BorrowedFd<'_> {
        bytes.of([
            self.memory.as_fd(),
            self.memory.as_fd(),
            self.event.as_fd(),
            self.event.as_fd(),
            self.socket.as_fd(),
        ])
    }
}

/// A front-end that begins well, or does not, and then sends anything.
pub fn session(data: &[u8]) {
    let sockets = daemon();
    let mut bytes = Bytes::new(data);
    let files = Files::new();
    let stream = connect(&sockets.device);
    let raw = stream.try_clone().expect("a socket");
    let mut endpoint = FrontendEndpoint::new(stream);
    endpoint.set_timeout(PATIENCE);
    if bytes.u8() < 0xe0 {
        begin(&mut endpoint, &files, bytes.u8());
    }
    while !bytes.is_empty() {
        if bytes.u8() < 8 {
            // What it shared shrinks under the daemon, or grows again.
            let _ = ftruncate(&files.memory, u64::from(bytes.u8() % 5) * 0x1000);
        }
        let codes = |bytes: &mut Bytes<'_>| FrontendCode::ALL[bytes.below(FrontendCode::ALL.len())].code();
        let message = message(&mut bytes, codes, 1);
        let count = bytes.of([0, 0, 0, 1, 1, 1, 2, 8]);
        let fds: Vec<_> = (0..count).map(|_| files.of(&mut bytes)).collect();
        if !message.is_empty() && !send(raw.as_fd(), &message, &fds) {
            break;
        }
        if bytes.u8() < 32 {
            let _ = rustix::io::write(&files.event, &1u64.to_ne_bytes());
        }
    }
    drop(endpoint);
    drop(raw);
    // The next front-end is served.
    let mut next = FrontendEndpoint::new(connect(&sockets.device));
    next.set_timeout(PATIENCE);
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = next.get_features() {
        assert!(Instant::now() < deadline, "the daemon does not answer the next front-end: {error}");
        next = FrontendEndpoint::new(connect(&sockets.device));
        next.set_timeout(PATIENCE);
    }
}

/// As far as `steps` says on the way to a running ring.
fn begin(endpoint: &mut FrontendEndpoint, files: &Files, steps: u8) {
    let mut steps = 0..steps % 16;
    let mut more = || steps.next().is_some();
    let rng = Features::VERSION_1 | Features::EVENT_IDX;
    let region =
        vhost_user::MemoryRegion { guest_addr: 0, size: 0x4000, user_addr: 0x10_0000, mmap_offset: 0 };
    let addr = vhost_user::VringAddr {
        index: 0,
        flags: 0,
        desc: 0x10_0000,
        avail: 0x10_1000,
        used: 0x10_2000,
        log: 0,
    };
    let wanted = ProtocolFeatures::all();
    let _ = more() && endpoint.get_features().is_ok();
    if more()
        && let Ok(offered) = endpoint.get_protocol_features()
    {
        let _ = endpoint.set_protocol_features(offered & wanted);
    }
    let _ = more() && endpoint.set_owner().is_ok();
    let _ = more() && endpoint.set_features(rng.low64() | F_PROTOCOL_FEATURES).is_ok();
    let _ = more() && endpoint.set_status(11).is_ok();
    let _ = more() && endpoint.add_mem_reg(region, files.memory.as_fd()).is_ok();
    let _ = more() && endpoint.set_vring_num(0, 16).is_ok();
    let _ = more() && endpoint.set_vring_base(0, 0).is_ok();
    let _ = more() && endpoint.set_vring_addr(&addr).is_ok();
    let _ = more() && endpoint.set_vring_kick(0, Some(files.event.as_fd())).is_ok();
    let _ = more() && endpoint.set_vring_call(0, Some(files.event.as_fd())).is_ok();
    let _ = more() && endpoint.set_vring_enable(0, true).is_ok();
    let _ = more() && endpoint.set_status(15).is_ok();
}

/// Names that requests of control clients are made of.
const WORDS: [&str; 24] = [
    "{\"request\":\"",
    "version",
    "status",
    "stats",
    "prometheus",
    "log-level",
    "list",
    "get",
    "set",
    "run",
    "watch",
    "unwatch",
    "\"",
    "\",\"guest\":0",
    "\",\"property\":\"",
    "\",\"interval_ms\":50",
    "\",\"level\":\"off\"",
    "}",
    "\n",
    "}\n",
    "{",
    "[[[[",
    "\\u0000",
    ":",
];

/// A client of the control socket that sends anything, in lines that nearly make sense.
pub fn control(data: &[u8]) {
    let sockets = daemon();
    let mut bytes = Bytes::new(data);
    let mut stream = connect(&sockets.control);
    stream.set_nonblocking(true).expect("a socket");
    let mut text = Vec::new();
    while !bytes.is_empty() {
        match bytes.u8() {
            choice @ 0..=0xdf => text.extend(WORDS[usize::from(choice) % WORDS.len()].as_bytes()),
            0xe0..=0xef => {
                let len = bytes.below(16);
                text.extend(bytes.take(len));
            }
            0xf0..=0xf4 => text.extend(std::iter::repeat_n(b'x', usize::from(bytes.u16()))),
            _ => {
                let _ = stream.write(&std::mem::take(&mut text));
                let mut sink = [0; 4096];
                let _ = stream.read(&mut sink);
            }
        }
    }
    let _ = stream.write(&text);
    drop(stream);
    // The next client is served.
    let deadline = Instant::now() + PATIENCE;
    loop {
        let mut next = connect(&sockets.control);
        next.set_read_timeout(Some(PATIENCE)).expect("a socket");
        // At the limit of clients a line may be lost with its connection: those before are just being noticed.
        let mut reply = [0; 64];
        if next.write_all(b"{\"request\":\"version\"}\n").is_ok() && matches!(next.read(&mut reply), Ok(1..))
        {
            return;
        }
        assert!(Instant::now() < deadline, "the daemon does not answer the next client");
    }
}
