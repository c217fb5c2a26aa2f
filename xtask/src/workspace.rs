//! What cargo knows about this workspace, and building pieces of it.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::Deserialize;

use crate::command;
use crate::error::{Error, Result};
use crate::progress::Step;

/// What the names of our daemons begin with.
const DAEMON: &str = "vhost-device-";

/// The part of `cargo metadata` that is of interest.
#[derive(Debug, Deserialize)]
pub(crate) struct Workspace {
    #[serde(rename = "workspace_root")]
    pub(crate) root: PathBuf,
    #[serde(rename = "target_directory")]
    target: PathBuf,
    packages: Vec<Package>,
}

#[derive(Debug, Deserialize)]
struct Package {
    targets: Vec<Target>,
}

#[derive(Debug, Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// The cargo that runs us, else the one on the search path.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    without_cargos_settings(&mut command);
    command
}

/// What cargo set for this program is not meant for those that we build.
pub(crate) fn without_cargos_settings(command: &mut Command) {
    for (name, _) in std::env::vars_os() {
        let shown = name.to_string_lossy();
        if shown.starts_with("CARGO_PKG_") || shown.starts_with("CARGO_MANIFEST_") {
            command.env_remove(&name);
        }
    }
}

impl Workspace {
    /// Asks cargo.
    pub(crate) fn read() -> Result<Self> {
        let mut ask = cargo();
        ask.args(["metadata", "--format-version", "1", "--no-deps"]);
        if let Some(own) = std::env::var_os("CARGO_MANIFEST_DIR") {
            ask.current_dir(own);
        }
        serde_json::from_str(&command::output(&mut ask)?)
            .map_err(|e| Error::new("cannot read what `cargo metadata` says", e.to_string()))
    }

    /// The names of all daemons.
    pub(crate) fn daemons(&self) -> Vec<String> {
        let programs = self.packages.iter().flat_map(|package| &package.targets);
        let programs = programs.filter(|target| target.kind.iter().any(|kind| kind == "bin"));
        programs.map(|target| target.name.clone()).filter(|name| name.starts_with(DAEMON)).collect()
    }

    /// Where builds end up.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Where release builds of programs end up.
    pub(crate) fn release(&self) -> PathBuf {
        self.target.join("release")
    }

    /// Builds programs for release, and gives the folder they are in.
    pub(crate) fn build(&self, programs: &[String]) -> Result<PathBuf> {
        let mut build = cargo();
        build.current_dir(&self.root).args(["build", "--release"]);
        for name in programs {
            build.args(["--bin", name]);
        }
        let mut step = Step::start("programs", &format!("building {}", programs.join(", ")));
        command::run(
            &mut build,
            &mut step,
            |step, line| {
                if let Some(what) = line.trim_start().strip_prefix("Compiling ") {
                    step.detail(what);
                }
            },
            |_| (),
        )?;
        step.done(&format!("built {}", programs.join(", ")));
        Ok(self.release())
    }

    /// A path in the source tree.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.root.join(Path::new(name))
    }
}
