//! The guest's root: busybox, the usual tools for the kernel's devices from Debian, and a few files of our own.
//!
//! Only the programs that tests call are kept of each package, with the libraries that they load. The archive is
//! not compressed: under an emulated CPU unpacking would cost more than the host's copying.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use backplane_tests::cpio;

use super::apt::{self, Apt};
use super::libraries;
use super::part::{self, Part};
use crate::command;
use crate::error::{Error, Result};
use crate::progress::Step;

/// Packages and which of their programs the guest has.
const TOOLS: [(&str, &[&str]); 18] = [
    ("rng-tools-debian", &["rngtest"]),
    ("fio", &["fio"]),
    ("e2fsprogs", &["mkfs.ext4"]),
    ("util-linux", &["lsblk"]),
    ("socat", &["socat"]),
    ("iperf3", &["iperf3"]),
    ("i2c-tools", &["i2cdetect", "i2cdump", "i2cget", "i2cset", "i2ctransfer"]),
    ("gpiod", &["gpiodetect", "gpioget", "gpioinfo", "gpiomon", "gpioset"]),
    ("can-utils", &["candump", "cangen", "cansend"]),
    ("alsa-utils", &["alsactl", "amixer", "aplay"]),
    (
        "sg3-utils",
        &[
            "sg_dd",
            "sg_inq",
            "sg_luns",
            "sg_modes",
            "sg_opcodes",
            "sg_raw",
            "sg_readcap",
            "sg_turs",
            "sg_unmap",
            "sg_vpd",
        ],
    ),
    ("spi-tools", &["spi-config", "spi-pipe"]),
    ("evtest", &["evtest"]),
    ("libdrm-tests", &["modetest"]),
    ("linuxptp", &["phc_ctl"]),
    ("ethtool", &["ethtool"]),
    ("iputils-ping", &["ping"]),
    ("busybox-static", &["busybox"]),
];
/// Packages with so many libraries that they get an archive of their own, for the tests that want them.
const SEPARATE: [&str; 1] = ["fio"];
/// Second names of programs that look at the name they are called by.
const ALIASES: [(&str, &str); 1] = [("arecord", "aplay")];
/// Dependencies that only matter on a machine that boots from these packages.
const UNNEEDED: &[&str] = &[
    "systemd*",
    "libsystemd-shared",
    "udev",
    "kmod",
    "debconf*",
    "perl*",
    "libperl*",
    "openssl-provider-legacy",
    "openssl",
    "libc-gconv*",
    "passwd",
    "adduser",
    "login*",
    "logsave",
    "sysvinit-utils",
    "python3*",
    "libpython3*",
    "gnuplot*",
];
/// The usual folder of libraries.
const LIBRARY: &str = "usr/lib/x86_64-linux-gnu";
/// Folders with libraries beside the usual one.
const LIBRARIES: [&str; 3] =
    ["usr/lib/x86_64-linux-gnu/sg3-utils", "usr/lib/x86_64-linux-gnu/ceph", "usr/lib"];
const VSOCK: &str = include_str!("../../lab/vsock.c");
const INIT: &str = include_str!("../../lab/init");
const FUNCTIONS: &str = include_str!("../../lab/lab.sh");

pub(super) fn part() -> Part {
    let tools: Vec<String> =
        TOOLS.iter().map(|(package, programs)| format!("{package} {}", programs.join(" "))).collect();
    let mut pieces = vec!["2", apt::SUITE, VSOCK, INIT, FUNCTIONS];
    pieces.extend(tools.iter().map(String::as_str));
    Part { name: "initramfs", recipe: part::recipe(&pieces), needs: 500 }
}

pub(super) fn make(apt: &Apt, out: &Path, work: &Path, step: &mut Step) -> Result<String> {
    let packages: Vec<&str> = TOOLS.iter().map(|(package, _)| *package).collect();
    let debian = work.join("debian");
    let closure = apt::without(apt.closure(&packages)?, UNNEEDED);
    apt.unpack(&closure, &work.join("debs"), &debian, step)?;
    apt::merge_usr(&debian)?;

    step.doing("collecting programs and their libraries");
    let root = work.join("root");
    let programs = root.join("usr/bin");
    for folder in [
        "usr/bin",
        "usr/lib/x86_64-linux-gnu",
        "usr/lib64",
        "usr/share",
        "proc",
        "sys",
        "dev",
        "tmp",
        "run",
        "etc",
        "root",
        "var",
    ] {
        let path = root.join(folder);
        fs::create_dir_all(&path).map_err(|e| Error::file("make", &path, &e))?;
    }
    for (link, target) in [
        ("bin", "usr/bin"),
        ("sbin", "usr/bin"),
        ("usr/sbin", "bin"),
        ("lib", "usr/lib"),
        ("lib64", "usr/lib64"),
    ] {
        let path = root.join(link);
        symlink(target, &path).map_err(|e| Error::file("make", &path, &e))?;
    }
    copy(&libraries::loader(&debian), &root.join("usr/lib64"))?;
    let mut shared = BTreeSet::new();
    for (package, names) in TOOLS.iter().filter(|(package, _)| !SEPARATE.contains(package)) {
        collect(&debian, package, names, &root, &mut shared)?;
    }
    alsa(&debian, &root)?;
    names(&programs)?;

    step.doing("compiling the vsock tool");
    let source = work.join("vsock.c");
    fs::write(&source, VSOCK).map_err(|e| Error::file("write", &source, &e))?;
    let mut compile = Command::new("gcc");
    compile.args(["-O2", "-Wall", "-Werror", "-static", "-s", "-o"]).arg(programs.join("vsock")).arg(&source);
    command::quiet(&mut compile, step)?;
    for (name, mode, text) in [
        ("init", 0o755, INIT),
        ("lab.sh", 0o644, FUNCTIONS),
        ("etc/passwd", 0o644, "root:x:0:0:root:/root:/bin/sh\n"),
        ("etc/group", 0o644, "root:x:0:\n"),
    ] {
        let path = root.join(name);
        fs::write(&path, text).map_err(|e| Error::file("write", &path, &e))?;
        fs::set_permissions(&path, fs::Permissions::from_mode(mode))
            .map_err(|e| Error::file("change", &path, &e))?;
    }

    step.doing("packing");
    pack(&root, &out.join("initramfs.cpio"))?;
    for (package, names) in TOOLS.iter().filter(|(package, _)| SEPARATE.contains(package)) {
        let root = work.join(package);
        for folder in ["usr/bin", LIBRARY] {
            let path = root.join(folder);
            fs::create_dir_all(&path).map_err(|e| Error::file("make", &path, &e))?;
        }
        collect(&debian, package, names, &root, &mut shared.clone())?;
        pack(&root, &out.join(format!("{package}.cpio")))?;
    }
    Ok(format!(
        "{} programs from Debian {}",
        TOOLS.iter().map(|(_, names)| names.len()).sum::<usize>(),
        apt::SUITE
    ))
}

/// Copies a package's programs, and those of their libraries that are not in `shared` yet, into `root`.
fn collect(
    debian: &Path,
    package: &str,
    names: &[&str],
    root: &Path,
    shared: &mut BTreeSet<PathBuf>,
) -> Result<()> {
    for name in names {
        let program = find(debian, name).ok_or_else(|| {
            Error::new(
                format!("the package {package} of Debian {} has no program {name}", apt::SUITE),
                "it moved, or is gone",
            )
            .fix("look where it is now, and change the list in xtask/src/lab/initramfs.rs")
        })?;
        let real = fs::canonicalize(&program).map_err(|e| Error::file("find", &program, &e))?;
        let to = root.join("usr/bin").join(name);
        fs::copy(&real, &to).map_err(|e| Error::file("copy", &real, &e))?;
        if package == "busybox-static" {
            continue;
        }
        for library in libraries::of(debian, &program, &LIBRARIES)? {
            if !library.starts_with(debian) {
                return Err(Error::new(
                    format!("the guest's {name} is not complete"),
                    format!("it would use {} of this machine", library.display()),
                ));
            }
            if !shared.contains(&library) {
                copy(&library, &root.join(LIBRARY))?;
                shared.insert(library);
            }
        }
    }
    Ok(())
}

fn pack(root: &Path, archive: &Path) -> Result<()> {
    fs::File::create(archive)
        .and_then(|file| cpio::Archive::after(std::io::BufWriter::new(file), 0))
        .and_then(|mut cpio| cpio.tree(root).and_then(|()| cpio.finish()))
        .map(drop)
        .map_err(|e| Error::file("write", archive, &e))
}

/// A program in the folders where packages put programs.
fn find(debian: &Path, name: &str) -> Option<PathBuf> {
    ["usr/bin", "usr/sbin", "usr/libexec"]
        .iter()
        .map(|folder| debian.join(folder).join(name))
        .find(|path| path.is_file())
}

/// Copies what `file` (or the link of that name) holds into `folder`.
fn copy(file: &Path, folder: &Path) -> Result<()> {
    let Some(name) = file.file_name() else { return Ok(()) };
    fs::copy(file, folder.join(name)).map(|_| ()).map_err(|e| Error::file("copy", file, &e))
}

/// The library's own configuration, without the descriptions of real sound cards.
fn alsa(debian: &Path, root: &Path) -> Result<()> {
    let (from, to) = (debian.join("usr/share/alsa"), root.join("usr/share/alsa"));
    for folder in ["", "cards", "pcm", "ctl", "alsa.conf.d"] {
        let Ok(entries) = fs::read_dir(from.join(folder)) else { continue };
        let to = to.join(folder);
        fs::create_dir_all(&to).map_err(|e| Error::file("make", &to, &e))?;
        for entry in entries.flatten() {
            if entry.path().is_file() {
                copy(&entry.path(), &to)?;
            }
        }
    }
    Ok(())
}

/// Gives every busybox command its name, except where a real program has it.
fn names(programs: &Path) -> Result<()> {
    let listed = command::output(Command::new(programs.join("busybox")).arg("--list"))?;
    for (name, target) in listed.lines().map(|name| (name, "busybox")).chain(ALIASES) {
        let link = programs.join(name);
        if !link.exists() {
            symlink(target, &link).map_err(|e| Error::file("make", &link, &e))?;
        }
    }
    Ok(())
}
