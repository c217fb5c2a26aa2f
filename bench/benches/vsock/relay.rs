//! The floor of a daemon between clients and a guest: a process that wakes and is woken as often, and does nothing else.
//!
//! It has the clients' socket, and the two descriptors by which it and the guest wake each other. What a client sends, and
//! that it comes and goes, it tells the guest by one wake-up; the guest's answer is one, too, and what a client waits for is sent
//! then. There are no rings, no packets and no shared memory, on the guest's side neither. It runs as a process of its own, as
//! daemons do: a wake-up then is a change of address space.
use std::collections::VecDeque;
use std::fs;
use std::io::{ErrorKind, Read, Write, stdin, stdout};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};

use rustix::event::{EventfdFlags, epoll, eventfd};
use rustix::fs::Timespec;
use virtio_testkit::daemon::TempDir;
use virtio_testkit::load::pin_current_thread;

use crate::Failed;
use crate::daemon::{CLIENTS, Daemon};

/// The program's first argument, if it is to be the relay.
pub(crate) const ARGUMENT: &str = "--relay";

/// What it waits for beside clients.
const GUEST: u64 = u64::MAX;
const LISTENER: u64 = u64::MAX - 1;

/// What the guest's next answer means.
enum Answer {
    /// To a connection.
    Open(usize),
    /// To what a client has sent.
    Data(usize),
    /// To the end of a connection.
    End,
}

/// A client, and whether its line has been read.
type Client = Option<(UnixStream, bool)>;

/// `ARGUMENT PATH`: the clients' socket. The guest wakes it by what is its standard input, and is woken by its standard output.
pub(crate) fn main(path: &str) -> Result<(), Failed> {
    let (kick, call) = (stdin(), stdout());
    // It has its name when it listens.
    let unnamed = format!("{path}.new");
    let listener = UnixListener::bind(&unnamed)?;
    fs::rename(unnamed, path)?;
    listener.set_nonblocking(true)?;
    let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
    let watch = |file: BorrowedFd<'_>, key| {
        epoll::add(&events, file, epoll::EventData::new_u64(key), epoll::EventFlags::IN)
    };
    watch(kick.as_fd(), GUEST)?;
    watch(listener.as_fd(), LISTENER)?;
    let tell = || rustix::io::write(&call, &1u64.to_ne_bytes());
    let (mut clients, mut answers): (Vec<Client>, VecDeque<Answer>) = Default::default();
    let mut part = [0; 4096];
    let mut ready =
        [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }; 16];
    loop {
        let count = epoll::wait(&events, &mut ready, None)?;
        for key in ready.iter().take(count).map(|event| event.data.u64()) {
            match key {
                GUEST => {
                    let mut woken = [0; 8];
                    rustix::io::read(&kick, &mut woken)?;
                    for _ in 0..u64::from_ne_bytes(woken) {
                        match answers.pop_front() {
                            Some(Answer::Open(at)) => send(&mut clients, at, b"OK 1024\n")?,
                            Some(Answer::Data(at)) => send(&mut clients, at, &part[..64])?,
                            Some(Answer::End) | None => {}
                        }
                    }
                }
                LISTENER => {
                    let (mut stream, _) = listener.accept()?;
                    stream.set_nonblocking(true)?;
                    let at = clients.len();
                    watch(stream.as_fd(), at as u64)?;
                    // Most have written by now.
                    let asked = stream.read(&mut part).is_ok();
                    if asked {
                        answers.push_back(Answer::Open(at));
                        tell()?;
                    }
                    // Each has a number of its own: an answer that is on its way is nobody else's.
                    clients.push(Some((stream, asked)));
                }
                at => {
                    let at = at as usize;
                    let Some((stream, asked)) = &mut clients[at] else { continue };
                    let answer = match stream.read(&mut part) {
                        Ok(0) => Answer::End,
                        Ok(_) if *asked => Answer::Data(at),
                        Ok(_) => Answer::Open(at),
                        Err(error) if error.kind() == ErrorKind::WouldBlock => continue,
                        Err(_) => Answer::End,
                    };
                    *asked = true;
                    if let Answer::End = answer {
                        clients[at] = None;
                    }
                    answers.push_back(answer);
                    tell()?;
                }
            }
        }
    }
}

fn send(clients: &mut [Client], at: usize, bytes: &[u8]) -> Result<(), Failed> {
    if let Some(Some((stream, _))) = clients.get_mut(at) {
        stream.write_all(bytes)?;
    }
    Ok(())
}

/// The relay, and the guest's end of it.
pub(crate) struct Relay {
    pub(crate) daemon: Daemon,
    kick: OwnedFd,
    call: OwnedFd,
}

impl Relay {
    /// On the CPU that all of it is on.
    pub(crate) fn start() -> Result<Relay, Failed> {
        pin_current_thread()?;
        let dir = TempDir::new();
        let (kick, call) = (eventfd(0, EventfdFlags::CLOEXEC)?, eventfd(0, EventfdFlags::CLOEXEC)?);
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(ARGUMENT).arg(dir.join(CLIENTS));
        command.stdin(Stdio::from(kick.try_clone()?)).stdout(Stdio::from(call.try_clone()?));
        Ok(Relay { daemon: Daemon::spawned(&mut command, dir)?, kick, call })
    }

    /// The guest: answers each wake-up by one, until it is enough. It sleeps and wakes as the driver of the daemons does.
    pub(crate) fn answer(&self, enough: &dyn Fn() -> bool) -> Result<(), Failed> {
        const TICK: Timespec = Timespec { tv_sec: 0, tv_nsec: 1_000_000 };
        let events = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        epoll::add(&events, &self.call, epoll::EventData::new_u64(0), epoll::EventFlags::IN)?;
        let mut ready =
            [epoll::Event { flags: epoll::EventFlags::empty(), data: epoll::EventData::new_u64(0) }];
        while !enough() {
            if epoll::wait(&events, &mut ready, Some(&TICK))? > 0 {
                let mut woken = [0; 8];
                rustix::io::read(&self.call, &mut woken)?;
                rustix::io::write(&self.kick, &woken)?;
            }
        }
        Ok(())
    }
}
