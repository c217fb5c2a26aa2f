//! The entropy device in memory, both layouts: 5.4 of virtio, what a malformed request gets, sources, rate limit,
//! stop and reset. Everything steps in one thread: a device that slept or waited would be seen.
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use virtio_rng::{Entropy, MAX_REQUEST, OpenError, RateLimit, Rng};
use virtio_testkit::ring::DESC_INDIRECT;
use virtio_testkit::{Buf, MemoryHost, RingLayout, Shape, TestRam};
use vm_virtio::{DeviceType, Features, GuestAddress, HostEvent, Status, Stop, VirtioDevice};

/// Longer than anything here takes, shorter than anything that would be waited for by sleeping.
const SOON: Duration = Duration::from_secs(30);

fn host(layout: RingLayout, entropy: &Entropy, limit: Option<RateLimit>) -> MemoryHost<Rng> {
    MemoryHost::builder(Rng::new(entropy, 0, limit).unwrap()).layout(layout).start()
}

fn seeded(layout: RingLayout) -> MemoryHost<Rng> {
    host(layout, &Entropy::insecure_seeded(1), None)
}

/// One request of these elements: the length and the bytes that came.
fn ask(host: &mut MemoryHost<Rng>, chain: &[Buf], shape: Shape) -> (u32, Vec<u8>) {
    let id = host.ring(0).add_as(chain, shape);
    host.kick(0);
    host.settle();
    let used = host.ring(0).used().expect("an answer at once");
    assert_eq!(used.id, id);
    let bytes = host.ram().written(chain);
    (used.len, bytes)
}

fn ask_for(host: &mut MemoryHost<Rng>, len: u32) -> (u32, Vec<u8>) {
    let buf = host.ram().writable(len);
    let answer = ask(host, &[buf], Shape::Direct);
    host.ram().free(buf.addr);
    answer
}

/// Adds a request that cannot be answered now, and shows that it is not.
fn ask_in_vain(host: &mut MemoryHost<Rng>, len: u32) -> Buf {
    let buf = host.ram().writable(len);
    host.ring(0).add(&[buf]);
    host.kick(0);
    // A device that slept until it could answer would have answered.
    host.settle();
    assert_eq!(host.ring(0).used(), None, "nothing instead of something");
    buf
}

/// Plays a scene that has to be over within a period of the limit. On a machine that is too slow for that it proves
/// nothing, and is played again with a longer one.
fn within_a_period(
    mut period: Duration,
    scene: impl Fn(Duration) -> (MemoryHost<Rng>, bool),
) -> MemoryHost<Rng> {
    loop {
        let start = Instant::now();
        let (host, as_it_should) = scene(period);
        if start.elapsed() < period {
            assert!(as_it_should);
            return host;
        }
        period *= 2;
        assert!(period < SOON);
    }
}

fn wait(host: &mut MemoryHost<Rng>) -> u32 {
    let mut used = None;
    assert!(host.run_until(SOON, |host| {
        used = host.ring(0).used();
        used.is_some()
    }));
    used.map_or(0, |used| used.len)
}

/// A path of its own for each test, removed at the end.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("virtio-rng-{}-{name}", std::process::id()));
        let _ = std::fs::remove_file(&path);
        Scratch(path)
    }

    fn fifo(name: &str) -> (Scratch, File) {
        let scratch = Scratch::new(name);
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &scratch.0,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::from_raw_mode(0o600),
            0,
        )
        .unwrap();
        // Both ends, so that neither waits for the other.
        let both = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(&scratch.0);
        (scratch, both.unwrap())
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn c5_4_identity_no_features_no_configuration() {
    let host = seeded(RingLayout::Split);
    assert_eq!(host.engine().device_type(), DeviceType::ENTROPY);
    // NOTIF_CONFIG_DATA is of PCI only (4.1), and not this host's.
    assert_eq!(host.engine().offered(), Features::RING | (Features::CARRIED - Features::NOTIF_CONFIG_DATA));
    assert_eq!(host.config().len(), 0);
    let queues = host.engine().queues();
    assert_eq!((queues.len(), queues[0].name), (1, "requestq"));
}

#[test]
fn c5_4_6_2_one_or_more_bytes_from_the_start_of_the_buffer() {
    for layout in RingLayout::ALL {
        let mut host = seeded(layout);
        for len in [1, 2, 63, 64, 65, 256, 257, 4095, 4096, 65536] {
            let (got, bytes) = ask_for(&mut host, len);
            assert_eq!(got, len, "{layout:?}");
            assert!(len < 63 || bytes.iter().filter(|byte| **byte == 0x5a).count() < bytes.len() / 4);
        }
    }
}

#[test]
fn the_seeded_generator_is_chacha20_by_seed_and_guest() {
    // The published first block of ChaCha20 with a key, block number and nonce of zeros.
    let zero =
        [0x76, 0xb8, 0xe0, 0xad, 0xa0, 0xf1, 0x3d, 0x90, 0x40, 0x5d, 0x6a, 0xe5, 0x53, 0x86, 0xbd, 0x28];
    let mut host = host(RingLayout::Split, &Entropy::insecure_seeded(0), None);
    let (first, second) = (ask_for(&mut host, 10).1, ask_for(&mut host, 6).1);
    assert_eq!([first, second].concat(), zero);

    let bytes = |seed, guest| {
        let device = Rng::new(&Entropy::insecure_seeded(seed), guest, None).unwrap();
        ask_for(&mut MemoryHost::builder(device).start(), 64).1
    };
    assert_eq!(bytes(7, 1), bytes(7, 1));
    assert_ne!(bytes(7, 1), bytes(7, 2), "guests do not get each other's bytes");
    assert_ne!(bytes(7, 1), bytes(8, 1));
}

#[test]
fn peers_rng_two_descriptors_do_not_end_the_device() {
    for layout in RingLayout::ALL {
        for shape in [Shape::Direct, Shape::Indirect] {
            let mut one = seeded(layout);
            let expected = ask_for(&mut one, 600).1;
            let mut host = seeded(layout);
            let lens = [1, 99, 300, 200];
            let chain: Vec<Buf> = lens.iter().map(|len| host.ram().writable(*len)).collect();
            let (len, bytes) = ask(&mut host, &chain, shape);
            assert_eq!((len, bytes), (600, expected), "{layout:?} {shape:?}: filled in order");
            assert_eq!(ask_for(&mut host, 64).0, 64, "and it goes on");
        }
    }
}

#[test]
fn a_readable_descriptor_is_neither_read_nor_written() {
    for layout in RingLayout::ALL {
        for shape in [Shape::Direct, Shape::Indirect] {
            let mut host = seeded(layout);
            let readable = host.ram().readable(&[0x11; 40]);
            let chain = [readable, host.ram().writable(30), host.ram().writable(34)];
            // The ring driver compares the readable part itself.
            let (len, bytes) = ask(&mut host, &chain, shape);
            assert_eq!((len, bytes), (64, ask_for(&mut seeded(layout), 64).1));
        }
    }
}

#[test]
fn nothing_writable_is_returned_with_length_0() {
    for layout in RingLayout::ALL {
        let mut host = seeded(layout);
        let readable = host.ram().readable(&[0x11; 40]);
        assert_eq!(ask(&mut host, &[readable], Shape::Direct).0, 0);
        let empty = [host.ram().writable(0), host.ram().writable(0)];
        assert_eq!(ask(&mut host, &empty, Shape::Direct).0, 0);
        assert_eq!(ask(&mut host, &[readable, empty[0]], Shape::Indirect).0, 0);
        assert_eq!(ask_for(&mut host, 64).0, 64, "and it goes on");
        assert!(host.events().is_empty(), "no fault");
    }
}

#[test]
fn very_large_buffers_get_a_short_length() {
    for layout in RingLayout::ALL {
        for entropy in [Entropy::insecure_seeded(1), Entropy::kernel().unwrap()] {
            let mut host = host(layout, &entropy, None);
            let chain =
                [host.ram().writable(60_000), host.ram().writable(60_000), host.ram().writable(1 << 20)];
            let (len, bytes) = ask(&mut host, &chain, Shape::Direct);
            assert_eq!(len as usize, MAX_REQUEST);
            let untouched = bytes[MAX_REQUEST..].iter().all(|byte| *byte == 0x5a);
            assert!(untouched, "what is not counted is not written");
            assert!(bytes[MAX_REQUEST - 64..MAX_REQUEST].iter().any(|byte| *byte != 0x5a));
        }
    }
}

#[test]
fn the_kernels_bytes_are_handed_out_once() {
    for layout in RingLayout::ALL {
        let mut host = host(layout, &Entropy::kernel().unwrap(), None);
        let mut all = Vec::new();
        // Sizes that meet the ends of the pool everywhere, and those that go around it.
        for len in (1..400).chain([1023, 1024, 1025, 5000, 65536]) {
            let (got, bytes) = ask_for(&mut host, len);
            assert_eq!(got, len);
            all.extend(bytes);
        }
        let mut blocks: Vec<&[u8]> = all.windows(8).collect();
        blocks.sort_unstable();
        let repeated = blocks.windows(2).filter(|pair| pair[0] == pair[1]).count();
        assert_eq!(repeated, 0, "eight bytes that came twice, in {} bytes", all.len());
        let ones: u64 = all.iter().map(|byte| u64::from(byte.count_ones())).sum();
        let bits = all.len() as u64 * 8;
        assert!(ones.abs_diff(bits / 2) < bits / 100, "{ones} of {bits} bits are set");
    }
}

#[test]
fn c2_1_2_nothing_before_driver_ok_and_the_ring_is_looked_at_then() {
    for layout in RingLayout::ALL {
        let mut host = MemoryHost::builder(Rng::new(&Entropy::insecure_seeded(1), 0, None).unwrap())
            .layout(layout)
            .build();
        let buf = host.ram().writable(64);
        host.ring(0).add(&[buf]);
        // Stops short of DRIVER_OK once and would complain about a used buffer; then goes on without a kick.
        host.initialise();
        host.settle();
        assert_eq!(host.ring(0).used().expect("found without a kick").len, 64);
    }
}

#[test]
fn c2_4_1_reset_drops_requests_and_the_device_starts_over() {
    for layout in RingLayout::ALL {
        let (_scratch, fifo) = Scratch::fifo(&format!("reset-{layout:?}"));
        let mut host = host(layout, &Entropy::open(&_scratch.0).unwrap(), None);
        let buf = ask_in_vain(&mut host, 64);
        host.reset();
        (&fifo).write_all(&[7; 64]).unwrap();
        std::thread::sleep(Duration::from_millis(20));
        host.settle();
        assert_eq!(host.ram().contents(&buf), vec![0x5a; 64], "a dropped request is not written");
        host.initialise();
        assert_eq!(ask_for(&mut host, 64), (64, vec![7; 64]));
    }
}

#[test]
fn a_reset_makes_the_seeded_generator_start_over() {
    let mut host = seeded(RingLayout::Split);
    let first = ask_for(&mut host, 64);
    assert_ne!(ask_for(&mut host, 64), first);
    for _ in 0..3 {
        host.reset();
        host.initialise();
        assert_eq!(ask_for(&mut host, 64), first);
    }
}

#[test]
fn a_stop_while_requests_wait_is_over_at_once_and_loses_none() {
    for layout in RingLayout::ALL {
        let limit = RateLimit::new(64, Duration::from_secs(3600)).unwrap();
        let mut host = host(layout, &Entropy::insecure_seeded(1), Some(limit));
        ask_for(&mut host, 64);
        ask_in_vain(&mut host, 64);
        let state = host.stop_queue(0, Stop::Drain).expect("nothing is out");
        assert_eq!(state, host.ring(0).queue_state(), "the request is still in the ring");

        let (_scratch, fifo) = Scratch::fifo(&format!("stop-{layout:?}"));
        let mut host = self::host(layout, &Entropy::open(&_scratch.0).unwrap(), None);
        ask_in_vain(&mut host, 64);
        let state = host.stop_queue(0, Stop::Drain).expect("nothing is out");
        (&fifo).write_all(&[7; 64]).unwrap();
        host.settle();
        assert_eq!(host.ring(0).used(), None, "a stopped queue is not served");
        host.start_queue(0, Some(state));
        assert_eq!(wait(&mut host), 64);
    }
}

#[test]
fn a_broken_ring_needs_a_reset_and_works_again_after_it() {
    for layout in RingLayout::ALL {
        let mut host = seeded(layout);
        host.ring(0).add(&[Buf::writable(GuestAddress(1 << 40), 64)]);
        host.kick(0);
        host.step();
        assert!(host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
        assert!(host.events().iter().any(|event| matches!(event, HostEvent::QueueFault { queue: 0, .. })));
        host.reset();
        host.initialise();
        assert_eq!(ask_for(&mut host, 64).0, 64);
    }
}

#[test]
fn a_descriptor_flag_that_was_not_negotiated_breaks_the_ring() {
    let device = Rng::new(&Entropy::insecure_seeded(1), 0, None).unwrap();
    let mut host = MemoryHost::builder(device).without(Features::INDIRECT_DESC).start();
    let buf = host.ram().writable(64);
    let id = host.ring(0).add(&[buf]);
    let ring = host.ring(0).split();
    let mut desc = ring.desc(id);
    desc.flags |= DESC_INDIRECT;
    ring.set_desc(id, desc);
    host.kick(0);
    host.step();
    assert!(host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
}

#[test]
fn memory_that_is_gone_costs_its_request_only() {
    for layout in RingLayout::ALL {
        let ram = TestRam::spread(2, 8 << 20);
        let device = Rng::new(&Entropy::kernel().unwrap(), 0, None).unwrap();
        let mut host = MemoryHost::builder(device).layout(layout).ram(ram.clone()).start();
        // The last megabyte of the second region loses its file.
        rustix::fs::ftruncate(ram.fd(), 15 << 20).unwrap();
        let gone = GuestAddress((16 << 20) + (7 << 20));
        host.ring(0).add(&[Buf::writable(gone, 4096)]);
        host.kick(0);
        host.settle();
        assert_eq!(host.ring(0).used().expect("the buffer goes back").len, 0);
        assert_eq!(ask_for(&mut host, 64).0, 64);
    }
}

#[test]
fn a_file_is_handed_out_in_order_once_and_its_end_waits() {
    for layout in RingLayout::ALL {
        let scratch = Scratch::new(&format!("file-{layout:?}"));
        let data: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        std::fs::write(&scratch.0, &data).unwrap();
        let entropy = Entropy::open(&scratch.0).unwrap();
        let mut host = host(layout, &entropy, None);
        let first = host.ram().writable(600);
        host.ring(0).add(&[first]);
        host.kick(0);
        assert_eq!(wait(&mut host), 600);
        assert_eq!(host.ram().contents(&first), data[..600]);
        // Another guest of the same process gets the next bytes, not the same.
        let mut other = MemoryHost::builder(Rng::new(&entropy, 1, None).unwrap()).layout(layout).start();
        assert_eq!(ask_for(&mut other, 100), (100, data[600..700].to_vec()));
        let (len, bytes) = ask_for(&mut host, 4096);
        assert_eq!((len, &bytes[..300]), (300, &data[700..]), "what is left is an answer");

        let buf = ask_in_vain(&mut host, 64);
        host.reset();
        host.initialise();
        assert_eq!(host.ram().contents(&buf), vec![0x5a; 64]);
        let buf = ask_in_vain(&mut host, 64);
        let mut file = OpenOptions::new().append(true).open(&scratch.0).unwrap();
        file.write_all(b"more").unwrap();
        assert_eq!(wait(&mut host), 4, "a file that has grown goes on");
        assert_eq!(host.ram().contents(&buf)[..4], *b"more");
    }
}

#[test]
fn a_source_without_data_is_waited_for_by_readiness() {
    for layout in RingLayout::ALL {
        let (scratch, fifo) = Scratch::fifo(&format!("pipe-{layout:?}"));
        let mut host = host(layout, &Entropy::open(&scratch.0).unwrap(), None);
        for round in 1..20u8 {
            let buf = ask_in_vain(&mut host, 64);
            for _ in 0..3 {
                host.kick_anyway(0);
                host.settle();
            }
            assert_eq!(host.ring(0).used(), None, "kicks change nothing");
            (&fifo).write_all(&[round; 10]).unwrap();
            assert_eq!(wait(&mut host), 10, "what there is");
            assert_eq!(host.ram().contents(&buf)[..10], [round; 10]);
            host.ram().free(buf.addr);
        }
    }
}

#[test]
fn a_pipe_without_a_writer_waits() {
    let (scratch, fifo) = Scratch::fifo("no-writer");
    drop(fifo);
    let mut host = host(RingLayout::Split, &Entropy::open(&scratch.0).unwrap(), None);
    ask_in_vain(&mut host, 64);
    let mut writer = OpenOptions::new().write(true).open(&scratch.0).unwrap();
    writer.write_all(&[3; 5]).unwrap();
    assert_eq!(wait(&mut host), 5);
}

#[test]
fn devices_are_read_and_other_files_are_refused() {
    for path in ["/dev/urandom", "/dev/random"] {
        let mut host = host(RingLayout::Split, &Entropy::open(path.as_ref()).unwrap(), None);
        assert_eq!(ask_for(&mut host, 64).0, 64);
    }
    // A device that cannot be watched and never has anything: requests wait.
    let mut host = host(RingLayout::Split, &Entropy::open("/dev/null".as_ref()).unwrap(), None);
    ask_in_vain(&mut host, 64);

    let directory = std::env::temp_dir();
    let refused = Entropy::open(&directory).err().expect("a directory is no source");
    assert!(matches!(refused, OpenError::NotASource { what: "a directory", .. }), "{refused}");
    let refused = Entropy::open("/no/such/source".as_ref()).err().expect("nothing there");
    let text = refused.to_string();
    assert!(text.contains("/no/such/source") && text.contains("name a file"), "{text}");
}

#[test]
fn peers_rng_rate_limit_does_not_sleep_in_the_queue_thread() {
    for layout in RingLayout::ALL {
        let mut host = within_a_period(Duration::from_millis(150), |period| {
            let limit = RateLimit::new(100, period).unwrap();
            let mut host = host(layout, &Entropy::insecure_seeded(1), Some(limit));
            let first = ask_for(&mut host, 64).0;
            // What is left of the period, at least one byte.
            let second = ask_for(&mut host, 64).0;
            // Everything else goes on while the third request waits: not before the period is over.
            let buf = host.ram().writable(64);
            host.ring(0).add(&[buf]);
            host.kick(0);
            host.settle();
            let waits = host.ring(0).glance().is_none();
            (host, (first, second, waits) == (64, 36, true))
        });
        assert_eq!(wait(&mut host), 64);
    }
}

#[test]
fn more_requests_than_a_turn_may_serve_wait_together_and_are_all_served() {
    for layout in RingLayout::ALL {
        // Held by the limit, and by a source without data: both come back outside of a kick.
        let (scratch, fifo) = Scratch::fifo(&format!("many-{layout:?}"));
        for limited in [true, false] {
            let mut host = within_a_period(Duration::from_millis(300), |period| {
                let limit = limited.then(|| RateLimit::new(65536, period).unwrap());
                let entropy = match limited {
                    true => Entropy::insecure_seeded(1),
                    false => Entropy::open(&scratch.0).unwrap(),
                };
                let device = Rng::new(&entropy, 0, limit).unwrap();
                let mut host = MemoryHost::builder(device).layout(layout).queue_size(1024).start();
                if limited {
                    assert_eq!(ask_for(&mut host, 65536).0, 65536);
                }
                let buf = host.ram().writable(16);
                for _ in 0..1024 {
                    host.ring(0).add(&[buf]);
                }
                host.kick(0);
                host.settle();
                let waits = host.ring(0).glance().is_none();
                (host, waits)
            });
            let mut rest = 1024;
            if !limited {
                (&fifo).write_all(&[9; 16 * 1024]).unwrap();
            }
            assert!(host.run_until(SOON, |host| {
                rest -= host.ring(0).drain().len();
                rest == 0
            }));
        }
    }
}

#[test]
fn a_file_that_is_not_in_the_page_cache_is_fetched_without_waiting() {
    let scratch = Scratch::new("cold");
    let data: Vec<u8> = (0..1u32 << 20).map(|i| (i / 7) as u8).collect();
    std::fs::write(&scratch.0, &data).unwrap();
    let file = File::open(&scratch.0).unwrap();
    file.sync_all().unwrap();
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    let mut host = host(RingLayout::Split, &Entropy::open(&scratch.0).unwrap(), None);
    let mut at = 0;
    while at < data.len() {
        let buf = host.ram().writable(50_000);
        host.ring(0).add(&[buf]);
        host.kick(0);
        let len = wait(&mut host) as usize;
        assert_eq!(host.ram().contents(&buf)[..len], data[at..at + len]);
        at += len;
        host.ram().free(buf.addr);
    }
}

#[test]
fn a_reset_is_no_way_around_the_rate_limit() {
    let limit = RateLimit::new(64, Duration::from_secs(3600)).unwrap();
    let mut host = host(RingLayout::Split, &Entropy::insecure_seeded(1), Some(limit));
    assert_eq!(ask_for(&mut host, 64).0, 64);
    host.reset();
    host.initialise();
    ask_in_vain(&mut host, 64);
}

#[test]
fn a_limit_below_the_request_is_a_byte_now_and_then_never_none() {
    let limit = RateLimit::new(1, Duration::from_millis(5)).unwrap();
    let mut host = host(RingLayout::Packed, &Entropy::insecure_seeded(1), Some(limit));
    for _ in 0..10 {
        let buf = host.ram().writable(64);
        host.ring(0).add(&[buf]);
        host.kick(0);
        assert_eq!(wait(&mut host), 1);
    }
}

#[test]
fn one_guests_greed_is_not_felt_by_another() {
    let whole = RateLimit::new(101, Duration::from_secs(3600)).unwrap();
    let entropy = Entropy::insecure_seeded(1);
    let guest = |index| {
        let device = Rng::new(&entropy, index, Some(whole.share(index, 2).unwrap())).unwrap();
        MemoryHost::builder(device).start()
    };
    let (mut greedy, mut modest) = (guest(0), guest(1));
    assert_eq!(ask_for(&mut greedy, 1000).0, 51, "the remainder is not lost");
    ask_in_vain(&mut greedy, 1000);
    assert_eq!(ask_for(&mut modest, 50).0, 50);
    ask_in_vain(&mut modest, 1);
}

#[test]
fn rings_in_order_and_many_requests() {
    for layout in RingLayout::ALL {
        for without in [Features::empty(), Features::EVENT_IDX, Features::INDIRECT_DESC] {
            let device = Rng::new(&Entropy::kernel().unwrap(), 0, None).unwrap();
            let mut host = MemoryHost::builder(device)
                .layout(layout)
                .with(Features::IN_ORDER)
                .without(without)
                .queue_size(16)
                .start();
            let bufs: Vec<Buf> = (0..16).map(|_| host.ram().writable(64)).collect();
            for _ in 0..500 {
                let ids: Vec<u16> = bufs.iter().map(|buf| host.ring(0).add(&[*buf])).collect();
                host.kick(0);
                host.settle();
                let used = host.ring(0).drain();
                assert_eq!(used.iter().map(|used| used.id).collect::<Vec<_>>(), ids);
                assert!(used.iter().all(|used| used.len == 64));
            }
        }
    }
}

#[test]
fn workers_are_made_once() {
    let mut device = Rng::new(&Entropy::insecure_seeded(1), 0, None).unwrap();
    assert_eq!(device.workers(&[]).unwrap().len(), 1);
    assert!(device.workers(&[]).is_err(), "an error, no panic");
}
