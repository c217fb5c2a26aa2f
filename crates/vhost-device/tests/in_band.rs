//! Kicks, interrupts and errors as messages (vhost-user, "In-band notifications").
mod support;

use std::os::fd::AsFd;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use support::echo::ask;
use support::*;
use vhost_user::{
    Answer, BackendRequest, Error, F_PROTOCOL_FEATURES, FrontendEndpoint, ProtocolFeatures, ReplyTicket,
};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::{GuestAddress, Status};

/// A driver without any eventfd.
fn in_band(daemon: &TestDaemon, guest: usize, layout: RingLayout) -> VhostUserDriver {
    let options = VhostUserOptions { in_band: true, ..options(layout) };
    let driver = VhostUserDriver::connect(daemon.socket(guest), options).unwrap();
    assert!(driver.protocol_features().contains(ProtocolFeatures::INBAND_NOTIFICATIONS));
    driver
}

/// The back-end's next request, not answered yet.
fn next(driver: &mut VhostUserDriver, timeout: Duration) -> Option<(BackendRequest, ReplyTicket)> {
    let received = driver.backend_requests().unwrap().wait(timeout).unwrap()?;
    Some((received.request, received.ticket))
}

fn acknowledge(driver: &mut VhostUserDriver, ticket: ReplyTicket) {
    driver.backend_requests().unwrap().reply(ticket, Answer::Done).unwrap();
}

/// Starts all rings again after a stop. The memory is still there.
fn restart(driver: &mut VhostUserDriver, queues: usize) {
    for queue in 0..queues {
        driver.start_ring(queue).unwrap();
        driver.endpoint().set_vring_enable(queue as u32, true).unwrap();
    }
}

/// A request whose answer is looked for in the ring, without listening to the back-end.
fn ask_deaf(driver: &mut VhostUserDriver, request: &[u8]) {
    submit(driver, 0, request);
    eventually("an answer in the ring", || driver.ring(0).used().is_some());
}

#[test]
fn a_device_works_without_any_eventfd() {
    let daemon = TestDaemon::with(1, || Echo::new(8).queues(2, 2));
    for layout in RingLayout::ALL {
        let mut driver = in_band(&daemon, 0, layout);
        for n in 0..200_u8 {
            let queue = usize::from(n % 2);
            assert_eq!(ask(&mut driver, queue, &[b'x', n]), [b'x', n]);
        }
        assert!(driver.interrupts(0) > 0 && driver.interrupts(1) > 0);
        // Several at once.
        for round in 0..20_u8 {
            for n in 0..8 {
                submit(&mut driver, 0, &[b'y', round, n]);
            }
            (0..8).for_each(|_| assert_eq!(answer(&mut driver, 0), 3));
        }
        // Stopped, started again by VRING_KICK, and from scratch.
        driver.stop().unwrap();
        restart(&mut driver, 2);
        assert_eq!(ask(&mut driver, 1, b"again"), b"again");
        driver.reboot().unwrap();
        assert_eq!(ask(&mut driver, 0, b"anew"), b"anew");
        driver.reset().unwrap();
    }
}

#[test]
fn vring_kick_starts_a_ring_and_what_is_in_it_is_served() {
    let daemon = TestDaemon::start();
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    driver.stop().unwrap();
    let chain = [driver.ram().readable(b"early"), driver.ram().writable(8)];
    driver.ring(0).add(&chain);
    assert!(driver.ring(0).used().is_none());
    restart(&mut driver, 1);
    assert_eq!(answer(&mut driver, 0), 5);
    // Where there is no memory there is no ring.
    driver.stop().unwrap();
    driver.reset().unwrap();
    assert!(matches!(driver.endpoint().vring_kick(0), Err(Error::Refused { .. })));
    driver.endpoint().get_vring_base(0).unwrap();
    driver.start().unwrap();
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
    // There is no ring 1.
    assert!(matches!(driver.endpoint().vring_kick(1), Err(Error::Refused { .. })));
    assert!(matches!(driver.endpoint().vring_kick(u32::MAX), Err(Error::Refused { .. })));
}

#[test]
fn vring_kick_needs_the_feature() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    assert!(matches!(driver.endpoint().vring_kick(0), Err(Error::Refused { .. })));
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

/// The document: "the back-end should close the connection as a response to a SET_PROTOCOL_FEATURES message that sets
/// the in-band notifications feature flag without the other two".
#[test]
fn the_feature_without_those_that_it_needs_ends_the_connection() {
    let daemon = TestDaemon::start();
    let (feature, all) =
        (ProtocolFeatures::INBAND_NOTIFICATIONS, ProtocolFeatures::REPLY_ACK | ProtocolFeatures::BACKEND_REQ);
    for with in [ProtocolFeatures::empty(), ProtocolFeatures::REPLY_ACK, ProtocolFeatures::BACKEND_REQ] {
        // Whether it hears of the refusal, because acknowledgements hold already, or does not.
        for hears in [false, true] {
            let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
            let offered = endpoint.get_protocol_features().unwrap();
            assert!(offered.contains(feature | all));
            if hears {
                endpoint.set_protocol_features(ProtocolFeatures::REPLY_ACK).unwrap();
                let body = (feature | with).bits().to_ne_bytes();
                endpoint.send(16, vhost_user::flags::NEED_REPLY, &[&body], &[]).unwrap();
                assert_eq!(endpoint.receive_reply().unwrap().body, 1_u64.to_ne_bytes());
            } else {
                endpoint.set_protocol_features(feature | with).unwrap();
            }
            let gone = endpoint.get_features();
            assert!(matches!(gone, Err(Error::Disconnected)), "{with:?}: {gone:?}");
        }
    }
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    endpoint.set_protocol_features(feature | all).unwrap();
    assert!(endpoint.get_features().is_ok());
}

#[test]
fn a_broken_ring_is_told_by_a_message_and_the_others_go_on() {
    let daemon = TestDaemon::with(1, || Echo::new(8).queues(2, 2));
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    let config = driver.ring(0).queue_config();
    driver.ram().store_u16(GuestAddress(config.driver.0 + 2), 0x4000);
    driver.kick_anyway(0);
    eventually("the message", || {
        driver.interrupts(0);
        driver.ring_failed(0)
    });
    assert!(!driver.ring_failed(1));
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    assert_eq!(ask(&mut driver, 1, b"unharmed"), b"unharmed");
    driver.endpoint().get_vring_base(0).unwrap();
    driver.endpoint().get_vring_base(1).unwrap();
    driver.reset().unwrap();
    driver.start().unwrap();
    assert_eq!(ask(&mut driver, 0, b"well again"), b"well again");
}

/// Each interrupt asks to be acknowledged, and the next one of the ring waits for that.
#[test]
fn a_front_end_that_does_not_acknowledge_gets_one_message_of_a_ring() {
    let daemon = TestDaemon::start();
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    for n in 0..100_u8 {
        ask_deaf(&mut driver, &[b'x', n]);
    }
    // An interrupt comes behind its answer: an order is carried out behind both.
    driver.endpoint().set_vring_enable(0, true).unwrap();
    let (request, first) = next(&mut driver, SOON).expect("an interrupt");
    assert!(matches!(request, BackendRequest::VringCall { index: 0 }));
    assert!(next(&mut driver, NEVER).is_none(), "a second message before the first was acknowledged");
    acknowledge(&mut driver, first);
    // What happened since is told with one more.
    let (request, second) = next(&mut driver, SOON).expect("an interrupt for all the others");
    assert!(matches!(request, BackendRequest::VringCall { index: 0 }));
    acknowledge(&mut driver, second);
    assert!(next(&mut driver, NEVER).is_none(), "nothing happened since");
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

/// The last interrupt of a ring that stops cannot wait, because a suspended device sends nothing.
#[test]
fn a_ring_that_stops_tells_all_and_then_nothing() {
    let daemon = TestDaemon::start();
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    ask_deaf(&mut driver, b"x");
    let (_, first) = next(&mut driver, SOON).expect("an interrupt");
    submit(&mut driver, 0, &[ask::HOLD]);
    // It was taken if the next one was.
    ask_deaf(&mut driver, b"y");
    // Asking arms the interrupt.
    assert!(driver.ring(0).used().is_none());
    driver.endpoint().get_vring_base(0).unwrap();
    assert!(driver.ring(0).used().is_some(), "finished before the ring stopped");
    let (request, second) = next(&mut driver, SOON).expect("an interrupt although the first is open");
    assert!(matches!(request, BackendRequest::VringCall { index: 0 }));
    acknowledge(&mut driver, first);
    acknowledge(&mut driver, second);
    assert!(next(&mut driver, NEVER).is_none(), "suspended");
}

#[test]
fn files_are_preferred_to_messages() {
    let daemon = TestDaemon::start();
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
    let before = driver.interrupts(0);
    let call = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    driver.endpoint().set_vring_call(0, Some(call.as_fd())).unwrap();
    driver.interrupts(0);
    let before = driver.interrupts(0).max(before);
    ask_deaf(&mut driver, b"x");
    let mut count = [0; 8];
    assert_eq!(rustix::io::read(&call, &mut count).unwrap(), 8);
    assert!(next(&mut driver, NEVER).is_none());
    assert_eq!(driver.interrupts(0), before);
    // No file at all: the front-end polls.
    driver.endpoint().set_vring_call(0, None).unwrap();
    ask_deaf(&mut driver, b"x");
    assert!(next(&mut driver, NEVER).is_none());
    // And a kick by file, beside those by message.
    let kick = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    driver.endpoint().set_vring_kick(0, Some(kick.as_fd())).unwrap();
    let chain = [driver.ram().readable(b"x"), driver.ram().writable(8)];
    driver.ring(0).add(&chain);
    rustix::io::write(&kick, &1_u64.to_ne_bytes()).unwrap();
    eventually("an answer in the ring", || driver.ring(0).used().is_some());
}

/// What an old channel has not acknowledged is said to the new one.
#[test]
fn a_new_channel_is_told_what_the_old_one_may_not_have_heard() {
    let daemon = TestDaemon::start();
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    ask_deaf(&mut driver, b"x");
    assert!(next(&mut driver, SOON).is_some());
    let protocol = driver.protocol_features();
    let (mut listener, other) = vhost_user::BackendListener::pair(protocol).unwrap();
    driver.endpoint().set_backend_req_fd(other.as_fd()).unwrap();
    drop(other);
    let received = listener.wait(SOON).unwrap().expect("the interrupt once more");
    assert!(matches!(received.request, BackendRequest::VringCall { index: 0 }));
    // A channel that is gone, or that says what nobody asked, ends by itself; the device goes on.
    drop(listener);
    ask_deaf(&mut driver, b"x");
    let (listener, other) = vhost_user::BackendListener::pair(protocol).unwrap();
    driver.endpoint().set_backend_req_fd(other.as_fd()).unwrap();
    rustix::io::write(&listener, &[0xff; 64]).unwrap();
    ask_deaf(&mut driver, b"x");
    ask_deaf(&mut driver, b"x");
    assert!(driver.endpoint().get_features().unwrap() & F_PROTOCOL_FEATURES != 0);
}

/// A front-end that kicks as fast as it can, and one that reads nothing it is sent, harm nobody else.
#[test]
fn a_flood_of_kicks_is_the_flooders_own_loss() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut other = daemon.driver(1, RingLayout::Split);
    let mut driver = in_band(&daemon, 0, RingLayout::Split);
    for n in 0..20_000_u32 {
        driver.kick_anyway(0);
        if n % 500 == 0 {
            assert_eq!(ask(&mut other, 0, b"unharmed"), b"unharmed");
            submit(&mut driver, 0, b"x");
            eventually("an answer in the ring", || driver.ring(0).used().is_some());
        }
    }
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
}
