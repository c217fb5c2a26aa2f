//! Changes of the memory table while rings run.
use vm_virtio::WaitFor;
use vm_virtio::device::VirtioDevice;

use super::Session;
use crate::memory::MemoryTable;

impl<D: VirtioDevice> Session<'_, D> {
    /// Takes the next table.
    ///
    /// A ring that the new table has at the same guest addresses moves to it between two requests. One that it has
    /// elsewhere is stopped first and started at its new place, exactly where it was. One that it does not have at all
    /// waits: front-ends exchange memory slots by removing one and adding another. Requests that were taken before
    /// keep the old memory mapped until they are done.
    pub(super) async fn change_memory(&mut self, next: MemoryTable, wait: WaitFor) {
        let packed = self.packed();
        for at in 0..self.rings.len() {
            let ring = &self.rings[at];
            let moves = ring.running.is_some() && ring.place(&next, packed).ok() != ring.running;
            if moves {
                self.halt(at).await;
            }
        }
        self.guest.engine.memory(next.ram().clone(), wait).await;
        self.memory = next;
        for at in 0..self.rings.len() {
            if self.rings[at].kick.is_some() && self.rings[at].running.is_none() {
                // A ring that still cannot run does not make the table wrong.
                if let Err(error) = self.start_if_possible(at).await {
                    tracing::info!(guest = self.guest.index, "after a change of memory: {error}");
                }
            }
        }
    }
}
