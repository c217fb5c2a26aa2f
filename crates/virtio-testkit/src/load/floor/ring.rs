//! The walk of the ring: either layout, through bare pointers.
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU16, AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, VolatileSlice};
use vm_virtio::Features;

use super::work::Work;
use crate::RingLayout;
use crate::load::ring::{field, lengths, packed_passed, passed};
use crate::ring::{DESC_INDIRECT, DESC_NEXT, DESC_WRITE, PACKED_AVAIL, PACKED_USED};

/// One ring, either layout, and what is done for each of its chains.
pub(super) struct Ring<'m, W> {
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
    work: W,
}

fn broken(what: &str) -> io::Error {
    io::Error::other(format!("the ring is broken: {what}"))
}

impl<'m, W: Work> Ring<'m, W> {
    pub(super) fn new(
        memory: &'m GuestMemoryMmap,
        features: Features,
        size: u16,
        at: [GuestAddress; 3],
        work: W,
    ) -> Ring<'m, W> {
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
            work,
        }
    }

    /// Serves until the process ends. Looks at the ring for `poll` before it sleeps.
    pub(super) fn run(&mut self, poll: Duration, kick: &OwnedFd, call: &OwnedFd) -> io::Result<()> {
        let mut count = [0; 8];
        loop {
            loop {
                let done = if self.packed { self.drain_packed()? } else { self.drain_split()? };
                if done && self.interrupt_wanted() {
                    let _ = rustix::io::write(call, &1u64.to_ne_bytes());
                }
                // Nobody asks for kicks while it looks: an event index that is passed stays passed.
                if !self.appears_within(poll) && !self.arm() {
                    break;
                }
            }
            rustix::io::retry_on_intr(|| rustix::io::read(kick, &mut count))?;
        }
    }

    fn appears_within(&self, poll: Duration) -> bool {
        if poll.is_zero() {
            return false;
        }
        let end = Instant::now() + poll;
        while !self.is_ready() {
            if Instant::now() > end {
                return false;
            }
            std::hint::spin_loop();
        }
        true
    }

    /// Whether a chain is available.
    fn is_ready(&self) -> bool {
        if !self.packed {
            return u16::from_le(field::<AtomicU16>(&self.driver, 2).load(Ordering::Acquire)) != self.next;
        }
        let word = field::<AtomicU64>(&self.desc, usize::from(self.next) * 16 + 8).load(Ordering::Acquire);
        let flags = (u64::from_le(word) >> 48) as u16;
        (flags & PACKED_AVAIL != 0) == self.wrap && (flags & PACKED_USED != 0) != self.wrap
    }

    fn drain_split(&mut self) -> io::Result<bool> {
        let avail = u16::from_le(field::<AtomicU16>(&self.driver, 2).load(Ordering::Acquire));
        let mask = self.size - 1;
        let first = self.used;
        while self.next != avail {
            let at = 4 + 2 * usize::from(self.next & mask);
            let head = u16::from_le(field::<AtomicU16>(&self.driver, at).load(Ordering::Relaxed));
            self.next = self.next.wrapping_add(1);
            let written = self.serve_split(head)?;
            let at = 4 + 8 * usize::from(self.used & mask);
            let entry = u64::from(head) | u64::from(written) << 32;
            // 2.7.8: entries of eight bytes, aligned to four only.
            field::<AtomicU32>(&self.device, at).store((entry as u32).to_le(), Ordering::Relaxed);
            field::<AtomicU32>(&self.device, at + 4).store(written.to_le(), Ordering::Relaxed);
            self.used = self.used.wrapping_add(1);
        }
        self.work.batch()?;
        field::<AtomicU16>(&self.device, 2).store(self.used.to_le(), Ordering::Release);
        Ok(self.used != first)
    }

    fn serve_split(&mut self, head: u16) -> io::Result<u32> {
        let (addr, len, flags, next) = element(&self.desc, head);
        if flags & DESC_INDIRECT == 0 {
            return self.serve_list(&self.desc.clone(), (addr, len, flags, next), self.size);
        }
        let table = self.memory.get_slice(GuestAddress(addr), len as usize).map_err(io::Error::other)?;
        let first = element(&table, 0);
        self.serve_list(&table, first, (len / 16) as u16)
    }

    /// The elements from `entry` on, linked by their `next`.
    fn serve_list(
        &mut self,
        table: &VolatileSlice<'_>,
        mut entry: (u64, u32, u16, u16),
        size: u16,
    ) -> io::Result<u32> {
        let mut written = 0;
        for _ in 0..size {
            written += self.serve(entry.0, entry.1, entry.2)?;
            if entry.2 & DESC_NEXT == 0 {
                return Ok(written + self.work.end()?);
            }
            if entry.3 >= size {
                break;
            }
            entry = element(table, entry.3);
        }
        Err(broken("a chain does not end"))
    }

    fn serve(&mut self, addr: u64, len: u32, flags: u16) -> io::Result<u32> {
        let writable = flags & DESC_WRITE != 0;
        if !writable && !W::READS {
            return Ok(0);
        }
        let buffer = self.memory.get_slice(GuestAddress(addr), len as usize).map_err(io::Error::other)?;
        self.work.element(&buffer, writable)
    }

    fn drain_packed(&mut self) -> io::Result<bool> {
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
                    written += self.serve(addr, len, flags)?;
                }
                self.step(1);
            } else {
                (count, written) = (0, 0);
                let mut more = true;
                while more {
                    let (addr, len, flags, last_id) = packed_element(&self.desc, self.next);
                    written += self.serve(addr, len, flags)?;
                    (more, id) = (flags & DESC_NEXT != 0, last_id);
                    self.step(1);
                    count += 1;
                    if count > self.size {
                        return Err(broken("a chain does not end"));
                    }
                }
            }
            written += self.work.end()?;
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
        self.work.batch()?;
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
        } else if self.event_idx {
            let word = u32::from(self.next) | u32::from(self.wrap) << 15 | 2 << 16;
            field::<AtomicU32>(&self.device, 0).store(word.to_le(), Ordering::Relaxed);
        }
        fence(Ordering::SeqCst);
        self.is_ready()
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
