//! Which sockets are ready: each is registered with the lane's reactor as it is, see [`Registry`].
//!
//! Connections come and go by the thousand. Here each is one registration of the socket itself, edge-triggered; it ends
//! with the socket, which nobody else holds. Who gets an event looks its number up in the [table](crate::table), where a
//! connection that is gone has none.
//!
//! Room is asked for only while it matters: the kernel tells of it each time that the peer has read something, which would
//! be a wake-up for each message.
use std::io;
use std::os::fd::BorrowedFd;

use reactor::{Interest, Reactor, Readiness, Registry};

/// What a socket says.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Ready {
    pub(crate) number: u64,
    pub(crate) readable: bool,
    pub(crate) writable: bool,
    /// Its peer sends nothing more.
    pub(crate) ended: bool,
    /// Its peer is gone.
    pub(crate) hung_up: bool,
}

impl Ready {
    pub(crate) fn of(number: u64, ready: Readiness) -> Ready {
        let hung_up = ready.hung_up() || ready.error();
        Ready {
            number,
            readable: hung_up || ready.readable() || ready.closed(),
            writable: hung_up || ready.writable(),
            ended: hung_up || ready.closed(),
            hung_up,
        }
    }
}

/// See the [module](self). Until the lane runs there is nothing to register with, and no socket.
#[derive(Debug, Default)]
pub(crate) struct Poller(Option<Registry>);

impl Poller {
    pub(crate) fn attach(&mut self, reactor: &Reactor) -> io::Result<()> {
        self.0 = Some(reactor.registry()?);
        Ok(())
    }

    /// What happens to a connection, once each; `room`: also that there is room.
    pub(crate) fn add(&self, socket: BorrowedFd<'_>, number: u64, room: bool) -> io::Result<()> {
        self.registry()?.add(socket, number, connection(room))
    }

    /// From now on with or without room. What is there now is told again.
    pub(crate) fn change(&self, socket: BorrowedFd<'_>, number: u64, room: bool) -> io::Result<()> {
        self.registry()?.change(socket, number, connection(room))
    }

    /// Connections to accept, for as long as there are any.
    pub(crate) fn listen(&self, socket: BorrowedFd<'_>, number: u64) -> io::Result<()> {
        self.registry()?.add(socket, number, Interest::READ)
    }

    /// Whether connections to accept are reported.
    pub(crate) fn mind(&self, socket: BorrowedFd<'_>, number: u64, on: bool) -> io::Result<()> {
        self.registry()?.change(socket, number, if on { Interest::READ } else { Interest::NONE })
    }

    /// Whether anything is ready.
    pub(crate) fn has_news(&self) -> bool {
        self.0.as_ref().is_some_and(Registry::has_news)
    }

    fn registry(&self) -> io::Result<&Registry> {
        self.0.as_ref().ok_or_else(|| io::ErrorKind::NotConnected.into())
    }
}

const fn connection(room: bool) -> Interest {
    if room { Interest::READ_WRITE_EDGE } else { Interest::READ_EDGE }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixStream;
    use std::time::Duration;

    use reactor::Event;

    fn news(reactor: &mut Reactor) -> Vec<(bool, bool)> {
        reactor.wait(Some(Duration::ZERO)).unwrap();
        let mut found = Vec::new();
        while let Some(event) = reactor.next() {
            let Event::Registered { number: 1, ready } = event else { panic!("{event:?}") };
            let ready = Ready::of(1, ready);
            found.push((ready.readable, ready.writable));
        }
        found
    }

    /// A wake-up for each message that the peer reads is what a round trip cannot afford.
    #[test]
    fn a_peer_that_reads_is_no_news_unless_room_is_asked_for() {
        let mut reactor = Reactor::new().unwrap();
        let mut poller = Poller::default();
        poller.attach(&reactor).unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        poller.add(ours.as_fd(), 1, false).unwrap();
        let mut exchange = |ours: &mut UnixStream| {
            ours.write_all(&[0; 64]).unwrap();
            theirs.read_exact(&mut [0; 64]).unwrap();
        };
        exchange(&mut ours);
        assert_eq!(news(&mut reactor), []);
        poller.change(ours.as_fd(), 1, true).unwrap();
        assert_eq!(news(&mut reactor), [(false, true)], "what is there is told");
        exchange(&mut ours);
        assert_eq!(news(&mut reactor), [(false, true)]);
        poller.change(ours.as_fd(), 1, false).unwrap();
        exchange(&mut ours);
        assert_eq!(news(&mut reactor), []);
        theirs.write_all(&[0]).unwrap();
        assert_eq!(news(&mut reactor), [(true, false)]);
    }
}
