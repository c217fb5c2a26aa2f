//! What the gate's maps are here: for both address spaces the ranges in ascending order, each with its slot.
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use crate::sync::AtomicUsize;

use super::IoDevice;
use super::gate::{Counts, Gate, Keeper, Pass};
use crate::bus::{self, Bus, BusAddress, BusRange, DeviceMmio, DevicePio, Error, MmioAddress, PioAddress};

pub(super) type IoGate = Gate<Work, Table, Slot>;
pub(super) type IoPass = Pass<Table, Slot>;

/// A device that is registered: what the gate calls a room.
pub(super) struct Slot {
    pub(super) device: IoDevice,
    state: AtomicU8,
}

const OPEN: u8 = 0;
/// Has its ranges, but nobody can reach it yet.
const SHUT: u8 = 1;
/// Panicked.
const FAILED: u8 = 2;

impl Slot {
    pub(super) fn new(device: IoDevice, open: bool) -> Slot {
        Slot { device, state: AtomicU8::new(if open { OPEN } else { SHUT }) }
    }

    /// Takes effect when the work is told, and shown.
    pub(super) fn open(&self) {
        self.state.store(OPEN, Ordering::Relaxed);
    }

    /// Takes effect when the work is told, and shown.
    pub(super) fn fail(&self) {
        self.state.store(FAILED, Ordering::Relaxed);
    }

    fn is_open(&self) -> bool {
        self.state.load(Ordering::Relaxed) == OPEN
    }

    pub(super) fn has_failed(&self) -> bool {
        self.state.load(Ordering::Relaxed) == FAILED
    }
}

/// What a range belongs to: its slot, and the slot's device, at hand so that an access need not look at the slot; `None` if
/// it is not to be called. The gate says when either may be looked at.
pub(super) struct Seat<A: Space> {
    slot: NonNull<Slot>,
    device: Option<NonNull<A::Device>>,
}

impl<A: Space> Clone for Seat<A> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<A: Space> Copy for Seat<A> {}

// SAFETY: no more than addresses; what is there is `Sync`.
unsafe impl<A: Space> Send for Seat<A> {}
// SAFETY: as above.
unsafe impl<A: Space> Sync for Seat<A> {}

impl<A: Space> Seat<A> {
    pub(super) fn of(slot: &Slot) -> Seat<A> {
        let device = A::device(&slot.device).filter(|_| slot.is_open()).map(NonNull::from);
        Seat { slot: NonNull::from(slot), device }
    }
}

/// What changes: both buses, and the slots that are alive.
#[derive(Default)]
pub(super) struct Work {
    pub(super) pio: Bus<PioAddress, Seat<PioAddress>>,
    pub(super) mmio: Bus<MmioAddress, Seat<MmioAddress>>,
    pub(super) slots: Vec<Option<Arc<Slot>>>,
    pub(super) free: Vec<usize>,
    /// The current map is older than this, since nobody could see it.
    pub(super) unseen: bool,
}

impl Work {
    /// The slot was opened, or has failed.
    pub(super) fn changed(&mut self, slot: &Slot) {
        fn renew<A: Space>(bus: &mut Bus<A, Seat<A>>, slot: &Slot) {
            let its = |seat: &&mut Seat<A>| seat.slot == NonNull::from(slot);
            bus.devices_mut().filter(its).for_each(|seat| *seat = Seat::of(slot));
        }
        renew(&mut self.pio, slot);
        renew(&mut self.mmio, slot);
    }
}

/// A map.
#[derive(Default)]
pub(super) struct Table {
    pio: Ranges<PioAddress>,
    mmio: Ranges<MmioAddress>,
}

impl Table {
    pub(super) fn of(work: &Work) -> Table {
        Table { pio: Ranges::of(&work.pio), mmio: Ranges::of(&work.mmio) }
    }
}

/// Ranges in ascending order. First addresses are by themselves, since searching looks at nothing else.
pub(super) struct Ranges<A: Space> {
    bases: Box<[A]>,
    rows: Box<[Row<A>]>,
}

struct Row<A: Space> {
    base: A,
    last: A,
    seat: Seat<A>,
}

impl<A: Space> Row<A> {
    #[inline(always)]
    fn found(&self) -> (NonNull<Slot>, Found<A>) {
        (self.seat.slot, Found { base: self.base, device: self.seat.device })
    }
}

impl<A: Space> Default for Ranges<A> {
    fn default() -> Self {
        Ranges { bases: Box::default(), rows: Box::default() }
    }
}

/// Why an access reaches no device, and what counts it.
#[derive(Clone, Copy)]
pub(super) enum Miss {
    Unclaimed,
    Straddling,
}

/// A guest often stays with a device for a while. So a pass remembers the row that it found last, in whatever table, times
/// `STREAK + 1`, and how often in a row; after `STREAK` times it looks there first. (Always looking there first would
/// cost those who do not stay more than it gains: processors predict what is usual.)
const STREAK: usize = 3;

/// Where an access goes.
struct Found<A: Space> {
    base: A,
    device: Option<NonNull<A::Device>>,
}

impl<A: Space> Ranges<A> {
    fn of(bus: &Bus<A, Seat<A>>) -> Ranges<A> {
        let mut bases = Vec::with_capacity(bus.len());
        let mut rows = Vec::with_capacity(bus.len());
        for (range, seat) in bus.iter() {
            bases.push(range.base());
            rows.push(Row { base: range.base(), last: range.last(), seat: *seat });
        }
        Ranges { bases: bases.into(), rows: rows.into() }
    }

    #[inline(always)]
    fn find(&self, first: A, last: A, hint: &AtomicUsize) -> Option<(NonNull<Slot>, Found<A>)> {
        let known = hint.load(Ordering::Relaxed);
        if known & STREAK == STREAK
            && let Some(row) = self.rows.get(known / (STREAK + 1))
            && row.base <= first
            && last <= row.last
        {
            return Some(row.found());
        }
        let at = self.behind(first).wrapping_sub(1);
        let row = self.rows.get(at).filter(|row| last <= row.last)?;
        let same = known / (STREAK + 1) == at && known & STREAK != STREAK;
        hint.store(if same { known + 1 } else { at * (STREAK + 1) }, Ordering::Relaxed);
        Some(row.found())
    }

    /// How many ranges begin at or before this address.
    #[inline(always)]
    fn behind(&self, first: A) -> usize {
        self.bases.partition_point(|base| *base <= first)
    }

    /// Why nothing was found.
    fn miss(&self, first: A, last: A) -> Miss {
        let behind = self.behind(first);
        let before = behind.checked_sub(1).and_then(|at| self.rows.get(at));
        let touched = before.is_some_and(|row| first <= row.last)
            || self.bases.get(behind).is_some_and(|base| *base <= last);
        if touched { Miss::Straddling } else { Miss::Unclaimed }
    }
}

/// The kinds of events that a pass counts.
pub(super) mod kind {
    pub(crate) const UNCLAIMED: usize = 0;
    pub(crate) const STRADDLING: usize = 1;
    pub(crate) const INVALID: usize = 2;
    pub(crate) const FAILED: usize = 3;
    pub(crate) const PANICS: usize = 4;
}

/// One of the two address spaces.
pub(super) trait Space: BusAddress + 'static {
    type Device: ?Sized;
    /// Which of a pass's hints is this space's.
    const HINT: usize;
    fn ranges(table: &Table) -> &Ranges<Self>;
    fn bus(work: &mut Work) -> &mut Bus<Self, Seat<Self>>;
    fn device(device: &IoDevice) -> Option<&Self::Device>;
    fn read(device: &Self::Device, base: Self, offset: Self::V, data: &mut [u8]);
    fn write(device: &Self::Device, base: Self, offset: Self::V, data: &[u8]);
}

impl Space for PioAddress {
    type Device = dyn DevicePio + Send + Sync;
    const HINT: usize = 0;

    #[inline(always)]
    fn ranges(table: &Table) -> &Ranges<Self> {
        &table.pio
    }

    fn bus(work: &mut Work) -> &mut Bus<Self, Seat<Self>> {
        &mut work.pio
    }

    #[inline(always)]
    fn device(device: &IoDevice) -> Option<&Self::Device> {
        device.pio.as_deref()
    }

    #[inline(always)]
    fn read(device: &Self::Device, base: Self, offset: Self::V, data: &mut [u8]) {
        device.pio_read(base, offset, data);
    }

    #[inline(always)]
    fn write(device: &Self::Device, base: Self, offset: Self::V, data: &[u8]) {
        device.pio_write(base, offset, data);
    }
}

impl Space for MmioAddress {
    type Device = dyn DeviceMmio + Send + Sync;
    const HINT: usize = 1;

    #[inline(always)]
    fn ranges(table: &Table) -> &Ranges<Self> {
        &table.mmio
    }

    fn bus(work: &mut Work) -> &mut Bus<Self, Seat<Self>> {
        &mut work.mmio
    }

    #[inline(always)]
    fn device(device: &IoDevice) -> Option<&Self::Device> {
        device.mmio.as_deref()
    }

    #[inline(always)]
    fn read(device: &Self::Device, base: Self, offset: Self::V, data: &mut [u8]) {
        device.mmio_read(base, offset, data);
    }

    #[inline(always)]
    fn write(device: &Self::Device, base: Self, offset: Self::V, data: &[u8]) {
        device.mmio_write(base, offset, data);
    }
}

/// A read: whatever reaches no device, or one that fails, is filled with ones, as on a bus where nobody answers.
///
/// # Safety
/// The caller owns this pass of this gate, and is in no room with it.
#[inline(always)]
pub(super) unsafe fn read<A: Space>(
    gate: &IoGate,
    pass: &IoPass,
    addr: A,
    data: &mut [u8],
) -> Result<(), Error> {
    // SAFETY: as of this function.
    let done = unsafe {
        access(gate, pass, addr, data.len(), |device, base, offset| A::read(device, base, offset, data))
    };
    if done.is_err() {
        data.fill(0xff);
    }
    done
}

/// A write.
///
/// # Safety
/// As of [`read`].
#[inline(always)]
pub(super) unsafe fn write<A: Space>(
    gate: &IoGate,
    pass: &IoPass,
    addr: A,
    data: &[u8],
) -> Result<(), Error> {
    // SAFETY: as of this function.
    unsafe {
        access(gate, pass, addr, data.len(), |device, base, offset| A::write(device, base, offset, data))
    }
}

/// # Safety
/// As of [`read`].
#[inline(always)]
unsafe fn access<A: Space>(
    gate: &IoGate,
    pass: &IoPass,
    addr: A,
    len: usize,
    call: impl FnOnce(&A::Device, A, A::V),
) -> Result<(), Error> {
    let range: BusRange<A> = match bus::access(addr, len) {
        Ok(range) => range,
        Err(error) => return Err(refuse(pass, kind::INVALID, error)),
    };
    let last = range.last();
    let hint = &pass.hints[A::HINT];
    // SAFETY: the caller's pass; `inside` leaves. Tables lead to slots that are closed after they were taken out (`IoSpace`).
    unsafe {
        match gate.enter_at_once(pass, |table| A::ranges(table).find(addr, last, hint)) {
            Some((slot, found)) => inside(gate, pass, addr, (slot, found), call),
            None => access_anew(gate, pass, addr, last, call),
        }
    }
}

/// An access that reaches nothing, or by a new table; up to its `last` byte.
///
/// # Safety
/// As of [`read`].
#[cold]
#[inline(never)]
unsafe fn access_anew<A: Space>(
    gate: &IoGate,
    pass: &IoPass,
    addr: A,
    last: A,
    call: impl FnOnce(&A::Device, A, A::V),
) -> Result<(), Error> {
    let find = |table: &Table| {
        let ranges = A::ranges(table);
        ranges.find(addr, last, &pass.hints[A::HINT]).ok_or_else(|| ranges.miss(addr, last))
    };
    // SAFETY: as of `access`.
    unsafe {
        match gate.enter(pass, find) {
            Ok(entered) => inside(gate, pass, addr, entered, call),
            Err(Miss::Unclaimed) => Err(refuse(pass, kind::UNCLAIMED, Error::DeviceNotFound)),
            Err(Miss::Straddling) => Err(refuse(pass, kind::STRADDLING, Error::DeviceNotFound)),
        }
    }
}

/// The rest of an access, from within the slot; leaves it.
///
/// # Safety
/// The caller owns this pass of this gate, and has entered the slot with it and this.
#[inline(always)]
unsafe fn inside<A: Space>(
    gate: &IoGate,
    pass: &IoPass,
    addr: A,
    (slot, found): (&Slot, Found<A>),
    call: impl FnOnce(&A::Device, A, A::V),
) -> Result<(), Error> {
    let Some(device) = found.device else { return Err(refuse_from(gate, pass, slot)) };
    // SAFETY: the slot has it, and we are in the slot until we leave.
    let device = unsafe { device.as_ref() };
    match catch_unwind(AssertUnwindSafe(|| call(device, found.base, addr - found.base))) {
        Ok(()) => {
            gate.leave(pass);
            Ok(())
        }
        Err(thrown) => {
            // It may panic again when it is dropped.
            std::mem::forget(thrown);
            Err(fail(gate, pass, slot))
        }
    }
}

/// The slot's device is not to be called.
#[cold]
fn refuse_from(gate: &IoGate, pass: &IoPass, slot: &Slot) -> Error {
    let (kind, error) = match slot.has_failed() {
        true => (kind::FAILED, Error::DeviceFailed),
        false => (kind::UNCLAIMED, Error::DeviceNotFound),
    };
    gate.leave(pass);
    refuse(pass, kind, error)
}

/// Nobody calls it any more, but for who found it in the table before.
#[cold]
fn fail(gate: &IoGate, pass: &IoPass, slot: &Slot) -> Error {
    let mut keeper = gate.keeper();
    slot.fail();
    keeper.work.changed(slot);
    show(gate, &mut keeper);
    drop(keeper);
    gate.leave(pass);
    refuse(pass, kind::PANICS, Error::DeviceFailed)
}

/// Makes the work visible, if there is anybody to see it.
pub(super) fn show(gate: &IoGate, keeper: &mut Keeper<Work, Table>) {
    if keeper.is_watched() {
        let table = Table::of(&keeper.work);
        gate.publish(keeper, table);
    } else {
        keeper.work.unseen = true;
    }
}

#[cold]
fn refuse(pass: &IoPass, kind: usize, error: Error) -> Error {
    pass.counts.add(kind);
    error
}

const _: () = assert!(kind::PANICS + 1 == Counts::KINDS);
