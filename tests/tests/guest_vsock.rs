//! Linux's AF_VSOCK through `vhost-device-vsock`: to the host and back, between guests, over reboots and daemons that are
//! killed, in both layouts. QEMU does not come back to a daemon with these devices; the relay does.

use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use backplane_tests::bundle::Bundle;
use backplane_tests::daemon::{self, Daemon};
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab::{self, Lab};
use backplane_tests::relay::Relay;
use backplane_tests::running::Running;
use backplane_tests::scratch::Scratch;
use backplane_tests::virtio;
use backplane_tests::vsock::{Sum, bytes, sink};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketType};

const DAEMON: &str = "vhost-device-vsock";
const DEVICE: &str = "vhost-user-vsock-pci";
const AGENT: &str = env!("CARGO_BIN_EXE_vsock-agent");
/// The socket device.
const VSOCK: u32 = 19;
/// How long anything on the host waits.
const SOON: Duration = Duration::from_secs(30);

fn agent() -> String {
    Bundle::command(Path::new(AGENT))
}

fn io(what: &str) -> impl FnOnce(std::io::Error) -> Failure {
    let what = what.to_owned();
    move |error| Failure::new(format!("{what}: {error}"))
}

/// Sockets of the host that a guest connects to: a sink on 1000, a shouter on 1001, an echo of messages on 1003; on 1005 who
/// says nothing.
struct HostSide {
    path: PathBuf,
    /// A connection to port 1004, held open.
    held: UnixListener,
    _scratch: Scratch,
}

impl HostSide {
    fn start() -> Result<HostSide, Failure> {
        let scratch = Scratch::new().map_err(io("make a temporary folder"))?;
        let path = scratch.join("vm");
        let at = |port: u32| format!("{}_{port}", path.display());
        serve(&at(1000), |stream| sink(stream).map(drop))?;
        serve(&at(1001), |stream| {
            let mut all = Vec::new();
            stream.read_to_end(&mut all)?;
            stream.write_all(&all.to_ascii_uppercase())
        })?;
        serve(&at(1005), |stream| {
            let mut part = [0; 4096];
            while stream.read(&mut part)? > 0 {}
            Ok(())
        })?;
        let echo = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None)
            .and_then(|socket| {
                rustix::net::bind(&socket, &SocketAddrUnix::new(at(1003))?)?;
                rustix::net::listen(&socket, 16)?;
                Ok(socket)
            })
            .map_err(|error| io("listen")(error.into()))?;
        thread::spawn(move || {
            while let Ok(socket) = rustix::net::accept(&echo) {
                let _ = rustix::net::sockopt::set_socket_send_buffer_size(&socket, 1 << 18);
                let mut room = vec![0; 1 << 18];
                while let Some(len) = received(&socket, &mut room) {
                    if rustix::net::send(&socket, &room[..len], SendFlags::NOSIGNAL).is_err() {
                        break;
                    }
                }
            }
        });
        let held = UnixListener::bind(at(1004)).map_err(io("listen"))?;
        Ok(HostSide { path, held, _scratch: scratch })
    }

    /// Where the relay listens.
    fn relay(&self) -> PathBuf {
        self.path.with_extension("relay")
    }

    /// A client that has the guest's port, and its consent.
    fn connect(&self, port: u32) -> Result<UnixStream, Failure> {
        let mut stream = UnixStream::connect(&self.path).map_err(io("connect"))?;
        stream.set_read_timeout(Some(SOON)).map_err(io("set a time-out"))?;
        writeln!(stream, "CONNECT {port}").map_err(io("say CONNECT"))?;
        let mut line = Vec::new();
        let mut byte = [0];
        while line.last() != Some(&b'\n') {
            stream.read_exact(&mut byte).map_err(io(&format!("hear OK of port {port}")))?;
            line.extend(byte);
        }
        if line.starts_with(b"OK ") { Ok(stream) } else { Err(Failure::new("no OK")) }
    }
}

/// The length of the next message; none at the end.
fn received(socket: &OwnedFd, room: &mut [u8]) -> Option<usize> {
    rustix::net::recv(socket, room, RecvFlags::empty()).ok().map(|(len, _)| len).filter(|len| *len > 0)
}

fn serve(
    path: &str,
    each: impl Fn(&mut UnixStream) -> std::io::Result<()> + Copy + Send + 'static,
) -> Result<(), Failure> {
    let listener = UnixListener::bind(path).map_err(io("listen"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let mut stream = stream;
            thread::spawn(move || each(&mut stream));
        }
    });
    Ok(())
}

/// Clients of the guest's servers: many connections to the sink, messages to the echo, words to socat and our tool.
fn host_calls(host: &HostSide) -> Result<String, Failure> {
    let mut all = Vec::new();
    for seed in 0..100u64 {
        all.push((host.connect(2000)?, bytes(seed, 1 + (seed * 7919 % 30_000) as usize)));
    }
    let mut total = 0;
    for (stream, data) in &mut all {
        stream.write_all(data).map_err(io("write"))?;
        total += data.len();
    }
    for (stream, data) in &mut all {
        stream.shutdown(std::net::Shutdown::Write).map_err(io("half-close"))?;
        let mut answer = [0; 16];
        stream.read_exact(&mut answer).map_err(io("read the guest's sum"))?;
        if answer != Sum::of(data).answer() {
            return Err(Failure::new("the guest got other bytes"));
        }
    }
    let mut large = host.connect(2000)?;
    let data = bytes(77, 4 << 20);
    large.write_all(&data).map_err(io("write"))?;
    large.shutdown(std::net::Shutdown::Write).map_err(io("half-close"))?;
    let mut answer = [0; 16];
    large.read_exact(&mut answer).map_err(io("read the guest's sum"))?;
    if answer != Sum::of(&data).answer() {
        return Err(Failure::new("the guest got other bytes of 4 MiB"));
    }
    for port in [2001, 2002] {
        let mut words = host.connect(port)?;
        words.write_all(b"from the host\n").map_err(io("write"))?;
        words.shutdown(std::net::Shutdown::Write).map_err(io("half-close"))?;
        let mut answer = String::new();
        words.read_to_string(&mut answer).map_err(io("read"))?;
        let wanted = if port == 2001 { "FROM THE HOST\n" } else { "words of the guest\n" };
        if answer != wanted {
            return Err(Failure::new(format!("port {port} answers {answer:?}")));
        }
    }
    messages(host)?;
    Ok(format!(
        "100 connections of the host at once, {total} bytes, and one of 4 MiB, every sum as sent; socat and vsock answer; 6 messages each as it was"
    ))
}

fn messages(host: &HostSide) -> Result<(), Failure> {
    let failed = |error: rustix::io::Errno| io("a SEQPACKET client")(error.into());
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::SEQPACKET, None).map_err(failed)?;
    let path = format!("{}.seqpacket", host.path.display());
    rustix::net::connect(&socket, &SocketAddrUnix::new(path).map_err(failed)?).map_err(failed)?;
    rustix::net::send(&socket, b"CONNECT 2003\n", SendFlags::empty()).map_err(failed)?;
    let mut room = vec![0; 1 << 18];
    let len = received(&socket, &mut room).ok_or_else(|| Failure::new("no OK"))?;
    if !room[..len].starts_with(b"OK ") {
        return Err(Failure::new("no OK"));
    }
    for size in [1, 100, 4052, 4053, 20_000, 100_000] {
        rustix::net::send(&socket, &bytes(size, size as usize), SendFlags::empty()).map_err(failed)?;
        let len = received(&socket, &mut room).unwrap_or(0);
        if room[..len] != bytes(size, size as usize) {
            return Err(Failure::new(format!("a message of {size} bytes came back as {len}")));
        }
    }
    Ok(())
}

/// A guest whose agent has connections while its daemon is killed.
fn broken(senders: usize, readers: usize) -> String {
    format!(
        "
{} broken 2 1005 {senders} {readers} >/tmp/broken 2>&1 & broken=$!
n=0; until grep -q open /tmp/broken; do n=$((n + 1)); [ $n -lt 200 ] || fail \"not open: $(cat /tmp/broken)\"; sleep 0.1; done
ask kill
wait $broken || fail \"$(cat /tmp/broken)\"
tell did \"$(uptime_s) s: $(tail -n 1 /tmp/broken)\"
",
        agent()
    )
}

/// The daemon of guest 7, and a relay to it that outlives it.
fn served(host: &HostSide, arguments: &[&str]) -> Result<(Daemon, Relay), Failure> {
    let mut daemon =
        Daemon::new(DAEMON)?.args(arguments).args(["--guest-cid", "7", "--uds-path"]).args([&host.path]);
    daemon.start()?;
    let relay = Relay::start(&host.relay(), &daemon.socket())?;
    Ok((daemon, relay))
}

/// Kills the daemon when the guest wants it, and starts it again.
fn kill(guest: &mut Running, daemon: &mut Daemon) -> Result<(), Failure> {
    guest.wait_told("kill", 1).map_err(|error| error.with_log(DAEMON, &daemon.stderr()))?;
    daemon.kill()?;
    daemon.start()?;
    guest.answer("again")
}

/// Everything, in one guest that reboots once with connections open, and whose daemon is killed once. QEMU keeps the event
/// queue of this device to itself: only who sends hears that a connection is gone, by an RST.
fn everything(lab: &Lab, test: &str, device: &str, arguments: &[&str]) -> Result<Outcome, Failure> {
    let host = HostSide::start()?;
    let bundle = Bundle::new(&[Path::new(AGENT)])?;
    let (mut daemon, relay) = served(&host, arguments)?;
    let agent = agent();
    let broken = broken(8, 0);
    let text = format!(
        "
run() {{ timeout 60 $* >/tmp/said 2>&1 || fail \"$*: $(tail -n 3 /tmp/said)\"; tell did \"$(uptime_s) s: $(tail -n 1 /tmp/said)\"; }}
[ $(vsock cid) = 7 ] || fail \"context id $(vsock cid)\"
ask up
if [ \"$answer\" = again ]; then
	{agent} hold 2 1004 >/tmp/held &
	n=0; until grep -q held /tmp/held; do n=$((n + 1)); [ $n -lt 200 ] || fail \"not held\"; sleep 0.1; done
	ask held
	reboot -f
	sleep 100
fi
{broken}
run {agent} flood 2 1000 500
run {agent} sizes 2 1000
run {agent} messages 2 1003
for way in 'socat -t 10 - VSOCK-CONNECT:2:1001' 'vsock connect 2 1001'; do
	said=$(echo 'words of the guest' | timeout 20 $way)
	[ \"$said\" = 'WORDS OF THE GUEST' ] || fail \"$way: $said\"
done
timeout 10 vsock connect 2 1999 </dev/null 2>/tmp/refused && fail 'nobody listens, and it connects'
grep -qi reset /tmp/refused || fail \"refused with $(cat /tmp/refused)\"
{agent} sink 2000 &
{agent} echo 2003 &
socat VSOCK-LISTEN:2001 SYSTEM:'tr a-z A-Z' &
(echo 'words of the guest' | vsock listen 2002 >/tmp/heard) &
sleep 0.5
ask serves
[ \"$(cat /tmp/heard)\" = 'from the host' ] || fail \"heard $(cat /tmp/heard)\"
tell did \"$(uptime_s) s: the host's calls\"
"
    );
    let mut guest = Guest::new(lab)
        .reboots()
        .vhost_user(device, relay.socket())
        .archive(&bundle.path())
        .script(&text)
        .limit(Duration::from_secs(300))
        .start()?;
    let log = |error: Failure, daemon: &Daemon| error.with_log(DAEMON, &daemon.stderr());
    guest.wait_told("up", 1).map_err(|error| log(error, &daemon))?;
    guest.answer("again")?;
    guest.wait_told("held", 1).map_err(|error| log(error, &daemon))?;
    let (mut held, _) = host.held.accept().map_err(io("accept"))?;
    held.set_read_timeout(Some(SOON)).map_err(io("set a time-out"))?;
    guest.answer("on")?;
    // The guest is gone, and so is its connection.
    match held.read(&mut [0]) {
        Ok(0) => {}
        Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => {}
        other => return Err(Failure::new(format!("a connection of a guest that rebooted: {other:?}"))),
    }
    guest.wait_told("up", 2).map_err(|error| log(error, &daemon))?;
    guest.answer("on")?;
    kill(&mut guest, &mut daemon)?;
    guest.wait_told("serves", 1).map_err(|error| log(error, &daemon))?;
    let done =
        host_calls(&host).map_err(|error| log(error, &daemon).with_log("the guest", &guest.console()))?;
    guest.answer("on")?;
    let outcome = guest.wait().and_then(Outcome::success).map_err(|error| log(error, &daemon))?;
    daemon.check()?;
    did(test, &outcome);
    assert_eq!(relay.reconnects(), 1);
    println!(
        "{test}: {done}; a reboot closed the connection that was open; {:.1} s",
        outcome.time.as_secs_f64()
    );
    daemon.stop()?;
    let device = outcome.devices().into_iter().find(|device| device.id == VSOCK).expect("a socket device");
    assert_eq!((device.driver.as_str(), device.status), ("vmw_vsock_virtio_transport", virtio::RUNNING));
    assert!(device.has(1), "SEQPACKET: {:?}", device.feature_names());
    Ok(outcome)
}

fn layout(outcome: &Outcome, packed: bool) {
    let device = outcome.devices().into_iter().find(|device| device.id == VSOCK).expect("a socket device");
    assert_eq!(device.has(virtio::RING_PACKED), packed, "{:?}", device.feature_names());
}

#[test]
fn vsock_packed() -> Result<(), Failure> {
    let Some(lab) = lab::require("vsock_packed") else { return Ok(()) };
    layout(&everything(&lab, "vsock_packed", &format!("{DEVICE},packed=on"), &[])?, true);
    Ok(())
}

#[test]
fn vsock_split() -> Result<(), Failure> {
    let Some(lab) = lab::require("vsock_split") else { return Ok(()) };
    layout(&everything(&lab, "vsock_split", DEVICE, &["--without", "ring_packed"])?, false);
    Ok(())
}

/// A front-end that leaves the event queue to the daemon, as QEMU's generic device does: its successor has the guest reset all
/// connections, also those that only wait.
fn killed(test: &str, arguments: &[&str], packed: bool) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let host = HostSide::start()?;
    let bundle = Bundle::new(&[Path::new(AGENT)])?;
    let (mut daemon, relay) = served(&host, arguments)?;
    let device = "vhost-user-test-device-pci,virtio-id=19,num_vqs=3,vq_size=128,config_size=8";
    let text = format!(
        "
run() {{ timeout 60 $* >/tmp/said 2>&1 || fail \"$*: $(tail -n 3 /tmp/said)\"; tell did \"$(uptime_s) s: $(tail -n 1 /tmp/said)\"; }}
[ $(vsock cid) = 7 ] || fail \"context id $(vsock cid)\"
{}
run {} flood 2 1000 50
",
        broken(4, 4),
        agent()
    );
    let mut guest =
        Guest::new(&lab).vhost_user(device, relay.socket()).archive(&bundle.path()).script(&text).start()?;
    kill(&mut guest, &mut daemon)?;
    let outcome = guest.wait().and_then(Outcome::success);
    let outcome = outcome.map_err(|error| error.with_log(DAEMON, &daemon.stderr()))?;
    daemon.check()?;
    assert_eq!(relay.reconnects(), 1);
    did(test, &outcome);
    daemon.stop()?;
    layout(&outcome, packed);
    Ok(())
}

#[test]
fn vsock_killed_daemons_successor_resets_all_connections_packed() -> Result<(), Failure> {
    killed("vsock_killed_daemons_successor_resets_all_connections_packed", &[], true)
}

#[test]
fn vsock_killed_daemons_successor_resets_all_connections_split() -> Result<(), Failure> {
    let split = ["--without", "ring_packed"];
    killed("vsock_killed_daemons_successor_resets_all_connections_split", &split, false)
}

/// Prints what the guest has done, and when.
fn did(test: &str, outcome: &Outcome) {
    for line in outcome.console.lines().filter_map(|line| line.split_once("LAB-TELL did ")) {
        println!("{test}: {}", line.1.trim_end());
    }
}

/// Two guests of one daemon; the second is not there at first.
#[test]
fn vsock_siblings() -> Result<(), Failure> {
    let Some(lab) = lab::require("vsock_siblings") else { return Ok(()) };
    let bundle = Bundle::new(&[Path::new(AGENT)])?;
    let mut daemon = Daemon::new(DAEMON)?.args(["--socket-count", "2", "--guest-cid", "3"]);
    daemon.start()?;
    let agent = agent();
    let begin = |number: usize, text: &str| {
        Guest::new(&lab)
            .cpus(1)
            .vhost_user(DEVICE, &daemon.socket_of(number))
            .archive(&bundle.path())
            .script(text)
            .start()
    };
    let mut one = begin(
        0,
        &format!(
            "
run() {{ timeout 60 $* >/tmp/said 2>&1 || fail \"$*: $(tail -n 3 /tmp/said)\"; tell did \"$(uptime_s) s: $(tail -n 1 /tmp/said)\"; }}
timeout 10 vsock connect 4 2000 </dev/null 2>/tmp/refused && fail 'the other has not booted'
grep -qi reset /tmp/refused || fail \"refused with $(cat /tmp/refused)\"
ask alone
run {agent} flood 4 2000 50
run {agent} sizes 4 2000
run {agent} messages 4 2003
ask done
"
        ),
    )?;
    one.wait_told("alone", 1).map_err(|error| error.with_log(DAEMON, &daemon.stderr()))?;
    let mut other = begin(1, &format!("{agent} sink 2000 &\n{agent} echo 2003 &\nsleep 0.5\nask serves\n"))?;
    other.wait_told("serves", 1).map_err(|error| error.with_log(DAEMON, &daemon.stderr()))?;
    one.answer("on")?;
    one.wait_told("done", 1)
        .map_err(|error| error.with_log(DAEMON, &daemon.stderr()).with_log("the other", &other.console()))?;
    one.answer("end")?;
    other.answer("end")?;
    let outcome = one.wait().and_then(Outcome::success)?;
    other.wait().and_then(Outcome::success)?;
    did("vsock_siblings", &outcome);
    daemon.check()?;
    daemon.stop()?;
    Ok(())
}

/// The daemon runs in the guest, whose kernel has the loopback of AF_VSOCK.
#[test]
fn vsock_forwarding_to_the_hosts_own_af_vsock() -> Result<(), Failure> {
    let Some(lab) = lab::require("vsock_forwarding_to_the_hosts_own_af_vsock") else { return Ok(()) };
    let program = daemon::find(DAEMON)?;
    let bundle = Bundle::new(&[Path::new(AGENT), &program])?;
    let text = format!(
        "timeout 60 {} forward {} >/tmp/said 2>&1 || fail \"$(cat /tmp/said)\"\nwhile read line; do tell did $line; done </tmp/said\n",
        agent(),
        Bundle::command(&program)
    );
    let outcome = Guest::new(&lab).cpus(2).archive(&bundle.path()).script(&text).run()?.success()?;
    let lines: Vec<_> = outcome.console.lines().filter_map(|line| line.split_once("LAB-TELL did ")).collect();
    assert!(lines.len() >= 3, "{}", outcome.console);
    for line in lines {
        println!("vsock_forwarding: {}", line.1.trim_end());
    }
    Ok(())
}
