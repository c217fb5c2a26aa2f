//! Messages that are cut, too short, too long, out of place, or none at all: a typed error each, every descriptor
//! closed, and the endpoint goes on wherever the next message can be found.

#![cfg(target_endian = "little")]

mod wire;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vhost_user::{
    Answer, BackendEndpoint, Error, FrontendCode, FrontendRequest, HeaderFault, MAX_BODY, MAX_OUTPUT,
    ProtocolFeatures, Reason,
};
use wire::{
    Probes, acknowledgement, assert_silent, backend, features, hex, message, read, received, refused,
    samples, send, with_need_reply,
};

/// The `vhost` crate refuses a message whose body arrives in two pieces.
#[test]
fn peers_vhost_crate_body_in_two_pieces() {
    for sample in samples() {
        for cut in 1..sample.bytes.len() {
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(sample.fds);
            send(&socket, &sample.bytes[..cut], &probes.fds());
            assert!(matches!(endpoint.receive(), Ok(None)), "{} cut at {cut}", sample.name());
            assert!(matches!(endpoint.receive(), Ok(None)), "{} cut at {cut}", sample.name());
            send(&socket, &sample.bytes[cut..], &[]);
            let got = received(&mut endpoint, &sample.name());
            assert!((sample.check)(&got.request), "{} cut at {cut}: {:?}", sample.name(), got.request);
            endpoint.reply(got.ticket, sample.answer.clone()).unwrap();
            assert!(matches!(endpoint.receive(), Ok(None)));
        }
    }
}

#[test]
fn every_byte_may_come_alone() {
    for sample in samples() {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(sample.fds);
        let (last, bytes) = sample.bytes.split_last().unwrap();
        for (at, byte) in bytes.iter().enumerate() {
            send(&socket, &[*byte], if at == 0 { probes.fds() } else { Vec::new() }.as_slice());
            assert!(matches!(endpoint.receive(), Ok(None)), "{} at {at}", sample.name());
        }
        send(&socket, &[*last], &[]);
        let got = received(&mut endpoint, &sample.name());
        assert!((sample.check)(&got.request), "{}: {:?}", sample.name(), got.request);
    }
}

#[test]
fn many_messages_may_come_at_once() {
    let (mut endpoint, socket) = backend();
    // In one write where no descriptors are between them.
    let plain: Vec<_> = samples().into_iter().filter(|sample| sample.fds == 0).collect();
    send(&socket, &plain.iter().flat_map(|sample| sample.bytes.clone()).collect::<Vec<_>>(), &[]);
    // And right behind it all the others, whose descriptors must not be taken for those of a neighbour.
    let others: Vec<_> = samples().into_iter().filter(|sample| sample.fds > 0).collect();
    let probes: Vec<_> = others.iter().map(|sample| Probes::new(sample.fds)).collect();
    for (sample, probes) in others.iter().zip(&probes) {
        send(&socket, &sample.bytes, &probes.fds());
    }
    for sample in plain.iter().chain(&others) {
        let got = received(&mut endpoint, &sample.name());
        assert!((sample.check)(&got.request), "{}: {:?}", sample.name(), got.request);
        endpoint.reply(got.ticket, sample.answer.clone()).unwrap();
        if let Some(reply) = &sample.reply {
            assert_eq!(read(&socket, reply.len()), *reply, "replies keep the order of the requests");
        }
    }
    assert!(matches!(endpoint.receive(), Ok(None)));
}

#[test]
fn end_of_file_at_each_byte() {
    for sample in samples() {
        for cut in 0..sample.bytes.len() {
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(sample.fds);
            if cut > 0 {
                send(&socket, &sample.bytes[..cut], &probes.fds());
            }
            drop(socket);
            match endpoint.receive() {
                Err(Error::Disconnected) if cut == 0 => {}
                Err(Error::Truncated { have }) if cut > 0 => assert_eq!(have, cut),
                other => panic!("{} ended at {cut}: {other:?}", sample.name()),
            }
            assert!(matches!(endpoint.receive(), Err(Error::Poisoned)));
            probes.assert_closed(&sample.name());
        }
    }
}

/// A payload one byte too short or too long for its request, whole in itself.
#[test]
fn wrong_size_by_one_is_refused_and_the_next_message_is_understood() {
    for sample in samples() {
        let body = &sample.bytes[12..];
        let mut longer = body.to_vec();
        longer.push(0);
        let shorter = body.split_last().map(|(_, shorter)| shorter.to_vec());
        for body in shorter.into_iter().chain([longer]) {
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(sample.fds);
            send(&socket, &message(sample.code.code(), 1, &body), &probes.fds());
            let reason = refused(&mut endpoint, &socket, &sample.name());
            assert!(
                matches!(reason, Reason::BodySize { got, .. } if got == body.len()),
                "{}: {reason:?}",
                sample.name()
            );
            probes.assert_closed(&sample.name());
        }
    }
}

#[test]
fn missing_and_superfluous_descriptors_are_refused_and_closed() {
    for sample in samples() {
        for count in 0..=40 {
            // REM_MEM_REG: one descriptor is tolerated; see below.
            if count == sample.fds || (sample.code == FrontendCode::RemMemReg && count == 1) {
                continue;
            }
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(count);
            send(&socket, &sample.bytes, &probes.fds());
            let reason = refused(&mut endpoint, &socket, &sample.name());
            match reason {
                Reason::FdCount { expected, got } => assert_eq!((expected, got), (sample.fds, count)),
                // The kernel closes what there was no room for.
                Reason::FdsTruncated => assert!(count > vhost_user::MAX_FDS),
                other => panic!("{} and got {count}: {other:?}", sample.name()),
            }
            probes.assert_closed(&sample.name());
        }
    }
}

/// Contract: REM_MEM_REG: no fd needed, close one if given.
#[test]
fn rem_mem_reg_closes_a_descriptor_without_using_it() {
    let sample = samples().into_iter().find(|sample| sample.code == FrontendCode::RemMemReg).unwrap();
    let (mut endpoint, socket) = backend();
    let probes = Probes::new(1);
    send(&socket, &sample.bytes, &probes.fds());
    let got = received(&mut endpoint, "one descriptor");
    assert!((sample.check)(&got.request));
    probes.assert_closed("closed when the request is handed out");
}

/// Contract: close stray fds.
#[test]
fn descriptors_in_the_middle_of_a_message_are_refused_and_closed() {
    for sample in samples() {
        for at in 1..sample.bytes.len() {
            let (mut endpoint, socket) = backend();
            let (own, stray) = (Probes::new(sample.fds), Probes::new(1));
            send(&socket, &sample.bytes[..at], &own.fds());
            // Both before and after the beginning has been read.
            if at % 2 == 0 {
                assert!(matches!(endpoint.receive(), Ok(None)));
            }
            send(&socket, &sample.bytes[at..], &stray.fds());
            let reason = refused(&mut endpoint, &socket, &sample.name());
            assert_eq!(reason, Reason::StrayFds, "{} at {at}", sample.name());
            own.assert_closed(&sample.name());
            stray.assert_closed(&sample.name());
        }
    }
}

#[test]
fn a_refusal_is_told_to_a_front_end_that_asked() {
    for sample in samples().into_iter().filter(|sample| sample.reply.is_none()) {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(sample.fds + 1);
        send(&socket, &with_need_reply(&message(sample.code.code(), 1, &[0; 77])), &probes.fds());
        refused(&mut endpoint, &socket, &sample.name());
        assert_eq!(read(&socket, 20), acknowledgement(sample.code.code(), 1));
        assert_silent(&socket, &sample.name());
        probes.assert_closed(&sample.name());
    }
}

#[test]
fn unknown_and_unsupported_codes_are_told_apart_and_survived() {
    let typed: Vec<u32> = samples().iter().map(|sample| sample.code.code()).collect();
    for code in (0..=50).chain([255, 1000, u32::MAX]).filter(|code| !typed.contains(code)) {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(1);
        send(&socket, &message(code, 9, b"whatever"), &probes.fds());
        let reason = refused(&mut endpoint, &socket, &code.to_string());
        let known = FrontendCode::from_code(code).is_some();
        assert_eq!(reason, if known { Reason::Unsupported } else { Reason::Unknown }, "{code}");
        probes.assert_closed(&code.to_string());
        // Requests whose reply this crate has no type for cannot be told; the others are.
        if ![26, 28, 31, 41, 44].contains(&code) {
            assert_eq!(read(&socket, 20), acknowledgement(code, 1));
        }
    }
}

/// IOTLB_MSG, POSTCOPY_END, SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE have a status as their reply: a refusal is sent
/// whether it was asked for or not.
#[test]
fn a_status_reply_is_sent_without_being_asked_for() {
    for code in [22, 30, 42, 43] {
        let (mut endpoint, socket) = backend();
        endpoint.set_protocol_features(ProtocolFeatures::empty());
        send(&socket, &message(code, 1, &[]), &[]);
        refused(&mut endpoint, &socket, &code.to_string());
        assert_eq!(read(&socket, 20), acknowledgement(code, 1));
        assert_silent(&socket, &code.to_string());
    }
}

#[test]
fn a_header_that_no_message_can_be_taken_by_ends_the_connection() {
    let oversized = (MAX_BODY + 1) as u32;
    let cases = [
        ([1, 0, 0], HeaderFault::Version),
        ([1, 2, 0], HeaderFault::Version),
        ([1, 3, 0], HeaderFault::Version),
        ([1, 5, 0], HeaderFault::ReplyBit),
        ([1, 13, 0], HeaderFault::ReplyBit),
        ([5, 1, oversized], HeaderFault::Oversized),
        ([24, 1, u32::MAX], HeaderFault::Oversized),
        ([u32::MAX, u32::MAX, u32::MAX], HeaderFault::Version),
    ];
    for (fields, expected) in cases {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(3);
        let bytes: Vec<u8> = fields.iter().flat_map(|field| field.to_le_bytes()).collect();
        send(&socket, &bytes, &probes.fds());
        send(&socket, &hex("03000000 01000000 00000000"), &[]);
        match endpoint.receive() {
            Err(Error::Header { request, flags, size, fault }) => {
                assert_eq!(([request, flags, size], fault), (fields, expected));
            }
            other => panic!("{fields:?}: {other:?}"),
        }
        // What follows cannot be trusted to be a message.
        assert!(matches!(endpoint.receive(), Err(Error::Poisoned)));
        probes.assert_closed("header");
    }
}

#[test]
fn flags_without_a_meaning_are_ignored() {
    let (mut endpoint, socket) = backend();
    send(&socket, &message(3, 0xffff_fff1, &[]), &[]);
    let got = received(&mut endpoint, "flags");
    assert!(matches!(got.request, FrontendRequest::SetOwner));
}

#[test]
fn the_longest_payload_is_taken() {
    let (mut endpoint, socket) = backend();
    let data = vec![7; vhost_user::MAX_CONFIG_SIZE];
    let mut body = [0_u32, data.len() as u32, 0].map(u32::to_le_bytes).concat();
    body.extend(&data);
    assert_eq!(body.len(), MAX_BODY);
    send(&socket, &message(25, 1, &body), &[]);
    let got = received(&mut endpoint, "SET_CONFIG");
    assert!(matches!(got.request, FrontendRequest::SetConfig { data: got, .. } if got == data));
}

/// Sizes that a payload claims for itself, and values that are not defined.
#[test]
fn claims_and_values_out_of_range_are_refused() {
    let u64s = |value: u64| value.to_le_bytes().to_vec();
    let u32s = |values: &[u32]| values.iter().flat_map(|value| value.to_le_bytes()).collect::<Vec<u8>>();
    let value = |field, value| Reason::Value { field, value };
    let vring = "vring index and flags";
    let cases = [
        // A table of more regions than a message has, of fewer and of more than it says.
        (5, u32s(&[9, 0]), value("num regions", 9)),
        (5, u32s(&[u32::MAX, 0]), value("num regions", u32::MAX.into())),
        (5, u32s(&[1, 0]), Reason::BodySize { expected: 40, got: 8 }),
        (5, [u32s(&[0, 0]), vec![0; 32]].concat(), Reason::BodySize { expected: 8, got: 40 }),
        (5, vec![0; 7], Reason::BodySize { expected: 8, got: 7 }),
        // Bits of a ring's index that have no meaning.
        (12, u64s(0x200), value(vring, 0x200)),
        (13, u64s(u64::MAX), value(vring, u64::MAX)),
        (14, u64s(1 << 32), value(vring, 1 << 32)),
        // Neither on nor off.
        (18, u32s(&[0, 2]), value("num", 2)),
        // More bytes than there are, up to the end of the address space.
        (24, u32s(&[0, 1, 0]), Reason::BodySize { expected: 13, got: 12 }),
        (24, u32s(&[0, 4096, 0]), Reason::BodySize { expected: 4108, got: 12 }),
        (24, u32s(&[0, u32::MAX, 0]), Reason::BodySize { expected: 0x1_0000_000b, got: 12 }),
        (25, u32s(&[0, u32::MAX, 0, 0]), Reason::BodySize { expected: 0x1_0000_000b, got: 16 }),
        (25, vec![0; 11], Reason::BodySize { expected: 12, got: 11 }),
        // The device status has eight bits.
        (39, u64s(0x100), value("status", 0x100)),
    ];
    for (code, body, expected) in cases {
        let (mut endpoint, socket) = backend();
        send(&socket, &message(code, 9, &body), &[]);
        assert_eq!(refused(&mut endpoint, &socket, &code.to_string()), expected, "{code} {body:x?}");
        // GET_CONFIG tells its failure in its own way, without a payload.
        let reply = if code == 24 { message(24, 5, &[]) } else { acknowledgement(code, 1) };
        assert_eq!(read(&socket, reply.len()), reply);
    }
}

#[test]
fn requests_of_features_that_were_not_negotiated_are_refused() {
    let cases = [
        (17, ProtocolFeatures::MQ),
        (21, ProtocolFeatures::BACKEND_REQ),
        (24, ProtocolFeatures::CONFIG),
        (25, ProtocolFeatures::CONFIG),
        (34, ProtocolFeatures::RESET_DEVICE),
        (36, ProtocolFeatures::CONFIGURE_MEM_SLOTS),
        (37, ProtocolFeatures::CONFIGURE_MEM_SLOTS),
        (38, ProtocolFeatures::CONFIGURE_MEM_SLOTS),
        (39, ProtocolFeatures::STATUS),
        (40, ProtocolFeatures::STATUS),
    ];
    for sample in samples() {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(sample.fds);
        let needed = cases.iter().find(|(code, _)| *code == sample.code.code());
        // Everything but the one feature; or nothing at all, for requests that need none.
        endpoint.set_protocol_features(match needed {
            Some((_, feature)) => features() - *feature,
            None => ProtocolFeatures::empty(),
        });
        send(&socket, &sample.bytes, &probes.fds());
        match needed {
            Some((_, feature)) => {
                let reason = refused(&mut endpoint, &socket, &sample.name());
                assert_eq!(reason, Reason::NotNegotiated(*feature), "{}", sample.name());
                probes.assert_closed(&sample.name());
            }
            // Contract: GET/SET_PROTOCOL_FEATURES usable before SET_FEATURES.
            None => assert!((sample.check)(&received(&mut endpoint, &sample.name()).request)),
        }
    }
}

/// The document ties some requests to what the back-end offers, not to what the front-end sets.
#[test]
fn an_offer_is_enough_where_the_document_says_so() {
    for code in [17, 21, 34] {
        let (mut endpoint, socket) = backend();
        endpoint.set_protocol_features(ProtocolFeatures::empty());
        send(&socket, &hex("0f000000 01000000 00000000"), &[]);
        let got = received(&mut endpoint, "offer");
        endpoint.reply(got.ticket, Answer::U64(features().bits())).unwrap();
        let sample = samples().into_iter().find(|sample| sample.code.code() == code).unwrap();
        let probes = Probes::new(sample.fds);
        send(&socket, &sample.bytes, &probes.fds());
        assert!((sample.check)(&received(&mut endpoint, &sample.name()).request));
    }
}

#[test]
fn no_request_is_handed_out_while_a_reply_is_owed() {
    let (mut endpoint, socket) = backend();
    send(&socket, &hex("0b000000 01000000 08000000 00000000 00000000  03000000 01000000 00000000"), &[]);
    let got = received(&mut endpoint, "GET_VRING_BASE");
    for _ in 0..3 {
        assert!(matches!(endpoint.receive(), Err(Error::ReplyOwed { code: 11 })));
    }
    endpoint.reply(got.ticket, Answer::VringBase(1)).unwrap();
    assert!(matches!(received(&mut endpoint, "SET_OWNER").request, FrontendRequest::SetOwner));
}

#[test]
fn an_answer_of_the_wrong_kind_is_not_sent() {
    let answers = [Answer::Done, Answer::U64(1), Answer::VringBase(1), Answer::Config(vec![0; 4])];
    for sample in samples() {
        for answer in &answers {
            if std::mem::discriminant(answer) == std::mem::discriminant(&sample.answer) {
                continue;
            }
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(sample.fds);
            send(&socket, &sample.bytes, &probes.fds());
            let got = received(&mut endpoint, &sample.name());
            let result = endpoint.reply(got.ticket, answer.clone());
            assert!(
                matches!(result, Err(Error::WrongAnswer { .. })),
                "{} {answer:?}: {result:?}",
                sample.name()
            );
            assert_silent(&socket, &sample.name());
        }
    }
    // Contract: GET_CONFIG reply size equals request.
    for length in [0, 3, 5, 4096] {
        let sample = samples().into_iter().find(|sample| sample.code == FrontendCode::GetConfig).unwrap();
        let (mut endpoint, socket) = backend();
        send(&socket, &sample.bytes, &[]);
        let got = received(&mut endpoint, &sample.name());
        let result = endpoint.reply(got.ticket, Answer::Config(vec![0; length]));
        assert!(matches!(result, Err(Error::WrongAnswer { .. })), "{length}: {result:?}");
    }
}

#[test]
fn a_front_end_that_reads_nothing_cannot_make_the_output_grow() {
    let (mut endpoint, socket) = backend();
    let get_features = hex("01000000 01000000 00000000");
    let mut answered = 0;
    let error = loop {
        send(&socket, &get_features, &[]);
        let got = received(&mut endpoint, "GET_FEATURES");
        match endpoint.reply(got.ticket, Answer::U64(answered)) {
            Ok(()) => answered += 1,
            Err(error) => break error,
        }
        assert!(answered < 1_000_000, "without bound");
    };
    assert!(matches!(error, Error::OutputFull), "{error:?}");
    assert!(endpoint.wants_write());
    assert!(matches!(endpoint.receive(), Err(Error::Poisoned)));
    // What was accepted before is all delivered, in order.
    for expected in 0..answered {
        if (expected as usize).is_multiple_of(MAX_OUTPUT / 20) {
            endpoint.flush().unwrap();
        }
        assert_eq!(read(&socket, 20), message(1, 5, &expected.to_le_bytes()));
        endpoint.flush().unwrap();
    }
    assert!(!endpoint.wants_write());
}

#[test]
fn replies_that_the_socket_does_not_take_are_sent_when_it_does() {
    let (mut endpoint, socket) = backend();
    rustix::net::sockopt::set_socket_send_buffer_size(&endpoint, 4608).unwrap();
    let get_features = hex("01000000 01000000 00000000");
    let mut sent = 0_u64;
    while !endpoint.wants_write() {
        send(&socket, &get_features, &[]);
        let got = received(&mut endpoint, "GET_FEATURES");
        endpoint.reply(got.ticket, Answer::U64(sent)).unwrap();
        sent += 1;
    }
    for expected in 0..sent {
        assert_eq!(read(&socket, 20), message(1, 5, &expected.to_le_bytes()));
        endpoint.flush().unwrap();
    }
    assert!(!endpoint.wants_write());
}

#[test]
fn a_reply_to_a_front_end_that_is_gone_is_a_disconnect_and_no_signal() {
    let (mut endpoint, socket) = backend();
    send(&socket, &hex("01000000 01000000 00000000"), &[]);
    let got = received(&mut endpoint, "GET_FEATURES");
    drop(socket);
    assert!(matches!(endpoint.reply(got.ticket, Answer::U64(0)), Err(Error::Disconnected)));
}

/// A front-end that closes over replies that it has not read is a disconnect too, not an error of the socket.
#[test]
fn a_close_over_unread_replies_is_a_disconnect() {
    let (mut endpoint, socket) = backend();
    send(&socket, &hex("01000000 01000000 00000000"), &[]);
    let got = received(&mut endpoint, "GET_FEATURES");
    endpoint.reply(got.ticket, Answer::U64(0)).unwrap();
    drop(socket);
    assert!(matches!(endpoint.receive(), Err(Error::Disconnected)));
}

#[test]
fn received_descriptors_are_closed_on_exec() {
    let (mut endpoint, socket) = backend();
    let probes = Probes::new(1);
    send(&socket, &hex("0c000000 01000000 08000000 0000000000000000"), &probes.fds());
    match received(&mut endpoint, "SET_VRING_KICK").request {
        FrontendRequest::SetVringKick { fd: Some(fd), .. } => {
            assert!(rustix::io::fcntl_getfd(fd.as_fd()).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
        other => panic!("{other:?}"),
    }
}

/// The socket may have been handed to us, and its flags belong to others as well.
#[test]
fn nothing_sleeps_on_a_socket_that_somebody_made_blocking() {
    let (near, _far) = UnixStream::pair().unwrap();
    let same = near.try_clone().unwrap();
    let mut endpoint = BackendEndpoint::new(near).unwrap();
    same.set_nonblocking(false).unwrap();
    assert!(matches!(endpoint.receive(), Ok(None)));
}

/// With credentials switched on, each read brings them along: they are not descriptors.
#[test]
fn credentials_in_the_ancillary_data_change_nothing() {
    for sample in samples() {
        let (mut endpoint, socket) = backend();
        rustix::net::sockopt::set_socket_passcred(&endpoint, true).unwrap();
        let probes = Probes::new(sample.fds);
        send(&socket, &sample.bytes, &probes.fds());
        let got = received(&mut endpoint, &sample.name());
        assert!((sample.check)(&got.request), "{}", sample.name());
    }
}
