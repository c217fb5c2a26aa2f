//! What workers ask of the front-end: mappings of shared memory regions (virtio 1.4, 2.10), objects of other devices.
//! The front-end is a VMM that really maps, or one that refuses, talks nonsense, says nothing or goes away.
mod support;

use std::fs::File;
use std::num::NonZeroUsize;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{MemfdFlags, memfd_create};
use support::echo::{PAGE, ask as op};
use support::*;
use vhost_device::{DaemonOptions, MEMORY_SLOTS};
use vhost_user::{
    Answer, BackendCode, BackendListener, BackendReceived, BackendRequest, FrontendEndpoint, MemoryRegion,
    ProtocolFeatures,
};
use virtio_testkit::{RingLayout, SharedMemory, VhostUserDriver, VhostUserOptions};
use vm_virtio::{HostRequests, ShmRegion};

const REGIONS: [ShmRegion; 2] = [ShmRegion { id: 0, size: 16 * PAGE }, ShmRegion { id: 7, size: PAGE }];

/// Page n is filled with n + 1.
fn numbered_pages() -> Arc<File> {
    let file = File::from(memfd_create("pages", MemfdFlags::CLOEXEC).unwrap());
    for n in 0..8 {
        file.write_all_at(&[n as u8 + 1; PAGE as usize], n * PAGE).unwrap();
    }
    Arc::new(file)
}

fn daemon(file: &Arc<File>) -> TestDaemon {
    daemon_with(file, DaemonOptions::default())
}

fn daemon_with(file: &Arc<File>, options: DaemonOptions) -> TestDaemon {
    let file = file.clone();
    TestDaemon::with_options(1, options, move || {
        let (requests, heard) = (HostRequests::SHARED_OBJECTS, Arc::default());
        Echo::new(8).shared_memory(&REGIONS, file.clone()).host_requests(requests, heard)
    })
}

fn with_shmem(layout: RingLayout) -> VhostUserOptions {
    let all = options(layout);
    let shmem = ProtocolFeatures::SHMEM_MAP | ProtocolFeatures::BACKEND_SEND_FD;
    VhostUserOptions { protocol: all.protocol | shmem | ProtocolFeatures::SHARED_OBJECT, ..all }
}

fn connected(daemon: &TestDaemon) -> VhostUserDriver {
    VhostUserDriver::connect(daemon.socket(0), with_shmem(RingLayout::Split)).unwrap()
}

/// The next request of the back-end.
#[track_caller]
fn next(driver: &mut VhostUserDriver) -> BackendReceived {
    driver.backend_requests().unwrap().wait(SOON).unwrap().expect("a request")
}

#[track_caller]
fn nothing_asked(driver: &mut VhostUserDriver) {
    let received = driver.backend_requests().unwrap().wait(NEVER).unwrap();
    assert!(received.is_none(), "{received:?}");
}

fn reply(driver: &mut VhostUserDriver, received: BackendReceived, answer: Answer) {
    driver.backend_requests().unwrap().reply(received.ticket, answer).unwrap();
}

/// The text of the next answer of the device.
#[track_caller]
fn text(driver: &mut VhostUserDriver, chain: &Out) -> String {
    let used = driver.wait_used(0, SOON).expect("an answer");
    assert_eq!(used.id, chain.id);
    let mut data = driver.ram().written(&chain.bufs);
    data.truncate(used.len as usize);
    String::from_utf8(data).unwrap()
}

struct Out {
    id: u16,
    bufs: [virtio_testkit::Buf; 2],
}

fn send(driver: &mut VhostUserDriver, request: &[u8]) -> Out {
    let bufs = [driver.ram().readable(request), driver.ram().writable(64)];
    let id = driver.ring(0).add(&bufs);
    driver.kick(0);
    Out { id, bufs }
}

/// A request for which the front-end does what it is asked.
#[track_caller]
fn served(driver: &mut VhostUserDriver, vmm: &mut SharedMemory, request: &[u8]) -> String {
    let out = send(driver, request);
    let received = next(driver);
    let BackendReceived { request, ticket } = received;
    let answer = vmm.carry_out(request);
    driver.backend_requests().unwrap().reply(ticket, answer).unwrap();
    text(driver, &out)
}

/// A request that the device answers without asking anybody.
#[track_caller]
fn unserved(driver: &mut VhostUserDriver, request: &[u8]) -> String {
    let out = send(driver, request);
    let answer = text(driver, &out);
    nothing_asked(driver);
    answer
}

#[test]
fn virtio_2_10_files_are_mapped_where_the_device_says_until_it_unmaps_them() {
    let file = numbered_pages();
    let daemon = daemon(&file);
    for layout in RingLayout::ALL {
        let mut driver = VhostUserDriver::connect(daemon.socket(0), with_shmem(layout)).unwrap();
        let config = driver.endpoint().get_shmem_config().unwrap();
        assert_eq!(config, [(0, 16 * PAGE), (7, PAGE)]);
        let mut vmm = SharedMemory::new(&config);
        // Two pages from page 3 of the file, at page 2 of the region.
        assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 2, 2, 3, 0]), "done");
        let seen = [0, 2 * PAGE - 1, 2 * PAGE, 3 * PAGE - 1, 3 * PAGE, 4 * PAGE].map(|at| vmm.read(0, at));
        assert_eq!(seen, [None, None, Some(4), Some(4), Some(5), None]);
        assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 7, 0, 1, 1, 1]), "done");
        vmm.write(7, 5, 99);
        let mut byte = [0];
        file.read_exact_at(&mut byte, PAGE + 5).unwrap();
        assert_eq!(byte, [99], "the guest writes into the file");
        vmm.write(7, 5, 2);
        // Not over another one, not a part of one, not outside.
        for overlapping in [[op::MAP, 0, 1, 2, 0, 0], [op::MAP, 0, 3, 1, 0, 0], [op::MAP, 0, 0, 16, 0, 0]] {
            assert_eq!(unserved(&mut driver, &overlapping), "there is a mapping already");
        }
        for other in [[op::UNMAP, 0, 2, 1], [op::UNMAP, 0, 3, 1], [op::UNMAP, 0, 8, 1]] {
            assert_eq!(unserved(&mut driver, &other), "that is no mapping");
        }
        for outside in [[op::MAP, 0, 15, 2, 0, 0], [op::MAP, 1, 0, 1, 0, 0], [op::MAP, 0, 0, 0, 0, 0]] {
            let refused = "not a range of whole pages in a shared memory region";
            assert_eq!(unserved(&mut driver, &outside), refused);
        }
        assert_eq!(served(&mut driver, &mut vmm, &[op::UNMAP, 0, 2, 2]), "done");
        assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 3, 1, 0, 0]), "done");
        assert_eq!(vmm.read(0, 3 * PAGE), Some(1));
        driver.reset().unwrap();
        // GET_SHMEM_CONFIG: unchanged for the lifetime of the connection.
        assert_eq!(driver.endpoint().get_shmem_config().unwrap(), config);
    }
}

#[test]
fn shared_memory_is_offered_by_devices_that_have_it_and_to_front_ends_that_took_it() {
    let both = ProtocolFeatures::SHMEM_MAP | ProtocolFeatures::BACKEND_SEND_FD;
    let without = TestDaemon::start();
    let mut endpoint = FrontendEndpoint::connect(without.socket(0)).unwrap();
    assert!(!endpoint.get_protocol_features().unwrap().intersects(both));
    let daemon = daemon(&numbered_pages());
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    endpoint.set_timeout(SOON);
    assert!(endpoint.get_protocol_features().unwrap().contains(both));
    assert!(endpoint.get_shmem_config().is_err(), "not negotiated");
    drop(endpoint);
    for missing in [both, ProtocolFeatures::BACKEND_SEND_FD, ProtocolFeatures::REPLY_ACK] {
        let all = with_shmem(RingLayout::Split);
        let options = VhostUserOptions { protocol: all.protocol.difference(missing), ..all };
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
        assert_eq!(unserved(&mut driver, &[op::MAP, 0, 0, 1, 0, 0]), "the host does not do this");
        driver.reset().unwrap();
    }
    let all = with_shmem(RingLayout::Split);
    let no_channel = all.protocol.difference(ProtocolFeatures::BACKEND_REQ);
    let options = VhostUserOptions { protocol: no_channel, ..all };
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
    let out = send(&mut driver, &[op::MAP, 0, 0, 1, 0, 0]);
    assert_eq!(text(&mut driver, &out), "there is no front-end");
}

#[test]
fn policy_3_what_a_front_end_refuses_is_not_there_and_can_be_asked_for_again() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let map = [op::MAP, 0, 0, 4, 0, 0];
    for _ in 0..2 {
        let out = send(&mut driver, &map);
        let received = next(&mut driver);
        reply(&mut driver, received, Answer::Failed);
        assert_eq!(text(&mut driver, &out), "the host refused");
    }
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    assert_eq!(served(&mut driver, &mut vmm, &map), "done");
    // One that does not unmap still has it.
    let out = send(&mut driver, &[op::UNMAP, 0, 0, 4]);
    let received = next(&mut driver);
    reply(&mut driver, received, Answer::Failed);
    assert_eq!(text(&mut driver, &out), "the host refused");
    assert_eq!(unserved(&mut driver, &map), "there is a mapping already");
}

/// Also: what is mapped for nobody is unmapped before anything else is asked.
#[test]
fn policy_7_a_front_end_that_does_not_answer_is_given_up_and_asked_nothing_more_until_it_does() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    let map = [op::MAP, 0, 0, 1, 0, 0];
    let out = send(&mut driver, &map);
    let late = next(&mut driver);
    assert_eq!(text(&mut driver, &out), "the host did not answer");
    // The device is well, the front-end is in doubt.
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
    let out = send(&mut driver, &[op::MAP, 0, 8, 1, 0, 0]);
    nothing_asked(&mut driver);
    assert_eq!(text(&mut driver, &out), "the host did not answer");
    // It has mapped it after all.
    let BackendReceived { request, ticket } = late;
    let answer = vmm.carry_out(request);
    driver.backend_requests().unwrap().reply(ticket, answer).unwrap();
    let out = send(&mut driver, &map);
    for code in [BackendCode::ShmemUnmap, BackendCode::ShmemMap] {
        let BackendReceived { request, ticket } = next(&mut driver);
        assert_eq!(request.code(), code);
        let answer = vmm.carry_out(request);
        driver.backend_requests().unwrap().reply(ticket, answer).unwrap();
    }
    assert_eq!(text(&mut driver, &out), "done");
    assert_eq!((vmm.mappings(), vmm.read(0, 0)), (1, Some(1)));
}

#[test]
fn policy_4_a_channel_that_ends_or_talks_nonsense_answers_what_is_out() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let nonsense: [&[u8]; 4] = [
        &[0xff; 64],
        // A reply to something else; to the right request with half a value; with no value.
        &[4, 0, 0, 0, 5, 0, 0, 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        &[9, 0, 0, 0, 5, 0, 0, 0, 4, 0, 0, 0, 0, 0, 0, 0],
        &[9, 0, 0, 0, 5, 0, 0, 0, 0, 0, 0, 0],
    ];
    for bytes in nonsense.map(Some).into_iter().chain([None]) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        driver.endpoint().set_backend_req_fd(theirs.as_fd()).unwrap();
        drop(theirs);
        let out = send(&mut driver, &[op::MAP, 0, 0, 1, 0, 0]);
        ours.set_read_timeout(Some(SOON)).unwrap();
        // Header, range, offset in the file, flags. What the channel before may have left mapped is unmapped first.
        let mut message = [0; 12 + 40];
        while message[0] != 9 {
            std::io::Read::read_exact(&mut &ours, &mut message).unwrap();
        }
        if let Some(bytes) = bytes {
            std::io::Write::write_all(&mut &ours, bytes).unwrap();
        } else {
            drop(ours);
        }
        assert_eq!(text(&mut driver, &out), "there is no front-end");
    }
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
    // A channel later all is well: what may be mapped is not any more.
    let (mut listener, other) = BackendListener::pair(driver.protocol_features()).unwrap();
    driver.endpoint().set_backend_req_fd(other.as_fd()).unwrap();
    drop(other);
    let out = send(&mut driver, &[op::MAP, 0, 0, 1, 0, 0]);
    let mut unmapped = 0;
    loop {
        let BackendReceived { request, ticket } = listener.wait(SOON).unwrap().expect("a request");
        match request {
            BackendRequest::ShmemUnmap(range) if range.offset == 0 && range.len == PAGE => unmapped += 1,
            BackendRequest::ShmemMap { .. } => {
                listener.reply(ticket, Answer::Done).unwrap();
                break;
            }
            other => panic!("{other:?}"),
        }
    }
    assert!(unmapped > 0);
    assert_eq!(text(&mut driver, &out), "done");
}

#[test]
fn virtio_2_4_a_reset_answers_what_is_out_and_leaves_nothing_mapped() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 0, 1, 0, 0]), "done");
    send(&mut driver, &[op::MAP, 0, 4, 1, 4, 0]);
    let late = next(&mut driver);
    // The status reads 0 afterwards: nothing was stuck.
    driver.reset().unwrap();
    vmm.reset();
    driver.start().unwrap();
    // The front-end gets to it only now.
    let answer = vmm.carry_out(late.request);
    driver.backend_requests().unwrap().reply(late.ticket, answer).unwrap();
    let out = send(&mut driver, &[op::MAP, 0, 0, 1, 2, 0]);
    for code in [BackendCode::ShmemUnmap, BackendCode::ShmemMap] {
        let BackendReceived { request, ticket } = next(&mut driver);
        assert_eq!(request.code(), code);
        let answer = vmm.carry_out(request);
        driver.backend_requests().unwrap().reply(ticket, answer).unwrap();
    }
    assert_eq!(text(&mut driver, &out), "done");
    assert_eq!((vmm.mappings(), vmm.read(0, 0), vmm.read(0, 4 * PAGE)), (1, Some(3), None));
}

/// QEMU makes a memory region of each mapping, and does not survive more of them than it has slots.
#[test]
fn peers_qemu_a_mapping_takes_a_memory_slot_and_the_last_one_is_left_alone() {
    let file = numbered_pages();
    let daemon = daemon(&file);
    let mut driver = connected(&daemon);
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    let first = driver.ram().regions().len() as u64;
    let slot = |n: u64| MemoryRegion {
        guest_addr: (1 << 40) + n * PAGE,
        size: PAGE,
        user_addr: (1 << 45) + n * PAGE,
        mmap_offset: 0,
    };
    let last = MEMORY_SLOTS as u64 - 2;
    for n in first..last {
        driver.endpoint().add_mem_reg(slot(n), file.as_fd()).unwrap();
    }
    assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 0, 1, 0, 0]), "done");
    driver.endpoint().add_mem_reg(slot(last), file.as_fd()).unwrap();
    assert_eq!(unserved(&mut driver, &[op::MAP, 0, 1, 1, 0, 0]), "too many at once");
    assert_eq!(served(&mut driver, &mut vmm, &[op::UNMAP, 0, 0, 1]), "done");
    driver.endpoint().rem_mem_reg(slot(last)).unwrap();
    assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 1, 1, 0, 0]), "done");
}

/// A front-end that does not say that it resets the device, as QEMU for its generic devices: a ring that begins again is
/// all that there is to see.
#[test]
fn virtio_2_4_a_reset_that_the_front_end_did_not_ask_for_unmaps() {
    let daemon = daemon(&numbered_pages());
    let all = with_shmem(RingLayout::Split);
    let silent = ProtocolFeatures::STATUS | ProtocolFeatures::RESET_DEVICE;
    let options = VhostUserOptions { protocol: all.protocol.difference(silent), ..all };
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    for offset in [0, 8] {
        assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, offset, 1, 0, 0]), "done");
    }
    driver.reboot().unwrap();
    for _ in 0..2 {
        let received = next(&mut driver);
        assert!(matches!(vmm.carry_out(received.request), Answer::Done));
    }
    assert_eq!(vmm.mappings(), 0);
    assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 8, 1, 0, 0]), "done");
}

/// "Mappings are automatically unmapped by the front-end across device reset", and by nothing else.
#[test]
fn a_mapping_is_there_for_the_next_connection() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, 0, 1, 0, 0]), "done");
    driver.reconnect(daemon.socket(0)).unwrap();
    assert_eq!(unserved(&mut driver, &[op::MAP, 0, 0, 1, 0, 0]), "there is a mapping already");
    assert_eq!(served(&mut driver, &mut vmm, &[op::UNMAP, 0, 0, 1]), "done");
    assert_eq!(vmm.mappings(), 0);
}

#[test]
fn get_vring_base_waits_for_an_answer_that_comes() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let (mut listener, other) = BackendListener::pair(driver.protocol_features()).unwrap();
    driver.endpoint().set_backend_req_fd(other.as_fd()).unwrap();
    drop(other);
    let out = send(&mut driver, &[op::MAP, 0, 0, 1, 0, 0]);
    let received = listener.wait(SOON).unwrap().expect("a request");
    let thread = std::thread::spawn(move || {
        // While the other thread waits for the ring to stop.
        std::thread::sleep(Duration::from_millis(200));
        listener.reply(received.ticket, Answer::Done).unwrap();
        listener
    });
    driver.stop().unwrap();
    assert_eq!(text(&mut driver, &out), "done");
    drop(thread.join().unwrap());
}

#[test]
fn virtio_2_12_objects_of_other_devices_are_looked_up() {
    let daemon = daemon(&numbered_pages());
    let mut driver = connected(&daemon);
    let mut vmm = SharedMemory::default();
    let object = File::from(memfd_create("object", MemfdFlags::CLOEXEC).unwrap());
    object.write_all_at(b"an object", 0).unwrap();
    vmm.export([5; 16], OwnedFd::from(object));
    for _ in 0..3 {
        assert_eq!(served(&mut driver, &mut vmm, &[op::LOOK_UP, 5]), "an object");
        assert_eq!(served(&mut driver, &mut vmm, &[op::LOOK_UP, 6]), "the host refused");
    }
    // One that comes too late is closed, and in nobody's way.
    let out = send(&mut driver, &[op::LOOK_UP, 5]);
    let late = next(&mut driver);
    assert_eq!(text(&mut driver, &out), "the host did not answer");
    let answer = vmm.carry_out(late.request);
    driver.backend_requests().unwrap().reply(late.ticket, answer).unwrap();
    assert_eq!(served(&mut driver, &mut vmm, &[op::LOOK_UP, 5]), "an object");
}

#[test]
fn policy_8_no_more_is_asked_at_once_than_there_is_room_for() {
    let daemon = daemon(&numbered_pages());
    let all = with_shmem(RingLayout::Split);
    let mut driver =
        VhostUserDriver::connect(daemon.socket(0), VhostUserOptions { queue_size: 256, ..all }).unwrap();
    // All in one turn of the lane.
    let bufs = [driver.ram().readable(&[op::LOOK_UP, 1]), driver.ram().writable(64)];
    let count = 80;
    for _ in 0..count {
        driver.ring(0).add(&bufs);
    }
    driver.kick(0);
    let refused = count - vm_virtio::upcall::MAX_UPCALLS;
    for _ in 0..refused {
        let used = driver.wait_used(0, SOON).expect("an answer");
        assert_eq!(used.len as usize, "too many at once".len());
    }
    for _ in refused..count {
        let received = next(&mut driver);
        reply(&mut driver, received, Answer::Failed);
    }
    for _ in refused..count {
        let used = driver.wait_used(0, SOON).expect("an answer");
        assert_eq!(used.len as usize, "the host refused".len());
    }
    nothing_asked(&mut driver);
}

/// `--threads`: answers and the end of patience wake a lane that has no thread of its own.
#[test]
fn lanes_in_a_pool_hear_answers_and_lose_patience_as_others_do() {
    let options = DaemonOptions { threads: NonZeroUsize::new(1), ..DaemonOptions::default() };
    let daemon = daemon_with(&numbered_pages(), options);
    let mut driver = connected(&daemon);
    let mut vmm = SharedMemory::new(&[(0, 16 * PAGE)]);
    for page in 0..3 {
        assert_eq!(served(&mut driver, &mut vmm, &[op::MAP, 0, page, 1, page, 0]), "done");
    }
    let out = send(&mut driver, &[op::MAP, 0, 8, 1, 0, 0]);
    let _unanswered = next(&mut driver);
    assert_eq!(text(&mut driver, &out), "the host did not answer");
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
}
