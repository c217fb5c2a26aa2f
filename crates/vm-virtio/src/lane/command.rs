//! What the engine tells a lane, and where workers meet the device.
use crate::device::{Session, Stop, Worker};
use crate::engine::{Collected, QueueResetError};
use crate::lane::suspend::{By, Gathering};
use crate::lane::{Call, Interrupt, Kick, StartError, StopError};
use crate::ticket::Completer;
use crate::{DirtyLog, GuestAddress, GuestRam, Queue, QueueState};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

/// How long a memory change waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WaitFor {
    /// Until new requests use the new memory; chains that are out keep the old one mapped.
    NewRequests,
    /// Until no chain of the old memory is out; new requests wait for that.
    OldChainsGone,
    /// As [`WaitFor::NewRequests`], and then until no chain is out that has memory in this range of (old) addresses, for
    /// nobody may access it any more; at most until the deadline, once for each chain. What is out for longer - a buffer
    /// that the device keeps for an event, of which the driver has certainly not taken the memory back - keeps its
    /// memory until it ends, and is counted.
    Released {
        /// First address.
        first: u64,
        /// Last address.
        last: u64,
        /// When to wait no longer.
        deadline: Instant,
    },
}

/// An order to a lane. Orders are carried out in the order in which they were given.
pub(crate) enum Command<W: Worker> {
    Start {
        queue: u16,
        ring: Box<Queue>,
        kick: Kick,
        call: Call,
        done: Completer<Result<(), StartError>>,
    },
    Enable {
        queue: u16,
        on: bool,
        done: Completer<()>,
    },
    SetCall {
        queue: u16,
        call: Call,
        done: Completer<()>,
    },
    Stop {
        queue: u16,
        how: Stop,
        deadline: Instant,
        done: Completer<Result<QueueState, StopError>>,
    },
    /// One queue by itself (2.6.1).
    ResetQueue {
        queue: u16,
        deadline: Instant,
        done: Completer<Result<(), QueueResetError>>,
    },
    /// Come to rest, and let go of `done` then.
    Suspend {
        by: By,
        deadline: Instant,
        done: Arc<Gathering>,
    },
    Resume {
        by: By,
        done: Arc<Completer<()>>,
    },
    /// Complete when the last holder of `done` is gone.
    Memory {
        ram: GuestRam,
        wait: WaitFor,
        done: Arc<Completer<()>>,
    },
    /// DRIVER_OK.
    Activate {
        session: Session,
        done: Arc<Completer<()>>,
    },
    /// The log of dirty pages, for all queues; complete when the last holder of `done` is gone.
    Log {
        log: Option<Arc<DirtyLog>>,
        done: Arc<Completer<()>>,
    },
    /// Where a queue's Device Area is for the log.
    LogRing {
        queue: u16,
        device: Option<GuestAddress>,
        done: Completer<()>,
    },
    Kick {
        queue: u16,
        /// Whoever waits until it is heard.
        done: Option<Completer<()>>,
    },
    /// Whoever made the file behind it can make it block: only this guest's lane is to feel that.
    Signal {
        interrupt: Arc<dyn Interrupt>,
        done: Completer<()>,
    },
    /// Stop everything, hand in the worker.
    CheckIn {
        meeting: Arc<Meeting<W>>,
        deadline: Instant,
    },
    /// Hand in the queues' states and the worker.
    Save {
        meeting: Arc<Meeting<W>>,
        collected: Arc<Mutex<Collected>>,
    },
    /// Hand in the worker of a device that is reset.
    Restore {
        meeting: Arc<Meeting<W>>,
    },
    /// The worker comes back, reset or as it was.
    Return {
        worker: W,
        reset: bool,
    },
    Shutdown,
}

impl<W: Worker> Command<W> {
    /// Whether it makes sense while the worker is away for a moment.
    pub(super) fn needs_no_worker(&self) -> bool {
        matches!(
            self,
            Command::Save { .. } | Command::Restore { .. } | Command::Return { .. } | Command::Shutdown
        )
    }
}

/// The engine's end of a lane.
pub(crate) struct LaneHandle<W: Worker> {
    pub(crate) commands: Sender<Command<W>>,
    pub(crate) waker: reactor::Waker,
}

impl<W: Worker> Clone for LaneHandle<W> {
    fn clone(&self) -> Self {
        LaneHandle { commands: self.commands.clone(), waker: self.waker.clone() }
    }
}

impl<W: Worker> LaneHandle<W> {
    /// A lane that is gone drops the command, whose ticket then says so.
    pub(crate) fn send(&self, command: Command<W>) {
        if self.commands.send(command).is_ok() {
            self.waker.wake();
        }
    }
}

/// What is done with all workers: gets them in the order of the lanes, and whether any lane had to give up chains.
type Agenda<W> = Box<dyn FnOnce(&mut [W], bool) + Send>;

/// What is done when the workers are on their way home, so that whatever it causes finds them there.
type Afterwards = Box<dyn FnOnce() + Send>;

struct Table<W: Worker> {
    seats: Vec<Option<W>>,
    stuck: bool,
    /// Whether the agenda resets the workers: the failed work again.
    resets: bool,
    agenda: Option<(Agenda<W>, Afterwards)>,
    lanes: Vec<LaneHandle<W>>,
}

/// Where the workers of all lanes come together. The last to arrive does the work, on its own thread; then everybody
/// goes home. No lock is held that a lane could wait for: a lane without a worker just has nothing to do.
pub(crate) struct Meeting<W: Worker>(Mutex<Table<W>>);

impl<W: Worker> Meeting<W> {
    pub(crate) fn new(
        lanes: Vec<LaneHandle<W>>,
        agenda: Agenda<W>,
        afterwards: Afterwards,
        resets: bool,
    ) -> Self {
        Meeting(Mutex::new(Table {
            seats: lanes.iter().map(|_| None).collect(),
            stuck: false,
            resets,
            agenda: Some((agenda, afterwards)),
            lanes,
        }))
    }

    /// Lane `index` hands in its worker.
    pub(crate) fn arrive(&self, index: u16, worker: W, stuck: bool) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        table.stuck |= stuck;
        if table.agenda.is_none() {
            // It was called off.
            if let Some(lane) = table.lanes.get(usize::from(index)) {
                lane.send(Command::Return { worker, reset: false });
            }
            return;
        }
        if let Some(seat) = table.seats.get_mut(usize::from(index)) {
            *seat = Some(worker);
        }
        if table.seats.iter().any(Option::is_none) {
            return;
        }
        let mut workers: Vec<W> = table.seats.iter_mut().filter_map(Option::take).collect();
        let (stuck, reset) = (table.stuck, table.resets);
        let agenda = table.agenda.take();
        let lanes = std::mem::take(&mut table.lanes);
        drop(table);
        let Some((agenda, afterwards)) = agenda else { return };
        // A panic in here is the device's; the agenda's own drop guard reports it.
        let _ = catch_unwind(AssertUnwindSafe(|| agenda(&mut workers, stuck)));
        for (lane, worker) in lanes.iter().zip(workers) {
            lane.send(Command::Return { worker, reset });
        }
        afterwards();
    }

    /// A lane cannot come: its worker is at another meeting, which may wait for those who are here. Everybody goes home.
    pub(crate) fn decline(&self) {
        let mut table = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let agenda = table.agenda.take();
        let seats: Vec<Option<W>> = table.seats.iter_mut().map(Option::take).collect();
        for (lane, worker) in table.lanes.iter().zip(seats) {
            if let Some(worker) = worker {
                lane.send(Command::Return { worker, reset: false });
            }
        }
        drop(table);
        // Answers those who wait, which is none of the table's business.
        drop(agenda);
    }
}
