//! A generator that gives the same bytes for the same seed: for tests, nothing to keep a secret with.
use chacha20::ChaCha20Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use vm_virtio::Segment;

use super::{Filled, pieces};

pub(crate) struct SeededSource {
    seed: u64,
    guest: u32,
    generator: ChaCha20Rng,
    /// The generator deals in words; the guest gets its bytes one after another, however they are framed. Those from
    /// `next` on have not been handed out.
    block: [u8; BLOCK],
    next: usize,
}

const BLOCK: usize = 256;

impl SeededSource {
    /// ChaCha20, its key the seed in little-endian followed by zeros, its stream the guest's number.
    pub(super) fn new(seed: u64, guest: u32) -> SeededSource {
        let mut key = [0; 32];
        key[..8].copy_from_slice(&seed.to_le_bytes());
        let mut generator = ChaCha20Rng::from_seed(key);
        generator.set_stream(u64::from(guest));
        SeededSource { seed, guest, generator, block: [0; BLOCK], next: BLOCK }
    }

    pub(super) fn fill(&mut self, buffers: &[Segment], limit: usize) -> Filled {
        let mut done = 0;
        for (buffer, part) in pieces(buffers, limit) {
            let mut at = 0;
            while at < part {
                if self.next == BLOCK {
                    self.generator.fill_bytes(&mut self.block);
                    self.next = 0;
                }
                let end = BLOCK.min(self.next + part - at);
                at += buffer.write(at, &self.block[self.next..end]);
                self.next = end;
            }
            done += part;
        }
        Filled::Bytes(done)
    }

    pub(super) fn reset(&mut self) {
        *self = SeededSource::new(self.seed, self.guest);
    }
}
