//! `--rate-limit`, for daemons whose device keeps to it: one line in their arguments, one where a device is made.
use vm_virtio::DeviceError;
use vm_virtio::limit::{LimitError, RateLimit};

use crate::{CommonArgs, GuestIndex};

/// The limit of all guests together; flatten it into the arguments of a daemon whose device asks a
/// [`Limiter`](vm_virtio::limit::Limiter).
#[derive(Clone, Copy, Debug, Default, clap::Args)]
pub struct LimitArgs {
    /// Most that all guests together get in a period, divided evenly: bytes=N, ops=N, or both; also bytes-burst=N,
    /// ops-burst=N (what may be saved up), period=MS (default 1000). Bytes may end in K, M or G [default: no limit]
    #[arg(long, value_name = "LIMIT")]
    pub rate_limit: Option<RateLimit>,
}

impl LimitArgs {
    /// Refuses a limit that cannot be divided among the guests: to be asked before anything is made.
    ///
    /// # Errors
    /// [`LimitError::TooFew`].
    pub fn check(&self, common: &CommonArgs) -> Result<(), LimitError> {
        self.part(0, common).map(|_| ())
    }

    /// The part of one guest.
    ///
    /// # Errors
    /// What [`LimitArgs::check`] says.
    pub fn of(&self, guest: GuestIndex, common: &CommonArgs) -> Result<Option<RateLimit>, DeviceError> {
        self.part(guest.0, common).map_err(DeviceError::new)
    }

    fn part(&self, guest: u32, common: &CommonArgs) -> Result<Option<RateLimit>, LimitError> {
        self.rate_limit.map(|limit| limit.share(guest, common.guest_count())).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(clap::Parser)]
    struct Args {
        #[command(flatten)]
        limit: LimitArgs,
        #[command(flatten)]
        common: CommonArgs,
    }

    fn args(line: &str) -> Result<Args, clap::Error> {
        Args::try_parse_from(["daemon", "-s", "/a"].into_iter().chain(line.split_whitespace()))
    }

    #[test]
    fn each_guest_has_its_part() {
        let none = args("").unwrap();
        assert!(none.limit.check(&none.common).is_ok());
        assert_eq!(none.limit.of(GuestIndex(0), &none.common).unwrap(), None);
        let some = args("--rate-limit bytes=10,ops=3 -c 3").unwrap();
        some.limit.check(&some.common).unwrap();
        let parts = [0, 1, 2].map(|guest| some.limit.of(GuestIndex(guest), &some.common).unwrap().unwrap());
        assert_eq!(parts.map(|part| part.bytes().unwrap()), [4, 3, 3]);
    }

    #[test]
    fn what_cannot_be_divided_or_understood_is_refused() {
        let few = args("--rate-limit bytes=10,ops=3 -c 4").unwrap();
        assert!(few.limit.check(&few.common).unwrap_err().to_string().contains("shared by 4 guests"));
        let Err(error) = args("--rate-limit fast") else { panic!("fast is no limit") };
        assert!(error.to_string().contains("bytes=N"), "{error}");
    }
}
