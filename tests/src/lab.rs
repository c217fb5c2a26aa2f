//! Where the lab is: QEMU, a guest kernel and an initramfs, made by `cargo xtask lab`.

use std::env;
use std::path::{Path, PathBuf};

use crate::skip;

/// Names the lab's folder, for `cargo xtask lab` and for tests.
pub const VARIABLE: &str = "BACKPLANE_LAB";

/// The pieces of a finished lab.
#[derive(Debug, Clone)]
pub struct Lab {
    /// Starts the lab's QEMU.
    pub qemu: PathBuf,
    /// The guest kernel (`bzImage`).
    pub kernel: PathBuf,
    /// The same kernel as an ELF file, for machine monitors that start that one.
    pub vmlinux: PathBuf,
    /// The guest's tools, as an uncompressed cpio archive.
    pub initramfs: PathBuf,
    /// virtiofsd 1, a back-end of others.
    pub virtiofsd: PathBuf,
    /// `fio` with its many libraries, as a further archive for [`Guest::archive`](crate::guest::Guest::archive).
    pub fio: PathBuf,
}

impl Lab {
    /// The lab in `folder`.
    ///
    /// # Errors
    /// Names the pieces that are missing.
    pub fn at(folder: &Path) -> Result<Self, String> {
        let lab = Self {
            qemu: folder.join("qemu/bin/qemu-system-x86_64"),
            kernel: folder.join("kernel/bzImage"),
            vmlinux: folder.join("kernel/vmlinux"),
            initramfs: folder.join("initramfs/initramfs.cpio"),
            virtiofsd: folder.join("virtiofsd/bin/virtiofsd"),
            fio: folder.join("initramfs/fio.cpio"),
        };
        let pieces = [&lab.qemu, &lab.kernel, &lab.vmlinux, &lab.initramfs, &lab.virtiofsd, &lab.fio];
        let missing: Vec<_> = pieces
            .into_iter()
            .filter(|path| !path.is_file())
            .map(|path| path.display().to_string())
            .collect();
        if missing.is_empty() { Ok(lab) } else { Err(format!("missing: {}", missing.join(", "))) }
    }
}

/// The folder named by [`VARIABLE`], else `backplane/lab` in the user's cache folder; nothing without a home.
#[must_use]
pub fn folder() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    if let Some(folder) = set(VARIABLE) {
        return Some(folder);
    }
    let cache = set("XDG_CACHE_HOME").or_else(|| set("HOME").map(|home| home.join(".cache")))?;
    Some(cache.join("backplane/lab"))
}

/// The lab for the test of that name, or nothing after telling why the test is skipped.
///
/// Guest tests only run where [`VARIABLE`] is set, which `cargo xtask test` does: they also need daemons that were
/// just built, and plain `cargo test` needs nothing but Rust.
#[must_use]
pub fn require(test: &str) -> Option<Lab> {
    let reason = match env::var_os(VARIABLE) {
        Some(folder) => match Lab::at(Path::new(&folder)) {
            Ok(lab) => return Some(lab),
            Err(reason) => format!("the lab is not complete, {reason}"),
        },
        None => "needs the guest lab; `cargo xtask test` makes it and runs this".to_owned(),
    };
    skip::tell(test, &reason);
    None
}
