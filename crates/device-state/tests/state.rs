//! The format, byte by byte, and what becomes of everything else.
use device_state::{HEADER, Header, MAX_STATE, SavedState, Section, StateError, Tag};
use proptest::prelude::*;
use serde::{Deserialize, Serialize};

const ONE: Tag = Tag(*b"one ");
const TWO: Tag = Tag(*b"two ");

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Part {
    number: u32,
    list: Vec<(u64, bool)>,
    name: Option<String>,
}

fn part() -> Part {
    Part { number: 300, list: vec![(1, true), (u64::MAX, false)], name: Some("x".into()) }
}

fn state() -> SavedState {
    let mut state = SavedState::new(4);
    state.put(ONE, Section::encode(3, &part()).unwrap());
    state.put(TWO, Section::empty());
    state
}

fn decode(bytes: &[u8]) -> Result<Part, StateError> {
    let mut state = SavedState::parse(bytes)?;
    let part = state.take(ONE)?.decode(3)?;
    state.take(TWO)?.decode_empty()?;
    state.finish()?;
    Ok(part)
}

/// If this fails, states that were saved before cannot be restored any more: a new version is due, not new bytes here.
#[test]
fn the_bytes_are_what_they_have_always_been() {
    #[rustfmt::skip]
    let golden = [
        0x42, 0x4b, 0x50, 0x4c, 0x53, 0x54, 0x41, 0x54, // magic
        1, 0, 0, 0, // version, flags
        4, 0, 0, 0, // device
        43, 0, 0, 0, 0, 0, 0, 0, // length
        0x5d, 0x8c, 0x42, 0xbb, // checksum
        b'o', b'n', b'e', b' ', 3, 0, 0, 0, 19, 0, 0, 0,
        0xac, 0x02, // 300
        2, 1, 1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0, // list
        1, 1, // Some, length
        b'x',
        b't', b'w', b'o', b' ', 0, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(state().to_bytes().unwrap(), golden);
    assert_eq!(decode(&golden), Ok(part()));
}

#[test]
fn a_state_that_is_cut_or_goes_on_is_refused() {
    let bytes = state().to_bytes().unwrap();
    for len in 0..bytes.len() {
        assert_eq!(decode(&bytes[..len]), Err(StateError::Truncated), "{len} bytes");
    }
    let mut longer = bytes.clone();
    longer.push(0);
    assert_eq!(decode(&longer), Err(StateError::Trailing));
}

#[test]
fn every_damaged_byte_is_found() {
    let bytes = state().to_bytes().unwrap();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            let error = decode(&damaged).expect_err("damaged");
            match at {
                0..8 => assert_eq!(error, StateError::Magic),
                8..10 => assert!(matches!(error, StateError::Version(_))),
                10..12 => assert!(matches!(error, StateError::Flags(_))),
                16..24 => assert!(
                    matches!(error, StateError::Truncated | StateError::Trailing | StateError::TooLarge(_)),
                    "{error}"
                ),
                _ => assert_eq!(error, StateError::Checksum),
            }
        }
    }
}

#[test]
fn a_later_version_is_an_error_of_its_own() {
    let mut newer = SavedState::new(4);
    newer.put(ONE, Section::encode(4, &part()).unwrap());
    let mut read = SavedState::parse(&newer.to_bytes().unwrap()).unwrap();
    let error = read.take(ONE).unwrap().decode::<Part>(3);
    assert_eq!(error, Err(StateError::SectionVersion { found: 4, known: 3 }));
    assert_eq!(read.take(TWO), Err(StateError::MissingSection(TWO)));
    // Older ones can be told apart and decoded as what they are.
    assert_eq!(Section::encode(1, &7u8).unwrap().version(), 1);
    let mut unknown = state();
    unknown.put(Tag(*b"new "), Section::empty());
    assert_eq!(decode(&unknown.to_bytes().unwrap()), Err(StateError::UnknownSection(Tag(*b"new "))));
}

/// Rebuilds header and checksum around sections that no writer makes.
fn framed(sections: &[u8]) -> Vec<u8> {
    let mut bytes = SavedState::new(4).to_bytes().unwrap();
    bytes[16..24].copy_from_slice(&(sections.len() as u64).to_le_bytes());
    bytes.extend(sections);
    let mut crc = crc32fast::Hasher::new();
    crc.update(&bytes[..24]);
    crc.update(&bytes[HEADER..]);
    bytes[24..28].copy_from_slice(&crc.finalize().to_le_bytes());
    bytes
}

#[test]
fn sections_that_lie_are_refused() {
    let section = |tag: &[u8; 4], flags: u16, len: u32, data: &[u8]| {
        let mut bytes = tag.to_vec();
        bytes.extend(0u16.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(len.to_le_bytes());
        bytes.extend(data);
        bytes
    };
    let parse = |sections: Vec<u8>| SavedState::parse(&framed(&sections)).map(drop);
    assert_eq!(parse(section(b"one ", 0, 2, &[1, 2])), Ok(()));
    assert_eq!(parse(section(b"one ", 0, 3, &[1, 2])), Err(StateError::Truncated));
    assert_eq!(parse(section(b"one ", 0, u32::MAX, &[1, 2])), Err(StateError::Truncated));
    assert_eq!(parse(section(b"one ", 1, 2, &[1, 2])), Err(StateError::Flags(1)));
    let twice = [section(b"one ", 0, 0, &[]), section(b"one ", 0, 0, &[])].concat();
    assert_eq!(parse(twice), Err(StateError::DuplicateSection(ONE)));
    let many = (0..100u32).flat_map(|i| section(&i.to_le_bytes(), 0, 0, &[])).collect();
    assert!(matches!(parse(many), Err(StateError::UnknownSection(_))));
}

#[test]
fn a_length_beyond_all_measure_is_refused_by_the_header_alone() {
    let mut bytes = state().to_bytes().unwrap();
    for length in [MAX_STATE, u64::MAX, 1 << 63] {
        bytes[16..24].copy_from_slice(&length.to_le_bytes());
        assert_eq!(Header::parse(&bytes[..HEADER]), Err(StateError::TooLarge(length)));
    }
    let mut huge = SavedState::new(4);
    huge.put(ONE, Section::from_bytes(0, vec![0; MAX_STATE as usize]));
    assert!(matches!(huge.to_bytes(), Err(StateError::TooLarge(_))));
}

#[test]
fn data_that_claims_a_long_list_allocates_none() {
    // A list of 2^63 elements, of which none is there.
    let liar = Section::from_bytes(3, vec![1, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x7f]);
    assert_eq!(liar.decode::<Part>(3), Err(StateError::Malformed));
    let behind = Section::from_bytes(3, [Section::encode(3, &part()).unwrap().bytes(), &[0]].concat());
    assert_eq!(behind.decode::<Part>(3), Err(StateError::Trailing));
}

proptest! {
    #[test]
    fn garbage_never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
        let _ = SavedState::parse(&bytes);
        let _ = SavedState::parse(&framed(&bytes)).map(|mut state| state.take(ONE));
        let _ = Section::from_bytes(3, bytes).decode::<Part>(3);
    }

    #[test]
    fn what_is_saved_is_restored(number: u32, list: Vec<(u64, bool)>, name: Option<String>) {
        let part = Part { number, list, name };
        let mut state = SavedState::new(9);
        state.put(ONE, Section::encode(0, &part).unwrap());
        let mut read = SavedState::parse(&state.to_bytes().unwrap()).unwrap();
        prop_assert_eq!(read.device(), 9);
        prop_assert_eq!(read.take(ONE).unwrap().decode::<Part>(0).unwrap(), part);
        prop_assert_eq!(read.finish(), Ok(()));
    }
}
