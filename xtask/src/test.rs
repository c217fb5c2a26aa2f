//! `cargo xtask test`: builds what tests need, runs all of them, and says in one line how it went.
//!
//! Tests report in two ways: the harness's own lines, which are counted as they pass by ([`Tally`]), and the file of
//! skipped tests, because a test that skips itself looks like a passed one to the harness.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::{Duration, Instant};

use backplane_tests::process::Owned;
use backplane_tests::scratch::Scratch;
use backplane_tests::{daemon, lab as guest_lab, skip};

use crate::command;
use crate::error::{Error, Result};
use crate::lab;
use crate::progress::{clock, in_ci, note};
use crate::tally::Tally;
use crate::workspace::{Workspace, cargo};

/// Which skips are known and accepted: lines of a test's name, a colon and the reason.
const ALLOWED: &str = "tests/allowed-skips.txt";

/// How the tests are to be run.
#[derive(Debug)]
pub(crate) struct Options {
    /// Only tests whose name contains this.
    pub(crate) filter: Option<String>,
    /// Skipped tests that are not on the list fail the run.
    pub(crate) deny_skips: bool,
    /// Leave out those that boot a guest.
    pub(crate) no_guest: bool,
}

/// Runs them; whether everything is as it should be.
pub(crate) fn run(options: &Options) -> Result<bool> {
    let begun = Instant::now();
    let workspace = Workspace::read()?;
    let allowed = read_allowed(&workspace.path(ALLOWED))?;
    let scratch = Scratch::new().map_err(|e| Error::new("cannot make a temporary folder", e.to_string()))?;
    let skips = scratch.join("skips");

    let mut test = cargo();
    test.current_dir(&workspace.root)
        .args(["test", "--all-features", "--no-fail-fast"])
        .args(&options.filter);
    test.env(skip::VARIABLE, &skips).env_remove(guest_lab::VARIABLE);
    if options.no_guest {
        note("guest tests: left out, as asked");
    } else {
        match lab::ensure(&lab::Options::default()) {
            Ok(_) => {
                test.env(guest_lab::VARIABLE, lab::folder()?);
            }
            Err(error) => {
                command::stop_if_interrupted()?;
                note(&format!("no guest lab, guest tests will be skipped: {error}"));
            }
        }
    }
    let mut programs = workspace.daemons();
    programs.extend(["backplane-vmm".into(), "vhost-ctl".into(), "vhost-probe".into()]);
    workspace.build(&programs)?;
    test.env(daemon::VARIABLE, workspace.release());

    let tally = stream(&mut test)?;
    let skipped = read_skips(&skips)?;
    Ok(report(&tally, &skipped, &allowed, options.deny_skips || in_ci(), begun.elapsed()))
}

/// A line that came from cargo or from a test program; `true` is standard output.
type Line = (bool, String);

/// Runs cargo, passes all it prints on as it comes, and counts.
fn stream(test: &mut std::process::Command) -> Result<Tally> {
    let failed = |e: io::Error| Error::new("cannot run `cargo test`", e.to_string());
    test.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = Owned::spawn(test).map_err(failed)?;
    let (sender, lines) = mpsc::channel::<Line>();
    let (out, err) = (child.child().stdout.take(), child.child().stderr.take());
    let pumps: Vec<_> =
        [out.map(|out| pump(out, true, sender.clone())), err.map(|err| pump(err, false, sender))]
            .into_iter()
            .flatten()
            .collect();
    let mut tally = Tally::default();
    loop {
        command::stop_if_interrupted()?;
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok((true, line)) => {
                println!("{line}");
                tally.test_line(&line);
            }
            Ok((false, line)) => {
                eprintln!("{line}");
                tally.cargo_line(&line);
            }
            Err(mpsc::RecvTimeoutError::Timeout) => {}
            Err(mpsc::RecvTimeoutError::Disconnected) => break,
        }
    }
    for pump in pumps {
        let _ = pump.join();
    }
    let status = loop {
        command::stop_if_interrupted()?;
        if let Some(status) = child.wait_for(Duration::from_millis(100)).map_err(failed)? {
            break status;
        }
    };
    tally.end((!status.success()).then(|| status.to_string()).as_deref());
    Ok(tally)
}

fn pump(from: impl Read + Send + 'static, output: bool, to: Sender<Line>) -> thread::JoinHandle<()> {
    thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(io::Result::ok) {
            let line = String::from_utf8_lossy(&line).into_owned();
            if to.send((output, line)).is_err() {
                break;
            }
        }
    })
}

/// Prints the summary; its last line is what a machine reads.
fn report(
    tally: &Tally,
    skipped: &BTreeMap<String, String>,
    allowed: &BTreeMap<String, String>,
    deny: bool,
    time: Duration,
) -> bool {
    println!("\nsummary, after {}:", clock(time));
    for name in &tally.failures {
        println!("  FAILED {name}");
    }
    let ignored = tally.ignored.iter().map(|(name, reason)| (name.as_str(), reason.as_str()));
    let mut unexpected = 0;
    let mut count = 0;
    for (name, reason) in skipped.iter().map(|(name, reason)| (name.as_str(), reason.as_str())).chain(ignored)
    {
        count += 1;
        let known = allowed.contains_key(without_line(name));
        let mark = if deny && !known { "SKIPPED, and not allowed to" } else { "skipped" };
        println!("  {mark} {name}: {reason}");
        unexpected += u32::from(!known);
    }
    if deny && unexpected > 0 {
        println!(
            "  {unexpected} skipped tests are not listed in {ALLOWED}: make them run, or list them with a reason"
        );
    }
    // A test that skipped itself was counted as passed by the harness.
    let passed = tally.passed().saturating_sub(u32::try_from(skipped.len()).unwrap_or(u32::MAX));
    println!("{passed} passed, {} failed, {count} skipped", tally.failed());
    let _ = io::stdout().flush();
    tally.failed() == 0 && !(deny && unexpected > 0)
}

/// Tests in documentation carry the number of their line, which says nothing to a list.
fn without_line(name: &str) -> &str {
    name.split_once(" (line ").map_or(name, |(name, _)| name)
}

fn read_allowed(path: &Path) -> Result<BTreeMap<String, String>> {
    let text = fs::read_to_string(path).map_err(|e| Error::file("read", path, &e))?;
    let mut allowed = BTreeMap::new();
    for line in text.lines().filter(|line| !line.trim().is_empty() && !line.starts_with('#')) {
        let Some((name, reason)) = line.split_once(": ") else {
            return Err(Error::new(
                format!("{} has a line without a reason", path.display()),
                line.to_owned(),
            )
            .fix("write it as NAME: REASON"));
        };
        allowed.insert(name.trim().to_owned(), reason.trim().to_owned());
    }
    Ok(allowed)
}

fn read_skips(path: &Path) -> Result<BTreeMap<String, String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(text
            .lines()
            .filter_map(|line| line.split_once('\t'))
            .map(|(name, reason)| (name.to_owned(), reason.to_owned()))
            .collect()),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(BTreeMap::new()),
        Err(e) => Err(Error::file("read", path, &e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn skips_count_as_skips() {
        let mut tally = Tally::default();
        tally.test_line("running 2 tests");
        tally.test_line("test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
        tally.end(None);
        let list = |name: &str| BTreeMap::from([(name.to_owned(), "reason".to_owned())]);
        let time = Duration::ZERO;
        assert!(report(&tally, &list("x"), &BTreeMap::new(), false, time));
        assert!(report(&tally, &list("x"), &list("x"), true, time));
        assert!(!report(&tally, &list("x"), &list("y"), true, time));
        assert_eq!(without_line("src/lib.rs - f (line 12)"), "src/lib.rs - f");
    }
}
