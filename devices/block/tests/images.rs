//! Real files behind the disk, each way to them: by the lane, by io_uring, by threads; cached and direct; what becomes of
//! requests whose image fails, hangs, shrinks or is somebody else's.
mod support;

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use support::memory::{Host, ask, disk, host, patterned, status, wait};
use support::probe::Probe;
use support::{DISCARD, FLUSH, IN, IOERR, OK, OUT, SOON, WRITE_ZEROES, chain, range};
use virtio_block::backend::{Image, OpenOptions, open};
use virtio_block::{Aio, Format, OpenError};
use virtio_testkit::daemon::TempDir;
use virtio_testkit::{Interrupts, MemoryHost, RingLayout};
use vm_virtio::limit::RateLimit;
use vm_virtio::{Status, Stop};

const BYTES: u64 = 1 << 20;
const WAYS: [Aio; 3] = [Aio::Auto, Aio::IoUring, Aio::Threads];

const WRITABLE: OpenOptions =
    OpenOptions { format: Format::Raw, read_only: false, direct: false, lock: true };

fn image(path: &Path, options: OpenOptions) -> Arc<dyn Image> {
    open(path, options).unwrap_or_else(|error| panic!("{error}"))
}

/// A directory in memory, if there is such a place.
struct InMemory(PathBuf);

impl InMemory {
    fn new() -> Option<InMemory> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let path = Path::new("/dev/shm").join(format!("virtio-block-{}-{count}", std::process::id()));
        std::fs::create_dir(&path).ok().map(|()| InMemory(path))
    }
}

impl Drop for InMemory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// Runs a test with an image on a file system of a disk, and with one in memory.
fn in_each_place(test: impl Fn(&Path)) {
    let disk = TempDir::new();
    test(&disk.join("disk.img"));
    match InMemory::new() {
        Some(memory) => test(&memory.0.join("disk.img")),
        None => println!("SKIP in memory: there is no /dev/shm"),
    }
}

#[test]
fn each_way_reads_and_writes_what_is_in_the_file() {
    let original = patterned(BYTES);
    in_each_place(|path| {
        for (aio, direct) in WAYS.into_iter().flat_map(|aio| [(aio, false), (aio, true)]) {
            for layout in RingLayout::ALL {
                std::fs::write(path, &original).unwrap();
                let image = match open(path, OpenOptions { direct, ..WRITABLE }) {
                    Ok(image) => image,
                    // Some file systems have no direct transfers.
                    Err(error) if direct => {
                        println!("SKIP direct: {error}");
                        continue;
                    }
                    Err(error) => panic!("{error}"),
                };
                let mut host = host(layout, image, |options| options.aio = aio);
                let mut block = [0; 4];
                host.config().read(20, &mut block);
                assert_eq!(block, 512u32.to_le_bytes(), "how the host reads it is not the guest's business");
                assert_eq!(ask(&mut host, IN, 0, &[], 4096), (OK, original[..4096].to_vec(), 4097));
                // Neither offset nor length nor address are those of pages.
                assert_eq!(ask(&mut host, IN, 3, &[], 1024).1, original[1536..2560]);
                assert_eq!(ask(&mut host, OUT, 5, &[0xee; 512], 0), (OK, vec![], 1));
                assert_eq!(ask(&mut host, OUT, 8, &[0xdd; 8192], 0), (OK, vec![], 1));
                assert_eq!(status(&mut host, FLUSH, 0, &[]), OK);
                assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(100, 17, 0)), OK);
                assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(200, 17, 1)), OK);
                assert_eq!(status(&mut host, DISCARD, 0, &range(1000, 1000, 0)), OK);
                assert_eq!(ask(&mut host, IN, 100, &[], 17 * 512).1, [0; 17 * 512]);
                assert_eq!(ask(&mut host, IN, 200, &[], 17 * 512).1, [0; 17 * 512]);
                // More than the lane copies by itself.
                let whole = ask(&mut host, IN, 0, &[], BYTES as u32).1;
                drop(host);
                let bytes = std::fs::read(path).unwrap();
                assert!(whole == bytes, "{aio:?}, direct {direct}");
                let mut expected = original.clone();
                expected[5 * 512..6 * 512].fill(0xee);
                expected[8 * 512..24 * 512].fill(0xdd);
                expected[100 * 512..117 * 512].fill(0);
                expected[200 * 512..217 * 512].fill(0);
                // What was discarded may be anything.
                expected[1000 * 512..2000 * 512].copy_from_slice(&bytes[1000 * 512..2000 * 512]);
                assert!(expected == bytes, "{aio:?}, direct {direct}");
                assert_eq!(bytes.len() as u64, BYTES, "a file keeps its size");
            }
        }
    });
}

#[test]
fn many_requests_are_under_way_at_once_and_each_gets_its_own() {
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    let original = patterned(BYTES);
    std::fs::write(&path, &original).unwrap();
    for (aio, direct) in [(Aio::IoUring, false), (Aio::IoUring, true), (Aio::Threads, false)] {
        let mut host =
            host(RingLayout::Packed, image(&path, OpenOptions { direct, ..WRITABLE }), |options| {
                options.aio = aio;
            });
        for round in 0..20 {
            let chains: Vec<_> = (0..20u64)
                .map(|n| {
                    let sector = (n * 97 + round * 13) % 2000;
                    let chain = chain(host.ram(), IN, sector, &[], 2048);
                    (host.ring(0).add(&chain), sector, chain)
                })
                .collect();
            host.kick(0);
            for _ in 0..chains.len() {
                let used = wait(&mut host, 0);
                let (_, sector, chain) = chains.iter().find(|(id, ..)| *id == used.id).unwrap();
                let bytes = host.ram().written(chain);
                let at = *sector as usize * 512;
                assert_eq!((used.len, bytes[2048]), (2049, OK));
                assert_eq!(bytes[..2048], original[at..at + 2048]);
            }
            chains.iter().flat_map(|(.., chain)| chain).for_each(|buf| host.ram().free(buf.addr));
        }
    }
}

#[test]
fn discards_and_zeros_that_unmap_give_blocks_back() {
    use std::os::unix::fs::MetadataExt;
    in_each_place(|path| {
        std::fs::write(path, vec![1; 1 << 20]).unwrap();
        let blocks = || std::fs::metadata(path).unwrap().blocks();
        let full = blocks();
        let mut host = host(RingLayout::Split, image(path, WRITABLE), |_| {});
        assert_eq!(status(&mut host, DISCARD, 0, &range(0, 512, 0)), OK);
        let after_discard = blocks();
        assert!(after_discard + 500 <= full, "{full} to {after_discard}");
        assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(512, 512, 1)), OK);
        assert!(blocks() + 500 <= after_discard);
        let before = blocks();
        assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(1024, 512, 0)), OK);
        assert!(blocks() >= before, "zeros that must not unmap do not");
    });
}

#[test]
fn policy_3_a_truncated_image_fails_what_it_lost_and_nothing_else() {
    for aio in WAYS {
        let directory = TempDir::new();
        let path = directory.join("disk.img");
        std::fs::write(&path, patterned(BYTES)).unwrap();
        let mut host = host(RingLayout::Split, image(&path, WRITABLE), |options| options.aio = aio);
        std::fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
        let (answer, _, len) = ask(&mut host, IN, 100, &[], 4096);
        assert_eq!((answer, len), (IOERR, 0), "{aio:?}");
        assert_eq!(ask(&mut host, IN, 4, &[], 4096).0, IOERR, "half of it is there");
        assert_eq!(ask(&mut host, IN, 0, &[], 4096).0, OK);
        assert_eq!(host.engine().stats(0).unwrap().requests.failed, 2);
        assert!(!host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
    }
}

/// A file system of a size of its own, as long as this lives; none without the right to mount one.
struct Mounted(TempDir);

impl Mounted {
    fn new(size: &str) -> Option<Mounted> {
        let directory = TempDir::new();
        let size = format!("size={size}");
        let mount = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &size, "none"])
            .arg(directory.path())
            .output();
        mount.is_ok_and(|mount| mount.status.success()).then(|| Mounted(directory))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

#[test]
fn policy_3_a_full_file_system_fails_writes_until_there_is_room_again() {
    for aio in WAYS {
        let Some(place) = Mounted::new("256k") else {
            println!("SKIP: no file system can be mounted here");
            return;
        };
        let path = place.0.join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(BYTES).unwrap();
        let mut host = host(RingLayout::Packed, image(&path, WRITABLE), |options| options.aio = aio);
        let write = |host: &mut Host, n: u64| status(host, OUT, n * 128, &[7; 64 << 10]);
        let full = (0..16).find(|n| write(&mut host, *n) == IOERR).expect("less room than the disk has");
        assert!(full >= 2);
        assert_eq!(ask(&mut host, IN, 128, &[], 512), (OK, vec![7; 512], 513));
        // The guest makes room itself.
        assert_eq!(status(&mut host, DISCARD, 0, &range(0, 128, 0)), OK);
        assert_eq!(write(&mut host, full), OK, "{aio:?}");
        assert_eq!(host.engine().stats(0).unwrap().requests.failed, 1);
    }
}

#[test]
fn policy_3_a_failing_image_fails_its_requests_and_comes_back() {
    for blocks in [false, true] {
        let probe = Probe::new(patterned(8192), blocks);
        let mut host = host(RingLayout::Packed, probe.image(), |_| {});
        // No space, a broken disk, a network mount that is gone.
        for error in [rustix::io::Errno::NOSPC, rustix::io::Errno::IO, rustix::io::Errno::STALE] {
            probe.fail(Some(error.raw_os_error()));
            for kind in [IN, OUT, FLUSH] {
                let (data, room) = if kind == OUT { (&[1; 512][..], 0) } else { (&[][..], 0) };
                assert_eq!(ask(&mut host, kind, 1, data, room).0, IOERR);
            }
            assert_eq!(status(&mut host, DISCARD, 0, &range(0, 1, 0)), IOERR);
            assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(0, 1, 0)), IOERR);
            probe.fail(None);
            assert_eq!(ask(&mut host, IN, 1, &[], 512).0, OK);
        }
        assert!(probe.bytes() == patterned(8192));
    }
}

#[test]
fn policy_3_code_of_an_image_that_panics_fails_its_request() {
    let probe = Probe::new(patterned(8192), true);
    let mut host = host(RingLayout::Split, probe.image(), |_| {});
    probe.panic(true);
    assert_eq!(ask(&mut host, IN, 1, &[], 512).0, IOERR);
    probe.panic(false);
    assert_eq!(ask(&mut host, IN, 1, &[], 512).0, OK);
}

#[test]
fn policy_8_a_request_that_hangs_holds_up_no_other_one() {
    let probe = Probe::new(patterned(8192), true);
    let device = disk(probe.image(), |options| options.num_queues = 2);
    let mut host = MemoryHost::builder(device).start();
    probe.hang(Some(512));
    let hanging = chain(host.ram(), IN, 1, &[], 512);
    let id = host.ring(0).add(&hanging);
    host.kick(0);
    // Of the same queue, and of the other.
    assert_eq!(ask(&mut host, IN, 2, &[], 512).0, OK);
    let other = chain(host.ram(), IN, 3, &[], 512);
    host.ring(1).add(&other);
    host.kick(1);
    assert_eq!(wait(&mut host, 1).len, 513);
    assert_eq!(host.ram().contents(&hanging[2]), [IOERR], "never to be taken for a success");
    probe.hang(None);
    assert_eq!(wait(&mut host, 0).id, id);
    assert_eq!(host.ram().written(&hanging)[512], OK);
}

#[test]
fn reset_ends_what_is_under_way_and_answers_none_of_it() {
    let probe = Probe::new(patterned(8192), true);
    let mut host = host(RingLayout::Split, probe.image(), |_| {});
    probe.hang(Some(512));
    let hanging = chain(host.ram(), IN, 1, &[], 512);
    host.ring(0).add(&hanging);
    host.kick(0);
    assert!(host.run_until(SOON, |_| !probe.calls().is_empty()));
    let other = probe.clone();
    let freed = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(50));
        other.hang(None);
    });
    // The reset waits for the call that nobody can end; that the status reads 0 is checked by the host.
    host.reset();
    freed.join().unwrap();
    assert!(!host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
    host.initialise();
    assert_eq!(ask(&mut host, IN, 3, &[], 512), (OK, patterned(8192)[1536..2048].to_vec(), 513));
}

#[test]
fn reset_reports_nothing_of_what_the_kernel_still_has() {
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    std::fs::write(&path, patterned(BYTES)).unwrap();
    let direct = OpenOptions { direct: true, ..WRITABLE };
    let mut host = host(RingLayout::Packed, image(&path, direct), |options| options.aio = Aio::IoUring);
    for _ in 0..20 {
        host.ring(0).set_interrupts(Interrupts::Never);
        let chains: Vec<_> = (0..16).map(|n| chain(host.ram(), IN, n * 8, &[], 4096)).collect();
        for chain in &chains {
            host.ring(0).add(chain);
        }
        host.kick_anyway(0);
        host.step();
        host.set_status(Status::empty());
        // What was answered until here was answered before the status read 0.
        while host.ring(0).used().is_some() {}
        let before = host.ring(0).in_flight();
        std::thread::sleep(Duration::from_millis(5));
        host.step();
        assert_eq!(host.ring(0).used(), None, "2.4.1: nothing after a reset");
        assert_eq!(host.ring(0).in_flight(), before);
        host.reset();
        host.initialise();
        chains.iter().flatten().for_each(|buf| host.ram().free(buf.addr));
    }
    assert_eq!(ask(&mut host, IN, 0, &[], 512).0, OK);
}

#[test]
fn policy_7_a_reset_does_not_wait_for_ever_and_late_results_touch_nothing() {
    let probe = Probe::new(patterned(8192), true);
    let device = disk(probe.image(), |_| {});
    let mut host = MemoryHost::builder(device).start();
    probe.hang(Some(512));
    let hanging = chain(host.ram(), IN, 1, &[], 512);
    host.ring(0).add(&hanging);
    host.kick(0);
    // Begun, that is: what has not begun is simply not done.
    assert!(host.run_until(SOON, |_| !probe.calls().is_empty()));
    let stop = host.engine().stop(0, Stop::Discard, Some(Instant::now() + Duration::from_millis(20)));
    assert!(host.finish(stop).is_err(), "stuck");
    assert!(host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
    host.reset();
    probe.hang(None);
    host.initialise();
    for sector in 0..8 {
        assert_eq!(ask(&mut host, IN, sector, &[], 512).0, OK);
    }
}

#[test]
fn a_stop_that_drains_finishes_what_was_taken_each_way() {
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    let original = patterned(BYTES);
    std::fs::write(&path, &original).unwrap();
    for aio in WAYS {
        let mut host =
            host(RingLayout::Split, image(&path, OpenOptions { direct: true, ..WRITABLE }), |options| {
                options.aio = aio;
            });
        let chains: Vec<_> = (0..8).map(|n| chain(host.ram(), IN, n * 8, &[], 4096)).collect();
        for chain in &chains {
            host.ring(0).add(chain);
        }
        host.kick(0);
        // Taken, but not waited for.
        host.step();
        let state = host.stop_queue(0, Stop::Drain).expect("a queue that stops");
        assert!(state.held.is_empty());
        let mut used = 0;
        while let Some(answer) = host.ring(0).used() {
            assert_eq!(answer.len, 4097);
            used += 1;
        }
        host.start_queue(0, Some(state));
        let order = host.engine().enable(0, true);
        host.finish(order);
        while used < chains.len() {
            wait(&mut host, 0);
            used += 1;
        }
        for (n, chain) in (0..).zip(&chains) {
            assert_eq!(host.ram().written(chain)[..4096], original[n * 4096..][..4096]);
        }
    }
}

#[test]
fn a_limited_guest_waits_and_reset_is_no_way_around() {
    let limit = RateLimit::new(1024, Duration::from_secs(3600)).unwrap().and_operations(100).unwrap();
    let probe = Probe::new(patterned(8192), false);
    let mut host = host(RingLayout::Split, probe.image(), |options| options.limit = Some(limit));
    assert_eq!(ask(&mut host, IN, 0, &[], 512).0, OK);
    assert_eq!(ask(&mut host, IN, 0, &[], 512).0, OK);
    let in_vain = |host: &mut Host| {
        let chain = chain(host.ram(), IN, 0, &[], 512);
        host.ring(0).add(&chain);
        host.kick(0);
        host.settle();
        assert_eq!(host.ring(0).used(), None, "the period's bytes are spent");
    };
    in_vain(&mut host);
    host.reset();
    host.initialise();
    in_vain(&mut host);
    // Lifted while it waits.
    use vm_virtio::HostRequest;
    use vm_virtio::controls::{ControlRequest, Value};
    let set = ControlRequest::Set("rate-limit".into(), Value::Text("none".into()));
    host.engine().host_request(HostRequest::Control(set)).unwrap();
    assert_eq!(wait(&mut host, 0).len, 513);
    let set = ControlRequest::Set("rate-limit".into(), Value::Text("ops=soon".into()));
    assert!(host.engine().host_request(HostRequest::Control(set)).is_err());
}

#[test]
fn two_lanes_share_one_limit() {
    let limit = RateLimit::operations(3, Duration::from_secs(3600)).unwrap();
    let probe = Probe::new(patterned(8192), false);
    let device = disk(probe.image(), |options| {
        options.limit = Some(limit);
        options.num_queues = 2;
    });
    let mut host = MemoryHost::builder(device).start();
    for queue in [0, 1, 0, 1] {
        let chain = chain(host.ram(), IN, 0, &[], 512);
        host.ring(queue).add(&chain);
        host.kick_anyway(queue);
        host.settle();
    }
    let mut answered = 0;
    for queue in [0, 1] {
        while host.ring(queue).used().is_some() {
            answered += 1;
        }
    }
    assert_eq!(answered, 3);
}

#[test]
fn an_image_is_locked_against_a_second_writer() {
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    std::fs::write(&path, patterned(8192)).unwrap();
    let read_only = OpenOptions { read_only: true, ..WRITABLE };
    let unlocked = OpenOptions { lock: false, ..WRITABLE };
    let locked = |options| matches!(open(&path, options), Err(OpenError::Locked { .. }));
    let writer = image(&path, WRITABLE);
    assert!(locked(WRITABLE) && locked(read_only));
    assert!(!locked(unlocked), "whoever asks for no lock can cope");
    drop(writer);
    let (one, two) = (image(&path, read_only), image(&path, read_only));
    assert!(locked(WRITABLE), "readers do not bear a writer");
    drop((one, two));
    assert!(!locked(WRITABLE), "the locks end with the image");
}

/// What io_uring had is let go of by the kernel a moment after its owner closed it, or was killed.
#[test]
fn a_lock_that_is_about_to_go_is_waited_for() {
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    std::fs::write(&path, patterned(8192)).unwrap();
    let deadline = Instant::now() + SOON;
    loop {
        let owner = image(&path, WRITABLE);
        let (opened, ends) = std::thread::scope(|scope| {
            let begun = Instant::now();
            let ends = scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(50));
                drop(owner);
                begun.elapsed()
            });
            (open(&path, WRITABLE).is_ok(), ends.join().unwrap())
        });
        if opened {
            return;
        }
        // A machine on which the owner had it for longer proves nothing.
        assert!(ends > Duration::from_millis(500) && Instant::now() < deadline, "had for {ends:?}");
    }
}

/// QEMU's own tools keep off, and are kept off, byte for byte.
#[test]
fn locks_are_qemus() {
    use std::process::Command;
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    std::fs::write(&path, patterned(8192)).unwrap();
    let qemu = |args: &[&str]| {
        let output = Command::new("qemu-io").args(["-f", "raw"]).args(args).arg(&path).output();
        output.ok().map(|output| {
            let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
            (output.status.success() && !text.contains("lock"), text)
        })
    };
    if qemu(&["-c", "read 0 512"]).is_none() {
        println!("SKIP: there is no qemu-io here");
        return;
    }
    let works = |args: &[&str], expected: bool| {
        let (works, text) = qemu(args).unwrap();
        assert_eq!(works, expected, "{args:?}: {text}");
    };
    let writer = image(&path, WRITABLE);
    works(&["-c", "write 0 512"], false);
    // Who reads a raw image with qemu-io bears whatever others do.
    works(&["-r", "-c", "read 0 512"], true);
    drop(writer);
    let reader = image(&path, OpenOptions { read_only: true, ..WRITABLE });
    works(&["-r", "-c", "read 0 512"], true);
    works(&["-c", "write 0 512"], false);
    drop(reader);
    works(&["-c", "write 0 512"], true);
    // The other way round: a qemu-io that has the image, until its input ends. It says so by its first answer: whoever tried to
    // open the image to find out would have it himself for a moment, and turn qemu-io away.
    let mut other = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(&path)
        .stdin(std::process::Stdio::piped())
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    other.stdin.as_ref().unwrap().write_all(b"read 0 512\n").unwrap();
    let mut says = BufReader::new(other.stdout.take().unwrap()).lines();
    let said = says.next().expect("it has the image").unwrap();
    assert!(said.contains("read 512/512"), "{said}");
    assert!(open(&path, WRITABLE).is_err(), "qemu-io has taken its locks");
    drop(other.stdin.take());
    says.for_each(drop);
    other.wait().unwrap();
    image(&path, WRITABLE);
}

#[test]
fn a_read_only_image_is_never_opened_for_writing() {
    use std::os::unix::fs::PermissionsExt;
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    std::fs::write(&path, patterned(8192)).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o400)).unwrap();
    let image = image(&path, OpenOptions { read_only: true, ..WRITABLE });
    assert!(image.discard(0, 512).is_err() && image.resize(Some(512)).is_err());
    assert!(image.write_zeroes(0, 512, false, &|| true).is_err());
    assert_eq!(std::fs::read(&path).unwrap(), patterned(8192));
}
