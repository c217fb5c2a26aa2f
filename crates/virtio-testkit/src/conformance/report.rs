//! What came out.
use std::fmt;

use super::{Line, Trouble};

/// What a line came to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The rule is kept.
    Pass,
    /// It is broken, and how.
    Fail(String),
    /// There is nothing that it speaks of, and why.
    NotApplicable(String),
}

impl From<Trouble> for Outcome {
    fn from(trouble: Trouble) -> Self {
        match trouble {
            Trouble::Broken(why) => Outcome::Fail(why),
            Trouble::NotApplicable(why) => Outcome::NotApplicable(why),
        }
    }
}

/// A line and its outcome.
#[derive(Debug)]
pub struct Row {
    /// The line.
    pub line: Line,
    /// Its outcome.
    pub outcome: Outcome,
}

/// The outcomes of a run.
#[derive(Debug)]
pub struct Report {
    /// One for each line that ran.
    pub rows: Vec<Row>,
}

impl Report {
    /// Whether no line failed.
    pub fn passed(&self) -> bool {
        !self.rows.iter().any(|row| matches!(row.outcome, Outcome::Fail(_)))
    }

    /// The ids of the lines that were not applicable.
    pub fn not_applicable(&self) -> Vec<&'static str> {
        let none = |row: &&Row| matches!(row.outcome, Outcome::NotApplicable(_));
        self.rows.iter().filter(none).map(|row| row.line.id).collect()
    }

    /// For tests: panics with everything that failed.
    ///
    /// # Panics
    /// If a line failed.
    #[track_caller]
    pub fn assert_passed(&self) {
        assert!(self.passed(), "rules are broken:\n{self}");
    }
}

/// The lines that did not pass.
impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Row { line, outcome } in &self.rows {
            match outcome {
                Outcome::Pass => {}
                Outcome::Fail(why) => writeln!(f, "FAIL {} ({}): {why}", line.id, line.section)?,
                Outcome::NotApplicable(why) => writeln!(f, "n/a  {} ({}): {why}", line.id, line.section)?,
            }
        }
        Ok(())
    }
}
