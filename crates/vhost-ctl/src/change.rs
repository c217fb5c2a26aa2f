//! `vhost-ctl list`, `get`, `set`, `call`, `watch` and `log-level`.
use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Map, Value as Json};
use vhost_device::control::protocol::{Got, Level, ListedProperty, Request};
use vhost_device::logging::LogLevel;

use crate::Failure;
use crate::client::Client;
use crate::daemons::{Daemons, Target, kind, shown, value};
use crate::table::Table;

pub(crate) fn list(daemons: &mut Daemons, out: &mut dyn Write) -> Result<(), Failure> {
    let targets = daemons.targets()?;
    for target in &targets {
        let name = daemons.name(target, targets.len());
        if !name.is_empty() {
            writeln!(out, "{}", name.trim_end())?;
        }
        let mut table = Table::new(&["<NAME", "<", "<VALUE", "<WHAT IT IS"]);
        for property in &target.list.properties {
            let ListedProperty { name, settable, help, .. } = property;
            let settable = if *settable { "get, set" } else { "get" };
            table.row([name.clone(), settable.into(), kind(&property.kind), help.clone()]);
        }
        for command in &target.list.commands {
            table.row([command.name.clone(), "call".into(), String::new(), command.help.clone()]);
            for argument in &command.arguments {
                let name = format!("  {}=", argument.name);
                let needed = if argument.required { "needed" } else { "" };
                table.row([name, needed.into(), kind(&argument.kind), argument.help.clone()]);
            }
        }
        table.lines().try_for_each(|line| writeln!(out, "{line}"))?;
    }
    Ok(())
}

pub(crate) fn get(daemons: &mut Daemons, property: Option<&str>, out: &mut dyn Write) -> Result<(), Failure> {
    let targets = daemons.targets()?;
    for target in &targets {
        let name = daemons.name(target, targets.len());
        match property {
            Some(property) => {
                let got = get_one(daemons.client(target)?, target.list.guest, property)?;
                writeln!(out, "{name}{}", shown(&got))?;
            }
            None => {
                for property in &target.list.properties {
                    let got = get_one(daemons.client(target)?, target.list.guest, &property.name)?;
                    writeln!(out, "{name}{} {}", property.name, shown(&got))?;
                }
            }
        }
    }
    Ok(())
}

pub(crate) fn get_one(client: &mut Client, guest: u32, property: &str) -> Result<Json, Failure> {
    let request = Request::Get { guest: Some(guest), property: property.to_owned() };
    Ok(client.ask::<Got>(&request)?.value)
}

/// The request that sets a property to what a user wrote.
pub(crate) fn set_request(target: &Target, property: &str, text: &str, check: bool) -> Request {
    let known = target.list.properties.iter().find(|known| known.name == property);
    let value = value(known.map(|known| &known.kind), text);
    Request::Set { guest: Some(target.list.guest), property: property.to_owned(), value, check }
}

/// The request that runs a command with what a user wrote, NAME=VALUE.
pub(crate) fn call_request(
    target: &Target,
    command: &str,
    arguments: &[String],
    check: bool,
) -> Result<Request, Failure> {
    let known = target.list.commands.iter().find(|known| known.name == command);
    let mut given = Map::new();
    for argument in arguments {
        let Some((name, text)) = argument.split_once('=') else {
            return Err(Failure::Usage(format!("argument {argument:?} is not NAME=VALUE")));
        };
        let known = known.and_then(|known| known.arguments.iter().find(|known| known.name == name));
        if given.insert(name.to_owned(), value(known.map(|known| &known.kind), text)).is_some() {
            return Err(Failure::Usage(format!("argument {name:?} is given twice")));
        }
    }
    Ok(Request::Run { guest: Some(target.list.guest), command: command.to_owned(), arguments: given, check })
}

pub(crate) fn set(
    daemons: &mut Daemons,
    property: &str,
    text: &str,
    _out: &mut dyn Write,
) -> Result<(), Failure> {
    // Checked for all before it is changed for one.
    let targets = daemons.changed()?;
    for check in [true, false] {
        for target in &targets {
            let request = set_request(target, property, text, check);
            daemons.client(target)?.ask::<Json>(&request)?;
        }
    }
    Ok(())
}

pub(crate) fn call(
    daemons: &mut Daemons,
    command: &str,
    arguments: &[String],
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let targets = daemons.changed()?;
    for check in [true, false] {
        for target in &targets {
            let request = call_request(target, command, arguments, check)?;
            let reply: Json = daemons.client(target)?.ask(&request)?;
            if let Some(value) = reply.get("value") {
                writeln!(out, "{}{}", daemons.name(target, targets.len()), shown(value))?;
            }
        }
    }
    Ok(())
}

pub(crate) fn watch(
    daemons: &mut Daemons,
    property: &str,
    interval_ms: u64,
    count: Option<u64>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let targets = daemons.targets()?;
    let mut watches = Vec::new();
    let mut lines = 0;
    for target in &targets {
        let name = daemons.name(target, targets.len());
        let request = Request::Watch {
            guest: Some(target.list.guest),
            property: property.to_owned(),
            interval_ms: Some(interval_ms),
        };
        let client = daemons.client(target)?;
        let id = client.send(&request)?;
        let value = client.reply(id)?;
        watches.push((target.daemon, id, name));
        print(&watches, target.daemon, id, &value, out)?;
        lines += 1;
    }
    // With one daemon there is nothing else to look at meanwhile.
    let patience = Duration::from_millis(if daemons.clients.len() > 1 { 20 } else { 1000 });
    while count.is_none_or(|count| lines < count) {
        for (daemon, client) in daemons.clients.iter_mut().enumerate() {
            if let Some((id, value)) = client.event(Instant::now() + patience)? {
                print(&watches, daemon, id, &value, out)?;
                lines += 1;
            }
        }
    }
    Ok(())
}

fn print(
    watches: &[(usize, u64, String)],
    daemon: usize,
    id: u64,
    got: &Json,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let name =
        watches.iter().find(|(of, known, _)| (*of, *known) == (daemon, id)).map(|(.., name)| name.as_str());
    let value = got.get("value").unwrap_or(&Json::Null);
    writeln!(out, "{}{}", name.unwrap_or_default(), shown(value))?;
    Ok(out.flush()?)
}

pub(crate) fn log_level(
    daemons: &mut Daemons,
    level: Option<LogLevel>,
    out: &mut dyn Write,
) -> Result<(), Failure> {
    let several = daemons.clients.len() > 1;
    for client in &mut daemons.clients {
        let Level { level: now } = client.ask(&Request::LogLevel { level })?;
        if level.is_none() {
            let name = if several { format!("{}: ", client.path.display()) } else { String::new() };
            writeln!(out, "{name}{}", format!("{now:?}").to_lowercase())?;
        }
    }
    Ok(())
}
