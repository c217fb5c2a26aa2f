//! A lane's part of queues that are served elsewhere ([`crate::delegated`]): handing them over, bridging kicks and
//! interrupts that are no files, and taking them back.
//!
//! Invariant: the [`Queue`](crate::Queue) of such a ring stays in its slot, closed: it stands for the checked addresses.
//! [`Ring::delegated`] says whether the ring is away.
use super::{Kick, LaneRunner};
use crate::delegated::{Change, QueueParts, Waiting};
use crate::device::{Stop, Worker};
use crate::ticket::Completer;
use crate::{QueueError, QueueState};
use reactor::{Interest, Token};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fd::{AsFd, OwnedFd};
use std::io;
use std::sync::Arc;

/// What a lane knows of a ring that is served elsewhere.
pub(super) struct Delegated {
    /// Handed over, and not given back.
    pub(super) away: bool,
    /// Where it began, or where it came back.
    pub(super) state: QueueState,
    /// For kicks that are calls of the engine.
    kick: Option<OwnedFd>,
}

impl Delegated {
    pub(super) fn new(state: QueueState) -> Delegated {
        Delegated { away: false, state, kick: None }
    }
}

fn event_file() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?)
}

impl<W: Worker> LaneRunner<W> {
    /// Whether whoever serves the ring elsewhere still has it.
    pub(super) fn is_away(&self, at: usize) -> bool {
        W::DELEGATES && self.rings.get(at).and_then(|ring| ring.delegated.as_ref()).is_some_and(|it| it.away)
    }

    /// Hands a ring over.
    pub(super) fn hand_over(&mut self, at: usize) -> io::Result<()> {
        let (number, enabled, logged) = (self.rings[at].index, self.rings[at].enabled, self.rings[at].logged);
        let log = self.log.clone();
        let call = self.call_file(at)?;
        let Some((config, ram)) = self.queue(at).map(|queue| (*queue.config(), queue.ram().clone())) else {
            return Ok(());
        };
        let ring = &mut self.rings[at];
        let Some(delegated) = ring.delegated.as_mut() else { return Ok(()) };
        let kick = match &ring.kick {
            Kick::Fd(file) => Some(file.try_clone()?),
            Kick::Poll => None,
            Kick::Manual => {
                let file = event_file()?;
                delegated.kick = Some(file.try_clone()?);
                Some(file)
            }
        };
        delegated.away = true;
        let state = delegated.state.clone();
        let parts = QueueParts { config, state, kick, call, enabled, ram, log, logged };
        self.enter(|worker, lane| worker.queue_delegated(number, parts, lane));
        Ok(())
    }

    /// The file for a ring's interrupts: the host's own, or one that this lane watches for it.
    fn call_file(&mut self, at: usize) -> io::Result<Option<OwnedFd>> {
        let ring = &self.rings[at];
        // Kicks are not watched here: the token is free.
        let token = Token::host(u32::from(ring.index));
        self.reactor.unwatch(token);
        let Some(call) = &ring.call else { return Ok(None) };
        if let Some(file) = call.as_fd() {
            return Ok(Some(file.try_clone_to_owned()?));
        }
        let file = event_file()?;
        self.reactor.watch(file.as_fd(), token, Interest::READ_EDGE)?;
        Ok(Some(file))
    }

    /// A queue starts: its ring goes away at once.
    pub(super) fn delegate(&mut self, at: usize) -> io::Result<()> {
        let state = self.queue(at).map(|queue| queue.state()).unwrap_or_default();
        self.rings[at].delegated = Some(Delegated::new(state));
        self.hand_over(at)
    }

    /// After a suspension: what came back goes away again.
    pub(super) fn delegate_again(&mut self, at: usize) {
        let ring = &self.rings[at];
        let here = ring.delegated.as_ref().is_some_and(|delegated| !delegated.away);
        if here
            && !ring.faulted
            && ring.stopping.is_none()
            && let Err(error) = self.hand_over(at)
        {
            self.fail(format!("a queue cannot be handed over: {error}"));
        }
    }

    /// Passes a change on. The order is carried out when the worker says so.
    pub(super) fn pass_on(&mut self, change: Change, done: &Arc<Completer<()>>) {
        let waiting = Waiting::new(done.clone());
        self.enter(|worker, lane| worker.delegation_changed(change, waiting, lane));
    }

    /// The same for one queue, if that is away.
    pub(super) fn pass_on_of(&mut self, at: usize, change: Change, done: Completer<()>) {
        if self.is_away(at) {
            self.pass_on(change, &Arc::new(done));
        } else {
            done.complete(());
        }
    }

    /// The interrupt of a queue was exchanged.
    pub(super) fn pass_on_call(&mut self, at: usize, done: Completer<()>) {
        let queue = self.rings[at].index;
        match self.call_file(at) {
            Ok(call) => self.pass_on_of(at, Change::Call { queue, call }, done),
            Err(error) => self.fail(format!("queue {queue} cannot get another interrupt: {error}")),
        }
    }

    /// A kick by call.
    pub(super) fn pass_on_kick(&self, at: usize) {
        let Some(ring) = self.rings.get(at) else { return };
        let bridge = ring.delegated.as_ref().and_then(|delegated| delegated.kick.as_ref());
        let file = match &ring.kick {
            Kick::Fd(file) => Some(file),
            Kick::Manual | Kick::Poll => bridge,
        };
        if let Some(file) = file {
            // Full means that a kick is pending already.
            let _ = rustix::io::write(file, &1u64.to_ne_bytes());
        }
    }

    /// Nobody will take this ring back: whoever has it must not go on.
    pub(super) fn abandon(&mut self, at: usize) {
        let number = self.rings[at].index;
        self.enter_quietly(|worker, lane| worker.queue_stop(number, Stop::Discard, lane));
    }

    /// Takes what came back, and hears of what broke elsewhere.
    pub(super) fn take_back(&mut self) {
        if !W::DELEGATES {
            return;
        }
        for (number, state) in std::mem::take(&mut self.queues.returned) {
            let Some(at) = self.find(number) else { continue };
            if let Some(delegated) = self.rings[at].delegated.as_mut().filter(|delegated| delegated.away) {
                delegated.away = false;
                delegated.kick = None;
                delegated.state = state;
                // An interrupt that is on its way over the bridge must not be lost with it.
                if self.rings[at].call.as_ref().is_some_and(|call| call.as_fd().is_none()) {
                    self.signal_unheard(at);
                }
            }
        }
        for number in std::mem::take(&mut self.queues.broken) {
            if let Some(at) = self.find(number).filter(|at| self.is_away(*at) && !self.rings[*at].faulted) {
                self.fault(at, QueueError::Delegated);
            }
        }
    }
}
