//! Offsets and bits of PCI configuration space that the rest of this module names: PCI Local Bus 3.0, chapter 6; PCI-to-PCI
//! Bridge 1.2, chapter 3; PCI Express Base 5.0, chapter 7.

/// Bytes of a conventional function's configuration space.
pub(crate) const CONVENTIONAL: u16 = 0x100;
/// Bytes of a PCI Express function's configuration space.
pub(crate) const EXTENDED: u16 = 0x1000;

// Both header types.
pub(crate) const VENDOR_ID: u16 = 0x00;
pub(crate) const DEVICE_ID: u16 = 0x02;
pub(crate) const COMMAND: u16 = 0x04;
pub(crate) const STATUS: u16 = 0x06;
pub(crate) const REVISION: u16 = 0x08;
pub(crate) const CACHE_LINE: u16 = 0x0c;
pub(crate) const HEADER_TYPE: u16 = 0x0e;
pub(crate) const BAR0: u16 = 0x10;
pub(crate) const CAPABILITIES: u16 = 0x34;
pub(crate) const INTERRUPT_LINE: u16 = 0x3c;
pub(crate) const INTERRUPT_PIN: u16 = 0x3d;
/// Where capabilities begin: all below is the header.
pub(crate) const HEADER_END: u16 = 0x40;

// Type 0.
pub(crate) const SUBSYSTEM_VENDOR: u16 = 0x2c;
pub(crate) const SUBSYSTEM: u16 = 0x2e;
pub(crate) const ROM: u16 = 0x30;

// Type 1.
pub(crate) const PRIMARY: u16 = 0x18;
pub(crate) const SECONDARY: u16 = 0x19;
pub(crate) const SUBORDINATE: u16 = 0x1a;
pub(crate) const IO_BASE: u16 = 0x1c;
pub(crate) const IO_LIMIT: u16 = 0x1d;
pub(crate) const SECONDARY_STATUS: u16 = 0x1e;
pub(crate) const MEMORY_BASE: u16 = 0x20;
pub(crate) const MEMORY_LIMIT: u16 = 0x22;
pub(crate) const PREFETCH_BASE: u16 = 0x24;
pub(crate) const PREFETCH_LIMIT: u16 = 0x26;
pub(crate) const PREFETCH_BASE_HIGH: u16 = 0x28;
pub(crate) const PREFETCH_LIMIT_HIGH: u16 = 0x2c;
pub(crate) const BRIDGE_CONTROL: u16 = 0x3e;

pub(crate) const COMMAND_IO: u16 = 1 << 0;
pub(crate) const COMMAND_MEMORY: u16 = 1 << 1;
pub(crate) const COMMAND_MASTER: u16 = 1 << 2;
pub(crate) const COMMAND_INTX_DISABLE: u16 = 1 << 10;
pub(crate) const STATUS_INTERRUPT: u16 = 1 << 3;
pub(crate) const STATUS_CAPABILITIES: u16 = 1 << 4;
pub(crate) const HEADER_MULTIFUNCTION: u8 = 0x80;
pub(crate) const ROM_ENABLE: u32 = 1;
pub(crate) const BRIDGE_RESET: u16 = 1 << 6;

// Capability identifiers.
pub(crate) const CAP_MSI: u8 = 0x05;
pub(crate) const CAP_EXPRESS: u8 = 0x10;
pub(crate) const CAP_MSIX: u8 = 0x11;
pub(crate) const EXT_SERIAL: u16 = 0x0003;

// MSI capability; offsets from its beginning, PCI Local Bus 3.0, 6.8.1. Always the form with 64-bit addresses and masks.
pub(crate) const MSI_CONTROL: u16 = 2;
pub(crate) const MSI_ADDRESS: u16 = 4;
pub(crate) const MSI_ADDRESS_HIGH: u16 = 8;
pub(crate) const MSI_DATA: u16 = 12;
pub(crate) const MSI_MASK: u16 = 16;
pub(crate) const MSI_PENDING: u16 = 20;
pub(crate) const MSI_ENABLE: u16 = 1;

// MSI-X capability, PCI Local Bus 3.0, 6.8.2.
pub(crate) const MSIX_CONTROL: u16 = 2;
pub(crate) const MSIX_MASK_ALL: u16 = 1 << 14;
pub(crate) const MSIX_ENABLE: u16 = 1 << 15;

// PCI Express capability, PCI Express Base 5.0, 7.5.3; offsets from its beginning.
pub(crate) const EXP_FLAGS: u16 = 0x02;
pub(crate) const EXP_DEVICE_CONTROL: u16 = 0x08;
pub(crate) const EXP_LINK_CAPABILITIES: u16 = 0x0c;
pub(crate) const EXP_LINK_CONTROL: u16 = 0x10;
pub(crate) const EXP_LINK_STATUS: u16 = 0x12;
pub(crate) const EXP_SLOT_CONTROL: u16 = 0x18;
pub(crate) const EXP_SLOT_STATUS: u16 = 0x1a;
pub(crate) const DEVICE_CONTROL_FLR: u16 = 1 << 15;
pub(crate) const LINK_CONTROL_DISABLE: u16 = 1 << 4;
pub(crate) const LINK_STATUS_ACTIVE: u16 = 1 << 13;

// Slot control.
pub(crate) const SLOT_BUTTON_ENABLE: u16 = 1 << 0;
pub(crate) const SLOT_PRESENCE_ENABLE: u16 = 1 << 3;
pub(crate) const SLOT_COMMAND_ENABLE: u16 = 1 << 4;
pub(crate) const SLOT_INTERRUPT_ENABLE: u16 = 1 << 5;
pub(crate) const SLOT_POWER_INDICATOR: u16 = 3 << 8;
pub(crate) const SLOT_POWER_INDICATOR_ON: u16 = 1 << 8;
pub(crate) const SLOT_POWER_INDICATOR_OFF: u16 = 3 << 8;
pub(crate) const SLOT_ATTENTION_INDICATOR_OFF: u16 = 3 << 6;
pub(crate) const SLOT_POWER_OFF: u16 = 1 << 10;
pub(crate) const SLOT_LINK_ENABLE: u16 = 1 << 12;
// Slot status.
pub(crate) const SLOT_BUTTON: u16 = 1 << 0;
pub(crate) const SLOT_PRESENCE_CHANGED: u16 = 1 << 3;
pub(crate) const SLOT_COMMAND_COMPLETED: u16 = 1 << 4;
pub(crate) const SLOT_PRESENT: u16 = 1 << 6;
pub(crate) const SLOT_LINK_CHANGED: u16 = 1 << 8;
