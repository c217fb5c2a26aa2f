//! SIGBUS in a front-end's memory: the file was truncated after it was mapped (failure policy 6).
//!
//! The handler lets a page of zeros appear where the access failed and poisons the mapping; the access is repeated and
//! succeeds, and who looks at the poison afterwards fails the device. A fault at any other address is not ours: it
//! goes on to whoever handled it before. A signal that somebody sent ends the process.
//!
//! Invariants:
//! * The handler takes no lock, allocates nothing and frees nothing: it walks a list of entries that only ever grows,
//!   whose fields are atomic, and makes one or two system calls.
//! * An entry is [`Entry::set`] after its mapping was made and cleared before it is unmapped, so ranges never overlap.
//!   Who faults in a mapping keeps it, so the entry that the handler needs does not change under it; others may, and
//!   are passed over while they do (their version is odd).
use std::ffi::{c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr;
use std::sync::atomic::{AtomicPtr, AtomicU32, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, Once, OnceLock, PoisonError};

use vm_virtio::memory::Poison;

/// Pages of one mapping that get a page of zeros each. Then the rest of it gets them at once: a mapping in pieces costs
/// the kernel memory and has a limit.
const PAGES: u32 = 256;

/// A mapped range, or a place for one. Never freed.
#[derive(Debug, Default)]
struct Entry {
    /// Odd while the fields change.
    version: AtomicU32,
    base: AtomicUsize,
    len: AtomicUsize,
    /// The unit in which the file is mapped.
    granule: AtomicUsize,
    pages: AtomicU32,
    poison: AtomicPtr<Poison>,
    next: AtomicPtr<Entry>,
}

/// What the handler needs to know of a range.
struct Found {
    base: usize,
    len: usize,
    granule: usize,
    poison: *const Poison,
}

impl Entry {
    /// `len` 0: of no range. Callers hold the lock of [`FREE`], or the registration of this entry.
    fn set(&self, base: usize, len: usize, granule: usize, poison: *const Poison) {
        self.version.fetch_add(1, Ordering::Relaxed);
        fence(Ordering::Release);
        self.base.store(base, Ordering::Relaxed);
        self.len.store(len, Ordering::Relaxed);
        self.granule.store(granule, Ordering::Relaxed);
        self.pages.store(0, Ordering::Relaxed);
        self.poison.store(poison.cast_mut(), Ordering::Relaxed);
        self.version.fetch_add(1, Ordering::Release);
    }

    fn holds(&self, addr: usize) -> Option<Found> {
        let version = self.version.load(Ordering::Acquire);
        let found = Found {
            base: self.base.load(Ordering::Relaxed),
            len: self.len.load(Ordering::Relaxed),
            granule: self.granule.load(Ordering::Relaxed),
            poison: self.poison.load(Ordering::Relaxed),
        };
        fence(Ordering::Acquire);
        let stable = version.is_multiple_of(2) && version == self.version.load(Ordering::Relaxed);
        (stable && addr.wrapping_sub(found.base) < found.len).then_some(found)
    }
}

/// All entries that were ever made.
static ENTRIES: AtomicPtr<Entry> = AtomicPtr::new(ptr::null_mut());
/// Those of no range.
static FREE: Mutex<Vec<&'static Entry>> = Mutex::new(Vec::new());
/// Who handled the signal before.
static BEFORE: OnceLock<libc::sigaction> = OnceLock::new();

/// A range that is watched, until this is dropped; drop it before the range is unmapped.
#[derive(Debug)]
pub(crate) struct Guarded {
    entry: &'static Entry,
    poison: Arc<Poison>,
}

impl Guarded {
    /// Watches a range that was mapped in units of `granule` bytes.
    pub(crate) fn new(base: *const c_void, len: usize, granule: usize) -> Guarded {
        install();
        let poison = Arc::<Poison>::default();
        let entry = FREE.lock().unwrap_or_else(PoisonError::into_inner).pop().unwrap_or_else(more);
        entry.set(base as usize, len, granule, Arc::as_ptr(&poison));
        Guarded { entry, poison }
    }

    /// Whether memory of the range was lost.
    pub(crate) fn poison(&self) -> &Arc<Poison> {
        &self.poison
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        self.entry.set(0, 0, 0, ptr::null());
        FREE.lock().unwrap_or_else(PoisonError::into_inner).push(self.entry);
    }
}

/// One more entry: as many as there are ever mappings at the same time, which are limited.
fn more() -> &'static Entry {
    let entry: &'static Entry = Box::leak(Box::default());
    let mut first = ENTRIES.load(Ordering::Relaxed);
    loop {
        entry.next.store(first, Ordering::Relaxed);
        let pointer = ptr::from_ref(entry).cast_mut();
        match ENTRIES.compare_exchange_weak(first, pointer, Ordering::Release, Ordering::Relaxed) {
            Ok(_) => return entry,
            Err(other) => first = other,
        }
    }
}

/// Installs the handler, once.
fn install() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let mut before = MaybeUninit::<libc::sigaction>::uninit();
        // SAFETY: an action of zeros is a valid one; sigaction writes `before` if it succeeds, and it is read only
        // then. The handler has the signature that SA_SIGINFO demands and is async-signal-safe, see the invariants.
        unsafe {
            let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
            if libc::sigaction(libc::SIGBUS, ptr::null(), before.as_mut_ptr()) != 0 {
                return;
            }
            // Before the handler is there: it reads this.
            let _ = BEFORE.set(before.assume_init());
            action.sa_sigaction = handle as *const () as usize;
            // On the alternate stack that the runtime gave each thread, as the runtime's own handler.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            libc::sigaction(libc::SIGBUS, &raw const action, ptr::null_mut());
        }
    });
}

extern "C" fn handle(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the kernel hands over a valid structure; the address means something if the kernel raised the signal,
    // which a positive code says.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code > 0 && replace(addr) {
        return;
    }
    pass_on(signal, info, context);
}

/// Lets zeros appear at the address, if it is in a range that is watched.
fn replace(addr: usize) -> bool {
    let mut at = ENTRIES.load(Ordering::Acquire);
    // SAFETY: entries are never freed.
    while let Some(entry) = unsafe { at.as_ref() } {
        at = entry.next.load(Ordering::Acquire);
        let Some(found) = entry.holds(addr) else { continue };
        // SAFETY: who faults here keeps the mapping, and with it the registration and its poison.
        unsafe { (*found.poison).set() };
        let page = addr - (addr - found.base) % found.granule.max(1);
        let one = found.granule.min(found.base + found.len - page);
        let few = entry.pages.fetch_add(1, Ordering::Relaxed) < PAGES;
        return few && zeros(page, one) || zeros(found.base, found.len);
    }
    false
}

/// Replaces a part of a watched mapping.
fn zeros(base: usize, len: usize) -> bool {
    // SAFETY: errno is the thread's own. The range is within a mapping that somebody keeps; what appears there can be
    // accessed like what was there, and goes with the mapping when that is unmapped.
    unsafe {
        let errno = libc::__errno_location();
        let saved = *errno;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED | libc::MAP_NORESERVE;
        let mapped = libc::mmap(base as *mut c_void, len, prot, flags, -1, 0);
        *errno = saved;
        mapped != libc::MAP_FAILED
    }
}

/// The signal is somebody else's.
fn pass_on(signal: c_int, info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: as in `handle`.
    let sent = unsafe { (*info).si_code } <= 0;
    // One that was sent asks for the process's end. The runtime's handler would swallow it, and put an end to ours.
    let before = BEFORE.get().filter(|_| !sent);
    let handler = before.map_or(libc::SIG_DFL, |before| before.sa_sigaction);
    // SAFETY: what was installed as a handler has the signature that its flags say. With the default action the
    // handler goes: the access is repeated, and the signal ends the process; one that was sent is raised again.
    unsafe {
        match handler {
            libc::SIG_IGN => {}
            libc::SIG_DFL => {
                libc::signal(signal, libc::SIG_DFL);
                if sent {
                    libc::raise(signal);
                }
            }
            handler if before.is_some_and(|before| before.sa_flags & libc::SA_SIGINFO != 0) => {
                let handler: extern "C" fn(c_int, *mut libc::siginfo_t, *mut c_void) =
                    std::mem::transmute(handler);
                handler(signal, info, context);
            }
            handler => {
                let handler: extern "C" fn(c_int) = std::mem::transmute(handler);
                handler(signal);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;

    use super::*;

    struct Mapped(*mut u8, usize, OwnedFd);

    fn mapped(len: usize) -> Mapped {
        let fd = rustix::fs::memfd_create("truncated", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, len as u64).unwrap();
        let prot = rustix::mm::ProtFlags::READ | rustix::mm::ProtFlags::WRITE;
        // SAFETY: without MAP_FIXED the kernel chooses addresses that are free.
        let base = unsafe {
            rustix::mm::mmap(ptr::null_mut(), len, prot, rustix::mm::MapFlags::SHARED, &fd, 0).unwrap()
        };
        Mapped(base.cast(), len, fd)
    }

    impl Mapped {
        fn at(&self, offset: usize) -> *mut u8 {
            assert!(offset < self.1);
            self.0.wrapping_add(offset)
        }
    }

    impl Drop for Mapped {
        fn drop(&mut self) {
            // SAFETY: mapped with this length, and not used any more.
            unsafe { rustix::mm::munmap(self.0.cast(), self.1).unwrap() };
        }
    }

    #[test]
    fn policy_6_lost_pages_read_as_zeros_and_those_that_are_left_stay() {
        let map = mapped(0x4000);
        let guarded = Guarded::new(map.0.cast(), map.1, 0x1000);
        // SAFETY: within the mapping, here and below.
        unsafe {
            for page in 0..4 {
                map.at(page * 0x1000).write_volatile(7);
            }
            rustix::fs::ftruncate(&map.2, 0x2000).unwrap();
            assert!(!guarded.poison().is_set());
            assert_eq!(map.at(0x1000).read_volatile(), 7);
            assert!(!guarded.poison().is_set(), "nothing was lost there");
            assert_eq!(map.at(0x3abc).read_volatile(), 0);
            assert!(guarded.poison().is_set());
            map.at(0x2000).write_volatile(9);
            assert_eq!((map.at(0x2000).read_volatile(), map.at(0x1000).read_volatile()), (9, 7));
        }
    }

    #[test]
    fn policy_6_a_mapping_that_is_lost_in_many_places_is_replaced_as_a_whole() {
        let map = mapped(0x1000 * (2 * PAGES as usize + 2));
        let guarded = Guarded::new(map.0.cast(), map.1, 0x1000);
        rustix::fs::ftruncate(&map.2, 0x1000).unwrap();
        for page in (1..=PAGES as usize).map(|page| 2 * page) {
            // SAFETY: within the mapping.
            unsafe { map.at(page * 0x1000).write_volatile(1) };
        }
        // SAFETY: within the mapping.
        unsafe { map.at(0x1000).write_volatile(1) };
        assert!(guarded.entry.pages.load(Ordering::Relaxed) == PAGES + 1 && guarded.poison().is_set());
        // SAFETY: within the mapping.
        unsafe { map.at(0x5000).write_volatile(1) };
        assert_eq!(guarded.entry.pages.load(Ordering::Relaxed), PAGES + 1, "nothing is left to be lost");
    }

    #[test]
    fn policy_6_entries_are_used_again_and_hold_what_is_mapped_only() {
        let map = mapped(0x2000);
        let outside = map.0 as usize + map.1;
        for _ in 0..100 {
            let guarded = Guarded::new(map.0.cast(), map.1, 0x1000);
            assert!(guarded.entry.holds(outside).is_none() && guarded.entry.holds(outside - 1).is_some());
            let entry = guarded.entry;
            drop(guarded);
            // Another test may have taken it meanwhile, for a range of its own.
            assert!(entry.holds(outside - 1).is_none());
        }
    }
}
