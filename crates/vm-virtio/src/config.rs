//! The configuration space of a device (virtio 1.4, section 2.5): bytes and a generation, shared by device, lanes and
//! hosts, so that a host reads it without entering the device.
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// An access that the configuration space refuses.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ConfigError {
    /// The range does not lie within the space.
    #[error("configuration access of {len} bytes at {offset} is outside of the {size} bytes there are")]
    OutOfRange {
        /// First byte of the access.
        offset: u32,
        /// Length of the access in bytes.
        len: usize,
        /// Size of the space in bytes.
        size: usize,
    },
}

struct Inner {
    bytes: Vec<u8>,
    /// While the driver must see no change (3.4.2): what the device has made of the bytes.
    held: Option<Vec<u8>>,
}

/// Configuration bytes and the generation that tells a driver whether two reads belong together (2.5.2).
pub struct ConfigSpace {
    inner: Mutex<Inner>,
    /// Changed under the lock only. Read without it: who looks before and after he reads bytes sees it move if they did.
    generation: AtomicU32,
}

impl ConfigSpace {
    /// A space of these bytes, generation 0.
    pub fn new(bytes: Vec<u8>) -> Self {
        ConfigSpace { inner: Mutex::new(Inner { bytes, held: None }), generation: AtomicU32::new(0) }
    }

    /// A space without a single byte: the device type has no configuration.
    pub fn empty() -> Self {
        ConfigSpace::new(Vec::new())
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        // Nothing that runs under this lock can panic half-way through a change.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size in bytes.
    pub fn len(&self) -> usize {
        self.lock().bytes.len()
    }

    /// Whether the device type has no configuration.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The current generation: changes with every change of the bytes.
    #[inline]
    pub fn generation(&self) -> u32 {
        self.generation.load(Ordering::SeqCst)
    }

    /// The bytes that readers see have changed; the lock is held.
    fn changed(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// Reads `data.len()` bytes at `offset` as one consistent view; bytes behind the end are zero, since hosts ask for
    /// as much as *they* know of a type. Returns the generation of that view.
    pub fn read(&self, offset: u32, data: &mut [u8]) -> u32 {
        let inner = self.lock();
        let known = inner.bytes.get(offset as usize..).unwrap_or(&[]);
        let n = known.len().min(data.len());
        let (head, tail) = data.split_at_mut(n);
        head.copy_from_slice(&known[..n]);
        tail.fill(0);
        self.generation()
    }

    /// Changes bytes; the generation moves if they differ. Returns whether they did. While the device is suspended by its
    /// driver, readers see the change when it is resumed.
    pub fn set(&self, offset: u32, data: &[u8]) -> Result<bool, ConfigError> {
        let mut inner = self.lock();
        let size = inner.bytes.len();
        let start = offset as usize;
        let Inner { bytes, held, .. } = &mut *inner;
        let is_held = held.is_some();
        let target = held.as_mut().unwrap_or(bytes);
        let slot = start.checked_add(data.len()).and_then(|end| target.get_mut(start..end));
        let Some(slot) = slot else {
            return Err(ConfigError::OutOfRange { offset, len: data.len(), size });
        };
        if slot == data {
            return Ok(false);
        }
        slot.copy_from_slice(data);
        if !is_held {
            self.changed();
        }
        Ok(true)
    }

    /// For a snapshot: what the device has made of the bytes, and the generation that readers see.
    pub(crate) fn save(&self) -> (Vec<u8>, u32) {
        let inner = self.lock();
        (inner.held.as_ref().unwrap_or(&inner.bytes).clone(), self.generation())
    }

    /// The bytes are those of a saved device: a driver that has read some of them goes on.
    pub(crate) fn set_generation(&self, generation: u32) {
        let _inner = self.lock();
        self.generation.store(generation, Ordering::SeqCst);
    }

    /// Readers see no change from here on (3.4.2).
    pub(crate) fn hold(&self) {
        let mut inner = self.lock();
        if inner.held.is_none() {
            inner.held = Some(inner.bytes.clone());
        }
    }

    /// Ends [`Self::hold`]. Returns whether something changed meanwhile.
    pub(crate) fn release(&self) -> bool {
        let mut inner = self.lock();
        match inner.held.take() {
            Some(held) if held != inner.bytes => {
                inner.bytes = held;
                self.changed();
                true
            }
            _ => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn c2_5_2_generation_changes_when_two_reads_could_differ() {
        let space = ConfigSpace::new(vec![1, 2, 3, 4]);
        let mut bytes = [0; 4];
        let before = space.read(0, &mut bytes);
        assert!(!space.set(0, &[1, 2]).unwrap(), "the same bytes are no change");
        assert_eq!(space.generation(), before);
        assert!(space.set(3, &[9]).unwrap());
        assert_ne!(space.read(0, &mut bytes), before);
        assert_eq!(bytes, [1, 2, 3, 9]);
    }

    #[test]
    fn c2_5_2_reads_between_two_equal_generations_belong_together() {
        let space = ConfigSpace::new(vec![0; 2]);
        std::thread::scope(|scope| {
            let device = scope.spawn(|| {
                for value in (1..=255).cycle().take(20_000) {
                    space.set(0, &[value; 2]).unwrap();
                }
            });
            let mut bytes = [0; 2];
            while !device.is_finished() {
                let before = space.generation();
                let (first, second) = bytes.split_at_mut(1);
                space.read(0, first);
                space.read(1, second);
                assert!(bytes[0] == bytes[1] || space.generation() != before);
            }
        });
    }

    #[test]
    fn peers_all_daemons_config_read_past_the_end_gives_zeros_not_memory() {
        let space = ConfigSpace::new(vec![7; 3]);
        let mut bytes = [0xaa; 8];
        space.read(1, &mut bytes);
        assert_eq!(bytes, [7, 7, 0, 0, 0, 0, 0, 0]);
        space.read(u32::MAX, &mut bytes);
        assert_eq!(bytes, [0; 8]);
    }

    #[test]
    fn writes_past_the_end_are_refused() {
        let space = ConfigSpace::new(vec![7; 3]);
        assert!(matches!(space.set(2, &[0, 0]), Err(ConfigError::OutOfRange { .. })));
        assert!(matches!(space.set(u32::MAX, &[0]), Err(ConfigError::OutOfRange { .. })));
    }
}
