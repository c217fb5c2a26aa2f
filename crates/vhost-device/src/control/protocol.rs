//! Requests and replies of the control socket. Daemons and their clients use the same types.
//!
//! A request that has a member nobody knows is refused: it means something that would not happen. A reply may have more
//! members than a client knows.
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value as Json};
use vm_virtio::HostError;
use vm_virtio::controls::{Argument, ControlCommand, Kind, Property, Value};

use crate::logging::LogLevel;

/// Version of the protocol: changes when something that was there changes or goes, not when something is added.
pub const PROTOCOL: u32 = 1;

/// What a client can ask for. `guest` left out: all guests, where a reply can be about all; else the only one.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Request {
    /// Who is there: [`Version`](super::report::Version).
    Version {},
    /// How guests are: [`Status`](super::report::Status).
    Status {
        /// Which guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
    },
    /// Counters: [`Stats`](super::report::Stats).
    Stats {
        /// Which guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
    },
    /// Counters as Prometheus text: [`Text`].
    Prometheus {},
    /// How much is logged, after the change if one is asked for: [`Level`].
    LogLevel {
        /// The new level; none changes nothing.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        level: Option<LogLevel>,
    },
    /// What can be read, set and run: [`Lists`].
    List {
        /// Which guest.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
    },
    /// The value of a property: [`Got`].
    Get {
        /// Whose.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
        /// Which.
        property: String,
    },
    /// Changes a property: [`Done`].
    Set {
        /// Whose.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
        /// Which.
        property: String,
        /// To what.
        value: Json,
        /// Say what would be wrong, change nothing.
        #[serde(default, skip_serializing_if = "is_false")]
        check: bool,
    },
    /// Runs a command of the device: [`Done`], or [`Got`] if it finds something out.
    Run {
        /// Whose.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
        /// Which.
        command: String,
        /// By name.
        #[serde(default, skip_serializing_if = "Map::is_empty")]
        arguments: Map<String, Json>,
        /// Say what would be wrong, run nothing.
        #[serde(default, skip_serializing_if = "is_false")]
        check: bool,
    },
    /// The value of a property now, [`Got`], and from then on an event with the same content whenever it is another.
    Watch {
        /// Whose.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        guest: Option<u32>,
        /// Which.
        property: String,
        /// Time between two looks; none: 1000.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        interval_ms: Option<u64>,
    },
    /// Ends all watches of this connection: [`Done`].
    Unwatch {},
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "serde passes references")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A line that a daemon sends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Reply {
    /// That of the request; none if it had none, or could not be read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<Json>,
    /// What it is.
    #[serde(flatten)]
    pub body: Body,
}

/// What a daemon says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Body {
    /// What was asked for.
    Ok(Json),
    /// Why not.
    Error(Refusal),
    /// News of a watch.
    Event(Json),
}

/// Why a request was not carried out. Nothing has changed then.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Refusal {
    /// For programs.
    pub kind: RefusalKind,
    /// For people.
    pub message: String,
}

/// Kinds of refusals.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum RefusalKind {
    /// Not JSON, no object, an unknown request or member, a line that is too long.
    BadRequest,
    /// No such guest, or more than one where one is needed.
    NoSuchGuest,
    /// No such property, command or argument.
    UnknownName,
    /// A value that does not fit, an argument that is missing, a property that cannot be set.
    BadValue,
    /// It makes sense, but not now, or not here.
    Refused,
    /// It was tried and failed.
    Failed,
    /// A kind that this client does not know.
    #[serde(other)]
    Unknown,
}

impl Refusal {
    pub(crate) fn new(kind: RefusalKind, message: impl Into<String>) -> Refusal {
        Refusal { kind, message: message.into() }
    }
}

impl From<HostError> for Refusal {
    fn from(error: HostError) -> Refusal {
        use HostError as E;
        let kind = match &error {
            E::NoSuchProperty(_) | E::NoSuchCommand(_) | E::NoSuchArgument(_) => RefusalKind::UnknownName,
            E::ArgumentMissing(_) | E::ArgumentTwice(_) | E::ReadOnly(_) | E::Value { .. } => {
                RefusalKind::BadValue
            }
            E::Failed(_) | E::Panicked => RefusalKind::Failed,
            _ => RefusalKind::Refused,
        };
        Refusal::new(kind, error.to_string())
    }
}

/// Nothing to say but that it is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {}

/// A text.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Text {
    /// It.
    pub text: String,
}

/// A level.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Level {
    /// It.
    pub level: LogLevel,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Got {
    /// Whose.
    pub guest: u32,
    /// It: true or false, a number, or text.
    pub value: Json,
}

/// What can be read, set and run on each guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lists {
    /// By guest.
    pub guests: Vec<List>,
}

/// What can be read, set and run on one guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct List {
    /// Its number.
    pub guest: u32,
    /// What can be read, and perhaps set.
    pub properties: Vec<ListedProperty>,
    /// What can be run.
    pub commands: Vec<ListedCommand>,
}

/// What is told of a property.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedProperty {
    /// Its name.
    pub name: String,
    /// Whether it can be set.
    pub settable: bool,
    /// Which values it can have.
    pub kind: ListedKind,
    /// What it is.
    pub help: String,
}

/// What is told of a command.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedCommand {
    /// Its name.
    pub name: String,
    /// Its arguments.
    pub arguments: Vec<ListedArgument>,
    /// What it does.
    pub help: String,
}

/// What is told of an argument.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListedArgument {
    /// Its name.
    pub name: String,
    /// Whether the command cannot do without.
    pub required: bool,
    /// Which values it can have.
    pub kind: ListedKind,
    /// What it is.
    pub help: String,
}

/// Which values something can have.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "kebab-case")]
#[non_exhaustive]
pub enum ListedKind {
    /// True or false.
    Bool,
    /// A number of a range, both ends included.
    Number {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// Text.
    Text {
        /// Most bytes.
        max: usize,
    },
    /// One of these texts.
    Choice {
        /// These.
        choices: Vec<String>,
    },
    /// A kind that this client does not know.
    #[serde(other)]
    Unknown,
}

impl From<&Kind> for ListedKind {
    fn from(kind: &Kind) -> Self {
        match kind {
            Kind::Bool => ListedKind::Bool,
            Kind::U64 { min, max } => ListedKind::Number { min: *min, max: *max },
            Kind::Text { max } => ListedKind::Text { max: *max },
            Kind::Choice(choices) => {
                ListedKind::Choice { choices: choices.iter().map(ToString::to_string).collect() }
            }
            _ => ListedKind::Unknown,
        }
    }
}

impl From<&Property> for ListedProperty {
    fn from(property: &Property) -> Self {
        let Property { name, kind, settable, help } = property;
        ListedProperty {
            name: name.to_string(),
            settable: *settable,
            kind: kind.into(),
            help: help.to_string(),
        }
    }
}

impl From<&Argument> for ListedArgument {
    fn from(argument: &Argument) -> Self {
        let Argument { name, kind, required, help } = argument;
        ListedArgument {
            name: name.to_string(),
            required: *required,
            kind: kind.into(),
            help: help.to_string(),
        }
    }
}

impl From<&ControlCommand> for ListedCommand {
    fn from(command: &ControlCommand) -> Self {
        let ControlCommand { name, arguments, help } = command;
        let arguments = arguments.iter().map(ListedArgument::from).collect();
        ListedCommand { name: name.to_string(), arguments, help: help.to_string() }
    }
}

/// A value on its way out.
pub(crate) fn to_json(value: &Value) -> Json {
    match value {
        Value::Bool(value) => Json::Bool(*value),
        Value::U64(value) => Json::from(*value),
        Value::Text(value) => Json::String(value.clone()),
        other => Json::String(other.to_string()),
    }
}

/// A value on its way in.
pub(crate) fn from_json(name: &str, json: Json) -> Result<Value, Refusal> {
    match json {
        Json::Bool(value) => Some(Value::Bool(value)),
        Json::Number(number) => number.as_u64().map(Value::U64),
        Json::String(text) => Some(Value::Text(text)),
        _ => None,
    }
    .ok_or_else(|| {
        let message = format!("{name:?} must be true, false, a whole number from 0 to 2^64-1, or text");
        Refusal::new(RefusalKind::BadValue, message)
    })
}

/// Takes a line apart: the request's id, if that can be told, and the request.
pub(crate) fn parse(line: &[u8]) -> (Option<Json>, Result<Request, Refusal>) {
    let bad = |message: String| Refusal::new(RefusalKind::BadRequest, message);
    let mut object = match serde_json::from_slice::<Map<String, Json>>(line) {
        Ok(object) => object,
        Err(error) => return (None, Err(bad(format!("the line is no JSON object: {error}")))),
    };
    let id = object.remove("id");
    if matches!(id, Some(Json::Object(_) | Json::Array(_))) {
        return (None, Err(bad("\"id\" must be a number or text".into())));
    }
    let request = serde_json::from_value(Json::Object(object)).map_err(|error| bad(error.to_string()));
    (id, request)
}

/// A line, with its end.
pub(crate) fn line(id: Option<Json>, body: Body) -> Vec<u8> {
    let mut line = serde_json::to_vec(&Reply { id, body }).unwrap_or_else(|error| {
        // Keys are strings and numbers are finite: it cannot fail.
        format!(r#"{{"error":{{"kind":"failed","message":"{error}"}}}}"#).into_bytes()
    });
    line.push(b'\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(line: &str) -> String {
        let (_, request) = parse(line.as_bytes());
        let refusal = request.expect_err(line);
        assert_eq!(refusal.kind, RefusalKind::BadRequest, "{line}");
        refusal.message
    }

    #[test]
    fn requests_are_what_the_document_says() {
        let lines = [
            (r#"{"request":"version"}"#, Request::Version {}),
            (r#"{"request":"stats","guest":3}"#, Request::Stats { guest: Some(3) }),
            (
                r#"{"request":"log-level","level":"debug"}"#,
                Request::LogLevel { level: Some(LogLevel::Debug) },
            ),
            (
                r#"{"request":"set","property":"p","value":7}"#,
                Request::Set { guest: None, property: "p".into(), value: Json::from(7), check: false },
            ),
        ];
        for (line, request) in lines {
            assert_eq!(parse(line.as_bytes()), (None, Ok(request.clone())), "{line}");
            assert_eq!(serde_json::to_string(&request).unwrap(), line);
        }
        let (id, request) = parse(br#"{"request":"version","id":"x-1"}"#);
        assert_eq!((id, request), (Some(Json::from("x-1")), Ok(Request::Version {})));
    }

    #[test]
    fn members_that_nobody_knows_are_refused() {
        assert!(refused(r#"{"request":"version","verbose":true}"#).contains("verbose"));
        assert!(refused(r#"{"request":"stats","gest":1}"#).contains("gest"));
        assert!(refused(r#"{"request":"warp"}"#).contains("warp"));
    }

    #[test]
    fn garbage_is_refused() {
        for line in ["", "x", "[]", "7", "null", "{", "\"\\ud800\"", "{}", r#"{"request":7}"#, "\u{0}"] {
            refused(line);
        }
        refused(r#"{"request":"stats","guest":-1}"#);
        refused(r#"{"request":"version","id":{}}"#);
        let deep = "[".repeat(100_000);
        refused(&format!(r#"{{"request":"set","property":"p","value":{deep}"#));
    }

    #[test]
    fn values_that_are_no_plain_ones_are_refused() {
        for json in [r#"{}"#, "[]", "null", "-1", "1.5", "1e30", "18446744073709551616"] {
            let value = serde_json::from_str(json).unwrap();
            assert_eq!(from_json("p", value).expect_err(json).kind, RefusalKind::BadValue);
        }
        assert_eq!(from_json("p", Json::from(u64::MAX)), Ok(Value::U64(u64::MAX)));
    }
}
