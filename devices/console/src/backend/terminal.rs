//! Raw mode that is always taken back, and notices of a terminal's new size.
//!
//! A terminal outlives the process that put it into raw mode, so the way back hangs on nothing that a failing process
//! could miss: it is in the guard's `Drop`, in a handler for the end of the process (a return from `main`, `exit`, a panic of the
//! main thread), and in handlers for the signals that end a process where it stands (a hang-up, an abort, an access to
//! memory that is not there). SIGTERM and SIGINT are the host's: it ends in the first of these ways. Nothing can be done
//! about SIGKILL.
//!
//! Only one terminal of a process is raw at a time. The `unsafe` here is that of system calls which rustix does not have.
#![allow(unsafe_code)]
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicPtr, Ordering};

/// Signals whose default ends the process at once, but for those that cannot be caught and those that a daemon handles. The
/// faults among them happen again when the handler returns.
const FATAL: [(libc::c_int, bool); 10] = [
    (libc::SIGHUP, false),
    (libc::SIGQUIT, false),
    (libc::SIGABRT, false),
    (libc::SIGALRM, false),
    (libc::SIGXCPU, false),
    (libc::SIGUSR1, false),
    (libc::SIGUSR2, false),
    (libc::SIGSEGV, true),
    (libc::SIGILL, true),
    (libc::SIGFPE, true),
];

/// The raw terminal's descriptor; -1: none.
static TERMINAL: AtomicI32 = AtomicI32::new(-1);
/// What it was before. Never freed: a handler may be reading it.
static BEFORE: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());
/// What was there before our handlers, in the order of [`FATAL`]. Never freed.
static HANDLERS: AtomicPtr<[libc::sigaction; FATAL.len()]> = AtomicPtr::new(std::ptr::null_mut());
static INSTALLED: AtomicBool = AtomicBool::new(false);

/// A terminal in raw mode, until this is dropped or the process ends.
#[derive(Debug)]
pub(crate) struct RawMode(());

impl RawMode {
    /// # Errors
    /// It is no terminal, or another one is raw already.
    pub(crate) fn enter(terminal: BorrowedFd<'_>) -> io::Result<RawMode> {
        let fd = rustix::io::fcntl_dupfd_cloexec(terminal, 3)?;
        let mut before = MaybeUninit::<libc::termios>::uninit();
        // SAFETY: tcgetattr fills the structure if it returns 0.
        if unsafe { libc::tcgetattr(fd.as_raw_fd(), before.as_mut_ptr()) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: filled, as just checked.
        let before = unsafe { before.assume_init() };
        let mut raw = before;
        // SAFETY: the structure is a valid one of our own.
        unsafe { libc::cfmakeraw(&raw mut raw) };
        let number = fd.as_raw_fd();
        if TERMINAL.load(Ordering::SeqCst) != -1 {
            return Err(io::Error::new(io::ErrorKind::ResourceBusy, "another port has this terminal"));
        }
        // Never closed: a handler may be using it. There is one for each time that a terminal becomes raw.
        std::mem::forget(fd);
        BEFORE.store(Box::into_raw(Box::new(before)), Ordering::SeqCst);
        TERMINAL.store(number, Ordering::SeqCst);
        install();
        // SAFETY: `raw` is a valid structure.
        if unsafe { libc::tcsetattr(number, libc::TCSANOW, &raw const raw) } != 0 {
            let error = io::Error::last_os_error();
            restore();
            return Err(error);
        }
        Ok(RawMode(()))
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        restore();
    }
}

/// Takes raw mode back; once. Calls nothing that a signal handler must not.
fn restore() {
    let fd = TERMINAL.swap(-1, Ordering::SeqCst);
    let before = BEFORE.load(Ordering::SeqCst);
    if fd >= 0 && !before.is_null() {
        // SAFETY: the pointer is of a box that is never freed, and was stored before the descriptor was.
        unsafe { libc::tcsetattr(fd, libc::TCSANOW, before) };
    }
}

extern "C" fn at_exit() {
    restore();
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    restore();
    let handlers = HANDLERS.load(Ordering::SeqCst);
    // SAFETY: the kernel passes a valid one to a handler with SA_SIGINFO. Signals that a process sends have codes up to 0.
    let was_sent = unsafe { (*info).si_code } <= 0;
    for (at, (fatal, is_fault)) in FATAL.iter().enumerate() {
        if *fatal != signal || handlers.is_null() {
            continue;
        }
        // SAFETY: the array is never freed and is as long as `FATAL`; all zeros are the default action; sigaction(2) and
        // raise(3) may be called here.
        unsafe {
            let default: libc::sigaction = std::mem::zeroed();
            // A fault happens again and is then whose it was. One that was only sent does not: Rust's handler would ignore it.
            let next = if *is_fault && was_sent { &raw const default } else { &raw const (*handlers)[at] };
            libc::sigaction(signal, next, std::ptr::null_mut());
            if was_sent || !is_fault {
                // It is blocked while this handler runs, and then does what it would have done.
                libc::raise(signal);
            }
        }
    }
}

/// Installs the handlers; once a process.
fn install() {
    if INSTALLED.swap(true, Ordering::SeqCst) {
        return;
    }
    // SAFETY: a function without arguments that does not unwind.
    unsafe { libc::atexit(at_exit) };
    // SAFETY: all zeros are a valid sigaction: the default.
    let mut before: [libc::sigaction; FATAL.len()] = unsafe { std::mem::zeroed() };
    for ((signal, _), slot) in FATAL.iter().zip(&mut before) {
        // SAFETY: asks for the present action only.
        unsafe { libc::sigaction(*signal, std::ptr::null(), slot) };
    }
    HANDLERS.store(Box::into_raw(Box::new(before)), Ordering::SeqCst);
    for ((signal, is_fault), slot) in FATAL.iter().zip(&before) {
        // What is ignored, or handled by somebody, does not end the process. Faults are handled by Rust's runtime, which
        // ends it.
        if !is_fault && slot.sa_sigaction != libc::SIG_DFL {
            continue;
        }
        // SAFETY: all zeros are valid; the handler calls nothing that it must not. SA_ONSTACK: a stack that overflowed
        // cannot be used.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = on_fatal as *const () as usize;
            action.sa_flags = libc::SA_ONSTACK | libc::SA_SIGINFO;
            libc::sigaction(*signal, &raw const action, std::ptr::null_mut());
        }
    }
}

/// SIGWINCH as a readable descriptor. It is blocked in the thread that makes this and those that it starts later; other
/// threads must block it, too, or notices may be missed.
#[derive(Debug)]
pub(crate) struct Resizes(OwnedFd);

impl Resizes {
    pub(crate) fn new() -> io::Result<Resizes> {
        let mut set = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: sigemptyset initialises the set, the other calls get an initialised one and a valid signal; no old set is
        // asked for.
        let (fd, blocked) = unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            let mut set = set.assume_init();
            libc::sigaddset(&raw mut set, libc::SIGWINCH);
            let blocked = libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
            (libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK), blocked)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: signalfd returned a new descriptor that nothing else owns.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        if blocked != 0 {
            return Err(io::Error::from_raw_os_error(blocked));
        }
        Ok(Resizes(fd))
    }

    /// Takes the notices: that there were some is all that they say.
    pub(crate) fn take(&self) {
        let mut buffer = [0u8; size_of::<libc::signalfd_siginfo>()];
        while rustix::io::read(&self.0, &mut buffer).is_ok_and(|count| count > 0) {}
    }
}

impl AsFd for Resizes {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
