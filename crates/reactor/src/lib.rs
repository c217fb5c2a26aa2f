//! Readiness, timers, mailboxes and bounded adaptive polling for device threads.
//!
//! The lowest layer of Backplane: it knows files and time, and nothing of virtio.
//!
//! * [`Reactor`]: which files are ready and which timers are due. It is a file itself, so that one reactor can be
//!   watched by another.
//! * [`Registry`]: files by the thousand, each registered as it is.
//! * [`mailbox`]: the bounded way into a thread that sleeps in its reactor.
//! * [`Waker`]: an eventfd that ends such a sleep, also as a [`std::task::Waker`].
//! * [`BlockingPool`]: threads for calls that block, and the way of their results back.
//! * [`Spinner`]: whether to poll a little longer before sleeping.
//!
//! Promises that the rest of the project leans on, each with a test:
//!
//! 1. After [`Reactor::unwatch`] or [`Reactor::cancel_timer`] returns, no event of that token is handed out, not even
//!    one that [`Reactor::wait`] had collected already.
//! 2. Closing, or reusing the number of, a file that is still watched never affects another watch.
//!    (Of files in a [`Registry`] its user sees to both.)
//! 3. A reactor with nothing due sleeps: it makes no wake-ups of its own.
//! 4. A message sent to a mailbox is never left lying while its receiver sleeps.

mod blocking;
mod mailbox;
mod reactor;
mod spin;
mod timers;
mod token;
mod waker;

pub use blocking::{BlockingPool, Desk, Full, JobPanicked};
pub use mailbox::{Inbox, Mail, SendError, mailbox};
pub use reactor::{Reactor, Registry};
pub use spin::{SpinPolicy, Spinner};
pub use token::{Event, Interest, Readiness, Token, Trigger};
pub use waker::Waker;
