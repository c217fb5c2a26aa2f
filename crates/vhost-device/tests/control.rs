//! The control socket of a daemon as a process: what it says of two guests, what it changes, and clients that mean no
//! good. CONTROL.md is what is tested.
mod support;

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use rustix::process::Signal;
use serde_json::{Value as Json, json};
use support::process::{Process, ready};
use support::*;
use vhost_device::control::{MAX_CLIENTS, MAX_LINE, MAX_WATCHES};
use virtio_testkit::{RingLayout, VhostUserDriver};

struct Rig {
    dir: TempDir,
    process: Process,
}

impl Rig {
    /// A daemon of two guests.
    fn new() -> Rig {
        let dir = TempDir::new();
        let socket = dir.path().join("s");
        let control = dir.path().join("control");
        let args = ["-s", socket.to_str().unwrap(), "-c", "2", "--control-socket", control.to_str().unwrap()];
        let process = ready(&args);
        Rig { dir, process }
    }

    fn control(&self) -> PathBuf {
        self.dir.path().join("control")
    }

    fn client(&self) -> Client {
        Client::of(self.raw())
    }

    fn raw(&self) -> UnixStream {
        let stream = UnixStream::connect(self.control()).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream
    }

    fn driver(&self, guest: usize) -> VhostUserDriver {
        let socket = self.dir.path().join(format!("s{guest}"));
        VhostUserDriver::connect(socket, options(RingLayout::Split)).unwrap()
    }

    /// Guests are served and clients are answered.
    fn check(&self) {
        assert_eq!(ask(&mut self.driver(0), 0, b"alive"), b"alive");
        assert_eq!(self.client().ok(json!({"request": "version"}))["protocol"], 1);
    }
}

struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
}

impl Client {
    fn of(stream: UnixStream) -> Client {
        Client { lines: BufReader::new(stream.try_clone().unwrap()), stream }
    }

    fn send(&mut self, line: &[u8]) {
        self.stream.write_all(line).unwrap();
        self.stream.write_all(b"\n").unwrap();
    }

    fn line(&mut self) -> Json {
        let mut line = String::new();
        assert!(self.lines.read_line(&mut line).unwrap() > 0, "the connection is over");
        serde_json::from_str(&line).unwrap()
    }

    fn ask(&mut self, request: Json) -> Json {
        self.send(request.to_string().as_bytes());
        self.line()
    }

    #[track_caller]
    fn ok(&mut self, request: Json) -> Json {
        let reply = self.ask(request.clone());
        assert!(reply.get("ok").is_some(), "{request}: {reply}");
        reply["ok"].clone()
    }

    #[track_caller]
    fn refused(&mut self, request: Json, kind: &str) -> String {
        let reply = self.ask(request.clone());
        assert_eq!(reply["error"]["kind"], kind, "{request}: {reply}");
        reply["error"]["message"].as_str().unwrap().to_owned()
    }

    fn stats(&mut self) -> Json {
        self.ok(json!({"request": "stats"}))
    }
}

/// The other side has closed the connection, in whatever way.
fn is_over(stream: &mut UnixStream) -> bool {
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => true,
        Err(error) => error.kind() == ErrorKind::ConnectionReset,
    }
}

#[test]
fn status_tells_each_guests_story() {
    let rig = Rig::new();
    let mut client = rig.client();
    let version = client.ok(json!({"request": "version", "id": 1}));
    assert_eq!(version["name"], "vhost-device-echo");
    let before = client.ok(json!({"request": "status"}));
    assert_eq!(before["guests"].as_array().unwrap().len(), 2);
    assert_eq!(before["guests"][0]["connected"], false);
    assert_eq!(before["guests"][1]["status"], json!([]));
    assert!(before["guests"][1]["socket"].as_str().unwrap().ends_with("/s1"));
    assert!(before["process"]["resident_bytes"].as_u64().unwrap() > 100_000);
    assert_eq!(before["process"]["pid"], rig.process.id());

    let mut driver = rig.driver(1);
    ask(&mut driver, 0, b"x");
    let after = client.ok(json!({"request": "status", "guest": 1}));
    let guest = &after["guests"][0];
    assert_eq!((&guest["guest"], &guest["connected"]), (&json!(1), &json!(true)));
    assert!(guest["status"].as_array().unwrap().contains(&json!("DRIVER_OK")), "{guest}");
    let negotiated = guest["negotiated"].as_array().unwrap();
    assert!(negotiated.contains(&json!("event_idx")) && negotiated.contains(&json!("bit_5")), "{guest}");
    assert!(!negotiated.contains(&json!("ring_packed")), "the driver has a split ring");
}

#[test]
fn stats_count_what_each_guest_did_and_go_on_when_its_front_end_goes() {
    let rig = Rig::new();
    let mut client = rig.client();
    let mut driver = rig.driver(0);
    for _ in 0..10 {
        ask(&mut driver, 0, b"12345");
    }
    // The last answer is there a moment before it is counted.
    eventually("ten are counted", || client.stats()["guests"][0]["queues"][0]["completed"] == 10);
    let stats = client.stats();
    let queue = &stats["guests"][0]["queues"][0];
    assert_eq!((&queue["requests"], &queue["out"]), (&json!(10), &json!(0)), "{queue}");
    assert_eq!((&queue["bytes_read"], &queue["bytes_written"]), (&json!(50), &json!(50)));
    assert!(queue["kicks"].as_u64().unwrap() >= 1 && queue["interrupts"].as_u64().unwrap() >= 1);
    assert_eq!(stats["guests"][0]["connects"], 1);
    assert_eq!(stats["guests"][1]["queues"][0]["requests"], 0, "the other guest did nothing");
    let sampled: u64 =
        queue["latency"]["buckets"].as_array().unwrap().iter().map(|count| count.as_u64().unwrap()).sum();
    assert!((1..=10).contains(&sampled), "{queue}");
    driver.stop().unwrap();
    drop(driver);
    let mut driver = rig.driver(0);
    ask(&mut driver, 0, b"12345");
    eventually("it goes on", || client.stats()["guests"][0]["queues"][0]["requests"] == 11);
    let stats = client.stats();
    assert_eq!(stats["guests"][0]["connects"], 2);
    assert!(stats["guests"][0]["messages"].as_u64().unwrap() > 20);
    assert_eq!(stats["guests"][0]["failures"]["front-end"], 0, "{stats}");
}

#[test]
fn policy_8_every_failure_is_counted_by_who_failed() {
    let rig = Rig::new();
    let mut client = rig.client();
    // A front-end that speaks nonsense.
    let mut stream = UnixStream::connect(rig.dir.path().join("s0")).unwrap();
    stream.write_all(&[0xff; 64]).unwrap();
    assert!(is_over(&mut stream));
    eventually("the broken connection is counted", || client.stats()["guests"][0]["connections_broken"] == 1);
    // A second front-end.
    let mut driver = rig.driver(1);
    let mut second = UnixStream::connect(rig.dir.path().join("s1")).unwrap();
    assert!(is_over(&mut second));
    assert_eq!(client.stats()["guests"][1]["turned_away"], 1);
    // A worker that panics.
    submit(&mut driver, 0, b"P");
    // Counted first, told last.
    let mut why = String::new();
    eventually("the panic is told", || {
        let status = client.ok(json!({"request": "status", "guest": 1}));
        why.push_str(status["guests"][0]["last_failure"].as_str().unwrap_or_default());
        !why.is_empty()
    });
    assert!(why.contains("asked to panic"), "{why}");
    let stats = client.stats();
    assert_eq!(stats["guests"][1]["failures"]["worker"], 1);
    assert_eq!(stats["guests"][1]["needs_reset"], true);
    assert_eq!(stats["guests"][0]["needs_reset"], false);
    assert_eq!(stats["guests"][0]["failures"]["worker"], 0);
}

#[test]
fn properties_and_commands_of_one_device() {
    let rig = Rig::new();
    let mut client = rig.client();
    let list = client.ok(json!({"request": "list", "guest": 0}));
    let volume = &list["guests"][0]["properties"][0];
    assert_eq!(volume["name"], "volume");
    assert_eq!(volume["kind"], json!({"type": "number", "min": 0, "max": 11}));
    let get = |guest: u32| json!({"request": "get", "guest": guest, "property": "volume"});
    assert_eq!(client.ok(get(0))["value"], 5);
    client.ok(json!({"request": "set", "guest": 0, "property": "volume", "value": 7}));
    assert_eq!(client.ok(get(0))["value"], 7);
    assert_eq!(client.ok(get(1))["value"], 5, "the other guest's device is another");
    let run = |by: Json| json!({"request": "run", "guest": 0, "command": "louder", "arguments": {"by": by}});
    assert_eq!(client.ok(run(json!(2)))["value"], 9);
    assert_eq!(client.refused(run(json!(9)), "refused"), "it goes to eleven");

    client.refused(run(json!("much")), "bad-value");
    client.refused(run(json!([1])), "bad-value");
    client.refused(json!({"request": "run", "guest": 0, "command": "louder"}), "bad-value");
    client.refused(json!({"request": "run", "guest": 0, "command": "lower"}), "unknown-name");
    client.refused(json!({"request": "get", "guest": 0, "property": "pitch"}), "unknown-name");
    client.refused(json!({"request": "set", "guest": 0, "property": "model", "value": "x"}), "bad-value");
    client.refused(json!({"request": "set", "guest": 0, "property": "volume", "value": 12}), "bad-value");
    let many = client.refused(json!({"request": "get", "property": "volume"}), "no-such-guest");
    assert!(many.contains("2 guests"), "{many}");
    client.refused(json!({"request": "stats", "guest": 2}), "no-such-guest");
    client.refused(json!({"request": "stats", "guest": u32::MAX}), "no-such-guest");
    // A check changes nothing.
    let set = json!({"request": "set", "guest": 0, "property": "volume", "value": 1, "check": true});
    client.ok(set);
    let mut check = run(json!(9));
    check["check"] = json!(true);
    client.ok(check);
    assert_eq!(client.ok(get(0))["value"], 9);
}

#[test]
fn policy_5_a_device_that_panics_in_a_command_costs_its_own_guest_only() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.refused(json!({"request": "run", "guest": 1, "command": "panic"}), "failed");
    assert_eq!(client.stats()["guests"][1]["failures"]["worker"], 1);
    rig.check();
}

#[test]
fn a_watch_tells_of_each_change_until_it_ends() {
    let rig = Rig::new();
    let (mut watcher, mut other) = (rig.client(), rig.client());
    let watch = json!({"request": "watch", "guest": 1, "property": "volume", "interval_ms": 50, "id": "w"});
    assert_eq!(watcher.ok(watch)["value"], 5);
    for value in [6, 7] {
        other.ok(json!({"request": "set", "guest": 1, "property": "volume", "value": value}));
        let event = watcher.line();
        assert_eq!(event, json!({"id": "w", "event": {"guest": 1, "value": value}}));
    }
    watcher.ok(json!({"request": "unwatch"}));
    other.ok(json!({"request": "set", "guest": 1, "property": "volume", "value": 1}));
    std::thread::sleep(NEVER);
    assert_eq!(watcher.ok(json!({"request": "version"}))["protocol"], 1, "no event came before this");
    let too_often = json!({"request": "watch", "guest": 1, "property": "volume", "interval_ms": 1});
    watcher.refused(too_often, "bad-value");
    watcher.refused(json!({"request": "watch", "guest": 1, "property": "pitch"}), "unknown-name");
    for _ in 0..MAX_WATCHES {
        watcher.ok(json!({"request": "watch", "guest": 0, "property": "volume"}));
    }
    watcher.refused(json!({"request": "watch", "guest": 0, "property": "volume"}), "refused");
}

#[test]
fn the_log_level_changes_while_the_daemon_runs() {
    let rig = Rig::new();
    let mut client = rig.client();
    assert_eq!(client.ok(json!({"request": "log-level"}))["level"], "info");
    assert_eq!(client.ok(json!({"request": "log-level", "level": "trace"}))["level"], "trace");
    assert_eq!(client.ok(json!({"request": "log-level"}))["level"], "trace");
    assert_eq!(client.ok(json!({"request": "status"}))["process"]["log_level"], "trace");
    client.refused(json!({"request": "log-level", "level": "loud"}), "bad-request");
    rig.check();
}

#[test]
fn only_this_user_may_connect_and_the_file_goes_with_the_daemon() {
    let mut rig = Rig::new();
    let mode = std::fs::metadata(rig.control()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut client = rig.client();
    client.ok(json!({"request": "version"}));
    rig.process.signal(Signal::TERM);
    assert_eq!(rig.process.ended().code(), Some(0), "a client does not keep the daemon");
    assert!(!rig.control().exists());
}

#[test]
fn a_request_may_come_in_pieces_and_several_at_once() {
    let rig = Rig::new();
    let mut client = rig.client();
    for byte in b"{\"request\":\"version\"}\n" {
        client.stream.write_all(&[*byte]).unwrap();
    }
    assert_eq!(client.line()["ok"]["protocol"], 1);
    let many: String =
        (0..500).map(|id| format!("{}\r\n\n", json!({"request": "version", "id": id}))).collect();
    let mut stream = client.stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        stream.write_all(many.as_bytes()).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
    });
    for id in 0..500 {
        assert_eq!(client.line()["id"], id, "what was sent before the end is answered");
    }
    writer.join().unwrap();
    assert!(is_over(&mut client.stream));
}

#[test]
fn hostile_control_garbage_is_answered_and_the_connection_lives() {
    let rig = Rig::new();
    let mut client = rig.client();
    let deep = "[".repeat(MAX_LINE - 1);
    let garbage: [&[u8]; 10] = [
        b"hello",
        b"\xff\xfe\x00\x01",
        b"{",
        b"[]",
        b"{\"request\":\"stats\",\"guest\":-1}",
        b"{\"request\":\"stats\",\"guest\":1e400}",
        b"{\"request\":{\"request\":\"stats\"}}",
        b"{\"request\":\"set\",\"guest\":0,\"property\":\"volume\",\"value\":\"\\ud800\"}",
        b"{\"request\":\"warp\",\"id\":[[[[]]]]}",
        deep.as_bytes(),
    ];
    for line in garbage {
        client.send(line);
        assert_eq!(client.line()["error"]["kind"], "bad-request", "{:?}", line.get(..20));
    }
    let long = "x".repeat(MAX_LINE - 100);
    client.refused(json!({"request": "get", "guest": 0, "property": long}), "unknown-name");
    client.ok(json!({"request": "version"}));
    rig.check();
}

#[test]
fn hostile_control_a_line_of_a_million_bytes_is_refused() {
    let rig = Rig::new();
    let mut client = rig.client();
    let mut stream = client.stream.try_clone().unwrap();
    // The daemon does not read it to its end.
    let writer = std::thread::spawn(move || stream.write_all(&[b'x'; 1_000_000]).is_err());
    assert!(client.line()["error"]["message"].as_str().unwrap().contains("65536"));
    assert!(writer.join().unwrap());
    assert!(is_over(&mut client.stream));
    rig.check();
}

#[test]
fn hostile_control_lines_that_never_end_cost_a_bounded_amount_of_memory() {
    let rig = Rig::new();
    rig.check();
    let before = rig.process.status("VmRSS");
    let clients: Vec<_> = (0..MAX_CLIENTS - 1)
        .map(|_| {
            let mut stream = rig.raw();
            // All but what would be too long.
            stream.write_all(&vec![b' '; MAX_LINE]).unwrap();
            stream
        })
        .collect();
    rig.check();
    let grown = rig.process.status("VmRSS").saturating_sub(before);
    let most = MAX_CLIENTS * 3 * MAX_LINE / 1024;
    assert!(grown < most as u64 + 4096, "{grown} KiB");
    drop(clients);
}

#[test]
fn hostile_control_a_client_that_never_reads_slows_nobody() {
    let rig = Rig::new();
    let mut driver = rig.driver(0);
    let mut lazy = rig.raw();
    lazy.set_nonblocking(true).unwrap();
    let request = b"{\"request\":\"prometheus\"}\n".repeat(1000);
    // Until neither side takes anything any more.
    while lazy.write(&request).is_ok() {}
    let before = rig.process.status("VmRSS");
    let mut client = rig.client();
    for _ in 0..200 {
        assert_eq!(ask(&mut driver, 0, b"fast"), b"fast");
        client.ok(json!({"request": "version"}));
        let _ = lazy.write(&request);
    }
    let grown = rig.process.status("VmRSS").saturating_sub(before);
    assert!(grown < 4096, "{grown} KiB");
}

#[test]
fn hostile_control_hundreds_of_connections_keep_nobody_out() {
    let rig = Rig::new();
    rig.check();
    let before = rig.process.count("fd");
    let mut crowd = Vec::new();
    for _ in 0..10 * MAX_CLIENTS {
        crowd.push(rig.raw());
    }
    let mut client = rig.client();
    for _ in 0..10 {
        client.ok(json!({"request": "version"}));
    }
    rig.check();
    let most = before + 2 * (MAX_CLIENTS + 8);
    assert!(rig.process.count("fd") <= most, "a place has one connection");
    drop((crowd, client));
    eventually("all connections are closed", || rig.process.count("fd") <= before);
}

#[test]
fn hostile_control_disconnects_at_every_byte() {
    let rig = Rig::new();
    rig.check();
    let before = rig.process.count("fd");
    let request = b"{\"request\":\"set\",\"guest\":0,\"property\":\"volume\",\"value\":3}\n";
    for end in 0..=request.len() {
        rig.raw().write_all(&request[..end]).unwrap();
    }
    // Who asked is served in its own turn, and is gone by then.
    let mut client = rig.client();
    let get = json!({"request": "get", "guest": 0, "property": "volume"});
    eventually("the whole request is carried out", || client.ok(get.clone())["value"] == 3);
    drop(client);
    eventually("all connections are closed", || rig.process.count("fd") <= before);
    rig.check();
}

#[test]
fn hostile_control_a_flood_of_requests_leaves_turns_for_others() {
    let rig = Rig::new();
    let mut driver = rig.driver(0);
    let mut flood = rig.client();
    let mut stream = flood.stream.try_clone().unwrap();
    let writer = std::thread::spawn(move || {
        let requests = b"{\"request\":\"stats\"}\n".repeat(100);
        while stream.write_all(&requests).is_ok() {}
    });
    let reader = std::thread::spawn(move || {
        let mut bytes = [0; 65536];
        while flood.lines.read(&mut bytes).is_ok_and(|read| read > 0) {}
    });
    let mut client = rig.client();
    for _ in 0..50 {
        assert_eq!(ask(&mut driver, 0, b"on"), b"on");
        client.ok(json!({"request": "version"}));
        // Messages of front-ends are carried out, too.
        assert_eq!(ask(&mut rig.driver(1), 0, b"on"), b"on");
    }
    drop(rig);
    writer.join().unwrap();
    reader.join().unwrap();
}

#[test]
fn nobody_watches_means_no_wake_ups() {
    let rig = Rig::new();
    let mut client = rig.client();
    client.ok(json!({"request": "version"}));
    // An idle client costs nothing.
    rig.process.rests(Duration::from_millis(500));
}
