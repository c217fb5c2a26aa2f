//! Status and reset (2.1, 2.4), starting and stopping.
use vm_virtio::{RingPos, Status};

use super::line;
use crate::RingLayout;
use crate::conformance::bench::Cut;
use crate::conformance::{Bench, Checked, Line, broken};
use crate::ring::Shape;

pub(super) fn lines() -> Vec<Line> {
    vec![
        line("status-kept", "2.1.1", "The status reads what was written", status_kept),
        line("nothing-before-driver-ok", "2.1.2", "No buffer is used before DRIVER_OK, all after", driver_ok)
            .layouts(),
        line("reset-status", "2.4.1", "After a reset the status reads 0", reset_status),
        line("reset-quiet", "2.4.1", "After a reset no queue is touched, no notification sent", reset_quiet)
            .layouts(),
        line("reset-indices", "2.4.1", "After a reset the rings begin at their beginning", reset_indices)
            .subsets(),
        line(
            "started-with-buffers",
            "3.1.1",
            "Buffers that are there at the start are used without a kick",
            unkicked,
        )
        .subsets(),
        line(
            "begins-where-told",
            "2.7.13",
            "A ring goes on where it is told to, over the wrap of its indices",
            wraps,
        )
        .subsets(),
    ]
}

fn status_kept(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let want = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;
    let status = bench.host.status()?;
    if status != want {
        return broken(format!("{status} instead of {want}"));
    }
    bench.go()?;
    let (status, want) = (bench.host.status()?, want | Status::DRIVER_OK);
    if status == want { Ok(()) } else { broken(format!("{status} instead of {want}")) }
}

fn driver_ok(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    // Without a status there is nothing that says DRIVER_OK but the start of the rings.
    bench.host.status()?;
    let queue = bench.queue()?;
    let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
    bench.host.ring(queue).publish();
    bench.host.start_rings()?;
    bench.quiet(queue, "before DRIVER_OK")?;
    bench.host.driver_ok()?;
    let used = bench.used(queue)?;
    bench.check(&asked, used)
}

fn reset_status(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    bench.host.status()?;
    bench.host.reset()?;
    let status = bench.host.status()?;
    if status.is_empty() { Ok(()) } else { broken(format!("it reads {status}")) }
}

fn reset_quiet(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    bench.host.reset()?;
    bench.stage(queue, Cut::Whole, Shape::Direct)?;
    bench.host.ring(queue).publish();
    bench.quiet(queue, "after a reset")?;
    Ok(bench.host.ring(queue).check_untouched()?)
}

fn reset_indices(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for round in 1..4 {
        (0..round).try_for_each(|_| bench.ask(queue))?;
        bench.host.reset()?;
        bench.host.renegotiate()?;
        bench.go()?;
    }
    bench.ask(queue)
}

fn unkicked(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let queue = bench.queue()?;
    let mut asked = Vec::new();
    for _ in 0..3 {
        asked.push(bench.stage(queue, Cut::Whole, Shape::Direct)?);
    }
    bench.host.ring(queue).publish();
    bench.go()?;
    bench.finish(queue, asked)
}

fn wraps(bench: &mut Bench<'_>) -> Checked {
    let size = bench.setup.size;
    bench.setup.start = match bench.setup.layout {
        RingLayout::Split => RingPos { index: u16::MAX - 20, wrap: true },
        RingLayout::Packed => RingPos { index: size - 3, wrap: false },
    };
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..48 {
        let asked = bench.submit(queue, Cut::Whole, Shape::Direct)?;
        // Whether kicks are wanted is another line's business.
        bench.host.kick(queue)?;
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    Ok(bench.host.ring(queue).check_untouched()?)
}
