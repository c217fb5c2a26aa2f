//! BARs that guests move: where they are decoded, and where not.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use proptest::prelude::*;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_device::pci::*;

use crate::machine::*;

const A: Place = (0, 2, 0);
const B: Place = (0, 3, 0);

fn two() -> (Machine, Arc<Answer>, Arc<Answer>) {
    let machine = Machine::new();
    let a = machine.add(BusId::Root, 2, 0xa);
    let b = machine.add(BusId::Root, 3, 0xb);
    (machine, a, b)
}

#[test]
fn pci_6_2_5_a_guest_sizes_places_and_moves_a_bar() {
    let (machine, a, _) = two();
    machine.write32(A, 0x10, u32::MAX);
    assert_eq!(machine.read32(A, 0x10), 0xffff_f000);
    machine.write32(A, 0x10, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), None, "COMMAND does not enable it");
    machine.write16(A, 4, 2);
    assert_eq!(machine.at(0xc000_0fff), Some(0xa));
    assert_eq!(machine.at(0xc000_1000), None);
    machine.write32(A, 0x10, 0xc700_0000);
    assert_eq!((machine.at(0xc000_0000), machine.at(0xc700_0000)), (None, Some(0xa)));
    machine.write16(A, 4, 0);
    assert_eq!(machine.at(0xc700_0000), None);
    let moves = ["bar 0 at 0xc0000000", "bar 0 nowhere", "bar 0 at 0xc7000000", "bar 0 nowhere"];
    assert_eq!(a.took(), moves);
}

#[test]
fn pci_6_2_5_all_kinds_of_bars_are_decoded() {
    let machine = Machine::new();
    let mut builder = FunctionBuilder::new("kinds", identity(0x33));
    builder.bar(0, BarKind::Io, 0x40).unwrap();
    builder.bar(1, BarKind::Memory32 { prefetchable: true }, 0x10).unwrap();
    builder.bar(2, BarKind::Memory64 { prefetchable: true }, 1 << 30).unwrap();
    builder.rom((0..=255).collect::<Vec<u8>>()).unwrap();
    assert_eq!(builder.bar(3, BarKind::Io, 4), Err(PciError::BarTaken(3)), "half of BAR 2");
    assert_eq!(builder.bar(1, BarKind::Io, 4), Err(PciError::BarTaken(1)));
    let (function, answer) = build(builder, None, 0x33);
    machine.root.add(BusId::Root, 2, Card::single(function)).unwrap();
    for (at, value) in
        [(0x10, 0x2000), (0x14, 0xc000_0010), (0x18, 0x4000_0000), (0x1c, 0x41), (0x30, 0xc010_0001)]
    {
        machine.write32(A, at, value);
    }
    machine.write16(A, 4, 1);
    assert_eq!((machine.at_port(0x203f), machine.at(0xc000_001f)), (Some(0x33), None));
    machine.write16(A, 4, 3);
    assert_eq!(machine.at(0xc000_001f), Some(0x33));
    assert_eq!(machine.at(0x41_7fff_ffff), Some(0x33));
    // The image, and ones behind it, to the end of 2 KiB. It cannot be written.
    assert_eq!((machine.at(0xc010_0055), machine.at(0xc010_07ff)), (Some(0x55), Some(0xff)));
    machine.buses.mmio_write(MmioAddress(0xc010_0055), &[0]).unwrap();
    assert_eq!((machine.at(0xc010_0055), machine.at(0xc010_0800)), (Some(0x55), None));
    answer.took();
    machine.buses.mmio_write(MmioAddress(0x41_4000_0008), &[1, 2, 3, 4]).unwrap();
    assert_eq!(answer.took(), ["bar 2 0x8 [01, 02, 03, 04]"]);
}

#[test]
fn a_bar_over_ram_is_not_decoded_and_is_back_when_it_moves_away() {
    let (machine, _, _) = two();
    machine.enable(A, RAM as u32);
    assert_eq!(machine.at(RAM), None);
    // Half in a window is not in it.
    machine.write32(A, 0x10, 0xdfff_f000);
    assert_eq!(machine.at(0xdfff_f000), Some(0xa));
    machine.write32(A, 0x10, 0xe000_0000);
    assert_eq!(machine.at(0xe000_0000), None);
    machine.write32(A, 0x10, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(0xa));
}

#[test]
fn of_bars_over_each_other_the_first_of_the_tree_is_decoded_and_none_is_lost() {
    let (machine, a, b) = two();
    machine.enable(B, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(0xb));
    machine.enable(A, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(0xa));
    assert_eq!(b.took(), ["bar 0 at 0xc0000000", "bar 0 nowhere"]);
    assert_eq!(a.took(), ["bar 0 at 0xc0000000"]);
    assert_eq!(machine.read32(B, 0x10), 0xc000_0000, "the register stays as it is");
    machine.write32(A, 0x10, 0xc001_0000);
    assert_eq!((machine.at(0xc000_0000), machine.at(0xc001_0000)), (Some(0xb), Some(0xa)));
    // Two BARs change places by way of the same place.
    machine.write32(A, 0x10, 0xc000_0000);
    machine.write32(B, 0x10, 0xc001_0000);
    assert_eq!((machine.at(0xc000_0000), machine.at(0xc001_0000)), (Some(0xa), Some(0xb)));
}

#[test]
fn what_the_vmm_registered_wins_over_a_bar() {
    struct Fixed;
    impl DeviceMmio for Fixed {
        fn mmio_read(&self, _base: MmioAddress, _offset: MmioAddressOffset, data: &mut [u8]) {
            data.fill(0xf1);
        }
        fn mmio_write(&self, _base: MmioAddress, _offset: MmioAddressOffset, _data: &[u8]) {}
    }
    let (mut machine, _, _) = two();
    let range = MmioRange::new(MmioAddress(0xc000_0800), 0x10).unwrap();
    machine.buses.register_mmio(range, Arc::new(Fixed)).unwrap();
    machine.enable(A, 0xc000_0000);
    assert_eq!((machine.at(0xc000_0000), machine.at(0xc000_0800)), (None, Some(0xf1)));
    assert_eq!(machine.root.blocked_bars(), 1);
    machine.enable(B, 0xc000_1000);
    machine.write32(A, 0x10, 0xc000_2000);
    assert_eq!(machine.at(0xc000_2000), Some(0xa));
    assert_eq!((machine.root.blocked_bars(), machine.at(0xc000_0800)), (0, Some(0xf1)));
    // It is tried again with each change.
    machine.write32(A, 0x10, 0xc000_0000);
    machine.buses.deregister_mmio(MmioAddress(0xc000_0800)).unwrap();
    assert_eq!(machine.at(0xc000_0000), None);
    machine.write32(B, 0x10, 0xc000_5000);
    assert_eq!(machine.at(0xc000_0000), Some(0xa));
}

#[test]
fn bridge_3_2_5_a_bar_behind_a_bridge_is_decoded_within_its_windows() {
    let machine = Machine::new();
    let port = machine.port(1, Some(1));
    machine.add(BusId::Behind(port), 0, 0xc);
    let (bridge, place) = ((0, 1, 0), (1, 0, 0));
    assert_eq!(machine.read32(place, 0), u32::MAX, "no bus numbers yet");
    machine.bridge(bridge, (1, 1), (0xc010_0000, 0xc01f_ffff));
    assert_eq!(machine.read16(place, 0), 0x1b36);
    machine.enable(place, 0xc010_0000);
    assert_eq!(machine.at(0xc010_0000), Some(0xc));
    for (at, data) in [
        (0x20, [0x20, 0xc0, 0x2f, 0xc0]), // elsewhere
        (0x20, [0x20, 0xc0, 0x10, 0xc0]), // reversed
        (0x04, [0x04, 0x00, 0x00, 0x00]), // no memory
    ] {
        let old = machine.read::<4>(bridge, at);
        machine.write(bridge, at, &data);
        assert_eq!(machine.at(0xc010_0000), None, "{at:#x} {data:x?}");
        machine.write(bridge, at, &old);
        assert_eq!(machine.at(0xc010_0000), Some(0xc));
    }
    // Through the prefetchable window, whatever the BAR says of itself.
    machine.write32(bridge, 0x20, 0x0000_fff0);
    machine.write32(bridge, 0x24, 0xc010_c010);
    assert_eq!(machine.at(0xc010_0000), Some(0xc));
    // That it is not numbered does not matter for memory.
    machine.write(bridge, 0x19, &[0]);
    assert_eq!((machine.at(0xc010_0000), machine.read32(place, 0)), (Some(0xc), u32::MAX));
}

#[test]
fn a_bar_moves_in_the_callback_of_a_vcpu_while_others_are_inside_of_the_device() {
    let (machine, _, _) = two();
    machine.enable(B, 0xc800_0000);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut vcpu = machine.buses.vcpu();
                let mut data = [0];
                while !done.load(Ordering::Relaxed) {
                    for place in [0xc000_0000, 0xc100_0000, 0xc800_0000] {
                        match vcpu.mmio_read(MmioAddress(place), &mut data) {
                            Ok(()) => assert_eq!(data, [if place == 0xc800_0000 { 0xb } else { 0xa }]),
                            Err(_) => assert_eq!(data, [0xff]),
                        }
                    }
                }
            });
        }
        let movers = [0, 1].map(|n| {
            let machine = &machine;
            scope.spawn(move || {
                let mut vcpu = machine.buses.vcpu();
                for round in 0..500_u32 {
                    let to = 0xc000_0000 | ((round + n) % 2) << 24;
                    for (at, value) in [(0x10, to), (0x04, 2)] {
                        let address = MmioAddress(ECAM + (2 << 15) + at);
                        vcpu.mmio_write(address, &value.to_le_bytes()).unwrap();
                    }
                }
            })
        });
        movers.into_iter().for_each(|mover| mover.join().unwrap());
        // Whoever was last: the map is what the register says.
        let at = u64::from(machine.read32(A, 0x10));
        assert_eq!(machine.at(at), Some(0xa));
        assert_eq!(machine.at(at ^ (1 << 24)), None);
        done.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_device_may_move_its_own_bar_while_it_is_written_or_told_of_a_move() {
    let (machine, a, _) = two();
    machine.enable(A, 0xc000_0000);
    let root = machine.root.clone();
    *a.on_write.lock().unwrap() = Some(Box::new(move || {
        root.config_write(0, 2, 0, 0x10, &0xc300_0000_u32.to_le_bytes());
    }));
    machine.buses.mmio_write(MmioAddress(0xc000_0000), &[1]).unwrap();
    assert_eq!((machine.at(0xc000_0000), machine.at(0xc300_0000)), (None, Some(0xa)));

    struct Restless(RootComplex);
    impl PciDevice for Restless {
        fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
            data.fill(0x44);
        }
        fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
        fn bar_moved(&self, _bar: u8, address: Option<u64>) {
            if address == Some(0xc400_0000) {
                self.0.config_write(0, 4, 0, 0x10, &0xc500_0000_u32.to_le_bytes());
            }
        }
    }
    let mut builder = FunctionBuilder::new("restless", identity(4));
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    let device = Arc::new(Restless(machine.root.clone()));
    let function = builder.build(None, |_| device).unwrap();
    machine.root.add(BusId::Root, 4, Card::single(function)).unwrap();
    machine.enable((0, 4, 0), 0xc400_0000);
    assert_eq!((machine.at(0xc400_0000), machine.at(0xc500_0000)), (None, Some(0x44)));
    // It holds the root complex that holds it.
    machine.root.remove(BusId::Root, 4).unwrap();
}

#[test]
fn policy_5_a_device_that_panics_when_it_is_told_of_something_fails_alone() {
    struct Broken;
    impl PciDevice for Broken {
        fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
            data.fill(0xbb);
        }
        fn bar_write(&self, _bar: u8, _offset: u64, _data: &[u8]) {}
        fn capability_write(&self, _access: CapabilityAccess<'_>, _data: &[u8]) {
            // Without a word on the terminal.
            std::panic::resume_unwind(Box::new("broken on purpose"));
        }
    }
    let (machine, _, _) = two();
    let mut builder = FunctionBuilder::new("broken", identity(4));
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    builder.capability(&Capability::new(Capability::VENDOR, [4, 0]).watched()).unwrap();
    let card = Card::single(builder.build(None, |_| Arc::new(Broken)).unwrap());
    let function = card.functions()[0].1.clone();
    machine.root.add(BusId::Root, 4, card).unwrap();
    machine.enable((0, 4, 0), 0xc400_0000);
    assert_eq!(machine.at(0xc400_0000), Some(0xbb));
    machine.write32((0, 4, 0), 0x40, 0);
    assert!(function.has_failed());
    assert_eq!(machine.at(0xc400_0000), Some(0xff), "it is not called any more");
    machine.enable(A, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(0xa));
}

#[test]
fn buses_that_are_gone_take_no_bars_and_harm_nobody() {
    let lines =
        [0; 4].map(|_| vm_device::interrupt::IrqLine::new(vm_device::interrupt::Trigger::Level).unwrap());
    let root = RootComplex::new(
        IoManager::new().space(),
        RootOptions {
            buses: 0..=0,
            memory: vec![MmioRange::new(MmioAddress(0), 1 << 32).unwrap()],
            ports: vec![],
            lines,
            events: Box::new(|_| {}),
        },
    );
    let (card, answer) = card(1);
    root.add(BusId::Root, 1, card).unwrap();
    root.config_write(0, 1, 0, 4, &[2]);
    assert_eq!(root.blocked_bars(), 1);
    drop(root);
    assert!(is_gone(answer));
}

proptest! {
    /// A guest that moves BARs of three devices, one behind a bridge, and the bridge's window, in any order: at each address
    /// answers whoever the rules say, by a model that knows only registers.
    #[test]
    fn the_map_is_what_the_registers_say(
        writes in proptest::collection::vec((0..4_usize, 0..12_u32, any::<bool>(), any::<bool>()), 1..30),
    ) {
        let machine = Machine::new();
        machine.add(BusId::Root, 2, 2);
        machine.add(BusId::Root, 3, 3);
        let port = machine.port(1, None);
        machine.add(BusId::Behind(port), 0, 1);
        machine.bridge((0, 1, 0), (1, 1), (0xc000_0000, 0xc000_0000));
        // Pages of 4 KiB over two windows of the bridge and a bit of what is below them.
        let page = |n: u32| 0xbfff_e000_u32 + n * 0x2_0000 / 0x1000 * 0x1000;
        let mut model = [(0_u32, false); 3];
        let mut window = 0xc000_0000_u32..=0xc00f_ffff;
        for (which, n, on, twice) in writes {
            let places = [(1, 0, 0), (0, 2, 0), (0, 3, 0)];
            match places.get(which) {
                Some(place) => {
                    let at = page(if twice { n } else { n / 2 });
                    machine.write32(*place, 0x10, at);
                    machine.write16(*place, 0x04, if on { 6 } else { 4 });
                    model[which] = (at, on);
                }
                None => {
                    let (first, last) = (0xc000_0000 + (n & 1) * 0x10_0000, 0xc00f_ffff + (n >> 1 & 1) * 0x10_0000);
                    machine.write16((0, 1, 0), 0x20, (first >> 16) as u16);
                    machine.write16((0, 1, 0), 0x22, (last >> 16) as u16);
                    window = first..=last;
                }
            }
            for n in 0..12 {
                let at = page(n);
                let here = |device: &usize| {
                    let (base, on) = model[*device];
                    let inside = u64::from(base) >= MEMORY && (*device != 0 || window.contains(&base) && window.contains(&(base + 0xfff)));
                    on && base == at && inside
                };
                let expected = (0..3).find(here).map(|device| device as u8 + 1);
                prop_assert_eq!(machine.at(at.into()), expected, "{:#x} {:x?} {:x?}", at, model, window);
            }
        }
    }
}
