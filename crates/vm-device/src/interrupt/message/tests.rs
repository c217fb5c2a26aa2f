use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32};
use std::thread;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

/// An interrupt controller in user space: holds what it was told, and delivers when it is asked to.
#[derive(Debug, Default)]
struct Controller {
    connected: Mutex<BTreeMap<u32, (MsiMessage, Event)>>,
    /// Numbers it has heard of and not been told to forget.
    known: Mutex<BTreeSet<u32>>,
    /// Refuses this address.
    refuse: Mutex<Option<u64>>,
    calls: AtomicU32,
}

impl MessageController for Controller {
    fn apply(&self, changes: &[MessageChange<'_>]) -> io::Result<()> {
        self.calls.fetch_add(1, Ordering::SeqCst);
        let refuse = *self.refuse.lock().unwrap();
        let bad = |change: &MessageChange<'_>| match change.action {
            MessageAction::Deliver(message) => Some(message.address) == refuse,
            _ => false,
        };
        if changes.iter().any(bad) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut connected = self.connected.lock().unwrap();
        let mut known = self.known.lock().unwrap();
        for change in changes {
            match change.action {
                MessageAction::Deliver(message) => {
                    connected.insert(change.number, (message, change.event.try_clone()?));
                    known.insert(change.number);
                }
                MessageAction::Hold => drop(connected.remove(&change.number)),
                MessageAction::Forget => {
                    connected.remove(&change.number);
                    known.remove(&change.number);
                }
            }
        }
        Ok(())
    }
}

impl Controller {
    /// What reaches a vCPU now.
    fn deliver(&self) -> Vec<(u32, MsiMessage)> {
        let connected = self.connected.lock().unwrap();
        connected
            .iter()
            .filter(|(_, (_, event))| event.take())
            .map(|(&number, &(message, _))| (number, message))
            .collect()
    }

    fn calls(&self) -> u32 {
        self.calls.swap(0, Ordering::SeqCst)
    }
}

fn function(count: u32) -> (Arc<Controller>, Messages) {
    let controller = Arc::new(Controller::default());
    let messages = Messages::new(controller.clone(), 24, count).unwrap();
    (controller, messages)
}

const UNMASKED: u32 = 0;
const MASKED: u32 = 1;

fn entry(address: u64, data: u32, control: u32) -> [u8; 16] {
    (u128::from(address) | u128::from(data) << 64 | u128::from(control) << 96).to_le_bytes()
}

/// As drivers do: double words.
fn program(messages: &Messages, index: u64, address: u64, data: u32, control: u32) {
    for (at, word) in (0..).zip(entry(address, data, control).chunks(4)) {
        messages.table_write(index * 16 + at * 4, word);
    }
}

fn pba(messages: &Messages, offset: u64) -> u64 {
    let mut data = [0; 8];
    messages.pba_read(offset, &mut data);
    u64::from_le_bytes(data)
}

const HERE: MsiMessage = MsiMessage { address: 0xfee0_0000, data: 0x31 };

#[test]
fn a_function_has_1_to_2048_vectors() {
    let make = |first, count| Messages::new(Arc::new(Controller::default()), first, count);
    for (first, count) in [(0, 0), (0, 2049), (u32::MAX, 1)] {
        assert!(matches!(make(first, count), Err(MessagesError::Count { .. })));
    }
    let messages = make(24, 65).unwrap();
    assert_eq!((messages.count(), messages.table_size(), messages.pba_size()), (65, 1040, 16));
    assert!(messages.vector(65).is_none());
    assert_eq!(messages.vectors().len(), 65);
    assert_eq!(make(0, 64).unwrap().pba_size(), 8);
}

#[test]
fn pci_6_8_2_9_after_reset_all_is_masked_disabled_and_zero() {
    let (controller, messages) = function(3);
    let fresh = messages.save();
    assert_eq!(
        fresh.vectors,
        [VectorState { message: MsiMessage::default(), masked: true, pending: false }; 3]
    );
    messages.set_msix_control(true, true);
    program(&messages, 1, HERE.address, HERE.data, UNMASKED);
    messages.vector(1).unwrap().signal();
    messages.reset();
    assert_eq!(messages.save(), fresh);
    assert!(!messages.is_enabled() && !messages.vector(0).unwrap().is_enabled());
    messages.set_msix_control(true, false);
    program(&messages, 1, HERE.address, HERE.data, UNMASKED);
    assert_eq!(controller.deliver(), [], "what was pending before the reset is gone");
}

#[test]
fn pci_6_8_2_an_unmasked_vector_of_an_enabled_function_sends_its_message() {
    let (controller, messages) = function(3);
    program(&messages, 2, HERE.address, HERE.data, UNMASKED);
    assert_eq!(controller.calls(), 0, "nothing reaches the controller while messages are disabled");
    messages.set_msix_control(true, false);
    assert!(messages.vector(2).unwrap().is_enabled());
    messages.vector(2).unwrap().signal();
    assert_eq!(controller.deliver(), [(26, HERE)]);
    assert_eq!(controller.deliver(), []);
    assert_eq!(pba(&messages, 0), 0);
}

#[test]
fn pci_6_8_2_enabling_tells_the_controller_of_all_vectors_at_once() {
    let (controller, messages) = function(64);
    for index in 0..64 {
        program(&messages, index, HERE.address, HERE.data, UNMASKED);
    }
    messages.set_msix_control(true, true);
    assert_eq!(controller.calls(), 0);
    messages.set_msix_control(true, false);
    assert_eq!(controller.calls(), 1);
    assert_eq!(controller.connected.lock().unwrap().len(), 64);
    messages.set_msix_control(true, false);
    assert_eq!(controller.calls(), 0, "nothing is new");
    messages.set_msix_control(true, true);
    assert_eq!((controller.calls(), controller.connected.lock().unwrap().len()), (1, 0));
}

#[test]
fn pci_6_8_2_5_a_masked_vector_is_pending_until_it_is_unmasked() {
    let (controller, messages) = function(70);
    messages.set_msix_control(true, false);
    for index in [0, 69] {
        program(&messages, index, HERE.address, HERE.data, MASKED);
        messages.vector(index as u16).unwrap().signal();
    }
    assert_eq!(controller.deliver(), []);
    assert_eq!((pba(&messages, 0), pba(&messages, 8)), (1, 1 << 5));
    let mut byte = [0];
    messages.pba_read(8, &mut byte);
    assert_eq!(byte, [1 << 5]);
    messages.table_write(69 * 16 + 12, &UNMASKED.to_le_bytes());
    assert_eq!(controller.deliver(), [(24 + 69, HERE)]);
    assert_eq!((pba(&messages, 0), pba(&messages, 8)), (1, 0));
    // The same for all at once, 6.8.2.3.
    messages.set_msix_control(true, true);
    messages.vector(69).unwrap().signal();
    assert_eq!((pba(&messages, 0), pba(&messages, 8)), (1, 1 << 5));
    messages.set_msix_control(true, false);
    assert_eq!(controller.deliver(), [(24 + 69, HERE)]);
    assert_eq!(pba(&messages, 16), 0, "behind the end");
    assert_eq!(pba(&messages, u64::MAX - 3), 0);
}

#[test]
fn pci_6_8_2_a_message_that_changes_while_masked_is_the_one_that_is_sent() {
    let (controller, messages) = function(1);
    messages.set_msix_control(true, false);
    program(&messages, 0, HERE.address, HERE.data, UNMASKED);
    messages.table_write(12, &MASKED.to_le_bytes());
    messages.vector(0).unwrap().signal();
    let there = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    program(&messages, 0, there.address, there.data, UNMASKED);
    assert_eq!(controller.deliver(), [(24, there)]);
}

#[test]
fn a_signal_from_before_messages_were_enabled_is_not_sent() {
    let (controller, messages) = function(1);
    program(&messages, 0, HERE.address, HERE.data, UNMASKED);
    messages.vector(0).unwrap().signal();
    assert_eq!(pba(&messages, 0), 0);
    messages.set_msix_control(true, false);
    assert_eq!(controller.deliver(), []);
}

#[test]
fn pci_6_8_2_reserved_bits_are_zero_and_the_rest_is_kept() {
    let (_, messages) = function(2);
    messages.table_write(0, &[0xff; 64]);
    let mut data = [0xaa; 48];
    messages.table_read(0, &mut data);
    let full = entry(!3, u32::MAX, 1);
    assert_eq!(data[..16], full);
    assert_eq!(data[16..32], full);
    assert_eq!(data[32..], [0; 16], "behind the table");
    messages.table_write(u64::MAX, &[1, 2]);
    messages.table_read(u64::MAX - 1, &mut data);
    assert_eq!(data, [0; 48]);
}

#[test]
fn pci_6_8_1_multiple_messages_differ_in_the_low_bits() {
    let (controller, messages) = function(8);
    let control = MsiControl { enabled: true, address: 0xfee0_0003, data: 0x4f, multiple: 2, mask: 0 };
    messages.set_msi(&control);
    for vector in messages.vectors() {
        vector.signal();
    }
    let expected = [0x4c, 0x4d, 0x4e, 0x4f].map(|data| MsiMessage { address: 0xfee0_0000, data });
    let got: Vec<_> = controller.deliver().into_iter().map(|(_, message)| message).collect();
    assert_eq!(got, expected, "the guest gave four vectors of eight");
    messages.set_msi(&MsiControl { mask: 0b10, ..control });
    messages.vector(1).unwrap().signal();
    messages.vector(0).unwrap().signal();
    assert_eq!(controller.deliver().len(), 1);
    assert_eq!(messages.msi_pending() & 0b11, 0b10);
    messages.set_msi(&control);
    assert_eq!(controller.deliver(), [(25, expected[1])]);
    messages.set_msi(&MsiControl { enabled: false, ..control });
    assert!(controller.connected.lock().unwrap().is_empty());
    // Reserved exponents do not reach further than 32 vectors.
    messages.set_msi(&MsiControl { multiple: 7, ..control });
    messages.set_msi(&MsiControl { multiple: 255, data: u16::MAX, ..control });
    assert_eq!(controller.connected.lock().unwrap().len(), 8);
}

#[test]
fn policy_8_a_message_that_the_controller_refuses_silences_no_other() {
    let (controller, messages) = function(3);
    *controller.refuse.lock().unwrap() = Some(0xbad0);
    program(&messages, 0, HERE.address, HERE.data, UNMASKED);
    program(&messages, 1, 0xbad0, 1, UNMASKED);
    program(&messages, 2, HERE.address, HERE.data, UNMASKED);
    messages.set_msix_control(true, false);
    assert_eq!(messages.failures(), 1);
    messages.vectors().iter().for_each(Message::signal);
    assert_eq!(controller.deliver(), [(24, HERE), (26, HERE)]);
    assert_eq!(pba(&messages, 0), 0b10, "what it has to say is pending");
    program(&messages, 1, HERE.address, HERE.data, UNMASKED);
    assert_eq!(controller.deliver(), [(25, HERE)]);
    // One that was fine, and is changed into a bad one, must not go on with the old message.
    let before = messages.failures();
    program(&messages, 1, 0xbad0, 1, UNMASKED);
    assert!(messages.failures() > before);
    messages.vector(1).unwrap().signal();
    assert_eq!(controller.deliver(), []);
}

#[test]
fn numbers_are_free_when_the_function_is_gone() {
    let (controller, messages) = function(3);
    messages.set_msix_control(true, false);
    program(&messages, 1, HERE.address, HERE.data, UNMASKED);
    let vector = messages.vector(1).unwrap();
    drop(messages);
    assert!(controller.known.lock().unwrap().is_empty() && controller.connected.lock().unwrap().is_empty());
    vector.signal();
    assert_eq!(controller.deliver(), []);
}

#[test]
fn a_successor_sends_what_was_pending() {
    let (_, old) = function(4);
    old.set_msix_control(true, false);
    for index in 0..3 {
        program(&old, index, HERE.address, HERE.data, u32::from(index > 0));
    }
    old.vector(1).unwrap().signal();
    let mut state = old.save();
    assert_eq!(
        state.vectors.iter().map(|vector| vector.pending).collect::<Vec<_>>(),
        [false, true, false, false]
    );
    let (controller, new) = function(4);
    new.vector(0).unwrap().signal();
    new.restore(&state).unwrap();
    assert_eq!(new.save(), state);
    assert_eq!(controller.deliver(), [], "what the new one was signalled before is not the old one's");
    new.table_write(16 + 12, &UNMASKED.to_le_bytes());
    assert_eq!(controller.deliver(), [(25, HERE)]);
    state.vectors.pop();
    assert!(matches!(new.restore(&state), Err(MessagesError::State { found: 3, expected: 4 })));
}

/// A device signals, and waits for each interrupt to arrive; a vCPU masks and unmasks as fast as it can, in both ways; another
/// takes interrupts.
#[test]
fn no_message_is_lost_or_early_while_the_guest_masks_and_unmasks() {
    const COUNT: u32 = 5_000;
    let (controller, messages) = function(1);
    program(&messages, 0, HERE.address, HERE.data, UNMASKED);
    messages.set_msix_control(true, false);
    let arrived = AtomicU32::new(0);
    // On a busy machine fewer.
    let enough = Instant::now() + Duration::from_secs(5);
    let (over, lost) = (AtomicBool::new(false), AtomicBool::new(false));
    let done = || over.load(Ordering::SeqCst);
    let vector = messages.vector(0).unwrap();
    thread::scope(|scope| {
        scope.spawn(|| {
            'all: for n in (0..COUNT).take_while(|_| Instant::now() < enough) {
                vector.signal();
                let deadline = Instant::now() + Duration::from_secs(30);
                while arrived.load(Ordering::SeqCst) == n {
                    if Instant::now() >= deadline {
                        lost.store(true, Ordering::SeqCst);
                        break 'all;
                    }
                    thread::yield_now();
                }
            }
            // The others end in any case.
            over.store(true, Ordering::SeqCst);
        });
        scope.spawn(|| {
            while !done() {
                let got = controller.deliver();
                if !got.is_empty() {
                    assert_eq!(got, [(24, HERE)]);
                    arrived.fetch_add(1, Ordering::SeqCst);
                }
                thread::yield_now();
            }
        });
        let mut round = 0_u32;
        while !done() {
            round += 1;
            match round % 2 {
                0 => messages.table_write(12, &MASKED.to_le_bytes()),
                _ => messages.set_msix_control(true, true),
            }
            let before = arrived.load(Ordering::SeqCst);
            assert!(controller.connected.lock().unwrap().is_empty());
            for _ in 0..10 {
                thread::yield_now();
            }
            // One that was taken before the mask may be counted after it.
            assert!(arrived.load(Ordering::SeqCst) <= before + 1, "an interrupt came through the mask");
            messages.table_write(12, &UNMASKED.to_le_bytes());
            messages.set_msix_control(true, false);
            thread::yield_now();
        }
    });
    assert!(!lost.into_inner(), "an interrupt is lost, after {}", arrived.into_inner());
    assert_eq!(pba(&messages, 0), 0);
}

proptest! {
    /// Any access to the table is as to plain memory with some read-only bits, and the controller always has what the table says.
    #[test]
    fn the_table_is_memory_and_the_controller_follows(
        writes in proptest::collection::vec(
            (0_u64..60, proptest::collection::vec(any::<u8>(), 0..9), any::<bool>(), any::<bool>()), 1..40),
    ) {
        let (controller, messages) = function(3);
        let mut memory = [0_u8; 48];
        for entry in 0..3 {
            memory[entry * 16 + 12] = 1;
        }
        for (offset, data, enabled, mask_all) in writes {
            messages.table_write(offset, &data);
            for (at, byte) in data.iter().enumerate() {
                let at = offset as usize + at;
                let writable = match at % 16 {
                    0 => 0xfc,
                    12 => 1,
                    13..16 => 0,
                    _ => 0xff,
                };
                if let Some(old) = memory.get_mut(at) {
                    *old = byte & writable;
                }
            }
            messages.set_msix_control(enabled, mask_all);
            let mut read = [0; 48];
            messages.table_read(0, &mut read);
            prop_assert_eq!(read, memory);
            let mut byte = [0xaa; 1];
            messages.table_read(offset, &mut byte);
            prop_assert_eq!(byte[0], memory.get(offset as usize).copied().unwrap_or(0));
            let expected: Vec<_> = (0..3_u32)
                .filter(|&index| enabled && !mask_all && memory[index as usize * 16 + 12] == 0)
                .map(|index| {
                    let entry = &memory[index as usize * 16..];
                    let address = u64::from_le_bytes(entry[..8].try_into().unwrap());
                    let data = u32::from_le_bytes(entry[8..12].try_into().unwrap());
                    (24 + index, MsiMessage { address, data })
                })
                .collect();
            let connected = controller.connected.lock().unwrap();
            let connected: Vec<_> = connected.iter().map(|(&number, &(message, _))| (number, message)).collect();
            prop_assert_eq!(connected, expected);
        }
    }
}
