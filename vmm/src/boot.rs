//! Puts Linux into memory as its PVH entry point wants it (arch/x86/platform/pvh in Linux; `hvm_start_info` in Xen's
//! public/arch-x86/hvm/start_info.h): an uncompressed kernel (`vmlinux`), an initramfs, a command line, a memory map, and where
//! ACPI's root pointer is. The boot processor starts there with 32 bits and without paging.

use std::fs::{self, File};
use std::path::Path;

use linux_loader::configurator::pvh::PvhBootConfigurator;
use linux_loader::configurator::{BootConfigurator, BootParams};
use linux_loader::loader::elf::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use linux_loader::loader::elf::{Elf, PvhBootCapability};
use linux_loader::loader::{Cmdline, KernelLoader, load_cmdline};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

use crate::layout::{
    ACPI, COMMAND_LINE, COMMAND_LINE_LEN, ECAM, HIGH_RAM, LOW_RAM_END, MEMORY_MAP, MODULES, START_INFO,
};
use crate::{Result, acpi};

const START_MAGIC: u32 = 0x336e_c578;
const PAGE: u64 = 0x1000;

/// Kinds of memory, as the map has them.
const RAM: u32 = 1;
const RESERVED: u32 = 2;

/// What to boot.
pub(crate) struct Software<'a> {
    pub(crate) kernel: &'a Path,
    pub(crate) initramfs: Option<&'a Path>,
    pub(crate) command_line: &'a str,
    pub(crate) cpus: u8,
    pub(crate) last_bus: u8,
}

/// Loads it all; where the boot processor starts.
pub(crate) fn load(ram: &GuestMemoryMmap, software: &Software<'_>) -> Result<GuestAddress> {
    let shown = software.kernel.display();
    let mut kernel = File::open(software.kernel).map_err(|error| format!("{shown}: {error}"))?;
    let loaded = Elf::load(ram, None, &mut kernel, Some(GuestAddress(HIGH_RAM)))
        .map_err(|error| format!("{shown} cannot be loaded: {error}; it has to be a vmlinux"))?;
    let PvhBootCapability::PvhEntryPresent(entry) = loaded.pvh_boot_cap else {
        return Err(format!("{shown} has no PVH entry point: build it with CONFIG_PVH").into());
    };
    let end = ram.last_addr().0 + 1;
    let mut start = hvm_start_info {
        magic: START_MAGIC,
        version: 1,
        cmdline_paddr: COMMAND_LINE,
        rsdp_paddr: ACPI,
        memmap_paddr: MEMORY_MAP,
        ..Default::default()
    };
    let mut modules = Vec::new();
    if let Some(path) = software.initramfs {
        let data = fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
        let size = data.len() as u64;
        // As high as it can be, out of the kernel's way.
        let at = end.checked_sub(size).map(|at| at & !(PAGE - 1)).filter(|at| *at >= loaded.kernel_end);
        let at = at.ok_or("there is not enough memory for the initramfs")?;
        ram.write_slice(&data, GuestAddress(at))?;
        modules.push(hvm_modlist_entry { paddr: at, size, ..Default::default() });
        start.nr_modules = 1;
        start.modlist_paddr = MODULES;
    }
    let range = |addr, end: u64, type_| hvm_memmap_table_entry { addr, size: end - addr, type_, reserved: 0 };
    let map = [
        range(0, LOW_RAM_END, RAM),
        range(ACPI, HIGH_RAM, RESERVED),
        range(HIGH_RAM, end, RAM),
        range(ECAM, ECAM + (u64::from(software.last_bus) + 1) * vm_device::pci::ECAM_BUS, RESERVED),
    ];
    start.memmap_entries = u32::try_from(map.len())?;
    let mut parameters = BootParams::new(&start, GuestAddress(START_INFO));
    parameters.set_sections(&map, GuestAddress(MEMORY_MAP));
    if !modules.is_empty() {
        parameters.set_modules(&modules, GuestAddress(MODULES));
    }
    PvhBootConfigurator::write_bootparams(&parameters, ram)?;
    let mut command_line = Cmdline::new(COMMAND_LINE_LEN)?;
    command_line.insert_str(software.command_line)?;
    load_cmdline(ram, GuestAddress(COMMAND_LINE), &command_line)?;
    ram.write_slice(&acpi::tables(software.cpus, software.last_bus)?, GuestAddress(ACPI))?;
    Ok(entry)
}
