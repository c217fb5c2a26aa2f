//! Each message in both directions, byte for byte as the document describes it.

#![cfg(target_endian = "little")]

mod wire;

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost_user::{
    Answer, BackendChannel, BackendEndpoint, BackendListener, BackendRequest, FrontendCode, FrontendEndpoint,
    ProtocolFeatures, Sent,
};
use wire::{
    Probes, acknowledgement, assert_silent, backend, features, hex, read, read_with_fds, received, samples,
    send, with_need_reply,
};

#[test]
fn the_samples_cover_every_request() {
    for code in FrontendCode::ALL {
        assert!(samples().iter().any(|sample| sample.code == *code), "{code}");
    }
}

#[test]
fn back_end_understands_the_documents_bytes() {
    for sample in samples() {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(sample.fds);
        send(&socket, &sample.bytes, &probes.fds());
        let got = received(&mut endpoint, &sample.name());
        assert!((sample.check)(&got.request), "{}: {:?}", sample.name(), got.request);
        assert_eq!(got.request.code(), sample.code);
        assert_eq!(got.ticket.code(), sample.code.code());
        assert!(matches!(endpoint.receive(), Ok(None) | Err(vhost_user::Error::ReplyOwed { .. })));
        drop(got.request);
        probes.assert_closed(&sample.name());
    }
}

#[test]
fn back_end_answers_with_the_documents_bytes() {
    for sample in samples() {
        let (mut endpoint, socket) = backend();
        let probes = Probes::new(sample.fds);
        send(&socket, &sample.bytes, &probes.fds());
        let got = received(&mut endpoint, &sample.name());
        endpoint.reply(got.ticket, (sample.answer)()).unwrap();
        if let Some(reply) = &sample.reply {
            let (bytes, fds) = read_with_fds(&socket, reply.len());
            assert_eq!((&bytes, fds.len()), (reply, sample.reply_fds), "{}", sample.name());
        }
        assert_silent(&socket, &sample.name());
    }
}

/// Contract: with need_reply and REPLY_ACK exactly one reply, of a u64 unless the message has its own.
#[test]
fn reply_ack_every_message_with_need_reply_gets_exactly_one_reply() {
    for sample in samples() {
        for fails in [false, true] {
            let (mut endpoint, socket) = backend();
            let probes = Probes::new(sample.fds);
            send(&socket, &with_need_reply(&sample.bytes), &probes.fds());
            let got = received(&mut endpoint, &sample.name());
            assert!(endpoint.reply_owed());
            let code = sample.code.code();
            let answer = if fails { Answer::Failed } else { (sample.answer)() };
            let expected = match (&sample.reply, fails) {
                (None, fails) => Some((acknowledgement(code, fails.into()), 0)),
                (Some(reply), false) => Some((reply.clone(), sample.reply_fds)),
                (Some(_), true) => sample.failure.clone().map(|failure| (failure, 0)),
            };
            match (endpoint.reply(got.ticket, answer), expected) {
                (Ok(()), Some((reply, count))) => {
                    let (bytes, fds) = read_with_fds(&socket, reply.len());
                    assert_eq!((bytes, fds.len()), (reply, count), "{}", sample.name());
                }
                (Err(vhost_user::Error::CannotFail { code: cannot }), None) => assert_eq!(cannot, code),
                (other, _) => panic!("{}: {other:?}", sample.name()),
            }
            assert_silent(&socket, &sample.name());
        }
    }
}

#[test]
fn without_reply_ack_need_reply_brings_no_acknowledgement() {
    for sample in samples().into_iter().filter(|sample| sample.reply.is_none()) {
        let (mut endpoint, socket) = backend();
        endpoint.set_protocol_features(features() - ProtocolFeatures::REPLY_ACK);
        let probes = Probes::new(sample.fds);
        send(&socket, &with_need_reply(&sample.bytes), &probes.fds());
        let got = received(&mut endpoint, &sample.name());
        endpoint.reply(got.ticket, Answer::Failed).unwrap();
        assert_silent(&socket, &sample.name());
    }
}

/// A front-end may ask for an acknowledgement of the very message that negotiates acknowledgements.
#[test]
fn set_protocol_features_is_acknowledged_by_what_it_negotiates() {
    for (bits, acknowledged) in [("ffff7d0000000000", true), ("0000000000000000", false)] {
        let (near, socket) = UnixStream::pair().unwrap();
        let mut endpoint = BackendEndpoint::new(near).unwrap();
        send(&socket, &hex(&format!("10000000 09000000 08000000 {bits}")), &[]);
        let got = received(&mut endpoint, bits);
        let vhost_user::FrontendRequest::SetProtocolFeatures(set) = got.request else { panic!() };
        endpoint.set_protocol_features(set);
        endpoint.reply(got.ticket, Answer::Done).unwrap();
        if acknowledged {
            assert_eq!(read(&socket, 20), acknowledgement(16, 0));
        }
        assert_silent(&socket, bits);
        assert!(matches!(endpoint.receive(), Ok(None)));
    }
}

#[test]
fn front_end_sends_the_documents_bytes_and_understands_the_reply() {
    for sample in samples() {
        let (near, far) = UnixStream::pair().unwrap();
        let mut frontend = FrontendEndpoint::new(near);
        frontend.set_timeout(Duration::from_secs(30));
        // The reply lies there before the question: one thread is enough.
        let reply_fds = Probes::new(sample.reply_fds);
        if let Some(reply) = &sample.reply {
            send(&far, reply, &reply_fds.fds());
        }
        let probes = Probes::new(sample.fds);
        let result = (sample.call)(&mut frontend, &probes.fds()).unwrap();
        assert_eq!(result, sample.result, "{}", sample.name());
        assert_eq!(read(&far, sample.bytes.len()), sample.bytes, "{}", sample.name());
        assert_silent(&far, &sample.name());
    }
}

#[test]
fn front_end_asks_for_acknowledgements_once_they_are_negotiated() {
    for sample in samples().into_iter().filter(|sample| sample.code != FrontendCode::SetProtocolFeatures) {
        let code = sample.code.code();
        for value in [0, 0x1234] {
            let (near, far) = UnixStream::pair().unwrap();
            let mut frontend = FrontendEndpoint::new(near);
            frontend.set_protocol_features(features()).unwrap();
            read(&far, 20);
            let probes = Probes::new(sample.fds);
            match &sample.reply {
                Some(reply) => send(&far, reply, &Probes::new(sample.reply_fds).fds()),
                None => send(&far, &acknowledgement(code, value), &[]),
            }
            let result = (sample.call)(&mut frontend, &probes.fds());
            let bytes = read(&far, sample.bytes.len());
            if sample.reply.is_some() {
                use FrontendCode::{CheckDeviceState, IotlbMsg, PostcopyEnd};
                // Whose own reply is no more than an acknowledgement.
                let asks = matches!(sample.code, IotlbMsg | PostcopyEnd | CheckDeviceState);
                let expected = if asks { with_need_reply(&sample.bytes) } else { sample.bytes.clone() };
                assert_eq!((result.unwrap().as_str(), bytes), (sample.result, expected), "{}", sample.name());
                continue;
            }
            assert_eq!(bytes, with_need_reply(&sample.bytes), "{}", sample.name());
            match result {
                Ok(_) => assert_eq!(value, 0),
                Err(vhost_user::Error::Refused { code: refused, value: 0x1234 }) => assert_eq!(refused, code),
                other => panic!("{}: {other:?}", sample.name()),
            }
        }
    }
}

#[test]
fn config_change_message() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut channel = BackendChannel::new(near.into(), features()).unwrap();
    assert_eq!(channel.config_changed().unwrap(), Sent::Now);
    assert_eq!(read(&far, 12), hex("02000000 01000000 00000000"));

    let (mut listener, far) = BackendListener::pair(features()).unwrap();
    let far = UnixStream::from(far);
    send(&far, &hex("02000000 09000000 00000000"), &[]);
    let got = listener.receive().unwrap().unwrap();
    assert!(matches!(got.request, BackendRequest::ConfigChange));
    listener.reply(got.ticket, Answer::Done).unwrap();
    assert_eq!(read(&far, 20), hex("02000000 05000000 08000000 0000000000000000"));
    send(&far, &hex("02000000 01000000 00000000"), &[]);
    let got = listener.wait(Duration::from_secs(30)).unwrap().unwrap();
    listener.reply(got.ticket, Answer::Failed).unwrap();
    assert_silent(&far, "no need_reply");
    assert!(listener.wait(Duration::from_millis(1)).unwrap().is_none());
    let _ = listener.as_fd();
}
