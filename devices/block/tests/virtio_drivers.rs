//! An independent driver: that of the `virtio-drivers` crate for block devices, over our registers: what it writes is in the
//! image, and what is in the image it reads.
use std::path::Path;
use std::sync::Arc;

use virtio_block::backend::{self, OpenOptions};
use virtio_block::{Block, Options as BlockOptions};
use virtio_drivers::device::blk::{SECTOR_SIZE, VirtIOBlk};
use virtio_drivers::transport::DeviceType;
use virtio_testkit::daemon::TempDir;
use virtio_testkit::second_opinion::{RamHal, Wired, options, ram, run};
use virtio_testkit::transport::{RegisterAccess, TestFunction, TestLine};
use vm_virtio::WaitFor;
use vm_virtio::transport::Kicks;
use vm_virtio::transport::mmio::Mmio;
use vm_virtio::transport::pci::Pci;

const SERIAL: &[u8] = b"second-opinion";
const SECTORS: usize = 2048;

fn disk(path: &Path, read_only: bool) -> Block {
    let options = OpenOptions { read_only, lock: true, ..OpenOptions::default() };
    let image = backend::open(path, options).expect("an image");
    let mut options = BlockOptions::new(BlockOptions::own_pool());
    options.serial = String::from_utf8(SERIAL.to_vec()).expect("a serial number");
    options.read_only = read_only;
    Block::new(image, options).expect("a disk")
}

fn image(folder: &TempDir) -> std::path::PathBuf {
    let path = folder.join("disk.img");
    let bytes: Vec<u8> = (0..SECTORS * SECTOR_SIZE).map(|at| (at / SECTOR_SIZE) as u8).collect();
    std::fs::write(&path, bytes).expect("an image");
    path
}

fn drive(wired: Wired<impl RegisterAccess>, path: &Path, read_only: bool) {
    let mut driver = VirtIOBlk::<RamHal, _>::new(wired).expect("a device that is accepted");
    assert_eq!((driver.capacity(), driver.readonly()), (SECTORS as u64, read_only));
    let mut id = [0; 20];
    let len = driver.device_id(&mut id).expect("a serial number");
    assert_eq!(&id[..len], SERIAL);
    let mut bytes = vec![0; 4 * SECTOR_SIZE];
    driver.read_blocks(7, &mut bytes).expect("a read");
    for (at, sector) in bytes.chunks(SECTOR_SIZE).enumerate() {
        assert_eq!(sector, [7 + at as u8; SECTOR_SIZE]);
    }
    assert!(driver.read_blocks(SECTORS, &mut bytes).is_err(), "behind the end");
    assert!(driver.read_blocks(SECTORS - 3, &mut bytes).is_err(), "over the end");
    let data = vec![0xa5; 8 * SECTOR_SIZE];
    assert_eq!(
        driver.write_blocks(1024, &data).is_err(),
        read_only,
        "5.2.6.2: nothing is written to a disk with RO"
    );
    driver.flush().expect("a flush");
    let there = std::fs::read(path).expect("an image");
    let place = &there[1024 * SECTOR_SIZE..1032 * SECTOR_SIZE];
    assert_eq!(place == data, !read_only);
    if !read_only {
        // As it was, for who comes next.
        let before: Vec<u8> = (1024..1032).flat_map(|sector| [sector as u8; SECTOR_SIZE]).collect();
        driver.write_blocks(1024, &before).expect("a write");
        driver.read_blocks(1024, &mut bytes).expect("a read");
        assert_eq!(bytes, before[..4 * SECTOR_SIZE]);
    }
    driver.ack_interrupt();
}

#[test]
fn virtio_drivers_over_mmio() {
    for (kicks, read_only) in [(Kicks::Files, false), (Kicks::Calls, false), (Kicks::Files, true)] {
        let folder = TempDir::new();
        let path = image(&folder);
        let line = Arc::new(TestLine::default());
        let (mmio, lanes) =
            Mmio::new(disk(&path, read_only), options(kicks), 0, line.clone()).expect("a transport");
        run(lanes);
        mmio.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
        let mmio = Arc::new(mmio);
        for _ in 0..2 {
            drive(Wired::mmio(mmio.clone(), DeviceType::Block), &path, read_only);
        }
        assert!(line.raised() > 0);
        assert_eq!(mmio.ignored().count(), 0, "nothing that a driver must not do");
    }
}

#[test]
fn virtio_drivers_over_pci() {
    for read_only in [false, true] {
        let folder = TempDir::new();
        let path = image(&folder);
        let (pci, lanes) = Pci::new(disk(&path, read_only), options(Kicks::Files), 0).expect("a transport");
        run(lanes);
        pci.connect(Arc::new(TestFunction::default()));
        pci.engine().memory(ram().ram(), WaitFor::NewRequests).wait();
        let pci = Arc::new(pci);
        for _ in 0..2 {
            drive(Wired::pci(pci.clone(), DeviceType::Block), &path, read_only);
        }
        assert_eq!(pci.ignored().count(), 0, "nothing that a driver must not do");
    }
}
