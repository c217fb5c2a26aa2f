//! The owner that knows devices: what each has, and which bus it is on.
use std::collections::HashMap;
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use device_state::{Section, StateError};
use vm_memory::GuestAddress;

use super::taken::Taken;
use super::{Device, IoResource, IoType, IrqResource};
use crate::bus::{self, DeviceMmio, DevicePio, MmioAddress, PioAddress};
use crate::dispatch::{Counts, Io, IoDevice, IoSpace, Registration, Removal, VcpuIo};
use crate::resources::{ResourceError, SystemAllocator};

/// What can go wrong with a [`DeviceManager`]. What was to be registered is then not, and nothing is taken for it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// A range, an interrupt or an instance id cannot be had.
    #[error(transparent)]
    Resource(#[from] ResourceError),
    /// A range cannot be registered: devices that were plugged into the [`IoSpace`] directly may be in the way.
    #[error(transparent)]
    Bus(#[from] bus::Error),
    /// There is no device with this instance id.
    #[error("there is no device {0}")]
    Unknown(u32),
    /// The bus has devices on it.
    #[error("device {0} is a bus with devices on it")]
    HasChildren(u32),
    /// The device panicked.
    #[error("{name} has failed: it panicked")]
    Failed {
        /// The device's name.
        name: String,
    },
    /// A device cannot be saved or restored.
    #[error("{name}: {error}")]
    State {
        /// The device's name.
        name: String,
        /// What is wrong.
        error: StateError,
    },
    /// The saved machine has other devices than this one.
    #[error("the state is of a machine with other devices")]
    OtherMachine,
}

/// All devices of a machine as a tree, with what each was given from the machine's resources.
///
/// Devices are registered with the resources that they need, at fixed places or anywhere, all of them or none; they are found
/// again by instance id. Accesses find them by address, through [`read`](Self::read) and [`write`](Self::write) or, for many
/// vCPUs, through each one's [handle](Self::vcpu).
///
/// ```
/// use std::sync::{Arc, Mutex};
/// use vm_device::device_manager::{Device, DeviceManager, IoResource, IoType, IrqResource};
/// use vm_device::resources::{INSTANCE_ID_BASE, SystemAllocator, X86_64_IRQ_BASE, X86_64_IRQ_END};
/// use vm_memory::GuestAddress;
///
/// /// A register of one byte, and where the machine has put it.
/// #[derive(Default)]
/// struct Register {
///     value: Mutex<u8>,
///     place: Mutex<Option<(GuestAddress, u32)>>,
/// }
///
/// impl Device for Register {
///     fn name(&self) -> String {
///         "register".to_string()
///     }
///     fn read(&self, _addr: GuestAddress, data: &mut [u8], _io_type: IoType) {
///         data.fill(*self.value.lock().unwrap());
///     }
///     fn write(&self, _addr: GuestAddress, data: &[u8], _io_type: IoType) {
///         *self.value.lock().unwrap() = data[0];
///     }
///     fn set_resources(&self, res: &[IoResource], irq: Option<IrqResource>) {
///         *self.place.lock().unwrap() = res[0].addr.zip(irq.and_then(|irq| irq.0));
///     }
/// }
///
/// let allocator = SystemAllocator::new(
///     None,
///     None,
///     GuestAddress(0xd000_0000),
///     0x1000_0000,
///     X86_64_IRQ_BASE,
///     X86_64_IRQ_END,
///     INSTANCE_ID_BASE,
/// )
/// .ok_or("a range is empty or wraps around")?;
/// let mut devices = DeviceManager::new(&allocator);
///
/// let register = Arc::new(Register::default());
/// let mut resources = [IoResource::new(None, 0x1000, IoType::Mmio)];
/// let id = devices.register_device(register.clone(), None, &mut resources, Some(IrqResource(None)))?;
/// let place = resources[0].addr.unwrap();
/// assert_eq!(*register.place.lock().unwrap(), Some((place, X86_64_IRQ_BASE)));
///
/// devices.write(place, &[42], IoType::Mmio)?;
/// assert_eq!(*register.value.lock().unwrap(), 42);
/// assert_eq!(devices.to_string(), "0 register: memory 0xd0000000+0x1000, interrupt 5\n");
///
/// assert!(devices.unregister_device(id)?.is_over());
/// assert!(devices.write(place, &[42], IoType::Mmio).is_err());
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct DeviceManager {
    allocator: SystemAllocator,
    io: Io,
    nodes: HashMap<u32, Node>,
    /// Devices that nobody can reach any more, but somebody is in: they keep what they were given.
    leaving: Vec<(Removal, Taken)>,
}

struct Node {
    device: Arc<dyn Device>,
    parent: Option<u32>,
    /// In the order in which they were registered.
    children: Vec<u32>,
    // Dropped before what it was given goes back.
    registration: Registration,
    taken: Taken,
}

/// One device as [`DeviceManager::walk`] comes by.
#[derive(Clone, Copy)]
pub struct DeviceNode<'m> {
    /// Its instance id.
    pub id: u32,
    /// How many buses are above it.
    pub depth: usize,
    node: &'m Node,
}

impl<'m> DeviceNode<'m> {
    /// The device.
    pub fn device(&self) -> &'m Arc<dyn Device> {
        &self.node.device
    }

    /// The bus that it is on; `None`: directly in the machine.
    pub fn parent(&self) -> Option<u32> {
        self.node.parent
    }

    /// What is on it, if it is a bus, in the order of registration.
    pub fn children(&self) -> &'m [u32] {
        &self.node.children
    }

    /// The ranges that it was given.
    pub fn resources(&self) -> &'m [IoResource] {
        &self.node.taken.resources
    }

    /// The interrupt line that it was given.
    pub fn irq(&self) -> Option<u32> {
        self.node.taken.irq
    }

    /// Whether it panicked, and is not called by the guest any more.
    pub fn has_failed(&self) -> bool {
        self.node.registration.has_failed()
    }
}

impl DeviceManager {
    /// A machine without devices, whose resources come from this allocator.
    pub fn new(allocator: &SystemAllocator) -> DeviceManager {
        DeviceManager {
            allocator: allocator.clone(),
            io: Io::new(),
            nodes: HashMap::new(),
            leaving: Vec::new(),
        }
    }

    /// Registers a device on the bus `parent`, or directly in the machine, and gives it these resources and this interrupt,
    /// all of them or none. Addresses that were `None` are filled in. The device is told
    /// ([`Device::set_resources`]) before the guest can reach it. Its instance id.
    ///
    /// # Errors
    /// * [`DeviceError::Unknown`]: there is no such parent.
    /// * [`DeviceError::Resource`]: something is empty, taken, or not to be had.
    /// * [`DeviceError::Bus`]: a device that was not registered here is in the way.
    /// * [`DeviceError::Failed`]: the device panicked when it was told.
    pub fn register_device(
        &mut self,
        device: Arc<dyn Device>,
        parent: Option<u32>,
        resources: &mut [IoResource],
        irq: Option<IrqResource>,
    ) -> Result<u32, DeviceError> {
        self.reap();
        if let Some(parent) = parent {
            self.node(parent)?;
        }
        let taken = Taken::take(&self.allocator, resources, irq)?;
        let exits = Arc::new(Exits(device.clone()));
        let registration = self.space().register_shut(IoDevice::both(exits), &taken.exits()?)?;
        let given = irq.map(|_| IrqResource(taken.irq));
        guarded(&device, &registration, || device.set_resources(&taken.resources, given))?;
        registration.open();

        resources.copy_from_slice(&taken.resources);
        let id = taken.id;
        if let Some(parent) = parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            parent.children.push(id);
        }
        self.nodes.insert(id, Node { device, parent, children: Vec::new(), registration, taken });
        Ok(id)
    }

    /// Removes a device. Waits until no vCPU is inside of it, or defers, as [`Registration::remove`] does: then what it was
    /// given goes back later, too.
    ///
    /// # Errors
    /// * [`DeviceError::Unknown`]: there is none, or not any more.
    /// * [`DeviceError::HasChildren`]: it is a bus with devices on it.
    pub fn unregister_device(&mut self, id: u32) -> Result<Removal, DeviceError> {
        self.reap();
        if !self.node(id)?.children.is_empty() {
            return Err(DeviceError::HasChildren(id));
        }
        let node = self.nodes.remove(&id).ok_or(DeviceError::Unknown(id))?;
        if let Some(parent) = node.parent.and_then(|parent| self.nodes.get_mut(&parent)) {
            parent.children.retain(|child| *child != id);
        }
        let removal = node.registration.remove();
        if let Removal::Deferred(removed) = &removal {
            self.leaving.push((Removal::Deferred(removed.clone()), node.taken));
        }
        Ok(removal)
    }

    /// Removes a bus with all that is on it, what is deepest first. Whether all of them are gone, see
    /// [`unregister_device`](Self::unregister_device).
    ///
    /// # Errors
    /// [`DeviceError::Unknown`]: there is none, or not any more.
    pub fn unregister_tree(&mut self, id: u32) -> Result<bool, DeviceError> {
        let below = self.below(id)?;
        let mut over = true;
        for id in below.into_iter().rev() {
            over &= self.unregister_device(id)?.is_over();
        }
        Ok(over)
    }

    /// Gives back what devices had whose removal is over by now. Happens by itself when devices come or go.
    fn reap(&mut self) {
        self.leaving.retain(|(removal, _)| !removal.is_over());
    }

    /// The guest reads. Whatever the outcome, `data` is what the guest gets: ones where nobody answers.
    ///
    /// # Errors
    /// See [`VcpuIo`].
    pub fn read(&self, addr: GuestAddress, data: &mut [u8], io_type: IoType) -> Result<(), bus::Error> {
        match io_type {
            IoType::Pio => match u16::try_from(addr.0) {
                Ok(port) => self.io.pio_read(PioAddress(port), data),
                Err(_) => {
                    data.fill(0xff);
                    self.io.refuse(bus::Error::InvalidRange)
                }
            },
            IoType::Mmio | IoType::PhysicalMmio => self.io.mmio_read(MmioAddress(addr.0), data),
        }
    }

    /// The guest writes.
    ///
    /// # Errors
    /// See [`VcpuIo`].
    pub fn write(&self, addr: GuestAddress, data: &[u8], io_type: IoType) -> Result<(), bus::Error> {
        match io_type {
            IoType::Pio => match u16::try_from(addr.0) {
                Ok(port) => self.io.pio_write(PioAddress(port), data),
                Err(_) => self.io.refuse(bus::Error::InvalidRange),
            },
            IoType::Mmio | IoType::PhysicalMmio => self.io.mmio_write(MmioAddress(addr.0), data),
        }
    }

    /// A way to the devices for one vCPU's thread: faster than [`read`](Self::read) and [`write`](Self::write).
    pub fn vcpu(&self) -> VcpuIo {
        self.io.vcpu()
    }

    /// Where what is not registered here is plugged in, such as the functions of a PCI host. What it gets should be within
    /// ranges that a device has, or that the VMM took from the allocator.
    pub fn space(&self) -> IoSpace {
        self.io.space()
    }

    /// What was refused so far.
    pub fn counts(&self) -> Counts {
        self.io.counts()
    }

    /// The device with this instance id.
    pub fn device(&self, id: u32) -> Option<DeviceNode<'_>> {
        let node = self.nodes.get(&id)?;
        let above = std::iter::successors(node.parent, |id| self.nodes.get(id)?.parent);
        Some(DeviceNode { id, depth: above.count(), node })
    }

    /// How many devices there are.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.nodes.is_empty()
    }

    /// All devices, each bus before what is on it.
    pub fn walk(&self) -> impl Iterator<Item = DeviceNode<'_>> {
        let mut tops: Vec<u32> =
            self.nodes.iter().filter(|(_, node)| node.parent.is_none()).map(|(id, _)| *id).collect();
        tops.sort_unstable();
        let mut next: Vec<(u32, usize)> = tops.into_iter().rev().map(|id| (id, 0)).collect();
        std::iter::from_fn(move || {
            let (id, depth) = next.pop()?;
            let node = self.nodes.get(&id)?;
            next.extend(node.children.iter().rev().map(|child| (*child, depth + 1)));
            Some(DeviceNode { id, depth, node })
        })
    }

    /// A bus and all that is on it, each bus before what is on it.
    fn below(&self, id: u32) -> Result<Vec<u32>, DeviceError> {
        self.node(id)?;
        let mut below = vec![id];
        let mut at = 0;
        while let Some(id) = below.get(at) {
            let children = self.nodes.get(id).map(|node| node.children.clone());
            below.extend(children.unwrap_or_default());
            at += 1;
        }
        Ok(below)
    }

    /// Resets a device and, if it is a bus, all that is on it, the bus first. One that had failed is called by the guest
    /// again.
    ///
    /// # Errors
    /// * [`DeviceError::Unknown`]: there is none.
    /// * [`DeviceError::Failed`]: one panicked; the others were reset all the same.
    pub fn reset_device(&self, id: u32) -> Result<(), DeviceError> {
        self.reset_all(self.below(id)?)
    }

    /// Resets all devices, each bus before what is on it.
    ///
    /// # Errors
    /// [`DeviceError::Failed`]: one panicked; the others were reset all the same.
    pub fn reset(&self) -> Result<(), DeviceError> {
        self.reset_all(self.walk().map(|node| node.id).collect())
    }

    fn reset_all(&self, ids: Vec<u32>) -> Result<(), DeviceError> {
        let mut outcome = Ok(());
        for id in ids {
            let node = self.node(id)?;
            match guarded(&node.device, &node.registration, || node.device.reset()) {
                Ok(()) => node.registration.open(),
                Err(error) => outcome = outcome.and(Err(error)),
            }
        }
        outcome
    }

    /// The state of all devices, while no vCPU runs.
    ///
    /// # Errors
    /// * [`DeviceError::State`]: of the first device that cannot be saved.
    /// * [`DeviceError::Failed`]: one panicked, now or before.
    pub fn save(&self) -> Result<Section, DeviceError> {
        let mut saved: Vec<SavedDevice> = Vec::new();
        for node in self.walk() {
            let name = node.device().name();
            if node.has_failed() {
                return Err(DeviceError::Failed { name });
            }
            let section = guarded(node.device(), &node.node.registration, || node.device().save())?;
            let section = section.map_err(|error| DeviceError::State { name: name.clone(), error })?;
            saved.push((node.id, name, section.version(), section.bytes().to_vec()));
        }
        Section::encode(VERSION, &saved)
            .map_err(|error| DeviceError::State { name: "device manager".to_string(), error })
    }

    /// Restores all devices of a machine that has the same ones, by instance id and name, as when it was saved; while no
    /// vCPU runs. The state comes from outside, and may hold anything.
    ///
    /// # Errors
    /// * [`DeviceError::State`]: it cannot be read, or a device refuses its part.
    /// * [`DeviceError::OtherMachine`]: the devices are not the same.
    /// * [`DeviceError::Failed`]: one panicked.
    ///
    /// All devices are then reset, unless no device was touched.
    pub fn restore(&self, state: &Section) -> Result<(), DeviceError> {
        let saved: Vec<SavedDevice> = state
            .decode(VERSION)
            .map_err(|error| DeviceError::State { name: "device manager".to_string(), error })?;
        let nodes: Vec<DeviceNode<'_>> = self.walk().collect();
        let same = nodes.len() == saved.len()
            && nodes
                .iter()
                .zip(&saved)
                .all(|(node, (id, name, ..))| node.id == *id && node.device().name() == *name);
        if !same {
            return Err(DeviceError::OtherMachine);
        }
        for (node, (_, name, version, bytes)) in nodes.into_iter().zip(saved) {
            let section = Section::from_bytes(version, bytes);
            let restored =
                guarded(node.device(), &node.node.registration, || node.device().restore(&section));
            let restored = restored.and_then(|done| done.map_err(|error| DeviceError::State { name, error }));
            if let Err(error) = restored {
                // What it says is less than why it was called.
                let _ = self.reset();
                return Err(error);
            }
        }
        Ok(())
    }

    fn node(&self, id: u32) -> Result<&Node, DeviceError> {
        self.nodes.get(&id).ok_or(DeviceError::Unknown(id))
    }
}

/// Version of the section that holds all devices.
const VERSION: u16 = 1;

/// Instance id, name, version and data of one device's section.
type SavedDevice = (u32, String, u16, Vec<u8>);

/// Calls a device; a panic of it fails it, and nobody else.
fn guarded<R>(
    device: &Arc<dyn Device>,
    registration: &Registration,
    call: impl FnOnce() -> R,
) -> Result<R, DeviceError> {
    catch_unwind(AssertUnwindSafe(call)).map_err(|thrown| {
        // It may panic again when it is dropped.
        std::mem::forget(thrown);
        registration.fail();
        let name = catch_unwind(AssertUnwindSafe(|| device.name()));
        DeviceError::Failed { name: name.unwrap_or_else(|_| "a device".to_string()) }
    })
}

/// A device as the buses see it.
struct Exits(Arc<dyn Device>);

impl DevicePio for Exits {
    fn pio_read(&self, base: PioAddress, offset: u16, data: &mut [u8]) {
        self.0.read(port(base, offset), data, IoType::Pio);
    }

    fn pio_write(&self, base: PioAddress, offset: u16, data: &[u8]) {
        self.0.write(port(base, offset), data, IoType::Pio);
    }
}

fn port(base: PioAddress, offset: u16) -> GuestAddress {
    GuestAddress(u64::from(base.0) + u64::from(offset))
}

impl DeviceMmio for Exits {
    fn mmio_read(&self, base: MmioAddress, offset: u64, data: &mut [u8]) {
        self.0.read(GuestAddress((base + offset).0), data, IoType::Mmio);
    }

    fn mmio_write(&self, base: MmioAddress, offset: u64, data: &[u8]) {
        self.0.write(GuestAddress((base + offset).0), data, IoType::Mmio);
    }
}

/// The tree: a line for each device, indented below its bus.
impl fmt::Display for DeviceManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for node in self.walk() {
            write!(f, "{:indent$}{} {}", "", node.id, node.device().name(), indent = node.depth * 2)?;
            let mut separator = ": ";
            for resource in node.resources() {
                write!(f, "{separator}{resource}")?;
                separator = ", ";
            }
            if let Some(irq) = node.irq() {
                write!(f, "{separator}interrupt {irq}")?;
                separator = ", ";
            }
            if node.has_failed() {
                write!(f, "{separator}failed")?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Debug for DeviceManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceManager").field("devices", &self.nodes.len()).finish_non_exhaustive()
    }
}

impl fmt::Debug for DeviceNode<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeviceNode").field("id", &self.id).field("depth", &self.depth).finish_non_exhaustive()
    }
}
