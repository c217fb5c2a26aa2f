//! Requests on the host's blocking pool.
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reactor::{BlockingPool, Desk};

use super::{Done, Request, carry_out};
use crate::backend::Image;

/// More than one queue has chains, and those of former lives of it that hang in a thread besides.
const CAPACITY: usize = 2 << 15;

/// A lane's desk at the pool.
pub(super) struct Pool {
    desk: Desk<Done>,
    image: Arc<dyn Image>,
    /// Of all jobs since the last [`Pool::forget`].
    wanted: Arc<AtomicBool>,
}

impl Pool {
    pub(super) fn new(host: &BlockingPool, image: Arc<dyn Image>) -> io::Result<Pool> {
        Ok(Pool { desk: host.desk(CAPACITY)?, image, wanted: Arc::new(AtomicBool::new(true)) })
    }

    /// The request comes back whatever the image's code does. If the pool takes it not, it is dropped: back to the
    /// driver, with the status that whoever began it has put there.
    pub(super) fn begin(&mut self, mut request: Request) {
        let (image, wanted) = (Arc::clone(&self.image), Arc::clone(&self.wanted));
        let job = move || {
            let still = || wanted.load(Ordering::Relaxed);
            let result = catch_unwind(AssertUnwindSafe(|| carry_out(&*image, &mut request, &still)));
            Done::Request(
                request,
                result.unwrap_or_else(|_| Err(io::Error::other("the image's code panicked"))),
            )
        };
        drop(self.desk.submit(job));
    }

    pub(super) fn begin_resize(&mut self, bytes: Option<u64>) -> bool {
        let image = Arc::clone(&self.image);
        self.desk.submit(move || Done::Size(image.resize(bytes))).is_ok()
    }

    pub(super) fn next(&mut self) -> Option<Done> {
        loop {
            // A job that did not return has dropped its request.
            if let Ok(done) = self.desk.take()? {
                return Some(done);
            }
        }
    }

    /// What has not begun never will; the rest ends between two steps and is dropped.
    pub(super) fn forget(&mut self) {
        self.wanted.store(false, Ordering::Relaxed);
        self.wanted = Arc::new(AtomicBool::new(true));
        self.desk.forget();
    }
}

impl AsFd for Pool {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.desk.as_fd()
    }
}
