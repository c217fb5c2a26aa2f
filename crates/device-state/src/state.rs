//! The whole: header and sections.
use crate::{Section, StateError, Tag};

/// Most bytes of a state, header included: what a daemon may have to hold for a guest that is restored.
pub const MAX_STATE: u64 = 16 << 20;

/// Bytes of the header.
pub const HEADER: usize = 28;

const MAGIC: [u8; 8] = *b"BKPLSTAT";
pub(crate) const VERSION: u16 = 1;
/// Header bytes that the checksum covers.
const CHECKED: usize = 24;
const SECTION_HEADER: usize = 12;

/// What the header says, for whoever reads a stream and wants to know how much there is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The virtio device type.
    pub device: u32,
    /// Bytes behind the header.
    pub length: u64,
    checksum: u32,
}

impl Header {
    /// Reads a header from the first bytes of a state.
    pub fn parse(bytes: &[u8]) -> Result<Header, StateError> {
        let mut input = Input(bytes);
        // Something short that is something else is just that.
        if !MAGIC.starts_with(bytes.get(..MAGIC.len().min(bytes.len())).unwrap_or(&[])) {
            return Err(StateError::Magic);
        }
        input.take::<8>()?;
        let version = u16::from_le_bytes(input.take()?);
        if version != VERSION {
            return Err(StateError::Version(version));
        }
        let flags = u16::from_le_bytes(input.take()?);
        if flags != 0 {
            return Err(StateError::Flags(flags));
        }
        let device = u32::from_le_bytes(input.take()?);
        let length = u64::from_le_bytes(input.take()?);
        let checksum = u32::from_le_bytes(input.take()?);
        if length > MAX_STATE - HEADER as u64 {
            return Err(StateError::TooLarge(length));
        }
        Ok(Header { device, length, checksum })
    }
}

/// The state of a device: its sections, each under a tag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SavedState {
    device: u32,
    sections: Vec<(Tag, Section)>,
}

impl SavedState {
    /// The state of a device of this virtio type, without any section.
    pub fn new(device: u32) -> SavedState {
        SavedState { device, sections: Vec::new() }
    }

    /// The virtio device type.
    pub fn device(&self) -> u32 {
        self.device
    }

    /// Adds a section. A tag that is there already is given another one.
    pub fn put(&mut self, tag: Tag, section: Section) {
        self.sections.retain(|(known, _)| *known != tag);
        self.sections.push((tag, section));
    }

    /// Takes a section out.
    pub fn take(&mut self, tag: Tag) -> Result<Section, StateError> {
        let at = self.sections.iter().position(|(known, _)| *known == tag);
        at.map(|at| self.sections.remove(at).1).ok_or(StateError::MissingSection(tag))
    }

    /// To be called when all known sections were taken: one that is left would be lost.
    pub fn finish(self) -> Result<(), StateError> {
        match self.sections.first() {
            Some((tag, _)) => Err(StateError::UnknownSection(*tag)),
            None => Ok(()),
        }
    }

    /// All bytes.
    pub fn to_bytes(&self) -> Result<Vec<u8>, StateError> {
        let length: u64 =
            self.sections.iter().map(|(_, section)| (SECTION_HEADER + section.data.len()) as u64).sum();
        if length > MAX_STATE - HEADER as u64 {
            return Err(StateError::TooLarge(length));
        }
        let mut bytes = Vec::with_capacity(HEADER + length as usize);
        bytes.extend(MAGIC);
        bytes.extend(VERSION.to_le_bytes());
        bytes.extend([0; 2]);
        bytes.extend(self.device.to_le_bytes());
        bytes.extend(length.to_le_bytes());
        bytes.extend([0; 4]);
        for (tag, section) in &self.sections {
            bytes.extend(tag.0);
            bytes.extend(section.version().to_le_bytes());
            bytes.extend([0; 2]);
            // All of them together are below 2^32.
            bytes.extend((section.data.len() as u32).to_le_bytes());
            bytes.extend(&section.data);
        }
        let checksum = checksum(&bytes);
        bytes[CHECKED..HEADER].copy_from_slice(&checksum.to_le_bytes());
        Ok(bytes)
    }

    /// Reads a state: exactly these bytes, undamaged.
    pub fn parse(bytes: &[u8]) -> Result<SavedState, StateError> {
        let header = Header::parse(bytes)?;
        let body = bytes.get(HEADER..).ok_or(StateError::Truncated)?;
        match (body.len() as u64).cmp(&header.length) {
            std::cmp::Ordering::Less => return Err(StateError::Truncated),
            std::cmp::Ordering::Greater => return Err(StateError::Trailing),
            std::cmp::Ordering::Equal => {}
        }
        if checksum(bytes) != header.checksum {
            return Err(StateError::Checksum);
        }
        let mut state = SavedState::new(header.device);
        let mut input = Input(body);
        while !input.0.is_empty() {
            let tag = Tag(input.take()?);
            let version = u16::from_le_bytes(input.take()?);
            let flags = u16::from_le_bytes(input.take()?);
            if flags != 0 {
                return Err(StateError::Flags(flags));
            }
            let length = u32::from_le_bytes(input.take()?);
            let data = input.bytes(length as usize)?.to_vec();
            if state.sections.iter().any(|(known, _)| *known == tag) {
                return Err(StateError::DuplicateSection(tag));
            }
            // More sections than any version has are none of ours, and comparing all tags must stay cheap.
            if state.sections.len() >= 64 {
                return Err(StateError::UnknownSection(tag));
            }
            state.sections.push((tag, Section::from_bytes(version, data)));
        }
        Ok(state)
    }
}

/// The checksum of a state whose header is complete but for it.
fn checksum(bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(bytes.get(..CHECKED).unwrap_or(&[]));
    crc.update(bytes.get(HEADER..).unwrap_or(&[]));
    crc.finalize()
}

/// Bytes that are left to read.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take<const N: usize>(&mut self) -> Result<[u8; N], StateError> {
        let (head, rest) = self.0.split_first_chunk().ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(*head)
    }

    fn bytes(&mut self, len: usize) -> Result<&'a [u8], StateError> {
        let (head, rest) = self.0.split_at_checked(len).ok_or(StateError::Truncated)?;
        self.0 = rest;
        Ok(head)
    }
}
