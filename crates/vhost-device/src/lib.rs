//! Hosts any virtio device as a vhost-user daemon.
