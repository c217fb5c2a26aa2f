//! The owner that only dispatches.
use std::fmt;
use std::sync::Arc;

use super::{MmioManager, PioManager};
use crate::bus::{
    self, Bus, BusAddress, BusRange, DeviceMmio, DevicePio, MmioAddress, MmioBus, MmioRange, PioAddress,
    PioBus, PioRange,
};
use crate::dispatch::{Counts, Io, IoDevice, IoRange, IoSpace, Registration, VcpuIo};
use crate::resources::Resource;

type Pio = Arc<dyn DevicePio + Send + Sync>;
type Mmio = Arc<dyn DeviceMmio + Send + Sync>;

/// What can go wrong with [`IoManager`]'s resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A range could not be given to the device.
    #[error("cannot register the device: {0}")]
    Bus(#[from] bus::Error),
}

/// Both buses of a machine. Registers devices by their ranges, and finds them again by address.
///
/// It is the owner: when it and the vCPUs' handles are dropped, its devices are. It can be used from one thread as it is;
/// for many vCPUs see [`vcpu`](Self::vcpu) and [`space`](Self::space).
///
/// ```
/// use std::sync::Arc;
/// use vm_device::bus::{MmioAddress, MmioAddressOffset, PioAddress, PioAddressOffset};
/// use vm_device::device_manager::{IoManager, MmioManager, PioManager};
/// use vm_device::resources::Resource;
/// use vm_device::{DeviceMmio, DevicePio};
///
/// /// A device whose registers are reached by ports and by memory alike.
/// struct Constant(u8);
///
/// impl DevicePio for Constant {
///     fn pio_read(&self, _base: PioAddress, _offset: PioAddressOffset, data: &mut [u8]) {
///         data.fill(self.0);
///     }
///     fn pio_write(&self, _base: PioAddress, _offset: PioAddressOffset, _data: &[u8]) {}
/// }
///
/// impl DeviceMmio for Constant {
///     fn mmio_read(&self, _base: MmioAddress, _offset: MmioAddressOffset, data: &mut [u8]) {
///         data.fill(self.0);
///     }
///     fn mmio_write(&self, _base: MmioAddress, _offset: MmioAddressOffset, _data: &[u8]) {}
/// }
///
/// let mut manager = IoManager::new();
/// let resources = [
///     Resource::PioAddressRange { base: 0x510, size: 2 },
///     Resource::MmioAddressRange { base: 0xfe00_0000, size: 0x1000 },
/// ];
/// manager.register_resources(Arc::new(Constant(3)), &resources)?;
///
/// let mut data = [0; 4];
/// manager.mmio_read(MmioAddress(0xfe00_0ffc), &mut data)?;
/// assert_eq!(data, [3; 4]);
/// // Two of these four ports are nobody's.
/// assert!(manager.pio_read(PioAddress(0x510), &mut data).is_err());
/// assert_eq!(data, [0xff; 4]);
///
/// assert_eq!(manager.deregister_resources(&resources), 2);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct IoManager {
    pio: PioBus<Held<Pio>>,
    mmio: MmioBus<Held<Mmio>>,
    io: Io,
}

/// A device with one of its ranges. All ranges that were registered together have the same registration.
struct Held<D> {
    device: D,
    registration: Arc<Registration>,
}

impl Default for IoManager {
    fn default() -> Self {
        IoManager::new()
    }
}

impl IoManager {
    /// Empty buses.
    pub fn new() -> IoManager {
        IoManager { pio: PioBus::new(), mmio: MmioBus::new(), io: Io::new() }
    }

    /// A way to the devices for one vCPU's thread: faster than the accesses of [`PioManager`] and [`MmioManager`] through
    /// a shared reference, and there for as long as it is wanted.
    pub fn vcpu(&self) -> VcpuIo {
        self.io.vcpu()
    }

    /// Where devices are plugged in while vCPUs run. Those devices are dispatched to by this manager, too, but are no
    /// business of [`pio_device`](PioManager::pio_device) and [`deregister_pio`](PioManager::deregister_pio).
    pub fn space(&self) -> IoSpace {
        self.io.space()
    }

    /// What was refused so far.
    pub fn counts(&self) -> Counts {
        self.io.counts()
    }

    /// Gives a device all ranges of memory that are among its resources, or none of them. Other resources are left alone.
    ///
    /// # Errors
    /// A range is empty, leaves the address space, or overlaps another.
    pub fn register_mmio_resources(&mut self, device: Mmio, resources: &[Resource]) -> Result<(), Error> {
        let ranges = Ranges::of(resources, false, true)?;
        self.register(ranges, None, Some(device))
    }

    /// Gives a device all ranges of ports that are among its resources, or none of them. Other resources are left alone.
    ///
    /// # Errors
    /// A range is empty, leaves the address space, or overlaps another.
    pub fn register_pio_resources(&mut self, device: Pio, resources: &[Resource]) -> Result<(), Error> {
        let ranges = Ranges::of(resources, true, false)?;
        self.register(ranges, Some(device), None)
    }

    /// Gives a device all ranges of ports and memory that are among its resources, or none of them. Other resources are
    /// left alone.
    ///
    /// # Errors
    /// A range is empty, leaves the address space, or overlaps another.
    pub fn register_resources<T: DeviceMmio + DevicePio + 'static + Send + Sync>(
        &mut self,
        device: Arc<T>,
        resources: &[Resource],
    ) -> Result<(), Error> {
        let ranges = Ranges::of(resources, true, true)?;
        self.register(ranges, Some(device.clone()), Some(device))
    }

    /// Takes away the ranges that have the first addresses of these; how many there were.
    pub fn deregister_resources(&mut self, resources: &[Resource]) -> usize {
        let gone = |resource: &&Resource| match **resource {
            Resource::PioAddressRange { base, .. } => self.deregister_pio(PioAddress(base)).is_some(),
            Resource::MmioAddressRange { base, .. } => self.deregister_mmio(MmioAddress(base)).is_some(),
            _ => false,
        };
        resources.iter().filter(gone).count()
    }

    fn register(&mut self, ranges: Ranges, pio: Option<Pio>, mmio: Option<Mmio>) -> Result<(), Error> {
        let all: Vec<IoRange> =
            ranges.pio.iter().map(|r| (*r).into()).chain(ranges.mmio.iter().map(|r| (*r).into())).collect();
        let device = IoDevice { pio: pio.clone(), mmio: mmio.clone() };
        let registration = Arc::new(self.space().register(device, &all)?);
        hold(&mut self.pio, ranges.pio, pio, &registration)?;
        hold(&mut self.mmio, ranges.mmio, mmio, &registration)
    }
}

/// What is registered overlaps nothing, and all that is held is registered: this does not fail.
fn hold<A: BusAddress, D: Clone>(
    bus: &mut Bus<A, Held<D>>,
    ranges: Vec<BusRange<A>>,
    device: Option<D>,
    registration: &Arc<Registration>,
) -> Result<(), Error> {
    for (range, device) in ranges.into_iter().zip(std::iter::repeat(device)) {
        if let Some(device) = device {
            bus.register(range, Held { device, registration: registration.clone() })?;
        }
    }
    Ok(())
}

impl<D> Held<D> {
    /// Takes the range from the device, and the device from the buses if that was its last. Then no vCPU is inside of it,
    /// as after [`Registration::remove`].
    fn release(self, range: IoRange) -> D {
        let mut rest = self.registration.ranges();
        rest.retain(|one| *one != range);
        if !rest.is_empty() {
            // It fails if the buses are gone, and this is their owner.
            let _ = self.registration.set_ranges(&rest);
        } else if let Some(registration) = Arc::into_inner(self.registration) {
            let _ = registration.remove();
        }
        self.device
    }
}

/// Ranges of ports and memory among resources.
#[derive(Default)]
struct Ranges {
    pio: Vec<PioRange>,
    mmio: Vec<MmioRange>,
}

impl Ranges {
    fn of(resources: &[Resource], pio: bool, mmio: bool) -> Result<Ranges, Error> {
        let mut ranges = Ranges::default();
        for resource in resources {
            match *resource {
                Resource::PioAddressRange { base, size } if pio => {
                    ranges.pio.push(PioRange::new(PioAddress(base), size)?);
                }
                Resource::MmioAddressRange { base, size } if mmio => {
                    ranges.mmio.push(MmioRange::new(MmioAddress(base), size)?);
                }
                _ => (),
            }
        }
        Ok(ranges)
    }
}

impl fmt::Debug for IoManager {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let pio: Vec<_> = self.pio.iter().map(|(range, _)| range).collect();
        let mmio: Vec<_> = self.mmio.iter().map(|(range, _)| range).collect();
        f.debug_struct("IoManager").field("pio", &pio).field("mmio", &mmio).finish_non_exhaustive()
    }
}

impl PioManager for IoManager {
    type D = Pio;

    fn pio_device(&self, addr: PioAddress) -> Option<(&PioRange, &Pio)> {
        self.pio.device(addr).map(|(range, held)| (range, &held.device))
    }

    fn pio_read(&self, addr: PioAddress, data: &mut [u8]) -> Result<(), bus::Error> {
        self.io.pio_read(addr, data)
    }

    fn pio_write(&self, addr: PioAddress, data: &[u8]) -> Result<(), bus::Error> {
        self.io.pio_write(addr, data)
    }

    fn register_pio(&mut self, range: PioRange, device: Pio) -> Result<(), bus::Error> {
        let registration = self.space().register(IoDevice::pio(device.clone()), &[range.into()])?;
        self.pio.register(range, Held { device, registration: Arc::new(registration) })
    }

    fn deregister_pio(&mut self, addr: PioAddress) -> Option<(PioRange, Pio)> {
        let (range, held) = self.pio.deregister(addr)?;
        Some((range, held.release(range.into())))
    }
}

impl MmioManager for IoManager {
    type D = Mmio;

    fn mmio_device(&self, addr: MmioAddress) -> Option<(&MmioRange, &Mmio)> {
        self.mmio.device(addr).map(|(range, held)| (range, &held.device))
    }

    fn mmio_read(&self, addr: MmioAddress, data: &mut [u8]) -> Result<(), bus::Error> {
        self.io.mmio_read(addr, data)
    }

    fn mmio_write(&self, addr: MmioAddress, data: &[u8]) -> Result<(), bus::Error> {
        self.io.mmio_write(addr, data)
    }

    fn register_mmio(&mut self, range: MmioRange, device: Mmio) -> Result<(), bus::Error> {
        let registration = self.space().register(IoDevice::mmio(device.clone()), &[range.into()])?;
        self.mmio.register(range, Held { device, registration: Arc::new(registration) })
    }

    fn deregister_mmio(&mut self, addr: MmioAddress) -> Option<(MmioRange, Mmio)> {
        let (range, held) = self.mmio.deregister(addr)?;
        Some((range, held.release(range.into())))
    }
}
