//! The guest lab: QEMU, virtiofsd, a guest kernel and the guest's tools, kept outside the source tree.
//!
//! Everything here is made of Debian packages and of what lies in `xtask/lab`. One run at a time works on a lab (a
//! lock file sees to that); parts that are there and were made by the present recipe are left alone.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};
use std::process::Command;

use backplane_tests::lab;

use crate::command;
use crate::error::{Error, Result};
use crate::progress::{Step, clock, note};

mod apt;
mod initramfs;
mod kernel;
mod libraries;
mod mirror;
mod part;
mod qemu;
mod virtiofsd;

use part::{Building, Part};

/// How the lab is to be made.
#[derive(Debug, Default)]
pub(crate) struct Options {
    /// Do without the network.
    pub(crate) offline: bool,
    /// Use this mirror instead of the machine's.
    pub(crate) mirror: Option<String>,
    /// Make everything again.
    pub(crate) fresh: bool,
}

/// The lab's folder.
pub(crate) fn folder() -> Result<PathBuf> {
    let folder = lab::folder().ok_or_else(|| {
        Error::new("cannot tell where the guest lab belongs", "neither HOME nor XDG_CACHE_HOME is set")
            .fix(format!("name a folder: {}=FOLDER", lab::VARIABLE))
    })?;
    std::path::absolute(&folder).map_err(|e| Error::file("find", &folder, &e))
}

/// Makes what is missing, and gives the whole.
pub(crate) fn ensure(options: &Options) -> Result<lab::Lab> {
    let folder = folder()?;
    fs::create_dir_all(&folder).map_err(|e| Error::file("make", &folder, &e))?;
    let lock = lock(&folder)?;
    part::sweep(&folder)?;
    let mut missing = Vec::new();
    for part in [qemu::part(), virtiofsd::part(), initramfs::part(), kernel::part()] {
        match part.present(&folder) {
            Ok(stamp) if !options.fresh => note(&format!("{}: {}", part.name, stamp.line())),
            Ok(_) => missing.push((part, "wanted again".to_owned())),
            Err(why) => missing.push((part, why)),
        }
    }
    if !missing.is_empty() {
        make(&folder, &missing, options)?;
    }
    drop(lock);
    lab::Lab::at(&folder).map_err(|why| {
        Error::new(format!("the lab in {} is damaged", folder.display()), why).fix("cargo xtask lab --fresh")
    })
}

fn make(folder: &Path, missing: &[(Part, String)], options: &Options) -> Result<()> {
    let list: Vec<String> = missing.iter().map(|(part, why)| format!("{} ({why})", part.name)).collect();
    let system = qemu::of_system();
    // The system's QEMU only needs a starter; everything else comes over the network.
    let fetched = missing.iter().any(|(part, _)| part.name != "qemu" || system.is_none());
    let compiled = missing.iter().any(|(part, _)| ["initramfs", "kernel"].contains(&part.name));
    let tools = if compiled { missing_tools() } else { Vec::new() };
    if options.offline && fetched {
        let mut why = format!("without the network these cannot be made: {}", list.join(", "));
        if !tools.is_empty() {
            let names: Vec<&str> = tools.iter().map(|(name, _)| *name).collect();
            why += &format!("; and this machine lacks the packages {}", names.join(", "));
        }
        return Err(Error::new(format!("the lab in {} is not complete", folder.display()), why)
            .fix("run `cargo xtask lab` once with the network"));
    }
    note(&format!("lab: making {} in {}", list.join(", "), folder.display()));
    room(folder, missing.iter().map(|(part, _)| part.needs).sum())?;
    install(&tools)?;

    let private = Building::new(folder, "apt")?;
    let apt = if fetched {
        let mirror = options.mirror.clone().map_or_else(mirror::of_this_machine, Ok)?;
        note(&format!(
            "lab: packages of Debian {} come from {mirror}; nothing of them is installed",
            apt::SUITE
        ));
        let mut step = Step::start("packages", "setting up");
        let apt = apt::Apt::open(&private.0, &mirror, &mut step)?;
        step.done("package lists read");
        Some(apt)
    } else {
        None
    };
    for (part, _) in missing {
        let mut step = Step::start(part.name, "looking up packages");
        let stamp = part.make(folder, &mut step, |out, work, step| match (part.name, &system, &apt) {
            ("qemu", Some(version), _) => qemu::link(out, version),
            ("qemu", None, Some(apt)) => qemu::make(apt, out, work, step),
            ("virtiofsd", _, Some(apt)) => virtiofsd::make(apt, out, work, step),
            ("initramfs", _, Some(apt)) => initramfs::make(apt, out, work, step),
            ("kernel", _, Some(apt)) => kernel::make(apt, out, work, step),
            (other, ..) => {
                Err(Error::new("cannot make the lab", format!("nothing knows how to make {other}")))
            }
        })?;
        step.done(&stamp.line());
    }
    drop(private);
    Ok(())
}

/// Waits until no other run works on this lab.
fn lock(folder: &Path) -> Result<File> {
    let path = folder.join("lock");
    let file = File::options()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .map_err(|e| Error::file("open", &path, &e))?;
    let mut waiting: Option<Step> = None;
    loop {
        command::stop_if_interrupted()?;
        match file.try_lock() {
            Ok(()) => {
                if let Some(step) = waiting {
                    step.done("it has ended");
                }
                return Ok(file);
            }
            Err(TryLockError::WouldBlock) => {
                waiting
                    .get_or_insert_with(|| Step::start("lab", "waiting for another run that works on it"))
                    .tick();
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            Err(TryLockError::Error(e)) => return Err(Error::file("lock", &path, &e)),
        }
    }
}

/// Refuses to begin what the disk has no room for.
fn room(folder: &Path, needed: u64) -> Result<()> {
    let about =
        rustix::fs::statvfs(folder).map_err(|e| Error::file("look at the disk of", folder, &e.into()))?;
    let free = (about.f_bavail * about.f_frsize) >> 20;
    if free >= needed {
        return Ok(());
    }
    Err(Error::new(
        "not enough room for the guest lab",
        format!("making it needs {needed} MiB for a while, {} has {free} MiB free", folder.display()),
    )
    .fix(format!("make room, or put the lab on another disk: {}=FOLDER", lab::VARIABLE)))
}

/// Packages that are needed to compile and not installed, each with what it is for.
fn missing_tools() -> Vec<(&'static str, &'static str)> {
    let installed = |name: &str| {
        command::output(Command::new("dpkg-query").args(["--show", "--showformat=${Status}", name]))
            .is_ok_and(|status| status.ends_with(" installed"))
    };
    kernel::HOST_TOOLS.into_iter().filter(|(name, _)| !installed(name)).collect()
}

/// Installs packages of the machine's own Debian, after saying which and why.
fn install(tools: &[(&str, &str)]) -> Result<()> {
    if tools.is_empty() {
        return Ok(());
    }
    let names: Vec<&str> = tools.iter().map(|(name, _)| *name).collect();
    for (name, why) in tools {
        note(&format!("lab: this machine lacks {name}, which {why}"));
    }
    let by_hand = format!("apt-get install {}", names.join(" "));
    if !rustix::process::geteuid().is_root() {
        return Err(Error::new("cannot install what the lab needs", "that takes root").fix(by_hand));
    }
    let mut step = Step::start("machine", &format!("installing {}", names.join(", ")));
    let apt = |arguments: &[&str]| {
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C.UTF-8");
        command
    };
    command::quiet(&mut apt(&["update"]), &mut step)?;
    let mut install = apt(&["install", "--yes", "--no-install-recommends"]);
    install.args(&names);
    command::quiet(&mut install, &mut step)
        .map_err(|e| e.within("cannot install what the lab needs", &by_hand))?;
    let time = clock(step.elapsed());
    step.done(&format!("installed {} packages in {time}", names.len()));
    Ok(())
}
