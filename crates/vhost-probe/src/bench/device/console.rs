//! Consoles: output of port 0. It goes to the null device, which takes it for nothing, to a file in memory or on a disk, or
//! through a socket to a reader in this process, on the driver's CPU; then every byte has to have come out in the end.
use std::any::Any;
use std::fs::File;
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use virtio_testkit::load::floor::Floor;
use virtio_testkit::load::{ConsoleOutput, LoadError, Outlet};

use super::{Device, Setting, Who};
use crate::bench::{Arguments, Case};

/// What stands for a port's backend in a command, as `vhost-device-console` spells it.
const BACKEND: &str = "{backend}";
/// What stands for the number of a TCP port.
const TCP: &str = "{tcp}";

/// Where output ends that nobody reads.
const NULL: &str = "/dev/null";
/// Where files take memory only.
const MEMORY: &str = "/dev/shm";

/// Queues of a console with one port (5.3.2), and its transmitq.
const QUEUES: u16 = 4;
const TRANSMIT: u16 = 1;

#[derive(Debug)]
pub(super) struct Console;

impl Device for Console {
    fn name(&self) -> &'static str {
        "console"
    }

    fn kinds(&self) -> &'static [&'static str] {
        &["file", "shm", "disk", "unix", "tcp"]
    }

    fn size(&self) -> u32 {
        64
    }

    fn floors(&self, _arguments: &Arguments) -> Vec<&'static str> {
        vec![Floor::Ring.name(), WRITE, WRITE_BATCH]
    }

    fn setting(
        &self,
        case: &Case,
        arguments: &Arguments,
        who: Who<'_>,
        shelf: &mut dyn Any,
    ) -> Result<Setting, LoadError> {
        if case.queues > 1 {
            return Err(LoadError::NotOffered("a second port"));
        }
        let mut place = |folder: &Path| -> PathBuf {
            let number =
                shelf.downcast_mut::<usize>().map_or(0, |count| std::mem::replace(count, *count + 1));
            folder.join(format!("vhost-probe-console-{}-{number}", std::process::id()))
        };
        let kept = match case.kind.as_str() {
            "shm" => Some(place(Path::new(MEMORY))),
            "disk" => Some(place(&arguments.disk_dir.clone().unwrap_or_else(std::env::temp_dir))),
            _ => None,
        };
        let floor = match who {
            Who::Floor(name) => Floor::by_name(name, Some(kept.clone().unwrap_or_else(|| NULL.into()))),
            _ => None,
        };
        let has = |word: &str| matches!(who, Who::Command(command) if command.contains(word));
        let (outlet, words) = match case.kind.as_str() {
            "file" if floor.is_some() => (Outlet::File, Vec::new()),
            // It writes nowhere.
            "shm" | "disk" if matches!(floor, Some(Floor::Ring)) => (Outlet::File, Vec::new()),
            "shm" | "disk" if floor.is_some() || has(BACKEND) => {
                let path = kept.unwrap_or_default();
                File::create(&path).map_err(|error| LoadError::System("making a file", error))?;
                let backend = format!("file:{}", path.display());
                (Outlet::Kept(path), vec![(BACKEND, backend)])
            }
            "file" if has(BACKEND) => (Outlet::File, vec![(BACKEND, format!("file:{NULL}"))]),
            "unix" if has(BACKEND) => {
                let path = place(&std::env::temp_dir());
                (Outlet::Unix(path.clone()), vec![(BACKEND, format!("unix:{}", path.display()))])
            }
            "tcp" if has(BACKEND) || has(TCP) => {
                // One that was free just now.
                let port = TcpListener::bind(("127.0.0.1", 0)).and_then(|socket| socket.local_addr());
                let port = port.map_err(|error| LoadError::System("finding a TCP port", error))?.port();
                (Outlet::Tcp(port), vec![(BACKEND, format!("tcp:{port}")), (TCP, port.to_string())])
            }
            _ => return Err(LoadError::NotOffered("that way out")),
        };
        let load = ConsoleOutput::new(case.size, outlet);
        Ok(Setting { loads: vec![(TRANSMIT, Box::new(load))], queues: QUEUES, words, floor })
    }

    fn shelf(&self) -> Box<dyn Any> {
        Box::new(0_usize)
    }
}

/// The names of the floors that write.
const WRITE: &str = "floor-write";
const WRITE_BATCH: &str = "floor-write-batch";
