//! The conformance suite over each transport. Lines that cannot apply are listed with the reason.
use std::time::Duration;

use virtio_testkit::TestRam;
use virtio_testkit::conformance::{Outcome, RegisterBench, Subject, check};
use virtio_testkit::transport::Machine;
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_virtio::transport::Kicks;

fn vsock() -> Vsock {
    Vsock::new(Settings::new(3, HostSide::Nobody), &Exchange::new()).expect("a socket device")
}

/// Wherever there are registers.
const NOT_HERE: (&str, &str) = ("begins-where-told", "a transport starts rings at their beginning");
/// 4.3.4: reserved for future use.
const NOT_ON_CHANNELS: (&str, &str) = ("queue-reset", "ring_reset not offered");

fn conforms(make: impl FnMut(&TestRam) -> Machine, not_here: &[(&str, &str)]) {
    let report = check(&mut RegisterBench::new(make), Some(&Subject::SOCKET), Duration::from_secs(5));
    report.assert_passed();
    for (line, why) in not_here {
        let row = report.rows.iter().find(|row| row.line.id == *line).expect("a line of that name");
        assert_eq!(row.outcome, Outcome::NotApplicable((*why).to_owned()));
    }
}

#[test]
fn conformance_over_mmio() {
    conforms(|ram| Machine::mmio(vsock(), ram, Kicks::Files), &[NOT_HERE]);
}

#[test]
fn conformance_over_pci() {
    conforms(|ram| Machine::pci(vsock(), ram, true), &[NOT_HERE]);
}

#[test]
fn conformance_over_ccw() {
    conforms(|ram| Machine::ccw(vsock(), ram, false), &[NOT_HERE, NOT_ON_CHANNELS]);
}
