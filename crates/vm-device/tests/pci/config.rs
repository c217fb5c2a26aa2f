//! Accesses to configuration space, good and bad.
use vm_device::bus::PioAddress;
use vm_device::device_manager::{MmioManager, PioManager};

use crate::machine::*;
use proptest::prelude::*;
use std::sync::{Arc, Mutex};
use vm_device::DevicePio;
use vm_device::bus::{MmioAddress, PioAddressOffset};
use vm_device::pci::*;

fn address(machine: &Machine, value: u32) {
    machine.buses.pio_write(PioAddress(0xcf8), &value.to_le_bytes()).unwrap();
}

fn port<const N: usize>(machine: &Machine, at: u16) -> [u8; N] {
    let mut data = [0xaa; N];
    machine.buses.pio_read(PioAddress(at), &mut data).unwrap();
    data
}

#[test]
fn pci_3_2_2_3_2_ports_reach_a_function_with_1_2_and_4_bytes() {
    let machine = Machine::new();
    machine.add(BusId::Root, 3, 0x77);
    address(&machine, 0x8000_1800);
    assert_eq!(port(&machine, 0xcfc), [0x36, 0x1b, 0x77, 0x00]);
    assert_eq!(port(&machine, 0xcfe), [0x77, 0x00]);
    assert_eq!(port(&machine, 0xcfd), [0x1b]);
    address(&machine, 0x8000_1804);
    machine.buses.pio_write(PioAddress(0xcfc), &[6, 0]).unwrap();
    machine.buses.pio_write(PioAddress(0xcfd), &[4]).unwrap();
    assert_eq!(machine.read16((0, 3, 0), 4), 0x0406);
    // Both ways lead to the same registers.
    machine.write32((0, 3, 0), 0x3c, 0x55);
    address(&machine, 0x8000_183c);
    assert_eq!(port(&machine, 0xcfc), [0x55, 1, 0, 0]);
}

#[test]
fn pci_3_2_2_3_2_the_address_has_an_enable_bit_and_no_others() {
    let machine = Machine::new();
    machine.add(BusId::Root, 3, 0x77);
    address(&machine, 0x0000_1800);
    assert_eq!(port(&machine, 0xcfc), [0xff; 4]);
    machine.buses.pio_write(PioAddress(0xcfc), &[0; 4]).unwrap();
    address(&machine, u32::MAX);
    assert_eq!(port(&machine, 0xcf8), 0x80ff_fffc_u32.to_le_bytes());
}

#[test]
fn pci_3_2_2_3_2_only_a_double_word_is_the_address() {
    struct ResetControl(Mutex<Vec<(u16, Vec<u8>)>>);
    impl DevicePio for ResetControl {
        fn pio_read(&self, _base: PioAddress, offset: PioAddressOffset, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn pio_write(&self, _base: PioAddress, offset: PioAddressOffset, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }
    let machine = Machine::new();
    address(&machine, 0x8000_1800);
    for len in [1, 2] {
        machine.buses.pio_write(PioAddress(0xcf8), &[0xff; 2][..len]).unwrap();
    }
    assert_eq!(port(&machine, 0xcf8), 0x8000_1800_u32.to_le_bytes());
    assert_eq!(port(&machine, 0xcf9), [0xff]);
    let beside = Arc::new(ResetControl(Mutex::default()));
    let ports = ConfigPorts::new(machine.root.clone()).beside(beside.clone());
    ports.pio_write(PioAddress(0xcf8), 1, &[6]);
    ports.pio_write(PioAddress(0xcf8), 0, &0x8000_0000_u32.to_le_bytes());
    let mut data = [0];
    ports.pio_read(PioAddress(0xcf8), 1, &mut data);
    assert_eq!(data, [1]);
    assert_eq!(*beside.0.lock().unwrap(), [(1, vec![6])]);
}

#[test]
fn pci_absent_functions_and_buses_read_as_ones_and_are_counted() {
    let machine = Machine::with(0..=3);
    machine.add(BusId::Root, 3, 1);
    for place in [(0, 0, 0), (0, 3, 1), (0, 31, 7), (1, 0, 0), (3, 0, 0)] {
        assert_eq!(machine.read32(place, 0), u32::MAX, "{place:?}");
        machine.write32(place, 0x10, 0);
    }
    assert_eq!(machine.root.absent_accesses(), 10);
    let mut data = [0; 4];
    // Behind the memory of bus 3 there is nothing of ours.
    machine.buses.mmio_read(MmioAddress(ECAM + 4 * ECAM_BUS), &mut data).unwrap_err();
    address(&machine, 0x8004_1800);
    assert_eq!(port(&machine, 0xcfc), [0xff; 4]);
}

#[test]
fn pci_a_conventional_function_has_256_bytes_and_an_express_one_4096() {
    let machine = Machine::new();
    machine.add(BusId::Root, 2, 1);
    let mut builder = FunctionBuilder::new("conventional", identity(2));
    builder.pin(Pin::B);
    let (function, _) = build(builder, None, 2);
    machine.root.add(BusId::Root, 3, Card::single(function)).unwrap();
    assert_eq!(machine.read32((0, 2, 0), 0x100), 0, "no extended capability");
    assert_eq!(machine.read32((0, 2, 0), 0xffc), 0);
    assert_eq!(machine.read32((0, 3, 0), 0xfc), 0);
    assert_eq!(machine.read32((0, 3, 0), 0x100), u32::MAX);
    assert_eq!(machine.read::<2>((0, 3, 0), 0x3c), [0, 2]);
}

#[test]
fn pcie_7_2_2_accesses_that_cross_a_double_word_are_none() {
    let machine = Machine::new();
    machine.add(BusId::Root, 2, 1);
    let place = (0, 2, 0);
    assert_eq!(machine.read::<4>(place, 0x02), [0xff; 4]);
    assert_eq!(machine.read::<8>(place, 0x00), [0xff; 8]);
    assert_eq!(machine.read::<2>(place, 0x01), [0x1b, 0x01]);
    machine.write(place, 0x0e, &[0xff; 8]);
    machine.write(place, 0x0f, &[0xff; 4]);
    assert_eq!(machine.read32(place, 0x10), 0);
}

#[test]
fn pci_6_7_a_watched_capability_reaches_the_device_without_a_lock() {
    let machine = Machine::new();
    let mut builder = FunctionBuilder::new("watched", identity(9));
    // As virtio's window into its BARs: what is written is kept, but for the last four bytes.
    let window = Capability::new(Capability::VENDOR, [8, 5, 0, 0, 0, 0]).writable(4, 4, u32::MAX).watched();
    assert_eq!(builder.capability(&Capability::new(Capability::VENDOR, [4, 0])).unwrap(), 0x40);
    assert_eq!(builder.capability(&window).unwrap(), 0x44);
    let (function, answer) = build(builder, None, 9);
    machine.root.add(BusId::Root, 2, Card::single(function)).unwrap();
    machine.write32((0, 2, 0), 0x40, 0);
    machine.read32((0, 2, 0), 0x40);
    assert!(answer.took().is_empty());
    machine.write16((0, 2, 0), 0x48, 0x2211);
    assert_eq!(machine.read32((0, 2, 0), 0x48), 0x0101_2312);
    assert_eq!(
        answer.took(),
        [
            "write 0x44+4 [09, 00, 08, 05, 11, 22, 00, 00] [11, 22]",
            "read 0x44+4 [09, 00, 08, 05, 11, 22, 00, 00]",
        ]
    );
    // An access that is none has no effects.
    machine.read::<4>((0, 2, 0), 0x46);
    machine.write((0, 2, 0), 0x46, &[0; 4]);
    assert!(answer.took().is_empty());
}

/// A machine with one of everything that has registers of its own, and where those are.
fn one_of_everything() -> (Machine, Vec<Place>, Vec<Arc<Answer>>) {
    let machine = Machine::new();
    let port = machine.port(1, Some(1));
    machine.port(2, None);
    let mut builder = FunctionBuilder::new("all", identity(3));
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x8000).unwrap();
    builder.bar(1, BarKind::Io, 0x20).unwrap();
    builder.bar(2, BarKind::Memory64 { prefetchable: true }, 1 << 20).unwrap();
    builder.rom(vec![0x55, 0xaa]).unwrap();
    builder.pin(Pin::A);
    builder.express().unwrap();
    builder.capability(&Capability::new(9, [6, 0, 0, 0]).writable(4, 2, 0xf0f0).watched()).unwrap();
    let layout =
        MsixLayout { vectors: 3, table_bar: 0, table_offset: 0x1000, pending_bar: 0, pending_offset: 0x2000 };
    builder.msix(layout).unwrap();
    builder.extended_capability(&ExtendedCapability::serial_number(7)).unwrap();
    let (function, first) = build(builder, Some(machine.controller.messages(3)), 3);
    let mut builder = FunctionBuilder::new("msi", identity(4));
    builder.msi(4).unwrap();
    builder.pin(Pin::B);
    let (msi, second) = build(builder, Some(machine.controller.messages(4)), 4);
    machine.root.add(BusId::Root, 3, Card::multifunction(vec![(0, function), (5, msi)]).unwrap()).unwrap();
    let (card, third) = card(5);
    machine.root.add(BusId::Behind(port), 0, card).unwrap();
    machine.bridge((0, 1, 0), (1, 1), (0xc000_0000, 0xc00f_ffff));
    (machine, vec![(0, 1, 0), (0, 2, 0), (0, 3, 0), (0, 3, 5), (1, 0, 0)], vec![first, second, third])
}

/// What the bits of a function are, found from outside: those that never change, whatever is written.
fn settings(machine: &Machine, place: Place) -> Vec<u32> {
    (0..1024).map(|n| machine.read32(place, n * 4)).collect()
}

#[test]
fn policy_8_a_guest_writes_every_byte_of_configuration_space_with_every_value() {
    let (machine, places, answers) = one_of_everything();
    for place in places {
        let before = settings(&machine, place);
        let limit = if before[64] == u32::MAX { 0x100 } else { 0x1000 };
        for offset in 0..limit {
            for value in 0..=255 {
                let (bus, device, function) = place;
                machine.root.config_write(bus, device, function, offset, &[value]);
            }
        }
        let bridge = before[3] >> 16 & 0x7f == 1;
        for at in [0, 8, 0x34, 0x2c].into_iter().take(if bridge { 3 } else { 4 }) {
            let dword = usize::from(at / 4_u16);
            assert_eq!(machine.read32(place, at), before[dword], "{place:?} {at:#x}");
        }
        assert_eq!(machine.read16(place, 0), 0x1b36);
        // What is behind a bridge that was numbered away, or turned off, is there again.
        machine.root.reset();
        machine.bridge((0, 1, 0), (1, 1), (0xc000_0000, 0xc00f_ffff));
    }
    drop(answers);
    machine.enable((0, 3, 0), 0xc100_0000);
    assert_eq!(machine.at(0xc100_0000), Some(3));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// Any access of any width at any place: as its bytes were written one by one within the double word, or not at all.
    #[test]
    fn wide_accesses_are_their_bytes_or_nothing(
        writes in proptest::collection::vec(
            (0..4_usize, 0..0x110_u16, proptest::collection::vec(any::<u8>(), 1..9)), 1..30),
    ) {
        let (wide, places, _) = one_of_everything();
        let (narrow, _, _) = one_of_everything();
        for (which, offset, data) in writes {
            let place = places[which];
            // What a port notes of its slot and link depends on the order of writes, not only on what was written.
            let link = wide.capability((0, 1, 0), 0x10) + 0x10;
            if which == 0 && (link..link + 0xc).contains(&(offset & !3)) {
                continue;
            }
            wide.write(place, offset, &data);
            if offset % 4 + data.len() as u16 <= 4 {
                for (at, byte) in (offset..).zip(&data) {
                    narrow.write(place, at, &[*byte]);
                }
            }
        }
        for place in places {
            prop_assert_eq!(settings(&wide, place), settings(&narrow, place));
        }
    }
}
