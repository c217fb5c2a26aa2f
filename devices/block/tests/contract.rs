//! The disk in memory, both layouts: 5.2 of virtio and what a malformed request gets, line by line of the contract's sheet.
//! Lines of zoned devices do not apply: ZONED is not offered (`c5_2_3_...`), and zone requests are refused
//! (`c5_2_6_2_zone_requests_...`). What a guest's driver does with it is in the guest tests.
mod support;

use std::sync::Arc;

use support::feature::{self, bit};
use support::memory::{Host, ask, disk, host, patterned, send, status};
use support::probe::{Call, Probe};
use support::{DISCARD, FLUSH, GET_ID, IN, IOERR, OK, OUT, UNSUPP, WRITE_ZEROES, header, range};
use virtio_block::backend::MemoryImage;
use virtio_testkit::{Buf, MemoryHost, RingLayout, Shape};
use vm_virtio::{ConfigWriter, DeviceType, Features, HostEvent, VirtioDevice};

const SECTORS: u64 = 64;
const BYTES: u64 = SECTORS * 512;

fn probe() -> Probe {
    Probe::new(patterned(BYTES), false)
}

fn field(host: &Host, offset: u32, len: usize) -> u64 {
    let mut bytes = [0; 8];
    host.config().read(offset, &mut bytes[..len]);
    u64::from_le_bytes(bytes)
}

fn writes_nothing(probe: &Probe) {
    assert_eq!(probe.bytes(), patterned(BYTES), "nothing was written");
    assert_eq!(probe.calls(), [], "nor asked");
}

// Identity, features, configuration.

#[test]
fn c5_2_1_and_c5_2_2_a_block_device_with_n_queues() {
    let device = disk(probe().image(), |options| options.num_queues = 3);
    assert_eq!(device.device_type(), DeviceType::BLOCK);
    let queues = device.queues(device.features());
    assert_eq!(
        queues.iter().map(|queue| (queue.name, queue.lane)).collect::<Vec<_>>(),
        [("requestq", 0), ("requestq", 1), ("requestq", 2)]
    );
    assert_eq!(device.queues(device.features() - feature::MQ).len(), 1, "N = 1 without MQ");
}

#[test]
fn c5_2_3_features_that_are_offered_and_nothing_else() {
    let always = feature::SIZE_MAX
        | feature::SEG_MAX
        | feature::GEOMETRY
        | feature::BLK_SIZE
        | feature::FLUSH
        | feature::TOPOLOGY
        | feature::CONFIG_WCE;
    let plain = disk(probe().image(), |_| {}).features();
    assert_eq!(plain, always | feature::DISCARD | feature::WRITE_ZEROES);
    let queues = disk(probe().image(), |options| options.num_queues = 2).features();
    assert_eq!(queues, plain | feature::MQ);
    let ignoring = disk(probe().image(), |options| options.discard = false).features();
    assert_eq!(ignoring, plain - feature::DISCARD);
    let read_only = disk(probe().image(), |options| options.read_only = true).features();
    assert_eq!(read_only, always | feature::RO, "what would write is not offered");
    // LIFETIME only with real metrics (5.2.6.2), ZONED not by a device without zones (5.2.5.2); SECURE_ERASE, and BARRIER
    // and SCSI of the legacy interface.
    for never in [15, 16, 17, 0, 7] {
        for offered in [plain, queues, ignoring, read_only] {
            assert!(!offered.contains(bit(never)), "bit {never}");
        }
    }
}

#[test]
fn c5_2_4_configuration_of_each_offered_feature_is_readable_before_features_ok() {
    let device = disk(Arc::new(MemoryImage::new(vec![0; 3 << 20])), |options| {
        options.num_queues = 5;
        options.queue_size = 256;
        options.block_size = Some(4096);
    });
    let host = MemoryHost::builder(device).build();
    assert_eq!(host.config().len(), 60);
    assert_eq!(field(&host, 0, 8), (3 << 20) / 512, "capacity in sectors, whatever a block is");
    assert_eq!(field(&host, 8, 4), 1 << 20, "size_max");
    assert_eq!(field(&host, 12, 4), 126, "seg_max");
    assert_eq!((field(&host, 16, 2), field(&host, 18, 1), field(&host, 19, 1)), (6144 / (16 * 63), 16, 63));
    assert_eq!(field(&host, 20, 4), 4096, "blk_size in bytes");
    assert_eq!((field(&host, 24, 1), field(&host, 25, 1)), (0, 0), "physical_block_exp, alignment_offset");
    assert_eq!((field(&host, 26, 2), field(&host, 28, 4)), (1, 0), "min_io_size, opt_io_size in blocks");
    assert_eq!(field(&host, 32, 1), 1, "writeback");
    assert_eq!(field(&host, 34, 2), 5, "num_queues");
    assert_eq!((field(&host, 36, 4), field(&host, 40, 4), field(&host, 44, 4)), (1 << 21, 32, 8), "discard");
    assert_eq!((field(&host, 48, 4), field(&host, 52, 4), field(&host, 56, 1)), (1 << 16, 32, 1), "zeroes");
}

#[test]
fn c5_2_5_2_unused_bytes_are_zero_and_so_are_fields_of_what_is_not_offered() {
    let device = disk(probe().image(), |options| options.read_only = true);
    let host = MemoryHost::builder(device).build();
    assert_eq!(field(&host, 33, 1), 0, "unused0");
    assert_eq!(field(&host, 57, 3), 0, "unused1");
    for (offset, len) in [(36, 8), (44, 8), (52, 8), (60, 8), (68, 8), (76, 8), (84, 8), (92, 4)] {
        assert_eq!(field(&host, offset, len), 0, "at {offset}: discard, zeroes, secure erase, zones");
    }
}

#[test]
fn c5_2_4_seg_max_leaves_room_for_header_and_status_without_indirect_descriptors() {
    for size in [4, 64, 128, 1024] {
        let device = disk(probe().image(), |options| options.queue_size = size);
        let host = MemoryHost::builder(device).build();
        assert!(field(&host, 12, 4) + 2 <= size.into());
        assert!(field(&host, 12, 4) >= 1, "Linux takes 0 for 1");
    }
}

#[test]
fn c5_2_4_blk_size_is_a_power_of_two_from_512_on() {
    for (size, fits) in
        [(512, true), (4096, true), (256, false), (0, false), (3 * 512, false), (1 << 17, false)]
    {
        let mut options = virtio_block::Options::new(virtio_block::Options::own_pool());
        options.block_size = Some(size);
        let image = MemoryImage::new(vec![0; 1 << 20]);
        assert_eq!(virtio_block::Block::new(Arc::new(image), options).is_ok(), fits, "{size}");
    }
}

#[test]
fn c5_2_5_2_flush_is_always_offered_also_with_config_wce() {
    for read_only in [false, true] {
        let features = disk(probe().image(), |options| options.read_only = read_only).features();
        assert!(features.contains(feature::FLUSH | feature::CONFIG_WCE));
    }
}

#[test]
fn c5_2_5_2_config_wce_without_flush_begins_write_through() {
    let device = disk(probe().image(), |_| {});
    let mut host = MemoryHost::builder(device).without(feature::FLUSH).start();
    assert_eq!(field(&host, 32, 1), 0);
    // The default is back with a reset.
    host.reset();
    assert_eq!(field(&host, 32, 1), 1);
}

#[test]
fn c2_2_2_every_subset_of_the_features_is_accepted() {
    let features = [
        feature::SIZE_MAX,
        feature::SEG_MAX,
        feature::GEOMETRY,
        feature::BLK_SIZE,
        feature::FLUSH,
        feature::TOPOLOGY,
        feature::CONFIG_WCE,
        feature::DISCARD,
        feature::WRITE_ZEROES,
    ];
    for subset in 0..1 << features.len() {
        let chosen = (0..features.len()).filter(|at| subset >> at & 1 == 1).map(|at| features[at]);
        let chosen = chosen.fold(Features::empty(), |all, one| all | one);
        assert!(disk(probe().image(), |_| {}).check_features(chosen | Features::VERSION_1));
    }
}

// Requests.

#[test]
fn c5_2_6_each_request_and_its_length() {
    for layout in RingLayout::ALL {
        let probe = probe();
        let mut host = host(layout, probe.image(), |options| options.serial = "disk 1".into());
        assert_eq!(ask(&mut host, IN, 3, &[], 1024), (OK, patterned(BYTES)[1536..2560].to_vec(), 1025));
        assert_eq!(ask(&mut host, OUT, 62, &[7; 1024], 0), (OK, vec![], 1));
        assert_eq!(probe.bytes()[62 * 512..], [7; 1024]);
        assert_eq!(ask(&mut host, FLUSH, 0, &[], 0), (OK, vec![], 1));
        assert_eq!(
            ask(&mut host, GET_ID, 0, &[], 20),
            (OK, b"disk 1\0\0\0\0\0\0\0\0\0\0\0\0\0\0".to_vec(), 21)
        );
        assert_eq!(ask(&mut host, DISCARD, 0, &range(8, 8, 0), 0), (OK, vec![], 1));
        assert_eq!(ask(&mut host, WRITE_ZEROES, 0, &range(16, 8, 0), 0), (OK, vec![], 1));
        assert_eq!(probe.bytes()[16 * 512..24 * 512], [0; 4096]);
        let calls = probe.calls();
        assert!(calls.contains(&Call::Flush) && calls.contains(&Call::Discard(4096, 4096)), "{calls:?}");
    }
}

#[test]
fn c5_2_6_an_id_of_20_characters_has_no_terminator() {
    let mut host =
        host(RingLayout::Split, probe().image(), |options| options.serial = "twenty-characters-20".into());
    assert_eq!(ask(&mut host, GET_ID, 0, &[], 20).1, b"twenty-characters-20");
    // Another length: as much as there is of both, and the length does not claim what was not written.
    assert_eq!(ask(&mut host, GET_ID, 0, &[], 6), (OK, b"twenty".to_vec(), 7));
    let (status, data, len) = ask(&mut host, GET_ID, 0, &[], 30);
    assert_eq!((status, &data[..20], len), (OK, &b"twenty-characters-20"[..], 20));
    assert_eq!(ask(&mut host, GET_ID, 0, &[], 0), (OK, vec![], 1));
}

#[test]
fn c5_2_6_2_a_transfer_of_no_sectors_is_done() {
    let probe = probe();
    let mut host = host(RingLayout::Packed, probe.image(), |_| {});
    assert_eq!(ask(&mut host, IN, SECTORS, &[], 0), (OK, vec![], 1));
    assert_eq!(ask(&mut host, OUT, 0, &[], 0).0, OK);
    assert_eq!(ask(&mut host, IN, SECTORS + 1, &[], 0).0, IOERR, "of a place that does not exist");
    assert_eq!(probe.bytes(), patterned(BYTES));
}

#[test]
fn c2_7_4_1_any_layout_a_header_in_many_descriptors_and_a_status_that_shares_one() {
    for layout in RingLayout::ALL {
        for shape in [Shape::Direct, Shape::Indirect] {
            let probe = probe();
            let mut host = host(layout, probe.image(), |_| {});
            // A descriptor for each byte of the header; the status at the end of the data's.
            let mut pieces: Vec<Buf> =
                header(IN, 1).iter().map(|byte| host.ram().readable(&[*byte])).collect();
            pieces.push(host.ram().writable(513));
            let (len, bytes) = send(&mut host, &pieces, shape);
            assert_eq!((len, bytes[512], &bytes[..512]), (513, OK, &patterned(BYTES)[512..1024]));
            // Header and data in one descriptor; more of the data in pieces that are no sectors.
            let message = [header(OUT, 2), (0..1000u32).map(|n| n as u8).collect()].concat();
            let rest: Vec<u8> = (1000..1024u32).map(|n| n as u8).collect();
            let pieces = [
                host.ram().readable(&message),
                host.ram().readable(&rest[..5]),
                host.ram().readable(&rest[5..]),
                host.ram().writable(1),
            ];
            assert_eq!(send(&mut host, &pieces, shape), (1, vec![OK]));
            assert!(probe.bytes()[1024..2048].iter().copied().eq((0..1024u32).map(|n| n as u8)));
            // Data of a read in odd pieces, the last of them with the status.
            let pieces = [
                host.ram().readable(&header(IN, 0)),
                host.ram().writable(1),
                host.ram().writable(1000),
                host.ram().writable(24),
            ];
            let (len, bytes) = send(&mut host, &pieces, shape);
            assert_eq!((len, bytes[1024]), (1025, OK));
            assert_eq!(bytes[..1024], patterned(BYTES)[..1024]);
        }
    }
}

#[test]
fn as_many_segments_as_a_chain_can_have() {
    let directory = virtio_testkit::daemon::TempDir::new();
    let path = directory.join("disk");
    std::fs::write(&path, patterned(1 << 20)).unwrap();
    for aio in [virtio_block::Aio::Auto, virtio_block::Aio::IoUring, virtio_block::Aio::Threads] {
        let image = virtio_block::backend::open(&path, options(true)).unwrap();
        let device = disk(image, |options| {
            options.read_only = true;
            options.aio = aio;
            options.queue_size = 1024;
        });
        let mut host = MemoryHost::builder(device).queue_size(1024).start();
        let mut pieces = vec![host.ram().readable(&header(IN, 0))];
        pieces.extend((0..1022).map(|_| host.ram().writable(512)));
        pieces.push(host.ram().writable(513));
        let (len, bytes) = send(&mut host, &pieces, Shape::Indirect);
        assert_eq!((len, bytes[1023 * 512]), (1023 * 512 + 1, OK), "{aio:?}");
        assert_eq!(bytes[..1023 * 512], patterned(1 << 20)[..1023 * 512]);
    }
}

fn options(read_only: bool) -> virtio_block::backend::OpenOptions {
    let format = virtio_block::Format::Raw;
    virtio_block::backend::OpenOptions { format, read_only, direct: false, lock: true }
}

// Malformed.

#[test]
fn malformed_out_of_range_misaligned_and_overflowing_are_ioerr() {
    for layout in RingLayout::ALL {
        let probe = probe();
        let mut host = host(layout, probe.image(), |_| {});
        let big = u64::MAX / 512;
        for sector in [SECTORS - 1, SECTORS, SECTORS + 1, big, big + 1, u64::MAX - 1, u64::MAX, 1 << 63] {
            let (status, data, len) = ask(&mut host, IN, sector, &[], 1024);
            assert_eq!((status, len), (IOERR, 0), "sector {sector}: no byte counts as written");
            assert!(data.iter().all(|byte| *byte == 0x5a));
            assert_eq!(ask(&mut host, OUT, sector, &[1; 1024], 0), (IOERR, vec![], 1));
        }
        for len in [1, 511, 513, 1023] {
            assert_eq!(ask(&mut host, IN, 0, &[], len).0, IOERR, "{len} bytes");
            assert_eq!(ask(&mut host, OUT, 0, &vec![1; len as usize], 0).0, IOERR, "{len} bytes");
        }
        writes_nothing(&probe);
        assert_eq!(ask(&mut host, IN, SECTORS - 2, &[], 1024).0, OK, "the device goes on");
        assert!(host.engine().stats(0).unwrap().requests.refused > 20, "and counts");
    }
}

#[test]
fn malformed_unknown_types_and_those_of_features_that_were_not_negotiated_are_unsupp() {
    let probe = probe();
    let device = disk(probe.image(), |_| {});
    let mut host = MemoryHost::builder(device).without(feature::DISCARD | feature::WRITE_ZEROES).start();
    // SCSI commands, the flush of the legacy interface, GET_LIFETIME, SECURE_ERASE, nothing at all.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 100, 0x8000_0000, 0x8000_0001, u32::MAX, DISCARD, WRITE_ZEROES]
    {
        assert_eq!(status(&mut host, kind, 0, &range(0, 1, 0)), UNSUPP, "type {kind}");
    }
    writes_nothing(&probe);
}

#[test]
fn c5_2_6_2_zone_requests_are_unsupp_where_zoned_was_not_negotiated() {
    let mut host = host(RingLayout::Split, probe().image(), |_| {});
    for kind in [15, 16, 18, 20, 22, 24, 26] {
        assert_eq!(ask(&mut host, kind, 0, &[], 64).0, UNSUPP, "type {kind}");
    }
}

#[test]
fn malformed_a_header_that_is_short_is_ioerr_or_length_0() {
    for layout in RingLayout::ALL {
        let probe = probe();
        let mut host = host(layout, probe.image(), |_| {});
        for len in [1, 4, 8, 15] {
            let pieces = [host.ram().readable(&header(OUT, 0)[..len]), host.ram().writable(1)];
            assert_eq!(send(&mut host, &pieces, Shape::Direct), (1, vec![IOERR]));
        }
        let pieces = [host.ram().writable(513)];
        let (len, bytes) = send(&mut host, &pieces, Shape::Direct);
        assert_eq!((len, bytes[512]), (0, IOERR), "nothing but a status, which no length covers");
        let pieces = [host.ram().readable(&header(OUT, 0)[..7])];
        assert_eq!(send(&mut host, &pieces, Shape::Direct).0, 0, "and no place for one");
        writes_nothing(&probe);
    }
}

#[test]
fn malformed_without_a_status_byte_nothing_is_done() {
    for layout in RingLayout::ALL {
        let probe = probe();
        let mut host = host(layout, probe.image(), |_| {});
        let pieces = [host.ram().readable(&header(OUT, 0)), host.ram().readable(&[1; 512])];
        assert_eq!(send(&mut host, &pieces, Shape::Direct).0, 0);
        let pieces = [host.ram().readable(&header(FLUSH, 0))];
        assert_eq!(send(&mut host, &pieces, Shape::Direct).0, 0);
        writes_nothing(&probe);
        assert_eq!(status(&mut host, FLUSH, 0, &[]), OK);
    }
}

#[test]
fn malformed_flush_ignores_data_and_sector() {
    let probe = probe();
    let mut host = host(RingLayout::Packed, probe.image(), |_| {});
    assert_eq!(ask(&mut host, FLUSH, u64::MAX, &[1; 100], 0).0, OK);
    assert_eq!(ask(&mut host, FLUSH, 7, &[], 100), (OK, vec![0x5a; 100], 0), "the length claims nothing");
    assert_eq!(probe.calls(), [Call::Flush, Call::Flush]);
}

#[test]
fn malformed_lists_of_ranges_of_any_size() {
    let probe = probe();
    let mut host = host(RingLayout::Split, probe.image(), |_| {});
    for kind in [DISCARD, WRITE_ZEROES] {
        for len in [0, 1, 15, 17, 31, 33] {
            assert_eq!(status(&mut host, kind, 0, &vec![0; len]), IOERR, "{len} bytes of list");
        }
        let many = |count: usize| range(0, 1, 0).repeat(count);
        assert_eq!(status(&mut host, kind, 0, &many(33)), IOERR, "more than max");
        assert_eq!(status(&mut host, kind, 0, &many(60_000)), IOERR);
        for (sector, sectors) in
            [(SECTORS - 1, 2), (SECTORS + 1, 0), (u64::MAX, 1), (0, u32::MAX), (u64::MAX, u32::MAX)]
        {
            assert_eq!(status(&mut host, kind, 0, &range(sector, sectors, 0)), IOERR, "{sector}+{sectors}");
        }
        // One of them is wrong: none is touched.
        let list = [range(0, 8, 0), range(SECTORS, 8, 0)].concat();
        assert_eq!(status(&mut host, kind, 0, &list), IOERR);
    }
    writes_nothing(&probe);
    assert_eq!(status(&mut host, DISCARD, 0, &range(0, 1, 0).repeat(32)), OK);
    assert_eq!(status(&mut host, WRITE_ZEROES, 9, &range(SECTORS, 0, 0)), OK, "a range of nothing");
}

#[test]
fn malformed_a_range_longer_than_max_is_ioerr() {
    // A disk that has the room: no byte of it is touched.
    let mut host = host(RingLayout::Split, Arc::new(MemoryImage::new(vec![0; 48 << 20])), |_| {});
    assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(0, (1 << 16) + 1, 0)), IOERR);
    assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(0, 1 << 16, 0)), OK);
}

// RO.

#[test]
fn c5_2_6_2_and_traps_a_read_only_disk_answers_every_kind_of_write_with_ioerr() {
    for layout in RingLayout::ALL {
        let probe = probe();
        let mut host = host(layout, probe.image(), |options| options.read_only = true);
        assert_eq!(status(&mut host, OUT, 0, &[1; 512]), IOERR);
        assert_eq!(status(&mut host, DISCARD, 0, &range(0, 8, 0)), IOERR);
        assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(0, 8, 1)), IOERR);
        assert_ne!(status(&mut host, 14, 0, &range(0, 8, 0)), OK, "secure erase");
        writes_nothing(&probe);
        assert_eq!(status(&mut host, FLUSH, 0, &[]), OK);
        assert_eq!(ask(&mut host, IN, 0, &[], 512).0, OK);
    }
}

#[test]
fn c5_2_6_2_a_read_only_disk_refuses_writes_also_if_ro_was_not_negotiated() {
    let probe = probe();
    let device = disk(probe.image(), |options| options.read_only = true);
    let mut host = MemoryHost::builder(device).without(feature::RO).start();
    assert_eq!(status(&mut host, OUT, 0, &[1; 512]), IOERR);
    writes_nothing(&probe);
}

// Discard and zeros.

#[test]
fn c5_2_6_2_unknown_flags_and_unmap_of_a_discard_are_unsupp() {
    let probe = probe();
    let mut host = host(RingLayout::Split, probe.image(), |_| {});
    for flags in [1, 2, 3, 1 << 31, u32::MAX] {
        assert_eq!(status(&mut host, DISCARD, 0, &range(0, 8, flags)), UNSUPP, "discard {flags:#x}");
        if flags != 1 {
            assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(0, 8, flags)), UNSUPP, "zeroes {flags:#x}");
        }
    }
    // Whatever else is wrong, and in whichever range.
    let list = [range(SECTORS, 8, 0), range(0, 8, 4)].concat();
    assert_eq!(status(&mut host, WRITE_ZEROES, 0, &list), UNSUPP);
    writes_nothing(&probe);
}

#[test]
fn c5_2_6_2_after_write_zeroes_reads_are_zeros_whether_or_not_unmap() {
    for unmap in [0, 1] {
        let probe = probe();
        let mut host = host(RingLayout::Packed, probe.image(), |_| {});
        let list = [range(1, 3, unmap), range(40, 24, unmap)].concat();
        assert_eq!(status(&mut host, WRITE_ZEROES, 0, &list), OK);
        assert_eq!(ask(&mut host, IN, 1, &[], 1536).1, [0; 1536]);
        assert_eq!(ask(&mut host, IN, 40, &[], 24 * 512).1, [0; 24 * 512]);
        assert_eq!(ask(&mut host, IN, 4, &[], 512).1, patterned(BYTES)[2048..2560], "and nothing else");
        assert!(probe.calls().contains(&Call::Zeroes { offset: 512, len: 1536, unmap: unmap == 1 }));
    }
}

#[test]
fn c5_2_6_2_write_zeroes_may_unmap_only_if_it_can() {
    let with = MemoryHost::builder(disk(probe().image(), |_| {})).build();
    let without = MemoryHost::builder(disk(probe().image(), |options| options.discard = false)).build();
    assert_eq!((field(&with, 56, 1), field(&without, 56, 1)), (1, 0));
}

#[test]
fn where_discards_are_ignored_zeros_never_unmap() {
    let probe = probe();
    let mut host = host(RingLayout::Split, probe.image(), |options| options.discard = false);
    assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(0, 8, 1)), OK);
    assert_eq!(probe.calls(), [Call::Zeroes { offset: 0, len: 4096, unmap: false }]);
}

#[test]
fn a_storage_that_cannot_discard_is_unsupp_not_an_error() {
    let probe = probe();
    let mut host = host(RingLayout::Split, probe.image(), |_| {});
    // EOPNOTSUPP, as an image says it.
    probe.fail(Some(libc_eopnotsupp()));
    assert_eq!(status(&mut host, DISCARD, 0, &range(0, 8, 0)), UNSUPP);
    assert_eq!(status(&mut host, OUT, 0, &[0; 512]), IOERR, "of a write it is an error");
}

fn libc_eopnotsupp() -> i32 {
    rustix::io::Errno::OPNOTSUPP.raw_os_error()
}

// When a write is stable.

/// A write and zeros under these negotiated features and this register: whether they are stable before they are answered.
fn stable(without: Features, register: Option<u8>, write_through: bool) -> bool {
    let probe = probe();
    let device = disk(probe.image(), |options| options.write_through = write_through);
    let mut host = MemoryHost::builder(device).without(without).start();
    if let Some(value) = register {
        host.engine().write_config(32, &[value], ConfigWriter::Driver).unwrap();
    }
    assert_eq!(status(&mut host, OUT, 0, &[1; 512]), OK);
    let [Call::Write { stable, .. }] = probe.calls()[..] else { panic!("one write") };
    assert_eq!(status(&mut host, WRITE_ZEROES, 0, &range(8, 8, 0)), OK);
    assert_eq!(probe.calls().contains(&Call::Flush), stable, "zeros are as stable as data");
    stable
}

#[test]
fn c5_2_6_2_case_1_and_traps_without_flush_and_config_wce_writes_are_stable() {
    assert!(stable(feature::FLUSH | feature::CONFIG_WCE, None, false));
}

#[test]
fn c5_2_6_2_case_2_the_writeback_register_decides_with_config_wce() {
    assert!(!stable(Features::empty(), None, false), "a driver that flushes");
    assert!(stable(Features::empty(), Some(0), false));
    assert!(!stable(Features::empty(), Some(1), true));
    assert!(stable(Features::empty(), None, true), "as the command line says");
    assert!(stable(feature::FLUSH, None, false));
    // Without CONFIG_WCE there is no register to write to, and what is in it means nothing.
    assert!(!stable(feature::CONFIG_WCE, Some(0), false));
    assert!(stable(feature::CONFIG_WCE, Some(1), true), "a host that writes through does not ask");
}

#[test]
fn c5_2_6_2_case_3_a_flush_reaches_the_image_after_the_writes_before_it() {
    let probe = probe();
    let mut host = host(RingLayout::Split, probe.image(), |_| {});
    assert_eq!(status(&mut host, OUT, 4, &[1; 512]), OK);
    assert_eq!(status(&mut host, FLUSH, 0, &[]), OK);
    assert_eq!(probe.calls(), [Call::Write { offset: 2048, stable: false }, Call::Flush]);
}

#[test]
fn c5_2_4_the_driver_writes_the_register_and_nothing_else() {
    let mut host = host(RingLayout::Split, probe().image(), |_| {});
    let mut before = [0; 60];
    host.config().read(0, &mut before);
    host.engine().write_config(0, &[0xff; 60], ConfigWriter::Driver).unwrap();
    host.engine().write_config(31, &[9, 0, 9], ConfigWriter::Driver).unwrap();
    let mut after = [0; 60];
    host.config().read(0, &mut after);
    before[32] = 0;
    assert_eq!(after, before);
    assert!(host.engine().write_config(32, &[77], ConfigWriter::Driver).is_ok());
    assert_eq!(field(&host, 32, 1), 1, "0 or 1");
    host.reset();
    assert_eq!(field(&host, 32, 1), 1, "the default after a reset");
}

// Size.

#[test]
fn an_image_that_is_no_multiple_of_512_ends_with_its_last_sector() {
    for (bytes, block, sectors) in [(1025, 512, 2), (1535, 512, 2), (8191, 4096, 8), (12287, 4096, 16)] {
        let image = Probe::new(vec![5; bytes], false);
        let mut host = host(RingLayout::Split, image.image(), |options| options.block_size = Some(block));
        assert_eq!(field(&host, 0, 8), sectors);
        assert_eq!(ask(&mut host, IN, sectors - 1, &[], 512), (OK, vec![5; 512], 513));
        assert_eq!(ask(&mut host, IN, sectors, &[], 512).0, IOERR);
        assert_eq!(status(&mut host, OUT, sectors, &[1; 512]), IOERR);
        assert_eq!(image.bytes().len(), bytes);
    }
}

#[test]
fn c5_2_6_2_a_changed_capacity_is_told_to_the_driver() {
    use vm_virtio::HostRequest;
    use vm_virtio::controls::{Arguments, ControlRequest, Value};
    for layout in RingLayout::ALL {
        let probe = probe();
        let mut host = host(layout, probe.image(), |_| {});
        let resize = |host: &mut Host, bytes: Option<u64>| {
            let arguments = bytes.map(|bytes| ("bytes".to_owned(), Value::U64(bytes))).into_iter().collect();
            let request = ControlRequest::Run("resize".into(), Arguments(arguments));
            host.engine().host_request(HostRequest::Control(request)).unwrap();
        };
        host.events();
        let generation = host.config().generation();
        resize(&mut host, Some(2 * BYTES));
        assert!(host.run_until(support::SOON, |host| field(host, 0, 8) == 2 * SECTORS));
        assert!(host.events().iter().any(|event| matches!(event, HostEvent::ConfigChanged)));
        assert_ne!(host.config().generation(), generation);
        assert_eq!(status(&mut host, OUT, 2 * SECTORS - 1, &[1; 512]), OK);
        resize(&mut host, Some(BYTES));
        assert!(host.run_until(support::SOON, |host| field(host, 0, 8) == SECTORS));
        assert_eq!(ask(&mut host, IN, 2 * SECTORS - 1, &[], 512).0, IOERR);
        // Somebody else made it larger.
        virtio_block::Image::resize(&*probe.image(), Some(3 * BYTES)).unwrap();
        resize(&mut host, None);
        assert!(host.run_until(support::SOON, |host| field(host, 0, 8) == 3 * SECTORS));
        host.reset();
        assert_eq!(field(&host, 0, 8), 3 * SECTORS, "a reset does not shrink it");
    }
}
