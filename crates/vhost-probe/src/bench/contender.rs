//! Who is measured: back-ends behind a socket, and floors, which are processes of this program.
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::str::FromStr;

use virtio_testkit::load::floor::{self, Floor};
use virtio_testkit::load::{LoadError, Target};

/// A back-end and what it is called.
#[derive(Clone, Debug)]
pub(crate) struct Backend {
    name: String,
    path: PathBuf,
}

impl FromStr for Backend {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Backend, Self::Err> {
        Ok(match text.split_once('=') {
            // A path may hold the sign, too.
            Some((name, path)) if !name.contains('/') => Backend { name: name.to_owned(), path: path.into() },
            _ => {
                let path = PathBuf::from(text);
                let name = path.file_stem().map_or(text.into(), |stem| stem.to_string_lossy());
                Backend { name: name.into_owned(), path }
            }
        })
    }
}

/// Who is measured.
#[derive(Clone, Debug)]
pub(crate) enum Contender {
    Floor(Floor),
    Backend(Backend),
}

/// A process that ends with its owner.
pub(crate) struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended with its connection.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Contender {
    pub(crate) fn floors() -> impl Iterator<Item = Contender> {
        Floor::ALL.into_iter().map(Contender::Floor)
    }

    pub(crate) fn name(&self) -> String {
        match self {
            Contender::Floor(floor) => floor.name().to_owned(),
            Contender::Backend(backend) => backend.name.clone(),
        }
    }

    /// Where to connect to. A floor is started for it.
    pub(crate) fn target(&self, processes: &mut Vec<Running>) -> Result<Target<'_>, LoadError> {
        match self {
            Contender::Backend(backend) => Ok(Target::Path(&backend.path)),
            Contender::Floor(floor) => {
                let failed = |error| LoadError::System("starting a floor", error);
                let (ours, theirs) = UnixStream::pair().map_err(failed)?;
                let child = Command::new(std::env::current_exe().map_err(failed)?)
                    .args(["floor", floor.name()])
                    .stdin(Stdio::from(OwnedFd::from(theirs)))
                    .stdout(Stdio::null())
                    .spawn()
                    .map_err(failed)?;
                let pid = child.id();
                processes.push(Running(child));
                Ok(Target::Connected(ours, pid))
            }
        }
    }
}

/// Be a floor: the front-end is standard input
#[derive(Debug, clap::Args)]
pub(crate) struct FloorArguments {
    #[arg(value_parser = by_name)]
    floor: Floor,
}

fn by_name(name: &str) -> Result<Floor, String> {
    Floor::ALL.into_iter().find(|floor| floor.name() == name).ok_or_else(|| "no such floor".to_owned())
}

pub(crate) fn serve_floor(arguments: &FloorArguments) -> ExitCode {
    let socket = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned().map(UnixStream::from);
    match socket.and_then(|socket| floor::serve(socket, arguments.floor)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", arguments.floor.name());
            ExitCode::FAILURE
        }
    }
}
