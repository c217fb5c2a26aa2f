//! A set of numbers of which ranges are given away and taken back: the one algorithm behind every kind of resource.
//!
//! Two maps, free and taken, both from a range's first number to its last. Together they always cover the pool exactly, and
//! two free ranges never touch. Each allocation stays a range of its own, so that it can only be given back as it was given.
//!
//! Why not the interval tree of rust-vmm's `vm-allocator` 0.1: it knows no window, its whole range must be shorter than 2^64, and a
//! search walks over everything that is taken, where this one visits what is free, of which there is little in practice.

use std::collections::BTreeMap;

use super::{Pool, ResourceError};

/// Which of several possible places is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AllocPolicy {
    /// The lowest.
    #[default]
    FirstMatch,
    /// The highest.
    LastMatch,
    /// This one or none.
    ExactMatch(u64),
}

/// What one range has to be like: a size, an alignment (1 unless said otherwise), a window (everywhere), a policy (first match).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request {
    size: u64,
    align: u64,
    window: (u64, u64),
    policy: AllocPolicy,
}

impl Request {
    /// A range of `size` bytes, ports, lines or whatever the pool consists of. Zero is refused when it is asked for.
    pub const fn new(size: u64) -> Self {
        Self { size, align: 1, window: (0, u64::MAX), policy: AllocPolicy::FirstMatch }
    }

    /// The first number of the range shall be a multiple of `align`, a power of two.
    #[must_use]
    pub const fn align(mut self, align: u64) -> Self {
        self.align = align;
        self
    }

    /// All numbers of the range shall be within `min` to `max`, both included.
    #[must_use]
    pub const fn within(mut self, min: u64, max: u64) -> Self {
        self.window = (min, max);
        self
    }

    /// Which place is taken if there are several.
    #[must_use]
    pub const fn policy(mut self, policy: AllocPolicy) -> Self {
        self.policy = policy;
        self
    }

    /// The range shall begin at `base`: [`AllocPolicy::ExactMatch`].
    #[must_use]
    pub const fn at(self, base: u64) -> Self {
        self.policy(AllocPolicy::ExactMatch(base))
    }
}

/// See the module.
#[derive(Clone, Debug)]
pub(super) struct RangeSet {
    pool: Pool,
    first: u64,
    last: u64,
    free: BTreeMap<u64, u64>,
    taken: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// `first` to `last`, both included; `None` if that is nothing.
    pub(super) fn new(pool: Pool, first: u64, last: u64) -> Option<Self> {
        (first <= last).then(|| Self {
            pool,
            first,
            last,
            free: BTreeMap::from([(first, last)]),
            taken: BTreeMap::new(),
        })
    }

    /// Takes a range; its first number.
    pub(super) fn allocate(&mut self, request: &Request) -> Result<u64, ResourceError> {
        let pool = self.pool;
        let Request { size, align, window: (min, max), policy } = *request;
        let Some(more) = size.checked_sub(1) else { return Err(ResourceError::ZeroSize { pool }) };
        if !align.is_power_of_two() {
            return Err(ResourceError::Alignment { pool, align });
        }
        if min > max {
            return Err(ResourceError::Window { pool, min, max });
        }
        let (min, max) = (min.max(self.first), max.min(self.last));
        let base = match policy {
            AllocPolicy::ExactMatch(base) => {
                if base & (align - 1) != 0 {
                    return Err(ResourceError::Misaligned { pool, base, align });
                }
                let Some(last) = base.checked_add(more) else {
                    return Err(ResourceError::WrapsAround { pool, base, size });
                };
                if base < min || last > max {
                    return Err(ResourceError::Outside { pool, base, size, min, max });
                }
                if self.free.range(..=base).next_back().is_none_or(|(_, &end)| end < last) {
                    return Err(ResourceError::InUse { pool, base, size });
                }
                base
            }
            AllocPolicy::FirstMatch => self
                .lowest(more, align, min, max)
                .ok_or(ResourceError::Exhausted { pool, size, align, min, max })?,
            AllocPolicy::LastMatch => self
                .highest(more, align, min, max)
                .ok_or(ResourceError::Exhausted { pool, size, align, min, max })?,
        };
        // Cannot overflow: each of the three has seen that `base + more` is within a free range.
        self.take(base, base.saturating_add(more));
        Ok(base)
    }

    fn lowest(&self, more: u64, align: u64, min: u64, max: u64) -> Option<u64> {
        if min > max {
            return None;
        }
        // The free range that `min` is in begins at or below it.
        let from = self.free.range(..=min).next_back().map_or(min, |(&start, _)| start);
        self.free.range(from..=max).find_map(|(&start, &end)| {
            let base = start.max(min).checked_add(align - 1)? & !(align - 1);
            (base.checked_add(more)? <= end.min(max)).then_some(base)
        })
    }

    fn highest(&self, more: u64, align: u64, min: u64, max: u64) -> Option<u64> {
        if min > max {
            return None;
        }
        self.free.range(..=max).rev().take_while(|&(_, &end)| end >= min).find_map(|(&start, &end)| {
            let base = end.min(max).checked_sub(more)? & !(align - 1);
            (base >= start.max(min)).then_some(base)
        })
    }

    /// `base` to `last` are within one free range.
    fn take(&mut self, base: u64, last: u64) {
        let Some((&start, &end)) = self.free.range(..=base).next_back() else { return };
        if start < base {
            self.free.insert(start, base - 1);
        } else {
            self.free.remove(&start);
        }
        if last < end {
            self.free.insert(last + 1, end);
        }
        self.taken.insert(base, last);
    }

    /// Gives back a range that was taken exactly like this.
    pub(super) fn free(&mut self, base: u64, size: u64) -> Result<(), ResourceError> {
        let error = ResourceError::NotAllocated { pool: self.pool, base, size };
        let Some(last) = size.checked_sub(1).and_then(|more| base.checked_add(more)) else {
            return Err(error);
        };
        if self.taken.get(&base) != Some(&last) {
            return Err(error);
        }
        self.taken.remove(&base);
        let (mut start, mut end) = (base, last);
        if let Some((&before, &its_end)) = self.free.range(..base).next_back()
            && its_end.checked_add(1) == Some(base)
        {
            start = before;
        }
        if let Some(after) = last.checked_add(1)
            && let Some(its_end) = self.free.remove(&after)
        {
            end = its_end;
        }
        self.free.insert(start, end);
        Ok(())
    }

    pub(super) fn is_untouched(&self) -> bool {
        self.taken.is_empty()
    }

    /// First and last number of each range that is taken, in order.
    pub(super) fn taken(&self) -> impl Iterator<Item = (u64, u64)> {
        self.taken.iter().map(|(&first, &last)| (first, last))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(first: u64, last: u64) -> RangeSet {
        RangeSet::new(Pool::Mmio, first, last).unwrap()
    }

    /// The two maps cover the pool, do not overlap, and free ranges are merged.
    fn check(set: &RangeSet) {
        let mut all: Vec<_> = set.free.iter().map(|(&a, &b)| (a, b, true)).collect();
        all.extend(set.taken.iter().map(|(&a, &b)| (a, b, false)));
        all.sort_unstable();
        let mut next = Some(set.first);
        let mut was_free = false;
        for (first, last, free) in all {
            assert_eq!(Some(first), next, "{set:?}");
            assert!(first <= last && !(free && was_free), "{set:?}");
            next = last.checked_add(1);
            was_free = free;
        }
        assert_eq!(next, set.last.checked_add(1));
    }

    #[test]
    fn an_empty_pool_does_not_exist() {
        assert!(RangeSet::new(Pool::Pio, 1, 0).is_none());
    }

    #[test]
    fn the_whole_of_all_numbers_can_be_managed_but_for_one() {
        let mut set = set(0, u64::MAX);
        assert_eq!(set.allocate(&Request::new(u64::MAX).at(1)), Ok(1));
        assert_eq!(set.allocate(&Request::new(1)), Ok(0));
        assert!(matches!(set.allocate(&Request::new(1)), Err(ResourceError::Exhausted { .. })));
        set.free(1, u64::MAX).unwrap();
        assert_eq!(set.allocate(&Request::new(1).policy(AllocPolicy::LastMatch)), Ok(u64::MAX));
        check(&set);
    }

    #[test]
    fn bad_requests_have_their_errors_and_change_nothing() {
        let pool = Pool::Mmio;
        let mut set = set(0x1000, 0x8fff);
        set.allocate(&Request::new(0x1000).at(0x3000)).unwrap();
        let before = format!("{set:?}");
        let last = AllocPolicy::LastMatch;
        for (request, error) in [
            (Request::new(0), ResourceError::ZeroSize { pool }),
            (Request::new(0).at(0x2000), ResourceError::ZeroSize { pool }),
            (Request::new(1).align(0), ResourceError::Alignment { pool, align: 0 }),
            (Request::new(1).align(3), ResourceError::Alignment { pool, align: 3 }),
            (
                Request::new(1).align(0x1000).at(0x1001),
                ResourceError::Misaligned { pool, base: 0x1001, align: 0x1000 },
            ),
            (Request::new(2).at(u64::MAX), ResourceError::WrapsAround { pool, base: u64::MAX, size: 2 }),
            (
                Request::new(u64::MAX).at(0x1000),
                ResourceError::WrapsAround { pool, base: 0x1000, size: u64::MAX },
            ),
            (Request::new(1).within(2, 1), ResourceError::Window { pool, min: 2, max: 1 }),
            (
                Request::new(2).at(0xfff),
                ResourceError::Outside { pool, base: 0xfff, size: 2, min: 0x1000, max: 0x8fff },
            ),
            (
                Request::new(2).at(0x8fff),
                ResourceError::Outside { pool, base: 0x8fff, size: 2, min: 0x1000, max: 0x8fff },
            ),
            (
                Request::new(2).at(0x2000).within(0x2001, 0x3000),
                ResourceError::Outside { pool, base: 0x2000, size: 2, min: 0x2001, max: 0x3000 },
            ),
            // One number of somebody else's at either end, all of it, and more than it.
            (Request::new(2).at(0x2fff), ResourceError::InUse { pool, base: 0x2fff, size: 2 }),
            (Request::new(2).at(0x3fff), ResourceError::InUse { pool, base: 0x3fff, size: 2 }),
            (Request::new(0x1000).at(0x3000), ResourceError::InUse { pool, base: 0x3000, size: 0x1000 }),
            (Request::new(0x3000).at(0x2000), ResourceError::InUse { pool, base: 0x2000, size: 0x3000 }),
            (
                Request::new(0x5001),
                ResourceError::Exhausted { pool, size: 0x5001, align: 1, min: 0x1000, max: 0x8fff },
            ),
            (
                Request::new(0x5001).policy(last),
                ResourceError::Exhausted { pool, size: 0x5001, align: 1, min: 0x1000, max: 0x8fff },
            ),
            (
                Request::new(0x10).within(0x3000, 0x3fff),
                ResourceError::Exhausted { pool, size: 0x10, align: 1, min: 0x3000, max: 0x3fff },
            ),
            (
                Request::new(1).within(0, 0xfff),
                ResourceError::Exhausted { pool, size: 1, align: 1, min: 0x1000, max: 0xfff },
            ),
            (
                Request::new(1).within(0x9000, 0xffff).policy(last),
                ResourceError::Exhausted { pool, size: 1, align: 1, min: 0x9000, max: 0x8fff },
            ),
            (
                Request::new(1).align(1 << 63),
                ResourceError::Exhausted { pool, size: 1, align: 1 << 63, min: 0x1000, max: 0x8fff },
            ),
        ] {
            assert_eq!(set.allocate(&request), Err(error), "{request:?}");
            assert_eq!(format!("{set:?}"), before, "{request:?}");
        }
    }

    #[test]
    fn only_what_was_given_is_taken_back_and_only_once() {
        let mut set = set(0, 0xff);
        set.allocate(&Request::new(0x10).at(0x20)).unwrap();
        set.allocate(&Request::new(0x10).at(0x30)).unwrap();
        for (base, size) in [(0x20, 0), (0x20, 0xf), (0x20, 0x20), (0x21, 0xf), (0x40, 1), (0x20, u64::MAX)] {
            let error = ResourceError::NotAllocated { pool: Pool::Mmio, base, size };
            assert_eq!(set.free(base, size), Err(error));
        }
        set.free(0x20, 0x10).unwrap();
        assert!(set.free(0x20, 0x10).is_err());
        set.free(0x30, 0x10).unwrap();
        assert_eq!(set.free, BTreeMap::from([(0, 0xff)]));
    }

    #[derive(Clone, Debug)]
    enum Step {
        Allocate(Request),
        Free(usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let policy = prop_oneof![
            Just(AllocPolicy::FirstMatch),
            Just(AllocPolicy::LastMatch),
            (0_u64..140).prop_map(AllocPolicy::ExactMatch),
        ];
        let request = (0_u64..20, 0_u32..6, 0_u64..140, 0_u64..140, policy, any::<bool>()).prop_map(
            |(size, align, min, max, policy, window)| {
                let request = Request::new(size).align(1 << align).policy(policy);
                if window { request.within(min, max) } else { request }
            },
        );
        prop_oneof![3 => request.prop_map(Step::Allocate), 2 => (0_usize..64).prop_map(Step::Free)]
    }

    proptest! {
        /// Against a model that is one flag a number, and tries every place.
        #[test]
        fn behaves_as_a_table_of_flags(offset in prop_oneof![Just(0), Just(u64::MAX - 127)],
                                       steps in proptest::collection::vec(step(), 1..80)) {
            let mut set = set(offset, offset + 127);
            let mut used = [false; 128];
            let mut given: Vec<(u64, u64)> = Vec::new();
            for step in steps {
                match step {
                    Step::Allocate(mut request) => {
                        // The model counts from zero; the set is at the offset.
                        request.window = (
                            request.window.0.saturating_add(offset),
                            request.window.1.saturating_add(offset),
                        );
                        if let AllocPolicy::ExactMatch(base) = request.policy {
                            request.policy = AllocPolicy::ExactMatch(base.saturating_add(offset));
                        }
                        let fits = |index: u64| {
                            let (base, size) = (offset + index, request.size);
                            base.is_multiple_of(request.align)
                                && index + size <= 128
                                && base >= request.window.0
                                && base + (size - 1) <= request.window.1
                                && (index..index + size).all(|i| !used[i as usize])
                        };
                        let expected = if request.size == 0 || request.window.0 > request.window.1 {
                            None
                        } else {
                            match request.policy {
                                AllocPolicy::FirstMatch => (0..128).find(|&i| fits(i)),
                                AllocPolicy::LastMatch => (0..128).rev().find(|&i| fits(i)),
                                AllocPolicy::ExactMatch(base) => {
                                    base.checked_sub(offset).filter(|&i| i < 128 && fits(i))
                                }
                            }
                        };
                        let got = set.allocate(&request).ok();
                        prop_assert_eq!(got, expected.map(|i| offset + i), "{:?}", request);
                        if let Some(index) = expected {
                            (index..index + request.size).for_each(|i| used[i as usize] = true);
                            given.push((offset + index, request.size));
                        }
                    }
                    Step::Free(which) if which < given.len() => {
                        let (base, size) = given.swap_remove(which);
                        prop_assert_eq!(set.free(base, size), Ok(()));
                        prop_assert!(set.free(base, size).is_err());
                        let index = base - offset;
                        (index..index + size).for_each(|i| used[i as usize] = false);
                    }
                    Step::Free(_) => {}
                }
                check(&set);
            }
        }
    }
}
