//! A small VMM made of Backplane's crates: boots 64-bit Linux under KVM, on their buses, with their devices.
//!
//! It is for reading: how a VMM is put together. In the order of a machine's life:
//!
//! | module | what for |
//! |---|---|
//! | `layout` | where everything is |
//! | `memory` | the guest's RAM |
//! | `machine` | interrupt controllers, buses, root complex, devices; the loop beside the vCPUs |
//! | `virtio` | devices on either of the two buses |
//! | `serial`, `power`, `pic` | the legacy devices that it cannot do without |
//! | `acpi`, `boot` | what Linux is told, and how it starts |
//! | `power_on` | what a reset puts back |
//! | `vcpu` | exits of the guest become accesses of our buses |
//! | `commands` | cards that come and go |
//!
//! It is also the machine in which Linux's own drivers judge our buses and transports: see `tests/tests/guest_vmm.rs`.

mod acpi;
mod boot;
mod commands;
mod layout;
mod machine;
mod memory;
mod pic;
mod power;
mod power_on;
mod serial;
mod vcpu;
mod virtio;

use std::path::PathBuf;
use std::process::ExitCode;

use boot::Software;
use clap::Parser;
use machine::{LAST_BUS, Machine};
use power::End;
use virtio::DeviceSpec;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// A small VMM that boots Linux on Backplane's buses.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// Kernel: an uncompressed vmlinux with a PVH entry point (CONFIG_PVH)
    #[arg(long, value_name = "VMLINUX")]
    kernel: PathBuf,

    /// Initial file system, a cpio archive
    #[arg(long, value_name = "CPIO")]
    initramfs: Option<PathBuf>,

    /// The kernel's command line; virtio-mmio devices are added to it
    #[arg(long, value_name = "TEXT", default_value = "console=ttyS0 panic=-1")]
    append: String,

    /// Memory in MiB
    #[arg(long, value_name = "MIB", default_value_t = 256)]
    memory_mib: u32,

    /// Processors
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=16))]
    cpus: u8,

    /// A device behind virtio-mmio: rng, block=IMAGE, console=SOCKET or vsock=CID:SOCKET, with ,without=FEATURE+FEATURE...
    /// behind it; repeat it for more
    #[arg(long, value_name = "DEVICE")]
    mmio: Vec<DeviceSpec>,

    /// A device on the PCI bus; repeat it for more
    #[arg(long, value_name = "DEVICE")]
    pci: Vec<DeviceSpec>,

    /// Slots for PCI devices that come and go
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=16))]
    slots: u8,

    /// Named pipe for commands: plug SLOT DEVICE, unplug SLOT, pull SLOT, show, off
    #[arg(long, value_name = "PIPE")]
    commands: Option<PathBuf>,

    /// A guest that reboots ends
    #[arg(long)]
    no_reboot: bool,
}

fn run(args: &Args) -> Result<()> {
    let mut machine = Machine::new(args)?;
    let software = Software {
        kernel: &args.kernel,
        initramfs: args.initramfs.as_deref(),
        command_line: &format!("{}{}", args.append, machine.kernel_arguments()),
        cpus: args.cpus,
        last_bus: LAST_BUS,
    };
    loop {
        let entry = boot::load(&machine.ram, &software)?;
        match machine.run(entry)? {
            End::Reset if !args.no_reboot => machine.reset()?,
            _ => return Ok(()),
        }
    }
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("backplane-vmm: {error}");
            ExitCode::FAILURE
        }
    }
}
