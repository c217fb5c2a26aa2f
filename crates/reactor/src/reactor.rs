//! The reactor: an epoll, the watches in it, and the events it has collected.
//!
//! Two things make readiness interfaces treacherous, and both are excluded here by construction:
//!
//! * **Events that outlive their watch.** A wait collects a batch; handling the first event may end the watch of the
//!   second. Each registration therefore carries a key that is never used again (slot and generation), and an event
//!   is looked up by it only when it is handed out.
//! * **Descriptors that are closed or reused while they are registered.** epoll(7) keys a registration by number *and*
//!   open file: after a close it may live on unreachable, or a deletion may hit a stranger. The reactor registers a
//!   duplicate that only it knows, so the number is its own from registration to deletion. A watch keeps its file
//!   open: whoever wants the other end to see a close calls `unwatch` too.
//!
//! Both cost system calls and a descriptor for each file. Who has thousands, owns each of them alone and can tell which are gone
//! registers them as they are, see [`Registry`].

use std::collections::{HashMap, VecDeque};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::timers::Timers;
use crate::{Event, Interest, Readiness, Token, Trigger};

/// Most events that one wait takes from the kernel. The kernel goes round its ready list, so a larger number of
/// ready files is served over several waits without starving any.
const BATCH: usize = 64;

/// The key of the timerfd: no slot has this index.
const TIMER_KEY: u64 = u64::MAX;

/// Set in the keys of what is in a [`Registry`], and in the timerfd's.
const REGISTERED: u64 = 1 << 63;

/// Tells which files are ready and which timers are due. See the [crate documentation](crate) for its promises.
///
/// Not for sharing: the thread that owns it waits in it. [`AsFd`] gives its epoll, which is readable when something
/// is due, timers included: a reactor can be watched by another one, or by any poll(2).
pub struct Reactor {
    epoll: OwnedFd,
    timers: Timers,
    slots: Vec<Slot>,
    free: Vec<u32>,
    by_token: HashMap<Token, u32>,
    collected: VecDeque<(u64, EventFlags)>,
}

#[derive(Default)]
struct Slot {
    generation: u32,
    watch: Option<Watch>,
}

struct Watch {
    token: Token,
    /// Our own duplicate of the file.
    fd: OwnedFd,
}

impl Reactor {
    /// A reactor that watches nothing. Takes two file descriptors.
    pub fn new() -> io::Result<Reactor> {
        let epoll = epoll::create(CreateFlags::CLOEXEC)?;
        let timers = Timers::new()?;
        epoll::add(&epoll, timers.as_fd(), EventData::new_u64(TIMER_KEY), EventFlags::IN | EventFlags::ET)?;
        Ok(Reactor {
            epoll,
            timers,
            slots: Vec::new(),
            free: Vec::new(),
            by_token: HashMap::new(),
            collected: VecDeque::new(),
        })
    }

    /// Watches `fd` as `token`, in place of a former watch of that token.
    ///
    /// The watch is on the open file: it goes on when `fd` is closed, and holds the file open until
    /// [`unwatch`](Self::unwatch). The same file may be watched under several tokens.
    ///
    /// # Errors
    ///
    /// `EPERM` for a file that has no readiness (a regular file, a directory), `EMFILE` or `ENFILE` without
    /// descriptors left for the duplicate, `ENOSPC` at the user's limit of watches, `ELOOP` for reactors that would
    /// watch each other. A former watch of `token` then goes on unchanged.
    pub fn watch(&mut self, fd: BorrowedFd<'_>, token: Token, interest: Interest) -> io::Result<()> {
        let fd = rustix::io::fcntl_dupfd_cloexec(fd, 0)?;
        let index = match self.free.last() {
            Some(index) => *index,
            None => {
                // Far above any limit of descriptors, and the one index that the timer's key could meet is excluded.
                let index = u32::try_from(self.slots.len()).ok().filter(|index| *index != u32::MAX);
                let index = index.ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
                self.slots.push(Slot::default());
                self.free.push(index);
                index
            }
        };
        let Some(slot) = self.slots.get_mut(index as usize) else {
            return Err(io::ErrorKind::OutOfMemory.into());
        };
        epoll::add(&self.epoll, &fd, EventData::new_u64(key(index, slot.generation)), flags_of(interest))?;
        self.free.pop();
        slot.watch = Some(Watch { token, fd });
        if let Some(former) = self.by_token.insert(token, index) {
            self.release(former);
        }
        Ok(())
    }

    /// Ends the watch of `token`, if there is one. No event of it is handed out any more.
    pub fn unwatch(&mut self, token: Token) {
        if let Some(index) = self.by_token.remove(&token) {
            self.release(index);
        }
    }

    /// Ends every watch and timer whose token `keep` does not hold on to.
    pub fn retain(&mut self, mut keep: impl FnMut(Token) -> bool) {
        let gone: Vec<Token> = self.by_token.keys().copied().filter(|token| !keep(*token)).collect();
        for token in gone {
            self.unwatch(token);
        }
        self.timers.retain(keep);
    }

    /// Whether `token` has a watch.
    pub fn is_watched(&self, token: Token) -> bool {
        self.by_token.contains_key(&token)
    }

    /// Makes `token` have an [`Event::Timer`] once, not before `at`, in place of a former timer of that token.
    pub fn set_timer(&mut self, token: Token, at: std::time::Instant) {
        self.timers.set(token, at);
    }

    /// Ends the timer of `token`, if there is one. It is not handed out any more, even if it was due.
    pub fn cancel_timer(&mut self, token: Token) {
        self.timers.cancel(token);
    }

    /// Sleeps until something is ready or due, or `timeout` has passed, and collects events for [`next`](Self::next).
    ///
    /// `None` sleeps for as long as it takes, [`Duration::ZERO`] not at all. The time-out is rounded up to
    /// milliseconds; a timer is exact. Returns at once when events of an earlier wait have not all been taken, and
    /// may return with nothing: after a signal, or when a timer was pushed back.
    pub fn wait(&mut self, timeout: Option<Duration>) -> io::Result<()> {
        if !self.collected.is_empty() || self.timers.has_due() {
            return Ok(());
        }
        let timeout = timeout.map(|t| Timespec {
            tv_sec: t.as_secs().min(i32::MAX as u64) as _,
            tv_nsec: t.subsec_nanos() as _,
        });
        self.timers.settle();
        // On the stack: rustix's event is not `Send`, and a reactor moves to its thread.
        let mut buffer = [MaybeUninit::<epoll::Event>::uninit(); BATCH];
        let events = match epoll::wait(&self.epoll, &mut buffer[..], timeout.as_ref()) {
            Ok((events, _)) => events,
            // A signal: its handler has run, and the caller decides what comes next.
            Err(Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let mut fired = false;
        for event in events {
            let (data, flags) = (event.data, event.flags);
            match data.u64() {
                TIMER_KEY => fired = true,
                key => self.collected.push_back((key, flags)),
            }
        }
        self.timers.collect(fired);
        Ok(())
    }

    /// Hands out the next collected event. Handlers may watch, unwatch and set timers in between.
    #[expect(
        clippy::should_implement_trait,
        reason = "an iterator would borrow the reactor over the handler's call"
    )]
    pub fn next(&mut self) -> Option<Event> {
        while let Some((key, flags)) = self.collected.pop_front() {
            if key & REGISTERED != 0 {
                return Some(Event::Registered { number: key & !REGISTERED, ready: readiness_of(flags) });
            }
            let (index, generation) = (key as u32, (key >> 32) as u32);
            let Some(slot) = self.slots.get(index as usize) else { continue };
            if slot.generation != generation {
                continue;
            }
            if let Some(watch) = &slot.watch {
                return Some(Event::Ready { token: watch.token, ready: readiness_of(flags) });
            }
        }
        self.timers.next_due().map(|token| Event::Timer { token })
    }

    /// The way to register files as they are. Takes a file descriptor.
    ///
    /// # Errors
    ///
    /// `EMFILE` or `ENFILE` without descriptors left.
    pub fn registry(&self) -> io::Result<Registry> {
        Ok(Registry(rustix::io::fcntl_dupfd_cloexec(&self.epoll, 0)?))
    }

    /// Ends the registration in `index`.
    fn release(&mut self, index: u32) {
        let Some(slot) = self.slots.get_mut(index as usize) else { return };
        let Some(watch) = slot.watch.take() else { return };
        // The number is our own duplicate, so this deletes what was added and nothing else. It matters although the
        // duplicate is closed next: another duplicate of the file would keep the registration alive.
        let deleted = epoll::delete(&self.epoll, &watch.fd);
        debug_assert!(deleted.is_ok(), "a registration of our own was lost: {deleted:?}");
        // A slot whose generations are used up is retired, so that no key ever comes back.
        let next = slot.generation.checked_add(1);
        if let Some(generation) = next.filter(|next| key(index, *next) & REGISTERED == 0) {
            slot.generation = generation;
            self.free.push(index);
        }
    }
}

const _: () = {
    const fn is_send<T: Send>() {}
    is_send::<Reactor>();
};

impl AsFd for Reactor {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

/// Registers files with a [`Reactor`] as they are: no duplicate, no token, nothing kept. [`Reactor::next`] tells of them by
/// [`Event::Registered`].
///
/// For those who have many files that come and go. A registration ends when its file is closed, so two promises of the
/// [reactor](crate) become the caller's:
///
/// 1. An event may come that was collected before its file was closed: numbers are not used again, and one that is gone is nobody's.
/// 2. Nobody else holds the open file, nor inherits it. Otherwise its registration would live on, and nothing could end it.
#[derive(Debug)]
pub struct Registry(OwnedFd);

impl Registry {
    /// Registers a file under a number.
    ///
    /// # Errors
    ///
    /// `EINVAL` for a number of [`Registry::NUMBERS`] or above, `EPERM` for a file that has no readiness, `EEXIST` for one that is
    /// registered, `ENOSPC` at the user's limit of watches.
    pub fn add(&self, file: BorrowedFd<'_>, number: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::add(&self.0, file, data(number)?, flags_of(interest))?)
    }

    /// Changes what a registered file is watched for. What it is ready for now is told again.
    ///
    /// # Errors
    ///
    /// `EINVAL` as above, `ENOENT` for a file that is not registered.
    pub fn change(&self, file: BorrowedFd<'_>, number: u64, interest: Interest) -> io::Result<()> {
        Ok(epoll::modify(&self.0, file, data(number)?, flags_of(interest))?)
    }

    /// Whether anything that the reactor watches or has registered is ready; timers count once they have fired.
    pub fn has_news(&self) -> bool {
        let mut file = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut file, Some(&now)).is_ok_and(|ready| ready > 0)
    }

    /// How many numbers there are.
    pub const NUMBERS: u64 = REGISTERED - 1;
}

fn data(number: u64) -> io::Result<EventData> {
    // The last one would be the timerfd's key.
    if number >= Registry::NUMBERS {
        return Err(io::Error::from(Errno::INVAL));
    }
    Ok(EventData::new_u64(REGISTERED | number))
}

impl std::fmt::Debug for Reactor {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reactor").field("watches", &self.by_token.len()).finish_non_exhaustive()
    }
}

fn key(index: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

fn flags_of(interest: Interest) -> EventFlags {
    let mut flags = EventFlags::empty();
    if interest.readable {
        // Without a wish to read, the end of the other side's sending must not be reported: at level it would be
        // reported for ever to somebody who has stopped reading on purpose.
        flags |= EventFlags::IN | EventFlags::RDHUP;
    }
    if interest.writable {
        flags |= EventFlags::OUT;
    }
    if interest.trigger == Trigger::Edge {
        flags |= EventFlags::ET;
    }
    flags
}

fn readiness_of(flags: EventFlags) -> Readiness {
    Readiness {
        readable: flags.contains(EventFlags::IN),
        writable: flags.contains(EventFlags::OUT),
        closed: flags.intersects(EventFlags::HUP | EventFlags::RDHUP),
        hung_up: flags.contains(EventFlags::HUP),
        error: flags.contains(EventFlags::ERR),
    }
}
