//! A second opinion: drivers of the `virtio-drivers` crate over our registers. Its transports want registers at addresses;
//! this is its interface for transports, in terms of the register tables of 4.2.2 and 4.1.4.3, for any driver of it.
#![allow(unsafe_code)]

use std::ptr::NonNull;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PhysAddr, Result};
use vm_virtio::transport::Options;
use vm_virtio::{GuestAddress, LaneRunner, Worker};
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::TestRam;
use crate::transport::{Deaf, Kicks, RegisterAccess};

/// Guest memory of all these drivers in a process: the crate's memory functions know no device.
pub fn ram() -> &'static TestRam {
    static RAM: OnceLock<TestRam> = OnceLock::new();
    RAM.get_or_init(|| TestRam::new(&[(1 << 20, 16 << 20)]))
}

/// How a device is behind a transport here: on threads of its own, with this kind of kicks.
pub fn options(kicks: Kicks) -> Options {
    let mut options = Options::new(Arc::new(Deaf));
    (options.kicks, options.patience) = (kicks, Duration::from_secs(20));
    options
}

/// Gives each lane of a device a thread.
pub fn run<W: Worker>(lanes: Vec<LaneRunner<W>>) {
    for lane in lanes {
        drop(std::thread::spawn(move || lane.run()));
    }
}

/// Memory of [`ram`] for the crate's drivers.
#[derive(Debug)]
pub struct RamHal;

// SAFETY: pages come from the test's guest memory, which is never unmapped, each only once until it is given back.
unsafe impl Hal for RamHal {
    fn dma_alloc(pages: usize, _: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let len = pages * 4096;
        let addr = ram().alloc(len as u64, 4096);
        ram().write(addr, &vec![0; len]);
        let host = NonNull::new(ram().user_addr(addr) as *mut u8).expect("mapped memory");
        (addr.0, host)
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _: NonNull<u8>, _: usize) -> i32 {
        ram().free(GuestAddress(paddr));
        0
    }

    unsafe fn mmio_phys_to_virt(_: PhysAddr, _: usize) -> NonNull<u8> {
        unreachable!("for its own transports only")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _: BufferDirection) -> PhysAddr {
        // SAFETY: the caller's promise: valid, and nobody else's for now.
        let bytes = unsafe { buffer.as_ref() };
        let addr = ram().alloc(bytes.len() as u64, 8);
        ram().write(addr, bytes);
        addr.0
    }

    unsafe fn unshare(paddr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: the caller's promise: valid, and nobody else's for now.
            let bytes = unsafe { buffer.as_mut() };
            ram().read(GuestAddress(paddr), bytes);
        }
        ram().free(GuestAddress(paddr));
    }
}

/// Fields by their names in the standard.
#[derive(Debug)]
struct Fields {
    status: (u64, usize),
    device_features: [(u64, usize); 2],
    driver_features: [(u64, usize); 2],
    queue_select: (u64, usize),
    queue_max: (u64, usize),
    queue_size: (u64, usize),
    areas: [u64; 3],
    queue_ready: (u64, usize),
    generation: (u64, usize),
    config: u64,
}

static MMIO: Fields = Fields {
    status: (0x070, 4),
    device_features: [(0x014, 4), (0x010, 4)],
    driver_features: [(0x024, 4), (0x020, 4)],
    queue_select: (0x030, 4),
    queue_max: (0x034, 4),
    queue_size: (0x038, 4),
    areas: [0x080, 0x090, 0x0a0],
    queue_ready: (0x044, 4),
    generation: (0x0fc, 4),
    config: 0x100,
};

static PCI: Fields = Fields {
    status: (20, 1),
    device_features: [(0, 4), (4, 4)],
    driver_features: [(8, 4), (12, 4)],
    queue_select: (22, 2),
    queue_max: (24, 2),
    queue_size: (24, 2),
    areas: [32, 40, 48],
    queue_ready: (28, 2),
    generation: (21, 1),
    config: 0x2000,
};

/// A transport of the crate: registers of ours.
#[derive(Debug)]
pub struct Wired<R> {
    registers: R,
    fields: &'static Fields,
    is_pci: bool,
    device: DeviceType,
}

impl<R: RegisterAccess> Wired<R> {
    /// Over registers of virtio-mmio, for the crate's driver of this type of device.
    pub fn mmio(registers: R, device: DeviceType) -> Wired<R> {
        Wired { registers, fields: &MMIO, is_pci: false, device }
    }

    /// Over the BAR of virtio over PCI.
    pub fn pci(registers: R, device: DeviceType) -> Wired<R> {
        Wired { registers, fields: &PCI, is_pci: true, device }
    }

    fn load(&self, (at, width): (u64, usize)) -> u32 {
        let mut bytes = [0; 4];
        self.registers.load(at, &mut bytes[..width]);
        u32::from_le_bytes(bytes)
    }

    fn store(&self, (at, width): (u64, usize), value: u32) {
        self.registers.store(at, &value.to_le_bytes()[..width]);
    }
}

impl<R: RegisterAccess> Transport for Wired<R> {
    fn device_type(&self) -> DeviceType {
        self.device
    }

    fn read_device_features(&mut self) -> u64 {
        let [select, word] = self.fields.device_features;
        (0..2).fold(0, |all, n| {
            self.store(select, n);
            all | u64::from(self.load(word)) << (32 * n)
        })
    }

    fn write_driver_features(&mut self, features: u64) {
        let [select, word] = self.fields.driver_features;
        for n in 0..2 {
            self.store(select, n);
            self.store(word, (features >> (32 * n)) as u32);
        }
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.store(self.fields.queue_select, queue.into());
        self.load(self.fields.queue_max)
    }

    fn notify(&mut self, queue: u16) {
        match self.is_pci {
            true => self.store((0x1000 + 4 * u64::from(queue), 2), queue.into()),
            false => self.store((0x050, 4), queue.into()),
        }
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.load(self.fields.status))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.store(self.fields.status, status.bits());
    }

    fn set_guest_page_size(&mut self, _: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver: PhysAddr,
        device: PhysAddr,
    ) {
        self.store(self.fields.queue_select, queue.into());
        self.store(self.fields.queue_size, size);
        for (at, area) in self.fields.areas.into_iter().zip([descriptors, driver, device]) {
            self.store((at, 4), area as u32);
            self.store((at + 4, 4), (area >> 32) as u32);
        }
        self.store(self.fields.queue_ready, 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        // Over PCI there is no way but a reset.
        if !self.is_pci {
            self.store(self.fields.queue_select, queue.into());
            self.store(self.fields.queue_ready, 0);
            assert_eq!(self.load(self.fields.queue_ready), 0);
        } else {
            self.set_status(DeviceStatus::empty());
            while !self.get_status().is_empty() {}
        }
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.store(self.fields.queue_select, queue.into());
        self.load(self.fields.queue_ready) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        if self.is_pci {
            return InterruptStatus::from_bits_retain(self.load((0x40, 1)));
        }
        let events = self.load((0x060, 4));
        self.store((0x064, 4), events);
        InterruptStatus::from_bits_retain(events)
    }

    fn read_config_generation(&self) -> u32 {
        self.load(self.fields.generation)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(&self, offset: usize) -> Result<T> {
        let mut value = T::new_zeroed();
        self.registers.load(self.fields.config + offset as u64, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(&mut self, offset: usize, value: T) -> Result<()> {
        self.registers.store(self.fields.config + offset as u64, value.as_bytes());
        Ok(())
    }
}
