//! The entropy device as a vhost-user daemon.
fn main() {}
