//! `vhost-proxy` with whole daemons as its other half: ours, killed under load, QEMU's storage daemon, and virtiofsd.

use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{collections::HashMap, env};

use backplane_tests::daemon::{self, Daemon};
use backplane_tests::failure::Failure;
use backplane_tests::lab;
use backplane_tests::process::Owned;
use backplane_tests::scratch::Scratch;
use backplane_tests::skip;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use vhost_proxy::{ConfigSource, Proxy, ProxyError, ProxyOptions, ProxyStats};
use virtio_testkit::{Buf, RingDriver, RingLayout, TestRam, Used};
use vm_virtio::{
    DeviceType, Engine, EngineOptions, EventFd, Features, HostEvent, HostEvents, Kick, QueueStart, Status,
    WaitFor,
};

const SOON: Duration = Duration::from_secs(30);

struct Deaf;

impl HostEvents for Deaf {
    fn event(&self, _: HostEvent) {}
}

struct Line {
    ring: RingDriver,
    kick: OwnedFd,
    call: OwnedFd,
}

/// A driver in this process, before a proxied device.
struct Guest {
    engine: Engine<Proxy>,
    lane: Option<JoinHandle<()>>,
    ram: TestRam,
    lines: Vec<Line>,
    stats: Arc<ProxyStats>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.engine.shutdown();
        if let Some(lane) = self.lane.take() {
            let _ = lane.join();
        }
    }
}

impl Guest {
    fn new(socket: &Path, options: ProxyOptions, layout: RingLayout) -> Guest {
        let deadline = Instant::now() + SOON;
        let proxy = loop {
            match Proxy::connect(socket, options.clone()) {
                Ok(proxy) => break proxy,
                // It has not got as far as listening.
                Err(ProxyError::Connect(_)) if Instant::now() < deadline => {
                    thread::sleep(Duration::from_millis(10));
                }
                Err(error) => panic!("no back-end: {error}"),
            }
        };
        let stats = proxy.stats();
        let (engine, mut lanes) = Engine::new(proxy, EngineOptions::new(Arc::new(Deaf))).expect("a device");
        let lane = lanes.pop().map(|lane| thread::spawn(move || lane.run()));
        let ram = TestRam::spread(2, 8 << 20);
        let own = engine.offered() - Features::NOT_A_DEVICES;
        let features = engine.offered() & (own | layout.features());
        assert_eq!(features.contains(Features::RING_PACKED), layout == RingLayout::Packed);
        let file = || eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).expect("an eventfd");
        let status = Status::ACKNOWLEDGE | Status::DRIVER;
        engine.set_status(status).wait();
        engine.set_driver_features(features).expect("features that are offered");
        engine.set_status(status | Status::FEATURES_OK).wait();
        engine.memory(ram.ram(), WaitFor::NewRequests).wait();
        let mut lines = Vec::new();
        for queue in 0..engine.queues().len() as u16 {
            let line = Line { ring: RingDriver::new(&ram, layout, 64, features), kick: file(), call: file() };
            let call = EventFd::new(line.call.try_clone().expect("a descriptor")).expect("an eventfd");
            let start = QueueStart {
                config: line.ring.queue_config(),
                state: None,
                inflight: None,
                kick: Kick::Fd(line.kick.try_clone().expect("a descriptor")),
                call: Some(Arc::new(call)),
            };
            engine.start(queue, start).wait().expect("a ring that starts");
            engine.enable(queue, true).wait();
            lines.push(line);
        }
        engine.set_status(status | Status::FEATURES_OK | Status::DRIVER_OK).wait();
        Guest { engine, lane, ram, lines, stats }
    }

    fn submit(&mut self, queue: usize, chain: &[Buf]) -> u16 {
        let line = &mut self.lines[queue];
        let id = line.ring.add(chain);
        if line.ring.kick_wanted() {
            let _ = rustix::io::write(&line.kick, &1u64.to_ne_bytes());
        }
        id
    }

    /// By interrupts alone.
    fn wait_used(&mut self, queue: usize) -> Option<Used> {
        let deadline = Instant::now() + SOON;
        loop {
            let line = &mut self.lines[queue];
            if let Some(used) = line.ring.used() {
                return Some(used);
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            let _ = poll(&mut [PollFd::new(&line.call, PollFlags::IN)], Some(&timeout));
            let _ = rustix::io::read(&line.call, &mut [0; 8]);
        }
    }
}

#[test]
fn proxied_entropy_survives_a_daemon_that_is_killed_under_load() -> Result<(), Failure> {
    let test = "proxied_entropy_survives_a_daemon_that_is_killed_under_load";
    if env::var_os(daemon::VARIABLE).is_none() {
        skip::tell(test, "needs programs that were just built; `cargo xtask test` makes them and runs this");
        return Ok(());
    }
    for layout in RingLayout::ALL {
        let mut daemon = Daemon::new("vhost-device-rng")?;
        daemon.start()?;
        let mut guest = Guest::new(&daemon.socket(), ProxyOptions::new(DeviceType::ENTROPY), layout);
        let mut out: HashMap<u16, Buf> = HashMap::new();
        let (mut answers, mut kills) = (0, 0);
        while kills < 8 || !out.is_empty() {
            while kills < 8 && out.len() < 32 {
                let buf = guest.ram.writable(64);
                let id = guest.submit(0, &[buf]);
                out.insert(id, buf);
            }
            if kills < 8 && answers >= (kills + 1) * 100 {
                kills += 1;
                daemon.kill()?;
                daemon.start()?;
            }
            // The ring driver finds out what comes twice or was never asked for.
            let used = guest.wait_used(0).expect("none is lost");
            let buf = out.remove(&used.id).expect("none comes twice");
            assert_eq!(used.len, 64);
            let bytes = guest.ram.contents(&buf);
            assert!(bytes.iter().any(|byte| *byte != bytes[0]), "random bytes");
            guest.ram.free(buf.addr);
            answers += 1;
        }
        assert!(!guest.engine.status().contains(Status::DEVICE_NEEDS_RESET));
        guest.ram.check_guards().expect("nothing else was written");
    }
    Ok(())
}

/// QEMU's storage daemon, where the machine has it.
fn storage_daemon() -> Option<PathBuf> {
    let paths = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&paths).map(|folder| folder.join("qemu-storage-daemon")).find(|path| path.is_file())
}

const SECTOR: usize = 512;

/// One request (virtio 1.4, 5.2.6): its header, its data, its status.
fn block(guest: &mut Guest, queue: usize, kind: u32, sector: u64, data: Buf) -> u8 {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    let (header, status) = (guest.ram.readable(&header), guest.ram.writable(1));
    let id = guest.submit(queue, &[header, data, status]);
    assert_eq!(guest.wait_used(queue).expect("an answer").id, id);
    let code = guest.ram.contents(&status)[0];
    guest.ram.free(header.addr);
    guest.ram.free(status.addr);
    code
}

#[test]
fn proxied_storage_daemon_reads_what_is_in_the_image_and_writes_what_it_is_told() -> Result<(), Failure> {
    let test = "proxied_storage_daemon_reads_what_is_in_the_image_and_writes_what_it_is_told";
    let Some(program) = storage_daemon() else {
        skip::tell(test, "qemu-storage-daemon is not on this machine (Debian: qemu-utils)");
        return Ok(());
    };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let (disk, socket) = (scratch.join("disk"), scratch.join("socket"));
    let image: Vec<u8> = (0..1 << 20).map(|at: u32| (at.wrapping_mul(2654435761) >> 24) as u8).collect();
    fs::write(&disk, &image).map_err(Failure::io("write a disk"))?;
    let mut command = Command::new(program);
    command.arg("--blockdev").arg(format!("driver=file,node-name=disk,filename={}", disk.display()));
    command.arg("--export").arg(format!(
        "type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues=2,addr.type=unix,addr.path={}",
        socket.display()
    ));
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut running = Owned::spawn(&mut command).map_err(Failure::io("start qemu-storage-daemon"))?;
    let mut guest = Guest::new(&socket, ProxyOptions::new(DeviceType::BLOCK), RingLayout::Split);
    assert_eq!(guest.lines.len(), 2);
    let mut capacity = [0; 8];
    guest.engine.config().read(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), (image.len() / SECTOR) as u64);
    // All of it, on both queues.
    for (at, part) in image.chunks(8 * SECTOR).enumerate() {
        let data = guest.ram.writable(part.len() as u32);
        assert_eq!(block(&mut guest, at % 2, 0, (at * 8) as u64, data), 0);
        assert_eq!(guest.ram.contents(&data), part, "sector {}", at * 8);
        guest.ram.free(data.addr);
    }
    let ours: Vec<u8> = (0..4 * SECTOR).map(|at| at as u8 ^ 0x5a).collect();
    let data = guest.ram.readable(&ours);
    assert_eq!(block(&mut guest, 0, 1, 100, data), 0);
    assert_eq!(&fs::read(&disk).map_err(Failure::io("read the disk"))?[100 * SECTOR..104 * SECTOR], ours);
    // Beyond the end: an error of that request.
    let data = guest.ram.writable(SECTOR as u32);
    assert_eq!(block(&mut guest, 0, 0, 1 << 20, data), 1);
    // Killed while nothing is out, and back: a driver that waits notices nothing.
    running.kill().map_err(Failure::io("kill qemu-storage-daemon"))?;
    let _ = fs::remove_file(&socket);
    let _again = Owned::spawn(&mut command).map_err(Failure::io("start qemu-storage-daemon"))?;
    let deadline = Instant::now() + SOON;
    while guest.stats.connections.load(Ordering::Relaxed) < 2 {
        assert!(Instant::now() < deadline, "the proxy does not find it");
        thread::sleep(Duration::from_millis(10));
    }
    // Ends when everything was told.
    guest.engine.memory(guest.ram.ram(), WaitFor::NewRequests).wait();
    let data = guest.ram.writable(SECTOR as u32);
    assert_eq!(block(&mut guest, 1, 0, 100, data), 0);
    assert_eq!(guest.ram.contents(&data), ours[..SECTOR]);
    assert!(!guest.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    Ok(())
}

/// One FUSE request on the first request queue: the error code, and what follows the header of the answer.
fn fuse(guest: &mut Guest, opcode: u32, node: u64, arguments: &[u8], room: u32) -> (i32, Vec<u8>) {
    const UNIQUE: u64 = 0x1234_5678_9abc;
    let mut request = Vec::new();
    request.extend((40 + arguments.len() as u32).to_le_bytes());
    request.extend(opcode.to_le_bytes());
    request.extend(UNIQUE.to_le_bytes());
    request.extend(node.to_le_bytes());
    // uid, gid, pid, and no extensions.
    request.extend([0; 16]);
    let (header, arguments) = (guest.ram.readable(&request), guest.ram.readable(arguments));
    let (answer, data) = (guest.ram.writable(16), guest.ram.writable(room));
    let id = guest.submit(1, &[header, arguments, answer, data]);
    let used = guest.wait_used(1).expect("an answer");
    assert_eq!(used.id, id);
    let answer = guest.ram.contents(&answer);
    assert_eq!(answer[8..], UNIQUE.to_le_bytes(), "the answer to this request");
    let mut data = guest.ram.contents(&data);
    data.truncate(u32::from_le_bytes(answer[..4].try_into().unwrap()).saturating_sub(16) as usize);
    (i32::from_le_bytes(answer[4..8].try_into().unwrap()), data)
}

#[test]
fn proxied_virtiofsd_gives_the_files_that_it_shares() -> Result<(), Failure> {
    let test = "proxied_virtiofsd_gives_the_files_that_it_shares";
    let Some(lab) = lab::require(test) else { return Ok(()) };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let (shared, socket) = (scratch.join("shared"), scratch.join("socket"));
    fs::create_dir(&shared).map_err(Failure::io("make a folder"))?;
    let contents: Vec<u8> = (0..10_000u32).map(|at| (at * 7 / 3) as u8).collect();
    fs::write(shared.join("numbers"), &contents).map_err(Failure::io("write a file"))?;
    let mut command = Command::new(lab.virtiofsd);
    command.arg(format!("--socket-path={}", socket.display()));
    command.arg("--shared-dir").arg(&shared).args(["--sandbox", "none"]);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    let _running = Owned::spawn(&mut command).map_err(Failure::io("start virtiofsd"))?;
    // The tag is the front-end's with the older ones.
    let tag = ConfigSource::Fixed([b"shared".as_slice(), &[0; 30], &1u32.to_le_bytes()].concat());
    let options = ProxyOptions { config: tag, queues: Some(2), ..ProxyOptions::new(DeviceType(26)) };
    let mut guest = Guest::new(&socket, options, RingLayout::Split);
    // FUSE_INIT: 7.31, read-ahead, no flags.
    let words = [7u32, 31, 0x2_0000, 0];
    let (error, answer) = fuse(&mut guest, 26, 0, &words.map(u32::to_le_bytes).concat(), 64);
    assert_eq!((error, u32::from_le_bytes(answer[..4].try_into().unwrap())), (0, 7));
    // FUSE_LOOKUP in the root, of what is there and what is not.
    assert_eq!(fuse(&mut guest, 1, 1, b"letters\0", 128).0, -2);
    let (error, entry) = fuse(&mut guest, 1, 1, b"numbers\0", 128);
    assert_eq!(error, 0);
    let node = u64::from_le_bytes(entry[..8].try_into().unwrap());
    // FUSE_OPEN to read.
    let (error, open) = fuse(&mut guest, 14, node, &[0; 8], 16);
    assert_eq!(error, 0);
    // FUSE_READ: handle, offset, size, and zeros.
    let mut read = Vec::new();
    while read.len() < contents.len() {
        let mut arguments = open[..8].to_vec();
        arguments.extend((read.len() as u64).to_le_bytes());
        arguments.extend(4096u32.to_le_bytes());
        arguments.extend([0; 20]);
        let (error, data) = fuse(&mut guest, 15, node, &arguments, 4096);
        assert_eq!(error, 0);
        assert!(!data.is_empty());
        read.extend(data);
    }
    assert_eq!(read, contents);
    assert!(!guest.engine.status().contains(Status::DEVICE_NEEDS_RESET));
    Ok(())
}
