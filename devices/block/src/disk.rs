//! One `--blk-file`: a path, or `path=...` with options of its own behind it.
use std::path::PathBuf;

use clap::ValueEnum;
use virtio_block::backend::OpenOptions;

use crate::Args;

/// Who makes writes stable.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum WriteCache {
    /// The guest, by flushing.
    #[default]
    Writeback,
    /// The device, each of them.
    Writethrough,
}

/// What becomes of discards.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Discard {
    /// Ranges go back to the storage.
    #[default]
    Unmap,
    /// They are not offered.
    Ignore,
}

/// On or off.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Switch {
    /// Yes.
    #[default]
    On,
    /// No.
    Off,
}

/// A disk as it was asked for.
#[derive(Clone, Debug)]
pub(crate) struct Disk {
    pub(crate) path: PathBuf,
    pub(crate) open: OpenOptions,
    pub(crate) backing: Vec<PathBuf>,
    pub(crate) serial: String,
    pub(crate) block_size: Option<u32>,
    pub(crate) cache: WriteCache,
    pub(crate) discard: Discard,
}

/// A `--blk-file` that makes no sense.
#[derive(Debug, thiserror::Error)]
pub(crate) enum DiskError {
    #[error("--blk-file {0:?} has {1:?}, which is not KEY=VALUE; separate options by commas")]
    NoValue(String, String),
    #[error(
        "--blk-file {0:?} has the unknown key {1:?}; known are path, readonly, format, serial, direct, cache, \
         block-size, discard, lock, backing-dir"
    )]
    UnknownKey(String, String),
    #[error("--blk-file {0:?}: {1}={2} is not understood; see --help for what it can be")]
    Value(String, String, String),
}

impl Disk {
    /// Anything that does not begin with `path=` is a path, whatever is in it.
    pub(crate) fn parse(text: &str, args: &Args) -> Result<Disk, DiskError> {
        let mut disk = Disk {
            path: PathBuf::from(text),
            open: OpenOptions {
                format: args.format,
                read_only: args.read_only,
                direct: args.direct,
                lock: args.lock == Switch::On,
            },
            backing: args.backing_dir.clone(),
            serial: args.serial.clone(),
            block_size: args.block_size,
            cache: args.cache,
            discard: args.discard,
        };
        if !text.starts_with("path=") {
            return Ok(disk);
        }
        for option in text.split(',') {
            let Some((key, value)) = option.split_once('=') else {
                return Err(DiskError::NoValue(text.into(), option.into()));
            };
            let bad = || DiskError::Value(text.into(), key.into(), value.into());
            match key {
                "path" if value.is_empty() => return Err(bad()),
                "path" => disk.path = PathBuf::from(value),
                "readonly" | "read-only" => disk.open.read_only = switch(value).ok_or_else(bad)?,
                "direct" => disk.open.direct = switch(value).ok_or_else(bad)?,
                "lock" => disk.open.lock = switch(value).ok_or_else(bad)?,
                "backing-dir" => disk.backing.push(PathBuf::from(value)),
                "format" => disk.open.format = choice(value).ok_or_else(bad)?,
                "cache" => disk.cache = choice(value).ok_or_else(bad)?,
                "discard" => disk.discard = choice(value).ok_or_else(bad)?,
                "serial" => disk.serial = value.to_owned(),
                "block-size" => disk.block_size = Some(value.parse().map_err(|_| bad())?),
                _ => return Err(DiskError::UnknownKey(text.into(), key.into())),
            }
        }
        Ok(disk)
    }
}

fn choice<T: ValueEnum>(value: &str) -> Option<T> {
    T::from_str(value, false).ok()
}

fn switch(value: &str) -> Option<bool> {
    match value {
        "on" | "true" => Some(true),
        "off" | "false" => Some(false),
        _ => None,
    }
}
