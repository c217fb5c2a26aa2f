//! `vhost-probe check` over whole daemons: ours, which keep every rule, and QEMU's storage daemon, whose differences are
//! known by name.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, fs, thread};

use backplane_tests::daemon::{self, Daemon};
use backplane_tests::failure::Failure;
use backplane_tests::process::Owned;
use backplane_tests::scratch::Scratch;
use backplane_tests::skip;
use serde_json::Value;

/// What `vhost-probe`'s README says of QEMU's storage daemon.
const README: &str = include_str!("../../crates/vhost-probe/README.md");

/// For daemons that answer: long, because test machines are slow.
const LONG: &str = "30000";

/// The probe that was just built, or nothing after telling why the test is skipped.
fn probe(test: &str) -> Option<PathBuf> {
    if env::var_os(daemon::VARIABLE).is_none() {
        skip::tell(test, "needs programs that were just built; `cargo xtask test` makes them and runs this");
        return None;
    }
    Some(daemon::find("vhost-probe").expect("a probe beside the daemons"))
}

/// Runs the suite over a socket, with so many milliseconds for each answer. The exit code has to say what the lines say.
fn check(
    probe: &Path,
    socket: &Path,
    device: &str,
    timeout: &str,
) -> Result<Vec<(String, String, String)>, Failure> {
    let mut command = Command::new(probe);
    command.args(["check", "--json", "--timeout", timeout, "--device", device]).arg(socket);
    let output = command.output().map_err(Failure::io("run the probe"))?;
    let report: Value = serde_json::from_slice(&output.stdout)
        .map_err(|e| Failure::new(format!("no JSON: {e}: {}", String::from_utf8_lossy(&output.stderr))))?;
    let text = |line: &Value, name: &str| line[name].as_str().unwrap_or_default().to_owned();
    let lines = report["lines"].as_array().cloned().unwrap_or_default();
    let lines: Vec<_> =
        lines.iter().map(|line| (text(line, "line"), text(line, "result"), text(line, "reason"))).collect();
    let failed = lines.iter().filter(|(_, result, _)| result == "FAIL").count();
    assert_eq!(report["failed"], failed);
    assert_eq!(output.status.success(), failed == 0);
    assert!(lines.len() > 80, "{} lines", lines.len());
    Ok(lines)
}

fn failed(lines: &[(String, String, String)]) -> Vec<&(String, String, String)> {
    lines.iter().filter(|(_, result, _)| result == "FAIL").collect()
}

#[test]
fn the_entropy_daemon_keeps_every_rule() -> Result<(), Failure> {
    let Some(probe) = probe("the_entropy_daemon_keeps_every_rule") else { return Ok(()) };
    // Both layouts in one run, and split alone.
    for (arguments, packed) in [(vec![], "pass"), (vec!["--without", "ring_packed"], "n/a")] {
        let mut daemon = Daemon::new("vhost-device-rng")?.args(arguments);
        daemon.start()?;
        let lines = check(&probe, &daemon.socket(), "rng", LONG)?;
        assert!(failed(&lines).is_empty(), "{:#?}", failed(&lines));
        assert!(lines.iter().any(|(line, result, _)| line == "packed-lists" && result == packed));
        daemon.check()?;
        assert_eq!(daemon.stop()?.code(), Some(0));
    }
    Ok(())
}

#[test]
fn the_block_daemon_keeps_every_rule() -> Result<(), Failure> {
    let Some(probe) = probe("the_block_daemon_keeps_every_rule") else { return Ok(()) };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let image = scratch.path().join("disk.img");
    fs::write(&image, vec![1; 1 << 20]).map_err(Failure::io("write an image"))?;
    let disk = [OsStr::new("--blk-file"), image.as_os_str(), OsStr::new("--num-queues"), OsStr::new("4")];
    let mut daemon = Daemon::new("vhost-device-block")?.args(disk);
    daemon.start()?;
    let lines = check(&probe, &daemon.socket(), "blk", LONG)?;
    assert!(failed(&lines).is_empty(), "{:#?}", failed(&lines));
    daemon.check()?;
    assert_eq!(daemon.stop()?.code(), Some(0));
    Ok(())
}

/// QEMU's storage daemon, where the machine has it.
fn storage_daemon() -> Option<PathBuf> {
    let paths = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&paths).map(|folder| folder.join("qemu-storage-daemon")).find(|path| path.is_file())
}

#[test]
fn qemus_storage_daemon_differs_where_the_readme_says() -> Result<(), Failure> {
    let test = "qemus_storage_daemon_differs_where_the_readme_says";
    let Some(probe) = probe(test) else { return Ok(()) };
    let Some(program) = storage_daemon() else {
        skip::tell(test, "qemu-storage-daemon is not on this machine (Debian: qemu-utils)");
        return Ok(());
    };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let (disk, socket) = (scratch.join("disk"), scratch.join("socket"));
    fs::write(&disk, vec![0x5c; 1 << 20]).map_err(Failure::io("write a disk"))?;
    let mut command = Command::new(program);
    command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", disk.display()));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
        socket.display()
    ));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Owned::spawn(&mut command).map_err(Failure::io("start qemu-storage-daemon"))?;
    let deadline = Instant::now() + Duration::from_secs(30);
    while !socket.exists() {
        assert!(Instant::now() < deadline, "qemu-storage-daemon does not listen");
        thread::sleep(Duration::from_millis(10));
    }
    // Each of its differences may take that long.
    let lines = check(&probe, &socket, "blk", "3000")?;
    // The table's rows: a line's name, what the daemon does.
    let known: BTreeSet<&str> = README
        .lines()
        .filter_map(|row| row.strip_prefix("| `")?.split_once('`'))
        .map(|(name, _)| name)
        .collect();
    let is_known = |name: &str| {
        known
            .iter()
            .any(|known| known.strip_suffix('*').map_or(*known == name, |begin| name.starts_with(begin)))
    };
    for (line, _, why) in failed(&lines) {
        assert!(is_known(line), "{line} is not in the README's table: {why}");
    }
    for line in ["version-1-offered", "framing", "indirect", "used-once", "notified", "reconnect"] {
        assert!(
            lines.iter().any(|(name, result, _)| name == line && result == "pass"),
            "{line} does not pass"
        );
    }
    Ok(())
}
