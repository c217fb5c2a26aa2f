//! A generator that gives the same bytes for the same seed: for tests, nothing to keep a secret with.
use chacha20::ChaCha20Rng;
use chacha20::rand_core::{Rng, SeedableRng};
use vm_virtio::{Segment, StateError};

use crate::state::{SeededV1, other_source};

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

    pub(super) fn save(&self) -> SeededV1 {
        // Words of four bytes, of which the rest of the block has not been handed out.
        let generated = u64::try_from(self.generator.get_word_pos() * 4).unwrap_or(u64::MAX);
        let position = generated - (BLOCK - self.next) as u64;
        SeededV1 { seed: self.seed, guest: self.guest, position }
    }

    pub(super) fn restore(&mut self, state: &SeededV1) -> Result<(), StateError> {
        if state.seed != self.seed {
            return Err(other_source());
        }
        *self = SeededSource::new(self.seed, state.guest);
        let (block, at) = (state.position / BLOCK as u64, (state.position % BLOCK as u64) as usize);
        self.generator.set_word_pos(u128::from(block) * (BLOCK / 4) as u128);
        if at > 0 {
            self.generator.fill_bytes(&mut self.block);
            self.next = at;
        }
        Ok(())
    }

    pub(super) fn reset(&mut self) {
        *self = SeededSource::new(self.seed, self.guest);
    }
}
