//! Cards that come and go while the guest runs. The guest here does what Linux's pciehp does, step by step
//! (drivers/pci/hotplug/pciehp_{hpc,ctrl}.c); names are those of its headers.
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use vm_device::bus::MmioAddress;
use vm_device::device_manager::MmioManager;
use vm_device::interrupt::MsiMessage;
use vm_device::pci::*;

use crate::machine::*;

const PORT: Place = (0, 1, 0);
const CARD: Place = (1, 0, 0);

const SLTCTL: u16 = 0x18;
const SLTSTA: u16 = 0x1a;
const LNKSTA: u16 = 0x12;
const ABP: u16 = 1;
const PDC: u16 = 8;
const CC: u16 = 0x10;
const PDS: u16 = 0x40;
const DLLSC: u16 = 0x100;
const DLLLA: u16 = 0x2000;
const ATTN_IND_OFF: u16 = 0x00c0;
const PWR_IND_ON: u16 = 0x0100;
const PWR_IND_BLINK: u16 = 0x0200;
const PWR_IND_OFF: u16 = 0x0300;
const PWR_OFF: u16 = 0x0400;

/// The part of pciehp that talks to registers.
struct Pciehp<'a> {
    machine: &'a Machine,
    at: u16,
}

impl<'a> Pciehp<'a> {
    /// As firmware and Linux start: bridge numbered, events cleared, an empty slot without power, notification enabled.
    fn probe(machine: &'a Machine) -> Pciehp<'a> {
        machine.bridge(PORT, (1, 1), (0xc000_0000, 0xc00f_ffff));
        let pciehp = Pciehp { machine, at: machine.capability(PORT, 0x10) };
        let slot = machine.read32(PORT, pciehp.at + 0x14);
        assert_eq!(slot & 0x7f, 0x7b, "button, power, indicators, surprise, hot plug; no latch");
        machine.write16(PORT, pciehp.at + SLTSTA, 0x011f);
        if pciehp.status() & PDS == 0 && pciehp.control() & PWR_OFF == 0 {
            pciehp.command(PWR_OFF, PWR_OFF);
        }
        // DLLSCE, ABPE, HPIE, CCIE.
        pciehp.command(0x1031, 0x103b);
        pciehp
    }

    fn status(&self) -> u16 {
        self.machine.read16(PORT, self.at + SLTSTA)
    }

    fn control(&self) -> u16 {
        self.machine.read16(PORT, self.at + SLTCTL)
    }

    fn link_active(&self) -> bool {
        self.machine.read16(PORT, self.at + LNKSTA) & DLLLA != 0
    }

    fn command(&self, value: u16, mask: u16) {
        self.machine.write16(PORT, self.at + SLTCTL, self.control() & !mask | value);
    }

    /// What the interrupt handler does: the events that there were, cleared until none is left.
    fn isr(&self) -> u16 {
        let mut all = 0;
        loop {
            let events = self.status() & (ABP | PDC | CC | DLLSC);
            if events == 0 {
                return all;
            }
            all |= events;
            self.machine.write16(PORT, self.at + SLTSTA, events);
        }
    }

    /// A command, and the interrupt that says that it is completed.
    fn command_and_wait(&self, value: u16, mask: u16) -> u16 {
        self.command(value, mask);
        let events = self.isr();
        assert_eq!(events & CC, CC);
        events & !CC
    }

    /// What it does when a card appears.
    fn power_on(&self) {
        self.command_and_wait(0, PWR_OFF);
        self.command_and_wait(PWR_IND_BLINK, PWR_IND_OFF);
        assert!(self.link_active());
        self.isr();
        assert_eq!(self.machine.read16(CARD, 0), 0x1b36);
        self.machine.enable(CARD, 0xc000_0000);
        self.command_and_wait(PWR_IND_ON | ATTN_IND_OFF, PWR_IND_OFF | 0x00c0);
    }

    /// What it does five seconds after the button.
    fn power_off(&self) {
        self.machine.write16(CARD, 4, 0);
        self.command_and_wait(PWR_OFF, PWR_OFF);
        self.command_and_wait(PWR_IND_OFF, PWR_IND_OFF);
    }
}

fn machine() -> (Machine, PortId) {
    let machine = Machine::new();
    let port = machine.port(1, Some(7));
    (machine, port)
}

#[test]
fn pcie_6_7_plug_use_unplug_and_plug_again() {
    let (machine, port) = machine();
    let pciehp = Pciehp::probe(&machine);
    assert!(machine.asserted()[1], "a completed command");
    assert_eq!((pciehp.isr(), machine.asserted()), (CC, [false; 4]));
    for round in 0..3 {
        let (card, answer) = card(0x50 + round);
        machine.root.plug(port, card).unwrap();
        assert!(machine.asserted()[1]);
        assert_eq!(machine.read32(CARD, 0), u32::MAX, "no power yet");
        assert_eq!(pciehp.isr(), ABP | PDC);
        pciehp.power_on();
        assert_eq!(machine.at(0xc000_0000), Some(0x50 + round));
        assert_eq!(machine.root.power_indicator(port), Ok(Some(PowerIndicator::On)));
        assert_eq!(machine.root.plug(port, crate::machine::card(1).0), Err(PciError::Occupied));

        assert!(matches!(machine.root.unplug(port), Ok(Unplug::Asked)));
        assert_eq!(pciehp.isr(), ABP);
        pciehp.command_and_wait(PWR_IND_BLINK, PWR_IND_OFF);
        // Asking again does not press again, which would take the wish back.
        assert!(matches!(machine.root.unplug(port), Ok(Unplug::Asked)));
        assert_eq!(pciehp.isr(), 0);
        assert!(matches!(machine.took()[..], [PciEvent::Power { on: true, .. }]));
        pciehp.power_off();
        assert_eq!(pciehp.status() & PDS, 0);
        assert_eq!((machine.at(0xc000_0000), machine.read32(CARD, 0)), (None, u32::MAX));
        let told = machine.took();
        let [PciEvent::Power { on: false, .. }, PciEvent::Ejected { port: from, card }] = &told[..] else {
            panic!("not told");
        };
        assert_eq!((*from, card.functions().len()), (port, 1));
        drop(told);
        assert_eq!(machine.root.unplug(port).unwrap_err(), PciError::Empty);
        assert!(is_gone(answer));
    }
}

#[test]
fn pcie_6_7_a_card_from_the_beginning_is_there_without_any_event() {
    let (machine, port) = machine();
    machine.add(BusId::Behind(port), 0, 1);
    let at = machine.capability(PORT, 0x10);
    assert_eq!(machine.read16(PORT, at + SLTSTA), PDS);
    let pciehp = Pciehp::probe(&machine);
    assert_eq!(pciehp.isr(), CC);
    assert!(pciehp.link_active());
    machine.enable(CARD, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(1));
}

#[test]
fn pcie_6_7_a_surprise_is_told_and_the_device_is_gone_at_once() {
    let (machine, port) = machine();
    let answer = machine.add(BusId::Behind(port), 0, 1);
    let pciehp = Pciehp::probe(&machine);
    machine.enable(CARD, 0xc000_0000);
    answer.interrupts().set_intx(true);
    pciehp.isr();
    assert!(machine.asserted()[1]);
    let card = machine.root.pull(port).unwrap();
    assert_eq!((machine.at(0xc000_0000), machine.read32(CARD, 0)), (None, u32::MAX));
    assert!(machine.asserted()[1], "that of the port");
    assert_eq!(pciehp.isr(), PDC | DLLSC);
    assert_eq!(machine.asserted(), [false; 4], "that of the card is gone");
    assert!(!pciehp.link_active());
    assert_eq!(machine.root.pull(port).unwrap_err(), PciError::Empty);
    // Linux turns the slot off then. The card comes up in it again as if it were new.
    pciehp.command_and_wait(PWR_OFF, PWR_OFF);
    answer.took();
    machine.root.plug(port, card).unwrap();
    assert_eq!(pciehp.isr(), ABP | PDC);
    assert!(answer.took().is_empty());
    pciehp.command_and_wait(0, PWR_OFF);
    assert_eq!((machine.read16(CARD, 4), machine.at(0xc000_0000)), (0, None));
    machine.enable(CARD, 0xc000_0000);
    assert_eq!(machine.at(0xc000_0000), Some(1));
    drop(machine.root.pull(port));
    assert!(is_gone(answer));
}

#[test]
fn pcie_6_7_power_off_by_the_guest_alone_leaves_the_card_in_its_slot() {
    let (machine, port) = machine();
    let answer = machine.add(BusId::Behind(port), 0, 1);
    let pciehp = Pciehp::probe(&machine);
    machine.enable(CARD, 0xc000_0000);
    answer.took();
    pciehp.power_off();
    assert_eq!(answer.took(), ["bar 0 nowhere", "reset"]);
    assert!(matches!(machine.took()[..], [PciEvent::Power { on: false, .. }]));
    assert_eq!(pciehp.status() & PDS, PDS);
    pciehp.power_on();
    assert_eq!(machine.at(0xc000_0000), Some(1));
    pciehp.power_off();
    assert!(matches!(machine.root.unplug(port), Ok(Unplug::Done(_))), "nobody to ask");
}

#[test]
fn pcie_6_7_the_wish_for_a_card_can_be_taken_back_by_the_button() {
    let (machine, port) = machine();
    machine.add(BusId::Behind(port), 0, 1);
    let pciehp = Pciehp::probe(&machine);
    pciehp.isr();
    assert!(matches!(machine.root.unplug(port), Ok(Unplug::Asked)));
    assert_eq!(pciehp.isr(), ABP);
    machine.root.cancel_unplug(port).unwrap();
    assert_eq!(pciehp.isr(), ABP);
    pciehp.power_off();
    assert!(!machine.took().iter().any(|event| matches!(event, PciEvent::Ejected { .. })));
    assert_eq!(machine.root.cancel_unplug(port), Err(PciError::NotAsked));
}

#[test]
fn pcie_6_7_3_4_by_msi_each_time_that_there_was_nothing_before() {
    let (machine, port) = machine();
    let pciehp = Pciehp::probe(&machine);
    pciehp.isr();
    let msi = machine.capability(PORT, 5);
    machine.write32(PORT, msi + 4, 0xfee0_0000);
    machine.write16(PORT, msi + 12, 0x41);
    machine.write16(PORT, msi + 2, 1);
    machine.root.plug(port, card(1).0).unwrap();
    let message = MsiMessage { address: 0xfee0_0000, data: 0x41 };
    assert_eq!(machine.controller.take(), [message]);
    assert_eq!(machine.asserted(), [false; 4]);
    machine.root.pull(port).unwrap();
    assert_eq!(machine.controller.take(), [], "the first is not answered yet");
    assert_eq!(pciehp.isr(), ABP | PDC);
    pciehp.command(0, PWR_OFF);
    assert_eq!(machine.controller.take(), [message]);
}

#[test]
fn pcie_a_link_without_a_slot_takes_no_cards_later() {
    let machine = Machine::new();
    let port = machine.port(1, None);
    assert_eq!(machine.root.plug(port, card(1).0), Err(PciError::NoSlot));
    machine.add(BusId::Behind(port), 0, 1);
    assert_eq!(machine.root.unplug(port).unwrap_err(), PciError::NoSlot);
    assert_eq!(machine.root.pull(port).unwrap_err(), PciError::NoSlot);
    assert_eq!(machine.root.power_indicator(port), Ok(None));
    machine.bridge(PORT, (1, 1), (0, 0));
    assert_eq!(machine.read16(CARD, 0), 0x1b36);
    let at = machine.capability(PORT, 0x10);
    assert_eq!(machine.read32(PORT, at + 0x14), 0);
    machine.write32(PORT, at + SLTCTL, u32::MAX);
    assert_eq!(machine.read32(PORT, at + SLTCTL), 0);
}

#[test]
fn bridge_3_2_5_17_a_reset_of_the_bus_behind_is_no_hot_plug() {
    let (machine, port) = machine();
    let answer = machine.add(BusId::Behind(port), 0, 1);
    let pciehp = Pciehp::probe(&machine);
    machine.enable(CARD, 0xc000_0000);
    pciehp.isr();
    answer.took();
    machine.write16(PORT, 0x3e, 0x40);
    machine.write16(PORT, 0x3e, 0x40);
    machine.write16(PORT, 0x3e, 0);
    assert_eq!(answer.took(), ["reset", "bar 0 nowhere"]);
    assert_eq!((pciehp.isr(), pciehp.link_active()), (0, true));
    assert_eq!(machine.read16(CARD, 4), 0);
    assert_eq!(machine.read16(PORT, 4), 0x0007, "the bridge itself is not reset");
}

#[test]
fn a_reset_of_the_machine_keeps_cards_and_finishes_unplugs() {
    let (machine, port) = machine();
    let other = machine.port(2, Some(8));
    machine.add(BusId::Behind(port), 0, 1);
    let stays = machine.add(BusId::Behind(other), 0, 2);
    Pciehp::probe(&machine);
    machine.root.unplug(port).unwrap();
    stays.took();
    machine.root.reset();
    assert!(matches!(machine.took()[..], [PciEvent::Ejected { port: from, .. }] if from == port));
    assert_eq!(stays.took(), ["reset"]);
    assert_eq!(machine.read32(PORT, 0x18), 0);
    machine.bridge((0, 2, 0), (1, 1), (0, 0));
    assert_eq!(machine.read16(CARD, 2), 2);
}

#[test]
fn pcie_a_card_of_a_switch_below_a_switch_loses_its_link_with_all_above() {
    let (machine, port) = machine();
    let upstream = machine.port_on(BusId::Behind(port), 0, 0, PortKind::Upstream, None).unwrap();
    let downstream = machine.port_on(BusId::Behind(upstream), 1, 0, PortKind::Downstream, Some(9)).unwrap();
    let answer = machine.add(BusId::Behind(downstream), 0, 3);
    answer.interrupts().set_intx(true);
    assert_eq!(machine.asserted(), [false, false, true, false]);
    let at = machine.capability(PORT, 0x10);
    // The link of the root port is disabled: all behind it is reset.
    machine.write16(PORT, at + 0x10, 0x10);
    assert_eq!((answer.took(), machine.asserted()), (vec!["reset".to_string()], [false; 4]));
    answer.interrupts().set_intx(true);
    assert_eq!(machine.asserted(), [false; 4], "out of sight");
    machine.write16(PORT, at + 0x10, 0);
    assert_eq!(machine.asserted(), [false, false, true, false]);
    // A switch is no card.
    assert_eq!(machine.root.pull(port).unwrap_err(), PciError::Empty);
    assert!(machine.root.pull(downstream).is_ok());
}

#[test]
fn pull_waits_for_the_vcpu_inside_and_plug_goes_on_under_load() {
    let (machine, port) = machine();
    let pciehp = Pciehp::probe(&machine);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut vcpu = machine.buses.vcpu();
                let mut data = [0];
                while !done.load(Ordering::Relaxed) {
                    let here = vcpu.mmio_read(MmioAddress(0xc000_0000), &mut data).is_ok();
                    assert!(here == (data == [3]) || data == [0xff]);
                    let _ = vcpu.mmio_write(MmioAddress(0xc000_0000), &[0]);
                }
            });
        }
        for _ in 0..50 {
            let (card, answer) = card(3);
            let busy = Arc::new(AtomicBool::new(false));
            let inside = busy.clone();
            *answer.on_write.lock().unwrap() = Some(Box::new(move || {
                inside.store(true, Ordering::SeqCst);
                thread::yield_now();
                inside.store(false, Ordering::SeqCst);
            }));
            machine.root.plug(port, card).unwrap();
            pciehp.isr();
            pciehp.power_on();
            while answer.accesses.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            let card = machine.root.pull(port).unwrap();
            assert!(!busy.load(Ordering::SeqCst), "nobody is inside of it");
            drop(card);
            assert!(is_gone(answer));
            pciehp.command(PWR_OFF, PWR_OFF);
            pciehp.isr();
        }
        done.store(true, Ordering::Relaxed);
    });
    // Nobody reads the memory of what is not there.
    let mut data = [0];
    machine.buses.mmio_read(MmioAddress(0xc000_0000), &mut data).unwrap_err();
}
