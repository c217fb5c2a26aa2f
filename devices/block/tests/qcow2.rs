//! Disks in qcow2 images: what a disk owes, and what an image may not do to the host. What QEMU makes of the images is
//! checked by the whole-system tests.
#![cfg(feature = "qcow2")]
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatCreateBuilder, Storage, StorageCreateOptions};
use virtio_block::Format;
use virtio_block::backend::{Image, OpenError, OpenOptions, Payload, open, open_over};
use virtio_testkit::daemon::TempDir;

const MIB: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;

/// Makes an image; `behind` is a file behind it, and its format.
fn make(path: &Path, bytes: u64, behind: Option<(&str, &str)>) {
    let storage = File::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let mut image = Qcow2::<File>::create_builder(storage).size(bytes);
    if let Some((name, format)) = behind {
        image = image.backing(name.to_owned(), format.to_owned());
    }
    image.create().unwrap();
}

fn options() -> OpenOptions {
    OpenOptions { format: Format::Qcow2, lock: true, ..OpenOptions::default() }
}

fn read(image: &dyn Image, offset: u64, len: usize) -> Vec<u8> {
    let mut payload = Payload::from_bytes(vec![0x77; len]);
    image.read(offset, &mut payload).unwrap();
    assert_eq!(payload.left(), 0);
    payload.into_bytes()
}

fn write(image: &dyn Image, offset: u64, bytes: Vec<u8>, stable: bool) {
    let mut payload = Payload::from_bytes(bytes);
    image.write(offset, &mut payload, stable).unwrap();
    assert_eq!(payload.left(), 0);
}

fn wanted() -> bool {
    true
}

#[test]
fn what_is_written_is_read_also_by_who_opens_the_image_next() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, 8 * MIB, None);
    let bytes: Vec<u8> = (0..3 * CLUSTER + 512).map(|n| (n / 512 + n) as u8).collect();
    {
        let image = open(&path, options()).unwrap();
        assert_eq!(image.geometry().bytes, 8 * MIB);
        assert!(image.blocks() && image.raw().is_none());
        assert_eq!(read(&*image, 0, 4096), vec![0; 4096]);
        // Over the ends of clusters, and longer than what is copied at once.
        write(&*image, CLUSTER - 1024, bytes.clone(), false);
        write(&*image, 4 * MIB, vec![9; 2 * MIB as usize + 512], true);
        assert_eq!(read(&*image, CLUSTER - 1024, bytes.len()), bytes);
        image.flush().unwrap();
    }
    let image = open(&path, OpenOptions { read_only: true, ..options() }).unwrap();
    assert_eq!(read(&*image, CLUSTER - 1024, bytes.len()), bytes);
    assert_eq!(read(&*image, 4 * MIB, 2 * MIB as usize + 512), vec![9; 2 * MIB as usize + 512]);
    let mut payload = Payload::from_bytes(vec![1; 512]);
    assert!(image.write(0, &mut payload, false).is_err(), "read only");
}

/// A daemon that is killed has flushed nothing. What it answered must be in the file all the same, since the guest goes on:
/// the image is looked at while the first owner still has it open.
#[test]
fn policy_7_what_was_answered_survives_a_daemon_that_is_killed() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, 8 * MIB, None);
    let image = open(&path, OpenOptions { lock: false, ..options() }).unwrap();
    write(&*image, 3 * MIB, vec![5; 4096], false);
    image.write_zeroes(3 * MIB + 1024, 512, false, &wanted).unwrap();
    let copy = folder.join("copy.qcow2");
    fs::copy(&path, &copy).unwrap();
    let successor = open(&copy, options()).unwrap();
    let seen = read(&*successor, 3 * MIB, 4096);
    assert_eq!(
        (&seen[..1024], &seen[1024..1536], &seen[1536..]),
        (&[5; 1024][..], &[0; 512][..], &[5; 2560][..])
    );
}

#[test]
fn ranges_are_zeroed_and_given_back() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, 8 * MIB, None);
    let image = open(&path, options()).unwrap();
    for unmap in [false, true] {
        write(&*image, 0, vec![3; 4 * CLUSTER as usize], false);
        // Not whole clusters: what is beside the range stays.
        image.write_zeroes(512, 3 * CLUSTER, unmap, &wanted).unwrap();
        let seen = read(&*image, 0, 4 * CLUSTER as usize);
        let end = 512 + 3 * CLUSTER as usize;
        assert!(seen[..512].iter().all(|byte| *byte == 3) && seen[end..].iter().all(|byte| *byte == 3));
        assert!(seen[512..end].iter().all(|byte| *byte == 0), "unmap: {unmap}");
    }
    write(&*image, 0, vec![4; 4 * CLUSTER as usize], false);
    image.discard(CLUSTER, CLUSTER).unwrap();
    let seen = read(&*image, 0, 4 * CLUSTER as usize);
    assert!(seen[..CLUSTER as usize].iter().all(|byte| *byte == 4));
    assert!(seen[2 * CLUSTER as usize..].iter().all(|byte| *byte == 4));
    assert!(image.write_zeroes(0, 8 * MIB, true, &|| false).is_err(), "not wanted any more");
}

#[test]
fn the_disk_is_resized() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, MIB, None);
    let image = open(&path, options()).unwrap();
    write(&*image, MIB - 512, vec![8; 512], false);
    assert_eq!(image.resize(None).unwrap(), MIB);
    assert_eq!(image.resize(Some(4 * MIB)).unwrap(), 4 * MIB);
    assert_eq!(read(&*image, MIB - 512, 1024), [vec![8; 512], vec![0; 512]].concat());
    write(&*image, 4 * MIB - 512, vec![6; 512], false);
    drop(image);
    let image = open(&path, OpenOptions { read_only: true, ..options() }).unwrap();
    assert_eq!((image.geometry().bytes, read(&*image, 4 * MIB - 512, 512)), (4 * MIB, vec![6; 512]));
    assert!(image.resize(Some(8 * MIB)).is_err());
}

#[test]
fn many_at_once_do_not_disturb_each_other() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, 16 * MIB, None);
    let image = open(&path, options()).unwrap();
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let image = Arc::clone(&image);
            std::thread::spawn(move || {
                for round in 0..64u64 {
                    // Neighbours in the same cluster are other threads'.
                    let offset = round * CLUSTER + thread * 4096;
                    write(&*image, offset, vec![(thread * 64 + round) as u8; 4096], round % 16 == 0);
                    assert_eq!(read(&*image, offset, 4096), vec![(thread * 64 + round) as u8; 4096]);
                    if round % 8 == 7 {
                        image.discard(8 * MIB + thread * MIB, MIB).unwrap();
                    }
                }
            })
        })
        .collect();
    threads.into_iter().for_each(|thread| thread.join().unwrap());
    for round in 0..64u64 {
        for thread in 0..4u64 {
            let seen = read(&*image, round * CLUSTER + thread * 4096, 4096);
            assert_eq!(seen, vec![(thread * 64 + round) as u8; 4096]);
        }
    }
}

/// An image over others, one of which is qcow2 and one raw.
fn layers(folder: &TempDir) -> PathBuf {
    let (raw, middle, top) = (folder.join("base.raw"), folder.join("middle.qcow2"), folder.join("top.qcow2"));
    fs::write(&raw, vec![0xb0; MIB as usize]).unwrap();
    make(&middle, MIB, Some(("base.raw", "raw")));
    write(&*open_over(&middle, options(), &[folder.join("")]).unwrap(), 4096, vec![0xb1; 4096], true);
    make(&top, 2 * MIB, Some((middle.to_str().unwrap(), "qcow2")));
    top
}

#[test]
fn files_behind_an_image_are_read_and_not_written() {
    let folder = TempDir::new();
    let top = layers(&folder);
    let image = open_over(&top, options(), &[folder.join("")]).unwrap();
    assert_eq!(read(&*image, 0, 4096), vec![0xb0; 4096]);
    assert_eq!(read(&*image, 4096, 4096), vec![0xb1; 4096]);
    assert_eq!(read(&*image, MIB, 4096), vec![0; 4096], "behind the end of what is behind");
    write(&*image, 512, vec![1; 512], true);
    let seen = read(&*image, 0, 1536);
    assert_eq!(seen, [vec![0xb0; 512], vec![1; 512], vec![0xb0; 512]].concat());
    drop(image);
    assert_eq!(fs::read(folder.join("base.raw")).unwrap(), vec![0xb0; MIB as usize]);
}

fn refused(path: &Path, options: OpenOptions, backing: &[PathBuf]) -> String {
    match open_over(path, options, backing) {
        Err(error) => error.to_string(),
        Ok(_) => panic!("{} is opened", path.display()),
    }
}

/// A guest, or who made an image, could name any file of the host.
#[test]
fn an_image_names_files_only_below_folders_that_are_allowed() {
    let folder = TempDir::new();
    let top = layers(&folder);
    let outside = TempDir::new();
    for allowed in [vec![], vec![outside.join("")]] {
        let why = refused(&top, options(), &allowed);
        assert!(why.contains("--backing-dir") && why.contains("middle.qcow2"), "{why}");
    }
    // Neither a link nor dots lead out.
    fs::write(outside.join("secret"), vec![1; MIB as usize]).unwrap();
    let link = folder.join("link");
    std::os::unix::fs::symlink(outside.join("secret"), &link).unwrap();
    let dots = format!("../{}/secret", outside.join("").file_name().unwrap().to_str().unwrap());
    for name in ["link", &dots, outside.join("secret").to_str().unwrap(), "/etc/passwd"] {
        let path = folder.join(&format!("names-{}.qcow2", name.len()));
        make(&path, MIB, Some((name, "raw")));
        let why = refused(&path, options(), &[folder.join("")]);
        assert!(why.contains("not below a folder"), "{name}: {why}");
    }
    let path = folder.join("missing.qcow2");
    make(&path, MIB, Some(("json:{\"driver\":\"nbd\"}", "raw")));
    assert!(matches!(open_over(&path, options(), &[folder.join("")]).err(), Some(OpenError::Open { .. })));
    let why = refused(&top, options(), &[folder.join("nowhere")]);
    assert!(why.contains("nowhere"), "{why}");
}

#[test]
fn the_format_behind_an_image_is_stated_and_chains_end() {
    let folder = TempDir::new();
    let allowed = [folder.join("")];
    fs::write(folder.join("base.raw"), vec![1; MIB as usize]).unwrap();
    let path = folder.join("other.qcow2");
    make(&path, MIB, Some(("base.raw", "vmdk")));
    assert!(refused(&path, options(), &allowed).contains("vmdk"));
    // The name of the format is an extension of the header (0xe2792aca); without, nobody guesses.
    let path = folder.join("silent.qcow2");
    make(&path, MIB, Some(("base.raw", "raw")));
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(4).position(|bytes| bytes == 0xe279_2aca_u32.to_be_bytes()).unwrap();
    bytes[at..at + 4].copy_from_slice(&0x7777_7777_u32.to_be_bytes());
    fs::write(&path, bytes).unwrap();
    assert!(refused(&path, options(), &allowed).contains("does not state the format"));
    let path = folder.join("itself.qcow2");
    make(&path, MIB, Some(("itself.qcow2", "qcow2")));
    let why = refused(&path, OpenOptions { lock: false, ..options() }, &allowed);
    assert!(why.contains("16th layer"), "{why}");
}

#[test]
fn an_image_is_locked_as_raw_ones_are() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, MIB, None);
    let _first = open(&path, options()).unwrap();
    assert!(matches!(open(&path, options()).err(), Some(OpenError::Locked { .. })));
    assert!(matches!(
        open(&path, OpenOptions { read_only: true, ..options() }).err(),
        Some(OpenError::Locked { .. })
    ));
    assert!(open(&path, OpenOptions { lock: false, ..options() }).is_ok());
}

#[test]
fn what_is_no_image_is_refused() {
    let folder = TempDir::new();
    let path = folder.join("raw");
    for bytes in
        [vec![], vec![0; 4096], b"QFI\xfb\x00\x00\x00\x04".to_vec(), b"QFI\xfb\x00\x00\x00\x03".to_vec()]
    {
        fs::write(&path, &bytes).unwrap();
        assert!(matches!(open(&path, options()).err(), Some(OpenError::BadImage { .. })), "{bytes:?}");
    }
    assert!(matches!(open(&folder.join(""), options()).err(), Some(OpenError::NotAnImage { .. })));
    assert!(matches!(open(&folder.join("none"), options()).err(), Some(OpenError::Open { .. })));
    // Its data would be in whatever file it names.
    let (image, data) = (folder.join("split.qcow2"), folder.join("data"));
    let storage = |path: &Path| File::create_open(StorageCreateOptions::new().filename(path)).unwrap();
    let builder = Qcow2::<File>::create_builder(storage(&image)).size(MIB);
    builder.data_file("data".to_owned(), storage(&data)).create().unwrap();
    assert!(refused(&image, options(), &[]).contains("another file"));
}

/// What holds an image together is looked at before it is written to: see `backend/qcow2/check.rs`. To read it, nothing of
/// that is needed.
#[test]
fn an_image_whose_counts_or_tables_are_nonsense_is_not_written_to() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    make(&path, 8 * MIB, None);
    write(&*open(&path, options()).unwrap(), 0, vec![1; 8192], true);
    let good = fs::read(&path).unwrap();
    let offset = |at: usize| u64::from_be_bytes(good[at..at + 8].try_into().unwrap()) as usize;
    let table = offset(48);
    let block = offset(table);
    for (why, at, bytes) in [
        ("too short for the disk", 24, (1u64 << 50).to_be_bytes()),
        ("is not within the file", 48, (1u64 << 40).to_be_bytes()),
        ("is not within the file", table, (1u64 << 40).to_be_bytes()),
        ("there twice", table + 8, (block as u64).to_be_bytes()),
        ("the header counts as free", block, [0; 8]),
        ("has no reference count", table, [0; 8]),
    ] {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&bytes);
        fs::write(&path, bad).unwrap();
        let refusal = refused(&path, options(), &[]);
        assert!(refusal.contains(why), "{why}: {refusal}");
    }
    fs::write(&path, &good).unwrap();
    open(&path, options()).unwrap();
}

/// Every byte of header and tables, changed in many ways: an error or a disk with wrong contents, never a panic of ours, never
/// a hang.
#[test]
fn a_corrupt_image_gives_errors() {
    let folder = TempDir::new();
    let path = folder.join("disk.qcow2");
    let storage = File::create_open(StorageCreateOptions::new().filename(&path)).unwrap();
    Qcow2::<File>::create_builder(storage).size(MIB).cluster_size(512).create().unwrap();
    write(&*open(&path, options()).unwrap(), 0, vec![1; 8192], true);
    let good = fs::read(&path).unwrap();
    let (done, end) = mpsc::channel();
    let work = thread::spawn(move || {
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |below: usize| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state % below as u64) as usize
        };
        let (mut opened, mut refused) = (0, 0);
        for round in 0..600 {
            let mut bytes = good.clone();
            // Most of it in the header.
            for _ in 0..1 + next(3) {
                let at = if round % 3 == 0 { next(bytes.len()) } else { next(104) };
                bytes[at] = [0, 1, 0x7f, 0x80, 0xff, next(256) as u8][next(6)];
            }
            if round % 7 == 0 {
                bytes.truncate(next(good.len()));
            }
            fs::write(&path, &bytes).unwrap();
            match open(&path, options()) {
                Ok(image) => {
                    opened += 1;
                    let mut payload = Payload::from_bytes(vec![0; 16384]);
                    let _ = image.read(0, &mut payload);
                    let mut payload = Payload::from_bytes(vec![2; 4096]);
                    let _ = image.write(4096, &mut payload, false);
                    let _ = image.write_zeroes(0, 4096, true, &wanted);
                    let _ = image.discard(8192, 4096);
                    let _ = image.flush();
                }
                Err(_) => refused += 1,
            }
        }
        assert!(opened > 20 && refused > 20, "{opened} opened, {refused} refused");
        let _ = done.send(());
    });
    let ended = end.recv_timeout(Duration::from_secs(60));
    assert!(ended.is_ok() || work.is_finished(), "an image that is never done with");
    work.join().unwrap();
}
