//! The socket device in memory, both layouts: 5.10 of virtio, what malformed packets get, and what the standard leaves
//! to the host's side. Everything steps in one thread: a device that waited would be seen.
//!
//! | line of the contract | shown by |
//! |---|---|
//! | queues, configuration, guest_cid none of the reserved (5.10.2, 5.10.4, 5.10.6.4.2) | `c5_10_identity_...`, `c5_10_6_4_2_a_reserved_...` |
//! | offers NO_IMPLIED_STREAM; which types there are without and with bits (5.10.3.2) | `c5_10_3_2_...` |
//! | the header's 44 bytes, operations, types, reserved context IDs | `src/packet.rs` `c5_10_6_...`, `c5_10_4_...` |
//! | buffers longer than `len`, payload in any descriptors; used lengths of rx and tx | `payload_in_any_number_...`; `receive_buffers_of_any_size`, each use of `Guest::send` |
//! | tx goes on while rx is full, until what can be held is exhausted (5.10.6.1.2) | `c5_10_6_1_2_...` |
//! | RW only into room that the peer has (5.10.6.3.2) | `c5_10_6_3_2_data_goes_...`, `src/flow/tests.rs` `c5_10_6_3_2_...` |
//! | each packet of a flow has valid buf_alloc and fwd_cnt (5.10.6.3.2) | `c5_10_6_3_2_every_packet_...` |
//! | CREDIT_REQUEST is answered by CREDIT_UPDATE (5.10.6.3) | `src/flow/tests.rs` `c5_10_6_3_credit_request_...` |
//! | an unknown type is answered with RST (5.10.6.4.2) | `c5_10_6_4_2_an_unknown_type_...` |
//! | REQUEST is answered with RESPONSE or RST; life and end of a connection (5.10.6.5) | `c5_10_6_5_...` |
//! | SHUTDOWN's flags stay (5.10.6.5) | `src/flow/tests.rs` `c5_10_6_5_shutdown_flags_...` |
//! | a tuple is not given again before its end | `a_tuple_that_is_taken_...` |
//! | EOM and EOR on the last packets of messages and records (5.10.6.6.1) | `peers_vsock_c5_10_6_6_1_...`; EOR to AF_VSOCK: `tests/tests/guest_vsock.rs` `vsock_forwarding_...` |
//! | TRANSPORT_RESET after a migration, connections are gone (5.10.6.7); four bytes | `snapshot.rs` `c5_10_6_7_...` |
//! | malformed: short, `len` beyond what there is | `headers_that_are_short_...` |
//! | malformed: foreign source, unknown destination, upper halves of context IDs | `headers_that_lie_about_addresses` |
//! | malformed: no such connection (RST, but none for an RST), wrong type | `peers_vsock_refused_unknown_...` |
//! | malformed: operations 0 and above 7; data before a connection and after its end | `operations_that_are_none_...`, `data_before_a_connection_...` |
//! | malformed: more than the credit | `more_than_the_credit_...` |
//! | rx buffers below 44 bytes, payload that is larger than a buffer | `receive_buffers_of_any_size` |
//! | reset: connections and what was to be sent are gone | `reset_drops_...` |
//! | two rings of QEMU's, three of others | `snapshot.rs` `two_of_three_...` |
//! | CONNECT and OK | `peers_vsock_bytes_that_come_...`, `a_connect_line_...`, `clients_that_talk_...` |
//! | traps: counters that wrap around; CREDIT_UPDATE neither missing nor a storm | `src/flow/tests.rs` `c5_10_6_3_credit_in_both_directions_...`, `credit_updates_...` |
//! | traps: RW after SHUTDOWN(receive); starvation | `after_shutdown_of_receiving_...`; `fair_among_connections` |
//! | common rules | `conformance.rs` |
mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use rustix::net::{SocketAddrUnix, SocketFlags, SocketType};
use support::*;
use virtio_testkit::{RingLayout, Shape};
use virtio_vsock::packet::{
    HEADER, HOST_CID, Header, Kind, Op, SEQ_EOM, SEQ_EOR, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND,
};
use virtio_vsock::{
    Exchange, HostSide, NO_IMPLIED_STREAM, SEQPACKET, SOCKET, STREAM, Settings, SetupError, Timeouts, Vsock,
};
use vm_virtio::{ConfigWriter, Features, VirtioDevice};
use zerocopy::IntoBytes;
use zerocopy::byteorder::little_endian::{U16, U32, U64};

/// A device that waits for nobody for long.
fn hurried() -> Guest {
    let soon = Duration::from_millis(100);
    Guest::with(RingLayout::Split, Features::empty(), |settings| {
        settings.timeouts =
            Timeouts { greeting: soon, connect: soon, answer: soon, close: soon, drain: soon };
    })
}

#[test]
fn c5_10_identity_queues_and_configuration() {
    let guest = Guest::new(RingLayout::Split);
    assert_eq!(guest.host.engine().device_type(), SOCKET);
    assert_eq!(SOCKET.0, 19);
    let names: Vec<_> = guest.host.engine().queues().iter().map(|queue| queue.name).collect();
    assert_eq!(names, ["rx", "tx", "event"]);
    let mut cid = [0xff; 8];
    guest.host.config().read(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), u64::from(CID), "5.10.4: the upper 32 bits are zero");
    assert_eq!(guest.host.config().len(), 8);
}

#[test]
fn c5_10_3_2_offers_no_implied_stream() {
    let guest = Guest::new(RingLayout::Split);
    let own = guest.host.engine().offered() - Features::NOT_A_DEVICES;
    assert_eq!(own, STREAM | SEQPACKET | NO_IMPLIED_STREAM);
    assert_eq!(own.bits(), 7);
}

/// Each set of features, and which types it means.
#[test]
fn c5_10_3_2_which_types_there_are_without_and_with_bits() {
    let all = STREAM | SEQPACKET | NO_IMPLIED_STREAM;
    for bits in 0..8u128 {
        let taken = Features::from_bits_retain(bits);
        let mut guest = Guest::with(RingLayout::Split, all - taken, |_| ());
        let stream =
            taken.contains(STREAM) || !taken.contains(NO_IMPLIED_STREAM) || !taken.contains(SEQPACKET);
        for (kind, expected) in [(Kind::Stream, stream), (Kind::SeqPacket, taken.contains(SEQPACKET))] {
            let end = End { kind, ..to_host(9, if kind == Kind::Stream { 1 } else { 2 }) };
            let _stream = (kind == Kind::Stream).then(|| guest.listen(1));
            let _packet = (kind == Kind::SeqPacket).then(|| listen_seqpacket(&guest.path(2)));
            guest.send(end.packet(Op::Request), &[]);
            let answer = guest.next();
            assert_eq!(answer.is(Op::Response), expected, "{taken:?} {kind:?}");
            assert_eq!(answer.is(Op::Rst), !expected, "{taken:?} {kind:?}");
            let _ = std::fs::remove_file(guest.path(1));
            let _ = std::fs::remove_file(guest.path(2));
        }
    }
}

#[test]
fn c5_10_6_4_2_a_reserved_context_id_is_refused() {
    for cid in [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX] {
        let made = Vsock::new(Settings::new(cid, HostSide::Nobody), &Exchange::new());
        assert!(matches!(made, Err(SetupError::ReservedCid(_))), "{cid:#x}");
    }
    let mut device = Vsock::new(Settings::new(3, HostSide::Nobody), &Exchange::new()).unwrap();
    device.write_config(0, &[0; 8], ConfigWriter::Driver);
    device.write_config(0, &[0; 8], ConfigWriter::Migration);
    let mut cid = [0; 8];
    device.config().read(0, &mut cid);
    assert_eq!(cid, 3u64.to_le_bytes(), "nobody changes it");
}

#[test]
fn c5_10_6_5_request_is_answered_with_response_or_rst() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(77, 1234);
        guest.send(end.packet(Op::Request), &[]);
        let rst = guest.next();
        assert!(rst.is(Op::Rst), "no listener: {rst:?}");
        assert_eq!(end_of(&rst.header), end, "source and destination are swapped");
        assert_eq!(rst.header.dst_cid.get(), u64::from(CID));
        let _stream = guest.connect(end);
        guest.quiet();
    }
}

#[test]
fn c5_10_6_3_2_every_packet_of_a_flow_tells_valid_credit() {
    let mut guest = Guest::new(RingLayout::Split);
    let end = to_host(1, 2);
    let listener = guest.listen(2);
    guest.send(end.packet(Op::Request), &[]);
    let response = guest.next();
    assert_eq!((response.header.buf_alloc.get(), response.header.fwd_cnt.get()), (256 << 10, 0));
    let (mut stream, _) = listener.accept().unwrap();
    guest.send(end.data(1000), &pattern(1000));
    stream.write_all(b"x").unwrap();
    let data = guest.next();
    assert_eq!((data.header.buf_alloc.get(), data.header.fwd_cnt.get()), (256 << 10, 1000));
    guest.send(end.packet(Op::CreditRequest), &[]);
    let update = guest.next();
    assert!(update.is(Op::CreditUpdate), "5.10.6.3: {update:?}");
    assert_eq!((update.header.buf_alloc.get(), update.header.fwd_cnt.get()), (256 << 10, 1000));
}

#[test]
fn payload_in_any_number_of_descriptors_and_longer_than_it_says() {
    for layout in RingLayout::ALL {
        for shape in [Shape::Direct, Shape::Indirect] {
            let mut guest = Guest::new(layout);
            let end = to_host(1, 2);
            let mut stream = guest.connect(end);
            let data = pattern(5000);
            let header = bytes(&end.data(5000));
            // One descriptor for everything; the header in pieces; payload in pieces; more than `len` says.
            let whole = [&header[..], &data[..]].concat();
            guest.send_raw(&[&whole], shape);
            assert_eq!(read_all(&mut stream), data);
            guest.send_raw(
                &[&header[..1], &header[1..43], &[&header[43..], &data[..1]].concat(), &data[1..]],
                shape,
            );
            assert_eq!(read_all(&mut stream), data);
            let pieces: Vec<&[u8]> = std::iter::once(&header[..]).chain(data.chunks(101)).collect();
            guest.send_raw(&pieces, shape);
            assert_eq!(read_all(&mut stream), data);
            guest.send_raw(&[&header, &data, &[0xee; 900]], shape);
            assert_eq!(read_all(&mut stream), data, "5.10.6: only the first `len` bytes");
            guest.quiet();
        }
    }
}

/// Linux hands those over in several descriptors.
#[test]
fn peers_vsock_a_send_of_more_than_32_kib_is_not_lost() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let mut stream = guest.connect(end);
        let data = pattern(64 << 10);
        let header = bytes(&end.data(data.len()));
        let pieces: Vec<&[u8]> = std::iter::once(&header[..]).chain(data.chunks(4096)).collect();
        guest.send_raw(&pieces, Shape::Direct);
        assert_eq!(read_all(&mut stream), data);
    }
}

#[test]
fn many_packets_in_one_turn_arrive_in_order() {
    let mut guest = Guest::new(RingLayout::Packed);
    let ends = [to_host(1, 2), to_host(2, 3)];
    let mut streams = ends.map(|end| guest.connect(end));
    let mut expected = [Vec::new(), Vec::new()];
    for n in 0..24usize {
        let which = usize::from(n % 7 > 3);
        let data = pattern(100 + n);
        let chain = [
            guest.host.ram().readable(ends[which].data(data.len()).as_bytes()),
            guest.host.ram().readable(&data),
        ];
        guest.host.ring(TX).add(&chain);
        expected[which].extend(data);
    }
    guest.host.kick(TX);
    guest.settle();
    assert_eq!(guest.host.ring(TX).drain().len(), 24);
    for (stream, expected) in streams.iter_mut().zip(expected) {
        assert_eq!(read_all(stream), expected);
    }
}

#[test]
fn c5_10_6_1_2_tx_goes_on_while_rx_is_full() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let mut stream = guest.connect(end);
        // The guest takes no more; its buffers are used up by what the host sends.
        guest.receives = None;
        let sent = pattern(400_000);
        for part in sent.chunks(200_000) {
            stream.write_all(part).unwrap();
            guest.settle();
        }
        assert_eq!(guest.host.ring(RX).in_flight(), 0, "rx is full");
        for n in 0..100 {
            guest.send(end.data(1000), &pattern(1000));
            assert_eq!(read_all(&mut stream), pattern(1000), "{n}");
        }
        // Also what has to be answered, as long as there is something to hold the answers.
        for n in 0..100 {
            guest.send(to_host(n, 9999).packet(Op::Request), &[]);
        }
        // And then it comes.
        guest.receives = Some(4096);
        guest.fill();
        let got = guest.received();
        assert_eq!(got.iter().filter(|packet| packet.is(Op::Rst)).count(), 100);
        let data: Vec<u8> = got.iter().filter(|p| p.is(Op::Rw)).flat_map(|p| p.data.clone()).collect();
        assert!(data == sent);
    }
}

/// The resources to hold replies end somewhere: memory is bounded.
#[test]
fn c5_10_6_1_2_tx_waits_when_the_answers_that_can_be_held_are_exhausted() {
    let mut guest = Guest::new(RingLayout::Split);
    guest.receives = None;
    let mut taken = 0;
    for n in 0..2000 {
        let buf = guest.host.ram().readable(to_host(n, 9999).packet(Op::Request).as_bytes());
        guest.host.ring(TX).add(&[buf]);
        guest.host.kick(TX);
        guest.host.settle();
        match guest.host.ring(TX).used() {
            Some(_) => taken += 1,
            None => break,
        }
    }
    // 64 went into the buffers that were there.
    assert_eq!(taken, 64 + 256);
    guest.receives = Some(4096);
    guest.fill();
    let rsts = guest.received().iter().filter(|packet| packet.is(Op::Rst)).count();
    // Those in the first 64 buffers went before the guest stopped looking.
    assert_eq!(rsts, 64 + 256 + 1);
    assert_eq!(guest.host.ring(TX).drain().len(), 1, "and tx goes on");
}

#[test]
fn c5_10_6_3_2_data_goes_to_the_guest_only_while_it_has_room() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let listener = guest.listen(2);
        let room = |header: Header, alloc: u32, forwarded: u32| Header {
            buf_alloc: U32::new(alloc),
            fwd_cnt: U32::new(forwarded),
            ..header
        };
        guest.send(room(end.packet(Op::Request), 10_000, 0), &[]);
        assert!(guest.next().is(Op::Response));
        let (mut stream, _) = listener.accept().unwrap();
        stream.write_all(&pattern(30_000)).unwrap();
        let (mut data, mut asks) = (Vec::new(), 0);
        let mut granted = 0;
        while data.len() < 30_000 {
            for packet in guest.received() {
                asks += usize::from(packet.is(Op::CreditRequest));
                data.extend(packet.data);
            }
            assert!(data.len() <= granted + 10_000, "more than there is room for");
            assert_eq!(data.len(), (granted + 10_000).min(30_000), "as much as there is room for");
            granted += 3_000;
            guest.send(room(end.packet(Op::CreditUpdate), 10_000, granted as u32), &[]);
        }
        assert_eq!(data, pattern(30_000));
        assert!(asks >= 1, "a guest that forgets to tell is asked");
    }
}

#[test]
fn more_than_the_credit_is_answered_with_rst() {
    let mut guest = Guest::with(RingLayout::Split, Features::empty(), |settings| settings.buffer_size = 8192);
    let end = to_host(1, 2);
    let mut stream = guest.connect(end);
    guest.send(end.data(8193), &pattern(8193));
    assert!(guest.next().is(Op::Rst));
    assert!(is_closed(&mut stream), "nothing of it arrives");
}

#[test]
fn a_client_that_does_not_read_costs_what_was_promised_and_no_more() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let mut stream = guest.connect(end);
        let (mut sent, mut told, mut expected) = (0u32, 0u32, Vec::new());
        while sent - told + 4096 <= 256 << 10 {
            let data = pattern(4096);
            guest.send(end.data(4096), &data);
            expected.extend(data);
            sent += 4096;
            for packet in guest.received() {
                assert!(packet.is(Op::CreditUpdate), "{packet:?}");
                told = packet.header.fwd_cnt.get();
            }
            assert!(sent < 4 << 20, "the socket's own buffer ends somewhere");
        }
        // No room: what comes now breaks the rule. But first the client reads, and the guest hears of it.
        let mut got = Vec::new();
        guest.wait("everything", |_| {
            got.extend(read_all(&mut stream));
            got.len() == expected.len()
        });
        assert!(got == expected);
        let update = guest.received().pop().expect("an update: otherwise the guest would wait for ever");
        assert!(update.is(Op::CreditUpdate) && update.header.fwd_cnt.get() == sent);
    }
}

#[test]
fn c5_10_6_4_2_an_unknown_type_is_answered_with_rst() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let _listener = guest.listen(2);
        for kind in [0, 3, 4, 0xffff] {
            for op in 1..=8 {
                let mut header = to_host(1, 2).packet(Op::Request);
                (header.kind, header.op) = (U16::new(kind), U16::new(op));
                guest.send(header, &[]);
                if op == Op::Rst.number() {
                    guest.quiet();
                    continue;
                }
                let answer = guest.next();
                assert!(answer.is(Op::Rst));
                assert_eq!(answer.header.kind.get(), kind, "of the same type");
            }
        }
    }
}

/// An RST to what is refused, unknown, or of the wrong type: without one the guest hangs until its time-out.
#[test]
fn peers_vsock_refused_unknown_and_wrong_type_get_an_rst() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        for op in [Op::Request, Op::Response, Op::Shutdown, Op::Rw, Op::CreditUpdate, Op::CreditRequest] {
            guest.send(end.packet(op), &[]);
            assert!(guest.next().is(Op::Rst), "{op:?} to nobody");
        }
        guest.send(end.packet(Op::Rst), &[]);
        guest.quiet();
        let mut stream = guest.connect(end);
        let wrong = End { kind: Kind::SeqPacket, ..end };
        guest.send(wrong.data(1), b"x");
        assert!(guest.next().is(Op::Rst), "of the wrong type");
        assert!(is_closed(&mut stream));
        // There is a listener, but of the other type.
        let _listener = guest.listen(2);
        guest.send(wrong.packet(Op::Request), &[]);
        assert!(guest.next().is(Op::Rst));
    }
}

#[test]
fn operations_that_are_none_are_answered_with_rst() {
    for op in [0, 8, 255, 0xffff] {
        let mut guest = Guest::new(RingLayout::Split);
        let end = to_host(1, 2);
        let mut header = end.packet(Op::Rw);
        header.op = U16::new(op);
        guest.send(header, &[]);
        assert!(guest.next().is(Op::Rst), "{op} to nobody");
        let mut stream = guest.connect(end);
        guest.send(header, &[]);
        assert!(guest.next().is(Op::Rst), "{op} on a connection");
        assert!(is_closed(&mut stream));
    }
}

#[test]
fn headers_that_lie_about_addresses() {
    let mut guest = Guest::new(RingLayout::Split);
    let _listener = guest.listen(2);
    let request = to_host(1, 2).packet(Op::Request);
    // Not the guest's own context ID: nobody to answer to.
    for cid in [0, 2, 4, u64::MAX, 3 | 1 << 32] {
        guest.send(Header { src_cid: U64::new(cid), ..request }, &[]);
        guest.quiet();
    }
    // Nobody there, or no such address.
    for cid in [0, 1, u64::from(CID), 4, 0xffff_ffff, 2 | 1 << 32, u64::MAX] {
        guest.send(Header { dst_cid: U64::new(cid), ..request }, &[]);
        let answer = guest.next();
        assert!(answer.is(Op::Rst), "{cid:#x}");
        assert_eq!(answer.header.src_cid.get(), cid);
    }
}

#[test]
fn headers_that_are_short_or_promise_more_than_there_is() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        for len in [1, 43] {
            guest.send_raw(&[&bytes(&end.packet(Op::Request))[..len]], Shape::Direct);
            guest.quiet();
        }
        let mut stream = guest.connect(end);
        guest.send(end.data(100), &pattern(99));
        assert!(guest.next().is(Op::Rst));
        assert!(is_closed(&mut stream), "nothing of it arrives");
        for len in [1, 4096, u32::MAX] {
            guest.send(Header { len: U32::new(len), ..end.packet(Op::Rw) }, &[]);
            assert!(guest.next().is(Op::Rst), "{len}");
        }
        // `len` is about payload: other packets have none.
        let mut stream = guest.connect(end);
        guest.send(Header { len: U32::new(7), ..end.packet(Op::CreditUpdate) }, &[]);
        guest.quiet();
        assert!(!is_closed(&mut stream));
    }
}

#[test]
fn data_before_a_connection_and_after_a_shutdown_is_answered_with_rst() {
    let mut guest = Guest::new(RingLayout::Packed);
    let end = to_host(1, 2);
    guest.send(end.data(3), b"abc");
    assert!(guest.next().is(Op::Rst));
    let mut stream = guest.connect(end);
    guest.send(end.with_flags(Op::Shutdown, SHUTDOWN_SEND), &[]);
    guest.send(end.data(3), b"abc");
    assert!(guest.next().is(Op::Rst));
    assert!(is_closed(&mut stream));
    // A client that waits: data instead of an answer.
    let mut client = guest.client("CONNECT 9\n");
    let end = guest.asked();
    guest.send(end.data(3), b"abc");
    assert!(guest.next().is(Op::Rst));
    assert!(is_closed(&mut client));
}

#[test]
fn receive_buffers_of_any_size() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let mut stream = guest.connect(end);
        guest.receives = None;
        guest.settle();
        // Used up, so that the next ones are known.
        let filler = guest.host.ring(RX).in_flight();
        for _ in 0..filler {
            guest.send(end.packet(Op::CreditRequest), &[]);
        }
        assert_eq!(guest.host.ring(RX).in_flight(), 0);
        stream.write_all(&pattern(1000)).unwrap();
        let sizes: [&[u32]; 6] = [&[43], &[44], &[45], &[20, 24, 3], &[40, 104], &[4096]];
        let mut got = Vec::new();
        let mut lens = Vec::new();
        for size in sizes {
            let chain: Vec<_> = size.iter().map(|len| guest.host.ram().writable(*len)).collect();
            guest.post(&chain);
            guest.host.settle();
            let used = guest.host.ring(RX).used().expect("used at once");
            lens.push(used.len as usize);
            if let Some(data) = guest.host.ram().written(&chain)[..used.len as usize].get(HEADER..) {
                got.extend(data.to_vec());
            }
        }
        // Too small for a header: back with length 0. For a header alone: something that is never wrong.
        assert_eq!(lens, [0, 44, 45, 47, 144, 44 + 1000 - 104]);
        assert_eq!(got, pattern(1000), "payload larger than a buffer is split");
    }
}

/// Each direction ends by itself, in both orders.
#[test]
fn peers_vsock_half_close_is_not_full_close() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        // The guest ends first.
        let mut stream = guest.connect(end);
        guest.send(end.data(5), b"hello");
        guest.send(end.with_flags(Op::Shutdown, SHUTDOWN_SEND), &[]);
        assert_eq!(read_all(&mut stream), b"hello");
        assert!(is_closed(&mut stream), "the client sees the end");
        stream.write_all(b"and back").unwrap();
        assert_eq!(guest.next().data, b"and back");
        drop(stream);
        let shut = guest.next();
        assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_BOTH));
        guest.send(end.packet(Op::Rst), &[]);
        guest.quiet();
        // The client ends first.
        let mut stream = guest.connect(end);
        stream.write_all(b"last words").unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        assert_eq!(guest.next().data, b"last words");
        let shut = guest.next();
        assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_SEND));
        guest.send(end.data(3), b"abc");
        assert_eq!(read_all(&mut stream), b"abc");
        guest.send(end.with_flags(Op::Shutdown, SHUTDOWN_BOTH), &[]);
        assert!(guest.next().is(Op::Rst), "5.10.6.5: the clean end");
        assert!(is_closed(&mut stream));
        guest.quiet();
    }
}

#[test]
fn c5_10_6_5_clean_disconnect_delivers_everything_first() {
    let mut guest = Guest::new(RingLayout::Split);
    let end = to_host(1, 2);
    let mut stream = guest.connect(end);
    // More than the socket takes: the rest waits in the device.
    let data = pattern(250_000);
    for part in data.chunks(50_000) {
        guest.send(end.data(part.len()), part);
    }
    guest.send(end.with_flags(Op::Shutdown, SHUTDOWN_BOTH), &[]);
    let end_packets: Vec<u16> = guest.received().iter().map(Packet::op).filter(|op| *op != 6).collect();
    assert_eq!(end_packets, [Op::Rst.number()]);
    // The tuple is free again, although the client has still to read.
    let mut second = guest.connect(end);
    let mut got = Vec::new();
    guest.wait("everything", |_| {
        got.extend(read_all(&mut stream));
        got.len() == data.len()
    });
    assert!(got == data && is_closed(&mut stream));
    guest.send(end.data(3), b"new");
    assert_eq!(read_all(&mut second), b"new");
}

#[test]
fn after_shutdown_of_receiving_nothing_is_sent_to_the_guest() {
    let mut guest = Guest::new(RingLayout::Split);
    let end = to_host(1, 2);
    let mut stream = guest.connect(end);
    guest.send(end.with_flags(Op::Shutdown, SHUTDOWN_RECEIVE), &[]);
    // 5.10.6.5: permanent, whatever follows.
    guest.send(end.with_flags(Op::Shutdown, 0), &[]);
    assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    guest.quiet();
    guest.send(end.data(3), b"abc");
    assert_eq!(read_all(&mut stream), b"abc", "the other direction goes on");
}

#[test]
fn c5_10_6_5_a_guest_that_does_not_end_a_connection_gets_an_rst() {
    let mut guest = hurried();
    let end = to_host(1, 2);
    drop(guest.connect(end));
    let shut = guest.next();
    assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_BOTH));
    assert!(guest.next().is(Op::Rst));
    guest.send(end.packet(Op::CreditUpdate), &[]);
    assert!(guest.next().is(Op::Rst), "it is forgotten");
}

#[test]
fn peers_vsock_bytes_that_come_with_connect_are_not_lost() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let mut client = guest.client("CONNECT 1025\nhello, guest");
        let end = guest.asked();
        assert_eq!((end.port, end.peer.0), (1025, HOST_CID));
        guest.quiet();
        guest.send(end.packet(Op::Response), &[]);
        assert_eq!(guest.next().data, b"hello, guest");
        assert_eq!(read_all(&mut client), format!("OK {}\n", end.peer.1).as_bytes());
        guest.send(end.data(2), b"hi");
        assert_eq!(read_all(&mut client), b"hi");
    }
}

#[test]
fn a_connect_line_in_pieces() {
    let mut guest = Guest::new(RingLayout::Split);
    let mut client = guest.client("");
    for byte in b"CONNECT 7\n" {
        guest.quiet();
        client.write_all(&[*byte]).unwrap();
    }
    client.write_all(b"x").unwrap();
    let end = guest.asked();
    guest.send(end.packet(Op::Response), &[]);
    assert_eq!(guest.next().data, b"x");
}

#[test]
fn clients_that_talk_nonsense_are_turned_away() {
    let mut guest = Guest::new(RingLayout::Split);
    let long = "1".repeat(1 << 20);
    for line in [
        "\n",
        "GET / HTTP/1.1\r\n",
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT 4294967296\n",
        "CONNECT 1 2\n",
        &long,
    ] {
        let mut client = std::os::unix::net::UnixStream::connect(guest.dir.join("vm")).unwrap();
        client.set_nonblocking(true).unwrap();
        let _ = client.write(line.as_bytes());
        guest.wait("the end", |_| is_closed(&mut client));
        guest.quiet();
    }
    // Half a line and the end of it.
    let mut client = guest.client("CONNEC");
    guest.quiet();
    client.shutdown(Shutdown::Write).unwrap();
    guest.wait("the end", |_| is_closed(&mut client));
    guest.quiet();
}

/// A client that says nothing holds up nobody, and not for ever.
#[test]
fn a_client_that_connects_and_stalls() {
    let mut guest = hurried();
    let mut stalled = [guest.client(""), guest.client("CONNECT 4")];
    let _client = guest.client("CONNECT 5\n");
    assert_eq!(guest.asked().port, 5);
    guest.wait("the end", |_| stalled.iter_mut().all(is_closed));
}

#[test]
fn a_guest_that_refuses_or_does_not_answer() {
    let mut guest = Guest::new(RingLayout::Split);
    let mut refused = guest.client("CONNECT 5\n");
    let end = guest.asked();
    guest.send(end.packet(Op::Rst), &[]);
    assert!(is_closed(&mut refused));
    guest.quiet();
    let mut guest = hurried();
    let mut waits = guest.client("CONNECT 6\n");
    guest.asked();
    let rst = guest.next();
    assert!(rst.is(Op::Rst), "after a time-out");
    assert!(is_closed(&mut waits));
}

/// It spun, and leaked a descriptor.
#[test]
fn peers_vsock_a_client_that_connects_and_closes_at_once() {
    let mut guest = Guest::new(RingLayout::Split);
    let descriptors = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    for line in ["", "CONNECT 5", "CONNECT 5\n"].iter().cycle().take(300) {
        drop(guest.client(line));
        // Comes to rest: `settle` would not return otherwise.
        guest.settle();
    }
    for packet in guest.received() {
        assert!(packet.is(Op::Request) || packet.is(Op::Rst), "{packet:?}");
    }
    // Other tests of this process have files, too.
    assert!(descriptors() < before + 150, "{} of {before}", descriptors());
    let _client = guest.client("CONNECT 6\n");
    assert_eq!(guest.asked().port, 6);
}

/// It panicked.
#[test]
fn peers_vsock_a_client_that_closes_before_the_guest_answers() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let client = guest.client("CONNECT 5\n");
        let end = guest.asked();
        drop(client);
        assert!(guest.next().is(Op::Rst), "the guest is told");
        guest.send(end.packet(Op::Response), &[]);
        assert!(guest.next().is(Op::Rst), "of nothing any more");
        // It answers at the same time.
        let client = guest.client("CONNECT 5\n");
        let end = guest.asked();
        drop(client);
        let buf = guest.host.ram().readable(end.packet(Op::Response).as_bytes());
        guest.host.ring(TX).add(&[buf]);
        guest.host.kick(TX);
        let answers: Vec<u16> = guest.received().iter().map(Packet::op).collect();
        assert!(
            answers.contains(&Op::Rst.number()) || answers.contains(&Op::Shutdown.number()),
            "{answers:?}"
        );
        guest.host.ring(TX).drain();
        guest.send(end.packet(Op::Rst), &[]);
        guest.quiet();
    }
}

/// The queue's thread waited for a listener that accepts nothing.
#[test]
fn peers_vsock_connecting_waits_for_nobody() {
    let mut guest = Guest::new(RingLayout::Split);
    let busy = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&busy, &SocketAddrUnix::new(guest.path(2)).unwrap()).unwrap();
    rustix::net::listen(&busy, 0).unwrap();
    // Its only place is taken.
    let _first = std::os::unix::net::UnixStream::connect(guest.path(2)).unwrap();
    let end = to_host(1, 2);
    guest.send(end.packet(Op::Request), &[]);
    // Others go on meanwhile.
    let mut stream = guest.connect(to_host(1, 3));
    guest.send(to_host(1, 3).data(3), b"abc");
    assert_eq!(read_all(&mut stream), b"abc");
    // When it accepts, the connection is made.
    let _accepted = rustix::net::accept(&busy).unwrap();
    assert!(guest.next().is(Op::Response));
    // One that never does is given up.
    guest.send(to_host(4, 2).packet(Op::Request), &[]);
    let rst = guest.next();
    assert!(rst.is(Op::Rst) && rst.header.dst_port.get() == 4, "{rst:?}");
}

#[test]
fn a_tuple_that_is_taken_is_not_given_twice() {
    let mut guest = Guest::new(RingLayout::Split);
    let end = to_host(1, 2);
    let mut stream = guest.connect(end);
    let _listener = guest.listen(2);
    guest.send(end.packet(Op::Request), &[]);
    assert!(guest.next().is(Op::Rst));
    assert!(is_closed(&mut stream));
    // Clients get ports of their own.
    let clients: Vec<_> = (0..50).map(|_| guest.client("CONNECT 5\n")).collect();
    let mut ports: Vec<u32> = clients.iter().map(|_| guest.asked().peer.1).collect();
    ports.sort_unstable();
    ports.dedup();
    assert_eq!(ports.len(), 50);
}

#[test]
fn reset_drops_every_connection_and_what_was_to_be_sent() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = to_host(1, 2);
        let mut stream = guest.connect(end);
        let mut client = guest.client("CONNECT 5\n");
        guest.asked();
        guest.receives = None;
        stream.write_all(&pattern(200_000)).unwrap();
        guest.send(to_host(9, 9).packet(Op::Request), &[]);
        guest.host.reset();
        assert!(is_closed(&mut client));
        assert!(is_closed(&mut stream));
        // Without a driver nobody is let in.
        let mut early = guest.client("CONNECT 5\n");
        guest.host.settle();
        assert!(is_closed(&mut early));
        let Guest { host, dir, .. } = guest;
        let mut guest = rebooted(host, dir);
        guest.quiet();
        let mut stream = guest.connect(end);
        guest.send(end.data(3), b"abc");
        assert_eq!(read_all(&mut stream), b"abc");
    }
}

fn rebooted(mut host: virtio_testkit::MemoryHost<Vsock>, dir: virtio_testkit::daemon::TempDir) -> Guest {
    host.initialise();
    Guest::again(host, dir)
}

/// One that sends as much as it can does not keep the others waiting.
#[test]
fn fair_among_connections() {
    let mut guest = Guest::new(RingLayout::Split);
    let heavy = to_host(1, 2);
    let mut floods = guest.connect(heavy);
    let light = to_host(1, 3);
    let mut whispers = guest.connect(light);
    guest.receives = None;
    guest.settle();
    while guest.host.ring(RX).used().is_some() {}
    floods.write_all(&pattern(200_000)).unwrap();
    whispers.write_all(b"psst").unwrap();
    guest.settle();
    guest.receives = Some(4096);
    guest.fill();
    let got = guest.received();
    let before = got.iter().position(|packet| packet.data == b"psst").expect("it came");
    assert!(before <= 64, "after {before} packets of the other");
}

fn listen_seqpacket(path: &std::path::Path) -> rustix::fd::OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&socket, 16).unwrap();
    socket
}

fn message(socket: &rustix::fd::OwnedFd) -> Option<Vec<u8>> {
    let mut bytes = vec![0; 1 << 20];
    let (len, _) = rustix::net::recv(socket, &mut bytes[..], RecvFlags::DONTWAIT).ok()?;
    bytes.truncate(len);
    Some(bytes)
}

/// There was none.
#[test]
fn peers_vsock_c5_10_6_6_1_seqpacket_keeps_messages() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let end = End { kind: Kind::SeqPacket, ..to_host(1, 2) };
        let listener = listen_seqpacket(&guest.path(2));
        guest.send(end.packet(Op::Request), &[]);
        let response = guest.next();
        assert!(response.is(Op::Response) && response.header.kind.get() == 2);
        let socket = rustix::net::accept_with(&listener, SocketFlags::NONBLOCK).unwrap();
        let eom = |len: usize, flags| Header { flags: U32::new(flags), ..end.data(len) };
        // Whole messages, and one in three packets, of which the last ends a record as well.
        guest.send(eom(3, SEQ_EOM), b"one");
        guest.send(eom(0, SEQ_EOM), &[]);
        guest.send(eom(2, 0), b"tw");
        assert_eq!(message(&socket).as_deref(), Some(&b"one"[..]));
        assert_eq!(message(&socket).as_deref(), Some(&b""[..]));
        assert_eq!(message(&socket), None, "not before its end");
        guest.send(eom(1, 0), b"o");
        guest.send(eom(5, SEQ_EOM | SEQ_EOR), b" more");
        assert_eq!(message(&socket).as_deref(), Some(&b"two more"[..]));
        // To the guest: what fits into a buffer, and what does not.
        for len in [1, 4000, 4096 - HEADER, 4096, 100_000] {
            rustix::net::send(&socket, &pattern(len), SendFlags::empty()).unwrap();
            let parts = guest.received();
            let (last, others) = parts.split_last().expect("a message");
            assert!(others.iter().all(|part| part.header.flags.get() == 0), "EOM on the last packet only");
            assert_eq!(last.header.flags.get(), SEQ_EOM);
            let data: Vec<u8> = parts.iter().flat_map(|part| part.data.clone()).collect();
            assert!(data == pattern(len));
        }
        drop(socket);
        let shut = guest.next();
        assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_BOTH));
    }
}

#[test]
fn seqpacket_messages_wait_whole_for_a_client_that_does_not_read() {
    let mut guest = Guest::new(RingLayout::Split);
    let end = End { kind: Kind::SeqPacket, ..to_host(1, 2) };
    let listener = listen_seqpacket(&guest.path(2));
    guest.send(end.packet(Op::Request), &[]);
    guest.next();
    let socket = rustix::net::accept_with(&listener, SocketFlags::NONBLOCK).unwrap();
    for n in 0..60usize {
        let header = Header { flags: U32::new(SEQ_EOM), ..end.data(1000 + n) };
        guest.send(header, &pattern(1000 + n));
    }
    let mut n = 0;
    guest.wait("all messages", |_| {
        while let Some(bytes) = message(&socket) {
            assert!(bytes == pattern(1000 + n), "message {n}");
            n += 1;
        }
        n == 60
    });
}

/// They take no credit: what bounds them is their number.
#[test]
fn policy_8_messages_without_a_byte_are_bounded() {
    let mut guest = Guest::with(RingLayout::Split, Features::empty(), |settings| settings.buffer_size = 4096);
    let end = End { kind: Kind::SeqPacket, ..to_host(1, 2) };
    let listener = listen_seqpacket(&guest.path(2));
    guest.send(end.packet(Op::Request), &[]);
    guest.next();
    // It reads nothing. Its socket takes a few hundred.
    let _socket = rustix::net::accept_with(&listener, SocketFlags::NONBLOCK).unwrap();
    let empty = Header { flags: U32::new(SEQ_EOM), ..end.data(0) };
    let packet = guest.host.ram().readable(empty.as_bytes());
    let mut sent = 0;
    while guest.received().iter().all(|packet| !packet.is(Op::Rst)) {
        while guest.host.ring(TX).free_slots() > 0 {
            guest.host.ring(TX).add(&[packet]);
            sent += 1;
        }
        guest.host.kick(TX);
        guest.settle();
        guest.host.ring(TX).drain();
        assert!(sent < 100_000, "messages without end");
    }
    assert!(sent > 4096, "as many as a message of each byte of credit: {sent}");
}

/// The kernel ends a read where a file was passed, whatever follows; there is no second event for that.
#[test]
fn a_client_that_passes_files_is_read_on() {
    let mut guest = Guest::new(RingLayout::Split);
    let stream = guest.connect(to_host(1, 2));
    let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut files = SendAncillaryBuffer::new(&mut room);
    let passed = [stream.as_fd()];
    assert!(files.push(SendAncillaryMessage::ScmRights(&passed)));
    let one = [std::io::IoSlice::new(b"one")];
    rustix::net::sendmsg(&stream, &one, &mut files, SendFlags::empty()).unwrap();
    (&stream).write_all(b"two").unwrap();
    let data: Vec<u8> = guest.received().into_iter().flat_map(|packet| packet.data).collect();
    assert_eq!(data, b"onetwo");
    // Nothing of it was taken by us: the file is not in this process a second time, so the end is seen at once.
    drop(stream);
    assert!(guest.next().is(Op::Shutdown));
}

#[test]
fn seqpacket_clients_of_the_host() {
    let mut guest = Guest::new(RingLayout::Packed);
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    for rest in ["", "first"] {
        let client =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
        rustix::net::connect(&client, &SocketAddrUnix::new(guest.dir.join("vm.seqpacket")).unwrap()).unwrap();
        rustix::net::send(&client, format!("CONNECT 8\n{rest}").as_bytes(), SendFlags::empty()).unwrap();
        rustix::net::send(&client, b"second", SendFlags::empty()).unwrap();
        let end = guest.asked();
        assert_eq!((end.port, end.kind), (8, Kind::SeqPacket));
        guest.send(end.packet(Op::Response), &[]);
        assert_eq!(message(&client), Some(format!("OK {}\n", end.peer.1).into_bytes()));
        let data: Vec<Vec<u8>> = guest.received().into_iter().map(|packet| packet.data).collect();
        let expected: Vec<&[u8]> =
            [rest.as_bytes(), b"second"].into_iter().filter(|m| !m.is_empty()).collect();
        assert_eq!(data, expected);
        drop(client);
        assert!(guest.next().is(Op::Shutdown));
    }
}

#[test]
fn a_message_that_the_guest_can_never_take_ends_the_connection() {
    let mut guest = Guest::new(RingLayout::Split);
    let end = End { kind: Kind::SeqPacket, ..to_host(1, 2) };
    let listener = listen_seqpacket(&guest.path(2));
    guest.send(Header { buf_alloc: U32::new(100), ..end.packet(Op::Request) }, &[]);
    guest.next();
    let socket = rustix::net::accept_with(&listener, SocketFlags::NONBLOCK).unwrap();
    rustix::net::send(&socket, &pattern(101), SendFlags::empty()).unwrap();
    assert!(guest.next().is(Op::Rst));
}

#[test]
fn a_thousand_calls_to_a_busy_listener_are_given_up() {
    let mut guest = hurried();
    let busy = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&busy, &SocketAddrUnix::new(guest.path(2)).unwrap()).unwrap();
    rustix::net::listen(&busy, 0).unwrap();
    let _first = std::os::unix::net::UnixStream::connect(guest.path(2)).unwrap();
    for port in 0..1000 {
        guest.send(to_host(port, 2).packet(Op::Request), &[]);
    }
    let mut rsts = 0;
    guest.wait("all are given up", |guest| {
        rsts += guest.received().iter().filter(|packet| packet.is(Op::Rst)).count();
        rsts == 1000
    });
}
