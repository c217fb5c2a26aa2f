//! Every request of the back-end, as the bytes that the document describes.

use vhost_user::{
    BackendCode as C, BackendRequest as R, IotlbAccess, IotlbReport, ProtocolFeatures as P, ShmemRange,
};

use super::{file, hex};

/// One request of the back-end in all its forms.
pub(crate) struct BackendSample {
    pub(crate) code: C,
    pub(crate) request: fn() -> R,
    /// The message as a back-end sends it.
    pub(crate) bytes: Vec<u8>,
    /// How many descriptors go with it.
    pub(crate) fds: usize,
    /// Whether it was understood.
    pub(crate) check: fn(&R) -> bool,
    /// What it needs.
    pub(crate) needs: P,
}

const OBJECT: [u8; 16] = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16];
const OBJECT_HEX: &str = "01020304 0506 0708 090a0b0c0d0e0f10";
const RANGE: ShmemRange = ShmemRange { shmid: 5, offset: 0x2000, len: 0x3000 };
const MISS: IotlbReport = IotlbReport::Miss { iova: 0x1_0000_2000, access: IotlbAccess::WRITE };
const FAIL: IotlbReport = IotlbReport::AccessFail { iova: 0x3000, access: IotlbAccess::READ };

pub(crate) fn samples() -> Vec<BackendSample> {
    let sample = |request: fn() -> R, bytes: &str, fds, check, needs| BackendSample {
        code: request().code(),
        request,
        bytes: hex(bytes),
        fds,
        check,
        needs,
    };
    let sends_fd = P::BACKEND_SEND_FD;
    vec![
        sample(
            || R::Iotlb(MISS),
            "01000000 01000000 20000000
             0020000001000000 0000000000000000 0000000000000000 02 01 000000000000",
            0,
            |r| matches!(r, R::Iotlb(MISS)),
            P::empty(),
        ),
        sample(
            || R::Iotlb(FAIL),
            "01000000 01000000 20000000
             0030000000000000 0000000000000000 0000000000000000 01 04 000000000000",
            0,
            |r| matches!(r, R::Iotlb(FAIL)),
            P::empty(),
        ),
        sample(
            || R::ConfigChange,
            "02000000 01000000 00000000",
            0,
            |r| matches!(r, R::ConfigChange),
            P::CONFIG,
        ),
        sample(
            || R::VringHostNotifier { index: 7, size: 0x1000, offset: 0x8000, fd: Some(file()) },
            "03000000 01000000 18000000 0700000000000000 0010000000000000 0080000000000000",
            1,
            |r| matches!(r, R::VringHostNotifier { index: 7, size: 0x1000, offset: 0x8000, fd: Some(_) }),
            P::HOST_NOTIFIER | sends_fd,
        ),
        sample(
            || R::VringHostNotifier { index: 255, size: 0, offset: 0, fd: None },
            "03000000 01000000 18000000 ff01000000000000 0000000000000000 0000000000000000",
            0,
            |r| matches!(r, R::VringHostNotifier { index: 255, size: 0, offset: 0, fd: None }),
            P::HOST_NOTIFIER,
        ),
        sample(
            || R::VringCall { index: 3 },
            "04000000 01000000 08000000 03000000 00000000",
            0,
            |r| matches!(r, R::VringCall { index: 3 }),
            P::INBAND_NOTIFICATIONS,
        ),
        sample(
            || R::VringErr { index: 0x102 },
            "05000000 01000000 08000000 02010000 00000000",
            0,
            |r| matches!(r, R::VringErr { index: 0x102 }),
            P::INBAND_NOTIFICATIONS,
        ),
        sample(
            || R::SharedObjectAdd(OBJECT),
            &format!("06000000 01000000 10000000 {OBJECT_HEX}"),
            0,
            |r| matches!(r, R::SharedObjectAdd(OBJECT)),
            P::SHARED_OBJECT,
        ),
        sample(
            || R::SharedObjectRemove(OBJECT),
            &format!("07000000 01000000 10000000 {OBJECT_HEX}"),
            0,
            |r| matches!(r, R::SharedObjectRemove(OBJECT)),
            P::SHARED_OBJECT,
        ),
        sample(
            || R::SharedObjectLookup(OBJECT),
            &format!("08000000 01000000 10000000 {OBJECT_HEX}"),
            0,
            |r| matches!(r, R::SharedObjectLookup(OBJECT)),
            P::SHARED_OBJECT,
        ),
        sample(
            || R::ShmemMap { range: RANGE, fd: file(), fd_offset: 0x4000, writable: true },
            "09000000 01000000 28000000 05 00000000000000
             0040000000000000 0020000000000000 0030000000000000 0100000000000000",
            1,
            |r| matches!(r, R::ShmemMap { range: RANGE, fd_offset: 0x4000, writable: true, .. }),
            P::SHMEM_MAP | sends_fd,
        ),
        sample(
            || R::ShmemMap { range: RANGE, fd: file(), fd_offset: 0, writable: false },
            "09000000 01000000 28000000 05 00000000000000
             0000000000000000 0020000000000000 0030000000000000 0000000000000000",
            1,
            |r| matches!(r, R::ShmemMap { range: RANGE, fd_offset: 0, writable: false, .. }),
            P::SHMEM_MAP | sends_fd,
        ),
        sample(
            || R::ShmemUnmap(RANGE),
            "0a000000 01000000 28000000 05 00000000000000
             0000000000000000 0020000000000000 0030000000000000 0000000000000000",
            0,
            |r| matches!(r, R::ShmemUnmap(RANGE)),
            P::SHMEM_MAP,
        ),
    ]
}
