//! An image that somebody else made: the bytes are a qcow2 image, behind eight that say what is done with it. Checked: no
//! panic, no end of the stack, nothing for ever (the fuzzer's own time limit; a limit here for replays).
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use virtio_block::Format;
use virtio_block::backend::{Image, OpenOptions, Payload, open};

/// Far longer than any of it takes.
const LONG: Duration = Duration::from_secs(20);
/// Longer images find nothing that shorter ones do not.
const LONGEST: usize = 1 << 20;
const PIECE: usize = 4096;

/// Opens the image and uses it as a device does.
pub fn qcow2(data: &[u8]) {
    let (Some((how, image)), true) = (data.split_first_chunk::<8>(), data.len() <= LONGEST) else { return };
    let start = Instant::now();
    let file = memfd_create("image", MemfdFlags::CLOEXEC).expect("a memfd");
    let mut file = File::from(file);
    file.write_all(image).expect("room");
    let path = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let [kind, ..] = *how;
    let options = OpenOptions { format: Format::Qcow2, read_only: kind & 1 != 0, ..OpenOptions::default() };
    if let Ok(image) = open(&path, options) {
        for byte in how {
            step(&*image, *byte);
        }
    }
    assert!(start.elapsed() < LONG, "an image that takes {:?}", start.elapsed());
}

fn step(image: &dyn Image, byte: u8) {
    let bytes = image.resize(None).unwrap_or(0) & !511;
    let len = (PIECE as u64).min(bytes);
    let last = bytes - len;
    // The beginning, the end, and places between: aligned as a device asks.
    let offset = match byte >> 4 {
        0 => last,
        part => (last / 15).saturating_mul(u64::from(part) - 1) & !511,
    };
    match byte & 7 {
        0 | 1 => drop(image.read(offset, &mut Payload::from_bytes(vec![0; len as usize]))),
        2 | 3 => drop(image.write(offset, &mut Payload::from_bytes(vec![byte; len as usize]), byte & 1 != 0)),
        4 => drop(image.write_zeroes(offset, len, byte & 8 != 0, &|| true)),
        5 => drop(image.discard(offset, len)),
        6 => drop(image.flush()),
        _ => drop(image.resize(Some(bytes.saturating_add(1 << 20)))),
    }
}
