//! PCI: a root complex, its bridges, and devices whose place in the address map is the guest's to choose.
//!
//! # From a device to a guest that uses it
//!
//! 1. Implement [`PciDevice`]: what is behind the BARs.
//! 2. Describe the function with a [`FunctionBuilder`]: identity, BARs, capabilities, interrupts. [`build`](FunctionBuilder::build)
//!    hands the device its [`Interrupts`].
//! 3. Make a [`RootComplex`] over the [`IoSpace`](crate::dispatch::IoSpace) that vCPUs dispatch from, and register
//!    [`ConfigPorts`] and [`ConfigMemory`] there: by these the guest finds all the rest.
//! 4. [`RootComplex::add`] what is there from the beginning; [`RootComplex::plug`], [`unplug`](RootComplex::unplug) and
//!    [`pull`](RootComplex::pull) cards while the guest runs.
//!
//! ```
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU8, Ordering};
//!
//! use vm_device::bus::{MmioAddress, MmioRange, PioAddress, PioRange};
//! use vm_device::device_manager::{IoManager, MmioManager, PioManager};
//! use vm_device::interrupt::{IrqLine, Trigger};
//! use vm_device::pci::{
//!     BarKind, BusId, Card, ConfigPorts, FunctionBuilder, Identity, PciDevice, Pin, RootComplex, RootOptions,
//! };
//!
//! /// One register behind BAR 0.
//! struct Scratch(AtomicU8);
//!
//! impl PciDevice for Scratch {
//!     fn bar_read(&self, _bar: u8, _offset: u64, data: &mut [u8]) {
//!         data.fill(self.0.load(Ordering::Relaxed));
//!     }
//!     fn bar_write(&self, _bar: u8, _offset: u64, data: &[u8]) {
//!         self.0.store(data.first().copied().unwrap_or(0), Ordering::Relaxed);
//!     }
//! }
//!
//! let line = || IrqLine::new(Trigger::Level);
//! let mut buses = IoManager::new();
//! let root = RootComplex::new(
//!     buses.space(),
//!     RootOptions {
//!         buses: 0..=255,
//!         memory: vec![MmioRange::new(MmioAddress(0xe000_0000), 0x1000_0000)?],
//!         ports: vec![PioRange::new(PioAddress(0x1000), 0xe000)?],
//!         lines: [line()?, line()?, line()?, line()?],
//!         events: Box::new(|event| println!("{event:?}")),
//!     },
//! );
//! buses.register_pio(ConfigPorts::range(), Arc::new(ConfigPorts::new(root.clone())))?;
//!
//! let mut builder = FunctionBuilder::new("scratch", Identity { vendor: 0x1b36, device: 5, ..Identity::default() });
//! builder.bar(0, BarKind::Memory32 { prefetchable: false }, 0x1000)?;
//! builder.pin(Pin::A);
//! root.add(BusId::Root, 0, Card::host_bridge(0x8086, 0x29c0))?;
//! root.add(BusId::Root, 3, Card::single(builder.build(None, |_| Arc::new(Scratch(AtomicU8::new(7))))?))?;
//!
//! // What firmware does: device 3, BAR 0 to 0xe0000000, memory enabled.
//! for (register, value) in [(0x10, 0xe000_0000_u32), (0x04, 2)] {
//!     buses.pio_write(PioAddress(0xcf8), &(0x8000_1800_u32 | register).to_le_bytes())?;
//!     buses.pio_write(PioAddress(0xcfc), &value.to_le_bytes())?;
//! }
//! let mut data = [0];
//! buses.mmio_read(MmioAddress(0xe000_0123), &mut data)?;
//! assert_eq!(data, [7]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Rules
//!
//! * **What a guest may write** is a table: each bit is read-only, read-write or cleared by writing 1. Accesses that cross a
//!   double word, and functions that there are not, read as ones and take no writes.
//! * **The address map follows the registers**, at once, in the vCPU's own thread: `COMMAND`, BARs, the windows and bus numbers
//!   of bridges, links. It is a function of the registers alone, so a restored machine has the map of the saved one. BARs lie
//!   inside of the windows of [`RootOptions`] or are not decoded: RAM wins, and so does what the VMM registered itself. Of
//!   BARs that overlap, the first in the order of the tree is decoded. One that is not decoded is where it was put as soon as
//!   nothing is in its way.
//! * **Bus numbers** are the guest's: an access goes to the first bridge that claims its bus, one level down at each step. Where
//!   numbers overlap, others behind them are out of reach until they do not.
//! * **Interrupts**: a pin that is wired through bridges as PCI-to-PCI Bridge 1.2, 9.1 shifts it, MSI, or MSI-X with its table
//!   and pending bits in a BAR. Messages wait while they are masked, and while the function is no bus master.
//! * **Bus master** of a device is its own bit; that of the bridges above it is not looked at.
//! * **Hot plug** is PCI Express's own, see [`PciEvent`] for what comes back. The guest's operating system has to have been given
//!   control of it (`_OSC` in ACPI).
//!
//! Not here: ISA and VGA decoding of bridges, 32-bit I/O windows, power management, error reporting, SR-IOV and ARI.

mod access;
mod bar;
mod bridge;
mod builder;
mod capability;
mod config;
mod decode;
mod device;
mod express;
mod function;
mod interrupts;
mod regs;
mod root;
mod slot;
mod state;
mod tree;

pub use access::{CONFIG_ADDRESS, ConfigMemory, ConfigPorts, ECAM_BUS};
pub use bar::{BarKind, ROM_BAR, Space};
pub use builder::{FunctionBuilder, Identity, MsixLayout};
pub use capability::{Capability, ExtendedCapability};
pub use device::{CapabilityAccess, PciDevice};
pub use express::PortKind;
pub use function::Function;
pub use interrupts::{Interrupts, Pin};
pub use root::{BusId, Card, PciEvent, PortId, PortOptions, RootComplex, RootOptions, Unplug};
pub use slot::PowerIndicator;

/// What cannot be built, or plugged in or out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PciError {
    /// A function has BARs 0 to 5; one of 64 bits takes two.
    #[error("there is no BAR {0} for it")]
    BarIndex(u8),
    /// BAR sizes are powers of two within the limits of [`BarKind`].
    #[error("BAR {bar} cannot have {size:#x} bytes")]
    BarSize {
        /// Its number.
        bar: u8,
        /// What was asked for.
        size: u64,
    },
    /// Another BAR has this number, or half of it.
    #[error("BAR {0} is taken")]
    BarTaken(u8),
    /// A capability does not fit behind those that there are.
    #[error("no room for capability {0:#x}")]
    NoRoom(u16),
    /// A capability of which a function has one; of MSI and MSI-X it has one or the other.
    #[error("capability {0:#x} cannot be added: it, or one in its place, is there already")]
    Twice(u8),
    /// MSI has 1, 2, 4, 8, 16 or 32 vectors, MSI-X 1 to 2048.
    #[error("{0} is no number of interrupt vectors")]
    VectorCount(u16),
    /// There have to be as many messages as vectors.
    #[error("{given} messages for {wanted} interrupt vectors")]
    Vectors {
        /// How many vectors the function has.
        wanted: u16,
        /// How many messages there were.
        given: u16,
    },
    /// MSI-X structures lie in memory BARs of the function, aligned, beside each other.
    #[error("the MSI-X table or its pending bits are not in a memory BAR, not aligned, or overlap")]
    MsixPlace,
    /// A bus has devices 0 to 31, a link only device 0.
    #[error("there cannot be a device {0} on this bus")]
    DeviceNumber(u8),
    /// A device has functions 0 to 7, and always 0.
    #[error("function {0} is missing, twice or none")]
    FunctionNumber(u8),
    /// Slots have numbers below 8192, and only ports with a link have slots.
    #[error("the port cannot have this slot")]
    SlotNumber,
    /// There is no such port, or it is no place of this kind.
    #[error("there is no such port")]
    NoSuchPort,
    /// The port has no slot.
    #[error("the port has no slot")]
    NoSlot,
    /// Something is there.
    #[error("the place is taken")]
    Occupied,
    /// The guest was not asked for a card.
    #[error("the guest was not asked for the card")]
    NotAsked,
    /// Nothing is there.
    #[error("nothing is there")]
    Empty,
}
