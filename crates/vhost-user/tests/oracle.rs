//! Against the `vhost` crate, the protocol's other implementation in Rust: its front-end with our back-end, its back-end
//! with our front-end, and the back-end's channel both ways.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use vhost::vhost_user::message::*;
use vhost::vhost_user::{
    Backend, BackendReqHandler, Error as TheirError, Frontend, FrontendReqHandler, GpuBackend, HandlerResult,
    Result as Theirs, VhostUserBackendReqHandlerMut, VhostUserFrontend, VhostUserFrontendReqHandler,
    VhostUserFrontendReqHandlerMut,
};
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_user::{
    Answer, BackendChannel, BackendEndpoint, BackendListener, BackendRequest, Error, FrontendEndpoint,
    FrontendRequest, InflightArea, LogArea, MemoryRegion, MigrationPhase, ProtocolFeatures, Sent, ShmemRange,
    TransferDirection, VringAddr,
};
use vmm_sys_util::eventfd::EventFd;

const FEATURES: u64 = 1 << 32 | vhost_user::F_PROTOCOL_FEATURES;

fn features() -> ProtocolFeatures {
    ProtocolFeatures::MQ
        | ProtocolFeatures::REPLY_ACK
        | ProtocolFeatures::BACKEND_REQ
        | ProtocolFeatures::CONFIG
        | ProtocolFeatures::RESET_DEVICE
        | ProtocolFeatures::CONFIGURE_MEM_SLOTS
        | ProtocolFeatures::LOG_SHMFD
        | ProtocolFeatures::PAGEFAULT
        | ProtocolFeatures::BACKEND_SEND_FD
        | ProtocolFeatures::INFLIGHT_SHMFD
        | ProtocolFeatures::SHARED_OBJECT
        | ProtocolFeatures::DEVICE_STATE
        | ProtocolFeatures::SHMEM_MAP
}

/// The file that the back-ends of these tests answer with: what was written to it tells it from others.
fn answered_file() -> OwnedFd {
    let (reader, mut writer) = io::pipe().unwrap();
    io::Write::write_all(&mut writer, b"answered").unwrap();
    reader.into()
}

fn is_answered_file(file: impl Into<File>) -> bool {
    let mut bytes = [0; 8];
    io::Read::read_exact(&mut file.into(), &mut bytes).is_ok() && &bytes == b"answered"
}

const OBJECT: [u8; 16] = *b"an object's uuid";

fn object() -> VhostUserSharedMsg {
    VhostUserSharedMsg { uuid: uuid::Uuid::from_bytes(OBJECT) }
}

/// Serves with our back-end until the other side goes; what it understood goes to the channel.
fn our_backend(socket: UnixStream) -> (thread::JoinHandle<()>, Receiver<FrontendRequest>) {
    let (asked, requests) = channel();
    let server = thread::spawn(move || {
        let mut endpoint = BackendEndpoint::new(socket).unwrap();
        loop {
            let received = match endpoint.receive() {
                Ok(Some(received)) => received,
                Ok(None) => {
                    let flags = rustix::event::PollFlags::IN;
                    rustix::event::poll(&mut [rustix::event::PollFd::new(&endpoint, flags)], None).unwrap();
                    continue;
                }
                Err(Error::Invalid { ticket, .. }) => {
                    endpoint.reply(ticket, Answer::Failed).unwrap();
                    continue;
                }
                Err(Error::Disconnected) => return,
                Err(other) => panic!("{other:?}"),
            };
            let answer = match &received.request {
                FrontendRequest::GetFeatures => Answer::U64(FEATURES),
                FrontendRequest::GetProtocolFeatures => Answer::U64(features().bits()),
                FrontendRequest::SetProtocolFeatures(set) => {
                    endpoint.set_protocol_features(*set);
                    Answer::Done
                }
                FrontendRequest::GetQueueNum => Answer::U64(5),
                FrontendRequest::GetMaxMemSlots => Answer::U64(32),
                FrontendRequest::GetVringBase { index } => Answer::VringBase(index + 100),
                FrontendRequest::GetConfig { offset, size, .. } => match offset {
                    0 => Answer::Config((0..*size).map(|n| n as u8).collect()),
                    _ => Answer::Failed,
                },
                FrontendRequest::GetInflightFd(asked) => {
                    let area = InflightArea { mmap_size: 0x1000, mmap_offset: 0x40, ..*asked };
                    Answer::Inflight(area, answered_file())
                }
                FrontendRequest::GetSharedObject(OBJECT) | FrontendRequest::PostcopyAdvise => {
                    Answer::Fd(answered_file())
                }
                FrontendRequest::GetSharedObject(_) => Answer::Failed,
                FrontendRequest::SetDeviceStateFd { direction: TransferDirection::Load, .. } => {
                    Answer::Fd(answered_file())
                }
                FrontendRequest::GetShmemConfig => Answer::ShmemConfig(vec![(0, 0x1000), (200, 0x20_0000)]),
                FrontendRequest::SetVringNum { num, .. } if !num.is_power_of_two() => Answer::Failed,
                _ => Answer::Done,
            };
            endpoint.reply(received.ticket, answer).unwrap();
            asked.send(received.request).unwrap();
        }
    });
    (server, requests)
}

fn next(requests: &Receiver<FrontendRequest>) -> FrontendRequest {
    requests.recv_timeout(Duration::from_secs(30)).unwrap()
}

/// Writes to an eventfd that was sent must arrive at the one that was kept.
fn same_file(sent: &OwnedFd, kept: &EventFd) -> bool {
    rustix::io::write(sent, &5_u64.to_ne_bytes()).unwrap();
    kept.read().unwrap() == 5
}

#[test]
fn their_front_end_and_our_back_end() {
    for need_reply in [false, true] {
        let (near, far) = UnixStream::pair().unwrap();
        let (server, requests) = our_backend(far);
        let mut frontend = Frontend::from_stream(near, 5);

        frontend.set_owner().unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetOwner));
        assert_eq!(frontend.get_features().unwrap(), FEATURES);
        assert!(matches!(next(&requests), FrontendRequest::GetFeatures));
        frontend.set_features(FEATURES).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetFeatures(FEATURES)));
        let offered = frontend.get_protocol_features().unwrap();
        assert_eq!(offered.bits(), features().bits());
        assert!(matches!(next(&requests), FrontendRequest::GetProtocolFeatures));
        if need_reply {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        frontend.set_protocol_features(offered).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetProtocolFeatures(set) if set == features()));
        assert_eq!(frontend.get_queue_num().unwrap(), 5);
        assert!(matches!(next(&requests), FrontendRequest::GetQueueNum));
        frontend.reset_owner().unwrap();
        assert!(matches!(next(&requests), FrontendRequest::ResetOwner));

        let file = EventFd::new(0).unwrap();
        let region = |n: u64| VhostUserMemoryRegionInfo {
            guest_phys_addr: n << 32,
            memory_size: 0x1000 * (n + 1),
            userspace_addr: 0x7000_0000 + (n << 20),
            mmap_offset: n,
            mmap_handle: file.as_raw_fd(),
        };
        let ours = |n: u64| MemoryRegion {
            guest_addr: n << 32,
            size: 0x1000 * (n + 1),
            user_addr: 0x7000_0000 + (n << 20),
            mmap_offset: n,
        };
        let table: Vec<_> = (0..8).map(region).collect();
        frontend.set_mem_table(&table).unwrap();
        let FrontendRequest::SetMemTable(got) = next(&requests) else { panic!() };
        for (n, (region, fd)) in got.iter().enumerate() {
            assert_eq!(*region, ours(n as u64));
            assert!(same_file(fd, &file));
        }
        assert_eq!(got.len(), 8);
        assert_eq!(frontend.get_max_mem_slots().unwrap(), 32);
        assert!(matches!(next(&requests), FrontendRequest::GetMaxMemSlots));
        frontend.add_mem_region(&region(9)).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::AddMemReg(got, fd)
            if got == ours(9) && same_file(&fd, &file)));
        frontend.remove_mem_region(&region(9)).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::RemMemReg(got) if got.guest_addr == 9 << 32));

        frontend.set_vring_num(1, 256).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetVringNum { index: 1, num: 256 }));
        let ring = VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 1,
            desc_table_addr: 0x1000,
            used_ring_addr: 0x2000,
            avail_ring_addr: 0x3000,
            log_addr: Some(0x4000),
        };
        frontend.set_vring_addr(2, &ring).unwrap();
        let addr = VringAddr { index: 2, flags: 1, desc: 0x1000, used: 0x2000, avail: 0x3000, log: 0x4000 };
        assert!(matches!(next(&requests), FrontendRequest::SetVringAddr(got) if got == addr));
        frontend.set_vring_base(3, 7).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetVringBase { index: 3, base: 7 }));
        assert_eq!(frontend.get_vring_base(4).unwrap(), 104);
        assert!(matches!(next(&requests), FrontendRequest::GetVringBase { index: 4 }));
        frontend.set_vring_call(0, &file).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetVringCall { index: 0, fd: Some(fd) }
            if same_file(&fd, &file)));
        frontend.set_vring_kick(1, &file).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetVringKick { index: 1, fd: Some(fd) }
            if same_file(&fd, &file)));
        frontend.set_vring_err(2, &file).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetVringErr { index: 2, fd: Some(fd) }
            if same_file(&fd, &file)));
        frontend.set_vring_enable(3, true).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetVringEnable { index: 3, enable: true }));

        let writable = VhostUserConfigFlags::WRITABLE;
        let (header, data) = frontend.get_config(0, 8, writable, &[0; 8]).unwrap();
        assert_eq!(({ header.offset }, { header.size }, data), (0, 8, vec![0, 1, 2, 3, 4, 5, 6, 7]));
        assert!(matches!(next(&requests), FrontendRequest::GetConfig { offset: 0, size: 8, flags: 1 }));
        frontend.set_config(4, writable, &[9, 8, 7]).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetConfig { offset: 4, flags: 1, data }
            if data == [9, 8, 7]));
        frontend.set_backend_request_fd(&file).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetBackendReqFd(fd) if same_file(&fd, &file)));
        frontend.reset_device().unwrap();
        assert!(matches!(next(&requests), FrontendRequest::ResetDevice));

        let log = VhostUserDirtyLogRegion { mmap_size: 0x100, mmap_offset: 8, mmap_handle: file.as_raw_fd() };
        frontend.set_log_base(0, Some(log)).unwrap();
        let area = LogArea { size: 0x100, offset: 8 };
        assert!(matches!(next(&requests), FrontendRequest::SetLogBase(got, fd)
            if got == area && same_file(&fd, &file)));
        let asked = VhostUserInflight { num_queues: 2, queue_size: 256, ..VhostUserInflight::default() };
        let (inflight, tracked) = frontend.get_inflight_fd(&asked).unwrap();
        assert_eq!((inflight.mmap_size, inflight.mmap_offset), (0x1000, 0x40));
        assert_eq!((inflight.num_queues, inflight.queue_size), (2, 256));
        assert!(is_answered_file(tracked));
        let area = InflightArea { mmap_size: 0, mmap_offset: 0, num_queues: 2, queue_size: 256 };
        assert!(matches!(next(&requests), FrontendRequest::GetInflightFd(got) if got == area));
        frontend.set_inflight_fd(&inflight, file.as_raw_fd()).unwrap();
        let area = InflightArea { mmap_size: 0x1000, mmap_offset: 0x40, ..area };
        assert!(matches!(next(&requests), FrontendRequest::SetInflightFd(got, fd)
            if got == area && same_file(&fd, &file)));
        let (stopped, end) = (VhostTransferStatePhase::STOPPED, || answered_file());
        let own = frontend.set_device_state_fd(VhostTransferStateDirection::SAVE, stopped, end()).unwrap();
        assert!(own.is_none());
        assert!(matches!(next(&requests), FrontendRequest::SetDeviceStateFd { direction, fd, .. }
            if direction == TransferDirection::Save && is_answered_file(fd.try_clone().unwrap())));
        let own = frontend.set_device_state_fd(VhostTransferStateDirection::LOAD, stopped, end()).unwrap();
        assert!(is_answered_file(own.unwrap()));
        assert!(matches!(next(&requests), FrontendRequest::SetDeviceStateFd { .. }));
        frontend.check_device_state().unwrap();
        assert!(matches!(next(&requests), FrontendRequest::CheckDeviceState));
        assert!(is_answered_file(frontend.get_shared_object(&object()).unwrap()));
        assert!(matches!(next(&requests), FrontendRequest::GetSharedObject(OBJECT)));
        let other = VhostUserSharedMsg { uuid: uuid::Uuid::from_bytes([7; 16]) };
        assert!(frontend.get_shared_object(&other).is_err());
        assert!(matches!(next(&requests), FrontendRequest::GetSharedObject(_)));
        let shmem = frontend.get_shmem_config().unwrap();
        let sizes = [shmem.memory_sizes[0], shmem.memory_sizes[1], shmem.memory_sizes[200]];
        assert_eq!((shmem.nregions, sizes), (2, [0x1000, 0, 0x20_0000]));
        assert!(matches!(next(&requests), FrontendRequest::GetShmemConfig));
        assert!(is_answered_file(frontend.postcopy_advise().unwrap()));
        assert!(matches!(next(&requests), FrontendRequest::PostcopyAdvise));
        frontend.postcopy_listen().unwrap();
        assert!(matches!(next(&requests), FrontendRequest::PostcopyListen));

        // A failure is told only to a front-end that asks.
        assert_eq!(frontend.set_vring_num(1, 100).is_err(), need_reply);
        assert!(matches!(next(&requests), FrontendRequest::SetVringNum { num: 100, .. }));
        frontend.set_log_fd(file.as_raw_fd()).unwrap();
        assert!(matches!(next(&requests), FrontendRequest::SetLogFd(fd) if same_file(&fd, &file)));
        assert!(frontend.get_features().is_ok());

        drop(frontend);
        server.join().unwrap();
    }
}

struct ConfigChanges(Sender<()>);

impl VhostUserFrontendReqHandlerMut for ConfigChanges {
    fn handle_config_change(&mut self) -> HandlerResult<u64> {
        self.0.send(()).map_err(io::Error::other)?;
        Ok(0)
    }

    fn shared_object_add(&mut self, id: &VhostUserSharedMsg) -> HandlerResult<u64> {
        assert_eq!(id.uuid.as_bytes(), &OBJECT);
        Ok(0)
    }

    fn shared_object_remove(&mut self, id: &VhostUserSharedMsg) -> HandlerResult<u64> {
        assert_eq!(id.uuid.as_bytes(), &OBJECT);
        Err(io::Error::from_raw_os_error(2))
    }

    fn shmem_map(&mut self, map: &VhostUserMMap, file: &dyn AsRawFd) -> HandlerResult<u64> {
        let got = (map.shmid, map.fd_offset, map.shm_offset, map.len, map.flags);
        assert_eq!(got, (3, 0x1000, 0x2000, 0x3000, 1));
        // SAFETY: the listener keeps it open during this call.
        let file = unsafe { std::os::fd::BorrowedFd::borrow_raw(file.as_raw_fd()) };
        assert!(is_answered_file(file.try_clone_to_owned().unwrap()));
        Ok(0)
    }

    fn shmem_unmap(&mut self, map: &VhostUserMMap) -> HandlerResult<u64> {
        let got = (map.shmid, map.shm_offset, map.len);
        assert_eq!(got, (3, 0x2000, 0x3000));
        Ok(0)
    }
}

#[test]
fn our_channel_and_their_listener() {
    let (changes, changed) = channel();
    let mut listener = FrontendReqHandler::new(Arc::new(Mutex::new(ConfigChanges(changes)))).unwrap();
    listener.set_reply_ack_flag(true);
    // Its end of the socket comes to us the way it comes to a back-end.
    let (near, far) = UnixStream::pair().unwrap();
    let (server, requests) = our_backend(far);
    let mut frontend = Frontend::from_stream(near, 1);
    frontend.get_features().unwrap();
    frontend.set_features(FEATURES).unwrap();
    let offered = frontend.get_protocol_features().unwrap();
    frontend.set_protocol_features(offered).unwrap();
    frontend.set_backend_request_fd(&listener.get_tx_raw_fd()).unwrap();
    let socket = loop {
        if let FrontendRequest::SetBackendReqFd(socket) = next(&requests) {
            break socket;
        }
    };
    let mut channel = BackendChannel::new(socket, features()).unwrap();
    assert_eq!(channel.config_changed().unwrap(), Sent::Now);
    assert_eq!(listener.handle_request().unwrap(), 0);
    changed.try_recv().unwrap();
    // What it answers, and what it does not. (It wants a descriptor with a lookup, which the document does not have.)
    let range = ShmemRange { shmid: 3, offset: 0x2000, len: 0x3000 };
    let map = BackendRequest::ShmemMap { range, fd: answered_file(), fd_offset: 0x1000, writable: true };
    let asked = [
        (BackendRequest::SharedObjectAdd(OBJECT), 0),
        (BackendRequest::SharedObjectRemove(OBJECT), (-2_i64).cast_unsigned()),
        (map, 0),
        (BackendRequest::ShmemUnmap(range), 0),
        (BackendRequest::ConfigChange, 0),
    ];
    for (request, expected) in asked {
        let code = request.code();
        let id = channel.request(request, true).unwrap();
        let _ = listener.handle_request();
        let reply = channel.receive().unwrap().unwrap();
        assert_eq!((reply.id, reply.code, reply.value), (id, code, expected));
        assert!(reply.fd.is_none());
    }
    channel.request(BackendRequest::SharedObjectAdd(OBJECT), false).unwrap();
    assert_eq!(listener.handle_request().unwrap(), 0);
    assert!(channel.receive().unwrap().is_none());
    assert_eq!(channel.unanswered(), 0);
    drop(frontend);
    server.join().unwrap();
}

/// Their back-end, writing down what it understood.
#[derive(Default)]
struct Record {
    log: Vec<String>,
    channel: Option<Backend>,
}

impl Record {
    fn note(&mut self, what: String) -> Theirs<()> {
        self.log.push(what);
        Ok(())
    }
}

impl VhostUserBackendReqHandlerMut for Record {
    fn set_owner(&mut self) -> Theirs<()> {
        self.note("owner".into())
    }

    fn reset_owner(&mut self) -> Theirs<()> {
        self.note("reset owner".into())
    }

    fn reset_device(&mut self) -> Theirs<()> {
        self.note("reset".into())
    }

    fn get_features(&mut self) -> Theirs<u64> {
        Ok(FEATURES)
    }

    fn set_features(&mut self, features: u64) -> Theirs<()> {
        self.note(format!("features {features:x}"))
    }

    fn set_mem_table(
        &mut self,
        table: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _: Option<bool>,
    ) -> Theirs<Option<Vec<u64>>> {
        assert_eq!(table.len(), files.len());
        for region in table {
            let region = *region;
            let (guest, size, user, offset) =
                (region.guest_phys_addr, region.memory_size, region.user_addr, region.mmap_offset);
            self.note(format!("region {guest:x} {size:x} {user:x} {offset:x}"))?;
        }
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Theirs<()> {
        if num == 7 {
            return Err(TheirError::InvalidParam);
        }
        self.note(format!("num {index} {num}"))
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Theirs<()> {
        self.note(format!("addr {index} {} {descriptor:x} {used:x} {available:x} {log:x}", flags.bits()))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Theirs<()> {
        self.note(format!("base {index} {base}"))
    }

    fn get_vring_base(&mut self, index: u32) -> Theirs<VhostUserVringState> {
        Ok(VhostUserVringState::new(index, index + 100))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Theirs<()> {
        self.note(format!("kick {index} {}", fd.is_some()))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Theirs<()> {
        self.note(format!("call {index} {}", fd.is_some()))
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Theirs<()> {
        self.note(format!("err {index} {}", fd.is_some()))
    }

    fn get_protocol_features(&mut self) -> Theirs<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::from_bits_retain(features().bits()))
    }

    fn set_protocol_features(&mut self, features: u64) -> Theirs<()> {
        self.note(format!("protocol {features:x}"))
    }

    fn get_queue_num(&mut self) -> Theirs<u64> {
        Ok(5)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Theirs<()> {
        self.note(format!("enable {index} {enable}"))
    }

    fn get_config(&mut self, offset: u32, size: u32, flags: VhostUserConfigFlags) -> Theirs<Vec<u8>> {
        self.note(format!("get config {offset} {size} {}", flags.bits()))?;
        if offset == 0 { Ok(vec![6; size as usize]) } else { Err(TheirError::InvalidParam) }
    }

    fn set_config(&mut self, offset: u32, data: &[u8], flags: VhostUserConfigFlags) -> Theirs<()> {
        self.note(format!("set config {offset} {data:?} {}", flags.bits()))
    }

    fn set_backend_req_fd(&mut self, backend: Backend) {
        self.channel = Some(backend);
    }

    fn set_gpu_socket(&mut self, _: GpuBackend) -> Theirs<()> {
        self.note("gpu".into())
    }

    fn get_shared_object(&mut self, object: VhostUserSharedMsg) -> Theirs<File> {
        match object.uuid.as_bytes() {
            &OBJECT => Ok(answered_file().into()),
            _ => Err(TheirError::InvalidParam),
        }
    }

    fn get_inflight_fd(&mut self, asked: &VhostUserInflight) -> Theirs<(VhostUserInflight, File)> {
        let area = VhostUserInflight { mmap_size: 0x1000, mmap_offset: 0x40, ..*asked };
        Ok((area, answered_file().into()))
    }

    fn set_inflight_fd(&mut self, area: &VhostUserInflight, _: File) -> Theirs<()> {
        let (size, offset) = (area.mmap_size, area.mmap_offset);
        self.note(format!("inflight {size:x} {offset:x} {} {}", area.num_queues, area.queue_size))
    }

    fn get_max_mem_slots(&mut self) -> Theirs<u64> {
        Ok(32)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        _: File,
        _: Option<bool>,
    ) -> Theirs<Option<u64>> {
        let guest = region.guest_phys_addr;
        self.note(format!("add {guest:x}"))?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Theirs<()> {
        let guest = region.guest_phys_addr;
        self.note(format!("remove {guest:x}"))
    }

    fn set_device_state_fd(
        &mut self,
        direction: VhostTransferStateDirection,
        _: VhostTransferStatePhase,
        _: File,
    ) -> Theirs<Option<File>> {
        self.note(format!("state {direction:?}"))?;
        Ok((direction == VhostTransferStateDirection::LOAD).then(|| answered_file().into()))
    }

    /// Good the first time, bad the second.
    fn check_device_state(&mut self) -> Theirs<()> {
        let before = self.log.iter().filter(|line| *line == "check").count();
        self.note("check".into())?;
        if before == 0 { Ok(()) } else { Err(TheirError::InvalidParam) }
    }

    fn get_shmem_config(&mut self) -> Theirs<VhostUserShMemConfig> {
        Ok(VhostUserShMemConfig::new(2, &[0, 0x1000, 0, 0x20_0000]))
    }

    fn postcopy_advice(&mut self) -> Theirs<File> {
        Ok(answered_file().into())
    }

    fn postcopy_listen(&mut self) -> Theirs<()> {
        self.note("listen".into())
    }

    fn postcopy_end(&mut self) -> Theirs<()> {
        self.note("end".into())
    }

    fn postcopy_ack_mem_regions(&mut self) -> Theirs<()> {
        unreachable!()
    }

    fn set_log_base(&mut self, log: &VhostUserLog, _: File) -> Theirs<()> {
        let (size, offset) = (log.mmap_size, log.mmap_offset);
        self.note(format!("log {size:x} {offset:x}"))
    }
}

#[test]
fn our_front_end_and_their_back_end() {
    let (near, far) = UnixStream::pair().unwrap();
    let record = Arc::new(Mutex::new(Record::default()));
    let mut handler = BackendReqHandler::from_stream(far, Arc::clone(&record));
    // Errors of its handlers are for it to report and for us to be told.
    let server = thread::spawn(move || {
        loop {
            match handler.handle_request() {
                Ok(()) | Err(TheirError::ReqHandlerError(_) | TheirError::InvalidParam) => {}
                Err(_) => return,
            }
        }
    });

    let mut frontend = FrontendEndpoint::new(near);
    frontend.set_owner().unwrap();
    assert_eq!(frontend.get_features().unwrap(), FEATURES);
    assert_eq!(frontend.get_protocol_features().unwrap(), features());
    frontend.set_features(FEATURES).unwrap();
    frontend.set_protocol_features(features()).unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), 5);
    let file = rustix::event::eventfd(0, rustix::event::EventfdFlags::CLOEXEC).unwrap();
    let fd = file.as_fd();
    let region =
        MemoryRegion { guest_addr: 0x10_0000, size: 0x2000, user_addr: 0x7000_0000, mmap_offset: 0x3000 };
    let other = MemoryRegion { guest_addr: 0x20_0000, ..region };
    frontend.set_mem_table(&[(region, fd), (other, fd)]).unwrap();
    assert_eq!(frontend.get_max_mem_slots().unwrap(), 32);
    frontend.add_mem_reg(MemoryRegion { guest_addr: 0x30_0000, ..region }, fd).unwrap();
    frontend.rem_mem_reg(MemoryRegion { guest_addr: 0x30_0000, ..region }).unwrap();
    frontend.set_vring_num(1, 128).unwrap();
    assert!(matches!(frontend.set_vring_num(1, 7), Err(Error::Refused { .. })));
    let addr = VringAddr { index: 2, flags: 1, desc: 0x1000, used: 0x2000, avail: 0x3000, log: 0x4000 };
    frontend.set_vring_addr(&addr).unwrap();
    frontend.set_vring_base(3, 9).unwrap();
    assert_eq!(frontend.get_vring_base(3).unwrap(), 103);
    frontend.set_vring_kick(0, Some(fd)).unwrap();
    frontend.set_vring_kick(1, None).unwrap();
    frontend.set_vring_call(2, Some(fd)).unwrap();
    frontend.set_vring_err(3, None).unwrap();
    frontend.set_vring_enable(4, true).unwrap();
    assert_eq!(frontend.get_config(0, 3, 1).unwrap(), [6; 3]);
    // Their error has the fixed part of the payload, ours has no payload: both are understood.
    assert!(matches!(frontend.get_config(1, 3, 1), Err(Error::Refused { .. })));
    frontend.set_config(2, 1, &[1, 2]).unwrap();
    frontend.reset_device().unwrap();
    frontend.set_log_base(LogArea { size: 0x100, offset: 8 }, fd).unwrap();
    let (area, file) = frontend.get_inflight_fd(2, 256).unwrap();
    let expected = InflightArea { mmap_size: 0x1000, mmap_offset: 0x40, num_queues: 2, queue_size: 256 };
    assert!(area == expected && is_answered_file(file));
    frontend.set_inflight_fd(area, fd).unwrap();
    assert!(is_answered_file(frontend.get_shared_object(OBJECT).unwrap()));
    assert!(matches!(frontend.get_shared_object([7; 16]), Err(Error::Refused { code: 41, .. })));
    let stopped = MigrationPhase::Stopped;
    assert!(frontend.set_device_state_fd(TransferDirection::Save, stopped, fd).unwrap().is_none());
    let own = frontend.set_device_state_fd(TransferDirection::Load, stopped, fd).unwrap();
    assert!(is_answered_file(own.unwrap()));
    frontend.check_device_state().unwrap();
    assert!(matches!(frontend.check_device_state(), Err(Error::Refused { code: 43, .. })));
    assert_eq!(frontend.get_shmem_config().unwrap(), [(1, 0x1000), (3, 0x20_0000)]);
    let (near, _far) = UnixStream::pair().unwrap();
    frontend.gpu_set_socket(near.as_fd()).unwrap();
    assert!(is_answered_file(frontend.postcopy_advise().unwrap()));
    frontend.postcopy_listen().unwrap();

    // It cannot send a change of the configuration; what it can send, we refuse when it is not negotiated.
    let unshared = features() - ProtocolFeatures::SHARED_OBJECT;
    let (mut listener, socket) = BackendListener::pair(unshared).unwrap();
    frontend.set_backend_req_fd(socket.as_fd()).unwrap();
    drop(socket);
    let channel = record.lock().unwrap().channel.take().unwrap();
    let asked = thread::spawn(move || {
        channel.set_shared_object_flag(true);
        channel.set_reply_ack_flag(true);
        let refused = channel.shared_object_add(&object());
        channel.shared_object_remove(&object()).unwrap();
        channel.set_shmem_flag(true);
        let (shmid, fd_offset, shm_offset, len) = (3, 0x1000, 0x2000, 0x3000);
        let map = VhostUserMMap { shmid, padding: [0; 7], fd_offset, shm_offset, len, flags: 1 };
        channel.shmem_map(&map, &answered_file()).unwrap();
        channel.shmem_unmap(&VhostUserMMap { flags: 0, ..map }).unwrap();
        refused
    });
    match listener.wait(Duration::from_secs(30)) {
        Err(Error::Invalid { code: 6, reason: vhost_user::Reason::NotNegotiated(_), ticket }) => {
            listener.reply(ticket, Answer::Failed).unwrap();
        }
        other => panic!("{other:?}"),
    }
    listener.set_protocol_features(features());
    let mut next = || {
        let received = listener.wait(Duration::from_secs(30)).unwrap().unwrap();
        listener.reply(received.ticket, Answer::Done).unwrap();
        received.request
    };
    let range = ShmemRange { shmid: 3, offset: 0x2000, len: 0x3000 };
    assert!(matches!(next(), BackendRequest::SharedObjectRemove(OBJECT)));
    assert!(matches!(next(), BackendRequest::ShmemMap { range: got, fd, fd_offset: 0x1000, writable: true }
        if got == range && is_answered_file(fd.try_clone().unwrap())));
    assert!(matches!(next(), BackendRequest::ShmemUnmap(got) if got == range));
    assert!(asked.join().unwrap().is_err());
    frontend.postcopy_end().unwrap();

    drop(frontend);
    server.join().unwrap();
    let expected = [
        "owner",
        "features 140000000",
        "protocol 4cb72b",
        "region 100000 2000 70000000 3000",
        "region 200000 2000 70000000 3000",
        "add 300000",
        "remove 300000",
        "num 1 128",
        "addr 2 1 1000 2000 3000 4000",
        "base 3 9",
        "kick 0 true",
        "kick 1 false",
        "call 2 true",
        "err 3 false",
        "enable 4 true",
        "get config 0 3 1",
        "get config 1 3 1",
        "set config 2 [1, 2] 1",
        "reset",
        "log 100 8",
        "inflight 1000 40 2 256",
        "state SAVE",
        "state LOAD",
        "check",
        "check",
        "gpu",
        "listen",
        "end",
    ];
    assert_eq!(record.lock().unwrap().log, expected);
}
