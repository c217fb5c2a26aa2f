//! Says that a test was skipped, and why: on standard error, past the capture of the test harness, and in the file
//! from which `cargo xtask test` makes its summary.

use std::env;
use std::fs::OpenOptions;
use std::io::{self, Write};

/// Names the file to which each skipped test adds a line: its name, a tab, the reason.
pub const VARIABLE: &str = "BACKPLANE_SKIPS";

/// Tells that `test` was skipped for `reason`; the test then returns.
pub fn tell(test: &str, reason: &str) {
    // `eprintln!` would be captured: a skipped test passes, and what passing tests print is not shown.
    let _ = writeln!(io::stderr(), "SKIP {test}: {reason}");
    let Some(file) = env::var_os(VARIABLE) else { return };
    let line = format!("{test}\t{}\n", reason.replace(['\n', '\t'], " "));
    let written = OpenOptions::new()
        .create(true)
        .append(true)
        .open(&file)
        .and_then(|mut f| f.write_all(line.as_bytes()));
    if let Err(error) = written {
        // A skip that is not counted would look like a pass.
        panic!("cannot note in {} that {test} was skipped: {error}", file.display());
    }
}
