//! The rows of the table: what is measured of a ring full of chains.
use std::hint::black_box;
use std::time::{Duration, Instant};

use crate::guest::{Guest, Shape};

/// A device's side of a ring, as each variant writes it.
pub trait Device {
    type Chain;
    /// Takes the next chain: checked, and walked to its end.
    fn pop(&mut self) -> Option<Self::Chain>;
    /// Looks at pointer and length of each element.
    fn translated(&self, chain: &Self::Chain) -> u64;
    /// Reads the first 64 bytes.
    fn read(&self, chain: &Self::Chain) -> u64;
    fn add_used(&mut self, chain: Self::Chain, written: u32);
    /// Makes the used entries visible and decides about the interrupt.
    fn publish(&mut self) -> bool;

    #[inline(always)]
    fn pop_translated(&mut self) -> Option<(Self::Chain, u64)> {
        let chain = self.pop()?;
        let sum = self.translated(&chain);
        Some((chain, sum))
    }

    #[inline(always)]
    fn pop_read(&mut self) -> Option<(Self::Chain, u64)> {
        let chain = self.pop()?;
        let first = self.read(&chain);
        Some((chain, first))
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Pop,
    PopTranslated,
    PopRead,
    AddUsed,
    Cycle,
    Drain,
    Batches,
}

/// A row of the table.
pub struct Row {
    pub name: &'static str,
    /// For criterion's file names.
    pub id: &'static str,
    what: What,
    pub shape: Shape,
    /// Largest ratio to the bare loop, split with one region; with eight; packed.
    pub targets: [f64; 3],
}

const fn shape(elements: u16, readable: u16, indirect: bool) -> Shape {
    Shape { elements, readable, indirect }
}

const ROW: [f64; 3] = [1.15, 1.3, 1.3];
const BATCH: [f64; 3] = [1.4, 1.4, 1.4];

pub const ROWS: [Row; 9] = [
    Row { name: "pop a chain of 2", id: "pop2", what: What::Pop, shape: shape(2, 1, false), targets: ROW },
    Row { name: "pop a chain of 16", id: "pop16", what: What::Pop, shape: shape(16, 1, false), targets: ROW },
    Row { name: "pop indirect 4", id: "indirect4", what: What::Pop, shape: shape(4, 2, true), targets: ROW },
    Row {
        name: "pop + translate, chain of 4",
        id: "translate4",
        what: What::PopTranslated,
        shape: shape(4, 2, false),
        targets: ROW,
    },
    Row {
        name: "add_used + event decision",
        id: "used",
        what: What::AddUsed,
        shape: shape(2, 1, false),
        targets: ROW,
    },
    Row {
        name: "pop 2 + add_used + decision",
        id: "cycle",
        what: What::Cycle,
        shape: shape(2, 1, false),
        targets: ROW,
    },
    Row {
        name: "pop + read 64 B",
        id: "read64",
        what: What::PopRead,
        shape: shape(2, 1, false),
        targets: ROW,
    },
    Row {
        name: "drain 256 chains of 2, each",
        id: "drain",
        what: What::Drain,
        shape: shape(2, 1, false),
        targets: ROW,
    },
    Row {
        name: "batches of 32 chains of 2, each",
        id: "batch32",
        what: What::Batches,
        shape: shape(2, 1, false),
        targets: BATCH,
    },
];

/// One variant of one row, ready to run.
pub trait Run {
    /// Time of that many chains, at least.
    fn run(&mut self, chains: u64) -> (Duration, u64);
    /// The fastest of so many laps, in nanoseconds a chain: also says something on a machine that has other things to do.
    fn fastest(&mut self, laps: u32) -> f64;
}

pub struct Bench<D: Device> {
    pub guest: Guest,
    pub device: D,
    pub row: &'static Row,
    pub kept: Vec<D::Chain>,
}

impl<D: Device> Bench<D> {
    pub fn new(guest: Guest, device: D, row: &'static Row) -> Bench<D> {
        Bench { guest, device, row, kept: Vec::with_capacity(1024) }
    }

    /// One ring full.
    fn lap(&mut self) -> (Duration, u64) {
        self.guest.refill();
        let chains = u64::from(self.guest.shape.chains());
        let time = match self.row.what {
            What::Pop => self.pop(|device| Some((device.pop()?, ()))),
            What::PopTranslated => self.pop(D::pop_translated),
            What::PopRead => self.pop(D::pop_read),
            What::AddUsed => self.add_used(),
            What::Cycle => self.cycle(),
            What::Drain => self.drain(),
            What::Batches => self.batches(),
        };
        match self.row.what {
            // Chains were kept, as by a device whose requests take time, and are completed outside of the measurement.
            What::Pop | What::PopTranslated | What::PopRead => {
                assert_eq!(self.kept.len() as u64, chains);
                for chain in self.kept.drain(..) {
                    self.device.add_used(chain, 1);
                }
                black_box(self.device.publish());
            }
            _ => {}
        }
        (time, chains)
    }
}

/// The rows. What belongs to one is between the two looks at the clock. Functions of their own, as a device's would be: in one,
/// each would be laid out around all others.
impl<D: Device> Bench<D> {
    /// Pops all there are, and does something with each. A function for each kind of something.
    #[inline(never)]
    fn pop<T>(&mut self, mut pop: impl FnMut(&mut D) -> Option<(D::Chain, T)>) -> Duration {
        let start = Instant::now();
        while let Some((chain, found)) = pop(&mut self.device) {
            black_box(found);
            self.kept.push(chain);
        }
        start.elapsed()
    }

    #[inline(never)]
    fn add_used(&mut self) -> Duration {
        self.pop(|device| Some((device.pop()?, ())));
        let start = Instant::now();
        for chain in self.kept.drain(..) {
            self.device.add_used(chain, 1);
            black_box(self.device.publish());
        }
        start.elapsed()
    }

    #[inline(never)]
    fn cycle(&mut self) -> Duration {
        let start = Instant::now();
        while let Some(chain) = self.device.pop() {
            self.device.add_used(chain, 1);
            black_box(self.device.publish());
        }
        start.elapsed()
    }

    #[inline(never)]
    fn drain(&mut self) -> Duration {
        let start = Instant::now();
        while let Some(chain) = self.device.pop() {
            self.device.add_used(chain, 1);
        }
        black_box(self.device.publish());
        start.elapsed()
    }

    #[inline(never)]
    fn batches(&mut self) -> Duration {
        let start = Instant::now();
        loop {
            while self.kept.len() < 32
                && let Some(chain) = self.device.pop()
            {
                self.kept.push(chain);
            }
            if self.kept.is_empty() {
                return start.elapsed();
            }
            for chain in self.kept.drain(..) {
                self.device.add_used(chain, 1);
            }
            black_box(self.device.publish());
        }
    }
}

impl<D: Device> Run for Bench<D> {
    fn run(&mut self, chains: u64) -> (Duration, u64) {
        let (mut time, mut done) = (Duration::ZERO, 0);
        while done < chains {
            let (lap, count) = self.lap();
            time += lap;
            done += count;
        }
        (time, done)
    }

    fn fastest(&mut self, laps: u32) -> f64 {
        let lap = |_| {
            let (time, chains) = self.lap();
            time.as_nanos() as f64 / chains as f64
        };
        (0..laps).map(lap).fold(f64::INFINITY, f64::min)
    }
}
