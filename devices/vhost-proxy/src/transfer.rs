//! The back-end's own state (vhost-user, "Migrating back-end state"): through a pipe, within the exchange's time, and not more
//! than a state has. What it says is the back-ends' business.
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use device_state::{MAX_STATE, StateError};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use vhost_user::{Error, FrontendEndpoint, MigrationPhase, TransferDirection};

use crate::ProxyError;
use crate::offer::timed;

/// Bytes that are moved at once.
const PIECE: usize = 64 << 10;

/// Asks for the state. No ring runs.
pub(crate) fn save(endpoint: &mut FrontendEndpoint, deadline: Instant) -> Result<Vec<u8>, ProxyError> {
    let file = begin(endpoint, TransferDirection::Save, deadline)?;
    let mut state = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        match rustix::io::read(&file, piece.as_mut_slice()) {
            Ok(0) => break,
            Ok(count) => state.extend_from_slice(piece.get(..count).unwrap_or_default()),
            Err(Errno::AGAIN) => wait(&file, PollFlags::IN, deadline)?,
            Err(Errno::INTR) => {}
            Err(error) => return Err(io::Error::from(error).into()),
        }
        if state.len() as u64 > MAX_STATE {
            return Err(StateError::TooLarge(state.len() as u64).into());
        }
    }
    timed(endpoint, deadline)?.check_device_state()?;
    Ok(state)
}

/// Gives it a state. No ring runs. What it does not like it refuses.
pub(crate) fn load(
    endpoint: &mut FrontendEndpoint,
    state: &[u8],
    deadline: Instant,
) -> Result<(), ProxyError> {
    let file = begin(endpoint, TransferDirection::Load, deadline)?;
    let mut rest = state;
    while !rest.is_empty() {
        match rustix::io::write(&file, rest.get(..rest.len().min(PIECE)).unwrap_or_default()) {
            Ok(count) => rest = rest.get(count..).unwrap_or_default(),
            Err(Errno::AGAIN) => wait(&file, PollFlags::OUT, deadline)?,
            Err(Errno::INTR) => {}
            // It has read enough to refuse it, which it says next.
            Err(Errno::PIPE) => break,
            Err(error) => return Err(io::Error::from(error).into()),
        }
    }
    // The end of file.
    drop(file);
    timed(endpoint, deadline)?.check_device_state()?;
    Ok(())
}

/// SET_DEVICE_STATE_FD: our end of the channel.
fn begin(
    endpoint: &mut FrontendEndpoint,
    direction: TransferDirection,
    deadline: Instant,
) -> Result<OwnedFd, ProxyError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(io::Error::from)?;
    let (ours, theirs) = match direction {
        TransferDirection::Save => (reader, writer),
        TransferDirection::Load => (writer, reader),
    };
    let timed = timed(endpoint, deadline)?;
    let better = timed.set_device_state_fd(direction, MigrationPhase::Stopped, theirs.as_fd())?;
    let file = better.unwrap_or(ours);
    let flags = rustix::fs::fcntl_getfl(&file).map_err(io::Error::from)?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(io::Error::from)?;
    Ok(file)
}

fn wait(file: &OwnedFd, flags: PollFlags, deadline: Instant) -> Result<(), ProxyError> {
    let left = deadline.saturating_duration_since(Instant::now());
    let timeout = Timespec {
        tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: left.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(file, flags)], Some(&timeout)) {
        Ok(0) => Err(Error::TimedOut.into()),
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(io::Error::from(error).into()),
    }
}
