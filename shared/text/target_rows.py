"""Examples of which some tokens are targets, packed whole and best-fit into rows; positions restart at each.

    CACHE_DIR/examples/KEY/tokens.bin       uint32, of all examples that have a target in a row, one behind the other
                          /is_target.bin    bool, of each token
                          /pieces.bin       int64 pairs: of each row its examples, as first token and number of inputs
                          /row_ends.bin     int64: where a row's pieces end
                          /summary.json

The key covers examples, tokenizer, chat template and length of a row. A folder is complete or absent.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, one_line
from shared.data import left_out
from shared.data.batches import IGNORED
from shared.runtime.atomic_folder import one_builder, written_aside
from shared.text import tokenization
from shared.text.conversations import Conversations, Example, encode_example, stop_token
from shared.text.document_pool import map_documents
from shared.text.packing import fill_row, pack
from shared.text.token_cache import map_file

_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True, eq=False)
class TargetRows:
    """Rows of `seq_length` tokens, read from memory-mapped files one row at a time.

    Attributes:
        folder: where they lie.
        seq_length: tokens of a row.
        pad_token_id: fills a row up.
        num_cut: examples of which the end was left out.
        num_left_out: examples that had no target within a row, and are not there.
    """

    folder: Path
    seq_length: int
    pad_token_id: int
    num_cut: int
    num_left_out: int

    @functools.cached_property
    def _arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, which of them are targets, pieces (pieces, 2), and where the pieces of each row end."""
        kinds = {"tokens": np.uint32, "is_target": np.bool_, "pieces": np.int64, "row_ends": np.int64}
        tokens, is_target, pieces, row_ends = (map_file(self.folder / f"{name}.bin", kinds[name]) for name in kinds)
        return tokens, is_target, pieces.reshape(-1, 2), row_ends

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself; numpy would send it all of them."""
        return TargetRows, (self.folder, self.seq_length, self.pad_token_id, self.num_cut, self.num_left_out)

    def __len__(self) -> int:
        return len(self._arrays[3])

    @property
    def num_targets(self) -> int:
        """Of all examples."""
        return int(np.count_nonzero(self._arrays[1]))

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Row `row` as int64 arrays (seq_length,): input_ids, labels (-100 = no target), position_ids."""
        tokens, is_target, all_pieces, row_ends = self._arrays
        first = int(row_ends[row - 1]) if row else 0
        pieces = all_pieces[first : int(row_ends[row])].tolist()
        filled = fill_row(
            [tokens[start : start + length + 1] for start, length in pieces], self.seq_length, self.pad_token_id
        )
        learnt = np.concatenate([is_target[start + 1 : start + length + 1] for start, length in pieces])
        filled["labels"][: len(learnt)][~learnt] = IGNORED
        return filled


def pack_examples(
    samples: Conversations, tokenizer: Any, *, seq_length: int, cache_dir: Path, num_processes: int
) -> TargetRows:
    """Tokenise and pack examples, or find that done.

    One that is longer than a row loses its end: what is cut off would have to be predicted without what it answers.

    Args:
        samples: to pack.
        tokenizer: with a chat template, if they are messages.
        seq_length: tokens of a row.
        cache_dir: this node's folder for tokenised data.
        num_processes: tokenising processes.

    Raises:
        UsageError: the chat template does not take an example; it names the row.
    """
    template = tokenizer.chat_template if samples.talks() else ""
    parts = (_FORMAT_VERSION, samples.fingerprint(), tokenization.fingerprint(tokenizer), template, seq_length)
    folder = cache_dir / "examples" / hashlib.sha256(repr(parts).encode("utf-8", "surrogatepass")).hexdigest()[:24]
    if not folder.exists():
        with one_builder(folder) as builds:
            if builds:
                with written_aside(folder) as aside:
                    _write(aside, _encoded(samples, tokenizer, num_processes), seq_length)
    summary = json.loads((folder / "summary.json").read_text())
    where = f"{len(samples):,} examples ({folder.name[:8]})"
    left_out.note("ends_of_long_examples", summary["num_cut"], where=where, more=f"after {seq_length} tokens")
    left_out.note("examples_without_a_target", summary["num_left_out"], where=where)
    return TargetRows(folder, seq_length, tokenizer.eos_token_id, **summary)


def _write(folder: Path, examples: Iterator[Example], seq_length: int) -> None:
    """The files but for their name; of each example a few numbers are kept in memory, and not its tokens."""
    ends, num_cut, num_left_out = [0], 0, 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "is_target.bin").open("wb") as targets:
        for ids, is_target in examples:
            longest = seq_length + 1  # the last token is a target only
            num_cut += len(ids) > longest
            if not is_target[1:longest].any():
                num_left_out += 1
                continue
            tokens.write(ids[:longest].astype(np.uint32).tobytes())
            targets.write(is_target[:longest].tobytes())
            ends.append(ends[-1] + min(len(ids), longest))
    rows = list(pack(ends[1:], seq_length, max_waste=1.0))
    np.array(list(itertools.chain(*rows)), dtype=np.int64).tofile(folder / "pieces.bin")
    np.cumsum([len(row) for row in rows], dtype=np.int64).tofile(folder / "row_ends.bin")
    (folder / "summary.json").write_text(json.dumps({"num_cut": num_cut, "num_left_out": num_left_out}))


def _encoded(samples: Conversations, tokenizer: Any, num_processes: int) -> Iterator[Example]:
    """The examples as tokens, in order."""
    stop = stop_token(tokenizer) if samples.talks() else tokenizer.eos_token_id
    found = map_documents(
        _encode_batch,
        map(json.dumps, samples.records),
        start=_start_worker,
        arguments=(tokenizer, stop),
        num_processes=num_processes,
        description="tokenising",
    )
    for row, example in enumerate(found):
        if isinstance(example, str):
            raise UsageError(f"data: row {row}: expected a conversation that the chat template takes: {example}")
        yield example


_worker: dict[str, Any] = {}


def _start_worker(tokenizer: Any, stop: int) -> None:
    _worker.update(tokenizer=tokenizer, stop=stop)


def _encode_batch(records: list[str]) -> list[Example | str]:
    """Of each example its tokens, or why there are none."""
    encoded: list[Example | str] = []
    for record in map(json.loads, records):
        try:
            encoded.append(encode_example(_worker["tokenizer"], record, _worker["stop"]))
        except Exception as error:  # Jinja's errors, what a template raises, and UsageError have no common class
            encoded.append(one_line(error))
    return encoded
