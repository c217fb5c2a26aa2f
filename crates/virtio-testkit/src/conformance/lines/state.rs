//! The channel that a device's state goes through: a socket of ours, or whatever file the back-end wants instead.
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use rustix::io::Errno;
use vhost_user::{Error, FrontendEndpoint, MigrationPhase, ProtocolFeatures as P, TransferDirection};

use crate::conformance::socket::ready;
use crate::conformance::{Bench, Checked, broken};

/// More than any device has to say of itself.
const MOST: usize = 16 << 20;
/// What a file that can be written takes without making the writer wait: a pipe's atomic piece.
const PIECE: usize = 4096;

/// Begins a transfer; our end of it.
fn channel(endpoint: &mut FrontendEndpoint, direction: TransferDirection) -> Checked<OwnedFd> {
    let (ours, theirs) = UnixStream::pair().map_err(Error::Io)?;
    let better = endpoint.set_device_state_fd(direction, MigrationPhase::Stopped, theirs.as_fd())?;
    Ok(better.unwrap_or_else(|| ours.into()))
}

/// Reads to the end of file.
fn read_all(file: &OwnedFd, patience: Duration) -> Checked<Vec<u8>> {
    let deadline = Instant::now() + patience;
    let mut state = Vec::new();
    let mut piece = [0; PIECE];
    loop {
        if !ready(file, PollFlags::IN, deadline.saturating_duration_since(Instant::now())) {
            return broken(format!("the state does not come to an end: {} bytes so far", state.len()));
        }
        match rustix::io::read(file, &mut piece) {
            Ok(0) => return Ok(state),
            Ok(count) => state.extend(piece.iter().take(count)),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return broken(format!("the state cannot be read: {error}")),
        }
        if state.len() > MOST {
            return broken(format!("a state of more than {MOST} bytes"));
        }
    }
}

fn write_all(file: &OwnedFd, mut state: &[u8], patience: Duration) -> Checked {
    let deadline = Instant::now() + patience;
    while !state.is_empty() {
        if !ready(file, PollFlags::OUT, deadline.saturating_duration_since(Instant::now())) {
            return broken(format!("the last {} bytes of the state are not read", state.len()));
        }
        let (piece, _) = state.split_at(state.len().min(PIECE));
        match rustix::io::write(file, piece) {
            Ok(count) => state = state.get(count..).unwrap_or_default(),
            Err(Errno::INTR | Errno::AGAIN) => {}
            Err(error) => return broken(format!("the state is not read: {error}")),
        }
    }
    Ok(())
}

/// Saves a stopped device, loads what was saved, goes on.
pub(super) fn state(bench: &mut Bench<'_>) -> Checked {
    let (setup, patience) = (bench.setup, bench.patience);
    bench.host.wire()?.renew_with(&setup, P::DEVICE_STATE)?;
    bench.host.wire()?.now()?.need(P::DEVICE_STATE)?;
    bench.go()?;
    let queue = bench.queue()?;
    bench.ask(queue)?;
    for every in 0..bench.host.queues() {
        bench.host.stop_ring(every)?;
    }
    let endpoint = &mut bench.host.wire()?.now()?.endpoint;
    let ours = channel(endpoint, TransferDirection::Save)?;
    let saved = read_all(&ours, patience)?;
    endpoint.check_device_state()?;
    let ours = channel(endpoint, TransferDirection::Load)?;
    write_all(&ours, &saved, patience)?;
    // The end of the file is the end of the state.
    drop(ours);
    endpoint.check_device_state()?;
    for every in 0..bench.host.queues() {
        bench.host.start_ring(every)?;
    }
    (0..3).try_for_each(|_| bench.ask(queue))
}
