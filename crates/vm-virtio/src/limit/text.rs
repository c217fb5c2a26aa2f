//! A limit in words, as a command line has it: `bytes=10M,ops=500,period=1000`.
use super::{LimitError, RateLimit};
use std::str::FromStr;
use std::time::Duration;

/// The period if none is said, in milliseconds.
const PERIOD: u64 = 1000;

/// Words that are no limit.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseLimitError {
    /// Not a key and a number.
    #[error("{0:?} says nothing; write bytes=N, ops=N, bytes-burst=N, ops-burst=N or period=MS")]
    Unknown(String),
    /// A key that comes again.
    #[error("{0} is given twice")]
    Twice(&'static str),
    /// Not a number, or too large a one.
    #[error("{key}={value} is no number (bytes may end in K, M or G)")]
    Number {
        /// Of what.
        key: &'static str,
        /// What was there.
        value: String,
    },
    /// Nothing is limited.
    #[error("neither bytes=N nor ops=N is given: that limits nothing")]
    Nothing,
    /// More may be saved up of what is not limited.
    #[error("{0} needs {1}")]
    Burst(&'static str, &'static str),
    /// A limit that makes no sense.
    #[error(transparent)]
    Limit(#[from] LimitError),
}

const KEYS: [&str; 5] = ["bytes", "ops", "bytes-burst", "ops-burst", "period"];

fn number(key: &'static str, value: &str) -> Result<u64, ParseLimitError> {
    let (digits, shift) = match value.strip_suffix(['K', 'M', 'G']).filter(|_| key.starts_with("bytes")) {
        Some(digits) if value.ends_with('K') => (digits, 10),
        Some(digits) if value.ends_with('M') => (digits, 20),
        Some(digits) => (digits, 30),
        None => (value, 0),
    };
    // No sign, which parsing would take.
    let number =
        digits.parse::<u64>().ok().filter(|_| digits.starts_with(|first: char| first.is_ascii_digit()));
    let number = number.and_then(|number| number.checked_mul(1 << shift));
    number.ok_or_else(|| ParseLimitError::Number { key, value: value.to_owned() })
}

impl FromStr for RateLimit {
    type Err = ParseLimitError;

    fn from_str(text: &str) -> Result<RateLimit, ParseLimitError> {
        let mut values = [None; KEYS.len()];
        for word in text.split(',') {
            let unknown = || ParseLimitError::Unknown(word.to_owned());
            let (key, value) = word.split_once('=').ok_or_else(unknown)?;
            let (key, slot) =
                KEYS.into_iter().zip(&mut values).find(|(known, _)| *known == key).ok_or_else(unknown)?;
            if slot.replace(number(key, value)?).is_some() {
                return Err(ParseLimitError::Twice(key));
            }
        }
        let [bytes, operations, bytes_burst, operations_burst, period] = values;
        let period = Duration::from_millis(period.unwrap_or(PERIOD));
        let limit = match (bytes, operations) {
            (Some(bytes), None) => RateLimit::new(bytes, period)?,
            (None, Some(operations)) => RateLimit::operations(operations, period)?,
            (Some(bytes), Some(operations)) => RateLimit::new(bytes, period)?.and_operations(operations)?,
            (None, None) => return Err(ParseLimitError::Nothing),
        };
        match (bytes, bytes_burst, operations, operations_burst) {
            (None, Some(_), ..) => Err(ParseLimitError::Burst("bytes-burst", "bytes")),
            (.., None, Some(_)) => Err(ParseLimitError::Burst("ops-burst", "ops")),
            _ => Ok(limit.with_burst(bytes_burst.unwrap_or(0), operations_burst.unwrap_or(0))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<RateLimit, String> {
        text.parse::<RateLimit>().map_err(|error| error.to_string())
    }

    #[test]
    fn a_limit_in_words() {
        let second = Duration::from_secs(1);
        assert_eq!(parse("bytes=10M"), Ok(RateLimit::new(10 << 20, second).unwrap()));
        assert_eq!(parse("ops=500"), Ok(RateLimit::operations(500, second).unwrap()));
        let all = RateLimit::new(3 << 10, second / 4).unwrap().and_operations(7).unwrap();
        let all = all.with_burst(2 << 30, 9);
        assert_eq!(parse("ops-burst=9,bytes-burst=2G,period=250,ops=7,bytes=3K"), Ok(all));
    }

    #[test]
    fn other_words_say_why_they_are_none() {
        for (text, why) in [
            ("", "says nothing"),
            ("10M", "says nothing"),
            ("bytes=1,", "says nothing"),
            ("bits=1", "\"bits=1\""),
            ("bytes=", "bytes= is no number"),
            ("bytes=+5", "no number"),
            ("bytes=-5", "no number"),
            ("bytes=5k", "no number"),
            ("ops=1K", "no number"),
            ("bytes=99999999999G", "no number"),
            ("bytes=1,bytes=1", "given twice"),
            ("period=10", "limits nothing"),
            ("bytes=0", "0 bytes per period"),
            ("ops=1,period=0", "period of 0 ms"),
            ("ops=1,bytes-burst=1", "bytes-burst needs bytes"),
            ("bytes=1,ops-burst=1", "ops-burst needs ops"),
        ] {
            let error = parse(text).expect_err(text);
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
