//! The program that rust-vmm's device manager is introduced with, its typing errors mended: `sys_res` and `resources` are
//! what they were meant to be, the loop of `read` has the variables that it uses, unused parameters say so, and the
//! register is in a `Mutex`. The vCPU is a list of exits.
#![allow(clippy::unnecessary_mut_passed, reason = "as it was published")]
use std::sync::{Arc, Mutex};

use vm_device::device_manager::{Device, DeviceManager, IoResource, IoType, IrqResource};
use vm_device::resources::{INSTANCE_ID_BASE, SystemAllocator, X86_64_IRQ_BASE, X86_64_IRQ_END};
use vm_memory::{GuestAddress, GuestUsize};

#[derive(Debug)]
enum Error {
    CreateSystemAllocator,
}

/// DummyDevice returns config_address on a read and sets
/// config_address on a write. As dummy as it can get.
struct DummyDevice {
    config_address: Mutex<u32>,
}

impl Device for DummyDevice {
    fn name(&self) -> String {
        "dummy_device".to_string()
    }

    fn read(&self, _addr: GuestAddress, data: &mut [u8], _io_type: IoType) {
        if data.len() > 4 {
            for d in data {
                *d = 0xff;
            }
            return;
        }

        for (idx, iter) in data.iter_mut().enumerate() {
            let config = self.config_address.lock().expect("failed to acquire lock");
            *iter = (*config >> (idx * 8) & 0xff) as u8;
        }
    }

    fn write(&self, _addr: GuestAddress, data: &[u8], _io_type: IoType) {
        let mut config = self.config_address.lock().expect("failed to acquire lock");
        *config = data[0] as u32 & 0xff;
    }

    fn set_resources(&self, _res: &[IoResource], _irq: Option<IrqResource>) {}
}

enum VcpuExit<'a> {
    IoIn(u16, &'a mut [u8]),
    IoOut(u16, &'a [u8]),
}

struct VcpuFd<'a>(Vec<VcpuExit<'a>>);

impl<'a> VcpuFd<'a> {
    fn run(&mut self) -> Result<VcpuExit<'a>, ()> {
        self.0.pop().ok_or(())
    }
}

struct Vmm<'a> {
    fd: VcpuFd<'a>,
    devices: DeviceManager,
}

#[test]
fn published_dummy_device_runs() -> Result<(), Error> {
    // First we need to allocate a system allocator
    let mut allocator = SystemAllocator::new(
        None,
        None,
        GuestAddress(0),
        1 << 36 as GuestUsize,
        X86_64_IRQ_BASE,
        X86_64_IRQ_END,
        INSTANCE_ID_BASE,
    )
    .ok_or(Error::CreateSystemAllocator)?;

    let mut device_manager = DeviceManager::new(&mut allocator);

    // First we need a PIO resource for it.
    let mut resources = Vec::new();
    let res = IoResource::new(Some(GuestAddress(0xcf8)), 8 as GuestUsize, IoType::Pio);
    resources.push(res);

    // Register with the request of IO resource and IRQ resource.
    let dummy = DummyDevice { config_address: Mutex::new(0x1000) };
    device_manager
        .register_device(Arc::new(dummy), None, &mut resources, Some(IrqResource(None)))
        .expect("the ports are free");

    let (mut before, mut after) = ([0; 4], [0; 2]);
    let exits = vec![
        VcpuExit::IoIn(0xcfc, &mut after),
        VcpuExit::IoOut(0xcf8, &[0x42]),
        VcpuExit::IoIn(0xcf8, &mut before),
    ];
    // Create a Vmm
    let mut vmm = Vmm { fd: VcpuFd(exits), devices: device_manager };

    // Run the vCPU and only handle PIO exits
    while let Ok(run) = vmm.fd.run() {
        match run {
            VcpuExit::IoIn(addr, data) => {
                vmm.devices.read(GuestAddress(u64::from(addr)), data, IoType::Pio).unwrap();
            }
            VcpuExit::IoOut(addr, data) => {
                vmm.devices.write(GuestAddress(u64::from(addr)), data, IoType::Pio).unwrap();
            }
        }
    }
    assert_eq!(before, [0x00, 0x10, 0, 0]);
    assert_eq!(after, [0x42, 0]);
    Ok(())
}
