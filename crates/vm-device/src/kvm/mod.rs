//! KVM: interrupts and kicks that go through the kernel, without a thread of the VMM (cargo feature `kvm`).
//!
//! * [`KvmInterrupts`] connects [lines](crate::interrupt::IrqLine) and [messages](crate::interrupt::Messages) to the VM's interrupt
//!   controllers: irqfd, resample, and the table of routes.
//! * [`IoEvent`] makes a write of the guest a signal of an [`Event`](crate::interrupt::Event), and the vCPU goes on: ioeventfd.
//!
//! Both are handed `kvm-ioctls`' `VmFd`. The VM needs an interrupt controller in the kernel (`KVM_CREATE_IRQCHIP`; messages also work
//! with a split one, and lines through an I/O APIC of the VMM's: `vm_device::legacy`, cargo feature `io-apic`).
//!
//! ```no_run
//! use std::sync::Arc;
//!
//! use kvm_ioctls::Kvm;
//! use vm_device::interrupt::{Event, IrqLine, Messages, Trigger};
//! use vm_device::kvm::{IoAddress, IoEvent, IoMatch, KvmInterrupts};
//!
//! let vm = Arc::new(Kvm::new()?.create_vm()?);
//! vm.create_irq_chip()?;
//! let interrupts = KvmInterrupts::new(vm.clone());
//! // A level-triggered line; whoever runs the event loop watches `line.resample()` and calls `line.resampled()`.
//! let line = IrqLine::new(Trigger::Level)?;
//! let connection = interrupts.connect_line(&line, 10)?;
//! line.source().assert();
//! // Three message interrupts with the numbers that the allocator gave; the guest programs their table.
//! let messages = Messages::new(Arc::new(interrupts), 24, 3)?;
//! let queue = messages.vector(1).ok_or("has three")?;
//! queue.signal();
//! // The guest's 16-bit write of 1 to this address wakes whoever waits for `kick`.
//! let kick = Event::new()?;
//! let kicked = IoEvent::new(&vm, IoAddress::Mmio(0xd000_0050), IoMatch::U16(1), &kick)?;
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod file;
mod interrupts;
mod ioevent;

pub use interrupts::{Chip, KvmInterrupts, LineConnection, Route};
pub use ioevent::{IoAddress, IoEvent, IoMatch};
