"""Rules of the code, how to break each, and the test that must fail then.

An entry names a file, a text that occurs in it once, and the text that breaks the rule. Change an entry
together with the line that it breaks: `tests/test_proofs.py` notices when the text is no longer there.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
_SERVER = "server/penstock/server"
_CLIENT = "client/penstock/client"


@dataclass(frozen=True, slots=True)
class Break:
    rule: str
    file: str
    old: str
    new: str
    test: str
    """The name of the test function, which only one file has; in brackets the case, where one is enough."""

    def apply(self, text: str) -> str:
        assert text.count(self.old) == 1, f"{self.file} has {self.old!r} {text.count(self.old)} times"
        return text.replace(self.old, self.new)


@functools.cache
def known_tests() -> dict[str, list[Path]]:
    """The files, below the root, that define each test function."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for name in re.findall(r"^(?:async )?def (test_\w+)", path.read_text(), re.MULTILINE):
            found.setdefault(name, []).append(path.relative_to(ROOT))
    return found


def locate(test: str) -> str:
    """How pytest calls the test of that name."""
    (file,) = known_tests()[test.partition("[")[0]]
    return f"{file}::{test}"


BREAKS = (
    # ---- bytes ----------------------------------------------------------------------------------
    Break(
        "a file is checked for changes before its segment is announced",
        f"{_SERVER}/staging/reading/filling.py",
        "check=file.check_unchanged,",
        "check=lambda: None,",
        "test_a_file_changed_in_mid_stream_fails_the_load_and_never_yields_a_wrong_tensor",
    ),
    Break(
        "a file whose checksum is another ends the load",
        f"{_SERVER}/staging/reading/verifying.py",
        "if found != file.checksum.value:",
        "if False:",
        "test_one_flipped_bit_ends_the_load_before_a_tensor_of_that_segment_is_yielded",
    ),
    Break(
        "a checksum counts only if it is of the full object",
        f"{_SERVER}/sources/s3/answers.py",
        'counts = kind == "FULL_OBJECT" or (not kind and algorithm == CRC64NVME)',
        "counts = True",
        "test_checksums_of_parts_are_not_mistaken_for_those_of_the_whole",
    ),
    Break(
        "a load that requires verification joins only entries that verify",
        f"{_SERVER}/staging/sharing.py",
        "if not _verifies(entry, checkpoint, selection):",
        "if False:",
        "test_a_stage_that_was_not_verified_serves_no_load_that_requires_it",
    ),
    Break(
        "the header of a corrupt file is forgotten",
        f"{_SERVER}/loads/control.py",
        "self._context.catalog.forget(error.version)",
        "pass",
        "test_a_flipped_bit_of_the_header_is_found_and_the_header_is_not_kept",
    ),
    Break(
        "a write that inotify told of is a change, whatever explains the file's ctime",
        f"{_SERVER}/sources/file/identity.py",
        "    if modified:",
        "    if modified and False:",
        "test_a_write_is_a_change_though_a_link_or_a_chmod_would_explain_its_ctime",
    ),
    Break(
        "a version says when a file was born, and which inode of which device it is",
        f"{_SERVER}/sources/file/identity.py",
        ":{status.inode}:{status.birth_ns}",
        "",
        "test_versions_hold_all_that_tells_files_apart",
    ),
    Break(
        "two mounts in one place differ",
        f"{_SERVER}/sources/file/mounts.py",
        '            return f"{mount.id:x}"',
        '            return ""',
        "test_two_mounts_in_one_place_differ_and_the_first_is_known_to_be_gone",
    ),
    Break(
        "a checkpoint whose mount is gone is given up",
        f"{_SERVER}/sources/file/source.py",
        "return mounts is not None and mounts.is_gone(self._seen.status.mount, self.mount)",
        "return False",
        "test_a_mount_can_be_unmounted_while_its_checkpoint_is_warm_which_then_is_given_up",
    ),
    Break(
        "an answer for another version of an object fails the load",
        f"{_SERVER}/sources/objects/object.py",
        "if not self._state.same(exchange.headers) or size_bytes != self.size_bytes:",
        "if False:",
        "test_an_object_that_is_replaced_is_noticed_also_where_conditions_are_ignored",
    ),
    Break(
        "an answer with another range than the one asked for is not used",
        f"{_SERVER}/sources/objects/object.py",
        "if (start, count) != (offset, end - offset):",
        "if False:",
        "test_a_fault_in_mid_load_costs_no_byte[another range]",
    ),
    Break(
        "shape and dtype must have as many bytes as the offsets span",
        f"{_SERVER}/checkpoint/headers/rules.py",
        "if (end - start) * 8 != bits:",
        "if False:",
        "test_refuses_what_the_library_refuses",
    ),
    Break(
        "tensors neither overlap nor leave holes",
        f"{_SERVER}/checkpoint/headers/rules.py",
        "            if self._starts[i] != at:",
        "            if False:",
        "test_agrees_with_the_library_on_mutated_files",
    ),
    Break(
        "a window reads only where every consumer has released",
        f"{_SERVER}/staging/ring.py",
        "return end - self._pages[self._freed] <= self.capacity_bytes",
        "return True",
        "test_a_window_reads_on_as_the_slowest_consumer_releases",
    ),
    Break(
        "a window of a group is not reused before all members joined",
        f"{_SERVER}/staging/ring.py",
        "if self.full or self.hold_back or not self._released:",
        "if self.full or not self._released:",
        "test_a_group_shares_a_window_and_the_first_waits_for_the_last",
    ),
    Break(
        "pages that the caller wrote to are dropped before their segment is read again",
        f"{_CLIENT}/ring/mapping.py",
        "if end == start or not may_be_written(self.address + start, self.address + end):",
        "if True:",
        "test_writing_while_loading_changes_no_later_tensor",
    ),
    Break(
        "the client refuses slabs that others could write or shrink",
        f"{_CLIENT}/ring/mapping.py",
        "if seals & _SEALS != _SEALS:",
        "if False:",
        "test_slabs_that_could_change_underneath_are_refused",
    ),
    Break(
        "memory of a copied tensor is used again only when the tensor is gone",
        f"{_CLIENT}/ring/copies.py",
        "        weakref.finalize(array, self._release, start, room).atexit = False",
        "        self._release(start, room)",
        "test_living_tensors_keep_their_bytes_whatever_is_copied_after_them",
    ),
    Break(
        "a pinned buffer is filled again only when the device has read it",
        f"{_CLIENT}/cuda/pinned.py",
        "            event.synchronize()",
        "            pass",
        "test_a_buffer_is_not_used_again_before_the_device_has_read_it",
    ),
    Break(
        "a load goes on after a restart only with the same version",
        f"{_CLIENT}/segments.py",
        "        if stream.manifest.version != manifest.version:",
        "        if False:",
        "test_another_version_is_seen_even_when_the_daemon_does_not_care",
    ),
    # ---- files beside the weights ---------------------------------------------------------------
    Break(
        "a file of a fetch has the version that was listed",
        f"{_SERVER}/loads/readahead.py",
        "if (file.listed_version, file.size_bytes) != expected:",
        "if False:",
        "test_a_file_that_changes_after_the_list_fails_the_fetch",
    ),
    Break(
        "a file of a fetch is checked for changes before its last bytes are sent",
        f"{_SERVER}/loads/readahead.py",
        "            file.check_unchanged()",
        "            pass",
        "test_a_file_that_changes_while_it_is_read_fails_before_it_is_whole[in place]",
    ),
    Break(
        "names that could lead out of the client's directory are refused",
        f"{_SERVER}/loads/choice.py",
        'if "" in parts or "." in parts or ".." in parts:',
        "if False:",
        "test_names_that_lead_elsewhere_or_cannot_be_made_are_refused",
    ),
    Break(
        "the client writes no name that leads out of its directory, whichever daemon sends it",
        f"{_CLIENT}/fetch.py",
        'if not name or "\\0" in name or {"", ".", ".."} & set(parts) or',
        "if",
        "test_names_that_no_daemon_may_say_are_not_written",
    ),
    Break(
        "a file that is shorter than its size ends the fetch",
        f"{_CLIENT}/fetch.py",
        "        if left:\n",
        "        if False:\n",
        "test_a_fetch_that_is_not_whole_leaves_nothing",
    ),
    Break(
        "a directory that no fetch made is not replaced",
        f"{_CLIENT}/system/trees.py",
        "if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not replaces(place):",
        "if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):",
        "test_what_is_there_is_replaced_only_if_it_may_be",
    ),
    # ---- engines --------------------------------------------------------------------------------
    Break(
        "layers of other pipeline stages are left out",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "        if mapped.startswith(self.other_stages):",
        "        if False:",
        "test_layers_of_other_stages_are_not_read",
    ),
    Break(
        "a layer is not taken for one whose number begins alike",
        f"{_CLIENT}/adopt/vllm_needs.py",
        '        f"{name}."\n',
        "        name\n",
        "test_layers_of_other_stages_are_not_read[map_name]",
    ),
    Break(
        "embeddings and heads are read on every stage",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "if isinstance(module, PPMissingLayer) and _LAYER.fullmatch(name)",
        "if isinstance(module, PPMissingLayer)",
        "test_layers_of_other_stages_are_not_read[map_name]",
    ),
    Break(
        "the model's own names say what a tensor is",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "        mapped = map_name(name)",
        "        mapped = name",
        "test_layers_of_other_stages_are_not_read[map_name]",
    ),
    Break(
        "everything is read if the model's names cannot be known",
        f"{_CLIENT}/adopt/vllm_loader.py",
        "            needs, map_name = EVERYTHING, str",
        "            map_name = str",
        "test_all_layers_are_read_where_it_cannot_be_known_how_the_model_names_them",
    ),
    Break(
        "everything is read if the daemon finds the names too many",
        f"{_CLIENT}/adopt/vllm_loader.py",
        "            if is_needed is None:\n                raise",
        "            raise",
        "test_everything_is_read_where_the_daemon_refuses_so_many_names",
    ),
    Break(
        "what any rank of the node needs is read",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "        return not all(stage.leaves_out(name, mapped) for stage in stages)",
        "        return not any(stage.leaves_out(name, mapped) for stage in stages)",
        "test_what_one_rank_of_a_node_needs_is_read_whatever_the_others_leave_out",
    ),
    Break(
        "experts that another rank of the node has are read",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "            here |= one.experts",
        "            here &= one.experts",
        "test_what_no_rank_of_a_node_needs_is_left_out",
    ),
    Break(
        "a model gets what its own stage needs, and no more of what the group reads",
        f"{_CLIENT}/adopt/vllm_loader.py",
        "if needs == EVERYTHING or not needs.leaves_out(name, map_name(name)):",
        "if True:",
        "test_ranks_of_an_engine_read_once_what_does_not_fit_and_each_gets_what_its_stage_needs",
    ),
    Break(
        "only tensors of the model's own expert layers are left out as experts",
        f"{_CLIENT}/adopt/vllm_needs.py",
        'if self.experts is None or mapped.partition(f"{_EXPERTS}.")[0] not in self.expert_layers:',
        "if self.experts is None:",
        "test_experts_that_a_rank_lacks_are_left_out",
    ),
    Break(
        "an expert whose number no expert layer has is read",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "known = expert is not None and expert < self.expert_count",
        "known = expert is not None",
        "test_experts_that_a_rank_lacks_are_left_out",
    ),
    Break(
        "all experts are read if they may be moved",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "if not parallel.enable_expert_parallel or parallel.enable_eplb:",
        "if not parallel.enable_expert_parallel:",
        "test_all_experts_are_read_where_it_cannot_be_known_which_are_needed[they may be moved]",
    ),
    Break(
        "all experts are read if they are placed in another way than vLLM's function says",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "    if here != compute_local_expert_ids(count, place.ep_size, place.ep_rank, strategy):",
        "    if False:",
        "test_all_experts_are_read_where_it_cannot_be_known_which_are_needed[they are placed in another way]",
    ),
    Break(
        "all experts are read if the layers of a model hold different ones",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "    if len(held) != 1:\n        return None\n    ((count, here),) = held\n",
        "    if not held:\n        return None\n    count, here = next(iter(held))\n",
        "test_all_experts_are_read_where_it_cannot_be_known_which_are_needed[layers differ]",
    ),
    Break(
        "replicas of a node ask for each other's experts",
        f"{_CLIENT}/adopt/vllm_needs.py",
        "        here |= compute_local_expert_ids(count, place.ep_size, rank, strategy) or set()",
        "        pass",
        "test_replicas_of_a_node_ask_for_the_same_experts",
    ),
    Break(
        "a draft model does not get the weights of the target's source",
        f"{_CLIENT}/adopt/vllm_loader.py",
        "    return source if of_target else None",
        "    return source",
        "test_a_draft_model_gets_its_own_weights_beside_a_target_with_a_source",
    ),
    Break(
        "weights are reloaded from the path that is given, whatever source there is",
        f"{_CLIENT}/adopt/vllm_loader.py",
        "return self.options.source if loaded_as == model_config.model else None",
        "return self.options.source",
        "test_weights_are_reloaded_from_the_path_that_is_given_and_else_from_the_source",
    ),
    Break(
        "weights that the checkpoint lacks fail the start",
        f"{_CLIENT}/adopt/vllm_loader.py",
        "        if track or (track is None and loaded is not None and not quantized):",
        "        if False:",
        "test_a_checkpoint_that_lacks_a_weight_is_refused_as_by_vllm_s_own_loader",
    ),
    # ---- the cap --------------------------------------------------------------------------------
    Break(
        "slabs of another user are closed before new ones are made beyond the cap",
        f"{_SERVER}/staging/pool.py",
        "doomed = foreign[: max(0,",
        "doomed = foreign[:0][: max(0,",
        "test_two_takers_that_replace_slabs_at_once_stay_within_the_cap",
    ),
    Break(
        "no more slabs are taken than the cap allows",
        f"{_SERVER}/staging/pool.py",
        "- self._taken - self._working",
        "- self._taken - self._working + 1",
        "test_any_mixture_of_users_stays_within_the_cap_and_keeps_tenants_apart",
    ),
    Break(
        "slabs are taken before the next load in the queue is considered",
        f"{_SERVER}/staging/pool.py",
        "        self._taken += count\n        slabs, foreign",
        "        slabs, foreign",
        "test_slabs_are_taken_before_the_first_await",
    ),
    Break(
        "with --trim-after, memory that nobody uses goes back to the system",
        f"{_SERVER}/staging/pool.py",
        "        await self._retire(old)",
        "        self._free += [(slab, limit) for slab in old]",
        "test_without_a_limit_memory_goes_back_to_the_system",
    ),
    Break(
        "what is only warm goes in the order of its last use when the system lacks memory",
        f"{_SERVER}/staging/memory/cache.py",
        "for entry in sorted(warm, key=lambda entry: (entry.wanted, entry.last_used)):",
        "for entry in sorted(warm, key=lambda entry: (entry.wanted, -entry.last_used)):",
        "test_what_is_warm_stays_while_the_system_has_memory_and_goes_in_the_order_of_use",
    ),
    Break(
        "the system has to have more memory left where processes stall for it",
        f"{_SERVER}/system/headroom.py",
        "share = SPARE_SHARE_UNDER_PRESSURE if pressed else SPARE_SHARE",
        "share = SPARE_SHARE",
        "test_where_processes_stall_for_memory_more_of_it_goes_back",
    ),
    Break(
        "a version of a warm set's file with a fault changes nothing",
        f"{_SERVER}/loads/warm/warm_set.py",
        "            problems = self._found = error.problems",
        "            self._reconcile(())\n            problems = self._found = error.problems",
        "test_a_broken_version_of_the_file_keeps_the_one_before_in_force",
    ),
    Break(
        "a new version of a warm set's checkpoint is staged before the old one is given up",
        f"{_SERVER}/staging/buffer.py",
        "        if not keep_old:\n",
        "        if True:\n",
        "test_a_new_version_is_noticed_after_the_interval_and_staged_beside_the_old_one",
    ),
    Break(
        "what a warm set names is evicted after what is warm by chance",
        f"{_SERVER}/staging/memory/cache.py",
        "key=lambda entry: (entry.stuck, entry.wanted, entry.last_used)",
        "key=lambda entry: (entry.stuck, entry.last_used)",
        "test_a_load_evicts_what_no_one_named_before_what_the_set_names",
    ),
    Break(
        "what was evicted from a warm set evicts nothing for a while",
        f"{_SERVER}/loads/warm/keeper.py",
        "evicting=not free_only,",
        "evicting=True,",
        "test_what_was_evicted_for_a_load_comes_back_without_evicting_what_took_its_place",
    ),
    Break(
        "the file for node-feature-discovery is written through no link",
        f"{_SERVER}/loads/warm/features.py",
        " | os.O_NOFOLLOW",
        "",
        "test_a_features_file_is_replaced_whole_and_no_link_is_followed",
    ),
    Break(
        "headers, indexes and plans are charged before their memory is spent",
        f"{_SERVER}/checkpoint/headers/budget.py",
        "        if more_bytes > 0:",
        "        if more_bytes > 1 << 60:",
        "test_what_is_not_there_is_refused_and_nothing_is_taken",
    ),
    # ---- everything comes back ------------------------------------------------------------------
    Break(
        "the end of a handoff connection releases what its session holds",
        f"{_SERVER}/edge/handoff.py",
        "        for release in releases:\n            release()",
        "        del releases",
        "test_the_connections_end_releases_everything_once_in_order",
    ),
    Break(
        "a load ends when its handoff connection closes",
        f"{_SERVER}/loads/control.py",
        "            if not load.finished:\n                task.cancel()",
        "            pass",
        "test_a_load_whose_handoff_connection_closes_while_it_waits_for_a_choice_ends",
    ),
    Break(
        "what a request held at the gate comes back when its stream ends",
        f"{_SERVER}/edge/streams.py",
        "        self._release(STREAM_BYTES + sum(self._waiting) + self._in_hand + self._kept)",
        "        self._release(STREAM_BYTES + sum(self._waiting) + self._in_hand)",
        "test_what_a_stream_held_comes_back_whoever_ends_it",
    ),
    Break(
        "a load that ends makes room for another",
        f"{_SERVER}/loads/control.py",
        ".release(load.caller.uid)",
        ".used_by(load.caller.uid)",
        "test_loads_at_a_time_are_bounded",
    ),
    Break(
        "a load that leaves gives up the reads that only it wanted",
        f"{_SERVER}/staging/reading/filling.py",
        "                del self._reading[index]",
        "                pass",
        "test_leaving_during_the_reads_gives_up_once_they_ended",
    ),
    Break(
        "slabs into which hung reads may still write go to nobody",
        f"{_SERVER}/staging/reading/filling.py",
        "        return [self._slabs[number] for number in sorted(used)]",
        "        return []",
        "test_a_stage_whose_reads_hang_is_evicted_but_for_the_slabs_they_write_into",
    ),
    # ---- users ----------------------------------------------------------------------------------
    Break(
        "slabs are sealed against later writable mappings",
        f"{_SERVER}/staging/slab.py",
        "linux.F_SEAL_GROW | linux.F_SEAL_FUTURE_WRITE | linux.F_SEAL_SEAL",
        "linux.F_SEAL_GROW | linux.F_SEAL_SEAL",
        "test_another_process_can_read_but_neither_write_nor_resize",
    ),
    Break(
        "slabs are sealed against other sizes",
        f"{_SERVER}/staging/slab.py",
        "linux.F_SEAL_SHRINK | linux.F_SEAL_GROW | ",
        "",
        "test_a_descriptor_cannot_change_the_slab",
    ),
    Break(
        "a slab that one user held goes to no other",
        f"{_SERVER}/staging/pool.py",
        " not in (None, ",
        " in (-1, ",
        "test_a_slab_that_one_user_held_never_goes_to_another",
    ),
    Break(
        "slabs that were received by one user are never received by another, over the sockets too",
        f"{_SERVER}/staging/pool.py",
        " not in (None, ",
        " in (-1, ",
        "test_a_slab_that_one_user_received_is_never_received_by_another",
    ),
    Break(
        "users do not share what is staged",
        f"{_SERVER}/staging/sharing.py",
        "entry.owner_uid not in (None, uid) or ",
        "",
        "test_users_do_not_share_a_checkpoint",
    ),
    Break(
        "a call needs the token of an open session",
        f"{_SERVER}/edge/handoff.py",
        "session = self._sessions.get(token) if isinstance(token, str) else None",
        "session = next(iter(self._sessions.values()), None)",
        "test_no_token_opens_another_s_load",
    ),
    Break(
        "a token opens one load",
        f"{_SERVER}/edge/service.py",
        "            session.loaded = True",
        "            session.loaded = False",
        "test_a_token_opens_one_load_only",
    ),
    Break(
        "a token dies with its connection",
        f"{_SERVER}/edge/handoff.py",
        "if self._sessions.pop(session.token, None) is not None:",
        "if self._sessions.get(session.token) is not None:",
        "test_a_token_dies_with_its_connection",
    ),
    Break(
        "paths of other users are resolved beneath the prefix",
        f"{_SERVER}/system/linux.py",
        "_RESOLVE_BENEATH | _RESOLVE_NO_MAGICLINKS",
        "_RESOLVE_NO_MAGICLINKS",
        "test_every_way_out_of_an_allowed_prefix_is_refused",
    ),
    Break(
        "only root and the daemon's own user evict",
        f"{_SERVER}/loads/control.py",
        "        if not is_privileged(client.uid):",
        "        if False:",
        "test_what_a_user_staged_is_neither_evicted_nor_seen_by_another",
    ),
    Break(
        "a user sees own loads only",
        f"{_SERVER}/watch/status.py",
        "all_of_it = only_uid is None",
        "all_of_it = True",
        "test_users_see_over_grpc_only_what_is_theirs",
    ),
    Break(
        "what clients choose is quoted in the log",
        f"{_SERVER}/system/log.py",
        "    return text if text.isprintable()",
        "    return text if True or text.isprintable()",
        "test_what_clients_choose_cannot_forge_lines_of_the_log",
    ),
    Break(
        "a web site whose name leads to the loopback is refused",
        f"{_SERVER}/watch/http.py",
        'return host == "localhost"',
        "return True",
        "test_a_web_site_that_has_its_name_resolved_to_the_loopback_reads_nothing",
    ),
    Break(
        "a private daemon imports nothing from the working directory",
        f"{_CLIENT}/system/interpreter.py",
        "sys.path[:] = sys.argv[4 : 4 + count]",
        "sys.path[1:] = sys.argv[4 : 4 + count]",
        "test_it_does_not_import_from_the_working_directory",
    ),
    Break(
        "a private daemon starts where nobody can put modules",
        f"{_CLIENT}/system/interpreter.py",
        'cwd="/",',
        "cwd=None,",
        "test_an_empty_entry_of_pythonpath_is_not_the_working_directory",
    ),
    Break(
        "the working directory is left out of the directories that a private daemon imports from",
        f"{_CLIENT}/system/interpreter.py",
        "if entry in wanted or not here or not _same(entry, here)]",
        "]",
        "test_a_working_directory_that_pythonpath_names_is_imported_from",
    ),
    Break(
        "a daemon removes only files that are still its own",
        f"{_SERVER}/system/own_files.py",
        "if own is not None and file_id(path) == own:",
        "if own is not None:",
        "test_a_daemon_whose_directory_was_replaced_removes_nothing_of_its_successor",
    ),
    Break(
        "two daemons do not serve one directory",
        f"{_SERVER}/system/lock.py",
        "fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)",
        "fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)",
        "test_a_second_daemon_in_the_directory_is_refused_and_the_first_serves_on",
    ),
    # ---- shares and bounds ----------------------------------------------------------------------
    Break(
        "privileged users keep their reserve",
        f"{_SERVER}/system/quota.py",
        "self._reserve = min(max(1, total // RESERVED_PART), total - 1)",
        "self._reserve = 0",
        "test_whatever_three_users_take_a_fourth_finds_some_and_root_its_reserve",
    ),
    Break(
        "newcomers find first units, whatever others hold",
        f"{_SERVER}/loads/control.py",
        "Quota(max_loads)",
        "Quota(max_loads, newcomers=0)",
        "test_users_who_take_every_load_leave_one_to_the_next_user_and_the_rest_to_root",
    ),
    Break(
        "a user's loads take at most that user's share of memory",
        f"{_SERVER}/staging/memory/shares.py",
        "        return max(0, user_share(self._max_slabs - others) - own)",
        "        return self._max_slabs - others - own",
        "test_a_user_who_holds_the_whole_share_for_ever_keeps_nobody_from_loading",
    ),
    Break(
        "calls that gRPC has not taken are few for each user",
        f"{_SERVER}/edge/gate.py",
        "if self._to_take[passage.uid] < CALLS_TO_TAKE:",
        "if True:",
        "test_calls_that_grpc_has_not_taken_wait_at_the_gate_by_user",
    ),
    Break(
        "a reset waits until gRPC has taken the call",
        f"{_SERVER}/edge/frame_filter.py",
        "if stream is not None and not stream.taken_up:",
        "if False:",
        "test_a_reset_waits_until_grpc_has_taken_the_call_and_so_does_the_end_of_the_connection",
    ),
    Break(
        "frames that carry nothing end their connection when they are too many",
        f"{_SERVER}/edge/frame_filter.py",
        "if self._control.wait_seconds(now):",
        "if False:",
        "test_frames_without_use_end_the_connection_when_they_are_too_many",
    ),
    Break(
        "the headers of a request are bounded",
        f"{_SERVER}/edge/frame_filter.py",
        "if len(self._block) > MAX_HEADER_BLOCK_BYTES:",
        "if False:",
        "test_headers_in_too_many_parts_or_bytes_never_reach_grpc",
    ),
    Break(
        "a compressed message is refused before it is unpacked",
        f"{_SERVER}/edge/streams.py",
        "        if compressed:",
        "        if False:",
        "test_a_compressed_message_is_never_unpacked",
    ),
    Break(
        "a message waits at the gate while its user's memory is used up",
        f"{_SERVER}/edge/streams.py",
        "        self.starved = not self._memory.take(self.uid, cost)",
        "        self.starved = not self._memory.take(self.uid, cost) and False",
        "test_a_message_waits_for_memory_and_is_refused_when_it_waits_too_long",
    ),
    Break(
        "a message of full size passes only with a token",
        f"{_SERVER}/edge/streams.py",
        "        if not self.approved and (",
        "        if False and (",
        "test_messages_of_full_size_pass_only_when_the_call_is_approved",
    ),
    Break(
        "a connection has a bounded number of calls at the same time",
        f"{_SERVER}/edge/rpc.py",
        '    ("grpc.max_concurrent_streams", MAX_CALLS_PER_CONNECTION),',
        "",
        "test_a_connection_has_at_most_sixteen_calls_at_the_same_time",
    ),
    Break(
        "messages that nobody reads are bounded by user",
        f"{_SERVER}/edge/answers.py",
        "        if uid in self._beyond or self._quota.used_by(uid):",
        "        if False:",
        "test_messages_that_nobody_reads_hold_up_their_user_and_no_other",
    ),
    Break(
        "of too many HTTP connections the one that waited longest gives way",
        f"{_SERVER}/watch/http.py",
        "            if len(self._connections) >= MAX_CONNECTIONS:",
        "            if False:",
        "test_a_crowd_of_slow_clients_gives_way_to_probes",
    ),
    Break(
        "no user takes all threads, and so all header children",
        f"{_SERVER}/system/fair.py",
        "able = [uid for uid in self._queues if self._quota.left(uid)]",
        "able = [*self._queues]",
        "test_one_user_has_one_child_at_a_time_and_all_users_have_a_few",
    ),
    Break(
        "the user who has been served least is served next",
        f"{_SERVER}/system/fair.py",
        "key=lambda uid: (self._quota.used_by(uid), self._served_seconds[uid])",
        "key=lambda uid: 0",
        "test_a_user_s_first_call_does_not_wait_for_all_that_others_have_queued",
    ),
    Break(
        "a header child has bounded memory and CPU time",
        f"{_SERVER}/checkpoint/headers/child.py",
        "        resource.setrlimit(limit, (value, value))",
        "        pass",
        "test_a_hostile_header_costs_the_caller_little_memory",
    ),
    Break(
        "a user who joins the spools waits for one turn of each other user",
        f"{_SERVER}/checkpoint/headers/spool.py",
        "key=lambda waiting: (self._turns[waiting[1]], waiting[0])",
        "key=lambda waiting: waiting[0]",
        "test_spools_are_bounded_in_bytes_and_a_user_who_fills_them_delays_another_by_one_header",
    ),
    Break(
        "names and dimensions of a tensor are bounded",
        f"{_SERVER}/checkpoint/headers/rules.py",
        "        if len(shape) > MAX_DIMS:",
        "        if False:",
        "test_names_and_shapes_that_no_writer_produces_are_refused",
    ),
    # ---- progress -------------------------------------------------------------------------------
    Break(
        "each user who reads gets the same bytes",
        f"{_SERVER}/staging/reading/schedule.py",
        "                        user.active >= user_share,\n                        user.served_bytes,",
        "                        0,\n                        0,",
        "test_each_of_n_users_gets_an_nth_of_the_bytes",
    ),
    Break(
        "a mount that hangs has a bounded number of reads",
        f"{_SERVER}/staging/reading/schedule.py",
        ".delayed < limit",
        ".delayed < 1 << 60",
        "test_a_mount_that_hangs_has_at_most_as_many_reads_as_there_are_threads",
    ),
    Break(
        "a load waits for memory no longer than --queue-timeout",
        f"{_SERVER}/staging/memory/waiting.py",
        ".call_later(self._timeout_seconds, self._expire,",
        ".call_later(1e6 + self._timeout_seconds, self._expire,",
        "test_waiting_too_long_fails_with_the_numbers",
    ),
    Break(
        "users who wait for memory take turns",
        f"{_SERVER}/staging/memory/waiting.py",
        "            if count:\n                self._turns.take(uid)",
        "            if count:",
        "test_a_load_waits_for_one_load_of_each_other_user_however_many_they_queue",
    ),
    Break(
        "a load that others of its window hold up fails with their pids",
        f"{_SERVER}/staging/entry.py",
        "        if blockers:",
        "        if False:",
        "test_a_member_of_a_group_that_stops_for_ever_fails_the_others_with_a_reason",
    ),
    Break(
        "a client that never chooses is given up",
        f"{_SERVER}/loads/selecting.py",
        "return await asyncio.wait_for(ask(), CHOICE_SECONDS)",
        "return await ask()",
        "test_a_load_whose_client_never_chooses_ends_after_a_while",
    ),
)
