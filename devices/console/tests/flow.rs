//! Who is slow, who comes, goes and comes back: clients and the guest, in memory, one step at a time.
mod support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::fd::OwnedFd;
use std::time::Instant;

use rustix::fs::{Mode, OFlags};
use rustix::termios::{Winsize, tcgetwinsize, tcsetwinsize};
use support::{Guest, Place, SOON, connect, console, drain, fill, pattern, queues};
use virtio_console::control::event;
use virtio_testkit::{RingLayout, Shape};
use vm_virtio::controls::Value;
use vm_virtio::{Features, HostReply, Stop};

fn named(place: &Place, name: &str) -> String {
    format!("name={name},{}", place.unix(name))
}

/// A guest with two named ports `a` and `b` that it has opened.
fn two(place: &Place, layout: RingLayout) -> Guest {
    let mut guest = Guest::ready(console(&[&named(place, "a"), &named(place, "b")]), layout);
    guest.say(0, event::PORT_OPEN, 1);
    guest.say(1, event::PORT_OPEN, 1);
    guest
}

fn text(value: Value) -> String {
    value.to_string()
}

#[test]
fn peers_console_output_before_a_client_is_replayed_in_order() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = two(&place, layout);
        for word in ["one ", "two ", "three "] {
            guest.print(0, word.as_bytes());
        }
        let mut client = connect(&place.path("a"));
        guest.wait_told(0, event::PORT_OPEN, 1);
        guest.print(0, b"four");
        assert_eq!(drain(&mut client), (b"one two three four".to_vec(), false));
        // Of more than is kept the end is.
        drop(client);
        guest.wait_told(0, event::PORT_OPEN, 0);
        let lost = pattern(100_000);
        for part in lost.chunks(10_000) {
            guest.print(0, part);
        }
        assert_eq!(guest.get("port.0.bytes-dropped"), Value::U64(100_000 - 65_536));
        let mut client = connect(&place.path("a"));
        guest.look();
        assert!(drain(&mut client).0 == lost[100_000 - 65_536..]);
    }
}

#[test]
fn policy_8_a_client_that_takes_nothing_holds_up_its_own_port_only() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = two(&place, layout);
        let (mut stalled, mut other) = (connect(&place.path("a")), connect(&place.path("b")));
        guest.wait_told(0, event::PORT_OPEN, 1);
        // More than a socket holds: the rest stays in the ring.
        let part = pattern(60_000);
        for _ in 0..20 {
            guest.write(0, &part);
        }
        let taken = guest.written(0);
        assert!(taken < 20, "{taken} of 20 buffers came back: nobody has read them");
        for round in 0..50 {
            guest.print(1, format!("round {round}\n").as_bytes());
        }
        let expected: String = (0..50).map(|round| format!("round {round}\n")).collect();
        assert_eq!(drain(&mut other).0, expected.as_bytes());
        assert_eq!(guest.written(0), 0, "nothing has changed for the other one");
        // It goes on where it was, to the last byte.
        let (mut all, mut back) = (Vec::new(), taken);
        let done = guest.host.run_until(SOON, |_| {
            all.extend(drain(&mut stalled).0);
            all.len() == 20 * part.len()
        });
        assert!(done, "{} bytes", all.len());
        assert!(all.chunks(part.len()).all(|chunk| chunk == part));
        back += guest.written(0);
        assert_eq!(back, 20);
    }
}

#[test]
fn a_console_that_nobody_reads_does_not_keep_its_guest_waiting() {
    // Linux waits for a console's buffer with a spinning CPU.
    let place = Place::new();
    let mut guest = Guest::ready(console(&[&place.unix("c")]), RingLayout::Split);
    let mut client = connect(&place.path("c"));
    guest.wait_told(0, event::PORT_OPEN, 1);
    let part = pattern(60_000);
    let (mut written, mut back) = (0, 0);
    // More than a socket holds: it waits.
    while back == written {
        guest.write(0, &part);
        written += 1;
        back += guest.written(0);
        assert!(written < 20, "a socket without an end");
    }
    while written < 20 {
        guest.write(0, &part);
        written += 1;
        back += guest.written(0);
    }
    // After a while it is given up, and what comes is kept, as far as it fits.
    let given_up = guest.host.run_until(SOON, |host| {
        back += host.ring(1).drain().len();
        back == 20
    });
    assert!(given_up, "it waits for ever");
    guest.print(0, b"the end");
    let mut all = Vec::new();
    let done = guest.host.run_until(SOON, |_| {
        all.extend(drain(&mut client).0);
        all.ends_with(b"the end")
    });
    assert!(done, "what is kept comes in order, once there is somebody who reads: {} bytes", all.len());
    guest.print(0, b"and on");
    assert_eq!(drain(&mut client).0, b"and on", "nobody is given up for good");
}

#[test]
fn clients_come_go_and_come_back() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = two(&place, layout);
        for round in 0..5 {
            let mut client = connect(&place.path("a"));
            guest.wait_told(0, event::PORT_OPEN, 1);
            assert_eq!(guest.get("port.0.client"), Value::Bool(true));
            guest.give(0, 64);
            client.write_all(format!("in {round}").as_bytes()).unwrap();
            assert_eq!(guest.wait_input(0), format!("in {round}").as_bytes());
            guest.print(0, b"out");
            assert_eq!(drain(&mut client).0, b"out");
            drop(client);
            // Seen with and without a buffer for input.
            if round % 2 == 0 {
                guest.give(0, 64);
            }
            guest.wait_told(0, event::PORT_OPEN, 0);
            assert_eq!(guest.get("port.0.client"), Value::Bool(false));
        }
    }
}

#[test]
fn a_second_client_waits_for_the_first() {
    let place = Place::new();
    let mut guest = two(&place, RingLayout::Split);
    let mut first = connect(&place.path("a"));
    guest.wait_told(0, event::PORT_OPEN, 1);
    let mut second = connect(&place.path("a"));
    guest.look();
    guest.print(0, b"for the first");
    assert_eq!((drain(&mut first).0.len(), drain(&mut second)), (13, (vec![], false)));
    guest.give(0, 64);
    drop(first);
    guest.wait_told(0, event::PORT_OPEN, 0);
    guest.print(0, b"for the second");
    assert_eq!(drain(&mut second).0, b"for the second");
    assert_eq!(guest.heard.iter().filter(|message| message.1 == event::PORT_OPEN).count(), 3);
}

#[test]
fn a_client_that_has_only_stopped_sending_still_gets_the_answer() {
    let place = Place::new();
    let mut guest = two(&place, RingLayout::Packed);
    let mut client = connect(&place.path("a"));
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    guest.give(0, 64);
    assert_eq!(guest.wait_input(0), b"question");
    guest.give(0, 64);
    guest.look();
    assert_eq!(guest.get("port.0.client"), Value::Bool(true));
    guest.print(0, b"answer");
    assert_eq!(drain(&mut client), (b"answer".to_vec(), false));
    drop(client);
    guest.wait_told(0, event::PORT_OPEN, 0);
}

#[test]
fn a_client_that_left_with_its_input_unread_gives_way_to_the_next() {
    let place = Place::new();
    let mut guest = two(&place, RingLayout::Split);
    let mut first = connect(&place.path("a"));
    guest.wait_told(0, event::PORT_OPEN, 1);
    first.write_all(b"unread").unwrap();
    drop(first);
    guest.look();
    // Nobody needs its place: what it wrote is still there to be read.
    guest.give(0, 64);
    assert_eq!(guest.wait_input(0), b"unread");
    guest.give(0, 64);
    guest.wait_told(0, event::PORT_OPEN, 0);
    let mut second = connect(&place.path("a"));
    guest.wait_told(0, event::PORT_OPEN, 1);
    second.write_all(&[1; 100]).unwrap();
    let taken = guest.wait_input(0).len();
    assert_eq!(taken, 64);
    drop(second);
    guest.look();
    let mut third = connect(&place.path("a"));
    guest.look();
    guest.print(0, b"who is there");
    assert_eq!(drain(&mut third).0, b"who is there");
}

#[test]
fn peers_console_tcp_is_one_backend_of_many_and_its_end_is_seen() {
    let mut guest = Guest::ready(console(&["name=t,backend=tcp:0"]), RingLayout::Split);
    guest.say(0, event::PORT_OPEN, 1);
    let address = text(guest.get("port.0.backend")).strip_prefix("tcp:").unwrap().to_owned();
    for _ in 0..3 {
        let mut client = TcpStream::connect(&address).unwrap();
        guest.wait_told(0, event::PORT_OPEN, 1);
        guest.give(0, 64);
        client.write_all(b"hello").unwrap();
        assert_eq!(guest.wait_input(0), b"hello");
        guest.print(0, b"hello, too");
        client.set_read_timeout(Some(SOON)).unwrap();
        let mut bytes = [0; 10];
        client.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"hello, too");
        guest.give(0, 64);
        drop(client);
        guest.wait_told(0, event::PORT_OPEN, 0);
    }
}

#[test]
fn a_stop_finds_nothing_to_wait_for_and_loses_nothing() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let mut guest = two(&place, layout);
        let mut client = connect(&place.path("a"));
        guest.wait_told(0, event::PORT_OPEN, 1);
        let part = pattern(1_000_000);
        for _ in 0..3 {
            guest.write(0, &part);
        }
        let mut all = Vec::new();
        let (_, transmit) = queues(0);
        // As QEMU does when a guest is paused, again and again: each time in the middle of a buffer.
        for _ in 0..20 {
            let state = guest.host.stop_queue(transmit, Stop::Drain).expect("it is not stuck");
            all.extend(drain(&mut client).0);
            guest.host.start_queue(transmit, Some(state));
            let order = guest.host.engine().enable(transmit as u16, true);
            guest.host.finish(order);
            guest.host.settle();
        }
        let done = guest.host.run_until(SOON, |_| {
            all.extend(drain(&mut client).0);
            all.len() >= 3 * part.len()
        });
        assert!(done, "{} bytes", all.len());
        assert!(all.chunks(part.len()).all(|chunk| chunk == part) && all.len() == 3 * part.len());
    }
}

#[test]
fn in_order_output_and_input_go_on_under_back_pressure() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let host = virtio_testkit::MemoryHost::builder(console(&[&named(&place, "a")]))
            .layout(layout)
            .with(Features::IN_ORDER)
            .start();
        let mut guest = Guest::of(host);
        guest.shake_hands();
        guest.say(0, event::PORT_OPEN, 1);
        let mut client = connect(&place.path("a"));
        guest.wait_told(0, event::PORT_OPEN, 1);
        let part = pattern(50_000);
        for _ in 0..20 {
            guest.write(0, &part);
        }
        let mut all = Vec::new();
        let done = guest.host.run_until(SOON, |_| {
            all.extend(drain(&mut client).0);
            all.len() == 20 * part.len()
        });
        assert!(done && all.chunks(part.len()).all(|chunk| chunk == part));
        guest.written(0);
        assert_eq!(guest.host.ring(1).in_flight(), 0);
    }
}

#[test]
fn a_client_that_leaves_in_the_middle_of_a_buffer_leaves_the_rest_to_the_next() {
    let place = Place::new();
    let mut guest = two(&place, RingLayout::Packed);
    let mut client = connect(&place.path("a"));
    guest.wait_told(0, event::PORT_OPEN, 1);
    let part = pattern(300_000);
    guest.write(0, &part);
    assert_eq!(guest.written(0), 0, "more than the socket holds");
    let (first, _) = drain(&mut client);
    drop(client);
    guest.give(0, 64);
    guest.wait_told(0, event::PORT_OPEN, 0);
    assert_eq!(guest.written(0), 1);
    let mut client = connect(&place.path("a"));
    guest.look();
    let (second, _) = drain(&mut client);
    assert!(part.starts_with(&first) && part.ends_with(&second));
    assert_eq!(second.len(), 65_536.min(part.len() - first.len()), "as much as is kept");
}

#[test]
fn ports_are_added_and_removed_while_the_guest_runs() {
    for layout in RingLayout::ALL {
        let place = Place::new();
        let specs = [support::spec("backend=null")];
        let mut guest = Guest::ready(virtio_console::Console::new(&specs, 3, 64).unwrap(), layout);
        let add =
            |guest: &mut Guest, spec: &str| guest.run("add-port", &[("spec", Value::Text(spec.into()))]);
        assert_eq!(add(&mut guest, &named(&place, "x")).unwrap(), HostReply::Value(Value::U64(1)));
        guest.wait_told(1, event::DEVICE_ADD, 0);
        assert!(guest.heard.contains(&(1, event::PORT_NAME, 1, b"x".to_vec())));
        guest.say(1, event::PORT_OPEN, 1);
        let mut client = connect(&place.path("x"));
        guest.wait_told(1, event::PORT_OPEN, 1);
        guest.print(1, b"hello");
        assert_eq!(drain(&mut client).0, b"hello");
        // What makes no sense changes nothing.
        for refused in ["", "backend=stdio", "backend=unix:/no/such/place", "name=x,backend=null", "nonsense"]
        {
            assert!(add(&mut guest, refused).is_err(), "{refused:?}");
        }
        assert_eq!(add(&mut guest, "backend=null").unwrap(), HostReply::Value(Value::U64(2)));
        assert!(add(&mut guest, "backend=null").is_err(), "no more than there is room for");
        assert!(guest.run("remove-port", &[("port", Value::U64(3))]).is_err());
        assert!(guest.run("remove-port", &[("port", Value::U64(1))]).is_ok());
        assert!(guest.run("remove-port", &[("port", Value::U64(1))]).is_err(), "it is gone");
        guest.wait_told(1, event::DEVICE_REMOVE, 0);
        assert_eq!(drain(&mut client), (vec![], true), "who was connected is disconnected");
        assert_eq!(place.names(), Vec::<String>::new(), "no socket is left behind");
        // The number is free again, for another port.
        guest.give(1, 64);
        assert_eq!(add(&mut guest, &named(&place, "y")).unwrap(), HostReply::Value(Value::U64(1)));
        guest.wait_told(1, event::DEVICE_ADD, 0);
        let mut client = connect(&place.path("y"));
        guest.wait_told(1, event::PORT_OPEN, 1);
        client.write_all(b"before it is open").unwrap();
        guest.look();
        assert_eq!(guest.input(1), None, "the new port is not open because the old one was");
        guest.say(1, event::PORT_OPEN, 1);
        assert_eq!(guest.wait_input(1), b"before it is open");
    }
}

/// The other side of a pseudo-terminal.
fn open_pty(guest: &mut Guest) -> OwnedFd {
    let path = text(guest.get("port.0.backend"));
    rustix::fs::open(path, OFlags::RDWR | OFlags::NOCTTY | OFlags::NONBLOCK, Mode::empty()).unwrap()
}

fn read_fd(fd: &OwnedFd) -> Vec<u8> {
    let mut bytes = vec![0; 4096];
    let count = rustix::io::read(fd, &mut bytes).unwrap_or(0);
    bytes.truncate(count);
    bytes
}

#[test]
fn a_terminal_is_open_while_somebody_has_it_open() {
    let place = Place::new();
    let link = format!("name=p,backend=pty:{}", place.path("tty").display());
    let mut guest = Guest::ready(console(&[&link]), RingLayout::Split);
    guest.say(0, event::PORT_OPEN, 1);
    assert_eq!(
        std::fs::read_link(place.path("tty")).unwrap().display().to_string(),
        text(guest.get("port.0.backend"))
    );
    for round in 0..3 {
        // Kept, since nobody is there; a terminal's own buffer would keep it for somebody else.
        guest.print(0, b"early ");
        assert_eq!(guest.get("port.0.client"), Value::Bool(false), "round {round}");
        let terminal = open_pty(&mut guest);
        guest.wait_told(0, event::PORT_OPEN, 1);
        guest.print(0, b"late\n");
        // The kernel hands it over in its own time.
        let (mut seen, deadline) = (Vec::new(), Instant::now() + SOON);
        while seen.len() < 11 && Instant::now() < deadline {
            seen.extend(read_fd(&terminal));
        }
        assert_eq!(seen, b"early late\n", "nothing is translated");
        rustix::io::write(&terminal, b"typed\r\x03").unwrap();
        guest.give(0, 64);
        assert_eq!(guest.wait_input(0), b"typed\r\x03", "nothing is translated");
        drop(terminal);
        guest.wait_told(0, event::PORT_OPEN, 0);
    }
    // Who comes, writes and goes at once is read.
    rustix::io::write(open_pty(&mut guest), b"in passing").unwrap();
    guest.give(0, 64);
    assert_eq!(guest.wait_input(0), b"in passing");
    drop(guest);
    assert_eq!(place.names(), Vec::<String>::new(), "the link is gone");
}

#[test]
fn a_terminals_size_comes_with_what_is_typed() {
    let mut guest = Guest::ready(console(&["backend=pty"]), RingLayout::Split);
    let terminal = open_pty(&mut guest);
    guest.wait_told(0, event::PORT_OPEN, 1);
    tcsetwinsize(&terminal, Winsize { ws_row: 43, ws_col: 132, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    assert_eq!(tcgetwinsize(&terminal).unwrap().ws_col, 132);
    rustix::io::write(&terminal, b"x").unwrap();
    guest.wait_told(0, event::RESIZE, 0);
    assert!(guest.heard.contains(&(0, event::RESIZE, 0, vec![132, 0, 43, 0])));
    assert_eq!(guest.get("port.0.size"), Value::Text("132x43".into()));
}

#[test]
fn a_terminal_that_nobody_reads_is_waited_for_and_the_order_stays() {
    let mut guest = Guest::ready(console(&["name=p,backend=pty"]), RingLayout::Packed);
    let terminal = open_pty(&mut guest);
    guest.wait_told(0, event::PORT_OPEN, 1);
    let part = pattern(200_000);
    guest.write(0, &part);
    assert_eq!(guest.written(0), 0);
    let mut all = Vec::new();
    let done = guest.host.run_until(SOON, |_| {
        all.extend(read_fd(&terminal));
        all.len() == part.len()
    });
    assert!(done && all == part, "{} bytes", all.len());
}

#[test]
fn a_file_is_appended_to_and_a_full_disk_costs_its_own_bytes_only() {
    let place = Place::new();
    std::fs::write(place.path("log"), "before\n").unwrap();
    let log = format!("backend=file:{}", place.path("log").display());
    let full = "name=full,backend=file:/dev/full";
    let mut guest = Guest::ready(console(&[&log, full]), RingLayout::Split);
    guest.print(0, b"one\n");
    for _ in 0..10 {
        guest.print(1, b"lost");
    }
    guest.print(0, b"two\n");
    assert_eq!(std::fs::read_to_string(place.path("log")).unwrap(), "before\none\ntwo\n");
    assert_eq!(guest.get("port.1.bytes-dropped"), Value::U64(40));
    assert_eq!(guest.host.engine().stats(queues(1).1 as u16).unwrap().requests.failed, 10);
}

#[test]
fn a_named_pipe_without_a_reader_fills_and_goes_on() {
    let place = Place::new();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        place.path("pipe"),
        rustix::fs::FileType::Fifo,
        Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
    let spec = format!("name=f,backend=file:{}", place.path("pipe").display());
    let mut guest = Guest::ready(console(&[&spec]), RingLayout::Split);
    let part = pattern(50_000);
    for _ in 0..4 {
        guest.write(0, &part);
    }
    assert!(guest.written(0) < 4);
    let reader =
        rustix::fs::open(place.path("pipe"), OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty()).unwrap();
    let mut all = Vec::new();
    let done = guest.host.run_until(SOON, |_| {
        all.extend(read_fd(&reader));
        all.len() == 4 * part.len()
    });
    assert!(done && all.chunks(part.len()).all(|chunk| chunk == part));
}

#[test]
fn sockets_are_for_this_user_alone_and_what_a_killed_process_left_is_replaced() {
    use std::os::unix::fs::PermissionsExt;
    let place = Place::new();
    // Bound, and not removed: as after a kill.
    drop(std::os::unix::net::UnixListener::bind(place.path("a")).unwrap());
    let device = console(&[&named(&place, "a")]);
    assert_eq!(std::fs::metadata(place.path("a")).unwrap().permissions().mode() & 0o777, 0o600);
    let specs = [support::spec(&named(&place, "a"))];
    let error =
        virtio_console::Console::new(&specs, 0, 64).err().expect("somebody listens there").to_string();
    assert!(error.contains("in use"), "{error}");
    drop(device);
    assert_eq!(place.names(), Vec::<String>::new());
    std::fs::write(place.path("a"), "precious").unwrap();
    assert!(virtio_console::Console::new(&specs, 0, 64).is_err());
    assert_eq!(std::fs::read(place.path("a")).unwrap(), b"precious");
}

#[test]
fn policy_8_a_client_that_floods_costs_the_others_nothing() {
    let place = Place::new();
    let mut guest = two(&place, RingLayout::Split);
    let (mut flood, mut quiet) = (connect(&place.path("a")), connect(&place.path("b")));
    guest.wait_told(1, event::PORT_OPEN, 1);
    let junk = vec![0xff; 1 << 20];
    let mut input = 0;
    for round in 0..50 {
        fill(&mut flood, &junk);
        guest.give(0, 4096);
        guest.give(1, 64);
        let line = format!("line {round}");
        quiet.write_all(line.as_bytes()).unwrap();
        assert_eq!(guest.wait_input(1), line.as_bytes());
        input += guest.input(0).map_or(0, |bytes| bytes.len());
    }
    assert!(input > 0);
}

#[test]
fn a_buffer_in_pieces_goes_on_in_the_middle_of_any_of_them() {
    for layout in RingLayout::ALL {
        for shape in [Shape::Direct, Shape::Indirect] {
            let place = Place::new();
            let mut guest = two(&place, layout);
            let mut client = connect(&place.path("a"));
            guest.wait_told(0, event::PORT_OPEN, 1);
            let part = pattern(90_000);
            for _ in 0..5 {
                let pieces: Vec<_> =
                    part.chunks(17_001).map(|piece| guest.host.ram().readable(piece)).collect();
                guest.host.ring(1).add_as(&pieces, shape);
            }
            guest.host.kick(1);
            let mut all: Vec<u8> = Vec::new();
            let mut buffer = [0; 5_003];
            let done = guest.host.run_until(SOON, |_| {
                // A little at a time, so that it stops in many places.
                let count = client.read(&mut buffer).unwrap_or(0);
                all.extend(&buffer[..count]);
                all.len() == 5 * part.len()
            });
            assert!(done && all.chunks(part.len()).all(|chunk| chunk == part), "{layout:?} {shape:?}");
            assert_eq!(guest.written(0), 5);
        }
    }
}
