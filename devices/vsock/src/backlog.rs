//! What a guest has sent and the host's socket has not taken yet: bytes of a stream, or messages.
//!
//! Never more bytes than the credit that was promised ([`crate::flow`]), never more messages than these bytes
//! ([`Backlog::end_message`]), and no memory at all while there is nothing.
use std::collections::VecDeque;

use vm_virtio::queue::Reader;

/// A message that is complete.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Message {
    pub(crate) len: usize,
    /// It ends a record (5.10.6.6.1).
    pub(crate) eor: bool,
}

/// A [`Message`] in four bytes: messages of one byte each take no more than five times what they hold.
#[derive(Clone, Copy, Debug)]
struct Packed(u32);

impl From<Message> for Packed {
    fn from(message: Message) -> Packed {
        // A message is no longer than the credit, which is 16 MiB at most.
        Packed(u32::try_from(message.len).unwrap_or(u32::MAX) << 1 | u32::from(message.eor))
    }
}

impl From<Packed> for Message {
    fn from(Packed(both): Packed) -> Message {
        Message { len: (both >> 1) as usize, eor: both & 1 != 0 }
    }
}

/// See the [module](self).
#[derive(Debug, Default)]
pub(crate) struct Backlog {
    bytes: Vec<u8>,
    /// Bytes before this are gone.
    start: usize,
    /// SEQPACKET: messages from `start` on. What follows them is a message that is not complete.
    messages: VecDeque<Packed>,
    complete: usize,
}

impl Backlog {
    /// Nothing at all: not even the beginning of a message.
    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.messages.is_empty()
    }

    /// Bytes in it.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - self.start
    }

    /// Takes `len` bytes of a chain; what the chain does not have is zero.
    pub(crate) fn append(&mut self, reader: &mut Reader<'_>, len: usize) {
        let end = self.bytes.len();
        self.bytes.resize(end + len, 0);
        if let Some(room) = self.bytes.get_mut(end..) {
            reader.read(room);
        }
    }

    /// What was appended since the last message is one, too. False: there are `most` already. Messages without a byte
    /// take no credit, so that only this bounds them.
    #[must_use]
    pub(crate) fn end_message(&mut self, eor: bool, most: u32) -> bool {
        if self.messages.len() as u64 >= u64::from(most) {
            return false;
        }
        let len = self.len() - self.complete;
        self.complete += len;
        self.messages.push_back(Message { len, eor }.into());
        true
    }

    /// The bytes of a stream.
    pub(crate) fn stream(&self) -> &[u8] {
        self.bytes.get(self.start..).unwrap_or_default()
    }

    /// The first complete message.
    pub(crate) fn message(&self) -> Option<(&[u8], Message)> {
        let message = Message::from(*self.messages.front()?);
        Some((self.bytes.get(self.start..self.start + message.len)?, message))
    }

    /// So many bytes at the beginning are done with.
    pub(crate) fn consume(&mut self, count: usize) {
        self.start = (self.start + count).min(self.bytes.len());
        if self.start == self.bytes.len() {
            (self.bytes, self.start) = (Vec::new(), 0);
        } else if self.start >= self.bytes.len() / 2 {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }

    /// The first message is done with.
    pub(crate) fn consume_message(&mut self) {
        if let Some(message) = self.messages.pop_front().map(Message::from) {
            self.complete -= message.len;
            self.consume(message.len);
        }
        if self.messages.is_empty() {
            self.messages = VecDeque::new();
        }
    }

    /// Forgets everything.
    pub(crate) fn clear(&mut self) {
        *self = Backlog::default();
    }
}
