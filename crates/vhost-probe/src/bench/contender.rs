//! Who is measured: back-ends behind a socket, back-ends that are started anew for each case, and floors, which are
//! processes of this program.
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

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

/// How to start a back-end.
#[derive(Clone, Debug)]
pub(crate) struct Spawned {
    name: String,
    program: String,
    arguments: Vec<String>,
}

impl FromStr for Spawned {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Spawned, Self::Err> {
        let (name, command) = text.split_once('=').ok_or("give it a name: NAME=COMMAND")?;
        if !command.contains("{}") {
            return Err("say with {} where the command wants its socket");
        }
        let mut words = command.split_whitespace().map(str::to_owned);
        let program = words.next().unwrap_or_default();
        Ok(Spawned { name: name.to_owned(), program, arguments: words.collect() })
    }
}

/// Who is measured.
#[derive(Clone, Debug)]
pub(crate) enum Contender {
    Floor(Floor),
    Backend(Backend),
    Spawned(Spawned),
}

/// A process that ends with its owner, and the folder of its socket.
pub(crate) struct Running {
    child: Child,
    folder: Option<PathBuf>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended with its connection.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if let Some(folder) = &self.folder {
            let _ = fs::remove_dir_all(folder);
        }
    }
}

/// How long a back-end may take until its socket is there.
const START: Duration = Duration::from_secs(5);

impl Spawned {
    /// Starts it and waits for its socket.
    fn start(&self, number: usize) -> io::Result<(Running, PathBuf)> {
        let folder = std::env::temp_dir().join(format!("vhost-probe-{}-{number}", std::process::id()));
        fs::create_dir(&folder)?;
        let socket = folder.join("socket");
        let mut command = Command::new(&self.program);
        command.args(self.arguments.iter().map(|argument| argument.replace("{}", &socket.to_string_lossy())));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().inspect_err(|_| drop(fs::remove_dir(&folder)))?;
        let mut running = Running { child, folder: Some(folder.clone()) };
        // Some number their sockets even if there is only one.
        let names = [socket, folder.join("socket0")];
        let deadline = Instant::now() + START;
        loop {
            if let Some(socket) = names.iter().find(|socket| socket.exists()) {
                return Ok((running, socket.clone()));
            }
            if let Some(status) = running.child.try_wait()? {
                return Err(io::Error::other(format!("{} ended before it listened: {status}", self.program)));
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{} made no socket within {START:?}", self.program)));
            }
            thread::sleep(Duration::from_millis(2));
        }
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
            Contender::Spawned(spawned) => spawned.name.clone(),
        }
    }

    /// Where to connect to. What is started for it is added to `processes`.
    pub(crate) fn target(&self, processes: &mut Vec<Running>) -> Result<Target, LoadError> {
        match self {
            Contender::Backend(backend) => Ok(Target::Path(backend.path.clone())),
            Contender::Spawned(spawned) => {
                let failed = |error| LoadError::System("starting the back-end", error);
                let (running, socket) = spawned.start(processes.len()).map_err(failed)?;
                processes.push(running);
                Ok(Target::Path(socket))
            }
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
                processes.push(Running { child, folder: None });
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
