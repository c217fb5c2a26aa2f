//! One control socket: a request, its reply, and news in between.
use std::collections::VecDeque;
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value as Json;
use vhost_device::control::protocol::{Body, PROTOCOL, Reply, Request};
use vhost_device::control::report::Version;

use crate::Failure;

/// Longest reply that is taken: a daemon of a thousand guests stays far below.
const LONGEST: u64 = 256 << 20;

/// A connection to a daemon.
pub(crate) struct Client {
    pub(crate) path: PathBuf,
    stream: BufReader<UnixStream>,
    timeout: Duration,
    next: u64,
    events: VecDeque<(u64, Json)>,
    /// A line that has not come to its end yet.
    partial: Vec<u8>,
}

#[derive(Serialize)]
struct Envelope<'a> {
    id: u64,
    #[serde(flatten)]
    request: &'a Request,
}

impl Client {
    /// Connects, and makes sure that both sides mean the same.
    pub(crate) fn connect(path: &Path, timeout: Duration) -> Result<Client, Failure> {
        let stream = UnixStream::connect(path)
            .map_err(|error| Failure::Unreachable(format!("{}: {error}", path.display())))?;
        let mut client = Client {
            path: path.to_owned(),
            stream: BufReader::new(stream),
            timeout,
            next: 1,
            events: VecDeque::new(),
            partial: Vec::new(),
        };
        client.limit(client.stream.get_ref().set_write_timeout(Some(timeout)))?;
        let version: Version = client.ask(&Request::Version {})?;
        if version.protocol != PROTOCOL {
            return Err(client.gone(format!(
                "{} speaks protocol {}, this program {PROTOCOL}",
                version.name, version.protocol
            )));
        }
        Ok(client)
    }

    fn gone(&self, why: impl std::fmt::Display) -> Failure {
        Failure::Unreachable(format!("{}: {why}", self.path.display()))
    }

    fn limit(&self, outcome: std::io::Result<()>) -> Result<(), Failure> {
        outcome.map_err(|error| self.gone(error))
    }

    /// Sends a request and returns its number.
    pub(crate) fn send(&mut self, request: &Request) -> Result<u64, Failure> {
        let id = self.next;
        self.next += 1;
        let mut line = serde_json::to_vec(&Envelope { id, request }).map_err(|error| self.gone(error))?;
        line.push(b'\n');
        self.stream.get_mut().write_all(&line).map_err(|error| self.gone(error))?;
        Ok(id)
    }

    /// Asks, and waits for the reply; a refusal is a failure.
    pub(crate) fn ask<R: DeserializeOwned>(&mut self, request: &Request) -> Result<R, Failure> {
        let id = self.send(request)?;
        let reply = self.reply(id)?;
        serde_json::from_value(reply)
            .map_err(|error| self.gone(format!("a reply that makes no sense: {error}")))
    }

    /// Waits for the reply to a request; news are kept.
    pub(crate) fn reply(&mut self, id: u64) -> Result<Json, Failure> {
        let deadline = Instant::now() + self.timeout;
        loop {
            let Some(Reply { id: of, body }) = self.line(Some(deadline))? else {
                return Err(self.gone("no answer in time"));
            };
            let of = of.as_ref().and_then(Json::as_u64);
            match body {
                Body::Ok(reply) if of == Some(id) => return Ok(reply),
                // One without a number is about the connection.
                Body::Error(refusal) if of == Some(id) || of.is_none() => {
                    return Err(Failure::Refused(refusal.to_string()));
                }
                Body::Event(news) => self.events.extend(of.map(|of| (of, news))),
                _ => {}
            }
        }
    }

    /// News of a watch, if some come until the deadline.
    pub(crate) fn event(&mut self, deadline: Instant) -> Result<Option<(u64, Json)>, Failure> {
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Some(event));
            }
            match self.line(Some(deadline))? {
                None => return Ok(None),
                Some(Reply { id, body: Body::Event(news) }) => {
                    self.events.extend(id.as_ref().and_then(Json::as_u64).map(|id| (id, news)));
                }
                Some(Reply { body: Body::Error(refusal), .. }) => {
                    return Err(Failure::Refused(refusal.to_string()));
                }
                Some(_) => {}
            }
        }
    }

    /// The next line; none if it does not come in time.
    fn line(&mut self, deadline: Option<Instant>) -> Result<Option<Reply>, Failure> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left.is_some_and(|left| left.is_zero()) {
                return Ok(None);
            }
            self.limit(self.stream.get_ref().set_read_timeout(left))?;
            let room = LONGEST.saturating_sub(self.partial.len() as u64);
            match (&mut self.stream).take(room).read_until(b'\n', &mut self.partial) {
                Ok(_) if self.partial.ends_with(b"\n") => break,
                Ok(0) if room > 0 => return Err(self.gone("the daemon hung up")),
                Ok(0) => return Err(self.gone("a reply that does not end")),
                Ok(_) => {}
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => {}
                    _ => return Err(self.gone(error)),
                },
            }
        }
        let line = std::mem::take(&mut self.partial);
        let reply = serde_json::from_slice(&line);
        reply.map(Some).map_err(|error| self.gone(format!("a line that is no reply: {error}")))
    }
}
