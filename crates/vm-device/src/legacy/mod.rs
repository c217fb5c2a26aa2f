//! Devices of a PC that an operating system expects to find.

mod io_apic;

pub use io_apic::{IO_APIC_LEN, IO_APIC_PINS, IoApic, IoApicError, IoApicState};
