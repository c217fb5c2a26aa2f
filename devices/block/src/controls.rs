//! What can be seen and changed while the device runs: its image, its size, its rate limit.
use std::sync::Arc;

use reactor::Mail;
use vm_virtio::controls::{
    Argument, Arguments, ControlCommand, ControlRequest, Controls, Kind, Property, Value,
};
use vm_virtio::limit::RateLimit;
use vm_virtio::{HostError, HostReply};

use crate::SECTOR;
use crate::shared::Shared;
use crate::worker::{Order, What};

const IMAGE: &str = "image";
const SIZE: &str = "size";
const READ_ONLY: &str = "read-only";
const WRITEBACK: &str = "writeback";
const RATE_LIMIT: &str = "rate-limit";
const RESIZE: &str = "resize";
const BYTES: &str = "bytes";

/// What stands for no limit.
const NONE: &str = "none";

/// As long a path as there can be, and more than that.
const LONGEST: usize = 8 << 10;

pub(crate) fn list() -> Controls {
    Controls {
        properties: vec![
            Property::read_only(IMAGE, Kind::Text { max: LONGEST }, "where the disk's bytes are kept"),
            Property::read_only(SIZE, Kind::ANY_U64, "size of the disk as the guest is told, in bytes"),
            Property::read_only(READ_ONLY, Kind::Bool, "whether the guest cannot write"),
            Property::read_only(
                WRITEBACK,
                Kind::Bool,
                "the writeback register: true if the guest flushes its writes, false if each write is flushed",
            ),
            Property::settable(
                RATE_LIMIT,
                Kind::Text { max: 256 },
                "what this guest gets in a period, in the words of --rate-limit; none: no limit",
            ),
        ],
        commands: vec![ControlCommand {
            name: RESIZE.into(),
            arguments: vec![Argument {
                name: BYTES.into(),
                kind: Kind::U64 { min: SECTOR, max: i64::MAX as u64 },
                required: false,
                help: "make the image file this large first".into(),
            }],
            help:
                "look how large the image is now, and tell the guest; the outcome is in size and in the log"
                    .into(),
        }],
    }
}

/// What the device knows to answer with.
pub(crate) struct Operator {
    image: String,
    shared: Arc<Shared>,
    limit: String,
    mail: Vec<Mail<Order>>,
}

impl Operator {
    pub(crate) fn new(image: String, shared: Arc<Shared>, limit: Option<RateLimit>) -> Operator {
        let limit = if limit.is_some() { "as on the command line" } else { NONE };
        Operator { image, shared, limit: limit.to_owned(), mail: Vec::new() }
    }

    /// Where the workers get their mail.
    pub(crate) fn attach(&mut self, mail: &[Mail<Order>]) {
        self.mail = mail.to_vec();
    }

    pub(crate) fn carry_out(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        match request {
            ControlRequest::Get(name) => Ok(HostReply::Value(match name.as_str() {
                IMAGE => Value::Text(self.image.clone()),
                SIZE => Value::U64(self.shared.capacity().saturating_mul(SECTOR)),
                READ_ONLY => Value::Bool(self.shared.read_only),
                WRITEBACK => Value::Bool(self.shared.writeback()),
                RATE_LIMIT => Value::Text(self.limit.clone()),
                _ => return Err(HostError::NoSuchProperty(name)),
            })),
            ControlRequest::Set(name, Value::Text(text)) if name == RATE_LIMIT => self.set_limit(text),
            ControlRequest::Run(name, arguments) if name == RESIZE => self.resize(&arguments),
            _ => Err(HostError::Unsupported),
        }
    }

    fn set_limit(&mut self, text: String) -> Result<HostReply, HostError> {
        let limit = match text.as_str() {
            NONE => None,
            _ => Some(text.parse().map_err(|error| HostError::Refused(format!("{error}")))?),
        };
        self.shared.set_limit(limit);
        self.limit = text;
        for mail in &self.mail {
            // A lane whose mailbox is full has something to do, and looks at the limit then.
            let _ = mail.send(Order(What::LookAgain));
        }
        Ok(HostReply::Done)
    }

    fn resize(&self, arguments: &Arguments) -> Result<HostReply, HostError> {
        let bytes = arguments.u64(BYTES);
        if bytes.is_some() && self.shared.read_only {
            return Err(HostError::Refused(
                "the disk is read-only; its file is somebody else's to change".into(),
            ));
        }
        let mail = self.mail.first().ok_or(HostError::Unsupported)?;
        let busy = |_| HostError::Refused("the device has too much to do; try again".into());
        mail.send(Order(What::Resize(bytes))).map_err(busy)?;
        Ok(HostReply::Done)
    }
}
