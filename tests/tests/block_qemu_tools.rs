//! QEMU's own tools as a second opinion of our disks: images that they made are read and written by ours, and afterwards
//! `qemu-img check` finds no fault, `qemu-img compare` and `qemu-io` find every byte where a model of the disk has it.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use backplane_tests::failure::Failure;
use backplane_tests::scratch::Scratch;
use backplane_tests::skip;
use virtio_block::Format;
use virtio_block::backend::{Image, OpenOptions, Payload, open_over};

const KIB: usize = 1 << 10;
const DISK: usize = 8 << 20;

/// A tool of QEMU's, where the machine has it.
fn tool(test: &str, name: &str) -> Option<PathBuf> {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).map(|folder| folder.join(name)).find(|path| path.is_file());
    if found.is_none() {
        skip::tell(test, &format!("{name} is not on this machine (Debian: qemu-utils)"));
    }
    found
}

fn run(program: &Path, arguments: &[&str]) -> Result<String, Failure> {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output = output.map_err(Failure::io(format_args!("run {}", program.display())))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    if output.status.success() && !text.contains("Pattern verification failed") {
        return Ok(text);
    }
    let errors = String::from_utf8_lossy(&output.stderr);
    Err(Failure::new(format!("{} {arguments:?}: {text}{errors}", program.display())))
}

/// The same numbers in each run.
struct Dice(u64);

impl Dice {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Does this and that to a disk and to its model; they have to be alike all the time.
fn use_both(image: &dyn Image, model: &mut [u8], seed: u64) -> Result<(), Failure> {
    let failed = |what: &'static str| move |error: std::io::Error| Failure::new(format!("{what}: {error}"));
    let mut dice = Dice(seed);
    for round in 0..400 {
        let len = 512 * (1 + dice.below([1, 8, 64, 300][round % 4]));
        let at = 512 * dice.below((DISK - len) / 512 + 1);
        let place = at..at + len;
        match dice.below(8) {
            0..3 => {
                let byte = 1 + dice.below(255) as u8;
                let mut from = Payload::from_bytes(vec![byte; len]);
                image.write(at as u64, &mut from, round % 50 == 0).map_err(failed("a write"))?;
                model[place].fill(byte);
            }
            kind @ (3 | 4) => {
                image.write_zeroes(at as u64, len as u64, kind == 3, &|| true).map_err(failed("zeros"))?;
                model[place].fill(0);
            }
            5 => {
                // What is there then is the image's choice.
                match image.discard(at as u64, len as u64) {
                    Err(error) if error.kind() == std::io::ErrorKind::Unsupported => {}
                    other => other.map_err(failed("a discard"))?,
                }
                let mut to = Payload::from_bytes(vec![0; len]);
                image.read(at as u64, &mut to).map_err(failed("a read"))?;
                model[place].copy_from_slice(&to.into_bytes());
            }
            _ => {
                let mut to = Payload::from_bytes(vec![0; len]);
                image.read(at as u64, &mut to).map_err(failed("a read"))?;
                assert!(to.into_bytes() == model[place], "{len} bytes at {at} in round {round}");
            }
        }
    }
    image.flush().map_err(failed("a flush"))
}

#[test]
fn block_qemu_finds_our_qcow2_images_whole() -> Result<(), Failure> {
    let test = "block_qemu_finds_our_qcow2_images_whole";
    let (Some(qemu_img), Some(qemu_io)) = (tool(test, "qemu-img"), tool(test, "qemu-io")) else {
        return Ok(());
    };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let path = |name: &str| scratch.join(name).display().to_string();
    let (base, raw) = (path("base.raw"), path("model.raw"));
    let below: Vec<u8> = (0..DISK / 2).map(|at| (at / 512 % 251) as u8).collect();
    fs::write(&base, &below).map_err(Failure::io("write a disk"))?;
    let behind: &[&str] = &["-b", &base, "-F", "raw"];
    for (seed, (options, behind)) in [
        ("cluster_size=64k", &[][..]),
        ("cluster_size=512,refcount_bits=1", &[]),
        ("cluster_size=2M,lazy_refcounts=on", &[]),
        ("compat=0.10", &[]),
        ("cluster_size=4k,refcount_bits=64", behind),
    ]
    .into_iter()
    .enumerate()
    {
        let image = path(&format!("{seed}.qcow2"));
        let words = [&["create", "-q", "-f", "qcow2", "-o", options][..], behind, &[&image, "8M"]];
        run(&qemu_img, &words.concat())?;
        let mut model = vec![0; DISK];
        if !behind.is_empty() {
            model[..below.len()].copy_from_slice(&below);
        }
        // QEMU writes first, compressed where we never do.
        run(
            &qemu_io,
            &["-f", "qcow2", "-c", "write -P 0x5a 1M 64k", "-c", "write -c -P 0x33 2M 64k", &image],
        )
        .or_else(|_| {
            run(
                &qemu_io,
                &["-f", "qcow2", "-c", "write -P 0x5a 1M 64k", "-c", "write -P 0x33 2M 64k", &image],
            )
        })?;
        model[1024 * KIB..1088 * KIB].fill(0x5a);
        model[2048 * KIB..2112 * KIB].fill(0x33);
        for life in 0..2 {
            let opened = OpenOptions { format: Format::Qcow2, lock: true, ..OpenOptions::default() };
            let opened = open_over(Path::new(&image), opened, &[scratch.path().to_owned()]);
            let opened = opened.map_err(|error| Failure::new(format!("{options}: {error}")))?;
            use_both(&*opened, &mut model, 77 + 2 * seed as u64 + life)?;
        }
        // Leaks would be lost room; it is to be none of either.
        let check = run(&qemu_img, &["check", "-f", "qcow2", &image])?;
        assert!(check.contains("No errors were found"), "{options}: {check}");
        fs::write(&raw, &model).map_err(Failure::io("write the model"))?;
        run(&qemu_img, &["compare", "-f", "qcow2", "-F", "raw", &image, &raw])?;
        println!(
            "{test}: {options}{}: {}",
            behind.first().map_or("", |_| " over a raw file"),
            check.lines().next().unwrap_or_default()
        );
    }
    Ok(())
}

#[test]
fn block_qemu_reads_what_we_write_to_raw_images() -> Result<(), Failure> {
    let test = "block_qemu_reads_what_we_write_to_raw_images";
    let Some(qemu_io) = tool(test, "qemu-io") else { return Ok(()) };
    let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
    let path = scratch.join("disk.raw");
    fs::write(&path, vec![0; DISK]).map_err(Failure::io("write a disk"))?;
    let image = path.display().to_string();
    run(&qemu_io, &["-f", "raw", "-c", "write -P 0x11 64k 64k", "-c", "write -P 0x22 1M 512", &image])?;
    let mut model = vec![0; DISK];
    model[64 * KIB..128 * KIB].fill(0x11);
    model[1024 * KIB..1024 * KIB + 512].fill(0x22);
    {
        let opened = open_over(&path, OpenOptions { lock: true, ..OpenOptions::default() }, &[]);
        use_both(&*opened.map_err(|error| Failure::new(error.to_string()))?, &mut model, 5)?;
    }
    // Runs of one byte, as qemu-io checks them.
    let mut commands = Vec::new();
    let mut at = 0;
    while at < DISK && commands.len() < 200 {
        let byte = model[at];
        let len = model[at..].iter().position(|next| *next != byte).unwrap_or(DISK - at);
        commands.push(format!("read -P {byte} {at} {len}"));
        at += len;
    }
    let words: Vec<&str> = commands.iter().flat_map(|command| ["-c", command.as_str()]).collect();
    run(&qemu_io, &[&["-r", "-f", "raw"], words.as_slice(), &[image.as_str()]].concat())?;
    println!("{test}: qemu-io finds {} runs of bytes where the model has them", commands.len());
    Ok(())
}
