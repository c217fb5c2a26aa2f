//! The log of dirty pages, as a migration's front-end uses it.
mod support;

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use support::*;
use vhost_user::{F_LOG_ALL, F_PROTOCOL_FEATURES, LogArea, MemoryRegion, ProtocolFeatures, VringAddr};
use virtio_testkit::{Buf, PHYSICAL, RingLayout, TestRam, VhostUserDriver, VhostUserOptions};
use vm_virtio::{GuestAddress, Status};

const PAGE: u64 = 0x1000;
/// The log begins here in its file.
const OFFSET: u64 = 0x2010;

/// A log in a file.
struct Log {
    file: OwnedFd,
    size: u64,
}

impl Log {
    /// With a bit for each page up to this address.
    fn up_to(addr: u64) -> Log {
        let size = addr / PAGE / 8 + 1;
        let file = rustix::fs::memfd_create("log", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&file, OFFSET + size + 0x2000).unwrap();
        Log { file, size }
    }

    fn base(&self, driver: &mut VhostUserDriver) {
        let area = LogArea { size: self.size, offset: OFFSET };
        driver.endpoint().set_log_base(area, self.file.as_fd()).unwrap();
    }

    /// The pages that were marked since the last call; nothing was written beside the log.
    fn take(&self) -> Vec<u64> {
        let mut bytes = vec![0; (OFFSET + self.size + 0x2000) as usize];
        rustix::io::pread(&self.file, &mut bytes, 0).unwrap();
        let (before, rest) = bytes.split_at(OFFSET as usize);
        let (log, behind) = rest.split_at(self.size as usize);
        assert!(before.iter().chain(behind).all(|byte| *byte == 0), "beside the log");
        rustix::io::pwrite(&self.file, &vec![0; log.len()], OFFSET).unwrap();
        let bits = log.iter().enumerate().flat_map(|(at, byte)| {
            (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| (at as u64 * 8 + bit) * PAGE)
        });
        bits.collect()
    }
}

fn page(addr: GuestAddress) -> u64 {
    addr.0 - addr.0 % PAGE
}

fn log_all(driver: &mut VhostUserDriver, on: bool) {
    let features = driver.features().low64() | F_PROTOCOL_FEATURES | if on { F_LOG_ALL } else { 0 };
    driver.endpoint().set_features(features).unwrap();
}

/// SET_VRING_ADDR of the running ring once more, with this flag.
fn ring_flag(driver: &mut VhostUserDriver, flags: u32, log: u64) {
    let config = driver.ring(0).queue_config();
    let translated = driver.features().contains(vm_virtio::Features::ACCESS_PLATFORM);
    let ram = driver.ram().clone();
    let place = |addr: GuestAddress| if translated { addr.0 } else { ram.user_addr(addr) };
    let (desc, used, avail) = (place(config.desc), place(config.device), place(config.driver));
    driver.endpoint().set_vring_addr(&VringAddr { index: 0, flags, desc, used, avail, log }).unwrap();
}

fn with_log(layout: RingLayout) -> VhostUserOptions {
    let mut options = options(layout);
    options.protocol |= ProtocolFeatures::LOG_SHMFD;
    options
}

fn started(options: VhostUserOptions) -> (TestDaemon, VhostUserDriver) {
    let daemon = TestDaemon::start();
    let driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
    (daemon, driver)
}

/// A request whose answer goes to a page of its own; the page.
fn ask_into(driver: &mut VhostUserDriver, text: &[u8]) -> u64 {
    let out = driver.ram().alloc(PAGE - 16, PAGE);
    let request = driver.ram().readable(text);
    driver.ring(0).add(&[request, Buf::writable(out, 64)]);
    driver.kick(0);
    assert_eq!(driver.wait_used(0, SOON).unwrap().len, text.len() as u32);
    out.0
}

#[test]
fn dirty_pages_are_marked_while_log_all_is_set_and_there_is_a_log() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(with_log(layout));
        let log = Log::up_to(4 << 20);
        ask_into(&mut driver, b"before");
        log.base(&mut driver);
        ask_into(&mut driver, b"a log but no wish");
        assert_eq!(log.take(), [0u64; 0]);
        for _ in 0..2 {
            log_all(&mut driver, true);
            let at = ask_into(&mut driver, b"logged");
            assert_eq!(log.take(), [at], "the buffer, and not the ring");
            log_all(&mut driver, false);
            ask_into(&mut driver, b"not any more");
            assert_eq!(log.take(), [0u64; 0]);
        }
        // Another log takes its place while running.
        log_all(&mut driver, true);
        let next = Log::up_to(4 << 20);
        next.base(&mut driver);
        let at = ask_into(&mut driver, b"elsewhere");
        assert_eq!((next.take(), log.take()), (vec![at], vec![]));
    }
}

/// A request that was out when the log came is in it, and one that ends by a stop, too.
#[test]
fn dirty_pages_of_requests_that_are_out_are_marked_when_they_end() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(with_log(layout));
        let out = driver.ram().alloc(PAGE - 16, PAGE);
        let request = driver.ram().readable(&[echo::ask::HOLD]);
        driver.ring(0).add(&[request, Buf::writable(out, 64)]);
        driver.kick(0);
        ask_into(&mut driver, b"beside");
        let log = Log::up_to(4 << 20);
        log.base(&mut driver);
        log_all(&mut driver, true);
        let used = driver.ring(0).queue_config().device;
        ring_flag(&mut driver, 1, used.0);
        log.take();
        driver.stop().unwrap();
        assert!(log.take().contains(&out.0));
        assert_eq!(driver.wait_used(0, SOON).unwrap().len, 4);
    }
}

/// The used ring is logged where the front-end says, by SET_VRING_ADDR while the ring runs, which it does not stop.
#[test]
fn dirty_rings_are_marked_at_log_guest_addr_while_the_flag_is_set() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(with_log(layout));
        // Beyond all memory, as the document allows.
        let said = 0x70_0000;
        let log = Log::up_to(0x80_0000);
        log.base(&mut driver);
        log_all(&mut driver, true);
        let desc = page(driver.ring(0).queue_config().desc);
        for _ in 0..2 {
            ring_flag(&mut driver, 1, said + 8);
            log.take();
            let at = ask_into(&mut driver, b"logged");
            driver.endpoint().get_status().unwrap();
            eventually("the ring is marked", || {
                let mut pages = log.take();
                pages.retain(|page| *page != at);
                let expected = if layout == RingLayout::Packed { vec![desc, said] } else { vec![said] };
                assert!(pages.is_empty() || pages == expected, "{layout:?}: {pages:x?}");
                !pages.is_empty()
            });
            ring_flag(&mut driver, 0, said);
            log.take();
            let at = ask_into(&mut driver, b"not any more");
            assert_eq!(log.take(), [at]);
        }
    }
}

/// Of the `vhost` crate's back-end: regions that come after SET_LOG_BASE were not in its log.
#[test]
fn peers_vhost_crate_memory_added_after_set_log_base_is_logged() {
    const LATE: u64 = 0x800_0000;
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(with_log(layout));
        let log = Log::up_to(LATE + (1 << 20));
        log.base(&mut driver);
        log_all(&mut driver, true);
        let late = TestRam::new(&[(LATE, 1 << 20)]);
        let region = MemoryRegion {
            guest_addr: LATE,
            size: 1 << 20,
            user_addr: late.regions()[0].user_addr,
            mmap_offset: 0,
        };
        driver.endpoint().add_mem_reg(region, late.fd()).unwrap();
        // No memory of the driver's own.
        let request = driver.ram().readable(b"late");
        driver.ring(0).add(&[request, Buf::writable(GuestAddress(LATE + 0x5000), 64)]);
        driver.kick(0);
        eventually("it is answered", || driver.interrupts(0) > 1);
        assert_eq!(log.take(), [LATE + 0x5000]);
        let mut text = [0; 4];
        late.read(GuestAddress(LATE + 0x5000), &mut text);
        assert_eq!(&text, b"late");
    }
}

#[test]
fn dirty_log_is_told_of_through_its_file_and_has_an_end() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(with_log(layout));
        let told = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        driver.endpoint().set_log_fd(told.as_fd()).unwrap();
        // No bit for anything but the first eight pages.
        let log = Log { size: 1, ..Log::up_to(0) };
        log.base(&mut driver);
        log_all(&mut driver, true);
        ring_flag(&mut driver, 1, u64::MAX);
        ask_into(&mut driver, b"far away");
        ask_into(&mut driver, b"far away, in the other region");
        log.take();
        let limit = Timespec { tv_sec: SOON.as_secs() as i64, tv_nsec: 0 };
        let mut files = [PollFd::new(&told, PollFlags::IN)];
        assert!(poll(&mut files, Some(&limit)).unwrap() > 0, "told");
        assert_eq!(ask(&mut driver, 0, b"on"), b"on");
    }
}

/// Behind an IOMMU the log is of guest-physical addresses.
#[test]
fn dirty_pages_behind_an_iommu_are_guest_physical() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(VhostUserOptions { iommu: true, ..with_log(layout) });
        ask_into(&mut driver, b"before");
        let log = Log::up_to(PHYSICAL + (4 << 20));
        log.base(&mut driver);
        log_all(&mut driver, true);
        let at = ask_into(&mut driver, b"logged");
        assert_eq!(log.take(), [PHYSICAL + at]);
        let config = driver.ring(0).queue_config();
        ring_flag(&mut driver, 1, config.device.0);
        log.take();
        let at = ask_into(&mut driver, b"logged");
        eventually("the ring is marked", || {
            let mut pages = log.take();
            pages.retain(|page| *page != PHYSICAL + at);
            let mut expected = vec![PHYSICAL + page(config.device)];
            if layout == RingLayout::Packed {
                expected.push(PHYSICAL + page(config.desc));
            }
            expected.sort_unstable();
            expected.dedup();
            assert!(pages.is_empty() || pages == expected, "{layout:?}: {pages:x?}");
            !pages.is_empty()
        });
    }
}

#[test]
fn dirty_log_that_is_none_ends_the_connection_and_one_that_is_truncated_fails_the_device() {
    for layout in RingLayout::ALL {
        let (daemon, mut driver) = started(with_log(layout));
        let log = Log::up_to(4 << 20);
        log.base(&mut driver);
        log_all(&mut driver, true);
        ask_into(&mut driver, b"logged");
        rustix::fs::ftruncate(&log.file, 0).unwrap();
        ask_into(&mut driver, b"not logged");
        eventually("the device needs a reset (failure policy 6)", || {
            let status = Status::from_bits_retain(driver.endpoint().get_status().unwrap());
            status.contains(Status::DEVICE_NEEDS_RESET)
        });
        driver.endpoint().set_timeout(SOON);
        let area = LogArea { size: 0x1000, offset: 0 };
        assert!(driver.endpoint().set_log_base(area, log.file.as_fd()).is_err(), "an empty file");
        drop(driver);
        let mut next = VhostUserDriver::connect(daemon.socket(0), with_log(layout)).unwrap();
        ask_into(&mut next, b"works");
    }
}
