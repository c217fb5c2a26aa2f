//! The guest kernel: Debian's newest source, built small, with every virtio driver and all test hardware inside.
//!
//! `xtask/lab/kernel.config` says what is in it; after configuring, every option of that file is checked, because
//! the kernel's build drops without a word what it does not know or whose conditions are not met. Two things are
//! added to the source, see `xtask/lab/board.c`, and one is changed, see [`INJECTED`]. Source and build folder (some
//! gigabytes) go away at the end.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Write;
use std::path::Path;
use std::process::Command;
use std::thread;

use super::apt::{self, Apt};
use super::part::{self, Part};
use crate::command;
use crate::error::{Error, Result};
use crate::progress::{Step, Unit, note};

const CONFIG: &str = include_str!("../../lab/kernel.config");
const EXCEPTIONS: &str = include_str!("../../lab/kernel.exceptions");
/// The folder `drivers/lab` of the kernel source.
const ADDED: [(&str, &str); 3] = [
    ("Makefile", include_str!("../../lab/Makefile")),
    ("board.c", include_str!("../../lab/board.c")),
    ("scmi.dtso", include_str!("../../lab/scmi.dtso")),
];
/// Where KVM enters a guest on AMD's processors, as it is and as it becomes: a guest that is given an interrupt leaves again before
/// its first instruction, by an interrupt that the host sends to itself.
///
/// QEMU's emulation of VMRUN delivers an injected interrupt, but keeps its vector as the exception that comes next (`helper_vmrun`,
/// the case of `SVM_EVTINJ_TYPE_INTR`). Whatever then makes QEMU leave its loop for a moment, as the end of a slice of `-icount`
/// does, delivers it again, and does not ask whether the guest takes interrupts. Linux, when this happens in the handler
/// of an edge-triggered interrupt, waits for itself for ever. An exit forgets the vector.
const INJECTED: [&str; 3] = [
    "arch/x86/kvm/svm/svm.c",
    "\tif (force_immediate_exit)\n\t\tsmp_send_reschedule(vcpu->cpu);\n",
    "\tif (force_immediate_exit || (svm->vmcb->control.event_inj & SVM_EVTINJ_VALID))\n\t\tsmp_send_reschedule(vcpu->cpu);\n",
];
/// CAN, SPI and RTC over virtio came with it.
const OLDEST: (u32, u32) = (7, 2);
/// Files that are compiled, roughly: only the progress bar wants to know.
const ABOUT_FILES: u64 = 1800;

/// What has to be installed on this machine to build a kernel, and what for.
pub(super) const HOST_TOOLS: [(&str, &str); 9] = [
    ("make", "runs the kernel's build"),
    ("gcc", "compiles the kernel and the small tools of the guest"),
    ("libc6-dev", "headers and static library for programs that the kernel's build runs"),
    ("binutils", "links the kernel and strips the guest's programs"),
    ("flex", "makes the parser of the kernel's configuration"),
    ("bison", "makes the parser of the kernel's configuration"),
    ("bc", "computes time constants during the kernel's build"),
    ("libelf-dev", "lets the kernel's build check its own object files"),
    ("xz-utils", "unpacks the kernel's source"),
];

pub(super) fn part() -> Part {
    let mut pieces = vec!["1", apt::SUITE, CONFIG];
    pieces.extend(ADDED.iter().flat_map(|(name, text)| [*name, *text]));
    pieces.extend(INJECTED);
    Part { name: "kernel", recipe: part::recipe(&pieces), needs: 4500 }
}

pub(super) fn make(apt: &Apt, out: &Path, work: &Path, step: &mut Step) -> Result<String> {
    let package = apt.newest_kernel_source(OLDEST)?;
    let version = apt.version(&package)?;
    note(&format!("kernel: Linux {version}, the newest source of Debian {}", apt::SUITE));
    apt.unpack(&apt.alone(&package)?, &work.join("debs"), work, step)?;
    step.doing("unpacking the source (about 1.7 GB)");
    let archive = work.join(format!("usr/src/{package}.tar.xz"));
    command::quiet(Command::new("tar").arg("-xf").arg(&archive).arg("-C").arg(work), step)?;
    fs::remove_file(&archive).map_err(|e| Error::file("remove", &archive, &e))?;
    let source = work.join(&package);
    add(&source)?;
    change(&source, INJECTED)?;

    let build = work.join("build");
    let fragment = work.join("fragment");
    fs::create_dir(&build).map_err(|e| Error::file("make", &build, &e))?;
    fs::write(&fragment, CONFIG).map_err(|e| Error::file("write", &fragment, &e))?;
    step.doing("configuring");
    let mut configure = make_in(&source, &build);
    configure.env("KCONFIG_ALLCONFIG", &fragment).args(["-s", "allnoconfig"]);
    command::quiet(&mut configure, step)?;
    check(&build.join(".config"))?;

    step.doing("compiling");
    step.total(ABOUT_FILES, Unit::About("files"));
    let jobs = thread::available_parallelism().map_or(2, usize::from);
    let mut compile = make_in(&source, &build);
    compile.arg(format!("-j{jobs}")).arg("bzImage");
    command::run(
        &mut compile,
        step,
        |step, line| {
            if line.trim_start().starts_with("CC ") {
                step.at(step.position() + 1);
            }
        },
        |_| (),
    )?;
    let copies = [("arch/x86/boot/bzImage", "bzImage"), (".config", "config")];
    for (from, to) in copies {
        fs::copy(build.join(from), out.join(to)).map_err(|e| Error::file("copy", &build.join(from), &e))?;
    }
    // The same kernel as an ELF file: some machine monitors start that one.
    let vmlinux = build.join("vmlinux");
    command::quiet(Command::new("strip").arg("-o").arg(out.join("vmlinux")).arg(&vmlinux), step)?;
    Ok(format!("Linux {version} from Debian {}", apt::SUITE))
}

/// The kernel's make, made to give the same bytes wherever it runs.
fn make_in(source: &Path, build: &Path) -> Command {
    let mut command = Command::new("make");
    command.arg("-C").arg(source).arg(format!("O={}", build.display()));
    command.env("KBUILD_BUILD_USER", "backplane").env("KBUILD_BUILD_HOST", "lab");
    command.env("KBUILD_BUILD_TIMESTAMP", "2026-01-01").env("LC_ALL", "C");
    // What a make that runs us has set for its own children means nothing here.
    command.env_remove("MAKEFLAGS").env_remove("MAKELEVEL");
    command
}

/// Puts our folder into the source.
fn add(source: &Path) -> Result<()> {
    let folder = source.join("drivers/lab");
    fs::create_dir(&folder).map_err(|e| Error::file("make", &folder, &e))?;
    for (name, text) in ADDED {
        let path = folder.join(name);
        fs::write(&path, text).map_err(|e| Error::file("write", &path, &e))?;
    }
    let list = source.join("drivers/Makefile");
    fs::OpenOptions::new()
        .append(true)
        .open(&list)
        .and_then(|mut file| file.write_all(b"\nobj-y += lab/\n"))
        .map_err(|e| Error::file("extend", &list, &e))
}

/// Replaces what stands once in a file of the source.
fn change(source: &Path, [name, from, to]: [&str; 3]) -> Result<()> {
    let path = source.join(name);
    let text = fs::read_to_string(&path).map_err(|e| Error::file("read", &path, &e))?;
    let found = text.matches(from).count();
    if found != 1 {
        let why = format!("{found} times in {name}: {from:?}");
        return Err(Error::new("the kernel source is not as xtask/src/lab/kernel.rs expects it", why)
            .fix("find what became of it, or whether QEMU needs it no longer"));
    }
    fs::write(&path, text.replacen(from, to, 1)).map_err(|e| Error::file("write", &path, &e))
}

/// Compares what the kernel's configuration became with what was asked for.
fn check(config: &Path) -> Result<()> {
    let got = fs::read_to_string(config).map_err(|e| Error::file("read", config, &e))?;
    let (got, wanted) = (options(&got), options(CONFIG));
    let refused: BTreeSet<&str> = wanted
        .iter()
        .filter(|(name, value)| got.get(*name).unwrap_or(&"n") != *value)
        .map(|(name, _)| *name)
        .collect();
    let known: BTreeSet<&str> = EXCEPTIONS
        .lines()
        .filter(|l| !l.starts_with('#'))
        .filter_map(|l| l.split_whitespace().next())
        .collect();
    let unexpected: Vec<&str> = refused.difference(&known).copied().collect();
    if unexpected.is_empty() {
        return Ok(());
    }
    Err(Error::new(
        "the kernel source does not grant all options of xtask/lab/kernel.config",
        format!("not as wanted: {}", unexpected.join(", ")),
    )
    .fix("find the option's new name or missing condition, or list it with its reason in xtask/lab/kernel.exceptions"))
}

/// Names and values of a configuration file; "is not set" is `n`.
fn options(text: &str) -> BTreeMap<&str, &str> {
    text.lines()
        .filter_map(|line| match line.strip_prefix("# ") {
            Some(remark) => Some((remark.strip_suffix(" is not set")?, "n")),
            None => line.split_once('='),
        })
        .filter(|(name, _)| name.starts_with("CONFIG_"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_of_a_configuration() {
        let found =
            options("# a remark\nCONFIG_A=y\n# CONFIG_B is not set\nCONFIG_C=\"x=y\"\n\nCONFIG_D=n\n");
        let wanted = [("CONFIG_A", "y"), ("CONFIG_B", "n"), ("CONFIG_C", "\"x=y\""), ("CONFIG_D", "n")];
        assert_eq!(found, BTreeMap::from(wanted));
    }

    #[test]
    fn no_option_is_asked_for_twice() {
        let lines = CONFIG
            .lines()
            .filter(|l| l.contains("CONFIG_") && (l.contains('=') || l.ends_with("is not set")));
        assert_eq!(lines.count(), options(CONFIG).len());
    }
}
