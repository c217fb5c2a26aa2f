//! The address map of a root complex: which BAR answers to which addresses, kept on the VMM's buses.
//!
//! [`wanted`] is a function of the registers alone, so that the map after any sequence of writes, and after a restore, is the
//! one that the registers say. [`Decoder`] brings the buses there. The rules:
//!
//! * A BAR is decoded if `COMMAND` enables its space, every bridge above it passes all of its range and has its link up, and
//!   the range is inside of a window of the root complex. What lies elsewhere (over RAM, above all) never reaches the bus.
//! * Of BARs that overlap, the one comes first that a walk of the tree (devices and functions in ascending order, a bridge
//!   before what is behind it) meets first. The others are not decoded until it is gone. Real machines do not define this.
//! * What the VMM has registered itself comes before any BAR. A BAR over it is not decoded; this is tried again with each
//!   change of the map.
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::thread::{self, ThreadId};

use super::bar::{Claim, ROM_BAR, Space};
use super::bridge::Window;
use super::function::Function;
use super::tree::Bus;
use crate::bus::{
    DeviceMmio, DevicePio, MmioAddress, MmioAddressOffset, MmioRange, PioAddress, PioAddressOffset, PioRange,
};
use crate::dispatch::{IoDevice, IoRange, IoSpace, Registration};
use crate::sync::{Condvar, Mutex, lock};

/// A BAR of a function, as the bus calls it.
struct Target {
    function: Arc<Function>,
    bar: u8,
}

impl DeviceMmio for Target {
    fn mmio_read(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset, data);
    }

    fn mmio_write(&self, _base: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.function.bar_write(self.bar, offset, data);
    }
}

impl DevicePio for Target {
    fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        self.function.bar_read(self.bar, offset.into(), data);
    }

    fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        self.function.bar_write(self.bar, offset.into(), data);
    }
}

/// A BAR, and where it is decoded.
pub(crate) type Wanted = (Arc<Function>, Claim);

/// All that is to be decoded below this bus, within these windows.
pub(crate) fn wanted(root: &Bus, windows: &[Window]) -> Vec<Wanted> {
    let mut found = Vec::new();
    collect(root, &mut vec![windows.to_vec()], &mut found);
    let mut taken: [BTreeMap<u64, u64>; 2] = Default::default();
    found.retain(|(_, claim)| {
        let taken = match claim.space {
            Space::Io => &mut taken[0],
            Space::Memory => &mut taken[1],
        };
        let last = claim.base + (claim.size - 1);
        let free = taken.range(..=last).next_back().is_none_or(|(_, taken)| *taken < claim.base);
        if free {
            taken.insert(claim.base, last);
        }
        free
    });
    found
}

fn collect(bus: &Bus, levels: &mut Vec<Vec<Window>>, found: &mut Vec<Wanted>) {
    for node in bus.values() {
        let claims = node.function.claims().into_iter();
        let passes = |claim: &Claim| levels.iter().all(|open| open.iter().any(|window| window.passes(claim)));
        found.extend(claims.filter(passes).map(|claim| (node.function.clone(), claim)));
        if let Some(port) = &node.port
            && node.function.link_is_up()
        {
            levels.push(node.function.windows());
            collect(&port.bus, levels, found);
            levels.pop();
        }
    }
}

/// A function by its place in memory, and the number of its BAR. Who has the key of a function has the function, too, so that a
/// key is not another one's.
type Key = (usize, u8);

fn key(function: &Arc<Function>, bar: u8) -> Key {
    (Arc::as_ptr(function).addr(), bar)
}

/// A BAR that was decoded once.
struct Mapped {
    function: Arc<Function>,
    registration: Registration,
    at: Option<u64>,
}

/// Keeps the buses as the registers say.
pub(crate) struct Decoder {
    space: IoSpace,
    state: Mutex<State>,
    idle: Condvar,
}

#[derive(Default)]
struct State {
    mapped: BTreeMap<Key, Mapped>,
    /// BARs that should be decoded, but that something of the VMM's is in the way of.
    blocked: usize,
    /// Registers have changed since the last look at them.
    stale: bool,
    /// Who is bringing the buses up to date.
    busy: Option<ThreadId>,
}

impl Decoder {
    pub(crate) fn new(space: IoSpace) -> Decoder {
        Decoder { space, state: Mutex::new(State::default()), idle: Condvar::new() }
    }

    /// Brings the buses up to date. When this returns they are, also if another thread is about it; but not if it is called by
    /// a device that is being told of a move: then that is done as soon as the device returns.
    ///
    /// `look` gives what is wanted, and all functions that there are.
    pub(crate) fn refresh(&self, look: impl Fn() -> (Vec<Wanted>, Vec<Arc<Function>>)) {
        let me = thread::current().id();
        let mut state = lock(&self.state);
        state.stale = true;
        if state.busy == Some(me) {
            return;
        }
        // Whoever is about it sees what is stale before it ends. So it goes on for as many rounds at most as there are
        // threads that wait here: none of them can write anything meanwhile.
        while state.busy.is_some() {
            state = self.idle.wait(state).unwrap_or_else(std::sync::PoisonError::into_inner);
        }
        while state.stale {
            state.stale = false;
            state.busy = Some(me);
            let mut mapped = std::mem::take(&mut state.mapped);
            drop(state);
            let (wanted, functions) = look();
            let blocked = self.apply(&mut mapped, &wanted, &functions);
            state = lock(&self.state);
            state.mapped = mapped;
            state.blocked = blocked;
        }
        state.busy = None;
        drop(state);
        self.idle.notify_all();
    }

    /// Brings the buses there. Ranges are given up before others are taken, since one may be the other's.
    fn apply(
        &self,
        mapped: &mut BTreeMap<Key, Mapped>,
        wanted: &[Wanted],
        functions: &[Arc<Function>],
    ) -> usize {
        let bases: BTreeMap<Key, u64> =
            wanted.iter().map(|(function, claim)| (key(function, claim.bar), claim.base)).collect();
        for (key, old) in &mut *mapped {
            if old.at != bases.get(key).copied() && old.at.take().is_some() {
                // Taking ranges away does not fail, but for buses that are gone altogether.
                let _ = old.registration.set_ranges(&[]);
                moved(&old.function, key.1, None);
            }
        }
        let here: BTreeSet<usize> = functions.iter().map(|function| key(function, 0).0).collect();
        for (_, gone) in mapped.extract_if(.., |key, _| !here.contains(&key.0)) {
            // Waits for the vCPUs inside of it, unless this is one.
            let _ = gone.registration.remove();
        }
        let mut blocked = 0;
        for (function, claim) in wanted {
            let Some(range) = range(claim) else { continue };
            let key = key(function, claim.bar);
            let done = match mapped.get_mut(&key) {
                Some(old) if old.at.is_some() => continue,
                Some(old) => {
                    let done = old.registration.set_ranges(&[range]);
                    done.map(|()| old.at = Some(claim.base))
                }
                None => self.space.register(target(function, claim), &[range]).map(|registration| {
                    let (function, at) = (function.clone(), Some(claim.base));
                    mapped.insert(key, Mapped { function, registration, at });
                }),
            };
            match done {
                Ok(()) => moved(function, claim.bar, Some(claim.base)),
                Err(_) => blocked += 1,
            }
        }
        blocked
    }

    /// Where a function's BAR is decoded.
    pub(crate) fn address(&self, function: &Arc<Function>, bar: u8) -> Option<u64> {
        lock(&self.state).mapped.get(&key(function, bar)).and_then(|mapped| mapped.at)
    }

    /// How many BARs should be decoded, but lie over something of the VMM's.
    pub(crate) fn blocked(&self) -> usize {
        lock(&self.state).blocked
    }
}

fn moved(function: &Function, bar: u8, address: Option<u64>) {
    if bar != ROM_BAR {
        function.call(|device| device.bar_moved(bar, address));
    }
}

fn target(function: &Arc<Function>, claim: &Claim) -> IoDevice {
    let target = Arc::new(Target { function: function.clone(), bar: claim.bar });
    match claim.space {
        Space::Io => IoDevice::pio(target),
        Space::Memory => IoDevice::mmio(target),
    }
}

fn range(claim: &Claim) -> Option<IoRange> {
    match claim.space {
        Space::Io => {
            let (base, size) = (u16::try_from(claim.base).ok()?, u16::try_from(claim.size).ok()?);
            Some(PioRange::new(PioAddress(base), size).ok()?.into())
        }
        Space::Memory => Some(MmioRange::new(MmioAddress(claim.base), claim.size).ok()?.into()),
    }
}
