//! The failure policy for what a driver does to its rings (ARCHITECTURE.md, rule 1). The standard leaves it open what
//! becomes of a broken ring; that nothing outside of the given memory is touched goes without saying.
use std::time::Duration;

use vm_virtio::{Features, Status};

use super::line;
use crate::conformance::bench::Cut;
use crate::conformance::{Bench, Checked, Line, Run, Trouble, broken};
use crate::hostile::{Breakage, Havoc, features_of};
use crate::ring::Shape;

pub(super) fn lines() -> Vec<Line> {
    use Breakage as B;
    let all = Breakage::ALL.into_iter().map(|breakage| {
        let (id, text) = match breakage {
            B::AvailIndexTooFar => ("fault-avail-index", "The available index runs too far ahead"),
            B::HeadOutOfRange => ("fault-head", "The available ring names no descriptor"),
            B::NextOutOfRange => ("fault-next", "A descriptor goes on beyond the table"),
            B::Loop => ("fault-loop", "A list without an end"),
            B::ListNotAvailable => ("fault-list", "A list goes on with what is not available"),
            B::ReadableAfterWritable => ("fault-order", "A readable element behind a writable one"),
            B::Unmapped => ("fault-unmapped", "An element in memory that was not given"),
            B::AddressWraps => ("fault-address-wraps", "An element beyond the last address"),
            B::BeyondRegion => ("fault-beyond-region", "An element that leaves memory"),
            B::IndirectNotNegotiated => ("fault-indirect-unasked", "A table without the feature"),
            B::IndirectNested => ("fault-indirect-nested", "A table within a table"),
            B::IndirectWithNext => ("fault-indirect-next", "A table with a next descriptor"),
            B::IndirectOddLength => ("fault-indirect-odd", "A table of 15 bytes"),
            B::IndirectEmpty => ("fault-indirect-empty", "A table of no bytes"),
            B::IndirectUnmapped => ("fault-indirect-unmapped", "A table in memory that was not given"),
            B::IndirectTooLong => ("fault-indirect-long", "A table longer than the queue"),
            B::IndirectNextOutOfRange => ("fault-indirect-range", "An element goes on beyond its table"),
            B::IndirectLoop => ("fault-indirect-loop", "A table that goes round in a circle"),
        };
        let (with, without) = features_of(breakage);
        let base = line(id, "policy 1", text, |_| Ok(())).layouts().with(with).without(without);
        Line { layout: breakage.layout(), run: Run::Fault(breakage), ..base }
    });
    let wild = line(
        "fault-random",
        "policy 1, 8",
        "Nonsense of every kind: nothing is harmed, a reset heals",
        havoc,
    );
    let aspect =
        |id, text| Line { run: Run::Fault(B::Unmapped), ..line(id, "policy 1", text, |_| Ok(())).layouts() };
    let aspects = [
        aspect("fault-needs-reset", "A broken ring sets DEVICE_NEEDS_RESET"),
        aspect("fault-stays", "A broken ring stays stopped, whatever is added"),
        aspect("fault-others-go-on", "The other queues go on"),
        aspect("fault-heals", "After a reset the ring works again"),
    ];
    all.chain(aspects).chain([wild.layouts()]).collect()
}

/// One rule is broken: the queue stops and says so, the others go on, nothing is touched, a reset heals.
pub(in crate::conformance) fn fault(bench: &mut Bench<'_>, breakage: Breakage) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    let subject = bench.subject()?;
    bench.ask(queue)?;
    let ram = bench.ram();
    bench.host.ring_failed(queue, Duration::ZERO);
    breakage.apply(bench.host.ring(queue), &ram);
    bench.host.kick(queue)?;
    if !bench.host.ring_failed(queue, bench.patience) {
        ram.check_forbidden()?;
        return broken("no error of the ring is reported");
    }
    match bench.host.status() {
        Ok(status) if !status.contains(Status::DEVICE_NEEDS_RESET) => {
            return broken(format!("the status reads {status}, without NEEDS_RESET"));
        }
        Ok(_) | Err(Trouble::NotApplicable(_)) => {}
        Err(trouble) => return Err(trouble),
    }
    if bench.host.ring(queue).glance().is_some() {
        return broken("the broken chain was used");
    }
    ram.check_guards()?;
    let others = (subject.queue..subject.queue + subject.queues).filter(|other| *other != queue);
    for other in others {
        if other < bench.host.queues()
            && let Err(trouble) = bench.ask(other)
        {
            return broken(format!("afterwards queue {other} does not go on: {trouble}"));
        }
    }
    // A good request behind the broken one. Packed, it takes the broken one's place.
    bench.stage(queue, Cut::Whole, Shape::Direct)?;
    bench.host.ring(queue).publish();
    bench.host.kick(queue)?;
    bench.host.rest()?;
    if bench.host.ring(queue).glance().is_some() {
        return broken("the broken queue goes on");
    }
    heal(bench, queue)
}

fn heal(bench: &mut Bench<'_>, queue: usize) -> Checked {
    let healed = (|| {
        bench.host.reset()?;
        bench.host.renegotiate()?;
        bench.go()?;
        (0..3).try_for_each(|_| bench.ask(queue))
    })();
    match healed {
        Err(Trouble::Broken(why)) => broken(format!("after a reset it does not work: {why}")),
        other => other,
    }
}

fn havoc(bench: &mut Bench<'_>) -> Checked {
    for seed in 0..12 {
        bench.setup.optional = match seed % 3 {
            0 => bench.setup.optional | Features::INDIRECT_DESC,
            1 => bench.setup.optional - Features::EVENT_IDX,
            _ => bench.setup.optional,
        };
        bench.begin()?;
        let queue = bench.queue()?;
        bench.ask(queue)?;
        let (ram, mut havoc) = (bench.ram(), Havoc::new(seed));
        for step in 0..40 {
            havoc.step(bench.host.ring(queue), &ram);
            if step % 4 == 0 {
                bench.host.kick(queue)?;
            }
        }
        bench.host.kick(queue)?;
        if let Err(Trouble::Broken(why)) = heal(bench, queue) {
            return broken(format!("seed {seed}: {why}"));
        }
        ram.check_forbidden()?;
    }
    Ok(())
}
