//! Registration, changes, removal and access in any order, beside a model: for each address, whose it is.
use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;
use vm_device::bus::{Bus, Error, MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::dispatch::{IoDevice, IoRange, Registration, VcpuIo};
use vm_device::{DeviceMmio, DevicePio};

/// The end of the address space is as interesting as its beginning.
fn address() -> impl Strategy<Value = u64> {
    prop_oneof![0..40u64, (u64::MAX - 24)..=u64::MAX]
}

fn port() -> impl Strategy<Value = u16> {
    prop_oneof![0..40u16, (u16::MAX - 24)..=u16::MAX]
}

/// A range, which may be none: empty, or beyond the end.
#[derive(Clone, Copy, Debug)]
enum Wanted {
    Pio(u16, u16),
    Mmio(u64, u64),
}

impl Wanted {
    fn range(self) -> Result<IoRange, Error> {
        match self {
            Wanted::Pio(base, size) => PioRange::new(PioAddress(base), size).map(IoRange::from),
            Wanted::Mmio(base, size) => MmioRange::new(MmioAddress(base), size).map(IoRange::from),
        }
    }

    /// All its addresses, in one space of 128 bits: ports are beyond memory.
    fn addresses(self) -> Option<Vec<u128>> {
        let (base, size, limit) = match self {
            Wanted::Pio(base, size) => (u128::from(base), u128::from(size), 1u128 << 16),
            Wanted::Mmio(base, size) => (u128::from(base), u128::from(size), 1u128 << 64),
        };
        if size == 0 || base + size > limit {
            return None;
        }
        let space = if matches!(self, Wanted::Pio(..)) { 1u128 << 100 } else { 0 };
        Some((base..base + size).map(|address| space + address).collect())
    }
}

fn wanted() -> impl Strategy<Value = Wanted> {
    prop_oneof![
        (port(), 0..9u16).prop_map(|(base, size)| Wanted::Pio(base, size)),
        (address(), 0..9u64).prop_map(|(base, size)| Wanted::Mmio(base, size)),
    ]
}

#[derive(Clone, Debug)]
enum Op {
    Register(Vec<Wanted>, bool),
    Set(usize, Vec<Wanted>),
    Open(usize),
    Remove(usize),
    /// By the handle, or by the manager.
    Read(Wanted, bool),
    Write(Wanted, bool, u8),
    /// A vCPU more.
    Handle,
}

/// A device panics when this is written.
const BOMB: u8 = 13;

fn op() -> impl Strategy<Value = Op> {
    let ranges = || prop::collection::vec(wanted(), 0..4);
    prop_oneof![
        2 => (ranges(), prop::bool::weighted(0.2)).prop_map(|(ranges, shut)| Op::Register(ranges, shut)),
        2 => (0..8usize, ranges()).prop_map(|(device, ranges)| Op::Set(device, ranges)),
        1 => (0..8usize).prop_map(Op::Open),
        1 => (0..8usize).prop_map(Op::Remove),
        8 => (wanted(), any::<bool>()).prop_map(|(access, handle)| Op::Read(access, handle)),
        4 => (wanted(), any::<bool>(), 0..16u8).prop_map(|(access, handle, value)| Op::Write(access, handle, value)),
        1 => Just(Op::Handle),
    ]
}

/// Reads as its number, and remembers where it was reached.
struct Numbered {
    number: u8,
    base: AtomicU64,
    offset: AtomicU64,
}

impl Numbered {
    fn reached(&self, base: u64, offset: u64) {
        self.base.store(base, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
    }
}

impl DevicePio for Numbered {
    fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
        self.reached(base.0.into(), offset.into());
        data.fill(self.number);
    }
    fn pio_write(&self, base: PioAddress, offset: u16, data: &[u8]) {
        self.reached(base.0.into(), offset.into());
        explode_if(data.contains(&BOMB));
    }
}

impl DeviceMmio for Numbered {
    fn mmio_read(&self, base: MmioAddress, offset: u64, data: &mut [u8]) {
        self.reached(base.0, offset);
        data.fill(self.number);
    }
    fn mmio_write(&self, base: MmioAddress, offset: u64, data: &[u8]) {
        self.reached(base.0, offset);
        explode_if(data.contains(&BOMB));
    }
}

/// Panics without a word on the terminal.
fn explode_if(explode: bool) {
    if explode {
        std::panic::resume_unwind(Box::new("told to"));
    }
}

#[derive(Clone, Copy, PartialEq)]
enum State {
    Open,
    Shut,
    Failed,
}

#[derive(Default)]
struct Model {
    /// Which device has an address, and the base of the range.
    owners: BTreeMap<u128, (u8, u128)>,
    states: HashMap<u8, State>,
}

impl Model {
    fn take(&mut self, device: u8, ranges: &[Wanted]) -> bool {
        let mut owners = self.owners.clone();
        for range in ranges {
            let addresses = range.addresses().expect("a range");
            for address in &addresses {
                if owners.insert(*address, (device, addresses[0])).is_some() {
                    return false;
                }
            }
        }
        self.owners = owners;
        true
    }

    fn give_up(&mut self, device: u8) {
        self.owners.retain(|_, (owner, _)| *owner != device);
    }

    /// Which device is reached by which base, or why none is.
    fn access(&self, access: Wanted) -> Result<(u8, u128), Error> {
        let addresses = access.addresses().ok_or(Error::InvalidRange)?;
        let owners: Vec<_> = addresses.iter().map(|address| self.owners.get(address)).collect();
        match owners[0] {
            Some(first) if owners.iter().all(|owner| *owner == Some(first)) => match self.states[&first.0] {
                State::Open => Ok(*first),
                State::Shut => Err(Error::DeviceNotFound),
                State::Failed => Err(Error::DeviceFailed),
            },
            _ => Err(Error::DeviceNotFound),
        }
    }
}

struct Machine {
    manager: IoManager,
    vcpu: VcpuIo,
    devices: Vec<(u8, Arc<Numbered>, Registration)>,
    model: Model,
    refused: u64,
}

impl Machine {
    fn new() -> Machine {
        let manager = IoManager::new();
        let vcpu = manager.vcpu();
        Machine { manager, vcpu, devices: Vec::new(), model: Model::default(), refused: 0 }
    }

    fn ranges(wanted: &[Wanted]) -> Result<Vec<IoRange>, Error> {
        wanted.iter().map(|range| range.range()).collect()
    }

    fn run(&mut self, op: &Op, number: u8) {
        match op {
            Op::Register(wanted, shut) => {
                let Ok(ranges) = Machine::ranges(wanted) else {
                    assert!(wanted.iter().any(|range| range.addresses().is_none()));
                    return;
                };
                let device =
                    Arc::new(Numbered { number, base: AtomicU64::new(0), offset: AtomicU64::new(0) });
                let (space, both) = (self.manager.space(), IoDevice::both(device.clone()));
                let registered = match shut {
                    true => space.register_shut(both, &ranges),
                    false => space.register(both, &ranges),
                };
                assert_eq!(registered.is_ok(), self.model.take(number, wanted), "{registered:?}");
                if let Ok(registration) = registered {
                    let state = if *shut { State::Shut } else { State::Open };
                    self.model.states.insert(number, state);
                    self.devices.push((number, device, registration));
                }
            }
            Op::Set(at, wanted) => {
                let (Some((number, _, registration)), Ok(ranges)) =
                    (self.devices.get(*at), Machine::ranges(wanted))
                else {
                    return;
                };
                let before = self.model.owners.clone();
                self.model.give_up(*number);
                let possible = self.model.take(*number, wanted);
                if !possible {
                    self.model.owners = before;
                }
                assert_eq!(registration.set_ranges(&ranges).is_ok(), possible);
            }
            Op::Open(at) => {
                if let Some((number, _, registration)) = self.devices.get(*at) {
                    registration.open();
                    self.model.states.insert(*number, State::Open);
                }
            }
            Op::Remove(at) if *at < self.devices.len() => {
                let (number, device, registration) = self.devices.swap_remove(*at);
                assert!(registration.remove().is_over());
                assert_eq!(Arc::strong_count(&device), 1);
                self.model.give_up(number);
            }
            Op::Remove(_) => (),
            Op::Read(access, handle) => self.access(*access, *handle, None),
            Op::Write(access, handle, value) => self.access(*access, *handle, Some(*value)),
            Op::Handle => self.vcpu = self.manager.vcpu(),
        }
    }

    fn access(&mut self, access: Wanted, handle: bool, value: Option<u8>) {
        let mut data = vec![value.unwrap_or(0x55); 8];
        let done = match access {
            Wanted::Pio(base, size) => {
                let (addr, data) = (PioAddress(base), &mut data[..usize::from(size)]);
                match (value, handle) {
                    (None, true) => self.vcpu.pio_read(addr, data),
                    (None, false) => self.manager.pio_read(addr, data),
                    (Some(_), true) => self.vcpu.pio_write(addr, data),
                    (Some(_), false) => self.manager.pio_write(addr, data),
                }
            }
            Wanted::Mmio(base, size) => {
                let (addr, data) = (MmioAddress(base), &mut data[..size as usize]);
                match (value, handle) {
                    (None, true) => self.vcpu.mmio_read(addr, data),
                    (None, false) => self.manager.mmio_read(addr, data),
                    (Some(_), true) => self.vcpu.mmio_write(addr, data),
                    (Some(_), false) => self.manager.mmio_write(addr, data),
                }
            }
        };
        let (base, size) = match access {
            Wanted::Pio(base, size) => (u64::from(base), usize::from(size)),
            Wanted::Mmio(base, size) => (base, size as usize),
        };
        let mut expected = self.model.access(access);
        if let (Ok((number, first)), Some(BOMB)) = (expected, value) {
            self.model.states.insert(number, State::Failed);
            self.reached(number, first, base);
            expected = Err(Error::DeviceFailed);
        } else if let Ok((number, first)) = expected {
            self.reached(number, first, base);
        }
        assert_eq!(done.err(), expected.err(), "{access:x?}");
        if value.is_none() {
            let read = expected.map_or(0xff, |(number, _)| number);
            assert!(data[..size].iter().all(|byte| *byte == read), "{data:x?}, not {read:x}");
        }
        assert!(data[size..].iter().all(|byte| *byte == value.unwrap_or(0x55)), "beyond the access");
        self.refused += u64::from(done.is_err());
        let counts = self.manager.counts();
        let sum = counts.unclaimed + counts.straddling + counts.invalid + counts.failed + counts.panics;
        assert_eq!(sum, self.refused, "{counts:?}");
    }

    fn reached(&self, number: u8, first: u128, address: u64) {
        let (_, device, _) = self.devices.iter().find(|(known, ..)| *known == number).expect("registered");
        let base = device.base.load(Ordering::Relaxed);
        assert_eq!(base, first as u64);
        assert_eq!(base + device.offset.load(Ordering::Relaxed), address);
    }
}

proptest! {
    #[test]
    fn dispatch_does_what_the_model_does(ops in prop::collection::vec(op(), 1..60)) {
        let mut machine = Machine::new();
        for (op, number) in ops.iter().zip(0u8..) {
            machine.run(op, number);
        }
    }

    #[test]
    fn a_bus_does_what_a_list_does(ops in prop::collection::vec((address(), 0..9u64, 0..3u8), 1..60)) {
        let mut bus = Bus::new();
        let mut list: Vec<MmioRange> = Vec::new();
        for (address, size, what) in ops {
            let addr = MmioAddress(address);
            let at = list.iter().position(|range| (range.base()..=range.last()).contains(&addr));
            match (what, MmioRange::new(addr, size)) {
                (0, Ok(range)) => {
                    let free = !list.iter().any(|taken| taken.overlaps(&range));
                    assert_eq!(bus.register(range, address).is_ok(), free);
                    if free {
                        list.push(range);
                    }
                }
                (1, _) => assert_eq!(bus.deregister(addr).map(|(range, _)| range), at.map(|at| list.swap_remove(at))),
                (_, range) => {
                    assert_eq!(bus.device(addr).map(|(range, _)| range), at.map(|at| &list[at]));
                    let within = range.map(|range| at.is_some_and(|at| range.last() <= list[at].last()));
                    let checked = bus.check_access(addr, size as usize).map(|(range, base)| {
                        assert_eq!(range.base().0, *base);
                    });
                    let expected = within.and_then(|within| if within { Ok(()) } else { Err(Error::DeviceNotFound) });
                    assert_eq!(checked, expected);
                }
            }
            assert_eq!((bus.len(), bus.is_empty()), (list.len(), list.is_empty()));
            assert!(bus.iter().is_sorted_by_key(|(range, _)| range.base()));
        }
    }
}
