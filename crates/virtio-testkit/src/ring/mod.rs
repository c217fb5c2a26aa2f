//! One virtqueue from the driver's side: placing chains, taking used buffers, suppression in both directions - and the
//! checks of what the device owes.
//!
//! Invariants: a chain is *staged* (descriptors written, invisible), *in flight* (the device may use it) or done; what
//! the device must not write (descriptors, indirect tables, device-readable elements, the driver area) is remembered
//! and compared. The two layouts share the small interface `Layout`; everything that holds for both is here.
//!
//! A test that breaks rules takes the raw ring: [`RingDriver::split`], [`RingDriver::packed`].
mod packed;
mod split;

use std::collections::{HashMap, VecDeque};

use vm_memory::GuestAddress;
use vm_virtio::{Features, QueueConfig, QueueState, RingPos};

pub use packed::{PACKED_AVAIL, PACKED_USED, PackedDesc, PackedRing};
pub use split::{SplitDesc, SplitRing};

use crate::violation::expect;
use crate::{TestRam, Violation};

/// `NEXT`, the same in both layouts (2.7.5, 2.8.6).
pub const DESC_NEXT: u16 = 1;
/// `WRITE`, the same in both layouts (2.7.5, 2.8.3).
pub const DESC_WRITE: u16 = 2;
/// `INDIRECT`, the same in both layouts (2.7.5.3, 2.8.7).
pub const DESC_INDIRECT: u16 = 4;

/// The two formats of a virtqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RingLayout {
    /// Descriptor table, available ring, used ring (2.7).
    Split,
    /// One descriptor ring and two event suppression structures (2.8).
    Packed,
}

impl RingLayout {
    /// Both, for tests that run over each.
    pub const ALL: [RingLayout; 2] = [RingLayout::Split, RingLayout::Packed];

    /// The ring features that a current driver of this layout takes when they are offered.
    pub fn features(self) -> Features {
        let both = Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX;
        match self {
            RingLayout::Split => both,
            RingLayout::Packed => both | Features::RING_PACKED,
        }
    }
}

/// One element of a chain: a piece of guest memory and its direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Buf {
    /// Guest address of the first byte.
    pub addr: GuestAddress,
    /// Length in bytes.
    pub len: u32,
    /// Whether the device writes it (else it reads it).
    pub writable: bool,
}

impl Buf {
    /// A device-readable element.
    pub fn readable(addr: GuestAddress, len: u32) -> Buf {
        Buf { addr, len, writable: false }
    }

    /// A device-writable element.
    pub fn writable(addr: GuestAddress, len: u32) -> Buf {
        Buf { addr, len, writable: true }
    }
}

/// How the elements of a chain are described.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A descriptor of the ring for each.
    Direct,
    /// All in one indirect table.
    Indirect,
    /// The first `n` in the ring, the rest in one indirect table: split only (2.7.5.3.2).
    Mixed(usize),
}

/// When the driver wants to be interrupted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Interrupts {
    /// For every used buffer that it has not seen yet. With `EVENT_IDX` the driver moves its event on each time it has
    /// taken everything, as Linux does.
    Always,
    /// Not at all.
    Never,
    /// Once this many further used entries (split) or ring slots (packed) were passed. Without `EVENT_IDX`: always.
    After(u16),
}

/// A used buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// What [`RingDriver::add`] returned.
    pub id: u16,
    /// Bytes written, counted from the start of the device-writable part.
    pub len: u32,
    /// The device wrote no entry for it: it belongs to an `IN_ORDER` batch and counts as used completely (2.7.9).
    pub skipped: bool,
}

/// The ring has no room for a chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no room in the ring")]
pub struct RingFull;

/// One descriptor that a layout places: an element or a reference to an indirect table.
struct Entry {
    addr: u64,
    len: u32,
    flags: u16,
}

/// What a layout tells of a chain that it placed.
#[derive(Clone)]
struct Placed {
    id: u16,
    /// Split: descriptors of the table; packed: the slots, in ring order.
    slots: Vec<u16>,
}

/// What the two formats do differently.
trait Layout {
    fn free_slots(&self) -> usize;
    /// Writes the descriptors of a chain without making it visible.
    fn place(&mut self, entries: &[Entry]) -> Placed;
    /// The bytes of an indirect table with these elements.
    fn table(&self, entries: &[Entry]) -> Vec<u8>;
    /// Makes the staged chains visible, all at once or the first one last.
    fn publish(&mut self);
    /// Whether the device wants a kick for what was published since the last call (2.7.10, 2.8.10).
    fn kick_wanted(&mut self) -> Result<bool, Violation>;
    /// The next used entry, if there is one.
    fn peek_used(&self, in_flight: usize) -> Result<Option<UsedEntry>, Violation>;
    /// Passes a used entry that stood for these chains, the last being the one it named. Returns whether that passed
    /// the driver's event: whether the device owes an interrupt.
    fn pass_used(&mut self, chains: &[Placed]) -> Result<bool, Violation>;
    /// Takes the descriptors of a finished chain back.
    fn release(&mut self, placed: &Placed);
    fn set_interrupts(&mut self, wanted: Interrupts);
    /// Compares everything that only the driver writes. Exact only while the device rests and all used entries have
    /// been taken.
    fn check_untouched(&self) -> Result<(), Violation>;
    /// `VRING_BASE` that makes a device start again at the first buffer that is not used.
    fn first_unused(&self) -> RingPos;
}

struct UsedEntry {
    id: u32,
    len: u32,
    /// Buffers that the device can have completed by now (split: from `used.idx`).
    published: Option<u16>,
}

enum Rings {
    Split(SplitRing),
    Packed(PackedRing),
}

struct InFlight {
    placed: Placed,
    writable: u64,
    /// Where the device must not write, and what is there: device-readable elements and the indirect table.
    constant: Vec<(GuestAddress, Vec<u8>)>,
    table: Option<GuestAddress>,
}

/// The driver's side of one virtqueue.
pub struct RingDriver {
    ram: TestRam,
    size: u16,
    features: Features,
    rings: Rings,
    chains: HashMap<u16, InFlight>,
    /// Ids in flight, in the order in which they were made available; the staged ones at the end.
    order: VecDeque<u16>,
    staged: usize,
    /// Used buffers that the test has not asked for yet: their ids and descriptors stay taken until it does.
    taken: VecDeque<(Used, Placed)>,
    interrupts: Interrupts,
    owed: bool,
}

impl RingDriver {
    /// A fresh ring in `ram`, its parts aligned no better than they have to be. Of `features` those of rings matter:
    /// what was negotiated.
    ///
    /// # Panics
    /// If the layout does not know that size.
    pub fn new(ram: &TestRam, layout: RingLayout, size: u16, features: Features) -> RingDriver {
        let start = RingPos { index: 0, wrap: true };
        RingDriver::start_at(ram, layout, size, features, start)
    }

    /// A ring that has already been used up to `start`: for tests of what happens at the wrap of an index.
    /// [`RingDriver::queue_state`] tells the device.
    pub fn start_at(
        ram: &TestRam,
        layout: RingLayout,
        size: u16,
        features: Features,
        start: RingPos,
    ) -> RingDriver {
        let rings = match layout {
            RingLayout::Split => Rings::Split(SplitRing::new(ram, size, features, start.index)),
            RingLayout::Packed => Rings::Packed(PackedRing::new(ram, size, features, start)),
        };
        let mut driver = RingDriver {
            ram: ram.clone(),
            size,
            features,
            rings,
            chains: HashMap::new(),
            order: VecDeque::new(),
            staged: 0,
            taken: VecDeque::new(),
            interrupts: Interrupts::Always,
            owed: false,
        };
        driver.set_interrupts(Interrupts::Always);
        driver
    }

    /// Forgets everything in flight and starts with zeroed rings at the same addresses: after a reset of the device.
    pub fn restart(&mut self) {
        for (_, chain) in self.chains.drain() {
            if let Some(table) = chain.table {
                self.ram.free(table);
            }
        }
        self.order.clear();
        self.taken.clear();
        self.staged = 0;
        self.owed = false;
        match &mut self.rings {
            Rings::Split(ring) => ring.restart(0),
            Rings::Packed(ring) => ring.restart(RingPos { index: 0, wrap: true }),
        }
        self.set_interrupts(Interrupts::Always);
    }

    /// The format of the ring.
    pub fn layout_of(&self) -> RingLayout {
        match &self.rings {
            Rings::Split(_) => RingLayout::Split,
            Rings::Packed(_) => RingLayout::Packed,
        }
    }

    fn layout(&self) -> &dyn Layout {
        match &self.rings {
            Rings::Split(ring) => ring,
            Rings::Packed(ring) => ring,
        }
    }

    fn layout_mut(&mut self) -> &mut dyn Layout {
        match &mut self.rings {
            Rings::Split(ring) => ring,
            Rings::Packed(ring) => ring,
        }
    }

    /// Size and addresses, as a device gets them.
    pub fn queue_config(&self) -> QueueConfig {
        match &self.rings {
            Rings::Split(ring) => ring.config(),
            Rings::Packed(ring) => ring.config(),
        }
    }

    /// The state in which a device has to start for [`RingDriver::start_at`], or after a crash: everything that is not
    /// used is available again. Meant for devices that use buffers in order.
    pub fn queue_state(&mut self) -> QueueState {
        let at = expect(self.try_position());
        QueueState { avail: at, used: at, held: Vec::new() }
    }

    /// Where a device that uses buffers in order has to go on.
    pub fn try_position(&mut self) -> Result<RingPos, Violation> {
        self.collect()?;
        Ok(self.layout().first_unused())
    }

    /// Number of entries of the ring.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// What was negotiated for the ring.
    pub fn features(&self) -> Features {
        self.features
    }

    /// Raw access to a split ring.
    ///
    /// # Panics
    /// If the ring is packed.
    pub fn split(&mut self) -> &mut SplitRing {
        match &mut self.rings {
            Rings::Split(ring) => ring,
            Rings::Packed(_) => panic!("the ring is packed"),
        }
    }

    /// Raw access to a packed ring.
    ///
    /// # Panics
    /// If the ring is split.
    pub fn packed(&mut self) -> &mut PackedRing {
        match &mut self.rings {
            Rings::Packed(ring) => ring,
            Rings::Split(_) => panic!("the ring is split"),
        }
    }

    /// Descriptors of the ring that are free.
    pub fn free_slots(&self) -> usize {
        self.layout().free_slots()
    }

    /// Chains that the device has not used yet (or whose use was not seen yet).
    pub fn in_flight(&self) -> usize {
        self.order.len() - self.staged
    }

    /// Makes one chain of direct descriptors available. Returns its id, which is unique while it is in flight.
    ///
    /// # Panics
    /// If the ring has no room.
    #[track_caller]
    pub fn add(&mut self, chain: &[Buf]) -> u16 {
        self.add_as(chain, Shape::Direct)
    }

    /// Makes one chain of any shape available.
    ///
    /// # Panics
    /// If the ring has no room.
    #[track_caller]
    pub fn add_as(&mut self, chain: &[Buf], shape: Shape) -> u16 {
        let Ok(id) = self.stage(chain, shape) else { panic!("no room in the ring") };
        self.publish();
        id
    }

    /// Places a chain without making it available; [`RingDriver::publish`] does that for all staged ones.
    ///
    /// # Panics
    /// If the chain breaks a rule for drivers (empty, longer than the ring, readable behind writable, indirect without
    /// the feature): those are broken through raw access.
    pub fn stage(&mut self, chain: &[Buf], shape: Shape) -> Result<u16, RingFull> {
        assert!(
            !chain.is_empty() && chain.len() <= usize::from(self.size),
            "a chain of 1 to queue size elements"
        );
        assert!(
            !chain.windows(2).any(|w| w[0].writable && !w[1].writable),
            "readable elements come first (2.7.4.2)"
        );
        let direct = match shape {
            Shape::Direct => chain.len(),
            Shape::Indirect => 0,
            Shape::Mixed(direct) => direct.min(chain.len()),
        };
        let (direct, indirect) = chain.split_at(direct);
        assert!(
            indirect.is_empty() || self.features.contains(Features::INDIRECT_DESC),
            "INDIRECT_DESC is negotiated"
        );
        let packed = matches!(self.rings, Rings::Packed(_));
        assert!(!packed || direct.is_empty() || indirect.is_empty(), "packed lists are of one kind (2.8.5)");
        if direct.len() + usize::from(!indirect.is_empty()) > self.layout().free_slots() {
            return Err(RingFull);
        }

        let mut constant: Vec<_> =
            chain.iter().filter(|buf| !buf.writable).map(|buf| (buf.addr, self.ram.contents(buf))).collect();
        let mut entries: Vec<_> = direct.iter().map(entry).collect();
        let mut table = None;
        if !indirect.is_empty() {
            let elements: Vec<_> = indirect.iter().map(entry).collect();
            let bytes = self.layout().table(&elements);
            let at = self.ram.alloc(bytes.len() as u64, 16);
            self.ram.write(at, &bytes);
            entries.push(Entry { addr: at.0, len: bytes.len() as u32, flags: DESC_INDIRECT });
            constant.push((at, bytes));
            table = Some(at);
        }
        let placed = self.layout_mut().place(&entries);
        let id = placed.id;
        let writable = chain.iter().filter(|buf| buf.writable).map(|buf| u64::from(buf.len)).sum();
        let known = self.chains.insert(id, InFlight { placed, writable, constant, table });
        assert!(known.is_none(), "ids are unique while in flight");
        self.order.push_back(id);
        self.staged += 1;
        Ok(id)
    }

    /// Makes all staged chains available.
    pub fn publish(&mut self) {
        self.staged = 0;
        self.layout_mut().publish();
    }

    /// Whether the device wants a notification for what was made available since the last call.
    ///
    /// # Panics
    /// With the [`Violation`] if the device's suppression fields are illegal.
    #[track_caller]
    pub fn kick_wanted(&mut self) -> bool {
        expect(self.try_kick_wanted())
    }

    /// As [`RingDriver::kick_wanted`], for tests that expect a violation.
    pub fn try_kick_wanted(&mut self) -> Result<bool, Violation> {
        self.layout_mut().kick_wanted()
    }

    /// Sets `WRITE` on the descriptor that refers to the indirect table of a staged chain, where it means nothing
    /// (2.7.5.3.2, 2.8.7).
    pub(crate) fn mark_table_writable(&mut self, id: u16) {
        let slot = self.chains.get(&id).and_then(|chain| chain.placed.slots.last().copied());
        let Some(slot) = slot else { return };
        match &mut self.rings {
            Rings::Split(ring) => {
                let desc = ring.desc(slot);
                ring.set_desc(slot, SplitDesc { flags: desc.flags | DESC_WRITE, ..desc });
            }
            Rings::Packed(ring) => ring.add_staged_flags(slot, DESC_WRITE),
        }
    }

    /// Id and length of the next used entry that was not taken, whatever they are: nothing is checked or taken.
    pub fn glance(&self) -> Option<(u32, u32)> {
        match &self.rings {
            Rings::Split(ring) => ring.glance(),
            Rings::Packed(ring) => ring.glance(),
        }
    }

    /// The next used buffer, if there is one. When there is none, the driver's event is moved on (see [`Interrupts`]).
    ///
    /// # Panics
    /// With the [`Violation`] if the device broke a rule.
    #[track_caller]
    pub fn used(&mut self) -> Option<Used> {
        expect(self.try_used())
    }

    /// As [`RingDriver::used`], for tests that expect a violation.
    pub fn try_used(&mut self) -> Result<Option<Used>, Violation> {
        if self.taken.is_empty() {
            self.collect()?;
            // After arming look again: the device may have used a buffer in between and not seen the event.
            if self.taken.is_empty() {
                self.arm();
                self.collect()?;
            }
        }
        Ok(self.taken.pop_front().map(|(used, placed)| {
            self.layout_mut().release(&placed);
            used
        }))
    }

    /// All used buffers there are.
    ///
    /// # Panics
    /// With the [`Violation`] if the device broke a rule.
    #[track_caller]
    pub fn drain(&mut self) -> Vec<Used> {
        std::iter::from_fn(|| self.used()).collect()
    }

    /// Says when interrupts are wanted, from the next used buffer on.
    pub fn set_interrupts(&mut self, wanted: Interrupts) {
        expect(self.try_set_interrupts(wanted));
    }

    /// As [`RingDriver::set_interrupts`], for tests that expect a violation.
    pub fn try_set_interrupts(&mut self, wanted: Interrupts) -> Result<(), Violation> {
        self.collect()?;
        self.interrupts = wanted;
        self.layout_mut().set_interrupts(wanted);
        Ok(())
    }

    pub(crate) fn interrupts_wanted(&self) -> Interrupts {
        self.interrupts
    }

    fn arm(&mut self) {
        if self.interrupts == Interrupts::Always {
            self.layout_mut().set_interrupts(Interrupts::Always);
        }
    }

    /// Whether the used buffers since the last call passed the driver's event, so that the device owes an interrupt.
    /// Exact if the device did not run at the same time.
    ///
    /// # Panics
    /// With the [`Violation`] if the device broke a rule.
    #[track_caller]
    pub fn interrupt_owed(&mut self) -> bool {
        expect(self.try_interrupt_owed())
    }

    /// As [`RingDriver::interrupt_owed`], for tests that expect a violation.
    pub fn try_interrupt_owed(&mut self) -> Result<bool, Violation> {
        self.collect()?;
        Ok(std::mem::take(&mut self.owed))
    }

    /// Checks that the device changed nothing that only the driver writes: descriptors, the driver area, indirect
    /// tables, device-readable elements, the bytes behind every allocation. Call it while the device rests.
    pub fn check_untouched(&mut self) -> Result<(), Violation> {
        self.collect()?;
        self.layout().check_untouched()?;
        for chain in self.chains.values() {
            self.check_constant(chain)?;
        }
        self.ram.check_guards()
    }

    fn check_constant(&self, chain: &InFlight) -> Result<(), Violation> {
        for (addr, expected) in &chain.constant {
            let mut now = vec![0; expected.len()];
            self.ram.read(*addr, &mut now);
            if now != *expected {
                return Err(Violation::new(
                    "a device writes neither device-readable buffers nor indirect tables (2.7.5.1, 2.8.15)",
                    format!("{} bytes at {:#x} changed", expected.len(), addr.0),
                ));
            }
        }
        Ok(())
    }

    /// Takes every used entry that is there out of the ring, checked.
    fn collect(&mut self) -> Result<(), Violation> {
        while let Some(entry) = self.layout().peek_used(self.in_flight())? {
            self.complete(&entry)?;
        }
        Ok(())
    }

    fn complete(&mut self, entry: &UsedEntry) -> Result<(), Violation> {
        let known = u16::try_from(entry.id).ok().filter(|id| self.chains.contains_key(id));
        let Some(id) = known else {
            return Err(Violation::new(
                "a used id is one that is in flight, and is used once (2.7.8, 2.8.6)",
                format!("id {} with len {}", entry.id, entry.len),
            ));
        };
        let visible = self.in_flight();
        let Some(at) = self.order.iter().take(visible).position(|other| *other == id) else {
            return Err(Violation::new(
                "a device uses only what was made available (2.7.13.3, 2.8.15)",
                format!("id {id} is used before it was published"),
            ));
        };
        // With IN_ORDER an entry stands for everything up to the buffer that it names (2.7.9, 2.8.8).
        let batch: Vec<u16> = if self.features.contains(Features::IN_ORDER) {
            self.order.drain(..=at).collect()
        } else {
            self.order.remove(at).into_iter().collect()
        };
        if entry.published.is_some_and(|published| usize::from(published) < batch.len()) {
            return Err(Violation::new(
                "used.idx advances by the size of an IN_ORDER batch, in the order of availability (2.7.9)",
                format!("id {id} ends a batch of {}, used.idx says {:?}", batch.len(), entry.published),
            ));
        }
        let chains: Vec<InFlight> = batch.iter().filter_map(|id| self.chains.remove(id)).collect();
        let placed: Vec<Placed> = chains.iter().map(|chain| chain.placed.clone()).collect();
        self.owed |= self.layout_mut().pass_used(&placed)?;
        for chain in chains {
            self.check_constant(&chain)?;
            if let Some(table) = chain.table {
                self.ram.free(table);
            }
            let skipped = chain.placed.id != id;
            let full = u32::try_from(chain.writable).unwrap_or(u32::MAX);
            let len = if skipped { full } else { entry.len };
            if u64::from(len) > chain.writable {
                return Err(Violation::new(
                    "len counts bytes that were written to the device-writable part (2.7.8.2, 2.8.4)",
                    format!("id {id}: len {len} of {} writable bytes", chain.writable),
                ));
            }
            self.taken.push_back((Used { id: chain.placed.id, len, skipped }, chain.placed));
        }
        Ok(())
    }
}

fn entry(buf: &Buf) -> Entry {
    Entry { addr: buf.addr.0, len: buf.len, flags: if buf.writable { DESC_WRITE } else { 0 } }
}
