//! An independent driver: that of the `virtio-drivers` crate for socket devices, over our registers.
use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::Arc;

use virtio_drivers::device::socket::{VirtIOSocket, VsockAddr, VsockConnectionManager, VsockEventType};
use virtio_drivers::transport::DeviceType;
use virtio_testkit::daemon::TempDir;
use virtio_testkit::second_opinion::{RamHal, Wired, options, ram, run};
use virtio_testkit::transport::{RegisterAccess, TestFunction, TestLine};
use virtio_vsock::{Exchange, HostSide, Settings, Vsock};
use vm_virtio::WaitFor;
use vm_virtio::transport::Kicks;
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::Pci;

fn vsock(dir: &TempDir) -> Vsock {
    Vsock::new(Settings::new(42, HostSide::Unix(dir.join("vm"))), &Exchange::new()).expect("a socket device")
}

/// A connection to the host and one of the host, with a refusal before; bytes both ways, and the clean end.
fn drive(wired: Wired<impl RegisterAccess>, dir: &TempDir) {
    let mut driver = VsockConnectionManager::new(
        VirtIOSocket::<RamHal, _>::new(wired).expect("a device that is accepted"),
    );
    assert_eq!(driver.guest_cid(), 42);
    let host = VsockAddr { cid: 2, port: 77 };
    driver.connect(host, 1000).expect("a request");
    let refused = driver.wait_for_event().expect("an answer");
    assert!(matches!(refused.event_type, VsockEventType::Disconnected { .. }), "{refused:?}");

    let path = dir.join("vm_77");
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).expect("a listener");
    driver.connect(host, 1000).expect("a request");
    assert_eq!(driver.wait_for_event().expect("an answer").event_type, VsockEventType::Connected);
    let (stream, _) = listener.accept().expect("a connection");
    talk(&mut driver, stream, host, 1000);

    driver.listen(5);
    let mut client = UnixStream::connect(dir.join("vm")).expect("a client");
    client.write_all(b"CONNECT 5\n").expect("a line");
    let request = driver.wait_for_event().expect("a request");
    assert_eq!((request.event_type, request.destination.port), (VsockEventType::ConnectionRequest, 5));
    let line = format!("OK {}\n", request.source.port);
    let mut heard = vec![0; line.len()];
    client.read_exact(&mut heard).expect("an answer");
    assert_eq!(heard, line.as_bytes());
    talk(&mut driver, client, request.source, 5);
}

fn talk<R: RegisterAccess>(
    driver: &mut VsockConnectionManager<RamHal, Wired<R>>,
    mut stream: UnixStream,
    peer: VsockAddr,
    port: u32,
) {
    // More than this driver's buffer for a connection, so that it depends on credit.
    let sent: Vec<u8> = (0..5000u32).map(|n| ((n * 31) >> 3) as u8).collect();
    let writer = {
        let (mut stream, sent) = (stream.try_clone().expect("a stream"), sent.clone());
        std::thread::spawn(move || stream.write_all(&sent))
    };
    let mut got = Vec::new();
    while got.len() < sent.len() {
        let event = driver.wait_for_event().expect("data");
        if let VsockEventType::Received { length } = event.event_type {
            let mut bytes = vec![0; length];
            assert_eq!(driver.recv(peer, port, &mut bytes).expect("what came"), length);
            got.extend(bytes);
            driver.update_credit(peer, port).expect("an update");
        }
    }
    writer.join().expect("a writer").expect("everything is taken");
    assert!(got == sent);
    for part in sent.chunks(700) {
        driver.send(peer, port, part).expect("credit");
    }
    let mut heard = vec![0; sent.len()];
    stream.read_exact(&mut heard).expect("what the guest sent");
    assert!(heard == sent);
    driver.shutdown(peer, port).expect("the end");
    loop {
        if let VsockEventType::Disconnected { .. } = driver.wait_for_event().expect("the end").event_type {
            break;
        }
    }
    assert_eq!(stream.read(&mut heard).expect("the end"), 0);
}

#[test]
fn virtio_drivers_over_mmio_and_pci() {
    let dir = TempDir::new();
    let line = Arc::new(TestLine::default());
    let (mmio, lanes) = Mmio::new(vsock(&dir), options(Kicks::Files), 0, line.clone()).expect("a transport");
    run(lanes);
    mmio.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
    let mmio = Arc::new(mmio);
    for _ in 0..2 {
        drive(Wired::mmio(mmio.clone(), DeviceType::Socket), &dir);
    }
    assert_eq!(mmio.ignored().count(), 0, "nothing that a driver must not do");

    let dir = TempDir::new();
    let (pci, lanes) = Pci::new(vsock(&dir), options(Kicks::Files), 0).expect("a transport");
    run(lanes);
    pci.connect(Arc::new(TestFunction::default()));
    pci.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
    drive(Wired::pci(Arc::new(pci), DeviceType::Socket), &dir);
}
