"""Which fault does what, and the tests that hold it to that. README has the table, with the number of their cases.

python -m tests.faults        # after a test of a fault, or a case of one, came or went
"""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

README = Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- faults -->\n", "<!-- /faults -->"
Cases = Mapping[tuple[str, str], int]  # file below tests/ and name of a test -> its cases


class Fault(NamedTuple):
    """A row of the table.

    Attributes:
        what: goes wrong.
        then: happens.
        tests: file below tests/ -> names of tests.
    """

    what: str
    then: str
    tests: dict[str, list[str]]


_CHECKPOINTS, _GPT, _STARTS = (
    "shared/run/test_checkpoints.py",
    "recipes/test_gpt_pretrain.py",
    "recipes/test_three_starts.py",
)
_HUB, _IMAGES, _TEXTS = "shared/run/test_hub.py", "shared/images/test_decoding.py", "shared/text/test_documents.py"
_ENGINES = {
    "gpt": "recipes/test_gpt_engines.py",
    "bert": "recipes/test_bert_engines.py",
    "resnet": "recipes/test_resnet_engines.py",
    "text_to_image": "recipes/test_text_to_image_engines.py",
}
_COMMAND_LINE, _FOLDER, _UPDATES = (
    "shared/test_command_line.py",
    "shared/run/test_folder.py",
    "shared/data/test_updates.py",
)


def _in_engines(name: str) -> dict[str, list[str]]:
    return {file: [name] for file in _ENGINES.values()}


FAULTS = (
    Fault(
        "SIGKILL at each of six points of a save (all training pages)",
        "goes on from the newest whole checkpoint, equal to the bit",
        {
            _STARTS: ["test_kills_change_nothing"],
            _CHECKPOINTS: [
                "test_sigkill_at_every_point_of_a_save_loses_nothing",
                "test_sigkill_in_the_first_save",
                "test_killed_in_every_save_one_after_the_other",
            ],
        },
    ),
    Fault(
        "SIGKILL at ten random times (all training pages)",
        "the same",
        {_STARTS: ["test_kills_change_nothing"], _CHECKPOINTS: ["test_sigkill_at_random_times"]},
    ),
    Fault(
        "stopped and resumed twice and more inside an epoch (all training pages)",
        "equal to the bit; no update comes twice",
        {
            _STARTS: ["test_two_stops_change_nothing", "test_kills_change_nothing"],
            _CHECKPOINTS: ["test_resuming_again_and_again"],
        },
    ),
    Fault(
        "resumed at any update, also at an epoch's border, and when all is done (all training pages)",
        "no sample is left out or repeated; a finished run trains nothing",
        {
            _STARTS: ["test_two_stops_change_nothing"],
            "shared/data/test_sample_order.py": ["test_any_number_of_stops_leaves_no_gap_and_repeats_nothing"],
            _GPT: ["test_the_reference_crosses_epoch_borders", "test_resuming_is_exact_to_the_bit"],
            "recipes/test_bert_pretrain.py": ["test_resuming_is_exact_to_the_bit"],
            "recipes/test_resnet_pretrain.py": ["test_resuming_is_exact_to_the_bit"],
        },
    ),
    Fault(
        "one of two processes is killed",
        "the other ends; started again, both go on, equal to the bit",
        {_ENGINES["gpt"]: ["test_a_killed_process_ends_the_other_and_both_go_on"]},
    ),
    Fault(
        "one of two machines vanishes without a word",
        "the other ends after `--timeout_minutes`; started again, both go on, equal to the bit",
        {_ENGINES["gpt"]: ["test_a_machine_that_vanishes_ends_the_other_and_both_go_on"]},
    ),
    Fault(
        "other data workers, other micro-batches (all training pages)",
        "equal to the bit with any workers; equal to rounding with any accumulation",
        {
            _STARTS: ["test_two_stops_change_nothing"],
            _UPDATES: ["test_workers_change_nothing"],
            _GPT: ["test_accumulation_is_exact"],
            "recipes/test_bert_pretrain.py": ["test_accumulation_is_exact"],
            "recipes/test_resnet_pretrain.py": ["test_accumulation_is_exact"],
            "recipes/test_text_to_image_train_vae.py": ["test_accumulation_is_exact"],
            "recipes/test_text_to_image_pretrain.py": ["test_accumulation_is_exact"],
            "recipes/test_text_to_image_pretrain_transformer.py": ["test_accumulation_is_exact"],
            **{file: ["test_float64_updates_are_equal"] for file in (_ENGINES["gpt"], _ENGINES["bert"])},
        },
    ),
    Fault(
        "a signal between two micro-batches",
        "the update is finished, then saved",
        {_GPT: ["test_a_signal_between_two_micro_batches_waits_for_the_update"]},
    ),
    Fault(
        "another number of processes under DDP",
        "goes on with the same samples",
        {
            _ENGINES["gpt"]: ["test_one_process_goes_on_from_two"],
            _CHECKPOINTS: ["test_ddp_goes_on_with_another_number_of_processes"],
            "shared/data/test_sample_order.py": ["test_an_update_is_the_same_on_any_number_of_processes"],
        },
    ),
    Fault(
        "resumed under FSDP2, also with fewer processes",
        "goes on; equal to the bit with as many",
        {
            _CHECKPOINTS: ["test_fsdp2_goes_on_exactly"],
            _ENGINES["gpt"]: ["test_fsdp2_goes_on_with_fewer_processes"],
        },
    ),
    Fault(
        "resumed under ZeRO, also with fewer processes",
        "equal to the bit with as many, else refused in a line that says what converts it",
        {
            **_in_engines("test_stopping_and_going_on_is_exact"),
            _ENGINES["gpt"]: [
                "test_stopping_and_going_on_is_exact",
                "test_deepspeed_says_that_it_cannot_go_on_with_fewer_processes",
            ],
        },
    ),
    Fault(
        "a file of the newest checkpoint is cut, empty, altered by a bit, or gone",
        "a warning names it, the one before is gone on from, the damaged one is kept as `.bad_...`",
        {
            _CHECKPOINTS: [
                "test_a_damaged_file_is_found_named_and_passed_over",
                "test_a_damaged_manifest_is_found_and_passed_over",
                "test_every_single_flipped_bit_of_a_manifest_is_found_or_harmless",
                "test_two_damaged_ones_are_both_passed_over",
                "test_the_run_that_passed_a_damaged_one_over_ends_the_same",
            ],
            _GPT: ["test_a_damaged_checkpoint_is_passed_over"],
        },
    ),
    Fault(
        "foreign folders, files and links among the checkpoints",
        "passed over",
        {_CHECKPOINTS: ["test_foreign_names_are_ignored", "test_a_manifest_cannot_point_outside"]},
    ),
    Fault(
        "all checkpoints are damaged",
        "status 77, and what was tried; never a silent new beginning",
        {_CHECKPOINTS: ["test_all_damaged_stops_the_run_now_and_at_the_next_start"]},
    ),
    Fault(
        "the disk is full while it saves",
        "one line, status 74; the checkpoint before is whole and gone on from",
        {
            _CHECKPOINTS: ["test_a_full_disk_leaves_the_checkpoint_before"],
            _COMMAND_LINE: ["test_a_full_disk_is_one_line_and_a_status_of_its_own"],
        },
    ),
    Fault(
        "a disk fails for now (`EIO`, `ESTALE`, rights) while checkpoints are read",
        "it is tried again for 15 s, then status 74; nothing is renamed",
        {
            _CHECKPOINTS: [
                "test_a_disk_that_fails_for_now_damages_nothing",
                "test_a_folder_that_cannot_be_listed_is_not_an_empty_one",
                "test_a_disk_that_fails_while_a_checkpoint_is_found_ends_all_processes_in_one_line",
            ]
        },
    ),
    Fault(
        "an output folder that cannot be written, or is none",
        "one line before training",
        {_FOLDER: ["test_a_file_in_the_way", "test_a_folder_without_permission"]},
    ),
    Fault(
        "a mount without locks, flushes of folders or hard links (FUSE, NFS)",
        "a warning that it cannot be locked; trains, stops and goes on, equal to the bit",
        {
            _GPT: ["test_a_file_system_like_those_over_a_network_is_trained_on"],
            _CHECKPOINTS: ["test_a_file_system_that_cannot_flush_folders_has_checkpoints_all_the_same"],
            "shared/run/test_lock.py": ["test_a_file_system_without_locks_is_said"],
            "shared/runtime/test_atomic_folder.py": ["test_a_file_system_without_locks_is_no_obstacle"],
        },
    ),
    Fault(
        "a mount that cannot append, replace files or rename folders",
        "one line before training that says which",
        {"shared/runtime/test_collectives.py": ["test_what_the_file_system_of_a_run_folder_lacks_is_said"]},
    ),
    Fault(
        "SIGTERM or Ctrl-C to the launcher, to one process or to all (all training pages)",
        "all save after the same update; status 75",
        {
            _STARTS: ["test_two_stops_change_nothing"],
            **_in_engines("test_stopping_and_going_on_is_exact"),
            _GPT: ["test_signal_saves_and_the_same_command_goes_on"],
            "recipes/test_bert_finetune.py": ["test_stopping_two_processes_and_going_on_is_exact"],
            "recipes/test_gpt_finetune.py": ["test_stopping_two_processes_and_going_on_is_exact"],
            "shared/run/test_training_run.py": ["test_two_processes_do_the_same_and_stop_together"],
        },
    ),
    Fault(
        "a second signal while it saves",
        "the save is finished; a second Ctrl-C ends at once",
        {
            "shared/runtime/test_signals.py": [
                "test_any_other_second_signal_lets_it_finish_saving",
                "test_a_second_ctrl_c_ends_at_once",
            ]
        },
    ),
    Fault(
        "a process that is silent; a data worker that fails or is killed; a parent that dies",
        "the others end within the time-out; no process is left",
        {
            _ENGINES["gpt"]: ["test_a_machine_that_vanishes_ends_the_other_and_both_go_on"],
            _UPDATES: [
                "test_a_worker_that_is_killed_ends_the_loop",
                "test_what_goes_wrong_in_a_worker_is_raised_in_the_loop",
                "test_a_worker_does_not_outlive_a_parent_that_was_killed",
            ],
        },
    ),
    Fault(
        "a gradient that is not finite, on one process or on all, once or in a row (all training pages)",
        "no process takes the step; status 76 after `--max_bad_updates` in a row, saved",
        {
            _STARTS: ["test_updates_without_a_finite_gradient_are_skipped_and_end_a_run"],
            **_in_engines("test_bad_update_on_one_process_is_skipped_on_all"),
            "shared/optim/test_optimizers.py": [
                "test_updates_without_a_finite_gradient_change_neither_weights_nor_state"
            ],
        },
    ),
    Fault(
        "a loss fifty times as large, once",
        "its gradient is clipped; the losses after it are the usual ones",
        {_GPT: ["test_a_loss_fifty_times_as_large_once_leaves_no_trace"]},
    ),
    Fault(
        "images that are cut, random bytes, CMYK, 16 bits, palettes, turned or animated",
        "read as they are meant, or replaced, named and counted; above `--max_bad_fraction` status 2, saved",
        {
            _IMAGES: [
                "test_every_mode_becomes_rgb",
                "test_sixteen_bits_are_scaled_not_clipped",
                "test_exif_rotation_is_applied",
                "test_the_first_frame_of_an_animation_counts",
                "test_damaged_files_are_bad_images",
                "test_any_bytes_give_a_image_or_a_bad_image",
            ],
            "shared/images/test_bad_images.py": [
                "test_replacements_are_the_same_at_every_call",
                "test_more_than_the_stated_share_stops_the_run",
            ],
            "recipes/test_resnet_pretrain.py": ["test_damaged_images_are_replaced_the_same_way"],
        },
    ),
    Fault(
        "an image that would fill the memory",
        "a damaged image, before a pixel is decoded",
        {_IMAGES: ["test_a_decompression_bomb_costs_no_memory", "test_a_line_of_pixels_costs_no_memory"]},
    ),
    Fault(
        "empty texts, a line of 10 MB, surrogates, zero bytes, missing columns",
        "kept, or left out and counted; one line that names the columns there are",
        {
            _TEXTS: [
                "test_texts_that_are_none_or_empty_are_passed_over",
                "test_one_line_of_ten_megabytes_needs_the_memory_of_a_page",
                "test_a_lone_surrogate_in_json_is_kept",
                "test_bytes_that_are_not_utf8_are_kept_in_every_format",
                "test_a_wrong_column_names_those_there_are",
            ],
            "shared/text/test_sentence_cache.py": [
                "test_documents_of_one_sentence_are_left_out_and_counted",
                "test_a_long_line_without_an_end_is_cut",
                "test_special_tokens_and_odd_bytes_in_the_text_are_text",
            ],
            "test_openers_fuzz.py": ["test_texts", "test_labelled_tables", "test_folders_and_tars_of_images"],
        },
    ),
    Fault(
        "a pickle that runs code in any file that is read",
        "it never runs; the file is refused by name, or not read",
        {
            _CHECKPOINTS: [
                "test_a_pickle_in_the_optimizer_state_never_runs",
                "test_files_that_the_manifest_does_not_name_are_not_read",
                "test_a_sharded_checkpoint_is_taken_from_this_run_only",
            ],
            "shared/models/test_pretrained.py": ["test_pickled_weights_are_not_read"],
        },
    ),
    Fault(
        "code that comes with a model, a tokenizer or a pipeline",
        "refused without a question",
        {
            "shared/models/test_pretrained.py": ["test_code_that_comes_with_a_model_is_not_run"],
            "shared/models/test_causal_lm.py": ["test_a_folder_is_refused_and_nothing_of_it_is_run"],
            "shared/text/test_tokenization.py": ["test_code_that_comes_with_a_tokenizer_is_refused"],
            "shared/diffusion/test_generation.py": ["test_code_that_comes_with_a_pipeline_is_not_run"],
        },
    ),
    Fault(
        "names that lead out of their folder",
        "refused, or made plain",
        {
            _HUB: ["test_malformed_id_is_refused_before_any_request"],
            _TEXTS: ["test_what_looks_like_a_path_is_never_taken_for_a_hub_id"],
            _CHECKPOINTS: ["test_a_manifest_cannot_point_outside"],
            "recipes/test_text_to_image_generate.py": ["test_file_names_are_plain"],
        },
    ),
    Fault(
        "YAML with tags, anchors, keys that are unknown or given twice, `1e-3`, `no`, tabs",
        "values as written; one line that names the key and what is meant",
        {
            _COMMAND_LINE: [
                "test_yaml",
                "test_a_wrong_yaml_is_named_with_what_was_expected",
                "test_what_is_no_yaml_is_one_line_that_names_the_file",
                "test_tags_run_nothing_and_are_refused",
                "test_twenty_levels_of_anchors_cost_nothing",
            ],
            _FOLDER: ["test_a_config_with_a_python_tag_runs_nothing"],
        },
    ),
    Fault(
        "the Hub is down, slow, refuses, or drops the connection",
        "training goes on; pushed again with pauses; the last lines say what was not pushed",
        {
            _HUB: [
                "test_passing_failure_is_retried_and_makes_one_commit",
                "test_lasting_failure_is_reported_with_the_command_that_pushes_again",
                "test_refusal_by_xet_is_not_retried",
                "test_newest_push_replaces_the_one_that_waits",
                "test_close_keeps_its_deadline_and_the_process_ends",
            ],
            _GPT: ["test_a_hub_that_does_not_answer_stops_the_run_before_training"],
        },
    ),
    Fault(
        "killed in the middle of a push or of an export",
        "the old files or the new ones, never a mixture",
        {
            _HUB: ["test_kill_in_the_middle_of_a_push_leaves_the_old_model"],
            "shared/models/test_export.py": ["test_killed_half_way_the_old_weights_or_the_new_ones_load"],
        },
    ),
    Fault(
        "an access token in the environment or in a flag",
        "in no file, log, card, tracker or commit",
        {
            _HUB: ["test_token_travels_in_its_header_and_nowhere_else"],
            _FOLDER: ["test_the_record_has_no_token_no_home_folder_and_no_host_name"],
            _COMMAND_LINE: ["test_redact"],
            _GPT: ["test_push_reaches_the_hub_and_loads_in_a_clean_process"],
        },
    ),
    Fault(
        "a push that says nothing of who may see it",
        "private",
        {
            _HUB: [
                "test_repository_is_created_private_by_default",
                "test_existing_public_repository_is_said_to_be_public",
            ]
        },
    ),
    Fault(
        "a clock that jumps, another hash seed, the C locale, no home, no Hub, no terminal",
        "equal to the bit",
        {
            _GPT: ["test_an_odd_machine_gives_the_same_run"],
            _COMMAND_LINE: ["test_what_cannot_be_printed_ends_nothing"],
            "shared/runtime/test_cache_folder.py": [
                "test_the_cache_lies_in_the_home_of_the_hub_where_that_can_be_written",
                "test_datasets_stores_among_temporary_files_where_its_own_folder_cannot_be_written",
            ],
        },
    ),
    Fault(
        "200 saves and resumes in one process",
        "no more memory, descriptors, threads or files",
        {_CHECKPOINTS: ["test_two_hundred_saves_and_resumes_leave_nothing_behind"]},
    ),
    Fault(
        "any data size, batch, number of processes and stops",
        "each sample once an epoch, in the same order",
        {
            "shared/data/test_sample_order.py": [
                "test_any_number_of_stops_leaves_no_gap_and_repeats_nothing",
                "test_each_epoch_visits_each_row_once",
            ]
        },
    ),
    Fault(
        "two runs in one folder",
        "the second is refused, with the process and host of the first",
        {
            "shared/run/test_lock.py": ["test_a_folder_that_another_process_holds_is_refused_until_that_is_killed"],
            _GPT: ["test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on"],
        },
    ),
    Fault(
        "a checkpointer that is broken in one of nine ways",
        "a check finds it out",
        {"test_mutants.py": ["test_a_broken_checkpointer_is_found_out", "test_the_checkpointer_keeps_its_promises"]},
    ),
)


def cases_of(items: list[pytest.Item]) -> Counter[tuple[str, str]]:
    """Cases of each test that was collected."""
    root = README.parent / "tests"
    return Counter(
        (item.path.relative_to(root).as_posix(), item.function.__name__)
        for item in items
        if isinstance(item, pytest.Function)
    )


def table(cases: Cases) -> str:
    """What README shows."""
    named = {(file, name) for fault in FAULTS for file, names in fault.tests.items() for name in names}
    lines = [f"Each of these was made to happen, in {sum(cases[test] for test in named)} cases:", ""]
    lines += ["| fault | what happens | cases of tests |", "|---|---|---|"]
    for fault in FAULTS:
        numbers = {file: sum(cases[file, name] for name in names) for file, names in fault.tests.items()}
        links = [f"{number} [{Path(file).stem[5:]}](tests/{file})" for file, number in numbers.items()]
        lines.append(f"| {fault.what} | {fault.then} | {', '.join(links)} |")
    return "\n".join(lines) + "\n"


def gone() -> list[str]:
    """Tests that are named here and nowhere defined."""
    sources = {file: (README.parent / "tests" / file).read_text(encoding="utf-8") for f in FAULTS for file in f.tests}
    names = {(file, name) for fault in FAULTS for file, names in fault.tests.items() for name in names}
    return [f"{file}::{name}" for file, name in sorted(names) if f"def {name}(" not in sources[file]]


def with_table(readme: str, cases: Cases) -> str:
    """The README with the table as it is now."""
    head, begin, rest = readme.partition(BEGIN)
    return f"{head}{begin}{table(cases)}{END}{rest.partition(END)[2]}"


class _Collector:
    """A plug-in of pytest that keeps what it collects."""

    items: list[pytest.Item]

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        self.items = list(items)


if __name__ == "__main__":
    collector = _Collector()
    files = sorted({str(README.parent / "tests" / file) for fault in FAULTS for file in fault.tests})
    pytest.main(["--collect-only", "-qq", "-n", "0", "--dist", "no", *files], plugins=[collector])
    README.write_text(with_table(README.read_text(encoding="utf-8"), cases_of(collector.items)), encoding="utf-8")
