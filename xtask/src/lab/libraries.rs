//! Which shared libraries a program of an unpacked Debian tree loads, as that tree's own dynamic loader says.

use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command;
use crate::error::Result;

/// The tree's dynamic loader.
pub(super) fn loader(root: &Path) -> PathBuf {
    root.join("usr/lib64/ld-linux-x86-64.so.2")
}

/// The libraries of `program`; `more` are folders of the tree that are searched besides the usual one.
///
/// A static program has none.
pub(super) fn of(root: &Path, program: &Path, more: &[&str]) -> Result<Vec<PathBuf>> {
    let mut search = root.join("usr/lib/x86_64-linux-gnu").display().to_string();
    for folder in more {
        search.push(':');
        search.push_str(&root.join(folder).display().to_string());
    }
    let mut list = Command::new(loader(root));
    list.args(["--inhibit-cache", "--list", "--library-path", &search]).arg(program);
    match command::output(&mut list) {
        Ok(said) => Ok(said.lines().filter_map(resolved).collect()),
        // The loader refuses static programs in these words.
        Err(e)
            if e.reason().contains("not a dynamic executable")
                || e.reason().contains("no dynamic section") =>
        {
            Ok(Vec::new())
        }
        Err(e) => Err(e),
    }
}

/// From `  libz.so.1 => /path/libz.so.1 (0x...)`; lines without an arrow are the loader and the vDSO.
fn resolved(line: &str) -> Option<PathBuf> {
    let (_, target) = line.split_once(" => ")?;
    Some(PathBuf::from(target.split(" (").next()?))
}
