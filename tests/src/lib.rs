//! Whole-system tests: wire and guest.
