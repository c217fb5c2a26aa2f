//! The virtio entropy device (type 4).
