//! A device behind an IOMMU (vhost-user, "IOMMU support"): translations come from the front-end, which is asked for them.
//!
//! * A queue that misses a translation pops nothing until an update has it. A ring that misses one when it is to start
//!   waits like one whose memory slot is missing.
//! * An invalidation is acknowledged when no queue uses what it names: no new request, and of those that are out, each
//!   has [`RELEASE_DEADLINE`] to end. A buffer that the device keeps for longer (for an event that may never come) keeps
//!   its memory until it ends. Linux invalidates whatever there is, from time to time, so waiting for such buffers would
//!   stop the VMM, and giving them up would fail healthy devices. It is memory of the same guest in any case.
//! * A translation that does not allow what the driver wants is asked for once more. If the answer does not allow it
//!   either, the ring is broken and the front-end is told of the failed access.
use std::time::{Duration, Instant};

use vhost_user::{BackendRequest, Error, IotlbAccess, IotlbChange, IotlbReport};
use vm_virtio::WaitFor;
use vm_virtio::device::VirtioDevice;
use vm_virtio::memory::iotlb::{Rights, last_of};
use vm_virtio::queue::Miss;

use super::{Refused, Session};

/// How long an invalidation waits for requests that are out: long for a request that is under way, short for a VMM that
/// waits for it.
const RELEASE_DEADLINE: Duration = Duration::from_millis(100);

/// Reports that wait for room on the channel: a front-end that does not read gets no more of them than this.
const REPORTS: usize = 256;

pub(super) fn miss(miss: Miss) -> IotlbReport {
    IotlbReport::Miss { iova: miss.iova, access: access(miss) }
}

pub(super) fn access_fail(miss: Miss) -> IotlbReport {
    IotlbReport::AccessFail { iova: miss.iova, access: access(miss) }
}

fn access(miss: Miss) -> IotlbAccess {
    if miss.write { IotlbAccess::WRITE } else { IotlbAccess::READ }
}

impl<D: VirtioDevice> Session<'_, D> {
    /// IOTLB_MSG.
    pub(super) async fn change_iotlb(&mut self, change: IotlbChange) -> Result<(), Refused> {
        match change {
            IotlbChange::Update { iova, size, user_addr, access } => {
                let (read, write) = (access.contains(IotlbAccess::READ), access.contains(IotlbAccess::WRITE));
                let next = self.memory.updated(iova, size, user_addr, Rights { read, write })?;
                self.change_memory(next, WaitFor::NewRequests).await;
            }
            IotlbChange::Invalidate { iova, size } => {
                let next = self.memory.invalidated(iova, size)?;
                let deadline = Instant::now() + RELEASE_DEADLINE;
                let wait = WaitFor::Released { first: iova, last: last_of(iova, size), deadline };
                self.change_memory(next, wait).await;
            }
        }
        Ok(())
    }

    /// No ring runs: what is known may be out of date from here on. QEMU passes invalidations on only while rings run, and
    /// a driver that starts again may find its rings elsewhere under the same addresses.
    pub(super) async fn forget_translations(&mut self) -> Result<(), Refused> {
        if self.memory.is_translated() && self.is_suspended() {
            let next = self.memory.behind_iommu(true)?;
            self.change_memory(next, WaitFor::NewRequests).await;
        }
        Ok(())
    }

    /// A queue found a translation that does not allow what it wants: it may be out of date.
    pub(super) async fn forget_translation(&mut self, iova: u64) {
        if let Ok(next) = self.memory.invalidated(iova, 1) {
            self.change_memory(next, WaitFor::NewRequests).await;
        }
    }

    /// A ring cannot start for want of a translation. False: the driver may not use it.
    pub(super) fn ring_misses(&mut self, at: usize, missing: Miss) -> bool {
        let asked = self.rings[at].asked.replace(missing);
        let again = asked.is_some_and(|asked| (asked.iova, asked.write) == (missing.iova, missing.write));
        if again && missing.denied {
            self.rings[at].asked = None;
            self.report(access_fail(missing));
            return false;
        }
        if !again {
            self.report(miss(missing));
        }
        true
    }

    /// No ring is started: nothing is missing any more, and a suspended device says nothing.
    pub(super) fn forget_reports(&mut self) {
        if !self.is_started() {
            self.reports.clear();
        }
    }

    /// Tells the front-end, now or when the channel has room.
    pub(super) fn report(&mut self, report: IotlbReport) {
        if self.is_started() && self.reports.len() < REPORTS {
            self.reports.push_back(report);
        }
        self.send_reports();
    }

    pub(super) fn send_reports(&mut self) {
        while let (Some(channel), Some(report)) = (&mut self.channel, self.reports.front()) {
            match channel.socket.request(BackendRequest::Iotlb(*report), false) {
                Ok(_) => drop(self.reports.pop_front()),
                Err(Error::OutputFull) => return,
                Err(error) => self.channel_ended(&error),
            }
        }
    }
}
