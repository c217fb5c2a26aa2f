//! `vhost-ctl run`: a file of time-stamped steps.
//!
//! ```text
//! # Time since the beginning, or +TIME since the step before: 2s, 1.5s, 200ms, 1min.
//! 0s      set max-bytes 1000
//! +500ms  guest 1 set max-bytes 0x2000
//! +0s     socket 1 guest 0 call unplug port=3
//! 2s      expect max-bytes 1000
//! 2s      get max-bytes
//! 2s      log-level debug
//! ```
//!
//! Every step is parsed, and checked by the daemon it is for, before the first is carried out: what is wrong is said
//! with file and line, and nothing has changed.
use std::io::{Read, Write};
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value as Json;
use vhost_device::control::protocol::{Level, Request};
use vhost_device::logging::LogLevel;

use crate::Failure;
use crate::change::{call_request, get_one, set_request};
use crate::cli::Args;
use crate::daemons::{Daemons, Target, shown, value};

/// Largest file, in bytes.
const LARGEST: u64 = 1 << 20;
/// Latest step.
const LATEST: Duration = Duration::from_secs(7 * 86_400);

/// What a step does.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Action {
    Set { property: String, value: String },
    Get { property: String },
    Expect { property: String, value: String },
    Call { command: String, arguments: Vec<String> },
    LogLevel(LogLevel),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Step {
    line: usize,
    at: Duration,
    /// Which of the daemons, from 0.
    socket: Option<usize>,
    guest: Option<u32>,
    action: Action,
}

pub(crate) fn run(args: &Args, path: &Path, check: bool, out: &mut dyn Write) -> Result<(), Failure> {
    let file = path.display();
    let usage = |error: &dyn std::fmt::Display| Failure::Usage(format!("{file}: {error}"));
    let mut text = String::new();
    let opened = std::fs::File::open(path).map_err(|error| usage(&error))?;
    opened.take(LARGEST + 1).read_to_string(&mut text).map_err(|error| usage(&error))?;
    if text.len() as u64 > LARGEST {
        return Err(usage(&"larger than 1 MiB"));
    }
    let steps = parse(&text).map_err(|errors| {
        let errors: Vec<_> =
            errors.into_iter().map(|(line, what)| format!("{file}:{line}: {what}")).collect();
        Failure::Usage(errors.join("\nvhost-ctl: "))
    })?;

    let mut daemons = Daemons::connect(args)?;
    let targets = daemons.targets()?;
    let mut errors = Vec::new();
    for step in &steps {
        match carry_out(step, &mut daemons, &targets, true) {
            Ok(_) => {}
            Err(Failure::Refused(what) | Failure::Usage(what)) => {
                errors.push(format!("{file}:{}: {what}", step.line))
            }
            Err(other) => return Err(other),
        }
    }
    if !errors.is_empty() {
        return Err(Failure::Usage(errors.join("\nvhost-ctl: ")));
    }
    if check {
        writeln!(out, "{file}: {} steps, nothing wrong", steps.len())?;
        return Ok(());
    }

    let began = Instant::now();
    for step in &steps {
        std::thread::sleep((began + step.at).saturating_duration_since(Instant::now()));
        let shown = carry_out(step, &mut daemons, &targets, false).map_err(|failure| match failure {
            Failure::Refused(what) | Failure::Usage(what) => {
                Failure::Refused(format!("{file}:{}: {what}", step.line))
            }
            other => other,
        })?;
        if let Some(shown) = shown {
            writeln!(out, "{shown}")?;
            out.flush()?;
        }
    }
    Ok(())
}

/// Carries a step out, or only checks it; returns what there is to print.
fn carry_out(
    step: &Step,
    daemons: &mut Daemons,
    targets: &[Target],
    check: bool,
) -> Result<Option<String>, Failure> {
    if let Action::LogLevel(level) = step.action {
        let count = daemons.clients.len();
        if let Some(socket) = step.socket.filter(|socket| *socket >= count) {
            return Err(Failure::Usage(format!("there is no socket {socket}; sockets are counted from 0")));
        }
        for (socket, client) in daemons.clients.iter_mut().enumerate() {
            if step.socket.is_none_or(|only| only == socket) {
                client.ask::<Level>(&Request::LogLevel { level: (!check).then_some(level) })?;
            }
        }
        return Ok(None);
    }
    let target = target(step, targets)?;
    let client = daemons.client(target)?;
    let guest = target.list.guest;
    match &step.action {
        Action::Set { property, value } => {
            client.ask::<Json>(&set_request(target, property, value, check))?;
            Ok(None)
        }
        Action::Call { command, arguments } => {
            let reply: Json = client.ask(&call_request(target, command, arguments, check)?)?;
            Ok(reply.get("value").map(shown))
        }
        Action::Get { property } => {
            let got = get_one(client, guest, property)?;
            Ok((!check).then(|| format!("{property} {}", shown(&got))))
        }
        Action::Expect { property, value: text } => {
            let known = target.list.properties.iter().find(|known| known.name == *property);
            let wanted = value(known.map(|known| &known.kind), text);
            let got = get_one(client, guest, property)?;
            if check || got == wanted {
                return Ok(None);
            }
            Err(Failure::Refused(format!("{property} is {}, expected {}", shown(&got), shown(&wanted))))
        }
        Action::LogLevel(_) => Ok(None),
    }
}

/// The guest that a step is for: the only one that fits.
fn target<'a>(step: &Step, targets: &'a [Target]) -> Result<&'a Target, Failure> {
    let mut fitting = targets.iter().filter(|target| {
        step.socket.is_none_or(|socket| target.daemon == socket)
            && step.guest.is_none_or(|guest| target.list.guest == guest)
    });
    match (fitting.next(), fitting.next()) {
        (Some(only), None) => Ok(only),
        (None, _) => Err(Failure::Usage("there is no such guest".into())),
        (Some(_), Some(_)) => Err(Failure::Usage(
            "several guests are meant; write \"socket N guest N\" before the action".into(),
        )),
    }
}

/// All steps, or all that is wrong with them, by line.
fn parse(text: &str) -> Result<Vec<Step>, Vec<(usize, String)>> {
    let (mut steps, mut errors) = (Vec::new(), Vec::new());
    let mut last = Duration::ZERO;
    for (line, text) in (1..).zip(text.lines()) {
        match words(text).and_then(|words| step(line, &words, last)) {
            Ok(Some(step)) => {
                last = step.at;
                steps.push(step);
            }
            Ok(None) => {}
            Err(what) => errors.push((line, what)),
        }
    }
    if errors.is_empty() { Ok(steps) } else { Err(errors) }
}

/// The words of a line; text in double quotes is one. `#` at the beginning of a word begins a comment.
fn words(line: &str) -> Result<Vec<String>, String> {
    let mut words = Vec::new();
    let mut rest = line.trim_start();
    while !rest.is_empty() && !rest.starts_with('#') {
        let mut word = String::new();
        let mut quoted = false;
        let mut end = rest.len();
        for (at, c) in rest.char_indices() {
            match c {
                '"' => quoted = !quoted,
                c if c.is_whitespace() && !quoted => {
                    end = at;
                    break;
                }
                c => word.push(c),
            }
        }
        if quoted {
            return Err("a quotation mark without its other half".into());
        }
        words.push(word);
        rest = rest.get(end..).unwrap_or_default().trim_start();
    }
    Ok(words)
}

fn step(line: usize, words: &[String], last: Duration) -> Result<Option<Step>, String> {
    let Some((time, mut words)) = words.split_first() else { return Ok(None) };
    let at = match time.strip_prefix('+') {
        Some(time) => last.checked_add(self::time(time)?),
        None => Some(self::time(time)?),
    };
    let Some(at) = at.filter(|at| *at <= LATEST) else {
        return Err("a scenario lasts 7 days at most".into());
    };
    if at < last {
        return Err(format!("{time:?} is before the step above"));
    }
    let (mut socket, mut guest) = (None, None);
    if let [name, number, rest @ ..] = words
        && name == "socket"
    {
        socket = Some(number.parse().map_err(|_| format!("{number:?} is not the number of a socket"))?);
        words = rest;
    }
    if let [name, number, rest @ ..] = words
        && name == "guest"
    {
        guest = Some(number.parse().map_err(|_| format!("{number:?} is not the number of a guest"))?);
        words = rest;
    }
    let Some((name, words)) = words.split_first() else { return Err("nothing to do at this time".into()) };
    let action = match (name.as_str(), words) {
        ("set", [property, value]) => Action::Set { property: property.clone(), value: value.clone() },
        ("set", _) => return Err("set needs a property and a value".into()),
        ("get", [property]) => Action::Get { property: property.clone() },
        ("get", _) => return Err("get needs a property".into()),
        ("expect", [property, value]) => Action::Expect { property: property.clone(), value: value.clone() },
        ("expect", _) => return Err("expect needs a property and a value".into()),
        ("call", [command, arguments @ ..]) => {
            Action::Call { command: command.clone(), arguments: arguments.to_vec() }
        }
        ("call", _) => return Err("call needs a command".into()),
        ("log-level", [level]) => {
            let known = <LogLevel as clap::ValueEnum>::from_str(level, false);
            Action::LogLevel(known.map_err(|_| format!("there is no log level {level:?}"))?)
        }
        ("log-level", _) => return Err("log-level needs a level".into()),
        _ => return Err(format!("{name:?} is not set, get, expect, call or log-level")),
    };
    if guest.is_some() && matches!(action, Action::LogLevel(_)) {
        return Err("the log level is the daemon's, not a guest's".into());
    }
    Ok(Some(Step { line, at, socket, guest, action }))
}

/// A time: a number with ms, s or min behind it.
fn time(text: &str) -> Result<Duration, String> {
    let wrong = || format!("{text:?} is not a time; write 200ms, 1.5s or 2min");
    let units = [("ms", 0.001), ("min", 60.0), ("s", 1.0)];
    let found = units.iter().find_map(|(unit, seconds)| Some((text.strip_suffix(unit)?, *seconds)));
    let (number, unit) = found.ok_or_else(wrong)?;
    let plain = number.bytes().all(|byte| byte.is_ascii_digit() || byte == b'.');
    let number: f64 = number.parse().ok().filter(|_| plain).ok_or_else(wrong)?;
    Duration::try_from_secs_f64(number * unit).map_err(|_| wrong())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wrong(text: &str) -> Vec<(usize, String)> {
        parse(text).expect_err(text)
    }

    #[test]
    fn steps_have_times_targets_and_actions() {
        let steps = parse(
            "# a comment\n\n0s set a 1 # why\n+1.5s guest 1 call b c=\"x y\" d=2\n2s socket 1 guest 0 expect a \"#1\"\n\
             +1min log-level debug\n",
        )
        .unwrap();
        let at: Vec<_> = steps.iter().map(|step| (step.line, step.at.as_millis())).collect();
        assert_eq!(at, [(3, 0), (4, 1500), (5, 2000), (6, 62_000)]);
        let arguments = vec!["c=x y".to_owned(), "d=2".to_owned()];
        assert_eq!(steps[1].action, Action::Call { command: "b".into(), arguments });
        assert_eq!((steps[2].socket, steps[2].guest), (Some(1), Some(0)));
        assert_eq!(steps[2].action, Action::Expect { property: "a".into(), value: "#1".into() });
    }

    #[test]
    fn everything_that_is_wrong_is_said_with_its_line() {
        let lines: Vec<_> =
            wrong("0s set a 1\nnow set a 1\n1s set a\n0s set a 1\n1s jump\n").into_iter().collect();
        let numbers: Vec<_> = lines.iter().map(|(line, _)| *line).collect();
        assert_eq!(
            numbers,
            [2, 3, 5],
            "a step after a line that is wrong is measured from the last good one"
        );
        assert!(lines[0].1.contains("not a time"));
        assert_eq!(wrong("1s set a 1\n0s set a 1"), [(2, "\"0s\" is before the step above".to_owned())]);
    }

    #[test]
    fn lines_that_make_no_sense() {
        for line in [
            "1",
            "-1s set a 1",
            "1e3s set a 1",
            "s set a 1",
            "1s",
            "1s guest",
            "1s guest x set a 1",
            "1s set a 1 2",
            "1s get",
            "1s call",
            "1s log-level loud",
            "1s guest 0 log-level debug",
            "1s set a \"1",
            "999999min set a 1",
            "+",
            "1h set a 1",
            "NaNs set a 1",
            "1s socket 0",
        ] {
            assert_eq!(wrong(line).len(), 1, "{line}");
        }
        assert_eq!(parse("\u{feff}"), Err(vec![(1, wrong("\u{feff}")[0].1.clone())]));
        assert_eq!(parse(""), Ok(vec![]));
    }
}
