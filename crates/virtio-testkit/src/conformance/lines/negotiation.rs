//! Feature bits and configuration space (2.2, 2.5, 3.1, 6).
use std::time::Instant;

use vm_virtio::Features;

use super::line;
use crate::conformance::{Bench, Checked, Line, broken, not_applicable};

pub(super) fn lines() -> Vec<Line> {
    vec![
        line("version-1-offered", "6.2", "VERSION_1 is offered", version_1_offered),
        line("no-legacy-features", "6.3", "NOTIFY_ON_EMPTY and ANY_LAYOUT are not offered", no_legacy),
        line("no-reserved-features", "2.2.2", "Reserved bits are not offered", no_reserved),
        line("no-pci-features", "2.2.2", "Bits of a transport that this is not are not offered", no_pci),
        line("features-stable", "2.2.2", "What is offered does not change", features_stable),
        line("every-subset-works", "2.2.2", "Every subset of the ring features works", subset_works)
            .subsets(),
        line("own-features-optional", "2.2.2", "It works without the device's own features", without_own)
            .layouts(),
        line("unoffered-refused", "2.2.2", "Features that are not offered are refused", unoffered_refused),
        line("accepted-again", "2.2.2", "The same features are accepted again after a reset", accepted_again)
            .layouts(),
        line(
            "config-early",
            "3.2.1",
            "Fields are readable before FEATURES_OK, and say the same after",
            config_early,
        ),
        line(
            "config-in-pieces",
            "2.5.2",
            "Reading in pieces gives what reading at once gives",
            config_pieces,
        ),
        line("config-change-notified", "2.5.2", "A change by the device is notified", config_change),
    ]
}

fn version_1_offered(bench: &mut Bench<'_>) -> Checked {
    match bench.host.offered()?.contains(Features::VERSION_1) {
        true => Ok(()),
        false => broken("bit 32 is not offered"),
    }
}

fn none_of(bench: &mut Bench<'_>, bits: impl Iterator<Item = u32>) -> Checked {
    let offered = bench.host.offered()?.bits();
    let wrong: Vec<_> = bits.filter(|bit| offered & 1 << bit != 0).map(|bit| bit.to_string()).collect();
    if wrong.is_empty() { Ok(()) } else { broken(format!("bit {} is offered", wrong.join(", "))) }
}

fn no_legacy(bench: &mut Bench<'_>) -> Checked {
    none_of(bench, [24, 27].into_iter())
}

/// 25, 26 and 31 have no meaning; 26 is vhost's own and not looked at over vhost-user.
fn no_reserved(bench: &mut Bench<'_>) -> Checked {
    none_of(bench, [25, 31].into_iter().chain(44..50))
}

fn no_pci(bench: &mut Bench<'_>) -> Checked {
    none_of(bench, [37, 39].into_iter())
}

fn features_stable(bench: &mut Bench<'_>) -> Checked {
    let first = bench.host.offered()?;
    bench.begin()?;
    let second = bench.host.offered()?;
    if first == second { Ok(()) } else { broken(format!("{first:?}, later {second:?}")) }
}

fn subset_works(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    (0..4).try_for_each(|_| bench.ask(queue))
}

fn without_own(bench: &mut Bench<'_>) -> Checked {
    let own = bench.host.offered()? - Features::NOT_A_DEVICES;
    if own.is_empty() {
        return not_applicable("the device has no features of its own");
    }
    bench.setup.own = false;
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)
}

fn unoffered_refused(bench: &mut Bench<'_>) -> Checked {
    let offered = bench.host.offered()?;
    // Bits of the device, of rings, and reserved ones: the first of each that is not offered.
    for bits in [0..24, 33..41, 44..50] {
        let Some(bit) =
            bits.map(|bit| Features::from_bits_retain(1 << bit)).find(|bit| !offered.intersects(*bit))
        else {
            continue;
        };
        bench.renew()?;
        if !bench.host.refuses(bit)? {
            return broken(format!("bit {} was accepted", bit.bits().trailing_zeros()));
        }
    }
    Ok(())
}

fn accepted_again(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    bench.host.reset()?;
    bench.host.renegotiate()?;
    bench.go()?;
    bench.ask(queue)
}

/// As much of the configuration space as there is to read: 60 bytes, or fewer.
fn whole(bench: &mut Bench<'_>) -> Checked<Vec<u8>> {
    for len in [60, 24, 8] {
        if let Ok(bytes) = bench.host.config(0, len) {
            return Ok(bytes);
        }
    }
    bench.host.config(0, 4)
}

fn config_early(bench: &mut Bench<'_>) -> Checked {
    let early = if bench.host.is_wire() {
        bench.host.wire()?.early_config()?
    } else {
        bench.renew()?;
        whole(bench)?
    };
    bench.begin()?;
    let late = bench.host.config(0, early.len() as u32)?;
    if early == late { Ok(()) } else { broken(format!("{early:02x?} before, {late:02x?} after")) }
}

fn config_pieces(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let whole = whole(bench)?;
    for offset in 0..whole.len().min(24) {
        let byte = bench.host.config(offset as u32, 1)?;
        if byte[..] != whole[offset..=offset] {
            return broken(format!("byte {offset} is {byte:02x?}, at once {:02x}", whole[offset]));
        }
    }
    Ok(())
}

fn config_change(bench: &mut Bench<'_>) -> Checked {
    let subject = bench.subject()?;
    let Some(configure) = subject.configure else {
        return not_applicable("the device does not change its configuration space on request");
    };
    bench.begin()?;
    let queue = bench.queue()?;
    let before = whole(bench)?;
    bench.host.config_changes()?;
    for n in 0..2 {
        bench.exchange(queue, configure(n))?;
        let deadline = Instant::now() + bench.patience;
        while bench.host.config_changes()? == 0 {
            if Instant::now() >= deadline {
                return broken("no notification came");
            }
        }
    }
    match whole(bench)? == before {
        true => broken("a change was notified and there is none"),
        false => Ok(()),
    }
}
