//! Child processes that cannot outlive their owner.
//!
//! A child leads a process group of its own, so that it can be ended with everything it started, and the kernel
//! kills it if the thread that started it ends first.

use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group, set_parent_process_death_signal};

/// How long a process that was asked to end may take before it is killed.
const GRACE: Duration = Duration::from_secs(20);
/// How often a waiting loop looks.
pub const TICK: Duration = Duration::from_millis(10);

/// A running child, killed with its whole group when dropped.
#[derive(Debug)]
pub struct Owned {
    child: Child,
    ended: Option<ExitStatus>,
}

impl Owned {
    /// Starts `command` as the leader of a new process group.
    ///
    /// # Errors
    /// What starting a program reports.
    pub fn spawn(command: &mut Command) -> io::Result<Self> {
        command.process_group(0);
        // SAFETY: between fork and exec only one system call is made, which is async-signal-safe and allocates
        // nothing.
        unsafe {
            command.pre_exec(|| set_parent_process_death_signal(Some(Signal::KILL)).map_err(io::Error::from));
        }
        Ok(Self { child: command.spawn()?, ended: None })
    }

    /// The child itself, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, or nothing while it runs.
    ///
    /// # Errors
    /// What waiting reports.
    pub fn try_wait(&mut self) -> io::Result<Option<ExitStatus>> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait()?;
        }
        Ok(self.ended)
    }

    /// Waits until it has ended, at most `limit`; nothing if it still runs then.
    ///
    /// # Errors
    /// What waiting reports.
    pub fn wait_for(&mut self, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let end = Instant::now() + limit;
        loop {
            if let Some(status) = self.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= end {
                return Ok(None);
            }
            thread::sleep(TICK);
        }
    }

    /// Sends `signal` to the whole group; nothing happens once the child was waited for.
    pub fn signal(&self, signal: Signal) {
        if self.ended.is_none()
            && let Some(pid) = Pid::from_raw(self.child.id().cast_signed())
        {
            let _ = kill_process_group(pid, signal);
        }
    }

    /// Asks it to end (SIGTERM), kills it if it does not within three seconds, and says how it ended.
    ///
    /// # Errors
    /// What waiting reports.
    pub fn stop(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::TERM);
        if let Some(status) = self.wait_for(GRACE)? {
            return Ok(status);
        }
        self.kill()
    }

    /// Kills it at once and waits for it.
    ///
    /// # Errors
    /// What waiting reports.
    pub fn kill(&mut self) -> io::Result<ExitStatus> {
        if let Some(status) = self.try_wait()? {
            return Ok(status);
        }
        self.signal(Signal::KILL);
        let status = self.child.wait()?;
        self.ended = Some(status);
        Ok(status)
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.kill();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_owner_leaves_no_process() {
        let owned = Owned::spawn(Command::new("sleep").arg("1000")).expect("sleep");
        let path = format!("/proc/{}", owned.id());
        assert!(std::fs::exists(&path).expect("proc"));
        drop(owned);
        assert!(!std::fs::exists(&path).expect("proc"));
    }
}
