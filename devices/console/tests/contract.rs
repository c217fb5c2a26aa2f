//! The console device in memory, both layouts: 5.3 of virtio line by line, and what malformed messages and buffers get.
//! Everything steps in one thread: a device that slept or waited would be seen.
//!
//! | line of the contract | shown by |
//! |---|---|
//! | a write to emerg_wr is allowed on an unconfigured device, its low byte comes out (5.3.5.1) | `peers_console_c5_3_5_1_...` |
//! | DEVICE_ADD of no port that exists or is beyond max_nr_ports (5.3.6.2.1) | `protocol.rs` `c5_3_6_2_1_a_port_...`, fuzz target `console` |
//! | DEVICE_REMOVE of added ports only (5.3.6.2.1) | `protocol.rs` `c5_3_6_2_1_only_...`, fuzz target `console` |
//! | a changed size is notified (5.3.6, item 3) | `peers_console_c5_3_6_the_size_...` |
//! | ports are announced after DEVICE_READY (5.3.5, item 3) | `c5_3_5_nothing_...` |
//! | without MULTIPORT queues 0 and 1 only (5.3.2); queues 2 and 3 are control (trap) | `c5_3_2_...` |
//! | transmit buffers are not written | `c5_3_6_output_...`, each use of `Guest::written` |
//! | common rules | `conformance.rs` |
//! | malformed: short, unknown, of no port; buffers of the wrong kind | `peers_console_an_unknown_...`, `what_is_of_the_wrong_kind_...` |
//! | PORT_READY(0), DEVICE_READY(0) | `a_driver_that_failed_...` |
//! | no control receive buffer: later, none lost | `without_control_buffers_...` |
//! | back-pressure: nobody there, guest's side closed, no buffers | `flow.rs` `peers_console_output_...`, `data_for_a_port_...`, `input_without_buffers_...` |
//! | reset: ports and open states vanish | `after_a_reset_...` |
//! | the driver goes on, the device is another process | `takeover.rs` |
//! | traps: CONSOLE_PORT has value 1, RESIZE columns first, transmit buffers of a console come back unread | `c5_3_6_2_...`, `peers_console_c5_3_6_the_size_...`, `flow.rs` `a_console_that_nobody_reads_...` |
mod support;

use std::io::Write;

use support::{Guest, Place, connect, console, drain, null, queues};
use virtio_console::control::event;
use virtio_console::{Console, EMERG_WRITE, MAX_PORTS, MULTIPORT, SIZE};
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::controls::{ControlRequest, Value};
use vm_virtio::{ConfigWriter, DeviceType, Features, HostEvent, VirtioDevice};

fn config(device: &Console) -> Vec<u8> {
    let mut bytes = vec![0; 12];
    device.config().read(0, &mut bytes);
    bytes
}

#[test]
fn c5_3_identity_queues_features_and_configuration() {
    let device = console(&["backend=null", "name=a,backend=null", "name=b,backend=null"]);
    assert_eq!(device.device_type(), DeviceType::CONSOLE);
    assert_eq!(device.features(), Features::from(SIZE | MULTIPORT | EMERG_WRITE));
    // cols, rows: unknown; max_nr_ports; emerg_wr, which cannot be read.
    assert_eq!(config(&device), [0, 0, 0, 0, 3, 0, 0, 0, 0, 0, 0, 0]);
    let names: Vec<_> = device.queues(device.features()).iter().map(|queue| queue.name).collect();
    let expected = ["receiveq", "transmitq", "control receiveq", "control transmitq"];
    assert_eq!(names[..4], expected);
    assert_eq!(names.len(), 2 * (3 + 1), "2 * (max_nr_ports + 1) queues (5.3.2)");
    assert_eq!(names[4..6], expected[..2]);
    assert_eq!(device.queues(Features::from(SIZE)).len(), 2, "without MULTIPORT there are two (5.3.2)");
}

#[test]
fn peers_console_as_many_ports_as_fit_64_queues_and_no_more() {
    let all: Vec<String> = (0..MAX_PORTS).map(|id| format!("name=p{id},backend=null")).collect();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    let mut guest = Guest::ready(console(&all), RingLayout::Split);
    assert_eq!(guest.host.engine().queues().len(), 64);
    assert_eq!(guest.heard.iter().filter(|message| message.1 == event::DEVICE_ADD).count(), 31);
    for port in [0, 1, 15, 30] {
        guest.print(port, b"x");
    }
    let specs = |count: u32| (0..count).map(|_| support::spec("backend=null")).collect::<Vec<_>>();
    assert!(Console::new(&specs(32), 0, 64).is_err());
    assert!(Console::new(&specs(1), 32, 64).is_err());
    assert!(Console::new(&[], 0, 64).is_err());
    for size in [0, 1, 3, 100] {
        assert!(Console::new(&specs(1), 0, size).is_err(), "{size}");
    }
    let twice = [support::spec("name=a,backend=null"), support::spec("name=a,backend=null")];
    assert!(Console::new(&twice, 0, 64).is_err());
}

#[test]
fn c5_3_6_output_is_read_in_any_number_of_descriptors_and_comes_back_unwritten() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(console(&[&place.unix("c")]), layout);
        let mut client = connect(&place.path("c"));
        guest.look();
        let parts: Vec<_> =
            [&b"a"[..], b"bc", b"def"].iter().map(|part| guest.host.ram().readable(part)).collect();
        guest.host.ring(1).add(&parts);
        guest.host.kick(1);
        guest.host.settle();
        assert_eq!(guest.written(0), 1);
        assert_eq!(drain(&mut client), (b"abcdef".to_vec(), false));
    }
}

#[test]
fn peers_console_c5_3_5_1_an_emergency_write_works_before_anything_is_negotiated() {
    let place = Place::new();
    let mut host = MemoryHost::builder(console(&[&place.unix("c")])).build();
    let mut client = connect(&place.path("c"));
    // As a driver does it, with a store to the field.
    for byte in b"oops" {
        host.engine().write_config(8, &u32::from(*byte).to_le_bytes(), ConfigWriter::Driver).unwrap();
    }
    // The lower byte is what counts; a store of one byte is one of it, one to the others is none.
    host.engine().write_config(8, &[b'!', 1, 2, 3], ConfigWriter::Driver).unwrap();
    host.engine().write_config(8, b"?", ConfigWriter::Driver).unwrap();
    host.engine().write_config(9, b"x", ConfigWriter::Driver).unwrap();
    // QEMU's generic device always writes all of the space.
    host.engine().write_config(0, b"cols1234\n\0\0\0", ConfigWriter::Driver).unwrap();
    host.engine().write_config(0, b"cols1234\0\0\0\0", ConfigWriter::Driver).unwrap();
    host.settle();
    assert_eq!(drain(&mut client).0, b"oops!?\n");
    let mut bytes = [0xff; 12];
    host.config().read(0, &mut bytes);
    assert_eq!(bytes, [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0], "the driver changes nothing that can be read");
}

#[test]
fn an_emergency_without_a_client_is_kept_for_who_comes() {
    let place = Place::new();
    let mut host = MemoryHost::builder(console(&[&place.unix("c")])).build();
    for byte in b"panic" {
        host.engine().write_config(8, &[*byte], ConfigWriter::Driver).unwrap();
        host.settle();
    }
    let mut client = connect(&place.path("c"));
    host.settle();
    assert_eq!(drain(&mut client).0, b"panic");
}

#[test]
fn c5_3_5_nothing_is_announced_before_device_ready() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::silent(console(&["backend=null", "name=b,backend=null"]), layout);
        guest.add_controls(8, 64);
        guest.say(0, event::PORT_READY, 1);
        assert_eq!(guest.message(), None);
        guest.say(7, event::DEVICE_READY, 1);
        assert_eq!(guest.message(), Some((0, event::DEVICE_ADD, 0, vec![])), "its id means nothing");
        assert_eq!(guest.message(), Some((1, event::DEVICE_ADD, 0, vec![])));
        assert_eq!(guest.message(), None, "5.3.6.2: nothing of a port before its PORT_READY");
    }
}

#[test]
fn c5_3_6_2_ports_are_described_as_linux_wants_it() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let ports = ["backend=null".to_owned(), format!("name=org.example.0,{}", place.unix("a"))];
        let mut guest = Guest::ready(console(&[&ports[0], &ports[1]]), layout);
        let of = |guest: &Guest, id| -> Vec<_> {
            guest.heard.iter().filter(|message| message.0 == id).cloned().collect()
        };
        // The null port is there from the start; nobody is connected to the other.
        assert_eq!(
            of(&guest, 0),
            [
                (0, event::DEVICE_ADD, 0, vec![]),
                (0, event::CONSOLE_PORT, 1, vec![]),
                (0, event::PORT_OPEN, 1, vec![])
            ]
        );
        let name = (1, event::PORT_NAME, 1, b"org.example.0".to_vec());
        assert_eq!(of(&guest, 1), [(1, event::DEVICE_ADD, 0, vec![]), name]);
        let client = connect(&place.path("a"));
        guest.wait_told(1, event::PORT_OPEN, 1);
        drop(client);
        guest.wait_told(1, event::PORT_OPEN, 0);
    }
}

#[test]
fn peers_console_c5_3_6_the_size_is_in_the_configuration_and_told_to_consoles_columns_first() {
    let mut guest =
        Guest::ready(console(&["backend=null", "backend=null", "name=x,backend=null"]), RingLayout::Split);
    guest.host.events();
    let mut set = |name: &str, size: &str| {
        guest.control(ControlRequest::Set(name.into(), Value::Text(size.into()))).unwrap();
        let changed =
            guest.host.events().iter().filter(|event| matches!(event, HostEvent::ConfigChanged)).count();
        let mut bytes = [0; 4];
        guest.host.config().read(0, &mut bytes);
        (changed, bytes, guest.listen())
    };
    let resize = |id, cols: u8, rows: u8| vec![(id, event::RESIZE, 0, vec![cols, 0, rows, 0])];
    assert_eq!(set("port.0.size", "132x43"), (1, [132, 0, 43, 0], resize(0, 132, 43)));
    assert_eq!(set("port.0.size", "132x43"), (0, [132, 0, 43, 0], vec![]), "no change is none");
    // This size applies to port 0 only.
    assert_eq!(set("port.1.size", "80x24"), (0, [132, 0, 43, 0], resize(1, 80, 24)));
    assert_eq!(set("port.2.size", "10x10"), (0, [132, 0, 43, 0], vec![]), "not a console");
    for nonsense in ["", "80", "80x", "x24", "0x24", "80x0", "80x65536", "-1x2", "80X24", "80x24x1"] {
        let request = ControlRequest::Set("port.0.size".into(), Value::Text(nonsense.into()));
        assert!(guest.control(request).is_err(), "{nonsense:?}");
    }
}

#[test]
fn c5_3_2_without_multiport_there_are_two_queues() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let ports = [place.unix("a"), format!("name=b,{}", place.unix("b"))];
        let mut guest = Guest::simple(console(&[&ports[0], &ports[1]]), layout);
        let (mut first, mut second) = (connect(&place.path("a")), connect(&place.path("b")));
        guest.print(0, b"hello");
        guest.give(0, 64);
        first.write_all(b"hi").unwrap();
        second.write_all(b"nobody").unwrap();
        assert_eq!(guest.wait_input(0), b"hi", "a port 0 without MULTIPORT is open");
        assert_eq!(drain(&mut first).0, b"hello");
        // The other queues do not exist: whatever is in them stays there.
        let control = guest.host.ram().readable(&[0xff, 0xff, 0xff, 0xff, 0, 0, 1, 0]);
        guest.host.ring(3).add(&[control]);
        for queue in [2, 4] {
            let buf = guest.host.ram().writable(64);
            guest.host.ring(queue).add(&[buf]);
        }
        let output = guest.host.ram().readable(b"x");
        guest.host.ring(5).add(&[output]);
        for queue in 2..6 {
            guest.host.kick_anyway(queue);
        }
        guest.look();
        for queue in 2..6 {
            assert_eq!(guest.host.ring(queue).used(), None, "queue {queue}");
        }
        assert_eq!(drain(&mut second).0, b"");
    }
}

#[test]
fn peers_console_an_unknown_control_message_does_not_end_the_device() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::ready(null(), layout);
        for length in [0, 1, 7, 8, 9, 64, 4096] {
            for fill in [0x00, 0x07, 0x08, 0xff] {
                guest.say_bytes(&vec![fill; length.max(1)]);
            }
        }
        for event in 0..=9 {
            for id in [0, 1, 31, 32768, u32::MAX] {
                for value in [0, 1, 2, u16::MAX] {
                    if (id, event) != (0, event::PORT_READY) && event != event::DEVICE_READY {
                        guest.say(id, event, value);
                    }
                }
            }
        }
        // A buffer without a readable byte, and one with a writable part behind.
        let writable = guest.host.ram().writable(8);
        guest.host.ring(3).add(&[writable]);
        let both = [guest.host.ram().readable(&[0; 4]), guest.host.ram().writable(8)];
        guest.host.ring(3).add(&both);
        guest.host.kick(3);
        guest.host.settle();
        assert!(guest.host.ring(3).drain().iter().all(|used| used.len == 0));
        assert!(guest.host.engine().stats(3).unwrap().requests.refused > 100, "they are counted");
        guest.print(0, b"and it goes on");
        assert_eq!(guest.host.events().len(), 0, "no reset is needed");
    }
}

#[test]
fn the_driver_may_cut_a_control_message_as_it_likes() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::silent(null(), layout);
        // 2.7.4.1, both ways: eight descriptors of one byte, a message in three pieces.
        let bytes: Vec<_> =
            [0, 0, 0, 0, 0, 0, 1, 0].iter().map(|byte| guest.host.ram().readable(&[*byte])).collect();
        guest.host.ring(3).add(&bytes);
        guest.host.kick(3);
        let pieces = [3, 1, 60].map(|length| guest.host.ram().writable(length));
        guest.host.ring(2).add(&pieces);
        guest.host.kick(2);
        guest.host.settle();
        assert_eq!(guest.host.ring(3).used().map(|used| used.len), Some(0));
        assert_eq!(guest.host.ring(2).used().map(|used| used.len), Some(8));
        assert_eq!(guest.host.ram().written(&pieces)[..8], [0, 0, 0, 0, 1, 0, 0, 0]);
    }
}

#[test]
fn without_control_buffers_messages_wait_and_none_is_lost() {
    let names: Vec<String> = (0..8).map(|id| format!("name=port{id},backend=null")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    let mut guest = Guest::silent(console(&names), RingLayout::Split);
    guest.say(0, event::DEVICE_READY, 1);
    // One at a time; and buffers that are too small for anything, or for this.
    let mut heard = Vec::new();
    for round in 0.. {
        if heard.len() == 24 {
            break;
        }
        assert!(round < 200);
        guest.add_controls(1, [64, 7, 64, 8, 64][round % 5]);
        if let Some(message) = guest.message() {
            if message.1 == event::DEVICE_ADD {
                guest.say(message.0, event::PORT_READY, 1);
            }
            heard.push((message.0, message.1));
        }
    }
    for id in 0..8 {
        let of: Vec<u16> = heard.iter().filter(|message| message.0 == id).map(|message| message.1).collect();
        assert_eq!(of, [event::DEVICE_ADD, event::PORT_NAME, event::PORT_OPEN], "port {id}");
    }
}

#[test]
fn a_driver_that_failed_is_given_nothing() {
    let place = Place::new();
    let mut guest = Guest::silent(console(&[&place.unix("c")]), RingLayout::Split);
    guest.add_controls(8, 64);
    guest.say(0, event::DEVICE_READY, 0);
    assert_eq!(guest.message(), None);
    guest.say(0, event::DEVICE_READY, 1);
    guest.message().expect("DEVICE_ADD");
    guest.say(0, event::PORT_READY, 0);
    guest.say(0, event::PORT_OPEN, 1);
    guest.give(0, 64);
    let mut client = connect(&place.path("c"));
    client.write_all(b"hello").unwrap();
    guest.look();
    assert_eq!(guest.input(0), None);
    assert_eq!(guest.message(), None);
}

#[test]
fn peers_console_one_receive_buffer_is_used_once_with_all_of_its_bytes() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(console(&[&place.unix("c")]), layout);
        for _ in 0..4 {
            guest.give(0, 4096);
        }
        let mut client = connect(&place.path("c"));
        client.write_all(b"a whole line of input\n").unwrap();
        assert_eq!(guest.wait_input(0), b"a whole line of input\n");
        guest.look();
        assert_eq!(guest.input(0), None, "the others are still there");
        client.write_all(b"second").unwrap();
        assert_eq!(guest.wait_input(0), b"second");
        // More than one buffer holds goes on in the next ones.
        client.write_all(&[7; 5000]).unwrap();
        assert_eq!((guest.wait_input(0).len(), guest.wait_input(0).len()), (4096, 904));
    }
}

#[test]
fn input_without_buffers_stays_with_the_host_and_waits_for_none() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(console(&[&place.unix("c")]), layout);
        let mut client = connect(&place.path("c"));
        let sent = support::pattern(1 << 20);
        let first = support::fill(&mut client, &sent);
        guest.look();
        assert_eq!(support::fill(&mut client, &sent[first..]), 0, "the device has read what nobody takes");
        let (mut got, mut done) = (Vec::new(), first);
        while got.len() < 400 << 10 {
            guest.give(0, 4096);
            got.extend(guest.input(0).unwrap_or_default());
            done += support::fill(&mut client, &sent[done..]);
        }
        assert!(got == sent[..got.len()], "the bytes are those that were sent, in order");
        assert!(done <= got.len() + first + (64 << 10), "what is not taken is not read");
    }
}

#[test]
fn data_for_a_port_that_the_guest_has_closed_is_held() {
    let place = Place::new();
    let ports = ["backend=null".to_owned(), format!("name=b,{}", place.unix("b"))];
    let mut guest = Guest::ready(console(&[&ports[0], &ports[1]]), RingLayout::Packed);
    guest.give(1, 64);
    let mut client = connect(&place.path("b"));
    client.write_all(b"wait for it").unwrap();
    guest.look();
    assert_eq!(guest.input(1), None, "it has not opened the port yet");
    assert_eq!(guest.get("port.1.guest-open"), Value::Bool(false));
    guest.say(1, event::PORT_OPEN, 1);
    assert_eq!(guest.wait_input(1), b"wait for it");
    assert_eq!(guest.get("port.1.guest-open"), Value::Bool(true));
    guest.say(1, event::PORT_OPEN, 0);
    guest.give(1, 64);
    client.write_all(b"more").unwrap();
    guest.look();
    assert_eq!(guest.input(1), None);
    guest.say(1, event::PORT_OPEN, 1);
    assert_eq!(guest.wait_input(1), b"more");
}

#[test]
fn what_is_of_the_wrong_kind_in_a_buffer_is_neither_read_nor_written() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = Guest::ready(console(&[&place.unix("c")]), layout);
        let mut client = connect(&place.path("c"));
        guest.look();
        // 5.3.6.1: a writable part in a transmitq.
        let chain = [guest.host.ram().readable(b"read"), guest.host.ram().writable(16)];
        guest.host.ring(1).add(&chain);
        let alone = guest.host.ram().writable(16);
        guest.host.ring(1).add(&[alone]);
        guest.host.kick(1);
        guest.host.settle();
        assert_eq!(guest.written(0), 2);
        assert!(guest.host.ram().written(&[chain[1], alone]).iter().all(|byte| *byte == 0x5a));
        assert_eq!(drain(&mut client).0, b"read");
        // A readable part in a receiveq, with and without room behind it.
        let (receive, _) = queues(0);
        let none = guest.host.ram().readable(b"mine");
        guest.host.ring(receive).add(&[none]);
        let chain = [guest.host.ram().readable(b"mine"), guest.host.ram().writable(16)];
        guest.host.ring(receive).add(&chain);
        guest.host.kick(receive);
        client.write_all(b"yours").unwrap();
        guest.look();
        let used = guest.host.ring(receive).drain();
        assert_eq!(used.iter().map(|used| used.len).collect::<Vec<_>>(), [0, 5]);
        assert_eq!(guest.host.ram().written(&chain)[..5], *b"yours");
        guest.host.settle();
    }
}

#[test]
fn a_port_that_is_not_there_swallows_what_is_sent_to_it() {
    let specs = [support::spec("backend=null")];
    let mut guest = Guest::ready(Console::new(&specs, 4, 64).unwrap(), RingLayout::Split);
    for port in 1..4 {
        guest.print(port, b"into the void");
        guest.give(port, 64);
    }
    guest.say(3, event::PORT_OPEN, 1);
    guest.print(0, b"x");
    assert_eq!(guest.get("port.3.backend"), Value::Text(String::new()));
}

#[test]
fn after_a_reset_ports_vanish_and_the_handshake_starts_again() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let ports = [place.unix("a"), format!("name=b,{}", place.unix("b"))];
        let mut guest = Guest::ready(console(&[&ports[0], &ports[1]]), layout);
        let mut client = connect(&place.path("b"));
        guest.wait_told(1, event::PORT_OPEN, 1);
        guest.say(1, event::PORT_OPEN, 1);
        guest.host.reset();
        assert_eq!(guest.get("port.1.guest-open"), Value::Bool(false));
        guest.host.initialise();
        let mut again = Guest::of(guest.host);
        again.add_controls(8, 64);
        again.give(1, 64);
        client.write_all(b"for the next one").unwrap();
        again.look();
        assert_eq!((again.message(), again.input(1)), (None, None), "no port is open, none is announced");
        again.shake_hands();
        assert!(again.heard.contains(&(1, event::PORT_OPEN, 1, vec![])), "the client is still there");
        again.say(1, event::PORT_OPEN, 1);
        assert_eq!(again.wait_input(1), b"for the next one");
        again.print(1, b"answer");
        assert_eq!(drain(&mut client), (b"answer".to_vec(), false));
    }
}
