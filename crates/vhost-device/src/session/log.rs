//! The log of dirty pages (vhost-user, "Migration"): who is told of it, and when.
//!
//! The device marks pages while the front-end has set LOG_ALL and given a log, in whatever order and as often as it
//! likes. Pages of memory that comes later are marked as well; a page that the log has no bit for is not.
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use vhost_user::LogArea;
use vm_virtio::device::VirtioDevice;
use vm_virtio::memory::SharedMemory;
use vm_virtio::{DirtyLog, EventFd, Interrupt};

use super::{Refused, Session};
use crate::mapping;

/// What the front-end said about the log.
#[derive(Default)]
pub(super) struct Log {
    /// LOG_ALL of SET_FEATURES.
    pub(super) wanted: bool,
    /// SET_LOG_BASE.
    area: Option<Arc<SharedMemory>>,
    /// SET_LOG_FD.
    signal: Option<Arc<EventFd>>,
}

impl<D: VirtioDevice> Session<'_, D> {
    /// SET_LOG_BASE. When it is answered nobody writes to the former log.
    pub(super) async fn set_log_base(&mut self, area: LogArea, fd: OwnedFd) -> Result<(), Refused> {
        let mapped = mapping::map_beside(fd.as_fd(), area.offset, area.size, &self.guest.budget);
        self.log.area = Some(Arc::new(mapped.map_err(Refused::Log)?));
        self.apply_log().await;
        Ok(())
    }

    /// SET_LOG_FD.
    pub(super) async fn set_log_fd(&mut self, fd: OwnedFd) -> Result<(), Refused> {
        self.log.signal = Some(Arc::new(EventFd::new(fd)?));
        self.apply_log().await;
        Ok(())
    }

    /// Brings it to the device.
    pub(super) async fn apply_log(&self) {
        let Log { wanted, area, signal } = &self.log;
        let log = area.as_ref().filter(|_| *wanted).map(|area| {
            let signal = signal.clone().map(|signal| signal as Arc<dyn Interrupt>);
            Arc::new(DirtyLog::new(area.clone(), signal))
        });
        self.guest.engine.log(log).await;
    }

    /// SET_VRING_ADDR said whether writes to the ring itself are logged.
    pub(super) async fn apply_ring_log(&self, at: usize) {
        let device = self.rings.get(at).and_then(|ring| ring.logged(self.memory.is_translated()));
        self.guest.engine.log_ring(at as u16, device).await;
    }
}
