//! The region of a split queue.
//!
//! | word | header | entry, one for each descriptor: as head |
//! |---|---|---|
//! | 0 | features: 0 | popped: the number of the pop |
//! | 1 | version, desc_num (16 each), padding | done: [`OUT`], or the number of the used entry |
//!
//! Both numbers go on where 16 bits end, and both began with the same one: the low 16 bits of a pop's are its index in
//! the available ring, those of a used entry's its index in the used ring. What the driver has seen used is everything
//! below the used index of the ring itself, which is so the one word that commits a batch.
//!
//! * Pop: popped, then done, which becomes [`OUT`]. Before the second store the chain counts as not popped: what it was done
//!   with before is published, or the driver could not have made it available.
//! * Put: done. The used index is not larger than that yet, so that the chain still is in flight.
//! * Publish: nothing but the used index.
//! * Put back: done becomes [`NEVER`], then popped the number of the pop before.
//!
//! A successor has the ring's 16 bits of the used index, and needs all 64. The largest `popped` is that of the latest pop, or
//! one more (killed within a pop, or while it was put back). All that were popped and not published are no more than the
//! queue has entries; so the used index is the one number with these 16 bits that is so close behind it.
//!
//! The available position is the used index and as many as are in flight.
use super::super::config::Areas;
use super::super::error::QueueError;
use super::super::ring_mem::UsedRing;
use super::super::state::{QueueState, RingPos};
use super::again::Pending;
use super::table::{Table, field};
use super::{
    InflightError, InflightRegion, LIMIT, NEVER, OUT, Recovered, Tracker, check_format, check_fresh,
    in_order, sizes,
};

/// The version of this format.
pub(super) const VERSION: u16 = 3;

type Region = Table<2, 2>;

pub(in super::super) struct SplitInflight {
    region: Region,
    /// The number of the next pop, and of the next used entry.
    popped: u64,
    done: u64,
}

impl SplitInflight {
    #[inline(always)]
    pub(in super::super) fn pop(&mut self, head: u16) {
        if let Some([popped, done]) = self.region.entry(head) {
            popped.store(self.popped);
            done.store(OUT);
        }
        self.popped = self.popped.wrapping_add(1);
    }

    /// Puts back what was popped last.
    pub(in super::super) fn unpop(&mut self, head: u16) {
        self.popped = self.popped.wrapping_sub(1);
        if let Some([popped, done]) = self.region.entry(head) {
            done.store(NEVER);
            popped.store(self.popped.wrapping_sub(1));
        }
    }

    #[inline(always)]
    pub(in super::super) fn put(&mut self, head: u16) {
        if let Some([_, done]) = self.region.entry(head) {
            done.store(self.done);
        }
        self.done = self.done.wrapping_add(1);
    }

    /// The queue is reset: nothing is in flight any more.
    pub(in super::super) fn forget(self) {
        let [_, word] = self.region.header();
        word.store(0);
    }

    pub(in super::super) fn is_lost(&self) -> bool {
        self.region.is_poisoned()
    }
}

pub(super) fn recover(
    region: &InflightRegion,
    areas: &Areas,
    size: u16,
    state: &QueueState,
) -> Result<Recovered, QueueError> {
    let region = Region::new(region, 0, size)?;
    let [features, word] = region.header();
    let (features, word) = (features.load(), word.load());
    if !check_format(VERSION, features, field(word, 0))? {
        check_fresh(state)?;
        return Ok(fresh(region, size, state.used.index));
    }
    if field(word, 16) != size {
        return Err(InflightError::QueueSize(field(word, 16)).into());
    }
    // All of it is read before anything is stored.
    let mut entries = Vec::with_capacity(usize::from(size));
    for head in 0..size {
        let Some([popped, done]) = region.entry(head) else { break };
        let (popped, done) = (popped.load(), done.load());
        if popped >= LIMIT {
            return Err(InflightError::Value("popped").into());
        }
        if done >= LIMIT && done != OUT {
            return Err(InflightError::Value("done").into());
        }
        entries.push((popped, (head, done)));
    }
    let used_idx = UsedRing::new(&areas.device).idx();
    let latest = entries.iter().map(|(popped, _)| *popped).max().unwrap_or(0);
    // The low 16 bits are all that is needed of it.
    let behind = (latest as u16).wrapping_add(1).wrapping_sub(used_idx);
    let Some(used) = (latest + 1).checked_sub(u64::from(behind)).filter(|_| behind <= size + 1) else {
        return Err(InflightError::Behind(behind).into());
    };
    // `OUT` is larger than all others.
    entries.retain(|(_, (_, done))| *done >= used);
    // No more than there are entries.
    let count = entries.len() as u16;
    if count > behind {
        return Err(InflightError::Behind(behind).into());
    }
    in_order(&mut entries)?;
    for (_, (head, done)) in &entries {
        // Done, but not published: no number that comes now may make it so.
        if let (true, Some([_, place])) = (*done != OUT, region.entry(*head)) {
            place.store(OUT);
        }
    }
    let position = |index| RingPos { index, wrap: true };
    let avail = used_idx.wrapping_add(count);
    Ok(Recovered {
        tracker: Tracker::Split(SplitInflight { region, popped: used + u64::from(count), done: used }),
        state: Some(QueueState { avail: position(avail), used: position(used_idx), held: Vec::new() }),
        again: entries.into_iter().map(|(_, (head, _))| Pending::Split(head)).collect(),
    })
}

fn fresh(region: Region, size: u16, used_idx: u16) -> Recovered {
    // Above all that [`NEVER`] is compared with.
    let first = (1 << 16) + u64::from(used_idx);
    for index in 0..size {
        if let Some([popped, done]) = region.entry(index) {
            popped.store(first - 1);
            done.store(NEVER);
        }
    }
    let [features, word] = region.header();
    features.store(0);
    word.store(sizes(VERSION, size));
    let tracker = SplitInflight { region, popped: first, done: first };
    Recovered { tracker: Tracker::Split(tracker), state: None, again: Vec::new() }
}
