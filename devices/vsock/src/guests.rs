//! What a command line, `--vm` or a file say about guests. Names are those of rust-vmm's daemon, with `-` or `_`.
use std::io;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use virtio_vsock::packet::Kind;
use virtio_vsock::{HostSide, ListenPort, Settings, SetupError};

/// Largest configuration file.
const MAX_FILE: u64 = 1 << 20;

/// One guest.
#[derive(Clone, Debug, Default, clap::Args, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guest {
    /// Context ID of the guest; of several guests that of the first, the others follow [default: 3]
    #[arg(long, visible_alias = "guest_cid", value_name = "CID")]
    #[serde(alias = "guest-cid")]
    guest_cid: Option<u64>,

    /// Unix sockets of the host: PATH for clients, PATH_PORT for connections of the guest; with --socket-count
    /// numbered as the sockets are
    #[arg(long, visible_alias = "uds_path", value_name = "PATH", conflicts_with = "forward_cid")]
    #[serde(alias = "uds-path")]
    uds_path: Option<PathBuf>,

    /// Forward the guest's connections to the host to this context ID of the host's AF_VSOCK instead (1: the host
    /// itself)
    #[arg(long, visible_alias = "forward_cid", value_name = "CID")]
    #[serde(alias = "forward-cid")]
    forward_cid: Option<u32>,

    /// Ports of the host's AF_VSOCK to forward to the guest, e.g. 9001+9002; with /seqpacket behind one for SEQPACKET
    #[arg(long, visible_alias = "forward_listen", value_name = "PORTS", requires = "forward_cid")]
    #[serde(alias = "forward-listen", default, deserialize_with = "ports")]
    forward_listen: Option<String>,

    /// Bytes that a guest may send on a connection before they are taken, at most [default: 262144]
    #[arg(long, visible_alias = "tx_buffer_size", value_name = "BYTES")]
    #[serde(alias = "tx-buffer-size")]
    tx_buffer_size: Option<u32>,

    /// Largest size of a queue [default: 1024]
    #[arg(long, visible_alias = "queue_size", value_name = "N")]
    #[serde(alias = "queue-size")]
    queue_size: Option<u16>,

    /// Groups of the guest, e.g. a+b: guests that share one reach each other [default: default]
    #[arg(long, value_name = "GROUPS")]
    groups: Option<String>,

    /// Only in files, where it stands among the others.
    #[arg(skip)]
    socket: Option<PathBuf>,
}

/// A guest with its socket.
#[derive(Debug)]
pub(crate) struct Vm {
    pub(crate) guest: Guest,
    pub(crate) socket: Option<PathBuf>,
}

impl From<Guest> for Vm {
    fn from(mut guest: Guest) -> Vm {
        let socket = guest.socket.take();
        Vm { guest, socket }
    }
}

/// A command line that makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UsageError {
    #[error(
        "--vm {0:?}: {1:?} is not KEY=VALUE; write e.g. guest-cid=3,socket=/tmp/vhost3.sock,uds-path=/tmp/vm3.vsock"
    )]
    NotKeyValue(String, String),
    #[error(
        "--vm {0:?}: there is no key {1:?}; those there are: guest-cid, socket, uds-path, forward-cid, forward-listen, tx-buffer-size, queue-size, groups"
    )]
    NoSuchKey(String, String),
    #[error("--vm {0:?}: {1} is given twice; give it once")]
    Twice(String, String),
    #[error("--vm {0:?}: {1} cannot be {2:?}; give a number in its range")]
    Value(String, String, String),
    #[error("--forward-listen: {0:?} is no port; write e.g. 9001+9002 or 9001/seqpacket")]
    Port(String),
    #[error("a guest of --vm or --config has no socket; give it one, e.g. socket=/tmp/vhost3.sock")]
    NoSocket,
    #[error("a guest has both uds-path and forward-cid; give one of them")]
    TwoSides,
    #[error("a guest has forward-listen without forward-cid; give both")]
    ListenAlone,
    #[error("options of a single guest are given beside --vm or --config; put them there")]
    Both,
    #[error("forwarded ports cannot be those of several guests; use --vm with ports for each")]
    SharedPorts,
    #[error("--config {path:?}: {error}; see the README for an example")]
    File { path: PathBuf, error: String },
    #[error(transparent)]
    Settings(#[from] SetupError),
}

impl Guest {
    pub(crate) fn is_given(&self) -> bool {
        self.guest_cid.is_some()
            || self.uds_path.is_some()
            || self.forward_cid.is_some()
            || self.forward_listen.is_some()
            || self.tx_buffer_size.is_some()
            || self.queue_size.is_some()
            || self.groups.is_some()
    }

    /// With a number: one of several guests with the same options.
    pub(crate) fn settings(&self, number: Option<u32>) -> Result<Settings, UsageError> {
        let host = match (&self.uds_path, self.forward_cid) {
            (Some(_), Some(_)) => return Err(UsageError::TwoSides),
            (_, None) if self.forward_listen.is_some() => return Err(UsageError::ListenAlone),
            (Some(path), None) => HostSide::Unix(match number {
                None => path.clone(),
                Some(number) => {
                    let mut name = path.clone().into_os_string();
                    name.push(number.to_string());
                    name.into()
                }
            }),
            (None, Some(forward_cid)) => {
                let listen = self.listen()?;
                if number.is_some_and(|number| number > 0) && !listen.is_empty() {
                    return Err(UsageError::SharedPorts);
                }
                HostSide::Vsock { forward_cid, listen }
            }
            (None, None) => HostSide::Nobody,
        };
        let cid = self.guest_cid.unwrap_or(3).saturating_add(number.unwrap_or(0).into());
        let mut settings = Settings::new(cid, host);
        settings.buffer_size = self.tx_buffer_size.unwrap_or(settings.buffer_size);
        settings.queue_size = self.queue_size.unwrap_or(settings.queue_size);
        if let Some(groups) = &self.groups {
            settings.groups = groups.split('+').filter(|name| !name.is_empty()).map(str::to_owned).collect();
        }
        settings.check()?;
        Ok(settings)
    }

    fn listen(&self) -> Result<Vec<ListenPort>, UsageError> {
        let Some(text) = &self.forward_listen else { return Ok(Vec::new()) };
        text.split('+')
            .map(|item| {
                let (number, kind) = match item.split_once('/') {
                    None | Some((_, "stream")) => (item.trim_end_matches("/stream"), Kind::Stream),
                    Some((number, "seqpacket")) => (number, Kind::SeqPacket),
                    Some(_) => return Err(UsageError::Port(item.to_owned())),
                };
                let port = number.trim().parse().map_err(|_| UsageError::Port(item.to_owned()))?;
                Ok(ListenPort { port, kind })
            })
            .collect()
    }
}

/// The value of `--vm`.
pub(crate) fn parse(text: &str) -> Result<Vm, UsageError> {
    let mut vm = Vm { guest: Guest::default(), socket: None };
    for item in text.split(',') {
        let Some((key, value)) = item.split_once('=') else {
            return Err(UsageError::NotKeyValue(text.to_owned(), item.to_owned()));
        };
        let key = key.replace('_', "-");
        let wrong = || UsageError::Value(text.to_owned(), key.clone(), value.to_owned());
        let guest = &mut vm.guest;
        let was_given = match key.as_str() {
            "guest-cid" => guest.guest_cid.replace(value.parse().map_err(|_| wrong())?).is_some(),
            "socket" => vm.socket.replace(value.into()).is_some(),
            "uds-path" => guest.uds_path.replace(value.into()).is_some(),
            "forward-cid" => guest.forward_cid.replace(value.parse().map_err(|_| wrong())?).is_some(),
            "forward-listen" => guest.forward_listen.replace(value.to_owned()).is_some(),
            "tx-buffer-size" => guest.tx_buffer_size.replace(value.parse().map_err(|_| wrong())?).is_some(),
            "queue-size" => guest.queue_size.replace(value.parse().map_err(|_| wrong())?).is_some(),
            "groups" => guest.groups.replace(value.to_owned()).is_some(),
            _ => return Err(UsageError::NoSuchKey(text.to_owned(), key)),
        };
        if was_given {
            return Err(UsageError::Twice(text.to_owned(), key));
        }
    }
    Ok(vm)
}

/// A port alone, or a text of several.
fn ports<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<String>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ports {
        One(u32),
        Some(String),
    }
    Ok(Option::<Ports>::deserialize(deserializer)?.map(|ports| match ports {
        Ports::One(port) => port.to_string(),
        Ports::Some(text) => text,
    }))
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    vms: Vec<Guest>,
}

/// The guests of a file.
pub(crate) fn read(path: &Path) -> Result<Vec<Vm>, UsageError> {
    let failed = |error: String| UsageError::File { path: path.to_owned(), error };
    let text = text_of(path).map_err(|error| failed(error.to_string()))?;
    let vms = vms_of(&text).map_err(failed)?;
    if vms.is_empty() {
        return Err(failed("there is no guest in it".to_owned()));
    }
    Ok(vms)
}

fn text_of(path: &Path) -> io::Result<String> {
    if std::fs::metadata(path)?.len() > MAX_FILE {
        return Err(io::Error::other(format!("longer than {MAX_FILE} bytes")));
    }
    std::fs::read_to_string(path)
}

fn vms_of(text: &str) -> Result<Vec<Vm>, String> {
    let file: File = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    Ok(file.vms.into_iter().map(Vm::from).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Result<Settings, UsageError> {
        parse(text)?.guest.settings(None)
    }

    #[test]
    fn keys_with_dashes_and_underscores() {
        for text in [
            "guest-cid=4,socket=/tmp/s,uds-path=/tmp/v,tx-buffer-size=65536,queue-size=256,groups=a+b",
            "guest_cid=4,socket=/tmp/s,uds_path=/tmp/v,tx_buffer_size=65536,queue_size=256,groups=a+b",
        ] {
            let vm = parse(text).unwrap();
            assert_eq!(vm.socket, Some("/tmp/s".into()));
            let settings = vm.guest.settings(None).unwrap();
            assert_eq!(settings.guest_cid, 4);
            assert_eq!(settings.host, HostSide::Unix("/tmp/v".into()));
            assert_eq!((settings.buffer_size, settings.queue_size), (65536, 256));
            assert_eq!(settings.groups, ["a", "b"]);
        }
        let defaults = settings("socket=/tmp/s").unwrap();
        assert_eq!(defaults, Settings::new(3, HostSide::Nobody));
        assert_eq!(defaults.groups, ["default"]);
    }

    #[test]
    fn forwarding() {
        let port = |port, kind| ListenPort { port, kind };
        let got = settings("forward-cid=1,forward-listen=9001+9002/seqpacket+7/stream").unwrap().host;
        let listen = vec![port(9001, Kind::Stream), port(9002, Kind::SeqPacket), port(7, Kind::Stream)];
        assert_eq!(got, HostSide::Vsock { forward_cid: 1, listen });
        for wrong in [
            "forward-cid=1,forward-listen=",
            "forward-cid=1,forward-listen=1+x",
            "forward-cid=1,forward-listen=1/udp",
        ] {
            assert!(matches!(settings(wrong), Err(UsageError::Port(_))), "{wrong}");
        }
        assert!(matches!(settings("forward-cid=1,uds-path=/v"), Err(UsageError::TwoSides)));
        assert!(matches!(settings("forward-listen=1"), Err(UsageError::ListenAlone)));
        let two = parse("forward-cid=1,forward-listen=9001").unwrap().guest.settings(Some(1));
        assert!(matches!(two, Err(UsageError::SharedPorts)));
    }

    #[test]
    fn refusals() {
        assert!(matches!(settings(""), Err(UsageError::NotKeyValue(..))));
        assert!(matches!(settings("guest-cid"), Err(UsageError::NotKeyValue(..))));
        assert!(matches!(settings("cid=3"), Err(UsageError::NoSuchKey(..))));
        assert!(matches!(settings("guest-cid=3,guest_cid=4"), Err(UsageError::Twice(..))));
        assert!(matches!(settings("guest-cid=three"), Err(UsageError::Value(..))));
        for reserved in ["0", "1", "2", "4294967295", "4294967296", "18446744073709551615"] {
            let error = settings(&format!("guest-cid={reserved}"));
            assert!(matches!(error, Err(UsageError::Settings(SetupError::ReservedCid(_)))), "{reserved}");
        }
        assert!(settings("queue-size=1000").is_err() && settings("queue-size=0").is_err());
        assert!(settings("tx-buffer-size=1").is_err());
    }

    #[test]
    fn guests_of_the_same_options_are_numbered() {
        let guest = parse("guest-cid=7,uds-path=/tmp/v").unwrap().guest;
        let second = guest.settings(Some(1)).unwrap();
        assert_eq!((second.guest_cid, second.host), (8, HostSide::Unix("/tmp/v1".into())));
    }

    #[test]
    fn files_with_dashes_and_underscores() {
        let text = "
vms:
    - guest_cid: 3
      socket: /tmp/vhost3.socket
      uds_path: /tmp/vm3.sock
      tx_buffer_size: 65536
      queue_size: 1024
      groups: group1+groupA
    - guest-cid: 4
      socket: /tmp/vhost4.socket
      forward-cid: 1
      forward-listen: 9001+9002
    - {guest_cid: 5, socket: /tmp/vhost5.socket, forward_cid: 1, forward_listen: 9003}
";
        let vms = vms_of(text).unwrap();
        assert_eq!(vms.len(), 3);
        assert_eq!(vms[0].socket, Some("/tmp/vhost3.socket".into()));
        assert_eq!(vms[0].guest.settings(None).unwrap().groups, ["group1", "groupA"]);
        for (vm, ports) in vms.iter().skip(1).zip([2, 1]) {
            let HostSide::Vsock { forward_cid: 1, listen } = vm.guest.settings(None).unwrap().host else {
                panic!("forwards");
            };
            assert_eq!(listen.len(), ports);
        }
        for wrong in
            ["", "vms: 3", "vms:\n  - guest_cid: x", "vms:\n  - cid: 3", "guests: []", "vms: [", "\0"]
        {
            assert!(vms_of(wrong).is_err(), "{wrong:?}");
        }
    }
}
