//! Payloads (section "Payload"), in the byte order of the machine.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

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

/// The payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: bits 0-7 are the ring's index.
pub(crate) const VRING_INDEX_MASK: u64 = 0xff;
/// The payload of `SET_VRING_KICK`, `_CALL` and `_ERR`: bit 8 says that no descriptor comes with it.
pub(crate) const VRING_NO_FD: u64 = 1 << 8;
