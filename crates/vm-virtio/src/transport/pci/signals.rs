//! Interrupts of virtio over PCI: events to vectors of MSI-X, or the ISR status and the pin (4.1.4.5, 4.1.5.1.2, 4.1.5.3,
//! 4.1.5.4).
use crate::Interrupt;
use crate::transport::interrupt::{CONFIG, EVENTS, Events, Line, USED};
use crate::transport::registers::Signals;
use rustix::fd::BorrowedFd;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, OnceLock};

/// No vector: the event interrupts nobody (4.1.5.1.2).
pub const NO_VECTOR: u16 = 0xffff;

/// The interrupts of a PCI function. Called from lanes: must not block.
pub trait FunctionInterrupts: Send + Sync {
    /// Whether the guest has enabled MSI-X.
    fn uses_messages(&self) -> bool;
    /// Sends the message of a vector of the table; one that is masked becomes pending.
    fn message(&self, vector: u16);
    /// The eventfd of a vector, for those who signal by themselves: masks and routes are behind it.
    fn message_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        let _ = vector;
        None
    }
    /// What the function wants of its pin, and of the interrupt bit in the PCI Status register. While MSI-X is enabled, nobody
    /// is to see it.
    fn set_intx(&self, high: bool);
}

type Function = Arc<OnceLock<Arc<dyn FunctionInterrupts>>>;

/// The pin.
struct Intx(Function);

impl Line for Intx {
    fn set(&self, high: bool) {
        if let Some(function) = self.0.get() {
            function.set_intx(high);
        }
    }
}

/// Vectors and events of a device.
pub(super) struct PciSignals {
    function: Function,
    /// The ISR status.
    events: Events,
    vectors: u16,
    config: AtomicU16,
    queues: OnceLock<Vec<AtomicU16>>,
}

impl PciSignals {
    pub(super) fn new(vectors: u16) -> Self {
        let function = Function::default();
        let events = Events::new(Arc::new(Intx(function.clone())));
        PciSignals { function, events, vectors, config: AtomicU16::new(NO_VECTOR), queues: OnceLock::new() }
    }

    pub(super) fn set_queues(&self, count: u16) {
        let _ = self.queues.set((0..count).map(|_| AtomicU16::new(NO_VECTOR)).collect());
    }

    pub(super) fn connect(&self, function: Arc<dyn FunctionInterrupts>) {
        if self.function.set(function).is_ok() {
            self.events.settle();
        }
    }

    /// The interrupt of a queue.
    pub(super) fn queue(self: &Arc<Self>, queue: u16) -> Arc<dyn Interrupt> {
        Arc::new(QueueInterrupt { signals: self.clone(), queue })
    }

    fn slot(&self, queue: u32) -> Option<&AtomicU16> {
        self.queues.get()?.get(usize::try_from(queue).ok()?)
    }

    pub(super) fn table_size(&self) -> u16 {
        self.vectors
    }

    pub(super) fn config_vector(&self) -> u16 {
        self.config.load(Ordering::Relaxed)
    }

    pub(super) fn queue_vector(&self, queue: u32) -> u16 {
        self.slot(queue).map_or(NO_VECTOR, |slot| slot.load(Ordering::Relaxed))
    }

    /// What is mapped if this vector is asked for: one that there is not is none (4.1.5.1.2.1).
    fn mapped(&self, vector: u16) -> u16 {
        if vector < self.vectors { vector } else { NO_VECTOR }
    }

    pub(super) fn set_config_vector(&self, vector: u16) {
        self.config.store(self.mapped(vector), Ordering::Relaxed);
    }

    /// Whether there is such a queue.
    pub(super) fn set_queue_vector(&self, queue: u32, vector: u16) -> bool {
        let slot = self.slot(queue);
        slot.inspect(|slot| slot.store(self.mapped(vector), Ordering::Relaxed)).is_some()
    }

    /// The ISR status, which is 0 afterwards.
    pub(super) fn take(&self) -> u8 {
        (self.events.take() & EVENTS) as u8
    }

    #[inline]
    pub(super) fn pending(&self) -> u32 {
        self.events.pending()
    }

    pub(super) fn vectors(&self) -> (u16, Vec<u16>) {
        let queues = self.queues.get().into_iter().flatten();
        (self.config_vector(), queues.map(|slot| slot.load(Ordering::Relaxed)).collect())
    }

    /// Whether that is possible; if not, nothing changes.
    pub(super) fn restore(&self, isr: u32, config: u16, queues: &[u16]) -> bool {
        let slots = self.queues.get().map_or(&[][..], |slots| slots);
        let possible = |vector: &u16| self.mapped(*vector) == *vector;
        if isr & !EVENTS != 0 || queues.len() != slots.len() || ![config].iter().chain(queues).all(possible) {
            return false;
        }
        self.config.store(config, Ordering::Relaxed);
        slots.iter().zip(queues).for_each(|(slot, vector)| slot.store(*vector, Ordering::Relaxed));
        self.events.restore(isr);
        true
    }

    /// The file behind the vector of a queue.
    pub(super) fn file(&self, queue: u32) -> Option<BorrowedFd<'_>> {
        let vector = self.queue_vector(queue);
        self.messages().filter(|_| vector != NO_VECTOR)?.message_fd(vector)
    }

    fn messages(&self) -> Option<&Arc<dyn FunctionInterrupts>> {
        self.function.get().filter(|function| function.uses_messages())
    }

    fn send(function: &Arc<dyn FunctionInterrupts>, vector: u16) {
        if vector != NO_VECTOR {
            function.message(vector);
        }
    }
}

impl Signals for PciSignals {
    fn config_changed(&self) {
        // 4.1.4.5.1: the bit is set whatever follows.
        if self.events.signal(CONFIG)
            && let Some(function) = self.messages()
        {
            PciSignals::send(function, self.config_vector());
        }
    }

    fn mute(&self) {
        self.events.mute();
        // 4.1.5.1.2.1: all unmapped.
        self.config.store(NO_VECTOR, Ordering::Relaxed);
        self.queues.get().into_iter().flatten().for_each(|slot| slot.store(NO_VECTOR, Ordering::Relaxed));
    }

    fn unmute(&self) {
        self.events.unmute();
    }
}

struct QueueInterrupt {
    signals: Arc<PciSignals>,
    queue: u16,
}

impl Interrupt for QueueInterrupt {
    fn signal(&self) {
        match self.signals.messages() {
            Some(function) if !self.signals.events.is_muted() => {
                PciSignals::send(function, self.signals.queue_vector(u32::from(self.queue)));
            }
            Some(_) => {}
            None => {
                self.signals.events.signal(USED);
            }
        }
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.signals.file(u32::from(self.queue))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lane::EventFd;
    use rustix::event::{EventfdFlags, eventfd};

    /// Two vectors; messages are what was written to their files.
    struct Files([EventFd; 2]);

    impl FunctionInterrupts for Files {
        fn uses_messages(&self) -> bool {
            true
        }
        fn message(&self, vector: u16) {
            self.0[usize::from(vector)].signal();
        }
        fn message_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
            self.0.get(usize::from(vector))?.as_fd()
        }
        fn set_intx(&self, _: bool) {}
    }

    #[test]
    fn pci_4_1_5_3_a_queue_has_the_file_of_its_vector() {
        let file = || EventFd::new(eventfd(0, EventfdFlags::NONBLOCK).unwrap()).unwrap();
        let function = Arc::new(Files([file(), file()]));
        let number = |vector: usize| function.0[vector].as_fd().map(|fd| rustix::fd::AsRawFd::as_raw_fd(&fd));
        let signals = Arc::new(PciSignals::new(2));
        signals.set_queues(1);
        let call = signals.queue(0);
        assert!(call.as_fd().is_none(), "no function");
        signals.connect(function.clone());
        assert!(call.as_fd().is_none(), "no vector");
        for vector in [1, 0] {
            assert!(signals.set_queue_vector(0, vector));
            let fd = call.as_fd().map(|fd| rustix::fd::AsRawFd::as_raw_fd(&fd));
            assert_eq!(fd, number(usize::from(vector)));
        }
        signals.mute();
        assert!(call.as_fd().is_none(), "after a reset");
    }
}
