//! Our queue, as a device and the lane runtime use it.
use std::sync::Arc;

use vm_virtio::memory::SharedMemory;
use vm_virtio::{Chain, Features, GuestRam, InflightRegion, Queue, QueueConfig};

use crate::guest::{DESC, DEVICE, DRIVER, Guest, SIZE};
use crate::rows::Device;

pub struct Ours(Queue);

impl Ours {
    pub fn new(guest: &Guest) -> Ours {
        Ours::with(guest, None)
    }

    /// With in-flight tracking.
    pub fn tracked(guest: &Guest) -> Ours {
        let len = InflightRegion::bytes_for(SIZE);
        let memory = Arc::new(SharedMemory::private(len));
        Ours::with(guest, Some(InflightRegion::new(memory, 0, len).expect("a region")))
    }

    fn with(guest: &Guest, region: Option<InflightRegion>) -> Ours {
        let config = QueueConfig {
            size: SIZE,
            desc: vm_memory::GuestAddress(DESC),
            driver: vm_memory::GuestAddress(DRIVER),
            device: vm_memory::GuestAddress(DEVICE),
        };
        let mut features = Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX;
        if guest.packed {
            features |= Features::RING_PACKED;
        }
        let ram = GuestRam::new(&guest.memory);
        Ours(Queue::tracked(config, &ram, features, None, region.as_ref()).expect("a queue"))
    }
}

impl Device for Ours {
    type Chain = Chain;

    #[inline(always)]
    fn pop(&mut self) -> Option<Chain> {
        self.0.pop()
    }

    #[inline(always)]
    fn translated(&self, chain: &Chain) -> u64 {
        let sum = |segments: &[vm_virtio::Segment]| -> u64 {
            segments.iter().map(|segment| segment.as_ptr() as u64 ^ segment.len() as u64).sum()
        };
        sum(self.0.readable(chain)) + sum(self.0.writable(chain))
    }

    #[inline(always)]
    fn read(&self, chain: &Chain) -> u64 {
        let mut bytes = [0; 64];
        assert!(self.0.reader(chain).read(&mut bytes) == 64);
        u64::from(std::hint::black_box(&bytes)[0])
    }

    #[inline(always)]
    fn add_used(&mut self, chain: Chain, written: u32) {
        self.0.add_used(chain, written);
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        self.0.publish()
    }
}
