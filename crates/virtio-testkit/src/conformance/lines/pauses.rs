//! Suspending the device (3.4) and resetting one queue (2.6.1), where they are offered.
use std::time::Instant;

use vm_virtio::{Features, Status};

use super::line;
use crate::conformance::bench::Cut;
use crate::conformance::{Bench, Checked, Line, broken, not_applicable};
use crate::ring::Shape;

pub(super) fn lines() -> Vec<Line> {
    let suspend = |id, text, run| line(id, "3.4.2", text, run).layouts().with(Features::SUSPEND);
    let reset = |id, text, run| line(id, "2.6.1", text, run).layouts().with(Features::RING_RESET);
    vec![
        suspend("suspend-rests", "A suspended device touches no queue; resumed, it goes on", rests),
        suspend("suspend-early", "SUSPEND is ignored before DRIVER_OK", early),
        suspend("suspend-reset", "A suspended device can be reset", reset_suspended),
        reset("queue-reset", "A queue that was reset is not touched, and begins anew", queue_reset),
        reset("queue-reset-alone", "The other queues go on", queue_reset_alone),
    ]
}

/// Waits until the status has these bits and not those.
fn await_status(bench: &mut Bench<'_>, with: Status, without: Status) -> Checked {
    let deadline = Instant::now() + bench.patience;
    loop {
        let status = bench.host.status()?;
        if status.contains(with) && !status.intersects(without) {
            return Ok(());
        }
        if Instant::now() >= deadline {
            return broken(format!("the status reads {status}, not {with} without {without}"));
        }
        bench.host.rest()?;
    }
}

fn suspend(bench: &mut Bench<'_>) -> Checked {
    let status = bench.host.status()?;
    bench.host.write_status(status | Status::SUSPEND)?;
    await_status(bench, Status::SUSPEND, Status::DRIVER_OK)
}

fn rests(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..2 {
        bench.ask(queue)?;
        suspend(bench)?;
        let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
        bench.host.ring(queue).publish();
        bench.quiet(queue, "while the device was suspended")?;
        bench.host.ring(queue).check_untouched()?;
        let status = bench.host.status()? - Status::SUSPEND;
        bench.host.write_status(status | Status::DRIVER_OK)?;
        await_status(bench, Status::DRIVER_OK, Status::SUSPEND)?;
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    bench.ask(queue)
}

fn early(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let status = bench.host.status()?;
    bench.host.write_status(status | Status::SUSPEND)?;
    bench.host.rest()?;
    let now = bench.host.status()?;
    if now != status {
        return broken(format!("the status became {now}"));
    }
    bench.go()?;
    let queue = bench.queue()?;
    bench.ask(queue)
}

fn reset_suspended(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    suspend(bench)?;
    bench.host.reset()?;
    let status = bench.host.status()?;
    if !status.is_empty() {
        return broken(format!("after a reset the status reads {status}"));
    }
    bench.host.renegotiate()?;
    bench.go()?;
    bench.ask(queue)
}

fn queue_reset(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for round in 1..4 {
        (0..round).try_for_each(|_| bench.ask(queue))?;
        bench.host.reset_ring(queue)?;
        let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
        bench.host.ring(queue).publish();
        bench.quiet(queue, "after its reset")?;
        bench.host.ring(queue).check_untouched()?;
        bench.host.start_ring(queue)?;
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    bench.ask(queue)
}

fn queue_reset_alone(bench: &mut Bench<'_>) -> Checked {
    let subject = bench.subject()?;
    if subject.queues < 2 {
        return not_applicable("the device has one queue for such requests");
    }
    bench.begin()?;
    let queue = bench.queue()?;
    if queue + 1 >= bench.host.queues() {
        return not_applicable("the device has one queue for such requests");
    }
    bench.ask(queue + 1)?;
    bench.host.reset_ring(queue)?;
    bench.ask(queue + 1)?;
    bench.host.start_ring(queue)?;
    (queue..queue + 2).try_for_each(|every| bench.ask(every))
}
