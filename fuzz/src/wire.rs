//! Bytes and descriptors on sockets, against each endpoint of the protocol. Checked: no panic, no sleep beyond a
//! deadline, every descriptor that arrived is closed in the end, nothing is handed out after the end of a stream.
use std::io::{self, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user::{
    Answer, BackendChannel, BackendCode, BackendEndpoint, BackendListener, BackendRequest, Error,
    FrontendCode, FrontendEndpoint, FrontendRequest, MemoryRegion, ProtocolFeatures, ShmemRange, VringAddr,
};

use crate::bytes::Bytes;

/// A pipe that tells whether all copies of its writing end are closed.
struct Probe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Probe {
    fn new() -> Probe {
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).expect("a pipe");
        Probe { read, write }
    }

    /// All copies that were sent are closed.
    fn check_closed(self) {
        drop(self.write);
        let mut files = [PollFd::new(&self.read, PollFlags::empty())];
        poll(&mut files, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).expect("poll");
        assert!(files[0].revents().contains(PollFlags::HUP), "a descriptor was left open");
    }
}

/// Sends bytes with descriptors; what does not fit is not sent.
pub(crate) fn send(socket: BorrowedFd<'_>, data: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
    let mut space = [MaybeUninit::uninit(); 2048];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return false;
    }
    let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
    sendmsg(socket, &[io::IoSlice::new(data)], &mut control, flags).is_ok_and(|sent| sent == data.len())
}

/// The next message: mostly one with a header that can be understood, and a body of the right or a wrong length.
pub(crate) fn message(
    bytes: &mut Bytes<'_>,
    codes: impl FnOnce(&mut Bytes<'_>) -> u32,
    flags: u32,
) -> Vec<u8> {
    let mut data = Vec::new();
    if bytes.u8() < 8 {
        let len = bytes.below(64);
        data.extend(bytes.take(len));
        return data;
    }
    let code = codes(bytes);
    let kind = bytes.u8();
    let flags = match kind {
        0..=4 => bytes.u32(),
        _ => flags | u32::from(kind & 1) << 3,
    };
    let len = match bytes.u8() {
        0xff => bytes.u32(),
        0xfe => 8 + 32 * u32::from(bytes.u8() % 9),
        0xfd => 12 + u32::from(bytes.u8()),
        choice => [0, 8, 8, 8, 16, 20, 24, 32, 40, 40, 56][usize::from(choice) % 11],
    };
    for word in [code, flags, len] {
        data.extend(word.to_le_bytes());
    }
    let body = bytes.take((len as usize).min(512));
    data.extend(body);
    data.resize(12 + (len as usize).min(4096), 0);
    data
}

/// A front-end that sends anything.
pub fn wire_backend(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let probe = Probe::new();
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("a socket");
    let mut endpoint = BackendEndpoint::new(theirs).expect("an endpoint");
    while !bytes.is_empty() {
        let codes = |bytes: &mut Bytes<'_>| FrontendCode::ALL[bytes.below(FrontendCode::ALL.len())].code();
        let message = message(&mut bytes, codes, 1);
        let fds = vec![probe.write.as_fd(); bytes.of([0, 0, 0, 1, 1, 2, 8, 9])];
        let cut = bytes.below(message.len().max(1) * 4).min(message.len());
        let (first, second) = message.split_at(cut);
        // A message in two pieces, or in one.
        send(ours.as_fd(), if first.is_empty() { second } else { first }, &fds);
        let mut over = serve(&mut endpoint, &mut bytes);
        if !first.is_empty() && !second.is_empty() {
            send(ours.as_fd(), second, &[]);
            over |= serve(&mut endpoint, &mut bytes);
        }
        if over {
            assert!(endpoint.receive().is_err(), "something came after the end");
            break;
        }
        // Replies are read, or the endpoint would have to keep them.
        let mut sink = [0; 65536];
        while matches!(io::Read::read(&mut &ours, &mut sink), Ok(1..)) {}
    }
    drop(endpoint);
    drop(ours);
    probe.check_closed();
}

/// Answers all there is. Whether the connection is over.
fn serve(endpoint: &mut BackendEndpoint, bytes: &mut Bytes<'_>) -> bool {
    loop {
        let (ticket, answer) = match endpoint.receive() {
            Ok(Some(received)) => {
                if let FrontendRequest::SetProtocolFeatures(bits) = &received.request {
                    endpoint.set_protocol_features(*bits);
                }
                (received.ticket, answer(&received.request, bytes))
            }
            Ok(None) => return false,
            Err(Error::Invalid { ticket, .. }) => (ticket, Answer::Failed),
            Err(Error::ReplyOwed { .. }) => return false,
            Err(_) => return true,
        };
        match endpoint.reply(ticket, answer) {
            Ok(()) => {}
            Err(Error::CannotFail { .. } | Error::WrongAnswer { .. }) => return false,
            Err(_) => return true,
        }
    }
}

/// Mostly an answer of the right kind.
fn answer(request: &FrontendRequest, bytes: &mut Bytes<'_>) -> Answer {
    match (bytes.u8(), request) {
        (0..4, _) => Answer::Failed,
        (4..8, _) => Answer::Done,
        (_, FrontendRequest::GetConfig { size, .. }) => Answer::Config(vec![7; *size as usize]),
        (_, FrontendRequest::GetVringBase { .. }) => Answer::VringBase(bytes.u32()),
        (_, FrontendRequest::GetProtocolFeatures) => Answer::U64(ProtocolFeatures::all().bits()),
        (_, request) => match request.code() {
            FrontendCode::GetFeatures
            | FrontendCode::GetQueueNum
            | FrontendCode::GetMaxMemSlots
            | FrontendCode::GetStatus => Answer::U64(bytes.u64()),
            _ => Answer::Done,
        },
    }
}

/// Everything before the first operation of a front-end: what the back-end will have sent.
fn replies(bytes: &mut Bytes<'_>, probe: &Probe, socket: BorrowedFd<'_>) {
    for _ in 0..bytes.below(12) {
        let codes = |bytes: &mut Bytes<'_>| FrontendCode::ALL[bytes.below(FrontendCode::ALL.len())].code();
        let message = message(bytes, codes, 1 | 4);
        let fds = vec![probe.write.as_fd(); bytes.of([0, 0, 0, 0, 1, 2])];
        if !message.is_empty() {
            send(socket, &message, &fds);
        }
    }
}

/// A back-end that answers anything.
pub fn wire_frontend(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let probe = Probe::new();
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    replies(&mut bytes, &probe, ours.as_fd());
    // It says nothing more, but does not go: that would only make every send fail.
    ours.shutdown(std::net::Shutdown::Write).expect("a socket");
    let mut endpoint = FrontendEndpoint::new(theirs);
    endpoint.set_timeout(Duration::from_millis(50));
    endpoint.set_acknowledge(bytes.bool());
    let region = MemoryRegion { guest_addr: 0, size: 4096, user_addr: 0, mmap_offset: 0 };
    let file = probe.write.as_fd();
    for _ in 0..16 {
        if bytes.is_empty() {
            break;
        }
        let index = u32::from(bytes.u8());
        let _ = match bytes.below(20) {
            0 => endpoint.get_features().map(drop),
            1 => endpoint.set_features(bytes.u64()),
            2 => endpoint.set_owner(),
            3 => endpoint.get_protocol_features().map(drop),
            4 => endpoint.set_protocol_features(ProtocolFeatures::from_bits_retain(bytes.u64())),
            5 => endpoint.set_mem_table(&[(region, file)]),
            6 => endpoint.set_vring_num(index, bytes.u32()),
            7 => endpoint.get_vring_base(index).map(drop),
            8 => endpoint.set_vring_kick(index, Some(file)),
            9 => endpoint.get_queue_num().map(drop),
            10 => endpoint.set_vring_enable(index, true),
            11 => endpoint.get_config(index, bytes.u32(), 0).map(drop),
            12 => endpoint.set_config(index, 0, &[1, 2, 3]),
            13 => endpoint.reset_device(),
            14 => endpoint.get_max_mem_slots().map(drop),
            15 => endpoint.add_mem_reg(region, file),
            16 => endpoint.get_status().map(drop),
            17 => endpoint.receive_reply().map(drop),
            18 => {
                let code = FrontendCode::ALL[bytes.below(FrontendCode::ALL.len())];
                endpoint.receive_ack(code)
            }
            _ => endpoint.set_vring_addr(&VringAddr { index, ..VringAddr::default() }),
        };
    }
    drop(endpoint);
    drop(ours);
    probe.check_closed();
}

/// Both ends of the back-end's own channel, each against somebody who sends anything.
pub fn wire_channel(data: &[u8]) {
    let mut bytes = Bytes::new(data);
    let probe = Probe::new();
    let negotiated = ProtocolFeatures::from_bits_retain(bytes.u64());
    match bytes.bool() {
        true => listener(&mut bytes, &probe, negotiated),
        false => channel(&mut bytes, &probe, negotiated),
    }
    probe.check_closed();
}

fn backend_code(bytes: &mut Bytes<'_>) -> u32 {
    BackendCode::ALL[bytes.below(BackendCode::ALL.len())].code()
}

fn listener(bytes: &mut Bytes<'_>, probe: &Probe, negotiated: ProtocolFeatures) {
    let (mut listener, other) = BackendListener::pair(negotiated).expect("sockets");
    let other = UnixStream::from(other);
    other.set_nonblocking(true).expect("a socket");
    while !bytes.is_empty() {
        let message = message(bytes, backend_code, 1);
        let fds = vec![probe.write.as_fd(); bytes.of([0, 0, 0, 1, 1, 2])];
        if !message.is_empty() {
            send(other.as_fd(), &message, &fds);
        }
        for _ in 0..8 {
            let (ticket, answer) = match listener.wait(Duration::ZERO) {
                Ok(Some(received)) => {
                    let answer = match bytes.below(4) {
                        0 => Answer::Failed,
                        1 => probe.write.try_clone().map_or(Answer::Failed, Answer::Fd),
                        _ => Answer::Done,
                    };
                    (received.ticket, answer)
                }
                Ok(None) => break,
                Err(Error::Invalid { ticket, .. }) => (ticket, Answer::Failed),
                Err(_) => return,
            };
            let _ = listener.reply(ticket, answer);
        }
        let mut sink = [0; 4096];
        while matches!(io::Read::read(&mut &other, &mut sink), Ok(1..)) {}
    }
}

fn channel(bytes: &mut Bytes<'_>, probe: &Probe, negotiated: ProtocolFeatures) {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    ours.set_nonblocking(true).expect("a socket");
    let Ok(mut channel) = BackendChannel::new(theirs.into(), negotiated) else { return };
    while !bytes.is_empty() {
        let index = u32::from(bytes.u8());
        let acknowledge = bytes.bool();
        let range = ShmemRange { shmid: 1, offset: bytes.u64(), len: u64::from(bytes.u32()) };
        let request = match bytes.below(8) {
            0 => BackendRequest::ConfigChange,
            1 => BackendRequest::VringCall { index },
            2 => BackendRequest::VringErr { index },
            3 => BackendRequest::SharedObjectLookup([index as u8; 16]),
            4 => BackendRequest::ShmemUnmap(range),
            5 => match probe.write.try_clone() {
                Ok(fd) => BackendRequest::ShmemMap { range, fd, fd_offset: 0, writable: acknowledge },
                Err(_) => return,
            },
            _ => BackendRequest::SharedObjectAdd([index as u8; 16]),
        };
        let sent = channel.request(request, acknowledge);
        let mut sink = [0; 4096];
        while matches!(io::Read::read(&mut &ours, &mut sink), Ok(1..)) {}
        let message = message(bytes, backend_code, 1 | 4);
        let fds = vec![probe.write.as_fd(); bytes.of([0, 0, 0, 1, 2])];
        if !message.is_empty() {
            send(ours.as_fd(), &message, &fds);
        }
        if sent.is_err() && channel.unanswered() == 0 && bytes.bool() {
            let _ = (&ours).write(&[]);
        }
        while let Ok(Some(reply)) = channel.receive() {
            drop(reply.fd);
        }
    }
}
