//! What a back-end offers, and the messages that find out: what QEMU (11.1) sends before a guest runs, in its order.
//!
//! ```text
//! GET_FEATURES, [GET_PROTOCOL_FEATURES, SET_PROTOCOL_FEATURES], [GET_QUEUE_NUM], [GET_MAX_MEM_SLOTS], SET_OWNER,
//! GET_FEATURES, [GET_CONFIG], [SET_BACKEND_REQ_FD]
//! ```
//! The channel for the back-end's own requests comes last: it may wait for an answer to one, which the lane gives once it
//! has the channel.
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use vhost_user::{
    BackendListener, Error, F_LOG_ALL, F_PROTOCOL_FEATURES, FrontendEndpoint, ProtocolFeatures,
};
use vm_virtio::Features;

use crate::options::{ConfigSource, MAX_QUEUES};
use crate::{ProxyError, ProxyOptions};

/// Protocol features that are used where they are offered.
const USED: ProtocolFeatures = ProtocolFeatures::MQ
    .union(ProtocolFeatures::LOG_SHMFD)
    .union(ProtocolFeatures::REPLY_ACK)
    .union(ProtocolFeatures::BACKEND_REQ)
    .union(ProtocolFeatures::CONFIG)
    .union(ProtocolFeatures::INFLIGHT_SHMFD)
    .union(ProtocolFeatures::RESET_DEVICE)
    .union(ProtocolFeatures::CONFIGURE_MEM_SLOTS)
    .union(ProtocolFeatures::STATUS)
    .union(ProtocolFeatures::DEVICE_STATE);

/// Regions that `SET_MEM_TABLE` takes.
const TABLE_SLOTS: u64 = 8;

/// What a back-end offers, with what of the protocol is negotiated with it.
#[derive(Debug)]
pub(crate) struct Offer {
    /// Without the protocol's own bits.
    pub(crate) features: Features,
    /// Whether there are protocol features, and with them rings that begin disabled.
    pub(crate) enable_rules: bool,
    /// Whether it can log pages that it writes, in memory that is shared.
    pub(crate) logs: bool,
    pub(crate) protocol: ProtocolFeatures,
    pub(crate) queues: u16,
    pub(crate) slots: u64,
    pub(crate) config: Vec<u8>,
}

/// A connection on which nothing but the protocol is negotiated.
pub(crate) struct Fresh {
    pub(crate) endpoint: FrontendEndpoint,
    pub(crate) offer: Offer,
    pub(crate) channel: Option<BackendListener>,
}

impl Offer {
    /// Finds out what is offered, within the patience for one exchange.
    pub(crate) fn ask(mut endpoint: FrontendEndpoint, options: &ProxyOptions) -> Result<Fresh, ProxyError> {
        let deadline = Instant::now() + options.patience;
        let bits = timed(&mut endpoint, deadline)?.get_features()?;
        let enable_rules = bits & F_PROTOCOL_FEATURES != 0;
        let mut protocol = ProtocolFeatures::empty();
        if enable_rules {
            protocol = timed(&mut endpoint, deadline)?.get_protocol_features()? & USED;
            timed(&mut endpoint, deadline)?.set_protocol_features(protocol)?;
        }
        let has = match protocol.contains(ProtocolFeatures::MQ) {
            true => timed(&mut endpoint, deadline)?.get_queue_num()?,
            // It does not tell, and may have as many as its type has.
            false => options.queues.unwrap_or(1).into(),
        };
        let wanted = options.queues.or(u16::try_from(has).ok()).unwrap_or(MAX_QUEUES).min(MAX_QUEUES);
        if wanted == 0 || u64::from(wanted) > has {
            return Err(ProxyError::Queues { has, wanted });
        }
        let slots = match protocol.contains(ProtocolFeatures::CONFIGURE_MEM_SLOTS) {
            true => timed(&mut endpoint, deadline)?.get_max_mem_slots()?,
            false => TABLE_SLOTS,
        };
        timed(&mut endpoint, deadline)?.set_owner()?;
        if timed(&mut endpoint, deadline)?.get_features()? != bits {
            return Err(ProxyError::Changed("features each time it is asked"));
        }
        let features = Features::from(bits & !(F_PROTOCOL_FEATURES | F_LOG_ALL));
        if !features.contains(Features::VERSION_1) {
            return Err(ProxyError::Legacy);
        }
        let config = read_config(&mut endpoint, protocol, options, deadline)?;
        let mut channel = None;
        if protocol.contains(ProtocolFeatures::BACKEND_REQ) {
            let (listener, other) = BackendListener::pair(protocol)?;
            timed(&mut endpoint, deadline)?.set_backend_req_fd(other.as_fd())?;
            channel = Some(listener);
        }
        let logs = bits & F_LOG_ALL != 0 && protocol.contains(ProtocolFeatures::LOG_SHMFD);
        let queues = wanted;
        let offer = Offer { features, enable_rules, logs, protocol, queues, slots, config };
        Ok(Fresh { endpoint, offer, channel })
    }

    /// Whether a driver that knows the first back-end can go on with this one. Slots may differ: they are looked at when
    /// there is memory to share.
    pub(crate) fn replaces(&self, first: &Offer) -> Result<(), ProxyError> {
        let missing = [
            (!self.features.contains(first.features), "features"),
            (!self.protocol.contains(first.protocol), "protocol features"),
            (self.enable_rules != first.enable_rules || (first.logs && !self.logs), "protocol features"),
            (self.queues < first.queues, "queues"),
            (self.config.len() != first.config.len(), "configuration space"),
        ];
        match missing.iter().find(|(missing, _)| *missing) {
            Some((_, what)) => Err(ProxyError::Changed(what)),
            None => Ok(()),
        }
    }
}

fn read_config(
    endpoint: &mut FrontendEndpoint,
    protocol: ProtocolFeatures,
    options: &ProxyOptions,
    deadline: Instant,
) -> Result<Vec<u8>, ProxyError> {
    let sizes = match &options.config {
        ConfigSource::Fixed(bytes) => return Ok(bytes.clone()),
        ConfigSource::Backend(_) if !protocol.contains(ProtocolFeatures::CONFIG) => return Ok(Vec::new()),
        ConfigSource::Backend(sizes) => sizes,
    };
    for size in sizes {
        match timed(endpoint, deadline)?.get_config(0, *size, 0) {
            Ok(bytes) => return Ok(bytes),
            Err(Error::Refused { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    if sizes.is_empty() { Ok(Vec::new()) } else { Err(ProxyError::Config) }
}

/// The endpoint, with what is left of the time.
pub(crate) fn timed(
    endpoint: &mut FrontendEndpoint,
    deadline: Instant,
) -> Result<&mut FrontendEndpoint, ProxyError> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left == Duration::ZERO {
        return Err(Error::TimedOut.into());
    }
    endpoint.set_timeout(left);
    Ok(endpoint)
}
