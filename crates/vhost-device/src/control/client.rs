//! One client of the control socket.
//!
//! Invariant: while something waits to be written, nothing is read and no news is looked for; so `input` holds one line
//! at most and what came with it in one read, `output` one reply or the news of one round of watches.
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use serde_json::Value as Json;

use super::plane::{Outcome, Plane, Watching};
use super::protocol::{Body, Refusal, RefusalKind, line, parse};
use super::{MAX_LINE, MAX_WATCHES};
use crate::task::Watch;

/// Bytes that one read takes.
const READ: usize = 16 << 10;
/// Requests of one client in one turn.
const REQUESTS: usize = 4;
/// How long a client may leave what it asked for unread.
const PATIENCE: Duration = Duration::from_secs(10);

/// What becomes of a client after a turn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Next {
    /// It waits for its file, or for its time.
    Wait,
    /// There is more to do at once.
    More,
    /// It is over.
    End,
}

struct Watched {
    id: Option<Json>,
    watching: Watching,
    value: Json,
    due: Instant,
}

pub(crate) struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    /// How much of `input` is known to hold no end of a line.
    searched: usize,
    output: Vec<u8>,
    written: usize,
    watches: Vec<Watched>,
    /// When something last went on.
    pub(crate) active: Instant,
    /// No more requests come; what is left is written.
    closing: bool,
    /// Its file has news, or it has more to do.
    pub(crate) due: bool,
    _watch: Watch,
}

impl Client {
    pub(crate) fn new(stream: UnixStream, watch: Watch, now: Instant) -> io::Result<Client> {
        stream.set_nonblocking(true)?;
        Ok(Client {
            stream,
            input: Vec::new(),
            searched: 0,
            output: Vec::new(),
            written: 0,
            watches: Vec::new(),
            active: now,
            closing: false,
            due: true,
            _watch: watch,
        })
    }

    /// When it has to have a turn although its file has no news.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if self.unwritten() {
            return Some(self.active + PATIENCE);
        }
        self.watches.iter().map(|watched| watched.due).min()
    }

    fn unwritten(&self) -> bool {
        self.written < self.output.len()
    }

    /// Reads, answers and writes, as far as that goes without waiting.
    pub(crate) fn turn(&mut self, plane: &Plane, now: Instant) -> Next {
        let next = self.try_turn(plane, now).unwrap_or(Next::End);
        self.due = next == Next::More;
        next
    }

    fn try_turn(&mut self, plane: &Plane, now: Instant) -> io::Result<Next> {
        for _ in 0..REQUESTS {
            if !self.write(now)? {
                let patient = now < self.active + PATIENCE;
                return Ok(if patient { Next::Wait } else { Next::End });
            }
            if self.closing {
                return Ok(Next::End);
            }
            if let Some(end) = self.line_end() {
                self.active = now;
                self.answer(end, plane, now);
            } else if self.input.len() > MAX_LINE {
                let message = format!("a line has {MAX_LINE} bytes at most; the connection ends");
                let refusal = Refusal::new(RefusalKind::BadRequest, message);
                self.output = line(None, Body::Error(refusal));
                self.closing = true;
            } else if !self.read()? && !self.news(plane, now) {
                return Ok(Next::Wait);
            }
        }
        Ok(Next::More)
    }

    /// True: nothing is left to be written.
    fn write(&mut self, now: Instant) -> io::Result<bool> {
        while let Some(rest) = self.output.get(self.written..).filter(|rest| !rest.is_empty()) {
            match self.stream.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(bytes) => {
                    self.written += bytes;
                    self.active = now;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        // A long reply's memory is not kept for short ones.
        self.output = Vec::new();
        self.written = 0;
        Ok(true)
    }

    /// True: something came. The end of the stream ends the client, once what it asked for is written.
    fn read(&mut self) -> io::Result<bool> {
        let mut buffer = [0; READ];
        loop {
            match self.stream.read(&mut buffer) {
                Ok(0) => {
                    self.closing = true;
                    return Ok(true);
                }
                Ok(bytes) => {
                    self.input.extend_from_slice(buffer.get(..bytes).unwrap_or_default());
                    return Ok(true);
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(false),
                Err(error) => return Err(error),
            }
        }
    }

    fn line_end(&mut self) -> Option<usize> {
        let unsearched = self.input.get(self.searched..).unwrap_or_default();
        let end = unsearched.iter().position(|byte| *byte == b'\n').map(|at| self.searched + at);
        self.searched = end.unwrap_or(self.input.len());
        end.filter(|end| *end <= MAX_LINE)
    }

    /// Answers the line that ends at `end`.
    fn answer(&mut self, end: usize, plane: &Plane, now: Instant) {
        let rest = self.input.split_off(end + 1);
        let request = std::mem::replace(&mut self.input, rest);
        self.searched = 0;
        let request = request.trim_ascii();
        if request.is_empty() {
            return;
        }
        let (id, request) = parse(request);
        let full = self.watches.len() >= MAX_WATCHES;
        let outcome = request.and_then(|request| plane.carry_out(request));
        let body = match outcome {
            Ok(Outcome::Reply(reply)) => Body::Ok(reply),
            Ok(Outcome::Watch(..)) if full => {
                let message = format!("a client watches {MAX_WATCHES} properties at most");
                Body::Error(Refusal::new(RefusalKind::Refused, message))
            }
            Ok(Outcome::Watch(value, watching)) => {
                let due = now + watching.interval;
                self.watches.push(Watched { id: id.clone(), watching, value: value.clone(), due });
                Body::Ok(value)
            }
            Ok(Outcome::Unwatch(reply)) => {
                self.watches.clear();
                Body::Ok(reply)
            }
            Err(refusal) => Body::Error(refusal),
        };
        self.output = line(id, body);
    }

    /// Looks at what is watched and due. True: there is something to write.
    fn news(&mut self, plane: &Plane, now: Instant) -> bool {
        let output = &mut self.output;
        self.watches.retain_mut(|watched| {
            if now < watched.due {
                return true;
            }
            watched.due = now + watched.watching.interval;
            match plane.look(&watched.watching) {
                Ok(value) if value == watched.value => true,
                Ok(value) => {
                    watched.value = value.clone();
                    output.extend(line(watched.id.clone(), Body::Event(value)));
                    true
                }
                // It says why, and ends.
                Err(refusal) => {
                    output.extend(line(watched.id.clone(), Body::Error(refusal)));
                    false
                }
            }
        });
        !self.output.is_empty()
    }
}
