//! Readiness, timers, mailboxes and bounded adaptive polling for device threads.
