//! What the checks of this crate report: the rule that was broken, and what was seen.
use std::fmt;

/// A rule of virtio or vhost-user that the device under test broke.
///
/// The checked calls return it (`try_...`); the short ones panic with it, which is what most tests want.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// The rule in a few words, with the section of virtio 1.4 that states it.
    pub rule: &'static str,
    /// What the device did instead.
    pub seen: String,
}

impl Violation {
    pub(crate) fn new(rule: &'static str, seen: impl Into<String>) -> Violation {
        Violation { rule, seen: seen.into() }
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "contract broken: {}; seen: {}", self.rule, self.seen)
    }
}

impl std::error::Error for Violation {}

/// Panics with the violation, at the caller's line.
#[track_caller]
pub(crate) fn expect<T>(result: Result<T, Violation>) -> T {
    match result {
        Ok(value) => value,
        Err(violation) => panic!("{violation}"),
    }
}
