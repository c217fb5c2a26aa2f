//! Messages: 12 bytes of header, payload, files with the first byte.
use std::io::{self, IoSlice, IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

pub(super) struct Message {
    pub(super) code: u32,
    pub(super) need_reply: bool,
    pub(super) body: Vec<u8>,
    pub(super) fds: Vec<OwnedFd>,
}

/// A number of 32 bits; 0 where there is none.
pub(super) fn field(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

impl Message {
    /// The next one. None: the connection ended between two.
    pub(super) fn receive(mut stream: &UnixStream) -> io::Result<Option<Message>> {
        let mut header = [0; 12];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(stream, &mut [IoSliceMut::new(&mut header)], &mut control, flags)?.bytes;
        if count == 0 {
            return Ok(None);
        }
        let mut fds = Vec::new();
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        stream.read_exact(&mut header[count..])?;
        let size = field(&header, 8) as usize;
        if size > 4096 || field(&header, 4) & 3 != 1 {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "header"));
        }
        let mut body = vec![0; size];
        stream.read_exact(&mut body)?;
        Ok(Some(Message { code: field(&header, 0), need_reply: field(&header, 4) & 8 != 0, body, fds }))
    }

    pub(super) fn reply(
        stream: &UnixStream,
        code: u32,
        body: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<()> {
        let mut bytes = [code, 1 | 4, body.len() as u32].map(u32::to_ne_bytes).concat();
        bytes.extend(body);
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !fds.is_empty() {
            control.push(SendAncillaryMessage::ScmRights(fds));
        }
        sendmsg(stream, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        Ok(())
    }
}
