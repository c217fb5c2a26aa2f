//! The bounded way into a thread that sleeps in its reactor.
//!
//! **No wake-up is lost, and few are made.** The queue and the flag `woken` ("the receiver has been told since it last
//! found the queue empty") are under one lock. A sender that pushes sees the flag: clear, so it sets it and writes the
//! eventfd after it has let go of the lock; or set, and then a write has been made, or is about to be, by the sender
//! that set it. The receiver clears the flag only in the critical section in which it finds the queue empty. So at
//! any time a message in the queue implies the flag, and the flag implies a write later than the receiver's last look
//! at an empty queue. The receiver watches with an edge, where a write always is an event, whatever the count was.
//!
//! A lock rather than a lock-free queue: it is held for a push or a pop, nothing runs under it that can panic or
//! sleep, and mail is for control, not for requests.

use std::collections::VecDeque;
use std::fmt;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::Waker;

/// A mailbox for at most `capacity` messages. Takes one file descriptor.
pub fn mailbox<T: Send>(capacity: usize) -> io::Result<(Mail<T>, Inbox<T>)> {
    let shared = Arc::new(Shared {
        state: Mutex::new(State { queue: VecDeque::new(), woken: false, closed: false }),
        waiting: AtomicUsize::new(0),
        capacity,
        waker: Waker::new()?,
    });
    Ok((Mail(Arc::clone(&shared)), Inbox(shared)))
}

struct Shared<T> {
    state: Mutex<State<T>>,
    /// Length of the queue, for a look without the lock.
    waiting: AtomicUsize,
    capacity: usize,
    waker: Waker,
}

struct State<T> {
    queue: VecDeque<T>,
    woken: bool,
    closed: bool,
}

impl<T> Shared<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No critical section can stop half-way, so a poisoned lock guards a sound state.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The sending end. Clones send to the same mailbox.
pub struct Mail<T>(Arc<Shared<T>>);

impl<T> Mail<T> {
    /// Puts a message into the mailbox and wakes the receiver if it may be asleep. Never waits for room.
    pub fn send(&self, message: T) -> Result<(), SendError<T>> {
        let mut state = self.0.lock();
        if state.closed {
            return Err(SendError::Closed(message));
        }
        if state.queue.len() >= self.0.capacity {
            return Err(SendError::Full(message));
        }
        state.queue.push_back(message);
        self.0.waiting.store(state.queue.len(), Ordering::Release);
        let wake = !state.woken;
        state.woken = true;
        drop(state);
        if wake {
            self.0.waker.wake();
        }
        Ok(())
    }
}

impl<T> Clone for Mail<T> {
    fn clone(&self) -> Self {
        Mail(Arc::clone(&self.0))
    }
}

impl<T> fmt::Debug for Mail<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Mail")
            .field("waiting", &self.0.waiting.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}

/// Why a message was not sent. It comes back with the error.
#[derive(Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SendError<T> {
    /// The mailbox holds as many messages as it may.
    #[error("the mailbox is full")]
    Full(T),
    /// The receiver is gone.
    #[error("the mailbox's receiver is gone")]
    Closed(T),
}

impl<T> SendError<T> {
    /// The message that was not sent.
    pub fn into_inner(self) -> T {
        match self {
            SendError::Full(message) | SendError::Closed(message) => message,
        }
    }
}

// By hand: the message need not be `Debug`.
impl<T> fmt::Debug for SendError<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            SendError::Full(_) => "Full",
            SendError::Closed(_) => "Closed",
        })
    }
}

/// The receiving end. Watch it with [`Interest::READ_EDGE`](crate::Interest::READ_EDGE).
///
/// After an event, call [`recv`](Self::recv) until it returns `None`. A receiver that stops earlier calls
/// [`drained`](Self::drained), which sees to another event for what is left.
pub struct Inbox<T>(Arc<Shared<T>>);

impl<T> Inbox<T> {
    /// The oldest message. `None` also means that the next message will make a new event.
    pub fn recv(&mut self) -> Option<T> {
        let mut state = self.0.lock();
        let message = state.queue.pop_front();
        self.0.waiting.store(state.queue.len(), Ordering::Release);
        if message.is_none() {
            state.woken = false;
        }
        message
    }

    /// Ends a turn of receiving: the next message will make a new event, and if messages are left, there is one now.
    pub fn drained(&mut self) {
        let mut state = self.0.lock();
        // Left messages need an event that comes after this call; the flag stays as long as they are there.
        let left = !state.queue.is_empty();
        state.woken = left;
        drop(state);
        if left {
            self.0.waker.wake();
        }
    }

    /// Whether no message is waiting. Takes no lock: for polling before a sleep.
    pub fn is_empty(&self) -> bool {
        self.0.waiting.load(Ordering::Acquire) == 0
    }
}

impl<T> AsFd for Inbox<T> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.waker.as_fd()
    }
}

impl<T> Drop for Inbox<T> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.closed = true;
        let left = std::mem::take(&mut state.queue);
        self.0.waiting.store(0, Ordering::Release);
        // Messages may do anything when they are dropped, so not under the lock.
        drop(state);
        drop(left);
    }
}

impl<T> fmt::Debug for Inbox<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Inbox")
            .field("waiting", &self.0.waiting.load(Ordering::Relaxed))
            .finish_non_exhaustive()
    }
}
