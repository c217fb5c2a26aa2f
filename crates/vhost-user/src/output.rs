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

    /// Whether this very message waits, and no byte of it has been sent.
    pub(crate) fn is_untouched(&self, bytes: &[u8]) -> bool {
        self.queue.iter().any(|message| message.sent == 0 && message.bytes == bytes)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;

    use super::*;

    /// With a small buffer the socket takes a long message piece by piece.
    #[test]
    fn a_message_that_is_taken_in_parts_arrives_whole_and_makes_room() {
        let (near, mut far) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&near, 4608).unwrap();
        let message: Vec<u8> = (0..MAX_OUTPUT).map(|n| (n % 251) as u8).collect();
        let mut output = Output::default();
        let mut parts = 0;
        for round in 0..20 {
            output.push(message.clone(), Vec::new()).unwrap();
            assert!(matches!(output.push(vec![0], Vec::new()), Err(Error::OutputFull)));
            let mut got = Vec::new();
            let mut chunk = [0; 4096];
            while got.len() < message.len() {
                if !output.flush(near.as_fd()).unwrap() {
                    parts += 1;
                    assert!(!output.is_empty());
                }
                let count = far.read(&mut chunk).unwrap();
                got.extend_from_slice(&chunk[..count]);
            }
            assert!(got == message, "round {round}");
            assert!(output.flush(near.as_fd()).unwrap() && output.is_empty());
            assert_eq!(output.waiting, 0);
        }
        assert!(parts > 0, "never taken in parts: nothing is shown");
    }
}
