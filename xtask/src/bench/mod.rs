//! `cargo xtask bench`: our speed beside that of others, in one run.

use std::process::{Command, Stdio};
use std::time::Duration;

use backplane_tests::process::Owned;

use crate::command;
use crate::error::{Error, Result};
use crate::workspace::{Workspace, cargo};

mod block;
mod console;
mod peer;
mod probe;
mod rng;
mod vsock;

/// What can be measured.
pub(crate) const NAMES: [(&str, &str); 7] = [
    ("bus", "our buses and registers beside bare ones and rust-vmm's vm-device (2 minutes)"),
    ("rings", "our virtqueues beside a bare loop and rust-vmm's virtio-queue (5 minutes)"),
    ("daemon", "what a daemon costs beside its requests: start, memory, wake-ups (1 minute)"),
    ("block", "our block daemon beside a floor and QEMU's storage daemon (3 minutes)"),
    ("console", "our console daemon beside the floors and rust-vmm's vhost-device-console (1 minute)"),
    ("rng", "our entropy daemon beside the floors and rust-vmm's vhost-device-rng (2 minutes)"),
    (
        "vsock",
        "our socket daemon beside rust-vmm's vhost-device-vsock and Unix sockets themselves (1 minute)",
    ),
];

/// Prints what there is.
pub(crate) fn list() -> Result<bool> {
    for (name, what) in NAMES {
        println!("cargo xtask bench {name:8} {what}");
    }
    Ok(true)
}

/// Runs one benchmark; whether it ended well.
pub(crate) fn run(name: &str, arguments: &[String]) -> Result<bool> {
    let workspace = Workspace::read()?;
    match name {
        "block" => return block::run(&workspace, arguments),
        "console" => return console::run(&workspace, arguments),
        "rng" => return rng::run(&workspace, arguments),
        "vsock" => return vsock::run(&workspace, arguments),
        _ => {}
    }
    if name == "bus" {
        return wait(bus(&workspace).args(arguments));
    }
    let mut bench = cargo();
    bench.current_dir(&workspace.root).args(["bench", "--package", "backplane-bench", "--bench", name]);
    if !arguments.is_empty() {
        bench.arg("--").args(arguments);
    }
    wait(&mut bench)
}

/// The peer has the name of a crate of ours, so this is a workspace of its own.
fn bus(workspace: &Workspace) -> Command {
    let mut bus = cargo();
    bus.current_dir(workspace.path("bench/bus")).args(["run", "--release", "--target-dir"]);
    bus.arg(workspace.target().join("bench-bus")).arg("--");
    bus
}

/// Runs it to its end, its output going where ours does.
fn wait(program: &mut Command) -> Result<bool> {
    let shown = program.get_program().display().to_string();
    let failed = |e: std::io::Error| Error::new(format!("cannot run `{shown}`"), e.to_string());
    let mut child = Owned::spawn(program.stdin(Stdio::null())).map_err(failed)?;
    loop {
        command::stop_if_interrupted()?;
        if let Some(status) = child.wait_for(Duration::from_millis(100)).map_err(failed)? {
            return Ok(status.success());
        }
    }
}
