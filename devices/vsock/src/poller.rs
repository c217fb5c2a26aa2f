//! Which sockets are ready: an epoll of the device's own, which the lane's reactor watches as one file.
//!
//! Connections come and go by the thousand. Here each is one registration of the socket itself, edge-triggered; it ends
//! with the socket, which nobody else holds. Who gets an event looks its number up in the [table](crate::table), where a
//! connection that is gone has none.
//!
//! Room is asked for only while it matters: the kernel tells of it each time that the peer has read something, which would
//! be a wake-up for each message.
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::event::epoll::{self, CreateFlags, Event, EventData, EventFlags};
use rustix::time::Timespec;

/// Most events that are taken at once.
pub(crate) const BATCH: usize = 64;

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

/// See the [module](self).
pub(crate) struct Poller(OwnedFd);

impl Poller {
    pub(crate) fn new() -> io::Result<Poller> {
        Ok(Poller(epoll::create(CreateFlags::CLOEXEC)?))
    }

    /// What happens to a connection, once each; `room`: also that there is room.
    pub(crate) fn add(&self, socket: BorrowedFd<'_>, number: u64, room: bool) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, EventData::new_u64(number), connection(room))?)
    }

    /// From now on with or without room. What is there now is told again.
    pub(crate) fn change(&self, socket: BorrowedFd<'_>, number: u64, room: bool) -> io::Result<()> {
        Ok(epoll::modify(&self.0, socket, EventData::new_u64(number), connection(room))?)
    }

    /// Connections to accept, for as long as there are any.
    pub(crate) fn listen(&self, socket: BorrowedFd<'_>, number: u64) -> io::Result<()> {
        Ok(epoll::add(&self.0, socket, EventData::new_u64(number), EventFlags::IN)?)
    }

    /// Whether connections to accept are reported.
    pub(crate) fn mind(&self, socket: BorrowedFd<'_>, number: u64, on: bool) -> io::Result<()> {
        let flags = if on { EventFlags::IN } else { EventFlags::empty() };
        Ok(epoll::modify(&self.0, socket, EventData::new_u64(number), flags)?)
    }

    /// What is ready now, up to [`BATCH`]; the rest keeps the poller readable.
    pub(crate) fn collect(&self, into: &mut Vec<Ready>) -> io::Result<()> {
        let mut buffer = [MaybeUninit::<Event>::uninit(); BATCH];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        let events = match epoll::wait(&self.0, &mut buffer[..], Some(&now)) {
            Ok((events, _)) => events,
            Err(rustix::io::Errno::INTR) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        into.extend(events.iter().map(|event| {
            let (data, flags) = (event.data, event.flags);
            let failed = flags.contains(EventFlags::ERR);
            let hung_up = failed || flags.contains(EventFlags::HUP);
            Ready {
                number: data.u64(),
                readable: hung_up || flags.intersects(EventFlags::IN | EventFlags::RDHUP),
                writable: hung_up || flags.contains(EventFlags::OUT),
                ended: hung_up || flags.contains(EventFlags::RDHUP),
                hung_up,
            }
        }));
        Ok(())
    }

    /// Whether anything is ready.
    pub(crate) fn has_news(&self) -> bool {
        let mut file = [rustix::event::PollFd::new(&self.0, rustix::event::PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        rustix::event::poll(&mut file, Some(&now)).is_ok_and(|ready| ready > 0)
    }
}

fn connection(room: bool) -> EventFlags {
    let always = EventFlags::IN | EventFlags::RDHUP | EventFlags::ET;
    if room { always | EventFlags::OUT } else { always }
}

impl AsFd for Poller {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    fn news(poller: &Poller) -> Vec<(bool, bool)> {
        let mut found = Vec::new();
        poller.collect(&mut found).unwrap();
        found.iter().map(|ready| (ready.readable, ready.writable)).collect()
    }

    /// A wake-up for each message that the peer reads is what a round trip cannot afford.
    #[test]
    fn a_peer_that_reads_is_no_news_unless_room_is_asked_for() {
        let poller = Poller::new().unwrap();
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        poller.add(ours.as_fd(), 1, false).unwrap();
        let mut exchange = |ours: &mut UnixStream| {
            ours.write_all(&[0; 64]).unwrap();
            theirs.read_exact(&mut [0; 64]).unwrap();
        };
        exchange(&mut ours);
        assert_eq!(news(&poller), []);
        poller.change(ours.as_fd(), 1, true).unwrap();
        assert_eq!(news(&poller), [(false, true)], "what is there is told");
        exchange(&mut ours);
        assert_eq!(news(&poller), [(false, true)]);
        poller.change(ours.as_fd(), 1, false).unwrap();
        exchange(&mut ours);
        assert_eq!(news(&poller), []);
        theirs.write_all(&[0]).unwrap();
        assert_eq!(news(&poller), [(true, false)]);
    }
}
