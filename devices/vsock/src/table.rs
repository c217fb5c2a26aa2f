//! All connections of a guest: by id, by address tuple, by turn and by deadline.
//!
//! An [`Id`] is never used again (index and generation), so whatever still names a connection that is gone names none.
//! Each connection is in the line of those with something for the guest at most once, and has one deadline at most.
use std::collections::{BTreeSet, HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::time::Instant;

use crate::backlog::Backlog;
use crate::flow::{Flow, Key, Phase};
use crate::packet::Kind;

/// Connections of one guest, at most: those that wait for their CONNECT line are among them.
pub const MAX_CONNECTIONS: usize = 16384;

/// What may be promised to a guest for all of its connections together before each gets the least only: memory of the
/// daemon if no client on the host reads.
const PROMISES: u64 = 64 << 20;
/// The least that is promised to a connection.
const LEAST_PROMISE: u32 = 4096;

/// No connection has it: the poller's numbers have 63 bits.
pub(crate) const NO_GENERATION: u32 = u32::MAX >> 1;

/// Names a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Id {
    index: u32,
    generation: u32,
}

impl Id {
    /// As a number, for the poller.
    pub(crate) fn number(self) -> u64 {
        u64::from(self.generation) << 32 | u64::from(self.index)
    }

    pub(crate) fn of(number: u64) -> Id {
        Id { index: number as u32, generation: (number >> 32) as u32 }
    }
}

/// What a connection's socket is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Stage {
    /// The client has not said CONNECT yet.
    Greeting,
    /// The listener on the host is busy; another try later. Until then there is no socket.
    Redial {
        /// When to give up.
        until: Instant,
    },
    /// connect(2) is under way.
    Dialing,
    /// Another guest has to accept: it sends one byte.
    Sibling,
    /// It is connected.
    Live,
}

/// What the host's side gets to hear when the guest has accepted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Welcome {
    Nothing,
    /// `OK <port>`
    Line,
    /// One byte, for another guest.
    Byte,
}

/// What was read for the guest and is not in its buffers yet: a message that did not fit into one of them, or what a client
/// sent right behind its CONNECT line (until that is complete: what there is of it).
pub(crate) struct Inbox {
    pub(crate) bytes: Vec<u8>,
    pub(crate) sent: usize,
    pub(crate) eor: bool,
}

/// A connection.
pub(crate) struct Slot {
    pub(crate) flow: Flow,
    pub(crate) stage: Stage,
    pub(crate) welcome: Welcome,
    pub(crate) socket: Option<OwnedFd>,
    /// The socket may have something to read, as far as is known: it tells once (edge-triggered).
    pub(crate) readable: bool,
    /// It may have room.
    pub(crate) writable: bool,
    /// The poller tells of room.
    pub(crate) room_watched: bool,
    /// Its peer sends nothing more: read on until the end.
    pub(crate) ended: bool,
    /// Its peer is gone.
    pub(crate) hung_up: bool,
    /// Its peer was shown the end of what the guest sends.
    pub(crate) output_ended: bool,
    pub(crate) backlog: Backlog,
    pub(crate) inbox: Option<Inbox>,
    /// How many of the guest's buffers one read may fill: grows while they are filled.
    pub(crate) burst: u8,
    key: Option<Key>,
    queued: bool,
    deadline: Option<Instant>,
}

impl Slot {
    pub(crate) fn new(flow: Flow, stage: Stage, socket: Option<OwnedFd>) -> Slot {
        Slot {
            flow,
            stage,
            welcome: Welcome::Nothing,
            socket,
            readable: false,
            writable: true,
            room_watched: false,
            ended: false,
            hung_up: false,
            output_ended: false,
            backlog: Backlog::default(),
            inbox: None,
            burst: 1,
            key: None,
            queued: false,
            deadline: None,
        }
    }

    /// The tuple under which the guest knows it.
    pub(crate) fn key(&self) -> Option<Key> {
        self.key
    }

    /// It is waited for.
    pub(crate) fn has_deadline(&self) -> bool {
        self.deadline.is_some()
    }

    /// There may be something for the guest.
    pub(crate) fn has_input(&self) -> bool {
        self.stage == Stage::Live && (self.inbox.is_some() || self.readable && self.socket.is_some())
    }

    /// There is something for the host's side that can be sent.
    pub(crate) fn has_output(&self) -> bool {
        match self.flow.kind() {
            Kind::Stream => !self.backlog.is_empty(),
            Kind::SeqPacket => self.backlog.message().is_some(),
        }
    }

    /// Whether payload of the guest can go to the socket right away.
    pub(crate) fn is_direct(&self) -> bool {
        self.writable && self.socket.is_some() && self.backlog.is_empty() && self.stage == Stage::Live
    }
}

#[derive(Default)]
struct Entry {
    generation: u32,
    slot: Option<Box<Slot>>,
}

/// See the [module](self).
#[derive(Default)]
pub(crate) struct Table {
    entries: Vec<Entry>,
    free: Vec<u32>,
    used: usize,
    by_key: HashMap<Key, Id>,
    line: VecDeque<Id>,
    deadlines: BTreeSet<(Instant, Id)>,
    promised: u64,
}

impl Table {
    pub(crate) fn len(&self) -> usize {
        self.used
    }

    /// What a new connection can be promised, of `wanted`. The more there are, the less it is.
    pub(crate) fn promise(&self, wanted: u32) -> u32 {
        let share = PROMISES.saturating_sub(self.promised) / 8;
        wanted.min(u32::try_from(share).unwrap_or(u32::MAX)).max(LEAST_PROMISE.min(wanted))
    }

    /// None if there are too many.
    pub(crate) fn insert(&mut self, slot: Slot) -> Option<Id> {
        if self.used >= MAX_CONNECTIONS {
            return None;
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None => {
                self.entries.push(Entry::default());
                u32::try_from(self.entries.len() - 1).ok()?
            }
        };
        let entry = self.entries.get_mut(index as usize)?;
        self.used += 1;
        self.promised += u64::from(slot.flow.buf_alloc());
        entry.slot = Some(Box::new(slot));
        Some(Id { index, generation: entry.generation })
    }

    pub(crate) fn get(&mut self, id: Id) -> Option<&mut Slot> {
        let entry = self.entries.get_mut(id.index as usize)?;
        entry.slot.as_deref_mut().filter(|_| entry.generation == id.generation)
    }

    pub(crate) fn find(&self, key: Key) -> Option<Id> {
        self.by_key.get(&key).copied()
    }

    /// The guest gets to know it under this tuple, which must not be taken.
    pub(crate) fn name(&mut self, id: Id, key: Key) {
        if let Some(slot) = self.get(id) {
            slot.key = Some(key);
            self.by_key.insert(key, id);
        }
    }

    /// The guest knows it no more.
    pub(crate) fn unname(&mut self, id: Id) {
        if let Some(key) = self.get(id).and_then(|slot| slot.key.take()) {
            self.by_key.remove(&key);
        }
    }

    /// Forgets it and closes its socket.
    pub(crate) fn remove(&mut self, id: Id) {
        self.unname(id);
        self.set_deadline(id, None);
        let Some(entry) = self.entries.get_mut(id.index as usize) else { return };
        if entry.generation != id.generation {
            return;
        }
        let Some(slot) = entry.slot.take() else { return };
        self.used -= 1;
        self.promised -= u64::from(slot.flow.buf_alloc());
        // One whose generations are used up is retired: no id comes back.
        if let Some(generation) = entry.generation.checked_add(1).filter(|next| *next < NO_GENERATION) {
            entry.generation = generation;
            self.free.push(id.index);
        }
    }

    /// Another promise for a connection, before the guest hears of it.
    pub(crate) fn set_flow(&mut self, id: Id, flow: Flow) {
        let new = u64::from(flow.buf_alloc());
        if let Some(slot) = self.get(id) {
            let old = u64::from(std::mem::replace(&mut slot.flow, flow).buf_alloc());
            self.promised = self.promised + new - old;
        }
    }

    /// It has something for the guest: it gets its turn.
    pub(crate) fn activate(&mut self, id: Id) {
        if let Some(slot) = self.get(id)
            && !std::mem::replace(&mut slot.queued, true)
        {
            self.line.push_back(id);
        }
    }

    /// Whose turn it is.
    pub(crate) fn next(&mut self) -> Option<Id> {
        while let Some(id) = self.line.pop_front() {
            if let Some(slot) = self.get(id) {
                slot.queued = false;
                return Some(id);
            }
        }
        None
    }

    /// It could not have its turn: it is first next time.
    pub(crate) fn put_back(&mut self, id: Id) {
        if let Some(slot) = self.get(id)
            && !std::mem::replace(&mut slot.queued, true)
        {
            self.line.push_front(id);
        }
    }

    /// In place of an earlier deadline.
    pub(crate) fn set_deadline(&mut self, id: Id, at: Option<Instant>) {
        let Some(slot) = self.get(id) else { return };
        let old = std::mem::replace(&mut slot.deadline, at);
        if let Some(old) = old {
            self.deadlines.remove(&(old, id));
        }
        if let Some(at) = at {
            self.deadlines.insert((at, id));
        }
    }

    pub(crate) fn first_deadline(&self) -> Option<Instant> {
        self.deadlines.first().map(|(at, _)| *at)
    }

    /// One whose deadline has passed; it has none any more.
    pub(crate) fn due(&mut self, now: Instant) -> Option<Id> {
        let (at, id) = *self.deadlines.first()?;
        if at > now {
            return None;
        }
        self.set_deadline(id, None);
        Some(id)
    }

    /// Forgets all, and closes their sockets. Ids stay unique.
    pub(crate) fn clear(&mut self) {
        let ids: Vec<Id> = (0..)
            .zip(&self.entries)
            .filter(|(_, entry)| entry.slot.is_some())
            .map(|(index, entry)| Id { index, generation: entry.generation })
            .collect();
        ids.into_iter().for_each(|id| self.remove(id));
        self.line.clear();
    }

    /// Gives a connection that is over a last look: it goes when the guest knows that and nothing is left to send.
    pub(crate) fn retire(&mut self, id: Id) {
        let Some(slot) = self.get(id) else { return };
        if slot.flow.phase() != Phase::Over || slot.flow.owed().is_some() {
            return;
        }
        if slot.socket.is_none() || !slot.has_output() {
            self.remove(id);
        } else {
            self.unname(id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn slot() -> Slot {
        Slot::new(Flow::asking(Kind::Stream, 4096), Stage::Live, None)
    }

    #[test]
    fn an_id_never_names_another_connection() {
        let mut table = Table::default();
        let first = table.insert(slot()).unwrap();
        table.activate(first);
        table.set_deadline(first, Some(Instant::now()));
        table.remove(first);
        let second = table.insert(slot()).unwrap();
        assert_eq!(first.index, second.index);
        assert!(table.get(first).is_none() && table.get(second).is_some());
        assert_eq!((table.next(), table.due(Instant::now())), (None, None));
        table.remove(first);
        assert_eq!(table.len(), 1);
        assert_eq!(Id::of(second.number()), second);
    }

    #[test]
    fn everyone_gets_a_turn_and_is_in_line_once() {
        let mut table = Table::default();
        let ids: Vec<Id> = (0..3).map(|_| table.insert(slot()).unwrap()).collect();
        ids.iter().chain(&ids).for_each(|id| table.activate(*id));
        assert_eq!(table.next(), Some(ids[0]));
        table.put_back(ids[0]);
        assert_eq!((table.next(), table.next()), (Some(ids[0]), Some(ids[1])));
        table.activate(ids[0]);
        assert_eq!((table.next(), table.next(), table.next()), (Some(ids[2]), Some(ids[0]), None));
    }

    #[test]
    fn deadlines_in_their_order_and_replaced() {
        let mut table = Table::default();
        let now = Instant::now();
        let (a, b) = (table.insert(slot()).unwrap(), table.insert(slot()).unwrap());
        table.set_deadline(a, Some(now + Duration::from_secs(2)));
        table.set_deadline(b, Some(now + Duration::from_secs(1)));
        table.set_deadline(a, Some(now));
        assert_eq!(table.first_deadline(), Some(now));
        assert_eq!((table.due(now), table.due(now)), (Some(a), None));
        assert_eq!(table.due(now + Duration::from_secs(3)), Some(b));
        assert_eq!(table.first_deadline(), None);
    }

    #[test]
    fn policy_8_what_is_promised_to_a_guest_is_bounded() {
        let mut table = Table::default();
        let mut sum = 0;
        for _ in 0..MAX_CONNECTIONS {
            let promise = table.promise(256 << 10);
            sum += u64::from(promise);
            let flow = Flow::asking(Kind::Stream, promise);
            table.insert(Slot::new(flow, Stage::Live, None)).unwrap();
        }
        assert!(sum <= PROMISES + MAX_CONNECTIONS as u64 * u64::from(LEAST_PROMISE), "{sum}");
        assert!(table.insert(slot()).is_none());
        assert_eq!(table.promised, sum);
        table.clear();
        assert_eq!((table.len(), table.promised), (0, 0));
        assert_eq!(table.promise(100), 100, "no more than is wanted");
    }

    #[test]
    fn a_quiet_connection_takes_little_memory() {
        let size = size_of::<Slot>() + size_of::<Entry>() + 2 * size_of::<(Key, Id)>() + size_of::<Id>();
        assert!(size < 512, "{size}");
    }
}
