//! Messages out of a stream: delimited, not yet understood.
//!
//! A message may arrive in any number of pieces, and several at once. Descriptors belong to the message whose header's
//! first byte they come with (section "Communication"). To know that byte whatever the pieces are, it is read by
//! itself; then the rest of the header, then the payload, and never a byte of the next message.

use std::os::fd::{BorrowedFd, OwnedFd};

use zerocopy::FromBytes;

use crate::header::{HEADER_LEN, Header, MAX_BODY, VERSION};
use crate::socket::{self, Arrival};
use crate::{Error, HeaderFault, Reason};

/// A complete message.
#[derive(Debug)]
pub(crate) struct Frame {
    pub(crate) header: Header,
    pub(crate) body: Vec<u8>,
    pub(crate) fds: Vec<OwnedFd>,
    /// Descriptors came that were none of this message's; all are closed.
    pub(crate) fd_fault: Option<Reason>,
}

/// Which way the messages go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Direction {
    Requests,
    Replies,
}

#[derive(Debug)]
pub(crate) struct FrameReader {
    direction: Direction,
    header_bytes: [u8; HEADER_LEN],
    /// Bytes of header and payload that have arrived.
    have: usize,
    /// Known once the header is complete.
    header: Option<Header>,
    body: Vec<u8>,
    fds: Vec<OwnedFd>,
    fd_fault: Option<Reason>,
    poisoned: bool,
}

impl FrameReader {
    pub(crate) fn new(direction: Direction) -> Self {
        FrameReader {
            direction,
            header_bytes: [0; HEADER_LEN],
            have: 0,
            header: None,
            body: Vec::new(),
            fds: Vec::new(),
            fd_fault: None,
            poisoned: false,
        }
    }

    /// The next message. `None`: it has not arrived completely.
    pub(crate) fn read(&mut self, socket: BorrowedFd<'_>) -> Result<Option<Frame>, Error> {
        if self.poisoned {
            return Err(Error::Poisoned);
        }
        let result = self.advance(socket);
        if result.is_err() {
            self.poison();
        }
        result
    }

    /// Takes nothing more: the other direction of the connection has failed.
    pub(crate) fn poison(&mut self) {
        self.poisoned = true;
        self.fds.clear();
    }

    fn advance(&mut self, socket: BorrowedFd<'_>) -> Result<Option<Frame>, Error> {
        loop {
            if let Some(header) = self.header
                && self.have >= HEADER_LEN + self.body.len()
            {
                return Ok(Some(self.take(header)));
            }
            let first = self.have == 0;
            let missing = match self.header {
                Some(_) => self.body.get_mut(self.have - HEADER_LEN..),
                None if first => self.header_bytes.get_mut(..1),
                None => self.header_bytes.get_mut(self.have..),
            };
            match socket::receive(socket, missing.unwrap_or_default())? {
                Arrival::Nothing => return Ok(None),
                Arrival::End if first => return Err(Error::Disconnected),
                Arrival::End => return Err(Error::Truncated { have: self.have }),
                Arrival::Bytes { count, fds, truncated } => {
                    self.have += count;
                    if truncated {
                        self.fd_fault = Some(Reason::FdsTruncated);
                    } else if first {
                        self.fds = fds;
                    } else if !fds.is_empty() {
                        self.fd_fault = Some(Reason::StrayFds);
                    }
                }
            }
            if self.header.is_none() && self.have == HEADER_LEN {
                self.begin_body()?;
            }
        }
    }

    /// Looks at the complete header before anything is allocated for what it announces.
    fn begin_body(&mut self) -> Result<(), Error> {
        let Ok(header) = Header::read_from_bytes(&self.header_bytes) else { return Err(Error::Poisoned) };
        let bad = |fault| {
            let Header { request, flags, size } = header;
            Err(Error::Header { request, flags, size, fault })
        };
        if header.version() != VERSION {
            return bad(HeaderFault::Version);
        }
        if header.is_reply() != (self.direction == Direction::Replies) {
            return bad(HeaderFault::ReplyBit);
        }
        let size = usize::try_from(header.size).ok().filter(|size| *size <= MAX_BODY);
        let Some(size) = size else { return bad(HeaderFault::Oversized) };
        self.body = vec![0; size];
        self.header = Some(header);
        Ok(())
    }

    fn take(&mut self, header: Header) -> Frame {
        self.have = 0;
        self.header = None;
        let mut fds = std::mem::take(&mut self.fds);
        let fd_fault = self.fd_fault.take();
        if fd_fault.is_some() {
            fds.clear();
        }
        Frame { header, body: std::mem::take(&mut self.body), fds, fd_fault }
    }
}
