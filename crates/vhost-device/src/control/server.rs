//! The listener of the control socket and its clients.
use std::cell::RefCell;
use std::io;
use std::os::fd::AsFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::rc::Rc;
use std::time::{Duration, Instant};

use reactor::{Reactor, Token};

use super::client::{Client, Next};
use super::{MAX_CLIENTS, Plane};
use crate::listen::{ListenError, Listener};
use crate::task::Watch;

/// Connections that are accepted in one turn.
const ACCEPTED: usize = 16;
/// How long to wait after the system refused to accept one, most likely for want of descriptors.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// First of the tokens: the listener's, and that of the timer; clients have those behind it.
const FIRST: u32 = u32::MAX - 1000;

/// Serves the control socket on the main thread.
pub(crate) struct Server {
    listener: Listener,
    plane: Plane,
    /// A client keeps its place, and with it its token.
    clients: Vec<Option<Client>>,
    running: Option<Running>,
    /// A turn may do something.
    due: bool,
}

/// What there is only while the daemon serves.
struct Running {
    reactor: Rc<RefCell<Reactor>>,
    waker: reactor::Waker,
    /// Somebody may wait to be accepted.
    accept: bool,
    /// When to try again after accepting failed.
    accept_again: Option<Instant>,
    _watch: Watch,
}

impl Server {
    /// Whether an event is one of the control socket's.
    pub(crate) fn owns(token: Token) -> bool {
        (FIRST..=FIRST + MAX_CLIENTS as u32).contains(&token.number())
    }

    /// Binds the socket, for this user alone.
    pub(crate) fn bind(path: &Path, plane: Plane) -> Result<Server, ListenError> {
        let listener = Listener::bind_private(path)?;
        let clients = (0..MAX_CLIENTS).map(|_| None).collect();
        Ok(Server { listener, plane, clients, running: None, due: false })
    }

    pub(crate) fn plane(&mut self) -> &mut Plane {
        &mut self.plane
    }

    /// Begins to serve; `waker` ends a sleep of the main thread.
    pub(crate) fn start(&mut self, reactor: &Rc<RefCell<Reactor>>, waker: reactor::Waker) -> io::Result<()> {
        let watch = Watch::new(reactor, Token::host(FIRST), self.listener.as_fd())?;
        self.running = Some(Running {
            reactor: reactor.clone(),
            waker,
            accept: true,
            accept_again: None,
            _watch: watch,
        });
        self.due = true;
        Ok(())
    }

    /// One of its files has news, or its timer is due.
    pub(crate) fn event(&mut self, token: Token) {
        self.due = true;
        match token.number().checked_sub(FIRST + 1) {
            None => self.running.iter_mut().for_each(|running| running.accept = true),
            Some(place) => {
                if let Some(Some(client)) = self.clients.get_mut(place as usize) {
                    client.due = true;
                }
            }
        }
    }

    /// Does what can be done without waiting, and not too much of it at once.
    pub(crate) fn turn(&mut self) {
        if !std::mem::take(&mut self.due) {
            return;
        }
        let now = Instant::now();
        self.accept(now);
        let Some(running) = &self.running else { return };
        let (mut more, mut deadline) = (running.accept, running.accept_again);
        for place in &mut self.clients {
            let Some(client) = place else { continue };
            if client.due || client.deadline().is_some_and(|deadline| deadline <= now) {
                let plane = &self.plane;
                // A panic is a bug of this crate; it costs one client.
                let next = catch_unwind(AssertUnwindSafe(|| client.turn(plane, now)));
                match next.unwrap_or(Next::End) {
                    Next::Wait => {}
                    Next::More => more = true,
                    Next::End => {
                        *place = None;
                        continue;
                    }
                }
            }
            deadline = match (deadline, client.deadline()) {
                (Some(one), Some(other)) => Some(one.min(other)),
                (one, other) => one.or(other),
            };
        }
        let Some(running) = &mut self.running else { return };
        if more {
            self.due = true;
            running.waker.wake();
        }
        if let Some(deadline) = deadline {
            running.reactor.borrow_mut().set_timer(Token::host(FIRST), deadline);
        }
    }

    fn accept(&mut self, now: Instant) {
        let Some(running) = &mut self.running else { return };
        if !running.accept {
            return;
        }
        running.accept_again = None;
        for _ in 0..ACCEPTED {
            let stream = match self.listener.accept() {
                Ok(Some(stream)) => stream,
                Ok(None) => {
                    running.accept = false;
                    return;
                }
                Err(error) => {
                    tracing::warn!(%error, "a control connection could not be accepted; trying again");
                    running.accept = false;
                    running.accept_again = Some(now + ACCEPT_AGAIN);
                    return;
                }
            };
            let silence = |client: &Option<Client>| client.as_ref().map(|client| client.active);
            // An empty place, or that of the client that was silent for longest.
            let Some(place) = (0..self.clients.len()).min_by_key(|place| silence(&self.clients[*place]))
            else {
                return;
            };
            self.clients[place] = None;
            let token = Token::host(FIRST + 1 + place as u32);
            let client = Watch::new(&running.reactor, token, stream.as_fd())
                .and_then(|watch| Client::new(stream, watch, now));
            match client {
                Ok(client) => self.clients[place] = Some(client),
                Err(error) => tracing::warn!(%error, "a control connection could not be served"),
            }
        }
    }
}
