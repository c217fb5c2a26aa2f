//! Boots Linux under QEMU's software emulation, runs a shell script in it, and hands back what it said.
//!
//! The script is sourced by the guest's first process with the functions of `xtask/lab/lab.sh`; it joins the lab's
//! initramfs as a second archive. Its exit status comes back as [`Outcome::code`], and everything on the guest's
//! console as [`Outcome::console`]. A second serial port carries lines to the script, for tests in which the host
//! acts in the middle, see [`Running`].

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::cpio::Archive;
use crate::failure::Failure;
use crate::lab::Lab;
use crate::process::Owned;
use crate::running::Running;
use crate::scratch::Scratch;
use crate::virtio::Device;

/// What every kernel is told. An emulated timer may come late on a busy machine, which the kernel's check of its
/// timer takes for a broken one (`no_timer_check`).
const KERNEL_ARGUMENTS: &str =
    "console=ttyS0 quiet loglevel=4 panic=-1 no_timer_check random.trust_cpu=on lab.control";

/// A guest that has not been started yet.
#[derive(Debug)]
pub struct Guest {
    lab: Lab,
    memory_mib: u32,
    more_memory: String,
    cpus: u32,
    kernel_arguments: String,
    arguments: Vec<OsString>,
    archives: Vec<PathBuf>,
    script: String,
    reboots: bool,
    by_instructions: bool,
    limit: Duration,
    sockets: u32,
}

/// What is known of a guest that has ended.
#[derive(Debug)]
pub struct Outcome {
    /// The script's exit status.
    pub code: i32,
    /// Everything that was on its console.
    pub console: String,
    /// From the start of QEMU to its end.
    pub time: Duration,
}

impl Guest {
    /// A guest with 512 MiB and two CPUs, and no device but what is added.
    #[must_use]
    pub fn new(lab: &Lab) -> Self {
        Self {
            lab: lab.clone(),
            memory_mib: 512,
            more_memory: String::new(),
            cpus: 2,
            kernel_arguments: String::new(),
            arguments: Vec::new(),
            archives: Vec::new(),
            script: String::new(),
            reboots: false,
            by_instructions: false,
            limit: Duration::from_secs(240),
            sockets: 0,
        }
    }

    /// Its memory, which daemons can map.
    #[must_use]
    pub fn memory_mib(mut self, mib: u32) -> Self {
        self.memory_mib = mib;
        self
    }

    /// Lets memory modules be plugged in: how many, and how much memory there can be in all.
    #[must_use]
    pub fn memory_slots(mut self, slots: u32, most_mib: u32) -> Self {
        self.more_memory = format!(",slots={slots},maxmem={most_mib}M");
        self
    }

    /// How many CPUs it has.
    #[must_use]
    pub fn cpus(mut self, cpus: u32) -> Self {
        self.cpus = cpus;
        self
    }

    /// Adds words to the kernel's command line.
    #[must_use]
    pub fn kernel_arguments(mut self, words: &str) -> Self {
        self.kernel_arguments.push(' ');
        self.kernel_arguments.push_str(words);
        self
    }

    /// Adds arguments to QEMU's command line.
    #[must_use]
    pub fn args<A: AsRef<OsStr>>(mut self, arguments: impl IntoIterator<Item = A>) -> Self {
        self.arguments.extend(arguments.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    /// Adds a device with its properties, in QEMU's notation.
    #[must_use]
    pub fn device(self, device: &str) -> Self {
        self.args(["-device", device])
    }

    /// Adds a vhost-user device whose back-end listens on `socket`.
    #[must_use]
    pub fn vhost_user(mut self, device: &str, socket: &Path) -> Self {
        let id = format!("vhost{}", self.sockets);
        self.sockets += 1;
        let chardev = format!("socket,id={id},path={}", socket.display());
        self.args(["-chardev", &chardev, "-device", &format!("{device},chardev={id}")])
    }

    /// Adds a further cpio archive of the lab to the guest's root.
    #[must_use]
    pub fn archive(mut self, path: &Path) -> Self {
        self.archives.push(path.to_owned());
        self
    }

    /// The script to run.
    #[must_use]
    pub fn script(mut self, text: &str) -> Self {
        text.clone_into(&mut self.script);
        self
    }

    /// Lets the guest reboot; otherwise a reboot ends it.
    #[must_use]
    pub fn reboots(mut self) -> Self {
        self.reboots = true;
        self
    }

    /// Lets its time pass by the instructions that it executes instead of the host's clock, and its CPUs take turns. A guest in which
    /// another one runs needs that: each tick of a clock costs it so much that on a busy host it would do nothing but tick.
    #[must_use]
    pub fn time_by_instructions(mut self) -> Self {
        self.by_instructions = true;
        self
    }

    /// How long it may run in all.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Boots it and waits for its end.
    ///
    /// # Errors
    /// It did not start, did not end in time, or ended without having run the script; with its last lines.
    pub fn run(self) -> Result<Outcome, Failure> {
        self.start()?.wait()
    }

    /// Boots it.
    ///
    /// # Errors
    /// A file cannot be written or QEMU not be started.
    pub fn start(self) -> Result<Running, Failure> {
        let scratch = Scratch::new().map_err(Failure::io("make a temporary folder"))?;
        let initrd = scratch.join("initrd");
        self.write_initrd(&initrd).map_err(Failure::io(format_args!("write {}", initrd.display())))?;
        let output = File::create(scratch.join("qemu.out")).map_err(Failure::io("make QEMU's log"))?;
        let errors = output.try_clone().map_err(Failure::io("copy a descriptor"))?;
        let mut command = self.command(&scratch, &initrd);
        command.stdin(Stdio::null()).stdout(output).stderr(errors);
        let started = Instant::now();
        let qemu = Owned::spawn(&mut command)
            .map_err(Failure::io(format_args!("start {}", self.lab.qemu.display())))?;
        Ok(Running::new(qemu, scratch, started, self.limit))
    }

    fn command(&self, scratch: &Scratch, initrd: &Path) -> Command {
        let memory = self.memory_mib;
        let mut command = Command::new(&self.lab.qemu);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        if !self.reboots {
            command.arg("-no-reboot");
        }
        command.args([
            "-machine",
            "q35,memory-backend=ram,usb=off,vmport=off,smbus=off,sata=off,i8042=off,hpet=off",
        ]);
        if self.by_instructions {
            // An instruction is two nanoseconds, and while all CPUs wait time goes on at once.
            command.args(["-accel", "tcg,thread=single", "-icount", "shift=1,sleep=off"]);
        } else {
            command.args(["-accel", "tcg,thread=multi"]);
        }
        command.args(["-cpu", "max", "-smp", &self.cpus.to_string()]);
        command.args(["-m", &format!("{memory}M{}", self.more_memory)]);
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={memory}M,share=on")]);
        command
            .arg("-kernel")
            .arg(&self.lab.kernel)
            .arg("-initrd")
            .arg(initrd)
            .arg("-append")
            .arg(format!("{KERNEL_ARGUMENTS}{}", self.kernel_arguments));
        let path = |name: &str| scratch.join(name).display().to_string();
        for (id, chardev) in [
            ("console", format!("file,id=console,path={}", path("console"))),
            ("control", format!("socket,id=control,path={},server=on,wait=off", path("control"))),
        ] {
            command.args(["-chardev", &chardev, "-serial", &format!("chardev:{id}")]);
        }
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp"))]).args(&self.arguments);
        command
    }

    /// The lab's archives, and one more with the script.
    fn write_initrd(&self, path: &Path) -> io::Result<()> {
        let mut file = File::create(path)?;
        let mut size = 0;
        for archive in [&self.lab.initramfs].into_iter().chain(&self.archives) {
            // Archives written by us end at a multiple of four, where the next may start.
            size += io::copy(&mut File::open(archive)?, &mut file)?;
        }
        let mut archive = Archive::after(BufWriter::new(file), size)?;
        archive.file("test.sh", 0o644, self.script.as_bytes())?;
        archive.finish().map(drop)
    }
}

impl Outcome {
    /// Gives the outcome on if the script ended with 0.
    ///
    /// # Errors
    /// The script's exit status, with the console's last lines.
    pub fn success(self) -> Result<Self, Failure> {
        if self.code == 0 {
            return Ok(self);
        }
        let reason =
            lines(&self.console, "LAB-FAIL ").last().map_or(String::new(), |reason| format!(": {reason}"));
        Err(Failure::new(format!("the guest's script ended with {}{reason}", self.code))
            .with_log("the guest's console", &self.console))
    }

    /// What the script told (`tell KEY ...`) with that first word; the last such line.
    #[must_use]
    pub fn told(&self, key: &str) -> Option<&str> {
        told(&self.console, key).last()
    }

    /// The guest's virtio devices as last listed on the console.
    #[must_use]
    pub fn devices(&self) -> Vec<Device> {
        let mut last: Vec<Device> = Vec::new();
        for device in lines(&self.console, "LAB-VIRTIO ").filter_map(Device::parse) {
            last.retain(|known| known.name != device.name);
            last.push(device);
        }
        last
    }
}

/// The rest of each console line that starts with `prefix`.
pub(crate) fn lines<'a, 'b>(
    console: &'a str,
    prefix: &'b str,
) -> impl Iterator<Item = &'a str> + use<'a, 'b> {
    // The kernel may have left half a line of its own before ours.
    console.lines().filter_map(move |line| line.split_once(prefix)).map(|(_, rest)| rest.trim_end())
}

/// What was told with `key` as its first word.
pub(crate) fn told<'a, 'b>(console: &'a str, key: &'b str) -> impl Iterator<Item = &'a str> + use<'a, 'b> {
    lines(console, "LAB-TELL ").filter_map(move |line| {
        let rest = line.strip_prefix(key)?;
        if rest.is_empty() { Some(rest) } else { rest.strip_prefix(' ') }
    })
}

/// The exit status that the guest's first process reported.
pub(crate) fn exit_code(console: &str) -> Option<i32> {
    lines(console, "LAB-EXIT code=").last()?.split_whitespace().next()?.parse().ok()
}

/// Reads a log that another process writes.
pub(crate) fn read_log(path: &Path) -> String {
    fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).replace('\r', "")).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_console_is_read() {
        let console = "LAB-START kernel=x\nLAB-TELL bytes 12\nLAB-TELL bytesmore 1\n[ 1.0] xLAB-TELL bytes 13\n\
                       LAB-TELL done\nLAB-EXIT code=3 uptime=1.0\n";
        assert_eq!(told(console, "bytes").collect::<Vec<_>>(), ["12", "13"]);
        assert_eq!(told(console, "done").collect::<Vec<_>>(), [""]);
        assert_eq!(exit_code(console), Some(3));
        assert_eq!(exit_code("LAB-START"), None);
    }
}
