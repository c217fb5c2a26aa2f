//! A disk without bytes: writes go nowhere, reads leave the buffer as it was. For measuring what is not the disk.
use std::io;

use super::{Geometry, Image, Payload, StillWanted};

/// A disk of some size and no contents.
pub struct NullImage(u64);

impl NullImage {
    /// A disk of this many bytes, as far as it tells.
    pub fn new(bytes: u64) -> NullImage {
        NullImage(bytes)
    }
}

/// A size as it is in the place of a path: bytes, or with K, M, G behind it.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let (digits, shift) = match text.strip_suffix(['K', 'M', 'G']) {
        Some(digits) => (
            digits,
            match text.as_bytes().last() {
                Some(b'K') => 10,
                Some(b'M') => 20,
                _ => 30,
            },
        ),
        None => (text, 0),
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift).filter(|bytes| i64::try_from(*bytes).is_ok())
}

fn pass(payload: &mut Payload) {
    payload.advance(usize::try_from(payload.left()).unwrap_or(usize::MAX));
}

impl Image for NullImage {
    fn geometry(&self) -> Geometry {
        Geometry { bytes: self.0, block: 512, physical: 512, discards: true }
    }

    fn read(&self, _offset: u64, to: &mut Payload) -> io::Result<()> {
        pass(to);
        Ok(())
    }

    fn write(&self, _offset: u64, from: &mut Payload, _stable: bool) -> io::Result<()> {
        pass(from);
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool, _: StillWanted<'_>) -> io::Result<()> {
        Ok(())
    }

    fn resize(&self, bytes: Option<u64>) -> io::Result<u64> {
        match bytes {
            Some(bytes) if bytes != self.0 => Err(io::ErrorKind::Unsupported.into()),
            _ => Ok(self.0),
        }
    }

    fn blocks(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_is_bytes_or_has_one_letter() {
        let sizes =
            [("512", Some(512)), ("4K", Some(4096)), ("256M", Some(256 << 20)), ("1G", Some(1 << 30))];
        for (text, bytes) in sizes.into_iter().chain([("", None), ("M", None), ("-1", None), ("1T", None)]) {
            assert_eq!(parse_size(text), bytes, "{text}");
        }
        assert_eq!(parse_size("18446744073709551615"), None);
        assert_eq!(parse_size("17179869184G"), None);
    }
}
