//! Replays the inputs in `corpus/`: seeds, and whatever a fuzzer once found. Needs no fuzzer.
use std::fs;
use std::path::Path;

use backplane_fuzz::TARGETS;

#[test]
fn the_corpus_is_stood() {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus");
    for (name, target) in TARGETS {
        target(&[]);
        let mut inputs = 0;
        for entry in fs::read_dir(corpus.join(name)).unwrap_or_else(|error| panic!("{name}: {error}")) {
            let path = entry.unwrap().path();
            println!("{}", path.display());
            target(&fs::read(&path).unwrap());
            inputs += 1;
        }
        assert!(inputs > 0, "{name} has no seeds");
    }
}

/// Cheap pseudo-random inputs, the same in each run: the targets themselves work, also where no fuzzer runs.
#[test]
fn random_bytes_are_stood() {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    };
    for round in 0..200 {
        let data: Vec<u8> = (0..1 + round % 64).flat_map(|_| next()).collect();
        for (_, target) in TARGETS {
            target(&data);
        }
    }
}
