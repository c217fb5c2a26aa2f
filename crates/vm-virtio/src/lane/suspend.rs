//! Lanes that are suspended: by the driver (virtio 1.4, 3.4), or by the host for a snapshot.
//!
//! A lane is *asked* from the order on: its queues pop nothing, the worker finishes what is under way. It is *at rest*
//! once no chain is out but those that the worker [keeps](Worker::keeps), and the host has answered what the worker
//! asked: from then on it only obeys orders. It waits
//! for no file, timer or message, so nothing touches a queue or notifies anybody until it is resumed (3.4.2).
use super::{LaneRunner, PAUSE_DEADLINE};
use crate::Queue;
use crate::device::Worker;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// Who suspends. Each for itself: a lane serves when nobody does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum By {
    /// SUSPEND in the device status.
    Driver,
    /// The host.
    Host,
}

/// What to do when the last lane has let go; gets whether any of them could not finish.
type Then = Box<dyn FnOnce(bool) + Send>;

/// Waits for all lanes. A lane that is gone lets go, too.
pub(crate) struct Gathering {
    stuck: AtomicBool,
    then: Mutex<Option<Then>>,
}

impl Gathering {
    pub(crate) fn new(then: impl FnOnce(bool) + Send + 'static) -> Arc<Gathering> {
        Arc::new(Gathering { stuck: AtomicBool::new(false), then: Mutex::new(Some(Box::new(then))) })
    }
}

impl Drop for Gathering {
    fn drop(&mut self) {
        let then = self.then.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(then) = then {
            then(self.stuck.load(Ordering::SeqCst));
        }
    }
}

/// The suspensions of one lane.
#[derive(Default)]
pub(super) struct Pause {
    driver: bool,
    host: bool,
    /// Those who wait for it to come to rest, and until when.
    waiting: Vec<(Instant, Arc<Gathering>)>,
}

impl Pause {
    /// Whether anybody has asked for it.
    pub(super) fn asked(&self) -> bool {
        self.driver || self.host
    }

    /// A reset ends what the driver asked for, and nobody waits for it any more.
    pub(super) fn reset(&mut self) {
        self.driver = false;
        self.waiting.clear();
    }

    fn set(&mut self, by: By, on: bool) {
        match by {
            By::Driver => self.driver = on,
            By::Host => self.host = on,
        }
    }
}

impl<W: Worker> LaneRunner<W> {
    /// Whether only orders matter: suspended, at rest, and nothing is to be stopped.
    pub(super) fn at_rest(&self) -> bool {
        self.pause.asked()
            && self.pause.waiting.is_empty()
            && self.check_in.is_none()
            && self.rings.iter().all(|ring| ring.stopping.is_none())
    }

    pub(super) fn suspend(&mut self, by: By, deadline: Instant, done: Arc<Gathering>) {
        let serving = !self.pause.asked();
        self.pause.set(by, true);
        self.pause.waiting.push((deadline, done));
        if serving {
            (0..self.rings.len()).for_each(|at| self.regate(at));
            self.enter_quietly(|worker, lane| worker.suspend(lane));
        }
    }

    pub(super) fn resume(&mut self, by: By) {
        self.pause.set(by, false);
        if self.pause.asked() {
            return;
        }
        // Who still waits for it to come to rest waits in vain.
        self.pause.waiting.clear();
        self.reactor.cancel_timer(PAUSE_DEADLINE);
        for at in 0..self.rings.len() {
            self.regate(at);
            self.delegate_again(at);
            if std::mem::take(&mut self.rings[at].unheard) && self.live {
                self.signal(at);
            }
        }
    }

    /// Answers those who wait when the lane has come to rest, or time is up.
    pub(super) fn progress_pause(&mut self) {
        let Some(first) = self.pause.waiting.iter().map(|(deadline, _)| *deadline).min() else { return };
        // An answer that changes what the worker has to remember must not come after it was saved.
        let idle = self.up.is_quiet() && (0..self.rings.len()).all(|at| self.rests(at));
        if !idle && !self.failed && Instant::now() < first {
            self.reactor.set_timer(PAUSE_DEADLINE, first);
            return;
        }
        self.reactor.cancel_timer(PAUSE_DEADLINE);
        // Counting what is out may have taken dropped chains back. The driver hears of them before it hears that the
        // device is suspended.
        self.publish();
        for (_, done) in std::mem::take(&mut self.pause.waiting) {
            if !idle {
                self.up.shared.failures.stuck.fetch_add(1, Ordering::Relaxed);
                done.stuck.store(true, Ordering::SeqCst);
            }
        }
    }

    /// Whether no chain of the ring is out but those that are kept.
    fn rests(&mut self, at: usize) -> bool {
        let number = self.rings[at].index;
        let mut kept = 0;
        self.enter_quietly(|worker, _| kept = worker.keeps(number));
        !self.is_away(at)
            && self.queue(at).is_none_or(|queue: &mut Queue| queue.outstanding() <= kept + queue.unclaimed())
    }
}
