//! A machine for guest programs of a few hundred bytes: one vCPU, 640 KiB of RAM, KVM's interrupt controllers, and whatever is
//! on the bus. Code of 16 and 32 bits only, which every KVM can run.
//!
//! A program ends by writing to [`DONE`]. What it leaves in RAM is what a test looks at, together with the exits that were seen.
#![allow(dead_code, reason = "each test program uses some of it")]

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use std::{process, thread};

use kvm_bindings::{kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::dispatch::VcpuIo;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

mod code;
#[path = "../../../../tests/src/skip.rs"]
#[allow(unreachable_pub)]
mod skip;

pub use code::Code;

/// The program is over.
pub const DONE: u8 = 0xf4;
/// Where programs are loaded, in both modes.
pub const ORIGIN: u32 = 0x1000;
/// Where programs leave their results.
pub const RESULTS: u64 = 0x500;
/// Where programs of 32 bits find a table of segments ([`CODE32`], [`DATA32`]), and its descriptor for `lgdt`.
pub const GDT: u32 = 0x600;
pub const GDT_DESCRIPTOR: u32 = 0x620;
pub const CODE32: u16 = 0x08;
pub const DATA32: u16 = 0x10;

const RAM: u64 = 640 << 10;
const STACK: u64 = 0x8000;
/// Longer than any program takes.
const DEADLINE: Duration = Duration::from_secs(30);

/// Something that left the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    In(u16, Vec<u8>),
    Out(u16, Vec<u8>),
    Read(u64, Vec<u8>),
    Write(u64, Vec<u8>),
}

pub struct Machine {
    pub vm: Arc<VmFd>,
    pub ram: GuestMemoryMmap,
    vcpu: VcpuFd,
    pub exits: Vec<Exit>,
}

impl Machine {
    /// `None`, and the test is noted as skipped, where there is no KVM.
    pub fn new(test: &str) -> Option<Machine> {
        let kvm = match Kvm::new() {
            Ok(kvm) => kvm,
            Err(error) => {
                skip::tell(test, &format!("needs /dev/kvm: {error}"));
                return None;
            }
        };
        let vm = kvm.create_vm().unwrap();
        // Intel's processors need three pages for real mode.
        vm.set_tss_address(0xfffb_d000).unwrap();
        vm.create_irq_chip().unwrap();
        let ram = GuestMemoryMmap::from_ranges(&[(GuestAddress(0), RAM as usize)]).unwrap();
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: RAM,
            userspace_addr: ram.get_host_address(GuestAddress(0)).unwrap() as u64,
        };
        // SAFETY: the region is mapped as large as it says, and `Machine` keeps it as long as the VM's file.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Some(Machine { vm: Arc::new(vm), ram, vcpu, exits: Vec::new() })
    }

    /// Loads a program of 16 bits (real mode, all segments at 0).
    pub fn load16(&mut self, code: &Code) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        self.vcpu.set_sregs(&sregs).unwrap();
        self.start(code);
    }

    /// Loads a program of 32 bits (protected mode, segments of 4 GiB, no paging).
    pub fn load32(&mut self, code: &Code) {
        // Null, code, data: base 0, limit 4 GiB, 32 bits, ring 0.
        let segments: [u64; 3] = [0, 0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff];
        for (at, segment) in (0..).zip(segments) {
            self.ram.write_obj(segment, GuestAddress(u64::from(GDT) + at * 8)).unwrap();
        }
        self.ram.write_obj(23_u16, GuestAddress(GDT_DESCRIPTOR.into())).unwrap();
        self.ram.write_obj(GDT, GuestAddress(u64::from(GDT_DESCRIPTOR) + 2)).unwrap();
        let segment = |selector, type_| kvm_segment {
            base: 0,
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            db: 1,
            s: 1,
            g: 1,
            ..Default::default()
        };
        let mut sregs = self.vcpu.get_sregs().unwrap();
        sregs.cs = segment(CODE32, 11);
        let data = segment(DATA32, 3);
        (sregs.ds, sregs.es, sregs.ss, sregs.fs, sregs.gs) = (data, data, data, data, data);
        sregs.cr0 |= 1;
        self.vcpu.set_sregs(&sregs).unwrap();
        self.start(code);
    }

    fn start(&mut self, code: &Code) {
        self.ram.write_slice(&code.bytes(), GuestAddress(ORIGIN.into())).unwrap();
        let mut regs = self.vcpu.get_regs().unwrap();
        (regs.rip, regs.rsp, regs.rflags) = (ORIGIN.into(), STACK, 2);
        self.vcpu.set_regs(&regs).unwrap();
        self.exits.clear();
    }

    /// Runs the program to its end. Accesses go to `io`.
    pub fn run(&mut self, io: &mut VcpuIo) {
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            let watchdog = scope.spawn(|| {
                let begun = Instant::now();
                while !over.load(Ordering::SeqCst) {
                    if begun.elapsed() > DEADLINE {
                        // A vCPU that goes round in circles can be stopped by nothing else.
                        let _ = writeln!(io::stderr(), "the guest program hangs");
                        process::abort();
                    }
                    thread::park_timeout(Duration::from_secs(1));
                }
            });
            let end = self.run_to_done(io);
            over.store(true, Ordering::SeqCst);
            watchdog.thread().unpark();
            if let Err(what) = end {
                panic!("{what}, after {:?}", self.exits);
            }
        });
    }

    fn run_to_done(&mut self, io: &mut VcpuIo) -> Result<(), String> {
        loop {
            // Unclaimed accesses are errors of the bus and everyday life for the guest.
            match self.vcpu.run() {
                Ok(VcpuExit::IoOut(port, _)) if port == u16::from(DONE) => return Ok(()),
                Ok(VcpuExit::IoOut(port, data)) => {
                    let _ = io.pio_write(PioAddress(port), data);
                    self.exits.push(Exit::Out(port, data.to_vec()));
                }
                Ok(VcpuExit::IoIn(port, data)) => {
                    let _ = io.pio_read(PioAddress(port), data);
                    self.exits.push(Exit::In(port, data.to_vec()));
                }
                Ok(VcpuExit::MmioWrite(address, data)) => {
                    let _ = io.mmio_write(MmioAddress(address), data);
                    self.exits.push(Exit::Write(address, data.to_vec()));
                }
                Ok(VcpuExit::MmioRead(address, data)) => {
                    let _ = io.mmio_read(MmioAddress(address), data);
                    self.exits.push(Exit::Read(address, data.to_vec()));
                }
                Ok(other) => return Err(format!("the guest left by {other:?}")),
                Err(error) if error.errno() == libc_eintr() => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        }
    }

    pub fn result8(&self, offset: u64) -> u8 {
        self.ram.read_obj(GuestAddress(RESULTS + offset)).unwrap()
    }

    pub fn result16(&self, offset: u64) -> u16 {
        self.ram.read_obj(GuestAddress(RESULTS + offset)).unwrap()
    }

    pub fn result32(&self, offset: u64) -> u32 {
        self.ram.read_obj(GuestAddress(RESULTS + offset)).unwrap()
    }

    /// What the guest did, on standard error past the harness, which shows what tests print only if they fail.
    pub fn tell(&self, test: &str, found: &str) {
        let mut text = format!("{test}: ");
        let hex = |data: &[u8]| data.iter().rev().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        for exit in self.exits.iter().take(12) {
            let _ = match exit {
                Exit::In(port, data) => write!(text, "in {port:#x} = {}, ", hex(data)),
                Exit::Out(port, data) => write!(text, "out {port:#x} = {}, ", hex(data)),
                Exit::Read(at, data) => write!(text, "read {at:#x} = {}, ", hex(data)),
                Exit::Write(at, data) => write!(text, "write {at:#x} = {}, ", hex(data)),
            };
        }
        let _ = writeln!(io::stderr(), "{text}{} exits in all; {found}", self.exits.len());
    }
}

fn libc_eintr() -> i32 {
    rustix::io::Errno::INTR.raw_os_error()
}
