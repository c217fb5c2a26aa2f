//! What travels in the rx and tx queues (5.10.6): a header, its operations and flags. All fields are little-endian.
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The host's context ID (5.10.4).
pub const HOST_CID: u32 = 2;

/// Bytes of a header.
pub const HEADER: usize = 44;

/// `struct virtio_vsock_hdr` (5.10.6).
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned,
)]
#[repr(C)]
pub struct Header {
    /// Sender. The upper 32 bits are reserved and zero.
    pub src_cid: U64,
    /// Receiver. The upper 32 bits are reserved and zero.
    pub dst_cid: U64,
    /// Port of the sender.
    pub src_port: U32,
    /// Port of the receiver.
    pub dst_port: U32,
    /// Bytes of payload.
    pub len: U32,
    /// [`Kind`], as a number.
    pub kind: U16,
    /// [`Op`], as a number.
    pub op: U16,
    /// What they mean depends on the operation: [`SHUTDOWN_RECEIVE`], [`SEQ_EOM`], ...
    pub flags: U32,
    /// Receive buffer of the sender for this flow, in bytes.
    pub buf_alloc: U32,
    /// Bytes of this flow that the sender has taken out of that buffer so far, modulo 2^32.
    pub fwd_cnt: U32,
}

const _: () = assert!(size_of::<Header>() == HEADER);

/// The sender of this SHUTDOWN will receive no more data.
pub const SHUTDOWN_RECEIVE: u32 = 1 << 0;
/// The sender of this SHUTDOWN will send no more data.
pub const SHUTDOWN_SEND: u32 = 1 << 1;
/// Both: the connection is over.
pub const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// This RW packet ends a message (5.10.6.6.1).
pub const SEQ_EOM: u32 = 1 << 0;
/// This RW packet ends a record (5.10.6.6.1).
pub const SEQ_EOR: u32 = 1 << 1;

/// What a flow is (5.10.6.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Kind {
    /// `VIRTIO_VSOCK_TYPE_STREAM`: bytes.
    Stream,
    /// `VIRTIO_VSOCK_TYPE_SEQPACKET`: messages.
    SeqPacket,
}

impl Kind {
    /// The kind with this number; none if the standard has none.
    pub fn of(number: u16) -> Option<Kind> {
        match number {
            1 => Some(Kind::Stream),
            2 => Some(Kind::SeqPacket),
            _ => None,
        }
    }

    /// Its number.
    pub fn number(self) -> u16 {
        match self {
            Kind::Stream => 1,
            Kind::SeqPacket => 2,
        }
    }
}

/// The operations (5.10.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Op {
    /// A connection is wanted.
    Request,
    /// It is there.
    Response,
    /// It is refused, or over at once.
    Rst,
    /// One or both directions are over.
    Shutdown,
    /// Payload.
    Rw,
    /// Only `buf_alloc` and `fwd_cnt` matter.
    CreditUpdate,
    /// A CREDIT_UPDATE is wanted.
    CreditRequest,
}

impl Op {
    /// The operation with this number; none if the standard has none (0 is `INVALID`).
    pub fn of(number: u16) -> Option<Op> {
        Some(match number {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }

    /// Its number.
    pub fn number(self) -> u16 {
        match self {
            Op::Request => 1,
            Op::Response => 2,
            Op::Rst => 3,
            Op::Shutdown => 4,
            Op::Rw => 5,
            Op::CreditUpdate => 6,
            Op::CreditRequest => 7,
        }
    }
}

impl Header {
    /// The RST that answers this packet: the same flow seen from the other side, the same type, whatever it is
    /// (5.10.6.4.2). There is no buffer for a flow that does not exist.
    pub fn rst(&self) -> Header {
        Header {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: U16::new(Op::Rst.number()),
            ..Header::default()
        }
    }
}

/// Whether a guest can have this context ID (5.10.4).
pub fn is_guest_cid(cid: u64) -> bool {
    cid > u64::from(HOST_CID) && cid < u64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c5_10_6_the_header_lies_in_memory_as_the_standard_has_it() {
        let bytes: Vec<u8> = (0..44).collect();
        let header = Header::read_from_bytes(&bytes).unwrap();
        assert_eq!(header.src_cid.get(), 0x0706_0504_0302_0100);
        assert_eq!(header.dst_cid.get(), 0x0f0e_0d0c_0b0a_0908);
        assert_eq!((header.src_port.get(), header.dst_port.get()), (0x1312_1110, 0x1716_1514));
        assert_eq!((header.len.get(), header.kind.get(), header.op.get()), (0x1b1a_1918, 0x1d1c, 0x1f1e));
        assert_eq!(header.flags.get(), 0x2322_2120);
        assert_eq!((header.buf_alloc.get(), header.fwd_cnt.get()), (0x2726_2524, 0x2b2a_2928));
        assert_eq!(header.as_bytes(), bytes);
    }

    #[test]
    fn c5_10_6_operations_and_types_by_number() {
        for number in 0..=u16::MAX {
            assert_eq!(Op::of(number).map(Op::number), (1..=7).contains(&number).then_some(number));
            assert_eq!(Kind::of(number).map(Kind::number), (1..=2).contains(&number).then_some(number));
        }
    }

    #[test]
    fn c5_10_4_reserved_context_ids() {
        for cid in [0, 1, 2, 0xffff_ffff, 1 << 32, u64::MAX] {
            assert!(!is_guest_cid(cid), "{cid:#x}");
        }
        assert!(is_guest_cid(3) && is_guest_cid(0xffff_fffe));
    }
}
