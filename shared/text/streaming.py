"""Rows from a corpus that is read as it arrives, never stored.

A stream has no index, so order and state differ from the cached path: documents come as `shards.deal_records` deals
them, and a bounded window of them is cut, packed best-fit and shuffled at a time.
"""

import hashlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch

from shared.command_line import UsageError
from shared.data.batches import micro_batches
from shared.data.hub_data import resolve
from shared.data.randomness import derive_seed, shuffled_indices
from shared.data.sample_order import mixture_sources, positions_of_update
from shared.data.shards import StreamState, deal_records, resumed_state
from shared.text import tokenization
from shared.text.documents import (
    LocalTexts,
    Texts,
    hub_errors,
    list_corpora,
    local_files,
    open_texts,
    pick_text_column,
    text_columns,
)
from shared.text.packing import MAX_WASTE, BestFitPacker, cut, fill_row
from shared.text.token_cache import content_share
from shared.text.vocabulary import special_ids

logger = logging.getLogger(__name__)

HELD_OUT_FROM = 10_000  # documents of a stream's beginning among which those to evaluate on are found
WINDOW_ROWS = 512  # 2 MB of tokens at 1,024 a row; more would shuffle better and start later


def open_shards(data: str, *, config: str, split: str, text_column: str) -> Sequence[Texts]:
    """The shards of a corpus; a Hub data set is not downloaded.

    Raises:
        UsageError: nothing is there, or the column is not.
    """
    if local_files(data, split):
        texts = open_texts(data, config=config, split=split, text_column=text_column)
        assert isinstance(texts, LocalTexts)
        return [LocalTexts(data, (file,), texts.text_column, file.name) for file in texts.files]
    with hub_errors(data):
        import datasets

        name, configuration, commit = resolve(data, config)
        builder = datasets.load_dataset_builder(name, configuration, revision=commit)
        dataset = builder.as_streaming_dataset(split=split)
        columns = text_columns(dataset)
    if not columns:
        raise UsageError(f"data: {data!r}: expected at least one document, got none")
    column = pick_text_column(data, columns, text_column)
    version = f"{data} {builder.config.name} {builder.hash} {split}"  # the hash is that of the commit
    count = dataset.num_shards
    return [_HubShard(dataset.shard(count, index), column, f"{version} {index} of {count}") for index in range(count)]


class _HubShard:
    def __init__(self, dataset: Any, text_column: str, version: str) -> None:
        self._dataset, self._text_column = dataset, text_column
        self.fingerprint = f"{version} {text_column}"

    def __iter__(self) -> Iterator[str]:
        for record in self._dataset:
            if record[self._text_column]:
                yield record[self._text_column]


def is_held_out(document: str, eval_fraction: float) -> bool:
    """Whether a document of a stream belongs to the eval split; depends on its content alone."""
    return content_share(tokenization.to_bytes(document)) < eval_fraction


def stream_rows(
    shards: Sequence[Iterable[str]],
    tokenizer: Any,
    *,
    seq_length: int,
    eval_fraction: float,
    seed: int,
    rank: int,
    state: StreamState,
) -> Iterator[tuple[dict[str, np.ndarray], StreamState]]:
    """Endless rows for one process, each with the state after it.

    Args:
        shards: iterables of documents.
        tokenizer: a fast transformers tokenizer.
        seq_length: tokens of a row.
        eval_fraction: share of the documents that is passed over, see `is_held_out`.
        seed: of the order of shards and of the rows in a window.
        rank: this process.
        state: where to go on.

    Yields:
        The row as int64 arrays (seq_length,) input_ids, labels (-100 = padding) and position_ids; the state after it.

    Raises:
        UsageError: no document is left to this process, since all are empty or held out, or there are too few.
    """
    begin, end = special_ids(tokenizer)
    documents = deal_records([_Trained(shard, eval_fraction) for shard in shards], seed, rank, state)
    window_start: StreamState = {**state, "used": 0}
    used = state["used"]
    while True:
        window: list[np.ndarray] = []
        packer = BestFitPacker(seq_length, MAX_WASTE)
        rows, num_tokens = [], 0
        window_end = window_start
        while num_tokens < WINDOW_ROWS * seq_length:
            document, window_end = next(documents)
            ids = np.concatenate([[begin], tokenization.encode(tokenizer.backend_tokenizer, document), [end]])
            window.append(ids)
            for piece in cut(num_tokens, num_tokens + len(ids), seq_length):
                rows += packer.add(piece)
            num_tokens += len(ids)
        rows += packer.flush()
        tokens = np.concatenate(window)
        window_seed = derive_seed(seed, "window", window_start["epoch"], window_start["shard"], window_start["record"])
        order = shuffled_indices(np.arange(len(rows)), len(rows), derive_seed(window_seed, rank))
        for position in range(used, len(rows)):
            row = [tokens[start : start + length + 1] for start, length in rows[order[position]]]
            yield fill_row(row, seq_length, end), {**window_start, "used": position + 1}
        window_start, used = window_end, 0


class _Trained:
    """The documents of a shard that are not empty and not held out."""

    def __init__(self, shard: Iterable[str], eval_fraction: float) -> None:
        self._shard, self._eval_fraction = shard, eval_fraction

    def __iter__(self) -> Iterator[str]:
        return (document for document in self._shard if document and not is_held_out(document, self._eval_fraction))


class TextStream:
    """A corpus that is read as it arrives.

    Args:
        name: as the user gave it.
        shards: its parts.
        left_out: share of the documents, chosen by their content, that training passes over.
    """

    def __init__(self, name: str, shards: Sequence[Texts], left_out: float = 0.0) -> None:
        self.name, self.shards, self.left_out = name, shards, left_out
        parts = [shard.fingerprint for shard in shards]
        self.fingerprint = hashlib.sha256(repr((parts, left_out)).encode()).hexdigest()[:16]

    def __iter__(self) -> Iterator[str]:
        for shard in self.shards:
            yield from shard

    def leaving_out(self, fraction: float) -> "TextStream":
        """The same stream without the documents that `held_out` has."""
        return TextStream(self.name, self.shards, fraction)

    def held_out(self, fraction: float) -> "HeldOut":
        """The documents left out among the first `HELD_OUT_FROM`."""
        return HeldOut(self, fraction)


class HeldOut:
    """The held-out documents of a stream's beginning, for evaluation."""

    def __init__(self, stream: TextStream, fraction: float) -> None:
        self._stream, self._fraction, self.name = stream, fraction, stream.name
        self.fingerprint = f"held out {fraction} of {stream.fingerprint}"

    def __iter__(self) -> Iterator[str]:
        beginning = itertools.islice(self._stream, HELD_OUT_FROM)
        documents = (document for document in beginning if is_held_out(document, self._fraction))
        first = next(documents, None)
        if first is None:
            raise UsageError(
                f"eval_fraction: {self._fraction}: expected to hold out some of the first {HELD_OUT_FROM:,} documents "
                f"of {self._stream.name!r}, got none; set eval_data, or a larger share"
            )
        yield first
        yield from documents


def open_streams(data: str, *, config: str, split: str, text_column: str) -> list[TextStream]:
    """A stream for each of several comma-separated corpora; see `list_corpora` and `open_shards`."""
    corpora = list_corpora(data, config=config, split=split, text_column=text_column)
    return [TextStream(corpus["data"], open_shards(**corpus)) for corpus in corpora]


class StreamedUpdates(torch.utils.data.IterableDataset):
    """Endless updates of one process from weighted streams: micro-batches, and the states of the streams after them.

    Args:
        streams: one or more corpora.
        tokenizer: a fast transformers tokenizer.
        seq_length: tokens of a row.
        micro_batch_size: rows of a micro-batch.
        order: weights, seed, global_batch_size, rank and num_processes.
        step: first update.
        states: of every process and stream as a checkpoint kept them; empty = from the start.
    """

    def __init__(
        self,
        streams: list[TextStream],
        tokenizer: Any,
        seq_length: int,
        micro_batch_size: int,
        order: dict[str, Any],
        step: int,
        states: list[list[StreamState]],
    ) -> None:
        self._streams, self._tokenizer, self._seq_length = streams, tokenizer, seq_length
        self._micro_batch_size, self._order, self._step = micro_batch_size, order, step
        if any(len(saved) != len(streams) for saved in states):
            raise UsageError(f"resume: expected a checkpoint of a run over {len(streams)} streams, got another one")
        of_streams = zip(*states, strict=True) if states else [[] for _ in streams]
        self._states = [resumed_state(list(saved), order["rank"], order["num_processes"]) for saved in of_streams]

    def __iter__(self) -> Iterator[tuple[list[dict[str, np.ndarray]], list[StreamState]]]:
        order = self._order
        rows = [
            stream_rows(
                stream.shards,
                self._tokenizer,
                seq_length=self._seq_length,
                eval_fraction=stream.left_out,
                seed=derive_seed(order["seed"], "stream", index),
                rank=order["rank"],
                state=state,
            )
            for index, (stream, state) in enumerate(zip(self._streams, self._states, strict=True))
        ]
        states = list(self._states)
        for step in itertools.count(self._step):
            positions = positions_of_update(step, order["global_batch_size"], order["rank"], order["num_processes"])
            sources, _ = mixture_sources(positions, order["weights"], order["seed"])
            update = []
            for source in sources.tolist():
                row, states[source] = self._next(rows[source])
                update.append(row)
            yield micro_batches(update, self._micro_batch_size), list(states)

    def _next(self, rows: Iterator[tuple[dict[str, np.ndarray], StreamState]]) -> Any:
        try:
            return next(rows)
        except UsageError as error:
            if self._order["rank"]:  # whose errors are not shown at the end, since most are those of all processes
                logger.error("process %d: %s", self._order["rank"], error)
            raise
