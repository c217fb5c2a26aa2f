//! Payloads of requests, of the right length, and descriptors, of the right number: the same for both directions.

use std::os::fd::OwnedFd;

use zerocopy::FromBytes;

use crate::body::{
    CRYPTO_SESSION_MIN, ConfigHeader, InflightArea, InflightBody, IotlbBody, LogArea, MemTableHeader,
    MmapBody, ObjectId, SingleRegion, SingleXenRegion, TransferBody, VRING_INDEX_MASK, VRING_NO_FD,
    VringArea, XenRegion,
};
use crate::rules::{Body, Fds};
use crate::{MAX_FDS, MemoryRegion, Reason, VringAddr, VringState};

/// A payload of the right length.
pub(crate) enum Payload<'a> {
    Empty,
    U64(u64),
    VringState(VringState),
    VringAddr(VringAddr),
    VringFd { index: u32, no_fd: bool },
    Regions(Vec<MemoryRegion>),
    Region(MemoryRegion),
    Config(ConfigHeader, &'a [u8]),
    XenRegions(Vec<XenRegion>),
    XenRegion(XenRegion),
    Log(LogArea),
    Inflight(InflightArea),
    Iotlb(IotlbBody),
    ObjectId(ObjectId),
    CryptoSession(&'a [u8]),
    TransferState(TransferBody),
    VringArea { index: u32, no_fd: bool, size: u64, offset: u64 },
    Mmap(MmapBody),
}

impl<'a> Payload<'a> {
    /// `xen`: regions have Xen's fields.
    pub(crate) fn parse(kind: Body, xen: bool, body: &'a [u8]) -> Result<Self, Reason> {
        Ok(match kind {
            Body::Empty => {
                length(body, 0)?;
                Payload::Empty
            }
            Body::U64 => Payload::U64(whole(body)?),
            Body::VringState => Payload::VringState(whole(body)?),
            Body::VringAddr => Payload::VringAddr(whole(body)?),
            Body::SingleRegion if xen => Payload::XenRegion(whole::<SingleXenRegion>(body)?.region),
            Body::SingleRegion => Payload::Region(whole::<SingleRegion>(body)?.region),
            Body::VringFd => {
                let (index, no_fd) = index_and_flags(whole(body)?)?;
                Payload::VringFd { index, no_fd }
            }
            Body::MemTable if xen => Payload::XenRegions(table(body)?),
            Body::MemTable => Payload::Regions(table(body)?),
            Body::Config => {
                let (config, data) = prefix::<ConfigHeader>(body)?;
                let expected = usize::try_from(config.size).ok();
                let expected = expected.and_then(|size| size.checked_add(size_of::<ConfigHeader>()));
                length(body, expected.unwrap_or(usize::MAX))?;
                Payload::Config(config, data)
            }
            Body::Log => Payload::Log(whole(body)?),
            Body::Inflight => Payload::Inflight(InflightBody::read(body)?),
            Body::Iotlb => Payload::Iotlb(whole(body)?),
            Body::ObjectId => Payload::ObjectId(whole(body)?),
            Body::CryptoSession if body.len() < CRYPTO_SESSION_MIN => {
                return Err(Reason::BodySize { expected: CRYPTO_SESSION_MIN, got: body.len() });
            }
            Body::CryptoSession => Payload::CryptoSession(body),
            Body::TransferState => Payload::TransferState(whole(body)?),
            Body::VringArea => {
                let VringArea { index_and_flags: value, size, offset } = whole(body)?;
                let (index, no_fd) = index_and_flags(value)?;
                Payload::VringArea { index, no_fd, size, offset }
            }
            Body::Mmap => Payload::Mmap(whole(body)?),
        })
    }
}

/// Bits 0-7 and bit 8.
fn index_and_flags(value: u64) -> Result<(u32, bool), Reason> {
    if value & !(VRING_INDEX_MASK | VRING_NO_FD) != 0 {
        return Err(Reason::Value { field: "vring index and flags", value });
    }
    // The mask leaves eight bits.
    Ok(((value & VRING_INDEX_MASK) as u32, value & VRING_NO_FD != 0))
}

/// A count and as many regions.
fn table<T: FromBytes>(body: &[u8]) -> Result<Vec<T>, Reason> {
    let (table, rest) = prefix::<MemTableHeader>(body)?;
    let count = usize::try_from(table.num_regions).ok().filter(|count| *count <= MAX_FDS);
    let Some(count) = count else {
        return Err(Reason::Value { field: "num regions", value: table.num_regions.into() });
    };
    length(body, size_of::<MemTableHeader>() + count * size_of::<T>())?;
    Ok(rest.chunks_exact(size_of::<T>()).filter_map(|bytes| T::read_from_bytes(bytes).ok()).collect())
}

fn length(body: &[u8], expected: usize) -> Result<(), Reason> {
    if body.len() == expected { Ok(()) } else { Err(Reason::BodySize { expected, got: body.len() }) }
}

fn whole<T: FromBytes>(body: &[u8]) -> Result<T, Reason> {
    T::read_from_bytes(body).map_err(|_| Reason::BodySize { expected: size_of::<T>(), got: body.len() })
}

fn prefix<T: FromBytes>(body: &[u8]) -> Result<(T, &[u8]), Reason> {
    T::read_from_prefix(body).map_err(|_| Reason::BodySize { expected: size_of::<T>(), got: body.len() })
}

/// Passes the descriptors on if they are as many as the rule says.
pub(crate) fn counted(rule: Fds, payload: &Payload<'_>, fds: Vec<OwnedFd>) -> Result<Vec<OwnedFd>, Reason> {
    let got = fds.len();
    let expected = match (rule, payload) {
        (Fds::OneClosed, _) if got <= 1 => got,
        (Fds::None | Fds::OneClosed, _) => 0,
        (Fds::PerRegion, Payload::Regions(regions)) => regions.len(),
        (Fds::PerRegion, Payload::XenRegions(regions)) => regions.len(),
        (
            Fds::UnlessFlagged,
            Payload::VringFd { no_fd: true, .. } | Payload::VringArea { no_fd: true, .. },
        ) => 0,
        (Fds::One | Fds::PerRegion | Fds::UnlessFlagged, _) => 1,
    };
    if got == expected { Ok(fds) } else { Err(Reason::FdCount { expected, got }) }
}
