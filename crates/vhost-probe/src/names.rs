//! Names of feature bits and configuration fields, from virtio 1.4, section 5. vhost-user does not tell the type of a
//! device, so whoever asks names it.
use vhost_user::{F_LOG_ALL, F_PROTOCOL_FEATURES, ProtocolFeatures};
use vm_virtio::Features;

/// A device type, as far as the probe has names for it.
#[derive(Debug)]
pub(crate) struct Device {
    /// Its names on the command line.
    pub(crate) names: &'static [&'static str],
    /// Its own feature bits.
    features: &'static [(u32, &'static str)],
    /// Its configuration space: name and size in bytes of each field, in order, nothing between them.
    pub(crate) config: &'static [(&'static str, usize)],
}

const DEVICES: &[Device] = &[
    Device {
        names: &["net"],
        features: &[
            (0, "csum"),
            (1, "guest_csum"),
            (2, "ctrl_guest_offloads"),
            (3, "mtu"),
            (5, "mac"),
            (7, "guest_tso4"),
            (8, "guest_tso6"),
            (9, "guest_ecn"),
            (10, "guest_ufo"),
            (11, "host_tso4"),
            (12, "host_tso6"),
            (13, "host_ecn"),
            (14, "host_ufo"),
            (15, "mrg_rxbuf"),
            (16, "status"),
            (17, "ctrl_vq"),
            (18, "ctrl_rx"),
            (19, "ctrl_vlan"),
            (21, "guest_announce"),
            (22, "mq"),
            (23, "ctrl_mac_addr"),
            (53, "vq_notf_coal"),
            (54, "guest_uso4"),
            (55, "guest_uso6"),
            (56, "host_uso"),
            (57, "hash_report"),
            (59, "guest_hdrlen"),
            (60, "rss"),
            (61, "rsc_ext"),
            (62, "standby"),
            (63, "speed_duplex"),
        ],
        config: &[
            ("mac", 6),
            ("status", 2),
            ("max_virtqueue_pairs", 2),
            ("mtu", 2),
            ("speed", 4),
            ("duplex", 1),
            ("rss_max_key_size", 1),
            ("rss_max_indirection_table_length", 2),
            ("supported_hash_types", 4),
        ],
    },
    Device {
        names: &["blk", "block"],
        features: &[
            (1, "size_max"),
            (2, "seg_max"),
            (4, "geometry"),
            (5, "ro"),
            (6, "blk_size"),
            (9, "flush"),
            (10, "topology"),
            (11, "config_wce"),
            (12, "mq"),
            (13, "discard"),
            (14, "write_zeroes"),
            (15, "lifetime"),
            (16, "secure_erase"),
            (17, "zoned"),
        ],
        config: &[
            ("capacity", 8),
            ("size_max", 4),
            ("seg_max", 4),
            ("cylinders", 2),
            ("heads", 1),
            ("sectors", 1),
            ("blk_size", 4),
            ("physical_block_exp", 1),
            ("alignment_offset", 1),
            ("min_io_size", 2),
            ("opt_io_size", 4),
            ("writeback", 1),
            ("unused0", 1),
            ("num_queues", 2),
            ("max_discard_sectors", 4),
            ("max_discard_seg", 4),
            ("discard_sector_alignment", 4),
            ("max_write_zeroes_sectors", 4),
            ("max_write_zeroes_seg", 4),
            ("write_zeroes_may_unmap", 1),
            ("unused1", 3),
            ("max_secure_erase_sectors", 4),
            ("max_secure_erase_seg", 4),
            ("secure_erase_sector_alignment", 4),
            ("zone_sectors", 4),
            ("max_open_zones", 4),
            ("max_active_zones", 4),
            ("max_append_sectors", 4),
            ("write_granularity", 4),
            ("model", 1),
            ("unused2", 3),
        ],
    },
    Device {
        names: &["console"],
        features: &[(0, "size"), (1, "multiport"), (2, "emerg_write")],
        config: &[("cols", 2), ("rows", 2), ("max_nr_ports", 4), ("emerg_wr", 4)],
    },
    Device { names: &["rng", "entropy"], features: &[], config: &[] },
    Device {
        names: &["scsi"],
        features: &[(0, "inout"), (1, "hotplug"), (2, "change"), (3, "t10_pi")],
        config: &[
            ("num_queues", 4),
            ("seg_max", 4),
            ("max_sectors", 4),
            ("cmd_per_lun", 4),
            ("event_info_size", 4),
            ("sense_size", 4),
            ("cdb_size", 4),
            ("max_channel", 2),
            ("max_target", 2),
            ("max_lun", 4),
        ],
    },
    Device {
        names: &["gpu"],
        features: &[
            (0, "virgl"),
            (1, "edid"),
            (2, "resource_uuid"),
            (3, "resource_blob"),
            (4, "context_init"),
        ],
        config: &[("events_read", 4), ("events_clear", 4), ("num_scanouts", 4), ("num_capsets", 4)],
    },
    Device { names: &["vsock"], features: &[(0, "stream"), (1, "seqpacket")], config: &[("guest_cid", 8)] },
    Device {
        names: &["fs"],
        features: &[(0, "notification")],
        config: &[("tag", 36), ("num_request_queues", 4), ("notify_buf_size", 4)],
    },
    Device {
        names: &["sound", "snd"],
        features: &[(0, "ctls")],
        config: &[("jacks", 4), ("streams", 4), ("chmaps", 4), ("controls", 4)],
    },
    Device { names: &["i2c"], features: &[(0, "zero_length_request")], config: &[] },
    Device {
        names: &["gpio"],
        features: &[(0, "irq")],
        config: &[("ngpio", 2), ("padding", 2), ("gpio_names_size", 4)],
    },
];

/// The device type of that name.
pub(crate) fn device(name: &str) -> Result<&'static Device, String> {
    DEVICES.iter().find(|device| device.names.contains(&name)).ok_or_else(|| {
        let known: Vec<&str> = DEVICES.iter().filter_map(|device| device.names.first()).copied().collect();
        format!("not one of {}", known.join(", "))
    })
}

/// Feature bits that are not a device's own: virtio's, then those that vhost-user takes for itself.
fn common(bit: u32) -> Option<String> {
    let own = [(F_LOG_ALL, "log_all (vhost)"), (F_PROTOCOL_FEATURES, "protocol_features (vhost-user)")];
    if let Some((_, name)) = own.iter().find(|(mask, _)| *mask == 1 << bit) {
        return Some((*name).to_owned());
    }
    let known = Features::from_bits_retain(1 << bit);
    known.iter_names().next().map(|(name, _)| name.to_lowercase())
}

/// The name of a virtio feature bit, if it has one.
pub(crate) fn feature(bit: u32, device: Option<&Device>) -> Option<String> {
    let own = device.and_then(|device| device.features.iter().find(|(own, _)| *own == bit));
    // 41 is ADMIN_VQ and also a device's own (2.2).
    own.map(|(_, name)| (*name).to_owned()).or_else(|| common(bit))
}

/// The name of a protocol feature bit, if it has one.
pub(crate) fn protocol_feature(bit: u32) -> Option<String> {
    let known = ProtocolFeatures::from_bits_retain(1 << bit);
    known.iter_names().next().map(|(name, _)| name.to_lowercase())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_have_names() {
        assert_eq!(feature(32, None).as_deref(), Some("version_1"));
        assert_eq!(feature(30, None).as_deref(), Some("protocol_features (vhost-user)"));
        assert_eq!(feature(9, None), None);
        assert_eq!(feature(9, device("blk").ok()).as_deref(), Some("flush"));
        assert_eq!(protocol_feature(3).as_deref(), Some("reply_ack"));
        assert_eq!(protocol_feature(63), None);
    }

    #[test]
    fn fields_add_up_to_the_structures_of_the_standard() {
        let size = |name: &str| device(name).map(|d| d.config.iter().map(|(_, size)| size).sum::<usize>());
        assert_eq!(size("blk"), Ok(96));
        assert_eq!(size("net"), Ok(24));
        assert_eq!(size("scsi"), Ok(36));
        assert_eq!(size("fs"), Ok(44));
    }
}
