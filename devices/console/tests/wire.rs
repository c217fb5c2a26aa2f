//! The daemon behind its socket: what a front-end gets, its command line, and terminals that are as they were afterwards.
#![cfg(feature = "daemon")]
mod daemon;

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use daemon::{DAEMON, run, start};
use rustix::fs::{Mode, OFlags};
use rustix::process::Signal;
use rustix::pty::OpenptFlags;
use rustix::termios::{LocalModes, Termios, Winsize, tcgetattr, tcsetwinsize};
use virtio_testkit::daemon::{DaemonProcess, TempDir};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};

/// Longer than anything takes.
const SOON: Duration = Duration::from_secs(20);

fn attach(socket: &Path, layout: RingLayout) -> VhostUserDriver {
    VhostUserDriver::connect(socket, VhostUserOptions::new(layout)).expect("a device that works")
}

/// Output of port 0.
fn print(driver: &mut VhostUserDriver, bytes: &[u8]) {
    let buf = driver.ram().readable(bytes);
    driver.ring(1).add(&[buf]);
    driver.kick(1);
    assert_eq!(driver.wait_used(1, SOON).expect("output is taken").len, 0);
    driver.ram().free(buf.addr);
}

fn say(driver: &mut VhostUserDriver, id: u32, event: u16, value: u16) {
    let bytes = [&id.to_le_bytes()[..], &event.to_le_bytes(), &value.to_le_bytes()].concat();
    let buf = driver.ram().readable(&bytes);
    driver.ring(3).add(&[buf]);
    driver.kick(3);
    driver.wait_used(3, SOON).expect("control messages are taken");
}

/// Port 0 was added; it is a console; somebody is there.
const ADDED: &[u8] = &[0, 0, 0, 0, 1, 0, 0, 0];
const CONSOLE: &[u8] = &[0, 0, 0, 0, 4, 0, 1, 0];
const OPENED: &[u8] = &[0, 0, 0, 0, 6, 0, 1, 0];

/// Ready, and port 0 open. Until all of these messages came, too; a buffer for the next one is left.
fn open(driver: &mut VhostUserDriver, awaited: &[&[u8]]) {
    let mut awaited = [&[ADDED, CONSOLE], awaited].concat();
    let post = |driver: &mut VhostUserDriver| {
        let buf = driver.ram().writable(64);
        driver.ring(2).add(&[buf]);
        driver.kick(2);
        buf
    };
    let mut next = post(driver);
    say(driver, 0, 0, 1);
    while !awaited.is_empty() {
        let used = driver.wait_used(2, SOON).unwrap_or_else(|| panic!("not heard: {awaited:?}"));
        let mut bytes = driver.ram().contents(&next);
        bytes.truncate(used.len as usize);
        next = post(driver);
        if bytes == ADDED {
            say(driver, 0, 3, 1);
            say(driver, 0, 6, 1);
        }
        awaited.retain(|message| *message != bytes);
    }
}

/// Input of port 0.
fn input(driver: &mut VhostUserDriver) -> Vec<u8> {
    let buf = driver.ram().writable(64);
    driver.ring(0).add(&[buf]);
    driver.kick(0);
    let used = driver.wait_used(0, SOON).expect("input");
    let mut bytes = driver.ram().contents(&buf);
    bytes.truncate(used.len as usize);
    bytes
}

fn read_exactly(stream: &mut impl Read, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    stream.read_exact(&mut bytes).expect("so many bytes");
    bytes
}

#[test]
fn output_and_input_through_a_socket_in_both_layouts() {
    let directory = TempDir::new();
    let (socket, port) = (directory.join("vhost"), directory.join("port"));
    let spec = format!("backend=unix:{}", port.display());
    let daemon = start(&socket, &["--port", &spec]);
    for layout in RingLayout::ALL {
        let mut driver = attach(&socket, layout);
        assert_eq!(driver.offered().low64() & 7, 7, "SIZE, MULTIPORT, EMERG_WRITE");
        print(&mut driver, b"kept, ");
        let mut client = UnixStream::connect(&port).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        open(&mut driver, &[OPENED]);
        print(&mut driver, b"and new");
        assert_eq!(read_exactly(&mut client, 13), b"kept, and new");
        client.write_all(b"typed").unwrap();
        assert_eq!(input(&mut driver), b"typed");
        driver.stop().unwrap();
    }
    assert!(daemon.terminate().success());
    assert_eq!(directory.names(), Vec::<String>::new(), "no socket is left behind");
}

#[test]
fn an_emergency_write_comes_through_the_front_end() {
    let directory = TempDir::new();
    let (socket, log) = (directory.join("vhost"), directory.join("log"));
    let _daemon = start(&socket, &["--port", &format!("backend=file:{}", log.display())]);
    let mut driver = attach(&socket, RingLayout::Split);
    for byte in b"oops" {
        let endpoint = driver.endpoint();
        endpoint.set_config(8, 0, &u32::from(*byte).to_le_bytes()).unwrap();
    }
    let deadline = Instant::now() + SOON;
    while std::fs::read(&log).unwrap() != b"oops" {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(1));
    }
}

#[test]
fn several_guests_have_their_own_and_the_flags_that_users_know_work() {
    let directory = TempDir::new();
    let socket = directory.join("vhost");
    // Any port that is free for two guests.
    let (first, _daemon) = (20_000..60_000)
        .step_by(37)
        .find_map(|port: u16| {
            let free = |port| std::net::TcpListener::bind(("127.0.0.1", port)).is_ok();
            if !free(port) || !free(port + 1) {
                return None;
            }
            let args = ["-c", "2", "-b", "network", "-p", &port.to_string(), "-q", "256"];
            Some((port, start(&socket, &args)))
        })
        .unwrap();
    for guest in 0..2 {
        let mut driver = attach(&directory.join(&format!("vhost{guest}")), RingLayout::Packed);
        let mut client = TcpStream::connect(("127.0.0.1", first + guest)).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        open(&mut driver, &[]);
        print(&mut driver, format!("guest {guest}").as_bytes());
        assert_eq!(read_exactly(&mut client, 7), format!("guest {guest}").as_bytes());
    }
}

#[test]
fn senseless_command_lines_are_refused_before_a_socket_exists() {
    let directory = TempDir::new();
    let socket = directory.join("vhost");
    let refused = |args: &[&str], words: &[&str]| {
        let all = [&["--socket-path", socket.to_str().unwrap()], args].concat();
        let output = run(&all);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(matches!(output.status.code(), Some(1 | 2)), "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?}: no {word:?} in {text:?}");
        }
        assert_eq!(directory.names(), Vec::<String>::new(), "{args:?}");
    };
    refused(&["--port", "stdio"], &["KEY=VALUE", "backend="]);
    refused(&["--port", "backend=serial"], &["serial", "use stdio, pty"]);
    refused(&["--port", "backend=null", "-b", "network"], &["--backend", "--port"]);
    refused(&["--port", "backend=stdio", "--port", "backend=stdio"], &["standard input", "one of them"]);
    refused(&["--port", "backend=stdio", "-c", "2"], &["several guests", "pty"]);
    refused(&["-b", "network", "-p", "65535", "-c", "2"], &["guest 1", "lower"]);
    refused(&["-q", "100", "--port", "backend=null"], &["100", "power of two"]);
    refused(&["--max-ports", "32", "--port", "backend=null"], &["32 ports", "31"]);
    refused(&["--port", "backend=file:/"], &["file:/", "name a file"]);
    refused(&["--port", "name=a,backend=null", "--port", "name=a,backend=null"], &["\"a\""]);
    let output = run(&["--print-capabilities", "--port", "nonsense"]);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success() && text.contains("console"), "{text}");
}

#[test]
fn peers_console_the_end_of_standard_input_does_not_spin() {
    let directory = TempDir::new();
    let socket = directory.join("vhost");
    // No input from the start; input that ends while it runs.
    for stdin in [Stdio::null(), Stdio::piped()] {
        let mut command = Command::new(DAEMON);
        command.args(["--backend", "nested", "--log-level", "warn", "--socket-path"]).arg(&socket);
        let mut daemon = DaemonProcess::spawn(command.stdin(stdin).stdout(Stdio::piped()));
        let mut driver = attach(&socket, RingLayout::Split);
        open(&mut driver, &[]);
        if let Some(mut pipe) = daemon.child().stdin.take() {
            pipe.write_all(b"last words").unwrap();
            drop(pipe);
            assert_eq!(input(&mut driver), b"last words");
        }
        // A buffer for what never comes.
        let buf = driver.ram().writable(64);
        driver.ring(0).add(&[buf]);
        driver.kick(0);
        print(&mut driver, b"output goes on");
        let mut output = daemon.child().stdout.take().unwrap();
        assert_eq!(read_exactly(&mut output, 14), b"output goes on");
        let ticks = || -> u64 {
            let stat = std::fs::read_to_string(daemon.proc("stat")).unwrap();
            stat.rsplit(')')
                .next()
                .unwrap()
                .split(' ')
                .skip(12)
                .take(2)
                .filter_map(|ticks| ticks.parse::<u64>().ok())
                .sum()
        };
        let before = ticks();
        std::thread::sleep(Duration::from_millis(600));
        // 60 ticks are all of that time.
        assert!(ticks() - before < 20, "it spins");
        assert!(daemon.terminate().success());
    }
}

/// A terminal to run the daemon on.
fn terminal() -> (OwnedFd, OwnedFd) {
    let ours = rustix::pty::openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
    rustix::pty::grantpt(&ours).unwrap();
    rustix::pty::unlockpt(&ours).unwrap();
    rustix::io::ioctl_fionbio(&ours, true).unwrap();
    let name = rustix::pty::ptsname(&ours, Vec::new()).unwrap();
    let theirs = rustix::fs::open(
        name.to_str().unwrap(),
        OFlags::RDWR | OFlags::NOCTTY | OFlags::CLOEXEC,
        Mode::empty(),
    );
    (ours, theirs.unwrap())
}

fn on_terminal(socket: &Path, theirs: &OwnedFd) -> DaemonProcess {
    let fd = || Stdio::from(File::from(theirs.try_clone().unwrap()));
    // Whoever runs the tests may ignore some of the signals, as nohup(1) does, and then so would the daemon.
    let mut command = Command::new("env");
    command.args(["--default-signal", DAEMON, "--log-level", "warn", "--socket-path"]).arg(socket);
    command.stdin(fd()).stdout(fd());
    DaemonProcess::spawn(&mut command)
}

fn is_raw(settings: &Termios) -> bool {
    !settings.local_modes.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG)
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_terminal_is_as_it_was_after_every_end() {
    let directory = TempDir::new();
    let socket = directory.join("vhost");
    // Orderly ends; ends where it stands; an abort, as after a panic that cannot be caught; an access to nothing.
    let signals =
        [Signal::TERM, Signal::INT, Signal::HUP, Signal::QUIT, Signal::ABORT, Signal::SEGV, Signal::USR1];
    for signal in signals {
        let (_ours, theirs) = terminal();
        let before = tcgetattr(&theirs).unwrap();
        assert!(!is_raw(&before));
        let mut daemon = on_terminal(&socket, &theirs);
        wait_until("it becomes raw", || is_raw(&tcgetattr(&theirs).unwrap()));
        wait_until("it listens", || UnixStream::connect(&socket).is_ok());
        println!("{signal:?}");
        daemon.signal(signal);
        let status = daemon.ended();
        let ends_well = matches!(signal, Signal::TERM | Signal::INT);
        assert_eq!(status.success(), ends_well, "{signal:?}: {status}");
        let after = tcgetattr(&theirs).unwrap();
        assert_eq!(after.local_modes, before.local_modes, "{signal:?}");
        assert_eq!((after.input_modes, after.output_modes), (before.input_modes, before.output_modes));
        let _ = std::fs::remove_file(&socket);
    }
}

#[test]
fn a_terminals_keys_size_and_own_end() {
    let directory = TempDir::new();
    let socket = directory.join("vhost");
    let (ours, theirs) = terminal();
    let size = |cols, rows| Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
    tcsetwinsize(&theirs, size(80, 25)).unwrap();
    let before = tcgetattr(&theirs).unwrap();
    let mut daemon = on_terminal(&socket, &theirs);
    let mut driver = attach(&socket, RingLayout::Split);
    assert!(is_raw(&tcgetattr(&theirs).unwrap()));
    open(&mut driver, &[OPENED, &[0, 0, 0, 0, 5, 0, 0, 0, 80, 0, 25, 0]]);
    // The terminal of a session tells its foreground processes.
    tcsetwinsize(&theirs, size(100, 30)).unwrap();
    daemon.signal(Signal::WINCH);
    // The buffer that waits since `open`.
    let used = driver.wait_used(2, SOON).expect("a message about the size");
    assert_eq!(used.len, 12);
    let config = driver.endpoint().get_config(0, 12, 0).unwrap();
    assert_eq!(config[..4], [100, 0, 30, 0]);
    rustix::io::write(&ours, b"a\x01\x01\r\x03").unwrap();
    assert_eq!(input(&mut driver), b"a\x01\r\x03", "raw, but for our own key");
    print(&mut driver, b"out\n");
    let mut bytes = [0; 64];
    let mut seen: Vec<u8> = Vec::new();
    wait_until("output on the terminal", || {
        match rustix::io::read(ours.as_fd(), &mut bytes).map_err(|error| error.kind()) {
            Ok(count) => seen.extend(&bytes[..count]),
            Err(kind) => assert_eq!(kind, ErrorKind::WouldBlock),
        }
        seen == b"out\n"
    });
    rustix::io::write(&ours, b"\x01x").unwrap();
    // Also while the guest takes no input.
    assert!(daemon.ended().success(), "Ctrl-A x is an orderly end");
    assert_eq!(tcgetattr(&theirs).unwrap().local_modes, before.local_modes);
}

#[test]
fn a_killed_daemons_successor_goes_on_with_the_same_driver() {
    for layout in RingLayout::ALL {
        let directory = TempDir::new();
        let (socket, port) = (directory.join("vhost"), directory.join("port"));
        let spec = format!("backend=unix:{}", port.display());
        let daemon = start(&socket, &["--port", &spec]);
        let mut driver = attach(&socket, layout);
        open(&mut driver, &[]);
        print(&mut driver, b"first");
        daemon.kill();
        let _daemon = start(&socket, &["--port", &spec]);
        driver.reconnect(&socket).unwrap();
        let mut client = UnixStream::connect(&port).unwrap();
        client.set_read_timeout(Some(SOON)).unwrap();
        print(&mut driver, b"second");
        assert_eq!(read_exactly(&mut client, 6), b"second");
        // The driver said once that it is ready, and that its port is open.
        client.write_all(b"input").unwrap();
        assert_eq!(input(&mut driver), b"input");
    }
}
