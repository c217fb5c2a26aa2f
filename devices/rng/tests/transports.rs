//! The conformance suite over each transport, with kicks by file and by call.
use std::time::Duration;

use virtio_rng::{Entropy, Rng};
use virtio_testkit::conformance::{RegisterBench, Subject, check};
use virtio_testkit::transport::Machine;
use vm_virtio::transport::Kicks;

fn rng() -> Rng {
    Rng::new(&Entropy::insecure_seeded(7), 0, None).expect("an entropy device")
}

/// What cannot apply behind a transport, and why.
const NOT_HERE: [(&str, &str); 1] = [("begins-where-told", "a transport starts rings at their beginning")];

fn conforms(make: impl FnMut(&virtio_testkit::TestRam) -> Machine) {
    let report = check(&mut RegisterBench::new(make), Some(&Subject::ENTROPY), Duration::from_secs(5));
    report.assert_passed();
    for (line, why) in NOT_HERE {
        let row = report.rows.iter().find(|row| row.line.id == line).expect("a line of that name");
        assert_eq!(row.outcome, virtio_testkit::conformance::Outcome::NotApplicable(why.to_owned()));
    }
}

#[test]
fn conformance_over_mmio() {
    conforms(|ram| Machine::mmio(rng(), ram, Kicks::Files));
    conforms(|ram| Machine::mmio(rng(), ram, Kicks::Calls));
}
