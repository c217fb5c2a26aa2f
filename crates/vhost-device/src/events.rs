//! What lanes tell the main thread: kept until a connection can pass it on, never more than a few of a kind.
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Wake;

use vm_virtio::{HostEvent, HostEvents, ObjectId};

use crate::task::TaskWaker;

/// Events kept until they are looked at. More than this at once say nothing new.
const KEPT: usize = 64;

/// Objects that a device may export at a time.
const OBJECTS: usize = 1024;

/// The events of one guest's device.
pub(crate) struct Events {
    config_changed: AtomicBool,
    others: Mutex<Vec<HostEvent>>,
    /// What the device exports.
    objects: Mutex<BTreeSet<ObjectId>>,
    /// How often that changed.
    exports: AtomicU64,
    waker: Arc<TaskWaker>,
}

impl Events {
    pub(crate) fn new(waker: Arc<TaskWaker>) -> Arc<Events> {
        let config_changed = AtomicBool::new(false);
        let (others, objects, exports) = (Mutex::default(), Mutex::default(), AtomicU64::new(0));
        Arc::new(Events { config_changed, others, objects, exports, waker })
    }

    /// Whether the configuration space changed since it was last said to the front-end.
    pub(crate) fn config_changed(&self) -> bool {
        self.config_changed.load(Ordering::SeqCst)
    }

    /// The front-end knows, or will read all of it anyway.
    pub(crate) fn config_told(&self) {
        self.config_changed.store(false, Ordering::SeqCst);
    }

    /// Changes with what the device exports.
    pub(crate) fn exports(&self) -> u64 {
        self.exports.load(Ordering::SeqCst)
    }

    /// What the device exports.
    pub(crate) fn objects(&self) -> BTreeSet<ObjectId> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn export(&self, change: impl FnOnce(&mut BTreeSet<ObjectId>) -> bool) {
        if change(&mut self.objects.lock().unwrap_or_else(PoisonError::into_inner)) {
            self.exports.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// What wakes the guest's task on the main thread.
    pub(crate) fn waker(&self) -> &Arc<TaskWaker> {
        &self.waker
    }

    /// Faults since the last call.
    pub(crate) fn take(&self) -> Vec<HostEvent> {
        std::mem::take(&mut self.others.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl HostEvents for Events {
    fn event(&self, event: HostEvent) {
        // 2.1.2: a configuration-change notification follows DEVICE_NEEDS_RESET.
        if matches!(event, HostEvent::ConfigChanged | HostEvent::NeedsReset { .. }) {
            self.config_changed.store(true, Ordering::SeqCst);
        }
        match event {
            HostEvent::ConfigChanged => {}
            // The last one of a queue counts, and none may be lost: the queue waits.
            HostEvent::Miss { queue, miss } => {
                let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
                others.retain(|other| !matches!(other, HostEvent::Miss { queue: of, .. } if *of == queue));
                others.push(HostEvent::Miss { queue, miss });
            }
            HostEvent::ObjectExported(id) => {
                self.export(|objects| objects.len() < OBJECTS && objects.insert(id));
            }
            HostEvent::ObjectWithdrawn(id) => self.export(|objects| objects.remove(&id)),
            other => {
                let mut others = self.others.lock().unwrap_or_else(PoisonError::into_inner);
                if others.len() < KEPT {
                    others.push(other);
                }
            }
        }
        self.waker.wake_by_ref();
    }
}
