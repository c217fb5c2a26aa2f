//! The command line that all daemons share, and the checks that refuse a senseless one.
//!
//! Everything is checked before the first socket exists, so that a refused start leaves nothing behind. Each refusal
//! says what is wrong and what to do instead. A flag is here only if it works.
use std::ffi::{OsStr, OsString};
use std::num::NonZeroUsize;
use std::os::fd::{OwnedFd, RawFd};
use std::path::PathBuf;
use std::time::Duration;

use vm_virtio::Features;

use crate::inherit::{self, FdError};
use crate::listen::{self, Endpoint, ListenError};
use crate::logging::LogLevel;

/// Most guests that one daemon serves.
pub const MAX_GUESTS: u32 = 1024;
/// Longest time that a queue is polled before its thread sleeps, in microseconds.
pub const MAX_POLL_US: u32 = 100_000;

/// Most threads that lanes share.
pub const MAX_THREADS: u32 = 64;

/// The options that every daemon has; flatten it into the daemon's own arguments.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Options of all vhost-device daemons")]
pub struct CommonArgs {
    /// Unix socket to listen on for the VMM
    #[arg(short = 's', long, visible_alias = "socket", value_name = "PATH")]
    pub socket_path: Option<PathBuf>,

    /// Serve N guests on sockets PATH0, PATH1, ... (without this option: one guest on exactly PATH)
    #[arg(short = 'c', long, value_name = "N")]
    pub socket_count: Option<u32>,

    /// Inherited Unix socket of a guest, connected or listening; repeat it for several guests
    #[arg(long = "fd", visible_alias = "socket-fd", value_name = "N", allow_negative_numbers = true)]
    pub fds: Vec<RawFd>,

    /// Print what this back-end can do as JSON and exit; all other options are ignored
    #[arg(long)]
    pub print_capabilities: bool,

    /// Write READY=1 to this inherited descriptor and close it once the sockets accept connections
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pub ready_fd: Option<RawFd>,

    /// Unix socket, for this user alone, on which vhost-ctl shows and changes what the daemon does
    #[arg(long, value_name = "PATH")]
    pub control_socket: Option<PathBuf>,

    /// How much to log on standard error
    #[arg(long, value_enum, value_name = "LEVEL", default_value_t)]
    pub log_level: LogLevel,

    /// Poll a queue for up to N microseconds before sleeping; adapts to the load, 0 never polls
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub poll_us: u32,

    /// Serve all guests with N threads together instead of one or more each, for many guests that are mostly idle
    #[arg(long, value_name = "N")]
    pub threads: Option<u32>,

    /// Features to withhold from guests, e.g. ring_packed,event_idx
    #[arg(long, value_name = "FEATURE", value_delimiter = ',')]
    pub without: Vec<String>,

    /// Sockets that options of the daemon's own name, one a guest, instead of `--socket-path`.
    #[arg(skip)]
    pub socket_paths: Vec<PathBuf>,
}

/// A command line, or environment, that makes no sense.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum UsageError {
    /// Nowhere to listen.
    #[error("no socket is given; use --socket-path PATH, --fd N, or start the daemon by socket activation")]
    NoSocket,
    /// More than one source of sockets.
    #[error("{0} and {1} both say where the socket is; give one of them")]
    TwoSockets(&'static str, &'static str),
    /// A count of what?
    #[error(
        "--socket-count numbers the sockets of --socket-path, which is missing; add it or drop the count"
    )]
    CountWithoutPath,
    /// Zero guests, or more than one process should serve.
    #[error("--socket-count {0} is not between 1 and {MAX_GUESTS}; use a number in that range")]
    Count(u32),
    /// A path that cannot be listened on.
    #[error(transparent)]
    Path(#[from] ListenError),
    /// The path of the control socket cannot be listened on.
    #[error("--control-socket: {0}")]
    Control(#[source] ListenError),
    /// One path cannot be both.
    #[error("{0:?} is given to both --control-socket and a guest; use two paths")]
    ControlIsSocket(PathBuf),
    /// A descriptor of `--fd` that cannot be served.
    #[error("--fd: {0}")]
    Fd(#[source] FdError),
    /// More sockets than guests.
    #[error("{0} guests have sockets; one daemon serves at most {MAX_GUESTS}")]
    TooManyPaths(usize),
    /// More descriptors than guests.
    #[error("--fd is given {0} times; one daemon serves at most {MAX_GUESTS} guests")]
    TooManyFds(usize),
    /// A descriptor of socket activation that cannot be served.
    #[error("LISTEN_FDS: {0}")]
    ListenFds(#[source] FdError),
    /// The environment of socket activation is damaged.
    #[error("LISTEN_FDS is {0:?}, not a number from 1 to {MAX_GUESTS}; start the daemon from a socket unit")]
    ListenFdsCount(OsString),
    /// The descriptor for the readiness message cannot be used.
    #[error("--ready-fd: {0}")]
    ReadyFd(#[source] FdError),
    /// One descriptor cannot be both.
    #[error("descriptor {0} is given to both --fd and --ready-fd; use two")]
    ReadyFdIsSocket(RawFd),
    /// Polling for longer than anyone means to.
    #[error("--poll-us {0} is more than {MAX_POLL_US}; use a shorter time")]
    Poll(u32),
    /// Nobody, or a crowd.
    #[error("--threads {0} is not between 1 and {MAX_THREADS}; use a number in that range")]
    Threads(u32),
    /// One guest would be polled for with the threads of all.
    #[error("--poll-us and --threads: shared threads do not poll; give one of them")]
    PollWithThreads,
    /// No such feature.
    #[error("--without: there is no feature {0:?}; those that can be withheld are {names}", names = withholdable())]
    UnknownFeature(String),
    /// Not offered in the first place.
    #[error("--without: {0} is never offered; those that can be withheld are {names}", names = withholdable())]
    NotOffered(String),
    /// VERSION_1 must be offered (virtio 1.4, 6.2).
    #[error("--without: version_1 must be offered (virtio 1.4, section 6.2); leave it in, only {names} can be withheld", names = withholdable())]
    Required,
}

/// What every device of a daemon offers.
const OFFERED: Features = Features::RING.union(Features::ACCESS_PLATFORM);

/// The features that `--without` can withhold, for people.
fn withholdable() -> String {
    (OFFERED - Features::VERSION_1).names().collect::<Vec<_>>().join(", ")
}

/// The environment variables that matter, taken once.
#[derive(Clone, Debug, Default)]
pub(crate) struct Environment {
    pub(crate) listen_pid: Option<OsString>,
    pub(crate) listen_fds: Option<OsString>,
    pub(crate) notify_socket: Option<OsString>,
}

impl Environment {
    /// That of this process.
    pub(crate) fn of_process() -> Environment {
        Environment {
            listen_pid: std::env::var_os("LISTEN_PID"),
            listen_fds: std::env::var_os("LISTEN_FDS"),
            notify_socket: std::env::var_os("NOTIFY_SOCKET"),
        }
    }

    /// How many descriptors socket activation passed. Variables that were meant for another process are ignored
    /// (sd_listen_fds(3)).
    fn activated(&self) -> Result<Option<u32>, UsageError> {
        let (Some(pid), Some(count)) = (&self.listen_pid, &self.listen_fds) else { return Ok(None) };
        if pid.to_str().and_then(|pid| pid.parse().ok()) != Some(std::process::id()) {
            return Ok(None);
        }
        match count.to_str().and_then(|count| count.parse().ok()) {
            Some(count @ 1..=MAX_GUESTS) => Ok(Some(count)),
            _ => Err(UsageError::ListenFdsCount(count.clone())),
        }
    }
}

/// What a sensible command line asks for.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) endpoints: Vec<Endpoint>,
    pub(crate) ready_fd: Option<OwnedFd>,
    pub(crate) control_socket: Option<PathBuf>,
    pub(crate) without: Features,
    pub(crate) spin: Duration,
    pub(crate) threads: Option<NonZeroUsize>,
}

impl CommonArgs {
    /// How many guests this command line asks for, for devices that divide something among them: the sockets of
    /// `--socket-count` or `--fd`, or those of socket activation. 1 if it will be refused.
    pub fn guest_count(&self) -> u32 {
        let activated = || Environment::of_process().activated().ok().flatten();
        let given = self.fds.len().max(self.socket_paths.len());
        let fds = u32::try_from(given).ok().filter(|count| *count > 0);
        self.socket_count.filter(|count| *count > 0).or(fds).or_else(activated).unwrap_or(1)
    }

    /// Checks everything and takes the inherited descriptors. Nothing is created.
    pub(crate) fn plan(&self, environment: &Environment) -> Result<Plan, UsageError> {
        let without = self.without()?;
        if self.poll_us > MAX_POLL_US {
            return Err(UsageError::Poll(self.poll_us));
        }
        let threads = self.threads()?;
        let activated = environment.activated()?;
        let sources = [
            ("--socket-path", self.socket_path.is_some()),
            ("an option of a guest", !self.socket_paths.is_empty()),
            ("--fd", !self.fds.is_empty()),
            ("LISTEN_FDS", activated.is_some()),
        ];
        let mut given = sources.iter().filter(|(_, given)| *given).map(|(name, _)| *name);
        match (given.next(), given.next()) {
            (None, _) if self.socket_count.is_some() => return Err(UsageError::CountWithoutPath),
            (None, _) => return Err(UsageError::NoSocket),
            (Some(first), Some(second)) => return Err(UsageError::TwoSockets(first, second)),
            (Some(_), None) => {}
        }
        if self.socket_count.is_some() && self.socket_path.is_none() {
            return Err(UsageError::CountWithoutPath);
        }
        if let Some(fd) = self.ready_fd.filter(|fd| self.fds.contains(fd)) {
            return Err(UsageError::ReadyFdIsSocket(fd));
        }
        // The paths before the descriptors: looking takes nothing.
        let mut endpoints = self.paths()?;
        let control_socket = self.control_socket.clone();
        if let Some(control) = &control_socket {
            if endpoints.iter().any(|endpoint| matches!(endpoint, Endpoint::Path(path) if path == control)) {
                return Err(UsageError::ControlIsSocket(control.clone()));
            }
            listen::check(control).map_err(UsageError::Control)?;
        }
        if self.socket_paths.len() > MAX_GUESTS as usize {
            return Err(UsageError::TooManyPaths(self.socket_paths.len()));
        }
        if self.fds.len() > MAX_GUESTS as usize {
            return Err(UsageError::TooManyFds(self.fds.len()));
        }
        endpoints.extend(inherit::sockets(&self.fds).map_err(UsageError::Fd)?);
        if let Some(count) = activated {
            endpoints
                .extend(inherit::sockets(&inherit::activation_fds(count)).map_err(UsageError::ListenFds)?);
        }
        let ready_fd = self.ready_fd.map(inherit::ready_fd).transpose().map_err(UsageError::ReadyFd)?;
        Ok(Plan {
            endpoints,
            ready_fd,
            control_socket,
            without,
            spin: Duration::from_micros(self.poll_us.into()),
            threads,
        })
    }

    fn threads(&self) -> Result<Option<NonZeroUsize>, UsageError> {
        let Some(count) = self.threads else { return Ok(None) };
        if self.poll_us > 0 {
            return Err(UsageError::PollWithThreads);
        }
        let inside = (1..=MAX_THREADS).contains(&count);
        let threads = usize::try_from(count).ok().filter(|_| inside).and_then(NonZeroUsize::new);
        threads.map(Some).ok_or(UsageError::Threads(count))
    }

    fn paths(&self) -> Result<Vec<Endpoint>, UsageError> {
        let Some(base) = &self.socket_path else {
            self.socket_paths.iter().try_for_each(|path| listen::check(path))?;
            return Ok(self.socket_paths.iter().cloned().map(Endpoint::Path).collect());
        };
        if base.as_os_str() == OsStr::new("") {
            return Err(ListenError::Empty.into());
        }
        let paths = match self.socket_count {
            None => vec![listen::guest_path(base, None)],
            Some(count @ 1..=MAX_GUESTS) => {
                (0..count).map(|index| listen::guest_path(base, Some(index))).collect()
            }
            Some(count) => return Err(UsageError::Count(count)),
        };
        for path in &paths {
            listen::check(path)?;
        }
        Ok(paths.into_iter().map(Endpoint::Path).collect())
    }

    fn without(&self) -> Result<Features, UsageError> {
        let mut withheld = Features::empty();
        for name in &self.without {
            let feature = Features::by_name(name).ok_or_else(|| UsageError::UnknownFeature(name.clone()))?;
            if feature == Features::VERSION_1 {
                return Err(UsageError::Required);
            }
            if !OFFERED.contains(feature) {
                return Err(UsageError::NotOffered(name.clone()));
            }
            withheld |= feature;
        }
        Ok(withheld)
    }
}

/// Whether the command line asks for `--print-capabilities`, whatever else it says: the back-end program conventions
/// want all other options ignored, even those that are wrong.
pub(crate) fn wants_capabilities(args: impl IntoIterator<Item = OsString>) -> bool {
    args.into_iter().skip(1).take_while(|arg| arg != "--").any(|arg| arg == "--print-capabilities")
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use virtio_testkit::daemon::TempDir;

    #[derive(Debug, clap::Parser)]
    struct Args {
        #[command(flatten)]
        common: CommonArgs,
    }

    fn parse(line: &str) -> CommonArgs {
        Args::try_parse_from(std::iter::once("daemon").chain(line.split_whitespace())).unwrap().common
    }

    fn plan(line: &str) -> Result<Plan, UsageError> {
        parse(line).plan(&Environment::default())
    }

    /// The refusal of a line: it names a reason and, after a semicolon or colon, a way out.
    fn refusal(line: &str) -> String {
        let text = plan(line).unwrap_err().to_string();
        assert!(text.contains(';'), "no advice in {text:?}");
        text
    }

    #[test]
    fn clap_accepts_the_definition() {
        use clap::CommandFactory;
        Args::command().debug_assert();
    }

    #[test]
    fn one_source_of_sockets_and_only_one() {
        assert!(refusal("").contains("no socket is given"));
        assert!(refusal("-c 2").contains("--socket-path"));
        assert!(refusal("--fd 5 -c 2").contains("--socket-path"));
        assert!(refusal("-s /tmp/x --fd 5").contains("--socket-path and --fd"));
    }

    #[test]
    fn the_names_that_users_know_all_work() {
        for line in ["-s /a", "--socket-path /a", "--socket-path=/a", "--socket /a"] {
            assert_eq!(parse(line).socket_path.as_deref(), Some(std::path::Path::new("/a")), "{line}");
        }
        assert_eq!(parse("-c 3").socket_count, Some(3));
        assert_eq!(parse("--socket-count 3").socket_count, Some(3));
        assert_eq!(parse("--fd 3 --fd=4 --socket-fd 5").fds, [3, 4, 5]);
    }

    #[test]
    fn counts() {
        let dir = TempDir::new();
        let base = dir.path().join("s");
        let line = |count: &str| format!("-s {} {count}", base.display());
        assert!(refusal(&line("-c 0")).contains("between 1 and"));
        assert!(refusal(&line("-c 1025")).contains("between 1 and"));
        assert!(Args::try_parse_from(["daemon", "-s", "/a", "-c", "-1"]).is_err());
        let paths = |count: &str| -> Vec<PathBuf> {
            let plan = plan(&line(count)).unwrap();
            plan.endpoints
                .into_iter()
                .map(|endpoint| match endpoint {
                    Endpoint::Path(path) => path,
                    other => panic!("{other:?}"),
                })
                .collect()
        };
        assert_eq!(paths(""), std::slice::from_ref(&base));
        assert_eq!(paths("-c 1"), [dir.path().join("s0")]);
        assert_eq!(paths("-c 3"), [dir.path().join("s0"), dir.path().join("s1"), dir.path().join("s2")]);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "planning creates nothing");
    }

    #[test]
    fn threads() {
        let threads = |line: &str| plan(&format!("-s /tmp/backplane-none {line}")).unwrap().threads;
        assert_eq!(threads(""), None);
        assert_eq!(threads("--threads 4"), NonZeroUsize::new(4));
        for count in ["0", "65", "4294967295"] {
            assert!(refusal(&format!("-s /a --threads {count}")).contains("between 1 and 64"));
        }
        assert!(refusal("-s /a --threads 2 --poll-us 5").contains("do not poll"));
    }

    #[test]
    fn guests_are_counted() {
        for (line, count) in
            [("", 1), ("-s /a", 1), ("-s /a -c 3", 3), ("-s /a -c 0", 1), ("--fd 3 --fd 4", 2)]
        {
            assert_eq!(parse(line).guest_count(), count, "{line}");
        }
    }

    #[test]
    fn one_bad_path_of_many_refuses_all() {
        let dir = TempDir::new();
        std::fs::write(dir.path().join("s2"), "precious").unwrap();
        let text = refusal(&format!("-s {} -c 4", dir.path().join("s").display()));
        assert!(text.contains("is not a socket"), "{text}");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn bad_paths() {
        let dir = TempDir::new();
        assert!(refusal(&format!("-s {}/no/such", dir.path().display())).contains("does not exist"));
        assert!(refusal(&format!("-s {}", dir.path().display())).contains("not a socket"));
        let long = "x".repeat(200);
        assert!(refusal(&format!("-s {}/{long}", dir.path().display())).contains("bytes"));
        let empty = CommonArgs { socket_path: Some(PathBuf::new()), ..CommonArgs::default() };
        assert!(empty.plan(&Environment::default()).unwrap_err().to_string().contains("empty"));
        // The number that a count appends has to fit as well.
        let tight = dir.path().join("x".repeat(107 - dir.path().as_os_str().len() - 1));
        assert!(plan(&format!("-s {}", tight.display())).is_ok());
        assert!(refusal(&format!("-s {} -c 1", tight.display())).contains("bytes"));
    }

    #[test]
    fn bad_control_sockets() {
        let dir = TempDir::new();
        let base = dir.path().join("s");
        let line = |control: &str| format!("-s {} --control-socket {control}", base.display());
        assert!(refusal(&line(&base.display().to_string())).contains("both"));
        let text = refusal(&line(&dir.path().display().to_string()));
        assert!(text.contains("--control-socket") && text.contains("not a socket"), "{text}");
        assert!(refusal(&line("/no/such/directory/c")).contains("does not exist"));
        let planned = plan(&line(&dir.path().join("c").display().to_string())).unwrap();
        assert_eq!(planned.control_socket, Some(dir.path().join("c")));
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "planning creates nothing");
    }

    #[test]
    fn sockets_that_options_of_the_daemon_name() {
        let dir = TempDir::new();
        let paths = vec![dir.path().join("a"), dir.path().join("b")];
        let mut args = CommonArgs { socket_paths: paths, ..CommonArgs::default() };
        assert_eq!(args.guest_count(), 2);
        assert_eq!(args.plan(&Environment::default()).unwrap().endpoints.len(), 2);
        args.socket_path = Some(dir.path().join("c"));
        let error = args.plan(&Environment::default()).unwrap_err();
        assert!(matches!(error, UsageError::TwoSockets("--socket-path", "an option of a guest")), "{error}");
        args.socket_path = None;
        args.socket_paths.push(dir.path().to_owned());
        assert!(matches!(args.plan(&Environment::default()), Err(UsageError::Path(_))));
    }

    #[test]
    fn bad_descriptors() {
        assert!(refusal("--fd 1").contains("standard"));
        assert!(refusal("--fd -3").contains("not a descriptor"));
        assert!(refusal("--fd 99999").contains("not open"));
        assert!(refusal("--fd 7 --ready-fd 7").contains("both"));
        let dir = TempDir::new();
        assert!(refusal(&format!("-s {}/s --ready-fd 0", dir.path().display())).contains("standard"));
        assert!(Args::try_parse_from(["daemon", "--fd", "three"]).is_err());
    }

    #[test]
    fn features_to_withhold() {
        let args =
            CommonArgs { without: vec!["ring_packed".into(), "event_idx".into()], ..Default::default() };
        assert_eq!(args.without().unwrap(), Features::RING_PACKED | Features::EVENT_IDX);
        let text = refusal("-s /tmp/x --without ring_packed,warp_drive");
        assert!(
            text.contains("warp_drive") && text.contains("indirect_desc, event_idx, access_platform"),
            "{text}"
        );
        assert!(refusal("-s /tmp/x --without version_1").contains("6.2"));
        assert!(refusal("-s /tmp/x --without ring_reset").contains("never offered"));
        assert!(refusal("-s /tmp/x --without=").contains("no feature"));
    }

    #[test]
    fn polling_has_a_limit() {
        assert!(refusal("-s /tmp/x --poll-us 100001").contains("100000"));
        let dir = TempDir::new();
        let plan = plan(&format!("-s {}/s --poll-us 50", dir.path().display())).unwrap();
        assert_eq!(plan.spin, Duration::from_micros(50));
    }

    #[test]
    fn socket_activation_for_another_process_is_not_ours() {
        let other = Environment {
            listen_pid: Some("1".into()),
            listen_fds: Some("1".into()),
            ..Environment::default()
        };
        assert!(matches!(parse("").plan(&other), Err(UsageError::NoSocket)));
        let ours = |fds: &str| Environment {
            listen_pid: Some(std::process::id().to_string().into()),
            listen_fds: Some(fds.into()),
            ..Environment::default()
        };
        for count in ["0", "-1", "many", "", "100000"] {
            let error = parse("").plan(&ours(count)).unwrap_err();
            assert!(matches!(error, UsageError::ListenFdsCount(_)), "{count}: {error}");
        }
        assert!(matches!(parse("-s /tmp/x").plan(&ours("1")), Err(UsageError::TwoSockets(_, "LISTEN_FDS"))));
    }

    #[test]
    fn print_capabilities_is_found_among_nonsense() {
        let wants = |line: &str| wants_capabilities(line.split(' ').map(OsString::from));
        assert!(wants("daemon --nonsense 7 --print-capabilities"));
        assert!(!wants("daemon -- --print-capabilities"));
        assert!(!wants("--print-capabilities"), "the program's name is not an argument");
    }
}
