//! The lab's virtiofsd, a vhost-user back-end of others that our proxy is tested with: unpacked beside the system, and run
//! through its own dynamic loader and libraries, as the lab's QEMU is.

use std::path::Path;
use std::process::Command;

use super::apt::{self, Apt};
use super::part::{self, Part};
use super::qemu;
use crate::command;
use crate::error::Result;
use crate::progress::Step;

const PROGRAM: &str = "virtiofsd";

pub(super) fn part() -> Part {
    Part { name: PROGRAM, recipe: part::recipe(&["1", apt::SUITE, STARTER]), needs: 100 }
}

pub(super) fn make(apt: &Apt, out: &Path, work: &Path, step: &mut Step) -> Result<String> {
    let root = out.join("root");
    let packages = apt::without(apt.closure(&[PROGRAM])?, qemu::UNNEEDED);
    apt.unpack(&packages, &work.join("debs"), &root, step)?;
    apt::merge_usr(&root)?;
    qemu::install(out, PROGRAM, STARTER)?;
    step.doing("trying it");
    let said = command::output(Command::new(out.join("bin").join(PROGRAM)).arg("--version"))?;
    Ok(format!("{} from Debian {}", said.trim(), apt::SUITE))
}

/// Starts it from wherever the folder is.
const STARTER: &str = r#"#!/bin/sh
# virtiofsd with the C library that it came with.
here=$(dirname "$(dirname "$(readlink -f "$0")")")/root/usr
exec "$here/lib64/ld-linux-x86-64.so.2" --inhibit-cache --argv0 virtiofsd \
  --library-path "$here/lib/x86_64-linux-gnu" "$here/libexec/virtiofsd" "$@"
"#;
