//! Everything that a VM can give to its devices, in one place.
//!
//! One lock over all pools, so that what belongs together is taken together; nothing else happens under it, and nothing of
//! this is on the path of an access.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{Address, GuestAddress, GuestUsize};

use super::ranges::RangeSet;
use super::{DeviceResources, MsiIrqType, Request, Resource, ResourceConstraint, ResourceError};

/// First interrupt line of a PC that is not spoken for: 0 to 4 are the timer's, the keyboard's, the cascade's and those of
/// two serial ports.
pub const X86_64_IRQ_BASE: u32 = 5;

/// Last pin of the I/O APIC that KVM emulates.
pub const X86_64_IRQ_END: u32 = 23;

/// Where instance ids usually begin.
pub const INSTANCE_ID_BASE: u32 = 0;

/// Numbers of KVM's table of interrupt routes on x86; those that are no line are for messages.
const LAST_ROUTE: u64 = 4095;

/// Slots for memory that KVM has on x86, less its own three.
const LAST_MEMORY_SLOT: u64 = 32763;

/// Locally administered addresses of one station (IEEE 802, 8.2): the first byte is 2.
const LOCAL_MACS: (u64, u64) = (0x0200_0000_0001, 0x02ff_ffff_ffff);

const LAST_MAC: u64 = 0xffff_ffff_ffff;

/// The bit of a MAC address that says that it is not one station's.
const MAC_GROUP: u64 = 1 << 40;

/// The kinds of resources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[non_exhaustive]
pub enum Pool {
    /// I/O ports.
    Pio,
    /// Addresses of memory-mapped I/O, in bytes.
    Mmio,
    /// Interrupt lines.
    Irq,
    /// Numbers for interrupt messages (with KVM: GSIs above the lines).
    Msi,
    /// Names of devices in their manager.
    InstanceId,
    /// KVM's slots for memory.
    MemorySlot,
    /// MAC addresses, as numbers of 48 bits.
    Mac,
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pio => "I/O ports",
            Self::Mmio => "memory-mapped I/O",
            Self::Irq => "interrupt lines",
            Self::Msi => "interrupt messages",
            Self::InstanceId => "instance ids",
            Self::MemorySlot => "memory slots",
            Self::Mac => "MAC addresses",
        })
    }
}

#[derive(Debug)]
struct Pools {
    pio: RangeSet,
    mmio: RangeSet,
    irq: RangeSet,
    msi: RangeSet,
    instance_id: RangeSet,
    memory_slot: RangeSet,
    mac: RangeSet,
    /// Lines that several devices may have, and how many do.
    shared: BTreeMap<u32, u32>,
}

/// Gives resources to devices and takes them back: I/O ports, memory-mapped I/O, interrupt lines, messages, instance ids,
/// memory slots, MAC addresses.
///
/// A clone is another handle of the same allocator: VMM, device manager and PCI host share it.
#[derive(Clone, Debug)]
pub struct SystemAllocator(Arc<Mutex<Pools>>);

impl SystemAllocator {
    /// An allocator for a machine with `io_size` ports from `io_base` on (default: up to 0xffff, from 0), `mmio_size` bytes from
    /// `mmio_base` on, interrupt lines `irq_first` to `irq_last` (both included), and instance ids from `instance_id_base` on.
    ///
    /// Numbers for messages are those above `irq_last` up to 4095, memory slots 0 to 32763; see
    /// [`set_extent`](Self::set_extent).
    ///
    /// `None` if one of these ranges is empty, wraps around, or ends beyond port 0xffff.
    pub fn new(
        io_base: Option<GuestAddress>,
        io_size: Option<GuestUsize>,
        mmio_base: GuestAddress,
        mmio_size: GuestUsize,
        irq_first: u32,
        irq_last: u32,
        instance_id_base: u32,
    ) -> Option<Self> {
        let last_port = u64::from(u16::MAX);
        let io_first = io_base.map_or(0, |base| base.raw_value());
        let io_last = match io_size {
            Some(size) => io_first.checked_add(size.checked_sub(1)?)?,
            None => last_port,
        };
        if io_last > last_port {
            return None;
        }
        let mmio_first = mmio_base.raw_value();
        let mmio_last = mmio_first.checked_add(mmio_size.checked_sub(1)?)?;
        let (irq_first, irq_last) = (u64::from(irq_first), u64::from(irq_last));
        // Lines may reach beyond KVM's table; one message is above them even then.
        let (first_message, last_message) =
            (irq_last + 1, LAST_ROUTE.max(irq_last + 1).min(u64::from(u32::MAX)));
        Some(Self(Arc::new(Mutex::new(Pools {
            pio: RangeSet::new(Pool::Pio, io_first, io_last)?,
            mmio: RangeSet::new(Pool::Mmio, mmio_first, mmio_last)?,
            irq: RangeSet::new(Pool::Irq, irq_first, irq_last)?,
            msi: RangeSet::new(Pool::Msi, first_message, last_message)?,
            instance_id: RangeSet::new(Pool::InstanceId, u64::from(instance_id_base), u64::from(u32::MAX))?,
            memory_slot: RangeSet::new(Pool::MemorySlot, 0, LAST_MEMORY_SLOT)?,
            mac: RangeSet::new(Pool::Mac, 1, LAST_MAC)?,
            shared: BTreeMap::new(),
        }))))
    }

    /// Changes what there is of one kind to `first` to `last`, both included: what the hypervisor offers may be more or less than
    /// the default.
    ///
    /// # Errors
    /// The range is empty or has numbers that the kind cannot have, or something of the pool is given away.
    pub fn set_extent(&self, pool: Pool, first: u64, last: u64) -> Result<(), ResourceError> {
        let largest = match pool {
            Pool::Pio => u64::from(u16::MAX),
            Pool::Mmio => u64::MAX,
            Pool::Irq | Pool::Msi | Pool::InstanceId | Pool::MemorySlot => u64::from(u32::MAX),
            Pool::Mac => LAST_MAC,
        };
        let new = RangeSet::new(pool, first, last)
            .filter(|_| last <= largest)
            .ok_or(ResourceError::Window { pool, min: first, max: last })?;
        let mut pools = self.lock();
        let old = pools.of(pool);
        if !old.is_untouched() {
            return Err(ResourceError::PoolInUse { pool });
        }
        *old = new;
        Ok(())
    }

    /// Takes one range; its first number. Instance ids, lines and slots are ranges like any other.
    ///
    /// # Errors
    /// See [`ResourceError`].
    pub fn allocate_in(&self, pool: Pool, request: &Request) -> Result<u64, ResourceError> {
        self.lock().of(pool).allocate(request)
    }

    /// Gives back a range exactly as it was given.
    ///
    /// # Errors
    /// [`ResourceError::NotAllocated`].
    pub fn free_in(&self, pool: Pool, base: u64, size: u64) -> Result<(), ResourceError> {
        self.lock().free_in(pool, base, size)
    }

    /// Moves `size` numbers that were given at `from` to `to`, which may overlap with where they were: the guest's firmware has
    /// moved a BAR.
    ///
    /// # Errors
    /// See [`ResourceError`]; the range then stays where it was.
    pub fn relocate(&self, pool: Pool, from: u64, to: u64, size: u64) -> Result<(), ResourceError> {
        let mut pools = self.lock();
        let ranges = pools.of(pool);
        ranges.free(from, size)?;
        let moved = ranges.allocate(&Request::new(size).at(to)).map(drop);
        if moved.is_err() {
            ranges.allocate(&Request::new(size).at(from))?;
        }
        moved
    }

    /// Takes an interrupt line for one device: `irq`, or the lowest that is free.
    ///
    /// # Errors
    /// See [`ResourceError`].
    pub fn allocate_irq(&self, irq: Option<u32>) -> Result<u32, ResourceError> {
        self.lock().irq(irq)
    }

    /// Takes an interrupt line that other devices may have as well, if they also take it here: `irq`, or one that is free, or,
    /// when none is, the one that the fewest devices share. Level-triggered lines only can be shared.
    ///
    /// # Errors
    /// See [`ResourceError`]; a line that somebody has for itself is [in use](ResourceError::InUse).
    pub fn allocate_shared_irq(&self, irq: Option<u32>) -> Result<u32, ResourceError> {
        let mut pools = self.lock();
        let joined = match irq {
            Some(irq) => pools.shared.contains_key(&irq).then_some(irq),
            None => None,
        };
        let irq = match joined {
            Some(irq) => irq,
            None => match pools.irq(irq) {
                Ok(irq) => irq,
                Err(error @ ResourceError::Exhausted { .. }) => {
                    let least = pools.shared.iter().min_by_key(|&(_, &users)| users);
                    *least.ok_or(error)?.0
                }
                Err(error) => return Err(error),
            },
        };
        let users = pools.shared.entry(irq).or_insert(0);
        *users = users.saturating_add(1);
        Ok(irq)
    }

    /// Gives back an interrupt line; a shared one is free when the last has given it back.
    ///
    /// # Errors
    /// [`ResourceError::NotAllocated`].
    pub fn free_irq(&self, irq: u32) -> Result<(), ResourceError> {
        self.lock().free_in(Pool::Irq, u64::from(irq), 1)
    }

    /// Takes the lowest free instance id.
    ///
    /// # Errors
    /// [`ResourceError::Exhausted`].
    pub fn allocate_instance_id(&self) -> Result<u32, ResourceError> {
        let mut pools = self.lock();
        pools.number(Pool::InstanceId, &Request::new(1))
    }

    /// Gives back an instance id.
    ///
    /// # Errors
    /// [`ResourceError::NotAllocated`].
    pub fn free_instance_id(&self, id: u32) -> Result<(), ResourceError> {
        self.free_in(Pool::InstanceId, u64::from(id), 1)
    }

    /// Takes all that a device needs, or nothing: resources come in the order of the constraints.
    ///
    /// # Errors
    /// That of the first constraint that cannot be met; nothing is taken then.
    pub fn allocate(&self, constraints: &[ResourceConstraint]) -> Result<DeviceResources, ResourceError> {
        let mut pools = self.lock();
        let mut given = DeviceResources::new();
        for constraint in constraints {
            if let Err(error) = pools.allocate(constraint, &mut given) {
                for resource in given.get_all_resources() {
                    let undone = pools.free(resource);
                    debug_assert_eq!(undone, Ok(()), "just taken, under the same lock");
                }
                return Err(error);
            }
        }
        Ok(given)
    }

    /// Like [`allocate`](Self::allocate), for those who have further steps that may fail: all goes back unless it is
    /// [kept](Claim::keep).
    ///
    /// # Errors
    /// As of [`allocate`](Self::allocate).
    pub fn claim(&self, constraints: &[ResourceConstraint]) -> Result<Claim, ResourceError> {
        Ok(Claim { allocator: self.clone(), resources: self.allocate(constraints)? })
    }

    /// Gives back all that a device has, or nothing.
    ///
    /// # Errors
    /// [`ResourceError::NotAllocated`] or [`ResourceError::MacAddress`] for the first resource that cannot be given back; nothing is
    /// given back then.
    pub fn free(&self, resources: &DeviceResources) -> Result<(), ResourceError> {
        let mut pools = self.lock();
        let shared = pools.shared.clone();
        let all = resources.get_all_resources();
        for (done, resource) in all.iter().enumerate() {
            if let Err(error) = pools.free(resource) {
                for resource in all.iter().take(done) {
                    pools.take_again(resource);
                }
                pools.shared = shared;
                return Err(error);
            }
        }
        Ok(())
    }

    /// First and last number of each range of a kind that is given away, in order: what a VMM prints as its map.
    pub fn allocated(&self, pool: Pool) -> Vec<(u64, u64)> {
        self.lock().of(pool).taken().collect()
    }

    fn lock(&self) -> MutexGuard<'_, Pools> {
        // Nothing of another's runs under the lock, so a panic elsewhere cannot have left it half done.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Pools {
    fn of(&mut self, pool: Pool) -> &mut RangeSet {
        match pool {
            Pool::Pio => &mut self.pio,
            Pool::Mmio => &mut self.mmio,
            Pool::Irq => &mut self.irq,
            Pool::Msi => &mut self.msi,
            Pool::InstanceId => &mut self.instance_id,
            Pool::MemorySlot => &mut self.memory_slot,
            Pool::Mac => &mut self.mac,
        }
    }

    /// Of a pool whose numbers have 32 bits.
    fn number(&mut self, pool: Pool, request: &Request) -> Result<u32, ResourceError> {
        let number = self.of(pool).allocate(request)?;
        narrow(pool, number)
    }

    fn irq(&mut self, irq: Option<u32>) -> Result<u32, ResourceError> {
        self.number(Pool::Irq, &from(irq, 1))
    }

    fn free_in(&mut self, pool: Pool, base: u64, size: u64) -> Result<(), ResourceError> {
        if pool == Pool::Irq
            && size == 1
            && let Ok(irq) = u32::try_from(base)
            && let Some(users) = self.shared.get_mut(&irq)
        {
            *users -= 1;
            if *users > 0 {
                return Ok(());
            }
            self.shared.remove(&irq);
        }
        self.of(pool).free(base, size)
    }

    fn allocate(
        &mut self,
        constraint: &ResourceConstraint,
        given: &mut DeviceResources,
    ) -> Result<(), ResourceError> {
        let mut messages = |ty, size: u32| {
            let base = self.number(Pool::Msi, &Request::new(u64::from(size)))?;
            Ok(Resource::MsiIrq { ty, base, size })
        };
        let resource = match constraint {
            &ResourceConstraint::PioAddress { range, align, size } => {
                let mut request = Request::new(u64::from(size)).align(u64::from(align));
                if let Some((min, max)) = range {
                    request = request.within(u64::from(min), u64::from(max));
                }
                let base = self.pio.allocate(&request)?;
                Resource::PioAddressRange { base: narrow(Pool::Pio, base)?, size }
            }
            &ResourceConstraint::MmioAddress { range, align, size } => {
                let mut request = Request::new(size).align(align);
                if let Some((min, max)) = range {
                    request = request.within(min, max);
                }
                Resource::MmioAddressRange { base: self.mmio.allocate(&request)?, size }
            }
            &ResourceConstraint::LegacyIrq { irq } => Resource::LegacyIrq(self.irq(irq)?),
            &ResourceConstraint::PciMsiIrq { size } => {
                if !size.is_power_of_two() || size > 32 {
                    return Err(ResourceError::MessageCount { count: size });
                }
                messages(MsiIrqType::PciMsi, size)?
            }
            &ResourceConstraint::PciMsixIrq { size } => {
                if !(1..=2048).contains(&size) {
                    return Err(ResourceError::MessageCount { count: size });
                }
                messages(MsiIrqType::PciMsix, size)?
            }
            &ResourceConstraint::GenericIrq { size } => messages(MsiIrqType::GenericMsi, size)?,
            ResourceConstraint::MacAddress { address } => {
                let request = match address {
                    Some(address) => Request::new(1).at(parse_mac(address)?),
                    None => Request::new(1).within(LOCAL_MACS.0, LOCAL_MACS.1),
                };
                Resource::MacAddresss(print_mac(self.mac.allocate(&request)?))
            }
            &ResourceConstraint::KvmMemSlot { slot, size } => {
                let first = self.number(Pool::MemorySlot, &from(slot, size))?;
                // Each goes back on its own, so each is an allocation of its own. The range that was taken for them as one
                // has no other purpose than to be free as a whole.
                self.memory_slot.free(u64::from(first), u64::from(size))?;
                for slot in first..=first.saturating_add(size - 1) {
                    self.memory_slot.allocate(&from(Some(slot), 1))?;
                    given.append(Resource::KvmMemSlot(slot));
                }
                return Ok(());
            }
        };
        given.append(resource);
        Ok(())
    }

    fn free(&mut self, resource: &Resource) -> Result<(), ResourceError> {
        let (pool, base, size) = place(resource)?;
        self.free_in(pool, base, size)
    }

    /// Undoes [`free`](Self::free), but for the count of those who share a line.
    fn take_again(&mut self, resource: &Resource) {
        let Ok((pool, base, size)) = place(resource) else { return };
        let again = self.of(pool).allocate(&Request::new(size).at(base));
        debug_assert!(
            again.is_ok() || pool == Pool::Irq,
            "only a line that others share was not free meanwhile"
        );
    }
}

/// `size` numbers, from `first` on if it is given.
fn from(first: Option<u32>, size: u32) -> Request {
    let request = Request::new(u64::from(size));
    first.map_or(request, |first| request.at(u64::from(first)))
}

/// No pool of such numbers has larger ones, see [`SystemAllocator::set_extent`].
fn narrow<T: TryFrom<u64>>(pool: Pool, base: u64) -> Result<T, ResourceError> {
    T::try_from(base).map_err(|_| ResourceError::WrapsAround { pool, base, size: 1 })
}

/// What a resource is in its pool.
fn place(resource: &Resource) -> Result<(Pool, u64, u64), ResourceError> {
    Ok(match resource {
        &Resource::PioAddressRange { base, size } => (Pool::Pio, u64::from(base), u64::from(size)),
        &Resource::MmioAddressRange { base, size } => (Pool::Mmio, base, size),
        &Resource::LegacyIrq(irq) => (Pool::Irq, u64::from(irq), 1),
        &Resource::MsiIrq { base, size, .. } => (Pool::Msi, u64::from(base), u64::from(size)),
        Resource::MacAddresss(address) => (Pool::Mac, parse_mac(address)?, 1),
        &Resource::KvmMemSlot(slot) => (Pool::MemorySlot, u64::from(slot), 1),
    })
}

fn parse_mac(text: &str) -> Result<u64, ResourceError> {
    let bytes = text.split(':').map(|part| {
        let hex = part.len() == 2 && part.bytes().all(|byte| byte.is_ascii_hexdigit());
        hex.then(|| u64::from_str_radix(part, 16).ok()).flatten()
    });
    let bytes: Option<Vec<u64>> = bytes.collect();
    bytes
        .filter(|bytes| bytes.len() == 6)
        .map(|bytes| bytes.into_iter().fold(0, |number, byte| number << 8 | byte))
        .filter(|number| *number != 0 && number & MAC_GROUP == 0)
        .ok_or_else(|| ResourceError::MacAddress(text.to_owned()))
}

fn print_mac(number: u64) -> String {
    let [_, _, a, b, c, d, e, f] = number.to_be_bytes();
    format!("{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{f:02x}")
}

/// Resources that go back when this is dropped, see [`SystemAllocator::claim`].
#[derive(Debug)]
#[must_use = "what is claimed goes back at once"]
pub struct Claim {
    allocator: SystemAllocator,
    resources: DeviceResources,
}

impl Claim {
    /// What is claimed.
    pub fn resources(&self) -> &DeviceResources {
        &self.resources
    }

    /// From now on it is the caller's to [give back](SystemAllocator::free).
    pub fn keep(mut self) -> DeviceResources {
        std::mem::take(&mut self.resources)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let freed = self.allocator.free(&self.resources);
        debug_assert!(freed.is_ok(), "somebody else gave back what was claimed: {freed:?}");
    }
}

#[cfg(test)]
mod tests;
