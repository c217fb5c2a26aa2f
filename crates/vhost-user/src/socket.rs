//! Bytes with descriptors over a stream socket, never sleeping.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags,
};

use crate::{Error, MAX_FDS};

/// What one read brought.
pub(crate) enum Arrival {
    /// Nothing is there now.
    Nothing,
    /// The other side has closed.
    End,
    /// Bytes, and the descriptors that came with them.
    Bytes {
        count: usize,
        fds: Vec<OwnedFd>,
        /// The kernel had more descriptors than it could hand over. It has closed those.
        truncated: bool,
    },
}

/// Reads at most `buffer.len()` bytes, which must not be zero.
///
/// The kernel ends a read after bytes that descriptors came with, but not before them: one read can bring the end of
/// one message and the descriptors of the next. Callers therefore never ask for more than belongs together.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> Result<Arrival, Error> {
    // Room for credentials too: a socket that was handed to us may have them switched on, and they come first.
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmCredentials(1), ScmRights(MAX_FDS))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    // DONTWAIT besides O_NONBLOCK: the flag of the open file can be changed by whoever else holds it.
    let flags = RecvFlags::CMSG_CLOEXEC | RecvFlags::DONTWAIT;
    let message = loop {
        match rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags) {
            Ok(message) => break message,
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(Arrival::Nothing),
            // What an AF_UNIX socket says when the other side closed over unread data.
            Err(Errno::CONNRESET) => return Ok(Arrival::End),
            Err(error) => return Err(Error::Io(error.into())),
        }
    };
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    if message.bytes == 0 {
        return Ok(Arrival::End);
    }
    Ok(Arrival::Bytes { count: message.bytes, fds, truncated: message.flags.contains(ReturnFlags::CTRUNC) })
}

/// Sends what the socket takes of `bytes`, with `fds` on the first of them. `None`: it takes nothing now.
pub(crate) fn send(
    socket: BorrowedFd<'_>,
    bytes: &[u8],
    fds: &[BorrowedFd<'_>],
) -> Result<Option<usize>, Error> {
    let rights = SendAncillaryMessage::ScmRights(fds);
    let mut space = vec![MaybeUninit::uninit(); if fds.is_empty() { 0 } else { rights.size() }];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(rights) {
        return Err(Error::Argument("file descriptors"));
    }
    loop {
        let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
        match rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags) {
            Ok(count) => return Ok(Some(count)),
            Err(Errno::INTR) => {}
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::PIPE | Errno::CONNRESET) => return Err(Error::Disconnected),
            Err(error) => return Err(Error::Io(error.into())),
        }
    }
}
