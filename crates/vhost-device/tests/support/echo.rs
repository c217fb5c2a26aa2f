//! A device for tests: it gives back what it is sent, and does worse things when told to.
#![allow(unreachable_pub, dead_code, reason = "shared by test crates and an example, none of which uses all")]
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use reactor::Mail;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_virtio::controls::{Argument, ControlCommand, ControlRequest, Controls, Kind, Property, Value};
use vm_virtio::device::{
    ConfigWriter, DeviceError, DeviceState, Lane, QueueSpec, StateError, Stop, VirtioDevice, Worker,
};
use vm_virtio::{
    Chain, ConfigSpace, DeviceType, Features, HostError, HostFile, HostReply, HostRequest, HostRequests,
    Queue, ShmRange, ShmRegion, Upcall, UpcallError, UpcallId, UpcallReply, UpcallResult,
};

/// What mappings are counted in.
pub const PAGE: u64 = 0x1000;

/// A feature of the device's own.
pub const FEATURE: Features = Features::from_bits_retain(1 << 5);

/// What the first byte of a request asks for; any other byte: give the request back.
pub mod ask {
    /// Keep the request until the ring is stopped.
    pub const HOLD: u8 = b'H';
    /// Keep the request for ever.
    pub const CLING: u8 = b'K';
    /// Panic.
    pub const PANIC: u8 = b'P';
    /// Fail the worker.
    pub const FAIL: u8 = b'F';
    /// Change the configuration space: its first byte becomes the second of the request.
    pub const CONFIGURE: u8 = b'C';
    /// Keep the request until the ring is stopped, and change the configuration space then.
    pub const CONFIGURE_LATE: u8 = b'D';
    /// How many requests since the reset? One byte.
    pub const COUNT: u8 = b'N';
    /// Have so many MiB (second byte) of state.
    pub const GROW: u8 = b'G';
    /// Export an object: sixteen times the second byte.
    pub const EXPORT: u8 = b'E';
    /// Withdraw it.
    pub const WITHDRAW: u8 = b'W';
    /// Map: region, offset, length and offset in the file (in pages), whether the driver may write. Answered with what
    /// became of it.
    pub const MAP: u8 = b'M';
    /// Unmap: region, offset, length.
    pub const UNMAP: u8 = b'U';
    /// Look up an object: sixteen times the second byte. Answered with what is in its file.
    pub const LOOK_UP: u8 = b'L';
    /// Wait this many milliseconds (second byte), which no real device may do.
    pub const BLOCK: u8 = b'B';
}

pub struct Echo {
    config: Arc<ConfigSpace>,
    queues: u16,
    lanes: u16,
    savable: bool,
    /// A number that only control clients care about.
    volume: u64,
    requests: HostRequests,
    regions: Vec<ShmRegion>,
    /// What there is to map.
    file: Arc<File>,
    /// What the host asked for, as text.
    pub heard: Arc<Mutex<Vec<String>>>,
}

impl Echo {
    /// A device of one queue, with this many bytes of configuration space.
    pub fn new(config: usize) -> Echo {
        Echo {
            config: Arc::new(ConfigSpace::new((0..config).map(|i| i as u8).collect())),
            queues: 1,
            lanes: 1,
            savable: false,
            volume: 5,
            requests: HostRequests::empty(),
            regions: Vec::new(),
            file: Arc::new(File::from(memfd_create("echo", MemfdFlags::CLOEXEC).unwrap())),
            heard: Arc::default(),
        }
    }

    /// With its count of requests as a state that can be saved.
    pub fn savable(self) -> Echo {
        Echo { savable: true, ..self }
    }

    /// With these shared memory regions, and this file to map.
    pub fn shared_memory(self, regions: &[ShmRegion], file: Arc<File>) -> Echo {
        Echo { regions: regions.to_vec(), file, ..self }
    }

    /// That knows these requests of the host, and writes them down.
    pub fn host_requests(self, requests: HostRequests, heard: Arc<Mutex<Vec<String>>>) -> Echo {
        Echo { requests, heard, ..self }
    }

    fn device_request(&mut self, request: HostRequest) -> Result<HostReply, HostError> {
        let mut heard = self.heard.lock().unwrap();
        match request {
            HostRequest::Announce(mac) => heard.push(format!("announce {mac:x?}")),
            HostRequest::NetMtu(mtu) if mtu < 68 => return Err(HostError::Refused("too small".into())),
            HostRequest::NetMtu(mtu) => heard.push(format!("mtu {mtu}")),
            HostRequest::GpuSocket(socket) => {
                rustix::io::write(&socket, b"display")
                    .map_err(|error| HostError::Failed(std::io::Error::from(error).into()))?;
                heard.push("gpu".into());
            }
            HostRequest::CreateCryptoSession(description) if description[0] == 0 => {
                return Err(HostError::Refused("no such operation".into()));
            }
            HostRequest::CreateCryptoSession(description) => {
                heard.push(format!("session of {} bytes", description.len()));
                return Ok(HostReply::CryptoSession(7));
            }
            HostRequest::CloseCryptoSession(id) => heard.push(format!("close {id}")),
            HostRequest::SharedObject(id) if id == [1; 16] => {
                let (reader, mut writer) = std::io::pipe().unwrap();
                std::io::Write::write_all(&mut writer, b"object").unwrap();
                return Ok(HostReply::File(HostFile(reader.into())));
            }
            HostRequest::SharedObject(_) => return Err(HostError::Refused("no such object".into())),
            _ => return Err(HostError::Unsupported),
        }
        Ok(HostReply::Done)
    }

    /// With more queues and lanes.
    pub fn queues(self, queues: u16, lanes: u16) -> Echo {
        Echo { queues, lanes, ..self }
    }
}

impl VirtioDevice for Echo {
    type Worker = EchoWorker;

    fn device_type(&self) -> DeviceType {
        DeviceType(63)
    }

    fn features(&self) -> Features {
        FEATURE
    }

    fn queues(&self, _features: Features) -> Vec<QueueSpec> {
        (0..self.queues).map(|i| QueueSpec { name: "echo", max_size: 256, lane: i % self.lanes }).collect()
    }

    fn config(&self) -> Arc<ConfigSpace> {
        self.config.clone()
    }

    /// Byte 0 is the driver's to change, the others only a migration's.
    fn write_config(&mut self, offset: u32, data: &[u8], by: ConfigWriter) {
        let allowed = if by == ConfigWriter::Migration { data } else { &data[..data.len().min(1)] };
        if by == ConfigWriter::Migration || offset == 0 {
            let _ = self.config.set(offset, allowed);
        }
    }

    fn workers(&mut self, _mail: &[Mail<()>]) -> Result<Vec<EchoWorker>, DeviceError> {
        let worker = || EchoWorker {
            config: self.config.clone(),
            held: Vec::new(),
            clung: Vec::new(),
            waiting: BTreeMap::new(),
            file: self.file.clone(),
            late: None,
            count: 0,
            padding: 0,
        };
        Ok((0..self.lanes).map(|_| worker()).collect())
    }

    fn shared_memory(&self) -> &[ShmRegion] {
        &self.regions
    }

    fn host_requests(&self) -> HostRequests {
        self.requests
    }

    fn controls(&self) -> Controls {
        let by = Argument { name: "by".into(), kind: Kind::ANY_U64, required: true, help: "how much".into() };
        Controls {
            properties: vec![
                Property::settable("volume", Kind::U64 { min: 0, max: 11 }, "loudness"),
                Property::read_only("model", Kind::Text { max: 16 }, "what it is"),
            ],
            commands: vec![
                ControlCommand { name: "louder".into(), arguments: vec![by], help: "adds to volume".into() },
                ControlCommand { name: "panic".into(), arguments: vec![], help: "panics".into() },
            ],
        }
    }

    fn host_request(&mut self, request: HostRequest) -> Result<HostReply, HostError> {
        let request = match request {
            HostRequest::Control(request) => request,
            other => return self.device_request(other),
        };
        match request {
            ControlRequest::Get(name) if name == "volume" => Ok(HostReply::Value(Value::U64(self.volume))),
            ControlRequest::Get(_) => Ok(HostReply::Value(Value::Text("echo".into()))),
            ControlRequest::Set(_, Value::U64(volume)) => {
                self.volume = volume;
                Ok(HostReply::Done)
            }
            ControlRequest::Run(name, _) if name == "panic" => panic!("asked to panic"),
            ControlRequest::Run(_, arguments) => {
                let louder = self.volume.saturating_add(arguments.u64("by").unwrap_or(0));
                if louder > 11 {
                    return Err(HostError::Refused("it goes to eleven".into()));
                }
                self.volume = louder;
                Ok(HostReply::Value(Value::U64(louder)))
            }
            _ => Err(HostError::Unsupported),
        }
    }

    fn save(&self, workers: &[EchoWorker]) -> Result<DeviceState, StateError> {
        if !self.savable {
            return Err(StateError::Unsupported);
        }
        // As large as a state may be, if it is asked to be.
        let padding = vec![0x5a_u8; workers.iter().map(|worker| worker.padding).sum()];
        let counts: Vec<u8> = workers.iter().map(|worker| worker.count).collect();
        DeviceState::encode(1, &(counts, padding))
    }

    fn restore(&mut self, workers: &mut [EchoWorker], state: &DeviceState) -> Result<(), StateError> {
        let (counts, _padding): (Vec<u8>, Vec<u8>) = state.decode(1)?;
        if counts.len() != workers.len() {
            return Err(StateError::refused("another number of lanes"));
        }
        workers.iter_mut().zip(counts).for_each(|(worker, count)| worker.count = count);
        Ok(())
    }

    fn reset(&mut self, workers: &mut [EchoWorker]) {
        for worker in workers {
            worker.held.clear();
            worker.clung.clear();
            worker.waiting.clear();
            worker.count = 0;
        }
    }
}

pub struct EchoWorker {
    config: Arc<ConfigSpace>,
    held: Vec<(u16, Chain)>,
    clung: Vec<Chain>,
    /// For the host.
    waiting: BTreeMap<UpcallId, (u16, Chain)>,
    file: Arc<File>,
    /// What the first byte of the configuration space becomes when a ring is stopped.
    late: Option<u8>,
    count: u8,
    padding: usize,
}

fn answer(queue: &mut Queue, chain: Chain, answer: &[u8]) {
    let written = {
        let mut writer = queue.writer(&chain);
        writer.write(answer);
        writer.written()
    };
    queue.add_used(chain, written);
}

impl EchoWorker {
    fn ask_host(&self, request: &[u8], up: &Upcall) -> Result<UpcallId, UpcallError> {
        let range = |region: u8, offset: u8, len: u8| ShmRange {
            region,
            offset: u64::from(offset) * PAGE,
            len: u64::from(len) * PAGE,
        };
        match *request {
            [ask::MAP, region, offset, len, from, writable, ..] => {
                let file = self.file.try_clone().unwrap().into();
                up.map(range(region, offset, len), file, u64::from(from) * PAGE, writable != 0)
            }
            [ask::UNMAP, region, offset, len, ..] => up.unmap(range(region, offset, len)),
            [_, n, ..] => up.look_up([n; 16]),
            _ => Err(UpcallError::Unsupported),
        }
    }
}

impl Worker for EchoWorker {
    type Msg = ();

    fn queue_ready(&mut self, number: u16, lane: &mut Lane<'_>) -> Result<(), DeviceError> {
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        while let Some(chain) = queue.pop() {
            self.count = self.count.wrapping_add(1);
            let mut request = vec![0; 4096];
            let n = queue.reader(&chain).read(&mut request);
            queue.note_read(n as u64);
            request.truncate(n);
            match *request.as_slice() {
                [ask::HOLD, ..] => self.held.push((number, chain)),
                [ask::CONFIGURE_LATE, value, ..] => {
                    self.late = Some(value);
                    self.held.push((number, chain));
                }
                [ask::CLING, ..] => self.clung.push(chain),
                [ask::PANIC, ..] => panic!("asked to panic"),
                [ask::FAIL, ..] => return Err(DeviceError::new("asked to fail")),
                [ask::CONFIGURE, value, ..] => {
                    let _ = self.config.set(0, &[value]);
                    lane.up.config_changed();
                    answer(queue, chain, &request);
                }
                [ask::GROW, mebibytes, ..] => {
                    self.padding = usize::from(mebibytes) << 20;
                    answer(queue, chain, &request);
                }
                [ask::EXPORT, n, ..] => {
                    lane.up.export([n; 16]);
                    answer(queue, chain, &request);
                }
                [ask::WITHDRAW, n, ..] => {
                    lane.up.withdraw([n; 16]);
                    answer(queue, chain, &request);
                }
                [ask::MAP | ask::UNMAP | ask::LOOK_UP, ..] => match self.ask_host(&request, lane.up) {
                    Ok(id) => drop(self.waiting.insert(id, (number, chain))),
                    Err(error) => answer(queue, chain, error.to_string().as_bytes()),
                },
                [ask::COUNT, ..] => answer(queue, chain, &[self.count]),
                [ask::BLOCK, milliseconds, ..] => {
                    std::thread::sleep(std::time::Duration::from_millis(milliseconds.into()));
                    answer(queue, chain, &request);
                }
                _ => answer(queue, chain, &request),
            }
        }
        Ok(())
    }

    fn upcall_done(
        &mut self,
        id: UpcallId,
        result: UpcallResult,
        lane: &mut Lane<'_>,
    ) -> Result<(), DeviceError> {
        let Some((number, chain)) = self.waiting.remove(&id) else { return Ok(()) };
        let Some(queue) = lane.queues.get(number) else { return Ok(()) };
        let text = match result {
            Ok(UpcallReply::File(file)) => {
                let mut text = vec![0; 64];
                let len = File::from(file).read_at(&mut text, 0).unwrap();
                text.truncate(len);
                text
            }
            Ok(_) => b"done".to_vec(),
            // The driver takes its buffer back by itself.
            Err(UpcallError::Reset) => return Ok(()),
            Err(error) => error.to_string().into_bytes(),
        };
        answer(queue, chain, &text);
        Ok(())
    }

    fn queue_stop(&mut self, number: u16, _how: Stop, lane: &mut Lane<'_>) {
        let Some(queue) = lane.queues.get(number) else { return };
        let (done, kept) = std::mem::take(&mut self.held).into_iter().partition(|(of, _)| *of == number);
        self.held = kept;
        let done: Vec<(u16, Chain)> = done;
        for (_, chain) in done {
            answer(queue, chain, b"held");
        }
        if let Some(value) = self.late.take() {
            let _ = self.config.set(0, &[value]);
            lane.up.config_changed();
        }
    }
}
