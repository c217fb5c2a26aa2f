//! Dispatch while devices come, move, fail and go.
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use vm_device::bus::{Error, MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::dispatch::{IoDevice, IoRange, IoSpace, Registration, Removal, VcpuIo};
use vm_device::{DeviceMmio, DevicePio};

/// Ends a test that hangs.
const LIMIT: Duration = Duration::from_secs(30);

fn mmio(base: u64, size: u64) -> IoRange {
    MmioRange::new(MmioAddress(base), size).unwrap().into()
}

fn pio(base: u16, size: u16) -> IoRange {
    PioRange::new(PioAddress(base), size).unwrap().into()
}

/// Reads as its name; tells where it was reached and when it is dropped.
struct Named {
    name: u8,
    base: AtomicU64,
    offset: AtomicU64,
    dropped: Arc<AtomicUsize>,
}

impl Named {
    fn new(name: u8) -> (Arc<Named>, Arc<AtomicUsize>) {
        let dropped = Arc::new(AtomicUsize::new(0));
        let device = Named { name, base: 0.into(), offset: 0.into(), dropped: dropped.clone() };
        (Arc::new(device), dropped)
    }

    fn reached(&self, base: u64, offset: u64) {
        self.base.store(base, Ordering::Relaxed);
        self.offset.store(offset, Ordering::Relaxed);
    }

    fn last(&self) -> (u64, u64) {
        (self.base.load(Ordering::Relaxed), self.offset.load(Ordering::Relaxed))
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.dropped.fetch_add(1, Ordering::SeqCst);
    }
}

impl DeviceMmio for Named {
    fn mmio_read(&self, base: MmioAddress, offset: u64, data: &mut [u8]) {
        self.reached(base.0, offset);
        data.fill(self.name);
    }
    fn mmio_write(&self, base: MmioAddress, offset: u64, _data: &[u8]) {
        self.reached(base.0, offset);
    }
}

impl DevicePio for Named {
    fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
        self.reached(base.0.into(), offset.into());
        data.fill(self.name);
    }
    fn pio_write(&self, base: PioAddress, offset: u16, _data: &[u8]) {
        self.reached(base.0.into(), offset.into());
    }
}

/// Whatever it is given, for writes. Reads are zeros.
struct Does<F>(F);

impl<F: Fn(u64, &[u8])> DeviceMmio for Does<F> {
    fn mmio_read(&self, _: MmioAddress, _: u64, data: &mut [u8]) {
        data.fill(0);
    }
    fn mmio_write(&self, _: MmioAddress, offset: u64, data: &[u8]) {
        (self.0)(offset, data);
    }
}

fn does(what: impl Fn(u64, &[u8]) + Send + Sync + 'static) -> IoDevice {
    IoDevice::mmio(Arc::new(Does(what)))
}

fn read(vcpu: &mut VcpuIo, addr: u64) -> Result<u8, Error> {
    let mut data = [0x55];
    let done = vcpu.mmio_read(MmioAddress(addr), &mut data);
    assert!(done.is_ok() || data == [0xff], "an error without ones: {data:?}");
    done.map(|()| data[0])
}

#[test]
fn accesses_reach_the_device_with_base_and_offset() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let (device, _) = Named::new(7);
    let ranges = [mmio(0x1000, 0x10), pio(0x60, 4), mmio(0x3000, 1)];
    let _registration = manager.space().register(IoDevice::both(device.clone()), &ranges).unwrap();
    // Misaligned accesses of any length are the device's business, as long as they are within one range.
    let mut data = [0; 7];
    vcpu.mmio_read(MmioAddress(0x1003), &mut data).unwrap();
    assert_eq!((device.last(), data), ((0x1000, 3), [7; 7]));
    vcpu.pio_write(PioAddress(0x63), &[0]).unwrap();
    assert_eq!(device.last(), (0x60, 3));
    vcpu.mmio_write(MmioAddress(0x3000), &[0]).unwrap();
    assert_eq!(device.last(), (0x3000, 0));
    vcpu.pio_read(PioAddress(0x60), &mut data[..4]).unwrap();
    assert_eq!(device.last(), (0x60, 0));
}

#[test]
fn refused_reads_are_ones_an_error_and_counted() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let (device, _) = Named::new(1);
    let ranges = [mmio(0x1000, 8), mmio(0x1008, 8), mmio(u64::MAX, 1), pio(0xfffe, 2)];
    let _registration = manager.space().register(IoDevice::both(device), &ranges).unwrap();
    let mut expect = vcpu.counts();
    let mut check = |addr: u64, len: usize, error: Option<Error>, count: fn(&mut _) -> &mut u64| {
        let mut data = vec![0x55; len];
        let done = vcpu.mmio_read(MmioAddress(addr), &mut data);
        assert_eq!(done.err(), error, "{addr:#x} {len}");
        assert!(error.is_none() || data.iter().all(|byte| *byte == 0xff), "{addr:#x} {len}");
        assert_eq!(vcpu.mmio_write(MmioAddress(addr), &data).err(), error);
        if error.is_some() {
            *count(&mut expect) += 2;
        }
        assert_eq!(vcpu.counts(), expect, "{addr:#x} {len}");
    };
    let missing = Some(Error::DeviceNotFound);
    check(0xfff, 1, missing, |counts| &mut counts.unclaimed);
    check(0x1010, 4, missing, |counts| &mut counts.unclaimed);
    check(0, 8, missing, |counts| &mut counts.unclaimed);
    check(0xffc, 8, missing, |counts| &mut counts.straddling);
    check(0x1004, 8, missing, |counts| &mut counts.straddling);
    check(0x100c, 8, missing, |counts| &mut counts.straddling);
    check(0xff0, 0x100, missing, |counts| &mut counts.straddling);
    check(0x1000, 8, None, |_| unreachable!());
    check(u64::MAX, 1, None, |_| unreachable!());
    check(u64::MAX, 2, Some(Error::InvalidRange), |counts| &mut counts.invalid);
    check(0x1000, 0, Some(Error::InvalidRange), |counts| &mut counts.invalid);

    let mut data = [0; 3];
    assert_eq!(vcpu.pio_read(PioAddress(0xfffe), &mut data[..2]), Ok(()));
    assert_eq!(vcpu.pio_read(PioAddress(0xfffe), &mut data), Err(Error::InvalidRange));
    let mut much = vec![0; 0x10000];
    assert_eq!(vcpu.pio_read(PioAddress(0), &mut much), Err(Error::InvalidAccessLength(0x10000)));
    assert!(much.iter().all(|byte| *byte == 0xff));
    // All handles together, and the manager's own accesses.
    drop(vcpu);
    assert_eq!(manager.pio_read(PioAddress(0), &mut data), Err(Error::DeviceNotFound));
    assert_eq!(data, [0xff; 3]);
    assert_eq!(manager.counts().unclaimed, expect.unclaimed + 1);
    assert_eq!(manager.counts().invalid, expect.invalid + 2);
}

#[test]
fn registration_takes_all_ranges_or_none() {
    let manager = IoManager::new();
    let space = manager.space();
    let mut vcpu = manager.vcpu();
    let (first, _) = Named::new(1);
    let first = space.register(IoDevice::mmio(first), &[mmio(0x2000, 0x100)]).unwrap();
    let (second, dropped) = Named::new(2);
    let refused = [
        (vec![mmio(0x1000, 0x10), mmio(0x20ff, 1)], Error::DeviceOverlap),
        (vec![mmio(0x1000, 0x10), mmio(0x1fff, 0x102)], Error::DeviceOverlap),
        (vec![mmio(0x1000, 0x10), mmio(0x100f, 1)], Error::DeviceOverlap),
        (vec![mmio(0x1000, 0x10), pio(0x10, 1)], Error::WrongBus),
    ];
    for (ranges, error) in refused {
        let device = IoDevice::mmio(second.clone());
        assert_eq!(space.register(device, &ranges).unwrap_err(), error);
        assert_eq!(read(&mut vcpu, 0x1000), Err(Error::DeviceNotFound));
    }
    let second = space.register(IoDevice::mmio(second), &[mmio(0x1000, 0x10)]).unwrap();
    // The same for changes: the one in the way is in the way, what the device had it has.
    assert_eq!(second.set_ranges(&[mmio(0, 1), mmio(0x2050, 1)]), Err(Error::DeviceOverlap));
    assert_eq!((read(&mut vcpu, 0), read(&mut vcpu, 0x1000)), (Err(Error::DeviceNotFound), Ok(2)));
    assert_eq!(second.ranges(), [mmio(0x1000, 0x10)]);
    // Over itself it may move.
    second.set_ranges(&[mmio(0x1008, 0x10)]).unwrap();
    assert_eq!((read(&mut vcpu, 0x1007), read(&mut vcpu, 0x1017)), (Err(Error::DeviceNotFound), Ok(2)));
    // Two change places by way of nowhere.
    second.set_ranges(&[]).unwrap();
    first.set_ranges(&[mmio(0x1000, 0x10)]).unwrap();
    second.set_ranges(&[mmio(0x2000, 0x10)]).unwrap();
    assert_eq!((read(&mut vcpu, 0x1000), read(&mut vcpu, 0x2000)), (Ok(1), Ok(2)));
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    drop(manager);
    drop(vcpu);
    // With the buses all devices are gone; what is left of registrations does nothing.
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert_eq!(second.set_ranges(&[]), Err(Error::Closed));
    assert!(matches!(second.remove(), Removal::Done));
    let (late, _) = Named::new(3);
    assert_eq!(space.register(IoDevice::mmio(late), &[]).unwrap_err(), Error::Closed);
}

#[test]
fn a_shut_device_has_its_ranges_but_is_not_reached() {
    let manager = IoManager::new();
    let space = manager.space();
    let mut vcpu = manager.vcpu();
    let (device, _) = Named::new(1);
    let shut = space.register_shut(IoDevice::mmio(device.clone()), &[mmio(0, 8)]).unwrap();
    assert_eq!(read(&mut vcpu, 0), Err(Error::DeviceNotFound));
    assert_eq!(vcpu.counts().unclaimed, 1);
    assert_eq!(space.register(IoDevice::mmio(device), &[mmio(7, 1)]).unwrap_err(), Error::DeviceOverlap);
    shut.open();
    assert_eq!(read(&mut vcpu, 0), Ok(1));
}

#[test]
fn removal_waits_until_no_vcpu_is_inside() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let (inside, enter) = mpsc::channel();
    let (go, leave) = mpsc::channel::<()>();
    let leave = Mutex::new(leave);
    let left = Arc::new(AtomicBool::new(false));
    let done = left.clone();
    let slow = does(move |_, _| {
        inside.send(()).unwrap();
        leave.lock().unwrap().recv_timeout(LIMIT).unwrap();
        done.store(true, Ordering::SeqCst);
    });
    let registration = manager.space().register(slow, &[mmio(0, 8)]).unwrap();
    let (other, other_dropped) = Named::new(1);
    let other = manager.space().register(IoDevice::mmio(other), &[mmio(8, 8)]).unwrap();
    let accessing = thread::spawn(move || vcpu.mmio_write(MmioAddress(0), &[0]));
    enter.recv_timeout(LIMIT).unwrap();
    // Another device is removed at once.
    assert!(matches!(other.remove(), Removal::Done));
    assert_eq!(other_dropped.load(Ordering::SeqCst), 1);
    let removing = thread::spawn(move || registration.remove_within(LIMIT));
    let mut vcpu = manager.vcpu();
    while read(&mut vcpu, 0).is_ok() {
        thread::yield_now();
    }
    assert!(!removing.is_finished(), "it has to wait");
    go.send(()).unwrap();
    assert!(matches!(removing.join().unwrap(), Removal::Done));
    assert!(left.load(Ordering::SeqCst), "it did not wait");
    assert_eq!(accessing.join().unwrap(), Ok(()));
}

#[test]
fn policy_7_removal_of_a_device_that_hangs_is_deferred() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let (inside, enter) = mpsc::channel();
    let (go, leave) = mpsc::channel::<()>();
    let leave = Mutex::new(leave);
    let (canary, dropped) = Named::new(1);
    let slow = does(move |_, _| {
        let _with = &canary;
        inside.send(()).unwrap();
        leave.lock().unwrap().recv_timeout(LIMIT).unwrap();
    });
    let registration = manager.space().register(slow, &[mmio(0, 8)]).unwrap();
    let accessing = thread::spawn(move || vcpu.mmio_write(MmioAddress(0), &[0]));
    enter.recv_timeout(LIMIT).unwrap();
    let removal = registration.remove_within(Duration::from_millis(1));
    assert!(matches!(removal, Removal::Deferred(_)) && !removal.is_over());
    // Its place is free.
    let (next, _) = Named::new(2);
    let _next = manager.space().register(IoDevice::mmio(next), &[mmio(0, 8)]).unwrap();
    assert_eq!(read(&mut manager.vcpu(), 0), Ok(2));
    assert_eq!(dropped.load(Ordering::SeqCst), 0);
    go.send(()).unwrap();
    accessing.join().unwrap().unwrap();
    assert!(removal.is_over());
    assert_eq!(dropped.load(Ordering::SeqCst), 1, "who leaves last drops it");
}

#[test]
fn a_device_removes_itself_from_inside_of_its_callback() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let (canary, dropped) = Named::new(1);
    let own: Arc<Mutex<Option<Registration>>> = Arc::default();
    let removal: Arc<Mutex<Option<Removal>>> = Arc::default();
    let (mine, seen, gone) = (own.clone(), removal.clone(), dropped.clone());
    let device = does(move |_, _| {
        let _with = &canary;
        let registration = mine.lock().unwrap().take().unwrap();
        let removal = registration.remove();
        assert!(!removal.is_over());
        *seen.lock().unwrap() = Some(removal);
        assert_eq!(gone.load(Ordering::SeqCst), 0, "it is dropped around us");
    });
    *own.lock().unwrap() = Some(manager.space().register(device, &[mmio(0, 8)]).unwrap());
    assert_eq!(vcpu.mmio_write(MmioAddress(0), &[0]), Ok(()));
    assert_eq!(dropped.load(Ordering::SeqCst), 1);
    assert!(removal.lock().unwrap().as_ref().unwrap().is_over());
    assert_eq!(read(&mut vcpu, 0), Err(Error::DeviceNotFound));
}

#[test]
fn two_vcpus_remove_each_others_device_at_once() {
    for through_manager in [false, true] {
        let manager = Arc::new(IoManager::new());
        let meet = Arc::new(Barrier::new(2));
        let registrations: [Arc<Mutex<Option<Registration>>>; 2] = Default::default();
        for at in 0..2 {
            let (meet, other) = (meet.clone(), registrations[1 - at].clone());
            let device = does(move |_, _| {
                meet.wait();
                let other = other.lock().unwrap().take().unwrap();
                assert!(matches!(other.remove(), Removal::Deferred(_) | Removal::Done));
            });
            let range = mmio(at as u64 * 8, 8);
            *registrations[at].lock().unwrap() = Some(manager.space().register(device, &[range]).unwrap());
        }
        let threads: Vec<_> = (0..2u64)
            .map(|at| {
                let manager = manager.clone();
                thread::spawn(move || match through_manager {
                    true => manager.mmio_write(MmioAddress(at * 8), &[0]),
                    false => manager.vcpu().mmio_write(MmioAddress(at * 8), &[0]),
                })
            })
            .collect();
        for thread in threads {
            assert_eq!(thread.join().unwrap(), Ok(()));
        }
    }
}

#[test]
fn a_guest_moves_a_device_from_inside_of_its_callback() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let own: Arc<OnceLock<Registration>> = Arc::default();
    let mine = own.clone();
    let device = does(move |_, data| {
        let base = u64::from(data[0]) << 8;
        mine.get().unwrap().set_ranges(&[mmio(base, 8)]).unwrap();
    });
    own.set(manager.space().register(device, &[mmio(0, 8)]).unwrap()).unwrap();
    for at in [5u8, 3, 3, 9] {
        let now = own.get().unwrap().ranges();
        let [IoRange::Mmio(now)] = now[..] else { panic!() };
        assert_eq!(vcpu.mmio_write(now.base(), &[at]), Ok(()));
        assert_eq!(read(&mut vcpu, u64::from(at) << 8), Ok(0));
    }
    assert_eq!(read(&mut vcpu, 0), Err(Error::DeviceNotFound));
}

#[test]
fn a_device_plugs_in_others_from_inside_of_its_callback() {
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let plugged: Arc<Mutex<Vec<Registration>>> = Arc::default();
    let (space, list): (IoSpace, _) = (manager.space(), plugged.clone());
    let device = does(move |offset, data| {
        let mut list = list.lock().unwrap();
        if data[0] == 0 {
            list.clear();
        } else {
            let (device, _) = Named::new(data[0]);
            list.push(space.register(IoDevice::mmio(device), &[mmio(0x1000 + offset, 1)]).unwrap());
        }
    });
    let _slot = manager.space().register(device, &[mmio(0, 8)]).unwrap();
    vcpu.mmio_write(MmioAddress(3), &[9]).unwrap();
    vcpu.mmio_write(MmioAddress(4), &[8]).unwrap();
    assert_eq!((read(&mut vcpu, 0x1003), read(&mut vcpu, 0x1004)), (Ok(9), Ok(8)));
    vcpu.mmio_write(MmioAddress(0), &[0]).unwrap();
    assert_eq!(read(&mut vcpu, 0x1003), Err(Error::DeviceNotFound));
}

#[test]
fn a_device_accesses_another_through_the_manager() {
    let manager = Arc::new(IoManager::new());
    let (target, _) = Named::new(6);
    let _target = manager.space().register(IoDevice::mmio(target.clone()), &[mmio(0x1000, 8)]).unwrap();
    let weak = Arc::downgrade(&manager);
    let bridge = does(move |offset, data| {
        weak.upgrade().unwrap().mmio_write(MmioAddress(0x1000 + offset), data).unwrap();
    });
    let _bridge = manager.space().register(bridge, &[mmio(0, 8)]).unwrap();
    manager.vcpu().mmio_write(MmioAddress(5), &[0]).unwrap();
    assert_eq!(target.last(), (0x1000, 5));
}

#[test]
fn policy_5_a_device_that_panics_fails_alone() {
    /// Panics even when what it threw is dropped.
    struct Thrown;
    impl Drop for Thrown {
        fn drop(&mut self) {
            panic!("dropped what was thrown");
        }
    }
    let manager = IoManager::new();
    let mut vcpu = manager.vcpu();
    let bad = does(|_, _| std::panic::panic_any(Thrown));
    let bad = manager.space().register(bad, &[mmio(0, 8), mmio(0x100, 8)]).unwrap();
    let (good, _) = Named::new(1);
    let good = manager.space().register(IoDevice::mmio(good), &[mmio(8, 8)]).unwrap();
    assert_eq!(read(&mut vcpu, 0), Ok(0));
    assert_eq!(vcpu.mmio_write(MmioAddress(0), &[0]), Err(Error::DeviceFailed));
    assert!(bad.has_failed() && !good.has_failed());
    // All of its ranges, for all vCPUs.
    assert_eq!(read(&mut vcpu, 0x100), Err(Error::DeviceFailed));
    assert_eq!(read(&mut manager.vcpu(), 0), Err(Error::DeviceFailed));
    assert_eq!(manager.mmio_write(MmioAddress(0), &[0]), Err(Error::DeviceFailed));
    assert_eq!((vcpu.counts().panics, vcpu.counts().failed), (1, 3));
    assert_eq!(read(&mut vcpu, 8), Ok(1));
    // Who has reset it may open it again; it can be removed, too.
    bad.open();
    assert_eq!(read(&mut vcpu, 0), Ok(0));
    assert_eq!(vcpu.mmio_write(MmioAddress(0), &[0]), Err(Error::DeviceFailed));
    assert!(matches!(bad.remove(), Removal::Done));
    assert_eq!(read(&mut vcpu, 0), Err(Error::DeviceNotFound));
}

#[test]
fn a_device_whose_drop_panics_harms_nobody() {
    struct Bad;
    impl Drop for Bad {
        fn drop(&mut self) {
            panic!("dropped");
        }
    }
    let manager = IoManager::new();
    let bad = Bad;
    let device = does(move |_, _| {
        let _with = &bad;
    });
    let registration = manager.space().register(device, &[mmio(0, 8)]).unwrap();
    assert!(matches!(registration.remove(), Removal::Done));
}

/// Devices that know whether they are alive, plugged in and out, moved and accessed from all sides.
#[test]
fn devices_are_reached_only_while_they_are_registered() {
    const ROUNDS: u64 = 3_000;
    struct Live {
        alive: AtomicBool,
        base: AtomicU64,
    }
    impl DeviceMmio for Live {
        fn mmio_read(&self, base: MmioAddress, _: u64, data: &mut [u8]) {
            assert!(self.alive.load(Ordering::Relaxed), "reached a dropped device");
            let now = self.base.load(Ordering::Relaxed);
            assert!(now == base.0 || now == base.0 ^ 0x100, "{now:#x} {base:?}");
            data.fill(1);
        }
        fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
    }
    impl Drop for Live {
        fn drop(&mut self) {
            self.alive.store(false, Ordering::Relaxed);
        }
    }
    let manager = IoManager::new();
    let (fixed, _) = Named::new(9);
    let _fixed = manager.space().register(IoDevice::mmio(fixed), &[mmio(0x8000, 8)]).unwrap();
    let end = AtomicBool::new(false);
    let hits = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..2 {
            let mut vcpu = manager.vcpu();
            let (end, hits) = (&end, &hits);
            scope.spawn(move || {
                while !end.load(Ordering::Relaxed) {
                    for addr in [0, 0x100, 0x1000, 0x1100] {
                        match read(&mut vcpu, addr) {
                            Ok(1) => _ = hits.fetch_add(1, Ordering::Relaxed),
                            Err(Error::DeviceNotFound) => (),
                            other => panic!("{other:?}"),
                        }
                    }
                    assert_eq!(read(&mut vcpu, 0x8000), Ok(9));
                }
            });
        }
        let pluggers: Vec<_> = [0u64, 0x1000]
            .into_iter()
            .map(|base| {
                let space = manager.space();
                scope.spawn(move || {
                    for round in 0..ROUNDS {
                        let device = Arc::new(Live { alive: true.into(), base: base.into() });
                        let registration =
                            space.register(IoDevice::mmio(device.clone()), &[mmio(base, 8)]).unwrap();
                        if round % 2 == 0 {
                            registration.set_ranges(&[mmio(base ^ 0x100, 8)]).unwrap();
                        }
                        assert!(matches!(registration.remove(), Removal::Done));
                        assert_eq!(Arc::strong_count(&device), 1, "somebody still has it");
                    }
                })
            })
            .collect();
        for plugger in pluggers {
            plugger.join().unwrap();
        }
        end.store(true, Ordering::Relaxed);
    });
    println!("{} accesses reached a device that came and went", hits.load(Ordering::Relaxed));
    assert_eq!(manager.counts().panics, 0);
}
