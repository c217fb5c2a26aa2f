//! `cargo xtask bench`: our speed beside that of others, in one run.

use std::process::Stdio;
use std::time::Duration;

use backplane_tests::process::Owned;

use crate::command;
use crate::error::{Error, Result};
use crate::workspace::{Workspace, cargo};

/// Runs one benchmark; whether it ended well.
pub(crate) fn run(name: &str, arguments: &[String]) -> Result<bool> {
    let workspace = Workspace::read()?;
    let mut bench = cargo();
    bench.current_dir(&workspace.root).args(["bench", "--package", "backplane-bench", "--bench", name]);
    if !arguments.is_empty() {
        bench.arg("--").args(arguments);
    }
    bench.stdin(Stdio::null());
    let failed = |e: std::io::Error| Error::new("cannot run `cargo bench`", e.to_string());
    let mut child = Owned::spawn(&mut bench).map_err(failed)?;
    loop {
        command::stop_if_interrupted()?;
        if let Some(status) = child.wait_for(Duration::from_millis(100)).map_err(failed)? {
            return Ok(status.success());
        }
    }
}
