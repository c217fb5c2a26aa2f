//! The region of a split queue.
//!
//! | word | header | entry, one for each descriptor: as head |
//! |---|---|---|
//! | 0 | features: 0 | inflight (8 bits), padding (40), next (16) |
//! | 1 | version, desc_num, last_batch_head, used_idx (16 each) | counter |
//!
//! * Pop: counter, then inflight. Before the second store the chain counts as not popped.
//! * Put: the entry becomes the head of the list of the batch. As long as the used index is what it was, the list means
//!   nothing.
//! * Publish: the used index, at which the driver takes the batch; then inflight of each of it; then used_idx. A
//!   successor that finds two different used indices does the rest: the list has as many of the batch as they differ.
//!
//! The available position is the used index and as many as are in flight.
use super::super::config::Areas;
use super::super::error::QueueError;
use super::super::ring_mem::UsedRing;
use super::super::state::{QueueState, RingPos};
use super::again::Pending;
use super::table::{Table, field};
use super::{
    InflightError, InflightRegion, Recovered, Tracker, VERSION, check_format, check_fresh, in_order,
};

type Region = Table<2, 2>;

pub(in super::super) struct SplitInflight {
    region: Region,
    counter: u64,
    /// The header's second word: `last_batch_head` is the head of the list. One value, and stored as such: were fields
    /// of 16 bits put together for each store, it would wait until what was written last to one of them is in the cache.
    header: u64,
    /// The head of the list before the batch.
    last_before: u16,
    /// The heads of the batch, in the order in which they were put; as many as `len`.
    batch: Box<[u16]>,
    len: usize,
}

impl SplitInflight {
    fn new(region: Region, size: u16, used_idx: u16, last: u16, counter: u64) -> SplitInflight {
        let batch = vec![0; usize::from(size)].into();
        let sizes = u64::from(VERSION) | u64::from(size) << 16;
        let header = sizes | u64::from(last) << 32 | u64::from(used_idx) << 48;
        SplitInflight { region, counter, header, last_before: last, batch, len: 0 }
    }

    #[inline(always)]
    fn store_header(&self) {
        let [_, word] = self.region.header();
        word.store(self.header);
    }

    #[inline(always)]
    pub(in super::super) fn pop(&mut self, head: u16) {
        if let Some([state, counter]) = self.region.entry(head) {
            counter.store(self.counter);
            state.store(1);
        }
        self.counter = self.counter.wrapping_add(1);
    }

    /// Puts back what was popped last.
    pub(in super::super) fn unpop(&mut self, head: u16) {
        if let Some([state, _]) = self.region.entry(head) {
            state.store(0);
        }
    }

    #[inline(always)]
    pub(in super::super) fn put(&mut self, head: u16) {
        // A driver that uses a buffer twice can make batches longer than its queue. It loses track of its own.
        let (Some([state, _]), Some(place)) = (self.region.entry(head), self.batch.get_mut(self.len)) else {
            return;
        };
        *place = head;
        self.len += 1;
        state.store(1 | u64::from(field(self.header, 32)) << 48);
        self.header = self.header & !(0xffff << 32) | u64::from(head) << 32;
        self.store_header();
    }

    /// The used index was stored.
    #[inline(always)]
    pub(in super::super) fn published(&mut self, used_idx: u16) {
        if field(self.header, 48) == used_idx {
            return;
        }
        let mut next = self.last_before;
        for head in self.batch.get(..self.len).unwrap_or_default() {
            if let Some([state, _]) = self.region.entry(*head) {
                state.store(u64::from(next) << 48);
            }
            next = *head;
        }
        self.len = 0;
        self.last_before = field(self.header, 32);
        self.header = self.header << 16 >> 16 | u64::from(used_idx) << 48;
        self.store_header();
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
    let region = Region::new(region, size)?;
    let [features, word] = region.header();
    let (features, word) = (features.load(), word.load());
    if !check_format(features, field(word, 0))? {
        check_fresh(state)?;
        return Ok(fresh(region, size, state.used.index));
    }
    if field(word, 16) != size {
        return Err(InflightError::QueueSize(field(word, 16)).into());
    }
    let (last, used_before) = (field(word, 32), field(word, 48));
    let used_idx = UsedRing::new(&areas.device).idx();
    let batch = used_idx.wrapping_sub(used_before);
    if batch > size {
        return Err(InflightError::Batch(batch).into());
    }
    // All of it is read before anything is stored.
    let mut states = Vec::with_capacity(usize::from(size));
    for index in 0..size {
        let Some([state, _]) = region.entry(index) else { break };
        let word = state.load();
        if word & 0xff > 1 {
            return Err(InflightError::Value("inflight").into());
        }
        states.push((word & 0xff == 1, field(word, 48)));
    }
    let mut at = last;
    for _ in 0..batch {
        let Some((inflight, next)) = states.get_mut(usize::from(at)) else {
            return Err(InflightError::Value("last batch").into());
        };
        *inflight = false;
        if let Some([state, _]) = region.entry(at) {
            state.store(u64::from(*next) << 48);
        }
        at = *next;
    }
    let mut found = Vec::new();
    for (head, (inflight, _)) in (0..).zip(&states) {
        if let (true, Some([_, counter])) = (inflight, region.entry(head)) {
            found.push((counter.load(), head));
        }
    }
    let counter = |head: &u16, number| {
        if let Some([_, counter]) = region.entry(*head) {
            counter.store(number);
        }
    };
    let (heads, next) = in_order(found, counter)?;
    let tracker = SplitInflight::new(region, size, used_idx, last, next);
    tracker.store_header();
    let position = |index| RingPos { index, wrap: true };
    // As many as there are entries at most.
    let avail = used_idx.wrapping_add(heads.len() as u16);
    Ok(Recovered {
        tracker: Tracker::Split(tracker),
        state: Some(QueueState { avail: position(avail), used: position(used_idx), held: Vec::new() }),
        again: heads.into_iter().map(Pending::Split).collect(),
    })
}

fn fresh(region: Region, size: u16, used_idx: u16) -> Recovered {
    for index in 0..size {
        if let Some([state, _]) = region.entry(index) {
            state.store(0);
        }
    }
    let [features, _] = region.header();
    features.store(0);
    let tracker = SplitInflight::new(region, size, used_idx, 0, 0);
    tracker.store_header();
    Recovered { tracker: Tracker::Split(tracker), state: None, again: Vec::new() }
}
