//! Two guests of one process: everything that holds for the host's side holds between them.
mod support;

use support::*;
use virtio_testkit::daemon::TempDir;
use virtio_testkit::{MemoryHost, RingLayout};
use virtio_vsock::packet::{Header, Kind, Op, SEQ_EOM, SEQ_EOR, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_virtio::Features;
use zerocopy::byteorder::little_endian::{U32, U64};

const OTHER: u32 = 4;

fn device(exchange: &Exchange, cid: u32, groups: &[&str]) -> Vsock {
    let mut settings = Settings::new(cid.into(), HostSide::Nobody);
    settings.groups = groups.iter().map(|group| (*group).to_owned()).collect();
    Vsock::new(settings, exchange).expect("a device")
}

fn guest(exchange: &Exchange, cid: u32, groups: &[&str]) -> Guest {
    Guest::of(device(exchange, cid, groups), TempDir::new(), RingLayout::Split, Features::empty())
}

fn pair() -> (Guest, Guest) {
    let exchange = Exchange::new();
    (guest(&exchange, CID, &["a", "b"]), guest(&exchange, OTHER, &["b", "c"]))
}

/// The packet as the other guest sends it.
fn from_other(header: Header) -> Header {
    Header { src_cid: U64::new(OTHER.into()), ..header }
}

/// A connection, with the end of each guest.
fn connect(one: &mut Guest, other: &mut Guest, kind: Kind) -> (End, End) {
    let end = End { port: 50, peer: (OTHER, 60), kind };
    one.send(end.packet(Op::Request), &[]);
    one.quiet();
    let theirs = other.asked();
    assert_eq!(theirs, End { port: 60, peer: (CID, 50), kind });
    other.send(from_other(theirs.packet(Op::Response)), &[]);
    let answer = one.next();
    assert!(answer.is(Op::Response), "{answer:?}");
    (end, theirs)
}

#[test]
fn siblings_talk_in_both_directions() {
    let (mut one, mut other) = pair();
    let (end, theirs) = connect(&mut one, &mut other, Kind::Stream);
    one.send(end.data(5), b"hello");
    assert_eq!(other.next().data, b"hello");
    other.send(from_other(theirs.data(4)), b"back");
    assert_eq!(one.next().data, b"back");
    // Half-close, and the end.
    one.send(end.with_flags(Op::Shutdown, SHUTDOWN_SEND), &[]);
    let shut = other.next();
    assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_SEND));
    other.send(from_other(theirs.data(4)), b"more");
    assert_eq!(one.next().data, b"more");
    other.send(from_other(theirs.with_flags(Op::Shutdown, SHUTDOWN_BOTH)), &[]);
    assert!(other.next().is(Op::Rst));
    let shut = one.next();
    assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_BOTH));
    one.send(end.packet(Op::Rst), &[]);
    one.quiet();
    other.quiet();
}

#[test]
fn siblings_keep_messages() {
    let (mut one, mut other) = pair();
    let (end, _) = connect(&mut one, &mut other, Kind::SeqPacket);
    // The end of a record is one of a message here: a Unix socket is in between.
    for (len, flags) in [(1, SEQ_EOM), (100, SEQ_EOM | SEQ_EOR), (4000, SEQ_EOM)] {
        one.send(Header { flags: U32::new(flags), ..end.data(len) }, &pattern(len));
    }
    for len in [1, 100, 4000] {
        let packet = other.next();
        assert!(packet.data == pattern(len) && packet.header.flags.get() == SEQ_EOM);
    }
}

/// It ended that sibling's device.
#[test]
fn peers_vsock_a_sibling_that_has_not_booted_refuses() {
    let exchange = Exchange::new();
    let mut one = guest(&exchange, CID, &["a"]);
    let mut other = MemoryHost::builder(device(&exchange, OTHER, &["a"])).build();
    let end = End { port: 50, peer: (OTHER, 60), kind: Kind::Stream };
    one.send(end.packet(Op::Request), &[]);
    one.quiet();
    other.step();
    assert!(one.next().is(Op::Rst));
    // Once it has, it is reached.
    other.initialise();
    let mut other = Guest::again(other, TempDir::new());
    connect(&mut one, &mut other, Kind::Stream);
    // One that goes away lets go.
    other.host.reset();
    let shut = one.next();
    assert_eq!((shut.op(), shut.header.flags.get()), (Op::Shutdown.number(), SHUTDOWN_BOTH));
}

#[test]
fn a_sibling_without_a_listener_refuses() {
    let (mut one, mut other) = pair();
    let end = End { port: 50, peer: (OTHER, 60), kind: Kind::Stream };
    one.send(end.packet(Op::Request), &[]);
    let theirs = other.asked();
    other.send(from_other(theirs.packet(Op::Rst)), &[]);
    assert!(one.next().is(Op::Rst));
    other.quiet();
}

#[test]
fn guests_without_a_common_group_do_not_reach_each_other() {
    let exchange = Exchange::new();
    let mut one = guest(&exchange, CID, &["a", "b"]);
    let mut other = guest(&exchange, OTHER, &["c"]);
    let mut alone = guest(&exchange, 5, &[]);
    for cid in [OTHER, 5] {
        one.send(End { port: 50, peer: (cid, 60), kind: Kind::Stream }.packet(Op::Request), &[]);
        assert!(one.next().is(Op::Rst));
    }
    other.quiet();
    alone.quiet();
}

#[test]
fn a_context_id_is_one_guests() {
    let exchange = Exchange::new();
    let _first = MemoryHost::builder(device(&exchange, CID, &["a"])).build();
    let options = vm_virtio::EngineOptions::new(std::sync::Arc::new(Deaf));
    let second = vm_virtio::Engine::new(device(&exchange, CID, &["a"]), options);
    assert!(second.is_err(), "refused");
}

struct Deaf;
impl vm_virtio::HostEvents for Deaf {
    fn event(&self, _event: vm_virtio::HostEvent) {}
}

/// There was none: a sender was never held back.
#[test]
fn peers_vsock_credit_between_siblings() {
    let (mut one, mut other) = pair();
    let (end, theirs) = connect(&mut one, &mut other, Kind::Stream);
    // The other guest takes nothing: the sender gets no more credit.
    other.receives = None;
    let (mut sent, mut told) = (0u32, 0u32);
    let mut expected = Vec::new();
    while sent - told + 8192 <= 256 << 10 {
        let data = pattern(8192);
        one.send(end.data(8192), &data);
        expected.extend(data);
        sent += 8192;
        for packet in one.received() {
            assert!(packet.is(Op::CreditUpdate));
            told = packet.header.fwd_cnt.get();
        }
        other.settle();
        assert!(sent < 4 << 20, "it ends somewhere");
    }
    // One byte more than it may: broken.
    let _ = theirs;
    other.receives = Some(4096);
    other.fill();
    let mut got = Vec::new();
    one.wait("everything", |_| {
        for packet in other.received() {
            got.extend(packet.data);
        }
        // A guest that takes what it got says so.
        let header = Header { fwd_cnt: U32::new(got.len() as u32), ..theirs.packet(Op::CreditUpdate) };
        other.send(from_other(header), &[]);
        got.len() == expected.len()
    });
    assert!(got == expected);
    assert!(one.received().iter().any(|packet| packet.is(Op::CreditUpdate)));
}
