//! `cargo xtask bench vsock`: our socket daemon beside rust-vmm's, a floor and Unix sockets themselves, in turns on one CPU.
//! What is measured and how: `bench/benches/vsock.rs`.
use super::peer::Peer;
use super::wait;
use crate::error::Result;
use crate::workspace::{Workspace, cargo};

const PEER: Peer = Peer { name: "vhost-device-vsock", version: "0.3.0" };

pub(super) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let built = workspace.build(&["vhost-device-vsock".to_owned()])?;
    let peer = PEER.get();
    let mut bench = cargo();
    bench.current_dir(&workspace.root).args([
        "bench",
        "--package",
        "backplane-bench",
        "--bench",
        "vsock",
        "--",
    ]);
    bench.arg(format!("ours={}", built.join("vhost-device-vsock").display()));
    if let Ok(program) = &peer {
        bench.arg(format!("rust-vmm={}", program.display()));
    }
    let stood = wait(bench.args(arguments))?;
    if let Err(why) = peer {
        println!("MISSING {} {}: {why}", PEER.name, PEER.version);
    }
    Ok(stood)
}
