use std::collections::BTreeMap;
use std::sync::Mutex as StdMutex;
use std::sync::atomic::AtomicBool;

use proptest::prelude::*;

use super::*;

/// Delivers by noting what is where.
#[derive(Default)]
struct Controller {
    delivered: StdMutex<BTreeMap<u32, MsiMessage>>,
    refuses: AtomicBool,
}

impl MessageController for Controller {
    fn apply(&self, changes: &[MessageChange<'_>]) -> io::Result<()> {
        if self.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut delivered = self.delivered.lock().unwrap();
        for change in changes {
            match change.action {
                MessageAction::Deliver(message) => drop(delivered.insert(change.number, message)),
                MessageAction::Hold | MessageAction::Forget => drop(delivered.remove(&change.number)),
            }
        }
        Ok(())
    }
}

impl Controller {
    fn at(&self, pin: u8) -> Option<MsiMessage> {
        self.delivered.lock().unwrap().get(&pin.into()).copied()
    }
}

fn new() -> (Arc<Controller>, IoApic) {
    let controller = Arc::new(Controller::default());
    (controller.clone(), IoApic::new(controller, 0))
}

fn line(trigger: Trigger) -> IrqLine {
    IrqLine::new(trigger).unwrap()
}

fn set(apic: &IoApic, select: u8, value: u32) {
    let base = MmioAddress(0xfec0_0000);
    apic.mmio_write(base, SELECT, &[select, 0, 0, 0]);
    apic.mmio_write(base, WINDOW, &value.to_le_bytes());
}

fn get(apic: &IoApic, select: u8) -> u32 {
    let base = MmioAddress(0xfec0_0000);
    let mut data = [0xee; 4];
    apic.mmio_write(base, SELECT, &[select]);
    apic.mmio_read(base, WINDOW, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn ioapic_3_2_identification_version_and_entries_are_as_after_power_on() {
    let (_, apic) = new();
    assert_eq!([get(&apic, 0), get(&apic, 1), get(&apic, 2)], [0, 0x0017_0011, 0]);
    for pin in 0..IO_APIC_PINS {
        assert_eq!((get(&apic, 0x10 + 2 * pin), get(&apic, 0x11 + 2 * pin)), (0x0001_0000, 0));
    }
    assert_eq!((get(&apic, 3), get(&apic, 0x40), get(&apic, 0xff)), (0, 0, 0), "reserved");
    set(&apic, 0, u32::MAX);
    set(&apic, 1, 0);
    assert_eq!((get(&apic, 0), get(&apic, 1), get(&apic, 2)), (0x0f00_0000, 0x0017_0011, 0x0f00_0000));
}

#[test]
fn ioapic_3_2_4_an_entry_that_is_not_masked_is_a_message() {
    let (controller, apic) = new();
    apic.connect(4, &line(Trigger::Edge)).unwrap();
    apic.connect(16, &line(Trigger::Level)).unwrap();
    set(&apic, 0x19, 0x0300_0000);
    assert_eq!(controller.at(4), None, "masked");
    set(&apic, 0x18, 0x31);
    assert_eq!(controller.at(4), Some(MsiMessage { address: 0xfee0_3000, data: 0x31 }));
    // Logical destination, lowest priority, level.
    set(&apic, 0x31, 0xff00_0000);
    set(&apic, 0x30, 0xa941);
    assert_eq!(controller.at(16), Some(MsiMessage { address: 0xfeef_f004, data: 0xc141 }));
    // The other half changes the message, too.
    set(&apic, 0x31, 0x0100_0000);
    assert_eq!(controller.at(16), Some(MsiMessage { address: 0xfee0_1004, data: 0xc141 }));
    set(&apic, 0x30, 0x1_a941);
    assert_eq!((controller.at(16), controller.at(4).is_some()), (None, true));
}

#[test]
fn ioapic_3_2_4_a_pin_without_a_line_has_an_entry_and_sends_nothing() {
    let (controller, apic) = new();
    set(&apic, 0x10, 0x20);
    assert_eq!((get(&apic, 0x10), controller.at(0)), (0x20, None));
    // One that is connected later finds its entry.
    apic.connect(0, &line(Trigger::Edge)).unwrap();
    assert!(controller.at(0).is_some());
    assert_eq!(apic.connect(0, &line(Trigger::Edge)), Err(IoApicError::Taken(0)));
    assert_eq!(apic.connect(24, &line(Trigger::Edge)), Err(IoApicError::NoPin(24)));
}

#[test]
fn ioapic_3_2_4_the_end_of_a_level_interrupt_raises_what_is_still_asserted() {
    let (_, apic) = new();
    let (level, edge) = (line(Trigger::Level), line(Trigger::Edge));
    apic.connect(16, &level).unwrap();
    apic.connect(5, &edge).unwrap();
    set(&apic, 0x30, 0x8041);
    set(&apic, 0x1a, 0x41);
    let source = level.source();
    source.assert();
    let edges = edge.source();
    edges.assert();
    assert!(level.trigger().take() && edge.trigger().take());
    apic.end_of_interrupt(0x42);
    assert!(!level.trigger().is_signalled(), "another vector");
    apic.end_of_interrupt(0x41);
    assert!(level.trigger().take());
    assert!(!edge.trigger().is_signalled(), "edges do not come again");
    source.deassert();
    apic.end_of_interrupt(0x41);
    assert!(!level.trigger().is_signalled());
}

#[test]
fn ioapic_after_a_reset_pins_are_masked_and_edges_forgotten() {
    let (controller, apic) = new();
    let (level, edge) = (line(Trigger::Level), line(Trigger::Edge));
    apic.connect(1, &level).unwrap();
    apic.connect(2, &edge).unwrap();
    set(&apic, 0x12, 0x8041);
    set(&apic, 0x14, 0x42);
    set(&apic, 0, 0x0100_0000);
    let source = level.source();
    source.assert();
    edge.source().pulse();
    apic.reset();
    assert_eq!(
        (controller.at(1), controller.at(2), get(&apic, 0), get(&apic, 0x12)),
        (None, None, 0, 0x1_0000)
    );
    assert!(level.trigger().is_signalled(), "it still wants something");
    assert!(!edge.trigger().is_signalled());
}

#[test]
fn policy_8_a_controller_that_refuses_is_counted_and_asked_again() {
    let (controller, apic) = new();
    apic.connect(3, &line(Trigger::Edge)).unwrap();
    controller.refuses.store(true, Ordering::SeqCst);
    set(&apic, 0x16, 0x33);
    assert_eq!((apic.failures(), controller.at(3)), (1, None));
    controller.refuses.store(false, Ordering::SeqCst);
    set(&apic, 0x16, 0x33);
    assert_eq!((apic.failures(), controller.at(3).map(|message| message.data)), (1, Some(0x33)));
}

#[test]
fn ioapic_3_1_other_accesses_than_the_registers_own_do_nothing() {
    let (_, apic) = new();
    let base = MmioAddress(0xfec0_0000);
    set(&apic, 0x10, 0x33);
    for (offset, data) in
        [(WINDOW, &[1][..]), (WINDOW, &[1; 8]), (0x14, &[1; 4]), (0x1f, &[1]), (SELECT, &[])]
    {
        apic.mmio_write(base, offset, data);
        let mut read = vec![0xee; data.len()];
        apic.mmio_read(base, if offset == SELECT { 0x04 } else { offset }, &mut read);
        assert_eq!(read, vec![0; data.len()]);
    }
    assert_eq!(get(&apic, 0x10), 0x33);
}

#[test]
fn policy_8_a_state_is_taken_over_whole_or_not_at_all() {
    let (controller, apic) = new();
    apic.connect(4, &line(Trigger::Edge)).unwrap();
    set(&apic, 0x19, 0x0200_0000);
    set(&apic, 0x18, 0x31);
    let state = apic.save();
    apic.reset();
    for bad in [
        IoApicState { entries: vec![MASKED; 23], ..state.clone() },
        IoApicState { entries: vec![MASKED | 1 << 14; 24], ..state.clone() },
        IoApicState { id: 1, ..state.clone() },
    ] {
        assert!(apic.restore(&bad).is_err());
        assert_eq!((controller.at(4), apic.save().entries), (None, vec![MASKED; 24]));
    }
    apic.restore(&state).unwrap();
    assert_eq!((apic.save(), controller.at(4).map(|message| message.data)), (state, Some(0x31)));
}

proptest! {
    /// Whatever is written: reserved bits stay 0, and the controller has what the entries say.
    #[test]
    fn ioapic_3_2_4_entries_and_messages_agree_after_any_writes(
        writes in proptest::collection::vec((any::<u8>(), any::<u32>()), 1..80),
    ) {
        let (controller, apic) = new();
        for pin in 0..IO_APIC_PINS {
            apic.connect(pin, &line(Trigger::Edge)).unwrap();
        }
        for (select, value) in writes {
            set(&apic, select, value);
        }
        for pin in 0..IO_APIC_PINS {
            let entry = u64::from(get(&apic, 0x11 + 2 * pin)) << 32 | u64::from(get(&apic, 0x10 + 2 * pin));
            prop_assert_eq!(entry & !WRITABLE, 0);
            let wanted = (entry & MASKED == 0).then(|| message(entry));
            prop_assert_eq!(controller.at(pin), wanted);
        }
    }
}
