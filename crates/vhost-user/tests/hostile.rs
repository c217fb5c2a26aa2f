//! Messages that are cut, too short, too long, out of place, or none at all: a typed error each, every descriptor
//! closed, and the endpoint goes on wherever the next message can be found.

#![cfg(target_endian = "little")]

mod wire;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use vhost_user::{
    Answer, BackendEndpoint, Error, FrontendCode, FrontendRequest, HeaderFault, InflightArea, MAX_BODY,
    MAX_OUTPUT, ProtocolFeatures, Reason,
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
            endpoint.reply(got.ticket, (sample.answer)()).unwrap();
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
        endpoint.reply(got.ticket, (sample.answer)()).unwrap();
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
        // The description of a crypto session has any length from its least one on.
        let any = sample.code == FrontendCode::CreateCryptoSession;
        let (shorter, longer) = if any { (Some(vec![0; 15]), None) } else { (shorter, Some(longer)) };
        for body in shorter.into_iter().chain(longer) {
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
fn unknown_codes_are_refused_and_survived() {
    for code in (0..=50).chain([255, 1000, u32::MAX]).filter(|code| FrontendCode::from_code(*code).is_none())
    {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(1);
        send(&socket, &message(code, 9, b"whatever"), &probes.fds());
        let reason = refused(&mut endpoint, &socket, &code.to_string());
        assert_eq!(reason, Reason::Unknown, "{code}");
        probes.assert_closed(&code.to_string());
        assert_eq!(read(&socket, 20), acknowledgement(code, 1));
    }
}

/// IOTLB_MSG, POSTCOPY_END, SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE have a status as their reply: a refusal is sent
/// whether it was asked for or not. SET_DEVICE_STATE_FD says besides that no descriptor comes with it.
#[test]
fn a_status_reply_is_sent_without_being_asked_for() {
    for (code, value) in [(22, 1), (30, 1), (42, 0x101), (43, 1)] {
        let (mut endpoint, socket) = backend();
        endpoint.set_protocol_features(ProtocolFeatures::empty());
        send(&socket, &message(code, 1, &[]), &[]);
        refused(&mut endpoint, &socket, &code.to_string());
        assert_eq!(read(&socket, 20), acknowledgement(code, value));
        assert_silent(&socket, &code.to_string());
    }
}

/// The same for those whose reply is a file: none.
#[test]
fn a_reply_without_its_file_is_sent_without_being_asked_for() {
    for (code, length) in [(28, 0), (31, 24), (41, 0)] {
        let (mut endpoint, socket) = backend();
        endpoint.set_protocol_features(ProtocolFeatures::empty());
        send(&socket, &message(code, 1, &[]), &[]);
        refused(&mut endpoint, &socket, &code.to_string());
        assert_eq!(read(&socket, 12 + length), message(code, 5, &vec![0; length]));
        assert_silent(&socket, &code.to_string());
    }
}

/// Without LOG_SHMFD the request has no reply of its own, so a refusal is told to whoever asks for an acknowledgement.
#[test]
fn set_log_base_is_answered_in_its_own_way_only_with_log_shmfd() {
    let sample = samples().into_iter().find(|sample| sample.code == FrontendCode::SetLogBase).unwrap();
    for need_reply in [false, true] {
        let (mut endpoint, socket) = backend();
        endpoint.set_protocol_features(ProtocolFeatures::REPLY_ACK);
        let probes = Probes::new(1);
        let bytes = if need_reply { with_need_reply(&sample.bytes) } else { sample.bytes.clone() };
        send(&socket, &bytes, &probes.fds());
        let reason = refused(&mut endpoint, &socket, "SET_LOG_BASE");
        assert_eq!(reason, Reason::NotNegotiated(ProtocolFeatures::LOG_SHMFD));
        probes.assert_closed("SET_LOG_BASE");
        if need_reply {
            assert_eq!(read(&socket, 20), acknowledgement(6, 1));
        }
        assert_silent(&socket, "SET_LOG_BASE");
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
    let iotlb = |permissions, kind| [vec![0; 24], vec![permissions, kind, 0, 0, 0, 0, 0, 0]].concat();
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
        // Bigger than a field of the configuration space.
        (20, u64s(0x1_0000), value("mtu", 0x1_0000)),
        // Neither little nor big.
        (23, u32s(&[0, 2]), value("num", 2)),
        // What only the back-end sends, what nobody does, and permissions that are none.
        (22, iotlb(3, 0), value("type", 0)),
        (22, iotlb(3, 1), value("type", 1)),
        (22, iotlb(3, 4), value("type", 4)),
        (22, iotlb(3, 5), value("type", 5)),
        (22, iotlb(4, 2), value("permissions flags", 4)),
        (22, iotlb(0xff, 2), value("permissions flags", 0xff)),
        // No room for an operation code and a session's id.
        (26, vec![0; 15], Reason::BodySize { expected: 16, got: 15 }),
        (26, vec![], Reason::BodySize { expected: 16, got: 0 }),
        // Between the two lengths of an area.
        (31, vec![0; 22], Reason::BodySize { expected: 24, got: 22 }),
        // The device status has eight bits.
        (39, u64s(0x100), value("status", 0x100)),
    ];
    for (code, body, expected) in cases {
        let (mut endpoint, socket) = backend();
        send(&socket, &message(code, 9, &body), &[]);
        assert_eq!(refused(&mut endpoint, &socket, &code.to_string()), expected, "{code} {body:x?}");
        // Some tell of a failure in their own way.
        let reply = match code {
            24 => message(24, 5, &[]),
            // No session, in as many bytes as there were, but always in those of its id.
            26 => message(26, 5, &[&vec![0; body.len().saturating_sub(8)][..], &[0xff; 8]].concat()),
            31 => message(31, 5, &[0; 24]),
            _ => acknowledgement(code, 1),
        };
        assert_eq!(read(&socket, reply.len()), reply);
    }
}

/// The same in messages that bring descriptors.
#[test]
fn values_out_of_range_are_refused_and_their_descriptors_closed() {
    let transfer = |direction: u32, phase: u32| [direction.to_le_bytes(), phase.to_le_bytes()].concat();
    let cases = [
        (42, transfer(2, 0), Reason::Value { field: "transfer direction", value: 2 }),
        (42, transfer(u32::MAX, 0), Reason::Value { field: "transfer direction", value: u32::MAX.into() }),
        (42, transfer(0, 1), Reason::Value { field: "migration phase", value: 1 }),
        (32, vec![0; 23], Reason::BodySize { expected: 24, got: 23 }),
    ];
    for (code, body, expected) in cases {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(1);
        send(&socket, &message(code, 9, &body), &probes.fds());
        assert_eq!(refused(&mut endpoint, &socket, &code.to_string()), expected, "{code} {body:x?}");
        assert_eq!(read(&socket, 20), acknowledgement(code, if code == 42 { 0x101 } else { 1 }));
        probes.assert_closed(&code.to_string());
    }
}

/// The document adds up to 20 bytes, C compilers to 24, which is what QEMU sends.
#[test]
fn inflight_areas_are_understood_with_and_without_padding() {
    let long = hex("4020000000000000 4000000000000000 0200 0001 ffffffff");
    for length in [20, 24] {
        let (mut endpoint, socket) = backend();
        send(&socket, &message(31, 1, &long[..length]), &[]);
        let got = received(&mut endpoint, "GET_INFLIGHT_FD");
        let FrontendRequest::GetInflightFd(area) = got.request else { panic!() };
        let InflightArea { mmap_size, mmap_offset, num_queues, queue_size } = area;
        assert_eq!((mmap_size, mmap_offset, num_queues, queue_size), (0x2040, 0x40, 2, 256));
        // The reply has the length of the request, and zeros in the padding.
        endpoint.reply(got.ticket, Answer::Inflight(area, wire::file())).unwrap();
        let mut expected = message(31, 5, &long[..length]);
        expected.iter_mut().skip(32).for_each(|byte| *byte = 0);
        let (bytes, fds) = wire::read_with_fds(&socket, 12 + length);
        assert_eq!((bytes, fds.len()), (expected, 1));
        let probes = Probes::new(1);
        send(&socket, &message(32, 1, &long[..length]), &probes.fds());
        let got = received(&mut endpoint, "SET_INFLIGHT_FD");
        assert!(matches!(got.request, FrontendRequest::SetInflightFd(set, _) if set == area));
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
        (6, ProtocolFeatures::LOG_SHMFD),
        (19, ProtocolFeatures::RARP),
        (20, ProtocolFeatures::MTU),
        (23, ProtocolFeatures::CROSS_ENDIAN),
        (26, ProtocolFeatures::CRYPTO_SESSION),
        (27, ProtocolFeatures::CRYPTO_SESSION),
        (28, ProtocolFeatures::PAGEFAULT),
        (29, ProtocolFeatures::PAGEFAULT),
        (30, ProtocolFeatures::PAGEFAULT),
        (31, ProtocolFeatures::INFLIGHT_SHMFD),
        (32, ProtocolFeatures::INFLIGHT_SHMFD),
        (35, ProtocolFeatures::INBAND_NOTIFICATIONS),
        (41, ProtocolFeatures::SHARED_OBJECT),
        (42, ProtocolFeatures::DEVICE_STATE),
        (43, ProtocolFeatures::DEVICE_STATE),
        (44, ProtocolFeatures::SHMEM_MAP),
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
    for code in [17, 19, 20, 21, 28, 29, 30, 34] {
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
    let answers: [fn() -> Answer; 8] = [
        || Answer::Done,
        || Answer::U64(1),
        || Answer::VringBase(1),
        || Answer::Config(vec![0; 4]),
        || Answer::Inflight(InflightArea::default(), wire::file()),
        || Answer::CryptoSession(1),
        || Answer::Fd(wire::file()),
        || Answer::ShmemConfig(Vec::new()),
    ];
    for sample in samples() {
        for answer in answers {
            let answer = answer();
            // With a channel of its own or without.
            let either = sample.code == FrontendCode::SetDeviceStateFd
                && matches!(answer, Answer::Done | Answer::Fd(_));
            if either || std::mem::discriminant(&answer) == std::mem::discriminant(&(sample.answer)()) {
                continue;
            }
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(sample.fds);
            send(&socket, &sample.bytes, &probes.fds());
            let got = received(&mut endpoint, &sample.name());
            let what = format!("{} {answer:?}", sample.name());
            let result = endpoint.reply(got.ticket, answer);
            assert!(matches!(result, Err(Error::WrongAnswer { .. })), "{what}: {result:?}");
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
