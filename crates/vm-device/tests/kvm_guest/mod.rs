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

use kvm_bindings::{KVM_CAP_SPLIT_IRQCHIP, kvm_enable_cap, kvm_segment, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::dispatch::VcpuIo;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend as _, GuestMemoryMmap};

mod code;
pub(crate) mod interrupts;
#[path = "../../../../tests/src/skip.rs"]
#[allow(unreachable_pub)]
mod skip;

pub(crate) use code::Code;

/// The program is over.
pub(crate) const DONE: u8 = 0xf4;
/// Where programs are loaded, in both modes.
pub(crate) const ORIGIN: u32 = 0x1000;
/// Where programs leave their results.
pub(crate) const RESULTS: u64 = 0x500;
const RAM: u64 = 640 << 10;
const STACK: u64 = 0x8000;
/// Longer than any program takes.
const DEADLINE: Duration = Duration::from_secs(120);

/// All of 4 GiB.
const FLAT: kvm_segment = kvm_segment {
    base: 0,
    limit: u32::MAX,
    selector: 0,
    type_: 0,
    present: 1,
    dpl: 0,
    db: 0,
    s: 1,
    l: 0,
    g: 1,
    avl: 0,
    unusable: 0,
    padding: 0,
};

/// Something that left the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    In(u16, Vec<u8>),
    Out(u16, Vec<u8>),
    Read(u64, Vec<u8>),
    Write(u64, Vec<u8>),
}

pub(crate) struct Machine {
    pub(crate) vm: Arc<VmFd>,
    pub(crate) ram: GuestMemoryMmap,
    vcpu: VcpuFd,
    pub(crate) exits: Vec<Exit>,
}

impl Machine {
    /// `None`, and the test is noted as skipped, where there is no KVM.
    pub(crate) fn new(test: &str) -> Option<Machine> {
        Machine::with(test, |vm| vm.create_irq_chip())
    }

    /// With the local APIC in the kernel only.
    pub(crate) fn split(test: &str) -> Option<Machine> {
        Machine::with(test, |vm| {
            let pins = [24, 0, 0, 0];
            let cap = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, args: pins, ..Default::default() };
            vm.enable_cap(&cap)
        })
    }

    fn with(test: &str, controllers: impl FnOnce(&VmFd) -> Result<(), kvm_ioctls::Error>) -> Option<Machine> {
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
        controllers(&vm).unwrap();
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

    /// Loads a program of 16 bits: real mode, all segments at 0; the data segment reaches over 4 GiB, as it does after a visit
    /// to protected mode.
    pub(crate) fn load16(&mut self, code: &Code) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        sregs.ds = kvm_segment { type_: 3, ..FLAT };
        self.vcpu.set_sregs(&sregs).unwrap();
        self.start(code);
    }

    /// Loads a program of 32 bits (protected mode, segments of 4 GiB, no paging). It has no table of segments and no interrupts:
    /// not every KVM that runs such code can deliver them to it.
    pub(crate) fn load32(&mut self, code: &Code) {
        let segment = |selector, type_| kvm_segment { selector, type_, db: 1, ..FLAT };
        let mut sregs = self.vcpu.get_sregs().unwrap();
        sregs.cs = segment(8, 11);
        let data = segment(16, 3);
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
    pub(crate) fn run(&mut self, io: &mut VcpuIo) {
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
                Ok(other) => {
                    let other = format!("{other:?}");
                    let regs = self.vcpu.get_regs().unwrap();
                    return Err(format!("the guest left by {other} at {:#x}", regs.rip));
                }
                Err(error) if error.errno() == libc_eintr() => {}
                Err(error) => return Err(format!("KVM_RUN: {error}")),
            }
        }
    }

    pub(crate) fn result8(&self, offset: u64) -> u8 {
        self.ram.read_obj(GuestAddress(RESULTS + offset)).unwrap()
    }

    pub(crate) fn result16(&self, offset: u64) -> u16 {
        self.ram.read_obj(GuestAddress(RESULTS + offset)).unwrap()
    }

    pub(crate) fn result32(&self, offset: u64) -> u32 {
        self.ram.read_obj(GuestAddress(RESULTS + offset)).unwrap()
    }

    /// What the guest did, on standard error past the harness, which shows what tests print only if they fail.
    pub(crate) fn tell(&self, test: &str, found: &str) {
        let mut text = format!("{test}: ");
        let hex =
            |data: &[u8]| data.iter().rev().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
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
