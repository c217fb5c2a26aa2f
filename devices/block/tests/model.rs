//! Any requests, cut in any way, against a model of the disk that was written from the standard alone.
mod support;

use proptest::prelude::*;
use support::memory::{Host, disk, patterned, send};
use support::probe::Probe;
use support::{IOERR, OK, UNSUPP, feature, header, range};
use virtio_testkit::{Buf, MemoryHost, RingLayout, Shape};
use vm_virtio::Features;

const SECTORS: u64 = 32;

/// A request before it is cut: what the device reads, and how much it may write.
#[derive(Clone, Debug)]
struct Message {
    readable: Vec<u8>,
    writable: usize,
}

/// What is right.
#[derive(Debug, PartialEq)]
enum Right {
    /// Nothing is written, not even a status.
    Nothing,
    /// This status, and this data if there is any that matters.
    Status(u8, Option<Vec<u8>>),
}

/// 5.2.6, over plain bytes.
fn model(disk: &mut [u8], features: Features, read_only: bool, message: &Message) -> Right {
    let Some(room) = message.writable.checked_sub(1) else { return Right::Nothing };
    if message.readable.len() < 16 {
        return Right::Status(IOERR, None);
    }
    let (header, data) = message.readable.split_at(16);
    let number = |bytes: &[u8]| bytes.iter().rev().fold(0u64, |all, byte| all << 8 | u64::from(*byte));
    let (kind, sector) = (number(&header[..4]), number(&header[8..]));
    let place = |sector: u64, sectors: u64| {
        let end = u128::from(sector) + u128::from(sectors);
        (end <= u128::from(SECTORS)).then(|| sector as usize * 512..end as usize * 512)
    };
    match kind {
        0 if !room.is_multiple_of(512) => Right::Status(IOERR, None),
        0 => match place(sector, room as u64 / 512) {
            Some(place) => Right::Status(OK, Some(disk[place].to_vec())),
            None => Right::Status(IOERR, None),
        },
        1 | 11 | 13 if read_only => Right::Status(IOERR, None),
        1 if !data.len().is_multiple_of(512) => Right::Status(IOERR, None),
        1 => match place(sector, data.len() as u64 / 512) {
            Some(place) => {
                disk[place].copy_from_slice(data);
                Right::Status(OK, None)
            }
            None => Right::Status(IOERR, None),
        },
        4 => Right::Status(OK, None),
        8 => {
            let id = [b"model".as_slice(), &[0; 15]].concat();
            Right::Status(OK, Some(id[..room.min(20)].to_vec()))
        }
        11 | 13 => {
            let feature = if kind == 11 { feature::DISCARD } else { feature::WRITE_ZEROES };
            if !features.contains(feature) {
                return Right::Status(UNSUPP, None);
            }
            if data.is_empty() || !data.len().is_multiple_of(16) || data.len() > 32 * 16 {
                return Right::Status(IOERR, None);
            }
            let flags = if kind == 11 { 0 } else { 1 };
            if data.chunks(16).any(|range| number(&range[12..]) & !flags != 0) {
                return Right::Status(UNSUPP, None);
            }
            let places: Option<Vec<_>> =
                data.chunks(16).map(|range| place(number(&range[..8]), number(&range[8..12]))).collect();
            let Some(places) = places else { return Right::Status(IOERR, None) };
            for place in places {
                // The image fills what is discarded with this.
                disk[place].fill(if kind == 11 { 0xd5 } else { 0 });
            }
            Right::Status(OK, None)
        }
        _ => Right::Status(UNSUPP, None),
    }
}

fn message() -> impl Strategy<Value = Message> {
    let kind = prop_oneof![
        4 => Just(0u32), 4 => Just(1), 1 => Just(4), 1 => Just(8), 2 => Just(11), 2 => Just(13), 1 => any::<u32>()
    ];
    let sector = prop_oneof![8 => 0..SECTORS, 1 => Just(SECTORS), 1 => any::<u64>()];
    let len = prop_oneof![4 => (0..6usize).prop_map(|n| n * 512), 1 => 0..3000usize];
    let ranges = prop::collection::vec(
        (
            prop_oneof![6 => 0..SECTORS, 1 => any::<u64>()],
            prop_oneof![6 => 0..8u32, 1 => any::<u32>()],
            prop_oneof![6 => Just(0), 2 => Just(1u32), 1 => any::<u32>()],
        ),
        0..5,
    );
    let cut = prop_oneof![8 => Just(usize::MAX), 1 => 0..20usize];
    let status = prop_oneof![12 => Just(1), 1 => Just(0)];
    (kind, sector, len, any::<u8>(), ranges, cut, status).prop_map(
        |(kind, sector, len, fill, ranges, cut, status)| {
            let mut readable = header(kind, sector);
            match kind {
                11 | 13 => ranges
                    .iter()
                    .for_each(|(sector, count, flags)| readable.extend(range(*sector, *count, *flags))),
                0 | 8 => {}
                _ => readable.extend(vec![fill; len]),
            }
            let room = match kind {
                0 => len,
                8 => len % 40,
                _ => 0,
            };
            readable.truncate(cut);
            Message { readable, writable: room + status }
        },
    )
}

/// Cuts both parts at these places.
fn chain(host: &Host, message: &Message, cuts: &[usize]) -> Vec<Buf> {
    let pieces = |len: usize| {
        let mut ends: Vec<usize> = cuts.iter().map(|cut| cut % (len + 1)).chain([len]).collect();
        ends.sort();
        ends.dedup();
        let begins = [0].into_iter().chain(ends.clone());
        begins.zip(ends).filter(|(begin, end)| begin < end).collect::<Vec<_>>()
    };
    let readable = pieces(message.readable.len()).into_iter();
    let readable = readable.map(|(begin, end)| host.ram().readable(&message.readable[begin..end]));
    let writable = pieces(message.writable).into_iter();
    let writable = writable.map(|(begin, end)| host.ram().writable((end - begin) as u32));
    readable.chain(writable).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn requests_do_what_the_model_does(
        messages in prop::collection::vec((message(), prop::collection::vec(any::<usize>(), 0..6), any::<bool>()), 1..24),
        packed in any::<bool>(),
        blocks in prop::bool::weighted(0.2),
        read_only in prop::bool::weighted(0.2),
        without in prop::bool::weighted(0.2),
    ) {
        let mut expected = patterned(SECTORS * 512);
        let probe = Probe::new(expected.clone(), blocks);
        let device = disk(probe.image(), |options| {
            options.serial = "model".into();
            options.read_only = read_only;
        });
        let layout = if packed { RingLayout::Packed } else { RingLayout::Split };
        let without = if without { feature::DISCARD | feature::WRITE_ZEROES } else { Features::empty() };
        let mut host = MemoryHost::builder(device).layout(layout).without(without).start();
        let features = host.features();
        for (message, cuts, indirect) in &messages {
            let chain = chain(&host, message, cuts);
            if chain.is_empty() {
                continue;
            }
            let shape = if *indirect { Shape::Indirect } else { Shape::Direct };
            let (len, written) = send(&mut host, &chain, shape);
            match model(&mut expected, features, read_only, message) {
                Right::Nothing => prop_assert_eq!(len, 0),
                Right::Status(status, data) => {
                    let (got, room) = written.split_last().expect("a status");
                    prop_assert_eq!(*got, status, "{:?}", message);
                    let data = data.unwrap_or_default();
                    prop_assert_eq!(&room[..data.len()], &data[..]);
                    prop_assert!(room[data.len()..].iter().all(|byte| *byte == 0x5a), "nothing beyond it");
                    // The length is what was written from the start on, with the status if nothing is between.
                    let whole = data.len() == room.len();
                    prop_assert_eq!(len as usize, if whole { room.len() + 1 } else { data.len() });
                }
            }
            prop_assert!(probe.bytes() == expected);
        }
    }
}
