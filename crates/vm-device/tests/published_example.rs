//! The program that rust-vmm's `vm-device` is introduced with, without a change.
#![allow(clippy::useless_vec, reason = "it is what it is")]

#[test]
fn published_log_device_runs_unchanged() {
    use std::sync::{Arc, Mutex};
    use vm_device::MutDevicePio;
    use vm_device::bus::{PioAddress, PioAddressOffset, PioRange};
    use vm_device::device_manager::{IoManager, PioManager};

    struct LogDevice {}

    impl MutDevicePio for LogDevice {
        fn pio_read(&mut self, base: PioAddress, offset: PioAddressOffset, _data: &mut [u8]) {
            println!("mut pio_read: base {:?}, offset {}", base, offset);
        }
        fn pio_write(&mut self, base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
            println!("mut pio_write: base {:?}, offset {}, data {:?}", base, offset, data);
        }
    }

    // IoManager implements PioManager trait.
    let mut manager = IoManager::new();
    let device = LogDevice {};
    let bus_range = PioRange::new(PioAddress(0), 10).unwrap();
    manager.register_pio(bus_range, Arc::new(Mutex::new(device))).unwrap();
    manager.pio_write(PioAddress(0), &vec![b'o', b'k']).unwrap();
}
