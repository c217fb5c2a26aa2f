//! vhost-ctl and real daemons of two guests each.
mod support;

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};

use prometheus_parse::{Scrape, Value};
use support::{Daemon, SOON, ctl, load};

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

#[test]
fn status_shows_both_guests() {
    let daemon = Daemon::rng();
    let _driver = daemon.driver(1);
    let out = daemon.ctl(&["status"]).ok();
    assert!(out.contains("vhost-device-rng 0.") && out.contains("log level warn"), "{out}");
    assert!(
        out.contains(&format!("guest 0: entropy at {}/vm0, no front-end", daemon.folder.path().display())),
        "{out}"
    );
    assert!(
        out.contains("vm1, connected") && out.contains("DRIVER_OK") && out.contains("ring_packed"),
        "{out}"
    );
    let one = daemon.ctl(&["--guest", "1", "status"]).ok();
    assert!(one.contains("guest 1") && !one.contains("guest 0"), "{one}");
    let json = daemon.ctl(&["status", "--json"]).ok();
    assert!(json.starts_with("[{\"socket\":"), "{json}");
}

#[test]
fn stats_count_each_guest() {
    let daemon = Daemon::rng();
    daemon.counts(1, 1500);
    let out = daemon.ctl(&["stats"]).ok();
    let queue = lines(&out).into_iter().rfind(|line| line.contains("1  0 requestq")).unwrap();
    assert!(queue.contains("1.5k") && queue.contains("94Ki"), "{out}");
    assert!(out.contains("0  0 requestq         0"), "{out}");
    let json = daemon.ctl(&["-g", "1", "stats", "--json"]).ok();
    assert!(json.contains("\"requests\":1500") && json.contains("\"bytes_written\":96000"), "{json}");
}

#[test]
fn prometheus_text_is_what_a_scraper_takes() {
    let (rng, echo) = (Daemon::rng(), Daemon::echo());
    rng.counts(0, 100);
    let both = ["--socket", &rng.control(), "--socket", &echo.control(), "stats", "--prometheus"];
    let text = ctl(&both).ok();
    let scrape = Scrape::parse(text.lines().map(|line| Ok(line.to_owned()))).unwrap();

    let comments = text.lines().filter(|line| line.starts_with('#')).count();
    assert_eq!(scrape.docs.len(), comments / 2, "each metric has its help and its type, once");
    let of = |metric: &str, daemon: &str, guest: &str| {
        let mut found = scrape.samples.iter().filter(|sample| {
            sample.metric == metric
                && sample.labels.get("daemon") == Some(daemon)
                && sample.labels.get("guest") == Some(guest)
        });
        let sample = found.next().unwrap_or_else(|| panic!("no {metric} of {daemon} guest {guest}\n{text}"));
        assert!(found.next().is_none(), "{metric} is there once");
        sample.clone()
    };
    let requests = "backplane_queue_requests_total";
    assert_eq!(of(requests, "vhost-device-rng", "0").value, Value::Counter(100.0));
    assert_eq!(of(requests, "vhost-device-rng", "1").value, Value::Counter(0.0));
    assert_eq!(of(requests, "vhost-device-echo", "0").value, Value::Counter(0.0));
    assert_eq!(
        of("backplane_queue_written_bytes_total", "vhost-device-rng", "0").value,
        Value::Counter(6400.0)
    );
    assert_eq!(of("backplane_guest_connects_total", "vhost-device-rng", "0").value, Value::Counter(1.0));
    let histogram = of("backplane_queue_request_seconds", "vhost-device-rng", "0");
    let Value::Histogram(buckets) = &histogram.value else { panic!("{histogram:?}") };
    let counts: Vec<f64> = buckets.iter().map(|bucket| bucket.count).collect();
    assert!(counts.is_sorted() && buckets.is_sorted_by(|one, other| one.less_than < other.less_than));
    assert_eq!(buckets.last().unwrap().less_than, f64::INFINITY);
    let count = of("backplane_queue_request_seconds_count", "vhost-device-rng", "0");
    assert!(matches!(count.value, Value::Untyped(count) if Some(&count) == counts.last() && count > 0.0));

    let sockets: HashMap<_, _> = scrape
        .samples
        .iter()
        .filter(|sample| sample.metric == "backplane_build_info")
        .map(|sample| (sample.labels.get("daemon").unwrap(), sample.labels.get("socket").unwrap()))
        .collect();
    assert_eq!(sockets["vhost-device-rng"], rng.control());
}

#[test]
fn top_shows_the_rates_of_two_guests() {
    let daemon = Daemon::rng();
    let busy = AtomicBool::new(true);
    let out = std::thread::scope(|scope| {
        for guest in 0..2 {
            let mut driver = daemon.driver(guest);
            let busy = &busy;
            scope.spawn(move || {
                while busy.load(Ordering::Relaxed) {
                    load(&mut driver, 10);
                }
            });
        }
        let top = daemon.ctl(&["top", "--count", "2", "--interval", "1"]);
        busy.store(false, Ordering::Relaxed);
        top.ok()
    });
    let tables: Vec<_> = out.split("\n\n").collect();
    assert_eq!(tables.len(), 2, "{out}");
    for table in tables {
        let rows: Vec<_> = table.lines().filter(|line| line.contains("requestq")).collect();
        assert_eq!(rows.len(), 2, "{out}");
        for row in rows {
            assert!(row.contains("connected") && !row.contains("requestq      0 "), "{out}");
        }
    }
    assert!(!out.contains('\x1b'), "no control characters where there is no terminal");
    assert_eq!(lines(&daemon.ctl(&["top", "--once", "-i", "0.01"]).ok()).len(), 4);
}

#[test]
fn properties_are_listed_read_set_and_watched() {
    let daemon = Daemon::echo();
    let list = daemon.ctl(&["-g", "0", "list"]).ok();
    assert!(
        list.contains("volume") && list.contains("number from 0 to 11") && list.contains("get, set"),
        "{list}"
    );
    assert!(list.contains("louder") && list.contains("  by="), "{list}");
    assert_eq!(daemon.ctl(&["get", "volume"]).ok(), "guest 0: 5\nguest 1: 5\n");
    daemon.ctl(&["-g", "1", "set", "volume", "0xb"]).ok();
    assert_eq!(daemon.ctl(&["-g", "1", "get"]).ok(), "volume 11\nmodel echo\n");
    assert_eq!(daemon.ctl(&["-g", "0", "call", "louder", "by=2"]).ok(), "7\n");

    let several = daemon.ctl(&["set", "volume", "1"]).failed(2);
    assert!(several.contains("2 guests are meant"), "{several}");
    daemon.ctl(&["--all", "set", "volume", "1"]).ok();
    assert_eq!(daemon.ctl(&["get", "volume"]).ok(), "guest 0: 1\nguest 1: 1\n");
    assert!(daemon.ctl(&["-g", "0", "set", "volume", "12"]).failed(1).contains("number from 0 to 11"));
    assert!(daemon.ctl(&["-g", "0", "set", "volume", "loud"]).failed(1).contains("number from 0 to 11"));
    assert!(daemon.ctl(&["-g", "0", "set", "model", "x"]).failed(1).contains("cannot be set"));
    assert!(daemon.ctl(&["-g", "0", "get", "pitch"]).failed(1).contains("pitch"));
    assert!(daemon.ctl(&["-g", "0", "call", "louder", "2"]).failed(2).contains("NAME=VALUE"));
    assert!(daemon.ctl(&["-g", "2", "get", "volume"]).failed(1).contains("no guest 2"));

    let mut watch = Command::new(env!("CARGO_BIN_EXE_vhost-ctl"))
        .args(["-s", &daemon.control(), "-g", "0", "watch", "volume", "-i", "50", "-n", "3"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut seen = BufReader::new(watch.stdout.take().unwrap()).lines().map(Result::unwrap);
    assert_eq!(seen.next().as_deref(), Some("1"));
    for value in ["2", "3"] {
        daemon.ctl(&["-g", "0", "set", "volume", value]).ok();
        assert_eq!(seen.next().as_deref(), Some(value));
    }
    assert_eq!((seen.next(), watch.wait().unwrap().code()), (None, Some(0)));
}

#[test]
fn the_entropy_device_gets_a_limit_while_its_guest_reads() {
    let daemon = Daemon::rng();
    let mut driver = daemon.driver(0);
    load(&mut driver, 1);
    let all = daemon.ctl(&["-g", "0", "get"]).ok();
    assert_eq!(all, "source the kernel's generator\nmax-bytes 0\nperiod-ms 65536\n");
    daemon.ctl(&["-g", "0", "set", "max-bytes", "100"]).ok();
    let buf = driver.ram().writable(4096);
    driver.ring(0).add(&[buf]);
    driver.kick(0);
    let used = driver.wait_used(0, SOON).expect("an answer");
    assert_eq!(used.len, 100);
    assert_eq!(daemon.ctl(&["get", "max-bytes"]).ok(), "guest 0: 100\nguest 1: 0\n");
}

#[test]
fn a_scenario_is_carried_out_step_by_step() {
    let (one, other) = (Daemon::echo(), Daemon::echo());
    let scenario = one.folder.join("scenario");
    let text = "# Two daemons\n\
                0s     socket 0 guest 1 set volume 3\n\
                +50ms  socket 1 guest 0 call louder by=4  # from 5\n\
                +0s    socket 1 guest 0 expect volume 9\n\
                0.1s   socket 0 guest 1 get volume\n\
                0.1s   socket 1 log-level debug\n";
    std::fs::write(&scenario, text).unwrap();
    let scenario = scenario.to_str().unwrap();
    let (first, second) = (one.control(), other.control());
    let run = |more: &[&str]| ctl(&[&["-s", &first, "-s", &second, "run", scenario], more].concat());
    assert!(run(&["--check"]).ok().contains("5 steps, nothing wrong"));
    assert_eq!(one.ctl(&["-g", "1", "get", "volume"]).ok(), "5\n", "a check changes nothing");
    assert_eq!(run(&[]).ok(), "9\nvolume 3\n");
    assert_eq!(other.ctl(&["log-level"]).ok(), "debug\n");
    assert_eq!(one.ctl(&["log-level"]).ok(), "warn\n");
    let again = run(&[]);
    assert_eq!(again.code, 1, "louder than eleven");
    assert!(again.err.contains("scenario:3: it goes to eleven"), "{again:?}");
}

#[test]
fn a_scenario_with_a_mistake_changes_nothing_and_names_file_and_line() {
    let daemon = Daemon::echo();
    let scenario = daemon.folder.join("scenario");
    let path = scenario.to_str().unwrap();
    let run = |text: &str| {
        std::fs::write(&scenario, text).unwrap();
        daemon.ctl(&["run", path])
    };
    for (line, why) in [
        ("1s guest 0 set volume 12", "number from 0 to 11"),
        ("1s guest 0 set pitch 1", "no property"),
        ("1s guest 0 set model x", "cannot be set"),
        ("1s guest 0 call lower", "no command"),
        ("1s guest 0 call louder", "needs an argument"),
        ("1s guest 0 call louder by=x", "must be a number"),
        ("1s guest 0 expect pitch 1", "no property"),
        ("1s guest 7 get volume", "no such guest"),
        ("1s get volume", "several guests"),
        ("1s socket 1 log-level warn", "no socket 1"),
        ("soon guest 0 get volume", "not a time"),
        ("1s guest 0 jump", "jump"),
    ] {
        let err = run(&format!("0s guest 0 set volume 9\n\n{line}\n")).failed(2);
        assert!(err.contains(&format!("{path}:3: ")) && err.contains(why), "{line}: {err}");
    }
    let both = run("0s guest 0 set volume 99\n1s guest 0 set pitch 1\n").failed(2);
    assert!(both.contains(":1: ") && both.contains(":2: "), "{both}");
    assert_eq!(daemon.ctl(&["-g", "0", "get", "volume"]).ok(), "5\n", "nothing was changed");
    assert!(daemon.ctl(&["run", "/no/such/file"]).failed(2).contains("/no/such/file"));
    std::fs::write(&scenario, [0xff, 0xfe]).unwrap();
    daemon.ctl(&["run", path]).failed(2);
}

#[test]
fn a_daemon_that_is_not_there_has_its_own_exit_code() {
    assert!(ctl(&["-s", "/no/such/socket", "status"]).failed(3).contains("/no/such/socket"));
    assert!(!ctl(&["status"]).failed(2).is_empty());
    let daemon = Daemon::rng();
    assert!(daemon.ctl(&["top", "--interval", "0"]).failed(2).contains("seconds"));
    let mut top = Command::new(env!("CARGO_BIN_EXE_vhost-ctl"))
        .args(["-s", &daemon.control(), "top", "-i", "0.05"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut first = String::new();
    BufReader::new(top.stdout.as_mut().unwrap()).read_line(&mut first).unwrap();
    drop(daemon);
    // Its output is read no more, or its daemon is gone: whichever it notices first.
    drop(top.stdout.take());
    let code = top.wait().unwrap().code();
    assert!(matches!(code, Some(0 | 3)), "{code:?}");
}
