//! Every store to memory that outlives this process - rings and in-flight regions - goes through here, so that tests
//! can let the process die between any two of them.

/// Carries out one store.
#[inline(always)]
pub(super) fn store<R: Default>(what: impl FnOnce() -> R) -> R {
    #[cfg(test)]
    if !death::survives() {
        return R::default();
    }
    what()
}

/// A process that dies: what it stores afterwards is not there.
#[cfg(test)]
pub(super) mod death {
    use std::cell::Cell;

    thread_local! {
        /// How many stores there are still to be; none: any number.
        static LEFT: Cell<Option<u64>> = const { Cell::new(None) };
    }

    /// From here on, this thread carries out so many stores, and no more.
    pub(in super::super) fn after(stores: u64) {
        LEFT.set(Some(stores));
    }

    /// Whether the stores were used up; ends what [`after`] began.
    pub(in super::super) fn came() -> bool {
        LEFT.take() == Some(0)
    }

    /// Whether the next store would not take place.
    pub(in super::super) fn is_here() -> bool {
        LEFT.get() == Some(0)
    }

    pub(super) fn survives() -> bool {
        match LEFT.get() {
            None => true,
            Some(0) => false,
            Some(left) => {
                LEFT.set(Some(left - 1));
                true
            }
        }
    }
}
