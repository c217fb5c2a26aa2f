//! Both endpoints against each other, in two threads, as they are used.

#![cfg(target_endian = "little")]

mod wire;

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use vhost_user::{
    Answer, BackendChannel, BackendEndpoint, BackendListener, BackendRequest, Error, FrontendEndpoint,
    FrontendRequest, ProtocolFeatures, Reason, Sent, flags,
};
use wire::{Probes, assert_silent, features, hex, message, read, samples, send};

/// Serves until the front-end goes, and returns what was asked.
fn serve(
    socket: UnixStream,
    mut answer: impl FnMut(&FrontendRequest) -> Answer + Send + 'static,
) -> thread::JoinHandle<Vec<String>> {
    thread::spawn(move || {
        let mut endpoint = BackendEndpoint::new(socket).unwrap();
        let mut asked = Vec::new();
        loop {
            match endpoint.receive() {
                Ok(Some(received)) => {
                    if let FrontendRequest::SetProtocolFeatures(set) = &received.request {
                        endpoint.set_protocol_features(*set);
                    }
                    asked.push(received.request.code().to_string());
                    endpoint.reply(received.ticket, answer(&received.request)).unwrap();
                }
                Ok(None) => {
                    let flags = rustix::event::PollFlags::IN;
                    rustix::event::poll(&mut [rustix::event::PollFd::new(&endpoint, flags)], None).unwrap();
                }
                Err(Error::Invalid { ticket, reason, .. }) => {
                    asked.push(reason.to_string());
                    endpoint.reply(ticket, Answer::Failed).unwrap();
                }
                Err(Error::Disconnected) => return asked,
                Err(other) => panic!("{other:?}"),
            }
        }
    })
}

fn answer_of(request: &FrontendRequest) -> Answer {
    samples()
        .into_iter()
        .find(|sample| (sample.check)(request))
        .map_or(Answer::Done, |sample| (sample.answer)())
}

#[test]
fn every_request_with_and_without_acknowledgements() {
    for acknowledge in [false, true] {
        let (near, far) = UnixStream::pair().unwrap();
        let server = serve(far, answer_of);
        let mut frontend = FrontendEndpoint::new(near);
        frontend.set_acknowledge(acknowledge);
        frontend.set_protocol_features(features()).unwrap();
        assert_eq!(frontend.protocol_features(), features());
        for sample in samples() {
            let probes = Probes::new(sample.fds);
            let result = (sample.call)(&mut frontend, &probes.fds()).unwrap();
            assert_eq!(result, sample.result, "{}", sample.name());
            if acknowledge && sample.code != vhost_user::FrontendCode::SetProtocolFeatures {
                // The next answer comes only after the last request was dropped.
                frontend.get_features().unwrap();
                probes.assert_closed(&sample.name());
            }
        }
        drop(frontend);
        let asked = server.join().unwrap();
        for sample in samples() {
            assert!(asked.contains(&sample.code.to_string()), "{}", sample.name());
        }
    }
}

#[test]
fn failures_come_back_as_refusals_and_the_connection_goes_on() {
    let (near, far) = UnixStream::pair().unwrap();
    let server = serve(far, |request| match request {
        FrontendRequest::GetFeatures => Answer::U64(1),
        _ => Answer::Failed,
    });
    let mut frontend = FrontendEndpoint::new(near);
    frontend.set_protocol_features(features()).unwrap();
    assert!(matches!(frontend.set_owner(), Err(Error::Refused { code: 3, value: 1 })));
    assert!(matches!(frontend.get_config(0, 8, 0), Err(Error::Refused { code: 24, value: 0 })));
    assert!(matches!(frontend.set_vring_num(0, 7), Err(Error::Refused { code: 8, .. })));
    // A request that the back-end does not know.
    frontend.send(99, flags::NEED_REPLY, &[b"what"], &[]).unwrap();
    let reply = frontend.receive_reply().unwrap();
    assert_eq!((reply.header.request, &reply.body[..]), (99, &1_u64.to_ne_bytes()[..]));
    assert!(reply.header.is_reply() && reply.fds.is_empty());
    assert_eq!(frontend.get_features().unwrap(), 1);
    drop(frontend);
    assert!(server.join().unwrap().contains(&Reason::Unknown.to_string()));
}

#[test]
fn arguments_that_no_message_has_room_for_are_not_sent() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut frontend = FrontendEndpoint::new(near);
    let probes = Probes::new(1);
    let fd = probes.fds()[0];
    let many = [(wire::LOW, fd); 9];
    let results = [
        frontend.set_mem_table(&many),
        frontend.set_vring_kick(256, None),
        frontend.set_vring_call(u32::MAX, Some(fd)),
        frontend.get_config(0, u32::MAX, 0).map(|_| ()),
        frontend.set_config(0, 0, &[0; 4096]),
    ];
    for result in results {
        assert!(matches!(result, Err(Error::Argument(_))), "{result:?}");
    }
    assert_silent(&far, "arguments");
}

#[test]
fn a_back_end_that_does_not_answer_is_a_time_out() {
    let (near, far) = UnixStream::pair().unwrap();
    let mut frontend = FrontendEndpoint::new(near);
    frontend.set_timeout(Duration::from_millis(30));
    let start = Instant::now();
    assert!(matches!(frontend.get_features(), Err(Error::TimedOut)));
    assert!(start.elapsed() >= Duration::from_millis(30));
    // Nor does one byte now and then put it off.
    let (over, is_over) = std::sync::mpsc::channel();
    let slow = thread::spawn(move || {
        send(&far, &hex("01000000 05000000 00080000"), &[]);
        let went_on = (0..1000).all(|_| {
            send(&far, &[0], &[]);
            is_over.recv_timeout(Duration::from_millis(40)).is_err()
        });
        (far, went_on)
    });
    frontend.set_timeout(Duration::from_millis(100));
    assert!(matches!(frontend.receive_reply(), Err(Error::TimedOut)));
    over.send(()).unwrap();
    let (far, went_on) = slow.join().unwrap();
    assert!(!went_on, "it waited as long as bytes came");
    // One that does not read either.
    let filled = (0..100_000).find_map(|_| frontend.send_raw(&[0; 1024], &[]).err());
    assert!(matches!(filled, Some(Error::TimedOut)));
    drop(far);
    assert!(matches!(frontend.send_raw(&[0], &[]), Err(Error::Disconnected)));
}

#[test]
fn replies_that_do_not_belong_to_the_request_are_errors() {
    let bad_reply: [(&str, &str); 5] = [
        ("02000000 05000000 08000000 0000000000000000", "another request's"),
        ("01000000 05000000 04000000 00000000", "wrong length"),
        ("01000000 05000000 00000000", "wrong length"),
        ("01000000 05000000 10000000 0000000000000000 0000000000000000", "wrong length"),
        ("28000000 05000000 08000000 0000000000000000", "another request's"),
    ];
    for (reply, expected) in bad_reply {
        let (near, far) = UnixStream::pair().unwrap();
        let mut frontend = FrontendEndpoint::new(near);
        send(&far, &hex(reply), &[]);
        match frontend.get_features() {
            Err(Error::BadReply { code: 1, what }) => assert_eq!(what, expected),
            other => panic!("{reply}: {other:?}"),
        }
    }
    // A message that is no reply, and one of another version, end the connection.
    for header in ["01000000 01000000 00000000", "01000000 06000000 00000000", "01000000 05000000 01100000"] {
        let (near, far) = UnixStream::pair().unwrap();
        let mut frontend = FrontendEndpoint::new(near);
        send(&far, &hex(header), &[]);
        assert!(matches!(frontend.get_features(), Err(Error::Header { .. })), "{header}");
        assert!(matches!(frontend.get_features(), Err(Error::Poisoned)), "{header}");
    }
    // Descriptors that the reply does not have are closed.
    let (near, far) = UnixStream::pair().unwrap();
    let mut frontend = FrontendEndpoint::new(near);
    let (first, stray) = (Probes::new(1), Probes::new(1));
    send(&far, &hex("01000000 05000000 08000000 0000000000000000"), &first.fds());
    assert!(matches!(frontend.get_features(), Err(Error::BadReply { .. })));
    send(&far, &hex("01000000 05000000"), &[]);
    send(&far, &hex("08000000 0000000000000000"), &stray.fds());
    assert!(matches!(frontend.get_features(), Err(Error::BadReply { .. })));
    first.assert_closed("with the first byte");
    stray.assert_closed("in the middle");
    // Other values of the right shape.
    let (near, far) = UnixStream::pair().unwrap();
    let mut frontend = FrontendEndpoint::new(near);
    send(&far, &hex("0b000000 05000000 08000000 05000000 00000000"), &[]);
    assert!(matches!(frontend.get_vring_base(4), Err(Error::BadReply { .. })));
    send(&far, &hex("28000000 05000000 08000000 0001000000000000"), &[]);
    assert!(matches!(frontend.get_status(), Err(Error::BadReply { .. })));
    send(&far, &hex("18000000 05000000 0e000000 00000000 02000000 00000000 0000"), &[]);
    assert!(matches!(frontend.get_config(1, 2, 0), Err(Error::BadReply { .. })));
    drop(far);
    assert!(matches!(frontend.get_features(), Err(Error::Disconnected)));
}

#[test]
fn connect_finds_a_listening_back_end() {
    let directory = std::env::temp_dir().join(format!("vhost-user-connect-{}", std::process::id()));
    std::fs::create_dir_all(&directory).unwrap();
    let path = directory.join("socket");
    // Of a process that had this number, and was killed.
    let _ = std::fs::remove_file(&path);
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    let mut frontend = FrontendEndpoint::connect(&path).unwrap();
    let server = serve(listener.accept().unwrap().0, answer_of);
    assert_eq!(frontend.get_features().unwrap(), 0x1_4000_0000);
    assert!(frontend.stream().peer_addr().is_ok());
    let _ = frontend.as_fd();
    drop(frontend);
    server.join().unwrap();
    std::fs::remove_dir_all(&directory).unwrap();
    assert!(matches!(FrontendEndpoint::connect(&path), Err(Error::Io(_))));
}

#[test]
fn the_back_ends_channel_reaches_the_listener() {
    let (near, far) = UnixStream::pair().unwrap();
    // The channel is made and used while the request is carried out.
    let (channels, made) = std::sync::mpsc::channel();
    let server = serve(far, move |request| match request {
        FrontendRequest::SetBackendReqFd(fd) => {
            let mut channel = BackendChannel::new(fd.try_clone().unwrap(), features()).unwrap();
            assert_eq!(channel.config_changed().unwrap(), Sent::Now);
            assert!(!channel.wants_write());
            channels.send(channel).unwrap();
            Answer::Done
        }
        request => answer_of(request),
    });
    let mut frontend = FrontendEndpoint::new(near);
    frontend.set_protocol_features(features()).unwrap();
    let (mut listener, other) = BackendListener::pair(features()).unwrap();
    frontend.set_backend_req_fd(other.as_fd()).unwrap();
    drop(other);
    let received = listener.wait(Duration::from_secs(30)).unwrap().unwrap();
    assert!(matches!(received.request, BackendRequest::ConfigChange));
    listener.reply(received.ticket, Answer::Done).unwrap();
    // Nobody but the channel holds the other end.
    drop(made.recv().unwrap());
    drop(frontend);
    server.join().unwrap();
    assert!(matches!(listener.receive(), Err(Error::Disconnected)));
}

#[test]
fn a_front_end_that_does_not_read_its_channel_costs_one_message() {
    let (near, far) = UnixStream::pair().unwrap();
    rustix::net::sockopt::set_socket_send_buffer_size(&near, 4608).unwrap();
    let mut channel = BackendChannel::new(near.into(), features()).unwrap();
    let mut now = 0;
    while channel.config_changed().unwrap() == Sent::Now {
        now += 1;
    }
    assert!(now > 0 && channel.wants_write());
    for _ in 0..1000 {
        assert_eq!(channel.config_changed().unwrap(), Sent::Merged);
    }
    for _ in 0..=now {
        assert_eq!(read(&far, 12), hex("02000000 01000000 00000000"));
        channel.flush().unwrap();
    }
    assert!(!channel.wants_write());
    assert_silent(&far, "merged messages are not sent");
    assert_eq!(channel.config_changed().unwrap(), Sent::Now);
    drop(far);
    assert!(matches!(channel.config_changed(), Err(Error::Disconnected)));
}

#[test]
fn a_channel_needs_the_feature_and_a_socket() {
    let (near, _far) = UnixStream::pair().unwrap();
    let mut channel = BackendChannel::new(near.into(), ProtocolFeatures::BACKEND_REQ).unwrap();
    assert!(matches!(channel.config_changed(), Err(Error::NotNegotiated(ProtocolFeatures::CONFIG))));
    channel.set_protocol_features(features());
    assert_eq!(channel.config_changed().unwrap(), Sent::Now);
    let _ = channel.as_fd();
    let (reader, _writer) = std::io::pipe().unwrap();
    let datagram: OwnedFd = std::os::unix::net::UnixDatagram::pair().unwrap().0.into();
    for fd in [OwnedFd::from(reader), datagram] {
        assert!(matches!(BackendChannel::new(fd, features()), Err(Error::Io(_))));
    }
}

#[test]
fn the_listener_refuses_what_is_no_request_of_a_back_end() {
    let cases: [(u32, usize, usize, Reason); 5] = [
        (1, 32, 0, Reason::Value { field: "type", value: 0 }),
        (10, 41, 0, Reason::BodySize { expected: 40, got: 41 }),
        (11, 0, 0, Reason::Unknown),
        (2, 1, 0, Reason::BodySize { expected: 0, got: 1 }),
        (2, 0, 1, Reason::FdCount { expected: 0, got: 1 }),
    ];
    for (code, size, fds, expected) in cases {
        let (mut listener, far) = BackendListener::pair(features()).unwrap();
        let far = UnixStream::from(far);
        let probes = Probes::new(fds);
        send(&far, &message(code, 9, &vec![0; size]), &probes.fds());
        match listener.receive() {
            Err(Error::Invalid { code: got, reason, ticket }) => {
                assert_eq!((got, reason), (code, expected));
                listener.reply(ticket, Answer::Failed).unwrap();
            }
            other => panic!("{code}: {other:?}"),
        }
        assert_eq!(read(&far, 20), wire::acknowledgement(code, 1));
        probes.assert_closed("listener");
    }
    let (mut listener, far) = BackendListener::pair(features()).unwrap();
    let far = UnixStream::from(far);
    let stray = Probes::new(1);
    send(&far, &hex("02000000 01"), &[]);
    send(&far, &hex("000000 00000000"), &stray.fds());
    assert!(matches!(listener.receive(), Err(Error::Invalid { reason: Reason::StrayFds, .. })));
    stray.assert_closed("listener");
    let (mut listener, far) = BackendListener::pair(ProtocolFeatures::empty()).unwrap();
    let far = UnixStream::from(far);
    send(&far, &message(2, 1, &[]), &[]);
    assert!(matches!(listener.receive(), Err(Error::Invalid { reason: Reason::NotNegotiated(_), .. })));
    drop(far);
    assert!(matches!(listener.wait(Duration::from_secs(1)), Err(Error::Disconnected)));
}
