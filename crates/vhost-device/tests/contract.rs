//! The checklist of the vhost-user contract, line by line, over a real socket.
mod support;

use std::io::{PipeReader, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use support::*;
use vhost_user::{
    BackendRequest, Error, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendCode, FrontendEndpoint, MemoryRegion,
    ProtocolFeatures, VringAddr, config_flags, flags,
};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};
use vm_virtio::{Features, Status};

fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap()
}

fn readable(fd: &impl AsFd, timeout: Duration) -> bool {
    let limit = Timespec { tv_sec: timeout.as_secs() as i64, tv_nsec: i64::from(timeout.subsec_nanos()) };
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&limit)).unwrap() > 0
}

fn refused<T: std::fmt::Debug>(result: Result<T, Error>) {
    assert!(matches!(result, Err(Error::Refused { .. })), "{result:?}");
}

/// A connection with all protocol features and a driver's features, nothing else.
fn bare(daemon: &TestDaemon) -> FrontendEndpoint {
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    let features = endpoint.get_features().unwrap();
    let protocol = endpoint.get_protocol_features().unwrap();
    endpoint.set_protocol_features(protocol).unwrap();
    endpoint.set_owner().unwrap();
    endpoint.set_features(features & !Features::RING_PACKED.low64()).unwrap();
    endpoint
}

/// A driver that is connected and has started nothing.
fn attached(daemon: &TestDaemon, options: VhostUserOptions) -> VhostUserDriver {
    VhostUserDriver::attach(FrontendEndpoint::connect(daemon.socket(0)).unwrap(), options).unwrap()
}

fn region_of(driver: &VhostUserDriver, at: usize) -> MemoryRegion {
    let region = &driver.ram().regions()[at];
    MemoryRegion {
        guest_addr: region.guest_addr,
        size: region.size,
        user_addr: region.user_addr,
        mmap_offset: region.mmap_offset,
    }
}

#[test]
fn protocol_features_come_before_features_and_are_exactly_those_implemented() {
    for (config, expected) in [(0, 0x1_f02b_u64), (8, 0x1_f22b)] {
        let daemon = TestDaemon::with(1, move || Echo::new(config));
        let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
        let offered = endpoint.get_protocol_features().unwrap();
        // MQ 0, LOG_SHMFD 1, REPLY_ACK 3, BACKEND_REQ 5, CONFIG 9, INFLIGHT_SHMFD 12, RESET_DEVICE 13, INBAND_NOTIFICATIONS 14,
        // CONFIGURE_MEM_SLOTS 15, STATUS 16.
        assert_eq!(offered.bits(), expected, "{offered:?}");
        endpoint.set_protocol_features(offered).unwrap();
        assert_eq!(endpoint.get_queue_num().unwrap(), 1);
        assert!(endpoint.get_max_mem_slots().unwrap() >= 500);
    }
}

#[test]
fn features_are_the_devices_and_the_rings_and_those_of_vhost_user() {
    let daemon = TestDaemon::start();
    let mut endpoint = FrontendEndpoint::connect(daemon.socket(0)).unwrap();
    let expected = (echo::FEATURE | Features::RING | Features::ACCESS_PLATFORM).low64();
    let expected = expected | F_PROTOCOL_FEATURES | F_LOG_ALL;
    assert_eq!(endpoint.get_features().unwrap(), expected);
}

#[test]
fn features_that_were_not_offered_are_refused() {
    let daemon = TestDaemon::start();
    let mut endpoint = bare(&daemon);
    let offered = endpoint.get_features().unwrap();
    for bit in (0..64).filter(|bit| offered & (1 << bit) == 0) {
        refused(endpoint.set_features(offered | 1 << bit));
    }
    // Somebody who does not hear of it must not go on.
    endpoint.set_acknowledge(false);
    endpoint.set_features(offered | 1).unwrap();
    assert!(endpoint.get_features().is_err(), "closed");
}

#[test]
fn protocol_features_that_were_not_offered_are_refused() {
    let daemon = TestDaemon::start();
    let mut endpoint = bare(&daemon);
    let offered = endpoint.get_protocol_features().unwrap();
    for bit in (0..64).map(|bit| ProtocolFeatures::from_bits_retain(1 << bit)) {
        if !offered.contains(bit) {
            let code = FrontendCode::SetProtocolFeatures;
            let bits = (offered | bit).bits().to_ne_bytes();
            endpoint.send(code.code(), flags::NEED_REPLY, &[&bits], &[]).unwrap();
            refused(endpoint.receive_ack(code));
        }
    }
    assert!(endpoint.get_queue_num().is_ok(), "the accepted set still holds");
}

#[test]
fn every_message_is_acknowledged_once_if_asked_and_own_replies_are_not_doubled() {
    let daemon = TestDaemon::start();
    // `attached` and `start` wait for an acknowledgement of each message without a reply of its own.
    let mut driver = attached(&daemon, options(RingLayout::Split));
    driver.start().unwrap();
    let endpoint = driver.endpoint();
    for code in [FrontendCode::GetFeatures, FrontendCode::GetStatus, FrontendCode::GetQueueNum] {
        endpoint.send(code.code(), flags::NEED_REPLY, &[], &[]).unwrap();
        assert_eq!(endpoint.receive_reply().unwrap().header.request, code.code());
    }
    // A second reply to any of them would be taken for the answer to this.
    assert_eq!(endpoint.get_max_mem_slots().unwrap(), 509);
}

#[test]
fn without_bit_30_rings_are_enabled_at_once() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let options = VhostUserOptions { negotiate_protocol: false, queues: Some(1), ..options(layout) };
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
        assert_eq!(ask(&mut driver, 0, b"hello"), b"hello");
    }
}

/// Also of a ring that runs, and had been disabled.
#[test]
fn set_features_without_bit_30_enables_running_rings_at_once() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.endpoint().set_vring_enable(0, false).unwrap();
    submit(&mut driver, 0, b"waiting");
    driver.kick_anyway(0);
    assert_eq!(driver.wait_used(0, NEVER), None, "disabled");
    let features = driver.features().low64();
    driver.endpoint().set_features(features).unwrap();
    assert_eq!(answer(&mut driver, 0), 7);
}

#[test]
fn with_bit_30_a_ring_waits_until_it_is_enabled_and_is_looked_at_then() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.endpoint().set_vring_enable(0, false).unwrap();
    submit(&mut driver, 0, b"waiting");
    driver.kick_anyway(0);
    assert_eq!(driver.wait_used(0, NEVER), None, "disabled");
    driver.endpoint().set_vring_enable(0, true).unwrap();
    assert_eq!(answer(&mut driver, 0), 7, "without another kick");
}

#[test]
fn a_ring_starts_with_its_kick_file_and_is_looked_at_without_a_kick() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = attached(&daemon, options(layout));
        let chain = [driver.ram().readable(b"early"), driver.ram().writable(64)];
        driver.ring(0).add(&chain);
        driver.start().unwrap();
        assert_eq!(answer(&mut driver, 0), 5);
    }
}

#[test]
fn enabled_before_started_counts() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let base = driver.endpoint().get_vring_base(0).unwrap();
    assert_eq!(base, 0);
    driver.endpoint().set_vring_enable(0, false).unwrap();
    driver.endpoint().set_vring_enable(0, true).unwrap();
    driver.start_ring(0).unwrap();
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

#[test]
fn a_ring_without_a_kick_file_is_polled() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.endpoint().set_vring_kick(0, None).unwrap();
    let chain = [driver.ram().readable(b"nobody kicks"), driver.ram().writable(64)];
    driver.ring(0).add(&chain);
    assert_eq!(answer(&mut driver, 0), 12);
}

#[test]
fn call_kick_and_error_files_change_while_a_ring_runs() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    assert_eq!(ask(&mut driver, 0, b"before"), b"before");
    // Looking once more arms the interrupt for the next buffer.
    assert_eq!(driver.ring(0).used(), None);
    let (call, kick) = (event(), event());
    driver.endpoint().set_vring_call(0, Some(call.as_fd())).unwrap();
    assert!(readable(&call, SOON), "once, in case the old file took one unheard");
    let _ = rustix::io::read(&call, &mut [0; 8]);
    // What the old file got for the first request may have come after the answer was seen.
    let _ = driver.interrupts(0);
    driver.endpoint().set_vring_kick(0, Some(kick.as_fd())).unwrap();
    let chain = [driver.ram().readable(b"after"), driver.ram().writable(64)];
    driver.ring(0).add(&chain);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    assert!(readable(&call, SOON), "the new file");
    assert_eq!(driver.ring(0).used().unwrap().len, 5);
    assert!(!readable(&driver.call_fd(0), NEVER), "the old file is not used any more");
    // No call file at all: the driver polls.
    driver.endpoint().set_vring_call(0, None).unwrap();
    let chain = [driver.ram().readable(b"again"), driver.ram().writable(64)];
    driver.ring(0).add(&chain);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    eventually("an answer without an interrupt", || driver.ring(0).used().is_some());
    // The error goes to the file of the moment.
    let err = event();
    driver.endpoint().set_vring_err(0, Some(err.as_fd())).unwrap();
    driver.ring(0).split().set_avail_idx(0x4000);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    assert!(readable(&err, SOON), "the new error file");
    assert!(!driver.ring_failed(0), "the old one is not used any more");
}

/// Eight bytes of a pipe, which must come.
fn event_of(pipe: &mut PipeReader) {
    assert!(readable(pipe, SOON), "nothing was written");
    pipe.read_exact(&mut [0; 8]).unwrap();
}

/// "Either eventfd or pipe/pipe2": events are values of eight bytes, whatever the file is. Nobody but the back-end can
/// take them out of a pipe again, and a full one would hold up the driver.
#[test]
fn files_of_a_ring_may_be_pipes_and_events_have_eight_bytes() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let pipe = || std::io::pipe().unwrap();
    let ((kicked, mut kick), (mut call, calling), (mut err, failing)) = (pipe(), pipe(), pipe());
    driver.endpoint().set_vring_call(0, Some(calling.as_fd())).unwrap();
    driver.endpoint().set_vring_err(0, Some(failing.as_fd())).unwrap();
    driver.endpoint().set_vring_kick(0, Some(kicked.as_fd())).unwrap();
    drop((kicked, calling, failing));
    // What came with the exchange of files is behind us.
    let request = [driver.ram().readable(b"pipe"), driver.ram().writable(64)];
    let ask = |driver: &mut VhostUserDriver, kick: &mut std::io::PipeWriter| {
        driver.ring(0).add(&request);
        kick.write_all(&1u64.to_ne_bytes()).unwrap();
        eventually("an answer", || driver.ring(0).used().is_some());
    };
    ask(&mut driver, &mut kick);
    event_of(&mut call);
    // More than fit into the pipe.
    let room = rustix::pipe::fcntl_getpipe_size(&kick).unwrap();
    rustix::io::ioctl_fionbio(&kick, true).unwrap();
    for n in 0..2 * room / 8 {
        eventually("the kicks are taken", || kick.write(&1u64.to_ne_bytes()).is_ok());
        if n % 4096 == 0 {
            ask(&mut driver, &mut kick);
        }
    }
    ask(&mut driver, &mut kick);
    driver.ring(0).split().set_avail_idx(0x4000);
    kick.write_all(&1u64.to_ne_bytes()).unwrap();
    event_of(&mut err);
    driver.endpoint().set_vring_err(0, None).unwrap();
    assert_eq!(err.read(&mut [0]).unwrap(), 0, "eight bytes and no more, and the file is closed");
    driver.endpoint().set_vring_call(0, None).unwrap();
    let mut rest = Vec::new();
    call.read_to_end(&mut rest).unwrap();
    assert_eq!(rest.len() % 8, 0, "whole events");
}

/// "Suspended device state": no writes to memory, no notifications, no messages; but answers.
#[test]
fn suspended_devices_write_nothing_and_tell_nothing_but_answer() {
    for layout in RingLayout::ALL {
        let daemon = TestDaemon::start();
        let mut driver = daemon.driver(0, layout);
        // The configuration space changes in the moment of the stop.
        submit(&mut driver, 0, &[echo::ask::CONFIGURE_LATE, 77]);
        assert_eq!(ask_count(&mut driver), 2);
        driver.stop().unwrap();
        driver.ring(0).drain();
        driver.interrupts(0);
        let chain = [driver.ram().readable(b"not yet"), driver.ram().writable(64)];
        driver.ring(0).add(&chain);
        let snapshot = |driver: &VhostUserDriver| {
            let mut bytes = Vec::new();
            for region in driver.ram().regions() {
                let mut part = vec![0; region.size as usize];
                driver.ram().read(vm_virtio::GuestAddress(region.guest_addr), &mut part);
                bytes.push(part);
            }
            bytes
        };
        let (before, interrupts) = (snapshot(&driver), driver.interrupts(0));
        // Kicked, and with another file for the interrupt, which a running ring would be told through.
        driver.kick_anyway(0);
        let call = event();
        driver.endpoint().set_vring_call(0, Some(call.as_fd())).unwrap();
        driver.endpoint().set_vring_enable(0, true).unwrap();
        assert!(driver.backend_requests().unwrap().wait(NEVER).unwrap().is_none(), "a message");
        assert!(!readable(&call, NEVER) && driver.interrupts(0) == interrupts, "an interrupt");
        assert!(snapshot(&driver) == before, "a write");
        assert_eq!(driver.endpoint().get_config(0, 1, 0).unwrap(), [77], "answers");
        assert!(driver.endpoint().get_features().is_ok() && driver.status().is_ok());
        // What there was to tell is told when it goes on.
        driver.start_ring(0).unwrap();
        assert_eq!(answer(&mut driver, 0), 7);
        let told = driver.backend_requests().unwrap().wait(SOON).unwrap().expect("a message");
        assert!(matches!(told.request, BackendRequest::ConfigChange));
    }
}

#[test]
fn ring_addresses_may_be_set_again_while_the_ring_runs() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let config = driver.ring(0).queue_config();
    let ram = driver.ram().clone();
    let addr = VringAddr {
        index: 0,
        flags: 0,
        desc: ram.user_addr(config.desc),
        used: ram.user_addr(config.device),
        avail: ram.user_addr(config.driver),
        log: 0,
    };
    driver.endpoint().set_vring_addr(&addr).unwrap();
    assert_eq!(ask(&mut driver, 0, b"same place"), b"same place");
    // The whole ring moves.
    let size = u64::from(config.size);
    let desc = ram.alloc(16 * size, 16);
    let mut table = vec![0; 16 * size as usize];
    ram.read(config.desc, &mut table);
    ram.write(desc, &table);
    driver.endpoint().set_vring_addr(&VringAddr { desc: ram.user_addr(desc), ..addr }).unwrap();
    driver.endpoint().set_vring_addr(&addr).unwrap();
    assert_eq!(ask(&mut driver, 0, b"there and back"), b"there and back");
    // Where no memory is, there is no ring, until it is somewhere again.
    refused(driver.endpoint().set_vring_addr(&VringAddr { desc: 0x10, ..addr }));
    submit(&mut driver, 0, b"lost");
    driver.kick_anyway(0);
    assert_eq!(driver.wait_used(0, NEVER), None);
    driver.endpoint().set_vring_addr(&addr).unwrap();
    assert_eq!(answer(&mut driver, 0), 4);
}

#[test]
fn memory_changes_while_rings_run() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        let ram = driver.ram().clone();
        let all: Vec<_> = (0..ram.regions().len()).map(|at| region_of(&driver, at)).collect();
        assert_eq!(ask(&mut driver, 0, b"one"), b"one");
        // Slots go and come back one by one, those of the rings as well.
        for region in &all {
            driver.endpoint().rem_mem_reg(*region).unwrap();
            driver.endpoint().add_mem_reg(*region, ram.fd()).unwrap();
        }
        assert_eq!(ask(&mut driver, 0, b"two"), b"two");
        // The same as a table.
        let table: Vec<_> = all.iter().map(|region| (*region, ram.fd())).collect();
        driver.endpoint().set_mem_table(&table).unwrap();
        assert_eq!(ask(&mut driver, 0, b"three"), b"three");
        // Everything at other user addresses: the rings are looked for again.
        let moved: Vec<_> = all
            .iter()
            .map(|region| (MemoryRegion { user_addr: region.user_addr ^ (1 << 46), ..*region }, ram.fd()))
            .collect();
        driver.endpoint().set_mem_table(&moved).unwrap();
        submit(&mut driver, 0, b"four");
        driver.kick_anyway(0);
        assert_eq!(driver.wait_used(0, NEVER), None, "the ring is nowhere");
        driver.endpoint().set_mem_table(&table).unwrap();
        assert_eq!(answer(&mut driver, 0), 4, "and goes on where it was");
    }
}

#[test]
fn overlapping_or_unmappable_regions_are_refused_and_the_old_table_holds() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let ram = driver.ram().clone();
    let region = region_of(&driver, 0);
    refused(driver.endpoint().add_mem_reg(region, ram.fd()));
    refused(driver.endpoint().set_mem_table(&[(region, ram.fd()), (region, ram.fd())]));
    let free = MemoryRegion { guest_addr: 1 << 40, user_addr: 1 << 40, ..region };
    refused(driver.endpoint().add_mem_reg(MemoryRegion { mmap_offset: 1 << 50, ..free }, ram.fd()));
    refused(driver.endpoint().add_mem_reg(MemoryRegion { size: 0, ..free }, ram.fd()));
    refused(driver.endpoint().add_mem_reg(MemoryRegion { size: u64::MAX, ..free }, ram.fd()));
    refused(driver.endpoint().add_mem_reg(free, event().as_fd()));
    refused(driver.endpoint().rem_mem_reg(free));
    assert_eq!(ask(&mut driver, 0, b"still here"), b"still here");
}

#[test]
fn a_descriptor_with_rem_mem_reg_is_tolerated() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    let ram = driver.ram().clone();
    let region = region_of(&driver, 1);
    let mut body = vec![0u8; 8];
    for value in [region.guest_addr, region.size, region.user_addr, 12345] {
        body.extend_from_slice(&value.to_ne_bytes());
    }
    let code = FrontendCode::RemMemReg;
    driver.endpoint().send(code.code(), flags::NEED_REPLY, &[&body], &[ram.fd()]).unwrap();
    driver.endpoint().receive_ack(code).unwrap();
    driver.endpoint().add_mem_reg(region, ram.fd()).unwrap();
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

#[test]
fn get_vring_base_finishes_what_is_in_flight_and_stops_the_ring() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        let mut driver = daemon.driver(0, layout);
        submit(&mut driver, 0, b"H");
        submit(&mut driver, 0, b"H");
        assert_eq!(ask_count(&mut driver), 3, "both are held");
        // `stop` compares the base with the driver's own count of used buffers.
        driver.stop().unwrap();
        let used = driver.ring(0).drain();
        assert_eq!(used.iter().map(|used| used.len).collect::<Vec<_>>(), [4, 4], "given back by the stop");
        submit(&mut driver, 0, b"later");
        driver.kick_anyway(0);
        assert_eq!(driver.wait_used(0, NEVER), None, "stopped");
        driver.start_ring(0).unwrap();
        driver.endpoint().set_vring_enable(0, true).unwrap();
        assert_eq!(answer(&mut driver, 0), 5, "goes on where it was");
        driver.stop().unwrap();
    }
}

fn ask_count(driver: &mut VhostUserDriver) -> u8 {
    ask(driver, 0, b"N")[0]
}

#[test]
fn a_stopped_ring_goes_on_without_a_new_base() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    for _ in 0..5 {
        ask(&mut driver, 0, b"x");
    }
    assert_eq!(driver.endpoint().get_vring_base(0).unwrap(), 5);
    assert_eq!(driver.endpoint().get_vring_base(0).unwrap(), 5, "again");
    let kick = event();
    driver.endpoint().set_vring_kick(0, Some(kick.as_fd())).unwrap();
    let chain = [driver.ram().readable(b"y"), driver.ram().writable(64)];
    driver.ring(0).add(&chain);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    assert_eq!(answer(&mut driver, 0), 1);
    assert_eq!(driver.endpoint().get_vring_base(0).unwrap(), 6);
}

/// Base and used index differ after a back-end was killed: what lay between is lost, the ring goes on.
#[test]
fn set_vring_base_of_a_split_ring_reads_the_used_index_from_guest_memory() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    assert_eq!(ask(&mut driver, 0, b"one"), b"one");
    assert_eq!(driver.endpoint().get_vring_base(0).unwrap(), 1);
    let ram = driver.ram().clone();
    let lost = driver.ring(0).add(&[ram.readable(b"lost"), ram.writable(64)]);
    driver.endpoint().set_vring_base(0, 2).unwrap();
    let kick = event();
    driver.endpoint().set_vring_kick(0, Some(kick.as_fd())).unwrap();
    let next = driver.ring(0).add(&[ram.readable(b"three"), ram.writable(64)]);
    rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
    let used = driver.wait_used(0, SOON).expect("an answer");
    assert_eq!((used.id, used.len), (next, 5), "not {lost}");
}

#[test]
fn a_drain_that_hangs_ends_with_needs_reset_and_a_reset_heals() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    submit(&mut driver, 0, b"K");
    assert_eq!(ask_count(&mut driver), 2);
    let started = std::time::Instant::now();
    let base = driver.endpoint().get_vring_base(0).unwrap();
    assert!(started.elapsed() >= Duration::from_secs(4), "the deadline is five seconds");
    assert_eq!(base, 2, "both were taken");
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    assert!(driver.ring_failed(0));
    driver.reset().unwrap();
    driver.start().unwrap();
    assert_eq!(ask(&mut driver, 0, b"well"), b"well");
    assert_eq!(driver.status().unwrap().bits() & 0x40, 0);
}

#[test]
fn get_config_has_the_asked_size_and_zeros_behind_the_end() {
    let daemon = TestDaemon::start();
    let mut endpoint = bare(&daemon);
    assert_eq!(endpoint.get_config(0, 8, 0).unwrap(), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(endpoint.get_config(6, 4, 0).unwrap(), [6, 7, 0, 0]);
    assert_eq!(endpoint.get_config(0, 256, 0).unwrap().len(), 256);
    assert_eq!(endpoint.get_config(u32::MAX, 4, 0).unwrap(), [0; 4]);
}

#[test]
fn set_config_obeys_its_flags() {
    let daemon = TestDaemon::start();
    let mut endpoint = bare(&daemon);
    endpoint.set_config(0, config_flags::WRITABLE, &[9, 9]).unwrap();
    assert_eq!(endpoint.get_config(0, 3, 0).unwrap(), [9, 1, 2], "byte 1 is read-only");
    endpoint.set_config(1, config_flags::MIGRATION, &[7, 7]).unwrap();
    assert_eq!(endpoint.get_config(0, 3, 0).unwrap(), [9, 7, 7]);
    refused(endpoint.set_config(0, 2, &[0]));
    refused(endpoint.set_config(8, config_flags::WRITABLE, &[0]));
    refused(endpoint.set_config(u32::MAX, config_flags::MIGRATION, &[0]));
}

#[test]
fn config_is_neither_offered_nor_served_without_a_configuration_space() {
    let daemon = TestDaemon::with(1, || Echo::new(0));
    let mut endpoint = bare(&daemon);
    let body = [0u32.to_ne_bytes(), 4u32.to_ne_bytes(), [0; 4], [0; 4]].concat();
    endpoint.send(FrontendCode::GetConfig.code(), 0, &[&body], &[]).unwrap();
    assert!(endpoint.receive_reply().unwrap().body.is_empty(), "no payload is an error");
}

#[test]
fn a_change_of_the_configuration_space_is_told_but_not_while_suspended() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    ask(&mut driver, 0, &[echo::ask::CONFIGURE, 42]);
    let told = driver.backend_requests().unwrap().wait(SOON).unwrap().expect("a message");
    assert!(matches!(told.request, BackendRequest::ConfigChange));
    assert_eq!(driver.endpoint().get_config(0, 1, 0).unwrap(), [42]);
    // Nothing changed: nothing is told.
    ask(&mut driver, 0, b"x");
    assert!(driver.backend_requests().unwrap().wait(NEVER).unwrap().is_none());
    driver.stop().unwrap();
    assert!(driver.backend_requests().unwrap().wait(NEVER).unwrap().is_none());
}

#[test]
fn a_ring_of_another_number_or_size_is_refused() {
    let daemon = TestDaemon::start();
    let mut endpoint = bare(&daemon);
    for index in [1, 255] {
        refused(endpoint.set_vring_num(index, 16));
        refused(endpoint.set_vring_base(index, 0));
        refused(endpoint.set_vring_addr(&VringAddr { index, ..VringAddr::default() }));
        refused(endpoint.set_vring_kick(index, None));
        refused(endpoint.set_vring_call(index, None));
        refused(endpoint.set_vring_err(index, None));
        refused(endpoint.set_vring_enable(index, true));
    }
    refused(endpoint.set_vring_num(u32::MAX, 16));
    for size in [0, 257, 512, 65536, u32::MAX] {
        refused(endpoint.set_vring_num(0, size));
    }
    refused(endpoint.set_vring_base(0, 0x1_0000));
    // The reply of this one cannot say no.
    assert!(endpoint.get_vring_base(1).is_err());
}

#[test]
fn sizes_and_bases_do_not_change_under_a_running_ring() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    refused(driver.endpoint().set_vring_num(0, 8));
    refused(driver.endpoint().set_vring_base(0, 0));
    assert_eq!(ask(&mut driver, 0, b"unmoved"), b"unmoved");
}

#[test]
fn reset_device_and_status_0_reset() {
    let daemon = TestDaemon::start();
    for protocol in [ProtocolFeatures::all(), ProtocolFeatures::all() - ProtocolFeatures::STATUS] {
        let options = VhostUserOptions { protocol, ..options(RingLayout::Split) };
        let mut driver = VhostUserDriver::connect(daemon.socket(0), options).unwrap();
        assert_eq!(ask_count(&mut driver), 1);
        submit(&mut driver, 0, b"H");
        assert_eq!(ask_count(&mut driver), 3);
        // Without stopping the rings first: the reset stops them, and what was held is not used.
        driver.reset().unwrap();
        submit(&mut driver, 0, b"nobody there");
        driver.kick_anyway(0);
        assert_eq!(driver.wait_used(0, NEVER), None);
        driver.ring(0).restart();
        driver.start().unwrap();
        assert_eq!(ask_count(&mut driver), 1, "the device forgot");
        driver.reset().unwrap();
    }
}

/// RESET_DEVICE: "disable all rings". Where no message could enable them again (without bit 30) they stay enabled.
#[test]
fn reset_device_and_status_0_disable_all_rings_and_keep_the_owner() {
    let daemon = TestDaemon::start();
    for bit_30 in [true, false] {
        for reset in
            [FrontendEndpoint::reset_device, |endpoint: &mut FrontendEndpoint| endpoint.set_status(0)]
        {
            let mut driver = daemon.driver(0, RingLayout::Split);
            let features = driver.features().low64() | if bit_30 { F_PROTOCOL_FEATURES } else { 0 };
            driver.endpoint().set_features(features).unwrap();
            reset(driver.endpoint()).unwrap();
            driver.ring(0).restart();
            // Neither SET_OWNER nor features nor memory again.
            driver.start_ring(0).unwrap();
            submit(&mut driver, 0, b"after");
            if bit_30 {
                driver.kick_anyway(0);
                assert_eq!(driver.wait_used(0, NEVER), None, "disabled");
                driver.endpoint().set_vring_enable(0, true).unwrap();
            }
            assert_eq!(answer(&mut driver, 0), 5);
            driver.stop().unwrap();
            driver.reset().unwrap();
        }
    }
}

/// Everything up to a running ring, with the status set to `before` between features and memory.
fn started_with_status(daemon: &TestDaemon, before: &[u8]) -> VhostUserDriver {
    let mut driver = attached(daemon, options(RingLayout::Split));
    assert_eq!(driver.status().unwrap(), Status::empty());
    let features = driver.features().low64() | F_PROTOCOL_FEATURES;
    driver.endpoint().set_features(features).unwrap();
    for status in before {
        driver.endpoint().set_status(*status).unwrap();
        assert_eq!(driver.status().unwrap().bits(), *status);
    }
    let ram = driver.ram().clone();
    for at in 0..ram.regions().len() {
        let region = region_of(&driver, at);
        driver.endpoint().add_mem_reg(region, ram.fd()).unwrap();
    }
    driver.start_ring(0).unwrap();
    driver.endpoint().set_vring_enable(0, true).unwrap();
    driver
}

#[test]
fn the_status_is_what_was_set_and_rings_wait_for_a_drivers_driver_ok() {
    let daemon = TestDaemon::start();
    let mut driver = started_with_status(&daemon, &[1, 3, 11]);
    submit(&mut driver, 0, b"too early");
    driver.kick_anyway(0);
    assert_eq!(driver.wait_used(0, NEVER), None, "no buffer is consumed before DRIVER_OK");
    driver.endpoint().set_status(15).unwrap();
    assert_eq!(answer(&mut driver, 0), 9);
    assert_eq!(driver.status().unwrap().bits(), 15);
}

/// QEMU 11.1 tells the back-ends of its generic devices of FEATURES_OK and of nothing else.
#[test]
fn rings_run_for_front_ends_that_never_say_driver_ok() {
    for before in [&[8][..], &[]] {
        let daemon = TestDaemon::start();
        let mut driver = started_with_status(&daemon, before);
        assert_eq!(ask(&mut driver, 0, b"N"), [1]);
        let status = before.first().copied().unwrap_or(0);
        assert_eq!(driver.status().unwrap().bits(), status, "what was set, nothing else");
        // The guest reboots: its rings begin from scratch, that is all there is to see.
        driver.endpoint().get_vring_base(0).unwrap();
        driver.ring(0).restart();
        driver.start_ring(0).unwrap();
        assert_eq!(ask(&mut driver, 0, b"N"), [1]);
        assert_eq!(driver.status().unwrap().bits(), status);
        // For its older devices the rest follows.
        driver.endpoint().set_status(15).unwrap();
        assert_eq!(driver.status().unwrap().bits(), 15);
        assert_eq!(ask(&mut driver, 0, b"N"), [2]);
        driver.endpoint().set_status(0).unwrap();
        assert_eq!(driver.status().unwrap().bits(), 0);
    }
}

#[test]
fn features_that_the_device_cannot_accept_leave_features_ok_clear() {
    let daemon = TestDaemon::start();
    let mut endpoint = bare(&daemon);
    // 6.2: a device may refuse to work without VERSION_1.
    endpoint.set_features(F_PROTOCOL_FEATURES).unwrap();
    endpoint.set_status(1 | 2 | 8).unwrap();
    assert_eq!(endpoint.get_status().unwrap(), 3);
    endpoint.set_status(1 | 2 | 4 | 8).unwrap();
    assert_eq!(endpoint.get_status().unwrap(), 3, "no DRIVER_OK either");
}

#[test]
fn a_broken_ring_signals_its_error_file_and_needs_reset_and_the_others_go_on() {
    let daemon = TestDaemon::with(1, || Echo::new(8).queues(2, 2));
    let mut driver = daemon.driver(0, RingLayout::Split);
    assert_eq!(ask(&mut driver, 1, b"x"), b"x");
    // An available index that is further ahead than the ring has entries.
    let config = driver.ring(0).queue_config();
    let idx = vm_virtio::GuestAddress(config.driver.0 + 2);
    let ram = driver.ram().clone();
    ram.store_u16(idx, 0x4000);
    driver.kick_anyway(0);
    eventually("the error file", || driver.ring_failed(0));
    eventually("the status", || driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
    assert!(!driver.ring_failed(1));
    assert_eq!(ask(&mut driver, 1, b"unharmed"), b"unharmed");
    driver.endpoint().get_vring_base(0).unwrap();
    driver.endpoint().get_vring_base(1).unwrap();
    driver.reset().unwrap();
    driver.start().unwrap();
    assert_eq!(ask(&mut driver, 0, b"well again"), b"well again");
}

#[test]
fn a_ring_that_cannot_be_is_refused_and_signals_its_error_file() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.endpoint().get_vring_base(0).unwrap();
    let config = driver.ring(0).queue_config();
    let ram = driver.ram().clone();
    let addr = VringAddr {
        index: 0,
        flags: 0,
        desc: ram.user_addr(config.desc) + 8,
        used: ram.user_addr(config.device),
        avail: ram.user_addr(config.driver),
        log: 0,
    };
    driver.endpoint().set_vring_addr(&addr).unwrap();
    refused(driver.endpoint().set_vring_kick(0, Some(event().as_fd())));
    assert!(driver.ring_failed(0), "misaligned");
    assert!(driver.status().unwrap().contains(Status::DEVICE_NEEDS_RESET));
}

#[test]
fn deprecated_and_unknown_messages_do_no_harm() {
    let daemon = TestDaemon::start();
    let mut driver = daemon.driver(0, RingLayout::Split);
    driver.endpoint().reset_owner().unwrap();
    for code in [FrontendCode::SetLogFd.code(), FrontendCode::SendRarp.code(), 45, 9999] {
        driver.endpoint().send(code, flags::NEED_REPLY, &[&[0; 8]], &[]).unwrap();
        let reply = driver.endpoint().receive_reply().unwrap();
        assert_ne!(reply.body, [0; 8], "{code} is refused");
    }
    assert_eq!(ask(&mut driver, 0, b"x"), b"x");
}

#[test]
fn a_driver_that_begins_from_scratch_finds_a_device_without_memories() {
    let daemon = TestDaemon::start();
    for layout in RingLayout::ALL {
        for protocol in [ProtocolFeatures::REPLY_ACK | ProtocolFeatures::MQ, ProtocolFeatures::all()] {
            let options = || VhostUserOptions { protocol, ..options(layout) };
            let mut first = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
            ask_count(&mut first);
            assert_eq!(ask_count(&mut first), 2);
            // Killed, with neither a reset nor a stop; another guest comes to the same socket.
            drop(first);
            let mut second = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
            assert_eq!(ask_count(&mut second), 1, "{layout:?} {protocol:?}");
            // The same front-end stops and starts its rings, without a reset: the guest was paused.
            second.stop().unwrap();
            second.start_ring(0).unwrap();
            second.endpoint().set_vring_enable(0, true).unwrap();
            assert_eq!(ask_count(&mut second), 2);
            // It reboots the guest, without a reset: rings begin from scratch.
            second.endpoint().get_vring_base(0).unwrap();
            second.ring(0).restart();
            second.start_ring(0).unwrap();
            assert_eq!(ask_count(&mut second), 1);
        }
    }
}

/// Also if the ring that tells is not the first one to start.
#[test]
fn a_driver_that_begins_from_scratch_is_noticed_at_any_ring() {
    let daemon = TestDaemon::with(1, || Echo::new(8).queues(3, 1));
    for layout in RingLayout::ALL {
        let protocol = ProtocolFeatures::REPLY_ACK | ProtocolFeatures::MQ;
        let options = || VhostUserOptions { protocol, ..options(layout) };
        let mut first = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
        assert_eq!(ask(&mut first, 1, b"N"), [1]);
        assert_eq!(ask(&mut first, 1, b"N"), [2]);
        drop(first);
        let mut second = VhostUserDriver::connect(daemon.socket(0), options()).unwrap();
        for (count, queue) in [(1, 0), (2, 1), (3, 2)] {
            assert_eq!(ask(&mut second, queue, b"N"), [count], "{layout:?}");
        }
        second.stop().unwrap();
        for queue in 0..3 {
            second.start_ring(queue).unwrap();
            second.endpoint().set_vring_enable(queue as u32, true).unwrap();
        }
        assert_eq!(ask(&mut second, 2, b"N"), [4], "a pause is no new driver");
    }
}
