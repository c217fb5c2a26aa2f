//! Carries requests out: everything that a control client can see or touch.
//!
//! Runs on the main thread, between turns of guests. Nothing here waits: counters are read, and a device that is asked
//! must not block.
use std::rc::Rc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;
use serde_json::{Map, Value as Json};
use vm_virtio::controls::{Arguments, ControlRequest, Controls};
use vm_virtio::device::VirtioDevice;
use vm_virtio::lane::Latency as Samples;
use vm_virtio::{Features, HostError, HostReply, HostRequest, Status as DeviceStatus};

use super::protocol::{
    Done, Got, Level, List, Lists, PROTOCOL, Refusal, RefusalKind, Request, Text, from_json, to_json,
};
use super::report::{
    Failures, GuestStats, GuestStatus, Latency, Process, QueueErrors, QueueStats, Stats, Status, Version,
};
use super::{MIN_INTERVAL_MS, prometheus};
use crate::Identity;
use crate::guest::Guest;
use crate::logging::Logging;

/// What a client can do with one guest, whatever its device.
pub(crate) trait Operated {
    fn status(&self) -> GuestStatus;
    fn stats(&self) -> GuestStats;
    fn controls(&self) -> &Controls;
    fn control(&self, request: ControlRequest) -> Result<HostReply, HostError>;
}

impl<D: VirtioDevice> Operated for Guest<D> {
    fn status(&self) -> GuestStatus {
        guest_status(self)
    }

    fn stats(&self) -> GuestStats {
        guest_stats(self)
    }

    fn controls(&self) -> &Controls {
        self.engine.controls()
    }

    fn control(&self, request: ControlRequest) -> Result<HostReply, HostError> {
        self.engine.host_request(HostRequest::Control(request))
    }
}

/// How a guest is.
fn guest_status<D: VirtioDevice>(guest: &Guest<D>) -> GuestStatus {
    let status = guest.status();
    GuestStatus {
        guest: guest.index,
        socket: guest.socket.as_ref().map(|path| path.display().to_string()),
        device: guest.engine.device_type().to_string(),
        connected: guest.counts.connected.get(),
        status: status.iter_names().map(|(name, _)| name.to_owned()).collect(),
        needs_reset: status.contains(DeviceStatus::DEVICE_NEEDS_RESET),
        last_failure: guest.last_failure.borrow().clone(),
        offered: names(guest.engine.offered()),
        negotiated: names(guest.engine.driver_features()),
    }
}

/// Names of features; those of the device's own are called by their bits.
fn names(features: Features) -> Vec<String> {
    let bits = (0..u128::BITS).filter(|bit| features.bits() >> bit & 1 == 1);
    bits.map(|bit| {
        let name = Features::from_bits_retain(1 << bit).names().next();
        name.map_or_else(|| format!("bit_{bit}"), str::to_owned)
    })
    .collect()
}

/// What happened to a guest.
fn guest_stats<D: VirtioDevice>(guest: &Guest<D>) -> GuestStats {
    let queues: Vec<_> = (0..)
        .zip(guest.engine.queues())
        .map(|(queue, spec)| queue_stats(queue, spec.name, guest.engine.stats(queue).unwrap_or_default()))
        .collect();
    let counts = &guest.counts;
    let failures = guest.engine.failures();
    let (refused, broken) = (counts.refused.get(), counts.broken.get());
    let turned_away = counts.turned_away.get();
    GuestStats {
        guest: guest.index,
        connected: counts.connected.get(),
        needs_reset: guest.engine.status().contains(DeviceStatus::DEVICE_NEEDS_RESET),
        connects: counts.connects.get(),
        messages: counts.messages.get(),
        messages_refused: refused,
        connections_broken: broken,
        turned_away,
        failures: Failures {
            ring: failures.queue_faults.load(Ordering::Relaxed),
            request: queues.iter().map(|queue| queue.errors.refused).sum(),
            backend: queues.iter().map(|queue| queue.errors.failed).sum(),
            front_end: refused + broken + turned_away,
            worker: failures.worker_failures.load(Ordering::Relaxed),
            memory: failures.memory.load(Ordering::Relaxed),
            stuck: [&failures.stuck, &failures.unreleased, &failures.unanswered]
                .map(|count| count.load(Ordering::Relaxed))
                .iter()
                .sum(),
        },
        queues,
    }
}

fn queue_stats(queue: u16, name: &str, stats: vm_virtio::lane::QueueStats) -> QueueStats {
    let requests = stats.requests;
    QueueStats {
        queue,
        name: name.to_owned(),
        requests: requests.popped,
        completed: requests.completed,
        bytes_read: requests.bytes_read,
        bytes_written: requests.bytes_written,
        kicks: stats.kicks,
        interrupts: stats.interrupts,
        turns: stats.turns,
        out: stats.out,
        most_at_once: stats.most_at_once,
        errors: QueueErrors {
            ring: stats.faults,
            refused: requests.refused,
            failed: requests.failed,
            swept: requests.swept,
            discarded: requests.discarded,
            clamped: requests.clamped,
            foreign: requests.foreign,
        },
        latency: Latency {
            bounds_us: (0..).map_while(Samples::bound).map(|end| end.as_micros() as u64).collect(),
            buckets: stats.latency.buckets.to_vec(),
            sum_ns: stats.latency.sum,
            max_ns: stats.latency.max,
        },
    }
}

/// A property that a client watches.
pub(crate) struct Watching {
    guest: u32,
    property: String,
    pub(crate) interval: Duration,
}

/// What a request comes to.
pub(crate) enum Outcome {
    Reply(Json),
    /// A reply, and news from then on.
    Watch(Json, Watching),
    /// A reply, and no news any more.
    Unwatch(Json),
}

/// Everything that clients share.
pub(crate) struct Plane {
    identity: Identity,
    logging: Rc<Logging>,
    began: Instant,
    began_at: SystemTime,
    guests: Vec<Rc<dyn Operated>>,
}

impl Plane {
    pub(crate) fn new(identity: Identity, logging: Rc<Logging>) -> Plane {
        let (began, began_at) = (Instant::now(), SystemTime::now());
        Plane { identity, logging, began, began_at, guests: Vec::new() }
    }

    /// Guests are added in the order of their numbers.
    pub(crate) fn add(&mut self, guest: Rc<dyn Operated>) {
        self.guests.push(guest);
    }

    /// Carries one request out.
    pub(crate) fn carry_out(&self, request: Request) -> Result<Outcome, Refusal> {
        let reply = match request {
            Request::Version {} => json(&self.version()),
            Request::Status { guest } => json(&Status {
                version: self.version(),
                process: self.process(),
                guests: self.chosen(guest)?.map(|(_, guest)| guest.status()).collect(),
            }),
            Request::Stats { guest } => json(&self.stats(guest)?),
            Request::Prometheus {} => {
                let stats = self.stats(None)?;
                let source = prometheus::Source { labels: Vec::new(), stats: &stats };
                json(&Text { text: prometheus::render(&[source]) })
            }
            Request::LogLevel { level } => {
                if let Some(level) = level {
                    self.logging.set_level(level).map_err(|why| Refusal::new(RefusalKind::Refused, why))?;
                }
                json(&Level { level: self.logging.level() })
            }
            Request::List { guest } => {
                let list = |(number, guest): (u32, &dyn Operated)| List {
                    guest: number,
                    properties: guest.controls().properties.iter().map(Into::into).collect(),
                    commands: guest.controls().commands.iter().map(Into::into).collect(),
                };
                json(&Lists { guests: self.chosen(guest)?.map(list).collect() })
            }
            Request::Get { guest, property } => json(&self.get(self.one(guest)?.0, &property)?),
            Request::Set { guest, property, value, check } => {
                let value = from_json(&property, value)?;
                self.control(guest, ControlRequest::Set(property, value), check)
            }
            Request::Run { guest, command, arguments, check } => {
                let request = ControlRequest::Run(command, plain(arguments)?);
                self.control(guest, request, check)
            }
            Request::Watch { guest, property, interval_ms } => {
                let interval_ms = interval_ms.unwrap_or(1000);
                if interval_ms < MIN_INTERVAL_MS {
                    let message = format!("\"interval_ms\" must be {MIN_INTERVAL_MS} or more");
                    return Err(Refusal::new(RefusalKind::BadValue, message));
                }
                let (guest, _) = self.one(guest)?;
                let reply = json(&self.get(guest, &property)?)?;
                let interval = Duration::from_millis(interval_ms);
                return Ok(Outcome::Watch(reply, Watching { guest, property, interval }));
            }
            Request::Unwatch {} => return Ok(Outcome::Unwatch(json(&Done {})?)),
        };
        reply.map(Outcome::Reply)
    }

    /// What a watched property is now.
    pub(crate) fn look(&self, watching: &Watching) -> Result<Json, Refusal> {
        json(&self.get(watching.guest, &watching.property)?)
    }

    fn get(&self, guest: u32, property: &str) -> Result<Got, Refusal> {
        let (number, guest) = self.one(Some(guest))?;
        match guest.control(ControlRequest::Get(property.to_owned()))? {
            HostReply::Value(value) => Ok(Got { guest: number, value: to_json(&value) }),
            _ => Err(Refusal::new(RefusalKind::Failed, "the device gives no value")),
        }
    }

    fn control(&self, guest: Option<u32>, request: ControlRequest, check: bool) -> Result<Json, Refusal> {
        let (number, guest) = self.one(guest)?;
        if check {
            guest.controls().check(&request)?;
            return json(&Done {});
        }
        tracing::info!(guest = number, ?request, "asked for by a control client");
        match guest.control(request)? {
            HostReply::Value(value) => json(&Got { guest: number, value: to_json(&value) }),
            _ => json(&Done {}),
        }
    }

    /// The guest that is meant where one is needed.
    fn one(&self, guest: Option<u32>) -> Result<(u32, &dyn Operated), Refusal> {
        if guest.is_none() && self.guests.len() != 1 {
            let message = format!("there are {} guests; say which with \"guest\"", self.guests.len());
            return Err(Refusal::new(RefusalKind::NoSuchGuest, message));
        }
        let number = guest.unwrap_or(0);
        match self.guests.get(number as usize) {
            Some(guest) => Ok((number, &**guest)),
            None => {
                let message = format!("there is no guest {number}; guests are counted from 0");
                Err(Refusal::new(RefusalKind::NoSuchGuest, message))
            }
        }
    }

    /// The guests that are meant where all may be.
    fn chosen(&self, guest: Option<u32>) -> Result<impl Iterator<Item = (u32, &dyn Operated)>, Refusal> {
        if guest.is_some() {
            self.one(guest)?;
        }
        let all = (0..).zip(self.guests.iter().map(|guest| &**guest));
        Ok(all.filter(move |(number, _)| guest.is_none_or(|only| only == *number)))
    }

    fn stats(&self, guest: Option<u32>) -> Result<Stats, Refusal> {
        Ok(Stats {
            version: self.version(),
            process: self.process(),
            guests: self.chosen(guest)?.map(|(_, guest)| guest.stats()).collect(),
        })
    }

    fn version(&self) -> Version {
        let Identity { name, version, .. } = self.identity;
        Version { protocol: PROTOCOL, name: name.into(), version: version.into() }
    }

    fn process(&self) -> Process {
        let started = self.began_at.duration_since(UNIX_EPOCH).unwrap_or_default();
        Process {
            pid: std::process::id(),
            uptime_ms: u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX),
            started_s: started.as_secs(),
            resident_bytes: resident_bytes(),
            log_level: self.logging.level(),
            log_lines_suppressed: self.logging.suppressed(),
        }
    }
}

/// Second field of /proc/self/statm: pages in memory (proc(5)).
fn resident_bytes() -> Option<u64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: u64 = statm.split_ascii_whitespace().nth(1)?.parse().ok()?;
    pages.checked_mul(u64::try_from(rustix::param::page_size()).ok()?)
}

fn json(reply: &impl Serialize) -> Result<Json, Refusal> {
    serde_json::to_value(reply).map_err(|error| Refusal::new(RefusalKind::Failed, error.to_string()))
}

fn plain(arguments: Map<String, Json>) -> Result<Arguments, Refusal> {
    let plain = arguments.into_iter().map(|(name, value)| {
        let value = from_json(&name, value)?;
        Ok((name, value))
    });
    plain.collect::<Result<_, Refusal>>().map(Arguments)
}
