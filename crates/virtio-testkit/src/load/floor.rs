//! The floor: the least that a synchronous back-end does for a request, to measure others by.
//!
//! It speaks just enough of vhost-user to be driven like any back-end, one connection and one queue, and then one thread
//! walks the ring: read the kick, take every chain, do the one thing that [`Floor`] names for each, make them used with
//! one store, interrupt if that is wanted, ask for the next kick. It has no failure policy (a broken ring ends the
//! process), no state to stop at, no limits. **Not a device**: for a process of its own, started by the one who measures.
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::process;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use vhost_user::{
    Answer, BackendEndpoint, F_PROTOCOL_FEATURES, FrontendRequest, MemoryRegion, ProtocolFeatures, VringAddr,
};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};
use vm_virtio::Features;

use super::ring::{field, lengths, packed_passed, passed};
use crate::RingLayout;
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, PACKED_AVAIL, PACKED_USED};

/// What a floor does for each request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Floor {
    /// Nothing but a number at the start of the buffer, so that answers differ.
    #[default]
    Ring,
    /// getrandom(2) into the buffer.
    Random,
}

impl Floor {
    /// All of them.
    pub const ALL: [Floor; 2] = [Floor::Ring, Floor::Random];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Floor::Ring => "floor-ring",
            Floor::Random => "floor-getrandom",
        }
    }
}

/// Serves one front-end until it goes away.
///
/// # Errors
/// The connection's.
pub fn serve(socket: UnixStream, floor: Floor) -> io::Result<()> {
    let stream = socket.try_clone()?;
    let mut session = Session { floor, ..Session::default() };
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

#[derive(Default)]
struct Session {
    floor: Floor,
    features: Features,
    regions: Vec<(MemoryRegion, OwnedFd)>,
    size: u16,
    addr: Option<VringAddr>,
    kick: Option<OwnedFd>,
    call: Option<OwnedFd>,
}

impl Session {
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
            FrontendRequest::GetQueueNum => Answer::U64(1),
            FrontendRequest::SetMemTable(regions) => {
                self.regions = regions;
                Answer::Done
            }
            FrontendRequest::SetVringNum { num, .. } => {
                self.size = u16::try_from(num).map_err(io::Error::other)?;
                Answer::Done
            }
            FrontendRequest::SetVringAddr(addr) => {
                self.addr = Some(addr);
                Answer::Done
            }
            FrontendRequest::SetVringKick { fd, .. } => {
                self.kick = fd;
                Answer::Done
            }
            FrontendRequest::SetVringCall { fd, .. } => {
                self.call = fd;
                Answer::Done
            }
            FrontendRequest::SetVringEnable { enable: true, .. } => {
                self.start()?;
                Answer::Done
            }
            FrontendRequest::GetVringBase { .. } => Answer::VringBase(0),
            _ => Answer::Done,
        })
    }

    /// The ring's thread, for as long as the process lives.
    fn start(&mut self) -> io::Result<()> {
        let missing = || io::Error::other("enabled before it was set up");
        let (Some(addr), Some(kick), Some(call)) = (self.addr, self.kick.take(), self.call.take()) else {
            return Err(missing());
        };
        let guest_addr = |user: u64| {
            let region = self.regions.iter().map(|(region, _)| region);
            let mut region = region.filter(|r| user >= r.user_addr && user - r.user_addr < r.size);
            region.next().map(|r| GuestAddress(r.guest_addr + (user - r.user_addr))).ok_or_else(missing)
        };
        let (desc, avail, used) = (guest_addr(addr.desc)?, guest_addr(addr.avail)?, guest_addr(addr.used)?);
        let mut ranges = Vec::new();
        for (region, fd) in self.regions.drain(..) {
            let file = FileOffset::from_arc(Arc::new(File::from(fd)), region.mmap_offset);
            let size = usize::try_from(region.size).map_err(io::Error::other)?;
            ranges.push((GuestAddress(region.guest_addr), size, Some(file)));
        }
        let memory = GuestMemoryMmap::<()>::from_ranges_with_files(ranges).map_err(io::Error::other)?;
        // A blocking read is the cheapest way to sleep.
        let flags = rustix::fs::fcntl_getfl(&kick)?;
        rustix::fs::fcntl_setfl(&kick, flags - OFlags::NONBLOCK)?;
        let (floor, features, size) = (self.floor, self.features, self.size);
        thread::Builder::new().name("floor".to_owned()).spawn(move || {
            let mut ring = Ring::new(&memory, features, size, [desc, avail, used]);
            if let Err(error) = ring.run(floor, &kick, &call) {
                eprintln!("{}: {error}", floor.name());
                process::exit(1);
            }
        })?;
        Ok(())
    }
}

/// One ring, either layout.
struct Ring<'m> {
    memory: &'m GuestMemoryMmap,
    packed: bool,
    event_idx: bool,
    size: u16,
    desc: VolatileSlice<'m>,
    driver: VolatileSlice<'m>,
    device: VolatileSlice<'m>,
    /// Positions; the wrap counters are for packed rings.
    next: u16,
    wrap: bool,
    used: u16,
    used_wrap: bool,
    /// `used` at the last decision about an interrupt, and what was completed since (packed).
    mark: u16,
    completed: u16,
    serial: u64,
}

fn broken(what: &str) -> io::Error {
    io::Error::other(format!("the ring is broken: {what}"))
}

impl<'m> Ring<'m> {
    fn new(memory: &'m GuestMemoryMmap, features: Features, size: u16, at: [GuestAddress; 3]) -> Ring<'m> {
        let packed = features.contains(Features::RING_PACKED);
        let [desc, driver, device] =
            lengths(if packed { RingLayout::Packed } else { RingLayout::Split }, size);
        let area = |addr, len: u64| memory.get_slice(addr, len as usize).expect("a ring in guest memory");
        Ring {
            memory,
            packed,
            event_idx: features.contains(Features::EVENT_IDX),
            size,
            desc: area(at[0], desc),
            driver: area(at[1], driver),
            device: area(at[2], device),
            next: 0,
            wrap: true,
            used: 0,
            used_wrap: true,
            mark: 0,
            completed: 0,
            serial: 0,
        }
    }

    fn run(&mut self, floor: Floor, kick: &OwnedFd, call: &OwnedFd) -> io::Result<()> {
        let mut count = [0; 8];
        loop {
            loop {
                let done = if self.packed { self.drain_packed(floor)? } else { self.drain_split(floor)? };
                if done && self.interrupt_wanted() {
                    let _ = rustix::io::write(call, &1u64.to_ne_bytes());
                }
                if !self.arm() {
                    break;
                }
            }
            rustix::io::retry_on_intr(|| rustix::io::read(kick, &mut count))?;
        }
    }

    fn drain_split(&mut self, floor: Floor) -> io::Result<bool> {
        let avail = u16::from_le(field::<AtomicU16>(&self.driver, 2).load(Ordering::Acquire));
        let mask = self.size - 1;
        let first = self.used;
        while self.next != avail {
            let at = 4 + 2 * usize::from(self.next & mask);
            let head = u16::from_le(field::<AtomicU16>(&self.driver, at).load(Ordering::Relaxed));
            self.next = self.next.wrapping_add(1);
            let written = self.serve_split(floor, head)?;
            let at = 4 + 8 * usize::from(self.used & mask);
            let entry = u64::from(head) | u64::from(written) << 32;
            // 2.7.8: entries of eight bytes, aligned to four only.
            field::<AtomicU32>(&self.device, at).store((entry as u32).to_le(), Ordering::Relaxed);
            field::<AtomicU32>(&self.device, at + 4).store(written.to_le(), Ordering::Relaxed);
            self.used = self.used.wrapping_add(1);
        }
        field::<AtomicU16>(&self.device, 2).store(self.used.to_le(), Ordering::Release);
        Ok(self.used != first)
    }

    fn serve_split(&mut self, floor: Floor, head: u16) -> io::Result<u32> {
        let (addr, len, flags, next) = element(&self.desc, head);
        if flags & DESC_INDIRECT == 0 {
            return self.serve_list(floor, &self.desc.clone(), (addr, len, flags, next), self.size);
        }
        let table = self.memory.get_slice(GuestAddress(addr), len as usize).map_err(io::Error::other)?;
        let first = element(&table, 0);
        self.serve_list(floor, &table, first, (len / 16) as u16)
    }

    /// The elements from `entry` on, linked by their `next`.
    fn serve_list(
        &mut self,
        floor: Floor,
        table: &VolatileSlice<'_>,
        mut entry: (u64, u32, u16, u16),
        size: u16,
    ) -> io::Result<u32> {
        let mut written = 0;
        for _ in 0..size {
            written += self.serve(floor, entry.0, entry.1, entry.2)?;
            if entry.2 & DESC_NEXT == 0 {
                return Ok(written);
            }
            if entry.3 >= size {
                break;
            }
            entry = element(table, entry.3);
        }
        Err(broken("a chain does not end"))
    }

    fn serve(&mut self, floor: Floor, addr: u64, len: u32, flags: u16) -> io::Result<u32> {
        if flags & DESC_WRITE == 0 {
            return Ok(0);
        }
        let buffer = self.memory.get_slice(GuestAddress(addr), len as usize).map_err(io::Error::other)?;
        match floor {
            Floor::Ring => {
                self.serial += 1;
                let number = self.serial.to_ne_bytes();
                let _ = buffer.write(&number, 0);
            }
            Floor::Random => random(&buffer)?,
        }
        Ok(len)
    }

    fn drain_packed(&mut self, floor: Floor) -> io::Result<bool> {
        let mut first: Option<(u16, u64)> = None;
        let mut any = 0;
        loop {
            let at = self.next;
            let word = field::<AtomicU64>(&self.desc, usize::from(at) * 16 + 8).load(Ordering::Acquire);
            let flags = (u64::from_le(word) >> 48) as u16;
            let (avail, used) = (flags & PACKED_AVAIL != 0, flags & PACKED_USED != 0);
            if avail != self.wrap || used == self.wrap {
                break;
            }
            let (mut count, mut written, mut id);
            let (addr, len, flags, _) = packed_element(&self.desc, at);
            id = (u64::from_le(word) >> 32) as u16;
            if flags & DESC_INDIRECT != 0 {
                let table =
                    self.memory.get_slice(GuestAddress(addr), len as usize).map_err(io::Error::other)?;
                (count, written) = (1, 0);
                for n in 0..(len / 16) as u16 {
                    let (addr, len, flags, _) = packed_element(&table, n);
                    written += self.serve(floor, addr, len, flags)?;
                }
                self.step(1);
            } else {
                (count, written) = (0, 0);
                let mut more = true;
                while more {
                    let (addr, len, flags, last_id) = packed_element(&self.desc, self.next);
                    written += self.serve(floor, addr, len, flags)?;
                    (more, id) = (flags & DESC_NEXT != 0, last_id);
                    self.step(1);
                    count += 1;
                    if count > self.size {
                        return Err(broken("a chain does not end"));
                    }
                }
            }
            let turn = if self.used_wrap { PACKED_AVAIL | PACKED_USED } else { 0 };
            let word = u64::from(written) | u64::from(id) << 32 | u64::from(turn) << 48;
            // 2.8.21.1: the first of a batch becomes used last.
            match first {
                None => first = Some((self.used, word)),
                Some(_) => {
                    let at = usize::from(self.used) * 16 + 8;
                    field::<AtomicU64>(&self.desc, at).store(word.to_le(), Ordering::Relaxed);
                }
            }
            self.used += count;
            if self.used >= self.size {
                (self.used, self.used_wrap) = (self.used - self.size, !self.used_wrap);
            }
            any += count;
        }
        if let Some((at, word)) = first {
            let at = usize::from(at) * 16 + 8;
            field::<AtomicU64>(&self.desc, at).store(word.to_le(), Ordering::Release);
        }
        self.completed += any;
        Ok(any > 0)
    }

    fn step(&mut self, by: u16) {
        self.next += by;
        if self.next >= self.size {
            (self.next, self.wrap) = (self.next - self.size, !self.wrap);
        }
    }

    fn interrupt_wanted(&mut self) -> bool {
        fence(Ordering::SeqCst);
        if !self.packed {
            let old = std::mem::replace(&mut self.mark, self.used);
            let load = |at| u16::from_le(field::<AtomicU16>(&self.driver, at).load(Ordering::Relaxed));
            return match self.event_idx {
                true => passed(load(4 + 2 * usize::from(self.size)), self.used, old),
                false => load(0) & 1 == 0,
            };
        }
        let completed = std::mem::take(&mut self.completed);
        packed_passed(field(&self.driver, 0), self.size, (self.used, self.used_wrap), completed)
    }

    /// Asks for the next kick. Whether there is something already.
    fn arm(&mut self) -> bool {
        if !self.packed {
            if self.event_idx {
                let at = 4 + 8 * usize::from(self.size);
                field::<AtomicU16>(&self.device, at).store(self.next.to_le(), Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            return u16::from_le(field::<AtomicU16>(&self.driver, 2).load(Ordering::Acquire)) != self.next;
        }
        if self.event_idx {
            let word = u32::from(self.next) | u32::from(self.wrap) << 15 | 2 << 16;
            field::<AtomicU32>(&self.device, 0).store(word.to_le(), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        let word = field::<AtomicU64>(&self.desc, usize::from(self.next) * 16 + 8).load(Ordering::Acquire);
        let flags = (u64::from_le(word) >> 48) as u16;
        (flags & PACKED_AVAIL != 0) == self.wrap && (flags & PACKED_USED != 0) != self.wrap
    }
}

/// Address, length, flags, next.
fn element(table: &VolatileSlice<'_>, at: u16) -> (u64, u32, u16, u16) {
    let load = |offset| u64::from_le(field::<AtomicU64>(table, offset).load(Ordering::Relaxed));
    let word = load(usize::from(at) * 16 + 8);
    (load(usize::from(at) * 16), word as u32, (word >> 32) as u16, (word >> 48) as u16)
}

/// Address, length, flags, id.
fn packed_element(table: &VolatileSlice<'_>, at: u16) -> (u64, u32, u16, u16) {
    let (addr, len, id, flags) = element(table, at);
    (addr, len, flags, id)
}

/// getrandom(2) into guest memory.
#[allow(unsafe_code)]
fn random(buffer: &VolatileSlice<'_>) -> io::Result<()> {
    let guard = buffer.ptr_guard_mut();
    let mut done = 0;
    while done < buffer.len() {
        // SAFETY: the kernel writes at most the rest of the buffer, which the guard keeps mapped and no Rust
        // reference covers.
        let more = unsafe { libc::getrandom(guard.as_ptr().add(done).cast(), buffer.len() - done, 0) };
        done += usize::try_from(more).map_err(|_| io::Error::last_os_error())?;
    }
    Ok(())
}
