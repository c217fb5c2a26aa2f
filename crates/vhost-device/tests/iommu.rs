//! A device behind an IOMMU: the front-end translates, and takes translations back.
mod support;

use std::os::fd::AsFd;

use support::*;
use vhost_user::{
    BackendListener, Error, FrontendCode, FrontendEndpoint, IotlbAccess, IotlbChange, IotlbReport,
    ProtocolFeatures, flags,
};
use virtio_testkit::{Buf, RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::{Features, GuestAddress, Status};

const PAGE: u64 = 0x1000;
const ALL: IotlbAccess = IotlbAccess::READ.union(IotlbAccess::WRITE);

fn behind(layout: RingLayout) -> VhostUserOptions {
    VhostUserOptions { iommu: true, ..options(layout) }
}

fn started(layout: RingLayout) -> (TestDaemon, VhostUserDriver) {
    let daemon = TestDaemon::start();
    let driver = VhostUserDriver::connect(daemon.socket(0), behind(layout)).unwrap();
    assert!(driver.features().contains(Features::ACCESS_PLATFORM));
    (daemon, driver)
}

/// Everything is invalid, and it is known to be.
fn flush(driver: &mut VhostUserDriver) {
    driver.endpoint().iotlb(IotlbChange::Invalidate { iova: 0, size: 0 }).unwrap();
}

/// The ring, after it was stopped.
fn go_on(driver: &mut VhostUserDriver) {
    driver.start_ring(0).unwrap();
    driver.endpoint().set_vring_enable(0, true).unwrap();
}

fn needs_reset(driver: &mut VhostUserDriver) -> bool {
    let status = Status::from_bits_retain(driver.endpoint().get_status().unwrap());
    status.contains(Status::DEVICE_NEEDS_RESET)
}

fn pages(driver: &VhostUserDriver) -> Vec<u64> {
    let pages = driver.misses().iter().map(|report| match report {
        IotlbReport::Miss { iova, .. } => iova - iova % PAGE,
        other => panic!("{other:?}"),
    });
    pages.collect()
}

#[test]
fn iommu_rings_and_buffers_are_asked_for_and_then_known() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        assert_eq!(ask(&mut driver, 0, b"hello"), b"hello");
        let config = driver.ring(0).queue_config();
        let asked = pages(&driver);
        for addr in [config.desc, config.driver, config.device] {
            assert!(asked.contains(&(addr.0 - addr.0 % PAGE)), "{layout:?}: {addr:?} of {asked:x?}");
        }
        let mut once = asked.clone();
        once.sort_unstable();
        once.dedup();
        assert_eq!(once.len(), asked.len(), "each once: {asked:x?}");
        // The same buffers again.
        let chain = [driver.ram().readable(b"again"), driver.ram().writable(64)];
        for round in 0..3 {
            driver.ring(0).add(&chain);
            driver.kick(0);
            assert_eq!(driver.wait_used(0, SOON).unwrap().len, 5);
            assert!(round == 0 || driver.answer_misses().unwrap() == 0);
        }
        driver.stop().unwrap();
        go_on(&mut driver);
        assert_eq!(ask(&mut driver, 0, b"go on"), b"go on");
        driver.reboot().unwrap();
        assert_eq!(ask(&mut driver, 0, b"new"), b"new");
    }
}

/// A buffer may have many pages, and its translations come one by one.
#[test]
fn iommu_a_buffer_of_many_pages() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        let request: Vec<u8> = (0..4096).map(|i| (i % 251) as u8).collect();
        let chain = [driver.ram().readable(&request), driver.ram().writable(40_000)];
        driver.ring(0).add(&chain);
        driver.kick(0);
        assert_eq!(driver.wait_used(0, SOON).unwrap().len, 4096);
        assert_eq!(driver.ram().written(&chain)[..4096], request);
    }
}

#[test]
fn iommu_nothing_is_touched_after_an_invalidation_was_acknowledged() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        assert_eq!(ask(&mut driver, 0, b"one"), b"one");
        flush(&mut driver);
        let ram = driver.ram().clone();
        let snapshot = |ram: &virtio_testkit::TestRam| {
            let mut bytes = vec![0; 1 << 20];
            ram.read(GuestAddress(0), &mut bytes);
            let mut more = vec![0; 1 << 20];
            ram.read(GuestAddress(2 << 20), &mut more);
            (bytes, more)
        };
        let chain = [driver.ram().readable(b"two"), driver.ram().writable(64)];
        driver.ring(0).add(&chain);
        let before = snapshot(&ram);
        driver.kick_anyway(0);
        std::thread::sleep(NEVER);
        assert!(snapshot(&ram) == before, "{layout:?}");
        // Translated again, it goes on.
        assert_eq!(driver.wait_used(0, SOON).unwrap().len, 3);
        assert_eq!(&driver.ram().written(&chain)[..3], b"two");
    }
}

/// The same address, another page.
#[test]
fn iommu_a_page_that_moves_is_read_where_it_is() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        let buffer = driver.ram().alloc(PAGE - 16, PAGE);
        let iova = buffer.0;
        let frames = [b"here", b"over"].map(|text| {
            let frame = driver.ram().alloc(PAGE - 16, PAGE);
            driver.ram().write(frame, text);
            frame
        });
        let out = driver.ram().writable(64);
        for (frame, text) in frames.into_iter().zip([b"here", b"over"]) {
            driver.translate(iova, frame.0, IotlbAccess::READ).unwrap();
            let at = driver.ring(0).add(&[Buf::readable(buffer, 4), out]);
            driver.kick(0);
            assert_eq!(driver.wait_used(0, SOON).map(|used| (used.id, used.len)), Some((at, 4)));
            assert_eq!(&driver.ram().contents(&out)[..4], text);
            driver.endpoint().iotlb(IotlbChange::Invalidate { iova, size: PAGE }).unwrap();
        }
    }
}

/// QEMU passes no invalidations on while rings are stopped.
#[test]
fn iommu_translations_do_not_outlive_the_rings() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        assert_eq!(ask(&mut driver, 0, b"one"), b"one");
        let before = driver.misses().len();
        driver.stop().unwrap();
        go_on(&mut driver);
        assert_eq!(ask(&mut driver, 0, b"two"), b"two");
        let config = driver.ring(0).queue_config();
        let again = &pages(&driver)[before..];
        assert!(again.contains(&(config.desc.0 - config.desc.0 % PAGE)), "{layout:?}: {again:x?}");
    }
}

/// A buffer that the device keeps does not hold up the VMM for ever, nor twice; nor does it fail the device.
#[test]
fn iommu_requests_that_are_out_keep_their_memory_over_an_invalidation() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        submit(&mut driver, 0, &[echo::ask::HOLD]);
        assert_eq!(ask(&mut driver, 0, b"beside"), b"beside");
        for _ in 0..3 {
            flush(&mut driver);
            assert_eq!(ask(&mut driver, 0, b"after"), b"after");
        }
        assert!(!needs_reset(&mut driver));
        // The rings are not translated when the request ends, and the used entry is there all the same.
        flush(&mut driver);
        driver.stop().unwrap();
        assert_eq!(driver.wait_used(0, SOON).unwrap().len, 4);
        go_on(&mut driver);
        assert_eq!(ask(&mut driver, 0, b"on"), b"on");
    }
}

/// A translation that does not allow what the driver wants is asked for once more, and then is an error.
#[test]
fn iommu_access_that_is_not_allowed_breaks_the_ring_and_is_reported() {
    for layout in RingLayout::ALL {
        let (_daemon, mut driver) = started(layout);
        assert_eq!(ask(&mut driver, 0, b"one"), b"one");
        let frame = driver.ram().alloc(PAGE - 16, PAGE);
        driver.ram().write(frame, &[7; 16]);
        driver.translate(frame.0, frame.0, IotlbAccess::READ).unwrap();
        let request = driver.ram().readable(b"two");
        driver.answer_misses().unwrap();
        driver.ring(0).add(&[request, Buf::writable(frame, 16)]);
        driver.kick(0);
        let wanted = (frame.0, IotlbAccess::WRITE);
        let mut asked = false;
        eventually("the failed access is reported", || {
            let listener = driver.backend_requests().unwrap();
            let Some(received) = listener.receive().unwrap() else { return false };
            match received.request {
                vhost_user::BackendRequest::Iotlb(IotlbReport::Miss { iova, access }) => {
                    asked |= (iova, access) == wanted;
                    let page = iova - iova % PAGE;
                    let access = if page == frame.0 { IotlbAccess::READ } else { ALL };
                    driver.translate(page, page, access).unwrap();
                    false
                }
                vhost_user::BackendRequest::Iotlb(IotlbReport::AccessFail { iova, access }) => {
                    assert_eq!((iova, access), wanted);
                    true
                }
                _ => false,
            }
        });
        assert!(asked, "not without having asked");
        eventually("the ring is broken", || driver.ring_failed(0) && needs_reset(&mut driver));
        assert_eq!(driver.ram().contents(&Buf::readable(frame, 16)), [7; 16]);
        driver.reset().unwrap();
        driver.start().unwrap();
        assert_eq!(ask(&mut driver, 0, b"again"), b"again");
    }
}

#[test]
fn iommu_hostile_updates_are_refused_and_floods_are_bounded() {
    let (_daemon, mut driver) = started(RingLayout::Split);
    let user = driver.ram().user_addr(GuestAddress(0));
    let change = |iova, size, user_addr, access| IotlbChange::Update { iova, size, user_addr, access };
    for bad in [
        change(0x1000, 0, user, ALL),
        change(u64::MAX, 2, user, ALL),
        change(0x1000, 0x1000, u64::MAX, ALL),
        change(0x1000, 0x1000, user - 1, ALL),
        change(0x1000, (1 << 20) + 1, user, ALL),
        change(0x1000, u64::MAX, user, ALL),
        change(0x1000, 0x1000, user, IotlbAccess::empty()),
    ] {
        let refused = driver.endpoint().iotlb(bad);
        assert!(matches!(refused, Err(Error::Refused { .. })), "{bad:?}: {refused:?}");
    }
    for page in 0..300 {
        driver.endpoint().iotlb(change((1 << 40) + page * PAGE, PAGE, user, ALL)).unwrap();
    }
    assert_eq!(ask(&mut driver, 0, b"fine"), b"fine");
    driver.endpoint().iotlb(IotlbChange::Invalidate { iova: u64::MAX, size: u64::MAX }).unwrap();
    assert_eq!(ask(&mut driver, 0, b"fine"), b"fine");
}

/// IOTLB_MSG has a reply of its own: whether it is asked for makes no difference, and there is never a second one.
#[test]
fn iommu_every_message_is_answered_asked_for_or_not() {
    let (_daemon, mut driver) = started(RingLayout::Split);
    let endpoint = driver.endpoint();
    let code = FrontendCode::IotlbMsg;
    // Invalidate everything; an update to nowhere.
    let [good, bad] = [(3_u8, 0_u64), (2, 1)].map(|(kind, size)| {
        [&[0; 8], &size.to_ne_bytes()[..], &u64::MAX.to_ne_bytes(), &[3, kind, 0, 0, 0, 0, 0, 0]].concat()
    });
    for need_reply in [0, flags::NEED_REPLY] {
        endpoint.send(code.code(), need_reply, &[&good], &[]).unwrap();
        endpoint.receive_ack(code).unwrap();
        endpoint.send(code.code(), need_reply, &[&bad], &[]).unwrap();
        let refused = endpoint.receive_ack(code);
        assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
        assert!(endpoint.get_features().is_ok(), "no second reply");
    }
}

/// "Suspended device state": a translation that was missing for a ring is not asked for when the ring is stopped. The
/// front-end says late where requests go, so that the miss has to wait.
#[test]
fn iommu_suspended_devices_ask_for_nothing() {
    let daemon = TestDaemon::start();
    let mut driver = VhostUserDriver::connect(daemon.socket(0), behind(RingLayout::Split)).unwrap();
    let protocol = driver.protocol_features();
    driver.stop().unwrap();
    let channel = |driver: &mut VhostUserDriver| {
        let (listener, other) = BackendListener::pair(protocol).unwrap();
        driver.endpoint().set_backend_req_fd(other.as_fd()).unwrap();
        listener
    };
    // Nobody listens any more.
    drop(channel(&mut driver));
    go_on(&mut driver);
    driver.endpoint().get_vring_base(0).unwrap();
    let mut listener = channel(&mut driver);
    assert!(listener.wait(NEVER).unwrap().is_none(), "suspended");
    go_on(&mut driver);
    let asked = listener.wait(SOON).unwrap().expect("a miss");
    assert!(matches!(asked.request, vhost_user::BackendRequest::Iotlb(IotlbReport::Miss { .. })));
}

#[test]
fn iommu_needs_somebody_who_translates() {
    let daemon = TestDaemon::start();
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    let offered = endpoint.get_features().unwrap();
    let protocol = endpoint.get_protocol_features().unwrap();
    endpoint.set_protocol_features(protocol & ProtocolFeatures::REPLY_ACK).unwrap();
    endpoint.set_owner().unwrap();
    let platform = Features::ACCESS_PLATFORM.low64();
    assert!(matches!(endpoint.set_features(offered), Err(Error::Refused { .. })));
    endpoint.set_features(offered & !platform).unwrap();
    let update = IotlbChange::Invalidate { iova: 0, size: 0 };
    assert!(matches!(endpoint.iotlb(update), Err(Error::Refused { .. })));
    drop(endpoint);
    // A front-end whose requests nobody answers: the ring waits, and stops.
    let options = VhostUserOptions { iommu: true, ..options(RingLayout::Split) };
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
    submit(&mut driver, 0, b"nobody");
    std::thread::sleep(NEVER);
    assert_eq!(driver.endpoint().get_vring_base(0).unwrap(), 0);
    let _ = driver.backend_requests().unwrap().as_fd();
}
