//! Programs of others to measure beside ours: from the package registry, at a fixed version, in a folder outside the
//! source tree. They are measured, never linked.
use std::fs;
use std::path::PathBuf;

use crate::command;
use crate::error::{Error, Result};
use crate::lab;
use crate::progress::Step;
use crate::workspace::cargo;

/// A program of a crate.
pub(crate) struct Peer {
    /// Of the crate and of its program.
    pub(crate) name: &'static str,
    pub(crate) version: &'static str,
}

impl Peer {
    /// Where it is. Gets it first if it is not there.
    ///
    /// # Errors
    /// It cannot be had: without a network, for example. The benchmark goes on without it.
    pub(crate) fn get(&self) -> Result<PathBuf> {
        let Peer { name, version } = self;
        let lab = lab::folder()?;
        let cache = lab.parent().unwrap_or(&lab).join("peers");
        let root = cache.join(format!("{name}-{version}"));
        let program = root.join("bin").join(name);
        if program.is_file() {
            return Ok(program);
        }
        fs::create_dir_all(&root).map_err(|e| Error::file("make", &root, &e))?;
        let mut step = Step::start("peer", &format!("getting {name} {version} from the package registry"));
        let mut install = cargo();
        // Outside of our tree our settings do not hold for it.
        install.current_dir(&root).args(["install", name, "--locked", "--version"]);
        install.arg(format!("={version}")).arg("--root").arg(&root);
        command::quiet(&mut install, &mut step)?;
        step.done(&format!("got {name} {version}, in {}", root.display()));
        Ok(program)
    }
}
