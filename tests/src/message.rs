//! vhost-user messages as bytes, with the descriptors that came with them: enough to pass them on and repeat them.
//!
//! Numbers and layouts are those of QEMU's `docs/interop/vhost-user.rst`.

use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recvmsg, sendmsg,
};

pub(crate) const GET_FEATURES: u32 = 1;
pub(crate) const SET_FEATURES: u32 = 2;
pub(crate) const SET_OWNER: u32 = 3;
pub(crate) const SET_MEM_TABLE: u32 = 5;
pub(crate) const SET_VRING_NUM: u32 = 8;
pub(crate) const SET_VRING_ADDR: u32 = 9;
pub(crate) const SET_VRING_BASE: u32 = 10;
pub(crate) const GET_VRING_BASE: u32 = 11;
pub(crate) const SET_VRING_KICK: u32 = 12;
pub(crate) const SET_VRING_CALL: u32 = 13;
pub(crate) const SET_VRING_ERR: u32 = 14;
pub(crate) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(crate) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(crate) const GET_QUEUE_NUM: u32 = 17;
pub(crate) const SET_VRING_ENABLE: u32 = 18;
pub(crate) const SET_BACKEND_REQ_FD: u32 = 21;
pub(crate) const GET_CONFIG: u32 = 24;
pub(crate) const GET_INFLIGHT_FD: u32 = 31;
pub(crate) const SET_INFLIGHT_FD: u32 = 32;
pub(crate) const RESET_DEVICE: u32 = 34;
pub(crate) const GET_MAX_MEM_SLOTS: u32 = 36;
pub(crate) const ADD_MEM_REG: u32 = 37;
pub(crate) const REM_MEM_REG: u32 = 38;
pub(crate) const SET_STATUS: u32 = 39;
pub(crate) const GET_STATUS: u32 = 40;
pub(crate) const GET_SHMEM_CONFIG: u32 = 44;

/// Requests that are answered whether or not an answer was asked for.
const ANSWERED: [u32; 9] = [
    GET_FEATURES,
    GET_VRING_BASE,
    GET_PROTOCOL_FEATURES,
    GET_QUEUE_NUM,
    GET_CONFIG,
    GET_INFLIGHT_FD,
    GET_MAX_MEM_SLOTS,
    GET_STATUS,
    GET_SHMEM_CONFIG,
];
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 1 << 3;
const HEADER: usize = 12;
const MOST_DESCRIPTORS: usize = 8;
const LONGEST_BODY: usize = 1 << 16;

/// One message.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) request: u32,
    flags: u32,
    body: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Message {
    /// A request of this version of the protocol, without descriptors.
    pub(crate) fn new(request: u32, body: Vec<u8>) -> Self {
        Self { request, flags: VERSION, body, descriptors: Vec::new() }
    }

    /// An answer's contents and descriptors as another request.
    pub(crate) fn turned_into(self, request: u32) -> Self {
        Self { request, flags: VERSION, ..self }
    }

    /// Reads the next one; nothing at the end.
    pub(crate) fn receive(from: &UnixStream) -> io::Result<Option<Self>> {
        let mut header = [0; HEADER];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let got =
            recvmsg(from, &mut [IoSliceMut::new(&mut header)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?
                .bytes;
        if got == 0 {
            return Ok(None);
        }
        let mut descriptors = Vec::new();
        for part in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                descriptors.extend(rights);
            }
        }
        let mut from = from;
        from.read_exact(&mut header[got..])?;
        let word =
            |at: usize| u32::from_ne_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (request, flags, size) = (word(0), word(4), word(8) as usize);
        if size > LONGEST_BODY {
            return Err(io::Error::other(format!("a body of {size} bytes")));
        }
        let mut body = vec![0; size];
        from.read_exact(&mut body)?;
        Ok(Some(Self { request, flags, body, descriptors }))
    }

    pub(crate) fn send(&self, to: &UnixStream) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(HEADER + self.body.len());
        for word in [self.request, self.flags, u32::try_from(self.body.len()).unwrap_or(0)] {
            bytes.extend_from_slice(&word.to_ne_bytes());
        }
        bytes.extend_from_slice(&self.body);
        let descriptors: Vec<_> = self.descriptors.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() {
            ancillary.push(SendAncillaryMessage::ScmRights(&descriptors));
        }
        let sent = sendmsg(to, &[IoSlice::new(&bytes)], &mut ancillary, SendFlags::NOSIGNAL)?;
        let mut to = to;
        to.write_all(&bytes[sent..])
    }

    /// Sends it, and waits for the answer if there is to be one.
    pub(crate) fn exchange(&self, with: &UnixStream) -> io::Result<Option<Self>> {
        self.send(with)?;
        if self.flags & NEED_REPLY == 0 && !ANSWERED.contains(&self.request) {
            return Ok(None);
        }
        Self::receive(with)?.map(Some).ok_or_else(|| io::ErrorKind::UnexpectedEof.into())
    }

    /// Takes these bits out of a body that is 64 of them.
    pub(crate) fn clear(&mut self, bits: u64) {
        for (byte, cleared) in self.body.iter_mut().zip(bits.to_ne_bytes()) {
            *byte &= !cleared;
        }
    }

    /// The 32 bits at an offset of the body; zero past its end.
    pub(crate) fn word(&self, at: usize) -> u32 {
        self.body.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
    }

    /// The 64 bits at an offset of the body; zero past its end.
    pub(crate) fn long(&self, at: usize) -> u64 {
        self.body.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
    }
}
