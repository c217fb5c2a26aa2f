//! One connection of a front-end: messages in, calls of the engine, answers out.
//!
//! Messages are carried out one after the other, each completely: an acknowledgement means that the engine has done
//! it, so the next message finds it done. A message that has to wait for a lane (a ring that drains) keeps this
//! connection waiting and no other.
//!
//! What a front-end does wrong ends in one of three ways. A refused message that the front-end hears about
//! (REPLY_ACK) is answered with failure and the connection goes on. One that it does not hear about also leaves the
//! connection alone, unless both sides would disagree about features or memory from then on ([`Refused::desyncs`]):
//! then the connection is closed, as is one whose stream cannot be understood any more.
mod channel;
mod iommu;
mod log;
mod memory;
mod negotiation;
mod refused;
mod rings;
mod transfer;
mod upcalls;

use std::collections::VecDeque;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::task::Poll;
use std::time::{Duration, Instant};

use vhost_user::{
    Answer, BackendEndpoint, Error, FrontendRequest, IotlbReport, Received, ReplyTicket, config_flags,
};
use vm_virtio::device::{ConfigWriter, Stop, VirtioDevice};
use vm_virtio::engine::STOP_DEADLINE;
use vm_virtio::{Features, GuestRam, HostFile, HostReply, HostRequest, WaitFor};

use crate::guest::{Guest, count};
use crate::inflight::{self, Inflight};
use crate::listen::Listener;
use crate::memory::{MEMORY_SLOTS, MemoryTable};
use crate::ring::Ring;
use crate::task::{Watch, yield_now};

use channel::Channel;
use log::Log;
pub(crate) use refused::Refused;
use transfer::Transfer;

/// How long requests may take to finish when the daemon is asked to end: shorter than the usual patience of those who
/// ask (failure policy 7).
const SHUTDOWN_DEADLINE: Duration = Duration::from_secs(3);

/// Connections of others that are turned away before other guests get a turn.
const REFUSALS: u32 = 16;

/// Messages that are carried out before other guests get a turn.
const TURN: u32 = 32;

/// Why a connection is over.
pub(crate) enum End {
    /// The front-end closed it, or broke the protocol.
    Connection(Error),
    /// The front-end would go on with features or memory that it does not have.
    Desynced,
    /// Closing the connection is what the document wants.
    Broken(Refused),
    /// The daemon ends.
    Stopping,
}

impl End {
    /// Whether something went wrong: a front-end that just goes is in order.
    pub(crate) fn is_error(&self) -> bool {
        !matches!(self, End::Connection(Error::Disconnected) | End::Stopping)
    }
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            End::Connection(Error::Io(error)) => write!(f, "the vhost-user socket failed: {error}"),
            End::Connection(error) => error.fmt(f),
            End::Desynced => f.write_str("closed, because a refused message could not be answered"),
            End::Broken(error) => error.fmt(f),
            End::Stopping => f.write_str("the daemon ends"),
        }
    }
}

/// What there is to do next.
enum Next {
    Request(Received),
    Refused {
        error: String,
        ticket: ReplyTicket,
    },
    /// A translation has proved insufficient.
    Forget {
        iova: u64,
    },
    End(End),
}

/// A connection.
pub(crate) struct Session<'g, D: VirtioDevice> {
    guest: &'g Guest<D>,
    endpoint: BackendEndpoint,
    /// Where others are turned away.
    listener: Option<&'g Listener>,
    /// For requests to the front-end.
    channel: Option<Channel>,
    memory: MemoryTable,
    log: Log,
    rings: Vec<Ring>,
    /// For the front-end: translations that are missing.
    reports: VecDeque<IotlbReport>,
    /// Translations that do not allow what a queue wants.
    denied: Vec<u64>,
    /// SET_INFLIGHT_FD.
    inflight: Option<Inflight>,
    /// SET_FEATURES, without the protocol's own bit.
    acked: Option<Features>,
    /// Whether bit 30 was acknowledged: rings begin disabled, and SET_VRING_ENABLE rules.
    enable_rules: bool,
    /// The transfer of the device's state.
    transfer: Option<Transfer>,
    _watch: Watch,
}

impl<'g, D: VirtioDevice> Session<'g, D> {
    pub(crate) fn new(
        guest: &'g Guest<D>,
        stream: UnixStream,
        listener: Option<&'g Listener>,
    ) -> io::Result<Session<'g, D>> {
        let watch = Watch::new(&guest.host.reactor, guest.tokens().connection(), stream.as_fd())?;
        let endpoint = BackendEndpoint::new(stream)?;
        // A front-end that connects reads the configuration space; what changed before is no news to it.
        guest.events.config_told();
        Ok(Session {
            guest,
            endpoint,
            listener,
            channel: None,
            memory: MemoryTable::new(guest.budget.clone()),
            log: Log::default(),
            rings: guest.engine.queues().iter().map(|_| Ring::default()).collect(),
            reports: VecDeque::new(),
            denied: Vec::new(),
            inflight: None,
            acked: None,
            enable_rules: true,
            transfer: None,
            _watch: watch,
        })
    }

    /// Serves the connection until it ends.
    pub(crate) async fn run(&mut self) -> End {
        let mut turn = 0;
        loop {
            turn += 1;
            if turn % TURN == 0 {
                yield_now().await;
            }
            let outcome = match self.next().await {
                Next::End(end) => return end,
                Next::Forget { iova } => {
                    self.forget_translation(iova).await;
                    Ok(())
                }
                Next::Refused { error, ticket } => {
                    count(&self.guest.counts.messages);
                    count(&self.guest.counts.refused);
                    tracing::warn!(guest = self.guest.index, error, "message refused");
                    self.endpoint.reply(ticket, Answer::Failed)
                }
                Next::Request(Received { request, ticket }) => {
                    count(&self.guest.counts.messages);
                    let code = request.code();
                    tracing::debug!(guest = self.guest.index, ?code, "message");
                    let (answer, error) = match self.handle(request).await {
                        Ok(answer) => (answer, None),
                        Err(error) => {
                            count(&self.guest.counts.refused);
                            tracing::warn!(guest = self.guest.index, ?code, %error, "message refused");
                            (Answer::Failed, Some(error))
                        }
                    };
                    let heard = self.endpoint.reply_owed();
                    let sent = self.endpoint.reply(ticket, answer);
                    match error {
                        Some(error) if error.ends_connection() => return End::Broken(error),
                        Some(error) if error.desyncs() && !heard => return End::Desynced,
                        _ => {}
                    }
                    sent
                }
            };
            if let Err(error) = outcome {
                return End::Connection(error);
            }
        }
    }

    /// Looks at everything that this connection waits for.
    async fn next(&mut self) -> Next {
        poll_fn(|context| {
            if self.guest.host.stopping.get() {
                return Poll::Ready(Next::End(End::Stopping));
            }
            self.pass_on_events();
            if let Some(iova) = self.denied.pop() {
                return Poll::Ready(Next::Forget { iova });
            }
            if let Some(transfer) = &mut self.transfer {
                transfer.advance(context);
            }
            // Whoever does not read replies is not read either.
            if self.endpoint.wants_write() {
                match self.endpoint.flush() {
                    Err(error) => return Poll::Ready(Next::End(End::Connection(error))),
                    Ok(()) if self.endpoint.wants_write() => return Poll::Pending,
                    Ok(()) => {}
                }
            }
            for _ in 0..REFUSALS {
                match self.endpoint.receive() {
                    Ok(Some(received)) => return Poll::Ready(Next::Request(received)),
                    Ok(None) => {}
                    Err(Error::Invalid { code, reason, ticket }) => {
                        let error = format!("request {code}: {reason}");
                        return Poll::Ready(Next::Refused { error, ticket });
                    }
                    Err(error) => return Poll::Ready(Next::End(End::Connection(error))),
                }
                // Whoever connected before this was found alive is the second one.
                self.guest.turn_away();
                if !self.listener.is_some_and(|listener| self.guest.somebody_waits(listener)) {
                    return Poll::Pending;
                }
            }
            // The other guests' turn.
            context.waker().wake_by_ref();
            Poll::Pending
        })
        .await
    }

    /// Carries out one message.
    async fn handle(&mut self, request: FrontendRequest) -> Result<Answer, Refused> {
        use FrontendRequest as R;
        let engine = &self.guest.engine;
        match request {
            R::GetFeatures => return Ok(Answer::U64(self.offered_features())),
            R::SetFeatures(bits) => self.set_features(bits).await?,
            // The session began with the connection. RESET_OWNER is deprecated and best ignored.
            R::SetOwner | R::ResetOwner => {}
            R::GetProtocolFeatures => return Ok(Answer::U64(self.offered_protocol_features().bits())),
            R::SetProtocolFeatures(features) => self.set_protocol_features(features).await?,
            R::GetQueueNum => return Ok(Answer::U64(self.rings.len() as u64)),
            R::GetMaxMemSlots => return Ok(Answer::U64(MEMORY_SLOTS as u64)),
            R::SetMemTable(table) => {
                let next = self.memory.replaced(table)?;
                self.change_memory(next, WaitFor::NewRequests).await;
            }
            R::AddMemReg(region, fd) => {
                let next = self.memory.with(&region, &fd)?;
                // The mapping does not need it any more.
                drop(fd);
                self.change_memory(next, WaitFor::NewRequests).await;
            }
            R::RemMemReg(region) => {
                let next = self.memory.without(&region)?;
                self.change_memory(next, WaitFor::NewRequests).await;
            }
            R::SetLogBase(area, fd) => self.set_log_base(area, fd).await?,
            R::SetLogFd(fd) => self.set_log_fd(fd).await?,
            R::Iotlb(change) => self.change_iotlb(change).await?,
            R::SetVringNum { index, num } => self.set_num(index, num)?,
            R::SetVringAddr(addr) => self.set_addr(addr).await?,
            R::SetVringBase { index, base } => self.set_base(index, base)?,
            R::GetVringBase { index } => return Ok(Answer::VringBase(self.get_base(index).await?)),
            R::SetVringKick { index, fd } => self.set_kick(index, fd).await?,
            R::SetVringCall { index, fd } => self.set_call(index, fd).await?,
            R::SetVringErr { index, fd } => self.set_err(index, fd)?,
            R::VringKick { index } => self.vring_kick(index).await?,
            R::SetVringEnable { index, enable } => self.set_enable(index, enable).await?,
            R::SetBackendReqFd(fd) => self.set_channel(fd)?,
            R::GetConfig { offset, size, flags: _ } => {
                // Bounded by the size of a message. Bytes that the device does not have are zero: front-ends ask for
                // as much as they know of the type.
                let mut data = vec![0; size as usize];
                engine.config().read(offset, &mut data);
                return Ok(Answer::Config(data));
            }
            R::SetConfig { offset, flags, data } => {
                let by = match flags {
                    config_flags::WRITABLE => ConfigWriter::Driver,
                    config_flags::MIGRATION => ConfigWriter::Migration,
                    other => return Err(Refused::ConfigFlags(other)),
                };
                engine.write_config(offset, &data, by)?;
            }
            R::GetInflightFd(asked) => {
                let (area, file) = inflight::allocate(asked, self.most_in_flight())?;
                return Ok(Answer::Inflight(area, file));
            }
            R::SetInflightFd(area, file) => {
                // The last one counts, from the next start of a ring on.
                let most = self.most_in_flight();
                self.inflight = Some(Inflight::map(area, &file, most, &self.guest.budget)?);
            }
            R::ResetDevice => self.reset_device().await,
            R::SetStatus(status) => self.set_status(status).await?,
            R::GetStatus => return Ok(Answer::U64(self.guest.status().bits().into())),
            R::SetDeviceStateFd { direction, phase: _, fd } => {
                // Ours is better.
                drop(fd);
                return self.begin_transfer(direction).await;
            }
            R::CheckDeviceState => self.check_transfer().await?,
            R::GetShmemConfig => {
                let regions = engine.shared_memory().iter().map(|region| (region.id, region.size));
                return Ok(Answer::ShmemConfig(regions.collect()));
            }
            R::SendRarp(mac) => return self.ask_device(HostRequest::Announce(mac)),
            R::NetSetMtu(mtu) => return self.ask_device(HostRequest::NetMtu(mtu)),
            R::GpuSetSocket(socket) => return self.ask_device(HostRequest::GpuSocket(socket)),
            R::CreateCryptoSession(description) => {
                return self.ask_device(HostRequest::CreateCryptoSession(description));
            }
            R::CloseCryptoSession(id) => return self.ask_device(HostRequest::CloseCryptoSession(id)),
            R::GetSharedObject(id) => return self.ask_device(HostRequest::SharedObject(id)),
            other => return Err(Refused::Unsupported(other.code())),
        }
        Ok(Answer::Done)
    }

    /// What is the device's to do. An answer of a kind that the request does not have is the device's bug, and the
    /// connection's end.
    fn ask_device(&self, request: HostRequest) -> Result<Answer, Refused> {
        match self.guest.engine.host_request(request)? {
            HostReply::Done => Ok(Answer::Done),
            HostReply::CryptoSession(id) => Ok(Answer::CryptoSession(id)),
            HostReply::File(HostFile(file)) => Ok(Answer::Fd(file)),
            _ => Err(Refused::WrongReply),
        }
    }

    /// The end: rings finish what they took and stop, the front-end's memory and files go. The device stays.
    pub(crate) async fn close(mut self) {
        let patience = if self.guest.host.stopping.get() { SHUTDOWN_DEADLINE } else { STOP_DEADLINE };
        let deadline = Instant::now() + patience;
        let packed = self.packed();
        // Requests that wait for the front-end get their answer.
        self.lose_channel();
        let engine = &self.guest.engine;
        // All at once, so that they share the time.
        let stops: Vec<_> = (0..)
            .zip(&self.rings)
            .filter(|(_, ring)| ring.running.is_some())
            .map(|(queue, _)| (queue, engine.stop(queue, Stop::Drain, Some(deadline))))
            .collect();
        for (queue, stop) in stops {
            let stopped = stop.await;
            self.stopped(queue, stopped).await;
            self.remember(queue, packed);
        }
        for (queue, _) in (0..).zip(&self.rings) {
            // The engine keeps a call file over a stop, also over one that was before.
            engine.set_call(queue, None).await;
        }
        engine.log(None).await;
        engine.memory(GuestRam::empty(), WaitFor::NewRequests).await;
    }
}
