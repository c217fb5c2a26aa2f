//! Linux's `virtio_console` and its users behind `vhost-device-console`: a login, named ports, sizes, daemons that are killed
//! under load, bulk, drivers that go and come back, reboots, ports that are plugged in. QEMU has no vhost-user console by that
//! name; its generic device does. What that cannot do is to come back to a daemon that was killed: the relay does.

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use backplane_tests::daemon::{Daemon, find};
use backplane_tests::failure::Failure;
use backplane_tests::guest::{Guest, Outcome};
use backplane_tests::lab;
use backplane_tests::relay::Relay;
use backplane_tests::running::Running;
use backplane_tests::scratch::Scratch;
use backplane_tests::virtio;

const DAEMON: &str = "vhost-device-console";
/// The device type.
const CONSOLE: u32 = 3;
/// Named ports, beside port 0.
const NAMED: usize = 8;
/// A guest's boot included, on a busy machine.
const SOON: Duration = Duration::from_secs(120);

/// What a script begins with: udev's links, and a console that one can log in to.
const SETUP: &str = "
links() {
	mkdir -p /dev/virtio-ports
	for port in /sys/class/virtio-ports/*; do
		[ -s $port/name ] && ln -sf ../${port##*/} /dev/virtio-ports/$(cat $port/name)
	done
}
wait_for() {
	n=0; until [ -e \"$1\" ]; do n=$((n + 1)); [ $n -lt 100 ] || fail \"no $1\"; sleep 0.1; links; done
}
echo root::0:0:root:/root:/bin/sh >/etc/passwd
links
login() { while :; do setsid getty -L 0 hvc0 vt100; done & }
";

/// Somebody on the host's side of a port.
struct Client<S> {
    stream: S,
    seen: Vec<u8>,
}

impl<S: Read + Write> Client<S> {
    /// Reads until a text was there; everything up to it is taken.
    fn expect(&mut self, text: &str) -> Result<String, Failure> {
        let deadline = Instant::now() + SOON;
        let mut bytes = [0; 4096];
        loop {
            if let Some(at) = self.seen.windows(text.len()).position(|window| window == text.as_bytes()) {
                let taken: Vec<u8> = self.seen.drain(..at + text.len()).collect();
                return Ok(String::from_utf8_lossy(&taken).into_owned());
            }
            match self.stream.read(&mut bytes) {
                Ok(0) => return Err(self.failure(text, "the end")),
                Ok(count) => self.seen.extend(bytes.iter().take(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(2))
                }
                // A terminal whose other side nobody has open.
                Err(error) => return Err(self.failure(text, &error.to_string())),
            }
            if Instant::now() > deadline {
                return Err(self.failure(text, "nothing more"));
            }
        }
    }

    /// Everything up to the end of the connection.
    fn rest(&mut self) -> Result<Vec<u8>, Failure> {
        let deadline = Instant::now() + SOON;
        let mut bytes = [0; 4096];
        loop {
            match self.stream.read(&mut bytes) {
                Ok(0) => return Ok(std::mem::take(&mut self.seen)),
                Ok(count) => self.seen.extend(bytes.iter().take(count)),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    std::thread::sleep(Duration::from_millis(2))
                }
                // Something was on its way to a daemon that is dead.
                Err(error) if error.kind() == ErrorKind::ConnectionReset => {
                    return Ok(std::mem::take(&mut self.seen));
                }
                Err(error) => return Err(Failure::io("read to the end")(error)),
            }
            if Instant::now() > deadline {
                return Err(Failure::new("a client of a daemon that is dead waits for ever"));
            }
        }
    }

    fn failure(&self, text: &str, what: &str) -> Failure {
        Failure::new(format!("{what} instead of {text:?}; so far: {:?}", String::from_utf8_lossy(&self.seen)))
    }

    fn say(&mut self, text: &str) -> Result<(), Failure> {
        self.stream.write_all(text.as_bytes()).map_err(Failure::io("write to a port"))
    }

    /// Logs in, and leaves the prompt behind.
    fn login(&mut self) -> Result<(), Failure> {
        self.expect("login:")?;
        self.say("root\r")?;
        self.expect("# ").map(drop)
    }

    /// A command at the prompt, and what it says.
    fn run(&mut self, command: &str) -> Result<String, Failure> {
        // The echo is not the answer.
        self.say(&format!("echo BEG''IN; {command}; echo E''ND\r"))?;
        self.expect("BEGIN\r\n")?;
        let text = self.expect("END\r\n")?;
        self.expect("# ")?;
        Ok(text.trim_end_matches("END\r\n").trim_end().to_owned())
    }
}

fn connect(path: &Path) -> Result<Client<UnixStream>, Failure> {
    let stream =
        UnixStream::connect(path).map_err(Failure::io(format_args!("connect to {}", path.display())))?;
    stream.set_nonblocking(true).map_err(Failure::io("make it not block"))?;
    Ok(Client { stream, seen: Vec::new() })
}

struct Bench {
    daemon: Daemon,
    /// Between QEMU and the daemon.
    relay: Relay,
    scratch: Scratch,
}

impl Bench {
    /// A daemon with a console on `backend` (`{}`: the folder) and the named ports.
    fn new(backend: &str, arguments: &[&str]) -> Result<Bench, Failure> {
        let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
        let folder = scratch.join("").display().to_string();
        let mut all = vec!["--port".to_owned(), format!("backend={}", backend.replace("{}", &folder))];
        for number in 1..=NAMED {
            all.extend([
                "--port".to_owned(),
                // Nobody is there while a daemon is started again.
                format!("name=org.example.{number},backend=unix:{folder}port{number},buffer=1048576"),
            ]);
        }
        all.extend([
            "--max-ports".into(),
            (NAMED + 2).to_string(),
            "--control-socket".into(),
            format!("{folder}control"),
        ]);
        all.extend(arguments.iter().map(|argument| (*argument).to_owned()));
        let mut daemon = Daemon::new(DAEMON)?.args(all);
        daemon.start()?;
        let relay = Relay::start(&scratch.join("relay"), &daemon.socket())?;
        Ok(Bench { daemon, relay, scratch })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.scratch.join(name)
    }

    fn guest(&self, lab: &lab::Lab, script: &str) -> Guest {
        let queues = 2 * (NAMED + 2 + 1);
        let device =
            format!("vhost-user-test-device-pci,virtio-id=3,num_vqs={queues},vq_size=128,config_size=12");
        Guest::new(lab)
            .vhost_user(&device, self.relay.socket())
            .script(&format!("{SETUP}{script}"))
            .limit(Duration::from_secs(240))
    }

    /// A client for each of the named ports.
    fn clients(&self) -> Result<Vec<Client<UnixStream>>, Failure> {
        (1..=NAMED).map(|number| connect(&self.path(&format!("port{number}")))).collect()
    }

    fn ctl(&self, arguments: &[&str]) -> Result<String, Failure> {
        let output = Command::new(find("vhost-ctl")?)
            .arg("--socket")
            .arg(self.path("control"))
            .args(arguments)
            .stdin(Stdio::null())
            .output()
            .map_err(Failure::io("run vhost-ctl"))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        if output.status.success() {
            return Ok(text(&output.stdout));
        }
        Err(Failure::new(format!("vhost-ctl {arguments:?}: {}", text(&output.stderr))))
    }

    fn end(mut self, guest: Running) -> Result<virtio::Device, Failure> {
        let outcome = guest.wait().and_then(Outcome::success);
        let outcome = outcome.map_err(|error| error.with_log(DAEMON, &self.daemon.stderr()))?;
        self.daemon.check()?;
        self.daemon.stop()?;
        let device = outcome.devices().into_iter().find(|device| device.id == CONSOLE).expect("a console");
        assert_eq!((device.driver.as_str(), device.status), ("virtio_console", virtio::RUNNING));
        assert!(device.has(0) && device.has(1), "SIZE and MULTIPORT: {:?}", device.feature_names());
        println!("guest: {:.1} s from QEMU's start to its end", outcome.time.as_secs_f64());
        Ok(device)
    }
}

/// Every named port says its name and what it was told.
const GREET: &str = "
greet() {
	for number in 1 2 3 4 5 6 7 8; do
		wait_for /dev/virtio-ports/org.example.$number
		( read -r line && echo \"port $number: $line\" ) <>/dev/virtio-ports/org.example.$number >&0 &
		pids=\"$pids $!\"
	done
	wait $pids; pids=
}
";

fn greet(clients: &mut [Client<UnixStream>], round: usize) -> Result<(), Failure> {
    for (number, client) in (1..).zip(clients.iter_mut()) {
        client.say(&format!("hello {number} in round {round}\n"))?;
    }
    // The other way round: nobody waits for another.
    for (number, client) in (1..).zip(clients.iter_mut()).collect::<Vec<_>>().into_iter().rev() {
        let answer = client.expect("\n")?;
        assert_eq!(answer, format!("port {number}: hello {number} in round {round}\n"));
    }
    Ok(())
}

/// Numbered lines of the guest, each written for itself, over two daemons that are killed meanwhile; and a login at which
/// another command prints all the time.
const COUNT: &str = "
count() {
	( n=0; while [ ! -e /tmp/stop ]; do n=$((n + 1)); echo \"line $n\"; done; echo end ) >/dev/virtio-ports/org.example.2 &
	counter=$!
	ask counting
	touch /tmp/stop
	wait $counter
	ask counted
}
";

/// The numbers of whole lines.
fn numbers(text: &[u8]) -> Vec<u64> {
    let whole = text.iter().rposition(|byte| *byte == b'\n').map_or(0, |end| end + 1);
    let text = String::from_utf8_lossy(&text[..whole]).into_owned();
    text.lines().map(|line| line.strip_prefix("line ").and_then(|n| n.parse().ok()).unwrap_or(0)).collect()
}

/// Chains that a daemon may have written and not given back when it is killed: those of one system call.
const BATCH: u64 = 64;

/// The daemon is killed twice while lines come out of a port and out of the console, and started again.
fn killed(
    bench: &mut Bench,
    guest: &mut Running,
    console: &mut Client<UnixStream>,
    clients: &mut Vec<Client<UnixStream>>,
) -> Result<(), Failure> {
    guest.wait_told("counting", 1)?;
    console.say("here=still; while :; do echo noise; done\r")?;
    let (mut last, mut again) = (0, 0);
    for _ in 0..2 {
        console.expect("noise\r\nnoise\r\n")?;
        let mut seen = clients[1].expect("0\n")?.into_bytes();
        // More lines than a ring has entries.
        for _ in 0..30 {
            seen.extend(clients[1].expect("0\n")?.into_bytes());
        }
        bench.daemon.kill()?;
        seen.extend(clients[1].rest()?);
        last = compare(&numbers(&seen), last, &mut again)?;
        console.rest()?;
        bench.daemon.start()?;
        *console = connect(&bench.path("console"))?;
        *clients = bench.clients()?;
    }
    let mut seen = clients[1].expect("0\n")?;
    guest.answer("stop")?;
    seen += &clients[1].expect("end\n")?;
    last = compare(&numbers(seen.trim_end_matches("end\n").as_bytes()), last, &mut again)?;
    guest.wait_told("counted", 1)?;
    // The session is the one of before.
    console.expect("noise\r\n")?;
    console.say("\x03")?;
    console.expect("# ")?;
    assert_eq!(console.run("echo $here; tty")?, "still\r\n/dev/hvc0");
    assert_eq!(bench.relay.reconnects(), 2);
    println!(
        "killed twice with {last} lines on their way: none is lost, {again} came twice; the login goes on, under output of its own"
    );
    guest.answer("go")
}

/// Lines of one client, after those up to `last`: none is missing, and no more come again than were in one system call.
fn compare(numbers: &[u64], last: u64, again: &mut u64) -> Result<u64, Failure> {
    let (Some(first), Some(end)) = (numbers.first(), numbers.last()) else {
        return Err(Failure::new("no line at all"));
    };
    if let Some(pair) = numbers.windows(2).find(|pair| pair[1] != pair[0] + 1) {
        return Err(Failure::new(format!("line {} after line {}", pair[1], pair[0])));
    }
    let twice = (last + 1).checked_sub(*first).filter(|twice| *twice <= BATCH);
    *again += twice.ok_or_else(|| {
        Failure::new(format!("a client whose predecessor had line {last} begins with {first}"))
    })?;
    Ok(*end)
}

/// Everything in one guest with two boots; `bulk` bytes go to the guest and come back.
fn everything(test: &str, without: &[&str], packed: bool, bulk: usize) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let mut bench = Bench::new("unix:{}console", without)?;
    let script = format!(
        "{GREET}{COUNT}
        login
        greet
        ask greeted
        count
        # Linux reads 4 KiB at most, and writes 32.
        (dd ibs=4k obs=32k <&5 >&5 2>/tmp/dd) 5<>/dev/virtio-ports/org.example.1 || fail \"dd: $(cat /tmp/dd)\"
        ask bulk
        virtio=$(basename $(readlink -f /sys/class/virtio-ports/vport*p1/device))
        ( while echo traffic; do :; done ) >/dev/virtio-ports/org.example.2 2>/dev/null &
        ask traffic
        echo $virtio >/sys/bus/virtio/drivers/virtio_console/unbind || fail unbind
        wait $!
        [ -z \"$(ls /sys/class/virtio-ports)\" ] || fail \"ports are left: $(ls /sys/class/virtio-ports)\"
        rm -r /dev/virtio-ports
        ask unbound
        echo $virtio >/sys/bus/virtio/drivers/virtio_console/bind || fail bind
        links
        greet
        ask plug
        wait_for /dev/virtio-ports/org.example.late
        read -r line </dev/virtio-ports/org.example.late
        tell late $line
        ask unplug
        n=0; while grep -qs late /sys/class/virtio-ports/*/name; do n=$((n + 1)); [ $n -lt 100 ] || fail 'still there'; sleep 0.1; done
        virtio_devices
        "
    );
    let mut guest = bench.guest(&lab, &script).start()?;
    let mut console = connect(&bench.path("console"))?;
    let mut clients = bench.clients()?;
    bench.ctl(&["set", "port.0.size", "100x30"])?;
    let outcome = all_of_it(&mut bench, &mut guest, &mut console, &mut clients, bulk);
    outcome.map_err(|error| {
        error.with_log(DAEMON, &bench.daemon.stderr()).with_log("the guest's console", &guest.console())
    })?;
    let device = bench.end(guest)?;
    assert_eq!(device.has(virtio::RING_PACKED), packed, "{:?}", device.feature_names());
    Ok(())
}

fn all_of_it(
    bench: &mut Bench,
    guest: &mut Running,
    console: &mut Client<UnixStream>,
    clients: &mut Vec<Client<UnixStream>>,
    bulk: usize,
) -> Result<(), Failure> {
    greet(clients, 1)?;
    guest.wait_told("greeted", 1)?;
    println!("{NAMED} named ports: each line that was sent came back by its own port");

    // A login, and the size: the one from before the boot, and a new one.
    console.login()?;
    assert_eq!(console.run("tty")?, "/dev/hvc0");
    assert_eq!(console.run("stty size")?, "30 100");
    resize(bench, console, 132, 43)?;
    assert_eq!(console.run("echo $((6 * 7)) $(uname -s)")?, "42 Linux");
    println!("login on hvc0 over a Unix socket: tty, stty size 30 100, after a resize 43 132");

    guest.answer("go")?;
    killed(bench, guest, console, clients)?;
    resize(bench, console, 90, 25)?;

    // There and back, byte by byte.
    let begun = Instant::now();
    let client = clients.remove(0);
    let same = there_and_back(client.stream, bulk)?;
    println!(
        "{} MiB there and back through one port, every byte compared: {:.1} s",
        same >> 20,
        begun.elapsed().as_secs_f64()
    );
    // The end of the one client is the end of the file there; the next must not come before that is seen.
    guest.wait_told("bulk", 1)?;
    clients.insert(0, connect(&bench.path("port1"))?);
    guest.answer("go")?;

    // The driver goes while it sends, and comes back.
    guest.wait_told("traffic", 1)?;
    clients[1].expect("traffic\ntraffic\n")?;
    guest.answer("go")?;
    guest.wait_told("unbound", 1)?;
    guest.answer("go")?;
    clients.clear();
    *clients = bench.clients()?;
    for (number, client) in (1..).zip(clients.iter_mut()) {
        client.say(&format!("hello {number} in round 2\n"))?;
    }
    for (number, client) in (1..).zip(clients.iter_mut()) {
        // What the second one's predecessor left is replayed: lines of traffic.
        client.expect(&format!("port {number}: hello {number} in round 2\n"))?;
    }
    console.say("\r")?;
    console.login()?;
    assert_eq!(console.run("stty size")?, "25 90");
    println!("unbound with traffic and bound again: login and {NAMED} ports work");

    // A port more, and one less.
    guest.wait_told("plug", 1)?;
    let spec = format!("spec=name=org.example.late,backend=unix:{}", bench.path("late").display());
    bench.ctl(&["call", "add-port", &spec])?;
    guest.answer("go")?;
    let mut late = connect(&bench.path("late"))?;
    late.say("better late than never\n")?;
    guest.wait_told("unplug", 1)?;
    bench.ctl(&["call", "remove-port", &format!("port={}", NAMED + 1)])?;
    guest.answer("go")?;
    assert_eq!(guest.wait_told("late", 1)?, "better late than never");
    println!("a port added and removed while the guest runs");
    Ok(())
}

/// An operator says how large the console is, and `stty` says so, too.
fn resize(bench: &Bench, console: &mut Client<UnixStream>, cols: u16, rows: u16) -> Result<(), Failure> {
    bench.ctl(&["set", "port.0.size", &format!("{cols}x{rows}")])?;
    let deadline = Instant::now() + SOON;
    while console.run("stty size")? != format!("{rows} {cols}") {
        assert!(Instant::now() < deadline, "the size does not change");
    }
    Ok(())
}

/// Sends a pattern and compares what comes back; returns how many bytes were the same.
fn there_and_back(stream: UnixStream, bulk: usize) -> Result<usize, Failure> {
    const PART: usize = 1 << 16;
    const ROUND: usize = 1 << 20;
    let pattern: Vec<u8> = (0..(ROUND + PART) as u32 / 4)
        .flat_map(|word| word.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    // Each part begins elsewhere in the pattern, so that no two of them, nor pages of them, are the same.
    let part = move |at: usize| {
        let from = at / PART * 4099 % ROUND;
        pattern[from..from + PART].to_vec()
    };
    stream.set_nonblocking(false).map_err(Failure::io("make it block"))?;
    stream.set_read_timeout(Some(SOON)).map_err(Failure::io("limit its time"))?;
    let mut sender = stream.try_clone().map_err(Failure::io("copy a descriptor"))?;
    let parts = part.clone();
    let sending =
        std::thread::spawn(move || (0..bulk).step_by(PART).try_for_each(|at| sender.write_all(&parts(at))));
    let (mut reader, mut bytes) = (stream, vec![0; PART]);
    for at in (0..bulk).step_by(PART) {
        reader.read_exact(&mut bytes).map_err(Failure::io(format_args!("read back from byte {at} on")))?;
        if bytes != part(at) {
            return Err(Failure::new(format!("bytes from {at} on are others than those that were sent")));
        }
    }
    sending.join().map_err(|_| Failure::new("the sender panicked"))?.map_err(Failure::io("send"))?;
    Ok(bulk)
}

#[test]
fn console_login_ports_sizes_kill_bulk_unbind_plug_packed() -> Result<(), Failure> {
    everything("console_login_ports_sizes_kill_bulk_unbind_plug_packed", &[], true, 100 << 20)
}

#[test]
fn console_login_ports_sizes_kill_bulk_unbind_plug_split() -> Result<(), Failure> {
    everything(
        "console_login_ports_sizes_kill_bulk_unbind_plug_split",
        &["--without", "ring_packed"],
        false,
        100 << 20,
    )
}

/// On a pseudo-terminal, over reboots: the daemon and who sits at the terminal stay.
#[test]
fn console_on_a_terminal_over_reboots_packed() -> Result<(), Failure> {
    on_a_terminal_over_reboots("console_on_a_terminal_over_reboots_packed", &[], true)
}

#[test]
fn console_on_a_terminal_over_reboots_split() -> Result<(), Failure> {
    let split = ["--without", "ring_packed"];
    on_a_terminal_over_reboots("console_on_a_terminal_over_reboots_split", &split, false)
}

fn on_a_terminal_over_reboots(test: &str, without: &[&str], packed: bool) -> Result<(), Failure> {
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let bench = Bench::new("pty:{}console", without)?;
    let script = format!(
        "{GREET}
        login
        greet
        ask up
        if [ \"$answer\" = again ]; then ( while echo traffic; do :; done ) >/dev/hvc0 & sleep 0.2; reboot -f; sleep 100; fi
        virtio_devices
        "
    );
    let mut guest = bench.guest(&lab, &script).reboots().start()?;
    let terminal = rustix::fs::open(
        bench.path("console"),
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::NOCTTY | rustix::fs::OFlags::NONBLOCK,
        rustix::fs::Mode::empty(),
    );
    let terminal = terminal.map_err(|error| Failure::new(format!("cannot open the terminal: {error}")))?;
    let resizable = terminal.try_clone().map_err(Failure::io("copy a descriptor"))?;
    let mut console = Client { stream: File::from(terminal), seen: Vec::new() };
    let mut clients = bench.clients()?;
    for (boot, order) in [(1, "again"), (2, "enough")] {
        greet(&mut clients, boot).map_err(|error| error.with_log("the guest's console", &guest.console()))?;
        guest.wait_told("up", boot)?;
        console.login().map_err(|error| error.with_log(DAEMON, &bench.daemon.stderr()))?;
        assert_eq!(console.run("tty")?, "/dev/hvc0");
        let size =
            rustix::termios::Winsize { ws_row: 20 + boot as u16, ws_col: 90, ws_xpixel: 0, ws_ypixel: 0 };
        rustix::termios::tcsetwinsize(resizable.as_fd(), size)
            .map_err(|error| Failure::new(error.to_string()))?;
        let deadline = Instant::now() + SOON;
        while console.run("stty size")? != format!("{} 90", 20 + boot) {
            assert!(Instant::now() < deadline, "the size does not change");
        }
        println!("boot {boot}: login on hvc0 through a pty, {NAMED} ports, stty size {} 90", 20 + boot);
        guest.answer(order)?;
    }
    let device = bench.end(guest)?;
    assert_eq!(device.has(virtio::RING_PACKED), packed, "{:?}", device.feature_names());
    Ok(())
}
