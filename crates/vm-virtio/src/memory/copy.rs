//! Volatile copies: the only code that touches the bytes of guest memory, rings aside.
//!
//! The guest writes the same bytes at any time, so the compiler must neither repeat nor invent nor merge accesses:
//! short copies are volatile accesses of up to eight bytes, long ones an instruction the compiler cannot look into.

/// A value at any address: makes volatile accesses of the value's width without demanding its alignment.
#[derive(Clone, Copy)]
#[repr(C, packed)]
struct Anywhere<T>(T);

/// Above this many bytes the copy instruction of the machine beats a loop.
#[cfg(target_arch = "x86_64")]
const LONG: usize = 192;

/// Copies `len` bytes, each read once and written once. Naturally aligned values of 2, 4 and 8 bytes are accessed as
/// a whole.
///
/// # Safety
/// `src` must be valid for reads and `dst` for writes of `len` bytes, except that another party may write to either
/// at the same time. If they overlap, the bytes of `dst` are unspecified.
// Inlined wherever it is used: mostly the length is that of a structure, and then it is a handful of instructions.
#[inline(always)]
pub(crate) unsafe fn copy(src: *const u8, dst: *mut u8, len: usize) {
    #[cfg(target_arch = "x86_64")]
    if len > LONG {
        // SAFETY: the caller's.
        unsafe { copy_long(src, dst, len) };
        return;
    }
    let mut at = 0;
    while len - at >= 32 {
        for word in 0..4 {
            // SAFETY: `at + 32` is within the ranges that the caller vouches for.
            unsafe { step::<u64>(src.add(at + 8 * word), dst.add(at + 8 * word)) };
        }
        at += 32;
    }
    while len - at >= 8 {
        // SAFETY: `at + 8` is within the ranges that the caller vouches for.
        unsafe { step::<u64>(src.add(at), dst.add(at)) };
        at += 8;
    }
    if len - at >= 4 {
        // SAFETY: as above, four bytes.
        unsafe { step::<u32>(src.add(at), dst.add(at)) };
        at += 4;
    }
    if len - at >= 2 {
        // SAFETY: as above, two bytes.
        unsafe { step::<u16>(src.add(at), dst.add(at)) };
        at += 2;
    }
    if len - at >= 1 {
        // SAFETY: as above, one byte.
        unsafe { step::<u8>(src.add(at), dst.add(at)) };
    }
}

/// The same for lengths that make it worth while.
///
/// # Safety
/// As [`copy`].
#[cfg(target_arch = "x86_64")]
#[inline(never)]
unsafe fn copy_long(src: *const u8, dst: *mut u8, len: usize) {
    // SAFETY: the caller vouches for both ranges; the direction flag is clear by the ABI; nothing but these registers
    // and the range of `dst` changes.
    unsafe {
        std::arch::asm!(
            "rep movsb",
            inout("rcx") len => _,
            inout("rsi") src => _,
            inout("rdi") dst => _,
            options(nostack, preserves_flags)
        );
    }
}

/// Copies one value.
///
/// # Safety
/// As [`copy`], for the size of `T`; `T` must be an integer.
#[inline(always)]
unsafe fn step<T: Copy>(src: *const u8, dst: *mut u8) {
    // SAFETY: the wrapper has an alignment of 1, integers take any bytes, and the caller vouches for the ranges.
    unsafe { dst.cast::<Anywhere<T>>().write_volatile(src.cast::<Anywhere<T>>().read_volatile()) };
}

/// Reads eight bytes at any address, once, as a little-endian number.
///
/// # Safety
/// `src` must be valid for reads of eight bytes, except that another party may write there at the same time.
#[inline(always)]
pub(crate) unsafe fn load_u64(src: *const u8) -> u64 {
    // SAFETY: the wrapper has an alignment of 1, an integer takes any bytes, and the caller vouches for the range.
    u64::from_le(unsafe { src.cast::<Anywhere<u64>>().read_volatile() }.0)
}
