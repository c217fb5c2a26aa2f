//! The header of every message (section "Header") and the limits that are checked on it.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// Length of a header in bytes: three 32-bit fields (section "Header").
pub const HEADER_LEN: usize = 12;

/// The one version there is, in the lower two bits of the flags (section "Header").
pub const VERSION: u32 = 1;

/// Longest payload in bytes that is accepted. The document sets no limit; the longest payload that it describes is
/// 2056 bytes (section "VIRTIO Shared Memory Region configuration"), a configuration space can be longer, and 4096 is
/// what other implementations take.
pub const MAX_BODY: usize = 4096;

/// Most descriptors that come with one message: a memory table has at most 8 regions (section "Multiple Memory
/// regions description"), and a back-end sends at most 8 (section "Back-end communication").
pub const MAX_FDS: usize = 8;

/// Bits of [`Header::flags`] (section "Header").
pub mod flags {
    /// The version's bits.
    pub const VERSION_MASK: u32 = 0b11;
    /// The message is a reply.
    pub const REPLY: u32 = 1 << 2;
    /// The sender wants an acknowledgement (section "VHOST_USER_PROTOCOL_F_REPLY_ACK").
    pub const NEED_REPLY: u32 = 1 << 3;
}

/// The header of a message, in the byte order of the machine (section "Message Specification").
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
pub struct Header {
    /// The code of the request. A reply repeats it.
    pub request: u32,
    /// Version, reply and need_reply, see [`flags`]. Other bits have no meaning yet and are ignored.
    pub flags: u32,
    /// Length of the payload in bytes.
    pub size: u32,
}

impl Header {
    /// Whether the reply bit is set.
    pub const fn is_reply(&self) -> bool {
        self.flags & flags::REPLY != 0
    }

    /// Whether the need_reply bit is set.
    pub const fn needs_reply(&self) -> bool {
        self.flags & flags::NEED_REPLY != 0
    }

    /// The version in the flags.
    pub const fn version(&self) -> u32 {
        self.flags & flags::VERSION_MASK
    }
}

/// A whole message, for payloads that are within [`MAX_BODY`].
pub(crate) fn message(request: u32, flags: u32, body: &[&[u8]]) -> Vec<u8> {
    let size: usize = body.iter().map(|part| part.len()).sum();
    let header = Header { request, flags: VERSION | flags, size: size as u32 };
    let mut bytes = Vec::with_capacity(HEADER_LEN + size);
    bytes.extend_from_slice(header.as_bytes());
    for part in body {
        bytes.extend_from_slice(part);
    }
    bytes
}
