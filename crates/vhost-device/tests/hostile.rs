//! Front-ends that mean no good: whatever they send, the daemon lives and its other guest does not notice.
mod support;

use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use support::*;
use vhost_user::{FrontendEndpoint, ProtocolFeatures, VringAddr, flags};
use virtio_testkit::{RingLayout, TestRam, VhostUserDriver};
use vm_virtio::GuestAddress;

/// xorshift64*: reproducible, and good enough to be nasty.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 32) % limit
    }

    /// Mostly values that mean something somewhere.
    fn word(&mut self) -> u64 {
        match self.below(8) {
            0 => 0,
            1 => 1,
            2 => u64::MAX,
            3 => self.below(300),
            4 => 1 << self.below(64),
            5 => self.below(1 << 20) & !0xfff,
            _ => self.next(),
        }
    }
}

fn check_other(other: &mut VhostUserDriver, what: &str) {
    assert_eq!(ask(other, 0, b"unharmed"), b"unharmed", "{what}");
}

/// Messages of every code with payloads and descriptors that fit, nearly fit, or do not fit at all.
#[test]
fn random_messages() {
    let daemon = TestDaemon::with(2, || Echo::new(8).queues(2, 1));
    let mut other = daemon.driver(1, RingLayout::Split);
    let ram = TestRam::new(&[(0, 1 << 20)]);
    let (pipe, _other_end) = std::io::pipe().unwrap();
    let mut carried_out = 0;
    for seed in 1..=100 {
        let mut random = Random(seed * 0x9e37_79b9);
        let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        endpoint.set_timeout(SOON);
        let Ok(protocol) = endpoint.get_protocol_features() else { continue };
        // Mostly with acknowledgements: a refusal that nobody hears often ends the connection.
        let taken = if random.below(8) == 0 { random.next() } else { u64::MAX };
        endpoint.set_protocol_features(protocol & ProtocolFeatures::from_bits_retain(taken)).unwrap();
        for _ in 0..200 {
            // Mostly messages whose refusal can be told, so that the conversation goes on.
            let code = match random.below(60) {
                0 => random.next() as u32,
                1 => random.below(46) as u32,
                _ => {
                    [2, 3, 4, 5, 8, 9, 10, 12, 13, 14, 18, 21, 25, 34, 37, 38, 39][random.below(17) as usize]
                }
            };
            let words = match random.below(6) {
                0 => 0,
                1 | 2 => 1,
                3 => 5,
                _ => random.below(16),
            };
            let mut body: Vec<u8> = (0..words).flat_map(|_| random.word().to_ne_bytes()).collect();
            // Rings that exist, more often than not.
            if body.len() >= 8 && random.below(3) > 0 {
                body[..4].copy_from_slice(&(random.below(3) as u32).to_ne_bytes());
            }
            if random.below(10) == 0 {
                body.truncate(random.below(1 + body.len() as u64) as usize);
            }
            let files: [BorrowedFd<'_>; 2] = [ram.fd(), pipe.as_fd()];
            let fds: Vec<_> = (0..random.below(3)).map(|_| files[random.below(2) as usize]).collect();
            let extra = if random.below(50) > 0 { flags::NEED_REPLY } else { 0 };
            if endpoint.send(code, extra, &[&body], &fds).is_err() {
                break;
            }
            if extra != 0 && taken == u64::MAX {
                if endpoint.receive_reply().is_err() {
                    break;
                }
                carried_out += 1;
            }
        }
        drop(endpoint);
        check_other(&mut other, &format!("seed {seed}"));
    }
    assert!(carried_out > 1000, "only {carried_out} messages got through");
    eventually("service", || VhostUserDriver::connect(daemon.socket(0), options(RingLayout::Split)).is_ok());
}

#[test]
fn random_bytes() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut other = daemon.driver(1, RingLayout::Packed);
    for seed in 1..=200 {
        let mut random = Random(seed);
        let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        let bytes: Vec<u8> = (0..random.below(4096)).map(|_| random.next() as u8).collect();
        let _ = endpoint.send_raw(&bytes, &[]);
    }
    check_other(&mut other, "after 200 connections of noise");
    eventually("service", || VhostUserDriver::connect(daemon.socket(0), options(RingLayout::Split)).is_ok());
}

/// A running device under a front-end that changes everything under it all the time.
#[test]
fn changes_under_load_lose_no_request() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        let mut random = Random(7);
        let ram = driver.ram().clone();
        let regions: Vec<_> = ram
            .regions()
            .iter()
            .map(|r| vhost_user::MemoryRegion {
                guest_addr: r.guest_addr,
                size: r.size,
                user_addr: r.user_addr,
                mmap_offset: r.mmap_offset,
            })
            .collect();
        for i in 0..300u32 {
            let request = [b"x".as_slice(), &i.to_ne_bytes()].concat();
            let chain = [ram.readable(&request), ram.writable(64)];
            driver.ring(0).add(&chain);
            driver.kick(0);
            let region = regions[random.below(regions.len() as u64) as usize];
            match random.below(6) {
                0 => {
                    driver.endpoint().rem_mem_reg(region).unwrap();
                    driver.endpoint().add_mem_reg(region, ram.fd()).unwrap();
                }
                1 => {
                    let table: Vec<_> = regions.iter().map(|region| (*region, ram.fd())).collect();
                    driver.endpoint().set_mem_table(&table).unwrap();
                }
                2 => {
                    driver.endpoint().set_vring_enable(0, false).unwrap();
                    driver.endpoint().set_vring_enable(0, true).unwrap();
                }
                3 => {
                    driver.endpoint().get_vring_base(0).unwrap();
                    driver.start_ring(0).unwrap();
                }
                4 => {
                    let config = driver.ring(0).queue_config();
                    let addr = VringAddr {
                        index: 0,
                        flags: (random.below(2)) as u32,
                        desc: ram.user_addr(config.desc),
                        used: ram.user_addr(config.device),
                        avail: ram.user_addr(config.driver),
                        log: 0,
                    };
                    driver.endpoint().set_vring_addr(&addr).unwrap();
                }
                _ => driver.reconnect(daemon.socket(0)).unwrap(),
            }
            let used = driver.wait_used(0, SOON).expect("an answer");
            let mut answer = ram.written(&chain);
            answer.truncate(used.len as usize);
            assert_eq!(answer, request, "{layout:?} {i}");
        }
        driver.ring(0).check_untouched().unwrap();
        driver.reset().unwrap();
    }
}

/// Somebody who connects and goes in a loop, to a guest that has a front-end and to one that has none.
#[test]
fn a_flood_of_connections_disturbs_nobody() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut busy = daemon.driver(0, RingLayout::Split);
    let flood: Vec<_> = [0, 1]
        .into_iter()
        .map(|guest| {
            let path = daemon.socket(guest);
            std::thread::spawn(move || {
                for _ in 0..3000 {
                    drop(UnixStream::connect(&path).unwrap());
                }
            })
        })
        .collect();
    while !flood.iter().all(std::thread::JoinHandle::is_finished) {
        check_other(&mut busy, "during the flood");
        assert!(busy.status().is_ok());
    }
    flood.into_iter().for_each(|thread| thread.join().unwrap());
    eventually("service", || VhostUserDriver::connect(daemon.socket(1), options(RingLayout::Split)).is_ok());
}

/// Rings full of noise: faults, never harm.
#[test]
fn random_rings() {
    let daemon = TestDaemon::with(2, || Echo::new(8));
    let mut other = daemon.driver(1, RingLayout::Split);
    for seed in 1..=40 {
        let mut random = Random(seed * 77);
        let layout = RingLayout::ALL[seed as usize % 2];
        let mut driver = daemon.driver(0, layout);
        let config = driver.ring(0).queue_config();
        let ram = driver.ram().clone();
        for area in [config.desc, config.driver, config.device] {
            for word in 0..8 {
                let addr = GuestAddress(area.0 + 8 * word);
                ram.write(addr, &random.word().to_le_bytes());
            }
        }
        driver.kick_anyway(0);
        std::thread::sleep(Duration::from_millis(2));
        check_other(&mut other, &format!("seed {seed}"));
        let _ = driver.endpoint().get_vring_base(0);
        driver.reset().unwrap();
    }
    assert_eq!(ask(&mut daemon.driver(0, RingLayout::Split), 0, b"well"), b"well");
}
