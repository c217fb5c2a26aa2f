//! A `vhost-device-*` daemon under test: started, waited for, killed, started again, never left behind.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::interrupt;
use crate::process::Owned;
use crate::scratch::Scratch;

/// Names the folder with the daemons' binaries; `cargo xtask test` sets it.
pub const VARIABLE: &str = "BACKPLANE_DAEMONS";

const START_LIMIT: Duration = Duration::from_secs(30);

/// A daemon and its command line.
#[derive(Debug)]
pub struct Daemon {
    name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    scratch: Scratch,
    running: Option<Owned>,
    /// From its start until it said that it was ready.
    pub ready_after: Duration,
}

/// Where the binary `name` is: in the folder named by [`VARIABLE`], else in the release folder beside the running
/// program's own.
///
/// # Errors
/// Says how to build it.
pub fn find(name: &str) -> Result<PathBuf, Failure> {
    let folder = match env::var_os(VARIABLE) {
        Some(folder) => Some(PathBuf::from(folder)),
        None => env::current_exe().ok().and_then(|own| {
            let profile = own.ancestors().skip(1).find(|folder| !folder.ends_with("deps"))?;
            Some(profile.parent()?.join("release"))
        }),
    };
    match folder.map(|folder| folder.join(name)) {
        Some(path) if path.is_file() => Ok(path),
        Some(path) => {
            Err(Failure::new(format!("{} is not there: cargo build --release --bin {name}", path.display())))
        }
        None => Err(Failure::new(format!("cannot tell where {name} is: set {VARIABLE}=FOLDER"))),
    }
}

impl Daemon {
    /// The daemon `name`, to listen on the path that [`Daemon::socket`] gives.
    ///
    /// # Errors
    /// The binary is not there, or no temporary folder can be made.
    pub fn new(name: &str) -> Result<Self, Failure> {
        Self::of(name, find(name)?)
    }

    /// The daemon `name` whose binary is `program`.
    ///
    /// # Errors
    /// No temporary folder can be made.
    pub fn of(name: &str, program: PathBuf) -> Result<Self, Failure> {
        let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
        let mut daemon = Self {
            name: name.to_owned(),
            program,
            arguments: Vec::new(),
            scratch,
            running: None,
            ready_after: Duration::ZERO,
        };
        daemon.arguments.push("--socket-path".into());
        daemon.arguments.push(daemon.socket().into());
        Ok(daemon)
    }

    /// Adds arguments to its command line.
    #[must_use]
    pub fn args<A: Into<OsString>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(Into::into));
        self
    }

    /// The path given to it as `--socket-path`.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.scratch.join("vhost.sock")
    }

    /// The socket of guest `number` of a daemon that was given `--socket-count`.
    #[must_use]
    pub fn socket_of(&self, number: usize) -> PathBuf {
        self.scratch.join(&format!("vhost.sock{number}"))
    }

    /// Its process id while it runs.
    #[must_use]
    pub fn id(&self) -> Option<u32> {
        self.running.as_ref().map(Owned::id)
    }

    /// Starts it and waits until it says that it listens.
    ///
    /// # Errors
    /// It ended, or did not get ready within thirty seconds; with what it wrote.
    pub fn start(&mut self) -> Result<(), Failure> {
        let log = self.log();
        let stderr = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&log)
            .map_err(Failure::io(format_args!("open {}", log.display())))?;
        let mut command = virtio_testkit::daemon::announcing(&self.program);
        command.args(&self.arguments).stderr(stderr);
        let begun = Instant::now();
        let mut child = Owned::spawn(&mut command)
            .map_err(Failure::io(format_args!("start {}", self.program.display())))?;
        let mut word = child.child().stdout.take().ok_or_else(|| Failure::new("no pipe to the daemon"))?;
        let patient = || interrupt::caught().is_none() && begun.elapsed() < START_LIMIT;
        let ready = virtio_testkit::daemon::await_ready(&mut word, patient);
        if let Some(signal) = interrupt::caught() {
            return Err(Failure::new(format!("stopped by signal {signal}")));
        }
        if let Err(what) = ready {
            let end = child.wait_for(Duration::from_secs(1)).map_err(Failure::io("wait"))?;
            let how = end.map_or("and goes on".to_owned(), |end| end.to_string());
            return Err(self.failure(&format!("{what}: {how}")));
        }
        self.ready_after = begun.elapsed();
        self.running = Some(child);
        Ok(())
    }

    /// Kills it, without a chance to clean up.
    ///
    /// # Errors
    /// What waiting reports.
    pub fn kill(&mut self) -> Result<(), Failure> {
        match self.running.take() {
            Some(mut child) => child.kill().map(|_| ()).map_err(Failure::io("kill")),
            None => Ok(()),
        }
    }

    /// Asks it to end, and says how it did.
    ///
    /// # Errors
    /// It was not running, or had to be killed.
    pub fn stop(&mut self) -> Result<ExitStatus, Failure> {
        let Some(mut child) = self.running.take() else { return Err(self.failure("does not run")) };
        let status = child.stop().map_err(Failure::io("stop"))?;
        match status.code() {
            Some(_) => Ok(status),
            None => Err(self.failure(&format!("did not end in an orderly way: {status}"))),
        }
    }

    /// Whether it still runs.
    ///
    /// # Errors
    /// How it ended.
    pub fn check(&mut self) -> Result<(), Failure> {
        let ended = match &mut self.running {
            Some(child) => child.try_wait().map_err(Failure::io("wait"))?,
            None => return Err(self.failure("does not run")),
        };
        ended.map_or(Ok(()), |status| Err(self.failure(&format!("ended by itself: {status}"))))
    }

    /// Everything that it wrote to standard error, over all its starts.
    #[must_use]
    pub fn stderr(&self) -> String {
        fs::read(self.log()).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Its resident memory in KiB.
    #[must_use]
    pub fn resident_kib(&self) -> Option<u64> {
        self.status("VmRSS:")
    }

    /// The most memory that it had resident so far, in KiB.
    #[must_use]
    pub fn peak_kib(&self) -> Option<u64> {
        self.status("VmHWM:")
    }

    fn status(&self, field: &str) -> Option<u64> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.id()?)).ok()?;
        status.lines().find_map(|l| l.strip_prefix(field))?.split_whitespace().next()?.parse().ok()
    }

    /// Waits until a path is gone, as a daemon's socket has to be after its end.
    #[must_use]
    pub fn gone(path: &Path, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while path.exists() {
            if Instant::now() > end {
                return false;
            }
            thread::sleep(crate::process::TICK);
        }
        true
    }

    fn log(&self) -> PathBuf {
        self.scratch.join("stderr")
    }

    fn failure(&self, what: &str) -> Failure {
        Failure::new(format!("{} {what}", self.name)).with_log("its standard error", &self.stderr())
    }
}
