//! vhost-user: messages, ring states, memory (the document's sections, by their headings).
use std::io::Write;
use std::os::fd::AsFd;

use vhost_user::{
    Error, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendCode, LogArea, ProtocolFeatures as P, flags,
};

use super::line;
use super::state::state;
use crate::RingLayout;
use crate::conformance::bench::Cut;
use crate::conformance::socket::{base, region};
use crate::conformance::{Bench, Checked, Line, broken, not_applicable};
use crate::ring::Shape;
use crate::vhost_user_driver::{counted, new_eventfd};

pub(super) fn lines() -> Vec<Line> {
    let wire = |id, section, text, run| line(id, section, text, run).wire();
    vec![
        wire(
            "protocol-features-first",
            "Communication",
            "GET_PROTOCOL_FEATURES works before SET_FEATURES",
            early,
        ),
        wire("mq-offered", "Multiple queue support", "GET_QUEUE_NUM tells of at least one queue", queue_num),
        wire(
            "protocol-bits-consistent",
            "Protocol features",
            "No feature is offered without what it needs",
            consistent,
        ),
        wire(
            "replies-asked-for",
            "REPLY_ACK",
            "A message with need_reply is answered, with 0 if it is done",
            acks,
        ),
        wire(
            "failures-told",
            "REPLY_ACK",
            "A message with need_reply that fails is answered with another value",
            failures,
        ),
        wire("one-reply", "REPLY_ACK", "A message with a reply of its own is not answered twice", one_reply),
        wire("no-reply-unasked", "REPLY_ACK", "A message without need_reply is not answered", no_reply),
        wire("queue-index-checked", "Ring states", "A ring that does not exist is refused", index_checked),
        wire(
            "ring-size-checked",
            "VHOST_USER_SET_VRING_NUM",
            "A size that no ring has is refused",
            size_checked,
        ),
        wire(
            "enabled-without-bit-30",
            "Ring states",
            "Without bit 30 rings are enabled from the start",
            unruled,
        )
        .layouts(),
        wire(
            "enable-scans",
            "Ring states",
            "Buffers that are there when a ring is enabled are used",
            enable_scans,
        )
        .layouts(),
        wire(
            "disabled-no-effect",
            "Ring states",
            "A ring that is disabled again has no more interrupts",
            disabled,
        )
        .layouts(),
        wire(
            "call-changes",
            "VHOST_USER_SET_VRING_CALL",
            "The file for interrupts may change at any time",
            call_changes,
        )
        .layouts(),
        wire(
            "kick-changes",
            "VHOST_USER_SET_VRING_KICK",
            "The file for kicks may change at any time",
            kick_changes,
        )
        .layouts(),
        wire(
            "stop-tells-where",
            "VHOST_USER_GET_VRING_BASE",
            "A stop finishes what was taken and tells where it is",
            stop_where,
        )
        .subsets(),
        wire(
            "stopped-quiet",
            "Suspended device state",
            "A stopped ring is not touched, nothing is notified",
            stopped_quiet,
        )
        .layouts(),
        wire("stopped-goes-on", "Ring states", "A stopped ring that is started again goes on", goes_on)
            .subsets(),
        wire(
            "config-size",
            "VHOST_USER_GET_CONFIG",
            "The reply has as many bytes as were asked for",
            config_size,
        ),
        wire(
            "config-read-only",
            "VHOST_USER_SET_CONFIG",
            "A driver cannot write a read-only field",
            read_only,
        ),
        wire("memory-slots", "Memory access", "Memory is added and removed while rings run", slots).layouts(),
        wire(
            "memory-table-replaced",
            "VHOST_USER_SET_MEM_TABLE",
            "A new table replaces the old one while rings run",
            table,
        )
        .layouts(),
        wire(
            "memory-removed",
            "VHOST_USER_REM_MEM_REG",
            "Memory that was removed is not used any more",
            removed,
        )
        .layouts(),
        wire("overlap-refused", "Memory access", "Regions that overlap are refused", overlap),
        wire(
            "descriptors-counted",
            "Communication",
            "A table with another number of files than regions is refused",
            fd_count,
        ),
        wire(
            "reset-device",
            "VHOST_USER_RESET_DEVICE",
            "RESET_DEVICE leads to a device that works anew",
            reset_device,
        )
        .layouts(),
        wire(
            "log-marks-writes",
            "Migration",
            "While LOG_ALL is on, pages that the device writes are marked",
            log_marks,
        )
        .layouts(),
        wire(
            "inflight-area",
            "Inflight I/O tracking",
            "An area for requests in flight is given, taken, and work goes on",
            inflight,
        )
        .layouts(),
        wire(
            "kicks-as-messages",
            "In-band notifications",
            "A ring without a file for kicks is kicked by messages",
            inband,
        )
        .layouts(),
        wire(
            "device-state",
            "Migrating back-end state",
            "A stopped device's state is saved, and loaded again",
            state,
        )
        .layouts(),
        wire(
            "shmem-config",
            "VHOST_USER_GET_SHMEM_CONFIG",
            "Shared memory regions are whole pages and stay what they are",
            shmem_config,
        ),
        wire(
            "unknown-refused",
            "Communication",
            "A request that does not exist is refused or ends the connection",
            unknown,
        ),
        wire(
            "oversized-refused",
            "Communication",
            "A message of 4 GiB is refused or ends the connection",
            oversized,
        ),
        wire(
            "cut-anywhere",
            "Communication",
            "A front-end that goes away within a message harms nobody",
            cut_anywhere,
        ),
        wire("reconnect", "Communication", "The next front-end is served like the first", reconnect)
            .layouts(),
    ]
}

fn early(bench: &mut Bench<'_>) -> Checked {
    let mut endpoint = bench.host.wire()?.connect()?;
    if endpoint.get_features()? & F_PROTOCOL_FEATURES == 0 {
        return broken("bit 30 is not offered");
    }
    let offered = endpoint.get_protocol_features()?;
    endpoint.set_protocol_features(offered & P::MQ)?;
    match endpoint.get_features() {
        Ok(_) => Ok(()),
        Err(error) => broken(format!("after SET_PROTOCOL_FEATURES: {error}")),
    }
}

fn queue_num(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    if !now.has(P::MQ) {
        return broken("mq is not offered");
    }
    match now.endpoint.get_queue_num()? {
        1..=0xffff => Ok(()),
        count => broken(format!("{count} queues")),
    }
}

fn consistent(bench: &mut Bench<'_>) -> Checked {
    let mut endpoint = bench.host.wire()?.connect()?;
    if endpoint.get_features()? & F_PROTOCOL_FEATURES == 0 {
        return not_applicable("protocol_features not offered");
    }
    match endpoint.get_protocol_features()?.unmet() {
        None => Ok(()),
        Some((feature, needs)) => broken(format!("{feature:?} without {needs:?}")),
    }
}

fn acks(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::REPLY_ACK)?;
    let call = new_eventfd()?;
    now.endpoint.set_vring_call(0, Some(call.as_fd()))?;
    now.endpoint.set_vring_num(0, 16)?;
    now.endpoint.set_vring_base(0, 0)?;
    now.endpoint.set_vring_enable(0, false)?;
    Ok(now.endpoint.set_owner()?)
}

/// Whether a message is refused: told so, or the connection ends.
fn refused(result: Result<(), Error>) -> Checked<bool> {
    match result {
        Ok(()) => Ok(false),
        Err(Error::Refused { .. } | Error::Disconnected | Error::Truncated { .. }) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

fn failures(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::REPLY_ACK)?;
    match now.endpoint.set_vring_num(0xfe, 16) {
        Err(Error::Refused { value: 1.., .. }) => Ok(()),
        Ok(()) => broken("SET_VRING_NUM of ring 254 is answered with 0"),
        Err(error) => broken(format!("no answer: {error}")),
    }
}

/// Sends a message, then GET_QUEUE_NUM: the first reply that comes has to be that of `first`.
fn first_reply(bench: &mut Bench<'_>, code: FrontendCode, need_reply: bool, first: FrontendCode) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::REPLY_ACK | P::MQ)?;
    now.endpoint.send(code.code(), if need_reply { flags::NEED_REPLY } else { 0 }, &[], &[])?;
    now.endpoint.send(FrontendCode::GetQueueNum.code(), 0, &[], &[])?;
    let reply = now.endpoint.receive_reply()?.header.request;
    if reply != first.code() {
        return broken(format!("a reply to request {reply} came where one to {} belongs", first.code()));
    }
    if first == FrontendCode::GetQueueNum {
        return Ok(());
    }
    match now.endpoint.receive_reply()?.header.request {
        next if next == FrontendCode::GetQueueNum.code() => Ok(()),
        next => broken(format!("a second reply came, to request {next}")),
    }
}

fn one_reply(bench: &mut Bench<'_>) -> Checked {
    first_reply(bench, FrontendCode::GetFeatures, true, FrontendCode::GetFeatures)
}

fn no_reply(bench: &mut Bench<'_>) -> Checked {
    first_reply(bench, FrontendCode::SetOwner, false, FrontendCode::GetQueueNum)
}

fn index_checked(bench: &mut Bench<'_>) -> Checked {
    for index in [0x80, 0xff, 0x1_0000, u32::MAX] {
        bench.renew()?;
        let now = bench.host.wire()?.now()?;
        now.need(P::REPLY_ACK)?;
        if !refused(now.endpoint.set_vring_num(index, 16))? {
            return broken(format!("SET_VRING_NUM of ring {index} was accepted"));
        }
        bench.renew()?;
        let now = bench.host.wire()?.now()?;
        if !refused(now.endpoint.set_vring_enable(index, true))? {
            return broken(format!("SET_VRING_ENABLE of ring {index} was accepted"));
        }
    }
    bench.host.wire()?.alive()
}

fn size_checked(bench: &mut Bench<'_>) -> Checked {
    for size in [0, 0x8001, 0x1_0000, u32::MAX] {
        bench.renew()?;
        let now = bench.host.wire()?.now()?;
        now.need(P::REPLY_ACK)?;
        if !refused(now.endpoint.set_vring_num(0, size))? {
            return broken(format!("a ring of {size} entries was accepted"));
        }
    }
    bench.host.wire()?.alive()
}

fn unruled(bench: &mut Bench<'_>) -> Checked {
    bench.setup.rings_disabled = false;
    bench.begin()?;
    if bench.subject.is_some_and(|subject| subject.queue >= bench.host.queues()) {
        return not_applicable("without protocol features a front-end does not know of that queue");
    }
    let queue = bench.queue()?;
    bench.ask(queue)
}

fn enable_scans(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    bench.host.wire()?.now()?.enable(queue, false)?;
    let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
    bench.host.ring(queue).publish();
    // A device that has side effects to avoid may use the buffer now, too.
    bench.host.rest()?;
    bench.host.wire()?.now()?.enable(queue, true)?;
    let used = bench.used(queue)?;
    match bench.check(&asked, used) {
        // Used while disabled: without effect.
        Err(_) if used.id == asked.id && used.len == 0 => bench.ask(queue),
        other => other,
    }
}

fn disabled(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    for on in [false, true, false, true] {
        bench.host.wire()?.now()?.enable(queue, on)?;
    }
    // No interrupt is on its way any more.
    bench.ask_notified(queue)?;
    bench.host.wire()?.now()?.enable(queue, false)?;
    bench.host.rest()?;
    // Enabled or not, a ring without buffers has nothing to tell.
    bench.quiet(queue, "while the ring was disabled")
}

fn call_changes(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..3 {
        bench.ask(queue)?;
        bench.host.rest()?;
        let now = bench.host.wire()?.now()?;
        let old = std::mem::replace(&mut now.rings[queue].call, new_eventfd()?);
        let new = now.rings[queue].call.as_fd();
        now.endpoint.set_vring_call(queue as u32, Some(new))?;
        // Interrupts that are sent to be sure that none is lost.
        counted(&old);
        bench.ask_notified(queue)?;
        if counted(&old) != 0 {
            return broken("an interrupt came through the old file");
        }
    }
    Ok(())
}

fn kick_changes(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..3 {
        bench.ask(queue)?;
        let now = bench.host.wire()?.now()?;
        now.rings[queue].kick = new_eventfd()?;
        let new = now.rings[queue].kick.as_fd();
        now.endpoint.set_vring_kick(queue as u32, Some(new))?;
    }
    bench.host.rest()?;
    bench.ask(queue)
}

fn stop_where(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for count in [0, 1, 3] {
        // What is made available and not waited for is finished or left alone.
        let mut asked = Vec::new();
        for _ in 0..count {
            asked.push(bench.stage(queue, Cut::Whole, Shape::Direct)?);
        }
        bench.publish(queue)?;
        let stopped = bench.host.stop_ring(queue)?;
        let position = bench.host.ring(queue).try_position()?;
        let same = match bench.setup.layout {
            RingLayout::Split => stopped.index == position.index,
            RingLayout::Packed => {
                let now = bench.host.wire()?.now()?;
                stopped == position && now.rings[queue].base == base(RingLayout::Packed, position)
            }
        };
        if !same {
            return broken(format!("it says {stopped:?}, it is at {position:?}"));
        }
        bench.host.start_ring(queue)?;
        bench.finish(queue, asked)?;
    }
    Ok(())
}

fn stopped_quiet(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    for every in 0..bench.host.queues() {
        bench.host.stop_ring(every)?;
    }
    let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
    bench.host.ring(queue).publish();
    bench.quiet(queue, "while the ring was stopped")?;
    bench.host.ring(queue).check_untouched()?;
    for every in 0..bench.host.queues() {
        bench.host.start_ring(every)?;
    }
    let used = bench.used(queue)?;
    bench.check(&asked, used)
}

fn goes_on(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for round in 1..6 {
        (0..round).try_for_each(|_| bench.ask(queue))?;
        bench.host.stop_ring(queue)?;
        bench.host.start_ring(queue)?;
    }
    bench.ask(queue)
}

fn config_size(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::CONFIG)?;
    // The endpoint compares offset and size with what it asked for.
    for (offset, size) in [(0, 1), (0, 4), (2, 2), (0, 8)] {
        now.endpoint.get_config(offset, size, 0)?;
    }
    Ok(())
}

fn read_only(bench: &mut Bench<'_>) -> Checked {
    let subject = bench.subject()?;
    let Some(offset) = subject.read_only else {
        return not_applicable("no field of this device is known to be read-only");
    };
    bench.begin()?;
    let before = bench.host.config(offset, 1)?;
    let changed: Vec<u8> = before.iter().map(|byte| !byte).collect();
    refused(bench.host.wire()?.now()?.endpoint.set_config(offset, 0, &changed))?;
    if bench.host.wire()?.now()?.endpoint.get_features().is_err() {
        // It answered by ending the connection.
        bench.begin()?;
    }
    let after = bench.host.config(offset, 1)?;
    if before == after { Ok(()) } else { broken(format!("byte {offset} became {after:02x?}")) }
}

/// A region elsewhere in the guest's address space, over the same file as the first one.
fn alias(now: &crate::conformance::socket::Connection) -> vhost_user::MemoryRegion {
    let first = region(&now.ram.regions()[0]);
    vhost_user::MemoryRegion {
        guest_addr: 1 << 40,
        size: 4096,
        user_addr: 1 << 45,
        mmap_offset: first.mmap_offset,
    }
}

fn slots(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::CONFIGURE_MEM_SLOTS)?;
    let count = now.endpoint.get_max_mem_slots()?;
    if count == 0 {
        return broken("there are no slots");
    }
    for _ in 0..3 {
        bench.ask(queue)?;
        let now = bench.host.wire()?.now()?;
        let more = alias(now);
        let ram = now.ram.clone();
        now.endpoint.add_mem_reg(more, ram.fd())?;
        bench.ask(queue)?;
        bench.host.wire()?.now()?.endpoint.rem_mem_reg(more)?;
    }
    bench.ask(queue)
}

fn table(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    for _ in 0..3 {
        bench.ask(queue)?;
        bench.host.wire()?.now()?.set_mem_table()?;
        bench.ask(queue)?;
    }
    // Another table that replaces it: a back-end that only ever adds would refuse the overlap, or run out of room.
    for _ in 0..16 {
        bench.host.wire()?.now()?.set_mem_table()?;
    }
    bench.ask(queue)
}

fn removed(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::CONFIGURE_MEM_SLOTS)?;
    let more = alias(now);
    let ram = now.ram.clone();
    now.endpoint.add_mem_reg(more, ram.fd())?;
    bench.ask(queue)?;
    bench.host.wire()?.now()?.endpoint.rem_mem_reg(more)?;
    // A chain that lies there is broken now.
    let buf = crate::Buf::writable(vm_virtio::GuestAddress(more.guest_addr + 64), 64);
    if bench.host.ring(queue).stage(&[buf], Shape::Direct).is_err() {
        return not_applicable("the ring has no room");
    }
    bench.publish(queue)?;
    bench.host.rest()?;
    match bench.host.ring(queue).glance() {
        None => Ok(()),
        Some(_) => broken("a buffer in it was used"),
    }
}

fn overlap(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::CONFIGURE_MEM_SLOTS | P::REPLY_ACK)?;
    let ram = now.ram.clone();
    let first = region(&ram.regions()[0]);
    let over = vhost_user::MemoryRegion {
        guest_addr: first.guest_addr + 4096,
        user_addr: 1 << 45,
        size: 4096,
        ..first
    };
    if !refused(now.endpoint.add_mem_reg(over, ram.fd()))? {
        return broken("a region within another one was accepted");
    }
    bench.host.wire()?.alive()
}

fn fd_count(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::REPLY_ACK)?;
    let ram = now.ram.clone();
    let regions: Vec<_> = ram.regions().iter().map(region).collect();
    let mut body = (regions.len() as u32).to_ne_bytes().to_vec();
    body.extend([0; 4]);
    for r in &regions {
        for field in [r.guest_addr, r.size, r.user_addr, r.mmap_offset] {
            body.extend(field.to_ne_bytes());
        }
    }
    let code = FrontendCode::SetMemTable;
    now.endpoint.send(code.code(), flags::NEED_REPLY, &[&body], &[ram.fd()])?;
    if !refused(now.endpoint.receive_ack(code))? {
        return broken("two regions with one file were accepted");
    }
    bench.host.wire()?.alive()
}

fn reset_device(bench: &mut Bench<'_>) -> Checked {
    bench.begin()?;
    let queue = bench.queue()?;
    bench.host.wire()?.now()?.need(P::RESET_DEVICE)?;
    for _ in 0..2 {
        bench.ask(queue)?;
        let wire = bench.host.wire()?;
        let now = wire.now()?;
        for every in 0..now.rings.len() {
            now.stop(every)?;
        }
        now.endpoint.reset_device()?;
        for ring in &mut now.rings {
            ring.driver.restart();
            ring.base = base(now.setup.layout, vm_virtio::RingPos::START);
        }
        // The owner and the memory are the front-end's and stay.
        if now.has(P::STATUS) {
            let status = now.endpoint.get_status()?;
            if status != 0 {
                return broken(format!("afterwards the status reads {status:#x}"));
            }
            for status in [1, 3] {
                now.endpoint.set_status(status)?;
            }
        }
        now.endpoint.set_features(now.features.low64() | F_PROTOCOL_FEATURES)?;
        if now.has(P::STATUS) {
            now.endpoint.set_status(11)?;
        }
        bench.go()?;
    }
    bench.ask(queue)
}

fn log_marks(bench: &mut Bench<'_>) -> Checked {
    let mut endpoint = bench.host.wire()?.connect()?;
    if endpoint.get_features()? & F_LOG_ALL == 0 {
        return not_applicable("log_all not offered");
    }
    let setup = bench.setup;
    drop(endpoint);
    bench.host.wire()?.renew_with(&setup, P::LOG_SHMFD)?;
    bench.host.wire()?.now()?.need(P::LOG_SHMFD)?;
    bench.go()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    let now = bench.host.wire()?.now()?;
    // A bit a page for all of guest memory, and a page of file before the log begins.
    let end = now.ram.regions().iter().map(|r| r.guest_addr + r.size).max().unwrap_or(0);
    let size = (end / 4096).div_ceil(8).next_multiple_of(4096);
    let log = rustix::fs::memfd_create("testkit-log", rustix::fs::MemfdFlags::CLOEXEC);
    let log = std::fs::File::from(log.map_err(|error| Error::Io(error.into()))?);
    log.set_len(4096 + size).map_err(Error::Io)?;
    let area = LogArea { size, offset: 4096 };
    now.endpoint.set_log_base(area, log.as_fd())?;
    let bits = now.features.low64() | F_PROTOCOL_FEATURES;
    now.endpoint.set_features(bits | F_LOG_ALL)?;
    let asked = bench.submit(queue, Cut::Whole, Shape::Direct)?;
    let used = bench.used(queue)?;
    let written = asked.chain.iter().find(|buf| buf.writable).map(|buf| buf.addr.0 / 4096);
    bench.check(&asked, used)?;
    let marked = |page: u64| -> Checked<bool> {
        let mut byte = [0];
        std::os::unix::fs::FileExt::read_exact_at(&log, &mut byte, 4096 + page / 8).map_err(Error::Io)?;
        Ok(byte[0] >> (page % 8) & 1 == 1)
    };
    if let Some(page) = written
        && !marked(page)?
    {
        return broken(format!("page {page:#x} was written and is not marked"));
    }
    bench.host.wire()?.now()?.endpoint.set_features(bits)?;
    bench.ask(queue)
}

fn inflight(bench: &mut Bench<'_>) -> Checked {
    let setup = bench.setup;
    bench.host.wire()?.renew_with(&setup, P::INFLIGHT_SHMFD)?;
    let now = bench.host.wire()?.now()?;
    now.need(P::INFLIGHT_SHMFD)?;
    let queues = now.rings.len() as u16;
    let (area, fd) = now.endpoint.get_inflight_fd(queues, setup.size)?;
    if area.num_queues != queues || area.queue_size != setup.size {
        return broken(format!("an area for {} queues of {}", area.num_queues, area.queue_size));
    }
    let file = std::fs::File::from(fd);
    let len = file.metadata().map_err(Error::Io)?.len();
    if area.mmap_offset.checked_add(area.mmap_size).is_none_or(|end| end > len) {
        return broken(format!(
            "an area of {} bytes at {} in a file of {len}",
            area.mmap_size, area.mmap_offset
        ));
    }
    now.endpoint.set_inflight_fd(area, file.as_fd())?;
    bench.go()?;
    let queue = bench.queue()?;
    (0..2 * setup.size).try_for_each(|_| bench.ask(queue))?;
    bench.host.stop_ring(queue)?;
    bench.host.start_ring(queue)?;
    bench.ask(queue)
}

fn inband(bench: &mut Bench<'_>) -> Checked {
    let setup = bench.setup;
    bench.host.wire()?.renew_with(&setup, P::INBAND_NOTIFICATIONS)?;
    let now = bench.host.wire()?.now()?;
    now.need(P::INBAND_NOTIFICATIONS)?;
    for index in 0..now.rings.len() {
        now.place_ring(index)?;
        now.endpoint.set_vring_kick(index as u32, None)?;
        let call = now.rings[index].call.as_fd();
        now.endpoint.set_vring_call(index as u32, Some(call))?;
        now.enable(index, true)?;
    }
    bench.host.driver_ok()?;
    let queue = bench.queue()?;
    for _ in 0..4 {
        let asked = bench.stage(queue, Cut::Whole, Shape::Direct)?;
        bench.host.ring(queue).publish();
        bench.host.wire()?.now()?.endpoint.vring_kick(queue as u32)?;
        let used = bench.used(queue)?;
        bench.check(&asked, used)?;
    }
    Ok(())
}

/// Constant for the connection, whole pages.
fn shmem_config(bench: &mut Bench<'_>) -> Checked {
    let setup = bench.setup;
    bench.host.wire()?.renew_with(&setup, P::SHMEM_MAP | P::BACKEND_SEND_FD)?;
    let now = bench.host.wire()?.now()?;
    now.need(P::SHMEM_MAP)?;
    let regions = now.endpoint.get_shmem_config()?;
    let page = rustix::param::page_size() as u64;
    if let Some((id, size)) = regions.iter().find(|(_, size)| !size.is_multiple_of(page)) {
        return broken(format!("region {id} has {size} bytes"));
    }
    bench.go()?;
    let again = bench.host.wire()?.now()?.endpoint.get_shmem_config()?;
    if again == regions { Ok(()) } else { broken(format!("{regions:?}, then {again:?}")) }
}

fn unknown(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    now.need(P::REPLY_ACK)?;
    now.endpoint.send(200, flags::NEED_REPLY, &[&[0; 8]], &[])?;
    match now.endpoint.receive_reply() {
        Ok(reply) if reply.body.iter().all(|byte| *byte == 0) => {
            return broken("request 200 is answered with success");
        }
        Ok(_) | Err(Error::Disconnected | Error::Truncated { .. }) => {}
        Err(error) => return Err(error.into()),
    }
    bench.host.wire()?.alive()
}

fn oversized(bench: &mut Bench<'_>) -> Checked {
    bench.renew()?;
    let now = bench.host.wire()?.now()?;
    let mut header = Vec::new();
    for field in [FrontendCode::SetFeatures.code(), 1, u32::MAX] {
        header.extend(field.to_ne_bytes());
    }
    header.extend([0; 64]);
    // The connection may end before all of it is sent.
    let _ = now.endpoint.send_raw(&header, &[]);
    bench.host.wire()?.alive()
}

fn cut_anywhere(bench: &mut Bench<'_>) -> Checked {
    let mut message = Vec::new();
    for field in [FrontendCode::SetVringNum.code(), 1, 8, 0, 16] {
        message.extend(field.to_ne_bytes());
    }
    for len in 0..message.len() {
        let endpoint = bench.host.wire()?.connect()?;
        let _ = endpoint.stream().write_all(&message[..len]);
    }
    bench.host.wire()?.alive()?;
    bench.begin()?;
    let queue = bench.queue()?;
    bench.ask(queue)
}

fn reconnect(bench: &mut Bench<'_>) -> Checked {
    for _ in 0..3 {
        bench.begin()?;
        let queue = bench.queue()?;
        bench.ask(queue)?;
    }
    Ok(())
}
