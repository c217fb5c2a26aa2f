//! What can be seen and changed while the device runs: its source, and its limit.
use std::time::Duration;

use reactor::Mail;
use vm_virtio::controls::{ControlRequest, Controls, Kind, Property, Value};
use vm_virtio::limit::RateLimit;
use vm_virtio::{HostError, HostReply};

use crate::worker::SetLimit;

const SOURCE: &str = "source";
const MAX_BYTES: &str = "max-bytes";
const PERIOD: &str = "period-ms";

/// As long a path as there can be, and more than that.
const LONGEST: usize = 8 << 10;

/// What a period is if nothing was said: that of the command line.
const DEFAULT_PERIOD: Duration = Duration::from_millis(65536);

pub(crate) fn list() -> Controls {
    Controls {
        properties: vec![
            Property::read_only(SOURCE, Kind::Text { max: LONGEST }, "where the bytes come from"),
            Property::settable(
                MAX_BYTES,
                Kind::ANY_U64,
                "most bytes in a period, for this guest; 0: no limit",
            ),
            Property::settable(
                PERIOD,
                Kind::U64 { min: 1, max: u64::MAX },
                "period of max-bytes, in milliseconds",
            ),
        ],
        commands: Vec::new(),
    }
}

/// What the device knows to answer with.
pub(crate) struct Operator {
    source: String,
    /// None: no limit.
    limit: Option<RateLimit>,
    period: Duration,
    mail: Option<Mail<SetLimit>>,
}

impl Operator {
    pub(crate) fn new(source: String, limit: Option<RateLimit>) -> Operator {
        let period = limit.map_or(DEFAULT_PERIOD, |limit| limit.period());
        Operator { source, limit, period, mail: None }
    }

    fn bytes(&self) -> Option<u64> {
        self.limit.and_then(|limit| limit.bytes())
    }

    /// Where the worker gets its mail.
    pub(crate) fn attach(&mut self, mail: Option<Mail<SetLimit>>) {
        self.mail = mail;
    }

    pub(crate) fn carry_out(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        match request {
            ControlRequest::Get(name) => Ok(HostReply::Value(match name.as_str() {
                SOURCE => Value::Text(self.source.clone()),
                MAX_BYTES => Value::U64(self.bytes().unwrap_or(0)),
                PERIOD => Value::U64(u64::try_from(self.period.as_millis()).unwrap_or(u64::MAX)),
                _ => return Err(HostError::NoSuchProperty(name)),
            })),
            ControlRequest::Set(name, Value::U64(value)) => match name.as_str() {
                MAX_BYTES => self.limit(Some(value).filter(|bytes| *bytes > 0), self.period),
                PERIOD => self.limit(self.bytes(), Duration::from_millis(value)),
                _ => Err(HostError::NoSuchProperty(name)),
            },
            _ => Err(HostError::Unsupported),
        }
    }

    /// Another limit: for the worker first, so that nothing is claimed that it does not know.
    fn limit(&mut self, bytes: Option<u64>, period: Duration) -> Result<HostReply, HostError> {
        let refused = |error: &dyn std::fmt::Display| HostError::Refused(error.to_string());
        let limit = match (self.limit, bytes) {
            // Whatever else is limited stays so.
            (Some(limit), bytes) => limit.with_bytes(bytes, period),
            (None, bytes) => bytes.map(|bytes| RateLimit::new(bytes, period)).transpose(),
        };
        let limit = limit.map_err(|error| refused(&error))?;
        let mail = self.mail.as_ref().ok_or(HostError::Unsupported)?;
        mail.send(SetLimit(limit)).map_err(|_| refused(&"the device has too much to do; try again"))?;
        self.limit = limit;
        self.period = limit.map_or(period, |limit| limit.period());
        Ok(HostReply::Done)
    }
}
