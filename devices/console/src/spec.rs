//! What a port is to be, as it is written: `name=org.example.0,backend=unix:/run/port0,console=off,buffer=65536`.
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use crate::control::MAX_NAME;

/// Least, usual and most bytes that are kept of a port's output for a client that is not there yet.
pub const BUFFER: (usize, usize, usize) = (4 << 10, 64 << 10, 1 << 20);

/// Where the host's side of a port is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Output is thrown away, input never comes.
    Null,
    /// Standard input and output of this process.
    Stdio,
    /// A pseudo-terminal, perhaps with a symbolic link to it.
    Pty(Option<PathBuf>),
    /// A Unix socket that clients connect to, one at a time.
    Unix(PathBuf),
    /// An address, `HOST:PORT`, that clients connect to, one at a time.
    Tcp(String, u16),
    /// Output is appended to a file (or written to a named pipe or character device), input never comes.
    File(PathBuf),
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Target::Null => f.write_str("null"),
            Target::Stdio => f.write_str("stdio"),
            Target::Pty(None) => f.write_str("pty"),
            Target::Pty(Some(link)) => write!(f, "pty:{}", link.display()),
            Target::Unix(path) => write!(f, "unix:{}", path.display()),
            Target::Tcp(host, port) => write!(f, "tcp:{host}:{port}"),
            Target::File(path) => write!(f, "file:{}", path.display()),
        }
    }
}

/// A port as it is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortSpec {
    /// Its name in the guest; empty: none.
    pub name: String,
    /// The host's side.
    pub target: Target,
    /// Whether it is a console (`/dev/hvc0` ... in Linux).
    pub console: bool,
    /// Most bytes that are kept of its output while nobody is there to take them.
    pub buffer: usize,
}

/// A description of a port that makes no sense.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum SpecError {
    /// Not `KEY=VALUE`.
    #[error("{0:?} is not KEY=VALUE; write name=..., backend=..., console=on|off or buffer=BYTES")]
    NoValue(String),
    /// An unknown key.
    #[error("there is no {0:?}; write name=..., backend=..., console=on|off or buffer=BYTES")]
    Key(String),
    /// The same key again.
    #[error("{0} is given twice; give it once")]
    Twice(String),
    /// No host's side.
    #[error("backend is missing; add backend=stdio|pty|unix:PATH|tcp:ADDR|file:PATH|null")]
    NoBackend,
    /// An unknown backend.
    #[error(
        "there is no backend {0:?}; use stdio, pty, pty:LINK, unix:PATH, tcp:HOST:PORT, tcp:PORT, file:PATH or null"
    )]
    Backend(String),
    /// A name that no guest could use.
    #[error(
        "the name {0:?} is empty, longer than {MAX_NAME} bytes or has control characters; choose another one"
    )]
    Name(String),
    /// Not yes or no.
    #[error("console={0:?} is neither; write console=on or console=off")]
    Console(String),
    /// Out of range.
    #[error("buffer={0:?} is not between {least} and {most}; use a number of bytes in that range", least = BUFFER.0, most = BUFFER.2)]
    Buffer(String),
}

impl FromStr for Target {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Target, SpecError> {
        let unknown = || SpecError::Backend(text.to_owned());
        let (kind, rest) = text.split_once(':').map_or((text, None), |(kind, rest)| (kind, Some(rest)));
        match (kind, rest.filter(|rest| !rest.is_empty())) {
            ("null", None) => Ok(Target::Null),
            ("stdio", None) => Ok(Target::Stdio),
            ("pty", link) => Ok(Target::Pty(link.map(PathBuf::from))),
            ("unix", Some(path)) => Ok(Target::Unix(path.into())),
            ("file", Some(path)) => Ok(Target::File(path.into())),
            ("tcp", Some(address)) => {
                let (host, port) = address.rsplit_once(':').unwrap_or(("127.0.0.1", address));
                let port = port.parse().map_err(|_| unknown())?;
                if host.is_empty() { Err(unknown()) } else { Ok(Target::Tcp(host.to_owned(), port)) }
            }
            _ => Err(unknown()),
        }
    }
}

impl FromStr for PortSpec {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<PortSpec, SpecError> {
        let (mut name, mut target, mut console, mut buffer) = (None, None, None, None);
        for part in text.split(',') {
            let (key, value) = part.split_once('=').ok_or_else(|| SpecError::NoValue(part.to_owned()))?;
            let twice = match key {
                "name" => name.replace(value.to_owned()).is_some(),
                "backend" => target.replace(value.parse()?).is_some(),
                "console" => {
                    let yes = match value {
                        "on" | "true" | "yes" => true,
                        "off" | "false" | "no" => false,
                        _ => return Err(SpecError::Console(value.to_owned())),
                    };
                    console.replace(yes).is_some()
                }
                "buffer" => {
                    let bytes = value.parse().ok().filter(|bytes| (BUFFER.0..=BUFFER.2).contains(bytes));
                    buffer.replace(bytes.ok_or_else(|| SpecError::Buffer(value.to_owned()))?).is_some()
                }
                _ => return Err(SpecError::Key(key.to_owned())),
            };
            if twice {
                return Err(SpecError::Twice(key.to_owned()));
            }
        }
        if let Some(name) = &name
            && (name.is_empty() || name.len() > MAX_NAME || name.chars().any(char::is_control))
        {
            return Err(SpecError::Name(name.clone()));
        }
        Ok(PortSpec {
            // What has a name is for a program of the guest, what has none is for a person.
            console: console.unwrap_or(name.is_none()),
            name: name.unwrap_or_default(),
            target: target.ok_or(SpecError::NoBackend)?,
            buffer: buffer.unwrap_or(BUFFER.1),
        })
    }
}

impl PortSpec {
    /// A console without a name.
    pub fn console(target: Target) -> PortSpec {
        PortSpec { name: String::new(), target, console: true, buffer: BUFFER.1 }
    }

    /// The same for one guest of several: its number is appended to paths, as to the guests' sockets, and added to TCP
    /// ports. None: there is no such TCP port, or there is one of it only (standard input and output).
    pub fn of_guest(&self, guest: u32) -> Option<PortSpec> {
        let numbered = |path: &Path| {
            let mut path = path.as_os_str().to_owned();
            path.push(guest.to_string());
            PathBuf::from(path)
        };
        let target = match &self.target {
            Target::Null => Target::Null,
            Target::Stdio => return None,
            Target::Pty(link) => Target::Pty(link.as_deref().map(numbered)),
            Target::Unix(path) => Target::Unix(numbered(path)),
            Target::File(path) => Target::File(numbered(path)),
            // Port 0 is any free one.
            Target::Tcp(host, 0) => Target::Tcp(host.clone(), 0),
            Target::Tcp(host, port) => {
                Target::Tcp(host.clone(), port.checked_add(u16::try_from(guest).ok()?)?)
            }
        };
        Some(PortSpec { target, ..self.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_can_be_written() {
        let parse = |text: &str| text.parse::<PortSpec>();
        let named = parse("name=org.qemu.guest_agent.0,backend=unix:/run/a:b.sock").unwrap();
        assert_eq!((named.name.as_str(), named.console), ("org.qemu.guest_agent.0", false));
        assert_eq!(named.target, Target::Unix("/run/a:b.sock".into()));
        assert_eq!(parse("backend=tcp:12345").unwrap().target, Target::Tcp("127.0.0.1".into(), 12345));
        assert_eq!(parse("backend=tcp:[::1]:7").unwrap().target, Target::Tcp("[::1]".into(), 7));
        assert_eq!(parse("backend=pty").unwrap(), PortSpec::console(Target::Pty(None)));
        let both = parse("console=on,name=x,backend=file:/tmp/log,buffer=4096").unwrap();
        assert_eq!((both.console, both.buffer), (true, 4096));
        for target in ["null", "stdio", "pty", "pty:/tmp/p", "unix:/a", "tcp:host:1", "file:/a"] {
            assert_eq!(target.parse::<Target>().unwrap().to_string(), target);
        }
    }

    #[test]
    fn what_cannot() {
        let refused = |text: &str| text.parse::<PortSpec>().unwrap_err();
        assert_eq!(refused(""), SpecError::NoValue(String::new()));
        assert_eq!(refused("stdio"), SpecError::NoValue("stdio".into()));
        assert_eq!(refused("name=x"), SpecError::NoBackend);
        assert_eq!(refused("size=3"), SpecError::Key("size".into()));
        assert_eq!(refused("backend=null,backend=pty"), SpecError::Twice("backend".into()));
        for target in
            ["", "unix", "unix:", "tcp", "tcp:", "tcp:x", "tcp::1", "tcp:h:70000", "null:1", "stdio:x", "rtc"]
        {
            assert_eq!(refused(&format!("backend={target}")), SpecError::Backend(target.into()));
        }
        for name in ["", "a\nb", "a\0b", &"x".repeat(256)] {
            assert_eq!(refused(&format!("backend=null,name={name}")), SpecError::Name(name.into()));
        }
        for bytes in ["0", "4095", "1048577", "many", "-1"] {
            assert_eq!(refused(&format!("backend=null,buffer={bytes}")), SpecError::Buffer(bytes.into()));
        }
        assert_eq!(refused("backend=null,console=maybe"), SpecError::Console("maybe".into()));
    }

    #[test]
    fn each_guest_has_its_own() {
        let of = |text: &str, guest| {
            text.parse::<PortSpec>().unwrap().of_guest(guest).map(|spec| spec.target.to_string())
        };
        assert_eq!(of("backend=unix:/run/c", 3).as_deref(), Some("unix:/run/c3"));
        assert_eq!(of("backend=pty:/run/c", 0).as_deref(), Some("pty:/run/c0"));
        assert_eq!(of("backend=file:/run/c", 1).as_deref(), Some("file:/run/c1"));
        assert_eq!(of("backend=tcp:12345", 2).as_deref(), Some("tcp:127.0.0.1:12347"));
        assert_eq!(of("backend=tcp:65535", 1), None);
        assert_eq!(of("backend=stdio", 0), None);
    }
}
