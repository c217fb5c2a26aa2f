//! A daemon that was killed, and its successor, which knows nothing: the driver is the same, and says nothing twice. See
//! `virtio_console::control::Protocol::take_over`.
mod support;

use std::io::Write;

use support::{Guest, Place, connect, console, drain};
use virtio_console::Console;
use virtio_console::control::event;
use virtio_testkit::RingLayout;
use vm_virtio::controls::{ControlRequest, Value};

/// Ports `a`, `b`; and a console `c`.
fn device(place: &Place, process: &str) -> Console {
    let ports = [
        format!("name=a,{}", place.unix(&format!("a.{process}"))),
        format!("name=b,{}", place.unix(&format!("b.{process}"))),
        format!("console=on,{}", place.unix(&format!("c.{process}"))),
    ];
    console(&[&ports[0], &ports[1], &ports[2]])
}

#[test]
fn ports_go_on_and_none_is_added_again() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(device(&place, "old"), layout);
        guest.say(0, event::PORT_OPEN, 1);
        let old = connect(&place.path("a.old"));
        guest.wait_told(0, event::PORT_OPEN, 1);
        guest.give(0, 64);
        let mut guest = guest.survives(device(&place, "new"));
        drop(old);
        // 5.3.6.2.1: it has these ports. Whoever was there is gone.
        let gone: Vec<_> = (0..3).map(|id| (id, event::PORT_OPEN, 0, vec![])).collect();
        assert_eq!(guest.listen(), gone);
        let mut client = connect(&place.path("a.new"));
        guest.wait_told(0, event::PORT_OPEN, 1);
        client.write_all(b"to the guest").unwrap();
        // Into the buffer that the old one had.
        assert_eq!(guest.wait_input(0), b"to the guest");
        guest.print(0, b"from the guest");
        assert_eq!(drain(&mut client).0, b"from the guest");
        // A size is told as ever.
        guest.control(ControlRequest::Set("port.2.size".into(), Value::Text("90x25".into()))).unwrap();
        assert_eq!(guest.listen(), [(2, event::RESIZE, 0, vec![90, 0, 25, 0])]);
        // What the driver says counts from now on: it closes the port.
        guest.say(0, event::PORT_OPEN, 0);
        guest.give(0, 64);
        client.write_all(b"later").unwrap();
        guest.look();
        assert_eq!(guest.input(0), None);
        guest.say(0, event::PORT_OPEN, 1);
        assert_eq!(guest.wait_input(0), b"later");
        assert_eq!(guest.get("port.0.guest-open"), Value::Bool(true));
    }
}

/// The driver has said that it is ready, and no port was added yet.
#[test]
fn a_driver_that_knows_no_port_is_told_of_them() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::silent(device(&place, "old"), layout);
        guest.say(u32::MAX, event::DEVICE_READY, 1);
        let mut guest = guest.survives(device(&place, "new"));
        guest.add_controls(32, 512);
        let added: Vec<_> = guest.listen().iter().map(|message| (message.0, message.1)).collect();
        assert_eq!(added[..3], [0, 1, 2].map(|id| (id, event::DEVICE_ADD)));
        guest.give(1, 64);
        guest.say(1, event::PORT_OPEN, 1);
        connect(&place.path("b.new")).write_all(b"x").unwrap();
        assert_eq!(guest.wait_input(1), b"x");
    }
}

#[test]
fn a_driver_that_has_said_nothing_is_a_new_one() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let guest = Guest::silent(device(&place, "old"), layout);
        let mut guest = guest.survives(device(&place, "new"));
        guest.add_controls(32, 512);
        assert_eq!(guest.listen(), [], "c5_3_5: nothing before DEVICE_READY");
        guest.say(u32::MAX, event::DEVICE_READY, 1);
        assert_eq!(guest.listen()[0], (0, event::DEVICE_ADD, 0, vec![]));
    }
}

/// Queues that are stopped and started in one process, as for a pause of the guest, change nothing.
#[test]
fn a_pause_is_no_takeover() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(device(&place, "one"), layout);
        guest.say(0, event::PORT_OPEN, 1);
        for id in [0, 1, 2] {
            guest.say(id, event::PORT_OPEN, 0);
        }
        for queue in [2, 3] {
            let state = guest.host.stop_queue(queue, vm_virtio::Stop::Drain).unwrap();
            guest.host.start_queue(queue, Some(state));
        }
        guest.host.settle();
        assert_eq!(guest.listen(), []);
        assert_eq!(guest.get("port.0.guest-open"), Value::Bool(false));
    }
}

#[test]
fn after_a_takeover_a_reset_is_a_beginning() {
    let place = Place::new();
    let guest = Guest::ready(device(&place, "old"), RingLayout::Split);
    let guest = guest.survives(device(&place, "new"));
    let mut host = guest.host;
    host.reset();
    host.initialise();
    let mut guest = Guest::of(host);
    guest.add_controls(32, 512);
    assert_eq!(guest.listen(), []);
    guest.say(u32::MAX, event::DEVICE_READY, 1);
    assert_eq!(guest.listen()[0], (0, event::DEVICE_ADD, 0, vec![]));
}
