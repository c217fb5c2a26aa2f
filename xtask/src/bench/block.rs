//! `cargo xtask bench block`: our block daemon beside a floor (one `preadv` or `pwritev` a request) and beside QEMU's storage
//! daemon (io_uring and threads), in turns. What is measured and how: `vhost-probe bench --help`.
use std::path::Path;

use super::probe::{Figure, Probe, Target, table};
use crate::command;
use crate::error::Result;
use crate::progress::note;
use crate::workspace::Workspace;

const PEER: &str = "qemu-storage-daemon";
const FLOOR: &str = "floor-preadv";

/// One run of the probe: its name, its arguments, whether the images are in memory, who is measured.
struct Set {
    name: &'static str,
    arguments: &'static [&'static str],
    in_memory: bool,
    who: Who,
}

#[derive(Clone, Copy, PartialEq)]
enum Who {
    /// Ours and the peers.
    All,
    /// Ours with polling: the floor polls, too.
    Polling,
    /// With backends that carry nothing out.
    Null,
}

/// What each run has unless it says otherwise.
const ALWAYS: [(&str, &str); 4] =
    [("--device", "blk"), ("--rounds", "6"), ("--round-ms", "100"), ("--placement", "same")];

const SETS: [Set; 6] = [
    Set {
        name: "block-cached",
        arguments: &["--load", "randread", "--depth", "1,32"],
        in_memory: false,
        who: Who::All,
    },
    Set {
        name: "block-memory",
        arguments: &["--load", "randread,randwrite", "--depth", "1,32"],
        in_memory: true,
        who: Who::All,
    },
    Set {
        name: "block-queues",
        arguments: &["--load", "randread", "--depth", "32", "--queues", "2,4", "--layout", "split"],
        in_memory: false,
        who: Who::All,
    },
    Set {
        name: "block-null",
        arguments: &["--load", "randread", "--depth", "1,32"],
        in_memory: false,
        who: Who::Null,
    },
    Set {
        name: "block-cross",
        arguments: &["--load", "randread", "--placement", "cross", "--depth", "128"],
        in_memory: false,
        who: Who::All,
    },
    Set {
        name: "block-polling",
        arguments: &[
            "--load",
            "randread",
            "--placement",
            "cross",
            "--depth",
            "1,128",
            "--floor-poll-us",
            "100",
        ],
        in_memory: false,
        who: Who::Polling,
    },
];

/// Long requests, on their own for their size.
const SEQUENTIAL: Set = Set {
    name: "block-sequential",
    arguments: &["--load", "read,write", "--placement", "cross", "--depth", "32", "--size", "131072"],
    in_memory: true,
    who: Who::All,
};

const fn target(case: &'static str, figure: Figure, floor: f64, ours: f64) -> Target {
    Target { case, who: "ours", floor: FLOOR, figure, set: (floor, ours) }
}

/// What was asked when the project began: beside a floor that was measured then, on another machine.
const TARGETS: [Target; 15] = [
    target("randread, split, same CPU, depth 1, 4096 bytes", Figure::Latency, 4.2, 4.7),
    target("randread, split, same CPU, depth 1, 4096 bytes", Figure::Cpu, 2.3, 2.7),
    target("randread, packed, same CPU, depth 1, 4096 bytes", Figure::Latency, 4.2, 4.7),
    target("randread, packed, same CPU, depth 1, 4096 bytes", Figure::Cpu, 2.3, 2.7),
    target("randread, split, same CPU, depth 32, 4096 bytes", Figure::Both, 1000.0 / 776.0, 1000.0 / 650.0),
    target("randread, split, same CPU, depth 32, 4096 bytes", Figure::Cpu, 1.2, 1.5),
    target("randread, packed, same CPU, depth 32, 4096 bytes", Figure::Both, 1000.0 / 776.0, 1000.0 / 650.0),
    target("randread, packed, same CPU, depth 32, 4096 bytes", Figure::Cpu, 1.2, 1.5),
    target("randwrite, split, same CPU, depth 1, 4096 bytes", Figure::Latency, 4.6, 5.1),
    target("randwrite, split, same CPU, depth 1, 4096 bytes", Figure::Cpu, 3.2, 3.6),
    target("randwrite, packed, same CPU, depth 1, 4096 bytes", Figure::Latency, 4.6, 5.1),
    target("randread, split, two CPUs, depth 128, 4096 bytes", Figure::Rate, 494.0, 450.0),
    Target {
        who: "ours-poll",
        ..target("randread, split, two CPUs, depth 128, 4096 bytes", Figure::Rate, 637.0, 570.0)
    },
    Target {
        who: "ours-poll",
        ..target("randread, split, two CPUs, depth 1, 4096 bytes", Figure::Latency, 21.0, 21.0)
    },
    target("read, split, two CPUs, depth 32, 131072 bytes", Figure::Rate, 5.1, 5.0),
];

pub(super) fn run(workspace: &Workspace, arguments: &[String]) -> Result<bool> {
    let built = workspace.build(&["vhost-device-block".to_owned(), "vhost-probe".to_owned()])?;
    let probe = Probe::new(workspace, &built)?;
    let peer = command::found(PEER);
    let ours = built.join("vhost-device-block");
    let (mut stood, mut runs) = (true, Vec::new());
    for set in SETS.iter().chain([&SEQUENTIAL]) {
        println!("\n{}{}", set.name, if set.in_memory { " (images in /dev/shm)" } else { "" });
        let mut words: Vec<String> = set.arguments.iter().map(|word| (*word).to_owned()).collect();
        if set.in_memory {
            words.extend(["--disk-dir", "/dev/shm"].map(str::to_owned));
        }
        for spawned in contenders(set.who, &ours, peer) {
            words.extend(["--spawn".to_owned(), spawned]);
        }
        for (flag, value) in ALWAYS {
            if !words.iter().chain(arguments).any(|word| word.split('=').next() == Some(flag)) {
                words.extend([flag, value].map(str::to_owned));
            }
        }
        words.extend(arguments.iter().cloned());
        let (all, figures) = probe.run(set.name, &words)?;
        stood &= all;
        runs.push(figures);
    }
    print!("{}", table(&TARGETS, &runs));
    println!();
    if !peer {
        println!("MISSING {PEER} (Debian: qemu-utils)");
    }
    note(&format!("all figures: {}", probe.file("block-*.json").display()));
    Ok(stood)
}

/// Their names and commands.
fn contenders(who: Who, ours: &Path, peer: bool) -> Vec<String> {
    let ours = ours.display();
    let flags = "--socket-path {} --num-queues {queues}";
    let export = "--export vhost-user-blk,id=e,node-name=d,writable=on,num-queues={queues},addr.type=unix,addr.path={}";
    let file = "--blockdev file,node-name=d,filename={disk}";
    let mut all = match who {
        Who::All => vec![format!("ours={ours} {flags} --blk-file {{disk}}")],
        Who::Polling => vec![format!("ours-poll={ours} {flags} --blk-file {{disk}} --poll-us 100")],
        Who::Null => vec![format!("ours={ours} {flags} --format null --blk-file 256M")],
    };
    if peer {
        all.extend(match who {
            Who::All => vec![
                format!("qsd-io_uring={PEER} {file},aio=io_uring {export}"),
                format!("qsd-threads={PEER} {file},aio=threads {export}"),
            ],
            Who::Polling => Vec::new(),
            Who::Null => {
                vec![format!("qsd-null={PEER} --blockdev null-co,node-name=d,size=268435456 {export}")]
            }
        });
    }
    all
}
