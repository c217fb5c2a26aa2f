//! Virtqueues (virtio 1.4, sections 2.6 to 2.8): split and packed behind one type.
//!
//! A [`QueueConfig`] may change; [`Queue::new`] makes a [`Queue`] of it, whose addresses and size do not. The lane
//! runtime opens, arms, publishes and budgets; a device pops chains, reads and writes them, and completes them.
//!
//! What holds:
//! * Nothing that the driver writes is believed: each index, length and address is checked where it is used, and each
//!   descriptor is read once. The first violation is latched as a fault: nothing is popped any more, chains that are
//!   out can still be completed (failure policy: a ring violation stops its queue and nothing else).
//! * Not popping does not mean not completing: a closed, faulted or budgeted queue takes completions.
//! * Nothing is allocated and no lock is taken per request; rings are resolved to pointers once.
//!
//! | file | what for |
//! |---|---|
//! | `split.rs`, `packed.rs` | the two layouts: positions, pop, used, notifications |
//! | `ring_mem.rs` | ring accessors: the unsafe part of both |
//! | `gather.rs`, `indirect.rs` | one chain while it is popped |
//! | `arena/`, `segment_pool.rs`, `chain.rs` | popped chains and their handles |
//! | `in_order.rs` | completions that are held back |
//! | `inflight/` | which chains are out, for the successor of a process that is killed |
//! | `stores.rs` | what is stored there and in rings, so that tests can let the process die in between |
//! | `iommu.rs` | translations that are missing |
//! | `log.rs` | what is marked in the log of dirty pages |
//! | `rw.rs` | reading and writing a chain's bytes |
//! | `config.rs`, `state.rs`, `restore.rs`, `error.rs` | what a queue is made of, and why not |
//! | `counters.rs` | what happened on it |
mod arena;
mod chain;
mod config;
mod counters;
mod error;
mod gather;
mod in_order;
mod indirect;
mod inflight;
mod iommu;
mod log;
mod packed;
mod restore;
mod ring_mem;
mod rw;
mod segment_pool;
mod split;
mod state;
mod stores;

#[cfg(test)]
mod tests;

use crate::Features;
use crate::memory::{GuestRam, Segment};
use arena::{Arena, Mark};
use in_order::{InOrder, Run};
use inflight::Tracker;
use inflight::again::Again;
use inflight::split::SplitInflight;
use iommu::Missing;
use log::QueueLog;
use packed::Packed;
use split::Split;
use std::cell::Cell;

pub use chain::{Chain, ChainId};
pub use config::{MAX_QUEUE_SIZE, QueueConfig};
pub use counters::QueueCounters;
pub use error::{Miss, QueueArea, QueueError};
pub use inflight::{InflightError, InflightRegion};
pub use rw::{Reader, ShortChain, Writer};
pub use state::{HeldChain, QueueState, RingPos};

/// `VIRTQ_DESC_F_NEXT` (2.7.5, 2.8.6).
const NEXT: u16 = 1;
/// `VIRTQ_DESC_F_WRITE` (2.7.5, 2.8.3).
const WRITE: u16 = 2;
/// `VIRTQ_DESC_F_INDIRECT` (2.7.5, 2.8.7).
const INDIRECT: u16 = 4;

/// Most bytes of a chain (2.7.5.2).
pub const MAX_CHAIN_BYTES: u64 = 1 << 32;

/// A number of popped chains that is never reached.
const NEVER: u64 = u64::MAX;

/// What of the negotiated features the rings go by.
#[derive(Clone, Copy)]
struct Negotiated {
    indirect: bool,
    event_idx: bool,
}

enum Ring {
    Split(Split),
    Packed(Packed),
}

/// What there is to do beside the ring, when chains are popped, completed and published.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Nothing.
    Short,
    /// In-flight tracking, which the rings do.
    Tracked,
    /// Completions have an order, there is a log, or the ring is missing.
    Long,
}

/// Why a chain is not just popped: there is no need for it, or it breaks a rule.
#[derive(Clone, Copy)]
enum Why {
    /// As many were popped as may be.
    Limit,
    /// There is none.
    Empty,
    /// There is no free slot.
    Slot,
    /// The available index, by the next one.
    Index(u16, u16),
    /// The head.
    Head(u16),
    /// What comes next in a chain.
    Next(u16),
}

/// A virtqueue.
pub struct Queue {
    /// How many chains may have been popped by the short way: 0 as long as some are to be popped again, else `allowed`.
    limit: u64,
    /// How many chains may have been popped: 0 if the queue is closed or faulted.
    allowed: u64,
    ring: Ring,
    arena: Arena,
    in_order: Option<Box<InOrder>>,
    log: Option<Box<QueueLog>>,
    again: Option<Box<Again>>,
    /// It goes on where another process ended.
    follows: bool,
    /// It did not begin at the beginning.
    goes_on: bool,
    missing: Missing,
    way: Way,
    size: u16,
    closed: bool,
    /// Dropped chains are not given back any more.
    given_up: bool,
    budget: u32,
    fault: Option<QueueError>,
    /// How many chains had been popped when the ring was seen empty in this turn; [`NEVER`]: it was not.
    drained: Cell<u64>,
    /// All but popped and completed chains, which the arena counts: from here on.
    counters: QueueCounters,
    counted_from: (u64, u64),
    config: QueueConfig,
    /// Chains of the state that the queue began with, not yet adopted.
    unclaimed: Vec<Chain>,
}

impl Queue {
    /// For the lane runtime: who is woken when a chain is dropped, so that it is given back.
    pub(crate) fn set_waker(&self, waker: reactor::Waker) {
        self.arena.set_waker(waker);
    }

    /// Makes a queue: resolves its areas in guest memory and checks size, alignment and state. `features` are those
    /// that were negotiated. Without a state it starts as after a reset: index 0, wrap counter 1.
    ///
    /// The state may come from anywhere: it is checked as far as it can be, so that a wrong one is an error or does
    /// harm to its own guest only. Chains it held are to be [adopted](Self::adopt).
    pub fn new(
        config: QueueConfig,
        ram: &GuestRam,
        features: Features,
        state: Option<QueueState>,
    ) -> Result<Queue, QueueError> {
        Queue::tracked(config, ram, features, state, None)
    }

    /// The same, with what is in flight kept in a region. If that is a region of a queue whose process was killed, the
    /// chains that it had are popped again, in the same order, before any other; where the queue goes on is then told
    /// by region and ring, and `state` does not matter.
    pub fn tracked(
        config: QueueConfig,
        ram: &GuestRam,
        features: Features,
        state: Option<QueueState>,
        region: Option<&InflightRegion>,
    ) -> Result<Queue, QueueError> {
        let packed = features.contains(Features::RING_PACKED);
        let negotiated = Negotiated {
            indirect: features.contains(Features::INDIRECT_DESC),
            event_idx: features.contains(Features::EVENT_IDX),
        };
        let areas = config.resolve(ram, packed)?;
        let mut state = state.unwrap_or_default();
        let (mut tracker, mut again, mut follows) = (None, None, false);
        if let Some(region) = region {
            let recovered = inflight::recover(region, &areas, config.size, packed, &state)?;
            tracker = Some(recovered.tracker);
            again = (!recovered.again.is_empty()).then(|| Box::new(Again::new(recovered.again)));
            follows = recovered.state.is_some();
            state = recovered.state.unwrap_or(state);
        }
        let goes_on = follows || state != QueueState::new();
        let mut ring = if packed {
            Ring::Packed(Packed::new(&config, &areas, negotiated, &state)?)
        } else {
            Ring::Split(Split::new(&config, &areas, negotiated, &state)?)
        };
        match (tracker, &mut ring) {
            (Some(Tracker::Split(tracker)), Ring::Split(ring)) => ring.inflight = Some(tracker),
            (Some(Tracker::Packed(tracker)), Ring::Packed(ring)) => ring.inflight = Some(Box::new(tracker)),
            _ => {}
        }
        let in_order = features.contains(Features::IN_ORDER).then(|| Box::new(InOrder::new(config.size)));
        let mut queue = Queue {
            limit: 0,
            allowed: 0,
            ring,
            arena: Arena::new(config.size, ram.clone()),
            again,
            follows,
            goes_on,
            way: Way::Short,
            in_order,
            log: None,
            missing: Missing::default(),
            size: config.size,
            closed: false,
            given_up: false,
            budget: u32::MAX,
            fault: None,
            drained: Cell::new(NEVER),
            counters: QueueCounters::default(),
            counted_from: (0, 0),
            config,
            unclaimed: Vec::new(),
        };
        queue.restore_held(state.held)?;
        queue.counted_from = (queue.arena.popped(), queue.arena.ended());
        queue.set_budget(u32::MAX);
        queue.choose_way();
        Ok(queue)
    }

    /// Takes the next buffer that the driver made available. `None` if there is none, the queue is closed, faulted
    /// (now or before), out of budget, or waits for [a translation](Self::miss).
    // Part of the caller, as are a completion and a publication: what calls save and restore is a sixth of what a short
    // chain costs. What is not usual is called.
    #[inline(always)]
    pub fn pop(&mut self) -> Option<Chain> {
        match &self.ring {
            Ring::Split(_) => self.pop_split(),
            Ring::Packed(_) => self.pop_packed(),
        }
    }

    /// The rest of [`Self::pop`]: no chain was read. One function for all reasons, which may well return one, so that it can
    /// be called at the end.
    #[cold]
    #[inline(never)]
    fn pop_otherwise(&mut self, why: Why) -> Option<Chain> {
        match why {
            Why::Limit => self.pop_again(),
            Why::Empty => {
                self.drained.set(self.arena.popped());
                None
            }
            Why::Slot => self.pop_more(),
            Why::Index(idx, next) => self.stumbled(QueueError::AvailIndex { idx, next }),
            Why::Head(head) => self.stumbled(QueueError::Head(head)),
            Why::Next(next) => self.stumbled(QueueError::Next(next)),
        }
    }

    /// Pops if there is a slot to be had.
    fn pop_more(&mut self) -> Option<Chain> {
        let available = match &self.ring {
            Ring::Split(ring) => ring.has_available(),
            Ring::Packed(ring) => ring.has_available(),
        };
        if !available {
            return self.pop_otherwise(Why::Empty);
        }
        match self.arena.make().map(|slot| slot.is_some()) {
            Ok(true) => self.pop_new(),
            Ok(false) => self.pop_otherwise(Why::Empty),
            Err(error) => self.stumbled(error),
        }
    }

    /// [`Self::pop`] where its speed does not matter.
    #[inline(never)]
    fn pop_new(&mut self) -> Option<Chain> {
        self.pop()
    }

    /// What there is to pop breaks a rule, or misses a translation.
    #[cold]
    #[inline(never)]
    fn stumbled(&mut self, error: QueueError) -> Option<Chain> {
        self.stumble(error);
        None
    }

    /// Notes a chain that was popped where there is more than the ring.
    #[inline(never)]
    fn popped(&mut self, chain: Chain) -> Option<Chain> {
        if let (Some(slot), Some(in_order)) = (self.arena.slot(&chain), &mut self.in_order) {
            in_order.push(self.arena.index_of(slot));
        }
        Some(chain)
    }

    /// Pops until there is nothing more, or the budget is spent.
    pub fn iter(&mut self) -> impl Iterator<Item = Chain> {
        std::iter::from_fn(|| self.pop())
    }

    /// Gives a buffer back to the driver. `written` is how many bytes of its device-writable part were written, from
    /// its start on; all of them must have been (2.7.8.2). The driver sees it when the batch is
    /// [published](Self::publish).
    ///
    /// A chain of another queue is refused: it is counted here, and goes back to its own queue as if dropped.
    #[inline(always)]
    pub fn add_used(&mut self, chain: Chain, written: u32) {
        // Before anything else is stored, so that who pops and completes in one go does not wait for what it just wrote.
        let (id, descs) = self.arena.slot(&chain).map_or((0, 0), |slot| (slot.id(), slot.descs()));
        let slot = match self.arena.end(chain) {
            Ok(slot) => slot,
            Err(foreign) => return Self::refuse(&mut self.counters, foreign),
        };
        let way = self.way;
        if way == Way::Long || !self.arena.is_usual(slot) || written > slot.writable_len() {
            let slot = self.arena.index_of(slot);
            return self.add_used_slowly(slot, written);
        }
        self.counters.bytes_written += u64::from(written);
        // First, so that nothing is left to be done behind what the ring calls.
        self.arena.release_usual(slot);
        match (&mut self.ring, way) {
            (Ring::Split(ring), Way::Short) => ring.put_run(id, written, 1),
            (Ring::Packed(ring), Way::Short) => ring.put_run(id, written, descs),
            (Ring::Split(ring), _) => {
                std::hint::cold_path();
                ring.put(slot, written);
            }
            (Ring::Packed(ring), _) => {
                std::hint::cold_path();
                ring.put(&self.arena, slot, written);
            }
        }
    }

    /// Gives a chain up without a used entry: the queue is being reset, and the driver takes its buffers back itself.
    pub fn discard(&mut self, chain: Chain) {
        let slot = match self.arena.end(chain) {
            Ok(slot) => slot,
            Err(foreign) => return Self::refuse(&mut self.counters, foreign),
        };
        let slot = self.arena.index_of(slot);
        self.give_up_slot(slot);
    }

    /// The queue is being reset: chains that the device just drops from here on are given up as well, instead of going
    /// back to the driver (2.4.1).
    pub fn give_up(&mut self) {
        self.given_up = true;
        self.again = None;
        self.choose_limit();
        match &mut self.ring {
            Ring::Split(ring) => drop(ring.inflight.take().map(SplitInflight::forget)),
            Ring::Packed(ring) => drop(ring.inflight.take().map(|inflight| inflight.forget())),
        }
        self.choose_way();
    }

    fn give_up_slot(&mut self, slot: u32) {
        self.counters.discarded += 1;
        self.log_chain(slot);
        if let Ring::Packed(ring) = &mut self.ring {
            ring.leaves(&self.arena);
        }
        if self.in_order.is_none() {
            self.release(slot);
        } else if let Some(slot) = self.arena.at(slot) {
            // Keeps its place: what comes behind it must not be used before it.
            slot.hold(Mark::Discarded, 0);
        }
    }

    /// Puts the chain that was popped last back, to be popped again; any other one comes back as the error.
    pub fn unpop(&mut self, chain: Chain) -> Result<(), Chain> {
        let slot = self.arena.end_latest(chain)?;
        let number = self.arena.popped() + 1;
        if !self.again.as_mut().is_some_and(|again| again.put_back(number)) {
            match &mut self.ring {
                Ring::Split(ring) => ring.unpop(slot.id()),
                Ring::Packed(ring) => ring.unpop(slot),
            }
        }
        let slot = self.arena.index_of(slot);
        if let Some(in_order) = &mut self.in_order {
            in_order.order.pop_back();
        }
        self.release(slot);
        self.drained.set(NEVER);
        self.choose_limit();
        Ok(())
    }

    /// Hands out a chain that the state had as held; each once.
    pub fn adopt(&mut self, id: ChainId) -> Option<Chain> {
        let at = self.unclaimed.iter().position(|chain| self.id(chain) == Some(id))?;
        Some(self.unclaimed.swap_remove(at))
    }

    /// Chains of the state that nobody adopted.
    pub fn unclaimed(&self) -> usize {
        self.unclaimed.len()
    }

    /// Drops the chains that nobody adopted: they go back to the driver with length 0.
    pub fn drop_unclaimed(&mut self) {
        self.unclaimed.clear();
    }

    /// What identifies the chain in a [`QueueState`]; `None` if it is another queue's.
    pub fn id(&self, chain: &Chain) -> Option<ChainId> {
        self.arena.slot(chain).map(|slot| ChainId(slot.id()))
    }

    /// The violation that stopped the queue.
    pub fn fault(&self) -> Option<&QueueError> {
        self.fault.as_ref()
    }

    /// The device-readable segments; none if the chain is another queue's.
    #[inline]
    pub fn readable(&self, chain: &Chain) -> &[Segment] {
        self.arena.slot(chain).map_or(&[], |slot| slot.segments().0)
    }

    /// The device-writable segments; none if the chain is another queue's.
    #[inline]
    pub fn writable(&self, chain: &Chain) -> &[Segment] {
        self.arena.slot(chain).map_or(&[], |slot| slot.segments().1)
    }

    /// Reads the device-readable part.
    #[inline]
    pub fn reader<'a>(&'a self, chain: &'a Chain) -> Reader<'a> {
        Reader::new(self.readable(chain))
    }

    /// Writes the device-writable part.
    #[inline]
    pub fn writer<'a>(&'a self, chain: &'a Chain) -> Writer<'a> {
        Writer::new(self.writable(chain))
    }

    /// Reads the one and writes the other part.
    #[inline]
    pub fn split<'a>(&'a self, chain: &'a Chain) -> (Reader<'a>, Writer<'a>) {
        (self.reader(chain), self.writer(chain))
    }

    /// For the lane runtime: makes the completions since the last time visible to the driver, at once. Returns whether
    /// the driver wants an interrupt for them. Takes back dropped chains, too.
    #[inline(always)]
    pub fn publish(&mut self) -> bool {
        let wanted = match (&mut self.ring, self.way) {
            (Ring::Packed(ring), Way::Short) => ring.publish_batch(),
            (Ring::Packed(ring), Way::Tracked) => {
                std::hint::cold_path();
                ring.publish()
            }
            (Ring::Split(ring), Way::Short | Way::Tracked) => ring.publish(),
            (_, Way::Long) => {
                std::hint::cold_path();
                return self.publish_slowly();
            }
        };
        // Last, as it is rare: nothing is between the last completion and its publication then.
        if self.arena.has_dropped() {
            std::hint::cold_path();
            return self.publish_slowly() | wanted;
        }
        wanted
    }

    #[inline(never)]
    fn publish_slowly(&mut self) -> bool {
        if self.arena.has_dropped() {
            self.sweep();
        }
        if !self.has_ring() {
            return false;
        }
        if let Some(run) = self.in_order.as_mut().and_then(|in_order| in_order.flush()) {
            self.put_run(run);
        }
        if self.log.is_none() {
            return self.publish_ring();
        }
        let before = self.positions().1;
        let wanted = self.publish_ring();
        if self.positions().1 != before {
            self.log_rings();
        }
        wanted
    }

    #[inline(always)]
    fn publish_ring(&mut self) -> bool {
        match &mut self.ring {
            Ring::Split(ring) => ring.publish(),
            Ring::Packed(ring) => ring.publish(),
        }
    }

    fn choose_way(&mut self) {
        let tracks = match &self.ring {
            Ring::Split(ring) => ring.inflight.is_some(),
            Ring::Packed(ring) => ring.inflight.is_some(),
        };
        let long = self.in_order.is_some() || self.log.is_some() || !self.has_ring();
        self.way = match long {
            true => Way::Long,
            false if tracks => Way::Tracked,
            false => Way::Short,
        };
    }

    /// For the lane runtime, before it sleeps: asks the driver for a kick at the next buffer and looks once more.
    /// Returns whether there is something to pop: then a kick may not come. Asks for none, and has nothing, while
    /// closed or faulted.
    pub fn arm(&mut self) -> bool {
        if self.stalled() {
            self.disarm();
            return false;
        }
        let more = match &mut self.ring {
            Ring::Split(ring) => ring.arm(),
            Ring::Packed(ring) => ring.arm(),
        } | self.resubmits();
        if self.way == Way::Long {
            self.log_rings();
        }
        more
    }

    /// For the lane runtime, while it looks by itself: asks the driver for no kicks. It may send some all the same.
    #[inline]
    pub fn disarm(&mut self) {
        if !self.has_ring() {
            return;
        }
        match &mut self.ring {
            Ring::Split(ring) => ring.disarm(),
            Ring::Packed(ring) => ring.disarm(),
        }
        if self.way == Way::Long {
            self.log_rings();
        }
    }

    /// Whether the driver has made something available and the queue is neither closed nor faulted; the budget does
    /// not matter. Cheap: for spinning.
    #[inline]
    pub fn has_available(&self) -> bool {
        if self.stalled() {
            return false;
        }
        let available = match &self.ring {
            Ring::Split(ring) => ring.has_available(),
            Ring::Packed(ring) => ring.has_available(),
        } || self.resubmits();
        if !available {
            self.drained.set(self.arena.popped());
        }
        available
    }

    /// How many chains may be popped from now on, until this is set again; `u32::MAX`: any number.
    pub fn set_budget(&mut self, chains: u32) {
        self.budget = chains;
        self.drained.set(NEVER);
        self.allowed = match chains {
            _ if self.stalled() => 0,
            u32::MAX => u64::MAX,
            _ => self.arena.popped() + u64::from(chains),
        };
        self.choose_limit();
    }

    fn choose_limit(&mut self) {
        self.limit = if self.resubmits() { 0 } else { self.allowed };
    }

    /// Whether the budget is what keeps [`Self::pop`] from popping.
    pub fn budget_spent(&self) -> bool {
        !self.stalled() && self.arena.popped() >= self.allowed
    }

    /// Whether nothing is popped, whatever the driver and the budget say.
    fn stalled(&self) -> bool {
        self.closed || self.fault.is_some() || self.missing.miss.is_some()
    }

    /// Pops nothing any more; takes completions.
    pub fn close(&mut self) {
        self.closed = true;
        self.allowed = 0;
        self.limit = 0;
    }

    /// Ends [`Self::close`], with a budget as it was set last.
    pub fn open(&mut self) {
        self.closed = false;
        self.set_budget(self.budget);
    }

    /// Whether the queue is closed.
    pub fn is_closed(&self) -> bool {
        self.closed
    }

    /// Whether the ring was seen empty, by [`Self::pop`] or [`Self::has_available`], since the budget was last set and
    /// since the last successful pop: it is not the device that left something.
    pub fn drained(&self) -> bool {
        self.drained.get() == self.arena.popped()
    }

    /// Chains that are out: neither completed, discarded, put back nor dropped. Takes back those that were dropped, so
    /// that there may be something to [publish](Self::publish).
    pub fn outstanding(&mut self) -> usize {
        if self.arena.has_dropped() {
            self.sweep();
        }
        self.arena.out()
    }

    /// Moves to another snapshot of guest memory; chains that are out stay with theirs. Publish first:
    /// used entries lie in the memory of the time when they were added. If the rings are not in it,
    /// the queue keeps the one it has and is faulted, or waits if they are [missing](Self::miss).
    pub fn set_ram(&mut self, ram: &GuestRam) -> Result<(), QueueError> {
        if self.arena.ram().same_as(ram) && self.missing.miss.is_none() {
            return Ok(());
        }
        self.move_rings(ram)?;
        self.arena.set_ram(ram.clone());
        self.renew_log();
        self.end_miss();
        Ok(())
    }

    /// For the lane runtime, once a turn: whether the guest's memory, and the log of it, is still there. If not, the queue is
    /// faulted.
    /// Memory of former snapshots does not matter: what a front-end has taken away it may also truncate.
    #[inline]
    pub fn check_memory(&mut self) -> bool {
        if !self.arena.ram().is_poisoned() && !self.log_is_lost() && !self.inflight_is_lost() {
            return true;
        }
        self.latch(QueueError::Poisoned);
        false
    }

    /// How many former snapshots are kept for chains that are out.
    pub fn old_snapshots(&self) -> usize {
        self.arena.old_snapshots()
    }

    /// For the lane runtime: whether the queue goes on where another one ended, as its in-flight region told: that one's last
    /// interrupt may be missing.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Whether the queue began where one before it had ended, as its state or its in-flight region told. A device that knows
    /// nothing of its driver then has a predecessor that did. Of a state alone this is sure in one direction only: a ring
    /// comes by its beginning again.
    pub fn goes_on(&self) -> bool {
        self.goes_on
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The snapshot of guest memory that it uses.
    pub(crate) fn ram(&self) -> &GuestRam {
        self.arena.ram()
    }

    /// Whether the ring is packed.
    pub fn is_packed(&self) -> bool {
        matches!(self.ring, Ring::Packed(_))
    }

    /// Where the queue is.
    pub fn config(&self) -> &QueueConfig {
        &self.config
    }

    /// The device used so many bytes of device-readable parts. Its own to say: to look at each chain's length at its
    /// completion would cost every device a tenth of the time of the ring.
    pub fn note_read(&mut self, bytes: u64) {
        self.counters.bytes_read = self.counters.bytes_read.saturating_add(bytes);
    }

    /// The device answers a request that makes no sense (failure policy 2).
    pub fn note_refused(&mut self) {
        self.counters.refused += 1;
    }

    /// The device answers a request that its backend failed (failure policy 3).
    pub fn note_failed(&mut self) {
        self.counters.failed += 1;
    }

    /// As [`Self::outstanding`], with those that were dropped and not taken back yet.
    pub(crate) fn out(&self) -> u64 {
        self.arena.out() as u64
    }

    /// What happened so far.
    pub fn counters(&self) -> QueueCounters {
        let (popped, ended) = self.counted_from;
        let mut counters = self.counters;
        counters.popped = self.arena.popped() - popped;
        counters.completed = self.arena.ended() - ended - counters.discarded;
        counters
    }

    /// Nothing was popped, for this reason.
    fn stumble(&mut self, error: QueueError) {
        match error {
            QueueError::Miss(miss) => self.misses(miss),
            error => self.latch(error),
        }
    }

    /// Latches the first violation.
    #[cold]
    #[inline(never)]
    fn latch(&mut self, error: QueueError) {
        self.fault.get_or_insert(error);
        self.allowed = 0;
        self.limit = 0;
    }

    #[cold]
    fn refuse(counters: &mut QueueCounters, foreign: Chain) {
        counters.foreign += 1;
        drop(foreign);
    }

    /// The rest of [`Self::add_used`].
    #[inline(never)]
    fn add_used_slowly(&mut self, slot: u32, told: u32) {
        let Some(at) = self.arena.at(slot) else { return };
        let written = told.min(at.writable_len());
        if written != told {
            self.counters.clamped += 1;
        }
        self.counters.bytes_written += u64::from(written);
        self.complete_slowly(slot, written);
    }

    /// Completes the chain of a slot whose handle has ended.
    #[inline(never)]
    fn complete_slowly(&mut self, slot: u32, written: u32) {
        self.log_chain(slot);
        if self.withhold(slot, written) {
            return;
        }
        if self.in_order.is_none() {
            let Some(at) = self.arena.at(slot) else { return };
            match &mut self.ring {
                Ring::Split(ring) => ring.put(at, written),
                Ring::Packed(ring) => ring.put(&self.arena, at, written),
            }
            self.release(slot);
            return;
        }
        if let Some(at) = self.arena.at(slot) {
            at.hold(Mark::Done, written);
        }
        self.put_ordered();
    }

    /// IN_ORDER: from the oldest chain on, all that are done.
    fn put_ordered(&mut self) {
        while self.has_ring()
            && let Some(in_order) = &mut self.in_order
            && let Some(&first) = in_order.order.front()
            && let Some(at) = self.arena.at(first)
            && at.mark() == Mark::Done
        {
            in_order.order.pop_front();
            let filled = at.written() == at.writable_len();
            let run = in_order.used(at.id(), at.written(), at.descs(), filled);
            at.hold(Mark::Out, 0);
            match &mut self.ring {
                Ring::Split(ring) => ring.note_used(at),
                Ring::Packed(ring) => ring.note_used(&self.arena, at),
            }
            if let Some(run) = run {
                self.put_run(run);
            }
            self.release(first);
        }
    }

    /// Whether the in-flight region lost its file.
    fn inflight_is_lost(&self) -> bool {
        match &self.ring {
            Ring::Split(ring) => ring.inflight.as_ref().is_some_and(SplitInflight::is_lost),
            Ring::Packed(ring) => ring.inflight.as_ref().is_some_and(|inflight| inflight.is_lost()),
        }
    }

    fn put_run(&mut self, run: Run) {
        match &mut self.ring {
            Ring::Split(ring) => ring.put_run(run.id, run.written, run.chains),
            Ring::Packed(ring) => ring.put_kept(run.id, run.written, run.descs),
        }
    }

    /// Frees a slot whose handle has ended, and lets its snapshot go if it was the last one of it.
    fn release(&mut self, slot: u32) {
        let Some(at) = self.arena.at(slot) else { return };
        let old = self.arena.is_old(at);
        self.arena.release(at);
        if old {
            self.arena.leave_epoch(slot);
        }
    }

    /// Gives back what the device dropped.
    #[cold]
    #[inline(never)]
    fn sweep(&mut self) {
        let mut next = self.arena.take_dropped();
        while let Some(slot) = next {
            let Some(at) = self.arena.at(slot) else { return };
            next = self.arena.next_dropped(at);
            if self.given_up {
                self.give_up_slot(slot);
                continue;
            }
            self.counters.swept += 1;
            self.complete_slowly(slot, 0);
        }
    }
}

impl std::fmt::Debug for Queue {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (avail, used) = self.positions();
        f.debug_struct("Queue")
            .field("config", &self.config)
            .field("packed", &self.is_packed())
            .field("avail", &avail)
            .field("used", &used)
            .field("outstanding", &self.arena.out())
            .field("fault", &self.fault)
            .finish_non_exhaustive()
    }
}
