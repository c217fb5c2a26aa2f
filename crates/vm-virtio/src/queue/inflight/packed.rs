//! The region of a packed queue.
//!
//! Four things follow each other: the header; for each descriptor of the ring a state, a word each; for each what was in the
//! ring before the batch was, a word each; as many places for descriptors that are saved.
//!
//! | word | header | place |
//! |---|---|---|
//! | 0 | features: 0 | of a list's first: its state |
//! | 1 | version, desc_num (16 each), padding | of a list's first: its position |
//! | 2, 3 | two used positions | 2: the next place, of a list's first also their number (16 each) |
//! | 3, 4 | | id, flags and length; address |
//!
//! States are not in entries of 16 bytes, as descriptors are: region and ring both begin pages, so that the state of a list
//! would have the low address bits of a descriptor that is read soon after, and by those alone a processor guesses which of
//! the stores under way a load has to wait for.
//!
//! Positions are numbers of 64 bits: laps, and the place in the ring.
//!
//! The ring itself tells what is in flight, as long as lists are used in the order in which they were popped: what is
//! available from the used position on. So nothing is stored for a list that is popped, nor for one that is used when
//! its turn comes: a successor begins at the used position, and pops it there. Three things are done where the ring does not tell
//! enough:
//! * A used descriptor that is not the first of its batch is in the ring before it is published. What it is written over
//!   is kept in the region, and a successor writes it back.
//! * A list that is used before an older one is *done*: the states of all its descriptors become the used position. That is
//!   not larger than the position of the list, and not one lap below its end; so a state of a former lap is not taken for one of this
//!   lap. Until the used position that the driver has seen is above it, the list still is in flight.
//! * Such a list is written where older ones have their descriptors, and the driver may write there when it has seen that. So
//!   an older one is saved: its descriptors are copied to places of the region. From then on its state is there: [`OUT`], or
//!   the used position that it was done at. In the ring, the states of its descriptors become [`MOVED`], with their positions.
//!
//! * Pop: nothing.
//! * Put, in order: keeps the ring's word, if it is not the first of the batch.
//! * Put of a list that is not the oldest, or was saved: saves what it overtakes - descriptors, position, state, in this order, then
//!   the states in the ring, from the last descriptor to the first: in between both say the same, as both have the
//!   position. Then its own states, from the last one as well: it counts where it begins.
//! * Publish: the used position behind the batch, over the older of the two; then the ring's flags, at which the driver takes
//!   the batch. A successor finds two positions, and looks at the ring at the older one: still as the driver made it available,
//!   then the batch was not published; else it was. So nothing has to be stored after the ring.
//!
//! A successor walks from the used position to the last state of this lap. What it meets there is done, moved, or a list in
//! flight, which it saves; so it needs no more than this to do them in their order, whatever is written to the ring meanwhile.
//! All that it walked over has moved then, so that states of the killed process mean nothing any more. It goes on behind.
use std::collections::HashSet;

use super::super::NEXT;
use super::super::arena::{Arena, Slot};
use super::super::config::Areas;
use super::super::error::QueueError;
use super::super::ring_mem::{Cursor, Desc, FOREIGN, PackedRing};
use super::super::state::{QueueState, RingPos};
use super::again::Pending;
use super::table::{Table, Word, field};
use super::{
    InflightError, InflightRegion, LIMIT, NEVER, OUT, Recovered, Tracker, check_format, check_fresh,
    in_order, sizes,
};

/// The version of this format.
pub(super) const VERSION: u16 = 4;

type States = Table<4, 1>;
type Kept = Table<0, 1>;
type Places = Table<0, 5>;

/// Of what a chain has noted as its place: it is one for saved lists, not one in the ring. No ring has as many.
const SAVED: u16 = 1 << 15;
/// Of a state in the ring, with the descriptor's position: its list was saved.
const MOVED: u64 = 1 << 63;
/// No slot has this number.
const NOBODY: u32 = u32::MAX;

pub(in super::super) struct PackedInflight {
    states: States,
    kept: Kept,
    /// Where the next used descriptor goes.
    used: u64,
    /// Which of the used positions is the older one.
    second: bool,
    /// By place in the ring: the arena's slot of the list that begins there, if it is out and was not saved. Empty as long
    /// as lists are used in the order in which they were popped: then nobody asks.
    out: Box<[u32]>,
    size: u16,
    saved: Saved,
}

/// The lists that were saved.
struct Saved {
    places: Places,
    /// Behind each place the next one of its list, or the next free one.
    next: Box<[u16]>,
    free: u16,
    /// First place and length of those in the batch.
    batch: Vec<(u16, u16)>,
}

impl Saved {
    /// Copies a list. Returns its first place; none if there is no room, which there is for all that a ring has.
    fn add(&mut self, position: u64, descs: &[Desc]) -> Option<u16> {
        let first = self.free;
        let mut at = first;
        for desc in descs {
            let ([_, _, link, word, addr], next) = (self.places.entry(at)?, *self.next.get(usize::from(at))?);
            word.store(desc.word());
            addr.store(desc.addr);
            let count = if at == first { descs.len() as u64 } else { 0 };
            link.store(u64::from(next) | count << 16);
            at = next;
        }
        let [state, place, ..] = self.places.entry(first)?;
        place.store(position);
        state.store(OUT);
        self.free = at;
        Some(first)
    }

    fn state(&self, first: u16) -> Option<&Word> {
        self.places.entry(first).map(|[state, ..]| state)
    }

    /// The places of a list are free again.
    fn remove(&mut self, first: u16, count: u16) {
        let mut last = first;
        for _ in 1..count {
            last = self.next.get(usize::from(last)).copied().unwrap_or(last);
        }
        if let Some(next) = self.next.get_mut(usize::from(last)) {
            *next = self.free;
            self.free = first;
        }
    }
}

impl PackedInflight {
    fn new(states: States, kept: Kept, places: Places, size: u16, used: u64) -> PackedInflight {
        let saved = Saved {
            places,
            next: (1..=size).collect(),
            free: 0,
            batch: Vec::with_capacity(usize::from(size)),
        };
        PackedInflight { states, kept, used, second: false, out: Box::default(), size, saved }
    }

    /// Notes the list that begins at this place of the ring.
    #[inline(always)]
    pub(in super::super) fn pop(&mut self, arena: &Arena, slot: &Slot, place: u16) {
        slot.set_entry(place);
        if let Some(out) = self.out.get_mut(usize::from(place)) {
            *out = arena.index_of(slot);
        }
    }

    /// From here on it is known which lists are out: before the first one leaves their order.
    #[cold]
    #[inline(never)]
    pub(in super::super) fn know(&mut self, arena: &Arena) {
        if !self.out.is_empty() {
            return;
        }
        self.out = vec![NOBODY; usize::from(self.size)].into();
        for slot in arena.taken() {
            if let Some(out) = self.out.get_mut(usize::from(slot.entry())) {
                *out = arena.index_of(slot);
            }
        }
    }

    /// A list that is in the ring is not out any more.
    #[inline(always)]
    pub(in super::super) fn leave(&mut self, slot: &Slot) {
        if let Some(out) = self.out.get_mut(usize::from(slot.entry())) {
            *out = NOBODY;
        }
    }

    /// Sets the states of a list's descriptors, the first one last.
    fn set_states(&self, first: u16, descs: u16, state: impl Fn(u64) -> u64) {
        for next in (0..descs).rev() {
            let place = (u32::from(first) + u32::from(next)) % u32::from(self.size.max(1));
            if let Some([word]) = self.states.entry(place as u16) {
                word.store(state(u64::from(next)));
            }
        }
    }

    /// A used descriptor that is not published yet is going to be written there.
    pub(in super::super) fn keep(&self, ring: &PackedRing, at: Cursor) {
        if let (Some([kept]), Some(word)) = (self.kept.entry(at.index()), ring.word(at)) {
            kept.store(word);
        }
    }

    /// The list is done, if this place of the ring, where its used descriptor goes, is that of the list itself; else
    /// nothing is done. `keep`: as [`Self::keep`].
    #[inline(always)]
    pub(in super::super) fn put_in_order(&mut self, slot: &Slot, keep: Option<u64>, place: u16) -> bool {
        if slot.entry() != place {
            return false;
        }
        if let (Some(word), Some([kept])) = (keep, self.kept.entry(place)) {
            kept.store(word);
        }
        self.used = self.used.wrapping_add(u64::from(slot.descs()));
        self.leave(slot);
        true
    }

    /// The list is done; its used descriptor goes to the next place.
    pub(in super::super) fn put(&mut self, arena: &Arena, slot: &Slot, ring: &PackedRing) {
        if !self.put_in_order(slot, None, self.place(0)) {
            self.put_elsewhere(arena, slot, ring);
            self.used = self.used.wrapping_add(u64::from(slot.descs()));
        }
    }

    /// The place in the ring of the used position, or so many behind.
    fn place(&self, behind: u64) -> u16 {
        let size = u64::from(self.size.max(1));
        (self.used.wrapping_add(behind) % size) as u16
    }

    /// The list was saved, or is used before an older one.
    fn put_elsewhere(&mut self, arena: &Arena, slot: &Slot, ring: &PackedRing) {
        self.know(arena);
        for behind in 0..u64::from(slot.descs()) {
            let place = self.place(behind);
            let out = self.out.get(usize::from(place));
            let other = out.and_then(|out| arena.at(*out)).filter(|other| other.entry() == place);
            if let Some(other) = other
                && place != slot.entry()
            {
                self.save(other, ring, place, self.used.wrapping_add(behind));
            }
        }
        let (entry, used) = (slot.entry(), self.used);
        if entry & SAVED == 0 {
            self.leave(slot);
            return self.set_states(entry, slot.descs(), |_| used);
        }
        let first = entry & !SAVED;
        if let Some(state) = self.saved.state(first) {
            state.store(used);
        }
        self.saved.batch.push((first, slot.descs()));
    }

    /// Saves a list that is at this place and position.
    fn save(&mut self, slot: &Slot, ring: &PackedRing, place: u16, position: u64) {
        let behind = position.wrapping_sub(self.used);
        let descs: Vec<Desc> = (0..u64::from(slot.descs()))
            .filter_map(|next| ring.raw(self.place(behind.wrapping_add(next))))
            .collect();
        let Some(first) = self.saved.add(position, &descs) else { return };
        self.set_states(place, slot.descs(), |next| MOVED | position.wrapping_add(next));
        self.leave(slot);
        slot.set_entry(SAVED | first);
    }

    /// The ring's flags are going to be stored next.
    #[inline(always)]
    pub(in super::super) fn publishing(&mut self) {
        let [_, _, first, second] = self.states.header();
        (if self.second { second } else { first }).store(self.used);
        self.second = !self.second;
    }

    /// Whether there are saved lists in the batch.
    #[inline(always)]
    pub(in super::super) fn has_saved(&self) -> bool {
        !self.saved.batch.is_empty()
    }

    /// The batch was published: the places of its lists are free.
    pub(in super::super) fn free_batch(&mut self) {
        while let Some((first, count)) = self.saved.batch.pop() {
            self.saved.remove(first, count);
        }
    }

    /// The queue is reset: nothing is in flight any more.
    pub(in super::super) fn forget(self) {
        let [_, word, ..] = self.states.header();
        word.store(0);
    }

    pub(in super::super) fn is_lost(&self) -> bool {
        self.states.is_poisoned()
    }
}

/// Where a position is in the ring. Laps that are even have the wrap counter 1.
fn ring_pos(position: u64, size: u16) -> RingPos {
    let size = u64::from(size).max(1);
    RingPos { index: (position % size) as u16, wrap: (position / size).is_multiple_of(2) }
}

/// A list in flight, and its first place if it is saved.
type List = (Option<u16>, Vec<Desc>);

/// What is in flight, by position.
struct Lists {
    found: Vec<(u64, List)>,
    /// By place: whether a list is there, and what comes behind it there.
    taken: Vec<bool>,
    next: Box<[u16]>,
    /// Descriptors of all of them.
    descs: usize,
}

impl Lists {
    fn add(&mut self, position: u64, list: List) -> Result<(), InflightError> {
        self.descs += list.1.len();
        self.found.push((position, list));
        // They were all in the ring.
        if self.descs > self.taken.len() { Err(InflightError::Lists) } else { Ok(()) }
    }

    /// The lists that were saved.
    fn saved(places: &Places, size: u16, used: u64) -> Result<Lists, InflightError> {
        let len = usize::from(size);
        let mut lists =
            Lists { found: Vec::new(), taken: vec![false; len], next: vec![0; len].into(), descs: 0 };
        for first in 0..size {
            let Some([state, position, link, ..]) = places.entry(first) else { break };
            if !in_flight(state.load(), used)? {
                continue;
            }
            let (position, count) = (position.load(), field(link.load(), 16));
            if position >= used.saturating_add(u64::from(size)) || count == 0 {
                return Err(InflightError::Value("saved list"));
            }
            let (mut at, mut list) = (first, Vec::new());
            for _ in 0..count {
                let Some([_, _, link, word, addr]) = places.entry(at) else {
                    return Err(InflightError::Lists);
                };
                let link = field(link.load(), 0);
                match (lists.taken.get_mut(usize::from(at)), lists.next.get_mut(usize::from(at))) {
                    (Some(taken), Some(next)) if !*taken => (*taken, *next) = (true, link),
                    _ => return Err(InflightError::Lists),
                }
                list.push(Desc::new(addr.load(), word.load()));
                at = link;
            }
            lists.add(position, (Some(first), list))?;
        }
        Ok(lists)
    }

    /// Adds those that are in the ring only: in front of its last mark, and of the last one that was saved. How far that is.
    fn add_lap(&mut self, lap: &[Found], used: u64) -> Result<usize, InflightError> {
        let saved: HashSet<u64> = self.found.iter().map(|(position, _)| *position).collect();
        let marked = lap.iter().rposition(|found| found.mark != Mark::None).map_or(0, |last| last + 1);
        let latest = saved.iter().max().and_then(|position| position.checked_sub(used));
        let end = latest.map_or(marked, |latest| marked.max(latest as usize + 1));
        let mut at = 0;
        while at < end {
            let rest = lap.get(at..).unwrap_or_default();
            if rest.first().is_some_and(|found| found.mark == Mark::Elsewhere) {
                at += 1;
                continue;
            }
            let available = rest.iter().map_while(|found| found.desc);
            let last = available.clone().position(|desc| desc.packed_flags() & NEXT == 0);
            let list: Vec<Desc> = available.take(last.ok_or(InflightError::Lists)? + 1).collect();
            let position = used + at as u64;
            at += list.len();
            // In both places: killed while it was saved.
            if !saved.contains(&position) {
                self.add(position, (None, list))?;
            }
        }
        Ok(at)
    }
}

/// A descriptor of the ring as a successor finds it.
struct Found {
    at: Cursor,
    /// As the driver made it available, if it did.
    desc: Option<Desc>,
    /// There is a used descriptor, which was not published.
    overwritten: bool,
    mark: Mark,
}

/// What the state of a descriptor says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mark {
    /// Nothing.
    None,
    /// It was used, which the driver has not seen.
    Here,
    /// Its list was saved, or the driver has seen it used.
    Elsewhere,
}

impl Mark {
    fn new(state: u64, position: u64, used: u64, size: u16) -> Result<Mark, InflightError> {
        match state {
            state if state == MOVED | position => Ok(Mark::Elsewhere),
            state if state & !MOVED >= LIMIT => Err(InflightError::Value("state")),
            // Of a former lap.
            state if state & MOVED != 0 || state + u64::from(size) <= position => Ok(Mark::None),
            state if state < used => Ok(Mark::Elsewhere),
            _ => Ok(Mark::Here),
        }
    }
}

/// Whether a saved list in this state is in flight.
fn in_flight(state: u64, used: u64) -> Result<bool, InflightError> {
    match state {
        OUT => Ok(true),
        LIMIT.. => Err(InflightError::Value("state")),
        done => Ok(done >= used),
    }
}

pub(super) fn recover(
    region: &InflightRegion,
    areas: &Areas,
    size: u16,
    state: &QueueState,
) -> Result<Recovered, QueueError> {
    let states = States::new(region, 0, size)?;
    let kept = Kept::new(region, 4 + usize::from(size), size)?;
    let places = Places::new(region, 4 + 2 * usize::from(size), size)?;
    let [features, word, first, second] = states.header();
    let (features, word) = (features.load(), word.load());
    if !check_format(VERSION, features, field(word, 0))? {
        check_fresh(state)?;
        return Ok(fresh(states, kept, places, size, state.used));
    }
    if field(word, 16) != size {
        return Err(InflightError::QueueSize(field(word, 16)).into());
    }
    let (first_used, second_used) = (first.load(), second.load());
    let (old, new) = (first_used.min(second_used), first_used.max(second_used));
    if old == NEVER || new >= LIMIT || new - old > u64::from(size) {
        return Err(InflightError::Value("used position").into());
    }
    let ring = PackedRing::new(&areas.desc);
    let published = old != new && !ring.is(Cursor::available(ring_pos(old, size)));
    let used = if published { new } else { old };

    let mut lists = Lists::saved(&places, size, used)?;
    let mut lap = Vec::with_capacity(usize::from(size));
    let mut at = Cursor::available(ring_pos(used, size));
    for position in used..used + u64::from(size) {
        let index = at.index();
        let (Some([state]), Some([word])) = (states.entry(index), kept.entry(index)) else { break };
        let overwritten = ring.is_overwritten(at);
        let desc = if overwritten {
            ring.raw(index).map(|desc| Desc::new(desc.addr, word.load()))
        } else {
            ring.read(at).filter(|desc| desc.packed_flags() & FOREIGN == 0)
        };
        lap.push(Found { at, desc, overwritten, mark: Mark::new(state.load(), position, used, size)? });
        ring.step(&mut at);
    }
    let avail = used + lists.add_lap(&lap, used)? as u64;
    // What was used has made room for as many as were made available.
    if avail - used != lists.descs as u64 {
        return Err(InflightError::Lists.into());
    }
    in_order(&mut lists.found)?;

    let mut tracker = PackedInflight::new(states, kept, places, size, used);
    let saved = &mut tracker.saved;
    (saved.next, saved.free) = (lists.next, size);
    for ((place, next), taken) in (0..).zip(&mut saved.next).zip(lists.taken) {
        if !taken {
            (*next, saved.free) = (saved.free, place);
        }
    }
    let mut again = Vec::with_capacity(lists.found.len());
    for (position, (first, list)) in lists.found {
        let first = match first {
            Some(first) => {
                // Done, perhaps, but not published: no position that comes now may make it so.
                if let Some(state) = saved.state(first) {
                    state.store(OUT);
                }
                first
            }
            None => saved.add(position, &list).ok_or(InflightError::Lists)?,
        };
        again.push(Pending::Packed(SAVED | first, list));
    }
    for position in (used..avail).rev() {
        if let Some([state]) = tracker.states.entry(ring_pos(position, size).index) {
            state.store(MOVED | position);
        }
    }
    for found in lap {
        if let (true, Some(desc)) = (found.overwritten, found.desc) {
            ring.make_available(found.at, desc);
        }
    }
    let [_, _, first, second] = tracker.states.header();
    for (place, was) in [(first, first_used), (second, second_used)] {
        if was != used {
            place.store(used);
        }
    }
    let (avail, used) = (ring_pos(avail, size), ring_pos(used, size));
    Ok(Recovered {
        tracker: Tracker::Packed(tracker),
        state: Some(QueueState { avail, used, held: Vec::new() }),
        again,
    })
}

fn fresh(states: States, kept: Kept, places: Places, size: u16, used: RingPos) -> Recovered {
    // Above all that [`NEVER`] is compared with.
    let lap = if used.wrap { 2 } else { 3 };
    let position = lap * u64::from(size) + u64::from(used.index);
    for index in 0..size {
        if let (Some([state]), Some([saved, ..])) = (states.entry(index), places.entry(index)) {
            state.store(NEVER);
            saved.store(NEVER);
        }
    }
    let [features, word, first, second] = states.header();
    features.store(0);
    first.store(position);
    second.store(position);
    word.store(sizes(VERSION, size));
    let tracker = PackedInflight::new(states, kept, places, size, position);
    Recovered { tracker: Tracker::Packed(tracker), state: None, again: Vec::new() }
}
