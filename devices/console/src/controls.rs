//! What can be seen and changed while the device runs: ports, who is there, sizes.
use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use reactor::Mail;
use vm_virtio::controls::{
    Argument, Arguments, ControlCommand, ControlRequest, Controls, Kind, Name, Property, Value,
};
use vm_virtio::{HostError, HostReply};

use crate::control::{MAX_NAME, Size};
use crate::port::{Port, Seen};
use crate::spec::PortSpec;
use crate::worker::{self, Order};

const NAME: &str = "name";
const BACKEND: &str = "backend";
const CLIENT: &str = "client";
const GUEST_OPEN: &str = "guest-open";
const SENT: &str = "bytes-out";
const RECEIVED: &str = "bytes-in";
const DROPPED: &str = "bytes-dropped";
const SIZE: &str = "size";

const ADD: &str = "add-port";
const REMOVE: &str = "remove-port";
const PORT: &str = "port";
const SPEC: &str = "spec";

/// As long a path as there can be, with everything around it.
const LONGEST: usize = 8 << 10;

pub(crate) fn list(max: u32) -> Controls {
    let mut properties = Vec::new();
    for id in 0..max {
        let mut add = |what: &str, kind, help: &'static str| {
            properties.push(Property::read_only(format!("port.{id}.{what}"), kind, help));
        };
        add(NAME, Kind::Text { max: MAX_NAME }, "its name in the guest; empty: none");
        add(BACKEND, Kind::Text { max: LONGEST }, "where the host's side is; empty: there is no such port");
        add(CLIENT, Kind::Bool, "whether somebody is there on the host's side");
        add(GUEST_OPEN, Kind::Bool, "whether the guest has opened it");
        add(SENT, Kind::ANY_U64, "bytes from the guest so far");
        add(RECEIVED, Kind::ANY_U64, "bytes to the guest so far");
        add(DROPPED, Kind::ANY_U64, "bytes from the guest that nobody got");
        properties.push(Property::settable(
            format!("port.{id}.{SIZE}"),
            Kind::Text { max: 11 },
            "size of the console, COLUMNSxROWS; 0x0: unknown",
        ));
    }
    let argument = |name: &'static str, kind, required, help: &'static str| Argument {
        name: Cow::Borrowed(name),
        kind,
        required,
        help: Cow::Borrowed(help),
    };
    let number = Kind::U64 { min: 0, max: u64::from(max).saturating_sub(1) };
    let command = |name: &'static str, arguments, help: &'static str| ControlCommand {
        name: Name::Borrowed(name),
        arguments,
        help: Cow::Borrowed(help),
    };
    let spec_help = "name=...,backend=..., as on the command line";
    let commands = vec![
        command(
            ADD,
            vec![
                argument(SPEC, Kind::Text { max: LONGEST }, true, spec_help),
                argument(PORT, number.clone(), false, "its number; the lowest free one if not given"),
            ],
            "adds a port; the answer is its number",
        ),
        command(
            REMOVE,
            vec![argument(PORT, number, true, "its number")],
            "takes a port away from the guest; who is connected to it is disconnected",
        ),
    ];
    Controls { properties, commands }
}

/// What the device knows to answer with.
pub(crate) struct Operator {
    ports: Vec<Option<Arc<Seen>>>,
    mail: Option<Mail<Order>>,
}

fn refused(why: impl ToString) -> HostError {
    HostError::Refused(why.to_string())
}

impl Operator {
    pub(crate) fn new(ports: &[Option<Port>]) -> Operator {
        let ports = ports.iter().map(|port| port.as_ref().map(|port| port.seen.clone())).collect();
        Operator { ports, mail: None }
    }

    /// Where the worker gets its mail.
    pub(crate) fn attach(&mut self, mail: Option<Mail<Order>>) {
        self.mail = mail;
    }

    pub(crate) fn places(&self) -> impl Iterator<Item = (u32, String)> {
        (0..).zip(&self.ports).filter_map(|(id, port)| Some((id, port.as_ref()?.place.clone())))
    }

    /// A character of an emergency. One more than the worker can take is lost.
    pub(crate) fn emergency(&self, byte: u8) {
        if self.send(worker::Kind::Emergency(byte)).is_err()
            && let Some(Some(port)) = self.ports.first()
        {
            port.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn send(&self, order: worker::Kind) -> Result<(), HostError> {
        let mail = self.mail.as_ref().ok_or(HostError::Unsupported)?;
        mail.send(Order(order)).map_err(|_| refused("the device has too much to do; try again"))
    }

    pub(crate) fn carry_out(&mut self, request: ControlRequest) -> Result<HostReply, HostError> {
        match request {
            ControlRequest::Get(name) => self.get(&name).map(HostReply::Value),
            ControlRequest::Set(name, Value::Text(text)) => self.resize(&name, &text),
            ControlRequest::Run(command, arguments) => match command.as_str() {
                ADD => self.add(&arguments),
                REMOVE => self.remove(&arguments),
                _ => Err(HostError::NoSuchCommand(command)),
            },
            _ => Err(HostError::Unsupported),
        }
    }

    /// The number of a port and which property of it.
    fn property<'n>(&self, name: &'n str) -> Result<(usize, &'n str), HostError> {
        let parsed = name.strip_prefix("port.").and_then(|rest| rest.split_once('.'));
        parsed
            .and_then(|(id, what)| Some((id.parse().ok()?, what)))
            .ok_or_else(|| HostError::NoSuchProperty(name.to_owned()))
    }

    fn get(&self, name: &str) -> Result<Value, HostError> {
        let (id, what) = self.property(name)?;
        let port = self.ports.get(id).and_then(|port| port.as_deref());
        let text = |of: fn(&Seen) -> String| Value::Text(port.map(of).unwrap_or_default());
        let flag = |of: fn(&Seen) -> bool| Value::Bool(port.is_some_and(of));
        let number = |of: fn(&Seen) -> u64| Value::U64(port.map_or(0, of));
        Ok(match what {
            NAME => text(|port| port.name.clone()),
            BACKEND => text(|port| port.place.clone()),
            SIZE => {
                let size = port.map(Seen::size).unwrap_or_default();
                Value::Text(format!("{}x{}", size.cols, size.rows))
            }
            CLIENT => flag(|port| port.client.load(Ordering::Relaxed)),
            GUEST_OPEN => flag(|port| port.guest_open.load(Ordering::Relaxed)),
            SENT => number(|port| port.out.load(Ordering::Relaxed)),
            RECEIVED => number(|port| port.input.load(Ordering::Relaxed)),
            DROPPED => number(|port| port.dropped.load(Ordering::Relaxed)),
            _ => return Err(HostError::NoSuchProperty(name.to_owned())),
        })
    }

    fn resize(&mut self, name: &str, text: &str) -> Result<HostReply, HostError> {
        let (id, what) = self.property(name)?;
        if what != SIZE {
            return Err(HostError::ReadOnly(name.to_owned()));
        }
        if self.ports.get(id).is_none_or(|port| port.is_none()) {
            return Err(refused(format!("there is no port {id}")));
        }
        let size = text.split_once('x').and_then(|(cols, rows)| {
            let side = |text: &str| text.parse().ok().filter(|side| *side > 0);
            Some(Size { cols: side(cols)?, rows: side(rows)? })
        });
        let size = size.ok_or_else(|| refused("write COLUMNSxROWS, each from 1 to 65535, as in 80x25"))?;
        let id = u32::try_from(id).map_err(refused)?;
        self.send(worker::Kind::Resize(id, size))?;
        Ok(HostReply::Done)
    }

    fn add(&mut self, arguments: &Arguments) -> Result<HostReply, HostError> {
        let spec: PortSpec = arguments.text(SPEC).unwrap_or_default().parse().map_err(refused)?;
        if spec.target == crate::spec::Target::Stdio {
            return Err(refused(
                "standard input and output are for a port of the command line; use another backend",
            ));
        }
        let free = |slot: &Option<Arc<Seen>>| slot.is_none();
        let id = match arguments.u64(PORT).map(usize::try_from) {
            Some(Ok(id)) => Some(id).filter(|id| self.ports.get(*id).is_some_and(free)),
            Some(Err(_)) => None,
            None => self.ports.iter().position(free),
        };
        let id =
            id.ok_or_else(|| refused("there is no such free port; see --max-ports, or remove one first"))?;
        let number = u32::try_from(id).map_err(refused)?;
        if !spec.name.is_empty() && self.ports.iter().flatten().any(|port| port.name == spec.name) {
            return Err(refused(format!("there is a port {:?} already", spec.name)));
        }
        let port = Port::open(number, &spec).map_err(refused)?;
        let seen = port.seen.clone();
        self.send(worker::Kind::Add(Box::new(port)))?;
        if let Some(slot) = self.ports.get_mut(id) {
            *slot = Some(seen);
        }
        Ok(HostReply::Value(Value::U64(number.into())))
    }

    fn remove(&mut self, arguments: &Arguments) -> Result<HostReply, HostError> {
        let id = arguments.u64(PORT).unwrap_or(u64::MAX);
        let slot = usize::try_from(id).ok().and_then(|id| self.ports.get(id));
        if !slot.is_some_and(Option::is_some) {
            return Err(refused(format!("there is no port {id}")));
        }
        self.send(worker::Kind::Remove(u32::try_from(id).map_err(refused)?))?;
        if let Some(slot) = usize::try_from(id).ok().and_then(|id| self.ports.get_mut(id)) {
            *slot = None;
        }
        Ok(HostReply::Done)
    }
}
