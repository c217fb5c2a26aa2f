//! What workers ask of the front-end: kept until the connection's task passes it on, and what the front-end has mapped.
//!
//! A mapping outlives connections: the document ends it with a device reset, which the front-end carries out by itself
//! when it is the one who says so. What nobody needs any more and may be mapped all the same - by a request that was
//! given up before its answer came, or before a reset that the front-end knows nothing of - is [stale](Shmem::stale),
//! and unmapped before anything else is asked.
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Wake;

use vm_virtio::{Mappings, Responder, ShmRange, UpcallError, UpcallHandler, UpcallRequest};

use crate::task::TaskWaker;

/// Questions that are kept before those are looked for that nobody waits for any more.
const TIDY: usize = 64;

#[derive(Default)]
struct Waiting {
    /// There is a front-end that can be asked.
    open: bool,
    /// No more than each lane may have out, and [`TIDY`].
    questions: VecDeque<(UpcallRequest, Responder)>,
    resets: u64,
}

/// The questions of one guest's lanes.
pub(crate) struct Upcalls {
    waiting: Mutex<Waiting>,
    waker: Arc<TaskWaker>,
}

impl Upcalls {
    pub(crate) fn new(waker: Arc<TaskWaker>) -> Arc<Upcalls> {
        Arc::new(Upcalls { waiting: Mutex::default(), waker })
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is somebody to ask from here on.
    pub(crate) fn open(&self) {
        self.lock().open = true;
    }

    /// There is nobody any more: that is the answer to what waits.
    pub(crate) fn close(&self) {
        let mut waiting = self.lock();
        waiting.open = false;
        let questions = std::mem::take(&mut waiting.questions);
        drop(waiting);
        drop(questions);
    }

    /// The next question that somebody still wants an answer to.
    pub(crate) fn next(&self) -> Option<(UpcallRequest, Responder)> {
        let mut waiting = self.lock();
        loop {
            let question = waiting.questions.pop_front()?;
            if question.1.is_awaited() {
                return Some(question);
            }
        }
    }

    /// How often the device was reset.
    fn resets(&self) -> u64 {
        self.lock().resets
    }
}

impl UpcallHandler for Upcalls {
    fn request(&self, request: UpcallRequest, responder: Responder) {
        let mut waiting = self.lock();
        if !waiting.open {
            drop(waiting);
            responder.respond(Err(UpcallError::Gone));
            return;
        }
        if waiting.questions.len() >= TIDY {
            waiting.questions.retain(|(_, responder)| responder.is_awaited());
        }
        waiting.questions.push_back((request, responder));
        drop(waiting);
        self.waker.wake_by_ref();
    }

    fn reset(&self) {
        self.lock().resets += 1;
    }
}

/// The shared memory of one guest's device, as far as we know what the front-end has there.
#[derive(Default)]
pub(crate) struct Shmem {
    /// Mapped, or asked for.
    pub(crate) mapped: Mappings,
    /// To be unmapped: no more than were mapped, since nothing is mapped before they are gone.
    pub(crate) stale: VecDeque<ShmRange>,
    resets: u64,
}

impl Shmem {
    /// The front-end resets the device, and unmaps by itself what it has mapped.
    pub(crate) fn forget(&mut self) {
        self.mapped.take_all().for_each(drop);
        self.stale.clear();
    }

    /// After a reset all that is mapped is stale.
    pub(crate) fn notice_resets(&mut self, upcalls: &Upcalls) {
        let resets = upcalls.resets();
        if std::mem::replace(&mut self.resets, resets) != resets {
            self.stale.extend(self.mapped.take_all());
        }
    }
}
