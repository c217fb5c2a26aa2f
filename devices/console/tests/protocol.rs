//! The MULTIPORT messages as pure code (5.3.6.2): who is told what, and in which order.
use virtio_console::control::{Header, Heard, Message, Protocol, Size, event};
use zerocopy::IntoBytes;

fn say(protocol: &mut Protocol, id: u32, event: u16, value: u16) -> Heard {
    let header = Header { id: id.into(), event: event.into(), value: value.into() };
    protocol.hear(header.as_bytes())
}

/// Everything that is due.
fn told(protocol: &mut Protocol) -> Vec<(u32, u16, u16)> {
    let mut all = Vec::new();
    while let Some(message) = protocol.next() {
        protocol.sent(&message);
        all.push((message.id, message.event, message.value));
        assert!(all.len() < 1000, "it does not come to an end");
    }
    all
}

fn ready(protocol: &mut Protocol) {
    say(protocol, u32::MAX, event::DEVICE_READY, 1);
}

/// A driver that accepts whatever is added.
fn answered(protocol: &mut Protocol) -> Vec<(u32, u16, u16)> {
    let mut all = Vec::new();
    loop {
        let more = told(protocol);
        if more.is_empty() {
            return all;
        }
        for (id, event, _) in &more {
            if *event == event::DEVICE_ADD {
                say(protocol, *id, event::PORT_READY, 1);
            }
        }
        all.extend(more);
    }
}

#[test]
fn c5_3_5_ports_are_announced_after_device_ready_and_described_after_port_ready() {
    let mut protocol = Protocol::new(2);
    protocol.add(0, "", true);
    protocol.add(1, "org.example", false);
    protocol.resize(0, Size { cols: 80, rows: 25 });
    protocol.client(1, Some(1));
    assert_eq!(protocol.next(), None, "a driver that is not ready is told nothing");
    assert_eq!(say(&mut protocol, u32::MAX, event::DEVICE_READY, 1), Heard::Device(true));
    assert_eq!(told(&mut protocol), [(0, event::DEVICE_ADD, 0), (1, event::DEVICE_ADD, 0)]);
    assert_eq!(say(&mut protocol, 1, event::PORT_READY, 1), Heard::Port(1, true));
    let name = protocol.next().unwrap();
    assert_eq!(name.to_bytes(), b"\x01\0\0\0\x07\0\x01\0org.example", "no NUL at the end (5.3.6.2)");
    assert_eq!(told(&mut protocol), [(1, event::PORT_NAME, 1), (1, event::PORT_OPEN, 1)]);
    say(&mut protocol, 0, event::PORT_READY, 1);
    let messages: Vec<Message> = std::iter::from_fn(|| {
        let message = protocol.next()?;
        protocol.sent(&message);
        Some(message)
    })
    .collect();
    // Linux ignores CONSOLE_PORT with value 0; columns come before rows.
    assert_eq!(messages[0].to_bytes(), [0, 0, 0, 0, 4, 0, 1, 0]);
    assert_eq!(messages[1].to_bytes(), [0, 0, 0, 0, 5, 0, 0, 0, 80, 0, 25, 0]);
    assert_eq!(messages.len(), 2);
}

#[test]
fn c5_3_6_2_1_a_port_is_added_once_and_below_max_nr_ports() {
    let mut protocol = Protocol::new(2);
    protocol.add(0, "", true);
    protocol.add(2, "beyond", false);
    protocol.add(u32::MAX, "beyond", false);
    ready(&mut protocol);
    assert_eq!(told(&mut protocol), [(0, event::DEVICE_ADD, 0)]);
    for _ in 0..3 {
        ready(&mut protocol);
        say(&mut protocol, 0, event::PORT_READY, 1);
    }
    assert_eq!(told(&mut protocol), [(0, event::CONSOLE_PORT, 1)], "not added again");
    // Another port in its place: the old one goes first.
    protocol.add(0, "other", false);
    assert_eq!(
        answered(&mut protocol),
        [(0, event::DEVICE_REMOVE, 0), (0, event::DEVICE_ADD, 0), (0, event::PORT_NAME, 1)]
    );
}

#[test]
fn c5_3_6_2_1_only_what_was_added_is_removed() {
    let mut protocol = Protocol::new(3);
    protocol.add(1, "a", false);
    protocol.remove(1);
    ready(&mut protocol);
    assert_eq!(told(&mut protocol), [], "it came and went before anybody was told");
    protocol.add(1, "a", false);
    assert_eq!(told(&mut protocol), [(1, event::DEVICE_ADD, 0)]);
    protocol.remove(1);
    protocol.remove(1);
    protocol.remove(2);
    assert_eq!(told(&mut protocol), [(1, event::DEVICE_REMOVE, 0)]);
    assert_eq!(say(&mut protocol, 1, event::PORT_READY, 1), Heard::Ignored, "an answer that came too late");
    assert_eq!(told(&mut protocol), []);
}

#[test]
fn a_driver_that_is_taken_over_and_then_says_that_it_is_ready_begins_anew() {
    let mut protocol = Protocol::new(2);
    protocol.add(0, "x", false);
    protocol.take_over(true);
    assert!(protocol.takes_input(0));
    assert_eq!(told(&mut protocol), [(0, event::PORT_OPEN, 0)]);
    // Its word was in the ring when the predecessor was killed.
    ready(&mut protocol);
    assert_eq!(answered(&mut protocol), [(0, event::DEVICE_ADD, 0), (0, event::PORT_NAME, 1)]);
    // Whoever is known is not taken over.
    protocol.take_over(true);
    ready(&mut protocol);
    assert_eq!(told(&mut protocol), []);
    assert!(!protocol.takes_input(0));
}

#[test]
fn clients_that_come_and_go_are_told_of_each_for_itself() {
    let mut protocol = Protocol::new(1);
    protocol.add(0, "x", false);
    ready(&mut protocol);
    answered(&mut protocol);
    protocol.client(0, Some(1));
    assert_eq!(told(&mut protocol), [(0, event::PORT_OPEN, 1)]);
    // Another one, with no time in between.
    protocol.client(0, None);
    protocol.client(0, Some(2));
    assert_eq!(told(&mut protocol), [(0, event::PORT_OPEN, 0), (0, event::PORT_OPEN, 1)]);
    // Many that nobody could be told of are one change.
    for client in 3..1000 {
        protocol.client(0, None);
        protocol.client(0, Some(client));
    }
    protocol.client(0, None);
    assert_eq!(told(&mut protocol), [(0, event::PORT_OPEN, 0)]);
}

#[test]
fn one_port_that_flaps_does_not_keep_the_others_messages_back() {
    let mut protocol = Protocol::new(2);
    protocol.add(0, "a", false);
    protocol.add(1, "b", false);
    ready(&mut protocol);
    answered(&mut protocol);
    protocol.client(1, Some(1));
    let mut waited = 0;
    for client in 2.. {
        protocol.client(0, Some(client));
        let message = protocol.next().unwrap();
        protocol.sent(&message);
        if message.id == 1 {
            break;
        }
        waited += 1;
        assert!(waited < 4);
    }
}

#[test]
fn a_driver_that_failed_is_told_nothing_more() {
    let mut protocol = Protocol::new(2);
    protocol.add(0, "a", false);
    protocol.add(1, "b", false);
    assert_eq!(say(&mut protocol, 0, event::DEVICE_READY, 0), Heard::Device(false));
    assert_eq!(told(&mut protocol), []);
    ready(&mut protocol);
    told(&mut protocol);
    assert_eq!(say(&mut protocol, 0, event::PORT_READY, 0), Heard::Port(0, false));
    say(&mut protocol, 0, event::PORT_OPEN, 1);
    assert!(!protocol.takes_input(0), "a port whose driver failed is not used");
    protocol.client(0, Some(1));
    assert_eq!(told(&mut protocol), []);
}

#[test]
fn messages_that_make_no_sense_are_ignored_and_counted() {
    let mut protocol = Protocol::new(2);
    protocol.add(0, "a", false);
    assert_eq!(say(&mut protocol, 0, event::PORT_READY, 1), Heard::Ignored, "before DEVICE_READY");
    ready(&mut protocol);
    assert_eq!(say(&mut protocol, 0, event::PORT_READY, 1), Heard::Ignored, "not added yet");
    told(&mut protocol);
    for length in 0..8 {
        assert_eq!(protocol.hear(&[0xff; 8][..length]), Heard::Ignored, "{length} bytes");
    }
    for event in [1, 2, 4, 5, 7, 8, 255, u16::MAX] {
        assert_eq!(say(&mut protocol, 0, event, 1), Heard::Ignored, "event {event}");
    }
    for id in [1, 2, 31, 32768, u32::MAX] {
        for event in [event::PORT_READY, event::PORT_OPEN] {
            assert_eq!(say(&mut protocol, id, event, 1), Heard::Ignored, "port {id}");
        }
    }
    assert_eq!(protocol.ignored(), 2 + 8 + 8 + 10);
    // Longer than it has to be is no harm.
    let long = [Header { id: 0.into(), event: 3.into(), value: 1.into() }.as_bytes(), &[9; 40]].concat();
    assert_eq!(protocol.hear(&long), Heard::Port(0, true));
}

#[test]
fn after_a_reset_the_handshake_starts_again() {
    let mut protocol = Protocol::new(1);
    protocol.add(0, "a", true);
    protocol.client(0, Some(7));
    ready(&mut protocol);
    let first = answered(&mut protocol);
    assert_eq!(first.len(), 4);
    say(&mut protocol, 0, event::PORT_OPEN, 1);
    assert!(protocol.takes_input(0));
    protocol.reset();
    assert!(!protocol.takes_input(0) && protocol.next().is_none());
    ready(&mut protocol);
    assert_eq!(answered(&mut protocol), first);
    assert!(!protocol.takes_input(0), "every open state is gone");
}

#[test]
fn a_restored_dialogue_goes_on_and_tells_what_is_different_here() {
    let dialogue = || {
        let mut protocol = Protocol::new(3);
        protocol.add(0, "", true);
        protocol.add(1, "a", false);
        protocol
    };
    let mut first = dialogue();
    first.add(2, "c", false);
    first.client(1, Some(1));
    ready(&mut first);
    answered(&mut first);
    say(&mut first, 0, event::PORT_OPEN, 1);
    let mut second = dialogue();
    second.restore(first.save()).unwrap();
    assert!(second.takes_input(0));
    assert_eq!(told(&mut second), [(1, event::PORT_OPEN, 0), (2, event::DEVICE_REMOVE, 0)]);
    // Ports of other names are other ports; who is connected here is another client.
    let mut third = Protocol::new(3);
    third.add(0, "renamed", false);
    third.add(1, "a", false);
    third.client(1, Some(1));
    third.restore(first.save()).unwrap();
    let all = answered(&mut third);
    let of = |id| all.iter().filter(|message| message.0 == id).map(|message| message.1).collect::<Vec<_>>();
    assert_eq!(of(0), [event::DEVICE_REMOVE, event::DEVICE_ADD, event::PORT_NAME]);
    assert_eq!(of(1), [event::PORT_OPEN, event::PORT_OPEN], "the one client goes before the other comes");
    // Fewer ports than the driver knows: refused, nothing has changed.
    let mut small = Protocol::new(1);
    small.add(0, "", true);
    assert!(small.restore(first.save()).is_err());
    ready(&mut small);
    assert_eq!(told(&mut small), [(0, event::DEVICE_ADD, 0)]);
}
