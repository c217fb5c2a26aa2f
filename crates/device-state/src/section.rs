//! One part of a state: data of some version.
use std::fmt;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::StateError;

/// The name of a section.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(pub [u8; 4]);

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

/// The data of one part, and the version of its layout.
///
/// Whoever changes what a part saves gives it a new version and goes on decoding the old ones: see
/// [`version`](Self::version).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Section {
    version: u16,
    pub(crate) data: Vec<u8>,
}

impl Section {
    /// A part that has nothing to save.
    pub fn empty() -> Section {
        Section::default()
    }

    /// Data as it is.
    pub fn from_bytes(version: u16, data: Vec<u8>) -> Section {
        Section { version, data }
    }

    /// Encodes a value.
    pub fn encode<T: Serialize>(version: u16, value: &T) -> Result<Section, StateError> {
        let data = postcard::to_allocvec(value).map_err(|_| StateError::Encode)?;
        Ok(Section { version, data })
    }

    /// Decodes a value, of which the newest version that this program knows is `known`. All of the data has to be it.
    pub fn decode<T: DeserializeOwned>(&self, known: u16) -> Result<T, StateError> {
        self.check_version(known)?;
        match postcard::take_from_bytes(&self.data) {
            Ok((value, [])) => Ok(value),
            Ok(_) => Err(StateError::Trailing),
            Err(_) => Err(StateError::Malformed),
        }
    }

    /// Whether this is what [`Section::empty`] makes.
    pub fn decode_empty(&self) -> Result<(), StateError> {
        self.check_version(0)?;
        if self.data.is_empty() { Ok(()) } else { Err(StateError::Trailing) }
    }

    fn check_version(&self, known: u16) -> Result<(), StateError> {
        if self.version > known {
            return Err(StateError::SectionVersion { found: self.version, known });
        }
        Ok(())
    }

    /// The version of the layout.
    pub fn version(&self) -> u16 {
        self.version
    }

    /// The data, encoded.
    pub fn bytes(&self) -> &[u8] {
        &self.data
    }
}
