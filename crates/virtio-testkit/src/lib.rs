//! The driver side of virtio for tests: split and packed rings in memory and over vhost-user.
