//! The floor: the least that a synchronous back-end does for a request, to measure others by.
//!
//! It speaks just enough of vhost-user to be driven like any back-end, one connection, and then one thread a queue walks
//! its ring: read the kick, take every chain, do the one thing that [`Floor`] names for each, make them used with one
//! store, interrupt if that is wanted, ask for the next kick. It has no failure policy (a broken ring ends the process),
//! no state to stop at, no limits. **Not a device**: for a process of its own, started by the one who measures.
mod ring;
mod work;

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use vhost_user::{
    Answer, BackendEndpoint, F_PROTOCOL_FEATURES, FrontendRequest, ProtocolFeatures, VringAddr,
};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};
use vm_virtio::Features;

use ring::Ring;
use work::{Nothing, OneCall, Output, Random, StatusOnly, Work};

/// Queues that a floor has.
const QUEUES: u64 = 16;

/// What a floor does for each request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Floor {
    /// Nothing but a number at the start of each buffer, so that answers differ.
    Ring,
    /// getrandom(2) into the buffer.
    Random,
    /// A block device: one preadv(2) or pwritev(2) on this file.
    File(PathBuf),
    /// A block device: the status alone.
    Status,
    /// A console: one writev(2) to this file.
    Write(PathBuf),
    /// A console: one writev(2) to this file for all requests that are available.
    WriteBatch(PathBuf),
}

impl Floor {
    /// Its name in tables, and on command lines.
    pub fn name(&self) -> &'static str {
        match self {
            Floor::Ring => "floor-ring",
            Floor::Random => "floor-getrandom",
            Floor::File(_) => "floor-preadv",
            Floor::Status => "floor-status",
            Floor::Write(_) => "floor-write",
            Floor::WriteBatch(_) => "floor-write-batch",
        }
    }

    /// The floor of that name, and of that file where it has one.
    pub fn by_name(name: &str, file: Option<PathBuf>) -> Option<Floor> {
        let mut all = vec![Floor::Ring, Floor::Random, Floor::Status];
        if let Some(file) = file {
            all.extend([Floor::File, Floor::Write, Floor::WriteBatch].map(|floor| floor(file.clone())));
        }
        all.into_iter().find(|floor| floor.name() == name)
    }
}

/// Serves one front-end until it goes away. Each ring is looked at for `poll` before its thread sleeps.
///
/// # Errors
/// The connection's.
pub fn serve(socket: UnixStream, floor: Floor, poll_for: Duration) -> io::Result<()> {
    let stream = socket.try_clone()?;
    let mut session =
        Session { floor, poll: poll_for, features: Features::empty(), memory: None, rings: Vec::new() };
    let mut endpoint = BackendEndpoint::new(socket)?;
    loop {
        match endpoint.receive() {
            Ok(Some(received)) => {
                if let FrontendRequest::SetProtocolFeatures(bits) = &received.request {
                    endpoint.set_protocol_features(*bits);
                }
                let answer = session.answer(received.request)?;
                endpoint.reply(received.ticket, answer).map_err(io::Error::other)?;
            }
            Ok(None) => {
                poll(&mut [PollFd::new(&stream, PollFlags::IN)], None)?;
            }
            Err(vhost_user::Error::Invalid { ticket, .. }) => {
                endpoint.reply(ticket, Answer::Failed).map_err(io::Error::other)?;
            }
            Err(vhost_user::Error::Disconnected) => return Ok(()),
            Err(error) => return Err(io::Error::other(error)),
        }
    }
}

struct Session {
    floor: Floor,
    poll: Duration,
    features: Features,
    memory: Option<Memory>,
    rings: Vec<Settings>,
}

/// A guest's memory, and its regions as the front-end sees them: address there, size, address in the guest.
struct Memory {
    mapped: Arc<GuestMemoryMmap>,
    regions: Vec<(u64, u64, u64)>,
}

/// What is known of a ring.
#[derive(Default)]
struct Settings {
    size: u16,
    addr: Option<VringAddr>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
}

fn missing() -> io::Error {
    io::Error::other("enabled before it was set up")
}

impl Session {
    fn ring(&mut self, index: u32) -> io::Result<&mut Settings> {
        let index = usize::try_from(index).ok().filter(|index| (*index as u64) < QUEUES);
        let index = index.ok_or_else(|| io::Error::other("no such ring"))?;
        if self.rings.len() <= index {
            self.rings.resize_with(index + 1, Settings::default);
        }
        self.rings.get_mut(index).ok_or_else(missing)
    }

    fn answer(&mut self, request: FrontendRequest) -> io::Result<Answer> {
        let ring =
            Features::VERSION_1 | Features::INDIRECT_DESC | Features::EVENT_IDX | Features::RING_PACKED;
        Ok(match request {
            FrontendRequest::GetFeatures => Answer::U64(ring.low64() | F_PROTOCOL_FEATURES),
            FrontendRequest::SetFeatures(bits) => {
                self.features = Features::from(bits & !F_PROTOCOL_FEATURES);
                Answer::Done
            }
            FrontendRequest::GetProtocolFeatures => {
                Answer::U64((ProtocolFeatures::MQ | ProtocolFeatures::REPLY_ACK).bits())
            }
            FrontendRequest::GetQueueNum => Answer::U64(QUEUES),
            FrontendRequest::SetMemTable(regions) => {
                let table = regions.iter().map(|(r, _)| (r.user_addr, r.size, r.guest_addr)).collect();
                let mut ranges = Vec::new();
                for (region, fd) in regions {
                    let file = FileOffset::from_arc(Arc::new(File::from(fd)), region.mmap_offset);
                    let size = usize::try_from(region.size).map_err(io::Error::other)?;
                    ranges.push((GuestAddress(region.guest_addr), size, Some(file)));
                }
                let mapped =
                    GuestMemoryMmap::<()>::from_ranges_with_files(ranges).map_err(io::Error::other)?;
                self.memory = Some(Memory { mapped: Arc::new(mapped), regions: table });
                Answer::Done
            }
            FrontendRequest::SetVringNum { index, num } => {
                self.ring(index)?.size = u16::try_from(num).map_err(io::Error::other)?;
                Answer::Done
            }
            FrontendRequest::SetVringAddr(addr) => {
                self.ring(addr.index)?.addr = Some(addr);
                Answer::Done
            }
            FrontendRequest::SetVringKick { index, fd } => {
                self.ring(index)?.kick = fd;
                Answer::Done
            }
            FrontendRequest::SetVringCall { index, fd } => {
                self.ring(index)?.call = fd;
                Answer::Done
            }
            FrontendRequest::SetVringEnable { index, enable: true } => {
                self.start(index)?;
                Answer::Done
            }
            FrontendRequest::GetVringBase { .. } => Answer::VringBase(0),
            _ => Answer::Done,
        })
    }

    /// The ring's thread, for as long as the process lives.
    fn start(&mut self, index: u32) -> io::Result<()> {
        let ring = self.ring(index)?;
        let (Some(addr), Some(kick), Some(call)) = (ring.addr, ring.kick.take(), ring.call.take()) else {
            return Err(missing());
        };
        let size = ring.size;
        let memory = self.memory.as_ref().ok_or_else(missing)?;
        let guest_addr = |user: u64| {
            let mut regions = memory.regions.iter();
            let region = regions.find(|(base, size, _)| user >= *base && user - base < *size);
            region.map(|(base, _, guest)| GuestAddress(guest + (user - base))).ok_or_else(missing)
        };
        let at = [guest_addr(addr.desc)?, guest_addr(addr.avail)?, guest_addr(addr.used)?];
        // A blocking read is the cheapest way to sleep.
        let flags = rustix::fs::fcntl_getfl(&kick)?;
        rustix::fs::fcntl_setfl(&kick, flags - OFlags::NONBLOCK)?;
        let thread = Thread {
            memory: Arc::clone(&memory.mapped),
            features: self.features,
            size,
            at,
            poll: self.poll,
            kick,
            call,
        };
        let floor = self.floor.clone();
        thread::Builder::new().name("floor".to_owned()).spawn(move || {
            let name = floor.name();
            let ended = match floor {
                Floor::Ring => thread.walk(Nothing::default()),
                Floor::Random => thread.walk(Random),
                Floor::Status => thread.walk(StatusOnly::default()),
                Floor::Write(path) => Output::open(&path, false).and_then(|work| thread.walk(work)),
                Floor::WriteBatch(path) => Output::open(&path, true).and_then(|work| thread.walk(work)),
                Floor::File(path) => OneCall::open(&path).and_then(|work| thread.walk(work)),
            };
            if let Err(error) = ended {
                eprintln!("{name}: {error}");
                process::exit(1);
            }
        })?;
        Ok(())
    }
}

/// What a ring's thread is given.
struct Thread {
    memory: Arc<GuestMemoryMmap>,
    features: Features,
    size: u16,
    at: [GuestAddress; 3],
    poll: Duration,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Thread {
    fn walk(&self, work: impl Work) -> io::Result<()> {
        Ring::new(&self.memory, self.features, self.size, self.at, work)
            .run(self.poll, &self.kick, &self.call)
    }
}
