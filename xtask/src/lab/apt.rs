//! An apt with a state of its own: looks up, verifies and fetches packages of another Debian suite while the
//! machine's package lists and installed packages stay as they are.
//!
//! It believes in an empty machine, so that a package's whole closure of dependencies is listed. What arrives is
//! verified by apt itself: the suite's signature against the Debian archive keyring, each file by its hash.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::command;
use crate::error::{Error, Result};
use crate::progress::{Step, Unit};

/// The suite whose QEMU, kernel source and tools the lab takes.
pub(crate) const SUITE: &str = "forky";
const CHECK_NETWORK: &str = "try again; if it stays so, check the network or name another mirror: cargo xtask lab --debian-mirror URL";
const ARCHITECTURE: &str = "amd64";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// A private apt, ready to look things up.
pub(crate) struct Apt {
    config: PathBuf,
}

/// One package that apt would fetch.
pub(crate) struct Package {
    pub(crate) name: String,
    pub(crate) size: u64,
}

impl Apt {
    /// Sets it up in `folder` and reads the suite's package lists from `mirror`.
    pub(crate) fn open(folder: &Path, mirror: &str, step: &mut Step) -> Result<Self> {
        if !command::found("apt-get") || !command::found("dpkg-deb") {
            return Err(Error::new("cannot fetch Debian packages", "this machine has no apt-get or no dpkg-deb")
                .fix("run this on Debian or Ubuntu, or copy a finished lab folder here and name it with BACKPLANE_LAB"));
        }
        if !Path::new(KEYRING).is_file() {
            return Err(Error::new("cannot verify Debian packages", format!("{KEYRING} is not there"))
                .fix("apt-get install debian-archive-keyring"));
        }
        for sub in [
            "etc/apt.conf.d",
            "etc/preferences.d",
            "etc/trusted.gpg.d",
            "state/lists/partial",
            "cache/archives/partial",
        ] {
            let path = folder.join(sub);
            fs::create_dir_all(&path).map_err(|e| Error::file("make", &path, &e))?;
        }
        let write = |name: &str, text: String| {
            let path = folder.join(name);
            fs::write(&path, text).map_err(|e| Error::file("write", &path, &e)).map(|()| path)
        };
        write("status", String::new())?;
        write(
            "etc/sources.list",
            format!("deb [arch={ARCHITECTURE} signed-by={KEYRING}] {mirror} {SUITE} main\n"),
        )?;
        let at = folder.display();
        // The system's own configuration is not read (its hooks and defaults are about its own packages), but how
        // it reaches the network is taken over. Log-ins for a mirror stay in apt's own files.
        let network = command::output(Command::new("apt-config").arg("dump").arg("Acquire"))?;
        let network: String =
            network.lines().filter(|l| reaches_network(l)).map(|l| format!("{l}\n")).collect();
        let config = write(
            "apt.conf",
            format!(
                "{network}Dir::Etc \"{at}/etc\";\nDir::Etc::Parts \"{at}/etc/apt.conf.d\";\n\
                 Dir::Etc::netrc \"/etc/apt/auth.conf\";\nDir::Etc::netrcparts \"/etc/apt/auth.conf.d\";\n\
                 Dir::State \"{at}/state\";\nDir::State::status \"{at}/status\";\nDir::Cache \"{at}/cache\";\n\
                 APT::Architecture \"{ARCHITECTURE}\";\nAPT::Architectures {{ \"{ARCHITECTURE}\"; }};\n\
                 APT::Install-Recommends \"0\";\nAPT::Sandbox::User \"root\";\nAcquire::Languages \"none\";\n\
                 Acquire::Retries \"3\";\nDebug::NoLocking \"1\";\n"
            ),
        )?;
        let apt = Self { config };
        step.doing(&format!("reading the package lists of Debian {SUITE}"));
        command::quiet(apt.get().args(["update", "--error-on=any"]), step).map_err(|e| {
            e.within(format!("cannot read the package lists of Debian {SUITE}"), CHECK_NETWORK)
        })?;
        Ok(apt)
    }

    /// Everything that installing `packages` on an empty machine would bring.
    pub(crate) fn closure(&self, packages: &[&str]) -> Result<Vec<Package>> {
        let listed = command::output(self.get().args(["install", "--yes", "--print-uris"]).args(packages))?;
        Ok(addresses(&listed))
    }

    /// The candidate version of a package.
    pub(crate) fn version(&self, package: &str) -> Result<String> {
        let shown = command::output(self.cache().args(["policy", package]))?;
        shown
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate:").map(|v| v.trim().to_owned()))
            .filter(|version| version != "(none)")
            .ok_or_else(|| {
                Error::new(format!("Debian {SUITE} has no package {package}"), "apt knows no candidate")
            })
    }

    /// The package of the newest kernel source, with its version numbers, at least `oldest`.
    pub(crate) fn newest_kernel_source(&self, oldest: (u32, u32)) -> Result<String> {
        let listed =
            command::output(self.cache().args(["search", "--names-only", r"^linux-source-[0-9]+\.[0-9]+$"]))?;
        let newest = listed.lines().filter_map(|line| {
            let name = line.split_whitespace().next()?;
            let (major, minor) = name.strip_prefix("linux-source-")?.split_once('.')?;
            Some(((major.parse().ok()?, minor.parse().ok()?), name.to_owned()))
        });
        match newest.max() {
            Some((version, name)) if version >= oldest => Ok(name),
            other => Err(Error::new(
                format!("Debian {SUITE} has no kernel source from {}.{} on", oldest.0, oldest.1),
                other.map_or("it lists none at all".to_owned(), |(_, name)| format!("the newest is {name}")),
            )),
        }
    }

    /// Fetches packages into `folder` and unpacks them into `root`; the archives are removed again.
    pub(crate) fn unpack(
        &self,
        packages: &[Package],
        folder: &Path,
        root: &Path,
        step: &mut Step,
    ) -> Result<()> {
        fs::create_dir_all(folder).map_err(|e| Error::file("make", folder, &e))?;
        let total: u64 = packages.iter().map(|p| p.size).sum();
        step.doing(&format!("fetching {} packages", packages.len()));
        step.total(total, Unit::Bytes);
        let mut get = self.get();
        get.arg("download").args(packages.iter().map(|p| &p.name)).current_dir(folder);
        command::run(&mut get, step, |_, _| (), |step| step.at(size_of(folder).min(total)))
            .map_err(|e| e.within(format!("cannot fetch packages of Debian {SUITE}"), CHECK_NETWORK))?;
        step.doing("unpacking");
        step.total(packages.len() as u64, Unit::About("packages"));
        let archives = fs::read_dir(folder).map_err(|e| Error::file("read", folder, &e))?;
        for archive in archives {
            let archive = archive.map_err(|e| Error::file("read", folder, &e))?.path();
            if archive.extension().is_some_and(|e| e == "deb") {
                command::quiet(Command::new("dpkg-deb").arg("--extract").arg(&archive).arg(root), step)?;
                step.at(step.position() + 1);
            }
        }
        fs::remove_dir_all(folder).map_err(|e| Error::file("remove", folder, &e))
    }

    /// The package of that name with its size, ready for [`Apt::unpack`].
    pub(crate) fn alone(&self, package: &str) -> Result<Vec<Package>> {
        Ok(addresses(&command::output(self.get().args(["download", "--print-uris", package]))?))
    }

    fn get(&self) -> Command {
        self.command("apt-get")
    }

    fn cache(&self) -> Command {
        self.command("apt-cache")
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command
            .env("APT_CONFIG", &self.config)
            .env("LC_ALL", "C.UTF-8")
            .env("DEBIAN_FRONTEND", "noninteractive");
        command
    }
}

/// Removes those packages whose name is one of `names`, or starts with one that ends in `*`.
pub(crate) fn without(packages: Vec<Package>, names: &[&str]) -> Vec<Package> {
    let unwanted = |package: &Package| {
        names.iter().any(|name| match name.strip_suffix('*') {
            Some(start) => package.name.starts_with(start),
            None => package.name == *name,
        })
    };
    packages.into_iter().filter(|package| !unwanted(package)).collect()
}

/// Gives an unpacked tree the links of a merged `/usr`.
pub(crate) fn merge_usr(root: &Path) -> Result<()> {
    for name in ["bin", "sbin", "lib", "lib64"] {
        let link = root.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(format!("usr/{name}"), &link)
                .map_err(|e| Error::file("make", &link, &e))?;
        }
    }
    Ok(())
}

/// Lines of `--print-uris`: `'ADDRESS' FILE SIZE HASH`, where FILE starts with the package's name.
fn addresses(listed: &str) -> Vec<Package> {
    let package = |line: &str| {
        let mut words = line.strip_prefix('\'')?.split_whitespace().skip(1);
        let (name, _) = words.next()?.split_once('_')?;
        Some(Package { name: name.to_owned(), size: words.next()?.parse().ok()? })
    };
    listed.lines().filter_map(package).collect()
}

/// Whether a line of `apt-config dump` tells how mirrors are reached and trusted to be fresh.
fn reaches_network(line: &str) -> bool {
    let scheme = [
        "Acquire::http",
        "Acquire::https",
        "Acquire::ftp",
        "Acquire::Proxy",
        "Acquire::Check-",
        "Acquire::Force",
    ];
    scheme.iter().any(|start| line.starts_with(start)) && !line.ends_with("\"\";")
}

/// Bytes in the files of a folder and the folders in it.
pub(crate) fn size_of(folder: &Path) -> u64 {
    let Ok(entries) = fs::read_dir(folder) else { return 0 };
    entries
        .flatten()
        .map(|entry| match entry.metadata() {
            Ok(about) if about.is_dir() => size_of(&entry.path()),
            Ok(about) => about.len(),
            Err(_) => 0,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn print_uris_lines() {
        let listed = "Reading package lists...\n\
                      'http://x.example/pool/libc6_2.43-7_amd64.deb' libc6_2.43-7_amd64.deb 1866392 SHA256:00\n\
                      'http://x.example/z.deb' zlib1g_1%3a1.3_amd64.deb 90912 SHA256:00\n";
        let packages = addresses(listed);
        assert_eq!(packages.len(), 2);
        assert_eq!((packages[1].name.as_str(), packages[1].size), ("zlib1g", 90912));
        let left = without(packages, &["lib*"]);
        assert_eq!(left.len(), 1);
    }
}
