//! `DeviceManager`: all or nothing, the tree, and devices that misbehave.
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use device_state::{Section, StateError};
use vm_device::DeviceMmio;
use vm_device::bus::{self, MmioAddress, MmioRange};
use vm_device::device_manager::{Device, DeviceError, DeviceManager, IoResource, IoType, IrqResource};
use vm_device::dispatch::{IoDevice, Removal};
use vm_device::resources::{Pool, ResourceError, SystemAllocator};
use vm_memory::GuestAddress;

type Given = (Vec<IoResource>, Option<IrqResource>);

/// A byte that knows what it was given, and fails when it is told to.
#[derive(Default)]
struct Byte {
    name: &'static str,
    value: Mutex<u8>,
    given: Mutex<Option<Given>>,
    last: Mutex<Option<(u64, IoType)>>,
    panics: AtomicBool,
}

impl Byte {
    fn new(name: &'static str) -> Arc<Byte> {
        Arc::new(Byte { name, ..Byte::default() })
    }

    fn bad(name: &'static str) -> Arc<Byte> {
        let byte = Byte::new(name);
        byte.panics.store(true, Ordering::Relaxed);
        byte
    }

    fn set(&self, value: u8) {
        *self.value.lock().unwrap() = value;
    }

    fn get(&self) -> u8 {
        *self.value.lock().unwrap()
    }

    fn check(&self) {
        assert!(!self.panics.load(Ordering::Relaxed), "told to");
    }
}

impl Device for Byte {
    fn name(&self) -> String {
        self.name.to_string()
    }

    fn read(&self, addr: GuestAddress, data: &mut [u8], io_type: IoType) {
        self.check();
        *self.last.lock().unwrap() = Some((addr.0, io_type));
        data.fill(self.get());
    }

    fn write(&self, addr: GuestAddress, data: &[u8], io_type: IoType) {
        self.check();
        *self.last.lock().unwrap() = Some((addr.0, io_type));
        self.set(data[0]);
    }

    fn set_resources(&self, res: &[IoResource], irq: Option<IrqResource>) {
        self.check();
        *self.given.lock().unwrap() = Some((res.to_vec(), irq));
    }

    fn reset(&self) {
        self.check();
        self.set(0);
    }

    fn save(&self) -> Result<Section, StateError> {
        self.check();
        Ok(Section::from_bytes(1, vec![self.get()]))
    }

    fn restore(&self, state: &Section) -> Result<(), StateError> {
        self.check();
        match state.bytes() {
            [value] if *value < 0x80 => self.set(*value),
            _ => return Err(StateError::Malformed),
        }
        Ok(())
    }
}

fn allocator() -> SystemAllocator {
    SystemAllocator::new(None, None, GuestAddress(0x1000_0000), 0x1000_0000, 5, 8, 100).unwrap()
}

/// All that is given away.
fn all(allocator: &SystemAllocator) -> Vec<(u64, u64)> {
    let pools = [Pool::Pio, Pool::Mmio, Pool::Irq, Pool::InstanceId];
    pools.iter().flat_map(|pool| allocator.allocated(*pool)).collect()
}

fn at(addr: u64, size: u64, io_type: IoType) -> IoResource {
    IoResource::new(Some(GuestAddress(addr)), size, io_type)
}

fn any(size: u64, io_type: IoType) -> IoResource {
    IoResource::new(None, size, io_type)
}

#[test]
fn a_device_is_given_what_it_asks_for_and_told() {
    let allocator = allocator();
    let mut devices = DeviceManager::new(&allocator);
    let byte = Byte::new("byte");
    let mut resources = [
        any(3, IoType::Pio),
        at(0x3f8, 8, IoType::Pio),
        any(0x10, IoType::Mmio),
        any(0x2000, IoType::PhysicalMmio),
    ];
    let id = devices.register_device(byte.clone(), None, &mut resources, Some(IrqResource(None))).unwrap();
    assert_eq!(id, 100);
    let place = resources.map(|resource| resource.addr.unwrap().0);
    assert_eq!(place, [0, 0x3f8, 0x1000_0000, 0x1000_1000]);
    assert_eq!(*byte.given.lock().unwrap(), Some((resources.to_vec(), Some(IrqResource(Some(5))))));

    // Devices see absolute addresses.
    devices.write(GuestAddress(0x3fb), &[9], IoType::Pio).unwrap();
    assert_eq!(*byte.last.lock().unwrap(), Some((0x3fb, IoType::Pio)));
    let mut data = [0; 4];
    devices.vcpu().mmio_read(MmioAddress(0x1000_0004), &mut data).unwrap();
    assert_eq!(*byte.last.lock().unwrap(), Some((0x1000_0004, IoType::Mmio)));
    assert_eq!(data, [9; 4]);
    // What has pages behind it causes no exits; if one comes all the same, nobody answers.
    let mapped = GuestAddress(place[3]);
    assert_eq!(devices.read(mapped, &mut data, IoType::PhysicalMmio), Err(bus::Error::DeviceNotFound));
    assert_eq!(data, [0xff; 4]);
    let mut other = [at(place[3], 1, IoType::Mmio)];
    let taken = devices.register_device(Byte::new("other"), None, &mut other, None);
    assert!(matches!(taken, Err(DeviceError::Resource(ResourceError::InUse { .. }))));
    // Ports beyond the last one.
    data.fill(0);
    let beyond = GuestAddress(0x1_03f8);
    assert_eq!(devices.read(beyond, &mut data, IoType::Pio), Err(bus::Error::InvalidRange));
    assert_eq!(devices.write(beyond, &data, IoType::Pio), Err(bus::Error::InvalidRange));
    assert_eq!((data, devices.counts().invalid), ([0xff; 4], 2));

    assert!(devices.unregister_device(id).unwrap().is_over());
    assert!(all(&allocator).is_empty());
    assert_eq!(Arc::strong_count(&byte), 1);
    assert_eq!(devices.unregister_device(id).unwrap_err(), DeviceError::Unknown(id));
    assert!(devices.is_empty());
}

#[test]
fn registration_is_all_or_nothing_at_every_step() {
    let allocator = allocator();
    let mut devices = DeviceManager::new(&allocator);
    let good = [any(8, IoType::Pio), any(0x1000, IoType::Mmio)];
    devices.register_device(Byte::new("first"), None, &mut good.clone(), Some(IrqResource(Some(6)))).unwrap();
    // Not known to the allocator, but in the way.
    struct Nothing;
    impl DeviceMmio for Nothing {
        fn mmio_read(&self, _: MmioAddress, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
    }
    let hidden = MmioRange::new(MmioAddress(0x1800_0000), 1).unwrap();
    let _hidden = devices.space().register(IoDevice::mmio(Arc::new(Nothing)), &[hidden.into()]).unwrap();
    let before = all(&allocator);
    let bad_last = [
        at(0x1000_0000, 1, IoType::Mmio),
        at(0x1800_0000, 1, IoType::Mmio),
        at(0, 1, IoType::Mmio),
        at(0x1fff_ffff, 2, IoType::Mmio),
        at(u64::MAX, 2, IoType::Mmio),
        any(0, IoType::Mmio),
        any(0x1000_0000, IoType::PhysicalMmio),
        any(0, IoType::Pio),
        at(0xffff, 2, IoType::Pio),
        at(0x1_0000, 1, IoType::Pio),
        any(0x1_0000, IoType::Pio),
    ];
    let byte = Byte::new("second");
    for bad in bad_last {
        let mut resources = [good[0], good[1], bad];
        let refused = devices.register_device(byte.clone(), None, &mut resources, None).unwrap_err();
        assert!(matches!(refused, DeviceError::Resource(_) | DeviceError::Bus(_)), "{bad}: {refused}");
        assert_eq!(resources, [good[0], good[1], bad], "they are as they were");
        assert_eq!(all(&allocator), before, "{bad}");
    }
    for irq in [6, 4, 9, u32::MAX] {
        let refused =
            devices.register_device(byte.clone(), None, &mut good.clone(), Some(IrqResource(Some(irq))));
        assert!(matches!(refused, Err(DeviceError::Resource(_))));
        assert_eq!(all(&allocator), before);
    }
    let refused = devices.register_device(byte.clone(), Some(7), &mut good.clone(), None);
    assert_eq!(refused.unwrap_err(), DeviceError::Unknown(7));
    assert!(byte.given.lock().unwrap().is_none(), "it was told of what it did not get");
    let bad = devices.register_device(Byte::bad("bad"), None, &mut good.clone(), None);
    assert_eq!(bad.unwrap_err(), DeviceError::Failed { name: "bad".to_string() });
    assert_eq!((all(&allocator), devices.len()), (before, 1));
    // Interrupts run out: four lines, one is taken.
    for left in [2, 1, 0] {
        devices.register_device(Byte::new("more"), None, &mut [], Some(IrqResource(None))).unwrap();
        assert_eq!(allocator.allocated(Pool::Irq).len(), 4 - left);
    }
    let exhausted = devices.register_device(byte.clone(), None, &mut good.clone(), Some(IrqResource(None)));
    assert!(matches!(exhausted, Err(DeviceError::Resource(ResourceError::Exhausted { .. }))));
    assert_eq!(Arc::strong_count(&byte), 1);
}

#[test]
fn buses_and_devices_are_a_tree() {
    let allocator = allocator();
    let mut devices = DeviceManager::new(&allocator);
    let add = |devices: &mut DeviceManager, name, parent, res: &mut [IoResource], irq| {
        devices.register_device(Byte::new(name), parent, res, irq).unwrap()
    };
    let bus = add(&mut devices, "pci", None, &mut [any(0x10_0000, IoType::PhysicalMmio)], None);
    let serial =
        add(&mut devices, "serial", None, &mut [at(0x3f8, 8, IoType::Pio)], Some(IrqResource(Some(5))));
    let disk = add(&mut devices, "disk", Some(bus), &mut [any(0x1000, IoType::Mmio)], None);
    let bridge = add(&mut devices, "bridge", Some(bus), &mut [], None);
    let net =
        add(&mut devices, "net", Some(bridge), &mut [any(0x800, IoType::Mmio), any(4, IoType::Pio)], None);
    assert_eq!(
        devices.to_string(),
        "100 pci: mapped memory 0x10000000+0x100000\n\
         \x20 102 disk: memory 0x10100000+0x1000\n\
         \x20 103 bridge\n\
         \x20   104 net: memory 0x10101000+0x800, ports 0x0+0x4\n\
         101 serial: ports 0x3f8+0x8, interrupt 5\n"
    );
    let walked: Vec<_> = devices.walk().map(|node| (node.id, node.depth, node.parent())).collect();
    assert_eq!(
        walked,
        [
            (bus, 0, None),
            (disk, 1, Some(bus)),
            (bridge, 1, Some(bus)),
            (net, 2, Some(bridge)),
            (serial, 0, None)
        ]
    );
    let node = devices.device(net).unwrap();
    assert_eq!((node.depth, node.device().name(), node.irq()), (2, "net".to_string(), None));
    assert_eq!(devices.device(bus).unwrap().children(), [disk, bridge]);
    assert!(devices.device(99).is_none());

    assert_eq!(devices.unregister_device(bus).unwrap_err(), DeviceError::HasChildren(bus));
    devices.unregister_device(disk).unwrap().is_over();
    assert_eq!(devices.device(bus).unwrap().children(), [bridge]);
    assert!(devices.unregister_tree(bus).unwrap());
    assert_eq!(devices.walk().map(|node| node.id).collect::<Vec<_>>(), [serial]);
    assert_eq!(all(&allocator).len(), 3);
    assert_eq!(devices.unregister_tree(bus).unwrap_err(), DeviceError::Unknown(bus));
}

#[test]
fn a_deferred_removal_keeps_its_resources_until_it_is_over() {
    /// Removes itself when it is written to.
    #[derive(Default)]
    struct Suicidal {
        devices: Mutex<Option<Arc<Mutex<DeviceManager>>>>,
        id: Mutex<u32>,
    }
    impl Device for Suicidal {
        fn name(&self) -> String {
            "suicidal".to_string()
        }
        fn read(&self, _: GuestAddress, _: &mut [u8], _: IoType) {}
        fn write(&self, _: GuestAddress, _: &[u8], _: IoType) {
            let devices = self.devices.lock().unwrap().take().unwrap();
            let mut devices = devices.lock().unwrap();
            let removal = devices.unregister_device(*self.id.lock().unwrap()).unwrap();
            assert!(matches!(removal, Removal::Deferred(_)) && !removal.is_over());
            let again = devices.register_device(Byte::new("next"), None, &mut [at(8, 8, IoType::Pio)], None);
            assert!(matches!(again, Err(DeviceError::Resource(ResourceError::InUse { .. }))));
        }
        fn set_resources(&self, _: &[IoResource], _: Option<IrqResource>) {}
    }
    let allocator = allocator();
    let devices = Arc::new(Mutex::new(DeviceManager::new(&allocator)));
    let mut vcpu = devices.lock().unwrap().vcpu();
    let device = Arc::new(Suicidal::default());
    *device.devices.lock().unwrap() = Some(devices.clone());
    let mut resources = [at(8, 8, IoType::Pio)];
    let id = devices.lock().unwrap().register_device(device.clone(), None, &mut resources, None).unwrap();
    *device.id.lock().unwrap() = id;
    vcpu.pio_write(bus::PioAddress(8), &[0]).unwrap();
    assert_eq!(Arc::strong_count(&device), 1);
    let mut devices = devices.lock().unwrap();
    assert!(devices.is_empty());
    let next = devices.register_device(Byte::new("next"), None, &mut resources, None).unwrap();
    assert_eq!((next, allocator.allocated(Pool::Pio).len()), (id, 1));
}

#[test]
fn policy_5_a_device_that_panics_fails_and_a_reset_brings_it_back() {
    let allocator = allocator();
    let mut devices = DeviceManager::new(&allocator);
    let (bad, good) = (Byte::new("bad"), Byte::new("good"));
    let id = devices.register_device(bad.clone(), None, &mut [at(0, 8, IoType::Pio)], None).unwrap();
    devices.register_device(good.clone(), Some(id), &mut [at(8, 8, IoType::Pio)], None).unwrap();
    bad.panics.store(true, Ordering::Relaxed);
    let write = |devices: &DeviceManager, addr| devices.write(GuestAddress(addr), &[3], IoType::Pio);
    assert_eq!(write(&devices, 0), Err(bus::Error::DeviceFailed));
    assert_eq!(write(&devices, 8), Ok(()));
    assert!(devices.device(id).unwrap().has_failed());
    assert!(devices.to_string().starts_with("100 bad: ports 0x0+0x8, failed\n"));
    let failed = Err(DeviceError::Failed { name: "bad".to_string() });
    assert_eq!(devices.save().map(drop), failed);
    // It panics once more; who is below is reset all the same.
    assert_eq!(devices.reset_device(id), failed);
    assert_eq!(good.get(), 0);
    bad.panics.store(false, Ordering::Relaxed);
    assert_eq!(write(&devices, 0), Err(bus::Error::DeviceFailed));
    devices.reset().unwrap();
    assert_eq!(write(&devices, 0), Ok(()));
    assert_eq!(devices.reset_device(9), Err(DeviceError::Unknown(9)));
}

fn machine(names: &[&'static str]) -> (DeviceManager, Vec<Arc<Byte>>) {
    let mut devices = DeviceManager::new(&allocator());
    let bytes: Vec<_> = names.iter().map(|name| Byte::new(name)).collect();
    for byte in &bytes {
        devices.register_device(byte.clone(), None, &mut [any(1, IoType::Pio)], None).unwrap();
    }
    (devices, bytes)
}

#[test]
fn a_machine_is_saved_and_restored() {
    let (from, bytes) = machine(&["one", "two"]);
    bytes[0].set(1);
    bytes[1].set(2);
    let state = from.save().unwrap();
    let (to, restored) = machine(&["one", "two"]);
    to.restore(&state).unwrap();
    assert_eq!((restored[0].get(), restored[1].get()), (1, 2));

    for other in [&["one"][..], &["one", "other"], &["two", "one"], &["one", "two", "three"]] {
        let (other, bytes) = machine(other);
        bytes[0].set(7);
        assert_eq!(other.restore(&state), Err(DeviceError::OtherMachine));
        assert_eq!(bytes[0].get(), 7, "it was touched");
    }
}

#[test]
fn a_bad_state_leaves_reset_devices() {
    let (from, bytes) = machine(&["one", "two"]);
    bytes[1].set(0x80);
    let state = from.save().unwrap();
    let (to, restored) = machine(&["one", "two"]);
    restored[0].set(9);
    restored[1].set(9);
    let refused = DeviceError::State { name: "two".to_string(), error: StateError::Malformed };
    assert_eq!(to.restore(&state), Err(refused));
    assert_eq!((restored[0].get(), restored[1].get()), (0, 0));
    // Every cut, and every byte wrong: an error or values of this machine, never a panic.
    for end in 0..state.bytes().len() {
        let cut = Section::from_bytes(state.version(), state.bytes()[..end].to_vec());
        assert!(to.restore(&cut).is_err());
        let mut wrong = state.bytes().to_vec();
        wrong[end] ^= 0xff;
        let _ = to.restore(&Section::from_bytes(state.version(), wrong));
    }
    let newer = Section::from_bytes(state.version() + 1, state.bytes().to_vec());
    assert!(matches!(to.restore(&newer), Err(DeviceError::State { .. })));
    restored[1].panics.store(true, Ordering::Relaxed);
    bytes[1].set(1);
    let failed = DeviceError::Failed { name: "two".to_string() };
    assert_eq!(to.restore(&from.save().unwrap()), Err(failed));
}

#[test]
fn a_device_that_cannot_be_saved_is_named() {
    struct Plain;
    impl Device for Plain {
        fn name(&self) -> String {
            "plain".to_string()
        }
        fn read(&self, _: GuestAddress, _: &mut [u8], _: IoType) {}
        fn write(&self, _: GuestAddress, _: &[u8], _: IoType) {}
        fn set_resources(&self, _: &[IoResource], _: Option<IrqResource>) {}
    }
    let mut devices = DeviceManager::new(&allocator());
    devices.register_device(Arc::new(Plain), None, &mut [], None).unwrap();
    let error = DeviceError::State { name: "plain".to_string(), error: StateError::Unsupported };
    assert_eq!(devices.save().unwrap_err(), error);
    devices.reset().unwrap();
}
