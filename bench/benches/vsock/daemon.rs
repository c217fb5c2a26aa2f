//! A daemon in a folder of its own, and clients that reach the guest through it.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use virtio_testkit::daemon::TempDir;
use virtio_testkit::load::{Placement, Process, Target, sockets::SocketSession};
use virtio_testkit::{RingLayout, TestRam};

use crate::Failed;

/// The name of the clients' socket.
pub(crate) const CLIENTS: &str = "vm";

/// Ends with its owner.
pub(crate) struct Daemon {
    child: Child,
    dir: TempDir,
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Daemon {
    pub(crate) fn start(program: &Path) -> Result<Daemon, Failed> {
        let dir = TempDir::new();
        let mut command = Command::new(program);
        command
            .args(["--guest-cid", "3", "--socket"])
            .arg(dir.join("vhost"))
            .arg("--uds-path")
            .arg(dir.join(CLIENTS));
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let daemon = Daemon::spawned(&mut command, dir)?;
        daemon.await_socket("vhost")?;
        Ok(daemon)
    }

    /// A program that listens for clients in this folder.
    pub(crate) fn spawned(command: &mut Command, dir: TempDir) -> Result<Daemon, Failed> {
        let daemon = Daemon { child: command.spawn()?, dir };
        daemon.await_socket(CLIENTS)?;
        Ok(daemon)
    }

    fn await_socket(&self, name: &str) -> Result<(), Failed> {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !self.dir.join(name).exists() {
            if Instant::now() > deadline {
                return Err(format!("nobody listens at {name}").into());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    /// Where clients connect.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join(CLIENTS)
    }

    /// Its CPU time so far.
    pub(crate) fn cpu_time(&self) -> Result<Duration, Failed> {
        Ok(Process::new(self.child.id()).cpu_time()?)
    }

    /// A guest whose packets carry that much, on the same CPU.
    pub(crate) fn guest<'m>(
        &self,
        ram: &'m TestRam,
        layout: RingLayout,
        payload: u32,
    ) -> Result<SocketSession<'m>, Failed> {
        let target = Target::Path(self.dir.join("vhost"));
        let session = SocketSession::open(target, ram, layout, payload, Placement::Same)?;
        session.pin()?;
        Ok(session)
    }
}

/// A client with the guest's consent.
pub(crate) fn client(path: &Path, port: u32) -> Result<UnixStream, Failed> {
    let mut stream = UnixStream::connect(path)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    // What comes behind the line is of no interest to any of these clients.
    let mut line = [0; 32];
    let mut have = 0;
    while !line[..have].contains(&b'\n') {
        match stream.read(&mut line[have..])? {
            0 => return Err("no OK".into()),
            n => have += n,
        }
    }
    Ok(stream)
}
