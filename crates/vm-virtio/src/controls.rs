//! What whoever operates a device may look at and change while it runs: properties (the level of a line, a rate limit,
//! a capacity) and commands (resize, unplug).
//!
//! A device lists them once, as [`Controls`]; that list is the only description there is. Hosts check requests against
//! it before the device hears of them, and tools make their help from it.
use crate::host_request::HostError;
use std::borrow::Cow;
use std::fmt;

/// Names, in Rust's spelling: fixed by the device's type, or made from how many lines or ports this one has.
pub type Name = Cow<'static, str>;

/// A plain value.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Value {
    /// Yes or no.
    Bool(bool),
    /// A number.
    U64(u64),
    /// Text.
    Text(String),
}

impl fmt::Display for Value {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Value::Bool(value) => value.fmt(f),
            Value::U64(value) => value.fmt(f),
            Value::Text(value) => f.write_str(value),
        }
    }
}

/// Which values a property or an argument can have.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Kind {
    /// [`Value::Bool`].
    Bool,
    /// [`Value::U64`] from `min` to `max`, both included.
    U64 {
        /// The least.
        min: u64,
        /// The most.
        max: u64,
    },
    /// [`Value::Text`] of at most so many bytes.
    Text {
        /// Most bytes.
        max: usize,
    },
    /// [`Value::Text`], one of these.
    Choice(Vec<Name>),
}

impl Kind {
    /// Any number.
    pub const ANY_U64: Kind = Kind::U64 { min: 0, max: u64::MAX };

    /// Whether the value is of this kind.
    pub fn admits(&self, value: &Value) -> bool {
        match (self, value) {
            (Kind::Bool, Value::Bool(_)) => true,
            (Kind::U64 { min, max }, Value::U64(value)) => (min..=max).contains(&value),
            (Kind::Text { max }, Value::Text(text)) => text.len() <= *max,
            (Kind::Choice(choices), Value::Text(text)) => choices.iter().any(|choice| choice == text),
            _ => false,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Kind::Bool => f.write_str("true or false"),
            Kind::U64 { min: 0, max: u64::MAX } => f.write_str("a number"),
            Kind::U64 { min, max: u64::MAX } => write!(f, "a number from {min} on"),
            Kind::U64 { min, max } => write!(f, "a number from {min} to {max}"),
            Kind::Text { max } => write!(f, "text of up to {max} bytes"),
            Kind::Choice(choices) => write!(f, "one of {}", choices.join(", ")),
        }
    }
}

/// Something that can be read and, perhaps, set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Property {
    /// What it is called: lower-case words, `-` and `.` between them, e.g. `line.3.level`.
    pub name: Name,
    /// Which values it can have.
    pub kind: Kind,
    /// Whether it can be set.
    pub settable: bool,
    /// What it is, with its unit, in one line.
    pub help: Name,
}

impl Property {
    /// A property that can be read only.
    pub fn read_only(name: impl Into<Name>, kind: Kind, help: impl Into<Name>) -> Property {
        Property { name: name.into(), kind, settable: false, help: help.into() }
    }

    /// A property that can also be set.
    pub fn settable(name: impl Into<Name>, kind: Kind, help: impl Into<Name>) -> Property {
        Property { settable: true, ..Property::read_only(name, kind, help) }
    }
}

/// An argument of a command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Argument {
    /// What it is called.
    pub name: Name,
    /// Which values it can have.
    pub kind: Kind,
    /// Whether the command cannot do without.
    pub required: bool,
    /// What it is, with its unit, in one line.
    pub help: Name,
}

/// Something that a device can be told to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ControlCommand {
    /// What it is called: spelled as properties are.
    pub name: Name,
    /// Its arguments.
    pub arguments: Vec<Argument>,
    /// What it does, in one line.
    pub help: Name,
}

/// Everything that can be read, set and run; constant for the life of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Controls {
    /// The properties.
    pub properties: Vec<Property>,
    /// The commands.
    pub commands: Vec<ControlCommand>,
}

/// The arguments of a command, as they were given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Arguments(pub Vec<(String, Value)>);

impl Arguments {
    /// An argument by its name.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.iter().find(|(given, _)| given == name).map(|(_, value)| value)
    }

    /// A number by its name.
    pub fn u64(&self, name: &str) -> Option<u64> {
        if let Some(Value::U64(value)) = self.get(name) { Some(*value) } else { None }
    }

    /// A yes or no by its name.
    pub fn bool(&self, name: &str) -> Option<bool> {
        if let Some(Value::Bool(value)) = self.get(name) { Some(*value) } else { None }
    }

    /// A text by its name.
    pub fn text(&self, name: &str) -> Option<&str> {
        if let Some(Value::Text(value)) = self.get(name) { Some(value) } else { None }
    }
}

/// A request of whoever operates the device. What reaches a device fits its [`Controls`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ControlRequest {
    /// The value of a property.
    Get(String),
    /// A new value for a property.
    Set(String, Value),
    /// A command.
    Run(String, Arguments),
}

impl Controls {
    /// A property by its name.
    pub fn property(&self, name: &str) -> Option<&Property> {
        self.properties.iter().find(|property| property.name == name)
    }

    /// A command by its name.
    pub fn command(&self, name: &str) -> Option<&ControlCommand> {
        self.commands.iter().find(|command| command.name == name)
    }

    /// Whether a request makes sense to the device that these belong to. Without side effects, so that a list of
    /// requests can be checked before the first is carried out.
    pub fn check(&self, request: &ControlRequest) -> Result<(), HostError> {
        match request {
            ControlRequest::Get(name) => {
                self.property(name).map(drop).ok_or_else(|| HostError::NoSuchProperty(name.clone()))
            }
            ControlRequest::Set(name, value) => {
                let property = self.property(name).ok_or_else(|| HostError::NoSuchProperty(name.clone()))?;
                if !property.settable {
                    return Err(HostError::ReadOnly(name.clone()));
                }
                fits(&property.name, &property.kind, value)
            }
            ControlRequest::Run(name, arguments) => {
                let command = self.command(name).ok_or_else(|| HostError::NoSuchCommand(name.clone()))?;
                command.check(arguments)
            }
        }
    }
}

impl ControlCommand {
    fn check(&self, arguments: &Arguments) -> Result<(), HostError> {
        for (index, (name, value)) in arguments.0.iter().enumerate() {
            let argument = self.arguments.iter().find(|argument| argument.name == *name);
            let argument = argument.ok_or_else(|| HostError::NoSuchArgument(name.clone()))?;
            if arguments.0.iter().take(index).any(|(earlier, _)| earlier == name) {
                return Err(HostError::ArgumentTwice(name.clone()));
            }
            fits(name, &argument.kind, value)?;
        }
        match self
            .arguments
            .iter()
            .find(|argument| argument.required && arguments.get(&argument.name).is_none())
        {
            Some(missing) => Err(HostError::ArgumentMissing(missing.name.clone().into_owned())),
            None => Ok(()),
        }
    }
}

fn fits(name: &str, kind: &Kind, value: &Value) -> Result<(), HostError> {
    if kind.admits(value) {
        return Ok(());
    }
    Err(HostError::Value { name: name.to_owned(), wanted: kind.clone() })
}
