//! `IoManager`: names and semantics of rust-vmm's `vm-device`, without what its users have to live with.
use std::sync::{Arc, Mutex};

use vm_device::bus::{self, Bus, BusManager, MmioAddress, MmioRange, PioAddress, PioBus, PioRange};
use vm_device::device_manager::{Error, IoManager, MmioManager, PioManager};
use vm_device::resources::Resource;
use vm_device::{DeviceMmio, DevicePio, MutDeviceMmio, MutDevicePio};

/// Reads as what was written last, wherever.
#[derive(Default)]
struct Cell(u8);

impl MutDevicePio for Cell {
    fn pio_read(&mut self, _: PioAddress, _: u16, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn pio_write(&mut self, _: PioAddress, _: u16, data: &[u8]) {
        self.0 = data[0];
    }
}

impl MutDeviceMmio for Cell {
    fn mmio_read(&mut self, _: MmioAddress, _: u64, data: &mut [u8]) {
        data.fill(self.0);
    }
    fn mmio_write(&mut self, _: MmioAddress, _: u64, data: &[u8]) {
        self.0 = data[0];
    }
}

/// The same for both spaces at once.
#[derive(Default)]
struct Both(Mutex<Cell>);

impl DevicePio for Both {
    fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
        self.0.pio_read(base, offset, data);
    }
    fn pio_write(&self, base: PioAddress, offset: u16, data: &[u8]) {
        self.0.pio_write(base, offset, data);
    }
}

impl DeviceMmio for Both {
    fn mmio_read(&self, base: MmioAddress, offset: u64, data: &mut [u8]) {
        self.0.mmio_read(base, offset, data);
    }
    fn mmio_write(&self, base: MmioAddress, offset: u64, data: &[u8]) {
        self.0.mmio_write(base, offset, data);
    }
}

fn cell() -> Arc<Mutex<Cell>> {
    Arc::default()
}

const PIO: Resource = Resource::PioAddressRange { base: 0x10, size: 4 };
const MMIO: Resource = Resource::MmioAddressRange { base: 0x1000, size: 0x100 };

#[test]
fn devices_are_found_and_given_back() {
    let mut manager = IoManager::new();
    let (ports, memory) = (cell(), cell());
    manager.register_pio(PioRange::new(PioAddress(8), 4).unwrap(), ports.clone()).unwrap();
    manager.register_mmio(MmioRange::new(MmioAddress(8), 4).unwrap(), memory.clone()).unwrap();
    assert!(manager.pio_device(PioAddress(7)).is_none() && manager.pio_device(PioAddress(12)).is_none());
    let (range, device) = manager.mmio_device(MmioAddress(11)).unwrap();
    assert_eq!((range.base(), range.size()), (MmioAddress(8), 4));
    device.mmio_write(range.base(), 0, &[5]);
    let mut data = [0; 2];
    manager.mmio_read(MmioAddress(9), &mut data).unwrap();
    assert_eq!(data, [5, 5]);
    manager.vcpu().pio_write(PioAddress(8), &[6]).unwrap();
    assert_eq!(ports.lock().unwrap().0, 6);

    // By any address of the range; the device comes back, and nobody else has it.
    let (range, _) = manager.deregister_pio(PioAddress(11)).unwrap();
    assert_eq!(range.size(), 4);
    assert!(manager.deregister_pio(PioAddress(11)).is_none());
    assert_eq!(Arc::strong_count(&ports), 1);
    assert_eq!(manager.pio_write(PioAddress(8), &[6]), Err(bus::Error::DeviceNotFound));
    drop(manager);
    assert_eq!(Arc::strong_count(&memory), 1);
}

#[test]
fn peers_vm_device_registration_is_not_rolled_back_ours_is() {
    let mut manager = IoManager::new();
    manager.register_mmio(MmioRange::new(MmioAddress(0x1080), 1).unwrap(), cell()).unwrap();
    let both = Arc::new(Both::default());
    let taken = Err(Error::Bus(bus::Error::DeviceOverlap));
    assert_eq!(manager.register_resources(both.clone(), &[PIO, MMIO]), taken);
    assert!(manager.pio_device(PioAddress(0x10)).is_none());
    assert_eq!(manager.pio_write(PioAddress(0x10), &[0]), Err(bus::Error::DeviceNotFound));
    assert_eq!(Arc::strong_count(&both), 1);
    let twice = [MMIO, Resource::MmioAddressRange { base: 0x10ff, size: 1 }];
    manager.deregister_mmio(MmioAddress(0x1080)).unwrap();
    assert_eq!(manager.register_mmio_resources(cell(), &twice), taken);
    manager.register_resources(both, &[PIO, MMIO]).unwrap();
}

#[test]
fn peers_vm_device_a_zero_size_resource_panics_ours_is_refused() {
    let mut manager = IoManager::new();
    let refused = Err(Error::Bus(bus::Error::InvalidRange));
    for bad in [
        Resource::PioAddressRange { base: 0, size: 0 },
        Resource::PioAddressRange { base: 0xffff, size: 2 },
        Resource::MmioAddressRange { base: 5, size: 0 },
        Resource::MmioAddressRange { base: u64::MAX, size: 2 },
    ] {
        assert_eq!(manager.register_resources(Arc::new(Both::default()), &[PIO, bad, MMIO]), refused);
        assert!(manager.pio_device(PioAddress(0x10)).is_none());
    }
}

#[test]
fn peers_vm_device_an_unclaimed_read_leaves_the_buffer_ours_fills_it() {
    let manager = IoManager::new();
    let mut data = [0x55; 4];
    assert_eq!(manager.mmio_read(MmioAddress(0), &mut data), Err(bus::Error::DeviceNotFound));
    assert_eq!(data, [0xff; 4]);
    assert_eq!(manager.counts().unclaimed, 1);
}

#[test]
fn resources_of_other_kinds_are_left_alone() {
    let mut manager = IoManager::new();
    let others = [Resource::LegacyIrq(4), Resource::KvmMemSlot(1)];
    manager.register_resources(Arc::new(Both::default()), &others).unwrap();
    manager.register_pio_resources(cell(), &[MMIO, PIO]).unwrap();
    assert!(manager.mmio_device(MmioAddress(0x1000)).is_none());
    assert_eq!(manager.deregister_resources(&others), 0);
    assert_eq!(manager.deregister_resources(&[PIO, MMIO, PIO]), 1);
}

#[test]
fn ranges_that_were_registered_together_go_one_by_one() {
    let mut manager = IoManager::new();
    let both = Arc::new(Both::default());
    manager.register_resources(both.clone(), &[PIO, MMIO]).unwrap();
    assert_eq!(manager.deregister_resources(&[MMIO]), 1);
    assert_eq!(manager.mmio_write(MmioAddress(0x1000), &[1]), Err(bus::Error::DeviceNotFound));
    manager.pio_write(PioAddress(0x13), &[9]).unwrap();
    assert_eq!(both.0.lock().unwrap().0, 9);
    assert_eq!(manager.deregister_resources(&[PIO]), 1);
    assert_eq!(Arc::strong_count(&both), 1);
}

#[test]
fn a_panic_fails_all_ranges_that_were_registered_together() {
    let mut manager = IoManager::new();
    manager.register_resources(Arc::new(Both::default()), &[PIO, MMIO]).unwrap();
    // A write without a byte does not get so far; the cell of two spaces panics on nothing else.
    struct Bad;
    impl MutDevicePio for Bad {
        fn pio_read(&mut self, _: PioAddress, _: u16, _: &mut [u8]) {
            panic!("bad");
        }
        fn pio_write(&mut self, _: PioAddress, _: u16, _: &[u8]) {}
    }
    let ranges = [0x40, 0x50].map(|base| Resource::PioAddressRange { base, size: 1 });
    manager.register_pio_resources(Arc::new(Mutex::new(Bad)), &ranges).unwrap();
    let mut data = [0];
    assert_eq!(manager.pio_read(PioAddress(0x40), &mut data), Err(bus::Error::DeviceFailed));
    assert_eq!(data, [0xff]);
    assert_eq!(manager.pio_write(PioAddress(0x50), &data), Err(bus::Error::DeviceFailed));
    manager.pio_write(PioAddress(0x10), &data).unwrap();
}

#[test]
fn whoever_owns_a_bus_is_a_manager() {
    #[derive(Default)]
    struct Own(PioBus<Mutex<Cell>>);
    impl BusManager<PioAddress> for Own {
        type D = Mutex<Cell>;
        fn bus(&self) -> &Bus<PioAddress, Self::D> {
            &self.0
        }
        fn bus_mut(&mut self) -> &mut Bus<PioAddress, Self::D> {
            &mut self.0
        }
    }
    let mut own = Own::default();
    own.register_pio(PioRange::unit(PioAddress(1)), Mutex::default()).unwrap();
    own.pio_write(PioAddress(1), &[4]).unwrap();
    let mut data = [0];
    own.pio_read(PioAddress(1), &mut data).unwrap();
    assert_eq!(data, [4]);
    assert!(own.pio_read(PioAddress(0), &mut data).is_err());
    assert_eq!(data, [0xff]);
    own.0.device_mut(PioAddress(1)).unwrap().1.get_mut().unwrap().0 = 7;
    assert_eq!(own.deregister_pio(PioAddress(1)).unwrap().1.into_inner().unwrap().0, 7);
}

#[test]
fn policy_5_a_poisoned_mutex_reads_as_ones() {
    struct Bad;
    impl MutDeviceMmio for Bad {
        fn mmio_read(&mut self, _: MmioAddress, _: u64, data: &mut [u8]) {
            data.fill(0);
        }
        fn mmio_write(&mut self, _: MmioAddress, _: u64, _: &[u8]) {
            panic!("bad");
        }
    }
    let (mut one, mut other) = (IoManager::new(), IoManager::new());
    let device = Arc::new(Mutex::new(Bad));
    let range = MmioRange::unit(MmioAddress(0));
    one.register_mmio(range, device.clone()).unwrap();
    other.register_mmio(range, device).unwrap();
    assert_eq!(one.mmio_write(MmioAddress(0), &[0]), Err(bus::Error::DeviceFailed));
    let mut data = [0];
    other.mmio_read(MmioAddress(0), &mut data).unwrap();
    assert_eq!(data, [0xff]);
}
