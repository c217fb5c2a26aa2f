//! Payloads (section "Payload"), in the byte order of the machine.

use bitflags::bitflags;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

use crate::Reason;
use crate::header::MAX_BODY;

/// Section "A vring state description": an index and a number whose meaning is the message's.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringState {
    /// Index of the ring.
    pub index: u32,
    /// A size, a base or a switch.
    pub num: u32,
}

/// Section "A vring address description".
///
/// Addresses are I/O virtual addresses with `VIRTIO_F_IOMMU_PLATFORM`, guest physical addresses with
/// [`GPA_ADDRESSES`](crate::ProtocolFeatures::GPA_ADDRESSES), else user addresses.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct VringAddr {
    /// Index of the ring.
    pub index: u32,
    /// Bit 0, `VHOST_VRING_F_LOG`: writes to the used ring are logged.
    pub flags: u32,
    /// Address of the descriptor table (virtio 1.4: Descriptor Area).
    pub desc: u64,
    /// Address of the used ring (Device Area).
    pub used: u64,
    /// Address of the available ring (Driver Area).
    pub avail: u64,
    /// Guest address at which writes to the used ring are logged.
    pub log: u64,
}

/// Section "Memory region description".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct MemoryRegion {
    /// First guest physical address.
    pub guest_addr: u64,
    /// Size in bytes.
    pub size: u64,
    /// First user address: opaque to the back-end, the front-end's own view of the region.
    pub user_addr: u64,
    /// Where the region begins in the file that comes with it.
    pub mmap_offset: u64,
}

/// Section "Single memory region description".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct SingleRegion {
    /// Without meaning; sent as zero.
    pub padding: u64,
    /// The region.
    pub region: MemoryRegion,
}

/// What section "Memory region description" adds with [`XEN_MMAP`](crate::ProtocolFeatures::XEN_MMAP).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct XenMapping {
    /// See [`xen_flags`].
    pub flags: u32,
    /// The domain whose memory it is, as Xen numbers it.
    pub domid: u32,
}

/// Bits of [`XenMapping::flags`] (section "Memory region description").
pub mod xen_flags {
    /// A foreign mapping.
    pub const FOREIGN: u32 = 1 << 0;
    /// A grant mapping.
    pub const GRANT: u32 = 1 << 1;
    /// The region can be mapped in parts only, and only while they are needed.
    pub const NO_ADVANCE_MAP: u32 = 1 << 8;
}

/// A region with Xen's fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct XenRegion {
    pub(crate) region: MemoryRegion,
    pub(crate) xen: XenMapping,
}

/// [`SingleRegion`] with Xen's fields.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct SingleXenRegion {
    pub(crate) padding: u64,
    pub(crate) region: XenRegion,
}

/// The fixed part of section "Multiple Memory regions description".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct MemTableHeader {
    pub(crate) num_regions: u32,
    pub(crate) padding: u32,
}

/// The fixed part of section "Virtio device config space". `size` bytes follow.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct ConfigHeader {
    /// First byte in the configuration space.
    pub offset: u32,
    /// Number of bytes.
    pub size: u32,
    /// See [`config_flags`].
    pub flags: u32,
}

/// Most bytes of configuration space that one message carries: what [`MAX_BODY`] leaves.
pub const MAX_CONFIG_SIZE: usize = MAX_BODY - size_of::<ConfigHeader>();

/// Values of the flags of a configuration space message (section "Virtio device config space").
pub mod config_flags {
    /// For writable fields: a write of the guest.
    pub const WRITABLE: u32 = 0;
    /// For live migration: read-only fields may be written too.
    pub const MIGRATION: u32 = 1;
}

/// Section "Log description".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct LogArea {
    /// Size of the log in bytes: one bit for each page of 4096 bytes.
    pub size: u64,
    /// Where in the file the bit of guest address 0 is.
    pub offset: u64,
}

/// Section "Inflight description".
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct InflightArea {
    /// Size of the area in bytes.
    pub mmap_size: u64,
    /// Where in the file it begins.
    pub mmap_offset: u64,
    /// Number of queues that it tracks.
    pub num_queues: u16,
    /// Size of each of them in descriptors.
    pub queue_size: u16,
}

/// Section "Inflight description" as C compilers lay it out: QEMU and the `vhost` crate send 24 bytes, and QEMU takes
/// no other number. The document itself adds up to 20, which is accepted too.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct InflightBody {
    mmap_size: u64,
    mmap_offset: u64,
    num_queues: u16,
    queue_size: u16,
    padding: u32,
}

impl InflightBody {
    /// Length without the padding.
    pub(crate) const SHORT: usize = size_of::<InflightBody>() - size_of::<u32>();

    /// Understands either length.
    pub(crate) fn read(body: &[u8]) -> Result<InflightArea, Reason> {
        let mut whole = [0; size_of::<InflightBody>()];
        let reason = Reason::BodySize { expected: whole.len(), got: body.len() };
        if body.len() != whole.len() && body.len() != Self::SHORT {
            return Err(reason);
        }
        whole.iter_mut().zip(body).for_each(|(to, from)| *to = *from);
        let body = InflightBody::read_from_bytes(&whole).map_err(|_| reason)?;
        let InflightBody { mmap_size, mmap_offset, num_queues, queue_size, padding: _ } = body;
        Ok(InflightArea { mmap_size, mmap_offset, num_queues, queue_size })
    }
}

impl From<InflightArea> for InflightBody {
    fn from(area: InflightArea) -> Self {
        let InflightArea { mmap_size, mmap_offset, num_queues, queue_size } = area;
        InflightBody { mmap_size, mmap_offset, num_queues, queue_size, padding: 0 }
    }
}

bitflags! {
    /// Permissions of an IOTLB message (section "An IOTLB message"). Both are 3.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
    pub struct IotlbAccess: u8 {
        /// Read access.
        const READ = 1;
        /// Write access.
        const WRITE = 2;
    }
}

/// What the front-end does to the IOTLB (`IOTLB_MSG`; section "IOMMU support").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IotlbChange {
    /// Type 2: a translation.
    Update {
        /// First I/O virtual address.
        iova: u64,
        /// Size in bytes.
        size: u64,
        /// First user address, or guest physical address with
        /// [`GPA_ADDRESSES`](crate::ProtocolFeatures::GPA_ADDRESSES).
        user_addr: u64,
        /// What it allows.
        access: IotlbAccess,
    },
    /// Type 3: no translation holds here any more.
    Invalidate {
        /// First I/O virtual address.
        iova: u64,
        /// Size in bytes.
        size: u64,
    },
}

/// What the back-end reports of the IOTLB (`BACKEND_IOTLB_MSG`; section "IOMMU support").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum IotlbReport {
    /// Type 1: a translation is needed.
    Miss {
        /// The I/O virtual address.
        iova: u64,
        /// For what.
        access: IotlbAccess,
    },
    /// Type 4: the driver named an address that it may not use in this way.
    AccessFail {
        /// The I/O virtual address.
        iova: u64,
        /// For what.
        access: IotlbAccess,
    },
}

/// Section "An IOTLB message" as `struct vhost_iotlb_msg` of the C headers has it.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct IotlbBody {
    iova: u64,
    size: u64,
    user_addr: u64,
    permissions: u8,
    kind: u8,
    padding: [u8; 6],
}

impl IotlbBody {
    const MISS: u8 = 1;
    const UPDATE: u8 = 2;
    const INVALIDATE: u8 = 3;
    const ACCESS_FAIL: u8 = 4;

    pub(crate) fn change(self) -> Result<IotlbChange, Reason> {
        let IotlbBody { iova, size, user_addr, permissions: _, kind, padding: _ } = self;
        match kind {
            Self::UPDATE => Ok(IotlbChange::Update { iova, size, user_addr, access: self.access()? }),
            Self::INVALIDATE => Ok(IotlbChange::Invalidate { iova, size }),
            _ => Err(Reason::Value { field: "type", value: kind.into() }),
        }
    }

    pub(crate) fn report(self) -> Result<IotlbReport, Reason> {
        let iova = self.iova;
        match self.kind {
            Self::MISS => Ok(IotlbReport::Miss { iova, access: self.access()? }),
            Self::ACCESS_FAIL => Ok(IotlbReport::AccessFail { iova, access: self.access()? }),
            kind => Err(Reason::Value { field: "type", value: kind.into() }),
        }
    }

    fn access(self) -> Result<IotlbAccess, Reason> {
        let bits = self.permissions;
        IotlbAccess::from_bits(bits).ok_or(Reason::Value { field: "permissions flags", value: bits.into() })
    }
}

impl From<IotlbChange> for IotlbBody {
    fn from(change: IotlbChange) -> Self {
        match change {
            IotlbChange::Update { iova, size, user_addr, access } => {
                let permissions = access.bits();
                IotlbBody { iova, size, user_addr, permissions, kind: Self::UPDATE, padding: [0; 6] }
            }
            IotlbChange::Invalidate { iova, size } => {
                IotlbBody { iova, size, kind: Self::INVALIDATE, ..IotlbBody::default() }
            }
        }
    }
}

impl From<IotlbReport> for IotlbBody {
    fn from(report: IotlbReport) -> Self {
        let (kind, iova, access) = match report {
            IotlbReport::Miss { iova, access } => (Self::MISS, iova, access),
            IotlbReport::AccessFail { iova, access } => (Self::ACCESS_FAIL, iova, access),
        };
        IotlbBody { iova, permissions: access.bits(), kind, ..IotlbBody::default() }
    }
}

/// Which way the back-end's state goes (section "Device state transfer parameters").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum TransferDirection {
    /// From the back-end to the front-end.
    Save = 0,
    /// From the front-end to the back-end.
    Load = 1,
}

/// When the back-end's state is transferred (section "Device state transfer parameters").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum MigrationPhase {
    /// The guest is stopped and the device suspended.
    Stopped = 0,
}

/// Section "Device state transfer parameters".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct TransferBody {
    pub(crate) direction: u32,
    pub(crate) phase: u32,
}

impl TransferBody {
    pub(crate) fn typed(self) -> Result<(TransferDirection, MigrationPhase), Reason> {
        let direction = match self.direction {
            0 => TransferDirection::Save,
            1 => TransferDirection::Load,
            other => return Err(Reason::Value { field: "transfer direction", value: other.into() }),
        };
        match self.phase {
            0 => Ok((direction, MigrationPhase::Stopped)),
            other => Err(Reason::Value { field: "migration phase", value: other.into() }),
        }
    }
}

/// Section "VhostUserShared": the UUID of an object, as it is sent.
pub type ObjectId = [u8; 16];

/// Section "Vring area description".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct VringArea {
    pub(crate) index_and_flags: u64,
    pub(crate) size: u64,
    pub(crate) offset: u64,
}

/// A part of a shared memory region (section "MMAP request").
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ShmemRange {
    /// The region's id.
    pub shmid: u8,
    /// First byte within the region.
    pub offset: u64,
    /// Size in bytes.
    pub len: u64,
}

/// Section "MMAP request".
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct MmapBody {
    shmid: u8,
    padding: [u8; 7],
    pub(crate) fd_offset: u64,
    shm_offset: u64,
    len: u64,
    flags: u64,
}

impl MmapBody {
    pub(crate) fn new(range: ShmemRange, fd_offset: u64, writable: bool) -> Self {
        let ShmemRange { shmid, offset: shm_offset, len } = range;
        MmapBody { shmid, padding: [0; 7], fd_offset, shm_offset, len, flags: writable.into() }
    }

    pub(crate) fn range(&self) -> ShmemRange {
        ShmemRange { shmid: self.shmid, offset: self.shm_offset, len: self.len }
    }

    pub(crate) fn writable(&self) -> Result<bool, Reason> {
        match self.flags {
            0 => Ok(false),
            1 => Ok(true),
            other => Err(Reason::Value { field: "flags", value: other }),
        }
    }
}

/// Section "VIRTIO Shared Memory Region configuration".
#[repr(C)]
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub(crate) struct ShmemConfigBody {
    pub(crate) num_regions: u32,
    pub(crate) padding: u32,
    pub(crate) sizes: [u64; 256],
}

impl ShmemConfigBody {
    /// Of (id, size in bytes) pairs; sizes of zero are no regions.
    pub(crate) fn new(regions: &[(u8, u64)]) -> Self {
        let mut sizes = [0; 256];
        for (shmid, size) in regions {
            if let Some(place) = sizes.get_mut(usize::from(*shmid)) {
                *place = *size;
            }
        }
        // At most 256.
        let num_regions = sizes.iter().filter(|size| **size != 0).count() as u32;
        ShmemConfigBody { num_regions, padding: 0, sizes }
    }

    pub(crate) fn regions(&self) -> Vec<(u8, u64)> {
        (0..=u8::MAX).zip(self.sizes).filter(|(_, size)| *size != 0).collect()
    }
}

/// Shortest description of a crypto session that is accepted. The document does not say what is in it; QEMU (11.1)
/// begins with an operation code of eight bytes and ends with the session's id.
pub(crate) const CRYPTO_SESSION_MIN: usize = 16;

/// The payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: bits 0-7 are the ring's index.
pub(crate) const VRING_INDEX_MASK: u64 = 0xff;
/// The payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: bit 8 says that no descriptor comes with it.
pub(crate) const VRING_NO_FD: u64 = 1 << 8;
