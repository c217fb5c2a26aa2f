//! How one lane's requests get to the image: by the lane itself, by io_uring, or on the host's blocking pool.
//!
//! The rule ([`Aio::Auto`]), from what was measured: a transfer that the host's cache can serve costs least as one system
//! call on the lane, so that is tried first, in a way that comes back instead of waiting (`RWF_NOWAIT`). What would wait,
//! direct transfers and those of block devices go through io_uring, a batch a turn; flushes too. Everything else, and
//! everything where there is no io_uring, goes to the pool.
//!
//! Where a file system writes to its cache but cannot say whether that would wait (ext4, for one), the lane writes and looks
//! at the clock: once several writes in a short while have taken long, the next ones go through io_uring for a while. One
//! alone proves nothing: the thread may just have lost its CPU.
//!
//! Invariant: a request that is taken comes back from [`Io::next`] exactly once, or is dropped after
//! [`Io::give_up`]; its payload, which keeps the guest's memory in place, is owned by whoever works on it.
mod pool;
mod ring;

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use reactor::{BlockingPool, Interest, Reactor, Token};

use crate::backend::{Image, Payload, RawFile, syscall};
use crate::request::Range;

use pool::Pool;
use ring::Ring;

/// Completions of io_uring.
pub(crate) const RING: Token = Token::new(1);
/// Results of the pool.
pub(crate) const POOL: Token = Token::new(2);

/// Larger transfers are not made by the lane, which has other work: 1 MiB.
const LARGE: u64 = 1 << 20;

/// A write of the lane that took longer has waited for the disk.
const LONG: Duration = Duration::from_millis(2);
/// What it weighs against each that did not.
const WEIGHT: u8 = 8;
/// How much is too much: three of ten, say.
const TOO_MUCH: u8 = 16;
/// For how long writes go another way then.
const AVOID: Duration = Duration::from_millis(500);

/// How requests get to a raw image.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[cfg_attr(feature = "daemon", derive(clap::ValueEnum))]
pub enum Aio {
    /// What the host's cache can serve by the lane itself, the rest by io_uring.
    #[default]
    Auto,
    /// All by io_uring.
    #[cfg_attr(feature = "daemon", value(name = "io_uring", alias = "io-uring"))]
    IoUring,
    /// All on threads that may block.
    Threads,
}

/// What is to be done to the image.
#[derive(Debug)]
pub(crate) enum Action {
    /// From this byte on, which moves on with the payload.
    Read(u64),
    Write {
        offset: u64,
        /// On the storage before it is answered.
        stable: bool,
    },
    Flush,
    Discard(Vec<Range>),
    WriteZeroes {
        ranges: Vec<Range>,
        stable: bool,
    },
}

/// One request on its way.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) payload: Payload,
    pub(crate) action: Action,
    /// Bytes of data that count as written when all went well.
    pub(crate) fills: u64,
    /// Of which life of the queue.
    pub(crate) epoch: u32,
}

/// What comes back.
pub(crate) enum Done {
    Request(Request, io::Result<()>),
    /// The size of the image in bytes, after it was changed or looked at.
    Size(io::Result<u64>),
}

/// What an image on threads of its own can do for a request.
fn carry_out(image: &dyn Image, request: &mut Request, wanted: &dyn Fn() -> bool) -> io::Result<()> {
    let payload = &mut request.payload;
    match &request.action {
        Action::Read(offset) => image.read(*offset, payload),
        Action::Write { offset, stable } => image.write(*offset, payload, *stable),
        Action::Flush => image.flush(),
        Action::Discard(ranges) => {
            for Range { offset, len, .. } in ranges.iter().filter(|range| range.len > 0) {
                if !wanted() {
                    return Err(io::ErrorKind::Interrupted.into());
                }
                image.discard(*offset, *len)?;
            }
            Ok(())
        }
        Action::WriteZeroes { ranges, stable } => {
            for Range { offset, len, unmap } in ranges.iter().filter(|range| range.len > 0) {
                image.write_zeroes(*offset, *len, *unmap, wanted)?;
            }
            if *stable { image.flush() } else { Ok(()) }
        }
    }
}

/// What the lane itself knows of a raw file that the host caches.
#[derive(Clone, Copy)]
struct Quick {
    /// The kernel says when a read would wait.
    reads: bool,
    /// The same for writes.
    writes: bool,
    /// Nothing waits for long: the file is in memory.
    in_memory: bool,
    /// Rises with each write that took long, sinks with each that did not.
    slowness: u8,
    /// Writes go another way until then.
    avoid: Option<Instant>,
}

/// One lane's way to the image.
pub(crate) struct Io {
    image: Arc<dyn Image>,
    aio: Aio,
    quick: Option<Quick>,
    /// None: not needed yet, or not to be had.
    ring: Option<Ring>,
    no_ring: bool,
    entries: u16,
    host: BlockingPool,
    pool: Option<Pool>,
    /// For requests that no thread could be asked for.
    failed: Vec<Request>,
}

impl Io {
    /// `entries` requests at most are out at a time.
    pub(crate) fn new(image: Arc<dyn Image>, aio: Aio, entries: u16, host: BlockingPool) -> Io {
        let raw = image.raw().filter(|raw| raw.is_cached() && !raw.is_device());
        let quick = raw.filter(|_| aio == Aio::Auto).map(|raw| Quick {
            reads: true,
            writes: true,
            in_memory: raw.is_in_memory(),
            slowness: 0,
            avoid: None,
        });
        let no_ring = image.raw().is_none() || aio == Aio::Threads;
        Io { image, aio, quick, ring: None, no_ring, entries, host, pool: None, failed: Vec::new() }
    }

    /// Carries a request out if that takes no waiting. None: [begin](Self::begin) it; of a transfer, a part may be done.
    #[inline]
    pub(crate) fn attempt(&mut self, request: &mut Request) -> Option<io::Result<()>> {
        if let (Some(quick), Some(raw)) = (&mut self.quick, self.image.raw()) {
            return quick.attempt(raw, request);
        }
        if self.image.blocks() { None } else { Some(carry_out(&*self.image, request, &|| true)) }
    }

    /// Takes a request that takes a while.
    pub(crate) fn begin(&mut self, request: Request, reactor: &mut Reactor) {
        match self.offer_to_ring(request, reactor) {
            None => {}
            Some(request) => match self.pool(reactor) {
                Some(pool) => pool.begin(request),
                None => self.failed.push(request),
            },
        }
    }

    /// Looks at the image's size, after changing it if that is wanted. False if that cannot be begun.
    pub(crate) fn begin_resize(&mut self, bytes: Option<u64>, reactor: &mut Reactor) -> bool {
        self.pool(reactor).is_some_and(|pool| pool.begin_resize(bytes))
    }

    /// Gives the request to io_uring if that is its way.
    fn offer_to_ring(&mut self, request: Request, reactor: &mut Reactor) -> Option<Request> {
        let image = Arc::clone(&self.image);
        let Some(raw) = image.raw() else { return Some(request) };
        let fits = match &request.action {
            Action::Read(offset) | Action::Write { offset, .. } => raw.takes(*offset, &request.payload),
            Action::Flush => raw.check_losses().is_ok(),
            Action::Discard(_) | Action::WriteZeroes { .. } => false,
        };
        if !fits || self.no_ring {
            return Some(request);
        }
        if self.ring.is_none() {
            let ring = Ring::new(raw, self.entries).and_then(|ring| {
                reactor.watch(ring.as_fd(), RING, Interest::READ_EDGE)?;
                Ok(ring)
            });
            match ring {
                Ok(ring) => self.ring = Some(ring),
                Err(error) => {
                    if self.aio == Aio::IoUring {
                        tracing::warn!(%error, "there is no io_uring here; threads serve the disk instead");
                    }
                    self.no_ring = true;
                    return Some(request);
                }
            }
        }
        // What the host has in its cache would be copied by the lane all the same.
        let elsewhere = raw.is_cached() && request.payload.left() > LARGE;
        match &mut self.ring {
            Some(ring) => ring.begin(request, elsewhere),
            None => Some(request),
        }
    }

    fn pool(&mut self, reactor: &mut Reactor) -> Option<&mut Pool> {
        if self.pool.is_none() {
            let pool = Pool::new(&self.host, Arc::clone(&self.image)).and_then(|pool| {
                reactor.watch(pool.as_fd(), POOL, Interest::READ_EDGE)?;
                Ok(pool)
            });
            match pool {
                Ok(pool) => self.pool = Some(pool),
                Err(error) => tracing::warn!(%error, "no thread for a request that takes a while"),
            }
        }
        self.pool.as_mut()
    }

    /// Hands what was collected to the kernel. Whether there was something: some of it may be done by now.
    pub(crate) fn flush(&mut self) -> bool {
        self.ring.as_mut().is_some_and(Ring::submit)
    }

    /// Whether something may have come back: without a system call.
    pub(crate) fn has_news(&mut self) -> bool {
        self.ring.as_mut().is_some_and(Ring::has_news)
    }

    /// The next that is done, in whatever order.
    pub(crate) fn next(&mut self) -> Option<Done> {
        if let Some(request) = self.failed.pop() {
            return Some(Done::Request(request, Err(io::ErrorKind::OutOfMemory.into())));
        }
        if let Some(ring) = &mut self.ring
            && let Some((request, result)) = ring.next()
        {
            if let (Action::Flush, Some(raw)) = (&request.action, self.image.raw()) {
                raw.note_flush(&result);
            }
            return Some(Done::Request(request, result));
        }
        self.pool.as_mut()?.next()
    }

    /// What is under way is not wanted any more: it ends as soon as it can, and comes back or is dropped.
    pub(crate) fn give_up(&mut self) {
        if let Some(ring) = &mut self.ring {
            ring.cancel();
        }
        if let Some(pool) = &mut self.pool {
            pool.forget();
        }
        self.failed.clear();
    }
}

/// Whether the kernel says that it would have to wait.
fn would_wait(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

fn is_unsupported(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EOPNOTSUPP)
}

impl Quick {
    #[inline]
    fn attempt(&mut self, raw: &RawFile, request: &mut Request) -> Option<io::Result<()>> {
        let payload = &mut request.payload;
        match &mut request.action {
            Action::Read(offset) if payload.left() <= LARGE => self.read(raw.file(), offset, payload),
            Action::Write { offset, stable: false } if payload.left() <= LARGE => {
                self.write(raw.file(), offset, payload)
            }
            _ => None,
        }
    }

    #[inline]
    fn read(&mut self, file: BorrowedFd<'_>, offset: &mut u64, to: &mut Payload) -> Option<io::Result<()>> {
        if to.left() == 0 {
            return Some(Ok(()));
        }
        let flags = if self.reads { libc::RWF_NOWAIT } else { 0 };
        if flags == 0 && !self.in_memory {
            return None;
        }
        match syscall::read(file, *offset, to, flags) {
            Ok(_) if to.left() == 0 => Some(Ok(())),
            // The end of what the cache has, or of the file: whoever goes on finds out.
            Ok(done) => {
                *offset += done as u64;
                None
            }
            Err(error) if would_wait(&error) => None,
            Err(error) if self.reads && is_unsupported(&error) => {
                self.reads = false;
                self.read(file, offset, to)
            }
            Err(error) => Some(Err(error)),
        }
    }

    /// A write that could have waited began then and has ended now.
    #[inline]
    fn took(&mut self, now: Instant, began: Instant) {
        if now.duration_since(began) <= LONG {
            self.slowness = self.slowness.saturating_sub(1);
            return;
        }
        self.slowness += WEIGHT;
        if self.slowness > TOO_MUCH {
            self.slowness = 0;
            self.avoid = Some(now + AVOID);
        }
    }

    #[inline]
    fn write(
        &mut self,
        file: BorrowedFd<'_>,
        offset: &mut u64,
        from: &mut Payload,
    ) -> Option<io::Result<()>> {
        if from.left() == 0 {
            return Some(Ok(()));
        }
        let flags = if self.writes { libc::RWF_NOWAIT } else { 0 };
        let began = (flags == 0 && !self.in_memory).then(Instant::now);
        if let (Some(now), Some(until)) = (began, self.avoid) {
            if now < until {
                return None;
            }
            self.avoid = None;
        }
        let result = syscall::write(file, *offset, from, flags);
        if let Some(began) = began {
            self.took(Instant::now(), began);
        }
        match result {
            Ok(_) if from.left() == 0 => Some(Ok(())),
            Ok(done) => {
                *offset += done as u64;
                None
            }
            Err(error) if would_wait(&error) => None,
            Err(error) if self.writes && is_unsupported(&error) => {
                self.writes = false;
                self.write(file, offset, from)
            }
            Err(error) => Some(Err(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::{Format, OpenOptions, open};
    use virtio_testkit::daemon::TempDir;

    const OPTIONS: OpenOptions =
        OpenOptions { format: Format::Raw, read_only: false, direct: false, lock: false };

    fn io(aio: Aio, direct: bool) -> (TempDir, Io) {
        let directory = TempDir::new();
        let path = directory.join("disk");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let image = open(&path, OpenOptions { direct, ..OPTIONS }).unwrap();
        (directory, Io::new(image, aio, 16, crate::Options::own_pool()))
    }

    fn request(action: Action, len: usize) -> Request {
        Request { payload: Payload::from_bytes(vec![9; len]), action, fills: 0, epoch: 0 }
    }

    /// Whether the lane does it itself.
    fn is_quick(io: &mut Io, action: Action, len: usize) -> bool {
        io.attempt(&mut request(action, len)).map(Result::unwrap).is_some()
    }

    fn write(stable: bool) -> Action {
        Action::Write { offset: 0, stable }
    }

    #[test]
    fn the_lane_does_what_the_cache_can_and_nothing_that_waits() {
        let (_directory, mut io) = io(Aio::Auto, false);
        assert!(is_quick(&mut io, Action::Read(4096), 4096));
        assert!(is_quick(&mut io, write(false), 4096));
        assert!(is_quick(&mut io, Action::Read(0), 1 << 20));
        for (action, len) in [
            (Action::Read(0), (1 << 20) + 512),
            (write(false), (1 << 20) + 512),
            (write(true), 512),
            (Action::Flush, 0),
            (Action::Discard(Vec::new()), 0),
            (Action::WriteZeroes { ranges: Vec::new(), stable: false }, 0),
        ] {
            assert!(!is_quick(&mut io, action, len));
        }
        assert!(!is_quick(&mut io, Action::Read((4 << 20) - 512), 1024), "beyond the end of the file");
    }

    #[test]
    fn a_way_that_is_asked_for_is_taken_always() {
        for (aio, direct) in [(Aio::IoUring, false), (Aio::Threads, false), (Aio::Auto, true)] {
            let (_directory, mut io) = io(aio, direct);
            assert!(!is_quick(&mut io, Action::Read(0), 4096));
            assert!(!is_quick(&mut io, write(false), 4096));
        }
    }

    #[test]
    fn after_slow_writes_others_go_another_way_for_a_while() {
        let (_directory, mut io) = io(Aio::Auto, false);
        let quick = io.quick.as_mut().unwrap();
        // As on a file system that cannot say whether a write would wait.
        (quick.writes, quick.in_memory) = (false, false);
        let now = Instant::now();
        let slow = now.checked_sub(2 * LONG).unwrap();
        // A CPU that is lost now and then is no disk that is slow.
        for _ in 0..100 {
            quick.took(now, slow);
            (0..WEIGHT).for_each(|_| quick.took(now, now));
        }
        assert_eq!((quick.avoid, quick.slowness), (None, 0));
        (0..2).for_each(|_| quick.took(now, slow));
        quick.took(now, now);
        assert_eq!(quick.avoid, None);
        let later = now + Duration::from_secs(3600);
        quick.took(later, slow);
        assert_eq!((quick.avoid, quick.slowness), (Some(later + AVOID), 0));
        assert!(!is_quick(&mut io, write(false), 512));
        assert!(is_quick(&mut io, Action::Read(0), 512), "reads are asked for without waiting");
        io.quick.as_mut().unwrap().avoid = Some(Instant::now());
        assert!(is_quick(&mut io, write(false), 512));
        assert_eq!(io.quick.unwrap().avoid, None);
    }
}
