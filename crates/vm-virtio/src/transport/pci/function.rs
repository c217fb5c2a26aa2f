//! The device as a function on a PCI bus of `vm_device::pci` (cargo feature `vm-device`).
//!
//! | BAR | what |
//! |---|---|
//! | 0 | MSI-X table and pending bits, if it has any; 32 bits |
//! | 2 | shared memory regions, one behind the other, if it has any; 64 bits, prefetchable |
//! | 4 | the structures of virtio; 64 bits |
//!
//! What is in shared memory the VMM maps; what it has not mapped reads as zeros.
use super::{FunctionInterrupts, Pci, PciCapability, VENDOR};
use crate::device::VirtioDevice;
use crate::shared_memory::ShmRegion;
use rustix::fd::BorrowedFd;
use std::sync::Arc;
use vm_device::interrupt::{Message, Messages};
use vm_device::pci::{
    BarKind, Capability, CapabilityAccess, Function, FunctionBuilder, Identity, Interrupts, MsixLayout,
    PciDevice, PciError, Pin,
};

/// The BAR of MSI-X.
pub const MSIX_BAR: u8 = 0;
/// The BAR of shared memory regions.
pub const SHARED_MEMORY_BAR: u8 = 2;
/// The BAR of the virtio structures.
pub const VIRTIO_BAR: u8 = 4;

/// Told where a BAR is from now on, if it can be reached: ioeventfds and mapped memory have to follow.
pub type Moved = Box<dyn Fn(u8, Option<u64>) + Send + Sync>;

/// What a VMM decides about the function.
pub struct FunctionOptions {
    /// For people.
    pub name: String,
    /// Class code, 24 bits.
    pub class: u32,
    /// One for each vector that [`Pci::new`] was told of; without vectors none.
    pub messages: Option<Messages>,
    /// Vendor capabilities (4.1.4.8) and the like.
    pub capabilities: Vec<PciCapability>,
    /// Hears where BARs are.
    pub moved: Moved,
}

/// The interrupts of the function.
struct Wires {
    interrupts: Interrupts,
    messages: Vec<Message>,
}

impl FunctionInterrupts for Wires {
    fn uses_messages(&self) -> bool {
        self.interrupts.uses_messages()
    }

    fn message(&self, vector: u16) {
        if let Some(message) = self.messages.get(usize::from(vector)) {
            message.signal();
        }
    }

    fn message_fd(&self, vector: u16) -> Option<BorrowedFd<'_>> {
        self.messages.get(usize::from(vector))?.fd()
    }

    fn set_intx(&self, high: bool) {
        self.interrupts.set_intx(high);
    }
}

/// What is behind the BARs.
struct Behind<D: VirtioDevice> {
    pci: Arc<Pci<D>>,
    /// Where the window is in configuration space.
    window: u8,
    moved: Moved,
}

/// `pci_cfg_data` in the capability of the window (4.1.4.9).
const WINDOW_DATA: std::ops::Range<u16> = 16..20;

impl<D: VirtioDevice> PciDevice for Behind<D> {
    fn bar_read(&self, bar: u8, offset: u64, data: &mut [u8]) {
        match bar {
            VIRTIO_BAR => self.pci.read(offset, data),
            _ => data.fill(0),
        }
    }

    fn bar_write(&self, bar: u8, offset: u64, data: &[u8]) {
        if bar == VIRTIO_BAR {
            self.pci.write(offset, data);
        }
    }

    fn capability_read(&self, access: CapabilityAccess<'_>, data: &mut [u8]) {
        let skip = access.offset.checked_sub(WINDOW_DATA.start).map(usize::from);
        if access.at == self.window
            && let Some(skip) = skip
        {
            let window = self.pci.window_read(VIRTIO_BAR, access.bytes);
            let bytes = window.get(skip..).unwrap_or_default();
            data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
        }
    }

    fn capability_write(&self, access: CapabilityAccess<'_>, data: &[u8]) {
        let end = usize::from(access.offset) + data.len();
        if access.at == self.window && end > usize::from(WINDOW_DATA.start) {
            self.pci.window_write(VIRTIO_BAR, access.bytes);
        }
    }

    fn bar_moved(&self, bar: u8, address: Option<u64>) {
        (self.moved)(bar, address);
    }

    fn reset(&self) {
        self.pci.reset();
    }
}

/// Bytes of the MSI-X structures: a table, and behind it pending bits.
fn msix(vectors: u16) -> (MsixLayout, u64) {
    let pending = (u32::from(vectors) * 16).next_multiple_of(8);
    let layout = MsixLayout {
        vectors,
        table_bar: MSIX_BAR,
        table_offset: 0,
        pending_bar: MSIX_BAR,
        pending_offset: pending,
    };
    let size = u64::from(pending) + u64::from(vectors.div_ceil(64)) * 8;
    (layout, size.next_power_of_two().max(16))
}

/// Where each region is in the BAR, and the BAR's size. None: there is no such BAR.
fn layout(regions: &[ShmRegion]) -> Option<(Vec<u64>, u64)> {
    let mut end = 0_u64;
    let mut places = Vec::new();
    for region in regions {
        places.push(end);
        end = end.checked_add(region.size)?;
    }
    Some((places, end.checked_next_power_of_two()?))
}

/// Makes the function.
///
/// # Errors
/// A type of device that has no PCI device ID, shared memory that no BAR can hold, capabilities that do not fit, another number
/// of messages than vectors.
pub fn function<D: VirtioDevice>(pci: Arc<Pci<D>>, options: FunctionOptions) -> Result<Function, PciError> {
    let FunctionOptions { name, class, messages, capabilities, moved } = options;
    let device = pci.device_id().ok_or(PciError::NoRoom(VENDOR))?;
    let identity = Identity {
        vendor: VENDOR,
        device,
        // 4.1.2.1
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        subsystem: device,
    };
    let mut builder = FunctionBuilder::new(name, identity);
    let vectors = pci.vectors();
    if vectors > 0 {
        let (layout, size) = msix(vectors);
        builder.bar(MSIX_BAR, BarKind::Memory32 { prefetchable: false }, size)?;
        builder.msix(layout)?;
    }
    builder.pin(Pin::A);
    builder.bar(VIRTIO_BAR, BarKind::Memory64 { prefetchable: false }, pci.bar_size())?;
    let mut all = pci.capabilities(VIRTIO_BAR);
    let regions = pci.engine().shared_memory();
    if !regions.is_empty() {
        let too_large = PciError::BarSize { bar: SHARED_MEMORY_BAR, size: u64::MAX };
        let (places, size) = layout(regions).ok_or(too_large)?;
        builder.bar(SHARED_MEMORY_BAR, BarKind::Memory64 { prefetchable: true }, size)?;
        let region =
            |(region, at): (&ShmRegion, &u64)| PciCapability::shared_memory(*region, SHARED_MEMORY_BAR, *at);
        all.extend(regions.iter().zip(&places).map(region));
    }
    all.extend(capabilities);
    let mut window = 0;
    for capability in all {
        let description = Capability::new(Capability::VENDOR, capability.body);
        if capability.is_window {
            // 4.1.4.9: these fields are read-write.
            let description = description
                .writable(4, 1, 0xff)
                .writable(8, 4, u32::MAX)
                .writable(12, 4, u32::MAX)
                .writable(WINDOW_DATA.start, 4, u32::MAX)
                .watched();
            window = builder.capability(&description)?;
        } else {
            builder.capability(&description)?;
        }
    }
    builder.build(messages, |interrupts| {
        let messages = (0..vectors).filter_map(|vector| interrupts.message(vector)).collect();
        pci.connect(Arc::new(Wires { interrupts: interrupts.clone(), messages }));
        Arc::new(Behind { pci, window, moved })
    })
}
