//! Deadlines in order, and the one timerfd that ends a sleep for the earliest of them.
//!
//! The timerfd is set only when it would otherwise fire too late, or when no deadline is left. One that would fire
//! too early (its timer was pushed back or cancelled, another is left) stays: it costs at most a single early
//! wake-up, where setting it again would cost a system call for each request that pushes a time-out back.
//!
//! Due timers are collected once per wait and carry the number of their arming, so that a timer that was cancelled
//! or set again after it was collected is not handed out, and one that is set to a time in the past by its own
//! handler cannot keep a turn going for ever.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::Token;

/// Farthest time that the timerfd is set to; a later deadline is set again when this has passed.
const FARTHEST: Duration = Duration::from_secs(365 * 24 * 3600);

pub(crate) struct Timers {
    fd: OwnedFd,
    /// When the kernel will fire, if at all.
    armed: Option<Instant>,
    /// In the order of time; the number of the arming keeps timers of one instant apart.
    order: BTreeSet<(Instant, u64, Token)>,
    by_token: HashMap<Token, (Instant, u64)>,
    /// Number of the next arming.
    next: u64,
    due: VecDeque<(Token, u64)>,
}

impl Timers {
    pub(crate) fn new() -> io::Result<Self> {
        // `Instant` counts on the same clock as the timer: std documents CLOCK_MONOTONIC for Linux.
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        Ok(Timers {
            fd: rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)?,
            armed: None,
            order: BTreeSet::new(),
            by_token: HashMap::new(),
            next: 0,
            due: VecDeque::new(),
        })
    }

    pub(crate) fn set(&mut self, token: Token, at: Instant) {
        self.cancel(token);
        let number = self.next;
        self.next += 1;
        self.order.insert((at, number, token));
        self.by_token.insert(token, (at, number));
        // Armed here and not before the next sleep: whoever polls the reactor as a file may sleep without a wait.
        if self.armed.is_none_or(|armed| at < armed) {
            self.arm(Some(at));
        }
    }

    pub(crate) fn cancel(&mut self, token: Token) {
        if let Some((at, number)) = self.by_token.remove(&token) {
            self.order.remove(&(at, number, token));
        }
    }

    pub(crate) fn retain(&mut self, mut keep: impl FnMut(Token) -> bool) {
        self.by_token.retain(|token, _| keep(*token));
        let left = &self.by_token;
        self.order.retain(|(_, _, token)| left.contains_key(token));
    }

    /// Moves the timers that are due to the list that [`Timers::next_due`] hands out.
    ///
    /// `fired`: the timerfd has reported. It is watched edge-triggered, so that there is nothing to read or reset.
    pub(crate) fn collect(&mut self, fired: bool) {
        if fired {
            self.armed = None;
        }
        if !self.order.is_empty() {
            let now = Instant::now();
            while let Some((at, number, token)) = self.order.first().copied() {
                if at > now {
                    break;
                }
                self.order.pop_first();
                // It stays in `by_token` until it is handed out: that is what a cancel in between removes.
                self.due.push_back((token, number));
            }
        }
        self.settle();
    }

    /// Sets the timerfd right for a sleep: armed in time for the earliest deadline, and not at all without one.
    pub(crate) fn settle(&mut self) {
        match (self.order.first().map(|first| first.0), self.armed) {
            (None, None) => {}
            (None, Some(_)) => self.arm(None),
            (Some(earliest), armed) => {
                if armed.is_none_or(|armed| earliest < armed) {
                    self.arm(Some(earliest));
                }
            }
        }
    }

    pub(crate) fn next_due(&mut self) -> Option<Token> {
        while let Some((token, number)) = self.due.pop_front() {
            if self.by_token.get(&token).is_some_and(|(_, latest)| *latest == number) {
                self.by_token.remove(&token);
                return Some(token);
            }
        }
        None
    }

    /// Whether something may be left to hand out.
    pub(crate) fn has_due(&self) -> bool {
        !self.due.is_empty()
    }

    fn arm(&mut self, at: Option<Instant>) {
        let now = Instant::now();
        // A value of zero would disarm; a deadline in the past fires at once.
        let (armed, value) = match at {
            None => (None, Duration::ZERO),
            Some(at) => {
                let rest = at.saturating_duration_since(now).clamp(Duration::from_nanos(1), FARTHEST);
                (Some(now + rest), rest)
            }
        };
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let value = Timespec { tv_sec: value.as_secs() as _, tv_nsec: value.subsec_nanos() as _ };
        let spec = Itimerspec { it_interval: zero, it_value: value };
        // It can fail only for a bad file or a value out of range, and both are ours. Should it ever, `armed` stays
        // as it was and the next wait tries again.
        if rustix::time::timerfd_settime(&self.fd, TimerfdTimerFlags::empty(), &spec).is_ok() {
            self.armed = armed;
        }
    }
}

impl AsFd for Timers {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}
