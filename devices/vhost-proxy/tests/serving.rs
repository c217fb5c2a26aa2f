//! A guest's driver, the proxy and a daemon: what works through it, in both ring layouts.
mod support;

use std::sync::Arc;
use std::sync::atomic::Ordering;

use support::{Backend, Bell, Guest, SOON, Setup, echo_options, entropy_options, until};
use vhost_proxy::{ConfigSource, Proxy, ProxyError, ProxyOptions};
use vhost_user::ProtocolFeatures;
use virtio_testkit::{RingLayout, TestRam};
use vm_virtio::device::ConfigWriter;
use vm_virtio::memory::SharedMemory;
use vm_virtio::{
    DeviceType, DirtyLog, EventFd, Features, GuestAddress, HostEvent, SnapshotError, Status, Stop, WaitFor,
};

fn both(test: impl Fn(RingLayout)) {
    RingLayout::ALL.into_iter().for_each(test);
}

#[test]
fn requests_go_to_the_back_end_and_come_back_by_the_guests_own_files() {
    let backend = Backend::start(&["--queues", "3"]);
    both(|layout| {
        let mut guest = Guest::echo(&backend.socket(), layout);
        assert_eq!(guest.lines.len(), 3);
        for round in 0..200u32 {
            let queue = (round % 3) as usize;
            let request = format!("request {round}").into_bytes();
            assert_eq!(guest.ask(queue, &request, 64), request);
        }
        assert!(guest.lines.iter().all(|line| line.interrupts > 0));
        guest.ram.check_guards().unwrap();
        // The lane has seen none of it.
        let stats = guest.engine.stats(0).unwrap();
        assert_eq!((stats.requests.popped, stats.interrupts), (0, 0));
    });
}

/// "Front-ends SHOULD inject a kick after SET_VRING_KICK", for back-ends that start a ring with its first kick. Ours does not
/// take kicks out of an eventfd.
#[test]
fn front_end_kicks_after_set_vring_kick() {
    let backend = Backend::start(&[]);
    both(|layout| {
        let mut guest = Guest::echo(&backend.socket(), layout);
        until("a kick that the driver did not give", || support::counted(&guest.lines[0].kick) > 0);
        guest.works();
        support::counted(&guest.lines[0].kick);
        // Again when it goes on.
        let state = guest.stop(0).expect("finished");
        guest.start(0, Some(state));
        until("a kick that the driver did not give", || support::counted(&guest.lines[0].kick) > 0);
    });
}

/// What a guest's life is made of, whatever the back-end offers.
fn life(double: &support::double::Double, layout: RingLayout) -> Vec<u32> {
    let proxy = Proxy::with(double.connector(), echo_options()).unwrap();
    let mut guest = Guest::running(proxy, Setup::new(layout));
    guest.works();
    guest.engine.memory(guest.ram.ram(), WaitFor::NewRequests).wait();
    let _ = guest.engine.write_config(0, &[1], ConfigWriter::Driver);
    guest.engine.enable(0, false).wait();
    guest.engine.enable(0, true).wait();
    guest.works();
    let state = guest.stop(0).expect("finished");
    guest.start(0, Some(state));
    guest.works();
    guest.reset();
    guest.bring_up();
    guest.works();
    assert!(!guest.needs_reset(), "{:?}", guest.ear.reasons());
    drop(guest);
    std::mem::take(&mut double.plan.lock().unwrap().requests)
}

/// Each "should be sent only when" of the document: a back-end that does not offer it is not asked.
#[test]
fn front_end_sends_nothing_that_was_not_offered() {
    let backend = Backend::start(&[]);
    let gated: [(ProtocolFeatures, &[u32]); 7] = [
        (ProtocolFeatures::MQ, &[17]),
        (ProtocolFeatures::BACKEND_REQ, &[21]),
        (ProtocolFeatures::CONFIG, &[24, 25]),
        (ProtocolFeatures::INFLIGHT_SHMFD, &[31, 32]),
        (ProtocolFeatures::RESET_DEVICE, &[34]),
        (ProtocolFeatures::CONFIGURE_MEM_SLOTS, &[36, 37]),
        (ProtocolFeatures::STATUS, &[39, 40]),
    ];
    both(|layout| {
        let everything = life(&support::double::Double::new(backend.socket()), layout);
        for (feature, codes) in gated {
            assert!(codes.iter().all(|code| everything.contains(code)), "{feature:?} {everything:?}");
            let double = support::double::Double::new(backend.socket());
            double.without(feature);
            let sent = life(&double, layout);
            assert!(!codes.iter().any(|code| sent.contains(code)), "{feature:?}: {sent:?}");
        }
        // Without bit 30 none of it, nor SET_VRING_ENABLE: what there was before protocol features.
        let double = support::double::Double::new(backend.socket());
        double.plan.lock().unwrap().hidden = vhost_user::F_PROTOCOL_FEATURES;
        let sent = life(&double, layout);
        assert!(everything.contains(&18) && sent.iter().all(|code| *code <= 14), "{sent:?}");
    });
}

/// Contract, "What QEMU does": back-ends have seen no other order.
#[test]
fn front_end_messages_come_in_qemus_order() {
    let backend = Backend::start(&[]);
    both(|layout| {
        let sent = life(&support::double::Double::new(backend.socket()), layout);
        let order = [1, 15, 16, 17, 3, 1, 24, 2, 31, 32, 37, 8, 10, 9, 12, 13, 18, 39];
        let mut sent = sent.iter();
        for code in order {
            assert!(sent.any(|sent| *sent == code), "{code} is missing or out of order");
        }
    });
}

#[test]
fn a_host_whose_kicks_and_interrupts_are_calls_is_served_too() {
    let backend = Backend::start(&[]);
    both(|layout| {
        let proxy = Proxy::connect(backend.socket(), echo_options()).unwrap();
        let mut guest = Guest::running(proxy, Setup { bridged: true, ..Setup::new(layout) });
        for _ in 0..50 {
            guest.works();
        }
        assert!(guest.lines[0].bell.0.load(Ordering::SeqCst) > 0);
    });
}

#[test]
fn the_entropy_daemon_gives_bytes() {
    let backend = Backend::start(&["--entropy"]);
    both(|layout| {
        let proxy = Proxy::connect(backend.socket(), entropy_options()).unwrap();
        let mut guest = Guest::running(proxy, Setup::new(layout));
        let bytes = guest.ask(0, &[], 4096);
        assert_eq!(bytes.len(), 4096);
        assert!(bytes.iter().any(|byte| *byte != bytes[0]));
    });
}

#[test]
fn features_are_those_that_the_back_end_and_this_side_have() {
    let backend = Backend::start(&["--without", "in_order,ring_packed"]);
    let proxy = Proxy::connect(backend.socket(), echo_options()).unwrap();
    let carried = Features::SUSPEND | Features::NOTIFICATION_DATA | Features::RING_RESET;
    let guest = Guest::new(proxy, Setup { carried, ..Setup::new(RingLayout::Split) });
    let ring = guest.engine.offered() & Features::NOT_A_DEVICES;
    assert_eq!(ring, Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX);
    assert_eq!(guest.engine.offered() - Features::NOT_A_DEVICES, Features::from(1 << 5));
    assert!(guest.engine.set_driver_features(Features::IN_ORDER).is_err());
}

#[test]
fn a_reset_reaches_the_back_end_and_the_device_works_again() {
    let backend = Backend::start(&["--queues", "2"]);
    both(|layout| {
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        assert_eq!(guest.ask(0, b"N", 1), [2]);
        for _ in 0..3 {
            guest.reset();
            guest.bring_up();
            assert_eq!(guest.ask(0, b"N", 1), [1], "the back-end counts from its reset on");
            guest.works();
        }
    });
}

#[test]
fn a_reset_is_told_at_once_and_not_when_the_next_driver_comes() {
    let backend = Backend::start(&[]);
    let double = support::double::Double::new(backend.socket());
    let mut guest = Guest::running(
        Proxy::with(double.connector(), echo_options()).unwrap(),
        Setup::new(RingLayout::Split),
    );
    guest.works();
    let count = |code: u32| double.plan.lock().unwrap().requests.iter().filter(|seen| **seen == code).count();
    // RESET_DEVICE, SET_STATUS.
    let (resets, statuses) = (count(34), count(39));
    guest.reset();
    until("the back-end is told", || count(34) > resets && count(39) > statuses);
}

#[test]
fn a_new_guest_does_not_go_on_with_what_the_last_one_left() {
    let backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    guest.works();
    drop(guest);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    assert_eq!(guest.ask(0, b"N", 1), [1]);
}

#[test]
fn a_stopped_ring_has_finished_its_requests_and_goes_on_where_it_was() {
    let backend = Backend::start(&["--queues", "2"]);
    both(|layout| {
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        let id = guest.held(0, b"Hold this");
        guest.works_on(1);
        let state = guest.stop(0).expect("finished");
        assert_eq!(guest.lines[0].ring.used().expect("given back").id, id);
        assert_eq!(state, guest.lines[0].ring.queue_state());
        guest.works_on(1);
        let (late, _) = guest.submit(0, b"while stopped", 64);
        guest.start(0, Some(state));
        assert_eq!(guest.wait_used(0, SOON).expect("served now").id, late);
        guest.works();
    });
}

#[test]
fn a_disabled_ring_waits() {
    let backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    guest.works();
    guest.engine.enable(0, false).wait();
    guest.submit(0, b"later", 64);
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert!(guest.lines[0].ring.used().is_none());
    guest.engine.enable(0, true).wait();
    assert!(guest.wait_used(0, SOON).is_some());
}

#[test]
fn a_single_queue_is_reset_by_stopping_its_ring_where_the_back_end_offers_that() {
    // Ours does not, since front-ends like QEMU do not pass it on; what is needed of it is in the messages all the same.
    let backend = Backend::start(&["--queues", "2"]);
    let double = support::double::Double::new(backend.socket());
    double.plan.lock().unwrap().added = Features::RING_RESET.low64();
    both(|layout| {
        let proxy = Proxy::with(double.connector(), echo_options()).unwrap();
        let setup = Setup { carried: Features::RING_RESET, ..Setup::new(layout) };
        let mut guest = Guest::running(proxy, setup);
        guest.works();
        guest.held(0, b"Hold this");
        guest.engine.reset_queue(0).wait().expect("reset");
        guest.works_on(1);
        guest.lines[0].ring.restart();
        guest.start(0, None);
        guest.works();
        assert!(!guest.needs_reset());
    });
    let plain = Proxy::connect(backend.socket(), echo_options()).unwrap();
    let setup = Setup { carried: Features::RING_RESET, ..Setup::new(RingLayout::Split) };
    let guest = Guest::running(plain, setup);
    assert!(guest.engine.reset_queue(0).wait().is_err(), "not offered, so not negotiated");
}

#[test]
fn policy_8_a_driver_that_writes_faster_than_the_back_end_follows_fills_no_memory() {
    let mut backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    guest.works();
    backend.freeze();
    for round in 0..20_000u32 {
        guest.engine.write_config(0, &[round as u8], ConfigWriter::Driver).unwrap();
    }
    until("some are dropped", || guest.stats.dropped_writes.load(Ordering::Relaxed) > 19_000);
    backend.restart();
    guest.works();
    assert!(!guest.needs_reset());
}

#[test]
fn the_interrupt_of_a_running_ring_can_be_exchanged() {
    let backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    guest.works();
    // To a call, and to another file.
    let bell = Arc::new(Bell::default());
    guest.engine.set_call(0, Some(bell.clone())).wait();
    let before = bell.0.load(Ordering::SeqCst);
    // Whoever has taken everything asks for the next interrupt.
    assert!(guest.lines[0].ring.used().is_none());
    guest.submit(0, b"ring the bell", 64);
    until("the bell rings", || bell.0.load(Ordering::SeqCst) > before);
    // Not necessarily for this one: the exchange rings it, too, and that comes through a thread.
    until("the answer", || guest.lines[0].ring.used().is_some());
    let other = support::event_file();
    let call = Arc::new(EventFd::new(other.try_clone().unwrap()).unwrap());
    guest.engine.set_call(0, Some(call)).wait();
    guest.lines[0].call = other;
    support::counted(&guest.lines[0].call);
    guest.works();
}

/// What is heard of ring 0. Its back-end tells of it on two ways, by the ring's file and by its status: either may come first.
fn faults(guest: &Guest) -> usize {
    guest.ear.count(|event| matches!(event, HostEvent::QueueFault { queue: 0, .. }))
}

#[test]
fn memory_changes_while_requests_are_served() {
    for slots in [true, false] {
        let backend = Backend::start(&[]);
        let double = support::double::Double::new(backend.socket());
        let proxy = match slots {
            true => Proxy::connect(backend.socket(), echo_options()).unwrap(),
            false => {
                Proxy::with(double.without(ProtocolFeatures::CONFIGURE_MEM_SLOTS).connector(), echo_options())
                    .unwrap()
            }
        };
        let high = GuestAddress(1 << 32);
        let ram = TestRam::new(&[(0, 8 << 20), (16 << 20, 8 << 20), (high.0, 1 << 20)]);
        ram.forbid(high);
        let all = || vm_virtio::GuestRam::new(ram.memory());
        let mut guest = Guest::running(proxy, Setup { ram: ram.clone(), ..Setup::new(RingLayout::Split) });
        guest.works();
        // A region far away is unplugged and plugged, used in between; the rings stay where they are.
        for round in 0..20u8 {
            guest.engine.memory(all(), WaitFor::NewRequests).wait();
            ram.write(high, &[round; 32]);
            let request = virtio_testkit::Buf::readable(high, 32);
            let answer = virtio_testkit::Buf::writable(GuestAddress(high.0 + 4096), 32);
            guest.lines[0].ring.add(&[request, answer]);
            guest.kick(0);
            assert_eq!(guest.wait_used(0, SOON).expect("an answer").len, 32);
            assert_eq!(ram.contents(&answer), [round; 32]);
            guest.engine.memory(ram.ram(), WaitFor::OldChainsGone).wait();
        }
        // What is gone is gone for the back-end, too.
        guest.lines[0].ring.add(&[virtio_testkit::Buf::readable(high, 32)]);
        guest.kick(0);
        until("the ring is broken", || guest.failure_is_told() && faults(&guest) > 0);
        assert_eq!(faults(&guest), 1);
        guest.reset();
        guest.bring_up();
        guest.works();
    }
}

#[test]
fn policy_1_a_broken_ring_stops_alone_and_needs_a_reset() {
    let backend = Backend::start(&["--queues", "2"]);
    both(|layout| {
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        let nowhere = virtio_testkit::Buf::writable(GuestAddress(1 << 40), 16);
        guest.lines[0].ring.add(&[nowhere]);
        guest.kick(0);
        until("the ring is broken", || guest.failure_is_told() && faults(&guest) > 0);
        assert_eq!(faults(&guest), 1);
        guest.works_on(1);
        guest.reset();
        guest.bring_up();
        guest.works();
    });
}

#[test]
fn the_back_ends_configuration_is_read_written_and_followed() {
    let backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    let read = |guest: &Guest| {
        let mut bytes = [0; 8];
        let generation = guest.engine.config().read(0, &mut bytes);
        (bytes, generation)
    };
    let (bytes, generation) = read(&guest);
    assert_eq!(bytes, [0, 1, 2, 3, 4, 5, 6, 7]);
    // By the device.
    let changes = |guest: &Guest| guest.ear.count(|event| matches!(event, HostEvent::ConfigChanged));
    assert_eq!(guest.ask(0, b"CX", 8), b"CX");
    until("the change is told", || changes(&guest) == 1);
    let (bytes, changed) = read(&guest);
    assert_eq!(bytes[0], b'X');
    assert_ne!(changed, generation, "2.5.2");
    // By the driver: the device lets it change one byte, and is not told of it.
    guest.engine.write_config(0, &[9, 9], ConfigWriter::Driver).unwrap();
    until("the write arrives", || read(&guest).0 == [9, 1, 2, 3, 4, 5, 6, 7]);
    guest.works();
    assert_eq!(changes(&guest), 1);
    assert!(guest.engine.write_config(8, &[1], ConfigWriter::Driver).is_err());
}

#[test]
fn a_fixed_configuration_is_the_vmms() {
    let backend = Backend::start(&[]);
    let config = ConfigSource::Fixed(b"tag".to_vec());
    let proxy = Proxy::connect(backend.socket(), ProxyOptions { config, ..echo_options() }).unwrap();
    let mut guest = Guest::running(proxy, Setup::new(RingLayout::Split));
    let mut bytes = [0; 3];
    guest.engine.write_config(0, b"x", ConfigWriter::Driver).unwrap();
    guest.works();
    guest.engine.config().read(0, &mut bytes);
    assert_eq!(&bytes, b"tag");
}

/// Has the device write into a page of its own, so that nothing else accounts for its mark, and tells which.
fn marking(guest: &mut Guest) -> u64 {
    let buf = virtio_testkit::Buf::writable(guest.ram.alloc(8192, 4096), 64);
    let request = guest.ram.readable(b"mark this");
    guest.lines[0].ring.add(&[request, buf]);
    guest.kick(0);
    guest.wait_used(0, SOON).expect("an answer");
    buf.addr.0 / 4096
}

#[test]
fn pages_that_the_back_end_writes_are_in_the_log_while_there_is_one() {
    let backend = Backend::start(&[]);
    both(|layout| {
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        let area = Arc::new(SharedMemory::memfd(1 << 12).unwrap());
        let device = guest.lines[0].ring.queue_config().device;
        let marked = |page: u64| {
            let (file, offset) = area.file().unwrap();
            let mut byte = [0];
            std::os::unix::fs::FileExt::read_exact_at(&**file, &mut byte, offset + page / 8).unwrap();
            byte[0] & (1 << (page % 8)) != 0
        };
        guest.engine.log(Some(Arc::new(DirtyLog::new(area.clone(), None)))).wait();
        let ring = guest.lines[0].ring.queue_config();
        // What the device writes in: the used ring, or the descriptors.
        let ring_page = if layout == RingLayout::Packed { ring.desc.0 } else { device.0 } / 4096;
        let buffer = marking(&mut guest);
        assert!(marked(buffer), "what was written");
        assert!(!marked(buffer + 1) && !marked(ring_page), "and nothing else");
        guest.engine.log_ring(0, Some(device)).wait();
        // The lane marks the ring as a whole once; as a migration does, that is taken note of and cleared.
        assert!(marked(ring_page));
        let (file, offset) = area.file().unwrap();
        std::os::unix::fs::FileExt::write_all_at(&**file, &[0; 1 << 12], offset).unwrap();
        assert!(!marked(ring_page));
        assert!(marked(marking(&mut guest)) && marked(ring_page), "the ring, too, if that is wanted");
        // Nothing is marked after it was taken away.
        guest.engine.log_ring(0, None).wait();
        guest.engine.log(None).wait();
        let page = (0..).find(|page| !marked(*page)).unwrap();
        let before: Vec<bool> = (0..1 << 15).map(marked).collect();
        guest.works();
        assert_eq!(before, (0..1 << 15).map(marked).collect::<Vec<_>>(), "{page}");
        assert!(!guest.needs_reset());
    });
}

#[test]
fn a_log_that_cannot_be_shared_is_no_log() {
    let backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    guest.works();
    let private = Arc::new(SharedMemory::private(1 << 12));
    guest.engine.log(Some(Arc::new(DirtyLog::new(private, None)))).wait();
    assert!(guest.needs_reset());
    assert!(guest.ear.reasons().iter().any(|reason| reason.contains("logged")));
    guest.engine.log(None).wait();
    guest.reset();
    guest.bring_up();
    guest.works();
}

#[test]
fn a_device_is_saved_with_the_back_ends_state_and_goes_on_behind_another() {
    let (here, there) = (Backend::start(&["--queues", "2"]), Backend::start(&["--queues", "2"]));
    both(|layout| {
        let mut guest = Guest::echo(&here.socket(), layout);
        assert!(guest.engine.can_save());
        guest.works();
        guest.works_on(0);
        assert_eq!(guest.engine.save().wait(), Err(SnapshotError::Running));
        let waits = guest.held(0, b"Hold this");
        guest.engine.suspend().wait().expect("at rest");
        assert_eq!(guest.lines[0].ring.used().expect("finished").id, waits);
        let state = guest.engine.save().wait().expect("a state");
        // The saved one can go on.
        guest.engine.resume().wait();
        guest.works();
        guest.engine.suspend().wait().expect("at rest");
        let state_now = guest.engine.save().wait().expect("a state");
        assert_ne!(state, state_now);
        let (late, chain) = guest.submit(1, b"sent while nobody serves", 64);

        // Another VMM, another back-end, the same memory.
        let setup = Setup { ram: guest.ram.clone(), ..Setup::new(layout) };
        let mut other = Guest::new(Proxy::connect(there.socket(), echo_options()).unwrap(), setup);
        std::mem::swap(&mut other.lines, &mut guest.lines);
        drop(guest);
        other.engine.memory(other.ram.ram(), WaitFor::NewRequests).wait();
        let queues = other.engine.restore(&state_now).wait().expect("a state that is taken");
        assert_eq!(queues.len(), 2);
        for queue in queues {
            other.start(queue.index.into(), Some(queue.state));
        }
        assert_eq!(other.wait_used(1, SOON).expect("served here").id, late);
        assert_eq!(&other.ram.contents(&chain[1])[..4], b"sent");
        // works, works_on, held and what came behind, works: all of queue 0.
        assert_eq!(other.ask(0, b"N", 1), [6], "the back-end's state came along");
        other.works();
        assert!(!other.needs_reset());

        // Every truncated state is refused, and leaves a device that works.
        other.reset();
        for len in (0..state.len()).step_by(7).chain([state.len() - 1]) {
            assert!(other.engine.restore(&state[..len]).wait().is_err());
        }
        other.bring_up();
        other.works();
    });
}

#[test]
fn a_state_that_the_back_end_does_not_take_needs_a_reset() {
    let (here, there) = (Backend::start(&["--entropy"]), Backend::start(&["--entropy", "--seed", "8"]));
    let proxy = |backend: &Backend| Proxy::connect(backend.socket(), entropy_options()).unwrap();
    let mut guest = Guest::running(proxy(&here), Setup::new(RingLayout::Split));
    guest.ask(0, &[], 16);
    guest.engine.suspend().wait().unwrap();
    let state = guest.engine.save().wait().unwrap();
    drop(guest);
    let mut guest = Guest::new(proxy(&there), Setup::new(RingLayout::Split));
    guest.engine.restore(&state).wait().expect("as far as this side can tell");
    until("the back-end has said no", || guest.failure_is_told());
    assert!(
        guest.ear.reasons().iter().any(|why| why.contains("CHECK_DEVICE_STATE")),
        "{:?}",
        guest.ear.reasons()
    );
    guest.reset();
    guest.bring_up();
    assert_eq!(guest.ask(0, &[], 16).len(), 16);
}

#[test]
fn what_is_no_back_end_for_the_device_is_refused_by_name() {
    let backend = Backend::start(&["--queues", "2"]);
    let refused = |options: ProxyOptions| Proxy::connect(backend.socket(), options).expect_err("refused");
    let options = ProxyOptions { queues: Some(3), ..echo_options() };
    assert!(matches!(refused(options), ProxyError::Queues { has: 2, wanted: 3 }));
    let nobody = Proxy::connect("/nowhere/at/all", echo_options()).expect_err("refused");
    assert!(matches!(nobody, ProxyError::Connect(_)));
    let options = ProxyOptions { queue_size: 100, ..echo_options() };
    assert!(matches!(refused(options), ProxyError::Options(_)));
    // Fewer queues than it has are fine.
    let proxy = Proxy::connect(backend.socket(), ProxyOptions { queues: Some(1), ..echo_options() }).unwrap();
    let mut guest = Guest::running(proxy, Setup::new(RingLayout::Split));
    assert_eq!(guest.lines.len(), 1);
    guest.works();
    assert_eq!(guest.engine.device_type(), DeviceType(63));
    assert_eq!(guest.engine.status() & Status::FAILED, Status::empty());
    let ticket = guest.engine.stop(0, Stop::Discard, None);
    ticket.wait().unwrap();
}
