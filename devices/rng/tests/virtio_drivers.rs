//! An independent driver: that of the `virtio-drivers` crate for entropy devices, over our registers.

use std::sync::Arc;

use virtio_drivers::device::rng::VirtIORng;
use virtio_drivers::transport::DeviceType;
use virtio_rng::{Entropy, Rng};
use virtio_testkit::second_opinion::{RamHal, Wired, options, ram, run};
use virtio_testkit::transport::{RegisterAccess, TestFunction, TestLine};
use vm_virtio::WaitFor;
use vm_virtio::transport::Kicks;
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::Pci;

fn rng() -> Rng {
    Rng::new(&Entropy::insecure_seeded(7), 0, None).expect("an entropy device")
}

fn drive(wired: Wired<impl RegisterAccess>) {
    let mut driver = VirtIORng::<RamHal, _>::new(wired).expect("a device that is accepted");
    let mut seen = Vec::new();
    for len in [1, 16, 64, 4096, 65536] {
        let mut bytes = vec![0; len];
        let written = driver.request_entropy(&mut bytes).expect("entropy");
        assert!((1..=len).contains(&written));
        seen.extend_from_slice(&bytes[..written]);
        driver.ack_interrupt();
    }
    seen.sort_unstable();
    seen.dedup();
    assert!(seen.len() > 200, "all kinds of bytes");
}

#[test]
fn virtio_drivers_over_mmio() {
    for kicks in [Kicks::Files, Kicks::Calls] {
        let line = Arc::new(TestLine::default());
        let (mmio, lanes) = Mmio::new(rng(), options(kicks), 0, line.clone()).expect("a transport");
        run(lanes);
        mmio.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
        let mmio = Arc::new(mmio);
        for _ in 0..3 {
            drive(Wired::mmio(mmio.clone(), DeviceType::EntropySource));
        }
        assert!(line.raised() > 0);
        assert_eq!(mmio.ignored().count(), 0, "nothing that a driver must not do");
    }
}

#[test]
fn virtio_drivers_over_pci() {
    let (pci, lanes) = Pci::new(rng(), options(Kicks::Files), 0).expect("a transport");
    run(lanes);
    pci.connect(Arc::new(TestFunction::default()));
    pci.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
    let pci = Arc::new(pci);
    for _ in 0..3 {
        drive(Wired::pci(pci.clone(), DeviceType::EntropySource));
    }
    assert_eq!(pci.ignored().count(), 0, "nothing that a driver must not do");
}
