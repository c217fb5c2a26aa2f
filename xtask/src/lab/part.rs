//! A part of the lab (QEMU, kernel, initramfs): made in a folder beside its place, moved there in one step when
//! complete.
//!
//! What is at a part's place is therefore always whole. Its stamp names the recipe that made it, so that a changed
//! recipe makes that part, and only that one, again.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use crate::command;
use crate::error::{Error, Result};
use crate::progress::Step;

const STAMP: &str = "stamp.json";

/// What a finished part says about itself.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Stamp {
    /// Hash of everything that decided how it was made.
    recipe: String,
    /// What it is, for people: name and version.
    pub(crate) what: String,
    /// Size in bytes.
    size: u64,
}

/// One part of the lab.
pub(crate) struct Part {
    pub(crate) name: &'static str,
    pub(crate) recipe: String,
    /// Free disk space in MiB that making it needs.
    pub(crate) needs: u64,
}

impl Part {
    /// The finished part's stamp, or why it has to be made.
    pub(crate) fn present(&self, lab: &Path) -> Result<Stamp, String> {
        let place = lab.join(self.name);
        if !place.is_dir() {
            return Err("not there".to_owned());
        }
        let text = fs::read_to_string(place.join(STAMP)).map_err(|_| "there without its stamp".to_owned())?;
        let stamp: Stamp = serde_json::from_str(&text).map_err(|_| "its stamp cannot be read".to_owned())?;
        if stamp.recipe == self.recipe { Ok(stamp) } else { Err("made by another recipe".to_owned()) }
    }

    /// Makes the part: `make` fills the first folder it is given (the second is for intermediate files) and says
    /// what came out.
    pub(crate) fn make(
        &self,
        lab: &Path,
        step: &mut Step,
        make: impl FnOnce(&Path, &Path, &mut Step) -> Result<String>,
    ) -> Result<Stamp> {
        let building = Building::new(lab, self.name)?;
        let (out, work) = (building.0.join("out"), building.0.join("work"));
        for folder in [&out, &work] {
            fs::create_dir(folder).map_err(|e| Error::file("make", folder, &e))?;
        }
        let what = make(&out, &work, step)?;
        let stamp = Stamp { recipe: self.recipe.clone(), what, size: super::apt::size_of(&out) };
        let path = out.join(STAMP);
        let text = serde_json::to_string_pretty(&stamp)
            .map_err(|e| Error::new("cannot write the stamp", e.to_string()))?;
        fs::write(&path, text + "\n").map_err(|e| Error::file("write", &path, &e))?;
        step.doing("putting it in place");
        // All of it is on the disk before its name appears.
        command::quiet(Command::new("sync").arg("--file-system").arg(&out), step)?;
        let place = lab.join(self.name);
        let old = building.0.join("old");
        if place.exists() {
            fs::rename(&place, &old).map_err(|e| Error::file("move away", &place, &e))?;
        }
        fs::rename(&out, &place).map_err(|e| Error::file("move into place", &place, &e))?;
        fs::File::open(lab).and_then(|f| f.sync_all()).map_err(|e| Error::file("sync", lab, &e))?;
        drop(building);
        Ok(stamp)
    }
}

impl Stamp {
    /// One line about the part.
    pub(crate) fn line(&self) -> String {
        format!("{}, {:.1} MB", self.what, self.size as f64 / 1e6)
    }
}

/// A folder in which something comes to be; removed whatever happens.
pub(crate) struct Building(pub(crate) PathBuf);

impl Building {
    pub(crate) fn new(lab: &Path, name: &str) -> Result<Self> {
        let path = lab.join(format!("{BUILDING}{name}"));
        remove(&path)?;
        fs::create_dir(&path).map_err(|e| Error::file("make", &path, &e))?;
        Ok(Self(path))
    }
}

impl Drop for Building {
    fn drop(&mut self) {
        let _ = remove(&self.0);
    }
}

/// What the names of unfinished folders begin with.
const BUILDING: &str = ".building-";

/// Removes what a killed run left behind.
pub(crate) fn sweep(lab: &Path) -> Result<()> {
    let entries = fs::read_dir(lab).map_err(|e| Error::file("read", lab, &e))?;
    for entry in entries.flatten() {
        if entry.file_name().to_string_lossy().starts_with(BUILDING) {
            remove(&entry.path())?;
        }
    }
    Ok(())
}

fn remove(path: &Path) -> Result<()> {
    match fs::remove_dir_all(path) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::file("remove", path, &e)),
        _ => Ok(()),
    }
}

/// A hash of a recipe's pieces (FNV-1a): tells recipes apart, protects against nothing.
pub(crate) fn recipe(pieces: &[&str]) -> String {
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for piece in pieces {
        // A byte that no text holds keeps ("ab", "c") and ("a", "bc") apart.
        for byte in piece.bytes().chain([0xff]) {
            hash = (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }
    format!("{hash:016x}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recipe_depends_on_every_piece() {
        assert_ne!(recipe(&["ab", "c"]), recipe(&["a", "bc"]));
        assert_ne!(recipe(&["1"]), recipe(&["2"]));
        assert_eq!(recipe(&["x", "y"]), recipe(&["x", "y"]));
    }

    #[test]
    fn a_failed_making_leaves_what_was_there() {
        let lab = std::env::temp_dir().join(format!("xtask-part-{}", std::process::id()));
        fs::create_dir(&lab).expect("temporary folder");
        let part = Part { name: "p", recipe: recipe(&["1"]), needs: 0 };
        let mut step = Step::start("p", "testing");
        let good = part.make(&lab, &mut step, |out, _, _| {
            fs::write(out.join("f"), "1").map_err(|e| Error::file("write", out, &e))?;
            Ok("good".to_owned())
        });
        assert_eq!(good.expect("made").what, "good");
        let newer = Part { recipe: recipe(&["2"]), ..part };
        assert_eq!(newer.present(&lab).expect_err("changed"), "made by another recipe");
        let bad = newer.make(&lab, &mut step, |_, _, _| Err(Error::new("download", "broken")));
        assert!(bad.is_err());
        let names: Vec<_> = fs::read_dir(&lab).expect("lab").flatten().map(|e| e.file_name()).collect();
        assert_eq!(names, ["p"], "no half part stays");
        assert!(Part { recipe: recipe(&["1"]), ..newer }.present(&lab).is_ok());
        fs::remove_dir_all(&lab).expect("temporary folder");
    }
}
