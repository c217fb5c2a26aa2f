//! One guest: its device, which outlives connections, and the front-ends that come and go.
//!
//! A guest has one front-end at a time. While one is connected, the listener stays open; another that connects waits for
//! a moment, so that a VMM which reconnects faster than its disconnect is noticed gets in, and is then turned away by
//! closing its connection. When a front-end is gone its rings are stopped and its memory is let go; the device keeps its
//! state until RESET_DEVICE, SET_STATUS(0), or a driver that begins from scratch.
use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::io;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::task::Poll;
use std::time::{Duration, Instant};

use reactor::{Reactor, Token};
use vm_virtio::device::VirtioDevice;
use vm_virtio::{Engine, HostEvent, Status};

use crate::events::Events;
use crate::listen::Listener;
use crate::mapping::Budget;
use crate::session::Session;
use crate::task::{Watch, yield_now};
use crate::upcalls::{Shmem, Upcalls};

/// How long to wait after the system refused to accept a connection, most likely for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// How long somebody who connects while there is a front-end may wait for its end. A front-end that is gone can look
/// alive for a moment: a process that it forked holds its files until it executes another program.
const PATIENCE: Duration = Duration::from_millis(200);

/// What the guests of a process share; the main thread's.
pub(crate) struct Host {
    pub(crate) reactor: Rc<RefCell<Reactor>>,
    /// The daemon is asked to end.
    pub(crate) stopping: Cell<bool>,
    /// How many guests there are.
    pub(crate) guests: usize,
}

/// Tokens of one guest in the main reactor.
#[derive(Clone, Copy)]
pub(crate) struct Tokens(u32);

impl Tokens {
    const PER_GUEST: u32 = 4;

    pub(crate) fn of(guest: u32) -> Tokens {
        Tokens(guest * Tokens::PER_GUEST)
    }

    /// The guest that a token belongs to.
    pub(crate) fn guest(token: Token) -> usize {
        (token.number() / Tokens::PER_GUEST) as usize
    }

    pub(crate) fn connection(self) -> Token {
        Token::host(self.0)
    }

    pub(crate) fn listener(self) -> Token {
        Token::host(self.0 + 1)
    }

    pub(crate) fn transfer(self) -> Token {
        Token::host(self.0 + 3)
    }

    pub(crate) fn channel(self) -> Token {
        Token::host(self.0 + 2)
    }
}

/// Where front-ends come from.
pub(crate) enum Source {
    /// One after the other, without end. Watched from before readiness is announced: a daemon that cannot notice
    /// front-ends is not ready.
    Listener(Listener, Watch),
    /// This one only.
    Connected(UnixStream),
}

/// A guest and its device.
pub(crate) struct Guest<D: VirtioDevice> {
    /// Its number, from 0.
    pub(crate) index: u32,
    pub(crate) engine: Engine<D>,
    pub(crate) events: Arc<Events>,
    pub(crate) upcalls: Arc<Upcalls>,
    pub(crate) shmem: RefCell<Shmem>,
    pub(crate) host: Rc<Host>,
    /// Somebody who connected while there was, perhaps, another front-end.
    waiting: RefCell<Option<(UnixStream, Instant)>>,
    /// What it may map.
    pub(crate) budget: Arc<Budget>,
    /// Where each ring stopped last, since the last reset: tells a driver that goes on from one that begins again.
    pub(crate) stopped_at: RefCell<Vec<Option<u32>>>,
    /// Status bits that no front-end set: the session took these steps for it.
    pub(crate) implied: Cell<Status>,
    /// Failures of workers that were told to a front-end.
    failures_told: Cell<u64>,
    /// Where its front-ends connect, if that is a path.
    pub(crate) socket: Option<PathBuf>,
    pub(crate) counts: Counts,
    /// Why the device needed a reset last.
    pub(crate) last_failure: RefCell<Option<String>>,
}

/// What happened between a guest's front-ends and us.
#[derive(Default)]
pub(crate) struct Counts {
    /// A front-end is there.
    pub(crate) connected: Cell<bool>,
    /// Front-ends that connected.
    pub(crate) connects: Cell<u64>,
    /// Messages, refused ones included.
    pub(crate) messages: Cell<u64>,
    /// Messages that were refused.
    pub(crate) refused: Cell<u64>,
    /// Connections that ended because of an error.
    pub(crate) broken: Cell<u64>,
    /// Front-ends that were turned away.
    pub(crate) turned_away: Cell<u64>,
}

/// One more.
pub(crate) fn count(counter: &Cell<u64>) {
    counter.set(counter.get() + 1);
}

impl<D: VirtioDevice> Guest<D> {
    pub(crate) fn new(
        index: u32,
        engine: Engine<D>,
        events: Arc<Events>,
        upcalls: Arc<Upcalls>,
        host: Rc<Host>,
        socket: Option<PathBuf>,
    ) -> Guest<D> {
        let rings = engine.queues().len();
        let stopped_at = RefCell::new(vec![None; rings]);
        let (implied, failures_told) = (Cell::new(Status::empty()), Cell::new(0));
        let waiting = RefCell::default();
        let budget = Budget::share(host.guests);
        let counts = Counts::default();
        Guest {
            index,
            engine,
            events,
            upcalls,
            shmem: RefCell::default(),
            host,
            waiting,
            budget,
            stopped_at,
            implied,
            failures_told,
            socket,
            counts,
            last_failure: RefCell::default(),
        }
    }

    pub(crate) fn tokens(&self) -> Tokens {
        Tokens::of(self.index)
    }

    /// Serves front-ends until the daemon ends, or, given a connection, until that ends.
    pub(crate) async fn serve(self: Rc<Self>, source: Source) {
        match source {
            Source::Connected(stream) => self.session(stream, None).await,
            Source::Listener(listener, _watch) => {
                while let Some(stream) = self.accept(&listener).await {
                    self.session(stream, Some(&listener)).await;
                    // Whoever does nothing but connect must not keep the other guests waiting.
                    yield_now().await;
                }
            }
        }
    }

    /// The next front-end; `None` when the daemon ends.
    async fn accept(&self, listener: &Listener) -> Option<UnixStream> {
        poll_fn(|_| {
            if self.host.stopping.get() {
                return Poll::Ready(None);
            }
            self.log_events();
            if let Some((stream, _)) = self.waiting.take() {
                return Poll::Ready(Some(stream));
            }
            match listener.accept() {
                Ok(Some(stream)) => Poll::Ready(Some(stream)),
                Ok(None) => Poll::Pending,
                Err(error) => {
                    self.accept_failed(&error);
                    Poll::Pending
                }
            }
        })
        .await
    }

    /// Lets in whoever connects while there is a front-end, for now: see [`PATIENCE`]. True if somebody connected: the
    /// front-end's end may have come before that, so look for it once more, and then [turn](Guest::turn_away) away.
    pub(crate) fn somebody_waits(&self, listener: &Listener) -> bool {
        match listener.accept() {
            Ok(Some(stream)) => {
                let mut waiting = self.waiting.borrow_mut();
                if waiting.is_some() {
                    self.turned_away();
                } else {
                    let until = Instant::now() + PATIENCE;
                    self.host.reactor.borrow_mut().set_timer(self.tokens().listener(), until);
                    *waiting = Some((stream, until));
                }
                true
            }
            Ok(None) => false,
            Err(error) => {
                self.accept_failed(&error);
                false
            }
        }
    }

    /// Turns away who has waited long enough: the front-end is certainly there.
    pub(crate) fn turn_away(&self) {
        let mut waiting = self.waiting.borrow_mut();
        if waiting.as_ref().is_some_and(|(_, until)| Instant::now() >= *until) {
            *waiting = None;
            self.turned_away();
        }
    }

    fn turned_away(&self) {
        count(&self.counts.turned_away);
        tracing::warn!(guest = self.index, "has a front-end already; another one was turned away");
    }

    fn accept_failed(&self, error: &io::Error) {
        tracing::warn!(guest = self.index, %error, "a connection could not be accepted; trying again");
        // The watch reports a waiting connection once only.
        let again = Instant::now() + ACCEPT_AGAIN;
        self.host.reactor.borrow_mut().set_timer(self.tokens().listener(), again);
    }

    async fn session(&self, stream: UnixStream, listener: Option<&Listener>) {
        match Session::new(self, stream, listener) {
            Ok(mut session) => {
                tracing::info!(guest = self.index, "front-end connected");
                count(&self.counts.connects);
                self.counts.connected.set(true);
                let end = session.run().await;
                session.close().await;
                self.counts.connected.set(false);
                if end.is_error() {
                    count(&self.counts.broken);
                }
                tracing::info!(guest = self.index, "front-end gone: {end}");
            }
            Err(error) => tracing::warn!(guest = self.index, %error, "a connection could not be served"),
        }
    }

    /// Without a front-end the log is the only place for what happens.
    fn log_events(&self) {
        for event in self.events.take() {
            self.log_event(&event);
        }
    }

    pub(crate) fn log_event(&self, event: &HostEvent) {
        match event {
            HostEvent::QueueFault { queue, error } => {
                tracing::warn!(guest = self.index, queue, %error, "the driver broke a ring; the ring is stopped");
            }
            HostEvent::NeedsReset { reason, .. } => {
                tracing::warn!(guest = self.index, reason, "the device needs a reset");
                *self.last_failure.borrow_mut() = Some(reason.clone());
            }
            // Flags and whatever comes later are not for the log.
            _ => {}
        }
    }

    /// Whether a worker failed since the last call.
    pub(crate) fn worker_failed(&self) -> bool {
        let failures = self.engine.failures().worker_failures.load(Ordering::Relaxed);
        self.failures_told.replace(failures) != failures
    }

    /// The status as front-ends know it: what they set, minus what was refused, plus what the device says.
    pub(crate) fn status(&self) -> Status {
        self.engine.status() - self.implied.get()
    }

    /// Resets the device. Rings that begin at the beginning from here on mean nothing.
    pub(crate) async fn reset(&self) {
        self.engine.reset().await;
        self.stopped_at.borrow_mut().fill(None);
        self.implied.set(Status::empty());
    }
}
