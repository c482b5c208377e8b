//! What kinds of processors do otherwise than the bare-metal guests expect, by name and with the reason.

use crate::conformance::Kind;

/// One reason, and the tests that fail for it.
pub struct Exception {
    pub kind: Kind,
    pub why: &'static str,
    pub tests: &'static [&'static str],
}

/// What needs PCIDs throughout.
const PCIDS: &[&str] = &[
    "pcids::a_pcid_that_is_given_to_other_tables_is_flushed_by_its_new_owner",
    "pcids::a_switch_within_a_pcid_flushes_it_unless_told_not_to",
    "pcids::code_that_another_pcid_writes_is_new_in_this_one",
    "pcids::stores_are_seen_by_code_that_another_pcid_has_run_meanwhile",
    "pcids::turning_pcids_off_and_on_drops_them_all",
    "pcids::what_drops_translations_of_another_pcid",
];

pub const EXCEPTIONS: &[Exception] = &[
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG steps once more before the first iteration of a repeated string instruction",
        tests: &["debug::single_step_goes_through_rep_strings_one_iteration_at_a_time"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG leaves the EXT bit of error codes clear",
        tests: &["exceptions::a_benign_exception_that_can_not_be_delivered_becomes_the_second_one"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG raises #GP where a stack access is not canonical, so that the handler has no stack",
        tests: &["exceptions::a_push_to_an_address_that_is_not_canonical_is_a_stack_fault"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG takes the reserved bits of CR0's upper half",
        tests: &["exceptions::control_registers_refuse_what_is_reserved"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG saves the address of the next instruction with the #GP of INT n",
        tests: &["exceptions::int_n_from_user_code_needs_a_gate_of_its_level"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "a nested page fault ends the first exception's delivery, KVM injects it again, and TCG makes no double fault of an \
              exception that an injected one meets",
        tests: &["exceptions::two_contributory_exceptions_make_a_double_fault"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG checks no alignment",
        tests: &["system_calls::sysret_that_sets_ac_has_alignment_checked"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG's SYSRET sets RF and VM where R11 has them",
        tests: &[
            "system_calls::a_breakpoint_where_sysret_leads_is_not_passed_by_rf",
            "system_calls::system_calls_in_a_row_keep_flags_and_mask_those_of_the_kernel",
        ],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG saves RF as set with an injected interrupt",
        tests: &["interrupts::the_saved_flags_of_an_interrupt_are_those_of_the_interrupted_code"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG leaves P clear in the error code of a reserved bit",
        tests: &["paging::a_reserved_bit_is_a_fault_of_its_own"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG runs code that was written right before once more as it was",
        tests: &["paging::code_that_is_written_runs_as_written"],
    },
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG's processor has no PCID and no INVPCID, and so KVM can't give them",
        tests: &["paging::each_pcid_has_its_own_translations", "paging::translations_are_dropped_by_what_drops_them"],
    },
    Exception { kind: Kind::EmulatedAmd, why: "TCG's processor has no PCID", tests: PCIDS },
    // Left to itself it comes to a privileged CS with both L and D, which VMRUN then refuses.
    Exception {
        kind: Kind::EmulatedAmd,
        why: "TCG has SYSENTER in long mode on AMD's processors as well",
        tests: &["privilege::sysenter_and_sysexit_exchange_32_bit_code_and_the_kernel_except_on_amd"],
    },
    // AMD APM volume 2, 11.4.4: FXRSTOR leaves the pointers alone unless an exception is pending, so Linux loads others
    // before it (X86_BUG_FXSAVE_LEAK).
    Exception {
        kind: Kind::EmulatedAmd,
        why: "Linux clears the x87 pointers of AMD's processors when it switches to another task, and the vCPU may lose its own at any time",
        tests: &["x87::the_saved_pointer_names_the_last_instruction_also_if_its_operand_crossed_pages"],
    },
    Exception {
        kind: Kind::Emulating,
        why: "its emulator has no INT3 and INT1, with which these guests end",
        tests: &[
            "debug::a_single_step_trap_follows_a_load_of_ss_only_after_the_next_instruction",
            "debug::an_instruction_breakpoint_behind_a_load_of_ss_does_not_hit",
            "debug::an_instruction_breakpoint_is_a_fault_and_rf_lets_it_pass",
            "debug::data_breakpoints_trap_after_the_access",
            "debug::general_detect_protects_the_debug_registers_once",
            "debug::int1_is_a_trap_that_leaves_dr6_alone",
            "debug::iret_that_sets_tf_steps_from_its_target_on",
            "debug::no_trap_follows_int_n_and_the_handler_does_not_step",
            "debug::single_step_goes_through_rep_strings_one_iteration_at_a_time",
            "debug::single_step_traps_after_each_instruction_from_the_next_one_on",
            "exceptions::a_double_fault_that_can_not_be_delivered_resets_the_machine",
            "exceptions::faults_save_the_rip_of_their_instruction_and_traps_that_of_the_next",
            "interrupts::a_deadline_in_the_past_interrupts_before_the_next_instruction",
            "interrupts::a_halt_in_the_shadow_of_sti_is_ended_by_the_interrupt_that_was_pending",
            "interrupts::a_loop_without_calls_or_exits_is_interrupted",
            "interrupts::a_popf_that_enables_interrupts_takes_a_pending_one_before_the_next_instruction",
            "interrupts::a_self_ipi_waits_for_sti_and_for_the_instruction_after_it",
            "interrupts::an_msi_arrives_at_the_vector_and_processor_it_names",
            "interrupts::each_message_of_a_source_arrives_also_after_it_has_changed",
            "interrupts::flags_that_are_pushed_and_popped_come_back_and_leave_the_others",
            "interrupts::higher_vectors_go_first_and_interrupt_lower_ones",
            "interrupts::hlt_sleeps_until_the_tsc_deadline",
            "interrupts::interrupts_that_are_masked_by_the_task_priority_wait",
            "interrupts::nmis_wait_for_iret_while_one_is_handled",
            "interrupts::the_8259s_output_is_what_lint0_says",
            "paging::a_device_that_changes_the_memory_map_leaves_the_stack_where_it_is",
            "paging::a_page_of_code_and_data_that_is_rewritten_all_the_time_runs_as_written",
            "paging::accessed_and_dirty_bits_are_set_by_what_was_done",
            "paging::code_that_is_written_runs_as_written",
            "paging::devices_are_reached_through_any_instruction",
            "paging::permissions_are_those_of_the_page_and_the_level",
            "paging::translations_are_dropped_by_what_drops_them",
            "paging::without_wp_the_kernel_writes_read_only_pages",
            "processors::a_processor_starts_in_real_mode_and_reaches_long_mode",
            "processors::code_written_by_another_processor_runs_after_a_serializing_instruction",
            "processors::locked_increments_of_two_processors_all_count",
            "processors::stores_of_one_processor_are_seen_in_order_by_the_other",
        ],
    },
    Exception {
        kind: Kind::Emulating,
        why: "its emulator has no STAC, CLAC and RDPKRU",
        tests: &[
            "exceptions::protection_keys_are_read_where_cr4_has_them_and_ecx_is_0",
            "paging::stac_and_clac_leave_the_arithmetic_flags_alone_and_need_smap_to_matter",
            "paging::stac_lets_the_kernel_reach_user_pages_until_clac",
        ],
    },
    Exception {
        kind: Kind::Emulating,
        why: "its emulator has no x87, SSE or AVX arithmetic",
        tests: &[
            "exceptions::avx_is_undefined_without_osxsave_or_its_bit_in_xcr0",
            "exceptions::clts_lets_them_run_again",
            "exceptions::x87_and_sse_raise_nm_while_ts_is_set",
            "x87::the_saved_pointer_names_the_last_instruction_also_if_its_operand_crossed_pages",
        ],
    },
    Exception {
        kind: Kind::Emulating,
        why: "user code and the ways between user code and kernel are those of its own paravirtual interface",
        tests: &[
            "exceptions::int_n_from_user_code_needs_a_gate_of_its_level",
            "privilege::iretq_enters_64_bit_and_compatibility_mode_code",
            "privilege::iretq_refuses_selectors_that_do_not_fit",
            "privilege::swapgs_exchanges_the_bases",
            "privilege::syscall_in_compatibility_mode_is_undefined_on_intel_and_has_an_entry_of_its_own_on_amd",
            "privilege::syscall_is_undefined_without_sce",
            "privilege::syscall_saves_rip_and_rflags_and_masks",
            "privilege::sysenter_and_sysexit_exchange_32_bit_code_and_the_kernel_except_on_amd",
            "privilege::sysret_returns_to_64_bit_and_32_bit_code",
            "privilege::sysret_to_an_address_that_is_not_canonical_faults_in_the_kernel_or_on_amd_after_it",
            "privilege::the_kernels_stack_holds_what_was_pushed_flags_and_memory_operands_among_it",
            "system_calls::a_breakpoint_where_sysret_leads_is_not_passed_by_rf",
            "system_calls::a_pending_interrupt_comes_before_the_instruction_that_sysret_leads_to",
            "system_calls::a_system_call_that_is_stepped_through_traps_when_it_is_over",
            "system_calls::programs_that_sysret_leads_to_read_the_tsc_only_without_tsd",
            "system_calls::sysret_is_undefined_once_sce_is_clear",
            "system_calls::sysret_that_sets_ac_has_alignment_checked",
            "system_calls::sysret_that_sets_tf_traps_before_the_instruction_it_leads_to",
            "system_calls::system_calls_in_a_row_keep_flags_and_mask_those_of_the_kernel",
            "system_calls::the_kernel_reaches_user_pages_if_the_mask_leaves_ac_set",
        ],
    },
    Exception {
        kind: Kind::Emulating,
        why: "its emulator does not do these as a processor does",
        tests: &[
            "exceptions::a_benign_exception_that_can_not_be_delivered_becomes_the_second_one",
            "exceptions::a_page_fault_during_delivery_of_a_page_fault_keeps_the_second_address",
            "exceptions::control_registers_refuse_what_is_reserved",
            "interrupts::the_saved_flags_of_an_interrupt_are_those_of_the_interrupted_code",
            "paging::a_write_across_pages_is_done_whole_or_not_at_all",
            "paging::each_pcid_has_its_own_translations",
            "paging::large_pages_map_their_whole_range",
        ],
    },
    Exception { kind: Kind::Emulating, why: "its emulator answers with #GP where PCIDs are used", tests: PCIDS },
];
