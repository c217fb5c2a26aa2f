//! The daemon as a process: the `echo` example, which cargo builds together with the tests.
mod support;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use rustix::process::Signal;
use support::process::{Process, pass, program, ready};
use support::*;
use vhost_user::{FrontendEndpoint, MemoryRegion, ProtocolFeatures};
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver, VhostUserOptions};

/// Runs to the end: exit code, standard output, standard error.
fn output(args: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(program()).args(args).stdin(Stdio::null()).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn driver(path: &Path) -> VhostUserDriver {
    VhostUserDriver::connect(path, options(RingLayout::Split)).unwrap()
}

/// Started under a service manager, and what that hears.
fn managed(dir: &TempDir, socket: &Path) -> (Process, UnixDatagram) {
    let notify = dir.path().join("notify");
    let manager = UnixDatagram::bind(&notify).unwrap();
    manager.set_read_timeout(Some(SOON)).unwrap();
    let mut command = Command::new(program());
    command.arg("-s").arg(socket).env("NOTIFY_SOCKET", &notify).stderr(Stdio::null());
    (Process::spawn(&mut command), manager)
}

fn word(manager: &UnixDatagram) -> String {
    let mut text = [0; 64];
    let n = manager.recv(&mut text).unwrap();
    String::from_utf8(text[..n].to_vec()).unwrap()
}

#[test]
fn a_senseless_command_line_is_refused_with_code_2_a_reason_and_no_socket() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let socket = socket.to_str().unwrap();
    let missing = format!("{socket}/no/such");
    let long = format!("{socket}{}", "x".repeat(120));
    let lines: [&[&str]; 13] = [
        &[],
        &["-s", socket, "-c", "0"],
        &["-s", socket, "-c", "many"],
        &["-c", "2"],
        &["-s", socket, "--fd", "9"],
        &["--fd", "0"],
        &["--fd", "77"],
        &["-s", &missing],
        &["-s", &long],
        &["-s", socket, "--without", "version_1"],
        &["-s", socket, "--without", "nonsense"],
        &["-s", socket, "--ready-fd", "77"],
        &["-s", socket, "--no-such-flag"],
    ];
    for line in lines {
        let (code, out, err) = output(line);
        assert_eq!(code, Some(2), "{line:?}: {err}");
        assert!(out.is_empty() && !err.is_empty(), "{line:?}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{line:?}");
    }
}

#[test]
fn capabilities_are_printed_whatever_else_is_said() {
    let expected = "{\n  \"type\": \"echo\"\n}\n";
    for line in [&["--print-capabilities"][..], &["--nonsense", "-s", "/no/such", "--print-capabilities"]] {
        assert_eq!(output(line), (Some(0), expected.to_owned(), String::new()), "{line:?}");
    }
}

#[test]
fn a_socket_in_use_is_refused_with_code_1_and_a_stale_one_is_replaced() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let path = socket.to_str().unwrap();
    let first = ready(&["-s", path]);
    let (code, _, err) = output(&["-s", path]);
    assert_eq!(code, Some(1), "{err}");
    assert!(err.contains("another process listens"), "{err}");
    assert_eq!(ask(&mut driver(&socket), 0, b"not disturbed"), b"not disturbed");
    first.kill();
    assert!(socket.exists(), "a killed daemon leaves its socket");
    let mut second = ready(&["-s", path]);
    assert_eq!(ask(&mut driver(&socket), 0, b"x"), b"x");
    second.signal(Signal::TERM);
    assert_eq!(second.ended().code(), Some(0));
    assert!(!socket.exists());
}

/// Each takes the stale socket for its own; one gets it, and keeps it.
#[test]
fn of_daemons_that_start_at_once_on_one_path_one_serves() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    for _ in 0..5 {
        drop(UnixListener::bind(&socket).unwrap());
        let mut all: Vec<_> = (0..4)
            .map(|_| Process::spawn(Command::new(program()).arg("-s").arg(&socket).stderr(Stdio::null())))
            .collect();
        let mut ended = 0;
        eventually("the end of all but one", || {
            all.retain_mut(|process| match process.child().try_wait().unwrap() {
                Some(status) => {
                    assert_eq!(status.code(), Some(1));
                    ended += 1;
                    false
                }
                None => true,
            });
            ended == 3
        });
        assert_eq!(ask(&mut driver(&socket), 0, b"x"), b"x");
        all[0].signal(Signal::TERM);
        assert_eq!(all[0].ended().code(), Some(0));
        assert!(!socket.exists());
    }
}

/// "No signal handling."
#[test]
fn peers_all_daemons_sigterm_and_sigint_finish_requests_and_leave_no_socket() {
    for signal in [Signal::TERM, Signal::INT] {
        let dir = TempDir::new();
        let base = dir.path().join("s");
        let mut process = ready(&["-s", base.to_str().unwrap(), "-c", "3"]);
        let mut driver = driver(&dir.path().join("s1"));
        submit(&mut driver, 0, b"H");
        assert_eq!(ask(&mut driver, 0, b"N"), [2]);
        process.signal(signal);
        assert_eq!(process.ended().code(), Some(0));
        assert_eq!(driver.ring(0).used().map(|used| used.len), Some(4), "finished");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "no socket left");
    }
}

#[test]
fn a_second_signal_ends_at_once() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let (mut process, manager) = managed(&dir, &socket);
    assert_eq!(word(&manager), "READY=1\n");
    let mut driver = driver(&socket);
    submit(&mut driver, 0, b"K");
    assert_eq!(ask(&mut driver, 0, b"N"), [2]);
    process.signal(Signal::TERM);
    // Taken: two that are pending at once are one.
    assert_eq!(word(&manager), "STOPPING=1\n");
    assert!(process.is_running(), "it waits for the request");
    process.signal(Signal::TERM);
    // Not in order, as at the request's deadline.
    assert_eq!(process.ended().code(), Some(1));
    assert!(!socket.exists());
}

#[test]
fn requests_that_hang_do_not_keep_the_daemon_from_ending() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let mut process = ready(&["-s", socket.to_str().unwrap()]);
    let mut driver = driver(&socket);
    submit(&mut driver, 0, b"K");
    assert_eq!(ask(&mut driver, 0, b"N"), [2]);
    process.signal(Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
    assert!(!socket.exists());
}

/// "No readiness notice."
#[test]
fn peers_all_daemons_readiness_comes_after_the_sockets() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let (mut process, manager) = managed(&dir, &socket);
    assert_eq!(word(&manager), "READY=1\n");
    UnixStream::connect(&socket).unwrap();
    process.signal(Signal::TERM);
    assert_eq!(word(&manager), "STOPPING=1\n");
    assert_eq!(process.ended().code(), Some(0));
}

/// "No fd passing": a connected socket.
#[test]
fn peers_all_daemons_a_connected_socket_is_served_to_its_end() {
    let (ours, theirs) = UnixStream::pair().unwrap();
    let mut command = Command::new(program());
    command.args(["--fd", "7"]).stderr(Stdio::null());
    pass(&mut command, &[(theirs.as_raw_fd(), 7)]);
    let mut process = Process::spawn(&mut command);
    drop(theirs);
    let mut driver =
        VhostUserDriver::attach(FrontendEndpoint::new(ours), options(RingLayout::Split)).unwrap();
    driver.start().unwrap();
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
    drop(driver);
    assert_eq!(process.ended().code(), Some(0), "there is nobody left to serve");
}

/// "No fd passing": listening sockets, and several guests.
#[test]
fn peers_all_daemons_listening_sockets_are_served_and_left_alone() {
    let dir = TempDir::new();
    let paths = [dir.path().join("a"), dir.path().join("b")];
    let listeners = paths.each_ref().map(|path| UnixListener::bind(path).unwrap());
    let mut command = Command::new(program());
    command.args(["--fd", "7", "--fd", "8"]).stderr(Stdio::null());
    pass(&mut command, &[(listeners[0].as_raw_fd(), 7), (listeners[1].as_raw_fd(), 8)]);
    let mut process = Process::spawn(&mut command);
    for path in paths.iter().chain(&paths) {
        assert_eq!(ask(&mut driver(path), 0, b"x"), b"x");
    }
    process.signal(Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
    assert!(paths.iter().all(|path| path.exists()), "they belong to who made them");
}

/// "No fd passing": systemd's socket activation. LISTEN_PID has to be the daemon's own, so a shell becomes it.
#[test]
fn peers_all_daemons_socket_activation_is_served() {
    let dir = TempDir::new();
    let path = dir.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut command = Command::new("/bin/sh");
    command.args(["-c", "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\""]).arg(program()).stderr(Stdio::null());
    pass(&mut command, &[(listener.as_raw_fd(), 3)]);
    let mut process = Process::spawn(&mut command);
    assert_eq!(ask(&mut driver(&path), 0, b"x"), b"x");
    process.signal(Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
}

#[test]
fn features_are_withheld() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let names = "ring_packed,event_idx,indirect_desc,in_order,access_platform";
    let _process = ready(&["-s", socket.to_str().unwrap(), "--without", names]);
    let mut driver = driver(&socket);
    let offered = driver.offered();
    assert_eq!(offered, vm_virtio::Features::VERSION_1 | echo::FEATURE);
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

#[test]
fn polling_serves_as_well() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let _process = ready(&["-s", socket.to_str().unwrap(), "--poll-us", "200"]);
    let mut driver = driver(&socket);
    for i in 0..200u8 {
        assert_eq!(ask(&mut driver, 0, &[b'x', i]), [b'x', i]);
    }
}

/// Floods of mistakes are logged, but not each of them.
#[test]
fn peers_all_daemons_what_goes_wrong_is_logged_and_a_flood_is_cut() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let log = dir.path().join("log");
    let mut command = Command::new(program());
    command.arg("-s").arg(&socket).stderr(File::create(&log).unwrap());
    let mut process = Process::spawn(&mut command);
    let mut endpoint = {
        eventually("the socket", || UnixStream::connect(&socket).is_ok());
        let mut endpoint = FrontendEndpoint::connect(&socket).unwrap();
        let offered = endpoint.get_protocol_features().unwrap();
        endpoint.set_protocol_features(offered).unwrap();
        endpoint
    };
    for _ in 0..5000 {
        assert!(endpoint.set_vring_num(0, 0).is_err());
    }
    process.signal(Signal::TERM);
    assert_eq!(process.ended().code(), Some(0));
    let log = std::fs::read_to_string(&log).unwrap();
    let refusals = log.lines().filter(|line| line.contains("ring 0 cannot have 0 entries")).count();
    assert!((5..100).contains(&refusals), "{refusals} lines");
    assert!(log.contains("suppressed"), "{log}");
}

/// Nothing leaks: descriptors, mappings and threads are what they were, whatever front-ends do and however they go.
#[test]
fn front_ends_that_come_and_go_leave_nothing_behind() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let process = ready(&["-s", socket.to_str().unwrap(), "--log-level", "off"]);
    let held = || (process.mappings_of("memfd"), process.count("fd"), process.count("task"));
    let before = held();
    for i in 0..30 {
        let layout = RingLayout::ALL[i % 2];
        let options = VhostUserOptions { ram: TestRam::spread(20, 0x1_0000), ..options(layout) };
        let mut driver = VhostUserDriver::connect(&socket, options).unwrap();
        submit(&mut driver, 0, b"H");
        let ram = driver.ram().clone();
        match i % 6 {
            0 => driver.stop().unwrap(),
            1 => driver.reset().unwrap(),
            // Stray descriptors, with a message that has none, and with half a header.
            2 => driver.endpoint().send(1, 0, &[], &[ram.fd(), ram.fd()]).unwrap(),
            3 => driver.endpoint().send_raw(&[5, 0, 0], &[ram.fd(); 8]).unwrap(),
            4 => drop(driver.endpoint().set_mem_table(&[(MemoryRegion::default(), ram.fd())])),
            _ => drop(driver.endpoint().set_vring_call(200, Some(ram.fd()))),
        }
    }
    eventually("what there was before", || held() == before);
    assert_eq!(ask(&mut driver(&socket), 0, b"x"), b"x");
}

#[test]
fn five_hundred_slots_cost_no_descriptors() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let process = ready(&["-s", socket.to_str().unwrap()]);
    let before = process.count("fd");
    let options = VhostUserOptions { ram: TestRam::spread(500, 0x2000), ..options(RingLayout::Split) };
    let mut driver = VhostUserDriver::connect(&socket, options).unwrap();
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
    assert_eq!(process.mappings_of("memfd"), 500);
    assert!(process.count("fd") < before + 20);
    let slots = ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    assert!(driver.protocol_features().contains(slots));
}

/// Whatever the limit of descriptors is, the daemon either does not start, or lives and does not spin.
#[test]
fn want_of_descriptors_is_an_error_and_no_more() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let (mut refused, mut hindered, mut served) = (0, 0, 0);
    for limit in (4..48).step_by(2) {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", &format!("ulimit -n {limit}; exec \"$0\" -s \"$1\" --log-level off")]);
        let mut process = Process::spawn(command.arg(program()).arg(&socket).stderr(Stdio::null()));
        let (mut ended, mut endpoint) = (None, None);
        eventually("a socket or an end", || {
            ended = process.child().try_wait().unwrap();
            endpoint = FrontendEndpoint::connect(&socket).ok();
            ended.is_some() || endpoint.is_some()
        });
        if let Some(ended) = ended {
            // 127: not even the program's libraries could be opened.
            assert!(matches!(ended.code(), Some(1 | 127)), "{limit}: {ended}");
            refused += 1;
            continue;
        }
        let mut endpoint = endpoint.expect("one of the two");
        endpoint.set_timeout(Duration::from_secs(2));
        let outcome = VhostUserDriver::attach(endpoint, options(RingLayout::Split))
            .and_then(|mut driver| driver.start().map(|()| driver));
        let works = match outcome {
            Ok(mut driver) => {
                assert_eq!(ask(&mut driver, 0, b"x"), b"x");
                true
            }
            Err(_) => false,
        };
        let mut ended = process.child().try_wait().unwrap();
        if ended.is_none() {
            let used = std::fs::read_to_string(process.proc("stat")).unwrap();
            let ticks: u64 = used.split_whitespace().nth(13).unwrap().parse().unwrap();
            assert!(ticks < 20, "{limit}: {ticks} ticks of processor time");
            process.signal(Signal::TERM);
            ended = Some(process.ended());
        }
        match ended.and_then(|ended| ended.code()) {
            Some(0) if works => served += 1,
            Some(0) => hindered += 1,
            // The sockets were the last that could be had.
            Some(1) if !works => refused += 1,
            other => panic!("{limit}: exit code {other:?}, works: {works}"),
        }
    }
    assert!(refused > 0 && served > 0, "{refused} refused, {hindered} hindered, {served} served");
}

/// "Daemon: listening within 20 ms of start, resident memory below 6 MiB with a guest attached, no wake-ups when idle."
/// The times of a debug build on a busy machine prove nothing, so the time is not judged here; nor are pages of the
/// program's file, of which a debug build has many.
#[test]
fn an_idle_daemon_sleeps_and_is_small() {
    let dir = TempDir::new();
    let socket = dir.path().join("s");
    let process = ready(&["-s", socket.to_str().unwrap()]);
    let mut driver = driver(&socket);
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
    process.rests(Duration::from_secs(1));
    let anonymous = process.status("RssAnon");
    assert!(anonymous < 2048, "{anonymous} KiB of its own");
}

/// A peer that asks and never reads costs bounded memory and disturbs no one.
#[test]
fn replies_that_nobody_reads_are_bounded() {
    let dir = TempDir::new();
    let base = dir.path().join("s");
    let process = ready(&["-s", base.to_str().unwrap(), "-c", "2", "--log-level", "off"]);
    let mut deaf = FrontendEndpoint::connect(dir.path().join("s0")).unwrap();
    deaf.set_timeout(Duration::from_millis(200));
    let message = [1u32, 1, 0].map(u32::to_ne_bytes).concat().repeat(1000);
    let mut sent = 0;
    while deaf.send_raw(&message, &[]).is_ok() && sent < 100_000_000 {
        sent += message.len();
    }
    assert!(sent < 100_000_000, "it is not read for ever");
    assert_eq!(ask(&mut driver(&dir.path().join("s1")), 0, b"x"), b"x");
    assert!(process.status("RssAnon") < 4096);
}

#[test]
fn output_of_help_names_every_common_option() {
    let (code, help, _) = output(&["--help"]);
    assert_eq!(code, Some(0));
    let options =
        ["--socket-path", "--socket-count", "--fd", "--print-capabilities", "--ready-fd", "--log-level"];
    for option in options.iter().chain(&["--poll-us", "--threads", "--without"]) {
        assert!(help.contains(option), "{option}");
    }
}
