//! The region of a packed queue.
//!
//! | word | header | entry, one for each descriptor in flight |
//! |---|---|---|
//! | 0 | features: 0 | inflight (8 bits), padding (8), next, last, num (16 each) |
//! | 1 | version, desc_num, free_head, old_free_head (16 each) | counter |
//! | 2 | used_idx, old_used_idx (16 each), used_wrap_counter, old_used_wrap_counter (8 each) | id, flags (16 each), len (32) |
//! | 3 | padding | addr |
//!
//! Entries are on the free list, or in the list of a chain: `num` of them from its head on, through `next`. Only a head
//! that is not on the free list is in flight, whatever stands in its `inflight`.
//!
//! A word is stored as a whole, so that fields change together. Two words commit:
//! * Pop: takes entries from the front of the free list and fills them; then both free heads become what is behind them.
//!   Before that store they are free.
//! * Put: links the chain's list to that of the chain put before. Means nothing yet: `num` ends a list in flight.
//! * Publish: links the batch to the free list; stores used position and old used position; then the batch as free head,
//!   and the free list without it as old one; then the ring's flags, at which the driver takes the batch.
//!
//! A successor looks at the ring at the old used position: still as the driver made it available, then the batch was
//! not published and the old values hold; else the new ones do. So nothing has to be stored after the ring: the next
//! pop makes both free heads the same, and the next publication begins with the position where this one ended.
//!
//! The available position is the used one and as many descriptors as are in flight.
use super::super::config::Areas;
use super::super::error::QueueError;
use super::super::ring_mem::{Cursor, Desc, PackedRing};
use super::super::state::{QueueState, RingPos};
use super::again::Pending;
use super::table::{Table, field};
use super::{
    InflightError, InflightRegion, Recovered, Tracker, VERSION, check_format, check_fresh, in_order,
};

type Region = Table<4, 4>;

/// What of an entry's first word is needed while the queue runs.
#[derive(Clone, Copy, Default)]
struct Link {
    next: u16,
    /// Of a head: the last entry of its list.
    last: u16,
}

pub(in super::super) struct PackedInflight {
    region: Region,
    size: u16,
    /// Version and number of entries, as the header has them. Not put together for each store: fields of 16 bits that are
    /// neighbours would be loaded as one, which waits until what was stored last to one of them is in the cache.
    sizes: u64,
    counter: u64,
    links: Box<[Link]>,
    /// The free list without the batch; its end is `size`.
    free: u16,
    /// Whether both free heads of the region are that.
    committed: bool,
    /// The list of the batch: the chain put last, and the one put first. `size`: there is none.
    batch: u16,
    first: u16,
    /// Where the driver looks: as a new position in the header's word, a value that is loaded as it was stored.
    used: u64,
}

fn position_word(position: RingPos) -> u64 {
    u64::from(position.index) | u64::from(position.wrap) << 32
}

fn state_word(link: Link, num: u16) -> u64 {
    1 | u64::from(link.next) << 16 | u64::from(link.last) << 32 | u64::from(num) << 48
}

impl PackedInflight {
    fn new(region: Region, size: u16, used: RingPos, free: u16, links: Vec<Link>, counter: u64) -> Self {
        let (links, used) = (links.into(), position_word(used));
        let sizes = u64::from(VERSION) | u64::from(size) << 16;
        PackedInflight {
            region,
            size,
            sizes,
            counter,
            links,
            free,
            committed: true,
            batch: size,
            first: size,
            used,
        }
    }

    #[inline(always)]
    fn store_free(&self, head: u16, old: u16) {
        let [_, word, ..] = self.region.header();
        word.store(self.sizes | u64::from(head) << 32 | u64::from(old) << 48);
    }

    #[inline(always)]
    fn store_used(&self, used: u64, old: u64) {
        let [_, _, word, _] = self.region.header();
        word.store(used | (old & 0xffff) << 16 | old >> 32 << 40);
    }

    /// Notes a list that was popped; returns its entry.
    #[inline(always)]
    pub(in super::super) fn pop(&mut self, descs: u16, mut desc: impl FnMut(u16) -> Option<Desc>) -> u16 {
        let head = self.free;
        let (mut at, mut last) = (head, head);
        for i in 0..descs {
            // As many entries as the ring has descriptors: there is one.
            let (Some([state, _, second, addr]), Some(link), Some(desc)) =
                (self.region.entry(at), self.links.get(usize::from(at)), desc(i))
            else {
                return self.size;
            };
            addr.store(desc.addr);
            second.store(desc.word().rotate_left(32));
            if i > 0 {
                state.store(u64::from(link.next) << 16);
            }
            (last, at) = (at, link.next);
        }
        if let (Some([state, counter, ..]), Some(link)) =
            (self.region.entry(head), self.links.get_mut(usize::from(head)))
        {
            counter.store(self.counter);
            state.store(state_word(Link { last, ..*link }, descs));
            link.last = last;
        }
        self.counter = self.counter.wrapping_add(1);
        self.free = at;
        self.committed = true;
        self.store_free(at, at);
        head
    }

    /// Puts back what was popped last.
    pub(in super::super) fn unpop(&mut self, entry: u16) {
        if entry < self.size {
            self.link(entry, self.free);
            self.free = entry;
            self.committed = true;
            self.store_free(entry, entry);
        }
    }

    /// Links the end of a chain's list to another list.
    #[inline(always)]
    fn link(&mut self, head: u16, next: u16) {
        let Some(last) = self.links.get(usize::from(head)).map(|link| link.last) else { return };
        let (Some([state, ..]), Some(link)) =
            (self.region.entry(last), self.links.get_mut(usize::from(last)))
        else {
            return;
        };
        link.next = next;
        state.store(if last == head { state_word(*link, 1) } else { u64::from(next) << 16 });
    }

    #[inline(always)]
    pub(in super::super) fn put(&mut self, entry: u16) {
        if entry >= self.size {
            return;
        }
        if self.batch == self.size {
            self.first = entry;
        } else {
            self.link(entry, self.batch);
        }
        self.batch = entry;
    }

    /// The ring's flags are going to be stored next, and the driver finds what is used up to this position.
    #[inline(always)]
    pub(in super::super) fn publishing(&mut self, used: RingPos) {
        if self.batch == self.size {
            return;
        }
        let used = position_word(used);
        self.link(self.first, self.free);
        if !self.committed {
            self.store_free(self.free, self.free);
        }
        self.store_used(used, self.used);
        self.store_free(self.batch, self.free);
        self.committed = false;
        self.free = self.batch;
        self.batch = self.size;
        self.used = used;
    }

    /// The queue is reset: nothing is in flight any more.
    pub(in super::super) fn forget(self) {
        let [_, word, ..] = self.region.header();
        word.store(0);
    }

    pub(in super::super) fn is_lost(&self) -> bool {
        self.region.is_poisoned()
    }
}

/// Whether the entries were seen in a list: each is in one.
struct Seen(Vec<bool>);

impl Seen {
    fn mark(&mut self, entry: u16) -> Result<(), InflightError> {
        match self.0.get_mut(usize::from(entry)) {
            Some(seen) if !*seen => *seen = true,
            _ => return Err(InflightError::Lists),
        }
        Ok(())
    }
}

pub(super) fn recover(
    region: &InflightRegion,
    areas: &Areas,
    size: u16,
    state: &QueueState,
) -> Result<Recovered, QueueError> {
    let region = Region::new(region, size)?;
    let [features, heads, used, _] = region.header();
    let (features, heads, used) = (features.load(), heads.load(), used.load());
    if !check_format(features, field(heads, 0))? {
        check_fresh(state)?;
        return Ok(fresh(region, size, state.used));
    }
    if field(heads, 16) != size {
        return Err(InflightError::QueueSize(field(heads, 16)).into());
    }
    let position = |index: u32, wrap: u32| match (field(used, index), (used >> wrap) & 0xff) {
        (index, wrap @ 0..=1) if index < size => Ok(RingPos { index, wrap: wrap == 1 }),
        _ => Err(InflightError::Value("used position")),
    };
    let (new, old) = (position(0, 32)?, position(16, 40)?);
    let ring = PackedRing::new(&areas.desc);
    let published = old != new && !ring.is(Cursor::available(old));
    let (used, free) = if published { (new, field(heads, 32)) } else { (old, field(heads, 48)) };

    let words: Vec<[u64; 2]> = (0..size)
        .filter_map(|index| region.entry(index).map(|[state, counter, ..]| [state.load(), counter.load()]))
        .collect();
    let mut links: Vec<Link> =
        words.iter().map(|[state, _]| Link { next: field(*state, 16), last: field(*state, 32) }).collect();
    let mut seen = Seen(vec![false; usize::from(size)]);
    let mut at = free;
    while at != size {
        seen.mark(at)?;
        at = links.get(usize::from(at)).map_or(size, |link| link.next);
    }
    let on_free_list = seen.0.clone();
    let mut found = Vec::new();
    let mut descs = 0u32;
    for ((head, [state, counter]), free) in (0..).zip(&words).zip(on_free_list) {
        let inflight = match state & 0xff {
            inflight @ 0..=1 => inflight == 1,
            _ => return Err(InflightError::Value("inflight").into()),
        };
        if !inflight || free {
            continue;
        }
        let (num, mut at, mut last, mut list) = (field(*state, 48), head, head, Vec::new());
        for _ in 0..num {
            seen.mark(at)?;
            let Some([_, _, second, addr]) = region.entry(at) else {
                return Err(InflightError::Lists.into());
            };
            list.push(Desc::new(addr.load(), second.load().rotate_left(32)));
            last = at;
            at = links.get(usize::from(at)).map_or(size, |link| link.next);
        }
        match links.get_mut(usize::from(head)) {
            Some(link) if num > 0 && link.last == last => {}
            _ => return Err(InflightError::Lists.into()),
        }
        descs += u32::from(num);
        found.push((*counter, (head, list)));
    }
    if seen.0.contains(&false) {
        return Err(InflightError::Lists.into());
    }
    // No more than there are entries.
    let descs = descs as u16;
    let counter = |(head, _): &(u16, _), number| {
        if let Some([_, counter, ..]) = region.entry(*head) {
            counter.store(number);
        }
    };
    let (lists, next) = in_order(found, counter)?;
    // Used descriptors behind the first one of a batch that was not published: the driver must not take them for those
    // of the next batch.
    let mut avail = Cursor::available(used);
    for _ in 0..descs {
        ring.make_available(avail);
        ring.step(&mut avail);
    }
    links.shrink_to_fit();
    let tracker = PackedInflight::new(region, size, used, free, links, next);
    tracker.store_free(free, free);
    tracker.store_used(tracker.used, tracker.used);
    Ok(Recovered {
        tracker: Tracker::Packed(tracker),
        state: Some(QueueState { avail: avail.position(), used, held: Vec::new() }),
        again: lists.into_iter().map(|(entry, list)| Pending::Packed(entry, list)).collect(),
    })
}

fn fresh(region: Region, size: u16, used: RingPos) -> Recovered {
    let mut links = Vec::with_capacity(usize::from(size));
    for index in 0..size {
        let link = Link { next: index + 1, last: index };
        if let Some([state, ..]) = region.entry(index) {
            state.store(u64::from(link.next) << 16);
        }
        links.push(link);
    }
    let [features, ..] = region.header();
    features.store(0);
    let tracker = PackedInflight::new(region, size, used, 0, links, 0);
    tracker.store_used(tracker.used, tracker.used);
    tracker.store_free(0, 0);
    Recovered { tracker: Tracker::Packed(tracker), state: None, again: Vec::new() }
}
