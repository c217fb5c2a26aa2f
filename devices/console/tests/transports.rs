//! The conformance suite over each transport, with kicks by file and by call.
mod support;

use std::time::Duration;

use virtio_testkit::TestRam;
use virtio_testkit::conformance::{RegisterBench, Subject, check};
use virtio_testkit::transport::Machine;
use vm_virtio::transport::Kicks;

fn conforms(make: impl FnMut(&TestRam) -> Machine) {
    check(&mut RegisterBench::new(make), Some(&Subject::CONSOLE), Duration::from_secs(5)).assert_passed();
}

#[test]
fn conformance_over_mmio() {
    conforms(|ram| Machine::mmio(support::null(), ram, Kicks::Files));
    conforms(|ram| Machine::mmio(support::null(), ram, Kicks::Calls));
}

#[test]
fn conformance_over_pci() {
    conforms(|ram| Machine::pci(support::null(), ram, false));
}

#[test]
fn conformance_over_ccw() {
    conforms(|ram| Machine::ccw(support::null(), ram, true));
}
