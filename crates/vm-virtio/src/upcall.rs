//! What a worker asks of its host: [`Upcall`], the way up, and [`UpcallHandler`], who is there.
//!
//! Some of it is told and needs no answer. The rest is a question: the worker gets an [`UpcallId`] at once and hears the
//! outcome in [`Worker::upcall_done`](crate::Worker::upcall_done), on its lane's thread, exactly once. Whatever the host
//! and those behind it do, that is within [`UPCALL_DEADLINE`] as long as the lane is awake: a host that is silent, a
//! reset, and a [`Responder`] that is dropped answer as well. Who of the host and the lane was first is decided by one
//! flag, so that a host knows when what it did is nobody's any more.
use crate::Status;
use crate::device::HostEvent;
use crate::host_request::ObjectId;
use crate::lane::Shared;
use crate::shared_memory::{ShmRange, page_size};
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// How long a host may take to answer (failure policy 7): less than a stop may take, so that a request that waits for an
/// answer does not make its queue's stop get stuck.
pub const UPCALL_DEADLINE: Duration = Duration::from_secs(2);

/// Questions that one lane may have out.
pub const MAX_UPCALLS: usize = 64;

/// Stands for a question of a worker. No two of a lane are the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpcallId(u64);

/// A question.
#[derive(Debug)]
#[non_exhaustive]
pub enum UpcallRequest {
    /// Map a part of a file into a shared memory region.
    Map {
        /// Where to: whole pages of a region that the device has.
        to: ShmRange,
        /// The file.
        file: OwnedFd,
        /// Where in the file it begins, in bytes: a multiple of the page size.
        file_offset: u64,
        /// Whether the driver may write.
        writable: bool,
    },
    /// Unmap a whole mapping.
    Unmap(ShmRange),
    /// The file of an object that another device of the VM exports.
    LookUp(ObjectId),
}

/// What a host answers if all is well.
#[derive(Debug)]
#[non_exhaustive]
pub enum UpcallReply {
    /// It is done.
    Done,
    /// The file of the object.
    File(OwnedFd),
}

/// Why a question came to nothing. For a mapping that means: it is not there, or the host is about to undo it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum UpcallError {
    /// This host, or the front-end behind it, does no such thing.
    #[error("the host does not do this")]
    Unsupported,
    /// Not whole pages of a region that the device has.
    #[error("not a range of whole pages in a shared memory region")]
    Range,
    /// Something is mapped there.
    #[error("there is a mapping already")]
    Overlap,
    /// No mapping is exactly there.
    #[error("that is no mapping")]
    NotMapped,
    /// Too many questions are out, or there are too many mappings.
    #[error("too many at once")]
    Busy,
    /// The host said no.
    #[error("the host refused")]
    Refused,
    /// The host did not answer in time.
    #[error("the host did not answer")]
    TimedOut,
    /// Nobody is there, or not any more.
    #[error("there is no front-end")]
    Gone,
    /// The device is being reset. The driver takes back by itself what waits for the answer: drop the chain.
    #[error("the device is being reset")]
    Reset,
}

/// What comes back to a worker.
pub type UpcallResult = Result<UpcallReply, UpcallError>;

/// A host that answers questions.
pub trait UpcallHandler: Send + Sync {
    /// A worker asks. Called on its lane's thread: must neither block nor call back into the engine. The answer may come
    /// from here or from any thread later.
    fn request(&self, request: UpcallRequest, responder: Responder);

    /// The device is being reset: all questions are given up, no queue runs. When the driver sees the reset done, no
    /// mapping may be left that it could see (virtio 1.4, 2.4: a reset device is as it was in the beginning).
    fn reset(&self);
}

/// Where an answer goes. Dropped, it answers [`UpcallError::Gone`].
#[derive(Debug)]
pub struct Responder {
    id: UpcallId,
    awaited: Arc<AtomicBool>,
    answers: Sender<(UpcallId, UpcallResult)>,
    waker: reactor::Waker,
}

impl Responder {
    /// Whether the answer is still waited for.
    pub fn is_awaited(&self) -> bool {
        self.awaited.load(Ordering::Acquire)
    }

    /// Answers. False: nobody waits any more, and the worker was told of a failure; what was done for it has to be undone.
    pub fn respond(mut self, result: UpcallResult) -> bool {
        self.send(result)
    }

    fn send(&mut self, result: UpcallResult) -> bool {
        let first =
            self.awaited.swap(false, Ordering::AcqRel) && self.answers.send((self.id, result)).is_ok();
        if first {
            self.waker.wake();
        }
        first
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        self.send(Err(UpcallError::Gone));
    }
}

/// A question that is out.
struct Call {
    id: UpcallId,
    deadline: Instant,
    awaited: Arc<AtomicBool>,
}

/// The way from a worker up to its host.
pub struct Upcall {
    pub(crate) shared: Arc<Shared>,
    answers: Sender<(UpcallId, UpcallResult)>,
    waker: reactor::Waker,
    /// In the order of their deadlines.
    calls: RefCell<VecDeque<Call>>,
    next: Cell<u64>,
    /// During a reset nothing can be asked.
    closed: Cell<bool>,
}

impl Upcall {
    pub(crate) fn new(
        shared: Arc<Shared>,
        answers: Sender<(UpcallId, UpcallResult)>,
        waker: reactor::Waker,
    ) -> Self {
        let (calls, next, closed) = Default::default();
        Upcall { shared, answers, waker, calls, next, closed }
    }

    /// The worker changed the configuration space; tell the driver. Nobody is told before DRIVER_OK.
    pub fn config_changed(&self) {
        if self.shared.status().contains(Status::DRIVER_OK) {
            self.shared.events.event(HostEvent::ConfigChanged);
        }
    }

    /// The device cannot go on, though its workers do: DEVICE_NEEDS_RESET is set and the driver told (2.1.2). For what
    /// concerns one request, answer that request instead.
    pub fn needs_reset(&self, reason: impl Into<String>) {
        self.shared.needs_reset(reason.into());
    }

    /// Other devices of the VM may ask for this object: [`HostRequest::SharedObject`](crate::HostRequest::SharedObject)
    /// brings its file. Holds over resets, until it is [withdrawn](Upcall::withdraw), and is told to every front-end
    /// that comes. Only for devices with [`HostRequests::SHARED_OBJECTS`](crate::HostRequests::SHARED_OBJECTS).
    pub fn export(&self, object: ObjectId) {
        self.shared.events.event(HostEvent::ObjectExported(object));
    }

    /// The object is gone, or is nobody else's any more.
    pub fn withdraw(&self, object: ObjectId) {
        self.shared.events.event(HostEvent::ObjectWithdrawn(object));
    }

    /// Asks for the file of an object that another device of the VM exports (virtio 1.4, 2.12). Only for devices with
    /// [`HostRequests::SHARED_OBJECTS`](crate::HostRequests::SHARED_OBJECTS).
    ///
    /// # Errors
    /// As [`Upcall::map`], but for ranges.
    pub fn look_up(&self, object: ObjectId) -> Result<UpcallId, UpcallError> {
        self.ask(UpcallRequest::LookUp(object))
    }

    /// Asks for a mapping of a file, from `file_offset` on, in a shared memory region of the device. It stays until it is
    /// unmapped or the device is reset, also when the front-end is another one.
    ///
    /// Whether the driver cannot write what is not `writable` is up to the host: QEMU 11.1 lets its guest write into every
    /// file that is open for writing, and refuses others. What a guest must not change has to be safe by itself, as a
    /// copy is.
    ///
    /// # Errors
    /// Nothing is asked then, and [`Worker::upcall_done`](crate::Worker::upcall_done) does not come:
    /// [`UpcallError::Range`] for what is not whole pages of a region and a file, [`UpcallError::Busy`] beyond
    /// [`MAX_UPCALLS`], [`UpcallError::Unsupported`], [`UpcallError::Reset`].
    pub fn map(
        &self,
        to: ShmRange,
        file: OwnedFd,
        file_offset: u64,
        writable: bool,
    ) -> Result<UpcallId, UpcallError> {
        let whole = file_offset.is_multiple_of(page_size()) && file_offset.checked_add(to.len).is_some();
        if !whole || !to.fits(&self.shared.regions) {
            return Err(UpcallError::Range);
        }
        self.ask(UpcallRequest::Map { to, file, file_offset, writable })
    }

    /// Asks for the end of a mapping, the whole of it.
    ///
    /// # Errors
    /// As [`Upcall::map`].
    pub fn unmap(&self, range: ShmRange) -> Result<UpcallId, UpcallError> {
        if !range.fits(&self.shared.regions) {
            return Err(UpcallError::Range);
        }
        self.ask(UpcallRequest::Unmap(range))
    }

    fn ask(&self, request: UpcallRequest) -> Result<UpcallId, UpcallError> {
        let Some(handler) = &self.shared.upcalls else { return Err(UpcallError::Unsupported) };
        if self.closed.get() {
            return Err(UpcallError::Reset);
        }
        let mut calls = self.calls.borrow_mut();
        if calls.len() >= MAX_UPCALLS {
            return Err(UpcallError::Busy);
        }
        let id = UpcallId(self.next.get());
        self.next.set(id.0.wrapping_add(1));
        let awaited = Arc::new(AtomicBool::new(true));
        calls.push_back(Call { id, deadline: Instant::now() + UPCALL_DEADLINE, awaited: awaited.clone() });
        drop(calls);
        let (answers, waker) = (self.answers.clone(), self.waker.clone());
        handler.request(request, Responder { id, awaited, answers, waker });
        Ok(id)
    }

    /// Whether no question is out.
    pub(crate) fn is_quiet(&self) -> bool {
        self.calls.borrow().is_empty()
    }

    /// When the first question is to be given up, if any is out.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        // Those whose answer is on its way come out with it.
        let calls = self.calls.borrow();
        calls.iter().find(|call| call.awaited.load(Ordering::Acquire)).map(|call| call.deadline)
    }

    /// An answer came. Whether the question is one that is out.
    pub(crate) fn answered(&self, id: UpcallId) -> bool {
        let mut calls = self.calls.borrow_mut();
        let at = calls.iter().position(|call| call.id == id);
        at.and_then(|at| calls.remove(at)).is_some()
    }

    /// Gives up a question whose time is over, unless its answer is on its way.
    pub(crate) fn overdue(&self, now: Instant) -> Option<UpcallId> {
        let mut calls = self.calls.borrow_mut();
        let at = calls
            .iter()
            .take_while(|call| call.deadline <= now)
            .position(|call| call.awaited.swap(false, Ordering::AcqRel))?;
        calls.remove(at).map(|call| call.id)
    }

    /// Gives up all questions, in their order. Answers that are on their way go to nobody.
    pub(crate) fn give_up(&self) -> Vec<UpcallId> {
        let calls = std::mem::take(&mut *self.calls.borrow_mut());
        calls.iter().for_each(|call| call.awaited.store(false, Ordering::Release));
        calls.into_iter().map(|call| call.id).collect()
    }

    /// Lets nothing be asked, or lets it again.
    pub(crate) fn close(&self, closed: bool) {
        self.closed.set(closed);
    }
}
