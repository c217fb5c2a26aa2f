//! Real daemons for vhost-ctl, and vhost-ctl itself.
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use virtio_testkit::daemon::{DaemonProcess, TempDir, announcing};
use virtio_testkit::{RingLayout, VhostUserDriver, VhostUserOptions};

/// For whatever should happen soon; long, because test machines are slow.
pub(crate) const SOON: Duration = Duration::from_secs(30);

/// Where cargo puts what it builds for these tests, and whether that is a release.
fn profile() -> (PathBuf, bool) {
    let own = std::env::current_exe().unwrap();
    let folder = own.ancestors().nth(2).unwrap().to_owned();
    let release = folder.ends_with("release");
    (folder, release)
}

/// Builds the daemons that the tests run: cargo does not do it for those of other packages.
fn programs() -> &'static Path {
    static BUILT: OnceLock<PathBuf> = OnceLock::new();
    BUILT.get_or_init(|| {
        let (folder, release) = profile();
        for what in [["virtio-rng", "--bin", "vhost-device-rng"], ["vhost-device", "--example", "echo"]] {
            let mut cargo = Command::new(env!("CARGO"));
            cargo.args(["build", "--quiet", "--locked", "--package"]).args(what);
            if release {
                cargo.arg("--release");
            }
            assert!(cargo.status().unwrap().success(), "{what:?} is built");
        }
        folder
    })
}

/// A daemon of two guests with a control socket, in a directory of its own.
pub(crate) struct Daemon {
    _process: DaemonProcess,
    pub(crate) folder: TempDir,
}

impl Daemon {
    /// `vhost-device-rng`.
    pub(crate) fn rng() -> Daemon {
        Daemon::start("vhost-device-rng")
    }

    /// The echo device, which has properties and commands of all kinds.
    pub(crate) fn echo() -> Daemon {
        Daemon::start("examples/echo")
    }

    fn start(program: &str) -> Daemon {
        let folder = TempDir::new();
        let mut command = announcing(&programs().join(program));
        command.args(["--log-level", "warn", "--socket-count", "2", "--socket-path"]).arg(folder.join("vm"));
        command.arg("--control-socket").arg(folder.join("ctl"));
        Daemon { _process: DaemonProcess::ready(&mut command), folder }
    }

    pub(crate) fn control(&self) -> String {
        self.folder.join("ctl").to_str().unwrap().to_owned()
    }

    pub(crate) fn driver(&self, guest: u32) -> VhostUserDriver {
        let socket = self.folder.join(&format!("vm{guest}"));
        VhostUserDriver::connect(socket, VhostUserOptions::new(RingLayout::Packed)).unwrap()
    }

    /// So many requests of a guest, each of them counted: the last answer is there a moment before.
    pub(crate) fn counts(&self, guest: u32, requests: usize) {
        load(&mut self.driver(guest), requests);
        let (guest, wanted) = (guest.to_string(), format!("\"completed\":{requests},"));
        let deadline = Instant::now() + SOON;
        loop {
            let stats = self.ctl(&["-g", &guest, "stats", "--json"]).ok();
            if stats.contains(&wanted) {
                return;
            }
            assert!(Instant::now() < deadline, "{requests} requests: {stats}");
        }
    }

    /// Runs vhost-ctl with this daemon.
    pub(crate) fn ctl(&self, args: &[&str]) -> Ended {
        let control = self.control();
        ctl(&[&["--socket", &control], args].concat())
    }
}

/// How a run of vhost-ctl ended.
#[derive(Debug)]
pub(crate) struct Ended {
    pub(crate) code: i32,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Ended {
    /// It went well; what it wrote.
    #[track_caller]
    pub(crate) fn ok(self) -> String {
        assert_eq!(self.code, 0, "{self:?}");
        self.out
    }

    /// It did not; why.
    #[track_caller]
    pub(crate) fn failed(self, code: i32) -> String {
        assert_eq!((self.code, self.out.as_str()), (code, ""), "{}", self.err);
        self.err
    }
}

pub(crate) fn ctl(args: &[&str]) -> Ended {
    let output =
        Command::new(env!("CARGO_BIN_EXE_vhost-ctl")).args(args).stdin(Stdio::null()).output().unwrap();
    ended(output)
}

pub(crate) fn ended(output: Output) -> Ended {
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ended { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
}

/// So many requests of 64 bytes, one after the other.
pub(crate) fn load(driver: &mut VhostUserDriver, requests: usize) {
    let buf = driver.ram().writable(64);
    for _ in 0..requests {
        driver.ring(0).add(&[buf]);
        driver.kick(0);
        driver.wait_used(0, SOON).expect("an answer");
    }
}
