//! Why a guest, a daemon or a conversation with one did not go as wanted; with what was last seen of it.

use std::fmt;
use std::io;

/// A reason for people, of one or more lines.
#[derive(Clone)]
pub struct Failure(String);

impl Failure {
    /// A failure with its reason.
    pub fn new(reason: impl Into<String>) -> Self {
        Self(reason.into())
    }

    /// Adds the last lines of a log.
    #[must_use]
    pub fn with_log(mut self, name: &str, log: &str) -> Self {
        const SHOWN: usize = 40;
        let lines: Vec<&str> = log.lines().collect();
        self.0.push_str(&format!("\n  last lines of {name}:"));
        for line in &lines[lines.len().saturating_sub(SHOWN)..] {
            self.0.push_str("\n    | ");
            self.0.push_str(line.trim_end());
        }
        if lines.is_empty() {
            self.0.push_str(" (nothing)");
        }
        self
    }

    /// For `map_err`: an I/O error while doing something.
    pub fn io(doing: impl fmt::Display) -> impl FnOnce(io::Error) -> Self {
        move |error| Self(format!("{doing}: {error}"))
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// The same as for people: a test that returns a failure is shown with this.
impl fmt::Debug for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Failure {}
