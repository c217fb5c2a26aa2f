//! What tests of the disk share: images in a directory of their own, the daemon, requests.
#![allow(dead_code, reason = "each test binary uses what it needs")]
pub(crate) mod memory;
pub(crate) mod probe;

use std::path::{Path, PathBuf};
use std::process::Output;
use std::time::Duration;

use virtio_testkit::daemon::{DaemonProcess, TempDir};
use virtio_testkit::{Buf, RingLayout, TestRam, VhostUserDriver, VhostUserOptions};

/// Longer than anything takes.
pub(crate) const SOON: Duration = Duration::from_secs(20);

pub(crate) const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-device-block");

pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// `VIRTIO_BLK_F_*`.
pub(crate) mod feature {
    use vm_virtio::Features;

    pub(crate) const fn bit(bit: u32) -> Features {
        Features::from_bits_retain(1 << bit)
    }

    pub(crate) const SIZE_MAX: Features = bit(1);
    pub(crate) const SEG_MAX: Features = bit(2);
    pub(crate) const GEOMETRY: Features = bit(4);
    pub(crate) const RO: Features = bit(5);
    pub(crate) const BLK_SIZE: Features = bit(6);
    pub(crate) const FLUSH: Features = bit(9);
    pub(crate) const TOPOLOGY: Features = bit(10);
    pub(crate) const CONFIG_WCE: Features = bit(11);
    pub(crate) const MQ: Features = bit(12);
    pub(crate) const DISCARD: Features = bit(13);
    pub(crate) const WRITE_ZEROES: Features = bit(14);
}

/// What each byte of a test image is, so that one that is at the wrong place shows.
pub(crate) fn pattern(offset: u64) -> u8 {
    (offset / 512 * 7 + offset % 251) as u8
}

/// A directory with an image of so many bytes of [`pattern`].
pub(crate) fn image(bytes: u64) -> (TempDir, PathBuf) {
    let directory = TempDir::new();
    let path = directory.join("disk.img");
    std::fs::write(&path, (0..bytes).map(pattern).collect::<Vec<u8>>()).unwrap();
    (directory, path)
}

pub(crate) fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

/// `struct virtio_blk_discard_write_zeroes`.
pub(crate) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

/// The chain of a request as Linux makes it: header, data, status.
pub(crate) fn chain(ram: &TestRam, kind: u32, sector: u64, data: &[u8], room: u32) -> Vec<Buf> {
    let mut chain = vec![ram.readable(&header(kind, sector))];
    if !data.is_empty() {
        chain.push(ram.readable(data));
    }
    if room > 0 {
        chain.push(ram.writable(room));
    }
    chain.push(ram.writable(1));
    chain
}

/// Runs the daemon to its end, which has to come by itself.
pub(crate) fn run(args: &[&str]) -> Output {
    DaemonProcess::run(DAEMON, args)
}

/// Starts the daemon on a socket and waits for its word that it is ready.
#[track_caller]
pub(crate) fn start(socket: &Path, args: &[&str]) -> DaemonProcess {
    DaemonProcess::listening(DAEMON, socket, args)
}

/// A driver with everything that the daemon offers.
pub(crate) fn connect(socket: &Path, layout: RingLayout) -> VhostUserDriver {
    VhostUserDriver::connect(socket, VhostUserOptions::new(layout)).expect("a device that works")
}

/// One request on a queue: its status and the data that came.
#[track_caller]
pub(crate) fn ask_on(
    driver: &mut VhostUserDriver,
    queue: usize,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> (u8, Vec<u8>) {
    let chain = chain(driver.ram(), kind, sector, data, room);
    let id = driver.ring(queue).add(&chain);
    driver.kick(queue);
    let used = driver.wait_used(queue, SOON).expect("an answer");
    assert_eq!(used.id, id);
    let mut bytes = driver.ram().written(&chain);
    for buf in &chain {
        driver.ram().free(buf.addr);
    }
    let status = bytes.pop().unwrap();
    (status, bytes)
}

/// The same on the first.
#[track_caller]
pub(crate) fn ask(
    driver: &mut VhostUserDriver,
    kind: u32,
    sector: u64,
    data: &[u8],
    room: u32,
) -> (u8, Vec<u8>) {
    ask_on(driver, 0, kind, sector, data, room)
}
