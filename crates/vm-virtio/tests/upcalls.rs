//! What workers ask of their host, from the host's side: a VMM that has the device in its own process.
use std::collections::{BTreeMap, VecDeque};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reactor::Mail;
use rustix::fs::{MemfdFlags, memfd_create};
use virtio_testkit::{MemoryHost, RingLayout};
use vm_virtio::upcall::MAX_UPCALLS;
use vm_virtio::{
    Chain, DeviceError, DeviceState, DeviceType, Engine, EngineError, EngineOptions, Features, Lane,
    Mappings, QueueSpec, Responder, ShmRange, ShmRegion, SnapshotError, StateError, Status, Stop,
    SuspendError, UpcallError, UpcallHandler, UpcallId, UpcallReply, UpcallRequest, UpcallResult,
    VirtioDevice, Worker,
};

const SOON: Duration = Duration::from_secs(20);
const PAGE: u64 = 0x1000;

/// Each request (a page's number) asks for a mapping of that page; the answer's length tells what became of it.
/// What workers heard, for the test.
type Heard = Arc<Mutex<Vec<Result<(), UpcallError>>>>;

struct Mapper {
    regions: Vec<ShmRegion>,
    heard: Heard,
}

impl Mapper {
    fn new(regions: &[ShmRegion]) -> Mapper {
        Mapper { regions: regions.to_vec(), heard: Heard::default() }
    }
}

struct MapperWorker {
    waiting: BTreeMap<UpcallId, Chain>,
    heard: Heard,
}

const DONE: u32 = 1;
const FAILED: u32 = 2;
/// Asks the worker to fail.
const FAIL: u8 = 0xff;
/// Is done at once; the worker looks an object up for itself.
const LOOK_UP: u8 = 0xfe;

impl VirtioDevice for Mapper {
    type Worker = MapperWorker;
    fn device_type(&self) -> DeviceType {
        DeviceType(26)
    }
    fn features(&self) -> Features {
        Features::empty()
    }
    fn queues(&self, _: Features) -> Vec<QueueSpec> {
        vec![QueueSpec { name: "q", max_size: 256, lane: 0 }]
    }
    fn shared_memory(&self) -> &[ShmRegion] {
        &self.regions
    }
    fn workers(&mut self, _: &[Mail<()>]) -> Result<Vec<MapperWorker>, DeviceError> {
        Ok(vec![MapperWorker { waiting: BTreeMap::new(), heard: self.heard.clone() }])
    }
    fn save(&self, _: &[MapperWorker]) -> Result<DeviceState, StateError> {
        DeviceState::encode(1, &())
    }
    fn reset(&mut self, workers: &mut [MapperWorker]) {
        for worker in workers {
            worker.waiting.clear();
        }
    }
}

impl Worker for MapperWorker {
    type Msg = ();
    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            let mut page = [0];
            queue.reader(&chain).read(&mut page);
            if page[0] == FAIL {
                return Err(DeviceError::new("asked to"));
            }
            if page[0] == LOOK_UP {
                lane.up.look_up([1; 16]).map_err(DeviceError::new)?;
                queue.add_used(chain, DONE);
                continue;
            }
            let to = ShmRange { region: 3, offset: u64::from(page[0]) * PAGE, len: PAGE };
            let file = File::from(memfd_create("page", MemfdFlags::CLOEXEC).map_err(DeviceError::new)?);
            file.write_all_at(&[page[0]; PAGE as usize], 0)?;
            match lane.up.map(to, file.into(), 0, false) {
                Ok(id) => drop(self.waiting.insert(id, chain)),
                Err(_) => queue.add_used(chain, FAILED),
            }
        }
        Ok(())
    }
    fn queue_stop(&mut self, _: u16, how: Stop, lane: &mut Lane<'_>) {
        if how == Stop::Discard {
            // Too late to ask for anything.
            let object = lane.up.look_up([0; 16]);
            assert!(matches!(object, Ok(_) | Err(UpcallError::Reset)));
        }
    }
    fn upcall_done(
        &mut self,
        id: UpcallId,
        result: UpcallResult,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let heard = result.as_ref().map(|_| ()).map_err(|error| *error);
        self.heard.lock().unwrap().push(heard);
        let Some(chain) = self.waiting.remove(&id) else { return Ok(()) };
        // The driver takes its buffer back by itself.
        if result.as_ref().is_err_and(|error| *error == UpcallError::Reset) {
            return Ok(());
        }
        if let Some(queue) = lane.queues.get(0) {
            queue.add_used(chain, if result.is_ok() { DONE } else { FAILED });
        }
        Ok(())
    }
}

/// A VMM: takes down what is asked, answers when the test says so.
#[derive(Default)]
struct Vmm {
    asked: Mutex<VecDeque<(UpcallRequest, Responder)>>,
    mapped: Mutex<Mappings>,
    resets: AtomicU32,
}

impl UpcallHandler for Vmm {
    fn request(&self, request: UpcallRequest, responder: Responder) {
        self.asked.lock().unwrap().push_back((request, responder));
    }
    fn reset(&self) {
        self.resets.fetch_add(1, Ordering::SeqCst);
        self.mapped.lock().unwrap().take_all().for_each(drop);
    }
}

impl Vmm {
    fn next(&self) -> Option<(UpcallRequest, Responder)> {
        self.asked.lock().unwrap().pop_front()
    }

    /// Does what it is asked. Whether anybody still wanted that.
    fn answer(&self) -> bool {
        let (request, responder) = self.next().expect("a question");
        let UpcallRequest::Map { to, .. } = request else { panic!("{request:?}") };
        let result = self.mapped.lock().unwrap().map(to).map(|()| UpcallReply::Done);
        let mapped = result.is_ok();
        let wanted = responder.respond(result);
        if mapped && !wanted {
            self.mapped.lock().unwrap().unmap(to).unwrap();
        }
        wanted
    }

    fn mappings(&self) -> usize {
        self.mapped.lock().unwrap().take_all().count()
    }
}

fn host(layout: RingLayout) -> (MemoryHost<Mapper>, Arc<Vmm>, Heard) {
    let vmm = Arc::<Vmm>::default();
    let upcalls = vmm.clone();
    let device = Mapper::new(&[ShmRegion { id: 3, size: 256 * PAGE }]);
    let heard = device.heard.clone();
    let builder = MemoryHost::builder(device).layout(layout).queue_size(256);
    let builder = builder.with(Features::SUSPEND);
    (builder.options(move |options| options.upcalls = Some(upcalls)).start(), vmm, heard)
}

fn request(host: &mut MemoryHost<Mapper>, page: u8) {
    let chain = [host.ram().readable(&[page]), host.ram().writable(8)];
    host.ring(0).add(&chain);
    host.kick(0);
    host.step();
}

#[track_caller]
fn answered(host: &mut MemoryHost<Mapper>) -> u32 {
    let mut used = None;
    assert!(host.run_until(SOON, |host| {
        used = used.or_else(|| host.ring(0).used());
        used.is_some()
    }));
    used.expect("found").len
}

#[test]
fn answers_come_back_to_the_worker_in_any_order() {
    for layout in RingLayout::ALL {
        let (mut host, vmm, _) = host(layout);
        assert_eq!(host.engine().shared_memory(), [ShmRegion { id: 3, size: 256 * PAGE }]);
        for page in 0..3 {
            request(&mut host, page);
        }
        assert_eq!(host.ring(0).used(), None);
        let (UpcallRequest::Map { to, file, file_offset: 0, writable: false }, first) =
            vmm.next().expect("a question")
        else {
            panic!("a mapping")
        };
        assert_eq!(to, ShmRange { region: 3, offset: 0, len: PAGE });
        let mut byte = [9];
        File::from(file).read_exact_at(&mut byte, 0).unwrap();
        assert_eq!(byte, [0]);
        assert!(vmm.answer() && vmm.answer());
        assert_eq!([answered(&mut host), answered(&mut host)], [DONE; 2]);
        assert!(first.respond(Err(UpcallError::Refused)));
        assert_eq!(answered(&mut host), FAILED);
        // A VMM that loses the question has answered it.
        request(&mut host, 9);
        drop(vmm.next());
        assert_eq!(answered(&mut host), FAILED);
        host.settle();
    }
}

#[test]
fn policy_7_a_silent_host_is_given_up_and_knows_it() {
    let (mut host, vmm, _) = host(RingLayout::Split);
    request(&mut host, 1);
    let question = vmm.next().expect("a question");
    assert!(question.1.is_awaited());
    assert_eq!(answered(&mut host), FAILED);
    assert!(!question.1.is_awaited());
    assert_eq!(host.engine().failures().unanswered.load(Ordering::Relaxed), 1);
    vmm.asked.lock().unwrap().push_back(question);
    assert!(!vmm.answer());
    host.step();
    assert_eq!((host.ring(0).used(), vmm.mappings()), (None, 0));
    assert_eq!(host.engine().status() & Status::DEVICE_NEEDS_RESET, Status::empty());
}

#[test]
fn virtio_2_4_a_reset_answers_all_and_the_host_unmaps_all() {
    let (mut host, vmm, heard) = host(RingLayout::Packed);
    request(&mut host, 1);
    assert!(vmm.answer());
    assert_eq!(answered(&mut host), DONE);
    host.settle();
    request(&mut host, 2);
    request(&mut host, 3);
    host.reset();
    assert_eq!(host.engine().status(), Status::empty());
    assert_eq!(*heard.lock().unwrap(), [Ok(()), Err(UpcallError::Reset), Err(UpcallError::Reset)]);
    assert_eq!(vmm.resets.load(Ordering::SeqCst), 1);
    assert!(!vmm.answer(), "nobody's any more");
    assert_eq!(vmm.mappings(), 0);
    // And the answer that is late does not reach the next driver.
    let late = vmm.next().expect("a question");
    host.initialise();
    late.1.respond(Ok(UpcallReply::Done));
    host.step();
    assert_eq!(host.ring(0).used(), None);
    request(&mut host, 4);
    assert!(vmm.answer());
    assert_eq!(answered(&mut host), DONE);
}

#[test]
fn policy_5_nobody_waits_for_what_a_failed_worker_asked() {
    let (mut host, vmm, _) = host(RingLayout::Split);
    request(&mut host, 1);
    request(&mut host, FAIL);
    host.settle();
    assert!(host.engine().status().contains(Status::DEVICE_NEEDS_RESET));
    assert!(!vmm.answer());
    host.reset();
    host.initialise();
    request(&mut host, 1);
    assert!(vmm.answer());
    assert_eq!(answered(&mut host), DONE);
}

#[test]
fn policy_8_questions_are_bounded() {
    let (mut host, vmm, _) = host(RingLayout::Split);
    (0..MAX_UPCALLS as u8 + 3).for_each(|page| request(&mut host, page));
    assert_eq!(vmm.asked.lock().unwrap().len(), MAX_UPCALLS);
    assert_eq!([answered(&mut host), answered(&mut host), answered(&mut host)], [FAILED; 3]);
    (0..MAX_UPCALLS).for_each(|_| assert!(vmm.answer()));
    (0..MAX_UPCALLS).for_each(|_| assert_eq!(answered(&mut host), DONE));
}

/// 3.4.2: what is under way is finished before the device is suspended. Also what no request waits for: a state is that of
/// a device that waits for nothing.
#[test]
fn a_suspension_waits_for_answers_and_a_save_does_not_overtake_them() {
    for page in [1, LOOK_UP] {
        let (mut host, vmm, heard) = host(RingLayout::Split);
        request(&mut host, page);
        let ticket = host.engine().suspend();
        host.step();
        let (_, responder) = vmm.next().expect("a question");
        assert!(heard.lock().unwrap().is_empty());
        responder.respond(Ok(UpcallReply::Done));
        let suspended: Result<(), SuspendError> = host.finish(ticket);
        suspended.unwrap();
        assert_eq!(*heard.lock().unwrap(), [Ok(())], "before it was suspended");
        assert_eq!(host.ring(0).used().map(|used| used.len), Some(DONE));
        let ticket = host.engine().save();
        assert!(host.finish(ticket).is_ok());
        let ticket = host.engine().resume();
        host.finish(ticket);
        // Without a queue that runs there is nothing to suspend, and still something to wait for.
        request(&mut host, LOOK_UP);
        let stop = host.engine().stop(0, Stop::Drain, None);
        host.finish(stop).unwrap();
        let ticket = host.engine().save();
        assert!(matches!(host.finish(ticket), Err(SnapshotError::Running)));
        drop(vmm.next());
        host.step();
        let ticket = host.engine().save();
        assert!(host.finish(ticket).is_ok());
    }
}

/// The same, and the host is silent: the suspension waits until the question is given up.
#[test]
fn policy_7_a_suspension_outlasts_a_silent_host() {
    let (mut host, vmm, heard) = host(RingLayout::Split);
    request(&mut host, LOOK_UP);
    let mut ticket = host.engine().suspend();
    let mut suspended = None;
    assert!(host.run_until(SOON, |_| {
        suspended = ticket.try_take();
        suspended.is_some()
    }));
    assert!(matches!(suspended, Some(Ok(()))));
    assert_eq!(*heard.lock().unwrap(), [Err(UpcallError::TimedOut)]);
    drop(vmm);
}

#[test]
fn without_a_handler_nothing_can_be_asked() {
    let mut host = MemoryHost::builder(Mapper::new(&[ShmRegion { id: 3, size: 256 * PAGE }])).start();
    request(&mut host, 1);
    assert_eq!(answered(&mut host), FAILED);
}

#[test]
fn virtio_2_10_regions_have_ids_of_their_own_and_whole_pages() {
    struct Deaf;
    impl vm_virtio::HostEvents for Deaf {
        fn event(&self, _: vm_virtio::HostEvent) {}
    }
    let refused = |regions: &[ShmRegion]| {
        let made = Engine::new(Mapper::new(regions), EngineOptions::new(Arc::new(Deaf)));
        matches!(made.map(|_| ()), Err(EngineError::Description(_)))
    };
    let region = |id, size| ShmRegion { id, size };
    assert!(refused(&[region(1, PAGE), region(1, PAGE)]));
    assert!(refused(&[region(1, 0)]));
    assert!(refused(&[region(1, PAGE + 1)]));
    assert!(!refused(&[region(1, PAGE), region(255, 3 * PAGE)]));
}
