//! All daemons of a command line, and which of their guests are meant.
use serde_json::Value as Json;
use vhost_device::control::protocol::{List, ListedKind, Lists, Request};

use crate::Failure;
use crate::cli::Args;
use crate::client::Client;

/// The daemons of a command line.
pub(crate) struct Daemons {
    pub(crate) clients: Vec<Client>,
    guest: Option<u32>,
    all: bool,
}

/// A guest that is meant.
pub(crate) struct Target {
    /// Which of the daemons.
    pub(crate) daemon: usize,
    /// What its device offers.
    pub(crate) list: List,
}

impl Daemons {
    pub(crate) fn connect(args: &Args) -> Result<Daemons, Failure> {
        let clients = args.sockets.iter().map(|path| Client::connect(path, args.timeout));
        Ok(Daemons { clients: clients.collect::<Result<_, _>>()?, guest: args.guest, all: args.all })
    }

    /// The guest that a request is limited to, if any.
    pub(crate) fn guest(&self) -> Option<u32> {
        self.guest
    }

    /// Every guest that is meant.
    pub(crate) fn targets(&mut self) -> Result<Vec<Target>, Failure> {
        let guest = self.guest;
        let mut targets = Vec::new();
        for (daemon, client) in self.clients.iter_mut().enumerate() {
            let lists: Lists = client.ask(&Request::List { guest })?;
            targets.extend(lists.guests.into_iter().map(|list| Target { daemon, list }));
        }
        Ok(targets)
    }

    /// The guests that may be changed: one, unless the user said that all are meant.
    pub(crate) fn changed(&mut self) -> Result<Vec<Target>, Failure> {
        let targets = self.targets()?;
        match targets.len() {
            1 => Ok(targets),
            0 => Err(Failure::Usage("no guest is meant".into())),
            _ if self.all => Ok(targets),
            count => Err(Failure::Usage(format!(
                "{count} guests are meant; choose one with --socket and --guest, or say --all"
            ))),
        }
    }

    pub(crate) fn client(&mut self, target: &Target) -> Result<&mut Client, Failure> {
        self.clients.get_mut(target.daemon).ok_or_else(|| Failure::Usage("no such daemon".into()))
    }

    /// What a guest is called in output; nothing if there is only one.
    pub(crate) fn name(&self, target: &Target, of: usize) -> String {
        match self.clients.get(target.daemon) {
            Some(client) if self.clients.len() > 1 => {
                format!("{} guest {}: ", client.path.display(), target.list.guest)
            }
            _ if of > 1 => format!("guest {}: ", target.list.guest),
            _ => String::new(),
        }
    }
}

/// What a user wrote, as a value of that kind. What does not fit goes as text: the daemon says why it does not.
pub(crate) fn value(kind: Option<&ListedKind>, text: &str) -> Json {
    let fits = match kind {
        Some(ListedKind::Bool) => match text {
            "true" | "on" | "yes" => Some(Json::Bool(true)),
            "false" | "off" | "no" => Some(Json::Bool(false)),
            _ => None,
        },
        Some(ListedKind::Number { .. }) => {
            let number = match text.strip_prefix("0x") {
                Some(digits) => u64::from_str_radix(digits, 16),
                None => text.parse(),
            };
            number.ok().map(Json::from)
        }
        _ => None,
    };
    fits.unwrap_or_else(|| Json::String(text.to_owned()))
}

/// A value, as a user reads it: on one line, and without what a terminal would obey.
pub(crate) fn shown(value: &Json) -> String {
    match value {
        Json::String(text) => text.chars().fold(String::new(), |mut shown, c| {
            if c.is_control() {
                shown.extend(c.escape_default())
            } else {
                shown.push(c)
            }
            shown
        }),
        other => other.to_string(),
    }
}

/// What a kind admits, for people.
pub(crate) fn kind(kind: &ListedKind) -> String {
    match kind {
        ListedKind::Bool => "true or false".into(),
        ListedKind::Number { min: 0, max: u64::MAX } => "number".into(),
        ListedKind::Number { min, max: u64::MAX } => format!("number from {min} on"),
        ListedKind::Number { min, max } => format!("number from {min} to {max}"),
        ListedKind::Text { max } => format!("text, at most {max} bytes"),
        ListedKind::Choice { choices } => format!("one of {}", choices.join(", ")),
        _ => "something".into(),
    }
}
