//! Saved in one place, restored in another: the guest sees one disk.
mod support;

use std::sync::Arc;
use std::time::Duration;

use device_state::{SavedState, Section, Tag};
use support::memory::{Host, ask, disk, host, patterned, status};
use support::probe::{Call, Probe};
use support::{IN, OK, OUT, chain};
use virtio_block::Options;
use virtio_block::backend::MemoryImage;
use virtio_testkit::RingLayout;
use vm_virtio::limit::RateLimit;
use vm_virtio::{ConfigWriter, SnapshotError, StateError, WaitFor};

fn save(host: &mut Host) -> Vec<u8> {
    let order = host.engine().suspend();
    host.finish(order).unwrap();
    let order = host.engine().save();
    host.finish(order).unwrap()
}

/// Goes on with the same image.
fn restored(first: Host, probe: &Probe, state: &[u8], tune: impl FnOnce(&mut Options)) -> Host {
    let mut second = first.successor(disk(probe.image(), tune));
    let order = second.engine().memory(second.ram().ram(), WaitFor::NewRequests);
    second.finish(order);
    let order = second.engine().restore(state);
    let queues = second.finish(order).unwrap();
    second.start_restored(queues);
    second
}

#[test]
fn the_disk_goes_on_with_the_writeback_register_as_the_driver_left_it() {
    for layout in RingLayout::ALL {
        for register in [0, 1] {
            let probe = Probe::new(patterned(8192), false);
            let mut first = host(layout, probe.image(), |_| {});
            first.engine().write_config(32, &[register], ConfigWriter::Driver).unwrap();
            assert_eq!(status(&mut first, OUT, 1, &[7; 512]), OK);
            let state = save(&mut first);
            assert!(state.len() < 256, "{} bytes", state.len());
            probe.calls();
            let mut second = restored(first, &probe, &state, |_| {});
            assert_eq!(ask(&mut second, IN, 1, &[], 512), (OK, vec![7; 512], 513));
            assert_eq!(status(&mut second, OUT, 2, &[7; 512]), OK);
            assert!(probe.calls().contains(&Call::Write { offset: 1024, stable: register == 0 }));
            // The driver still has its register.
            second.engine().write_config(32, &[1 - register], ConfigWriter::Driver).unwrap();
            assert_eq!(status(&mut second, OUT, 3, &[7; 512]), OK);
            assert!(probe.calls().contains(&Call::Write { offset: 1536, stable: register == 1 }));
        }
    }
}

#[test]
fn requests_under_way_are_finished_before_the_state_is_made() {
    let probe = Probe::new(patterned(8192), true);
    let mut first = host(RingLayout::Packed, probe.image(), |_| {});
    let reading = chain(first.ram(), IN, 2, &[], 512);
    let id = first.ring(0).add(&reading);
    first.kick(0);
    first.step();
    let state = save(&mut first);
    assert_eq!(first.ring(0).used().map(|used| (used.id, used.len)), Some((id, 513)));
    let mut second = restored(first, &probe, &state, |_| {});
    assert_eq!(ask(&mut second, IN, 1, &[], 512).0, OK);
}

#[test]
fn a_snapshot_is_no_way_around_the_rate_limit() {
    let limit = RateLimit::new(1024, Duration::from_secs(3600)).unwrap();
    let probe = Probe::new(patterned(8192), false);
    let mut first = host(RingLayout::Split, probe.image(), |options| options.limit = Some(limit));
    assert_eq!(ask(&mut first, IN, 0, &[], 1024).0, OK);
    let state = save(&mut first);
    let mut second = restored(first, &probe, &state, |options| options.limit = Some(limit));
    let reading = chain(second.ram(), IN, 2, &[], 512);
    second.ring(0).add(&reading);
    second.kick(0);
    second.settle();
    assert_eq!(second.ring(0).used(), None);
}

/// If this fails, devices that were saved before cannot be restored any more: a new version is due.
#[test]
fn the_bytes_of_the_devices_part_are_what_they_have_always_been() {
    let mut first = host(RingLayout::Split, Arc::new(MemoryImage::new(vec![0; 8192])), |_| {});
    let section = SavedState::parse(&save(&mut first)).unwrap().take(Tag(*b"devc")).unwrap();
    assert_eq!((section.version(), section.bytes()), (1, &[0][..]));
}

#[test]
fn a_state_of_another_disk_or_of_nothing_is_refused_and_the_device_is_as_new() {
    let mut first = host(RingLayout::Split, Arc::new(MemoryImage::new(vec![0; 8192])), |_| {});
    let state = save(&mut first);
    let refused = |state: &[u8], bytes: usize, tune: fn(&mut Options)| {
        let device = disk(Arc::new(MemoryImage::new(vec![0; bytes])), tune);
        let mut second = virtio_testkit::MemoryHost::builder(device).build();
        let order = second.engine().restore(state);
        let error = second.finish(order).map(drop).expect_err("refused");
        second.initialise();
        assert_eq!(ask(&mut second, IN, 1, &[], 512).0, OK);
        error
    };
    assert!(matches!(refused(&state, 4096, |_| {}), SnapshotError::Config(0..8)), "another capacity");
    let blocks = refused(&state, 8192, |options| options.block_size = Some(4096));
    assert!(matches!(blocks, SnapshotError::Config(20..)), "{blocks:?}");
    let swap = |section: Section| {
        let mut parsed = SavedState::parse(&state).unwrap();
        parsed.put(Tag(*b"devc"), section);
        parsed.to_bytes().unwrap()
    };
    let newer = StateError::SectionVersion { found: 2, known: 1 };
    let with = |section| refused(&swap(section), 8192, |_| {});
    assert_eq!(with(Section::from_bytes(2, vec![0])), SnapshotError::State(newer));
    assert_eq!(with(Section::from_bytes(1, vec![2])), SnapshotError::State(StateError::Malformed));
    assert_eq!(with(Section::from_bytes(1, vec![0, 0])), SnapshotError::State(StateError::Trailing));
}
