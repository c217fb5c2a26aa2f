//! The daemon as a process: the `echo` example, which cargo builds together with the tests.
use std::os::fd::RawFd;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, Stdio};

pub use virtio_testkit::daemon::DaemonProcess as Process;
use virtio_testkit::daemon::announcing;

/// The example lies beside the test binaries.
pub fn program() -> PathBuf {
    let mut path = std::env::current_exe().unwrap();
    path.pop();
    path.pop();
    path.push("examples/echo");
    assert!(path.exists(), "no example at {path:?}: run `cargo build -p vhost-device --examples` first");
    path
}

/// Started with these arguments and ready: its sockets accept connections.
#[track_caller]
pub fn ready(args: &[&str]) -> Process {
    Process::ready(announcing(&program()).args(args).stderr(Stdio::null()))
}

/// Gives descriptors to a child under fixed numbers.
pub fn pass(command: &mut Command, fds: &[(RawFd, RawFd)]) {
    let mut fds = fds.to_vec();
    // SAFETY: dup2 and fcntl are safe to call between fork and exec; nothing is allocated.
    unsafe {
        command.pre_exec(move || {
            // Out of the way first: a number that is to be given may be that of another one to give.
            for (from, _) in &mut fds {
                *from = libc::fcntl(*from, libc::F_DUPFD_CLOEXEC, 100);
                if *from < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            for (from, to) in &fds {
                let outcome =
                    if from == to { libc::fcntl(*from, libc::F_SETFD, 0) } else { libc::dup2(*from, *to) };
                if outcome < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            Ok(())
        });
    }
}
