//! Counts tests from what `cargo test` prints, on the lines of the standard test harness.

/// What was counted so far.
#[derive(Debug, Default)]
pub(crate) struct Tally {
    passed: u32,
    failed: u32,
    /// Names of failed tests, and of test programs that ended without a result.
    pub(crate) failures: Vec<String>,
    /// Names and reasons of tests marked `#[ignore]`.
    pub(crate) ignored: Vec<(String, String)>,
    /// The program whose tests run, as cargo calls it.
    program: String,
    /// Passed tests of a program that has not given its result yet.
    open: Option<u32>,
    broken: u32,
}

impl Tally {
    /// A line of the tests' own output.
    pub(crate) fn test_line(&mut self, line: &str) {
        if let Some(rest) = line.strip_prefix("running ") {
            if rest.ends_with(" tests") || rest.ends_with(" test") {
                self.close();
                self.open = Some(0);
            }
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.open = None;
            for part in result.split([';', '.']) {
                match part.trim().split_once(' ') {
                    Some((count, "passed")) => self.passed += count.parse().unwrap_or(0),
                    Some((count, "failed")) => self.failed += count.parse().unwrap_or(0),
                    _ => {}
                }
            }
        } else if let Some((name, state)) =
            line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... "))
        {
            if state == "ok" {
                self.open = self.open.map(|count| count + 1);
            } else if state == "FAILED" {
                self.failures.push(name.to_owned());
            } else if let Some(reason) = state.strip_prefix("ignored") {
                let reason = reason.trim_start_matches([',', ' ']);
                let reason = if reason.is_empty() { "ignored without a reason" } else { reason };
                self.ignored.push((name.to_owned(), reason.to_owned()));
            }
        }
    }

    /// A line of cargo's.
    pub(crate) fn cargo_line(&mut self, line: &str) {
        let line = line.trim_start();
        if let Some(program) = line.strip_prefix("Running ").or_else(|| line.strip_prefix("Doc-tests ")) {
            program.split(" (").next().unwrap_or(program).clone_into(&mut self.program);
        }
    }

    /// The end of everything; `failed` says that cargo reported a failure.
    pub(crate) fn end(&mut self, failed: Option<&str>) {
        self.close();
        if let Some(how) = failed
            && self.failed() == 0
        {
            self.broken += 1;
            self.failures.push(format!("cargo test: {how} (see above: something does not build or run)"));
        }
    }

    /// A program that began and gave no result has crashed; those of its tests that passed still did.
    fn close(&mut self) {
        if let Some(passed) = self.open.take() {
            self.passed += passed;
            self.broken += 1;
            self.failures.push(format!("{}: ended in the middle of its tests", self.program));
        }
    }

    pub(crate) fn passed(&self) -> u32 {
        self.passed
    }

    pub(crate) fn failed(&self) -> u32 {
        self.failed + self.broken
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(lines: &[&str], end: Option<&str>) -> Tally {
        let mut tally = Tally::default();
        for line in lines {
            match line.strip_prefix("! ") {
                Some(line) => tally.cargo_line(line),
                None => tally.test_line(line),
            }
        }
        tally.end(end);
        tally
    }

    #[test]
    fn results_add_up() {
        let lines = [
            "! Running unittests src/lib.rs (target/debug/deps/a-1)",
            "running 3 tests",
            "test x ... ok",
            "test y ... FAILED",
            "test z ... ignored, needs a moon",
            "test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.01s",
            "! Doc-tests b",
            "running 1 test",
            "test src/lib.rs - f (line 3) ... ok",
            "test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.01s",
        ];
        let tally = tally(&lines, Some("exit status: 101"));
        assert_eq!((tally.passed(), tally.failed()), (2, 1));
        assert_eq!(tally.failures, ["y"]);
        assert_eq!(tally.ignored, [("z".to_owned(), "needs a moon".to_owned())]);
    }

    #[test]
    fn a_crash_is_a_failure() {
        let lines = [
            "! Running tests/wire.rs (target/debug/deps/wire-1)",
            "running 2 tests",
            "test x ... ok",
            "! Running tests/other.rs (target/debug/deps/other-1)",
            "running 0 tests",
            "test result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s",
        ];
        let crashed = tally(&lines, Some("exit status: 101"));
        assert_eq!((crashed.passed(), crashed.failed()), (1, 1));
        // The last program of all may be the one that crashes.
        assert_eq!(tally(&lines[..3], Some("exit status: 101")).failed(), 1);
    }

    #[test]
    fn what_does_not_build_is_a_failure() {
        assert_eq!(tally(&[], Some("exit status: 101")).failed(), 1);
        assert_eq!(tally(&[], None).failed(), 0);
    }
}
