//! A guest that runs: wait for what its script tells, answer what it asks, command its QEMU.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::thread;
use std::time::{Duration, Instant};

use crate::failure::Failure;
use crate::guest::{self, Outcome, read_log};
use crate::interrupt;
use crate::process::{Owned, TICK};
use crate::qmp::Qmp;
use crate::scratch::Scratch;

/// A booted guest; dropping it ends it.
#[derive(Debug)]
pub struct Running {
    qemu: Owned,
    scratch: Scratch,
    started: Instant,
    limit: Duration,
    control: Option<UnixStream>,
    qmp: Option<Qmp>,
}

impl Running {
    pub(crate) fn new(qemu: Owned, scratch: Scratch, started: Instant, limit: Duration) -> Self {
        Self { qemu, scratch, started, limit, control: None, qmp: None }
    }

    /// What was on the guest's console so far.
    #[must_use]
    pub fn console(&self) -> String {
        read_log(&self.scratch.join("console"))
    }

    /// Changes how long it may run in all; what is over is over.
    pub fn limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// QEMU's process id.
    #[must_use]
    pub fn id(&self) -> u32 {
        self.qemu.id()
    }

    /// Waits until the script told `key` for the `nth` time (from 1), and gives the rest of that line.
    ///
    /// # Errors
    /// The guest ended or its time is over before; with its last lines.
    pub fn wait_told(&mut self, key: &str, nth: usize) -> Result<String, Failure> {
        loop {
            let console = self.console();
            // A line is complete once its end is there.
            let whole = &console[..console.rfind('\n').map_or(0, |end| end + 1)];
            if let Some(rest) = guest::told(whole, key).nth(nth.saturating_sub(1)) {
                return Ok(rest.to_owned());
            }
            if let Some(status) = self.qemu.try_wait().map_err(Failure::io("wait for QEMU"))? {
                return Err(self.failure(&format!("ended ({status}) before it told {key:?} for time {nth}")));
            }
            self.in_time(&format!("told {key:?} for time {nth}"))?;
            thread::sleep(TICK);
        }
    }

    /// Answers what the script asked: one line, without its end.
    ///
    /// # Errors
    /// The guest is gone.
    pub fn answer(&mut self, line: &str) -> Result<(), Failure> {
        if self.control.is_none() {
            let socket = UnixStream::connect(self.scratch.join("control"));
            self.control = Some(socket.map_err(Failure::io("connect to the guest's second serial port"))?);
        }
        let Some(control) = &mut self.control else { return Ok(()) };
        control.write_all(format!("{line}\n").as_bytes()).map_err(Failure::io("answer the guest"))
    }

    /// Runs a command of QEMU's monitor.
    ///
    /// # Errors
    /// QEMU refused or is gone.
    pub fn qmp(
        &mut self,
        command: &str,
        arguments: &serde_json::Value,
    ) -> Result<serde_json::Value, Failure> {
        if self.qmp.is_none() {
            self.qmp = Some(Qmp::connect(&self.scratch.join("qmp"))?);
        }
        let Some(qmp) = &mut self.qmp else { return Err(Failure::new("no monitor")) };
        qmp.execute(command, arguments)
    }

    /// Waits for the guest's end.
    ///
    /// # Errors
    /// It did not end in time, or without having run the script; with its last lines.
    pub fn wait(self) -> Result<Outcome, Failure> {
        self.wait_while(|| ())
    }

    /// Waits for the guest's end, and calls `tick` often meanwhile.
    ///
    /// # Errors
    /// As [`Running::wait`].
    pub fn wait_while(mut self, mut tick: impl FnMut()) -> Result<Outcome, Failure> {
        loop {
            tick();
            if let Some(status) = self.qemu.try_wait().map_err(Failure::io("wait for QEMU"))? {
                let console = self.console();
                return match guest::exit_code(&console) {
                    Some(code) => Ok(Outcome { code, console, time: self.started.elapsed() }),
                    None => Err(self.failure(&format!("ended ({status}) without having run its script"))),
                };
            }
            self.in_time("ended")?;
            thread::sleep(TICK);
        }
    }

    fn in_time(&mut self, what: &str) -> Result<(), Failure> {
        if let Some(signal) = interrupt::caught() {
            return Err(Failure::new(format!("stopped by signal {signal}")));
        }
        if self.started.elapsed() < self.limit {
            return Ok(());
        }
        Err(self.failure(&format!("has not {what} after {} s", self.limit.as_secs())))
    }

    fn failure(&self, what: &str) -> Failure {
        Failure::new(format!("the guest {what}"))
            .with_log("the guest's console", &self.console())
            .with_log("QEMU's own output", &read_log(&self.scratch.join("qemu.out")))
    }
}
