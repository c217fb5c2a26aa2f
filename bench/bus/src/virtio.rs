//! Registers of virtio-mmio beside a bare `match` over the same offsets, through the same dispatch.
//!
//! The device does nothing and its driver is ready: status 15, no interrupt pending.
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use reactor::Mail;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_device::dispatch::VcpuIo;
use vm_virtio::transport::mmio::{MAGIC, Mmio, VERSION};
use vm_virtio::transport::{Line, Options};
use vm_virtio::{
    DeviceError, DeviceType, Features, HostEvent, HostEvents, Lane, LaneRunner, QueueSpec, VirtioDevice,
    Worker,
};

use crate::{Effort, ratio, shown, thread_time};

const TARGET: f64 = 1.2;

/// Registers, and what is written to them; none: they are read.
const REGISTERS: [(&str, u64, Option<u32>); 7] = [
    ("MagicValue", 0x000, None),
    ("InterruptStatus", 0x060, None),
    ("InterruptACK", 0x064, Some(1)),
    ("Status", 0x070, None),
    ("ConfigGeneration", 0x0fc, None),
    ("QueueSel", 0x030, Some(0)),
    ("QueueReady", 0x044, None),
];

const TYPE: DeviceType = DeviceType(4);
const VENDOR: u32 = 0x4b42;
const MAX: u16 = 64;
const LIVE: u32 = 15;

/// The least that a device with these registers can be.
#[derive(Default)]
struct Bare {
    features_sel: AtomicU32,
    driver_features_sel: AtomicU32,
    driver_features: AtomicU32,
    queue_sel: AtomicU32,
    queue_size: AtomicU32,
    queue_ready: AtomicU32,
    interrupt_status: AtomicU32,
    status: AtomicU32,
    addresses: [AtomicU32; 6],
    generation: AtomicU32,
}

impl DeviceMmio for Bare {
    fn mmio_read(&self, _: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let Ok(data) = <&mut [u8; 4]>::try_from(data) else { return };
        let value = match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => TYPE.0,
            0x00c => VENDOR,
            0x010 => self.features_sel.load(Ordering::Relaxed),
            0x034 => u32::from(MAX),
            0x044 => self.queue_ready.load(Ordering::Relaxed),
            0x060 => self.interrupt_status.load(Ordering::Relaxed),
            0x070 => self.status.load(Ordering::Relaxed),
            0x0fc => self.generation.load(Ordering::Relaxed),
            _ => 0,
        };
        *data = value.to_le_bytes();
    }

    fn mmio_write(&self, _: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        let Ok(data) = data.try_into() else { return };
        let value = u32::from_le_bytes(data);
        let register = match offset {
            0x014 => &self.features_sel,
            0x020 => &self.driver_features,
            0x024 => &self.driver_features_sel,
            0x030 => &self.queue_sel,
            0x038 => &self.queue_size,
            0x044 => &self.queue_ready,
            0x064 => {
                let left = self.interrupt_status.load(Ordering::Relaxed) & !value;
                return self.interrupt_status.store(left, Ordering::Relaxed);
            }
            0x070 => &self.status,
            0x080 => &self.addresses[0],
            0x084 => &self.addresses[1],
            0x090 => &self.addresses[2],
            0x094 => &self.addresses[3],
            0x0a0 => &self.addresses[4],
            0x0a4 => &self.addresses[5],
            _ => return,
        };
        register.store(value, Ordering::Relaxed);
    }
}

/// A device that does nothing.
struct Idle;

impl VirtioDevice for Idle {
    type Worker = Idle;
    fn device_type(&self) -> DeviceType {
        TYPE
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "requests", max_size: MAX, lane: 0 }]
    }
    fn workers(&mut self, _: &[Mail<()>]) -> Result<Vec<Idle>, DeviceError> {
        Ok(vec![Idle])
    }
}

impl Worker for Idle {
    type Msg = ();
    fn queue_ready(&mut self, _: u16, _: &mut Lane<'_>) -> Result<(), DeviceError> {
        Ok(())
    }
}

struct Nobody;

impl HostEvents for Nobody {
    fn event(&self, _: HostEvent) {}
}

impl Line for Nobody {
    fn set(&self, _: bool) {}
}

/// Ours, with a driver that is ready.
fn ours() -> (Arc<Mmio<Idle>>, Vec<LaneRunner<Idle>>) {
    let mut options = Options::new(Arc::new(Nobody));
    options.patience = Duration::ZERO;
    let (mmio, mut lanes) = Mmio::new(Idle, options, VENDOR, Arc::new(Nobody)).expect("a device");
    // DriverFeatures: VERSION_1.
    let steps = [(0x070, 0), (0x070, 1), (0x070, 3), (0x024, 1), (0x020, 1), (0x070, 11), (0x070, LIVE)];
    for (offset, value) in steps {
        mmio.write(offset, &u32::to_le_bytes(value));
        while lanes.iter_mut().any(|lane| lane.turn(Some(Duration::ZERO))) {}
    }
    (Arc::new(mmio), lanes)
}

const BARE: u64 = 0xd000_0000;
const OURS: u64 = 0xd000_2000;

fn lap(vcpu: &mut VcpuIo, address: u64, written: Option<u32>, accesses: usize) -> f64 {
    let begin = thread_time();
    match written {
        Some(value) => {
            for _ in 0..accesses {
                let address = MmioAddress(black_box(address));
                vcpu.mmio_write(address, &black_box(value).to_le_bytes()).expect("a device");
            }
        }
        None => {
            for _ in 0..accesses {
                let mut data = [0; 4];
                vcpu.mmio_read(MmioAddress(black_box(address)), &mut data).expect("a device");
                black_box(data);
            }
        }
    }
    (thread_time() - begin) / accesses as f64
}

pub fn table(effort: Effort) -> usize {
    println!(
        "\nnanoseconds of an access to a register of virtio-mmio with a vCPU's handle, beside a bare `match` behind the same \
         handle;\nnothing is pending. QueueReady takes a lock. Target of the ratio {TARGET}, ! if missed\n"
    );
    println!("| register         | bare match    | ours          | ratio  |");
    println!("|------------------|---------------|---------------|--------|");
    let mut times: [[Vec<f64>; 2]; REGISTERS.len()] = Default::default();
    for set in 0..effort.sets {
        let displaced = vec![0u8; set * 1040];
        let bare = Arc::new(Bare::default());
        bare.status.store(LIVE, Ordering::Relaxed);
        let (mmio, _lanes) = ours();
        let mut status = [0; 4];
        mmio.read(0x070, &mut status);
        assert_eq!(u32::from_le_bytes(status), LIVE);
        let mut manager = IoManager::new();
        let range = |base, size| MmioRange::new(MmioAddress(base), size).expect("it is one");
        manager.register_mmio(range(BARE, mmio.size()), bare).expect("it is free");
        manager.register_mmio(range(OURS, mmio.size()), mmio).expect("it is free");
        let mut vcpu = manager.vcpu();
        black_box(&displaced);
        for ((_, offset, written), times) in REGISTERS.iter().zip(&mut times) {
            for base in [BARE, OURS] {
                lap(&mut vcpu, base + offset, *written, effort.accesses);
            }
            for round in 0..effort.rounds {
                for i in 0..2 {
                    // Who comes first takes turns.
                    let i = (i + round) % 2;
                    let base = [BARE, OURS][i];
                    times[i].push(lap(&mut vcpu, base + offset, *written, effort.accesses));
                }
            }
        }
    }
    let mut missed = 0;
    for ((name, ..), [bare, ours]) in REGISTERS.iter().zip(&mut times) {
        let ratio = ratio(ours, bare);
        let met = ratio <= TARGET;
        missed += usize::from(!met);
        let mark = if met { "  " } else { " !" };
        println!("| {name:<16} | {:<13} | {:<13} | {ratio:.2}{mark} |", shown(bare), shown(ours));
    }
    missed
}
