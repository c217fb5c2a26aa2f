//! `vhost-probe features`: what a back-end offers, asked and not changed. Nothing is started.
use std::fmt::Write;
use std::process::ExitCode;
use std::time::Duration;

use serde_json::{Value, json};
use vhost_user::{Error, F_PROTOCOL_FEATURES, FrontendEndpoint, ProtocolFeatures};

use crate::{Target, names, table};

/// The largest configuration space that QEMU asks for; back-ends built on its library take no larger question.
const MAX_CONFIG: u32 = 256;
/// How long to wait for somebody to listen.
const LISTENING: Duration = Duration::from_millis(500);

#[derive(clap::Args)]
pub(crate) struct Options {
    #[command(flatten)]
    target: Target,
}

/// An answer, or why there is none.
type Answer<T> = Result<T, String>;

/// Everything that was learnt.
struct Findings {
    features: u64,
    protocol: Answer<ProtocolFeatures>,
    queues: Answer<u64>,
    slots: Answer<u64>,
    config: Answer<Vec<u8>>,
}

/// Prints what there is. Fails if the back-end cannot even be asked.
pub(crate) fn run(options: &Options) -> ExitCode {
    let target = &options.target;
    let found = virtio_testkit::connect(&target.path, LISTENING).and_then(|mut backend| {
        backend.set_timeout(target.timeout);
        ask(&mut backend)
    });
    match found {
        Ok(findings) if target.json => println!("{:#}", findings.json(target)),
        Ok(findings) => print!("{}", findings.text(target)),
        Err(error) => {
            eprintln!("vhost-probe: {}: {}", target.path.display(), reason(&error));
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

/// An error with its cause.
pub(crate) fn reason(error: &Error) -> String {
    match error {
        Error::Io(cause) => cause.to_string(),
        other => other.to_string(),
    }
}

fn ask(backend: &mut FrontendEndpoint) -> Result<Findings, Error> {
    let features = backend.get_features()?;
    let protocol = match features & F_PROTOCOL_FEATURES {
        0 => Err("needs protocol_features, which is not offered".to_owned()),
        _ => negotiate(backend).map_err(|error| reason(&error)),
    };
    let has = |feature| match protocol {
        Ok(set) if set.contains(feature) => Ok(()),
        Ok(_) => Err(format!("{} is not offered", name(feature))),
        Err(_) => Err("no protocol features".to_owned()),
    };
    let (mq, slots, config) = (
        has(ProtocolFeatures::MQ),
        has(ProtocolFeatures::CONFIGURE_MEM_SLOTS),
        has(ProtocolFeatures::CONFIG),
    );
    let told = |error: Error| reason(&error);
    Ok(Findings {
        features,
        queues: mq.and_then(|()| backend.get_queue_num().map_err(told)),
        slots: slots.and_then(|()| backend.get_max_mem_slots().map_err(told)),
        // Last: some back-ends close the connection over a size that they do not like.
        config: config.and_then(|()| read_config(backend)),
        protocol,
    })
}

/// Takes what only asks for information; with REPLY_ACK nothing could go wrong unheard.
fn negotiate(backend: &mut FrontendEndpoint) -> Result<ProtocolFeatures, Error> {
    let wanted = ProtocolFeatures::MQ
        | ProtocolFeatures::REPLY_ACK
        | ProtocolFeatures::CONFIG
        | ProtocolFeatures::CONFIGURE_MEM_SLOTS;
    let offered = backend.get_protocol_features()?;
    backend.set_protocol_features(offered & wanted)?;
    backend.set_owner()?;
    Ok(offered)
}

fn name(feature: ProtocolFeatures) -> String {
    feature.iter_names().map(|(name, _)| name.to_lowercase()).collect::<Vec<_>>().join(", ")
}

/// As much of the configuration space as the back-end gives: there is no message that tells its size.
fn read_config(backend: &mut FrontendEndpoint) -> Answer<Vec<u8>> {
    let (mut best, mut low, mut high) = (Vec::new(), 0, MAX_CONFIG);
    let mut size = high;
    while low < high {
        match backend.get_config(0, size, 0) {
            Ok(bytes) => (best, low) = (bytes, size),
            Err(Error::Refused { .. }) => high = size - 1,
            Err(error) if best.is_empty() => return Err(format!("{size} bytes asked: {}", reason(&error))),
            Err(_) => break,
        }
        size = low + (high - low).div_ceil(2);
    }
    Ok(best)
}

/// The numbers of the bits that are set.
fn bits(set: u64) -> impl Iterator<Item = u32> {
    (0..64).filter(move |bit| set & (1 << bit) != 0)
}

fn unnamed(bit: u32) -> String {
    format!("bit {bit}")
}

impl Findings {
    fn feature_names(&self, target: &Target) -> Vec<(u32, Option<String>)> {
        bits(self.features).map(|bit| (bit, names::feature(bit, target.device))).collect()
    }

    fn protocol_names(&self) -> Vec<(u32, Option<String>)> {
        let set = self.protocol.as_ref().map_or(0, |set| set.bits());
        bits(set).map(|bit| (bit, names::protocol_feature(bit))).collect()
    }

    /// Fields of the configuration space as far as they are known and there; little-endian numbers, or bytes.
    fn fields(&self, target: &Target) -> Vec<(&'static str, usize, Value)> {
        let (Ok(bytes), Some(device)) = (&self.config, target.device) else { return Vec::new() };
        let mut rest = bytes.as_slice();
        let mut offset = 0;
        let mut fields = Vec::new();
        for &(name, size) in device.config {
            let Some((field, tail)) = rest.split_at_checked(size) else { break };
            let value = match size {
                1 | 2 | 4 | 8 => json!(field.iter().rev().fold(0u64, |v, byte| v << 8 | u64::from(*byte))),
                _ => json!(hex(field)),
            };
            fields.push((name, offset, value));
            (rest, offset) = (tail, offset + size);
        }
        fields
    }

    fn text(&self, target: &Target) -> String {
        let mut out = String::new();
        let mut list = |headline: [&str; 2], list: Vec<(u32, Option<String>)>| {
            let row = |(bit, name): (u32, Option<String>)| {
                vec![name.unwrap_or_else(|| unnamed(bit)), bit.to_string()]
            };
            out += &table::text(&headline, &list.into_iter().map(row).collect::<Vec<_>>());
            out.push('\n');
        };
        list(["virtio feature", "bit"], self.feature_names(target));
        if self.protocol.is_ok() {
            list(["protocol feature", "bit"], self.protocol_names());
        }
        let mut rows = Vec::new();
        let mut row = |what: &str, value: String| rows.push(vec![what.to_owned(), table::plain(&value)]);
        let number = |answer: &Answer<u64>| match answer {
            Ok(value) => value.to_string(),
            Err(why) => format!("unknown: {why}"),
        };
        if let Err(why) = &self.protocol {
            row("protocol features", format!("none: {why}"));
        }
        row("queues", number(&self.queues));
        row("memory slots", number(&self.slots));
        match &self.config {
            Ok(bytes) => row("configuration space", format!("{} bytes readable", bytes.len())),
            Err(why) => row("configuration space", format!("none: {why}")),
        }
        out += &table::text(&["what", "value"], &rows);
        let fields = self.fields(target);
        if !fields.is_empty() {
            let cell = |value: &Value| value.as_str().map_or_else(|| value.to_string(), str::to_owned);
            let rows: Vec<_> = fields
                .iter()
                .map(|(name, offset, value)| vec![(*name).to_owned(), offset.to_string(), cell(value)])
                .collect();
            out.push('\n');
            out += &table::text(&["field", "offset", "value"], &rows);
        } else if let Ok(bytes) = &self.config {
            out.push('\n');
            for (row, chunk) in bytes.chunks(16).enumerate() {
                let _ = writeln!(out, "{:#06x}  {}", row * 16, hex(chunk));
            }
        }
        out
    }

    fn json(&self, target: &Target) -> Value {
        let list = |list: Vec<(u32, Option<String>)>| -> Vec<Value> {
            list.into_iter().map(|(bit, name)| json!({ "bit": bit, "name": name })).collect()
        };
        fn answer<T>(answer: &Answer<T>, value: impl Fn(&T) -> Value) -> Value {
            answer.as_ref().map_or_else(|why| json!({ "unknown": why }), value)
        }
        json!({
            "features": list(self.feature_names(target)),
            "protocol_features": answer(&self.protocol, |_| json!(list(self.protocol_names()))),
            "queues": answer(&self.queues, |n| json!(n)),
            "memory_slots": answer(&self.slots, |n| json!(n)),
            "config": answer(&self.config, |bytes| json!({
                "bytes": hex(bytes),
                "fields": self.fields(target).into_iter()
                    .map(|(name, offset, value)| json!({ "name": name, "offset": offset, "value": value }))
                    .collect::<Vec<_>>(),
            })),
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" ")
}
