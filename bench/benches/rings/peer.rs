//! rust-vmm's `virtio-queue`, split only. Its chains are walked by iterating over them.
use std::io::Read;

use virtio_queue::{Queue, QueueT, Reader};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

use crate::guest::{DESC, DEVICE, DRIVER, Guest, SIZE};
use crate::rows::Device;

pub struct Peer {
    queue: Queue,
    memory: &'static GuestMemoryMmap,
}

impl Peer {
    pub fn new(guest: &Guest) -> Peer {
        // Its chains hold a reference to memory; a clone that is never freed has none of an `Arc`'s cost.
        let memory: &'static GuestMemoryMmap = Box::leak(Box::new(guest.memory.clone()));
        let mut queue = Queue::new(SIZE).expect("a queue");
        queue.try_set_desc_table_address(GuestAddress(DESC)).expect("an address");
        queue.try_set_avail_ring_address(GuestAddress(DRIVER)).expect("an address");
        queue.try_set_used_ring_address(GuestAddress(DEVICE)).expect("an address");
        queue.set_event_idx(true);
        queue.set_ready(true);
        assert!(queue.is_valid(memory));
        Peer { queue, memory }
    }
}

type PeerChain = virtio_queue::DescriptorChain<&'static GuestMemoryMmap>;

impl Device for Peer {
    type Chain = PeerChain;

    #[inline(always)]
    fn pop(&mut self) -> Option<PeerChain> {
        let chain = self.queue.pop_descriptor_chain(self.memory)?;
        let walked = chain.clone().fold(0, |sum, desc| sum + u64::from(desc.len()));
        std::hint::black_box(walked);
        Some(chain)
    }

    #[inline(always)]
    fn pop_translated(&mut self) -> Option<(PeerChain, u64)> {
        let chain = self.queue.pop_descriptor_chain(self.memory)?;
        let sum = chain
            .clone()
            .map(|desc| {
                let access = if desc.is_write_only() { Permissions::Write } else { Permissions::Read };
                let slices = self.memory.get_slices(desc.addr(), desc.len() as usize, access);
                slices
                    .expect("mapped")
                    .map(|slice| {
                        let slice = slice.expect("mapped");
                        slice.ptr_guard().as_ptr() as u64 ^ slice.len() as u64
                    })
                    .sum::<u64>()
            })
            .sum();
        Some((chain, sum))
    }

    #[inline(always)]
    fn pop_read(&mut self) -> Option<(PeerChain, u64)> {
        let chain = self.queue.pop_descriptor_chain(self.memory)?;
        let mut bytes = [0; 64];
        let mut reader: Reader<'_, ()> = chain.clone().reader(self.memory).expect("mapped");
        reader.read_exact(&mut bytes).expect("64 bytes");
        Some((chain, u64::from(std::hint::black_box(&bytes)[0])))
    }

    fn translated(&self, _: &PeerChain) -> u64 {
        unreachable!("walks and translates in one go")
    }

    fn read(&self, _: &PeerChain) -> u64 {
        unreachable!("walks and reads in one go")
    }

    #[inline(always)]
    fn add_used(&mut self, chain: PeerChain, written: u32) {
        self.queue.add_used(self.memory, chain.head_index(), written).expect("a used ring");
    }

    #[inline(always)]
    fn publish(&mut self) -> bool {
        self.queue.needs_notification(self.memory).expect("a used ring")
    }
}
