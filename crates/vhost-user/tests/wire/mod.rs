//! Every request of the document, as the bytes that the document describes, written by hand; and what tests
//! need to put bytes and descriptors on a socket.
#![allow(dead_code, reason = "each test program uses its part")]

pub(crate) mod backend;
mod extensions;

use std::io::{IoSlice, IoSliceMut, PipeReader, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use vhost_user::{
    Answer, BackendEndpoint, Error, FrontendCode, FrontendEndpoint, FrontendRequest as R, HEADER_LEN,
    MemoryRegion, ProtocolFeatures, Reason, Received, VringAddr,
};

/// One request in all its forms.
pub(crate) struct Sample {
    pub(crate) code: FrontendCode,
    /// The message as a front-end sends it.
    pub(crate) bytes: Vec<u8>,
    /// How many descriptors go with it.
    pub(crate) fds: usize,
    /// Whether it was understood.
    pub(crate) check: fn(&R) -> bool,
    /// How the back-end answers in these tests.
    pub(crate) answer: fn() -> Answer,
    /// The reply to that answer, if the request has one of its own.
    pub(crate) reply: Option<Vec<u8>>,
    /// How many descriptors go with the reply.
    pub(crate) reply_fds: usize,
    /// The reply to a failure, if the request has one of its own that can tell.
    pub(crate) failure: Option<Vec<u8>>,
    /// The front-end's method for it, and its result as text.
    pub(crate) call: fn(&mut FrontendEndpoint, &[BorrowedFd<'_>]) -> Result<String, Error>,
    /// What the method makes of the reply.
    pub(crate) result: &'static str,
}

impl Sample {
    pub(crate) fn name(&self) -> String {
        format!("{} with {} fds", self.code, self.fds)
    }

    /// With descriptors in the request and in the reply.
    fn fds(self, fds: usize, reply_fds: usize) -> Sample {
        Sample { fds, reply_fds, ..self }
    }

    /// A reply that tells of a failure.
    fn fails(self, failure: &str) -> Sample {
        Sample { failure: Some(hex(failure)), ..self }
    }
}

/// Hexadecimal digits, spaces between them as one likes.
pub(crate) fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u32> =
        text.chars().filter(|c| !c.is_whitespace()).map(|c| c.to_digit(16).unwrap()).collect();
    digits.chunks(2).map(|pair| (pair[0] << 4 | pair[1]) as u8).collect()
}

pub(crate) const LOW: MemoryRegion =
    MemoryRegion { guest_addr: 0, size: 0x1000_0000, user_addr: 0x7f00_0000_0000, mmap_offset: 0x1000 };
pub(crate) const HIGH: MemoryRegion =
    MemoryRegion { guest_addr: 0x1_0000_0000, size: 0x2000, user_addr: 0x7f10_0000_0000, mmap_offset: 0 };
const LOW_HEX: &str = "0000000000000000 0000001000000000 00000000007f0000 0010000000000000";
const HIGH_HEX: &str = "0000000001000000 0020000000000000 00000000107f0000 0000000000000000";
pub(crate) const ADDR: VringAddr =
    VringAddr { index: 1, flags: 1, desc: 0x1000, used: 0x2000, avail: 0x3000, log: 0x4000 };

/// All protocol features of the document but XEN_MMAP, which gives memory regions another form.
pub(crate) fn features() -> ProtocolFeatures {
    ProtocolFeatures::from_bits_retain(0x7f_ffff) - ProtocolFeatures::XEN_MMAP
}

fn text<T: std::fmt::Debug>(result: Result<T, Error>) -> Result<String, Error> {
    result.map(|value| format!("{value:x?}"))
}

/// All of them. Header: request, flags (version 1), size; all little-endian.
pub(crate) fn samples() -> Vec<Sample> {
    let mut all = vec![
        own(
            FrontendCode::GetFeatures,
            "01000000 01000000 00000000",
            |r| matches!(r, R::GetFeatures),
            || Answer::U64(0x1_4000_0000),
            "01000000 05000000 08000000 0000004001000000",
            |f, _| text(f.get_features()),
            "140000000",
        ),
        ack(
            FrontendCode::SetFeatures,
            "02000000 01000000 08000000 0000004001000000",
            0,
            |r| matches!(r, R::SetFeatures(0x1_4000_0000)),
            |f, _| text(f.set_features(0x1_4000_0000)),
        ),
        ack(
            FrontendCode::SetOwner,
            "03000000 01000000 00000000",
            0,
            |r| matches!(r, R::SetOwner),
            |f, _| text(f.set_owner()),
        ),
        ack(
            FrontendCode::ResetOwner,
            "04000000 01000000 00000000",
            0,
            |r| matches!(r, R::ResetOwner),
            |f, _| text(f.reset_owner()),
        ),
        ack(
            FrontendCode::SetMemTable,
            &format!("05000000 01000000 48000000 02000000 00000000 {LOW_HEX} {HIGH_HEX}"),
            2,
            |r| matches!(r, R::SetMemTable(table) if table.len() == 2 && table[0].0 == LOW && table[1].0 == HIGH),
            |f, fds| text(f.set_mem_table(&[(LOW, fds[0]), (HIGH, fds[1])])),
        ),
        ack(
            FrontendCode::SetMemTable,
            &format!("05000000 01000000 08010000 08000000 00000000 {}", HIGH_HEX.repeat(8)),
            8,
            |r| matches!(r, R::SetMemTable(table) if table.len() == 8 && table.iter().all(|(r, _)| *r == HIGH)),
            |f, fds| text(f.set_mem_table(&fds.iter().map(|fd| (HIGH, *fd)).collect::<Vec<_>>())),
        ),
        ack(
            FrontendCode::SetMemTable,
            "05000000 01000000 08000000 00000000 00000000",
            0,
            |r| matches!(r, R::SetMemTable(table) if table.is_empty()),
            |f, _| text(f.set_mem_table(&[])),
        ),
        ack(
            FrontendCode::SetVringNum,
            "08000000 01000000 08000000 01000000 00010000",
            0,
            |r| matches!(r, R::SetVringNum { index: 1, num: 256 }),
            |f, _| text(f.set_vring_num(1, 256)),
        ),
        ack(
            FrontendCode::SetVringAddr,
            "09000000 01000000 28000000 01000000 01000000
             0010000000000000 0020000000000000 0030000000000000 0040000000000000",
            0,
            |r| matches!(r, R::SetVringAddr(addr) if *addr == ADDR),
            |f, _| text(f.set_vring_addr(&ADDR)),
        ),
        ack(
            FrontendCode::SetVringBase,
            "0a000000 01000000 08000000 01000000 05800680",
            0,
            |r| matches!(r, R::SetVringBase { index: 1, base: 0x8006_8005 }),
            |f, _| text(f.set_vring_base(1, 0x8006_8005)),
        ),
        own(
            FrontendCode::GetVringBase,
            "0b000000 01000000 08000000 02000000 00000000",
            |r| matches!(r, R::GetVringBase { index: 2 }),
            || Answer::VringBase(0xfffe),
            "0b000000 05000000 08000000 02000000 feff0000",
            |f, _| text(f.get_vring_base(2)),
            "fffe",
        ),
        ack(
            FrontendCode::SetVringKick,
            "0c000000 01000000 08000000 0300000000000000",
            1,
            |r| matches!(r, R::SetVringKick { index: 3, fd: Some(_) }),
            |f, fds| text(f.set_vring_kick(3, Some(fds[0]))),
        ),
        ack(
            FrontendCode::SetVringKick,
            "0c000000 01000000 08000000 ff01000000000000",
            0,
            |r| matches!(r, R::SetVringKick { index: 255, fd: None }),
            |f, _| text(f.set_vring_kick(255, None)),
        ),
        ack(
            FrontendCode::SetVringCall,
            "0d000000 01000000 08000000 0000000000000000",
            1,
            |r| matches!(r, R::SetVringCall { index: 0, fd: Some(_) }),
            |f, fds| text(f.set_vring_call(0, Some(fds[0]))),
        ),
        ack(
            FrontendCode::SetVringCall,
            "0d000000 01000000 08000000 0001000000000000",
            0,
            |r| matches!(r, R::SetVringCall { index: 0, fd: None }),
            |f, _| text(f.set_vring_call(0, None)),
        ),
        ack(
            FrontendCode::SetVringErr,
            "0e000000 01000000 08000000 0700000000000000",
            1,
            |r| matches!(r, R::SetVringErr { index: 7, fd: Some(_) }),
            |f, fds| text(f.set_vring_err(7, Some(fds[0]))),
        ),
        ack(
            FrontendCode::SetVringErr,
            "0e000000 01000000 08000000 0701000000000000",
            0,
            |r| matches!(r, R::SetVringErr { index: 7, fd: None }),
            |f, _| text(f.set_vring_err(7, None)),
        ),
        own(
            FrontendCode::GetProtocolFeatures,
            "0f000000 01000000 00000000",
            |r| matches!(r, R::GetProtocolFeatures),
            || Answer::U64(features().bits()),
            "0f000000 05000000 08000000 ffff7d0000000000",
            |f, _| text(f.get_protocol_features().map(|features| features.bits())),
            "7dffff",
        ),
        ack(
            FrontendCode::SetProtocolFeatures,
            "10000000 01000000 08000000 ffff7d0000000000",
            0,
            |r| matches!(r, R::SetProtocolFeatures(set) if *set == features()),
            |f, _| text(f.set_protocol_features(features())),
        ),
        own(
            FrontendCode::GetQueueNum,
            "11000000 01000000 00000000",
            |r| matches!(r, R::GetQueueNum),
            || Answer::U64(3),
            "11000000 05000000 08000000 0300000000000000",
            |f, _| text(f.get_queue_num()),
            "3",
        ),
        ack(
            FrontendCode::SetVringEnable,
            "12000000 01000000 08000000 01000000 01000000",
            0,
            |r| matches!(r, R::SetVringEnable { index: 1, enable: true }),
            |f, _| text(f.set_vring_enable(1, true)),
        ),
        ack(
            FrontendCode::SetVringEnable,
            "12000000 01000000 08000000 01000000 00000000",
            0,
            |r| matches!(r, R::SetVringEnable { index: 1, enable: false }),
            |f, _| text(f.set_vring_enable(1, false)),
        ),
        ack(
            FrontendCode::SetBackendReqFd,
            "15000000 01000000 00000000",
            1,
            |r| matches!(r, R::SetBackendReqFd(_)),
            |f, fds| text(f.set_backend_req_fd(fds[0])),
        ),
        own(
            FrontendCode::GetConfig,
            "18000000 01000000 10000000 02000000 04000000 00000000 00000000",
            |r| matches!(r, R::GetConfig { offset: 2, size: 4, flags: 0 }),
            || Answer::Config(vec![0xaa, 0xbb, 0xcc, 0xdd]),
            "18000000 05000000 10000000 02000000 04000000 00000000 aabbccdd",
            |f, _| text(f.get_config(2, 4, 0)),
            "[aa, bb, cc, dd]",
        )
        .fails("18000000 05000000 00000000"),
        ack(
            FrontendCode::SetConfig,
            "19000000 01000000 0f000000 02000000 03000000 01000000 010203",
            0,
            |r| matches!(r, R::SetConfig { offset: 2, flags: 1, data } if data[..] == [1, 2, 3]),
            |f, _| text(f.set_config(2, vhost_user::config_flags::MIGRATION, &[1, 2, 3])),
        ),
        ack(
            FrontendCode::ResetDevice,
            "22000000 01000000 00000000",
            0,
            |r| matches!(r, R::ResetDevice),
            |f, _| text(f.reset_device()),
        ),
        own(
            FrontendCode::GetMaxMemSlots,
            "24000000 01000000 00000000",
            |r| matches!(r, R::GetMaxMemSlots),
            || Answer::U64(509),
            "24000000 05000000 08000000 fd01000000000000",
            |f, _| text(f.get_max_mem_slots()),
            "1fd",
        ),
        ack(
            FrontendCode::AddMemReg,
            &format!("25000000 01000000 28000000 0000000000000000 {LOW_HEX}"),
            1,
            |r| matches!(r, R::AddMemReg(region, _) if *region == LOW),
            |f, fds| text(f.add_mem_reg(LOW, fds[0])),
        ),
        ack(
            FrontendCode::RemMemReg,
            &format!("26000000 01000000 28000000 0000000000000000 {HIGH_HEX}"),
            0,
            |r| matches!(r, R::RemMemReg(region) if *region == HIGH),
            |f, _| text(f.rem_mem_reg(HIGH)),
        ),
        ack(
            FrontendCode::SetStatus,
            "27000000 01000000 08000000 0f00000000000000",
            0,
            |r| matches!(r, R::SetStatus(0x0f)),
            |f, _| text(f.set_status(0x0f)),
        ),
        own(
            FrontendCode::GetStatus,
            "28000000 01000000 00000000",
            |r| matches!(r, R::GetStatus),
            || Answer::U64(0x4f),
            "28000000 05000000 08000000 4f00000000000000",
            |f, _| text(f.get_status()),
            "4f",
        ),
    ];
    all.extend(extensions::samples());
    all
}

type Check = fn(&R) -> bool;
type Call = fn(&mut FrontendEndpoint, &[BorrowedFd<'_>]) -> Result<String, Error>;

/// A request with a reply of its own.
fn own(
    code: FrontendCode,
    bytes: &str,
    check: Check,
    answer: fn() -> Answer,
    reply: &str,
    call: Call,
    result: &'static str,
) -> Sample {
    let (bytes, reply) = (hex(bytes), Some(hex(reply)));
    Sample { code, bytes, fds: 0, check, answer, reply, reply_fds: 0, failure: None, call, result }
}

/// A request that is acknowledged at most.
fn ack(code: FrontendCode, bytes: &str, fds: usize, check: Check, call: Call) -> Sample {
    Sample {
        code,
        bytes: hex(bytes),
        fds,
        check,
        answer: || Answer::Done,
        reply: None,
        reply_fds: 0,
        failure: None,
        call,
        result: "()",
    }
}

/// Some file.
pub(crate) fn file() -> OwnedFd {
    std::io::pipe().unwrap().1.into()
}

/// The same message with need_reply set.
pub(crate) fn with_need_reply(bytes: &[u8]) -> Vec<u8> {
    let mut bytes = bytes.to_vec();
    bytes[4] |= 8;
    bytes
}

/// A message with this request, flags and payload.
pub(crate) fn message(request: u32, flags: u32, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for field in [request, flags, body.len() as u32] {
        bytes.extend(field.to_le_bytes());
    }
    bytes.extend(body);
    bytes
}

/// The acknowledgement of `code`, as bytes.
pub(crate) fn acknowledgement(code: u32, value: u64) -> Vec<u8> {
    message(code, 5, &value.to_le_bytes())
}

/// A back-end that has negotiated everything, and the socket of its front-end.
pub(crate) fn backend() -> (BackendEndpoint, UnixStream) {
    let (near, far) = UnixStream::pair().unwrap();
    far.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut endpoint = BackendEndpoint::new(near).unwrap();
    endpoint.set_protocol_features(features());
    (endpoint, far)
}

/// Sends `bytes` with as many descriptors on the first of them as there are in `fds`.
pub(crate) fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let rights = SendAncillaryMessage::ScmRights(fds);
    let mut space = vec![MaybeUninit::uninit(); rights.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    assert!(fds.is_empty() || control.push(rights));
    let sent =
        rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL).unwrap();
    assert_eq!(sent, bytes.len());
}

/// Descriptors to send, which tell afterwards whether the receiver has closed them.
pub(crate) struct Probes {
    readers: Vec<PipeReader>,
    writers: Vec<OwnedFd>,
}

impl Probes {
    pub(crate) fn new(count: usize) -> Self {
        let pipes = (0..count).map(|_| std::io::pipe().unwrap());
        let (readers, writers) = pipes.map(|(reader, writer)| (reader, OwnedFd::from(writer))).unzip();
        Probes { readers, writers }
    }

    pub(crate) fn fds(&self) -> Vec<BorrowedFd<'_>> {
        self.writers.iter().map(AsFd::as_fd).collect()
    }

    /// Closes the sender's descriptors; fails if the receiver has any of them left.
    pub(crate) fn assert_closed(self, context: &str) {
        drop(self.writers);
        for mut reader in self.readers {
            let timeout = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };
            let mut poll = [rustix::event::PollFd::new(&reader, rustix::event::PollFlags::IN)];
            let ended = rustix::event::poll(&mut poll, Some(&timeout)).unwrap() == 1;
            assert!(ended, "{context}: a descriptor was not closed");
            assert_eq!(reader.read(&mut [0; 1]).unwrap(), 0);
        }
    }
}

/// Exactly `count` bytes from the back-end.
pub(crate) fn read(socket: &UnixStream, count: usize) -> Vec<u8> {
    let mut bytes = vec![0; count];
    (&*socket).read_exact(&mut bytes).unwrap();
    bytes
}

/// Exactly `count` bytes from the other side, which must be there, and the descriptors that came with the first.
pub(crate) fn read_with_fds(socket: &UnixStream, count: usize) -> (Vec<u8>, Vec<OwnedFd>) {
    let mut bytes = vec![0; count];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let (buffers, flags) = (&mut [IoSliceMut::new(&mut bytes)], RecvFlags::CMSG_CLOEXEC);
    let got = rustix::net::recvmsg(socket, buffers, &mut control, flags).unwrap().bytes;
    let mut fds = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            fds.extend(rights);
        }
    }
    (&*socket).read_exact(&mut bytes[got..]).unwrap();
    (bytes, fds)
}

/// Fails if the back-end has sent anything.
pub(crate) fn assert_silent(socket: &UnixStream, context: &str) {
    socket.set_nonblocking(true).unwrap();
    let mut byte = [0; 1];
    match (&*socket).read(&mut byte) {
        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
        other => panic!("{context}: {other:?} {byte:?}"),
    }
    socket.set_nonblocking(false).unwrap();
}

/// The next request, which must be there completely.
pub(crate) fn received(endpoint: &mut BackendEndpoint, context: &str) -> Received {
    match endpoint.receive() {
        Ok(Some(received)) => received,
        other => panic!("{context}: {other:?}"),
    }
}

/// Receives a request that must be refused, answers it with a failure, and shows that the endpoint goes on: the next
/// request is understood. A request that cannot be told of its failure ends here.
pub(crate) fn refused(endpoint: &mut BackendEndpoint, socket: &UnixStream, context: &str) -> Reason {
    let (code, reason, ticket) = match endpoint.receive() {
        Err(Error::Invalid { code, reason, ticket }) => (code, reason, ticket),
        other => panic!("{context}: {other:?}"),
    };
    assert_eq!(ticket.code(), code);
    match endpoint.reply(ticket, Answer::Failed) {
        Ok(()) => {}
        Err(Error::CannotFail { code: same }) => {
            assert_eq!(same, code);
            assert!(matches!(endpoint.receive(), Err(Error::ReplyOwed { .. })));
            return reason;
        }
        other => panic!("{context}: {other:?}"),
    }
    send(socket, &hex("03000000 01000000 00000000"), &[]);
    let next = received(endpoint, context);
    assert!(matches!(next.request, R::SetOwner), "{context}: {:?}", next.request);
    endpoint.reply(next.ticket, Answer::Done).unwrap();
    reason
}

const _: () = assert!(HEADER_LEN == 12);
