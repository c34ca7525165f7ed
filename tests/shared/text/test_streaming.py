"""Streams: exact resume, every document once a pass, nothing shared between processes, no endless search."""

import itertools
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from shared.command_line import UsageError
from shared.data.batches import IGNORED
from shared.data.shards import StreamState, deal_records, resumed_state, start_of_stream
from shared.text import streaming
from shared.text.documents import DOCUMENT_SEPARATOR, open_texts
from shared.text.packing import pack_corpus
from shared.text.streaming import (
    StreamedUpdates,
    TextStream,
    is_held_out,
    open_shards,
    open_streams,
    stream_rows,
)
from shared.text.tokenization import decode_bytes

SEQ_LENGTH = 32
Row = dict[str, np.ndarray]


class Shard:
    """Documents in memory."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = documents
        self.fingerprint = str(documents)

    def __iter__(self) -> Iterator[str]:
        return iter(self.documents)


def shards_of(number: int, documents_each: int = 12) -> list[Shard]:
    return [
        Shard([f"<{shard}.{document} {'word ' * (document % 9)}>" for document in range(documents_each + shard)])
        for shard in range(number)
    ]


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows of 6 rows, so that a few documents fill several."""
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 6)


def rows_from(
    shards: Sequence[Shard], tokenizer: Any, state: StreamState, rank: int = 0, **options: Any
) -> Iterator[tuple[Row, StreamState]]:
    options = {"seq_length": SEQ_LENGTH, "eval_fraction": 0.0, "seed": 0, **options}
    return stream_rows(shards, tokenizer, rank=rank, state=state, **options)


def first_rows(number: int, *arguments: Any, **options: Any) -> list[tuple[Row, StreamState]]:
    return list(itertools.islice(rows_from(*arguments, **options), number))


def same(left: Row, right: Row) -> bool:
    return all(np.array_equal(left[name], right[name]) for name in ("input_ids", "labels", "position_ids"))


def documents_in(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """The documents that lie whole in the rows."""
    found = []
    for row in rows:
        starts = np.flatnonzero(row["position_ids"] == 0).tolist()
        for first, last in itertools.pairwise([*starts, len(row["labels"])]):
            labels = row["labels"][first:last]
            tokens = labels[labels != IGNORED].tolist()
            if tokens and row["input_ids"][first] == tokens[-1] == tokenizer.eos_token_id:
                found.append(decode_bytes(tokenizer.backend_tokenizer, tokens[:-1]).decode())
    return found


def rows_of_a_pass(
    shards: Sequence[Shard], tokenizer: Any, processes: int, rank: int, epoch: int = 0, **options: Any
) -> list[Row]:
    """Rows of windows that began in one pass, whose last may reach into the next."""
    rows = rows_from(shards, tokenizer, start_of_stream(processes) | {"epoch": epoch}, rank, **options)
    return [row for row, _ in itertools.takewhile(lambda pair: pair[1]["epoch"] == epoch, rows)]


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@pytest.mark.parametrize(("number", "processes"), [(1, 1), (4, 1), (1, 2), (2, 2), (5, 2), (2, 3)])
def test_resuming_at_any_row_gives_the_same_rows(tokenizer: Any, number: int, processes: int) -> None:
    shards = shards_of(number)
    for rank in range(processes):
        rows = first_rows(60, shards, tokenizer, start_of_stream(processes), rank)
        assert max(state["epoch"] for _, state in rows) >= 1
        for stop in range(0, 45, 1 if number == 4 else 7):
            saved = json.loads(json.dumps(rows[stop][1]))  # as a checkpoint keeps it
            resumed = first_rows(12, shards, tokenizer, saved, rank)
            for (row, state), (again, state_again) in zip(rows[stop + 1 :], resumed, strict=False):
                assert same(row, again)
                assert state == state_again


def test_resuming_reads_each_earlier_shard_no_more(tokenizer: Any) -> None:
    class Counted(Shard):
        read = 0

        def __iter__(self) -> Iterator[str]:
            self.read += 1
            return super().__iter__()

    shards = [Counted(shard.documents) for shard in shards_of(6)]
    state = next(state for _, state in rows_from(shards, tokenizer, start_of_stream(1)) if state["shard"] == 4)
    before = [shard.read for shard in shards]
    first_rows(1, shards, tokenizer, state)
    assert sum(shard.read for shard in shards) - sum(before) <= 2


def test_with_as_many_processes_each_goes_on_where_it_was() -> None:
    states = [start_of_stream(2) | {"epoch": 1, "used": rank} for rank in range(2)]
    assert [resumed_state(states, rank, 2) for rank in range(2)] == states
    assert resumed_state([], 1, 2) == start_of_stream(2)


def test_with_another_number_of_processes_all_begin_the_same_new_pass(caplog: pytest.LogCaptureFixture) -> None:
    states = [start_of_stream(3) | {"epoch": epoch, "shard": 1, "record": 5, "used": 2} for epoch in (4, 6, 5)]
    with caplog.at_level(logging.WARNING):
        resumed = [resumed_state(states, rank, 2) for rank in range(2)]
    assert resumed == [start_of_stream(2) | {"epoch": 7}] * 2
    assert "the stream was read by 3 processes: a new pass over it begins" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# A pass


@pytest.mark.parametrize(("number", "processes"), [(1, 1), (5, 1), (1, 2), (2, 2), (5, 2), (2, 3), (3, 7)])
def test_every_document_comes_once_a_pass(number: int, processes: int) -> None:
    shards = shards_of(number)
    expected = sorted(document for shard in shards for document in shard)
    for epoch in range(2):
        found = [documents_of_a_pass(shards, processes, rank, epoch) for rank in range(processes)]
        assert sorted(itertools.chain.from_iterable(found)) == expected  # so no two processes share one
        assert all(found)


def documents_of_a_pass(shards: Sequence[Shard], processes: int, rank: int, epoch: int) -> list[str]:
    documents = deal_records(shards, 0, rank, start_of_stream(processes) | {"epoch": epoch})
    return [document for document, _ in itertools.takewhile(lambda pair: pair[1]["epoch"] == epoch, documents)]


def test_every_document_of_a_pass_is_in_its_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_WASTE", 1.0)  # so that documents stay whole
    shards = shards_of(4)
    rows = rows_of_a_pass(shards, tokenizer, 1, 0, seq_length=64)
    documents = [document for shard in shards for document in shard]
    found = documents_in(rows, tokenizer)
    assert sorted(set(found)) == sorted(documents)
    assert len(found) < len(documents) + 40  # the last window reaches into the next pass


def test_a_long_document_is_cut_and_nothing_of_it_is_lost(tokenizer: Any, prose: list[str]) -> None:
    rows = first_rows(100, [Shard([prose[0][:9000]])], tokenizer, start_of_stream(1))
    end_tokens = sum(int(np.sum(row["labels"] == tokenizer.eos_token_id)) for row, _ in rows)
    window = [row for row, state in rows if state["record"] == 0 and state["epoch"] == 0]
    expected = tokenizer.backend_tokenizer.encode(prose[0][:9000], add_special_tokens=False).ids
    labels = np.concatenate([row["labels"][row["labels"] != IGNORED] for row in window])
    assert sorted(labels.tolist()) == sorted([*expected, tokenizer.eos_token_id])
    assert end_tokens >= 1


def test_passes_windows_and_seeds_have_different_orders(tokenizer: Any) -> None:
    shards = shards_of(6)

    def order(epoch: int, seed: int) -> tuple[str, ...]:
        return tuple(documents_in(rows_of_a_pass(shards, tokenizer, 1, 0, epoch, seed=seed, seq_length=64), tokenizer))

    assert len({order(epoch, seed) for epoch in range(3) for seed in range(3)}) == 9
    in_order = [document for shard in shards for document in shard]
    assert list(order(0, 0))[:20] != in_order[:20]


def test_rows_have_the_form_of_cached_rows(tokenizer: Any) -> None:
    for row, _ in first_rows(20, shards_of(2), tokenizer, start_of_stream(1)):
        assert {name: (values.dtype, values.shape) for name, values in row.items()} == dict.fromkeys(
            ("input_ids", "labels", "position_ids"), (np.int64, (SEQ_LENGTH,))
        )


def test_states_of_another_run_are_refused(tokenizer: Any) -> None:
    streams = [TextStream("a", shards_of(2)), TextStream("b", shards_of(2))]
    order = {"weights": [1.0, 1.0], "seed": 0, "global_batch_size": 2, "rank": 0, "num_processes": 1}
    for states in ([[]], [[start_of_stream(1)]]):  # of a run that did not stream, and of one over one stream
        with pytest.raises(UsageError, match=r"^resume: expected a checkpoint of a run over 2 streams"):
            streaming.StreamedUpdates(streams, tokenizer, 16, 1, order, 0, states)


def test_an_error_that_one_process_alone_sees_is_shown(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    order = {"weights": [1.0], "seed": 0, "global_batch_size": 2, "rank": 1, "num_processes": 2}
    updates = streaming.StreamedUpdates([TextStream("a", [Shard(["only one"])])], tokenizer, 16, 1, order, 0, [])
    with pytest.raises(UsageError, match="got none for process 1"):
        next(iter(updates))
    assert "process 1: data: expected records" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Held-out documents


def test_held_out_documents_are_never_trained_on(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "MAX_WASTE", 1.0)  # so that documents stay whole
    stream = TextStream("made up", shards_of(4, documents_each=40))
    held_out = set(stream.held_out(0.2))
    trained = {
        document
        for row in rows_of_a_pass(stream.shards, tokenizer, 1, 0, eval_fraction=0.2, seq_length=64)
        for document in documents_in([row], tokenizer)
    }
    everything = set(stream)
    assert stream.leaving_out(0.2).left_out == 0.2
    assert 10 < len(held_out) < 70
    assert all(is_held_out(document, 0.2) for document in held_out)
    assert not trained & held_out
    assert trained == everything - held_out


def test_held_out_documents_come_from_the_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "HELD_OUT_FROM", 30)
    stream = TextStream("made up", shards_of(4, documents_each=40))
    beginning = list(itertools.islice(stream, 30))
    assert list(stream.held_out(0.5)) == [document for document in beginning if is_held_out(document, 0.5)]
    with pytest.raises(UsageError, match=r"^eval_fraction: 0\.0: expected to hold out some of the first 30 documents"):
        list(stream.held_out(0.0))


def test_held_out_documents_can_be_packed(tokenizer: Any, tmp_path: Path) -> None:
    held_out = TextStream("made up", shards_of(3, documents_each=40)).held_out(0.3)
    options = {"seq_length": 64, "eval_fraction": 1.0, "cache_dir": tmp_path, "num_processes": 1}
    rows = pack_corpus(held_out, tokenizer, **options)[1]
    assert sorted(documents_in([rows.read(row) for row in range(len(rows))], tokenizer)) == sorted(held_out)


# ---------------------------------------------------------------------------------------------------------------------
# Nothing to read


@pytest.mark.timeout(20)
@pytest.mark.parametrize("documents", [[], [""], ["", ""]])
@pytest.mark.parametrize(("number", "processes"), [(1, 1), (3, 1), (3, 2), (1, 2)])
def test_a_stream_of_nothing_ends_in_an_error(
    tokenizer: Any, documents: list[str], number: int, processes: int
) -> None:
    with pytest.raises(UsageError, match=r"^data: expected records to train on in a pass over the stream, got none"):
        first_rows(1, [Shard(documents)] * number, tokenizer, start_of_stream(processes))


@pytest.mark.timeout(20)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stream_that_is_all_held_out_ends_in_an_error(tokenizer: Any, processes: int) -> None:
    with pytest.raises(UsageError, match="all are held out"):
        first_rows(1, shards_of(3), tokenizer, start_of_stream(processes), eval_fraction=0.999999)


@pytest.mark.timeout(20)
def test_fewer_documents_than_processes_end_in_an_error(tokenizer: Any) -> None:
    assert first_rows(1, [Shard(["one"])], tokenizer, start_of_stream(2), rank=0)
    with pytest.raises(UsageError, match="got none for process 1 of 2"):
        first_rows(1, [Shard(["one"])], tokenizer, start_of_stream(2), rank=1)


@pytest.mark.timeout(20)
def test_a_shard_of_nothing_among_others_is_no_error(tokenizer: Any) -> None:
    shards = [Shard([]), Shard([""]), *shards_of(1)]
    for rank in range(3):
        rows = [row for row, _ in first_rows(8, shards, tokenizer, start_of_stream(3), rank)]
        assert documents_in(rows, tokenizer)


@pytest.mark.timeout(20)
def test_a_pass_that_is_resumed_at_its_very_end_is_no_error(tokenizer: Any) -> None:
    state: StreamState = {"num_processes": 1, "epoch": 0, "shard": 0, "record": 12, "used": 0}
    [(_, after)] = first_rows(1, shards_of(1), tokenizer, state)
    assert (after["epoch"], after["record"]) == (0, 12)


# ---------------------------------------------------------------------------------------------------------------------
# Waste


@pytest.mark.parametrize(("seq_length", "rows"), [(256, 1100), (1024, 520)])
def test_little_of_the_rows_is_empty(
    tokenizer: Any, prose: list[str], monkeypatch: pytest.MonkeyPatch, seq_length: int, rows: int
) -> None:
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 512)
    found = first_rows(rows, [Shard(prose)], tokenizer, start_of_stream(1), seq_length=seq_length)
    assert np.mean([np.mean(row["labels"] == IGNORED) for row, _ in found]) < 0.03


@pytest.mark.parametrize("spread", [0.3, 1.0])
def test_little_of_the_rows_of_web_pages_is_empty(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch, spread: float
) -> None:
    """The narrower, the more documents are a bit longer than half a row."""
    monkeypatch.setattr(streaming, "WINDOW_ROWS", 512)
    lengths = np.random.default_rng(0).lognormal(np.log(600) - spread**2 / 2, spread, 3000).astype(int)
    shard = Shard(["a" * max(1, length) for length in lengths])
    token_of_a = len(tokenizer.backend_tokenizer.encode("a" * 1000, add_special_tokens=False))
    assert token_of_a > 200
    found = first_rows(1000, [shard], tokenizer, start_of_stream(1), seq_length=1024 * token_of_a // 1000)
    assert np.mean([np.mean(row["labels"] == IGNORED) for row, _ in found]) < 0.03


# ---------------------------------------------------------------------------------------------------------------------
# Where shards come from


def test_files_are_shards(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text(f"one of {name}\n{DOCUMENT_SEPARATOR}\ntwo of {name}\n")
    shards = open_shards(str(tmp_path), config="", split="", text_column="")
    assert [list(shard) for shard in shards] == [[f"one of {name}\n", f"two of {name}\n"] for name in "ab"]
    [stream, sample] = open_streams(f"{tmp_path}, sample", config="", split="", text_column="text")
    assert list(stream) == list(open_texts(str(tmp_path), config="", split="", text_column=""))
    assert sample.name == "sample"


@pytest.mark.parametrize("data", ["", "./nothing", "nothing.txt", "me/nothing"])
def test_a_stream_of_what_is_not_there(data: str) -> None:
    with pytest.raises(UsageError, match=f"^data: '{data}': expected "):
        open_shards(data, config="", split="train", text_column="")


def test_a_stream_has_the_fingerprint_of_its_files_and_not_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for folder, text in (("a", "one"), ("b", "another")):
        (tmp_path / folder).mkdir()
        monkeypatch.chdir(tmp_path / folder)
        Path("corpus.txt").write_text(text)
        [stream] = open_streams("corpus.txt", config="", split="", text_column="")
        [again] = open_streams("corpus.txt", config="", split="", text_column="")
        assert again.fingerprint == stream.fingerprint
        found += [stream.fingerprint, stream.held_out(0.1).fingerprint, stream.held_out(0.2).fingerprint]
    assert len(set(found)) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Updates


def updates(
    tokenizer: Any, states: list[list[StreamState]], step: int = 0, rank: int = 0, num_processes: int = 1, **order: Any
) -> StreamedUpdates:
    streams = [TextStream("a", shards_of(3)), TextStream("b", shards_of(2))]
    order = {
        "weights": [0.7, 0.3],
        "seed": 0,
        "global_batch_size": 8,
        "rank": rank,
        "num_processes": num_processes,
    } | order
    return StreamedUpdates(streams, tokenizer, SEQ_LENGTH, 2, order, step, states)


def as_lists(update: tuple[list[Row], list[StreamState]]) -> Any:
    batches, states = update
    return [{name: np.asarray(values).tolist() for name, values in batch.items()} for batch in batches], states


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stops=st.lists(st.integers(1, 6), min_size=1, max_size=4), processes=st.sampled_from([1, 2]))
def test_any_number_of_stops_gives_the_same_updates(tokenizer: Any, stops: list[int], processes: int) -> None:
    ranks = range(processes)
    whole = [iter(updates(tokenizer, [], rank=rank, num_processes=processes)) for rank in ranks]
    saved: list[list[StreamState]] = []
    step = 0
    for length in stops:
        resumed = [iter(updates(tokenizer, saved, step, rank, processes)) for rank in ranks]
        for _ in range(length):
            expected, found = [[as_lists(next(each)) for each in side] for side in (whole, resumed)]
            assert found == expected
        saved = json.loads(json.dumps([states for _, states in found]))
        step += length


def test_an_update_has_the_micro_batches_of_this_process(tokenizer: Any) -> None:
    batches, states = next(iter(updates(tokenizer, [], num_processes=2)))
    assert [batch["input_ids"].shape for batch in batches] == [(2, SEQ_LENGTH)] * 2
    assert len(states) == 2


def test_streams_are_mixed_by_their_weights(tokenizer: Any) -> None:
    streams = [TextStream(name, [Shard([name * 20])]) for name in "ab"]
    order = {"weights": [3, 1], "seed": 0, "global_batch_size": 64, "rank": 0, "num_processes": 1}
    every = iter(StreamedUpdates(streams, tokenizer, SEQ_LENGTH, 64, order, 0, []))
    rows = np.concatenate([next(every)[0][0]["input_ids"] for _ in range(64)])  # one block of the mixture
    tokens_of_a = tokenizer.backend_tokenizer.encode("a" * 20, add_special_tokens=False).ids
    assert np.isin(rows, tokens_of_a).any(axis=1).sum() == 0.75 * len(rows)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_data_worker_changes_nothing(tokenizer: Any, num_workers: int) -> None:
    expected = [as_lists(update) for update in itertools.islice(updates(tokenizer, []), 12)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loader = DataLoader(updates(tokenizer, []), batch_size=None, num_workers=num_workers)
        assert [as_lists(update) for update in itertools.islice(loader, 12)] == expected
