//! What happens on a queue, in numbers.

/// What happened on a queue since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct QueueCounters {
    /// Chains popped; those that were put back do not count.
    pub popped: u64,
    /// Chains given back to the driver.
    pub completed: u64,
    /// Of those: chains that the device dropped, given back with length 0.
    pub swept: u64,
    /// Chains given up without a used entry.
    pub discarded: u64,
    /// Completions whose length was more than the chain has room for: errors of the device, cut to the room.
    pub clamped: u64,
    /// Chains of other queues that were refused.
    pub foreign: u64,
    /// Requests that make no sense, as the device says: [`Queue::note_refused`](super::Queue::note_refused).
    pub refused: u64,
    /// Requests that the device's backend failed, as the device says:
    /// [`Queue::note_failed`](super::Queue::note_failed).
    pub failed: u64,
    /// Bytes of device-readable parts that were used, as the device says: [`Queue::note_read`](super::Queue::note_read).
    pub bytes_read: u64,
    /// Bytes that completed chains said were written.
    pub bytes_written: u64,
}

impl QueueCounters {
    /// How many there are.
    pub(crate) const COUNT: usize = 10;

    /// All of them, in the order of the fields.
    pub(crate) fn to_array(self) -> [u64; Self::COUNT] {
        let QueueCounters {
            popped,
            completed,
            swept,
            discarded,
            clamped,
            foreign,
            refused,
            failed,
            bytes_read,
            bytes_written,
        } = self;
        [popped, completed, swept, discarded, clamped, foreign, refused, failed, bytes_read, bytes_written]
    }

    /// The way back.
    pub(crate) fn from_array(values: [u64; Self::COUNT]) -> QueueCounters {
        let [
            popped,
            completed,
            swept,
            discarded,
            clamped,
            foreign,
            refused,
            failed,
            bytes_read,
            bytes_written,
        ] = values;
        QueueCounters {
            popped,
            completed,
            swept,
            discarded,
            clamped,
            foreign,
            refused,
            failed,
            bytes_read,
            bytes_written,
        }
    }

    /// Requests that the device is done with.
    pub(crate) fn ended(&self) -> u64 {
        self.completed + self.discarded
    }
}
