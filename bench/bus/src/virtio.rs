//! Registers of virtio-mmio, and of the common configuration of virtio over PCI, beside a bare `match` over the same offsets,
//! through the same dispatch.
//!
//! The device does nothing and its driver is ready: status 15, no interrupt pending.
use std::hint::black_box;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, Ordering};
use std::time::Duration;

use reactor::Mail;
use vm_device::DeviceMmio;
use vm_device::bus::{MmioAddress, MmioAddressOffset, MmioRange};
use vm_device::device_manager::{IoManager, MmioManager};
use vm_device::dispatch::VcpuIo;
use vm_virtio::transport::mmio::{MAGIC, Mmio, VERSION};
use vm_virtio::transport::pci::Pci;
use vm_virtio::transport::{Line, Options};
use vm_virtio::{
    DeviceError, DeviceType, Features, HostEvent, HostEvents, Lane, LaneRunner, QueueSpec, VirtioDevice,
    Worker,
};

use crate::{Effort, ratio, shown, thread_time};

const TARGET: f64 = 1.2;

/// A register: where it is, how wide, and what is written to it; none: it is read.
type Register = (&'static str, u64, usize, Option<u32>);

const MMIO: &[Register] = &[
    ("MagicValue", 0x000, 4, None),
    ("InterruptStatus", 0x060, 4, None),
    ("InterruptACK", 0x064, 4, Some(1)),
    ("Status", 0x070, 4, None),
    ("ConfigGeneration", 0x0fc, 4, None),
    ("QueueSel", 0x030, 4, Some(0)),
    ("QueueReady", 0x044, 4, None),
];

const PCI: &[Register] = &[
    ("device_feature", 4, 4, None),
    ("config_msix_vector", 16, 2, None),
    ("num_queues", 18, 2, None),
    ("device_status", 20, 1, None),
    ("config_generation", 21, 1, None),
    ("queue_select", 22, 2, Some(0)),
    ("queue_size", 24, 2, None),
    ("queue_msix_vector", 26, 2, None),
    ("queue_enable", 28, 2, None),
    ("queue_notify_off", 30, 2, None),
    ("queue_desc", 32, 4, None),
    ("queue_reset", 58, 2, None),
    ("ISR status", 0x40, 1, None),
];

const TYPE: DeviceType = DeviceType(4);
const VENDOR: u32 = 0x4b42;
const MAX: u16 = 64;
const LIVE: u32 = 15;

/// The least that a device with these registers can be.
#[derive(Default)]
struct BareMmio {
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

impl DeviceMmio for BareMmio {
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

/// As little, with the fields of PCI.
#[derive(Default)]
struct BarePci {
    device_feature_select: AtomicU32,
    driver_feature_select: AtomicU32,
    driver_feature: AtomicU32,
    config_vector: AtomicU16,
    status: AtomicU8,
    generation: AtomicU8,
    queue_select: AtomicU16,
    queue_size: AtomicU16,
    queue_vector: AtomicU16,
    queue_enable: AtomicU16,
    queue_reset: AtomicU16,
    addresses: [AtomicU32; 6],
    isr: AtomicU8,
}

impl DeviceMmio for BarePci {
    fn mmio_read(&self, _: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        let value = match (offset, data.len()) {
            (0, 4) => self.device_feature_select.load(Ordering::Relaxed),
            (4, 4) => self.device_feature_select.load(Ordering::Relaxed) & 1,
            (8, 4) => self.driver_feature_select.load(Ordering::Relaxed),
            (12, 4) => self.driver_feature.load(Ordering::Relaxed),
            (16, 2) => self.config_vector.load(Ordering::Relaxed).into(),
            (18, 2) => 1,
            (20, 1) => self.status.load(Ordering::Relaxed).into(),
            (21, 1) => self.generation.load(Ordering::Relaxed).into(),
            (22, 2) => self.queue_select.load(Ordering::Relaxed).into(),
            (24, 2) => self.queue_size.load(Ordering::Relaxed).into(),
            (26, 2) => self.queue_vector.load(Ordering::Relaxed).into(),
            (28, 2) => self.queue_enable.load(Ordering::Relaxed).into(),
            (30, 2) => self.queue_select.load(Ordering::Relaxed).into(),
            (32 | 36 | 40 | 44 | 48 | 52, 4) => {
                self.addresses[(offset - 32) as usize / 4].load(Ordering::Relaxed)
            }
            (58, 2) => self.queue_reset.load(Ordering::Relaxed).into(),
            (0x40, 1) => self.isr.swap(0, Ordering::AcqRel).into(),
            _ => 0,
        };
        let [a, b, c, d] = value.to_le_bytes();
        match data {
            [one] => *one = a,
            [one, two] => (*one, *two) = (a, b),
            [one, two, three, four] => (*one, *two, *three, *four) = (a, b, c, d),
            _ => data.fill(0),
        }
    }

    fn mmio_write(&self, _: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        match (offset, data) {
            (22, &[low, high]) => self.queue_select.store(u16::from_le_bytes([low, high]), Ordering::Relaxed),
            (24, &[low, high]) => self.queue_size.store(u16::from_le_bytes([low, high]), Ordering::Relaxed),
            (26, &[low, high]) => self.queue_vector.store(u16::from_le_bytes([low, high]), Ordering::Relaxed),
            (58, &[low, high]) => self.queue_reset.store(u16::from_le_bytes([low, high]), Ordering::Relaxed),
            (28, &[low, high]) => self.queue_enable.store(u16::from_le_bytes([low, high]), Ordering::Relaxed),
            (20, &[status]) => self.status.store(status, Ordering::Relaxed),
            _ => {}
        }
    }
}

/// The BAR of virtio over PCI, on the bus by itself.
struct Bar(Pci<Idle>);

impl DeviceMmio for Bar {
    fn mmio_read(&self, _: MmioAddress, offset: MmioAddressOffset, data: &mut [u8]) {
        self.0.read(offset, data);
    }

    fn mmio_write(&self, _: MmioAddress, offset: MmioAddressOffset, data: &[u8]) {
        self.0.write(offset, data);
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

/// What a driver writes until it is ready: offset, width, value.
type Steps = [(u64, usize, u32); 7];

/// DriverFeatures: VERSION_1.
const MMIO_STEPS: Steps = [
    (0x070, 4, 0),
    (0x070, 4, 1),
    (0x070, 4, 3),
    (0x024, 4, 1),
    (0x020, 4, 1),
    (0x070, 4, 11),
    (0x070, 4, LIVE),
];
const PCI_STEPS: Steps =
    [(20, 1, 0), (20, 1, 1), (20, 1, 3), (8, 4, 1), (12, 4, 1), (20, 1, 11), (20, 1, LIVE)];

/// Brings a device up.
fn go(device: &dyn DeviceMmio, lanes: &mut [LaneRunner<Idle>], steps: &Steps) {
    for (offset, width, value) in steps {
        device.mmio_write(MmioAddress(OURS), *offset, &value.to_le_bytes()[..*width]);
        while lanes.iter_mut().any(|lane| lane.turn(Some(Duration::ZERO))) {}
    }
    let [(status, width, _), ..] = steps;
    let mut data = [0; 4];
    device.mmio_read(MmioAddress(OURS), *status, &mut data[..*width]);
    assert_eq!(u32::from_le_bytes(data), LIVE);
}

fn options() -> Options {
    let mut options = Options::new(Arc::new(Nobody));
    options.patience = Duration::ZERO;
    options
}

type Device = Arc<dyn DeviceMmio + Send + Sync>;

/// A bare device and ours, with a driver that is ready, and the lanes of ours.
type Pair = (Device, Device, Vec<LaneRunner<Idle>>);

fn mmio() -> Pair {
    let bare = BareMmio::default();
    bare.status.store(LIVE, Ordering::Relaxed);
    let (ours, mut lanes) = Mmio::new(Idle, options(), VENDOR, Arc::new(Nobody)).expect("a device");
    go(&ours, &mut lanes, &MMIO_STEPS);
    (Arc::new(bare), Arc::new(ours), lanes)
}

fn pci() -> Pair {
    let bare = BarePci::default();
    bare.status.store(LIVE as u8, Ordering::Relaxed);
    let (ours, mut lanes) = Pci::new(Idle, options(), 2).expect("a device");
    let ours = Bar(ours);
    go(&ours, &mut lanes, &PCI_STEPS);
    (Arc::new(bare), Arc::new(ours), lanes)
}

const BARE: u64 = 0xd000_0000;
const OURS: u64 = 0xd000_4000;
const SIZE: u64 = 0x4000;

/// Nanoseconds of an access to a register of `W` bytes.
fn lap<const W: usize>(vcpu: &mut VcpuIo, address: u64, written: Option<u32>, accesses: usize) -> f64 {
    let begin = thread_time();
    match written {
        Some(value) => {
            for _ in 0..accesses {
                let address = MmioAddress(black_box(address));
                let value = black_box(value).to_le_bytes();
                vcpu.mmio_write(address, value.first_chunk::<W>().expect("at most 4")).expect("a device");
            }
        }
        None => {
            for _ in 0..accesses {
                let mut data = [0; W];
                vcpu.mmio_read(MmioAddress(black_box(address)), &mut data).expect("a device");
                black_box(data);
            }
        }
    }
    (thread_time() - begin) / accesses as f64
}

pub fn table(effort: Effort) -> usize {
    println!(
        "\nnanoseconds of an access to a register of virtio-mmio, and of virtio over PCI, with a vCPU's handle, beside a bare \
         `match`\nbehind the same handle; nothing is pending. Target of the ratio {TARGET}, ! if missed\n"
    );
    println!("| register           | bare match    | ours          | ratio  |");
    println!("|--------------------|---------------|---------------|--------|");
    rows(effort, MMIO, mmio) + rows(effort, PCI, pci)
}

fn rows(effort: Effort, registers: &[Register], pair: fn() -> Pair) -> usize {
    let mut times: Vec<[Vec<f64>; 2]> = vec![Default::default(); registers.len()];
    for set in 0..effort.sets {
        let displaced = vec![0u8; set * 1040];
        let (bare, ours, _lanes) = pair();
        let mut manager = IoManager::new();
        let range = |base| MmioRange::new(MmioAddress(base), SIZE).expect("it is one");
        manager.register_mmio(range(BARE), bare).expect("it is free");
        manager.register_mmio(range(OURS), ours).expect("it is free");
        let mut vcpu = manager.vcpu();
        black_box(&displaced);
        for ((_, offset, width, written), times) in registers.iter().zip(&mut times) {
            let mut lap = |base| {
                let lap = [lap::<1>, lap::<2>, lap::<4>][width.ilog2() as usize];
                lap(&mut vcpu, base + offset, *written, effort.accesses)
            };
            let _warm = [BARE, OURS].map(&mut lap);
            for round in 0..effort.rounds {
                for i in 0..2 {
                    // Who comes first takes turns.
                    let i = (i + round) % 2;
                    times[i].push(lap([BARE, OURS][i]));
                }
            }
        }
    }
    let mut missed = 0;
    for ((name, ..), [bare, ours]) in registers.iter().zip(&mut times) {
        let ratio = ratio(ours, bare);
        let met = ratio <= TARGET;
        missed += usize::from(!met);
        let mark = if met { "  " } else { " !" };
        println!("| {name:<18} | {:<13} | {:<13} | {ratio:.2}{mark} |", shown(bare), shown(ours));
    }
    missed
}
