//! Devices behind an IOMMU over vhost-user: addresses are translated by the front-end (section "IOMMU support").
use std::collections::BTreeSet;
use std::time::Instant;

use vhost_user::IotlbChange;
use vm_virtio::Features;

use super::line;
use crate::conformance::bench::{Asked, Cut};
use crate::conformance::{Bench, Checked, Line, broken};
use crate::ring::Shape;
use crate::vhost_user_driver::PAGE;

pub(super) fn lines() -> Vec<Line> {
    let behind =
        |id, text, run| line(id, "IOMMU support", text, run).wire().layouts().with(Features::ACCESS_PLATFORM);
    vec![
        behind("iotlb-miss", "A translation that is missing is asked for, and nothing is done before", miss),
        behind(
            "iotlb-invalidate",
            "What was invalidated is asked for again, and not used before",
            invalidate,
        ),
    ]
}

/// A request that the device cannot serve for want of translations: it asks for one and does nothing else.
fn unserved(bench: &mut Bench<'_>, queue: usize) -> Checked<Asked> {
    let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
    bench.host.wire()?.now()?.translates = false;
    bench.host.ring(queue).publish();
    bench.host.kick(queue)?;
    let deadline = Instant::now() + bench.patience;
    loop {
        bench.host.rest()?;
        let now = bench.host.wire()?.now()?;
        now.answer_misses()?;
        let missed = now.missed.len();
        if bench.host.ring(queue).glance().is_some() {
            return broken("a buffer was used whose translation is not known");
        }
        if missed > 0 {
            return Ok(asked);
        }
        if Instant::now() >= deadline {
            return broken("no translation was asked for");
        }
    }
}

/// The front-end translates again.
fn served(bench: &mut Bench<'_>, queue: usize, asked: &Asked) -> Checked {
    bench.host.wire()?.now()?.translates = true;
    let used = bench.used(queue)?;
    bench.check(asked, used)
}

fn miss(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    bench.host.wire()?.now()?.translates = false;
    bench.go()?;
    let queue = bench.queue()?;
    let asked = unserved(bench, queue)?;
    served(bench, queue, &asked)?;
    (0..3).try_for_each(|_| bench.ask(queue))
}

fn invalidate(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..2 {
        bench.ask(queue)?;
        let now = bench.host.wire()?.now()?;
        for iova in std::mem::take(&mut now.translated) {
            now.endpoint.iotlb(IotlbChange::Invalidate { iova, size: PAGE })?;
        }
        now.missed = BTreeSet::new();
        let asked = unserved(bench, queue)?;
        served(bench, queue, &asked)?;
    }
    bench.ask(queue)
}
