//! `vhost-probe bench` and the load behind it, with floors for back-ends: the figures are of requests that were really
//! answered, and a back-end that ends or falls silent is an error and no hang.
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use virtio_testkit::load::{
    Access, BlockRequests, Disk, Entropy, LoadError, LoadOptions, LoadSession, Requests, Target,
};
use virtio_testkit::{Buf, RingLayout, TestRam};
use vm_memory::VolatileSlice;
use vm_virtio::Features;

const PROBE: &str = env!("CARGO_BIN_EXE_vhost-probe");
const SHORT: Duration = Duration::from_millis(20);

struct Floor(Child);

impl Floor {
    fn start(name: &str) -> (Floor, UnixStream) {
        Floor::with(&[name])
    }

    fn on(file: &Path) -> (Floor, UnixStream) {
        Floor::with(&["floor-preadv", "--poll-us", "20", "--file", file.to_str().unwrap()])
    }

    fn with(arguments: &[&str]) -> (Floor, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stdin = Stdio::from(OwnedFd::from(theirs));
        (Floor(Command::new(PROBE).arg("floor").args(arguments).stdin(stdin).spawn().unwrap()), ours)
    }

    fn signal(&self, signal: &str) {
        let sent = Command::new("kill").args([signal, &self.0.id().to_string()]).status().unwrap();
        assert!(sent.success());
    }
}

impl Drop for Floor {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Requests as a disk has them: readable, writable, writable. The floor writes a number into each writable element.
struct Three;

impl Requests for Three {
    fn chain(&mut self, _slot: usize, ram: &TestRam) -> Vec<Buf> {
        vec![ram.readable(&[7; 16]), ram.writable(512), ram.writable(8)]
    }

    fn prepare(&mut self, _slot: usize, buffers: &[VolatileSlice<'_>]) {
        assert_eq!(buffers.iter().map(VolatileSlice::len).collect::<Vec<_>>(), [16, 512, 8]);
    }

    fn check(&mut self, _slot: usize, written: u32, _buffers: &[VolatileSlice<'_>]) -> Result<u64, String> {
        if written == 520 { Ok(520) } else { Err(format!("{written} bytes")) }
    }
}

#[test]
fn every_kind_of_ring_is_loaded_at_every_depth() {
    let without = [
        Features::empty(),
        Features::EVENT_IDX,
        Features::INDIRECT_DESC,
        Features::EVENT_IDX | Features::INDIRECT_DESC,
    ];
    let deadline = Instant::now() + Duration::from_secs(300);
    for layout in RingLayout::ALL {
        for without in without {
            // 64 entries: rings wrap often, and chains of three meet their end in every way.
            for depth in [1, 5, 21] {
                let ram = TestRam::spread(2, 1 << 20);
                let (floor, socket) = Floor::start("floor-ring");
                let target = Target::Connected(socket, floor.0.id());
                let options =
                    LoadOptions { layout, depth, queue_size: 64, without, ..LoadOptions::default() };
                let mut session = LoadSession::open(target, &ram, options, vec![(0, Three)]).unwrap();
                assert_eq!(session.features() & without, Features::empty());
                for _ in 0..2 {
                    let mut round = session.round(SHORT).unwrap();
                    // On a busy machine a round may be over before the back-end had a CPU again.
                    while round.kicks == 0 || round.backend_cpu.is_zero() {
                        assert!(Instant::now() < deadline, "{round:?}");
                        round = session.round(SHORT).unwrap();
                    }
                    assert!(round.requests >= u64::from(depth), "{layout:?} {without:?} {depth}: {round:?}");
                    assert_eq!(round.bytes, round.requests * 520);
                    assert_eq!(round.latency.total(), round.requests);
                    assert!(round.elapsed >= SHORT);
                    assert!(round.both_us() > round.backend_us());
                }
                ram.check_guards().unwrap();
            }
        }
    }
}

#[test]
fn random_bytes_are_checked() {
    let ram = TestRam::spread(2, 1 << 20);
    let (floor, socket) = Floor::start("floor-getrandom");
    let target = Target::Connected(socket, floor.0.id());
    let options = LoadOptions { depth: 4, ..LoadOptions::default() };
    let mut session = LoadSession::open(target, &ram, options, vec![(0, Entropy::new(64))]).unwrap();
    let round = session.round(SHORT).unwrap();
    assert_eq!(round.bytes, 64 * round.requests);
}

#[test]
fn a_back_end_that_ends_or_falls_silent_is_an_error() {
    let ram = TestRam::spread(2, 1 << 20);
    // Longer than a back-end that lives needs on any machine.
    for (signal, patience) in [("-STOP", Duration::from_secs(3)), ("-KILL", Duration::from_secs(30))] {
        let silent = signal == "-STOP";
        let options = LoadOptions { depth: 4, patience, ..LoadOptions::default() };
        let (floor, socket) = Floor::start("floor-getrandom");
        let target = Target::Connected(socket, floor.0.id());
        let mut session = LoadSession::open(target, &ram, options, vec![(0, Entropy::new(64))]).unwrap();
        session.round(SHORT).unwrap();
        floor.signal(signal);
        // It may die while its figures are read.
        match session.round(SHORT).unwrap_err() {
            LoadError::Silent(after, 4) => assert!(silent && after == patience),
            LoadError::Gone(4) | LoadError::Placement(_) => assert!(!silent),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn more_requests_than_the_ring_has_room_for_are_refused() {
    let ram = TestRam::spread(2, 1 << 20);
    let (floor, socket) = Floor::start("floor-ring");
    let target = Target::Connected(socket, floor.0.id());
    let without = Features::INDIRECT_DESC;
    let options = LoadOptions { depth: 22, queue_size: 64, without, ..LoadOptions::default() };
    match LoadSession::open(target, &ram, options, vec![(0, Three)]).err() {
        Some(LoadError::Depth { depth: 22, each: 3, size: 64 }) => {}
        other => panic!("{other:?}"),
    }
}

const MIB: u64 = 1 << 20;

/// Queues of one disk, each with its part of it.
fn blocks(access: Access, size: u32, disk: &Arc<Disk>, queues: u16) -> Vec<(u16, BlockRequests)> {
    (0..queues)
        .map(|queue| (queue, BlockRequests::new(access, size, Some(Arc::clone(disk)), (queue, queues))))
        .collect()
}

#[test]
fn disks_are_read_and_written_with_every_access_over_several_queues() {
    let folder = Folder::new("disks");
    let disk = Arc::new(Disk::make(Path::new(&folder.path("disk")), 4 * MIB).unwrap());
    for layout in RingLayout::ALL {
        for access in Access::ALL {
            for (queues, depth, size) in [(1, 1, 4096), (2, 8, 4096), (4, 3, 128 << 10)] {
                let ram = TestRam::spread(2, 16 * MIB);
                let (floor, socket) = Floor::on(disk.path());
                let target = Target::Connected(socket, floor.0.id());
                let options = LoadOptions { layout, depth, queues, ..LoadOptions::default() };
                let loads = blocks(access, size, &disk, queues);
                let mut session = LoadSession::open(target, &ram, options, loads).unwrap();
                for _ in 0..2 {
                    let round = session.round(SHORT).unwrap();
                    assert!(round.requests >= u64::from(depth * queues), "{layout:?} {access:?}: {round:?}");
                    assert_eq!(round.bytes, round.requests * u64::from(size));
                }
                session.verify().unwrap();
                assert!(session.resident_kib().unwrap() > 0);
                ram.check_guards().unwrap();
            }
        }
    }
}

#[test]
fn wrong_contents_and_lost_writes_are_found() {
    let folder = Folder::new("wrong");
    let disk = Arc::new(Disk::make(Path::new(&folder.path("disk")), MIB).unwrap());
    let options = LoadOptions { depth: 4, ..LoadOptions::default() };
    let open = |ram, access, file: &Path| {
        let (floor, socket) = Floor::on(file);
        let target = Target::Connected(socket, floor.0.id());
        (LoadSession::open(target, ram, options, blocks(access, 4096, &disk, 1)).unwrap(), floor)
    };
    let ram = TestRam::spread(2, MIB);
    // Each back-end has another file than is looked at: an empty one, and one that takes the writes.
    let other = folder.path("other");
    std::fs::write(&other, vec![0; MIB as usize]).unwrap();
    let (mut session, _floor) = open(&ram, Access::RandomRead, Path::new(&other));
    assert!(matches!(session.round(SHORT), Err(LoadError::Answer(what)) if what.contains("other contents")));
    let (mut session, _floor) = open(&ram, Access::RandomWrite, Path::new(&other));
    session.round(SHORT).unwrap();
    assert!(matches!(session.verify(), Err(LoadError::Answer(what)) if what.contains("is lost")));
    // A status that was not written.
    let (floor, socket) = Floor::start("floor-ring");
    let target = Target::Connected(socket, floor.0.id());
    let loads = blocks(Access::RandomWrite, 4096, &disk, 1);
    let mut session = LoadSession::open(target, &ram, options, loads).unwrap();
    assert!(matches!(session.round(SHORT), Err(LoadError::Answer(what)) if what.contains("status")));
}

#[test]
fn more_queues_than_there_are_is_not_offered() {
    let ram = TestRam::spread(2, MIB);
    let (floor, socket) = Floor::start("floor-status");
    let target = Target::Connected(socket, floor.0.id());
    let options = LoadOptions { queues: 17, ..LoadOptions::default() };
    let session = LoadSession::open(target, &ram, options, vec![(0, Entropy::new(64))]);
    assert!(matches!(session.err(), Some(LoadError::NotOffered(_))));
}

fn bench(arguments: &[&str]) -> Output {
    let quick = ["--rounds", "2", "--round-ms", "10", "--placement", "same", "--depth", "2"];
    Command::new(PROBE).arg("bench").args(quick).args(arguments).output().unwrap()
}

/// A folder of its own, gone at the end.
struct Folder(std::path::PathBuf);

impl Folder {
    fn new(name: &str) -> Folder {
        let path = std::env::temp_dir().join(format!("vhost-probe-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Folder(path)
    }

    fn path(&self, name: &str) -> String {
        self.0.join(name).to_str().unwrap().to_owned()
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn floors_are_in_the_table_the_json_and_the_plot_and_a_failed_back_end_is_named() {
    let folder = Folder::new("table");
    let (socket, json, svg) = (folder.path("closing.sock"), folder.path("out.json"), folder.path("out.svg"));
    let listener = UnixListener::bind(&socket).unwrap();
    // Takes connections and ends them.
    std::thread::spawn(move || listener.incoming().for_each(drop));
    let named = format!("bad<1>={socket}");
    let output = bench(&[&named, "--json", &json, "--svg", &svg]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success());
    assert!(table.contains("read, split, same CPU, depth 2, 64 bytes"), "{table}");
    assert!(table.contains("packed, same CPU, depth 2, 64 bytes"), "{table}");
    assert!(
        table.contains("floor-getrandom") && table.contains("bad<1>") && table.contains("FAILED"),
        "{table}"
    );
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["version"], 1);
    let contenders = report["cases"][0]["contenders"].as_array().unwrap();
    assert_eq!(contenders[1]["measured"]["time_to_floor"]["median"], 1.0);
    assert!(contenders[0]["measured"]["requests"].as_u64() > Some(0));
    let counted = contenders[0]["measured"]["histogram_ns"].as_array().unwrap().iter();
    assert_eq!(
        counted.map(|bucket| bucket[1].as_u64().unwrap()).sum::<u64>(),
        contenders[0]["measured"]["requests"]
    );
    assert!(contenders[2]["error"].as_str().unwrap().starts_with("FAILED"), "{}", contenders[2]);
    let svg = std::fs::read_to_string(svg).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n") && svg.contains("bad&lt;1&gt;"));
}

#[test]
fn a_back_end_that_does_not_start_is_named() {
    let output = bench(&["--layout", "split", "--spawn", "gone=false {}", "--spawn", "none=/nonexistent {}"]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(!output.status.success());
    assert!(table.contains("ended before it listened"), "{table}");
    assert_eq!(table.matches("FAILED").count(), 2, "{table}");
    let output = bench(&["--spawn", "nosocket=true"]);
    assert_eq!(output.status.code(), Some(2));
}

/// What a console writes to a file has to be there in the end: one `write` each, or one for all that are available.
#[test]
fn floors_of_a_console_write_everything() {
    // Any program will do: what it cannot is in its own rows.
    let output =
        bench(&["--device", "console", "--load", "shm", "--size", "64", "--spawn", "none=true {backend} {}"]);
    let table = String::from_utf8(output.stdout).unwrap();
    let rows = |name: &str| {
        table.lines().filter(|line| line.split_whitespace().next() == Some(name)).collect::<Vec<_>>()
    };
    for name in ["floor-ring", "floor-write", "floor-write-batch", "none"] {
        let rows = rows(name);
        assert_eq!(rows.len(), 2, "{name}: one for each layout\n{table}");
        assert!(rows.iter().all(|row| row.contains("FAILED") == (name == "none")), "{table}");
    }
}

#[test]
fn images_are_made_for_commands_that_name_one_and_only_they_are_written_to() {
    let folder = Folder::new("images");
    let json = folder.path("out.json");
    let blk = ["--device", "blk", "--load", "randread,randwrite", "--queues", "1,2", "--layout", "split"];
    let own = ["--disk-dir", folder.0.to_str().unwrap(), "--disk-mib", "1", "--json", &json];
    // Any program that stays will do to see its words: it makes no socket.
    let see = format!("see=touch {}/saw{{queues}} {{disk}}.seen {{}}.no", folder.0.display());
    let output = bench(&[&blk[..], &own, &["--spawn", &see]].concat());
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("floor-preadv"), "{table}");
    assert!(table.contains("randwrite, split, same CPU, 2 queues, depth 2, 4096 bytes"), "{table}");
    let names: Vec<String> = std::fs::read_dir(&folder.0)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert!(names.iter().any(|name| name == "saw2"), "{names:?}");
    // One for each contender for all cases, gone at the end.
    assert_eq!(names.iter().filter(|name| name.ends_with(".seen")).count(), 1, "{names:?}");
    assert!(!names.iter().any(|name| name.ends_with("-0") || name.ends_with("-1")), "{names:?}");
    let report: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(json).unwrap()).unwrap();
    assert_eq!(report["cases"][3]["load"], "randwrite");
    assert_eq!(report["cases"][3]["queues"], 2);
    // A disk of somebody else's is not written to.
    let missing = folder.path("nobody.sock");
    let output = bench(&["--device", "blk", "--load", "write", "--layout", "split", &missing]);
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(table.contains("floor-status") && table.contains("--overwrite"), "{table}");
    assert_eq!(bench(&["--device", "blk", "--load", "nonsense", &missing]).status.code(), Some(2));
}
