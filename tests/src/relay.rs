//! Stands between QEMU and a daemon, and connects again when the daemon was started anew.
//!
//! A front-end that outlives its back-end tells the new one everything that it had told the old one. QEMU does so
//! for its block and network devices. For all devices of its `vhost-user-base` family (rng, gpio, i2c, spi, sound,
//! rtc and the test device) QEMU 11.1 ends with an assertion instead: on reconnect it starts a `vhost_dev` that it
//! had cleaned up before. So that such a daemon can be killed under a running guest all the same, this relay keeps
//! the front-end's memory in QEMU's place: it passes every message on, remembers those that set something, and
//! repeats them to a daemon that it reaches again. Neither QEMU nor the guest notices more than a pause.
//!
//! Where a ring goes on is read from the ring itself. That is exact as long as the driver has at most one request
//! of one descriptor outstanding, which is what Linux's entropy driver does.

use std::collections::BTreeMap;
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::failure::Failure;
use crate::message::{self, Message};
use crate::virtio;

const PAUSE: Duration = Duration::from_millis(20);

/// A relay at work; ends when dropped.
#[derive(Debug)]
pub struct Relay {
    socket: PathBuf,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    end: AtomicBool,
    reconnects: AtomicU32,
}

impl Relay {
    /// Listens on `socket` for one front-end after the other, each of which talks to the daemon on `daemon`.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn start(socket: &Path, daemon: &Path) -> Result<Self, Failure> {
        let listener = UnixListener::bind(socket)
            .map_err(Failure::io(format_args!("listen on {}", socket.display())))?;
        listener.set_nonblocking(true).map_err(Failure::io("change a socket"))?;
        let shared = Arc::new(Shared::default());
        let session = Session { daemon: daemon.to_owned(), shared: Arc::clone(&shared) };
        let thread = thread::spawn(move || session.serve(&listener));
        Ok(Self { socket: socket.to_owned(), shared, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// How many times it has told everything to a new daemon.
    #[must_use]
    pub fn reconnects(&self) -> u32 {
        self.shared.reconnects.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.shared.end.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Session {
    daemon: PathBuf,
    shared: Arc<Shared>,
}

impl Session {
    fn serve(&self, listener: &UnixListener) {
        while self.goes_on().is_ok() {
            match listener.accept() {
                // A front-end that leaves ends its session; there is nobody to tell of errors but the test, which
                // sees that the guest stands still.
                Ok((front, _)) => {
                    if let Err(error) = front.set_nonblocking(false).and_then(|()| self.relay(&front)) {
                        eprintln!("relay: {error}");
                    }
                }
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    fn relay(&self, front: &UnixStream) -> io::Result<()> {
        let mut memory = Memory::default();
        let mut back = self.connect(&memory)?;
        loop {
            self.goes_on()?;
            let mut waiting = [PollFd::new(front, PollFlags::IN), PollFd::new(&back, PollFlags::IN)];
            poll(&mut waiting, Some(&Timespec { tv_sec: 0, tv_nsec: 50_000_000 }))?;
            let (from_front, from_back) =
                (!waiting[0].revents().is_empty(), !waiting[1].revents().is_empty());
            if from_back {
                // A back-end only ever answers on this socket: by itself it can but leave.
                back = self.reconnect(&memory)?;
            }
            if !from_front {
                continue;
            }
            let Some(message) = Message::receive(front)? else { return Ok(()) };
            let reply = loop {
                match message.exchange(&back) {
                    Ok(reply) => break reply,
                    Err(_) => back = self.reconnect(&memory)?,
                }
            };
            if let Some(reply) = reply {
                reply.send(front)?;
            }
            memory.note(message);
        }
    }

    fn reconnect(&self, memory: &Memory) -> io::Result<UnixStream> {
        let back = self.connect(memory)?;
        self.shared.reconnects.fetch_add(1, Ordering::SeqCst);
        Ok(back)
    }

    /// Tries until a daemon listens and has been told everything.
    fn connect(&self, memory: &Memory) -> io::Result<UnixStream> {
        loop {
            self.goes_on()?;
            match UnixStream::connect(&self.daemon).and_then(|back| memory.tell(&back).map(|()| back)) {
                Ok(back) => return Ok(back),
                Err(_) => thread::sleep(PAUSE),
            }
        }
    }

    fn goes_on(&self) -> io::Result<()> {
        if self.shared.end.load(Ordering::SeqCst) { Err(io::ErrorKind::Interrupted.into()) } else { Ok(()) }
    }
}

/// What the front-end has set: the last message of each kind, and of each kind and ring or memory region.
#[derive(Default)]
struct Memory(BTreeMap<(Rank, u64), Message>);

/// The order in which a new back-end is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Owner,
    ProtocolFeatures,
    BackChannel,
    Features,
    Region,
    Table,
    Size,
    Base,
    Addresses,
    Error,
    Call,
    Kick,
    Enable,
    Status,
}

impl Memory {
    fn note(&mut self, message: Message) {
        let ring = u64::from(message.word(0) & 0xff);
        let (rank, which) = match message.request {
            message::SET_OWNER => (Rank::Owner, 0),
            message::SET_PROTOCOL_FEATURES => (Rank::ProtocolFeatures, 0),
            message::SET_BACKEND_REQ_FD => (Rank::BackChannel, 0),
            message::SET_FEATURES => (Rank::Features, 0),
            message::SET_MEM_TABLE => (Rank::Table, 0),
            message::ADD_MEM_REG => (Rank::Region, message.long(8)),
            message::SET_VRING_NUM => (Rank::Size, ring),
            message::SET_VRING_BASE => (Rank::Base, ring),
            message::SET_VRING_ADDR => (Rank::Addresses, ring),
            message::SET_VRING_ERR => (Rank::Error, ring),
            message::SET_VRING_CALL => (Rank::Call, ring),
            message::SET_VRING_KICK => (Rank::Kick, ring),
            message::SET_VRING_ENABLE => (Rank::Enable, ring),
            message::SET_STATUS => (Rank::Status, 0),
            message::REM_MEM_REG => {
                self.0.remove(&(Rank::Region, message.long(8)));
                return;
            }
            // The ring is stopped: a new back-end is not to start it.
            message::GET_VRING_BASE => {
                self.0.remove(&(Rank::Kick, ring));
                return;
            }
            message::RESET_DEVICE => {
                self.0.retain(|(rank, _), _| *rank < Rank::Size);
                return;
            }
            _ => return,
        };
        self.0.insert((rank, which), message);
    }

    fn tell(&self, back: &UnixStream) -> io::Result<()> {
        for ((rank, ring), message) in &self.0 {
            let moved = if *rank == Rank::Base { self.position(*ring) } else { None };
            let reply = match moved {
                Some(position) => message.with_word(4, position).exchange(back)?,
                None => message.exchange(back)?,
            };
            if reply.is_some_and(|reply| reply.long(0) != 0) {
                return Err(io::Error::other(format!("the daemon refused a repeated {rank:?}")));
            }
        }
        if !self.0.is_empty() {
            self.stir();
        }
        Ok(())
    }

    /// The old daemon may have taken a kick without serving it, and served a request without an interrupt: both
    /// sides look once more. A kick or an interrupt too many does no harm.
    fn stir(&self) {
        for ((rank, _), message) in &self.0 {
            if matches!(rank, Rank::Kick | Rank::Call) {
                message.signal();
            }
        }
    }

    /// Where a ring that has run goes on, as its `SET_VRING_BASE` value.
    fn position(&self, ring: u64) -> Option<u32> {
        self.0.get(&(Rank::Kick, ring))?;
        let addresses = self.0.get(&(Rank::Addresses, ring))?;
        let size = self.0.get(&(Rank::Size, ring))?.word(4);
        let features = self.0.get(&(Rank::Features, 0))?.long(0);
        if features >> virtio::RING_PACKED & 1 == 0 {
            // Whatever has no used entry yet was not answered: the used index is where to go on.
            let used = self.guest(addresses.long(16) + 2, 2)?;
            return Some(u32::from(u16::from_le_bytes([used[0], used[1]])));
        }
        let descriptors = self.guest(addresses.long(8), 16 * size as usize)?;
        let flags = descriptors.chunks_exact(16).map(|d| u16::from_le_bytes([d[14], d[15]]));
        let marks: Vec<(bool, bool)> = flags.map(|f| (f & 0x80 != 0, f & 0x8000 != 0)).collect();
        let (at, wrap) = packed_position(&marks);
        let half = u32::from(at) | u32::from(wrap) << 15;
        Some(half << 16 | half)
    }

    /// Reads guest memory at an address of QEMU's.
    fn guest(&self, address: u64, length: usize) -> Option<Vec<u8>> {
        self.0.values().flat_map(Message::regions).find_map(|region| region.read(address, length))
    }
}

/// The next descriptor of a packed ring that the device has to look at, with its wrap counter; from each
/// descriptor's (available, used) marks, with at most one descriptor outstanding.
fn packed_position(marks: &[(bool, bool)]) -> (u16, bool) {
    let at = |found: usize| u16::try_from(found).unwrap_or(0);
    if let Some(found) = marks.iter().position(|(available, used)| available != used) {
        return (at(found), marks[found].0);
    }
    // Nothing is outstanding: the place is where the marks of this lap end and those of the last begin.
    let lap = marks.first().is_some_and(|(_, used)| *used);
    match marks.iter().position(|(_, used)| *used != lap) {
        Some(found) => (at(found), lap),
        None => (0, !lap),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn where_a_packed_ring_goes_on() {
        let (new, old, fresh) = ((true, true), (false, false), (true, false));
        assert_eq!(packed_position(&[old, old, old]), (0, true), "never used");
        assert_eq!(packed_position(&[fresh, old, old]), (0, true), "first request");
        assert_eq!(packed_position(&[new, fresh, old]), (1, true), "second request");
        assert_eq!(packed_position(&[new, new, old]), (2, true), "two done");
        assert_eq!(packed_position(&[new, new, new]), (0, false), "a lap done");
        assert_eq!(packed_position(&[(false, true), new, new]), (0, false), "second lap's first request");
        assert_eq!(packed_position(&[old, new, new]), (1, false), "second lap, one done");
    }
}
