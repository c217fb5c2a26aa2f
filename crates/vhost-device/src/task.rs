//! Guests side by side on one thread: each guest's connection is a future, polled when one of its files or tickets has
//! news.
//!
//! There is no registration of interest beyond the reactor's: a task that is polled looks at everything it waits for,
//! without blocking. All watches are edge-triggered, so a task that looks away for a while (a request waits for its
//! lane) costs no wake-ups; it looks again by itself when it comes back.
use std::cell::RefCell;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use reactor::{Reactor, Token};

/// Wakes one task, from any thread.
pub(crate) struct TaskWaker {
    due: AtomicBool,
    main: reactor::Waker,
}

impl TaskWaker {
    pub(crate) fn new(main: reactor::Waker) -> Arc<TaskWaker> {
        // Due from the start: a task is polled once to begin with.
        Arc::new(TaskWaker { due: AtomicBool::new(true), main })
    }

    /// For the main thread itself, which needs no waking.
    pub(crate) fn mark(&self) {
        self.due.store(true, Ordering::SeqCst);
    }

    fn take(&self) -> bool {
        self.due.swap(false, Ordering::SeqCst)
    }
}

impl Wake for TaskWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.due.swap(true, Ordering::SeqCst) {
            self.main.wake();
        }
    }
}

/// One guest's future.
pub(crate) struct Task {
    waker: Arc<TaskWaker>,
    future: Option<Pin<Box<dyn Future<Output = ()>>>>,
}

impl Task {
    pub(crate) fn new(waker: Arc<TaskWaker>, future: impl Future<Output = ()> + 'static) -> Task {
        Task { waker, future: Some(Box::pin(future)) }
    }

    pub(crate) fn waker(&self) -> &TaskWaker {
        &self.waker
    }

    /// Lets the task go on if it is due. A panic in it is a bug of this crate and ends this guest, not the others.
    pub(crate) fn run(&mut self) {
        if !self.waker.take() {
            return;
        }
        let Some(future) = self.future.as_mut() else { return };
        let waker = Waker::from(self.waker.clone());
        let mut context = Context::from_waker(&waker);
        match catch_unwind(AssertUnwindSafe(|| future.as_mut().poll(&mut context))) {
            Ok(Poll::Pending) => {}
            Ok(Poll::Ready(())) => self.future = None,
            Err(_) => {
                tracing::error!("serving a guest panicked; it is not served any more");
                self.future = None;
            }
        }
    }

    pub(crate) fn is_over(&self) -> bool {
        self.future.is_none()
    }
}

/// Lets the other tasks have a turn.
pub(crate) async fn yield_now() {
    let mut yielded = false;
    std::future::poll_fn(|context| {
        if std::mem::replace(&mut yielded, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// A watch of the main reactor that ends with its owner. The reactor holds a duplicate of what it watches, so without
/// this a peer would not see its connection closed.
pub(crate) struct Watch {
    reactor: Rc<RefCell<Reactor>>,
    token: Token,
}

impl Watch {
    /// Watches for reading and writing, edge-triggered.
    pub(crate) fn new(
        reactor: &Rc<RefCell<Reactor>>,
        token: Token,
        fd: std::os::fd::BorrowedFd<'_>,
    ) -> std::io::Result<Watch> {
        let interest = reactor::Interest { writable: true, ..reactor::Interest::READ_EDGE };
        reactor.borrow_mut().watch(fd, token, interest)?;
        Ok(Watch { reactor: reactor.clone(), token })
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if let Ok(mut reactor) = self.reactor.try_borrow_mut() {
            reactor.unwatch(self.token);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_task_runs_when_it_is_woken_and_only_then() {
        let main = reactor::Waker::new().unwrap();
        let waker = TaskWaker::new(main);
        let mut polls = 0;
        let counter = std::rc::Rc::new(std::cell::Cell::new(0));
        let inside = counter.clone();
        let future = std::future::poll_fn(move |_| {
            inside.set(inside.get() + 1);
            if inside.get() == 3 { Poll::Ready(()) } else { Poll::Pending }
        });
        let mut task = Task::new(waker.clone(), future);
        for _ in 0..5 {
            task.run();
        }
        polls += 1;
        assert_eq!(counter.get(), polls, "once to begin with");
        waker.wake_by_ref();
        task.run();
        task.run();
        assert_eq!(counter.get(), 2);
        waker.mark();
        task.run();
        assert!(task.is_over());
    }

    #[test]
    fn a_panic_ends_its_own_task() {
        let waker = TaskWaker::new(reactor::Waker::new().unwrap());
        let mut task = Task::new(waker, async { panic!("a bug") });
        task.run();
        assert!(task.is_over());
    }

    #[test]
    fn yielding_comes_back_in_the_next_round() {
        let waker = TaskWaker::new(reactor::Waker::new().unwrap());
        let mut task = Task::new(waker, yield_now());
        task.run();
        assert!(!task.is_over());
        task.run();
        assert!(task.is_over());
    }
}
