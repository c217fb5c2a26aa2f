//! Between proxy and back-end: passes messages on, and loses the connection, falls silent, or talks nonsense when told to.
//!
//! Every message counts, in both directions: a request from the front-end, a reply of the back-end.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags,
};
use vhost_user::{HEADER_LEN, MAX_FDS, ProtocolFeatures};

/// What happens at the n-th message of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mischief {
    /// Both sides are closed instead of passing it on.
    Close,
    /// It is passed on, and its reply with another length of nonsense.
    Nonsense,
    /// Nothing is passed on any more; the sockets stay open.
    Silence,
}

#[derive(Default)]
pub struct Plan {
    /// At which message of the front-end, counted from the beginning, what happens. Once.
    pub at: Option<(usize, Mischief)>,
    /// Requests of the front-end so far, over all connections.
    pub requests: Vec<u32>,
    pub connections: usize,
    /// Protocol features that are not offered.
    pub withheld: u64,
    /// Features that are offered for the back-end, which does not hear of them: the front-end does them alone.
    pub added: u64,
    /// Features that are not offered.
    pub hidden: u64,
    /// No connection is to be had.
    pub refuses: bool,
}

/// Makes connections through a double.
#[derive(Clone)]
pub struct Double {
    backend: PathBuf,
    pub plan: Arc<Mutex<Plan>>,
}

impl Double {
    pub fn new(backend: PathBuf) -> Double {
        Double { backend, plan: Arc::default() }
    }

    pub fn connector(&self) -> impl Fn() -> io::Result<UnixStream> + Send + Sync + 'static {
        let double = self.clone();
        move || double.connect()
    }

    /// Without what the back-end offers of these, from the next connection on.
    pub fn without(&self, features: ProtocolFeatures) -> &Double {
        self.plan.lock().unwrap().withheld |= features.bits();
        self
    }

    fn connect(&self) -> io::Result<UnixStream> {
        let mut plan = self.plan.lock().unwrap();
        if plan.refuses {
            return Err(io::Error::from(io::ErrorKind::ConnectionRefused));
        }
        plan.connections += 1;
        drop(plan);
        let backend = UnixStream::connect(&self.backend)?;
        let (front, ours) = UnixStream::pair()?;
        let (up, down) = ((ours.try_clone()?, backend.try_clone()?), (backend, ours));
        let nonsense: Arc<Mutex<bool>> = Arc::default();
        let plan = self.plan.clone();
        let (marked, marks) = (nonsense.clone(), nonsense);
        let (withheld, added, hidden) = {
            let plan = plan.lock().unwrap();
            (plan.withheld, plan.added, plan.hidden)
        };
        std::thread::spawn(move || requests(&up.0, &up.1, &plan, &marks));
        std::thread::spawn(move || replies(&down.0, &down.1, withheld, (added, hidden), &marked));
        Ok(front)
    }
}

fn close(one: &UnixStream, other: &UnixStream) {
    let _ = one.shutdown(std::net::Shutdown::Both);
    let _ = other.shutdown(std::net::Shutdown::Both);
}

fn requests(from: &UnixStream, to: &UnixStream, plan: &Mutex<Plan>, nonsense: &Mutex<bool>) {
    while let Some((mut message, fds)) = receive(from) {
        let mischief = {
            let mut plan = plan.lock().unwrap();
            let code = u32::from_ne_bytes(message[..4].try_into().unwrap());
            if code == 2 {
                // SET_FEATURES.
                let chosen = u64::from_ne_bytes(message[HEADER_LEN..].try_into().unwrap());
                message[HEADER_LEN..].copy_from_slice(&(chosen & !plan.added).to_ne_bytes());
            }
            let number = plan.requests.len();
            plan.requests.push(code);
            plan.at.take_if(|(at, _)| *at == number)
        };
        match mischief.map(|(_, mischief)| mischief) {
            Some(Mischief::Close) => break,
            Some(Mischief::Silence) => {
                // Until the front-end has had enough.
                while receive(from).is_some() {}
                break;
            }
            Some(Mischief::Nonsense) => *nonsense.lock().unwrap() = true,
            None => {}
        }
        if !send(to, &message, &fds) {
            break;
        }
    }
    close(from, to);
}

fn replies(
    from: &UnixStream,
    to: &UnixStream,
    withheld: u64,
    (added, hidden): (u64, u64),
    nonsense: &Mutex<bool>,
) {
    while let Some((mut message, fds)) = receive(from) {
        if message[..4] == 15u32.to_ne_bytes() && message.len() == HEADER_LEN + 8 {
            // GET_PROTOCOL_FEATURES.
            let offered = u64::from_ne_bytes(message[HEADER_LEN..].try_into().unwrap());
            message[HEADER_LEN..].copy_from_slice(&(offered & !withheld).to_ne_bytes());
        }
        if message[..4] == 1u32.to_ne_bytes() && message.len() == HEADER_LEN + 8 {
            // GET_FEATURES.
            let offered = u64::from_ne_bytes(message[HEADER_LEN..].try_into().unwrap());
            message[HEADER_LEN..].copy_from_slice(&((offered | added) & !hidden).to_ne_bytes());
        }
        if std::mem::take(&mut *nonsense.lock().unwrap()) {
            // Another request's, of another length.
            message[0] ^= 0x55;
            message[8..12].copy_from_slice(&3u32.to_ne_bytes());
            message.resize(HEADER_LEN + 3, 0xff);
        }
        if !send(to, &message, &fds) {
            break;
        }
    }
    close(from, to);
}

/// A whole message with its descriptors.
fn receive(socket: &UnixStream) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    let (mut message, mut fds) = (vec![0; HEADER_LEN], Vec::new());
    let mut have = 0;
    loop {
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FDS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut buffer = [io::IoSliceMut::new(&mut message[have..])];
        let received =
            rustix::net::recvmsg(socket, &mut buffer, &mut control, RecvFlags::CMSG_CLOEXEC).ok()?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                fds.extend(rights);
            }
        }
        if received.bytes == 0 {
            return None;
        }
        have += received.bytes;
        if have == HEADER_LEN && message.len() == HEADER_LEN {
            let size = u32::from_ne_bytes(message[8..12].try_into().unwrap());
            message.resize(HEADER_LEN + size as usize, 0);
        }
        if have == message.len() {
            return Some((message, fds));
        }
    }
}

fn send(socket: &UnixStream, message: &[u8], fds: &[OwnedFd]) -> bool {
    let fds: Vec<_> = fds.iter().map(|fd| fd.as_fd()).collect();
    let rights = SendAncillaryMessage::ScmRights(&fds);
    let mut space = vec![std::mem::MaybeUninit::uninit(); rights.size()];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        control.push(rights);
    }
    let bytes = [io::IoSlice::new(message)];
    rustix::net::sendmsg(socket, &bytes, &mut control, SendFlags::NOSIGNAL)
        .is_ok_and(|count| count == message.len())
}

/// Passes whole messages with their descriptors both ways, until one side ends.
pub fn pump(one: UnixStream, other: UnixStream) {
    let (up, down) = ((one.try_clone().unwrap(), other.try_clone().unwrap()), (other, one));
    for (from, to) in [up, down] {
        std::thread::spawn(move || {
            while let Some((message, fds)) = receive(&from)
                && send(&to, &message, &fds)
            {}
            close(&from, &to);
        });
    }
}
