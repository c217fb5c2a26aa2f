//! The daemon as a process: the `echo` example, which cargo builds together with the tests.
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};

use super::SOON;

/// The example lies beside the test binaries.
pub fn program() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/echo");
    assert!(path.exists(), "no example at {path:?}: run `cargo build -p vhost-device --examples` first");
    path
}

/// A running daemon.
pub struct Process(pub Child);

impl Process {
    pub fn start(command: &mut Command) -> Process {
        Process(command.stdin(Stdio::null()).spawn().unwrap())
    }

    /// Started with these arguments and ready: its sockets accept connections.
    pub fn ready(args: &[&str]) -> Process {
        let (reader, writer) = std::io::pipe().unwrap();
        let mut command = Command::new(program());
        command.args(args).args(["--ready-fd", "9"]).stderr(Stdio::null());
        pass(&mut command, &[(writer.as_fd().as_raw_fd(), 9)]);
        let process = Process::start(&mut command);
        drop(writer);
        let mut line = String::new();
        BufReader::new(reader).read_line(&mut line).unwrap();
        assert_eq!(line, "READY=1\n");
        process
    }

    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.0), signal).unwrap();
    }

    /// Waits for its end.
    pub fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "the daemon does not end");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn proc(&self, file: &str) -> PathBuf {
        format!("/proc/{}/{file}", self.0.id()).into()
    }

    pub fn count(&self, directory: &str) -> usize {
        std::fs::read_dir(self.proc(directory)).unwrap().count()
    }

    pub fn mappings(&self) -> usize {
        std::fs::read_to_string(self.proc("maps"))
            .unwrap()
            .lines()
            .filter(|line| line.contains("memfd"))
            .count()
    }

    pub fn status(&self, field: &str) -> u64 {
        let status = std::fs::read_to_string(self.proc("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Gives descriptors to a child under fixed numbers.
pub fn pass(command: &mut Command, fds: &[(RawFd, RawFd)]) {
    let mut fds = fds.to_vec();
    // SAFETY: dup2 and fcntl are safe to call between fork and exec; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            // Out of the way first: a number that is to be given may be that of another one to give.
            for (from, _) in &mut fds {
                *from = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 100);
                if *from < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for (from, to) in &fds {
                let outcome =
                    if from == to { libc::fcntl(*from, libc::F_SETFD, 0) } else { libc::dup2(*from, *to) };
                if outcome < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}
