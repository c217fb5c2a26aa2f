//! The hostile driver: every rule of the rings that a driver can break, one at a time ([`Breakage`]) or at random
//! ([`Havoc`]).
//!
//! Everything is written through the ring's raw access; the driver's own books no longer fit the ring afterwards, so that
//! only a reset ([`RingDriver::restart`]) makes it usable again. Addresses point at memory that the device was given, or at
//! [`TestRam::forbidden`], which it was not; never at memory of this process.
use vm_virtio::{Features, GuestAddress};

use crate::ring::{
    DESC_INDIRECT, DESC_NEXT, DESC_WRITE, PackedDesc, PackedRing, RingDriver, RingLayout, SplitDesc,
};
use crate::{Buf, TestRam};

/// A rule that a driver breaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Breakage {
    /// The available index is further ahead than the ring has entries (2.7.13.3).
    AvailIndexTooFar,
    /// The available ring names a descriptor that does not exist (2.7.6).
    HeadOutOfRange,
    /// A descriptor goes on with one that does not exist (2.7.5).
    NextOutOfRange,
    /// A list that never ends (2.7.5.2, 2.8.6).
    Loop,
    /// A list goes on with a descriptor that is not available (2.8.6).
    ListNotAvailable,
    /// A device-readable element behind a device-writable one (2.7.4.2, 2.8.17).
    ReadableAfterWritable,
    /// An element in memory that the device was not given.
    Unmapped,
    /// An element whose end is beyond the last address.
    AddressWraps,
    /// An element that begins in memory and ends beyond it.
    BeyondRegion,
    /// An indirect descriptor, without the feature (2.7.5.3.1, 2.8.19).
    IndirectNotNegotiated,
    /// An indirect descriptor within an indirect table (2.7.5.3.1).
    IndirectNested,
    /// An indirect descriptor with a next one (2.7.5.3.1, 2.8.19).
    IndirectWithNext,
    /// The length of an indirect table is no multiple of 16 (2.7.5.3, 2.8.7).
    IndirectOddLength,
    /// An indirect table of no length (2.7.5.3, 2.8.7).
    IndirectEmpty,
    /// An indirect table in memory that the device was not given.
    IndirectUnmapped,
    /// More elements in an indirect table than the queue has entries (2.7.5.3.1, 2.8.19).
    IndirectTooLong,
    /// An element of an indirect table goes on beyond it (2.7.5.3).
    IndirectNextOutOfRange,
    /// The elements of an indirect table go round in a circle (2.7.5.3).
    IndirectLoop,
}

impl Breakage {
    /// All of them.
    pub const ALL: [Breakage; 18] = [
        Breakage::AvailIndexTooFar,
        Breakage::HeadOutOfRange,
        Breakage::NextOutOfRange,
        Breakage::Loop,
        Breakage::ListNotAvailable,
        Breakage::ReadableAfterWritable,
        Breakage::Unmapped,
        Breakage::AddressWraps,
        Breakage::BeyondRegion,
        Breakage::IndirectNotNegotiated,
        Breakage::IndirectNested,
        Breakage::IndirectWithNext,
        Breakage::IndirectOddLength,
        Breakage::IndirectEmpty,
        Breakage::IndirectUnmapped,
        Breakage::IndirectTooLong,
        Breakage::IndirectNextOutOfRange,
        Breakage::IndirectLoop,
    ];

    /// The layout that the rule is about; none: both.
    pub fn layout(self) -> Option<RingLayout> {
        use Breakage as B;
        match self {
            B::AvailIndexTooFar
            | B::HeadOutOfRange
            | B::NextOutOfRange
            // In packed tables the only flag is WRITE (2.8.7).
            | B::IndirectNested
            | B::IndirectNextOutOfRange
            | B::IndirectLoop => Some(RingLayout::Split),
            B::ListNotAvailable => Some(RingLayout::Packed),
            _ => None,
        }
    }

    /// Whether the rule is about indirect tables that were negotiated.
    pub fn needs_indirect(self) -> bool {
        use Breakage as B;
        matches!(
            self,
            B::IndirectNested
                | B::IndirectWithNext
                | B::IndirectOddLength
                | B::IndirectEmpty
                | B::IndirectUnmapped
                | B::IndirectTooLong
                | B::IndirectNextOutOfRange
                | B::IndirectLoop
        )
    }

    /// Breaks the rule on an idle ring: the broken chain is available afterwards.
    ///
    /// # Panics
    /// If the ring is not of the rule's layout.
    pub fn apply(self, ring: &mut RingDriver, ram: &TestRam) {
        assert!(self.layout().is_none_or(|layout| layout == ring.layout_of()));
        match ring.layout_of() {
            RingLayout::Split => self.split(ring, ram),
            RingLayout::Packed => self.packed(ring, ram),
        }
    }

    /// Elements of one chain that break what both layouts have in common.
    fn elements(self, ring: &RingDriver, ram: &TestRam) -> Vec<Element> {
        use Breakage as B;
        let good = ram.writable(64);
        let table = |elements: &[Element]| {
            let bytes = match ring.layout_of() {
                RingLayout::Split => split_table(elements),
                RingLayout::Packed => packed_table(elements),
            };
            let at = ram.alloc(bytes.len() as u64, 16);
            ram.write(at, &bytes);
            Element { addr: at.0, len: bytes.len() as u32, flags: DESC_INDIRECT, next: None }
        };
        let one = table(&[good.into()]);
        let forbidden = ram.forbidden().guest_addr;
        match self {
            B::ReadableAfterWritable => vec![good.into(), ram.readable(&[1; 16]).into()],
            B::Unmapped => vec![Element { addr: forbidden, ..good.into() }],
            B::AddressWraps => vec![Element { addr: u64::MAX - 7, ..good.into() }],
            B::BeyondRegion => {
                let region = ram.regions()[0];
                vec![Element { addr: region.guest_addr + region.size - 8, ..good.into() }]
            }
            B::IndirectNotNegotiated => vec![one],
            B::IndirectWithNext => vec![one, good.into()],
            B::IndirectOddLength => vec![Element { len: 15, ..one }],
            B::IndirectEmpty => vec![Element { len: 0, ..one }],
            B::IndirectUnmapped => vec![Element { addr: forbidden, ..one }],
            B::IndirectTooLong => {
                let many = usize::from(ring.size()) + 1;
                vec![table(&vec![Element { len: 1, ..good.into() }; many])]
            }
            B::IndirectNested => vec![table(&[one])],
            B::IndirectNextOutOfRange => {
                vec![table(&[Element { flags: DESC_WRITE | DESC_NEXT, next: Some(1), ..good.into() }])]
            }
            B::IndirectLoop => {
                vec![table(&[Element { flags: DESC_WRITE | DESC_NEXT, next: Some(0), ..good.into() }])]
            }
            _ => vec![good.into()],
        }
    }

    fn split(self, driver: &mut RingDriver, ram: &TestRam) {
        let elements = self.elements(driver, ram);
        let size = driver.size();
        let ring = driver.split();
        for (i, element) in (0u16..).zip(&elements) {
            let more = usize::from(i) + 1 < elements.len();
            let flags = element.flags | if more { DESC_NEXT } else { 0 };
            ring.set_desc(i, SplitDesc { addr: element.addr, len: element.len, flags, next: i + 1 });
        }
        let at = ring.avail_idx();
        ring.set_avail_entry(at, 0);
        let mut ahead = 1;
        match self {
            Breakage::AvailIndexTooFar => ahead = size + 1,
            Breakage::HeadOutOfRange => ring.set_avail_entry(at, size),
            Breakage::NextOutOfRange | Breakage::Loop => {
                let next = if self == Breakage::Loop { 0 } else { size };
                ring.set_desc(0, SplitDesc { flags: DESC_WRITE | DESC_NEXT, next, ..ring.desc(0) });
            }
            _ => {}
        }
        ring.set_avail_idx(at.wrapping_add(ahead));
    }

    fn packed(self, driver: &mut RingDriver, ram: &TestRam) {
        let mut elements = self.elements(driver, ram);
        let size = driver.size();
        let ring = driver.packed();
        match self {
            // Every descriptor of the ring has a next one.
            Breakage::Loop => elements = vec![elements[0]; usize::from(size)],
            Breakage::ListNotAvailable => elements.truncate(1),
            _ => {}
        }
        let start = ring.next_avail();
        // Backwards: the first one makes the list available.
        for (i, element) in (0..size).zip(&elements).collect::<Vec<_>>().into_iter().rev() {
            let (slot, wrap) = match start.index + i {
                beyond if beyond >= size => (beyond - size, !start.wrap),
                slot => (slot, start.wrap),
            };
            let more = usize::from(i) + 1 < elements.len()
                || matches!(self, Breakage::Loop | Breakage::ListNotAvailable);
            let flags = element.flags | if more { DESC_NEXT } else { 0 } | PackedRing::avail_flags(wrap);
            ring.set_desc(slot, PackedDesc { addr: element.addr, len: element.len, id: 1, flags });
        }
    }
}

/// A descriptor of either layout.
#[derive(Debug, Clone, Copy)]
struct Element {
    addr: u64,
    len: u32,
    flags: u16,
    next: Option<u16>,
}

impl From<Buf> for Element {
    fn from(buf: Buf) -> Self {
        let flags = if buf.writable { DESC_WRITE } else { 0 };
        Element { addr: buf.addr.0, len: buf.len, flags, next: None }
    }
}

fn split_table(elements: &[Element]) -> Vec<u8> {
    let desc = |(i, element): (usize, &Element)| {
        let more = i + 1 < elements.len();
        let flags = element.flags | if more { DESC_NEXT } else { 0 };
        let next = element.next.unwrap_or(i as u16 + 1);
        SplitDesc { addr: element.addr, len: element.len, flags, next }.to_bytes()
    };
    elements.iter().enumerate().flat_map(desc).collect()
}

fn packed_table(elements: &[Element]) -> Vec<u8> {
    let desc = |element: &Element| {
        PackedDesc { addr: element.addr, len: element.len, id: 0, flags: element.flags }.to_bytes()
    };
    elements.iter().flat_map(desc).collect()
}

/// A driver that writes nonsense into a ring, the same nonsense for the same seed.
///
/// Half of what it writes is nearly right, so that it gets past the first check.
pub struct Havoc(u64);

impl Havoc {
    /// The sequence of this seed.
    pub fn new(seed: u64) -> Havoc {
        Havoc(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next number (xorshift64*).
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    fn addr(&mut self, ram: &TestRam) -> u64 {
        let regions = ram.regions();
        let at = self.below(regions.len() as u64) as usize;
        let region = regions[at];
        match self.below(8) {
            0 => self.next(),
            1 => ram.forbidden().guest_addr + self.below(64),
            2 => region.guest_addr + region.size - self.below(64),
            _ => region.guest_addr + self.below(region.size),
        }
    }

    fn len(&mut self) -> u32 {
        match self.below(8) {
            0 => self.next() as u32,
            1 => 0,
            _ => self.below(256) as u32,
        }
    }

    fn flags(&mut self) -> u16 {
        match self.below(8) {
            0 => self.next() as u16,
            1 => DESC_INDIRECT,
            2 | 3 => DESC_NEXT | DESC_WRITE,
            4 => DESC_NEXT,
            _ => DESC_WRITE,
        }
    }

    /// Writes one thing somewhere in the ring.
    pub fn step(&mut self, driver: &mut RingDriver, ram: &TestRam) {
        let size = driver.size();
        let slot = self.below(size.into()) as u16;
        let (addr, len, flags) = (self.addr(ram), self.len(), self.flags());
        let near = self.below(2 * u64::from(size)) as u16;
        match driver.layout_of() {
            RingLayout::Split => {
                let ring = driver.split();
                match self.below(8) {
                    0 => ring.set_avail_idx(self.next() as u16),
                    1..=3 => ring.set_avail_idx(ring.avail_idx().wrapping_add(1 + near % 3)),
                    4 => ring.set_used_event(self.next() as u16),
                    5 => ring.set_avail_entry(self.next() as u16, near),
                    6 => ring.set_avail_flags(self.next() as u16),
                    _ => {}
                }
                ring.set_desc(slot, SplitDesc { addr, len, flags, next: near });
                if self.below(2) == 0 {
                    ring.set_avail_entry(self.next() as u16, slot);
                }
            }
            RingLayout::Packed => {
                let ring = driver.packed();
                let bits = match self.below(8) {
                    0 => self.next() as u16,
                    1 => PackedRing::avail_flags(false),
                    _ => PackedRing::avail_flags(true),
                };
                ring.set_desc(slot, PackedDesc { addr, len, id: near, flags: flags | bits });
                if self.below(4) == 0 {
                    ring.set_driver_event(self.next() as u16, self.below(5) as u16);
                }
            }
        }
    }
}

/// The features that a breakage is tried with.
pub(crate) fn features_of(breakage: Breakage) -> (Features, Features) {
    match breakage {
        Breakage::IndirectNotNegotiated => (Features::empty(), Features::INDIRECT_DESC),
        _ if breakage.needs_indirect() => (Features::INDIRECT_DESC, Features::empty()),
        _ => (Features::empty(), Features::empty()),
    }
}

/// Memory as the suite shares it: two regions for the device, and one that it is not given.
pub fn memory() -> TestRam {
    let mib = 1 << 20;
    let ram = TestRam::new(&[(0, mib), (2 * mib, mib), (4 * mib, 1 << 16)]);
    ram.forbid(GuestAddress(4 * mib));
    ram
}
