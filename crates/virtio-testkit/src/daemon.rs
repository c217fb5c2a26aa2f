//! A daemon as a process: started, ready, ended, never left behind; and a directory for its sockets.
//!
//! Daemons say that they are ready on a descriptor (`--ready-fd`). A shell makes one of our pipe: its number is certain
//! there, no other child of the test inherits it, and nothing has to be done between fork and exec.
use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, Signal, kill_process};

/// For whatever a daemon should do soon; long, because test machines are slow.
const SOON: Duration = Duration::from_secs(30);
/// How often a process is looked at that cannot be waited for.
const TICK: Duration = Duration::from_millis(2);

/// A directory that is gone when its owner is.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// A new one, among temporary files.
    ///
    /// # Panics
    /// If it cannot be made.
    #[expect(clippy::new_without_default, reason = "it makes a directory")]
    pub fn new() -> TempDir {
        TempDir::try_new().unwrap_or_else(|error| panic!("no new directory: {error}"))
    }

    /// The same for who can say what is wrong.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn try_new() -> std::io::Result<TempDir> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        loop {
            let name = format!("testkit-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
            let path = std::env::temp_dir().join(name);
            match std::fs::create_dir(&path) {
                // Of a process that had this number, and was killed.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
                made => return made.map(|()| TempDir(path)),
            }
        }
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Where a file of this name is, or would be.
    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What is in it.
    ///
    /// # Panics
    /// If it is gone.
    pub fn names(&self) -> Vec<String> {
        let entries = std::fs::read_dir(&self.0).expect("the directory");
        entries.map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned()).collect()
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// A command that runs a daemon and gets its word of readiness: for [`await_ready`] on its standard output, which is no
/// longer the daemon's. Arguments follow.
pub fn announcing(program: &Path) -> Command {
    let mut command = Command::new("/bin/sh");
    command.args(["-c", r#"exec "$0" --ready-fd 3 "$@" 3>&1 >&2"#]).arg(program);
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    command
}

/// Waits for a daemon to be ready. `patient` is asked again and again whether to go on waiting.
///
/// # Errors
/// What it did instead.
pub fn await_ready(word: &mut ChildStdout, mut patient: impl FnMut() -> bool) -> Result<(), String> {
    const READY: &[u8] = b"READY=1\n";
    let mut said = Vec::new();
    while said != READY {
        if !patient() {
            return Err("did not get ready".to_owned());
        }
        let tick = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };
        if !poll(&mut [PollFd::new(word, PollFlags::IN)], Some(&tick)).is_ok_and(|ready| ready > 0) {
            continue;
        }
        let mut bytes = [0; 64];
        match word.read(&mut bytes) {
            Ok(0) | Err(_) => return Err("closed --ready-fd before it was ready".to_owned()),
            Ok(count) => said.extend(bytes.iter().take(count)),
        }
        if !READY.starts_with(&said) {
            let text = String::from_utf8_lossy(&said).into_owned();
            return Err(format!("wrote {text:?} to --ready-fd, which is no readiness"));
        }
    }
    Ok(())
}

/// A running daemon; killed with its owner.
#[derive(Debug)]
pub struct DaemonProcess(Child);

impl DaemonProcess {
    /// Starts any command.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn spawn(command: &mut Command) -> DaemonProcess {
        DaemonProcess(command.spawn().expect("the daemon starts"))
    }

    /// Runs a daemon to its end, which has to come by itself.
    ///
    /// # Panics
    /// If it does not start.
    #[track_caller]
    pub fn run(program: &str, args: &[&str]) -> Output {
        Command::new(program).args(args).stdin(Stdio::null()).output().expect("the daemon starts")
    }

    /// Runs a daemon with a command line that makes no sense: it exits with 2 and says all of these words.
    ///
    /// # Panics
    /// If it does not.
    #[track_caller]
    pub fn refuses(program: &str, args: &[&str], words: &[&str]) {
        let output = DaemonProcess::run(program, args);
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        for word in words {
            assert!(text.contains(word), "{args:?}: no {word:?} in {text:?}");
        }
    }

    /// As [`Self::refuses`], before anything is made, with a socket that would be there otherwise.
    ///
    /// # Panics
    /// If it does not, or leaves something behind.
    #[track_caller]
    pub fn refuses_to_listen(program: &str, args: &[&str], words: &[&str]) {
        let directory = TempDir::new();
        let socket = directory.join("device.sock");
        let socket = socket.to_str().expect("a path in UTF-8");
        DaemonProcess::refuses(program, &[&["--socket-path", socket], args].concat(), words);
        assert_eq!(directory.names(), Vec::<String>::new(), "{args:?}");
    }

    /// Starts a daemon on a socket, see [`Self::ready`].
    ///
    /// # Panics
    /// If it does not start or does not get ready.
    #[track_caller]
    pub fn listening(program: &str, socket: &Path, args: &[&str]) -> DaemonProcess {
        let mut command = announcing(Path::new(program));
        command.args(["--log-level", "warn", "--socket-path"]).arg(socket);
        DaemonProcess::ready(command.args(args))
    }

    /// Starts a daemon by an [`announcing`] command and waits until its sockets accept connections.
    ///
    /// # Panics
    /// If it does not start or does not get ready.
    #[track_caller]
    pub fn ready(command: &mut Command) -> DaemonProcess {
        let mut daemon = DaemonProcess::spawn(command);
        let deadline = Instant::now() + SOON;
        let mut word = daemon.0.stdout.take().expect("a pipe");
        if let Err(what) = await_ready(&mut word, || Instant::now() < deadline) {
            panic!("the daemon {what}");
        }
        // It closes the descriptor a moment after its word: who counts descriptors from here on counts the same for ever.
        let more = word.read(&mut [0; 1]).expect("a pipe");
        assert_eq!(more, 0, "the daemon says more than that it is ready");
        daemon
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.0.id()
    }

    /// The process.
    pub fn child(&mut self) -> &mut Child {
        &mut self.0
    }

    /// Whether it has not ended.
    ///
    /// # Panics
    /// If that cannot be told.
    pub fn is_running(&mut self) -> bool {
        self.0.try_wait().expect("our child").is_none()
    }

    /// Sends it a signal.
    ///
    /// # Panics
    /// If it is gone.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).expect("our child");
    }

    /// Ends it without a chance to clean up.
    ///
    /// # Panics
    /// If it cannot be waited for.
    pub fn kill(mut self) {
        self.0.kill().expect("our child");
        self.0.wait().expect("our child");
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// If that does not come.
    #[track_caller]
    pub fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.0.try_wait().expect("our child") {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end\n{}", threads(self.0.id()));
            std::thread::sleep(TICK);
        }
    }

    /// Asks it to end, and says how it did.
    #[track_caller]
    pub fn terminate(mut self) -> ExitStatus {
        self.signal(Signal::TERM);
        self.ended()
    }

    /// A file of the kernel about it: `/proc/PID/...`.
    pub fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.0.id()).into()
    }

    /// How many entries a directory of these has: `fd` or `task`.
    ///
    /// # Panics
    /// If it is gone.
    pub fn count(&self, directory: &str) -> usize {
        std::fs::read_dir(self.proc(directory)).expect("a running process").count()
    }

    /// How many files of this kind it has mapped, by a part of their names: `memfd`.
    ///
    /// # Panics
    /// If it is gone.
    pub fn mappings_of(&self, name: &str) -> usize {
        let maps = std::fs::read_to_string(self.proc("maps")).expect("a running process");
        maps.lines().filter(|line| line.contains(name)).count()
    }

    /// Waits until none of its threads wakes up, begins or ends for so long: a daemon with nothing to do has no wake-ups.
    /// What was under way when it is asked for may take its time, and one that polls never comes to rest. Threads of the
    /// kernel's own (`iou-...`) do not count.
    ///
    /// # Panics
    /// If it does not come to rest, or is gone.
    #[track_caller]
    pub fn rests(&self, time: Duration) {
        let deadline = Instant::now() + SOON;
        let mut before = self.sleeps();
        loop {
            std::thread::sleep(time);
            let now = self.sleeps();
            if now == before {
                return;
            }
            assert!(Instant::now() < deadline, "it wakes up again and again: {before:?}, then {now:?}");
            before = now;
        }
    }

    /// How often each of its threads has gone to sleep.
    fn sleeps(&self) -> BTreeMap<String, String> {
        let threads = std::fs::read_dir(self.proc("task")).expect("a running process");
        let counted = threads.filter_map(|thread| {
            let path = thread.ok()?.path();
            // A thread that ends meanwhile has no status.
            let status = std::fs::read_to_string(path.join("status")).ok()?;
            let line = |field: &str| status.lines().find(|line| line.starts_with(field)).map(str::to_owned);
            let (name, count) = (line("Name:")?, line("voluntary_ctxt_switches:")?);
            (!name.contains("iou-")).then(|| (path.display().to_string(), count))
        });
        counted.collect()
    }

    /// A number of its status by the beginning of its line: `VmRSS` in KiB, `Threads`.
    ///
    /// # Panics
    /// If it is gone, or there is no such number.
    pub fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).expect("a running process");
        let line = status.lines().find(|line| line.starts_with(field)).expect("such a line");
        line.split_whitespace().nth(1).and_then(|value| value.parse().ok()).expect("a number")
    }
}

impl Drop for DaemonProcess {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What each thread of a process is at, a line each: to tell why it hangs.
fn threads(process: u32) -> String {
    let tasks = std::fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten();
    let lines = tasks.map(|task| {
        let file = |name: &str| std::fs::read_to_string(task.path().join(name)).unwrap_or_default();
        let [name, stat, place, call] = ["comm", "stat", "wchan", "syscall"].map(file);
        // The state comes behind the name, which is in brackets.
        let state = stat.rsplit(") ").next().and_then(|rest| rest.chars().next()).unwrap_or('?');
        format!("{}: state {state}, in {place}, system call {}\n", name.trim(), call.trim())
    });
    lines.collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_killed_process_of_the_same_number_left_behind_is_in_nobodys_way() {
        let own = TempDir::new();
        let own = own.path().to_str().unwrap();
        let (name, number) = own.rsplit_once('-').unwrap();
        let left = (1..=32).map(|n| format!("{name}-{}", number.parse::<u32>().unwrap() + n));
        // Tests beside this one may have taken some.
        let left: Vec<_> = left.filter(|path| std::fs::create_dir(path).is_ok()).collect();
        let new = TempDir::new();
        assert!(!left.iter().any(|path| new.path() == Path::new(path)));
        left.iter().for_each(|path| std::fs::remove_dir(path).unwrap());
    }

    #[test]
    fn each_thread_of_a_process_that_hangs_is_told_of() {
        let told = threads(std::process::id());
        assert!(told.lines().count() > 1, "{told}");
        assert!(told.contains(": state R, in "), "{told}");
    }
}
