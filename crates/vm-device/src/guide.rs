//! Guide: from nothing to a device that is registered, reached, interrupts, and is unplugged while the guest runs.
//!
//! # Who does what
//!
//! * A [`SystemAllocator`](crate::resources::SystemAllocator) knows which ports, addresses and interrupt lines the machine has,
//!   and who has them.
//! * A [`DeviceManager`](crate::device_manager::DeviceManager) owns the devices. It gives each what it needs, all of it or
//!   nothing, and knows the tree of buses and devices. (A VMM that does all of this itself takes an
//!   [`IoManager`](crate::device_manager::IoManager) instead, which only dispatches.)
//! * A [`VcpuIo`](crate::dispatch::VcpuIo) in each vCPU's thread answers the guest's accesses.
//! * An [`IrqLine`](crate::interrupt::IrqLine) carries a device's interrupt to the interrupt controller.
//!
//! # A device
//!
//! This one has a register of one byte: a write rings the doorbell, which interrupts the guest; a read tells how often it
//! rang, and silences it. The VMM gives it one end of an interrupt line; what it is given of the machine's resources it
//! learns before the guest can reach it.
//!
//! Several vCPUs may call at once, hence the `Mutex`. What the guest writes may be anything: nothing here can panic
//! because of it. If a device panics all the same, it alone fails: see [`dispatch`](crate::dispatch).
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::{Arc, Mutex};
//!
//! use vm_device::device_manager::{Device, DeviceManager, IoResource, IoType, IrqResource};
//! use vm_device::interrupt::{IrqLine, IrqSource, Trigger};
//! use vm_memory::GuestAddress;
//!
//! struct Doorbell {
//!     rang: Mutex<u8>,
//!     interrupt: IrqSource,
//! }
//!
//! impl Device for Doorbell {
//!     fn name(&self) -> String {
//!         "doorbell".to_string()
//!     }
//!
//!     fn read(&self, _addr: GuestAddress, data: &mut [u8], _io_type: IoType) {
//!         if let Ok(mut rang) = self.rang.lock() {
//!             data.fill(0);
//!             if let Some(first) = data.first_mut() {
//!                 *first = std::mem::take(&mut *rang);
//!             }
//!             self.interrupt.deassert();
//!         }
//!     }
//!
//!     fn write(&self, _addr: GuestAddress, _data: &[u8], _io_type: IoType) {
//!         if let Ok(mut rang) = self.rang.lock() {
//!             *rang = rang.saturating_add(1);
//!             self.interrupt.assert();
//!         }
//!     }
//!
//!     fn set_resources(&self, _res: &[IoResource], _irq: Option<IrqResource>) {}
//!
//!     fn reset(&self) {
//!         if let Ok(mut rang) = self.rang.lock() {
//!             *rang = 0;
//!             self.interrupt.deassert();
//!         }
//!     }
//! }
//!
//! // The machine: all ports, a window of memory for devices, interrupt lines.
//! use vm_device::resources::{INSTANCE_ID_BASE, SystemAllocator, X86_64_IRQ_BASE, X86_64_IRQ_END};
//!
//! let allocator = SystemAllocator::new(
//!     None,
//!     None,
//!     GuestAddress(0xd000_0000),
//!     0x2000_0000,
//!     X86_64_IRQ_BASE,
//!     X86_64_IRQ_END,
//!     INSTANCE_ID_BASE,
//! )
//! .ok_or("a range is empty or wraps around")?;
//! let mut devices = DeviceManager::new(&allocator);
//!
//! // A vCPU's thread gets its handle before it starts. Here its guest is a list of accesses: what a hypervisor reports
//! // as exits for memory that is not there.
//! let mut vcpu = devices.vcpu();
//! let mut guest_reads = move |addr: GuestAddress| {
//!     let mut data = [0; 4];
//!     // Whatever the outcome, this is what the guest gets: ones where nobody answers.
//!     let outcome = vcpu.mmio_read(vm_device::bus::MmioAddress(addr.0), &mut data);
//!     (u32::from_le_bytes(data), outcome)
//! };
//!
//! // Plug it in, anywhere, with any interrupt line. The guest may run already.
//! let line = IrqLine::new(Trigger::Level)?;
//! let doorbell = Arc::new(Doorbell { rang: Mutex::new(0), interrupt: line.source() });
//! let mut resources = [IoResource::new(None, 0x1000, IoType::Mmio)];
//! let id = devices.register_device(doorbell, None, &mut resources, Some(IrqResource(None)))?;
//! let addr = resources[0].addr.ok_or("it was filled in")?;
//! let irq = devices.device(id).and_then(|node| node.irq()).ok_or("it was asked for")?;
//! assert_eq!(devices.to_string(), "0 doorbell: memory 0xd0000000+0x1000, interrupt 5\n");
//!
//! // `irq` is the number under which the interrupt controller knows the line; its files are what the hypervisor takes:
//! // with KVM, `line.trigger()` and `line.resample()` are an irqfd for this number.
//! assert_eq!(irq, 5);
//!
//! // A write interrupts. (This is the slow way, for who is no vCPU.)
//! devices.write(addr, &[1], IoType::Mmio)?;
//! assert!(line.is_asserted());
//! assert!(line.trigger().take(), "the controller was told");
//! // The guest's handler asks the device and so silences it.
//! assert_eq!(guest_reads(addr), (1, Ok(())));
//! assert!(!line.is_asserted());
//!
//! // Unplug it. When this is over, no vCPU is inside of the device, nobody can reach it, and what it had is free.
//! let removal = devices.unregister_device(id)?;
//! assert!(removal.is_over());
//! let (value, outcome) = guest_reads(addr);
//! assert_eq!((value, outcome.is_err()), (u32::MAX, true));
//! assert_eq!(devices.counts().unclaimed, 1);
//! # Ok(())
//! # }
//! ```
//!
//! # What else there is
//!
//! * **A vCPU's loop** turns exits into calls of its handle: `IoIn` and `IoOut` into
//!   [`pio_read`](crate::dispatch::VcpuIo::pio_read) and [`pio_write`](crate::dispatch::VcpuIo::pio_write), `MmioRead` and
//!   `MmioWrite` into [`mmio_read`](crate::dispatch::VcpuIo::mmio_read) and
//!   [`mmio_write`](crate::dispatch::VcpuIo::mmio_write). The error is for the log, if anything: hardware has none.
//! * **Buses** are devices: register one, and its instance id is the `parent` of what is on it. `println!("{devices}")` prints
//!   the tree, [`walk`](crate::device_manager::DeviceManager::walk) visits it.
//! * **From inside of a callback** a device may plug in others, move its ranges, or remove itself or others, through an
//!   [`IoSpace`](crate::dispatch::IoSpace). Nothing waits there: a removal is over when the last vCPU has left the device.
//! * **PCI**: a host with its functions, BARs and hot plug is in [`pci`](crate::pci); it dispatches through the same
//!   [`IoSpace`](crate::dispatch::IoSpace).
//! * **A whole VMM** made of this, which boots Linux: `vmm/` in the repository.
//! * **KVM**: the cargo feature `kvm` connects lines and messages to the kernel, and turns writes into events without an exit.
//! * **Save and restore**: [`DeviceManager::save`](crate::device_manager::DeviceManager::save) collects what
//!   [`Device::save`](crate::device_manager::Device::save) gives.
//! * **Fixed places**: `IoResource::new(Some(GuestAddress(0x3f8)), 8, IoType::Pio)` and `IrqResource(Some(4))`.
//! * **Memory that the hypervisor maps** ([`IoType::PhysicalMmio`](crate::device_manager::IoType::PhysicalMmio)) is reserved and
//!   causes no exits.
