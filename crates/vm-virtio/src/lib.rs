//! Virtqueues, guest memory, device traits and the engine that runs virtio devices.
