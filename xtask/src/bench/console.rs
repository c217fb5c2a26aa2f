//! `cargo xtask bench console`: our console daemon's output beside the floors and beside rust-vmm's, driver, back-end and whoever
//! reads on one CPU, in turns. What is measured and how: `vhost-probe bench --help`.
use super::peer::Peer;
use super::probe::Probe;
use crate::error::Result;
use crate::progress::note;
use crate::workspace::Workspace;

const PEER: Peer = Peer { name: "vhost-device-console", version: "0.1.0" };

/// What is measured if the arguments say nothing else.
const DEFAULTS: [(&str, &str); 8] = [
    ("--device", "console"),
    ("--load", "file,shm,disk,unix,tcp"),
    ("--placement", "same"),
    ("--depth", "32"),
    ("--size", "64,4096"),
    // As many entries as rust-vmm's has.
    ("--queue-size", "128"),
    ("--rounds", "8"),
    ("--round-ms", "100"),
];

pub(super) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let built = workspace.build(&["vhost-device-console".to_owned(), "vhost-probe".to_owned()])?;
    let probe = Probe::new(workspace, &built)?;
    let peer = PEER.get();
    let mut words = Vec::new();
    for (flag, value) in DEFAULTS {
        if !arguments.iter().any(|given| given.split('=').next() == Some(flag)) {
            words.extend([flag, value].map(str::to_owned));
        }
    }
    let mut spawn = |name: &str, program: &std::path::Path, flags: &str| {
        words.extend(["--spawn".to_owned(), format!("{name}={} {flags}", program.display())]);
    };
    let ours = built.join("vhost-device-console");
    spawn("ours", &ours, "--socket-path {} --port backend={backend}");
    if let Ok(program) = &peer {
        // It has TCP only.
        spawn("rust-vmm", program, "--socket-path {} --backend network --tcp-port {tcp}");
    }
    words.extend(arguments.iter().cloned());
    let (stood, _) = probe.run("console", &words)?;
    println!();
    if let Err(why) = peer {
        println!("MISSING {} {}: {why}", PEER.name, PEER.version);
    }
    note(&format!("all figures: {}", probe.file("console.json").display()));
    Ok(stood)
}
