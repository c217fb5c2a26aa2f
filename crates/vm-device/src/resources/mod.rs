//! What devices need (addresses, interrupts, memory slots ...) and who gives it to them.
//!
//! A device states [constraints](ResourceConstraint); somebody turns them into [resources](Resource). Who that is, is the
//! VMM's choice for each device:
//!
//! * **The VMM** knows the place, as for a serial port at 0x3f8: a constraint with exactly one solution
//!   ([`ResourceConstraint::pio_at`], [`ResourceConstraint::mmio_at`], `new_legacy_irq(Some(4))`). The allocator only checks that it
//!   is free, and keeps it from others.
//! * **The manager** chooses within what the device asked for: size, alignment, window. [`SystemAllocator::allocate`] gives all
//!   of a device's constraints or none.
//! * **The firmware** chooses, as for PCI's BARs: the VMM takes one window from the allocator and tells the guest about it
//!   (ACPI, device tree); inside of it the guest places devices as it likes. Where a host wants the guest's choice to be
//!   accounted for as well, [`SystemAllocator::relocate`] moves what a device holds, or leaves it where it was.
//!
//! ```
//! use vm_device::resources::{
//!     INSTANCE_ID_BASE, Pool, Request, ResourceConstraint, SystemAllocator, X86_64_IRQ_BASE, X86_64_IRQ_END,
//! };
//! use vm_memory::GuestAddress;
//!
//! let allocator = SystemAllocator::new(
//!     None,
//!     None,
//!     GuestAddress(0),
//!     1 << 36,
//!     X86_64_IRQ_BASE,
//!     X86_64_IRQ_END,
//!     INSTANCE_ID_BASE,
//! )
//! .ok_or("a range is empty or wraps around")?;
//! // RAM is no place for devices.
//! allocator.allocate_in(Pool::Mmio, &Request::new(512 << 20).at(0))?;
//! // A network device: its registers anywhere, three message interrupts, an address of its own.
//! let given = allocator.allocate(&[
//!     ResourceConstraint::new_mmio(0x4000),
//!     ResourceConstraint::PciMsixIrq { size: 3 },
//!     ResourceConstraint::MacAddress { address: None },
//! ])?;
//! assert_eq!(given.get_mmio_address_ranges(), [(512 << 20, 0x4000)]);
//! // Unplugged again.
//! allocator.free(&given)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod allocator;
mod constraint;
mod error;
mod ranges;

pub use allocator::{Claim, INSTANCE_ID_BASE, Pool, SystemAllocator, X86_64_IRQ_BASE, X86_64_IRQ_END};
pub use constraint::{DeviceResources, MsiIrqType, Resource, ResourceConstraint};
pub use error::ResourceError;
pub use ranges::{AllocPolicy, Request};
