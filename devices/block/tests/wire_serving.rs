//! The daemon behind its socket, with the driver that plays QEMU and the guest.
#![cfg(feature = "daemon")]
mod support;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use support::{
    FLUSH, GET_ID, IN, IOERR, OK, OUT, SOON, UNSUPP, ask, ask_on, chain, connect, feature, image, pattern,
    start,
};
use vhost_user::{BackendRequest, ProtocolFeatures};
use virtio_testkit::daemon::{DaemonProcess, TempDir};
use virtio_testkit::{Buf, RingLayout, TestRam, VhostUserDriver, VhostUserOptions};
use vm_virtio::{Features, GuestAddress, Status};

const BYTES: u64 = 1 << 20;

struct World {
    directory: TempDir,
    image: PathBuf,
    socket: PathBuf,
    daemon: DaemonProcess,
}

fn started(args: &[&str]) -> World {
    let (directory, image) = image(BYTES);
    let socket = directory.join("block.sock");
    let daemon = start(&socket, &[&["--blk-file", image.to_str().unwrap()], args].concat());
    World { directory, image, socket, daemon }
}

fn sectors(from: u64, count: u64) -> Vec<u8> {
    (from * 512..(from + count) * 512).map(pattern).collect()
}

#[test]
fn four_queues_of_each_layout_and_every_way_to_the_image() {
    for way in [
        &["--aio", "auto"][..],
        &["--aio", "io_uring", "--direct"],
        &["--aio", "threads"],
        &["--threads", "2"],
        &["--threads", "2", "--aio", "io_uring", "--direct"],
    ] {
        let world = started(&[&["--num-queues", "4", "--serial", "wire"], way].concat());
        for layout in RingLayout::ALL {
            let mut driver = connect(&world.socket, layout);
            assert!(driver.offered().contains(feature::MQ | feature::CONFIG_WCE));
            assert_eq!(driver.endpoint().get_config(34, 2, 0).unwrap(), [4, 0]);
            for queue in 0..4 {
                let sector = queue as u64 * 16;
                let read = ask_on(&mut driver, queue, IN, sector, &[], 4096);
                assert_eq!(read, (OK, sectors(sector, 8)), "{way:?} {layout:?}");
                let data = vec![queue as u8 + 1; 4096];
                assert_eq!(ask_on(&mut driver, queue, OUT, 1000 + sector, &data, 0).0, OK);
                assert_eq!(ask_on(&mut driver, queue, FLUSH, 0, &[], 0).0, OK);
                assert_eq!(ask_on(&mut driver, queue, IN, 1000 + sector, &[], 4096).1, data);
            }
            assert_eq!(ask(&mut driver, GET_ID, 0, &[], 20).1[..5], *b"wire\0");
            assert_eq!(ask(&mut driver, 99, 0, &[], 0).0, UNSUPP);
            driver.stop().unwrap();
        }
        assert!(world.daemon.terminate().success());
        let bytes = std::fs::read(&world.image).unwrap();
        assert!(
            (0..4).all(|queue| bytes[(1000 + queue * 16) * 512..][..4096] == vec![queue as u8 + 1; 4096])
        );
    }
}

/// Requests are in the daemon's hands, or not yet seen by it, when it is killed. The front-end keeps what is in flight
/// (`INFLIGHT_SHMFD`): the next daemon does all of it, each request once.
#[test]
fn killed_under_load_nothing_is_lost_and_nothing_done_twice() {
    for (layout, way) in
        RingLayout::ALL.into_iter().zip([&["--aio", "auto"][..], &["--direct", "--cache", "writethrough"]])
    {
        let World { directory, image, socket, mut daemon } = started(way);
        let options = VhostUserOptions::new(layout);
        let protocol = options.protocol | ProtocolFeatures::INFLIGHT_SHMFD;
        let mut driver =
            VhostUserDriver::connect(&socket, VhostUserOptions { protocol, ..options }).expect("a device");
        for round in 0..8u8 {
            // Each writes its own 4 KiB, a number that no other round has.
            let chains: Vec<_> = (0..16u64)
                .map(|n| chain(driver.ram(), OUT, n * 8, &[round * 16 + n as u8; 4096], 0))
                .collect();
            let mut waiting: Vec<_> = chains.iter().map(|chain| driver.ring(0).add(chain)).collect();
            driver.kick(0);
            for _ in 0..round {
                let used = driver.wait_used(0, SOON).expect("an answer");
                waiting.retain(|id| *id != used.id);
            }
            daemon.kill();
            daemon = start(&socket, &[&["--blk-file", image.to_str().unwrap()], way].concat());
            driver.reconnect(&socket).unwrap();
            while !waiting.is_empty() {
                let used = driver.wait_used(0, SOON).expect("an answer");
                assert!(waiting.contains(&used.id), "each once");
                waiting.retain(|id| *id != used.id);
            }
            for (n, chain) in (0..).zip(&chains) {
                assert_eq!(driver.ram().written(chain), [OK]);
                assert_eq!(ask(&mut driver, IN, n * 8, &[], 4096), (OK, vec![round * 16 + n as u8; 4096]));
                chain.iter().for_each(|buf| driver.ram().free(buf.addr));
            }
        }
        driver.stop().unwrap();
        assert_eq!(directory.names().len(), 2);
    }
}

#[test]
fn a_front_end_that_comes_back_finds_its_register_as_it_was() {
    let world = started(&[]);
    let mut driver = connect(&world.socket, RingLayout::Split);
    driver.endpoint().set_config(32, 0, &[0]).unwrap();
    assert_eq!(driver.endpoint().get_config(32, 1, 0).unwrap(), [0]);
    driver.reconnect(&world.socket).unwrap();
    // The guest goes on and knows nothing of it: its writes have to be stable still.
    assert_eq!(driver.endpoint().get_config(32, 1, 0).unwrap(), [0]);
    driver.reboot().unwrap();
    assert_eq!(driver.endpoint().get_config(32, 1, 0).unwrap(), [1]);
}

#[test]
fn drivers_that_want_less() {
    let world = started(&[]);
    for layout in RingLayout::ALL {
        for without in [
            Features::INDIRECT_DESC | Features::EVENT_IDX,
            feature::FLUSH | feature::CONFIG_WCE,
            feature::SIZE_MAX | feature::SEG_MAX | feature::BLK_SIZE | feature::TOPOLOGY | feature::GEOMETRY,
        ] {
            let options =
                VhostUserOptions { without, with: Features::IN_ORDER, ..VhostUserOptions::new(layout) };
            let mut driver = VhostUserDriver::connect(&world.socket, options).unwrap();
            assert_eq!(ask(&mut driver, OUT, 3, &sectors(3, 2), 0).0, OK);
            assert_eq!(ask(&mut driver, IN, 3, &[], 1024), (OK, sectors(3, 2)));
            driver.stop().unwrap();
        }
    }
}

#[test]
fn two_guests_on_one_daemon_one_of_them_hostile() {
    let world = started(&["--read-only", "--socket-count", "2"]);
    let sockets = [world.directory.join("block.sock0"), world.directory.join("block.sock1")];
    let mut one = connect(&sockets[0], RingLayout::Packed);
    let mut two = connect(&sockets[1], RingLayout::Split);
    one.ring(0).add(&[Buf::writable(GuestAddress(1 << 40), 64)]);
    one.kick(0);
    let deadline = Instant::now() + SOON;
    while !one.ring_failed(0) {
        assert!(Instant::now() < deadline, "a broken ring is reported");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(ask(&mut two, IN, 0, &[], 512), (OK, sectors(0, 1)));
    one.reset().unwrap();
    one.start().unwrap();
    assert_eq!(ask(&mut one, IN, 1, &[], 512), (OK, sectors(1, 1)));
}

/// The kernel reads and writes guest memory itself, and says EFAULT where a truncated file has none: that request's error.
#[test]
fn policy_6_transfers_into_a_truncated_file_are_an_error_of_their_request() {
    const KEPT: u64 = 1 << 20;
    const LOST: u64 = 0x4000_0000;
    for way in ["auto", "io_uring", "threads"] {
        let mut world = started(&["--aio", way]);
        let ram = TestRam::new(&[(0, KEPT), (LOST, 0x4000)]);
        // No ring is there.
        while ram.alloc(0x2000 - 16, 16).0 < LOST {}
        while ram.alloc(0x2000 - 16, 16).0 < LOST {}
        let options = VhostUserOptions { ram, ..VhostUserOptions::new(RingLayout::Split) };
        let mut driver = VhostUserDriver::connect(&world.socket, options).unwrap();
        let header = driver.ram().readable(&support::header(IN, 0));
        let status = driver.ram().writable(1);
        driver.ring(0).add(&[header, Buf::writable(GuestAddress(LOST + 0x2000), 0x2000), status]);
        rustix::fs::ftruncate(driver.ram().fd(), KEPT + 0x2000).unwrap();
        driver.kick(0);
        assert_eq!(driver.wait_used(0, SOON).unwrap().len, 0, "{way}");
        assert_eq!(driver.ram().contents(&status), [IOERR]);
        assert_eq!(ask(&mut driver, IN, 1, &[], 512), (OK, sectors(1, 1)));
        let device = Status::from_bits_retain(driver.endpoint().get_status().unwrap());
        assert!(!device.contains(Status::DEVICE_NEEDS_RESET));
        assert!(world.daemon.is_running());
    }
}

#[test]
fn nothing_happens_while_nothing_is_asked() {
    let world = started(&["--aio", "io_uring"]);
    let mut driver = connect(&world.socket, RingLayout::Split);
    ask(&mut driver, IN, 0, &[], 512);
    ask(&mut driver, FLUSH, 0, &[], 0);
    world.daemon.rests(Duration::from_millis(300));
}

/// From the operator's command to what QEMU and the guest are told.
#[test]
fn c5_2_6_2_a_resize_by_the_control_socket_reaches_the_front_end() {
    let control = std::env::temp_dir().join(format!("virtio-block-control-{}", std::process::id()));
    let world = started(&["--control-socket", control.to_str().unwrap()]);
    let mut driver = connect(&world.socket, RingLayout::Packed);
    let mut operator = UnixStream::connect(&control).unwrap();
    let mut replies = BufReader::new(operator.try_clone().unwrap()).lines();
    let mut say = |request: &str| {
        writeln!(operator, "{request}").unwrap();
        replies.next().unwrap().unwrap()
    };
    let told = |driver: &mut VhostUserDriver| {
        let deadline = Instant::now() + SOON;
        loop {
            let listener = driver.backend_requests().expect("a channel of the back-end");
            if let Some(received) = listener.receive().unwrap() {
                assert!(matches!(received.request, BackendRequest::ConfigChange));
                return u64::from_le_bytes(
                    driver.endpoint().get_config(0, 8, 0).unwrap().try_into().unwrap(),
                );
            }
            assert!(Instant::now() < deadline, "the front-end is told");
            std::thread::sleep(Duration::from_millis(1));
        }
    };
    assert_eq!(ask(&mut driver, IN, BYTES / 512, &[], 512).0, IOERR);
    let reply = say(r#"{"request":"run","command":"resize","arguments":{"bytes":2097152}}"#);
    assert!(reply.contains("\"ok\""), "{reply}");
    assert_eq!(told(&mut driver), 4096);
    assert_eq!(std::fs::metadata(&world.image).unwrap().len(), 2 << 20);
    assert_eq!(ask(&mut driver, IN, BYTES / 512, &[], 512), (OK, vec![0; 512]));
    // Somebody else did it; the command looks.
    std::fs::File::options().write(true).open(&world.image).unwrap().set_len(3 << 20).unwrap();
    say(r#"{"request":"run","command":"resize","arguments":{}}"#);
    assert_eq!(told(&mut driver), 6144);
    let reply = say(r#"{"request":"get","property":"size"}"#);
    assert!(reply.contains("3145728"), "{reply}");
    // What makes no sense changes nothing.
    for bytes in ["0", "511", "18446744073709551615"] {
        let request = format!(r#"{{"request":"run","command":"resize","arguments":{{"bytes":{bytes}}}}}"#);
        assert!(say(&request).contains("bad-value"));
    }
}
