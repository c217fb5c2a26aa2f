//! The lab's QEMU: the system's when it is new enough, else one from a newer Debian, unpacked beside the system.
//!
//! The unpacked one runs through its own dynamic loader and libraries, so nothing of the machine is changed and
//! nothing of it is used. Either way `qemu/bin/qemu-system-x86_64` is what guests are started with.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use super::apt::{self, Apt};
use super::part::{self, Part};
use crate::command;
use crate::error::{Error, Result};
use crate::progress::Step;

/// Before it, devices that guest tests attach (SPI, RTC, the test device on x86) are missing.
const OLDEST: (u32, u32) = (11, 1);
const PROGRAM: &str = "qemu-system-x86_64";
/// Dependencies that only matter on a machine that boots from these packages.
pub(super) const UNNEEDED: &[&str] = &[
    "systemd*",
    "libsystemd-shared",
    "libc-gconv-modules-extra",
    "openssl-provider-legacy",
    "sysvinit-utils",
    "adduser",
    "passwd",
    "dpkg",
];

pub(super) fn part() -> Part {
    Part { name: "qemu", recipe: part::recipe(&["1", apt::SUITE, STARTER]), needs: 700 }
}

/// The system's QEMU, if it is there and new enough.
pub(super) fn of_system() -> Option<String> {
    let said = command::output(Command::new(PROGRAM).arg("--version")).ok()?;
    let version = version(&said)?;
    (version >= OLDEST).then(|| format!("{}.{} of this machine", version.0, version.1))
}

/// Puts a starter for the system's QEMU in place.
pub(super) fn link(out: &Path, version: &str) -> Result<String> {
    install(out, PROGRAM, &format!("#!/bin/sh\nexec {PROGRAM} \"$@\"\n"))?;
    Ok(format!("QEMU {version}"))
}

pub(super) fn make(apt: &Apt, out: &Path, work: &Path, step: &mut Step) -> Result<String> {
    let root = out.join("root");
    let packages = apt::without(apt.closure(&["qemu-system-x86"])?, UNNEEDED);
    apt.unpack(&packages, &work.join("debs"), &root, step)?;
    apt::merge_usr(&root)?;
    for junk in ["doc", "man", "locale", "info", "lintian", "bash-completion"] {
        let _ = fs::remove_dir_all(root.join("usr/share").join(junk));
    }
    install(out, PROGRAM, STARTER)?;
    let program = out.join("bin").join(PROGRAM);
    step.doing("trying it");
    borrowed(&root)?;
    let said = command::output(Command::new(&program).arg("--version"))?;
    let known = command::output(Command::new(&program).args(["-device", "help"]))?;
    for device in
        ["vhost-user-rng-pci", "vhost-user-spi-pci", "vhost-user-rtc-pci", "vhost-user-test-device-pci"]
    {
        if !known.contains(device) {
            return Err(Error::new(
                "the QEMU that was unpacked cannot be used",
                format!("it has no device {device}: {}", said.lines().next().unwrap_or_default()),
            ));
        }
    }
    let version = version(&said).map_or("of unknown version".to_owned(), |(a, b)| format!("{a}.{b}"));
    Ok(format!("QEMU {version} from Debian {}", apt::SUITE))
}

/// Starts the unpacked QEMU from wherever the folder is.
const STARTER: &str = r#"#!/bin/sh
# QEMU with the C library, modules and firmware that it came with.
here=$(dirname "$(dirname "$(readlink -f "$0")")")/root/usr
libraries=$here/lib/x86_64-linux-gnu
QEMU_MODULE_DIR=$libraries/qemu
export QEMU_MODULE_DIR
exec "$here/lib64/ld-linux-x86-64.so.2" --inhibit-cache --argv0 qemu-system-x86_64 \
  --library-path "$libraries:$libraries/qemu" "$here/bin/qemu-system-x86_64" \
  -L "$here/share/qemu" -L "$here/share/seabios" -L "$here/lib/ipxe/qemu" "$@"
"#;

/// Puts a script in place as that program of a part.
pub(super) fn install(out: &Path, program: &str, text: &str) -> Result<()> {
    let bin = out.join("bin");
    fs::create_dir_all(&bin).map_err(|e| Error::file("make", &bin, &e))?;
    let path = bin.join(program);
    fs::write(&path, text).map_err(|e| Error::file("write", &path, &e))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))
        .map_err(|e| Error::file("make runnable", &path, &e))
}

/// Makes sure that every library comes from the unpacked tree: one of the machine's would work here and fail there.
fn borrowed(root: &Path) -> Result<()> {
    let libraries = super::libraries::of(root, &root.join("usr/bin").join(PROGRAM), &[])?;
    match libraries.iter().find(|library| !library.starts_with(root)) {
        None => Ok(()),
        Some(other) => Err(Error::new(
            "the QEMU that was unpacked is not complete",
            format!("it would use {} of this machine", other.display()),
        )),
    }
}

/// From `QEMU emulator version 11.1.2 (Debian ...)`.
fn version(said: &str) -> Option<(u32, u32)> {
    let number = said.split("version ").nth(1)?.split([' ', '(', '\n']).next()?;
    let mut parts = number.split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_of_qemu() {
        assert_eq!(version("QEMU emulator version 11.1.2 (Debian 1:11.1.2+ds-3)\nCopyright"), Some((11, 1)));
        assert_eq!(version("QEMU emulator version 7.2.19\n"), Some((7, 2)));
        assert_eq!(version("something else"), None);
    }
}
