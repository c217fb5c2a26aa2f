//! Back-ends that die, vanish, fall silent, talk nonsense, or come back as something else.
mod support;

use std::collections::HashMap;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use support::double::{Double, Mischief};
use support::{Backend, Guest, SOON, Setup, counted, echo_options, until};
use vhost_proxy::{Proxy, ProxyOptions};
use vhost_user::ProtocolFeatures;
use virtio_testkit::{RingLayout, TestRam};
use vm_virtio::{HostEvent, Status, StopError, WaitFor};

fn both(test: impl Fn(RingLayout)) {
    RingLayout::ALL.into_iter().for_each(test);
}

fn through(double: &Double, options: ProxyOptions, layout: RingLayout) -> Guest {
    Guest::running(Proxy::with(double.connector(), options).expect("a back-end"), Setup::new(layout))
}

/// None that the back-end takes for something else than data.
fn request(number: u32) -> [u8; 8] {
    let [a, b, c, d] = number.to_le_bytes();
    [b'r', b'e', b'q', b' ', a, b, c, d]
}

/// Short, for back-ends that do not answer.
fn impatient() -> ProxyOptions {
    ProxyOptions { patience: Duration::from_millis(500), ..echo_options() }
}

#[test]
fn policy_3_requests_outlive_a_back_end_that_is_killed_under_load_none_lost_none_twice() {
    both(|layout| {
        let mut backend = Backend::start(&[]);
        let mut guest = Guest::echo(&backend.socket(), layout);
        let mut out: HashMap<u16, (u32, Vec<virtio_testkit::Buf>)> = HashMap::new();
        let (mut sent, mut answered, mut kills) = (0u32, 0u32, 0);
        while kills < 12 || !out.is_empty() {
            while kills < 12 && out.len() < 24 {
                let (id, chain) = guest.submit(0, &request(sent), 16);
                assert!(out.insert(id, (sent, chain)).is_none());
                sent += 1;
            }
            if kills < 12 && sent > (kills + 1) * 40 {
                kills += 1;
                backend.kill();
                // Whatever it finished before it died counts.
                backend.restart();
            }
            // The ring driver finds out what is used twice, or was never made available.
            let used = guest.wait_used(0, SOON).expect("none is lost");
            let (number, chain) = out.remove(&used.id).expect("none comes twice");
            assert_eq!(guest.ram.contents(&chain[1])[..8], request(number));
            chain.iter().for_each(|buf| guest.ram.free(buf.addr));
            answered += 1;
        }
        assert_eq!(answered, sent);
        assert!(!guest.needs_reset());
        assert!(guest.stats.losses.load(Ordering::Relaxed) > 0);
        guest.ram.check_guards().unwrap();
    });
}

#[test]
fn policy_3_what_a_killed_back_end_had_in_flight_is_taken_again_by_its_successor() {
    both(|layout| {
        let mut backend = Backend::start(&["--queues", "2"]);
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        let held: Vec<u16> = (0..5).map(|_| guest.held(0, b"Hold this")).collect();
        backend.kill();
        backend.restart();
        // The successor holds them again, and a stop finishes them.
        guest.works_on(1);
        let state = guest.stop(0).expect("finished");
        let mut used: Vec<u16> = guest.lines[0].ring.drain().iter().map(|used| used.id).collect();
        used.sort_unstable();
        let mut wanted = held.clone();
        wanted.sort_unstable();
        assert_eq!(used, wanted);
        guest.start(0, Some(state));
        guest.works();
    });
}

#[test]
fn policy_3_a_ring_is_stopped_properly_although_its_back_end_died() {
    both(|layout| {
        let mut backend = Backend::start(&[]);
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        let id = guest.held(0, b"Hold this");
        backend.kill();
        until("the loss is noticed", || !guest.stats.connected.load(Ordering::Relaxed));
        let stop = guest.engine.stop(0, vm_virtio::Stop::Drain, Some(Instant::now() + SOON));
        backend.restart();
        let state = stop.wait().expect("its successor has finished it");
        assert_eq!(guest.lines[0].ring.used().expect("given back").id, id);
        assert_eq!(state, guest.lines[0].ring.queue_state());
    });
}

#[test]
fn policy_7_a_stop_does_not_wait_for_ever_for_a_back_end_that_is_gone() {
    let mut backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Split);
    guest.works();
    backend.kill();
    until("the loss is noticed", || !guest.stats.connected.load(Ordering::Relaxed));
    let deadline = Instant::now() + Duration::from_millis(100);
    let stop = guest.engine.stop(0, vm_virtio::Stop::Drain, Some(deadline));
    assert!(matches!(stop.wait(), Err(StopError::Stuck(_))));
    assert!(guest.needs_reset());
    backend.restart();
    guest.reset();
    guest.bring_up();
    guest.works();
}

#[test]
fn policy_7_a_back_end_that_hangs_is_cut_off_and_a_reset_does_not_wait_for_it() {
    let mut backend = Backend::start(&[]);
    let mut guest = Guest::echo(&backend.socket(), RingLayout::Packed);
    guest.works();
    backend.freeze();
    // STOP_DEADLINE is longer than a reset waits for the back-end: status reads 0 at the first try.
    guest.reset();
    assert!(!guest.stats.connected.load(Ordering::Relaxed));
    backend.restart();
    guest.bring_up();
    guest.works();
}

#[test]
fn policy_7_a_stuck_ring_ends_the_connection_so_that_nobody_serves_it_any_more() {
    let backend = Backend::start(&["--queues", "2"]);
    // So patient that nothing but the stuck ring can end it.
    let options = ProxyOptions { patience: 3 * SOON, ..echo_options() };
    let proxy = Proxy::connect(backend.socket(), options).unwrap();
    let mut guest = Guest::running(proxy, Setup::new(RingLayout::Split));
    guest.works();
    let losses = guest.stats.losses.load(Ordering::Relaxed);
    // Kept for ever.
    guest.held(0, b"Kling");
    let deadline = Instant::now() + Duration::from_millis(200);
    let stop = guest.engine.stop(0, vm_virtio::Stop::Drain, Some(deadline));
    assert!(matches!(stop.wait(), Err(StopError::Stuck(_))));
    assert!(guest.needs_reset());
    until("the connection ends", || guest.stats.losses.load(Ordering::Relaxed) > losses);
    guest.reset();
    guest.bring_up();
    guest.works();
}

#[test]
fn a_back_end_that_stays_away_needs_a_reset_and_one_that_is_back_in_time_does_not() {
    let mut backend = Backend::start(&[]);
    // Longer than it takes to start one below, on any machine.
    let options = ProxyOptions { give_up: Duration::from_secs(8), ..echo_options() };
    let proxy = Proxy::connect(backend.socket(), options).unwrap();
    let mut guest = Guest::running(proxy, Setup::new(RingLayout::Split));
    guest.works();
    backend.kill();
    until("it is given up", || guest.failure_is_told());
    assert_eq!(guest.ear.reasons(), ["the back-end has been gone for 8s"]);
    assert!(guest.ear.count(|event| matches!(event, HostEvent::NeedsReset { .. })) == 1);
    // The driver resets: that works without a back-end, and the device with the next one.
    guest.reset();
    guest.negotiate();
    guest.start(0, None);
    guest.ready();
    backend.restart();
    guest.works();
    assert!(!guest.needs_reset());
}

#[test]
fn another_back_end_in_its_place_needs_a_reset() {
    let cases: [(&[&str], &str); 3] = [
        (&["--without", "event_idx"], "features"),
        (&["--config-size", "8", "--entropy"], "features"),
        (&["--queues", "1"], "queues"),
    ];
    for (arguments, what) in cases {
        let mut backend = Backend::start(&[]);
        let socket = backend.socket();
        backend.restart_with(&["--queues", "2"]);
        let mut guest = Guest::echo(&socket, RingLayout::Split);
        guest.works();
        backend.kill();
        backend.restart_with(arguments);
        until("it is found out", || guest.failure_is_told());
        let reasons = guest.ear.reasons();
        assert!(reasons[0].contains("other") && reasons[0].contains(what), "{reasons:?}");
        // The right one again.
        backend.restart_with(&["--queues", "2"]);
        guest.reset();
        guest.bring_up();
        guest.works();
    }
}

#[test]
fn without_in_flight_tracking_only_what_is_certain_goes_on() {
    let tracked = ProtocolFeatures::INFLIGHT_SHMFD;
    // Nothing is out: a split ring goes on.
    let mut backend = Backend::start(&[]);
    let double = Double::new(backend.socket());
    double.without(tracked);
    let mut guest = through(&double, echo_options(), RingLayout::Split);
    guest.works();
    counted(&guest.lines[0].call);
    backend.restart();
    // What comes before it is back could have been taken, for all anybody knows.
    until("it is back", || guest.stats.connections.load(Ordering::Relaxed) == 2);
    guest.engine.memory(guest.ram.ram(), WaitFor::NewRequests).wait();
    assert!(counted(&guest.lines[0].call) > 0, "the dead one may not have got to its last interrupt");
    guest.works();
    assert!(!guest.needs_reset());
    // Something is out: nobody knows what.
    guest.held(0, b"Hold this");
    backend.restart();
    until("it is found out", || guest.failure_is_told());
    assert!(guest.ear.reasons()[0].contains("lost with requests"), "{:?}", guest.ear.reasons());
    guest.reset();
    guest.bring_up();
    guest.works();
    drop(guest);
    // A packed ring does not tell.
    let mut guest = through(&double, echo_options(), RingLayout::Packed);
    guest.works();
    backend.restart();
    until("it is found out", || guest.failure_is_told());
    guest.reset();
    guest.bring_up();
    guest.works();
}

/// What a session does, as far as it gets: every message of it is one that the back-end may not survive.
fn session(guest: &mut Guest) {
    guest.bring_up();
    guest.works();
    guest.engine.memory(guest.ram.ram(), WaitFor::NewRequests).wait();
    let area = std::sync::Arc::new(vm_virtio::memory::SharedMemory::memfd(1 << 12).unwrap());
    let log = std::sync::Arc::new(vm_virtio::DirtyLog::new(area, None));
    let device = guest.lines[0].ring.queue_config().device;
    guest.engine.log(Some(log)).wait();
    guest.engine.log_ring(0, Some(device)).wait();
    guest.works();
    guest.engine.log(None).wait();
    guest.engine.enable(0, false).wait();
    guest.engine.enable(0, true).wait();
    guest.ask(0, b"Cx", 8);
    guest.engine.write_config(0, &[1], vm_virtio::device::ConfigWriter::Driver).unwrap();
    guest.engine.suspend().wait().expect("at rest");
    guest.engine.save().wait().expect("a state");
    guest.engine.resume().wait();
    guest.works();
    let state = guest.stop(0).expect("finished");
    guest.start(0, Some(state));
    guest.works();
    assert!(!guest.needs_reset(), "{:?}", guest.ear.reasons());
    guest.reset();
    guest.bring_up();
    guest.works();
}

/// How many messages a session has, and how many of them before the device is made.
fn count(backend: &Backend, layout: RingLayout, withheld: ProtocolFeatures) -> (usize, usize) {
    let double = Double::new(backend.socket());
    double.without(withheld);
    let proxy = Proxy::with(double.connector(), echo_options()).unwrap();
    let first = double.plan.lock().unwrap().requests.len();
    let mut guest = Guest::new(proxy, Setup::new(layout));
    session(&mut guest);
    drop(guest);
    let all = double.plan.lock().unwrap().requests.len();
    (first, all)
}

/// The same session, with this happening at each of its messages.
fn at_each_message(mischief: Mischief, step: usize, options: impl Fn() -> ProxyOptions) {
    both(|layout| {
        let backend = Backend::start(&[]);
        let (first, all) = count(&backend, layout, ProtocolFeatures::empty());
        assert!(all > 60, "{all} messages");
        for at in (0..all).step_by(step) {
            let double = Double::new(backend.socket());
            double.plan.lock().unwrap().at = Some((at, mischief));
            let make = || Proxy::with(double.connector(), options());
            if at < first {
                assert!(make().is_err(), "message {at} of {first} is needed to begin with");
                continue;
            }
            // More than once where the machine stands still for longer than the proxy's patience: an honest answer is late then.
            let mut proxy = None;
            until("a back-end", || {
                proxy = make().ok();
                proxy.is_some()
            });
            let mut guest = Guest::new(proxy.expect("a back-end"), Setup::new(layout));
            println!("{layout:?}, {mischief:?} at message {at} of {all}");
            session(&mut guest);
            let connections = double.plan.lock().unwrap().connections;
            // The last ones may be behind the session's end.
            assert!(connections >= 2 || double.plan.lock().unwrap().at.is_some() || at + 8 > all, "{at}");
        }
    });
}

#[test]
fn peers_a_back_end_that_vanishes_at_any_message_is_found_again_and_nothing_is_lost() {
    at_each_message(Mischief::Close, 1, echo_options);
}

#[test]
fn peers_a_back_end_that_answers_any_message_with_nonsense_is_cut_off_and_found_again() {
    at_each_message(Mischief::Nonsense, 1, echo_options);
}

#[test]
fn policy_7_a_back_end_that_never_answers_is_cut_off_at_any_message() {
    at_each_message(Mischief::Silence, 7, impatient);
}

#[test]
fn peers_a_back_end_that_speaks_unasked_is_cut_off_and_found_again() {
    use std::io::Write;
    let backend = Backend::start(&[]);
    let double = Double::new(backend.socket());
    let chatter: std::sync::Arc<std::sync::Mutex<Option<std::os::unix::net::UnixStream>>> =
        std::sync::Arc::default();
    let (tap, connect) = (chatter.clone(), double.connector());
    let connector = move || {
        let stream = connect()?;
        let (front, ours) = std::os::unix::net::UnixStream::pair()?;
        *tap.lock().unwrap() = Some(ours.try_clone()?);
        support::double::pump(stream, ours);
        Ok(front)
    };
    let proxy = Proxy::with(connector, echo_options()).unwrap();
    let mut guest = Guest::running(proxy, Setup::new(RingLayout::Split));
    guest.works();
    let connections = guest.stats.connections.load(Ordering::Relaxed);
    chatter.lock().unwrap().as_ref().unwrap().write_all(&[0xff; 64]).unwrap();
    until("it is cut off and found again", || guest.stats.connections.load(Ordering::Relaxed) > connections);
    guest.works();
    assert!(!guest.needs_reset());
    assert_eq!(guest.engine.status() & Status::FAILED, Status::empty());
}

#[test]
fn memory_that_cannot_be_shared_needs_a_reset() {
    let backend = Backend::start(&[]);
    let proxy = Proxy::connect(backend.socket(), echo_options()).unwrap();
    let setup = Setup { ram: TestRam::spread(1, 8 << 20), ..Setup::new(RingLayout::Split) };
    let mut guest = Guest::new(proxy, setup);
    guest.negotiate();
    // The same addresses, without a file.
    let private =
        vm_memory::GuestMemoryMmap::<()>::from_ranges(&[(vm_memory::GuestAddress(0), 8 << 20)]).unwrap();
    guest.engine.memory(vm_virtio::GuestRam::new(&private), WaitFor::NewRequests).wait();
    guest.start(0, None);
    guest.ready();
    until("it is found out", || guest.failure_is_told());
    assert!(guest.ear.reasons()[0].contains("queue 0"), "{:?}", guest.ear.reasons());
    guest.reset();
    guest.bring_up();
    guest.works();
}

#[test]
fn a_device_is_suspended_and_saved_although_its_back_end_died() {
    both(|layout| {
        let mut backend = Backend::start(&["--queues", "2"]);
        let mut guest = Guest::echo(&backend.socket(), layout);
        guest.works();
        let held = guest.held(0, b"Hold this");
        backend.kill();
        until("the loss is noticed", || !guest.stats.connected.load(Ordering::Relaxed));
        let suspend = guest.engine.suspend();
        backend.restart();
        suspend.wait().expect("its successor has finished what it had");
        assert_eq!(guest.lines[0].ring.used().expect("given back").id, held);
        guest.engine.save().wait().expect("a state");
        // While it rests nobody looks after the connection; the next one is made when it goes on.
        backend.restart();
        guest.engine.resume().wait();
        guest.works();
        assert!(!guest.needs_reset());
    });
}

#[test]
fn policy_8_devices_share_a_pool_and_one_that_hangs_does_not_hold_the_others() {
    let (frozen, healthy) = (Backend::start(&[]), Backend::start(&[]));
    let pool = reactor::BlockingPool::new(std::num::NonZeroUsize::new(2).unwrap());
    let options = ProxyOptions { pool: Some(pool), patience: SOON, ..echo_options() };
    let proxy = |backend: &Backend| Proxy::connect(backend.socket(), options.clone()).unwrap();
    let mut hangs = Guest::running(proxy(&frozen), Setup::new(RingLayout::Split));
    let mut works = Guest::running(proxy(&healthy), Setup::new(RingLayout::Split));
    hangs.works();
    frozen.freeze();
    // An exchange that nobody answers.
    let stuck = hangs.engine.enable(0, false);
    for _ in 0..20 {
        works.engine.enable(0, false).wait();
        works.engine.enable(0, true).wait();
        works.works();
    }
    assert!(hangs.stats.connected.load(Ordering::Relaxed), "it still waits");
    drop(stuck);
}
