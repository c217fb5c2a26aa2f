//! A disk of known contents as a vhost-user daemon, for tests of what QEMU does with daemons.
//!
//! QEMU reconnects by itself to a lost back-end for few of its devices; its block device is one of them. This is not
//! Backplane's block device: it reads a fixed pattern, knows no other request, and exists for
//! `tests/guest_reconnect.rs` alone.

use std::process::ExitCode;
use std::sync::Arc;
use std::time::{Duration, Instant};

use clap::Parser;
use reactor::Token;
use vhost_device::{CommonArgs, Identity};
use vm_virtio::device::{DeviceError, Lane, QueueSpec, Stop, VirtioDevice, Worker};
use vm_virtio::{Chain, ConfigSpace, DeviceType, Features, Queue};

const IDENTITY: Identity = Identity::new("test-disk", "block", env!("CARGO_PKG_VERSION"));

/// Disk of known contents, for tests
#[derive(Parser)]
#[command(name = IDENTITY.name, version)]
struct Args {
    #[command(flatten)]
    common: CommonArgs,
}

const SECTORS: u64 = 2048;
const SECTOR: usize = 512;
/// `VIRTIO_BLK_T_IN`, the status values OK, IOERR and UNSUPP (5.2.6).
const IN: u32 = 0;
const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

struct Disk;

impl VirtioDevice for Disk {
    type Worker = Reader;

    fn device_type(&self) -> DeviceType {
        DeviceType::BLOCK
    }

    fn features(&self) -> Features {
        Features::empty()
    }

    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "requestq", max_size: 1024, lane: 0 }]
    }

    fn config(&self) -> Arc<ConfigSpace> {
        Arc::new(ConfigSpace::new(SECTORS.to_le_bytes().to_vec()))
    }

    fn workers(&mut self, _: &[reactor::Mail<()>]) -> Result<Vec<Reader>, DeviceError> {
        Ok(vec![Reader::default()])
    }
}

/// Answers are late, and the last request comes first, so that a daemon that is killed has requests out that no index
/// tells of.
#[derive(Default)]
struct Reader {
    held: Vec<Chain>,
}

const LATE: Duration = Duration::from_millis(1);

fn answer(queue: &mut Queue, chain: Chain) {
    let (mut reader, mut writer) = queue.split(&chain);
    let mut header = [0; 16];
    let whole = reader.read_exact(&mut header).is_ok();
    let [a, b, c, d, _, _, _, _, sector @ ..] = header;
    let mut status = if whole && u32::from_le_bytes([a, b, c, d]) == IN { OK } else { UNSUPP };
    let mut sector = u64::from_le_bytes(sector);
    while status == OK && writer.remaining() > 1 {
        // Each sector is full of the low byte of its number.
        if sector >= SECTORS || writer.write_all(&[sector.to_le_bytes()[0]; SECTOR]).is_err() {
            status = IOERR;
        }
        sector += 1;
    }
    while writer.remaining() > 1 {
        let rest = usize::try_from(writer.remaining() - 1).unwrap_or(SECTOR).min(SECTOR);
        writer.write(&[0; SECTOR][..rest]);
    }
    let _ = writer.write_all(&[status]);
    let written = writer.written();
    queue.add_used(chain, written);
}

impl Reader {
    /// Answers all but the oldest ones.
    fn answer(&mut self, keep: usize, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(0) else { return };
        for chain in self.held.drain(keep.min(self.held.len())..).rev() {
            answer(queue, chain);
        }
        if !self.held.is_empty() {
            lane.reactor.set_timer(Token::new(0), Instant::now() + LATE);
        }
    }
}

impl Worker for Reader {
    type Msg = ();

    fn queue_ready(&mut self, queue: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(queue) else { return Ok(()) };
        self.held.extend(queue.iter());
        self.answer(2, lane);
        Ok(())
    }

    fn timer(&mut self, _: Token, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        self.answer(0, lane);
        Ok(())
    }

    fn queue_stop(&mut self, _: u16, _: Stop, lane: &mut Lane<'_>) {
        self.answer(0, lane);
    }
}

fn main() -> ExitCode {
    let args: Args = vhost_device::parse(&IDENTITY);
    vhost_device::run(&args.common, IDENTITY, |_guest| Ok::<_, DeviceError>(Disk))
}
