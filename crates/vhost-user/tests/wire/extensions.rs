//! The requests of single protocol features. Where the document leaves a layout to C, it is that of QEMU's headers on a
//! 64-bit machine.

use vhost_user::{
    Answer, FrontendCode as C, FrontendRequest as R, InflightArea, IotlbAccess, IotlbChange, LogArea,
    MigrationPhase, TransferDirection,
};

use super::{Sample, ack, file, own, text};

const LOG: LogArea = LogArea { size: 0x2_0000, offset: 0x1000 };
const AREA: InflightArea =
    InflightArea { mmap_size: 0x2040, mmap_offset: 0x40, num_queues: 2, queue_size: 256 };
const ASKED: InflightArea = InflightArea { mmap_size: 0, mmap_offset: 0, ..AREA };
const UPDATE: IotlbChange = IotlbChange::Update {
    iova: 0xffff_0000_0000,
    size: 0x1000,
    user_addr: 0x7f00_0000_3000,
    access: IotlbAccess::READ.union(IotlbAccess::WRITE),
};
const INVALIDATE: IotlbChange = IotlbChange::Invalidate { iova: 0x2000, size: 0x4000 };
const OBJECT: [u8; 16] =
    [0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff];
const OBJECT_HEX: &str = "00112233 4455 6677 8899aabbccddeeff";
/// An operation code, whatever a session is made of, and room for the id.
const SESSION: [u8; 20] = [4, 0, 0, 0, 0, 0, 0, 0, 0xca, 0xfe, 0xba, 0xbe, 0, 0, 0, 0, 0, 0, 0, 0];

fn acks() -> Vec<Sample> {
    vec![
        ack(
            C::SetLogFd,
            "07000000 01000000 00000000",
            1,
            |r| matches!(r, R::SetLogFd(_)),
            |f, fds| text(f.set_log_fd(fds[0])),
        ),
        ack(
            C::SendRarp,
            "13000000 01000000 08000000 525400123456 0000",
            0,
            |r| matches!(r, R::SendRarp([0x52, 0x54, 0, 0x12, 0x34, 0x56])),
            |f, _| text(f.send_rarp([0x52, 0x54, 0, 0x12, 0x34, 0x56])),
        ),
        ack(
            C::NetSetMtu,
            "14000000 01000000 08000000 2823000000000000",
            0,
            |r| matches!(r, R::NetSetMtu(9000)),
            |f, _| text(f.net_set_mtu(9000)),
        ),
        ack(
            C::SetVringEndian,
            "17000000 01000000 08000000 02000000 01000000",
            0,
            |r| matches!(r, R::SetVringEndian { index: 2, big: true }),
            |f, _| text(f.set_vring_endian(2, true)),
        ),
        ack(
            C::SetVringEndian,
            "17000000 01000000 08000000 02000000 00000000",
            0,
            |r| matches!(r, R::SetVringEndian { index: 2, big: false }),
            |f, _| text(f.set_vring_endian(2, false)),
        ),
        ack(
            C::CloseCryptoSession,
            "1b000000 01000000 08000000 0700000000000000",
            0,
            |r| matches!(r, R::CloseCryptoSession(7)),
            |f, _| text(f.close_crypto_session(7)),
        ),
        ack(
            C::PostcopyListen,
            "1d000000 01000000 00000000",
            0,
            |r| matches!(r, R::PostcopyListen),
            |f, _| text(f.postcopy_listen()),
        ),
        ack(
            C::SetInflightFd,
            "20000000 01000000 18000000 4020000000000000 4000000000000000 0200 0001 00000000",
            1,
            |r| matches!(r, R::SetInflightFd(AREA, _)),
            |f, fds| text(f.set_inflight_fd(AREA, fds[0])),
        ),
        ack(
            C::GpuSetSocket,
            "21000000 01000000 00000000",
            1,
            |r| matches!(r, R::GpuSetSocket(_)),
            |f, fds| text(f.gpu_set_socket(fds[0])),
        ),
        ack(
            C::VringKick,
            "23000000 01000000 08000000 03000000 00000000",
            0,
            |r| matches!(r, R::VringKick { index: 3 }),
            |f, _| text(f.vring_kick(3)),
        ),
    ]
}

/// Requests with replies of their own.
fn owns() -> Vec<Sample> {
    vec![
        own(
            C::SetLogBase,
            "06000000 01000000 10000000 0000020000000000 0010000000000000",
            |r| matches!(r, R::SetLogBase(LOG, _)),
            || Answer::Done,
            "06000000 05000000 10000000 0000020000000000 0010000000000000",
            |f, fds| text(f.set_log_base(LOG, fds[0])),
            "()",
        )
        .fds(1, 0),
        own(
            C::IotlbMsg,
            "16000000 01000000 20000000
             00000000ffff0000 0010000000000000 00300000007f0000 03 02 000000000000",
            |r| matches!(r, R::Iotlb(UPDATE)),
            || Answer::Done,
            "16000000 05000000 08000000 0000000000000000",
            |f, _| text(f.iotlb(UPDATE)),
            "()",
        )
        .fails("16000000 05000000 08000000 0100000000000000"),
        own(
            C::IotlbMsg,
            "16000000 01000000 20000000
             0020000000000000 0040000000000000 0000000000000000 00 03 000000000000",
            |r| matches!(r, R::Iotlb(INVALIDATE)),
            || Answer::Done,
            "16000000 05000000 08000000 0000000000000000",
            |f, _| text(f.iotlb(INVALIDATE)),
            "()",
        )
        .fails("16000000 05000000 08000000 0100000000000000"),
        own(
            C::CreateCryptoSession,
            "1a000000 01000000 14000000 0400000000000000 cafebabe 0000000000000000",
            |r| matches!(r, R::CreateCryptoSession(session) if session[..] == SESSION),
            || Answer::CryptoSession(0x1_0000_0002),
            "1a000000 05000000 14000000 0400000000000000 cafebabe 0200000001000000",
            |f, _| text(f.create_crypto_session(&SESSION)),
            "100000002",
        )
        .fails("1a000000 05000000 14000000 0400000000000000 cafebabe ffffffffffffffff"),
        own(
            C::PostcopyAdvise,
            "1c000000 01000000 00000000",
            |r| matches!(r, R::PostcopyAdvise),
            || Answer::Fd(file()),
            "1c000000 05000000 00000000",
            |f, _| text(f.postcopy_advise().map(|_| "a file")),
            "\"a file\"",
        )
        .fds(0, 1)
        .fails("1c000000 05000000 00000000"),
        own(
            C::PostcopyEnd,
            "1e000000 01000000 00000000",
            |r| matches!(r, R::PostcopyEnd),
            || Answer::Done,
            "1e000000 05000000 08000000 0000000000000000",
            |f, _| text(f.postcopy_end()),
            "()",
        )
        .fails("1e000000 05000000 08000000 0100000000000000"),
        own(
            C::GetInflightFd,
            "1f000000 01000000 18000000 0000000000000000 0000000000000000 0200 0001 00000000",
            |r| matches!(r, R::GetInflightFd(ASKED)),
            || Answer::Inflight(AREA, file()),
            "1f000000 05000000 18000000 4020000000000000 4000000000000000 0200 0001 00000000",
            |f, _| text(f.get_inflight_fd(2, 256).map(|(area, _)| (area == AREA, "a file"))),
            "(true, \"a file\")",
        )
        .fds(0, 1)
        .fails("1f000000 05000000 18000000 0000000000000000 0000000000000000 0000 0000 00000000"),
        own(
            C::GetSharedObject,
            &format!("29000000 01000000 10000000 {OBJECT_HEX}"),
            |r| matches!(r, R::GetSharedObject(OBJECT)),
            || Answer::Fd(file()),
            "29000000 05000000 00000000",
            |f, _| text(f.get_shared_object(OBJECT).map(|_| "a file")),
            "\"a file\"",
        )
        .fds(0, 1)
        .fails("29000000 05000000 00000000"),
        own(
            C::SetDeviceStateFd,
            "2a000000 01000000 08000000 00000000 00000000",
            |r| {
                matches!(
                    r,
                    R::SetDeviceStateFd {
                        direction: TransferDirection::Save,
                        phase: MigrationPhase::Stopped,
                        ..
                    }
                )
            },
            || Answer::Done,
            "2a000000 05000000 08000000 0001000000000000",
            |f, fds| text(f.set_device_state_fd(TransferDirection::Save, MigrationPhase::Stopped, fds[0])),
            "None",
        )
        .fds(1, 0)
        .fails("2a000000 05000000 08000000 0101000000000000"),
        own(
            C::SetDeviceStateFd,
            "2a000000 01000000 08000000 01000000 00000000",
            |r| matches!(r, R::SetDeviceStateFd { direction: TransferDirection::Load, .. }),
            || Answer::Fd(file()),
            "2a000000 05000000 08000000 0000000000000000",
            |f, fds| {
                let own = f.set_device_state_fd(TransferDirection::Load, MigrationPhase::Stopped, fds[0])?;
                text(Ok(own.map(|_| "a file")))
            },
            "Some(\"a file\")",
        )
        .fds(1, 1)
        .fails("2a000000 05000000 08000000 0101000000000000"),
        own(
            C::CheckDeviceState,
            "2b000000 01000000 00000000",
            |r| matches!(r, R::CheckDeviceState),
            || Answer::Done,
            "2b000000 05000000 08000000 0000000000000000",
            |f, _| text(f.check_device_state()),
            "()",
        )
        .fails("2b000000 05000000 08000000 0100000000000000"),
        own(
            C::GetShmemConfig,
            "2c000000 01000000 00000000",
            |r| matches!(r, R::GetShmemConfig),
            || Answer::ShmemConfig(vec![(1, 0x1000), (255, 0x4_0000_0000)]),
            &format!(
                "2c000000 05000000 08080000 02000000 00000000
                 0000000000000000 0010000000000000 {} 0000000004000000",
                "0000000000000000".repeat(253)
            ),
            |f, _| text(f.get_shmem_config()),
            "[(1, 1000), (ff, 400000000)]",
        ),
    ]
}

pub(super) fn samples() -> Vec<Sample> {
    acks().into_iter().chain(owns()).collect()
}
