//! Programs of the host for the guest: a cpio archive with a program, its libraries and its loader, all under `/opt`.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::cpio::Archive;
use crate::failure::Failure;
use crate::scratch::Scratch;

/// Where the loader is in the guest.
const LOADER: &str = "/opt/lib/loader";

/// An archive for [`Guest::archive`](crate::guest::Guest::archive); gone with this.
#[derive(Debug)]
pub struct Bundle {
    scratch: Scratch,
}

impl Bundle {
    /// Of these programs and what they need.
    ///
    /// # Errors
    /// A program, or a library of it, cannot be read.
    pub fn new(programs: &[&Path]) -> Result<Self, Failure> {
        let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
        let bundle = Self { scratch };
        let path = bundle.path();
        let shown = path.display().to_string();
        let failed = || Failure::io(format!("write {shown}"));
        let file = File::create(&path).map_err(failed())?;
        let mut archive = Archive::after(BufWriter::new(file), 0).map_err(failed())?;
        for folder in ["opt", "opt/bin", "opt/lib"] {
            archive.directory(folder, 0o755).map_err(failed())?;
        }
        let mut libraries: Vec<(String, PathBuf)> = Vec::new();
        for program in programs {
            let name = format!("opt/bin/{}", name(program));
            let data = fs::read(program).map_err(Failure::io(format_args!("read {}", program.display())))?;
            archive.file(&name, 0o755, &data).map_err(failed())?;
            libraries.extend(needs(program)?);
        }
        libraries.sort();
        libraries.dedup();
        for (name, from) in libraries {
            let data = fs::read(&from).map_err(Failure::io(format_args!("read {}", from.display())))?;
            archive.file(&format!("opt/lib/{name}"), 0o755, &data).map_err(failed())?;
        }
        archive.finish().map_err(failed())?;
        Ok(bundle)
    }

    /// The archive.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.scratch.join("bundle")
    }

    /// How the guest's shell starts one of the programs.
    #[must_use]
    pub fn command(program: &Path) -> String {
        format!("{LOADER} --library-path /opt/lib /opt/bin/{}", name(program))
    }
}

fn name(program: &Path) -> String {
    program.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// Libraries by the names under which the loader looks for them, and the loader.
fn needs(program: &Path) -> Result<Vec<(String, PathBuf)>, Failure> {
    let output = Command::new("ldd").arg(program).output().map_err(Failure::io("run ldd"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let mut found = Vec::new();
    for line in text.lines() {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            [name, "=>", path, ..] if path.starts_with('/') => found.push(((*name).to_owned(), path.into())),
            [path, ..] if path.starts_with('/') => found.push(("loader".to_owned(), path.into())),
            _ => {}
        }
    }
    if found.iter().any(|(name, _)| name == "loader") {
        return Ok(found);
    }
    Err(Failure::new(format!("ldd tells nothing of {}: {text}", program.display())))
}
