//! Messages on their way out, when the socket does not take them at once.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::{Error, socket};

/// Most bytes that wait for a reader. Some thousand replies: whoever leaves as many unread, besides what the kernel
/// holds, does not read at all.
pub const MAX_OUTPUT: usize = 64 * 1024;

#[derive(Debug, Default)]
pub(crate) struct Output {
    queue: VecDeque<Outgoing>,
    /// Bytes in the queue that are not sent yet.
    waiting: usize,
}

#[derive(Debug)]
struct Outgoing {
    bytes: Vec<u8>,
    sent: usize,
    /// Go with the first byte and are closed after it.
    fds: Vec<OwnedFd>,
}

impl Output {
    pub(crate) fn push(&mut self, bytes: Vec<u8>, fds: Vec<OwnedFd>) -> Result<(), Error> {
        let waiting = self.waiting.saturating_add(bytes.len());
        if waiting > MAX_OUTPUT {
            return Err(Error::OutputFull);
        }
        self.waiting = waiting;
        self.queue.push_back(Outgoing { bytes, sent: 0, fds });
        Ok(())
    }

    /// Sends what the socket takes. True: nothing waits any more.
    pub(crate) fn flush(&mut self, socket: BorrowedFd<'_>) -> Result<bool, Error> {
        while let Some(message) = self.queue.front_mut() {
            let rest = message.bytes.get(message.sent..).unwrap_or_default();
            if rest.is_empty() {
                self.queue.pop_front();
                continue;
            }
            let fds: Vec<BorrowedFd<'_>> = message.fds.iter().map(AsFd::as_fd).collect();
            let Some(count) = socket::send(socket, rest, &fds)? else { return Ok(false) };
            message.fds.clear();
            message.sent += count;
            self.waiting = self.waiting.saturating_sub(count);
        }
        Ok(true)
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Messages of which no byte has been sent.
    pub(crate) fn untouched(&self) -> usize {
        self.queue.iter().filter(|message| message.sent == 0).count()
    }
}
