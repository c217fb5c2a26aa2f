//! The guest's memory map changes while the device keeps requests.
mod support;

use support::*;
use vhost_user::MemoryRegion;
use virtio_testkit::{Buf, RingLayout, TestRam, VhostUserDriver};
use vm_virtio::GuestAddress;

const SLOT: u64 = 0x4000_0000;
const SIZE: u64 = 0x1_0000;

fn slot(ram: &TestRam) -> MemoryRegion {
    MemoryRegion { guest_addr: SLOT, size: SIZE, user_addr: ram.regions()[0].user_addr, mmap_offset: 0 }
}

fn text(ram: &TestRam, len: usize) -> Vec<u8> {
    let mut data = vec![0; len];
    ram.read(GuestAddress(SLOT), &mut data);
    data
}

/// A request with its answer in the slot.
fn submit_into_slot(driver: &mut VhostUserDriver, request: &[u8]) {
    let request = driver.ram().readable(request);
    driver.ring(0).add(&[request, Buf::writable(GuestAddress(SLOT), 64)]);
    driver.kick(0);
}

/// The slot is exchanged again and again under a request that the device keeps: the request's memory is that of its time,
/// new ones have the new memory, and what was taken away is let go with the last request that has it.
#[test]
fn memory_that_is_taken_away_stays_with_the_requests_that_have_it() {
    for layout in RingLayout::ALL {
        let daemon = TestDaemon::start();
        let mut driver = daemon.driver(0, layout);
        let slots: Vec<TestRam> = (0..4).map(|_| TestRam::new(&[(SLOT, SIZE)])).collect();
        for (round, ram) in slots.iter().enumerate() {
            driver.endpoint().add_mem_reg(slot(ram), ram.fd()).unwrap();
            submit_into_slot(&mut driver, &[echo::ask::HOLD]);
            submit_into_slot(&mut driver, format!("round {round}").as_bytes());
            assert_eq!(driver.wait_used(0, SOON).unwrap().len, 7);
            if round < 3 {
                driver.endpoint().rem_mem_reg(slot(ram)).unwrap();
            }
        }
        for (round, ram) in slots.iter().enumerate() {
            assert_eq!(text(ram, 7), format!("round {round}").as_bytes());
        }
        driver.stop().unwrap();
        for ram in &slots {
            assert_eq!(driver.wait_used(0, SOON).unwrap().len, 4);
            assert_eq!(text(ram, 4), b"held", "{layout:?}");
        }
        driver.start_ring(0).unwrap();
        driver.endpoint().set_vring_enable(0, true).unwrap();
        assert_eq!(ask(&mut driver, 0, b"goes on"), b"goes on");
    }
}
