//! A daemon in a folder of its own, and clients that reach the guest through it.
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use virtio_testkit::daemon::TempDir;
use virtio_testkit::load::{Placement, Target, sockets::SocketSession};
use virtio_testkit::{RingLayout, TestRam};

use crate::Failed;

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
        let child = Command::new(program)
            .args(["--guest-cid", "3", "--socket"])
            .arg(dir.join("vhost"))
            .arg("--uds-path")
            .arg(dir.join("vm"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        let daemon = Daemon { child, dir };
        let deadline = Instant::now() + Duration::from_secs(5);
        while !daemon.dir.join("vhost").exists() || !daemon.path().exists() {
            if Instant::now() > deadline {
                return Err(format!("{} does not listen", program.display()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(daemon)
    }

    /// Where clients connect.
    pub(crate) fn path(&self) -> PathBuf {
        self.dir.join("vm")
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
