//! Tickets: the answer to a question that another thread will answer.
//!
//! Nothing in the engine blocks. A vCPU thread [`wait`](Ticket::wait)s, an event loop polls the ticket as a
//! [`Future`] whose waker wakes the loop.
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

struct State<T> {
    value: Option<T>,
    waker: Option<Waker>,
}

struct Inner<T> {
    state: Mutex<State<T>>,
    done: Condvar,
}

impl<T> Inner<T> {
    fn lock(&self) -> MutexGuard<'_, State<T>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A promise of a `T`.
#[must_use = "the operation goes on, but its outcome is lost"]
pub struct Ticket<T>(Arc<Inner<T>>);

/// The other end: completes its ticket exactly once, on drop with the fallback if nothing better came.
pub(crate) struct Completer<T> {
    inner: Arc<Inner<T>>,
    fallback: Option<T>,
}

/// A ticket and its other end. `fallback` is the answer if the other end is lost, e.g. with its thread.
pub(crate) fn ticket<T>(fallback: T) -> (Completer<T>, Ticket<T>) {
    let inner =
        Arc::new(Inner { state: Mutex::new(State { value: None, waker: None }), done: Condvar::new() });
    (Completer { inner: inner.clone(), fallback: Some(fallback) }, Ticket(inner))
}

impl<T> Ticket<T> {
    /// A ticket whose answer is known.
    pub fn ready(value: T) -> Self {
        ticket(value).1
    }

    /// The answer, if it is there. It is handed out once.
    pub fn try_take(&mut self) -> Option<T> {
        self.0.lock().value.take()
    }

    /// Blocks this thread until the answer is there. Not for threads that carry a lane. If the answer has been taken
    /// before, there will be no other: don't wait after [`Ticket::try_take`] gave it.
    pub fn wait(self) -> T {
        let mut state = self.0.lock();
        loop {
            if let Some(value) = state.value.take() {
                return value;
            }
            state = self.0.done.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// As [`Ticket::wait`], at most for this long; for threads that must not be held for ever, such as a guest's CPU.
    /// None: not yet, ask again.
    pub fn wait_for(&mut self, patience: Duration) -> Option<T> {
        let deadline = Instant::now().checked_add(patience);
        let mut state = self.0.lock();
        loop {
            if let Some(value) = state.value.take() {
                return Some(value);
            }
            let left =
                deadline.map_or(patience, |deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_zero() {
                return None;
            }
            state = self.0.done.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl<T> Future for Ticket<T> {
    type Output = T;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let mut state = self.0.lock();
        match state.value.take() {
            Some(value) => Poll::Ready(value),
            None => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl<T> Completer<T> {
    /// Whether the ticket is still there.
    pub(crate) fn is_awaited(&self) -> bool {
        Arc::strong_count(&self.inner) > 1
    }

    /// Gives the answer.
    pub(crate) fn complete(mut self, value: T) {
        self.fallback = Some(value);
    }
}

impl<T> Drop for Completer<T> {
    fn drop(&mut self) {
        let waker = {
            let mut state = self.inner.lock();
            state.value = self.fallback.take();
            state.waker.take()
        };
        self.inner.done.notify_all();
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    struct Count(AtomicUsize);
    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn an_event_loop_is_woken_and_finds_the_answer() {
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        let mut context = Context::from_waker(&waker);
        let (completer, mut ticket) = ticket(0);
        assert!(Pin::new(&mut ticket).poll(&mut context).is_pending());
        completer.complete(7);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert!(matches!(Pin::new(&mut ticket).poll(&mut context), Poll::Ready(7)));
    }

    #[test]
    fn waiting_ends_in_time_and_the_answer_can_be_asked_for_again() {
        let (completer, mut ticket) = ticket(0);
        assert_eq!(ticket.wait_for(Duration::from_millis(1)), None);
        completer.complete(7);
        assert_eq!(ticket.wait_for(Duration::ZERO), Some(7));
    }

    #[test]
    fn a_lost_thread_answers_with_the_fallback() {
        let (completer, ticket) = ticket(3);
        let thread = std::thread::spawn(move || drop(completer));
        assert_eq!(ticket.wait(), 3);
        thread.join().unwrap();
        assert_eq!(Ticket::ready(9).wait(), 9);
    }
}
