//! A guest program under KVM drives devices over ports and memory-mapped I/O.
#![cfg(all(feature = "kvm", target_arch = "x86_64"))]

use std::sync::{Arc, Mutex};

use vm_device::bus::{MmioAddress, MmioAddressOffset, MmioRange, PioAddress, PioAddressOffset, PioRange};
use vm_device::device_manager::{IoManager, MmioManager, PioManager};
use vm_device::{MutDeviceMmio, MutDevicePio};

mod kvm_guest;

use kvm_guest::{Code, Exit, Machine};

/// Sixteen registers of a byte that keep what is written to them, inverted.
#[derive(Default)]
struct Registers([u8; 16]);

impl Registers {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let from = offset as usize;
        data.copy_from_slice(&self.0[from..from + data.len()]);
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for (register, byte) in self.0[offset as usize..].iter_mut().zip(data) {
            *register = !byte;
        }
    }
}

impl MutDevicePio for Registers {
    fn pio_read(&mut self, _: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
        self.read(offset.into(), data);
    }

    fn pio_write(&mut self, _: PioAddress, offset: PioAddressOffset, data: &[u8]) {
        self.write(offset.into(), data);
    }
}

impl MutDeviceMmio for Registers {
    fn mmio_read(&mut self, _: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.read(offset, data);
    }

    fn mmio_write(&mut self, _: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.write(offset, data);
    }
}

#[test]
fn a_guest_program_drives_devices_over_ports_and_memory() {
    let name = "a_guest_program_drives_devices_over_ports_and_memory";
    let Some(mut machine) = Machine::new(name) else { return };
    let mut manager = IoManager::new();
    let ports = Arc::new(Mutex::new(Registers::default()));
    let memory = Arc::new(Mutex::new(Registers::default()));
    manager.register_pio(PioRange::new(PioAddress(0x300), 16).unwrap(), ports.clone()).unwrap();
    manager.register_mmio(MmioRange::new(MmioAddress(0xd_0000), 16).unwrap(), memory.clone()).unwrap();

    let mut code = Code::default();
    // One, two and four bytes to ports, and back.
    code.out8(0x301, 0x5a)
        .op(&[0xec]) // in al, dx
        .op(&[0xa2, 0x00, 0x05]) // mov [0x500], al
        .op(&[0xba, 0x02, 0x03]) // mov dx, 0x302
        .op(&[0xb8, 0x34, 0x12]) // mov ax, 0x1234
        .op(&[0xef]) // out dx, ax
        .op(&[0xed]) // in ax, dx
        .op(&[0xa3, 0x02, 0x05]) // mov [0x502], ax
        .op(&[0xba, 0x04, 0x03]) // mov dx, 0x304
        .op(&[0x66, 0xb8, 0x78, 0x56, 0x34, 0x12]) // mov eax, 0x12345678
        .op(&[0x66, 0xef]) // out dx, eax
        .op(&[0x66, 0xed]) // in eax, dx
        .op(&[0x66, 0xa3, 0x04, 0x05]) // mov [0x504], eax
        // Half in the device's range, half behind it.
        .op(&[0xba, 0x0f, 0x03]) // mov dx, 0x30f
        .op(&[0xed]) // in ax, dx
        .op(&[0xa3, 0x08, 0x05]) // mov [0x508], ax
        // Nobody's.
        .op(&[0xba, 0x00, 0x04]) // mov dx, 0x400
        .op(&[0x66, 0xed]) // in eax, dx
        .op(&[0x66, 0xa3, 0x0c, 0x05]) // mov [0x50c], eax
        .op(&[0xef]); // out dx, ax
    // The same in memory.
    code.op(&[0xb8, 0x00, 0xd0]) // mov ax, 0xd000
        .op(&[0x8e, 0xc0]) // mov es, ax
        .op(&[0x26, 0xc6, 0x06, 0x01, 0x00, 0x5a]) // mov byte es:[1], 0x5a
        .op(&[0x26, 0xa0, 0x01, 0x00]) // mov al, es:[1]
        .op(&[0xa2, 0x10, 0x05]) // mov [0x510], al
        .op(&[0x26, 0xc7, 0x06, 0x02, 0x00, 0x34, 0x12]) // mov word es:[2], 0x1234
        .op(&[0x26, 0xa1, 0x02, 0x00]) // mov ax, es:[2]
        .op(&[0xa3, 0x12, 0x05]) // mov [0x512], ax
        .op(&[0x66, 0x26, 0xc7, 0x06, 0x04, 0x00, 0x78, 0x56, 0x34, 0x12]) // mov dword es:[4], 0x12345678
        .op(&[0x66, 0x26, 0xa1, 0x04, 0x00]) // mov eax, es:[4]
        .op(&[0x66, 0xa3, 0x14, 0x05]) // mov [0x514], eax
        .op(&[0x26, 0xa1, 0x0f, 0x00]) // mov ax, es:[15]
        .op(&[0xa3, 0x18, 0x05]) // mov [0x518], ax
        .op(&[0x66, 0x26, 0xa1, 0x00, 0x20]) // mov eax, es:[0x2000]
        .op(&[0x66, 0xa3, 0x1c, 0x05]) // mov [0x51c], eax
        .done();
    machine.load16(&code);
    let mut io = manager.vcpu();
    machine.run(&mut io);

    for at in [0, 0x10] {
        assert_eq!(machine.result8(at), !0x5a);
        assert_eq!(machine.result16(at + 2), !0x1234);
        assert_eq!(machine.result32(at + 4), !0x1234_5678);
        assert_eq!(machine.result16(at + 8), 0xffff, "straddles the end");
        assert_eq!(machine.result32(at + 0xc), u32::MAX, "nobody is there");
    }
    let written = [0, !0x5a, !0x34, !0x12, !0x78, !0x56, !0x34, !0x12, 0, 0, 0, 0, 0, 0, 0, 0];
    assert_eq!(ports.lock().unwrap().0, written);
    assert_eq!(memory.lock().unwrap().0, written);
    assert_eq!(machine.exits.len(), 17, "{:?}", machine.exits);
    assert!(machine.exits.contains(&Exit::Out(0x304, 0x1234_5678_u32.to_le_bytes().to_vec())));
    machine.tell(name, &format!("{:?}", io.counts()));
}

#[test]
fn a_guest_program_of_32_bits_drives_a_device_high_in_memory() {
    let name = "a_guest_program_of_32_bits_drives_a_device_high_in_memory";
    let Some(mut machine) = Machine::new(name) else { return };
    let mut manager = IoManager::new();
    let device = Arc::new(Mutex::new(Registers::default()));
    manager.register_mmio(MmioRange::new(MmioAddress(0xfff0_0000), 16).unwrap(), device.clone()).unwrap();

    let mut code = Code::default();
    code.op(&[0xbb, 0x00, 0x00, 0xf0, 0xff]) // mov ebx, 0xfff00000
        .op(&[0xb8, 0x78, 0x56, 0x34, 0x12]) // mov eax, 0x12345678
        .op(&[0x89, 0x43, 0x08]) // mov [ebx + 8], eax
        .op(&[0x0f, 0xb6, 0x4b, 0x0b]) // movzx ecx, byte [ebx + 11]
        .op(&[0x89, 0x0d, 0x00, 0x05, 0x00, 0x00]) // mov [0x500], ecx
        .op(&[0x03, 0x43, 0x08]) // add eax, [ebx + 8]
        .op(&[0xa3, 0x04, 0x05, 0x00, 0x00]) // mov [0x504], eax
        .done();
    machine.load32(&code);
    machine.run(&mut manager.vcpu());
    machine.tell(name, &format!("{:#x} {:#x}", machine.result32(0), machine.result32(4)));
    assert_eq!((machine.result32(0), machine.result32(4)), (0xed, u32::MAX));
    assert_eq!(machine.exits.len(), 3);
}
