//! Saving the registers with their device, and restoring them: what comes back is not to be trusted.
use super::{Phase, QueueRegisters, Registers, Slot};
use crate::device::VirtioDevice;
use crate::lane::StartError;
use crate::{DeviceType, Features, QueueConfig, SavedQueue, SnapshotError, Status};
use device_state::{SavedState, Section, StateError, Tag};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// The part of a saved transport that is its engine.
const ENGINE: Tag = Tag(*b"devi");
/// The part that all transports have.
const REGISTERS: Tag = Tag(*b"regs");
/// The part of one transport.
const OWN: Tag = Tag(*b"tran");

/// How long saving and restoring wait for lanes: longer than any of their own deadlines.
const SNAPSHOT_PATIENCE: Duration = Duration::from_secs(20);

/// A transport is not saved or restored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum TransportError {
    /// The device is not.
    #[error(transparent)]
    Device(#[from] SnapshotError),
    /// The state is none, or none for this transport.
    #[error(transparent)]
    State(#[from] StateError),
    /// A restored queue does not start.
    #[error("a queue of the state cannot start")]
    Queue(#[from] StartError),
    /// A queue is being stopped or reset: try again when it is over.
    #[error("a queue is being stopped")]
    Busy,
    /// A lane does not answer.
    #[error("a lane does not answer")]
    Silent,
}

/// Version 1 of the part that all transports have.
#[derive(Serialize, Deserialize)]
struct RegistersV1 {
    driver: u128,
    beyond: bool,
    /// Those of queues that run are the engine's.
    queues: Vec<QueueRegisters>,
}

impl<D: VirtioDevice> Registers<D> {
    /// Saves device and registers, and what the transport has beside them. The device has to be at rest:
    /// [`Engine::suspend`].
    pub(in crate::transport) fn save<T: Serialize>(
        &self,
        version: u16,
        own: &T,
    ) -> Result<Vec<u8>, TransportError> {
        let engine = self.engine.save().wait_for(SNAPSHOT_PATIENCE).ok_or(TransportError::Silent)??;
        let mut state = self.lock();
        state.queues.iter_mut().for_each(Slot::poll);
        if self.engine.is_resetting() || state.queues.iter().any(|slot| !slot.is_off() && !slot.is_on()) {
            return Err(TransportError::Busy);
        }
        let registers = RegistersV1 {
            driver: state.driver.bits(),
            beyond: state.beyond,
            queues: state.queues.iter().map(Slot::registers).collect(),
        };
        drop(state);
        let mut saved = SavedState::new(self.engine.device_type().0);
        saved.put(ENGINE, Section::from_bytes(1, engine));
        saved.put(REGISTERS, Section::encode(1, &registers)?);
        saved.put(OWN, Section::encode(version, own)?);
        Ok(saved.to_bytes()?)
    }

    /// Takes over what [`Registers::save`] returned, from outside and not to be trusted; memory is there. `install` takes the
    /// transport's own part, before anything runs that could interrupt. An error leaves a reset device.
    pub(in crate::transport) fn restore<T: DeserializeOwned>(
        &self,
        bytes: &[u8],
        version: u16,
        install: impl FnOnce(T) -> Result<(), TransportError>,
    ) -> Result<(), TransportError> {
        let mut saved = SavedState::parse(bytes)?;
        if saved.device() != self.engine.device_type().0 {
            return Err(SnapshotError::DeviceType(DeviceType(saved.device())).into());
        }
        let engine = saved.take(ENGINE)?;
        let registers: RegistersV1 = saved.take(REGISTERS)?.decode(1)?;
        let own: T = saved.take(OWN)?.decode(version)?;
        saved.finish()?;
        if registers.queues.len() != self.engine.queues().len() {
            return Err(StateError::refused("it has another number of queues").into());
        }
        if self.engine.is_resetting() || !self.engine.status().is_empty() {
            return Err(SnapshotError::NotReset.into());
        }
        let outcome = install(own).and_then(|()| {
            let queues = self.engine.restore(engine.bytes()).wait_for(SNAPSHOT_PATIENCE);
            self.take_over(registers, queues.ok_or(TransportError::Silent)??)
        });
        if outcome.is_err() {
            self.reset();
        }
        outcome
    }

    fn take_over(&self, registers: RegistersV1, queues: Vec<SavedQueue>) -> Result<(), TransportError> {
        let mut state = self.lock();
        let features = self.engine.driver_features();
        let fixed = self.engine.status().contains(Status::FEATURES_OK);
        state.driver = if fixed { features } else { Features::from_bits_retain(registers.driver) };
        state.beyond = registers.beyond && !fixed;
        self.carries_data.store(features.contains(Features::NOTIFICATION_DATA), Ordering::SeqCst);
        for (slot, registers) in state.queues.iter_mut().zip(registers.queues) {
            slot.clear();
            slot.set_registers(registers);
        }
        for SavedQueue { index, enabled, config, state: at } in queues {
            // A driver has no other way to disable one than to stop it.
            let slot = state.queues.get_mut(usize::from(index)).filter(|_| enabled);
            let slot = slot.ok_or(SnapshotError::Queue(index))?;
            let QueueConfig { size, desc, driver, device } = config;
            slot.set_registers(QueueRegisters {
                size: u32::from(size),
                desc: desc.0,
                driver: driver.0,
                device: device.0,
            });
            let mut started = self.start(index, config, Some(at)).map_err(StartError::Kick)?;
            started.wait_for(SNAPSHOT_PATIENCE).ok_or(TransportError::Silent)??;
            drop(self.engine.enable(index, true));
            slot.set_phase(Phase::On);
        }
        Ok(())
    }
}
