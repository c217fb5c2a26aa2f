//! An independent driver: that of the `virtio-drivers` crate for consoles, over our registers. It does not know MULTIPORT.
mod support;

use std::io::{Read, Write};
use std::sync::Arc;
use std::time::Instant;

use support::{Place, SOON, console};
use virtio_drivers::device::console::VirtIOConsole;
use virtio_drivers::transport::DeviceType;
use virtio_testkit::second_opinion::{RamHal, Wired, options, ram, run};
use virtio_testkit::transport::{RegisterAccess, TestFunction, TestLine};
use vm_virtio::controls::{ControlRequest, Value};
use vm_virtio::transport::Kicks;
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::Pci;
use vm_virtio::{HostRequest, WaitFor};

fn drive(wired: Wired<impl RegisterAccess>, place: &Place, size: (u16, u16)) {
    let mut driver = VirtIOConsole::<RamHal, _>::new(wired).expect("a device that is accepted");
    let told = driver.size().expect("a size").expect("SIZE is offered");
    assert_eq!((told.columns, told.rows), size);
    let mut client = std::os::unix::net::UnixStream::connect(place.path("c")).expect("a port that listens");
    client.set_read_timeout(Some(SOON)).unwrap();
    driver.send(b'h').expect("output");
    driver.send_bytes(b"ello, ").expect("output");
    driver.emergency_write(b'!').expect("EMERG_WRITE is offered");
    let mut bytes = [0; 8];
    client.read_exact(&mut bytes).expect("what was sent");
    bytes.sort_unstable();
    // The emergency goes by another way, and comes when it comes.
    assert_eq!(&bytes, b" !,ehllo");
    client.write_all(b"typed\r").unwrap();
    let (mut typed, deadline) = (Vec::new(), Instant::now() + SOON);
    while typed.len() < 6 {
        typed.extend(driver.recv(true).expect("input"));
        driver.ack_interrupt().expect("an interrupt");
        assert!(Instant::now() < deadline, "{typed:?}");
    }
    assert_eq!(typed, b"typed\r");
}

fn resize() -> HostRequest {
    HostRequest::Control(ControlRequest::Set("port.0.size".into(), Value::Text("132x43".into())))
}

#[test]
fn virtio_drivers_over_mmio() {
    for kicks in [Kicks::Files, Kicks::Calls] {
        let place = Place::new();
        let device = console(&[&place.unix("c")]);
        let line = Arc::new(TestLine::default());
        let (mmio, lanes) = Mmio::new(device, options(kicks), 0, line).expect("a transport");
        run(lanes);
        mmio.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
        let mmio = Arc::new(mmio);
        drive(Wired::mmio(mmio.clone(), DeviceType::Console), &place, (0, 0));
        mmio.engine().host_request(resize()).unwrap();
        let (mut size, deadline) = ([0; 4], Instant::now() + SOON);
        while size != [132, 0, 43, 0] {
            mmio.engine().config().read(0, &mut size);
            assert!(Instant::now() < deadline);
        }
        drive(Wired::mmio(mmio.clone(), DeviceType::Console), &place, (132, 43));
        assert_eq!(mmio.ignored().count(), 0, "nothing that a driver must not do");
    }
}

#[test]
fn virtio_drivers_over_pci() {
    let place = Place::new();
    let (pci, lanes) = Pci::new(console(&[&place.unix("c")]), options(Kicks::Files), 0).expect("a transport");
    run(lanes);
    pci.connect(Arc::new(TestFunction::default()));
    pci.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
    let pci = Arc::new(pci);
    for _ in 0..2 {
        drive(Wired::pci(pci.clone(), DeviceType::Console), &place, (0, 0));
    }
    assert_eq!(pci.ignored().count(), 0, "nothing that a driver must not do");
}
