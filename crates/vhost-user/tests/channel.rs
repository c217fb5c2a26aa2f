//! The back-end's own requests: bytes, answers, and what neither side takes from the other.

#![cfg(target_endian = "little")]

mod wire;

use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_user::{
    Answer, BackendChannel, BackendCode, BackendListener, BackendReceived, BackendRequest, Error,
    MAX_UNANSWERED, ProtocolFeatures, Reason,
};
use wire::backend::samples;
use wire::{
    Probes, acknowledgement, assert_silent, features, file, hex, message, read, read_with_fds, send,
    with_need_reply,
};

fn channel(negotiated: ProtocolFeatures) -> (BackendChannel, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    (BackendChannel::new(near.into(), negotiated).unwrap(), far)
}

fn listener(negotiated: ProtocolFeatures) -> (BackendListener, UnixStream) {
    let (listener, far) = BackendListener::pair(negotiated).unwrap();
    let far = UnixStream::from(far);
    far.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    (listener, far)
}

#[track_caller]
fn refused(listener: &mut BackendListener) -> Reason {
    match listener.receive() {
        Err(Error::Invalid { reason, ticket, .. }) => {
            listener.reply(ticket, Answer::Failed).unwrap();
            reason
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_samples_cover_every_request() {
    for code in BackendCode::ALL {
        assert!(samples().iter().any(|sample| sample.code == *code), "{code}");
    }
}

#[test]
fn back_end_sends_the_documents_bytes() {
    for sample in samples() {
        for acknowledge in [false, true] {
            let lookup = sample.code == BackendCode::SharedObjectLookup;
            let (mut channel, far) = channel(features());
            channel.request((sample.request)(), acknowledge).unwrap();
            let (bytes, fds) = read_with_fds(&far, sample.bytes.len());
            let asks = acknowledge && !lookup;
            let expected = if asks { with_need_reply(&sample.bytes) } else { sample.bytes.clone() };
            assert_eq!((bytes, fds.len()), (expected, sample.fds), "{}", sample.code);
            assert_silent(&far, sample.code.name());
            assert_eq!(channel.unanswered(), usize::from(acknowledge || lookup));
        }
    }
}

#[test]
fn front_end_understands_the_documents_bytes() {
    for sample in samples() {
        for cut in 1..sample.bytes.len() {
            let (mut listener, far) = listener(features());
            let probes = Probes::new(sample.fds);
            send(&far, &sample.bytes[..cut], &probes.fds());
            assert!(matches!(listener.receive(), Ok(None)));
            send(&far, &sample.bytes[cut..], &[]);
            let BackendReceived { request, ticket } = listener.receive().unwrap().unwrap();
            assert!((sample.check)(&request), "{} cut at {cut}: {request:?}", sample.code);
            assert_eq!((request.code(), ticket.code()), (sample.code, sample.code.code()));
            drop(request);
            probes.assert_closed(sample.code.name());
        }
    }
}

#[test]
fn answers_come_back_in_the_order_of_the_requests() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut channel = BackendChannel::new(near.into(), features()).unwrap();
    let (mut listener, other) = BackendListener::pair(features()).unwrap();
    // The listener's socket is one of its own making, so bytes are carried over.
    let other = UnixStream::from(other);
    let mut asked = Vec::new();
    for (n, sample) in samples().into_iter().enumerate() {
        let id = channel.request((sample.request)(), true).unwrap();
        let (bytes, fds) = read_with_fds(&far, sample.bytes.len());
        let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
        send(&other, &bytes, &fds);
        let received = listener.receive().unwrap().unwrap();
        let lookup = sample.code == BackendCode::SharedObjectLookup;
        let fails = n % 3 == 1;
        let answer = match fails {
            true => Answer::Failed,
            false if lookup => Answer::Fd(file()),
            false => Answer::Done,
        };
        let found = usize::from(lookup && !fails);
        listener.reply(received.ticket, answer).unwrap();
        asked.push((id, sample.code, u64::from(fails), found));
    }
    for (_, code, _, found) in &asked {
        let (bytes, fds) = read_with_fds(&other, 20);
        assert_eq!(fds.len(), *found, "{code}");
        let fds: Vec<_> = fds.iter().map(std::os::fd::AsFd::as_fd).collect();
        send(&far, &bytes, &fds);
    }
    for (id, code, value, found) in asked {
        let reply = channel.receive().unwrap().unwrap();
        let got = (reply.id, reply.code, reply.value, usize::from(reply.fd.is_some()));
        assert_eq!(got, (id, code, value, found));
    }
    assert!(matches!(channel.receive(), Ok(None)));
    assert_eq!(channel.unanswered(), 0);
}

/// The document: "if the operation fails, no fd is sent".
#[test]
fn lookups_are_answered_with_the_documents_bytes_asked_for_or_not() {
    for flags in [1, 9] {
        for negotiated in [features(), features() - ProtocolFeatures::REPLY_ACK] {
            for fails in [false, true] {
                let (mut listener, far) = listener(negotiated);
                send(&far, &message(8, flags, &[7; 16]), &[]);
                let BackendReceived { request, ticket } = listener.receive().unwrap().unwrap();
                assert!(matches!(request, BackendRequest::SharedObjectLookup([7, ..])));
                listener.reply(ticket, if fails { Answer::Failed } else { Answer::Fd(file()) }).unwrap();
                let (bytes, fds) = read_with_fds(&far, 20);
                let expected = hex(&format!("08000000 05000000 08000000 0{}00000000000000", fails as u8));
                assert_eq!((bytes, fds.len()), (expected, usize::from(!fails)));
                assert_silent(&far, "one answer");
            }
        }
    }
}

#[test]
fn requests_of_features_that_were_not_negotiated_are_neither_sent_nor_taken() {
    for sample in samples() {
        for missing in sample.needs.iter() {
            let negotiated = features() - missing;
            let (mut channel, far) = channel(negotiated);
            let sent = channel.request((sample.request)(), true);
            assert!(matches!(sent, Err(Error::NotNegotiated(unmet)) if unmet == missing), "{sent:?}");
            assert_silent(&far, "nothing is sent");
            assert_eq!(channel.unanswered(), 0);
            let (mut listener, far) = listener(negotiated);
            let probes = Probes::new(sample.fds);
            send(&far, &sample.bytes, &probes.fds());
            assert_eq!(refused(&mut listener), Reason::NotNegotiated(missing), "{}", sample.code);
            probes.assert_closed(sample.code.name());
        }
    }
}

#[test]
fn wrong_sizes_and_descriptors_are_refused_closed_and_told() {
    for sample in samples() {
        let code = sample.code.code();
        let body = &sample.bytes[12..];
        let longer = [body, &[0]].concat();
        let shorter = body.split_last().map(|(_, shorter)| shorter.to_vec());
        for body in shorter.into_iter().chain([longer]) {
            let (mut listener, far) = listener(features());
            let probes = Probes::new(sample.fds);
            send(&far, &message(code, 9, &body), &probes.fds());
            let reason = refused(&mut listener);
            assert!(matches!(reason, Reason::BodySize { got, .. } if got == body.len()), "{reason:?}");
            assert_eq!(read(&far, 20), acknowledgement(code, 1));
            probes.assert_closed(sample.code.name());
        }
        for count in (0..=12).filter(|count| *count != sample.fds) {
            let (mut listener, far) = listener(features());
            let probes = Probes::new(count);
            send(&far, &sample.bytes, &probes.fds());
            match refused(&mut listener) {
                Reason::FdCount { expected, got } => assert_eq!((expected, got), (sample.fds, count)),
                Reason::FdsTruncated => assert!(count > vhost_user::MAX_FDS),
                other => panic!("{}: {other:?}", sample.code),
            }
            probes.assert_closed(sample.code.name());
            send(&far, &message(2, 1, &[]), &[]);
            assert!(listener.receive().unwrap().is_some(), "the next message is understood");
        }
        for at in 1..sample.bytes.len() {
            let (mut listener, far) = listener(features());
            let (own, stray) = (Probes::new(sample.fds), Probes::new(1));
            send(&far, &sample.bytes[..at], &own.fds());
            send(&far, &sample.bytes[at..], &stray.fds());
            assert_eq!(refused(&mut listener), Reason::StrayFds, "{} at {at}", sample.code);
            own.assert_closed(sample.code.name());
            stray.assert_closed(sample.code.name());
        }
    }
}

#[test]
fn values_out_of_range_are_refused() {
    let value = |field, value| Reason::Value { field, value };
    let iotlb = |permissions, kind| [vec![0; 24], vec![permissions, kind, 0, 0, 0, 0, 0, 0]].concat();
    let area = |index: u64| [index.to_le_bytes(), [0; 8], [0; 8]].concat();
    let mmap = |flags: u64| [vec![0; 32], flags.to_le_bytes().to_vec()].concat();
    let cases = [
        // What only the front-end sends, and what nobody does.
        (1, iotlb(1, 2), 0, value("type", 2)),
        (1, iotlb(1, 3), 0, value("type", 3)),
        (1, iotlb(1, 5), 0, value("type", 5)),
        (1, iotlb(4, 1), 0, value("permissions flags", 4)),
        (3, area(0x200), 1, value("vring index and flags", 0x200)),
        (3, area(1 << 63), 0, value("vring index and flags", 1 << 63)),
        (9, mmap(2), 1, value("flags", 2)),
        (9, mmap(u64::MAX), 1, value("flags", u64::MAX)),
    ];
    for (code, body, fds, expected) in cases {
        let (mut listener, far) = listener(features());
        let probes = Probes::new(fds);
        send(&far, &message(code, 1, &body), &probes.fds());
        assert_eq!(refused(&mut listener), expected, "{code} {body:x?}");
        probes.assert_closed("value");
    }
    let (mut channel, far) = channel(features());
    let notifier = BackendRequest::VringHostNotifier { index: 256, size: 0, offset: 0, fd: None };
    assert!(matches!(channel.request(notifier, false), Err(Error::Argument("index"))));
    assert_silent(&far, "an index that the message has no room for");
}

#[test]
fn answers_that_belong_to_no_request_end_the_channel_and_leave_no_descriptor() {
    type Bad = (&'static str, fn() -> BackendRequest, usize);
    let lookup = || BackendRequest::SharedObjectLookup([1; 16]);
    let bad: [Bad; 8] = [
        // Another request's, too short, too long, with a descriptor that it does not have, without one that it has.
        ("07000000 05000000 08000000 0000000000000000", || BackendRequest::SharedObjectAdd([1; 16]), 0),
        ("06000000 05000000 04000000 00000000", || BackendRequest::SharedObjectAdd([1; 16]), 0),
        ("06000000 05000000 09000000 000000000000000000", || BackendRequest::SharedObjectAdd([1; 16]), 0),
        ("06000000 05000000 08000000 0000000000000000", || BackendRequest::SharedObjectAdd([1; 16]), 1),
        ("08000000 05000000 08000000 0000000000000000", lookup, 0),
        ("08000000 05000000 08000000 0000000000000000", lookup, 2),
        ("08000000 05000000 08000000 0100000000000000", lookup, 1),
        ("08000000 05000000 08000000 0100000000000000", lookup, 9),
    ];
    for (bytes, request, fds) in bad {
        let (mut channel, far) = channel(features());
        channel.request(request(), true).unwrap();
        let probes = Probes::new(fds);
        send(&far, &hex(bytes), &probes.fds());
        let got = channel.receive();
        assert!(matches!(got, Err(Error::BadChannelReply { .. })), "{bytes} with {fds}: {got:?}");
        assert!(matches!(channel.receive(), Err(Error::Poisoned)));
        probes.assert_closed(bytes);
    }
    // Nothing was asked; and no answer at all.
    let (mut channel, far) = channel(features());
    send(&far, &acknowledgement(4, 0), &[]);
    assert!(matches!(channel.receive(), Err(Error::BadChannelReply { code: 4, .. })));
    let (mut channel, far) = self::channel(features());
    send(&far, &message(4, 1, &[0; 8]), &[]);
    assert!(matches!(channel.receive(), Err(Error::Header { .. })));
    let (mut channel, far) = self::channel(features());
    drop(far);
    assert!(matches!(channel.receive(), Err(Error::Disconnected)));
}

#[test]
fn a_front_end_that_answers_nothing_cannot_make_the_channel_grow() {
    let (mut channel, far) = channel(features());
    for n in 0..MAX_UNANSWERED {
        channel.request(BackendRequest::VringCall { index: 0 }, true).unwrap();
        assert_eq!(read(&far, 20).len(), 20);
        assert_eq!(channel.unanswered(), n + 1);
    }
    let refused = channel.request(BackendRequest::VringCall { index: 0 }, true);
    assert!(matches!(refused, Err(Error::OutputFull)));
    assert_silent(&far, "nothing is sent");
    // What needs no answer still goes, and an answer makes room.
    channel.request(BackendRequest::VringCall { index: 0 }, false).unwrap();
    send(&far, &acknowledgement(4, 0), &[]);
    assert_eq!(channel.receive().unwrap().unwrap().code, BackendCode::VringCall);
    channel.request(BackendRequest::VringCall { index: 0 }, true).unwrap();
}

/// A change of the configuration that waits covers the next; a call that waits beside it does not.
#[test]
fn only_the_same_message_is_merged() {
    let (near, far) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&near, 4608).unwrap();
    let mut channel = BackendChannel::new(near.into(), features()).unwrap();
    while !channel.wants_write() {
        channel.request(BackendRequest::VringCall { index: 0 }, false).unwrap();
    }
    assert_eq!(channel.config_changed().unwrap(), vhost_user::Sent::Later);
    assert_eq!(channel.config_changed().unwrap(), vhost_user::Sent::Merged);
    let mut changes = 0;
    while channel.wants_write() || changes == 0 {
        let code = read(&far, 12)[0];
        changes += u32::from(code == 2);
        if code == 4 {
            read(&far, 8);
        }
        channel.flush().unwrap();
    }
    assert_eq!(changes, 1);
}
