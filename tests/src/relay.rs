//! Stands between QEMU and a daemon, and connects again when the daemon was started anew.
//!
//! A front-end that outlives its back-end tells the new one everything that it had told the old one. QEMU does so
//! for its block and network devices. For all devices of its `vhost-user-base` family (rng, gpio, i2c, spi, sound,
//! rtc and the test device) QEMU 11.1 ends with an assertion instead: on reconnect it starts a `vhost_dev` that it
//! had cleaned up before. So that such a daemon can be killed under a running guest all the same, this relay keeps
//! the front-end's memory in QEMU's place: it passes every message on, remembers those that set something, and
//! repeats them to a daemon that it reaches again. Neither QEMU nor the guest notices more than a pause.
//!
//! Where a ring goes on, and what was in flight, is in the buffer that the first daemon made (GET_INFLIGHT_FD). QEMU does
//! not ask for one with these devices: the relay does, and hands it to each daemon after that.

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
        Self::withholding(0, socket, daemon)
    }

    /// The same without some of the protocol's features: the front-end does not hear that the daemon has these bits.
    ///
    /// # Errors
    /// The socket cannot be made.
    pub fn withholding(features: u64, socket: &Path, daemon: &Path) -> Result<Self, Failure> {
        let listener = UnixListener::bind(socket)
            .map_err(Failure::io(format_args!("listen on {}", socket.display())))?;
        listener.set_nonblocking(true).map_err(Failure::io("change a socket"))?;
        let shared = Arc::new(Shared::default());
        let session = Session { daemon: daemon.to_owned(), withheld: features, shared: Arc::clone(&shared) };
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
    withheld: u64,
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
            if message.request == message::SET_VRING_NUM && memory.wants_inflight() {
                let size = message.word(4);
                while memory.wants_inflight() {
                    // No ring runs yet.
                    if memory.ask_for_inflight(&back, size).is_err() {
                        back = self.reconnect(&memory)?;
                    }
                }
            }
            let reply = loop {
                match message.exchange(&back) {
                    Ok(reply) => break reply,
                    Err(_) => back = self.reconnect(&memory)?,
                }
            };
            if let Some(mut reply) = reply {
                if reply.request == message::GET_PROTOCOL_FEATURES {
                    reply.clear(self.withheld);
                }
                reply.send(front)?;
                memory.note_reply(&reply);
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

/// Of the protocol's features: the back-end has a buffer for what is in flight.
const INFLIGHT_SHMFD: u64 = 1 << 12;

/// What the front-end has set: the last message of each kind, and of each kind and ring or memory region.
#[derive(Default)]
struct Memory {
    messages: BTreeMap<(Rank, u64), Message>,
    /// How many rings the back-end has.
    rings: u64,
}

/// The order in which a new back-end is told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Rank {
    Owner,
    ProtocolFeatures,
    BackChannel,
    Features,
    Region,
    Table,
    Inflight,
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
            message::SET_INFLIGHT_FD => (Rank::Inflight, 0),
            message::SET_VRING_NUM => (Rank::Size, ring),
            message::SET_VRING_BASE => (Rank::Base, ring),
            message::SET_VRING_ADDR => (Rank::Addresses, ring),
            message::SET_VRING_ERR => (Rank::Error, ring),
            message::SET_VRING_CALL => (Rank::Call, ring),
            message::SET_VRING_KICK => (Rank::Kick, ring),
            message::SET_VRING_ENABLE => (Rank::Enable, ring),
            message::SET_STATUS => (Rank::Status, 0),
            message::REM_MEM_REG => {
                self.messages.remove(&(Rank::Region, message.long(8)));
                return;
            }
            // The ring is stopped: a new back-end is not to start it.
            message::GET_VRING_BASE => {
                self.messages.remove(&(Rank::Kick, ring));
                return;
            }
            message::RESET_DEVICE => {
                self.messages.retain(|(rank, _), _| *rank < Rank::Size);
                return;
            }
            _ => return,
        };
        self.messages.insert((rank, which), message);
    }

    fn note_reply(&mut self, reply: &Message) {
        if reply.request == message::GET_QUEUE_NUM {
            self.rings = reply.long(0);
        }
    }

    fn wants_inflight(&self) -> bool {
        let features = self.messages.get(&(Rank::ProtocolFeatures, 0)).map_or(0, |message| message.long(0));
        features & INFLIGHT_SHMFD != 0 && !self.messages.contains_key(&(Rank::Inflight, 0))
    }

    /// Has the back-end make its buffer, for rings of this size, and hands it over as QEMU does with a disk.
    fn ask_for_inflight(&mut self, back: &UnixStream, size: u32) -> io::Result<()> {
        // Size and offset in the file, which the answer has; 16 bits each for the number of rings and their size.
        let shape = (size << 16 | (self.rings & 0xffff) as u32).to_ne_bytes();
        let ask = Message::new(message::GET_INFLIGHT_FD, [[0; 16].as_slice(), &shape].concat());
        let reply = ask.exchange(back)?.ok_or_else(|| io::Error::other("no in-flight buffer"))?;
        let set = reply.turned_into(message::SET_INFLIGHT_FD);
        set.exchange(back)?;
        self.note(set);
        Ok(())
    }

    fn tell(&self, back: &UnixStream) -> io::Result<()> {
        for ((rank, _), message) in &self.messages {
            if message.exchange(back)?.is_some_and(|reply| reply.long(0) != 0) {
                return Err(io::Error::other(format!("the daemon refused a repeated {rank:?}")));
            }
        }
        Ok(())
    }
}
