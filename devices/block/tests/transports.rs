//! The conformance suite over each transport, with kicks by file and by call. Lines that cannot apply are listed with the
//! reason; beyond those, what the disk itself has nothing of.
use std::sync::Arc;
use std::time::Duration;

use virtio_block::backend::MemoryImage;
use virtio_block::{Block, Options};
use virtio_testkit::TestRam;
use virtio_testkit::conformance::{Outcome, RegisterBench, Subject, check};
use virtio_testkit::transport::Machine;
use vm_virtio::transport::Kicks;

fn disk() -> Block {
    Block::new(Arc::new(MemoryImage::new(vec![1; 8192])), Options::new(Options::own_pool())).expect("a disk")
}

/// Wherever there are registers.
const NOT_HERE: (&str, &str) = ("begins-where-told", "a transport starts rings at their beginning");
/// 4.3.4: reserved for future use. (Nor are there shared memory regions.)
const NOT_ON_CHANNELS: (&str, &str) = ("queue-reset", "ring_reset not offered");

fn conforms(make: impl FnMut(&TestRam) -> Machine, not_here: &[(&str, &str)]) {
    let report = check(&mut RegisterBench::new(make), Some(&Subject::BLOCK), Duration::from_secs(5));
    report.assert_passed();
    let outcome =
        |id: &str| &report.rows.iter().find(|row| row.line.id == id).expect("a line of that name").outcome;
    for (line, why) in not_here {
        assert_eq!(*outcome(line), Outcome::NotApplicable((*why).to_owned()));
    }
    for line in ["started-with-buffers", "reset-quiet", "fault-heals"] {
        let known = report.rows.iter().any(|row| row.line.id == line);
        assert!(!known || *outcome(line) == Outcome::Pass, "{line}");
    }
    if !not_here.contains(&NOT_ON_CHANNELS) {
        assert_eq!(*outcome(NOT_ON_CHANNELS.0), Outcome::Pass);
    }
}

#[test]
fn conformance_over_mmio() {
    conforms(|ram| Machine::mmio(disk(), ram, Kicks::Files), &[NOT_HERE]);
    conforms(|ram| Machine::mmio(disk(), ram, Kicks::Calls), &[NOT_HERE]);
}

#[test]
fn conformance_over_pci() {
    conforms(|ram| Machine::pci(disk(), ram, false), &[NOT_HERE]);
    conforms(|ram| Machine::pci(disk(), ram, true), &[NOT_HERE]);
}

#[test]
fn conformance_over_ccw() {
    conforms(|ram| Machine::ccw(disk(), ram, false), &[NOT_HERE, NOT_ON_CHANNELS]);
    conforms(|ram| Machine::ccw(disk(), ram, true), &[NOT_HERE, NOT_ON_CHANNELS]);
}
