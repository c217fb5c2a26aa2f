//! Saved machines: taken over as they were, or refused.
use device_state::{Section, StateError};
use proptest::prelude::*;
use vm_device::bus::MmioAddress;
use vm_device::device_manager::MmioManager;
use vm_device::interrupt::MsiMessage;
use vm_device::pci::*;

use crate::machine::*;

fn machine() -> (Machine, PortId) {
    let machine = Machine::new();
    let port = machine.port(1, Some(7));
    let empty = machine.port(2, Some(8));
    machine.add(BusId::Behind(port), 0, 1);
    let mut builder = FunctionBuilder::new("msix", identity(2));
    builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000).unwrap();
    builder.pin(Pin::A);
    let layout =
        MsixLayout { vectors: 2, table_bar: 0, table_offset: 0, pending_bar: 0, pending_offset: 0x800 };
    builder.msix(layout).unwrap();
    let (function, _) = build(builder, Some(machine.controller.messages(2)), 2);
    machine.root.add(BusId::Root, 3, Card::single(function)).unwrap();
    assert_ne!(port, empty);
    (machine, port)
}

/// In use: BARs placed, MSI-X on with a vector pending, a card asked back.
fn used() -> (Machine, PortId) {
    let (machine, port) = machine();
    machine.bridge((0, 1, 0), (1, 1), (0xc000_0000, 0xc00f_ffff));
    machine.enable((1, 0, 0), 0xc000_0000);
    machine.enable((0, 3, 0), 0xc100_0000);
    let cap = machine.capability((0, 3, 0), 0x11);
    machine.write16((0, 3, 0), cap + 2, 0xc000);
    for (at, word) in [(0, 0xfee0_0000_u32), (8, 0x31), (12, 0)] {
        machine.buses.mmio_write(MmioAddress(0xc100_0000 + at), &word.to_le_bytes()).unwrap();
    }
    (machine, port)
}

fn compare(a: &Machine, b: &Machine) {
    for place in [(0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 0, 0)] {
        for at in (0..0x1000).step_by(4) {
            assert_eq!(a.read32(place, at), b.read32(place, at), "{place:?} {at:#x}");
        }
    }
    assert_eq!(a.root.to_string(), b.root.to_string());
}

#[test]
fn a_restored_machine_is_as_the_saved_one_was() {
    let (old, port) = used();
    let cap = old.capability((0, 3, 0), 0x11);
    let slot = old.capability((0, 1, 0), 0x10) + 0x18;
    old.write16((0, 1, 0), slot, 0x1031 | 0x0100);
    old.root.unplug(port).unwrap();
    assert!(old.asserted()[1]);
    let state = old.root.save().unwrap();
    let (new, _) = machine();
    new.root.restore(&state).unwrap();
    compare(&old, &new);
    assert_eq!(new.asserted(), old.asserted());
    assert_eq!((new.at(0xc000_0000), new.at(0xc100_0500)), (Some(1), Some(2)));
    assert_eq!(new.root.save().unwrap(), state);
    // What was under way goes on: the guest takes the power off, the card is out.
    new.write16((0, 1, 0), slot, 0x0400);
    assert!(new.took().iter().any(|event| matches!(event, PciEvent::Ejected { .. })));
    // And a message that was masked as a whole is sent when it is not.
    new.write16((0, 3, 0), cap + 2, 0x8000);
    assert_eq!(new.controller.take(), []);
}

#[test]
fn a_pending_message_is_pending_in_the_restored_machine() {
    let machine = Machine::new();
    let build_one = |machine: &Machine| {
        let mut builder = FunctionBuilder::new("msi", identity(2));
        builder.msi(2).unwrap();
        let (function, answer) = build(builder, Some(machine.controller.messages(2)), 2);
        machine.root.add(BusId::Root, 3, Card::single(function)).unwrap();
        answer
    };
    let place = (0, 3, 0);
    let answer = build_one(&machine);
    let cap = machine.capability(place, 5);
    machine.write16(place, 4, 4);
    machine.write32(place, cap + 4, 0xfee0_0000);
    machine.write32(place, cap + 16, 3);
    machine.write16(place, cap + 2, 0x0011);
    answer.interrupts().message(1).unwrap().signal();
    let state = machine.root.save().unwrap();
    let new = Machine::new();
    build_one(&new);
    new.root.restore(&state).unwrap();
    assert_eq!(new.read32(place, cap + 20), 2);
    assert_eq!(new.controller.take(), []);
    new.write32(place, cap + 16, 0);
    assert_eq!(new.controller.take(), [MsiMessage { address: 0xfee0_0000, data: 1 }]);
}

#[test]
fn states_of_other_machines_are_refused_and_change_nothing() {
    let (old, port) = used();
    let state = old.root.save().unwrap();
    let refused = |machine: &Machine, state: &Section| {
        let before = machine.root.save().unwrap();
        let error = machine.root.restore(state).unwrap_err();
        assert_eq!(machine.root.save().unwrap(), before);
        error
    };
    let (fewer, port_there) = machine();
    fewer.root.pull(port_there).unwrap();
    assert!(matches!(refused(&fewer, &state), StateError::Refused(why) if why.contains("4 PCI functions")));
    // Another card in the slot: its read-only bits differ.
    let (other, port_there) = machine();
    other.root.pull(port_there).unwrap();
    other.root.add(BusId::Behind(port_there), 0, card(9).0).unwrap();
    assert!(matches!(refused(&other, &state), StateError::Refused(why) if why.contains("at 0x2 of")));
    // The same in another place.
    let (moved, port_there) = machine();
    let card = moved.root.pull(port_there).unwrap();
    moved.root.add(BusId::Root, 9, card).unwrap();
    assert!(matches!(refused(&moved, &state), StateError::Refused(why) if why.contains("at [(")));
    let later = Section::from_bytes(2, state.bytes().to_vec());
    assert_eq!(refused(&old, &later), StateError::SectionVersion { found: 2, known: 1 });
    let all = state.bytes().len();
    for len in (0..256).chain((256..all).step_by(251)).chain([all - 1]) {
        let cut = Section::from_bytes(1, state.bytes()[..len].to_vec());
        assert!(refused(&old, &cut) == StateError::Malformed);
    }
    drop(old.root.pull(port));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    /// A state with any byte changed is refused, or is one that a guest could have made: then it can be saved again as it is.
    #[test]
    fn policy_8_a_damaged_state_is_refused_or_is_a_state(
        damage in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
    ) {
        let (old, _) = used();
        let mut bytes = old.root.save().unwrap().bytes().to_vec();
        for (at, value) in damage {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        let (new, _) = machine();
        if new.root.restore(&Section::from_bytes(1, bytes)).is_ok() {
            let again = new.root.save().unwrap();
            new.root.restore(&again).unwrap();
            prop_assert_eq!(new.root.save().unwrap(), again);
        }
        for place in [(0, 1, 0), (0, 3, 0)] {
            prop_assert_eq!(new.read16(place, 0), 0x1b36);
        }
    }
}
