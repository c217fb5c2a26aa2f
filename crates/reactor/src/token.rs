//! The vocabulary of a reactor: what is watched, for what, and what is reported.
//!
//! Invariant: a device's tokens and its host's tokens are two spaces that share no value, so that a device cannot
//! take away or imitate a watch of the thread it runs on.

use std::fmt;

/// Names one watch, and one timer, of a [`Reactor`](crate::Reactor).
///
/// A token may have a watch and a timer at the same time; they are independent of each other.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Token(u64);

/// Set in the tokens of hosts, above the 32 bits of the number.
const HOST: u64 = 1 << 32;

impl Token {
    /// A token of a device.
    pub const fn new(n: u32) -> Self {
        Token(n as u64)
    }

    /// A token of the code that runs the device: never equal to one made by [`Token::new`].
    pub const fn host(n: u32) -> Self {
        Token(HOST | n as u64)
    }

    /// Whether this is a host's token.
    pub const fn is_host(self) -> bool {
        self.0 & HOST != 0
    }

    /// The number that the token was made from.
    pub const fn number(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let space = if self.is_host() { "host" } else { "device" };
        write!(f, "Token({space} {})", self.number())
    }
}

/// What a file is ready for. Several can hold at once.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Readiness {
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    pub(crate) closed: bool,
    pub(crate) hung_up: bool,
    pub(crate) error: bool,
}

impl Readiness {
    /// A read, an accept or a receive would not block. Data can be left to read although [`closed`](Self::closed).
    pub const fn readable(self) -> bool {
        self.readable
    }

    /// A write would not block.
    pub const fn writable(self) -> bool {
        self.writable
    }

    /// The other end has closed, at least its sending direction.
    pub const fn closed(self) -> bool {
        self.closed
    }

    /// The other end has closed both directions, or is gone.
    pub const fn hung_up(self) -> bool {
        self.hung_up
    }

    /// The file has an error to report; the next read or write returns it.
    pub const fn error(self) -> bool {
        self.error
    }
}

/// When readiness is reported.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trigger {
    /// In each wait, for as long as it lasts.
    Level,
    /// Once when it begins, and again for each arrival after that. An eventfd that is watched like this needs no
    /// read(2) per wake-up: each write to it is one event.
    Edge,
}

/// What a watch is for.
///
/// With neither direction wanted the watch still reports [`closed`](Readiness::closed) and
/// [`error`](Readiness::error), as epoll(7) cannot be told not to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Interest {
    /// Report when a read would not block, and when the other end stops sending.
    pub readable: bool,
    /// Report when a write would not block.
    pub writable: bool,
    /// How often.
    pub trigger: Trigger,
}

impl Interest {
    /// Readable, for as long as it lasts.
    pub const READ: Self = Interest { readable: true, writable: false, trigger: Trigger::Level };
    /// Writable, for as long as it lasts.
    pub const WRITE: Self = Interest { readable: false, writable: true, trigger: Trigger::Level };
    /// Both directions, for as long as it lasts.
    pub const READ_WRITE: Self = Interest { readable: true, writable: true, trigger: Trigger::Level };
    /// Both directions, once for each arrival.
    pub const READ_WRITE_EDGE: Self = Interest { readable: true, writable: true, trigger: Trigger::Edge };
    /// Neither direction.
    pub const NONE: Self = Interest { readable: false, writable: false, trigger: Trigger::Level };
    /// Readable, once for each arrival: for eventfds and mailboxes.
    pub const READ_EDGE: Self = Interest { readable: true, writable: false, trigger: Trigger::Edge };
}

/// What [`Reactor::next`](crate::Reactor::next) hands out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// The file that `token` watches is ready.
    Ready {
        /// The token of the watch.
        token: Token,
        /// For what it is ready.
        ready: Readiness,
    },
    /// A file of a [`Registry`](crate::Registry) is ready.
    Registered {
        /// What it was registered under. It may be closed by now.
        number: u64,
        /// For what it is ready.
        ready: Readiness,
    },
    /// The time of a timer has come. The timer is gone.
    Timer {
        /// The token of the timer.
        token: Token,
    },
}
