//! Virtual CPUs: what they are made of, how the first one starts, and the loop that turns their exits into accesses of our buses.

use std::sync::Arc;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_msr_entry, kvm_regs, kvm_segment,
};
use kvm_ioctls::{Cap, Kvm, VcpuExit, VcpuFd, VmFd};
use vm_device::bus::{MmioAddress, PioAddress};
use vm_device::dispatch::VcpuIo;
use vm_device::legacy::IoApic;
use vm_memory::GuestAddress;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use crate::Result;
use crate::layout::START_INFO;
use crate::power::{End, Power};
use crate::power_on::Processor;

/// How long a vCPU has to leave the guest before it is asked again. It may be just about to enter it.
const ASK_AGAIN: Duration = Duration::from_millis(5);

/// The default memory type is write-back, and it counts (Intel SDM 3A, 12.11.2.1).
const MTRR_DEFAULT: kvm_msr_entry = kvm_msr_entry { index: 0x2ff, data: 1 << 11 | 6, reserved: 0 };

/// A vCPU's own ways to the devices.
pub(crate) struct Ways {
    pub(crate) io: VcpuIo,
    pub(crate) io_apic: Arc<IoApic>,
}

/// A vCPU that does not run.
pub(crate) struct Vcpu {
    id: u8,
    fd: VcpuFd,
    ways: Ways,
    power_on: Processor,
}

impl Vcpu {
    /// vCPU `id` of `count`. The others than the first wait until the guest starts them.
    pub(crate) fn new(kvm: &Kvm, vm: &VmFd, id: u8, count: u8, ways: Ways) -> Result<Vcpu> {
        let fd = vm.create_vcpu(id.into())?;
        fd.set_cpuid2(&cpuid(kvm, vm, id, count)?)?;
        fd.set_msrs(&Msrs::from_entries(&[MTRR_DEFAULT]).map_err(|error| format!("{error:?}"))?)?;
        let power_on = Processor::take(kvm, &fd)?;
        Ok(Vcpu { id, fd, ways, power_on })
    }

    /// As after power-on.
    pub(crate) fn reset(&self) -> Result<()> {
        self.power_on.put(&self.fd)
    }

    /// Lets this one, the first, start a kernel at its PVH entry point: flat segments, protected mode, no paging, EBX the start
    /// information.
    pub(crate) fn start_at(&self, entry: GuestAddress) -> Result<()> {
        let segment = |selector, type_, db, s| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            db,
            s,
            g: 1,
            ..Default::default()
        };
        let mut sregs = self.fd.get_sregs()?;
        sregs.cs = segment(0x08, 0xb, 1, 1);
        let data = segment(0x10, 0x3, 1, 1);
        (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
        sregs.tr = kvm_segment { limit: 0x67, g: 0, ..segment(0x18, 0xb, 0, 0) };
        sregs.cr0 = 0x11;
        sregs.cr4 = 0;
        self.fd.set_sregs(&sregs)?;
        Ok(self.fd.set_regs(&kvm_regs { rip: entry.0, rbx: START_INFO, rflags: 2, ..Default::default() })?)
    }

    /// Serves the guest until the run ends.
    fn run(&mut self, power: &Power) -> Result<()> {
        let Ways { io, io_apic } = &mut self.ways;
        while power.ended().is_none() {
            // The buses' errors are accesses that nobody answers: everyday life for a guest, which reads ones.
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => drop(io.pio_read(PioAddress(port), data)),
                Ok(VcpuExit::IoOut(port, data)) => drop(io.pio_write(PioAddress(port), data)),
                Ok(VcpuExit::MmioRead(address, data)) => drop(io.mmio_read(MmioAddress(address), data)),
                Ok(VcpuExit::MmioWrite(address, data)) => drop(io.mmio_write(MmioAddress(address), data)),
                Ok(VcpuExit::IoapicEoi(vector)) => io_apic.end_of_interrupt(vector),
                // A triple fault is how a PC is reset where all else fails.
                Ok(VcpuExit::Shutdown) => power.end(End::Reset),
                Ok(VcpuExit::Intr) => {}
                Ok(other) => return Err(format!("vCPU {} left the guest by {other:?}", self.id).into()),
                Err(error) if matches!(error.errno(), EINTR | EAGAIN) => {}
                Err(error) => return Err(format!("vCPU {}: {error}", self.id).into()),
            }
        }
        Ok(())
    }
}

const EINTR: i32 = rustix::io::Errno::INTR.raw_os_error();
const EAGAIN: i32 = rustix::io::Errno::AGAIN.raw_os_error();

/// What the guest is told of its processor: all that KVM can, and which of the cores it is.
fn cpuid(kvm: &Kvm, vm: &VmFd, id: u8, count: u8) -> Result<CpuId> {
    let mut cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let cores = u32::from(count);
    let bits = cores.next_power_of_two().trailing_zeros();
    let has_deadline = vm.check_extension(Cap::TscDeadlineTimer);
    cpuid.retain(|entry| entry.function != 0xb && entry.function != 0x8000_0026);
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => {
                entry.ebx = entry.ebx & 0x0000_ffff | u32::from(id) << 24 | cores << 16;
                // KVM has it whether it says so here or not.
                entry.ecx |= u32::from(has_deadline) << 24;
            }
            // AMD: this core, without threads beside it.
            0x8000_0008 => entry.ecx = bits << 12 | (cores - 1),
            0x8000_001e => (entry.eax, entry.ebx, entry.ecx) = (id.into(), id.into(), 0),
            _ => {}
        }
    }
    // Threads of a core (one), cores of the package.
    for (level, kind, shift, logical) in [(0, 1, 0, 1), (1, 2, bits, cores)] {
        cpuid
            .push(kvm_cpuid_entry2 {
                function: 0xb,
                index: level,
                // KVM_CPUID_FLAG_SIGNIFCANT_INDEX
                flags: 1,
                eax: shift,
                ebx: logical,
                ecx: kind << 8 | level,
                edx: id.into(),
                ..Default::default()
            })
            .map_err(|error| format!("CPUID: {error:?}"))?;
    }
    Ok(cpuid)
}

/// vCPUs that run, a thread each.
pub(crate) struct Running {
    threads: Vec<JoinHandle<(Vcpu, Result<()>)>>,
}

impl Running {
    /// Starts them. One that fails ends the run.
    pub(crate) fn start(vcpus: Vec<Vcpu>, power: &Arc<Power>) -> Result<Running> {
        // A signal without an effect gets a vCPU out of the guest.
        register_signal_handler(SIGRTMIN(), ignore)?;
        let mut threads = Vec::new();
        for mut vcpu in vcpus {
            let power = Arc::clone(power);
            let run = move || {
                let result = vcpu.run(&power);
                if result.is_err() {
                    power.end(End::Off);
                }
                (vcpu, result)
            };
            threads.push(thread::Builder::new().name(format!("vcpu{}", threads.len())).spawn(run)?);
        }
        Ok(Running { threads })
    }

    /// Waits for them, when the run has ended.
    pub(crate) fn stop(self) -> Result<Vec<Vcpu>> {
        let mut vcpus = Vec::new();
        for thread in self.threads {
            while !thread.is_finished() {
                thread.kill(SIGRTMIN())?;
                thread::sleep(ASK_AGAIN);
            }
            let (vcpu, result) = thread.join().map_err(|_| "a vCPU's thread panicked")?;
            result?;
            vcpus.push(vcpu);
        }
        Ok(vcpus)
    }
}

extern "C" fn ignore(_: i32, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
