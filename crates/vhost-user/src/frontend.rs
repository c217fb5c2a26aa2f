//! The front-end's side of the socket: for tests, for tools, and for devices whose other half is a back-end.

mod extensions;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use zerocopy::{FromBytes, IntoBytes};

use crate::body::{ConfigHeader, MemTableHeader, SingleRegion, VRING_INDEX_MASK, VRING_NO_FD};
use crate::deadline::Deadline;
use crate::frame::{Direction, FrameReader};
use crate::header::{self, Header, flags};
use crate::{
    Error, FrontendCode, MAX_CONFIG_SIZE, MAX_FDS, MemoryRegion, ProtocolFeatures, VringAddr, VringState,
    socket,
};

/// How long a back-end may take for an answer unless [`FrontendEndpoint::set_timeout`] says otherwise.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The front-end's side of a vhost-user socket: one method a request, each waiting for its answer.
///
/// Requests without a reply of their own are sent with need_reply once
/// [`REPLY_ACK`](ProtocolFeatures::REPLY_ACK) is negotiated, unless [`set_acknowledge`](Self::set_acknowledge) says
/// otherwise; a failure then is [`Error::Refused`]. Nothing is checked that the back-end ought to check, so that tests
/// can send what they like.
#[derive(Debug)]
pub struct FrontendEndpoint {
    socket: UnixStream,
    frames: FrameReader,
    negotiated: ProtocolFeatures,
    acknowledge: bool,
    timeout: Duration,
}

/// A reply as it came.
#[derive(Debug)]
pub struct Reply {
    /// Its header.
    pub header: Header,
    /// Its payload.
    pub body: Vec<u8>,
    /// The descriptors that came with its first byte.
    pub fds: Vec<OwnedFd>,
}

impl FrontendEndpoint {
    /// Connects to a listening back-end.
    pub fn connect(path: impl AsRef<Path>) -> Result<Self, Error> {
        Ok(Self::new(UnixStream::connect(path)?))
    }

    /// Takes a connected socket.
    pub fn new(socket: UnixStream) -> Self {
        FrontendEndpoint {
            socket,
            frames: FrameReader::new(Direction::Replies),
            negotiated: ProtocolFeatures::empty(),
            acknowledge: true,
            timeout: TIMEOUT,
        }
    }

    /// How long each request may take from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// Whether to ask for acknowledgements where that is negotiated. It is on at first.
    pub fn set_acknowledge(&mut self, acknowledge: bool) {
        self.acknowledge = acknowledge;
    }

    /// The protocol features that were set.
    pub fn protocol_features(&self) -> ProtocolFeatures {
        self.negotiated
    }

    /// `GET_FEATURES`.
    pub fn get_features(&mut self) -> Result<u64, Error> {
        self.value(FrontendCode::GetFeatures)
    }

    /// `SET_FEATURES`.
    pub fn set_features(&mut self, features: u64) -> Result<(), Error> {
        self.command(FrontendCode::SetFeatures, &[features.as_bytes()], &[])
    }

    /// `SET_OWNER`.
    pub fn set_owner(&mut self) -> Result<(), Error> {
        self.command(FrontendCode::SetOwner, &[], &[])
    }

    /// `RESET_OWNER`.
    pub fn reset_owner(&mut self) -> Result<(), Error> {
        self.command(FrontendCode::ResetOwner, &[], &[])
    }

    /// `SET_MEM_TABLE`, of at most eight regions.
    pub fn set_mem_table(&mut self, regions: &[(MemoryRegion, BorrowedFd<'_>)]) -> Result<(), Error> {
        let table = table_header(regions.len())?;
        let mut body = vec![table.as_bytes()];
        body.extend(regions.iter().map(|(region, _)| region.as_bytes()));
        let fds: Vec<_> = regions.iter().map(|(_, fd)| *fd).collect();
        self.command(FrontendCode::SetMemTable, &body, &fds)
    }

    /// `SET_VRING_NUM`.
    pub fn set_vring_num(&mut self, index: u32, num: u32) -> Result<(), Error> {
        self.vring_state(FrontendCode::SetVringNum, index, num)
    }

    /// `SET_VRING_ADDR`.
    pub fn set_vring_addr(&mut self, addr: &VringAddr) -> Result<(), Error> {
        self.command(FrontendCode::SetVringAddr, &[addr.as_bytes()], &[])
    }

    /// `SET_VRING_BASE`.
    pub fn set_vring_base(&mut self, index: u32, base: u32) -> Result<(), Error> {
        self.vring_state(FrontendCode::SetVringBase, index, base)
    }

    /// `GET_VRING_BASE`: stops the ring.
    pub fn get_vring_base(&mut self, index: u32) -> Result<u32, Error> {
        let code = FrontendCode::GetVringBase;
        let reply = self.call(code, &[VringState { index, num: 0 }.as_bytes()])?;
        let state: VringState = payload(code, &reply.body)?;
        if state.index != index {
            return Err(Error::BadReply { code: code.code(), what: "another ring" });
        }
        Ok(state.num)
    }

    /// `SET_VRING_KICK`: starts the ring.
    pub fn set_vring_kick(&mut self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.vring_fd(FrontendCode::SetVringKick, index, fd)
    }

    /// `SET_VRING_CALL`.
    pub fn set_vring_call(&mut self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.vring_fd(FrontendCode::SetVringCall, index, fd)
    }

    /// `SET_VRING_ERR`.
    pub fn set_vring_err(&mut self, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        self.vring_fd(FrontendCode::SetVringErr, index, fd)
    }

    /// `GET_PROTOCOL_FEATURES`.
    pub fn get_protocol_features(&mut self) -> Result<ProtocolFeatures, Error> {
        Ok(ProtocolFeatures::from_bits_retain(self.value(FrontendCode::GetProtocolFeatures)?))
    }

    /// `SET_PROTOCOL_FEATURES`. Sent without need_reply, which is only negotiated by it.
    pub fn set_protocol_features(&mut self, features: ProtocolFeatures) -> Result<(), Error> {
        let code = FrontendCode::SetProtocolFeatures.code();
        self.send(code, 0, &[features.bits().as_bytes()], &[])?;
        self.negotiated = features;
        Ok(())
    }

    /// `GET_QUEUE_NUM`.
    pub fn get_queue_num(&mut self) -> Result<u64, Error> {
        self.value(FrontendCode::GetQueueNum)
    }

    /// `SET_VRING_ENABLE`.
    pub fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<(), Error> {
        self.vring_state(FrontendCode::SetVringEnable, index, enable.into())
    }

    /// `SET_BACKEND_REQ_FD`; see [`BackendListener::pair`](crate::BackendListener::pair).
    pub fn set_backend_req_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.command(FrontendCode::SetBackendReqFd, &[], &[fd])
    }

    /// `GET_CONFIG`. [`Error::Refused`] if the back-end has no such bytes.
    pub fn get_config(&mut self, offset: u32, size: u32, flags: u32) -> Result<Vec<u8>, Error> {
        let code = FrontendCode::GetConfig;
        let length = usize::try_from(size).ok().filter(|size| *size <= MAX_CONFIG_SIZE);
        let length = length.ok_or(Error::Argument("size"))?;
        let config = ConfigHeader { offset, size, flags };
        let reply = self.call(code, &[config.as_bytes(), &vec![0; length]])?;
        // "Zero length of payload to indicate an error": that of the message, or that of the configuration space
        // within it. Back-ends do either.
        match ConfigHeader::read_from_prefix(&reply.body) {
            Ok((got, [])) if got.size == 0 && size != 0 => {
                Err(Error::Refused { code: code.code(), value: 0 })
            }
            Err(_) if reply.body.is_empty() => Err(Error::Refused { code: code.code(), value: 0 }),
            Ok((got, data)) if got.size == size && got.offset == offset && data.len() == length => {
                Ok(data.to_vec())
            }
            _ => Err(Error::BadReply { code: code.code(), what: "another part of the configuration space" }),
        }
    }

    /// `SET_CONFIG`.
    pub fn set_config(&mut self, offset: u32, flags: u32, data: &[u8]) -> Result<(), Error> {
        let size = u32::try_from(data.len()).ok().filter(|_| data.len() <= MAX_CONFIG_SIZE);
        let config = ConfigHeader { offset, size: size.ok_or(Error::Argument("data"))?, flags };
        self.command(FrontendCode::SetConfig, &[config.as_bytes(), data], &[])
    }

    /// `RESET_DEVICE`.
    pub fn reset_device(&mut self) -> Result<(), Error> {
        self.command(FrontendCode::ResetDevice, &[], &[])
    }

    /// `GET_MAX_MEM_SLOTS`.
    pub fn get_max_mem_slots(&mut self) -> Result<u64, Error> {
        self.value(FrontendCode::GetMaxMemSlots)
    }

    /// `ADD_MEM_REG`.
    pub fn add_mem_reg(&mut self, region: MemoryRegion, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.command(FrontendCode::AddMemReg, &[SingleRegion { padding: 0, region }.as_bytes()], &[fd])
    }

    /// `REM_MEM_REG`.
    pub fn rem_mem_reg(&mut self, region: MemoryRegion) -> Result<(), Error> {
        self.command(FrontendCode::RemMemReg, &[SingleRegion { padding: 0, region }.as_bytes()], &[])
    }

    /// `SET_STATUS`.
    pub fn set_status(&mut self, status: u8) -> Result<(), Error> {
        self.command(FrontendCode::SetStatus, &[u64::from(status).as_bytes()], &[])
    }

    /// `GET_STATUS`.
    pub fn get_status(&mut self) -> Result<u8, Error> {
        let code = FrontendCode::GetStatus;
        let status = self.value(code)?;
        u8::try_from(status)
            .map_err(|_| Error::BadReply { code: code.code(), what: "a status of more than 8 bits" })
    }

    /// Sends any message: a header of version 1 with `extra` flags, the parts of its payload, and descriptors on its
    /// first byte. Nothing is waited for but room in the socket.
    pub fn send(
        &mut self,
        code: u32,
        extra: u32,
        body: &[&[u8]],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), Error> {
        self.send_raw(&header::message(code, extra, body), fds)
    }

    /// Sends any bytes, with descriptors on the first of them.
    pub fn send_raw(&mut self, bytes: &[u8], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let deadline = Deadline::after(self.timeout);
        let (mut rest, mut fds) = (bytes, fds);
        while !rest.is_empty() {
            match socket::send(self.socket.as_fd(), rest, fds)? {
                Some(count) => {
                    rest = rest.get(count..).unwrap_or_default();
                    fds = &[];
                }
                None => deadline.writable(self.socket.as_fd())?,
            }
        }
        Ok(())
    }

    /// The next reply, whatever it is to.
    pub fn receive_reply(&mut self) -> Result<Reply, Error> {
        let deadline = Deadline::after(self.timeout);
        loop {
            match self.frames.read(self.socket.as_fd())? {
                Some(frame) if frame.fd_fault.is_some() => {
                    return Err(Error::BadReply {
                        code: frame.header.request,
                        what: "stray file descriptors",
                    });
                }
                Some(frame) => return Ok(Reply { header: frame.header, body: frame.body, fds: frame.fds }),
                None => deadline.readable(self.socket.as_fd())?,
            }
        }
    }

    /// The acknowledgement of a message that was sent with need_reply. [`Error::Refused`] if it failed.
    pub fn receive_ack(&mut self, code: FrontendCode) -> Result<(), Error> {
        let reply = self.reply_to(code)?;
        match payload(code, &reply.body)? {
            0_u64 => Ok(()),
            value => Err(Error::Refused { code: code.code(), value }),
        }
    }

    /// The socket, for tests that do to it what no method does.
    pub fn stream(&self) -> &UnixStream {
        &self.socket
    }

    /// A request without a reply of its own.
    fn command(&mut self, code: FrontendCode, body: &[&[u8]], fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        let acknowledge = self.acknowledges();
        self.send(code.code(), if acknowledge { flags::NEED_REPLY } else { 0 }, body, fds)?;
        if acknowledge { self.receive_ack(code) } else { Ok(()) }
    }

    /// Whether acknowledgements are wanted and possible.
    fn acknowledges(&self) -> bool {
        self.acknowledge && self.negotiated.contains(ProtocolFeatures::REPLY_ACK)
    }

    /// A request with a reply of its own.
    fn call(&mut self, code: FrontendCode, body: &[&[u8]]) -> Result<Reply, Error> {
        self.send(code.code(), 0, body, &[])?;
        self.reply_to(code)
    }

    fn value(&mut self, code: FrontendCode) -> Result<u64, Error> {
        let reply = self.call(code, &[])?;
        payload(code, &reply.body)
    }

    fn vring_state(&mut self, code: FrontendCode, index: u32, num: u32) -> Result<(), Error> {
        self.command(code, &[VringState { index, num }.as_bytes()], &[])
    }

    fn vring_fd(&mut self, code: FrontendCode, index: u32, fd: Option<BorrowedFd<'_>>) -> Result<(), Error> {
        let index = u64::from(index);
        if index > VRING_INDEX_MASK {
            return Err(Error::Argument("index"));
        }
        let value = if fd.is_some() { index } else { index | VRING_NO_FD };
        self.command(code, &[value.as_bytes()], fd.as_slice())
    }

    fn reply_to(&mut self, code: FrontendCode) -> Result<Reply, Error> {
        let reply = self.reply_with_fds(code)?;
        if !reply.fds.is_empty() {
            return Err(bad_reply(code, "file descriptors that it does not have"));
        }
        Ok(reply)
    }

    /// The reply, and the descriptors that came with it.
    fn reply_with_fds(&mut self, code: FrontendCode) -> Result<Reply, Error> {
        let reply = self.receive_reply()?;
        if reply.header.request != code.code() {
            return Err(bad_reply(code, "another request's"));
        }
        Ok(reply)
    }
}

impl AsFd for FrontendEndpoint {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Before so many regions.
fn table_header(regions: usize) -> Result<MemTableHeader, Error> {
    let num_regions = u32::try_from(regions).ok().filter(|_| regions <= MAX_FDS);
    Ok(MemTableHeader { num_regions: num_regions.ok_or(Error::Argument("regions"))?, padding: 0 })
}

fn payload<T: FromBytes>(code: FrontendCode, body: &[u8]) -> Result<T, Error> {
    T::read_from_bytes(body).map_err(|_| bad_reply(code, "wrong length"))
}

fn bad_reply(code: FrontendCode, what: &'static str) -> Error {
    Error::BadReply { code: code.code(), what }
}
