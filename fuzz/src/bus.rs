//! The buses of a machine: devices that come, move, fail and go, and accesses of any kind.
use std::sync::Arc;

use vm_device::bus::{Error, MmioAddress, MmioRange, PioAddress, PioRange};
use vm_device::device_manager::{Device, DeviceManager, IoResource, IoType, IrqResource};
use vm_device::dispatch::{IoDevice, IoRange, Registration, VcpuIo};
use vm_device::resources::{Pool, SystemAllocator};
use vm_device::{DeviceMmio, DevicePio};
use vm_memory::GuestAddress;

use crate::bytes::Bytes;

/// Reads as 0x11, and panics when it reads 13 bytes, if the access is within a range of its own.
struct Subject;

impl Subject {
    fn answer(&self, data: &mut [u8]) {
        if data.len() == 13 {
            // Without a word on the terminal, and of no size: what a device throws is never dropped, and leaks.
            std::panic::resume_unwind(Box::new(()));
        }
        data.fill(0x11);
    }
}

impl DevicePio for Subject {
    fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
        assert!(base.0.checked_add(offset).is_some(), "an address beyond the last port");
        self.answer(data);
    }
    fn pio_write(&self, _: PioAddress, _: u16, _: &[u8]) {}
}

impl DeviceMmio for Subject {
    fn mmio_read(&self, base: MmioAddress, offset: u64, data: &mut [u8]) {
        assert!(base.0.checked_add(offset).is_some(), "an address beyond the last one");
        self.answer(data);
    }
    fn mmio_write(&self, _: MmioAddress, _: u64, _: &[u8]) {}
}

impl Device for Subject {
    fn name(&self) -> String {
        "subject".to_string()
    }
    fn read(&self, _: GuestAddress, data: &mut [u8], _: IoType) {
        self.answer(data);
    }
    fn write(&self, _: GuestAddress, _: &[u8], _: IoType) {}
    fn set_resources(&self, res: &[IoResource], irq: Option<IrqResource>) {
        assert!(res.iter().all(|one| one.addr.is_some()) && irq != Some(IrqResource(None)));
    }
}

/// Mostly small, sometimes at an end.
fn number(bytes: &mut Bytes<'_>) -> u64 {
    let number = u64::from(bytes.u8());
    match bytes.below(8) {
        0 => u64::MAX - number,
        1 => 0xffff - number,
        2 => 1 << (number % 64),
        3 => bytes.u64(),
        _ => number,
    }
}

fn ranges(bytes: &mut Bytes<'_>) -> Vec<IoRange> {
    let count = bytes.below(4);
    let range = |bytes: &mut Bytes<'_>| -> Result<IoRange, Error> {
        let (ports, base, size) = (bytes.bool(), number(bytes), number(bytes));
        match ports {
            true => Ok(PioRange::new(PioAddress(base as u16), size as u16)?.into()),
            false => Ok(MmioRange::new(MmioAddress(base), size)?.into()),
        }
    };
    (0..count).filter_map(|_| range(bytes).ok()).collect()
}

fn access(vcpu: &mut VcpuIo, devices: &DeviceManager, bytes: &mut Bytes<'_>) {
    let (how, addr, len) = (bytes.u8(), number(bytes), usize::from(bytes.u8()));
    let mut data = vec![0x55; if how & 0x80 != 0 { len << 12 } else { len }];
    let done = match how % 8 {
        0 => vcpu.pio_read(PioAddress(addr as u16), &mut data),
        1 => vcpu.mmio_read(MmioAddress(addr), &mut data),
        2 => vcpu.pio_write(PioAddress(addr as u16), &data),
        3 => vcpu.mmio_write(MmioAddress(addr), &data),
        4 => devices.read(GuestAddress(addr), &mut data, IoType::Pio),
        5 => devices.read(GuestAddress(addr), &mut data, IoType::Mmio),
        6 => devices.write(GuestAddress(addr), &data, IoType::Pio),
        _ => devices.write(GuestAddress(addr), &data, IoType::PhysicalMmio),
    };
    if matches!(how % 8, 0 | 1 | 4 | 5) {
        let expected = if done.is_ok() { 0x11 } else { 0xff };
        assert!(data.iter().all(|byte| *byte == expected), "{done:?}: {data:x?}");
    }
}

/// Registers, changes, removes and accesses.
pub fn bus(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let allocator = SystemAllocator::new(None, None, GuestAddress(0), 1 << 40, 5, 23, 0).expect("ranges");
    let mut devices = DeviceManager::new(&allocator);
    let mut vcpus = [devices.vcpu(), devices.vcpu()];
    let mut plugged: Vec<Registration> = Vec::new();
    let mut known: Vec<u32> = Vec::new();
    while !bytes.is_empty() {
        let which = usize::from(bytes.u8());
        match bytes.below(10) {
            0 => {
                let subject = IoDevice::both(Arc::new(Subject));
                plugged.extend(devices.space().register(subject, &ranges(&mut bytes)));
            }
            1 => {
                let subject = IoDevice::both(Arc::new(Subject));
                plugged.extend(devices.space().register_shut(subject, &ranges(&mut bytes)));
            }
            2 if !plugged.is_empty() => {
                let (registration, wanted) = (&plugged[which % plugged.len()], ranges(&mut bytes));
                let before = registration.ranges();
                let held = if registration.set_ranges(&wanted).is_ok() { wanted } else { before };
                assert_eq!(registration.ranges(), held);
            }
            3 if !plugged.is_empty() => {
                let removal = plugged.swap_remove(which % plugged.len()).remove();
                assert!(removal.is_over(), "nobody is inside");
            }
            4 if !plugged.is_empty() => plugged[which % plugged.len()].open(),
            5 => {
                let mut wanted: Vec<IoResource> = (0..bytes.below(3))
                    .map(|_| {
                        let addr = bytes.bool().then(|| GuestAddress(number(&mut bytes)));
                        let io_type = bytes.of([IoType::Pio, IoType::Mmio, IoType::PhysicalMmio]);
                        IoResource::new(addr, number(&mut bytes), io_type)
                    })
                    .collect();
                let irq = bytes.bool().then(|| IrqResource(bytes.bool().then(|| bytes.u8().into())));
                let parent = bytes.bool().then_some(u32::from(bytes.u8()));
                if let Ok(id) = devices.register_device(Arc::new(Subject), parent, &mut wanted, irq) {
                    assert!(wanted.iter().all(|one| one.addr.is_some()));
                    known.push(id);
                }
            }
            6 => {
                if let Ok(removal) = devices.unregister_device(which as u32) {
                    assert!(removal.is_over(), "nobody is inside");
                    known.retain(|id| *id != which as u32);
                }
            }
            7 => drop(devices.reset()),
            _ => access(&mut vcpus[which % 2], &devices, &mut bytes),
        }
        assert_eq!(devices.walk().count(), known.len());
    }
    // All goes back.
    let tops: Vec<u32> = devices.walk().filter(|node| node.depth == 0).map(|node| node.id).collect();
    for top in tops {
        assert_eq!(devices.unregister_tree(top), Ok(true));
    }
    for pool in [Pool::Pio, Pool::Mmio, Pool::Irq, Pool::InstanceId] {
        assert_eq!(allocator.allocated(pool), []);
    }
}
