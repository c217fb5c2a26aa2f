//! The block device as a vhost-user daemon: from the command line to devices.
mod disk;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vhost_device::{CommonArgs, EXIT_FAILURE, EXIT_USAGE, Identity, LimitArgs};
use virtio_block::{Aio, Block, Format, Image, OpenError, Options};

use disk::{Disk, Switch, WriteCache};

const IDENTITY: Identity = Identity {
    capabilities: &["read-only", "blk-file"],
    ..Identity::new("vhost-device-block", "block", env!("CARGO_PKG_VERSION"))
};

/// How long an image that is locked is waited for.
const LOCKED: Duration = Duration::from_secs(3);

/// Gives guests disks (virtio block device) over vhost-user
#[derive(clap::Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    /// File or block device with the disk: PATH, or path=PATH with any of readonly=on, format=, serial=, direct=on,
    /// cache=, block-size=, discard=, lock=, backing-dir= behind it, separated by commas, which go before the options below. Repeat
    /// it for several guests, a disk each
    #[arg(short = 'b', long, value_name = "DISK", required = true)]
    blk_file: Vec<String>,

    /// The guests cannot write
    #[arg(short, long)]
    read_only: bool,

    /// What is in the file; never guessed
    #[arg(long, value_enum, default_value_t)]
    format: Format,

    /// Folder below which a qcow2 image may name a file as the one behind it; repeat it for more [default: it may name none]
    #[arg(long, value_name = "FOLDER")]
    backing_dir: Vec<std::path::PathBuf>,

    /// Serial number, up to 20 characters [default: none]
    #[arg(long, value_name = "TEXT", default_value = "", hide_default_value = true)]
    serial: String,

    /// Queues of each disk: as many as the guest has CPUs is best
    #[arg(long, value_name = "N", default_value_t = 1)]
    num_queues: u16,

    /// Entries of each queue
    #[arg(long, value_name = "N", default_value_t = 256)]
    queue_size: u16,

    /// Bytes of a block as guests are told [default: what the image has, mostly 512]
    #[arg(long, value_name = "BYTES")]
    block_size: Option<u32>,

    /// The host caches nothing (O_DIRECT)
    #[arg(long)]
    direct: bool,

    /// Whether guests have to flush what they write, or each write is flushed before it is answered, unless the guest
    /// decides otherwise
    #[arg(long, value_enum, default_value_t)]
    cache: WriteCache,

    /// Whether guests may give ranges back to the storage (unmap), or are not offered that (ignore)
    #[arg(long, value_enum, default_value_t)]
    discard: disk::Discard,

    /// Keep others from writing to the image, and from reading it while it is written to, if they ask for locks as QEMU
    /// does
    #[arg(long, value_enum, default_value_t)]
    lock: Switch,

    /// How requests get to a raw image: auto serves what the host has cached at once and the rest by io_uring
    #[arg(long, value_enum, default_value_t)]
    aio: Aio,

    #[command(flatten)]
    limit: LimitArgs,

    #[command(flatten)]
    common: CommonArgs,
}

impl Args {
    /// The device of each guest.
    fn devices(&mut self) -> Result<Vec<Block>, Box<dyn std::error::Error>> {
        let mut disks =
            self.blk_file.iter().map(|text| Disk::parse(text, self)).collect::<Result<Vec<_>, _>>()?;
        // As many sockets as disks, if nothing is said of them.
        if let (2.., Some(_), None) = (disks.len(), &self.common.socket_path, self.common.socket_count) {
            self.common.socket_count = Some(u32::try_from(disks.len())?);
        }
        let guests = self.common.guest_count() as usize;
        if disks.len() == 1 && guests > 1 {
            let disk = disks.remove(0);
            if !disk.open.read_only && disk.open.lock {
                return Err(
                    "several guests would write to one disk; give each its own --blk-file, or start with \
                            --read-only, or with --lock off if the guests can cope"
                        .into(),
                );
            }
            disks = vec![disk; guests];
        }
        if disks.len() != guests {
            return Err(format!(
                "{} disks cannot be given to {guests} guests; give a --blk-file for each socket",
                disks.len()
            )
            .into());
        }
        self.limit.check(&self.common)?;
        let pool = Options::own_pool();
        let device = |(guest, disk): (u32, Disk)| -> Result<Block, Box<dyn std::error::Error>> {
            let image = open(&disk)?;
            let options = Options {
                read_only: disk.open.read_only,
                serial: disk.serial,
                num_queues: self.num_queues,
                queue_size: self.queue_size,
                block_size: disk.block_size,
                write_through: disk.cache == WriteCache::Writethrough,
                discard: disk.discard == disk::Discard::Unmap,
                aio: self.aio,
                limit: self.limit.of(vhost_device::GuestIndex(guest), &self.common)?,
                name: disk.path.display().to_string(),
                pool: pool.clone(),
            };
            Ok(Block::new(image, options)?)
        };
        (0..).zip(disks).map(device).collect()
    }
}

/// Opens the image of a disk. One that is locked is waited for a while: when a daemon was killed, its locks stay until the
/// kernel is done with what it was writing, and until then nobody else may write.
fn open(disk: &Disk) -> Result<Arc<dyn Image>, OpenError> {
    let deadline = Instant::now() + LOCKED;
    loop {
        match virtio_block::backend::open_over(&disk.path, disk.open, &disk.backing) {
            Err(OpenError::Locked { .. }) if Instant::now() < deadline => std::thread::sleep(LOCKED / 100),
            result => return result,
        }
    }
}

fn main() -> ExitCode {
    let mut args: Args = vhost_device::parse(&IDENTITY);
    let devices = match args.devices() {
        Ok(devices) => devices,
        Err(error) => {
            eprintln!("{}: {error}", IDENTITY.name);
            // That somebody else has the image is no mistake of the command line.
            let in_use = matches!(error.downcast_ref(), Some(OpenError::Locked { .. }));
            return ExitCode::from(if in_use { EXIT_FAILURE } else { EXIT_USAGE });
        }
    };
    let mut devices = devices.into_iter();
    vhost_device::run(&args.common, IDENTITY, |_guest| {
        devices.next().ok_or_else(|| vm_virtio::DeviceError::new("there are more guests than disks"))
    })
}
