//! Output that nobody was there to take: bounded, in order, the oldest goes first.
use std::collections::VecDeque;
use std::io::IoSlice;

/// Bytes for the next client.
#[derive(Debug)]
pub(crate) struct Replay {
    bytes: VecDeque<u8>,
    limit: usize,
}

impl Replay {
    pub(crate) fn new(limit: usize) -> Replay {
        Replay { bytes: VecDeque::new(), limit }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    /// Appends; returns how many of the oldest bytes had to go for it.
    pub(crate) fn push(&mut self, data: &[u8]) -> u64 {
        let over = data.len().saturating_sub(self.limit);
        let data = data.get(over..).unwrap_or(&[]);
        let excess = (self.bytes.len() + data.len()).saturating_sub(self.limit);
        self.bytes.drain(..excess.min(self.bytes.len()));
        self.bytes.extend(data);
        (over + excess) as u64
    }

    /// For a system call.
    pub(crate) fn slices(&self) -> [IoSlice<'_>; 2] {
        let (first, second) = self.bytes.as_slices();
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// The oldest `count` bytes are taken.
    pub(crate) fn taken(&mut self, count: usize) {
        self.bytes.drain(..count.min(self.bytes.len()));
        if self.bytes.is_empty() {
            // A port whose client is there keeps no memory.
            self.bytes = VecDeque::new();
        }
    }

    pub(crate) fn to_vec(&self) -> Vec<u8> {
        self.bytes.iter().copied().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_console_what_was_written_before_a_client_comes_is_in_order_and_the_oldest_goes() {
        let mut replay = Replay::new(8);
        assert_eq!(replay.push(b"abc"), 0);
        assert_eq!(replay.push(b"defgh"), 0);
        assert_eq!(replay.to_vec(), b"abcdefgh");
        assert_eq!(replay.push(b"ij"), 2);
        assert_eq!(replay.to_vec(), b"cdefghij");
        assert_eq!(replay.push(b"0123456789"), 10);
        assert_eq!(replay.to_vec(), b"23456789");
        replay.taken(3);
        assert_eq!(replay.push(b"x"), 0);
        assert_eq!(replay.slices().iter().flat_map(|part| part.to_vec()).collect::<Vec<_>>(), b"56789x");
        replay.taken(100);
        assert!(replay.is_empty());
    }
}
