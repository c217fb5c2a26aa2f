//! `vhost-probe check` as a process, against back-ends that could hardly be worse: lines fail with a reason, the probe
//! comes to its end.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::process::{Command, Output};
use std::thread;

use serde_json::Value;
use virtio_testkit::daemon::TempDir;

/// A socket in a folder that ends with the test, and what is done with each connection to it.
struct Backend(PathBuf, #[expect(dead_code, reason = "held for its drop")] TempDir);

impl Backend {
    fn new(serve: impl Fn(UnixStream) + Send + Clone + 'static) -> Backend {
        let folder = TempDir::new();
        let path = folder.join("socket");
        let listener = UnixListener::bind(&path).expect("a listener");
        // It ends with the test's process.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let serve = serve.clone();
                thread::spawn(move || serve(stream));
            }
        });
        Backend(path, folder)
    }
}

fn check(path: &PathBuf, more: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_vhost-probe"));
    command.args(["check", "--json", "--timeout", "50", "--device", "rng"]).args(more).arg(path);
    command.output().expect("the probe runs")
}

/// Nearly every line fails, each with a reason; some have nothing to look at.
fn all_fail(path: &PathBuf) {
    let output = check(path, &[]);
    assert_eq!(output.status.code(), Some(1));
    let report: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let lines = report["lines"].as_array().expect("lines");
    assert!(lines.len() > 80);
    for line in lines {
        assert_ne!(line["result"], "pass", "{line}");
        assert!(line["reason"].as_str().is_some_and(|why| !why.is_empty()), "{line}");
        assert!(!line["reason"].as_str().is_some_and(|why| why.contains("the check itself")), "{line}");
    }
    assert!(report["failed"].as_u64().is_some_and(|count| count > 60));
}

#[test]
fn one_that_says_nothing() {
    let backend = Backend::new(|stream| {
        let _ = (&stream).read_to_end(&mut Vec::new());
    });
    all_fail(&backend.0);
}

#[test]
fn one_that_hangs_up() {
    let backend = Backend::new(drop);
    all_fail(&backend.0);
}

#[test]
fn one_that_talks_nonsense() {
    let backend = Backend::new(|mut stream| {
        let nonsense: Vec<u8> =
            (0..4096u32).flat_map(|i| i.wrapping_mul(0x9e37_79b9).to_ne_bytes()).collect();
        while stream.write_all(&nonsense).is_ok() {}
    });
    all_fail(&backend.0);
}

/// Every answer is a well-formed message, with all bits set in it.
#[test]
fn one_that_agrees_to_everything() {
    let backend = Backend::new(|mut stream| {
        let mut header = [0; 12];
        while stream.read_exact(&mut header).is_ok() {
            let size = header[8..].try_into().map_or(0, u32::from_ne_bytes) as usize;
            if stream.read_exact(&mut vec![0; size.min(4096)]).is_err() {
                return;
            }
            let mut reply = header[..4].to_vec();
            reply.extend([5u32, 8].map(u32::to_ne_bytes).concat());
            reply.extend([0xff; 8]);
            if stream.write_all(&reply).is_err() {
                return;
            }
        }
    });
    let output = check(&backend.0, &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(serde_json::from_slice::<Value>(&output.stdout).is_ok());
}

#[test]
fn lines_are_listed_and_chosen() {
    let nowhere = PathBuf::from("/nonexistent");
    let list = check(&nowhere, &["--list"]);
    assert!(list.status.success());
    let lines: Value = serde_json::from_slice(&list.stdout).expect("JSON");
    assert!(lines.as_array().is_some_and(|lines| lines.len() > 80));
    let list = check(&nowhere, &["--list", "--only", "reset-,fault-", "--skip", "fault-random"]);
    let lines: Value = serde_json::from_slice(&list.stdout).expect("JSON");
    for line in lines.as_array().expect("lines") {
        let name = line["line"].as_str().expect("a name");
        assert!(name.starts_with("reset-") || name.starts_with("fault-") && name != "fault-random", "{name}");
    }
    assert_eq!(check(&nowhere, &["--only", "no-such-line"]).status.code(), Some(1));
    let nobody = check(&nowhere, &[]);
    assert_eq!(nobody.status.code(), Some(1));
    assert!(!nobody.stderr.is_empty() && nobody.stdout.is_empty());
}
