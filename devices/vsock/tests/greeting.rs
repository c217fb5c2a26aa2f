//! What clients send right behind their CONNECT line is the guest's, however it comes.
mod support;

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsFd;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags};
use support::*;
use virtio_testkit::RingLayout;
use virtio_vsock::packet::{Header, Op, SHUTDOWN_SEND};
use zerocopy::byteorder::little_endian::U32;

/// Cuts of the bytes into two writes: everywhere in the line, at its end, and behind it, where the first read takes some.
#[test]
fn peers_vsock_bytes_behind_connect_arrive_whole_in_any_two_pieces() {
    let bytes = [b"CONNECT 7\n", &pattern(100)[..]].concat();
    for layout in RingLayout::ALL {
        for cut in (1..bytes.len()).filter(|cut| *cut < 36 || cut % 16 == 0) {
            let mut guest = Guest::new(layout);
            let mut client = guest.client("");
            client.write_all(&bytes[..cut]).unwrap();
            guest.settle();
            client.write_all(&bytes[cut..]).unwrap();
            client.shutdown(Shutdown::Write).unwrap();
            let end = guest.asked();
            assert_eq!(end.port, 7);
            guest.quiet();
            guest.send(end.packet(Op::Response), &[]);
            let mut data = Vec::new();
            let last = loop {
                let packet = guest.next();
                if !packet.is(Op::Rw) {
                    break packet;
                }
                data.extend(packet.data);
            };
            assert_eq!(data, pattern(100), "cut at {cut}");
            assert!(last.is(Op::Shutdown) && last.header.flags.get() == SHUTDOWN_SEND, "{last:?}");
            assert_eq!(read_all(&mut client), format!("OK {}\n", end.peer.1).as_bytes());
        }
    }
}

/// They wait for the guest's credit and buffers like any others.
#[test]
fn c5_10_6_3_bytes_behind_connect_keep_to_the_credit() {
    for layout in RingLayout::ALL {
        let mut guest = Guest::new(layout);
        let _client = guest.client("CONNECT 7\n0123456789");
        let end = guest.asked();
        let room =
            |op, forwarded| Header { buf_alloc: U32::new(4), fwd_cnt: U32::new(forwarded), ..end.packet(op) };
        guest.send(room(Op::Response, 0), &[]);
        let mut data = Vec::new();
        for forwarded in [4, 8] {
            data.extend(guest.received().into_iter().flat_map(|packet| packet.data));
            assert_eq!(data.len(), forwarded as usize);
            guest.send(room(Op::CreditUpdate, forwarded), &[]);
        }
        data.extend(guest.received().into_iter().flat_map(|packet| packet.data));
        assert_eq!(data, b"0123456789");
    }
}

/// The kernel ends a read where a file was passed, whatever follows; there is no second event for that.
#[test]
fn a_connect_line_with_files_is_read_on() {
    let mut guest = Guest::new(RingLayout::Split);
    let client = guest.client("");
    for part in ["CON", "NECT 7", "\nab", "cd"] {
        let mut room = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut files = SendAncillaryBuffer::new(&mut room);
        let passed = [client.as_fd()];
        assert!(files.push(SendAncillaryMessage::ScmRights(&passed)));
        let part = [std::io::IoSlice::new(part.as_bytes())];
        rustix::net::sendmsg(&client, &part, &mut files, SendFlags::empty()).unwrap();
    }
    let end = guest.asked();
    guest.send(end.packet(Op::Response), &[]);
    let data: Vec<u8> = guest.received().into_iter().flat_map(|packet| packet.data).collect();
    assert_eq!(data, b"abcd");
}

/// Failure policy 8: the end of a connection forgets them.
#[test]
fn a_guest_that_refuses_ends_a_client_that_has_sent_more() {
    let mut guest = Guest::new(RingLayout::Split);
    let mut client = guest.client("CONNECT 7\nhello");
    let end = guest.asked();
    guest.send(end.packet(Op::Rst), &[]);
    guest.wait("the end", |_| is_closed(&mut client));
    guest.quiet();
}
