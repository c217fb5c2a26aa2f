//! `cargo xtask bench rng`: our entropy daemon beside the floors and beside rust-vmm's, driver and back-end on one CPU,
//! in turns. What is measured and how: `vhost-probe bench --help`.
use std::fs;
use std::path::Path;
use std::process::Command;

use super::peer::Peer;
use super::wait;
use crate::error::{Error, Result};
use crate::progress::note;
use crate::workspace::Workspace;

const PEER: Peer = Peer { name: "vhost-device-rng", version: "0.1.0" };

/// What is measured if the arguments say nothing else. All of it takes a minute, once everything is built.
const DEFAULTS: [(&str, &str); 5] = [
    ("--placement", "same"),
    ("--depth", "1,32"),
    ("--size", "64,65536"),
    ("--rounds", "8"),
    ("--round-ms", "100"),
];

pub(super) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let built = workspace.build(&["vhost-device-rng".to_owned(), "vhost-probe".to_owned()])?;
    let peer = PEER.get();
    let plots = workspace.target().join("bench");
    fs::create_dir_all(&plots).map_err(|e| Error::file("make", &plots, &e))?;
    let (svg, json) = (plots.join("rng.svg"), plots.join("rng.json"));
    let spawn = |name: &str, program: &Path, flag: &str| format!("{name}={} {flag} {{}}", program.display());
    let mut probe = Command::new(built.join("vhost-probe"));
    probe.arg("bench");
    for (flag, value) in DEFAULTS {
        if !arguments.iter().any(|given| given.split('=').next() == Some(flag)) {
            probe.args([flag, value]);
        }
    }
    probe.arg("--svg").arg(&svg).arg("--json").arg(&json);
    probe.args(["--spawn", &spawn("ours", &built.join("vhost-device-rng"), "--socket-path")]);
    if let Ok(program) = &peer {
        probe.args(["--spawn", &spawn("rust-vmm", program, "--socket-path")]);
    }
    for old in [&svg, &json] {
        // Of an earlier run; it may not be there.
        let _ = fs::remove_file(old);
    }
    let stood = wait(probe.args(arguments))?;
    println!();
    if let Err(why) = peer {
        println!("MISSING {} {}: {why}", PEER.name, PEER.version);
    }
    if svg.exists() {
        note(&format!("plot: {}; all figures: {}", svg.display(), json.display()));
    }
    Ok(stood)
}
