//! The requests of single protocol features: logging, IOTLB, in-flight tracking, device state, and those of some device
//! types.

use std::os::fd::{BorrowedFd, OwnedFd};

use zerocopy::{FromBytes, IntoBytes};

use super::{FrontendEndpoint, Reply, bad_reply, payload, table_header};
use crate::body::{
    CRYPTO_SESSION_MIN, InflightArea, InflightBody, IotlbBody, ShmemConfigBody, SingleXenRegion,
    TransferBody, XenRegion,
};
use crate::header::flags;
use crate::reply::TRANSFER_NO_FD;
use crate::{
    Error, FrontendCode, IotlbChange, LogArea, MAX_BODY, MemoryRegion, MigrationPhase, ObjectId,
    ProtocolFeatures, TransferDirection, VringState, XenMapping,
};

impl FrontendEndpoint {
    /// `SET_LOG_BASE`. With [`LOG_SHMFD`](ProtocolFeatures::LOG_SHMFD) it has a reply, whose payload the document does
    /// not describe: any is accepted.
    pub fn set_log_base(&mut self, area: LogArea, fd: BorrowedFd<'_>) -> Result<(), Error> {
        let code = FrontendCode::SetLogBase;
        if !self.negotiated.contains(ProtocolFeatures::LOG_SHMFD) {
            return self.command(code, &[area.as_bytes()], &[fd]);
        }
        self.send(code.code(), 0, &[area.as_bytes()], &[fd])?;
        self.reply_to(code).map(|_| ())
    }

    /// `SET_LOG_FD`.
    pub fn set_log_fd(&mut self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.command(FrontendCode::SetLogFd, &[], &[fd])
    }

    /// `SEND_RARP`.
    pub fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), Error> {
        self.command(FrontendCode::SendRarp, &[&mac, &[0; 2]], &[])
    }

    /// `NET_SET_MTU`.
    pub fn net_set_mtu(&mut self, mtu: u16) -> Result<(), Error> {
        self.command(FrontendCode::NetSetMtu, &[u64::from(mtu).as_bytes()], &[])
    }

    /// `IOTLB_MSG`. [`Error::Refused`] if the back-end does not take it.
    pub fn iotlb(&mut self, change: IotlbChange) -> Result<(), Error> {
        self.status(FrontendCode::IotlbMsg, &[IotlbBody::from(change).as_bytes()])
    }

    /// `SET_VRING_ENDIAN`.
    pub fn set_vring_endian(&mut self, index: u32, big: bool) -> Result<(), Error> {
        self.vring_state(FrontendCode::SetVringEndian, index, big.into())
    }

    /// `CREATE_CRYPTO_SESSION`: the session's id. What the description holds is not checked; its last eight bytes are
    /// where the reply has the id. [`Error::Refused`] if that is negative.
    pub fn create_crypto_session(&mut self, description: &[u8]) -> Result<i64, Error> {
        let code = FrontendCode::CreateCryptoSession;
        if !(CRYPTO_SESSION_MIN..=MAX_BODY).contains(&description.len()) {
            return Err(Error::Argument("description"));
        }
        let reply = self.call(code, &[description])?;
        let id = i64::read_from_suffix(&reply.body).ok().filter(|_| reply.body.len() == description.len());
        match id.map(|(_, id)| id) {
            None => Err(bad_reply(code, "wrong length")),
            Some(id @ ..0) => Err(Error::Refused { code: code.code(), value: id.cast_unsigned() }),
            Some(id) => Ok(id),
        }
    }

    /// `CLOSE_CRYPTO_SESSION`.
    pub fn close_crypto_session(&mut self, id: i64) -> Result<(), Error> {
        self.command(FrontendCode::CloseCryptoSession, &[id.as_bytes()], &[])
    }

    /// `POSTCOPY_ADVISE`: the back-end's userfaultfd. [`Error::Refused`] if it has none.
    pub fn postcopy_advise(&mut self) -> Result<OwnedFd, Error> {
        self.file(FrontendCode::PostcopyAdvise, &[])
    }

    /// `POSTCOPY_LISTEN`.
    pub fn postcopy_listen(&mut self) -> Result<(), Error> {
        self.command(FrontendCode::PostcopyListen, &[], &[])
    }

    /// `POSTCOPY_END`.
    pub fn postcopy_end(&mut self) -> Result<(), Error> {
        self.status(FrontendCode::PostcopyEnd, &[])
    }

    /// [`set_mem_table`](Self::set_mem_table) in postcopy mode, that is after `POSTCOPY_LISTEN`: where the back-end has
    /// mapped each region. It touches none of them before it hears [`bases_heard`](Self::bases_heard).
    pub fn set_mem_table_postcopy(
        &mut self,
        regions: &[(MemoryRegion, BorrowedFd<'_>)],
    ) -> Result<Vec<u64>, Error> {
        let table = table_header(regions.len())?;
        let fds: Vec<_> = regions.iter().map(|(_, fd)| *fd).collect();
        let regions: Vec<_> = regions.iter().map(|(region, _)| *region).collect();
        self.bases(FrontendCode::SetMemTable, table.as_bytes(), &regions, &fds)
    }

    /// [`add_mem_reg`](Self::add_mem_reg) in postcopy mode; see [`set_mem_table_postcopy`](Self::set_mem_table_postcopy).
    pub fn add_mem_reg_postcopy(&mut self, region: MemoryRegion, fd: BorrowedFd<'_>) -> Result<u64, Error> {
        let code = FrontendCode::AddMemReg;
        let bases = self.bases(code, 0_u64.as_bytes(), &[region], &[fd])?;
        bases.first().copied().ok_or(bad_reply(code, "no region"))
    }

    /// Says that the bases of the answer to this request (`SET_MEM_TABLE` or `ADD_MEM_REG`) were heard, and faults are
    /// served from now on. Not answered.
    pub fn bases_heard(&mut self, code: FrontendCode) -> Result<(), Error> {
        self.send(code.code(), 0, &[0_u64.as_bytes()], &[])
    }

    /// "NEED_REPLY_MASK is not set in this case": the reply is the request with the back-end's addresses.
    fn bases(
        &mut self,
        code: FrontendCode,
        before: &[u8],
        regions: &[MemoryRegion],
        fds: &[BorrowedFd<'_>],
    ) -> Result<Vec<u64>, Error> {
        self.send(code.code(), 0, &[before, regions.as_bytes()], fds)?;
        let reply = self.reply_to(code)?;
        let mut bases = Vec::with_capacity(regions.len());
        let mut rest = reply.body.strip_prefix(before).ok_or(bad_reply(code, "another number of regions"))?;
        for asked in regions {
            let (got, behind) =
                MemoryRegion::read_from_prefix(rest).map_err(|_| bad_reply(code, "wrong length"))?;
            if got != (MemoryRegion { user_addr: got.user_addr, ..*asked }) {
                return Err(bad_reply(code, "another region"));
            }
            bases.push(got.user_addr);
            rest = behind;
        }
        if rest.is_empty() { Ok(bases) } else { Err(bad_reply(code, "wrong length")) }
    }

    /// `GET_INFLIGHT_FD`: an area for so many queues of this size. [`Error::Refused`] if the back-end has none.
    pub fn get_inflight_fd(
        &mut self,
        num_queues: u16,
        queue_size: u16,
    ) -> Result<(InflightArea, OwnedFd), Error> {
        let code = FrontendCode::GetInflightFd;
        let asked = InflightArea { num_queues, queue_size, ..InflightArea::default() };
        self.send(code.code(), 0, &[InflightBody::from(asked).as_bytes()], &[])?;
        let Reply { body, fds, .. } = self.reply_with_fds(code)?;
        let area = InflightBody::read(&body).map_err(|_| bad_reply(code, "wrong length"))?;
        match (area.mmap_size, one(fds)) {
            (0, Ok(None)) => Err(Error::Refused { code: code.code(), value: 0 }),
            (1.., Ok(Some(fd))) => Ok((area, fd)),
            _ => Err(bad_reply(code, "wrong number of file descriptors")),
        }
    }

    /// `SET_INFLIGHT_FD`.
    pub fn set_inflight_fd(&mut self, area: InflightArea, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.command(FrontendCode::SetInflightFd, &[InflightBody::from(area).as_bytes()], &[fd])
    }

    /// `GPU_SET_SOCKET`.
    pub fn gpu_set_socket(&mut self, fd: BorrowedFd<'_>) -> Result<(), Error> {
        self.command(FrontendCode::GpuSetSocket, &[], &[fd])
    }

    /// `VRING_KICK`.
    pub fn vring_kick(&mut self, index: u32) -> Result<(), Error> {
        self.command(FrontendCode::VringKick, &[VringState { index, num: 0 }.as_bytes()], &[])
    }

    /// `GET_SHARED_OBJECT`. [`Error::Refused`] if the back-end has no such object.
    pub fn get_shared_object(&mut self, id: ObjectId) -> Result<OwnedFd, Error> {
        self.file(FrontendCode::GetSharedObject, &[&id])
    }

    /// `SET_DEVICE_STATE_FD`: the channel that the back-end prefers to `fd`, if it does.
    pub fn set_device_state_fd(
        &mut self,
        direction: TransferDirection,
        phase: MigrationPhase,
        fd: BorrowedFd<'_>,
    ) -> Result<Option<OwnedFd>, Error> {
        let code = FrontendCode::SetDeviceStateFd;
        let body = TransferBody { direction: direction as u32, phase: phase as u32 };
        self.send(code.code(), 0, &[body.as_bytes()], &[fd])?;
        let Reply { body, fds, .. } = self.reply_with_fds(code)?;
        let value: u64 = payload(code, &body)?;
        match (value, one(fds)) {
            (TRANSFER_NO_FD, Ok(None)) => Ok(None),
            (0, Ok(Some(fd))) => Ok(Some(fd)),
            (value, Ok(None)) if value & 0xff != 0 => Err(Error::Refused { code: code.code(), value }),
            _ => Err(bad_reply(code, "a value that its file descriptors contradict")),
        }
    }

    /// `CHECK_DEVICE_STATE`. [`Error::Refused`] if the transfer failed.
    pub fn check_device_state(&mut self) -> Result<(), Error> {
        self.status(FrontendCode::CheckDeviceState, &[])
    }

    /// `GET_SHMEM_CONFIG`: id and size of each shared memory region.
    pub fn get_shmem_config(&mut self) -> Result<Vec<(u8, u64)>, Error> {
        let code = FrontendCode::GetShmemConfig;
        let reply = self.call(code, &[])?;
        let config: ShmemConfigBody = payload(code, &reply.body)?;
        let regions = config.regions();
        if usize::try_from(config.num_regions) != Ok(regions.len()) {
            return Err(bad_reply(code, "another number of regions than it has"));
        }
        Ok(regions)
    }

    /// `SET_MEM_TABLE` with [`XEN_MMAP`](ProtocolFeatures::XEN_MMAP).
    pub fn set_xen_mem_table(
        &mut self,
        regions: &[(MemoryRegion, XenMapping, BorrowedFd<'_>)],
    ) -> Result<(), Error> {
        let table = table_header(regions.len())?;
        let mut body = vec![table.as_bytes()];
        for (region, xen, _) in regions {
            body.extend([region.as_bytes(), xen.as_bytes()]);
        }
        let fds: Vec<_> = regions.iter().map(|(_, _, fd)| *fd).collect();
        self.command(FrontendCode::SetMemTable, &body, &fds)
    }

    /// `ADD_MEM_REG` with [`XEN_MMAP`](ProtocolFeatures::XEN_MMAP).
    pub fn add_xen_mem_reg(
        &mut self,
        region: MemoryRegion,
        xen: XenMapping,
        fd: BorrowedFd<'_>,
    ) -> Result<(), Error> {
        let body = SingleXenRegion { padding: 0, region: XenRegion { region, xen } };
        self.command(FrontendCode::AddMemReg, &[body.as_bytes()], &[fd])
    }

    /// `REM_MEM_REG` with [`XEN_MMAP`](ProtocolFeatures::XEN_MMAP).
    pub fn rem_xen_mem_reg(&mut self, region: MemoryRegion, xen: XenMapping) -> Result<(), Error> {
        let body = SingleXenRegion { padding: 0, region: XenRegion { region, xen } };
        self.command(FrontendCode::RemMemReg, &[body.as_bytes()], &[])
    }

    /// A request that is always answered with zero or an error. Asked for all the same where that is possible, as QEMU
    /// does: the `vhost` crate's back-end answers POSTCOPY_END only then.
    fn status(&mut self, code: FrontendCode, body: &[&[u8]]) -> Result<(), Error> {
        let flags = if self.acknowledges() { flags::NEED_REPLY } else { 0 };
        self.send(code.code(), flags, body, &[])?;
        self.receive_ack(code)
    }

    /// A request that is answered with a descriptor, or without one if it failed. The document gives these replies no
    /// payload; libvhost-user repeats the request's, which is ignored.
    fn file(&mut self, code: FrontendCode, body: &[&[u8]]) -> Result<OwnedFd, Error> {
        self.send(code.code(), 0, body, &[])?;
        match one(self.reply_with_fds(code)?.fds) {
            Ok(Some(fd)) => Ok(fd),
            Ok(None) => Err(Error::Refused { code: code.code(), value: 0 }),
            Err(()) => Err(bad_reply(code, "more than one file descriptor")),
        }
    }
}

/// The only descriptor, if there is any.
fn one(fds: Vec<OwnedFd>) -> Result<Option<OwnedFd>, ()> {
    let mut fds = fds.into_iter();
    match (fds.next(), fds.next()) {
        (fd, None) => Ok(fd),
        _ => Err(()),
    }
}
