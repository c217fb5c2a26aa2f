//! Who is measured: back-ends behind a socket, back-ends that are started anew for each case, and floors, which are
//! processes of this program.
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::{Child, Command, ExitCode, Stdio};
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use virtio_testkit::daemon::TempDir;
use virtio_testkit::load::floor::{self, Floor};
use virtio_testkit::load::{LoadError, Target};

use super::device::{Setting, Who};
use super::{Arguments, Case};

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
    command: String,
}

impl FromStr for Spawned {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Spawned, Self::Err> {
        let (name, command) = text.split_once('=').ok_or("give it a name: NAME=COMMAND")?;
        if !command.contains("{}") {
            return Err("say with {} where the command wants its socket");
        }
        Ok(Spawned { name: name.to_owned(), command: command.to_owned() })
    }
}

/// Who is measured.
#[derive(Clone, Debug)]
pub(crate) enum Contender {
    Floor(&'static str),
    Backend(Backend),
    Spawned(Spawned),
}

/// A process that ends with its owner, and the folder of its socket.
pub(crate) struct Running {
    child: Child,
    _folder: Option<TempDir>,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended with its connection.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// How long a back-end may take until its socket is there.
const START: Duration = Duration::from_secs(5);

impl Spawned {
    pub(super) fn command(&self) -> &str {
        &self.command
    }

    /// Starts it and waits for its socket. `words` are what stands for what.
    fn start(&self, words: &[(&str, String)]) -> io::Result<(Running, PathBuf)> {
        let folder = TempDir::try_new()?;
        let socket = folder.join("socket");
        let put = |word: &str| {
            let word = word.replace("{}", &socket.to_string_lossy());
            words.iter().fold(word, |word, (name, value)| word.replace(name, value))
        };
        let mut arguments = self.command.split_whitespace().map(put);
        let program = arguments.next().unwrap_or_default();
        let mut command = Command::new(&program);
        command.args(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        // Some number their sockets even if there is only one.
        let names = [socket.clone(), folder.join("socket0")];
        let mut running = Running { child: command.spawn()?, _folder: Some(folder) };
        let deadline = Instant::now() + START;
        loop {
            if let Some(socket) = names.iter().find(|socket| socket.exists()) {
                return Ok((running, socket.clone()));
            }
            if let Some(status) = running.child.try_wait()? {
                return Err(io::Error::other(format!("{program} ended before it listened: {status}")));
            }
            if Instant::now() > deadline {
                return Err(io::Error::other(format!("{program} made no socket within {START:?}")));
            }
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Contender {
    pub(crate) fn name(&self) -> String {
        match self {
            Contender::Floor(name) => (*name).to_owned(),
            Contender::Backend(backend) => backend.name.clone(),
            Contender::Spawned(spawned) => spawned.name.clone(),
        }
    }

    pub(super) fn who(&self) -> Who<'_> {
        match self {
            Contender::Floor(name) => Who::Floor(name),
            Contender::Backend(_) => Who::Running,
            Contender::Spawned(spawned) => Who::Command(&spawned.command),
        }
    }

    /// Where to connect to. What is started for it is added to `processes`.
    pub(super) fn target(
        &self,
        case: &Case,
        arguments: &Arguments,
        setting: &Setting,
        processes: &mut Vec<Running>,
    ) -> Result<Target, LoadError> {
        match self {
            Contender::Backend(backend) => Ok(Target::Path(backend.path.clone())),
            Contender::Spawned(spawned) => {
                let failed = |error| LoadError::System("starting the back-end", error);
                let mut words = setting.words.clone();
                words.push(("{queues}", case.queues.to_string()));
                let (running, socket) = spawned.start(&words).map_err(failed)?;
                processes.push(running);
                Ok(Target::Path(socket))
            }
            Contender::Floor(name) => {
                let failed = |error| LoadError::System("starting a floor", error);
                let (ours, theirs) = UnixStream::pair().map_err(failed)?;
                let mut command = Command::new(std::env::current_exe().map_err(failed)?);
                command.args(["floor", name, "--poll-us", &arguments.floor_poll_us.to_string()]);
                if let Some(Floor::File(path) | Floor::Write(path) | Floor::WriteBatch(path)) = &setting.floor
                {
                    command.arg("--file").arg(path);
                }
                let child = command
                    .stdin(Stdio::from(OwnedFd::from(theirs)))
                    .stdout(Stdio::null())
                    .spawn()
                    .map_err(failed)?;
                let pid = child.id();
                processes.push(Running { child, _folder: None });
                Ok(Target::Connected(ours, pid))
            }
        }
    }
}

/// Be a floor: the front-end is standard input
#[derive(Debug, clap::Args)]
pub(crate) struct FloorArguments {
    name: String,
    #[arg(long)]
    file: Option<PathBuf>,
    #[arg(long, default_value = "0")]
    poll_us: u64,
}

pub(crate) fn serve_floor(arguments: &FloorArguments) -> ExitCode {
    let Some(floor) = Floor::by_name(&arguments.name, arguments.file.clone()) else {
        eprintln!("{}: no such floor", arguments.name);
        return ExitCode::from(2);
    };
    let socket = std::os::fd::AsFd::as_fd(&io::stdin()).try_clone_to_owned().map(UnixStream::from);
    let poll = Duration::from_micros(arguments.poll_us);
    match socket.and_then(|socket| floor::serve(socket, floor, poll)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}: {error}", arguments.name);
            ExitCode::FAILURE
        }
    }
}
