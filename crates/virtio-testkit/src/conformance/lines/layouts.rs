//! What only one layout has (2.7, 2.8).
use vm_virtio::Features;

use super::line;
use crate::RingLayout::{Packed, Split};
use crate::conformance::bench::Cut;
use crate::conformance::{Bench, Checked, Line, not_applicable};
use crate::ring::Shape;

const EVENT_IDX: Features = Features::EVENT_IDX;

pub(super) fn lines() -> Vec<Line> {
    vec![
        line("split-used-event-ignored", "2.7.7.2", "Without EVENT_IDX used_event means nothing", used_event)
            .only(Split)
            .without(EVENT_IDX),
        line("split-avail-flags-ignored", "2.7.7.2", "With EVENT_IDX avail.flags mean nothing", avail_flags)
            .only(Split)
            .with(EVENT_IDX),
        line(
            "split-chain-ends-indirect",
            "2.7.5.3.2",
            "A list of descriptors may end with an indirect one",
            mixed,
        )
        .only(Split)
        .with(Features::INDIRECT_DESC),
        line("packed-any-size", "2.8", "A ring may have any number of entries", any_size)
            .only(Packed)
            .subsets(),
        line("packed-lists", "2.8.6", "One used descriptor for a list, the rest is skipped", lists)
            .only(Packed)
            .subsets(),
    ]
}

fn used_event(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for event in [0x8000, 0xffff, 7] {
        bench.host.ring(queue).split().set_used_event(event);
        bench.ask_notified(queue)?;
    }
    Ok(())
}

fn avail_flags(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.host.ring(queue).split().set_avail_flags(1);
    (0..4).try_for_each(|_| bench.ask_notified(queue))
}

fn mixed(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for direct in 1..4 {
        bench.ask_as(queue, Cut::Pieces(4), Shape::Mixed(direct))?;
    }
    Ok(())
}

fn any_size(bench: &mut Bench<'_>) -> Checked {
    for size in [5, 7, 12] {
        bench.setup.size = size;
        bench.begin()?;
        let queue = bench.queue()?;
        (0..2 * size).try_for_each(|_| bench.ask(queue))?;
    }
    Ok(())
}

fn lists(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    let request = bench.next_request()?;
    if request.readable.len() + (request.writable as usize) < 3 {
        return not_applicable("requests of this device are too short to be cut");
    }
    for _ in 0..6 {
        bench.ask_many(queue, 2, Cut::Pieces(3), Shape::Direct)?;
    }
    Ok(bench.host.ring(queue).check_untouched()?)
}
