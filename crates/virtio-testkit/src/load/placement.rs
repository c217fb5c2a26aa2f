//! Which CPUs driver and back-end run on, and what the back-end used of them.
use std::fs;
use std::io;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Where driver and back-end run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placement {
    /// Both on one CPU: the time of a request is the sum of both software paths. The stable figure.
    Same,
    /// On two CPUs: with the wake-ups of sleeping CPUs in it.
    Cross,
}

impl Placement {
    /// Both.
    pub const ALL: [Placement; 2] = [Placement::Same, Placement::Cross];
}

/// A process cannot be placed or measured.
#[derive(Debug, thiserror::Error)]
pub enum PlacementError {
    /// Two CPUs were asked for.
    #[error("the placement needs two CPUs, this process may run on {0}")]
    Cpus(usize),
    /// The back-end's process is not to be found through its socket.
    #[error("cannot tell which process is behind the socket: {0}")]
    Peer(#[source] io::Error),
    /// Its CPUs cannot be chosen.
    #[error("cannot choose the CPU of process {0}: {1} (it has to run as the same user)")]
    Pin(u32, #[source] io::Error),
    /// Its CPU time or memory cannot be read.
    #[error("cannot read the CPU time or memory of process {0}: {1}")]
    Time(u32, #[source] io::Error),
}

/// The process of a back-end.
#[derive(Clone, Copy, Debug)]
pub struct Process(u32);

impl Process {
    /// The one with this number.
    pub fn new(pid: u32) -> Process {
        Process(pid)
    }

    /// `known`, or who listened at the other end of `socket`.
    pub(super) fn behind(socket: &UnixStream, known: Option<u32>) -> Result<Process, PlacementError> {
        if let Some(pid) = known {
            return Ok(Process(pid));
        }
        let peer =
            rustix::net::sockopt::socket_peercred(socket).map_err(|e| PlacementError::Peer(e.into()))?;
        let pid = u32::try_from(peer.pid.as_raw_nonzero().get());
        pid.map(Process).map_err(|_| PlacementError::Peer(io::ErrorKind::NotFound.into()))
    }

    pub(super) fn id(self) -> u32 {
        self.0
    }

    fn threads(self) -> io::Result<Vec<i32>> {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.0))?;
        Ok(tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect())
    }

    /// CPU time of all threads that there are.
    ///
    /// # Errors
    /// There is no such process, or it is not to be looked at.
    pub fn cpu_time(self) -> Result<Duration, PlacementError> {
        let failed = |error| PlacementError::Time(self.0, error);
        let mut sum = 0;
        for thread in self.threads().map_err(failed)? {
            // A thread that ends meanwhile takes its time with it; the back-ends of interest keep theirs.
            let Ok(text) = fs::read_to_string(format!("/proc/{}/task/{thread}/schedstat", self.0)) else {
                continue;
            };
            let time = text.split_whitespace().next().and_then(|field| field.parse::<u64>().ok());
            sum += time.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))?;
        }
        Ok(Duration::from_nanos(sum))
    }

    /// Anonymous memory and pages of files that are mapped (the program itself); what is shared is the guest's.
    pub(super) fn resident_kib(self) -> Result<u64, PlacementError> {
        let failed = |error| PlacementError::Time(self.0, error);
        let status = fs::read_to_string(format!("/proc/{}/status", self.0)).map_err(failed)?;
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse::<u64>().ok()
        };
        let sum = field("RssAnon:").zip(field("RssFile:")).map(|(own, file)| own + file);
        sum.ok_or_else(|| failed(io::ErrorKind::InvalidData.into()))
    }
}

/// The CPUs that this process was started on, before anything was pinned.
fn allowed() -> &'static [usize] {
    static ALLOWED: std::sync::OnceLock<Vec<usize>> = std::sync::OnceLock::new();
    ALLOWED.get_or_init(|| {
        let set = sched_getaffinity(None).unwrap_or_default();
        (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
    })
}

fn only(cpu: usize) -> CpuSet {
    let mut set = CpuSet::new();
    set.set(cpu);
    set
}

/// CPU time of the calling thread.
pub(super) fn own_cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(u64::try_from(time.tv_sec).unwrap_or(0), u32::try_from(time.tv_nsec).unwrap_or(0))
}

/// Keeps the calling thread on the driver's CPU.
///
/// # Errors
/// The system refuses.
pub fn pin_current_thread() -> Result<(), PlacementError> {
    let pin = |cpu: &usize| sched_setaffinity(None, &only(*cpu));
    allowed().first().map_or(Ok(()), pin).map_err(|e| PlacementError::Pin(std::process::id(), e.into()))
}

impl Placement {
    /// Pins the calling thread, and all threads of the back-end.
    pub(super) fn apply(self, backend: &Process) -> Result<(), PlacementError> {
        let cpus = allowed();
        let at = match self {
            Placement::Same => cpus.first(),
            Placement::Cross => cpus.get(1),
        };
        let cpu = *at.ok_or(PlacementError::Cpus(cpus.len()))?;
        pin_current_thread()?;
        let failed = |error| PlacementError::Pin(backend.0, error);
        for thread in backend.threads().map_err(failed)? {
            match sched_setaffinity(Pid::from_raw(thread), &only(cpu)) {
                Ok(()) | Err(rustix::io::Errno::SRCH) => {}
                Err(error) => return Err(failed(error.into())),
            }
        }
        Ok(())
    }
}
