//! The one error of these commands: what failed, why, and what to do about it.

use std::fmt;
use std::io;
use std::path::Path;

use backplane_tests::interrupt;

/// Shown to a person: every part is a sentence or the piece of one.
#[derive(Debug)]
pub(crate) struct Error {
    what: String,
    why: String,
    fix: Option<String>,
}

pub(crate) type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    pub(crate) fn new(what: impl Into<String>, why: impl Into<String>) -> Self {
        Self { what: what.into(), why: why.into(), fix: None }
    }

    /// What the reader can do about it.
    pub(crate) fn fix(mut self, fix: impl Into<String>) -> Self {
        self.fix = Some(fix.into());
        self
    }

    /// The same trouble, told as part of something larger; `fix` is for what has no advice of its own.
    pub(crate) fn within(self, what: impl Into<String>, fix: &str) -> Self {
        if interrupt::caught().is_some() {
            return self;
        }
        let why = self.reason();
        Self { what: what.into(), why, fix: self.fix.or_else(|| Some(fix.to_owned())) }
    }

    /// The error of doing something with a file; a full disk and missing rights come with their advice.
    pub(crate) fn file(doing: &str, path: &Path, error: &io::Error) -> Self {
        let plain = Self::new(format!("cannot {doing} {}", path.display()), error.to_string());
        match error.kind() {
            io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                plain.fix("make room on that disk, or put the lab on another one with BACKPLANE_LAB=FOLDER")
            }
            io::ErrorKind::PermissionDenied => {
                plain.fix("use a folder that this user may write to, for the lab with BACKPLANE_LAB=FOLDER")
            }
            _ => plain,
        }
    }

    /// The first line: what and why.
    pub(crate) fn reason(&self) -> String {
        format!("{}: {}", self.what, self.why)
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.what, self.why)?;
        match &self.fix {
            Some(fix) => write!(f, "\n  what to do: {fix}"),
            None => Ok(()),
        }
    }
}
