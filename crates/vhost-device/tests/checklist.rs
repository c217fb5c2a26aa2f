//! Where each line of the vhost-user contract is proved: its checklist, its messages, ring states and in-flight buffer, and
//! what front-ends that mean no good may try. The tests are looked up in the sources, so that the list cannot go stale.
use std::fs;
use std::path::Path;

/// A line, and the files and tests that fail if it does not hold. Paths begin at the workspace.
type Line = (&'static str, &'static [(&'static str, &'static [&'static str])]);

const WIRE: &str = "crates/vhost-user/tests";
const HOST: &str = "crates/vhost-device/tests";
const QUEUE: &str = "crates/vm-virtio/src/queue/tests";

const CHECKLIST: &[Line] = &[
    (
        "GET/SET_PROTOCOL_FEATURES usable before SET_FEATURES; offer MQ; bits consistent (14 needs 5+3; 20 needs 12)",
        &[
            (
                "{HOST}/contract.rs",
                &[
                    "protocol_features_come_before_features_and_are_exactly_those_implemented",
                    "protocol_features_that_were_not_offered_are_refused",
                ],
            ),
            ("{HOST}/in_band.rs", &["the_feature_without_those_that_it_needs_ends_the_connection"]),
            (
                "crates/vhost-user/src/features.rs",
                &["dependent_features_are_found_when_their_base_is_missing"],
            ),
            ("crates/vhost-device/src/session/negotiation.rs", &["exactly_what_is_implemented_is_offered"]),
        ],
    ),
    (
        "REPLY_ACK: every message with need_reply gets a u64, except those that have their own reply",
        &[
            (
                "{WIRE}/golden.rs",
                &[
                    "reply_ack_every_message_with_need_reply_gets_exactly_one_reply",
                    "without_reply_ack_need_reply_brings_no_acknowledgement",
                ],
            ),
            (
                "{HOST}/contract.rs",
                &["every_message_is_acknowledged_once_if_asked_and_own_replies_are_not_doubled"],
            ),
        ],
    ),
    (
        "SET_FEATURES without bit 30: all rings enabled immediately",
        &[(
            "{HOST}/contract.rs",
            &[
                "without_bit_30_rings_are_enabled_at_once",
                "set_features_without_bit_30_enables_running_rings_at_once",
            ],
        )],
    ),
    (
        "Start on SET_VRING_KICK, do not wait for a first kick; scan the ring at start and at enable",
        &[
            (
                "{HOST}/contract.rs",
                &[
                    "a_ring_starts_with_its_kick_file_and_is_looked_at_without_a_kick",
                    "with_bit_30_a_ring_waits_until_it_is_enabled_and_is_looked_at_then",
                    "a_ring_without_a_kick_file_is_polled",
                ],
            ),
            ("{HOST}/in_band.rs", &["vring_kick_starts_a_ring_and_what_is_in_it_is_served"]),
            // The front-end's part: a kick for back-ends that wait for one.
            ("devices/vhost-proxy/tests/serving.rs", &["front_end_kicks_after_set_vring_kick"]),
        ],
    ),
    (
        "Changing call, err, addr, log and memory while running; rings translated again after a change of memory",
        &[
            (
                "{HOST}/contract.rs",
                &[
                    "call_kick_and_error_files_change_while_a_ring_runs",
                    "ring_addresses_may_be_set_again_while_the_ring_runs",
                    "memory_changes_while_rings_run",
                ],
            ),
            (
                "{HOST}/dirty_log.rs",
                &[
                    "dirty_pages_are_marked_while_log_all_is_set_and_there_is_a_log",
                    "dirty_rings_are_marked_at_log_guest_addr_while_the_flag_is_set",
                ],
            ),
        ],
    ),
    (
        "GET_VRING_BASE: complete what is in flight, reply after the last used update; stopped until a new kick",
        &[(
            "{HOST}/contract.rs",
            &[
                "get_vring_base_finishes_what_is_in_flight_and_stops_the_ring",
                "a_stopped_ring_goes_on_without_a_new_base",
            ],
        )],
    ),
    (
        "SET_VRING_BASE split: the used index is read from guest memory",
        &[("{HOST}/contract.rs", &["set_vring_base_of_a_split_ring_reads_the_used_index_from_guest_memory"])],
    ),
    (
        "GET_CONFIG reply size equals request; SET_CONFIG flags obeyed; CONFIG_CHANGE on change",
        &[(
            "{HOST}/contract.rs",
            &[
                "get_config_has_the_asked_size_and_zeros_behind_the_end",
                "set_config_obeys_its_flags",
                "config_is_neither_offered_nor_served_without_a_configuration_space",
                "a_change_of_the_configuration_space_is_told_but_not_while_suspended",
            ],
        )],
    ),
    (
        "SET_MEM_TABLE replaces; no overlaps; lengths, number of descriptors, index, size checked; strays closed",
        &[
            (
                "{HOST}/contract.rs",
                &[
                    "overlapping_or_unmappable_regions_are_refused_and_the_old_table_holds",
                    "a_ring_of_another_number_or_size_is_refused",
                ],
            ),
            (
                "{WIRE}/hostile.rs",
                &[
                    "wrong_size_by_one_is_refused_and_the_next_message_is_understood",
                    "missing_and_superfluous_descriptors_are_refused_and_closed",
                    "descriptors_in_the_middle_of_a_message_are_refused_and_closed",
                    "claims_and_values_out_of_range_are_refused",
                ],
            ),
        ],
    ),
    (
        "REM_MEM_REG: no fd needed, close one if given; unmap",
        &[
            ("{HOST}/contract.rs", &["a_descriptor_with_rem_mem_reg_is_tolerated"]),
            ("{WIRE}/hostile.rs", &["rem_mem_reg_closes_a_descriptor_without_using_it"]),
            ("crates/vhost-device/src/memory.rs", &["a_region_is_removed_by_addresses_and_size"]),
        ],
    ),
    (
        "RESET_DEVICE: rings disabled, state cleared; SET_STATUS(0) as well",
        &[(
            "{HOST}/contract.rs",
            &[
                "reset_device_and_status_0_reset",
                "reset_device_and_status_0_disable_all_rings_and_keep_the_owner",
            ],
        )],
    ),
    (
        "Suspended: no writes, no notifications, no messages, but answers",
        &[
            ("{HOST}/contract.rs", &["suspended_devices_write_nothing_and_tell_nothing_but_answer"]),
            ("{HOST}/in_band.rs", &["a_ring_that_stops_tells_all_and_then_nothing"]),
            ("{HOST}/iommu.rs", &["iommu_suspended_devices_ask_for_nothing"]),
        ],
    ),
    (
        "STATUS: what was set, minus refused FEATURES_OK, plus NEEDS_RESET",
        &[(
            "{HOST}/contract.rs",
            &[
                "the_status_is_what_was_set_and_rings_wait_for_a_drivers_driver_ok",
                "features_that_the_device_cannot_accept_leave_features_ok_clear",
                "a_broken_ring_signals_its_error_file_and_needs_reset_and_the_others_go_on",
            ],
        )],
    ),
    (
        "LOG: every page written, rings at log_guest_addr, pages of 4096, atomically, offset and size, LOG_FD",
        &[
            (
                "{HOST}/dirty_log.rs",
                &[
                    "dirty_pages_are_marked_while_log_all_is_set_and_there_is_a_log",
                    "dirty_rings_are_marked_at_log_guest_addr_while_the_flag_is_set",
                    "peers_vhost_crate_memory_added_after_set_log_base_is_logged",
                    "dirty_log_is_told_of_through_its_file_and_has_an_end",
                ],
            ),
            (
                "crates/vm-virtio/src/memory/dirty_log.rs",
                &[
                    "a_bit_stands_for_a_page_and_the_lowest_comes_first",
                    "marks_of_others_in_the_same_byte_are_not_lost",
                ],
            ),
        ],
    ),
    (
        "IOMMU: only translated ranges; misses sent; invalidations at once; IOTLB_MSG answered",
        &[(
            "{HOST}/iommu.rs",
            &[
                "iommu_rings_and_buffers_are_asked_for_and_then_known",
                "iommu_nothing_is_touched_after_an_invalidation_was_acknowledged",
                "iommu_access_that_is_not_allowed_breaks_the_ring_and_is_reported",
                "iommu_every_message_is_answered_asked_for_or_not",
            ],
        )],
    ),
    (
        "DEVICE_STATE: save and load to the end, CHECK answers, never error and fd, only while suspended",
        &[
            (
                "{HOST}/device_state.rs",
                &[
                    "requests_go_on_on_another_daemon_where_they_were_in_both_layouts",
                    "a_running_device_is_neither_saved_nor_loaded",
                    "policy_8_cut_and_damaged_streams_are_refused_and_the_device_is_as_new",
                ],
            ),
            ("{WIRE}/hostile.rs", &["a_status_reply_is_sent_without_being_asked_for"]),
            // The front-end's part.
            ("devices/vhost-proxy/src/transfer.rs", &["either_sides_channel_is_used"]),
        ],
    ),
    (
        "Errors on a ring: eight bytes to the error file, that ring stops, no exit",
        &[(
            "{HOST}/contract.rs",
            &[
                "files_of_a_ring_may_be_pipes_and_events_have_eight_bytes",
                "a_broken_ring_signals_its_error_file_and_needs_reset_and_the_others_go_on",
                "a_ring_that_cannot_be_is_refused_and_signals_its_error_file",
            ],
        )],
    ),
    (
        "Program conventions",
        &[
            (
                "{HOST}/process.rs",
                &[
                    "a_senseless_command_line_is_refused_with_code_2_a_reason_and_no_socket",
                    "capabilities_are_printed_whatever_else_is_said",
                    "peers_all_daemons_sigterm_and_sigint_finish_requests_and_leave_no_socket",
                    "peers_all_daemons_a_connected_socket_is_served_to_its_end",
                ],
            ),
            ("devices/block/tests/wire_usage.rs", &["qemu_back_end_conventions_blk_file_and_read_only"]),
            ("tests/tests/documents.rs", &["qemu_back_end_conventions_each_daemon_has_its_description_file"]),
        ],
    ),
];

const MESSAGES: &[Line] = &[
    (
        "Each message of either side, byte for byte, at both endpoints; and with another implementation",
        &[
            (
                "{WIRE}/golden.rs",
                &[
                    "the_samples_cover_every_request",
                    "back_end_understands_the_documents_bytes",
                    "back_end_answers_with_the_documents_bytes",
                    "front_end_sends_the_documents_bytes_and_understands_the_reply",
                ],
            ),
            (
                "{WIRE}/channel.rs",
                &[
                    "the_samples_cover_every_request",
                    "back_end_sends_the_documents_bytes",
                    "front_end_understands_the_documents_bytes",
                ],
            ),
            (
                "{WIRE}/oracle.rs",
                &[
                    "their_front_end_and_our_back_end",
                    "our_channel_and_their_listener",
                    "our_front_end_and_their_back_end",
                ],
            ),
            ("{WIRE}/xen.rs", &["both_sides_speak_the_documents_bytes"]),
            (
                "{WIRE}/postcopy.rs",
                &[
                    "back_end_answers_with_its_own_addresses_once_asked_for_or_not",
                    "front_end_sends_the_documents_bytes_and_understands_the_reply",
                ],
            ),
        ],
    ),
    (
        "RESET_OWNER ignored; unknown messages survived",
        &[("{HOST}/contract.rs", &["deprecated_and_unknown_messages_do_no_harm"])],
    ),
    (
        "SEND_RARP, NET_SET_MTU, GPU_SET_SOCKET, crypto sessions, GET_SHARED_OBJECT: devices that know them",
        &[(
            "{HOST}/host_requests.rs",
            &[
                "a_device_hears_what_it_knows_and_its_answer_is_the_front_ends",
                "what_a_device_does_not_know_is_neither_offered_nor_passed_on",
                "exported_objects_are_told_to_every_front_end_until_they_are_withdrawn",
            ],
        )],
    ),
    (
        "GET_SHMEM_CONFIG, SHMEM_MAP, SHMEM_UNMAP, SHARED_OBJECT_LOOKUP",
        &[(
            "{HOST}/shared_memory.rs",
            &[
                "virtio_2_10_files_are_mapped_where_the_device_says_until_it_unmaps_them",
                "virtio_2_4_a_reset_answers_what_is_out_and_leaves_nothing_mapped",
                "virtio_2_12_objects_of_other_devices_are_looked_up",
            ],
        )],
    ),
    (
        "VRING_KICK, VRING_CALL, VRING_ERR; files are preferred",
        &[(
            "{HOST}/in_band.rs",
            &[
                "a_device_works_without_any_eventfd",
                "vring_kick_needs_the_feature",
                "a_broken_ring_is_told_by_a_message_and_the_others_go_on",
                "files_are_preferred_to_messages",
            ],
        )],
    ),
    (
        "What needs a feature is not sent by a front-end to a back-end without it; the order is QEMU's",
        &[(
            "devices/vhost-proxy/tests/serving.rs",
            &["front_end_sends_nothing_that_was_not_offered", "front_end_messages_come_in_qemus_order"],
        )],
    ),
];

const IN_FLIGHT: &[Line] = &[
    (
        "GET_INFLIGHT_FD, SET_INFLIGHT_FD: what was in flight is taken again, in order, once",
        &[
            (
                "{HOST}/inflight.rs",
                &[
                    "policy_inflight_requests_outlive_a_daemon_that_is_killed_with_them_outstanding",
                    "policy_inflight_a_busy_daemon_is_killed_at_any_moment",
                    "nothing_is_in_flight_after_a_reset",
                    "buffers_that_do_not_fit_are_refused_and_the_connection_goes_on",
                ],
            ),
            (
                "crates/vhost-device/src/inflight.rs",
                &["a_buffer_has_the_rings_one_after_the_other_and_keeps_its_size"],
            ),
        ],
    ),
    (
        "Killed between any two stores, both layouts",
        &[(
            "{QUEUE}/inflight.rs",
            &[
                "inflight_killed_between_every_two_stores_of_pop_put_and_publish",
                "inflight_agrees_with_the_model_over_many_deaths",
                "inflight_refuses_regions_that_contradict_themselves",
            ],
        )],
    ),
];

const HOSTILE: &[Line] = &[
    (
        "Every message in every state, cut at every byte, with wrong descriptors, sizes and counts",
        &[
            (
                "{HOST}/hostile_states.rs",
                &[
                    "every_message_in_every_state_with_wrong_sizes_and_descriptors",
                    "every_message_in_every_state_cut_at_every_byte",
                    "two_front_ends_at_once",
                ],
            ),
            ("{WIRE}/hostile.rs", &["end_of_file_at_each_byte", "every_byte_may_come_alone"]),
            ("{HOST}/hostile.rs", &["random_messages", "random_bytes", "random_rings"]),
        ],
    ),
    (
        "10 000 connects and disconnects; nothing leaks",
        &[
            ("{HOST}/hostile_leaks.rs", &["ten_thousand_connections_leave_nothing_behind"]),
            ("{WIRE}/leaks.rs", &["no_descriptor_is_leaked_by_good_bad_cut_and_stray_messages"]),
        ],
    ),
    (
        "A memory file that shrinks",
        &[(
            "{HOST}/truncated.rs",
            &[
                "policy_6_buffers_in_a_truncated_file_fail_their_device_only",
                "policy_6_rings_in_a_truncated_file_fail_their_device_only",
            ],
        )],
    ),
    (
        "Control socket: garbage, a million-byte line, a slow reader",
        &[(
            "{HOST}/control.rs",
            &[
                "hostile_control_garbage_is_answered_and_the_connection_lives",
                "hostile_control_a_line_of_a_million_bytes_is_refused",
                "hostile_control_a_client_that_never_reads_slows_nobody",
            ],
        )],
    ),
];

#[test]
fn each_line_has_its_tests() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
    for (line, files) in [CHECKLIST, MESSAGES, IN_FLIGHT, HOSTILE].into_iter().flatten() {
        assert!(!files.is_empty(), "{line}");
        for (file, tests) in *files {
            let mut path = (*file).to_owned();
            for (short, long) in [("{WIRE}", WIRE), ("{HOST}", HOST), ("{QUEUE}", QUEUE)] {
                path = path.replace(short, long);
            }
            let source =
                fs::read_to_string(root.join(&path)).unwrap_or_else(|error| panic!("{path}: {error}"));
            for test in *tests {
                let found = source
                    .split("#[test]")
                    .skip(1)
                    .filter_map(|behind| behind.split_once("fn "))
                    .any(|(_, name)| name.split_once('(').is_some_and(|(name, _)| name == *test));
                assert!(found, "{line}: there is no test {test} in {path}");
            }
        }
    }
}
