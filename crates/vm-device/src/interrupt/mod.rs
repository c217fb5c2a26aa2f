//! Interrupts: lines and messages, an eventfd behind each.
//!
//! * A [line](IrqLine) is a wire to an interrupt controller: edge-triggered, or level-triggered and shared by any number of
//!   devices. Each device holds an [`IrqSource`].
//! * A [message](Message) is a write of a number to an address: MSI and MSI-X. The [`Messages`] of a function are its table, with
//!   masks and pending bits.
//!
//! Whoever has the file can interrupt, without a call into the VMM: a device, a thread of its own, `vhost` in the kernel, another
//! process. What carries it to the guest is behind the file as well. With KVM that is the kernel (`vm_device::kvm`, cargo feature
//! `kvm`); a VMM with an interrupt controller of its own watches the files and implements [`MessageController`].
//!
//! ```
//! use vm_device::interrupt::{IrqLine, Trigger};
//!
//! let line = IrqLine::new(Trigger::Level)?;
//! let (disk, network) = (line.source(), line.source());
//! disk.assert();
//! network.assert();
//! // The guest's handler makes the disk happy and ends the interrupt; the controller tells so by the resample file.
//! disk.deassert();
//! assert!(line.resampled(), "the network card still wants something: the guest is interrupted again");
//! network.deassert();
//! assert!(!line.resampled());
//! # Ok::<(), std::io::Error>(())
//! ```

mod event;
mod line;
mod message;

pub use event::Event;
pub use line::{IrqLine, IrqSource, Trigger};
pub use message::{
    Message, MessageAction, MessageChange, MessageController, Messages, MessagesError, MessagesState,
    MsiControl, MsiMessage, VectorState,
};
