//! The log of pages that a device has written, which a live migration reads: one bit a page of 4 KiB of guest-physical
//! addresses, shared with the front-end (vhost-user, "Migration").
//!
//! Bits are set after the page was written and before the driver hears of it, by an atomic operation that is also a full
//! barrier: who clears a bit and then copies the page copies what was written, or finds the bit set again.
use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use super::SharedMemory;
use crate::lane::Interrupt;

/// Bytes that one bit stands for (`VHOST_LOG_PAGE`).
pub const LOG_PAGE: u64 = 0x1000;

/// Where pages are marked. Immutable; another log takes its place by `Engine::log`.
#[derive(Clone)]
pub struct DirtyLog {
    area: Arc<SharedMemory>,
    signal: Option<Arc<dyn Interrupt>>,
}

impl DirtyLog {
    /// A log in this area: bit `n % 8` of byte `n / 8` is page `n`. Pages beyond its end are not marked. `signal` is
    /// told after pages were marked.
    pub fn new(area: Arc<SharedMemory>, signal: Option<Arc<dyn Interrupt>>) -> DirtyLog {
        DirtyLog { area, signal }
    }

    /// Marks the pages of a range of guest-physical addresses.
    pub fn mark(&self, addr: u64, len: u64) {
        let Some(last) = len.checked_sub(1).map(|len| addr.saturating_add(len) / LOG_PAGE) else { return };
        let mut page = addr / LOG_PAGE;
        // Ends at the end of the log: no more than an eighth of its bits are visited, a byte each.
        while page <= last
            && let Some(byte) = self.byte(page / 8)
        {
            let (from, to) = (page % 8, (last - (page - page % 8)).min(7));
            // 0 <= from <= to <= 7.
            let bits = (0xffu8 << from) & (0xffu8 >> (7 - to));
            byte.fetch_or(bits, Ordering::SeqCst);
            page = page - page % 8 + 8;
        }
    }

    fn byte(&self, at: u64) -> Option<&AtomicU8> {
        let at = usize::try_from(at).ok().filter(|at| *at < self.area.len())?;
        // SAFETY: within the area, which lives as long as `self`; any byte may be accessed atomically.
        Some(unsafe { AtomicU8::from_ptr(self.area.as_ptr().add(at)) })
    }

    /// Where the bits are.
    pub fn area(&self) -> &Arc<SharedMemory> {
        &self.area
    }

    /// Tells the front-end that pages were marked.
    pub fn signal(&self) {
        if let Some(signal) = &self.signal {
            signal.signal();
        }
    }

    /// Whether the file behind the log was truncated: then pages that were written may be missing (failure policy 6).
    pub fn is_poisoned(&self) -> bool {
        self.area.is_poisoned()
    }
}

impl fmt::Debug for DirtyLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DirtyLog").field("area", &self.area).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicU64;
    use std::time::{Duration, Instant};

    use super::*;

    fn bytes(area: &SharedMemory) -> Vec<u8> {
        // SAFETY: within the area, which nobody else has.
        (0..area.len()).map(|at| unsafe { area.as_ptr().add(at).read() }).collect()
    }

    fn marked(len: usize, ranges: &[(u64, u64)]) -> Vec<u8> {
        let area = Arc::new(SharedMemory::private(len));
        let log = DirtyLog::new(area.clone(), None);
        ranges.iter().for_each(|(addr, len)| log.mark(*addr, *len));
        bytes(&area)
    }

    #[test]
    fn a_bit_stands_for_a_page_and_the_lowest_comes_first() {
        assert_eq!(marked(3, &[(0, 1)]), [1, 0, 0]);
        assert_eq!(marked(3, &[(0x7fff, 1)]), [0x80, 0, 0]);
        assert_eq!(marked(3, &[(0x7fff, 2)]), [0x80, 1, 0]);
        assert_eq!(marked(3, &[(0x2000, 0x1000), (0x5001, 0xfff)]), [0b0010_0100, 0, 0]);
        assert_eq!(marked(3, &[(0x3000, 0x10_001)]), [0xf8, 0xff, 0b1111]);
        assert_eq!(marked(3, &[(0x3000, 0)]), [0; 3]);
    }

    #[test]
    fn pages_beyond_the_end_of_the_log_are_not_marked() {
        assert_eq!(marked(1, &[(0x8000, 1), (u64::MAX, 1), (u64::MAX - 5, u64::MAX)]), [0]);
        assert_eq!(marked(1, &[(0x7000, u64::MAX)]), [0x80]);
        assert_eq!(marked(0, &[(0, 0x10_0000)]), [0u8; 0]);
    }

    /// "Use atomic operations, as the log may be concurrently manipulated": by the front-end that takes bits, and by other
    /// lanes. Whoever marks one page does not undo what somebody else does to the same byte.
    #[test]
    fn marks_of_others_in_the_same_byte_are_not_lost() {
        let log = DirtyLog::new(Arc::new(SharedMemory::private(1)), None);
        let byte = log.byte(0).unwrap();
        let (over, turns) = (AtomicU8::new(0), AtomicU64::new(0));
        let mut lost = 0;
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while over.load(Ordering::SeqCst) == 0 {
                    log.mark(7 * LOG_PAGE, 1);
                    turns.fetch_add(1, Ordering::SeqCst);
                }
            });
            // Where both share a processor little is shown, and it should not take long.
            let deadline = Instant::now() + Duration::from_secs(1);
            for _ in 0..20_000 {
                byte.fetch_and(!1, Ordering::SeqCst);
                log.mark(0, 1);
                // What the other had begun before is over.
                let until = turns.load(Ordering::SeqCst) + 2;
                while turns.load(Ordering::SeqCst) < until {
                    std::hint::spin_loop();
                }
                lost += u32::from(byte.load(Ordering::SeqCst) & 1 == 0);
                if Instant::now() > deadline {
                    break;
                }
            }
            over.store(1, Ordering::SeqCst);
        });
        assert_eq!(lost, 0);
    }

    /// Every range of two bytes' pages against the definition.
    #[test]
    fn each_range_marks_its_pages_and_no_others() {
        for first in 0..24u64 {
            for last in first..24 {
                let log = marked(3, &[(first * LOG_PAGE + 5, (last - first) * LOG_PAGE + 1)]);
                let expected = |page: u64| (first..=last).contains(&page);
                let is = |page: u64| log[page as usize / 8] & (1 << (page % 8)) != 0;
                assert!((0..24).all(|page| is(page) == expected(page)), "{first} to {last}: {log:?}");
            }
        }
    }
}
