//! What holds for rings of both layouts: framing, buffers, lengths, notifications.
use std::time::{Duration, Instant};

use vm_virtio::Features;

use super::line;
use crate::conformance::bench::Cut;
use crate::conformance::{Bench, Checked, Line, broken, not_applicable};
use crate::ring::Shape;
use crate::{Interrupts, RingLayout};

const INDIRECT: Features = Features::INDIRECT_DESC;
const EVENT_IDX: Features = Features::EVENT_IDX;
const IN_ORDER: Features = Features::IN_ORDER;

pub(super) fn lines() -> Vec<Line> {
    vec![
        line("framing", "2.7.4.1", "How a message is cut into descriptors does not matter", framing)
            .subsets(),
        line("readable-untouched", "2.7.5.1, 2.8.15", "Device-readable buffers are not written", untouched)
            .subsets(),
        line("driver-areas-untouched", "2.7.6, 2.8.10", "What only the driver writes is not written", areas)
            .subsets(),
        line(
            "writes-within-buffers",
            "2.7.5.1, 2.8.15",
            "Nothing is written outside of device-writable buffers",
            guards,
        )
        .layouts(),
        line("length-not-too-large", "2.7.8.2", "len is at most what the buffer holds", length_bound)
            .layouts(),
        line("length-written", "2.7.8.2", "The first len bytes were really written", length_written)
            .layouts(),
        line(
            "entry-before-index",
            "2.7.8.2, 2.8.6",
            "id, len and data are there when the buffer becomes used",
            order,
        )
        .layouts(),
        line("used-once", "2.7.8, 2.8.6", "Every buffer is used, once, under its own id", used_once)
            .subsets(),
        line("full-ring", "2.7.13, 2.8.21", "A full ring is served, again and again", full_ring).subsets(),
        line(
            "in-order",
            "2.7.9, 2.8.8",
            "With IN_ORDER buffers are used in the order of availability",
            in_order,
        )
        .subsets()
        .with(IN_ORDER),
        line("indirect", "2.7.5.3, 2.8.7", "Indirect tables are followed", indirect).subsets().with(INDIRECT),
        line(
            "indirect-write-ignored",
            "2.7.5.3.2, 2.8.7",
            "WRITE on a descriptor of a table means nothing",
            write_flag,
        )
        .layouts()
        .with(INDIRECT),
        line("notified", "2.7.7.2, 2.8.10", "A used buffer is notified if the driver wants that", notified)
            .subsets(),
        line(
            "not-notified",
            "2.7.7.2, 2.8.10",
            "It is not notified if the driver does not want that",
            not_notified,
        )
        .subsets(),
        line(
            "notified-at-event",
            "2.7.7.2, 2.8.10",
            "With EVENT_IDX it is notified when the event is reached",
            at_event,
        )
        .layouts()
        .with(EVENT_IDX),
        line(
            "not-notified-before-event",
            "2.7.7.2, 2.8.10",
            "With EVENT_IDX it is not notified earlier",
            before_event,
        )
        .layouts()
        .with(EVENT_IDX),
        line("kicks-wanted", "2.7.10, 2.8.10", "A device that sleeps has asked to be kicked", kicks_wanted)
            .subsets(),
        line(
            "suppression-legal",
            "2.7.10.2, 2.8.14",
            "The device's suppression fields hold legal values",
            legal,
        )
        .subsets(),
        line("spurious-kicks", "2.7.10.2", "Kicks without a buffer do no harm", spurious_kicks).layouts(),
        line("other-queues", "2.6", "Queues are served independently of each other", other_queues).layouts(),
    ]
}

fn shapes(bench: &Bench<'_>) -> Vec<Shape> {
    if bench.has(INDIRECT) { vec![Shape::Direct, Shape::Indirect] } else { vec![Shape::Direct] }
}

fn framing(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for shape in shapes(bench) {
        for pieces in [1, 2, 3, 4] {
            bench.ask_as(queue, Cut::Pieces(pieces), shape)?;
        }
    }
    Ok(())
}

fn untouched(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    if bench.next_request()?.readable.is_empty() && !bench.has(INDIRECT) {
        return not_applicable("requests of this device have nothing to read");
    }
    for shape in shapes(bench) {
        bench.ask_many(queue, 3, Cut::Pieces(2), shape)?;
    }
    Ok(bench.host.ring(queue).check_untouched()?)
}

fn areas(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask_many(queue, 3, Cut::Whole, Shape::Direct)?;
    bench.ask(queue)?;
    bench.host.rest()?;
    Ok(bench.host.ring(queue).check_untouched()?)
}

fn guards(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..4 {
        let asked = bench.submit(queue, Cut::Pieces(3), Shape::Direct)?;
        let used = bench.used(queue)?;
        // Before the buffers go back.
        bench.ram().check_guards()?;
        bench.check(&asked, used)?;
    }
    Ok(())
}

/// The ring's driver compares each length with its buffer.
fn length_bound(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    (0..8).try_for_each(|_| bench.ask(queue))
}

fn length_written(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    // A byte that has the filling's value four times, with four fillings, was not written.
    let mut same: Vec<u8> = Vec::new();
    for filling in [0x00, 0xff, 0x5a, 0xa5] {
        let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
        let ram = bench.ram();
        for buf in asked.chain.iter().filter(|buf| buf.writable) {
            ram.write(buf.addr, &vec![filling; buf.len as usize]);
        }
        bench.publish(queue)?;
        let used = bench.used(queue)?;
        let bytes = ram.written(&asked.chain);
        same.resize(same.len().max(used.len as usize), 0);
        for (count, byte) in same.iter_mut().zip(&bytes).take(used.len as usize) {
            *count += u8::from(*byte == filling);
        }
    }
    match same.iter().position(|count| *count == 4) {
        None => Ok(()),
        Some(at) => broken(format!("byte {at} counts as written and never is")),
    }
}

/// Looks at the ring without a pause, takes the entry and the data in the moment they appear, and looks again later.
fn order(bench: &mut Bench<'_>) -> Checked {
    if !bench.host.is_wire() {
        return not_applicable("driver and device take turns in one thread");
    }
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..8 {
        let asked = bench.submit(queue, Cut::Whole, Shape::Direct)?;
        let ram = bench.ram();
        let deadline = Instant::now() + bench.patience;
        let (entry, at_once) = loop {
            if let Some(entry) = bench.host.ring(queue).glance() {
                break (entry, ram.written(&asked.chain));
            }
            if Instant::now() > deadline {
                return broken(format!("no answer within {:?}", bench.patience));
            }
        };
        std::thread::sleep(Duration::from_millis(2));
        let later = bench.host.ring(queue).glance();
        if later != Some(entry) {
            return broken(format!("id and len were {entry:?} when the buffer became used, later {later:?}"));
        }
        if ram.written(&asked.chain) != at_once {
            return broken("data was written after the buffer became used");
        }
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    Ok(())
}

fn used_once(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for count in [1, 2, 5, 3] {
        bench.ask_many(queue, count, Cut::Whole, Shape::Direct)?;
    }
    bench.host.rest()?;
    match bench.host.ring(queue).try_used()? {
        None => Ok(()),
        Some(used) => broken(format!("buffer {} was used twice", used.id)),
    }
}

fn full_ring(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    let elements = {
        let request = bench.next_request()?;
        usize::from(!request.readable.is_empty()) + usize::from(request.writable > 0)
    };
    let room = usize::from(bench.setup.size) / elements.max(1);
    (0..5).try_for_each(|_| bench.ask_many(queue, room, Cut::Whole, Shape::Direct))
}

fn in_order(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..4 {
        let mut asked = Vec::new();
        for _ in 0..5 {
            asked.push(bench.stage(queue, Cut::Whole, Shape::Direct)?);
        }
        bench.publish(queue)?;
        for asked in asked {
            let used = bench.used(queue)?;
            bench.check(&asked, used)?;
        }
    }
    Ok(())
}

fn indirect(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for pieces in 1..5 {
        bench.ask_as(queue, Cut::Pieces(pieces), Shape::Indirect)?;
    }
    bench.ask_many(queue, 8, Cut::Whole, Shape::Indirect)
}

fn write_flag(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..2 {
        let asked = bench.stage(queue, Cut::Whole, Shape::Indirect)?;
        bench.host.ring(queue).mark_table_writable(asked.id);
        bench.publish(queue)?;
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    Ok(())
}

fn notified(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    (0..6).try_for_each(|_| bench.ask_notified(queue))
}

fn not_notified(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    // No interrupt is on its way any more.
    bench.ask_notified(queue)?;
    bench.host.rest()?;
    bench.host.ring(queue).try_set_interrupts(Interrupts::Never)?;
    let before = bench.host.interrupts(queue);
    let asked = bench.submit(queue, Cut::Whole, Shape::Direct)?;
    let used = poll_used(bench, queue)?;
    bench.check(&asked, used)?;
    bench.host.rest()?;
    match bench.host.interrupts(queue) - before {
        0 => Ok(()),
        count => broken(format!("{count} interrupts came")),
    }
}

/// Looks for a used buffer without interrupts.
fn poll_used(bench: &mut Bench<'_>, queue: usize) -> Checked<crate::Used> {
    let deadline = Instant::now() + bench.patience;
    loop {
        bench.host.wait(queue, Duration::from_millis(1))?;
        if let Some(used) = bench.host.ring(queue).try_used()? {
            return Ok(used);
        }
        if Instant::now() > deadline {
            return broken(format!("no answer within {:?}", bench.patience));
        }
    }
}

/// Asks for an interrupt after three, makes `count` requests, and says how many interrupts came before those.
fn event_after_three(bench: &mut Bench<'_>, count: usize) -> Checked<u64> {
    bench.begin()?;
    let queue = bench.queue()?;
    // No interrupt is on its way any more.
    bench.ask_notified(queue)?;
    let slots = match bench.setup.layout {
        RingLayout::Split => 3,
        // Slots of the ring: requests are indirect, one slot each, or as many as they have elements.
        RingLayout::Packed if bench.has(INDIRECT) => 3,
        RingLayout::Packed => {
            let request = bench.next_request()?;
            3 * (u16::from(!request.readable.is_empty()) + u16::from(request.writable > 0))
        }
    };
    let shape = if bench.has(INDIRECT) { Shape::Indirect } else { Shape::Direct };
    bench.host.rest()?;
    bench.host.ring(queue).try_set_interrupts(Interrupts::After(slots))?;
    let before = bench.host.interrupts(queue);
    for _ in 0..count {
        // One after the other: it is the device that decides for each.
        let asked = bench.submit(queue, Cut::Whole, shape)?;
        let used = poll_used(bench, queue)?;
        bench.check(&asked, used)?;
    }
    Ok(before)
}

fn at_event(bench: &mut Bench<'_>) -> Checked {
    let before = event_after_three(bench, 3)?;
    bench.interrupt_after(bench.queue()?, before, "the event was reached and no interrupt came")
}

fn before_event(bench: &mut Bench<'_>) -> Checked {
    let before = event_after_three(bench, 2)?;
    bench.host.rest()?;
    match bench.host.interrupts(bench.queue()?) - before {
        0 => Ok(()),
        count => broken(format!("{count} interrupts came before the event was reached")),
    }
}

fn kicks_wanted(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for round in 0..24 {
        // It has had time to fall asleep.
        if round % 8 == 0 {
            bench.host.rest()?;
        }
        bench.ask(queue)?;
    }
    Ok(())
}

/// Looked at while the device works and while it rests; the ring's driver knows what is legal.
fn legal(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..8 {
        let asked = bench.submit(queue, Cut::Whole, Shape::Direct)?;
        bench.host.ring(queue).try_kick_wanted()?;
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    bench.host.rest()?;
    bench.host.ring(queue).try_kick_wanted().map(|_| ())?;
    Ok(())
}

fn spurious_kicks(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..3 {
        bench.host.rest()?;
        for every in 0..bench.host.queues() {
            bench.quiet(every, "after a kick without a buffer")?;
        }
        bench.ask_notified(queue)?;
    }
    Ok(())
}

fn other_queues(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let subject = bench.subject()?;
    let first = bench.queue()?;
    let count = subject.queues.min(bench.host.queues() - first);
    if count < 2 {
        return not_applicable("one queue takes requests");
    }
    for _ in 0..3 {
        for queue in (first..first + count).rev() {
            bench.ask(queue)?;
        }
    }
    Ok(())
}
