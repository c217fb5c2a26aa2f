//! Commands to a running QEMU (its monitor protocol, QMP): plug and unplug, pause, reset.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use crate::failure::Failure;

/// A connection to one QEMU's monitor.
#[derive(Debug)]
pub struct Qmp {
    to: UnixStream,
    from: BufReader<UnixStream>,
}

impl Qmp {
    /// Connects and says hello.
    pub(crate) fn connect(socket: &Path) -> Result<Self, Failure> {
        let to = UnixStream::connect(socket).map_err(Failure::io("connect to QEMU's monitor"))?;
        to.set_read_timeout(Some(Duration::from_secs(60))).map_err(Failure::io("set a time limit"))?;
        let from = BufReader::new(to.try_clone().map_err(Failure::io("copy a descriptor"))?);
        let mut qmp = Self { to, from };
        qmp.read()?; // the greeting
        qmp.execute("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    /// Runs one command and gives what it returned.
    ///
    /// # Errors
    /// QEMU refused, ended, or did not answer within sixty seconds.
    pub fn execute(&mut self, command: &str, arguments: &Value) -> Result<Value, Failure> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.to.write_all(line.as_bytes()).map_err(Failure::io("write to QEMU's monitor"))?;
        loop {
            let mut answer = self.read()?;
            if let Some(error) = answer.get("error") {
                return Err(Failure::new(format!("QEMU refused {command} {arguments}: {error}")));
            }
            // Anything else is an event, which nobody here waits for.
            if let Some(value) = answer.get_mut("return") {
                return Ok(value.take());
            }
        }
    }

    fn read(&mut self) -> Result<Value, Failure> {
        let mut line = String::new();
        match self.from.read_line(&mut line).map_err(Failure::io("read from QEMU's monitor"))? {
            0 => Err(Failure::new("QEMU closed its monitor")),
            _ => serde_json::from_str(&line)
                .map_err(|e| Failure::new(format!("QEMU's monitor said {line:?}: {e}"))),
        }
    }
}
