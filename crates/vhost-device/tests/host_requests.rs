//! Messages that are a device's own: they reach a device that knows them, and are not there for any other.
mod support;

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use support::echo::ask;
use support::*;
use vhost_user::{BackendRequest, Error, FrontendEndpoint, ProtocolFeatures};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::HostRequests;

const NEEDS: [(HostRequests, ProtocolFeatures); 4] = [
    (HostRequests::ANNOUNCE, ProtocolFeatures::RARP),
    (HostRequests::NET_MTU, ProtocolFeatures::MTU),
    (HostRequests::CRYPTO_SESSIONS, ProtocolFeatures::CRYPTO_SESSION),
    (HostRequests::SHARED_OBJECTS, ProtocolFeatures::SHARED_OBJECT),
];

type Heard = Arc<Mutex<Vec<String>>>;

fn daemon(requests: HostRequests) -> (TestDaemon, Heard) {
    let heard = Heard::default();
    let device = heard.clone();
    (TestDaemon::with(1, move || Echo::new(8).host_requests(requests, device.clone())), heard)
}

/// A connection with everything that is offered.
fn connected(daemon: &TestDaemon) -> FrontendEndpoint {
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    endpoint.set_timeout(SOON);
    let offered = endpoint.get_protocol_features().unwrap();
    endpoint.set_protocol_features(offered).unwrap();
    endpoint
}

#[track_caller]
fn refused<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}

#[test]
fn a_device_hears_what_it_knows_and_its_answer_is_the_front_ends() {
    let (daemon, heard) = daemon(HostRequests::all());
    let mut endpoint = connected(&daemon);
    endpoint.send_rarp([0x52, 0x54, 0, 0x12, 0x34, 0x56]).unwrap();
    endpoint.net_set_mtu(9000).unwrap();
    refused(endpoint.net_set_mtu(67));
    let (mut display, socket) = UnixStream::pair().unwrap();
    endpoint.gpu_set_socket(socket.as_fd()).unwrap();
    drop(socket);
    let mut said = String::new();
    display.read_to_string(&mut said).unwrap();
    assert_eq!(said, "display", "and the device closed it");
    assert_eq!(endpoint.create_crypto_session(&[1; 40]).unwrap(), 7);
    refused(endpoint.create_crypto_session(&[0; 40]));
    endpoint.close_crypto_session(7).unwrap();
    let mut object = String::new();
    let file = endpoint.get_shared_object([1; 16]).unwrap();
    std::fs::File::from(file).read_to_string(&mut object).unwrap();
    assert_eq!(object, "object");
    refused(endpoint.get_shared_object([2; 16]));
    let expected = ["announce [52, 54, 0, 12, 34, 56]", "mtu 9000", "gpu", "session of 40 bytes", "close 7"];
    assert_eq!(*heard.lock().unwrap(), expected);
    // Nothing of it ends the conversation.
    assert!(endpoint.get_features().is_ok());
}

/// What a back-end offers is what its device knows.
#[test]
fn what_a_device_does_not_know_is_neither_offered_nor_passed_on() {
    for missing in HostRequests::all().iter().chain([HostRequests::all()]) {
        let (daemon, heard) = daemon(HostRequests::all() - missing);
        let mut endpoint = connected(&daemon);
        for (request, feature) in NEEDS {
            let offered = endpoint.protocol_features().contains(feature);
            assert_eq!(offered, !missing.contains(request), "{request:?}");
        }
        let (_, socket) = UnixStream::pair().unwrap();
        let results = [
            (HostRequests::ANNOUNCE, endpoint.send_rarp([0; 6])),
            (HostRequests::NET_MTU, endpoint.net_set_mtu(1500)),
            (HostRequests::GPU_SOCKET, endpoint.gpu_set_socket(socket.as_fd())),
            (HostRequests::CRYPTO_SESSIONS, endpoint.create_crypto_session(&[1; 16]).map(|_| ())),
            (HostRequests::CRYPTO_SESSIONS, endpoint.close_crypto_session(1)),
            (HostRequests::SHARED_OBJECTS, endpoint.get_shared_object([1; 16]).map(|_| ())),
        ];
        for (request, result) in results {
            match missing.contains(request) {
                true => refused(result),
                // The other end of the socket is gone.
                false if request == HostRequests::GPU_SOCKET => refused(result),
                false => result.unwrap(),
            }
        }
        let silent = heard.lock().unwrap().is_empty();
        assert_eq!(silent, missing == HostRequests::all());
    }
}

fn next(driver: &mut VhostUserDriver, timeout: Duration) -> Option<BackendRequest> {
    Some(driver.backend_requests().unwrap().wait(timeout).unwrap()?.request)
}

#[test]
fn exported_objects_are_told_to_every_front_end_until_they_are_withdrawn() {
    let (daemon, _) = daemon(HostRequests::SHARED_OBJECTS);
    let options = || {
        let all = options(RingLayout::Split);
        VhostUserOptions { protocol: all.protocol | ProtocolFeatures::SHARED_OBJECT, ..all }
    };
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
    for n in [1, 2] {
        support::ask(&mut driver, 0, &[ask::EXPORT, n]);
        let told = next(&mut driver, SOON);
        assert!(matches!(told, Some(BackendRequest::SharedObjectAdd(id)) if id == [n; 16]), "{told:?}");
    }
    // Once more is no news.
    support::ask(&mut driver, 0, &[ask::EXPORT, 1]);
    support::ask(&mut driver, 0, &[ask::WITHDRAW, 1]);
    let told = next(&mut driver, SOON);
    assert!(matches!(told, Some(BackendRequest::SharedObjectRemove(id)) if id == [1; 16]), "{told:?}");
    drop(driver);
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
    let told = next(&mut driver, SOON);
    assert!(matches!(told, Some(BackendRequest::SharedObjectAdd(id)) if id == [2; 16]), "{told:?}");
    assert!(next(&mut driver, NEVER).is_none());
    drop(driver);
    // One that did not ask for it is told nothing.
    let mut driver = daemon.driver(0, RingLayout::Split);
    support::ask(&mut driver, 0, &[ask::EXPORT, 3]);
    assert!(next(&mut driver, NEVER).is_none());
}

/// More than fits into a socket at once, to a front-end that listens late.
#[test]
fn many_exported_objects_are_all_told() {
    let (daemon, _) = daemon(HostRequests::SHARED_OBJECTS);
    let all = options(RingLayout::Split);
    let options = VhostUserOptions { protocol: all.protocol | ProtocolFeatures::SHARED_OBJECT, ..all };
    let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
    for n in 0..=255 {
        support::ask(&mut driver, 0, &[ask::EXPORT, n]);
    }
    let mut told = Vec::new();
    while let Some(BackendRequest::SharedObjectAdd(id)) =
        next(&mut driver, if told.len() < 256 { SOON } else { NEVER })
    {
        told.push(id[0]);
    }
    assert_eq!(told, (0..=255).collect::<Vec<u8>>());
}
