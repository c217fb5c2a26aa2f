//! The state machine by itself, and beside a model of its peer that counts without wrapping around.
use proptest::prelude::*;

use super::*;

const KEY: Key = Key { peer_cid: 2, peer_port: 1024, guest_port: 5000 };

fn packet(op: Op, len: u32, flags: u32, buf_alloc: u32, fwd_cnt: u32) -> Header {
    Header {
        len: U32::new(len),
        kind: U16::new(1),
        op: U16::new(op.number()),
        flags: U32::new(flags),
        buf_alloc: U32::new(buf_alloc),
        fwd_cnt: U32::new(fwd_cnt),
        ..Header::default()
    }
}

fn plain(op: Op) -> Header {
    packet(op, 0, 0, 1 << 16, 0)
}

/// An open stream that the guest asked for; nothing is owed.
fn open() -> Flow {
    let mut flow = Flow::asked(Kind::Stream, &plain(Op::Request), 1 << 16);
    flow.accept();
    assert_eq!(sent(&mut flow), [Op::Response]);
    flow
}

/// Everything that is owed is sent.
fn sent(flow: &mut Flow) -> Vec<Op> {
    let mut all = Vec::new();
    while let Some(op) = flow.owed() {
        let header = flow.header(3, KEY, op, 0, 0);
        assert_eq!(header.op.get(), op.number());
        all.push(op);
    }
    all
}

#[test]
fn c5_10_6_5_request_response() {
    let mut flow = open();
    assert_eq!((flow.phase(), flow.room()), (Phase::Open, 1 << 16));
    assert_eq!(flow.hear(&plain(Op::CreditUpdate)), Heard::Nothing);

    let mut flow = Flow::asking(Kind::Stream, 1 << 16);
    assert_eq!((sent(&mut flow), flow.room()), (vec![Op::Request], 0));
    assert_eq!(flow.hear(&plain(Op::Response)), Heard::Opened);
    assert_eq!(flow.room(), 1 << 16);
}

#[test]
fn c5_10_6_5_rst_ends_it_and_is_not_answered() {
    for mut flow in [open(), Flow::asking(Kind::Stream, 1), Flow::asked(Kind::Stream, &plain(Op::Request), 1)]
    {
        assert_eq!(flow.hear(&plain(Op::Rst)), Heard::Reset);
        assert_eq!((flow.phase(), flow.owed()), (Phase::Over, None));
    }
}

#[test]
fn c5_10_6_5_shutdown_flags_are_permanent() {
    let mut flow = open();
    assert_eq!(flow.hear(&packet(Op::Shutdown, 0, 0, 1 << 16, 0)), Heard::Nothing);
    assert_eq!(flow.hear(&packet(Op::Shutdown, 0, SHUTDOWN_SEND, 1 << 16, 0)), Heard::Shut);
    assert_eq!(flow.hear(&packet(Op::Shutdown, 0, 0, 1 << 16, 0)), Heard::Shut);
    assert!(!flow.guest_will_send() && flow.guest_will_receive());
    assert_eq!(flow.room(), 1 << 16, "half-close: the other direction goes on");
    assert_eq!(flow.hear(&packet(Op::Shutdown, 0, SHUTDOWN_RECEIVE, 1 << 16, 0)), Heard::Shut);
    assert!(!flow.guest_will_send() && !flow.guest_will_receive());
    assert_eq!(flow.room(), 0);

    let mut flow = open();
    flow.host_ended();
    assert_eq!(flow.header(3, KEY, Op::Shutdown, 0, 0).flags.get(), SHUTDOWN_SEND);
    assert_eq!((flow.owed(), flow.room()), (None, 0));
    flow.host_ended();
    assert_eq!(flow.owed(), None, "told once");
    flow.host_gone();
    assert_eq!(flow.header(3, KEY, Op::Shutdown, 0, 0).flags.get(), SHUTDOWN_BOTH);
}

#[test]
fn what_breaks_a_flow_is_answered_with_one_rst() {
    let broken = |mut flow: Flow, header: Header, why: &str| {
        assert_eq!(flow.hear(&header), Heard::Broken, "{why}");
        assert_eq!((flow.phase(), flow.room()), (Phase::Over, 0), "{why}");
        assert_eq!(flow.hear(&header), Heard::Nothing, "{why}: the RST is on its way");
        assert_eq!(sent(&mut flow), [Op::Rst], "{why}");
    };
    let asked = || Flow::asked(Kind::Stream, &plain(Op::Request), 1 << 16);
    let asking = || Flow::asking(Kind::Stream, 1 << 16);
    broken(open(), plain(Op::Request), "a second request");
    broken(open(), plain(Op::Response), "a response to nothing");
    broken(open(), packet(Op::Rw, (1 << 16) + 1, 0, 0, 0), "more than the credit");
    broken(open(), packet(Op::Rw, u32::MAX, 0, 0, 0), "far more than the credit");
    broken(asked(), packet(Op::Rw, 1, 0, 0, 0), "data before the response");
    broken(asking(), packet(Op::Rw, 1, 0, 0, 0), "data instead of a response");
    broken(asking(), plain(Op::Request), "a request instead of a response");
    broken(asked(), plain(Op::Response), "a response from who asked");
    broken(asked(), packet(Op::Shutdown, 0, 3, 0, 0), "shutdown of nothing");
    for op in [0, 8, 9, u16::MAX] {
        let mut header = plain(Op::Rw);
        header.op = U16::new(op);
        broken(open(), header, "an operation that is none");
    }
    for kind in [0, 2, 3, u16::MAX] {
        let mut header = plain(Op::Rw);
        header.kind = U16::new(kind);
        broken(open(), header, "another type");
    }
    let mut shut = open();
    shut.hear(&packet(Op::Shutdown, 0, SHUTDOWN_SEND, 0, 0));
    broken(shut, packet(Op::Rw, 1, 0, 0, 0), "data after a shutdown");
}

#[test]
fn c5_10_6_3_credit_request_is_answered() {
    let mut flow = open();
    assert_eq!(flow.hear(&plain(Op::CreditRequest)), Heard::Nothing);
    assert_eq!(flow.hear(&plain(Op::CreditRequest)), Heard::Nothing);
    let header = flow.header(3, KEY, flow.owed().unwrap(), 0, 0);
    assert_eq!((header.op.get(), header.buf_alloc.get()), (6, 1 << 16));
    assert_eq!(flow.owed(), None, "one answer for all of them");
}

#[test]
fn c5_10_6_3_2_without_room_the_guest_is_asked_once() {
    let mut flow = open();
    flow.header(3, KEY, Op::Rw, 1 << 16, 0);
    assert_eq!(flow.room(), 0);
    flow.starve();
    flow.starve();
    assert_eq!(sent(&mut flow), [Op::CreditRequest]);
    flow.starve();
    assert_eq!(flow.owed(), None);
    flow.hear(&packet(Op::CreditUpdate, 0, 0, 1 << 16, 5));
    assert_eq!(flow.room(), 5);
}

#[test]
fn a_guest_that_lies_about_its_counters_gets_no_more_than_it_says() {
    let mut flow = open();
    flow.header(3, KEY, Op::Rw, 100, 0);
    for (alloc, forwarded, room) in [
        (0, 0, 0),
        (50, 0, 0),
        (1 << 16, 101, 0),
        (u32::MAX, 101, 0),
        (99, u32::MAX, 0),
        (u32::MAX, 100, u32::MAX),
    ] {
        flow.hear(&packet(Op::CreditUpdate, 0, 0, alloc, forwarded));
        assert_eq!(flow.room(), room, "{alloc} {forwarded}");
    }
}

#[test]
fn what_comes_after_the_hosts_end_is_dropped_and_credited() {
    let mut flow = open();
    flow.host_gone();
    assert_eq!(sent(&mut flow), [Op::Shutdown]);
    for _ in 0..1000 {
        assert_eq!(flow.hear(&packet(Op::Rw, 1 << 15, 0, 0, 0)), Heard::Nothing);
    }
    assert_eq!(flow.owed(), Some(Op::CreditUpdate));
}

#[test]
fn credit_updates_are_neither_late_nor_a_storm() {
    for piece in [1, 63, 1000, 4096, 1 << 15, 1 << 16] {
        let mut flow = open();
        let (mut total, mut updates, mut told) = (0u32, 0u32, 0u32);
        while total < 16 << 16 {
            // A sender stops where it has no room: the update has to have come before.
            assert!(total - told + piece <= 1 << 16, "late at {total} of pieces of {piece}");
            assert!(matches!(flow.hear(&packet(Op::Rw, piece, 0, 0, 0)), Heard::Data { .. }));
            flow.forwarded(piece);
            total += piece;
            if let Some(op) = flow.owed() {
                updates += 1;
                told = flow.header(3, KEY, op, 0, 0).fwd_cnt.get();
            }
        }
        assert!(updates <= (total >> 15) + 1, "{updates} updates for {total} bytes in pieces of {piece}");
    }
}

#[derive(Clone, Debug)]
enum Step {
    GuestSends(u32),
    GuestTakes(u32),
    HostSends(u32),
    HostTakes(u32),
    GuestAsks,
    Deliver,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u32..100_000).prop_map(Step::GuestSends),
        (0u32..100_000).prop_map(Step::GuestTakes),
        (0u32..100_000).prop_map(Step::HostSends),
        (0u32..100_000).prop_map(Step::HostTakes),
        Just(Step::GuestAsks),
        Just(Step::Deliver),
    ]
}

proptest! {
    /// A peer that keeps the rules, with counters that do not wrap, never sees one broken, and is never told less room
    /// for long: after everything is taken and delivered it may send again.
    #[test]
    fn c5_10_6_3_credit_in_both_directions_beside_a_model(
        ours in 1u32..200_000,
        theirs in 1u32..200_000,
        steps in proptest::collection::vec(step(), 1..400),
    ) {
        let mut flow = Flow::asked(Kind::Stream, &packet(Op::Request, 0, 0, theirs, 0), ours);
        flow.accept();
        let (mut guest_sent, mut host_took, mut told) = (0u64, 0u64, 0u64);
        let (mut host_sent, mut guest_took) = (0u64, 0u64);
        for step in steps {
            match step {
                Step::GuestSends(wish) => {
                    let room = u64::from(ours) - (guest_sent - told);
                    let len = u64::from(wish).min(room);
                    let heard = flow.hear(&packet(Op::Rw, len as u32, 0, theirs, guest_took as u32));
                    prop_assert_eq!(heard, Heard::Data { eom: false, eor: false });
                    guest_sent += len;
                }
                Step::HostTakes(wish) => {
                    let len = u64::from(wish).min(guest_sent - host_took);
                    flow.forwarded(len as u32);
                    host_took += len;
                }
                Step::HostSends(wish) => {
                    let len = wish.min(flow.room());
                    let header = flow.header(3, KEY, Op::Rw, len, 0);
                    host_sent += u64::from(len);
                    prop_assert!(host_sent - guest_took <= u64::from(theirs), "5.10.6.3.2");
                    prop_assert_eq!(header.fwd_cnt.get(), host_took as u32);
                    told = host_took;
                }
                Step::GuestTakes(wish) => {
                    guest_took += u64::from(wish).min(host_sent - guest_took);
                    flow.hear(&packet(Op::CreditUpdate, 0, 0, theirs, guest_took as u32));
                    prop_assert_eq!(u64::from(flow.room()), u64::from(theirs) - (host_sent - guest_took));
                }
                Step::GuestAsks => {
                    flow.hear(&packet(Op::CreditRequest, 0, 0, theirs, guest_took as u32));
                    prop_assert!(flow.owed().is_some());
                }
                Step::Deliver => {
                    while let Some(op) = flow.owed() {
                        let header = flow.header(3, KEY, op, 0, 0);
                        prop_assert_eq!(header.buf_alloc.get(), ours);
                        prop_assert_eq!(header.fwd_cnt.get(), host_took as u32);
                        told = host_took;
                    }
                }
            }
        }
        flow.forwarded((guest_sent - host_took) as u32);
        host_took = guest_sent;
        while let Some(op) = flow.owed() {
            flow.header(3, KEY, op, 0, 0);
            told = host_took;
        }
        prop_assert!(u64::from(ours) - (guest_sent - told) >= u64::from(ours) / 2, "the guest would wait for ever");
    }

    /// Whatever comes, and whatever the host's side does: no panic, no more promised memory, one RST at the end.
    #[test]
    fn any_sequence_of_packets_leaves_a_sound_state(
        packets in proptest::collection::vec((0u16..10, 0u16..4, any::<u32>(), 0u32..8, any::<u32>(), any::<u32>(), 0u8..12), 1..100),
    ) {
        let mut flow = open();
        let mut held = 0u64;
        for (op, kind, len, flags, alloc, forwarded, host) in packets {
            let mut header = packet(Op::Rw, len % 100_000, flags, alloc, forwarded);
            header.op = U16::new(op);
            header.kind = U16::new(if kind == 0 { 2 } else { 1 });
            if let Heard::Data { .. } = flow.hear(&header) {
                held += u64::from(header.len.get());
            }
            prop_assert!(held <= u64::from(flow.buf_alloc()));
            match host {
                0 => { flow.host_ended(); }
                1 => { flow.host_gone(); held = 0; }
                2 => { flow.forwarded(held as u32); held = 0; }
                3 => { flow.starve(); }
                _ => {}
            }
            if flow.host_is_gone() { held = 0; }
            if flow.phase() != Phase::Open { prop_assert_eq!(flow.room(), 0); }
            prop_assert!(sent(&mut flow).len() <= 4);
        }
    }
}
