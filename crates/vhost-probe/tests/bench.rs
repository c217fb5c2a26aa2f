//! `vhost-probe bench` and the load behind it, with floors for back-ends: the figures are of requests that were really
//! answered, and a back-end that ends or falls silent is an error and no hang.
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use virtio_testkit::load::{Entropy, LoadError, LoadOptions, LoadSession, Requests, Target};
use virtio_testkit::{Buf, RingLayout, TestRam};
use vm_memory::VolatileSlice;
use vm_virtio::Features;

const PROBE: &str = env!("CARGO_BIN_EXE_vhost-probe");
const SHORT: Duration = Duration::from_millis(20);

struct Floor(Child);

impl Floor {
    fn start(name: &str) -> (Floor, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let stdin = Stdio::from(OwnedFd::from(theirs));
        (Floor(Command::new(PROBE).args(["floor", name]).stdin(stdin).spawn().unwrap()), ours)
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

    fn check(&mut self, _slot: usize, written: u32, _buffers: &[VolatileSlice<'_>]) -> Result<(), String> {
        if written == 520 { Ok(()) } else { Err(format!("{written} bytes")) }
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
    for layout in RingLayout::ALL {
        for without in without {
            // 64 entries: rings wrap often, and chains of three meet their end in every way.
            for depth in [1, 5, 21] {
                let ram = TestRam::spread(2, 1 << 20);
                let (floor, socket) = Floor::start("floor-ring");
                let target = Target::Connected(socket, floor.0.id());
                let options =
                    LoadOptions { layout, depth, queue_size: 64, without, ..LoadOptions::default() };
                let mut session = LoadSession::open(target, &ram, options, Three).unwrap();
                assert_eq!(session.features() & without, Features::empty());
                for _ in 0..2 {
                    let round = session.round(SHORT).unwrap();
                    assert!(round.requests >= u64::from(depth), "{layout:?} {without:?} {depth}: {round:?}");
                    assert_eq!(round.bytes, round.requests * 520);
                    assert_eq!(round.latency.total(), round.requests);
                    assert!(round.kicks > 0 && round.elapsed >= SHORT && !round.backend_cpu.is_zero());
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
    let mut session = LoadSession::open(target, &ram, options, Entropy::new(64)).unwrap();
    let round = session.round(SHORT).unwrap();
    assert_eq!(round.bytes, 64 * round.requests);
}

#[test]
fn a_back_end_that_ends_or_falls_silent_is_an_error() {
    let ram = TestRam::spread(2, 1 << 20);
    let patience = Duration::from_millis(300);
    let options = LoadOptions { depth: 4, patience, ..LoadOptions::default() };
    for (signal, silent) in [("-STOP", true), ("-KILL", false)] {
        let (floor, socket) = Floor::start("floor-getrandom");
        let target = Target::Connected(socket, floor.0.id());
        let mut session = LoadSession::open(target, &ram, options, Entropy::new(64)).unwrap();
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
    match LoadSession::open(target, &ram, options, Three).err() {
        Some(LoadError::Depth { depth: 22, each: 3, size: 64 }) => {}
        other => panic!("{other:?}"),
    }
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
    assert!(table.contains("split, same CPU, depth 2, 64 bytes"), "{table}");
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
