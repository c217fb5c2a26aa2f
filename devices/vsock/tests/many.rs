//! Ten thousand connections of one guest: what they cost, and that each of them works.
#![cfg(feature = "daemon")]
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use virtio_testkit::daemon::{DaemonProcess, TempDir, announcing};
use virtio_testkit::load::sockets::{ECHO, SocketSession};
use virtio_testkit::load::{Placement, Target};
use virtio_testkit::{RingLayout, TestRam};

const MANY: usize = 10_000;
/// Issue 7: bytes of the daemon's for a quiet connection, beside what the kernel keeps for its socket.
const EACH: u64 = 4096;
const SOON: Duration = Duration::from_secs(60);

fn client(path: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("a client");
    stream.set_read_timeout(Some(SOON)).expect("a time-out");
    stream.write_all(format!("CONNECT {ECHO}\n").as_bytes()).expect("a line");
    let mut line = [0; 32];
    let mut have = 0;
    while !line[..have].contains(&b'\n') {
        let got = stream.read(&mut line[have..]).expect("an answer");
        assert_ne!(got, 0, "it was turned away");
        have += got;
    }
    assert!(line.starts_with(b"OK "));
    stream
}

/// The guest's driver answers with as many bytes.
fn round_trip(stream: &mut UnixStream) {
    stream.write_all(&[1; 64]).expect("a message");
    stream.read_exact(&mut [0; 64]).expect("as much");
}

/// What a client thread finds, while the guest keeps up with it.
fn beside<T: Send>(session: &mut SocketSession<'_>, clients: impl FnOnce() -> T + Send) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let clients = scope.spawn(|| {
            let _end = OnEnd(&done);
            clients()
        });
        session.run(|| done.load(Ordering::SeqCst)).expect("a device that keeps the rules");
        clients.join().expect("clients that are served")
    })
}

/// Also of a thread that panics.
struct OnEnd<'a>(&'a AtomicBool);

impl Drop for OnEnd<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[test]
fn ten_thousand_connections_cost_a_descriptor_and_less_than_4_kib_each() {
    let needed = MANY as u64 + 200;
    let Rlimit { maximum, .. } = getrlimit(Resource::Nofile);
    if maximum.is_some_and(|limit| limit < needed) {
        println!("SKIP: {MANY} connections need {needed} descriptors, the limit here is {maximum:?}");
        return;
    }
    setrlimit(Resource::Nofile, Rlimit { current: Some(1024), maximum }).expect("the customary limit");
    let dir = TempDir::new();
    let mut command = announcing(Path::new(env!("CARGO_BIN_EXE_vhost-device-vsock")));
    command.arg("--socket").arg(dir.join("vhost")).arg("--uds-path").arg(dir.join("vm"));
    // It raises its own soft limit.
    let daemon = DaemonProcess::ready(&mut command);
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum }).expect("room for all ends");

    let ram = TestRam::new(&[(0, 16 << 20)]);
    let target = Target::Path(dir.join("vhost"));
    let mut session =
        SocketSession::open(target, &ram, RingLayout::Split, 64, Placement::Same).expect("a device");
    let path = dir.join("vm");
    let mut first = beside(&mut session, || client(&path));
    beside(&mut session, || round_trip(&mut first));
    let (files, memory) = (daemon.count("fd"), daemon.status("RssAnon"));

    let mut all: Vec<UnixStream> = beside(&mut session, || (0..MANY).map(|_| client(&path)).collect());
    assert_eq!(daemon.count("fd"), files + MANY);
    let each = (daemon.status("RssAnon").saturating_sub(memory)) * 1024 / MANY as u64;
    assert!(each < EACH, "{each} bytes each");
    println!("{each} bytes each");

    beside(&mut session, || {
        round_trip(&mut first);
        all.iter_mut().for_each(round_trip);
    });
    beside(&mut session, || drop(all));
    let deadline = Instant::now() + SOON;
    while daemon.count("fd") > files {
        assert!(Instant::now() < deadline, "{} descriptors are left of {files}", daemon.count("fd"));
        let turn = Instant::now();
        session.run(|| turn.elapsed() > Duration::from_millis(20)).expect("a device that keeps the rules");
    }
    beside(&mut session, || round_trip(&mut first));
    assert!(daemon.terminate().success());
}
