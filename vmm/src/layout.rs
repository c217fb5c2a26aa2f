//! Where things are in the machine: addresses, ports and interrupt numbers (GSIs). Nothing overlaps; RAM ends below [`RAM_END`].

use std::ops::RangeInclusive;

/// What Linux's PVH entry point is handed (`hvm_start_info`, its module list and memory map), and the command line.
pub(crate) const START_INFO: u64 = 0x6000;
/// The list of modules, of which there is one: the initramfs.
pub(crate) const MODULES: u64 = 0x6800;
/// The memory map.
pub(crate) const MEMORY_MAP: u64 = 0x7000;
/// The kernel's command line.
pub(crate) const COMMAND_LINE: u64 = 0x2_0000;
/// Most bytes of it, its end included.
pub(crate) const COMMAND_LINE_LEN: usize = 0x1000;

/// RAM that a PC's firmware leaves to the operating system below 1 MiB ends here.
pub(crate) const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables are where a PC's firmware has them.
pub(crate) const ACPI: u64 = 0xe_0000;
/// Above the first MiB, all is RAM again.
pub(crate) const HIGH_RAM: u64 = 0x10_0000;
/// No RAM from here on: what follows is devices'.
pub(crate) const RAM_END: u64 = 0xc000_0000;

/// Memory BARs of 32 bits.
pub(crate) const PCI_MEMORY: RangeInclusive<u64> = 0xc000_0000..=0xcfff_ffff;
/// Registers of virtio-mmio devices, a page each.
pub(crate) const VIRTIO_MMIO: RangeInclusive<u64> = 0xd000_0000..=0xd00f_ffff;
/// PCI configuration space in memory.
pub(crate) const ECAM: u64 = 0xe000_0000;
/// Interrupt controllers: the I/O APIC is here, the local ones are in the kernel.
pub(crate) const IO_APIC: u32 = 0xfec0_0000;
pub(crate) const LOCAL_APIC: u32 = 0xfee0_0000;
/// Three pages that Intel's processors need for real mode.
pub(crate) const TSS: usize = 0xfffb_d000;
/// Memory BARs of 64 bits.
pub(crate) const PCI_MEMORY_64: RangeInclusive<u64> = 0x20_0000_0000..=0x2f_ffff_ffff;

/// The first serial port, and its interrupt.
pub(crate) const SERIAL: u16 = 0x3f8;
pub(crate) const SERIAL_IRQ: u8 = 4;
/// Power management: events (4 ports), control (2), reset (1). ACPI's interrupt is never used, but has to have a number.
pub(crate) const POWER: u16 = 0x600;
pub(crate) const POWER_IRQ: u32 = 9;
/// I/O BARs.
pub(crate) const PCI_PORTS: RangeInclusive<u16> = 0x1000..=0xefff;

/// Interrupts that devices may have of a PC's 16; those below and [`POWER_IRQ`] are spoken for.
pub(crate) const DEVICE_IRQS: RangeInclusive<u32> = 5..=15;
/// The wires of INTA to INTD.
pub(crate) const PCI_IRQS: [u8; 4] = [16, 17, 18, 19];
/// Messages have the numbers from the last pin of the I/O APIC on.
pub(crate) const MESSAGES: RangeInclusive<u32> = 24..=4095;
