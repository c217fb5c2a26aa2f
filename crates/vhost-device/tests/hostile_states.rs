//! Every message in every state of a connection: whole, of wrong sizes, with wrong descriptors, and cut at every byte.
//! The guest beside it does not notice, and the next front-end gets a device that works.
mod support;

use std::os::fd::BorrowedFd;

use support::*;
use vhost_user::{
    F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendCode, FrontendEndpoint, LogArea, MemoryRegion, ProtocolFeatures,
    flags,
};
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver, VhostUserOptions};
use vm_virtio::HostRequests;

/// How far a connection has got.
#[derive(Clone, Copy, Debug)]
enum State {
    Connected,
    Owned,
    Negotiated,
    Running,
    InBand,
    /// Behind an IOMMU.
    Translated,
    /// Logging, to a log that is too short.
    Logging,
    /// A ring is started and its memory is gone.
    Waiting,
    /// A ring is broken, the device needs a reset.
    Broken,
    Stopped,
    Reset,
}

const STATES: [State; 11] = [
    State::Connected,
    State::Owned,
    State::Negotiated,
    State::Running,
    State::InBand,
    State::Translated,
    State::Logging,
    State::Waiting,
    State::Broken,
    State::Stopped,
    State::Reset,
];

/// A front-end that has got so far.
enum FrontEnd {
    Endpoint(FrontendEndpoint),
    Driver(Box<VhostUserDriver>),
}

impl FrontEnd {
    fn new(daemon: &TestDaemon, state: State) -> FrontEnd {
        let driver_with = |in_band, iommu| {
            let all = ProtocolFeatures::all() - ProtocolFeatures::INBAND_NOTIFICATIONS;
            let options = VhostUserOptions { protocol: all, in_band, iommu, ..options(RingLayout::Split) };
            Box::new(VhostUserDriver::connect(daemon.socket(0), options).unwrap())
        };
        let driver = |in_band| driver_with(in_band, false);
        let bare = || FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        match state {
            State::Connected => FrontEnd::Endpoint(bare()),
            State::Owned => {
                let mut endpoint = bare();
                endpoint.set_owner().unwrap();
                FrontEnd::Endpoint(endpoint)
            }
            State::Negotiated => {
                let mut endpoint = bare();
                let protocol = endpoint.get_protocol_features().unwrap();
                endpoint.set_protocol_features(protocol).unwrap();
                let features = endpoint.get_features().unwrap();
                endpoint.set_features(features | F_PROTOCOL_FEATURES).unwrap();
                FrontEnd::Endpoint(endpoint)
            }
            State::Running => FrontEnd::Driver(driver(false)),
            State::InBand => FrontEnd::Driver(driver(true)),
            State::Translated => {
                let mut driver = driver_with(false, true);
                driver.answer_misses().unwrap();
                FrontEnd::Driver(driver)
            }
            State::Logging => {
                let mut driver = driver(false);
                let log = TestRam::new(&[(0, 1 << 12)]);
                driver.endpoint().set_log_base(LogArea { size: 1, offset: 0 }, log.fd()).unwrap();
                let features = driver.features().low64() | F_PROTOCOL_FEATURES | F_LOG_ALL;
                driver.endpoint().set_features(features).unwrap();
                FrontEnd::Driver(driver)
            }
            State::Waiting => {
                let mut driver = driver(false);
                for region in driver.ram().clone().regions() {
                    let region = MemoryRegion {
                        guest_addr: region.guest_addr,
                        size: region.size,
                        user_addr: region.user_addr,
                        mmap_offset: region.mmap_offset,
                    };
                    driver.endpoint().rem_mem_reg(region).unwrap();
                }
                FrontEnd::Driver(driver)
            }
            State::Broken => {
                let mut driver = driver(false);
                driver.ring(0).split().set_avail_idx(0x4000);
                driver.kick_anyway(0);
                eventually("the ring is broken", || driver.ring_failed(0));
                FrontEnd::Driver(driver)
            }
            State::Stopped | State::Reset => {
                let mut driver = driver(false);
                driver.stop().unwrap();
                if matches!(state, State::Reset) {
                    driver.reset().unwrap();
                }
                FrontEnd::Driver(driver)
            }
        }
    }

    fn endpoint(&mut self) -> &mut FrontendEndpoint {
        match self {
            FrontEnd::Endpoint(endpoint) => endpoint,
            FrontEnd::Driver(driver) => driver.endpoint(),
        }
    }

    /// Takes answers until the daemon has closed the connection, or has answered what is asked now, behind all else.
    fn hear(&mut self) {
        let endpoint = self.endpoint();
        endpoint.set_timeout(SOON);
        let _ = endpoint.send(FrontendCode::GetFeatures.code(), 0, &[], &[]);
        loop {
            match endpoint.receive_reply() {
                Ok(reply) if reply.header.request == FrontendCode::GetFeatures.code() => return,
                Ok(_) => {}
                Err(vhost_user::Error::TimedOut) => panic!("neither an answer nor an end"),
                Err(_) => return,
            }
        }
    }
}

/// A payload of the right length, and how many descriptors go with it.
fn right(code: u32) -> (Vec<u8>, usize) {
    let region = [0_u64, 0x10_0000, 0x7000_0000, 0].map(u64::to_ne_bytes).concat();
    match FrontendCode::from_code(code) {
        Some(FrontendCode::SetMemTable) => ([&1_u64.to_ne_bytes()[..], &region].concat(), 1),
        Some(FrontendCode::AddMemReg) => ([&[0; 8], &region[..]].concat(), 1),
        Some(FrontendCode::RemMemReg) => ([&[0; 8], &region[..]].concat(), 0),
        Some(FrontendCode::SetVringAddr) => (vec![0; 40], 0),
        Some(FrontendCode::GetConfig | FrontendCode::SetConfig) => {
            ([0_u32, 4, 0, 0].map(u32::to_ne_bytes).concat(), 0)
        }
        Some(FrontendCode::SetLogBase) => (vec![0; 16], 1),
        Some(FrontendCode::IotlbMsg) => (vec![0; 32], 0),
        Some(FrontendCode::CreateCryptoSession) => (vec![1; 32], 0),
        Some(FrontendCode::GetInflightFd) => (vec![1; 24], 0),
        Some(FrontendCode::SetInflightFd) => (vec![1; 24], 1),
        Some(FrontendCode::GetSharedObject) => (vec![1; 16], 0),
        Some(
            FrontendCode::SetVringKick
            | FrontendCode::SetVringCall
            | FrontendCode::SetVringErr
            | FrontendCode::SetDeviceStateFd,
        ) => (vec![0; 8], 1),
        Some(FrontendCode::SetBackendReqFd | FrontendCode::SetLogFd | FrontendCode::GpuSetSocket) => {
            (Vec::new(), 1)
        }
        Some(
            FrontendCode::GetFeatures
            | FrontendCode::SetOwner
            | FrontendCode::ResetOwner
            | FrontendCode::GetProtocolFeatures
            | FrontendCode::GetQueueNum
            | FrontendCode::PostcopyAdvise
            | FrontendCode::PostcopyListen
            | FrontendCode::PostcopyEnd
            | FrontendCode::ResetDevice
            | FrontendCode::GetMaxMemSlots
            | FrontendCode::GetStatus
            | FrontendCode::CheckDeviceState
            | FrontendCode::GetShmemConfig,
        ) => (Vec::new(), 0),
        _ => (vec![0; 8], 0),
    }
}

fn daemon() -> TestDaemon {
    TestDaemon::with(2, || Echo::new(8).queues(2, 1).host_requests(HostRequests::all(), Default::default()))
}

/// A device that works, for a front-end that comes after all this.
fn check_next(daemon: &TestDaemon, what: &str) {
    let mut driver = daemon.driver(0, RingLayout::Split);
    assert_eq!(ask(&mut driver, 0, b"next"), b"next", "{what}");
    // So that the next driver does not begin where this one's rings are.
    driver.stop().unwrap();
    driver.reset().unwrap();
}

#[test]
fn every_message_in_every_state_with_wrong_sizes_and_descriptors() {
    let daemon = daemon();
    let mut other = daemon.driver(1, RingLayout::Packed);
    let ram = TestRam::new(&[(0, 1 << 20)]);
    let files: [BorrowedFd<'_>; 9] = [ram.fd(); 9];
    for state in STATES {
        for code in 0..=46 {
            let (body, fds) = right(code);
            let mut bodies = vec![(body.clone(), fds), (body.clone(), fds + 1), (body.clone(), 9)];
            if fds > 0 {
                bodies.push((body.clone(), fds - 1));
            }
            let longer = [&body[..], &[0]].concat();
            let shorter = body.split_last().map(|(_, rest)| rest.to_vec());
            bodies.extend(
                shorter
                    .into_iter()
                    .chain([longer, vec![0xff; body.len()], vec![0xff; 4096]])
                    .map(|b| (b, fds)),
            );
            for need_reply in [0, flags::NEED_REPLY] {
                // One after the other on one connection, as long as it holds.
                let mut front_end = FrontEnd::new(&daemon, state);
                for (body, fds) in &bodies {
                    if front_end.endpoint().send(code, need_reply, &[body], &files[..*fds]).is_err() {
                        front_end = FrontEnd::new(&daemon, state);
                    }
                }
                front_end.hear();
            }
            assert_eq!(ask(&mut other, 0, b"unharmed"), b"unharmed", "{state:?} {code}");
        }
        check_next(&daemon, &format!("{state:?}"));
    }
}

#[test]
fn every_message_in_every_state_cut_at_every_byte() {
    let daemon = daemon();
    let mut other = daemon.driver(1, RingLayout::Packed);
    let ram = TestRam::new(&[(0, 1 << 20)]);
    for state in STATES {
        for code in 1..=44_u32 {
            let (body, fds) = right(code);
            let header = [code, 1 | flags::NEED_REPLY, body.len() as u32].map(u32::to_ne_bytes).concat();
            let whole = [header, body].concat();
            // Bare connections cost little. Others are cut within the header, after it, and before the end.
            let cuts: Vec<usize> = match state {
                State::Connected | State::Owned => (1..whole.len()).collect(),
                _ => [1, 7, 12, whole.len() - 1].into_iter().filter(|cut| *cut < whole.len()).collect(),
            };
            for cut in cuts {
                let mut front_end = FrontEnd::new(&daemon, state);
                let files: Vec<_> = (0..fds).map(|_| ram.fd()).collect();
                front_end.endpoint().send_raw(&whole[..cut], &files).unwrap();
            }
            assert_eq!(ask(&mut other, 0, b"unharmed"), b"unharmed", "{state:?} {code}");
        }
        check_next(&daemon, &format!("{state:?}"));
    }
}

/// While one front-end is served, others are turned away and get nothing, whatever they send.
#[test]
fn two_front_ends_at_once() {
    let daemon = daemon();
    let mut driver = daemon.driver(0, RingLayout::Split);
    for _ in 0..3 {
        let mut others: Vec<_> =
            (0..8).map(|_| FrontendEndpoint::connect(daemon.socket(0)).unwrap()).collect();
        for other in &mut others {
            other.set_timeout(SOON);
            // A reset that must not reach the device.
            let _ = other.send(FrontendCode::ResetDevice.code(), 0, &[], &[]);
        }
        assert_eq!(ask(&mut driver, 0, b"mine"), b"mine");
        for mut other in others {
            let gone = other.get_features();
            assert!(matches!(gone, Err(vhost_user::Error::Disconnected)), "{gone:?}");
        }
        assert_eq!(ask(&mut driver, 0, b"still mine"), b"still mine");
    }
}
