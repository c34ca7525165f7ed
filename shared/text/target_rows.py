"""Examples of which some tokens are targets, packed whole and best-fit into rows; positions restart at each."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.command_line import UsageError
from shared.data.batches import IGNORED
from shared.text.conversations import Conversations, Example, encode_example, stop_token
from shared.text.packing import Piece, fill_row, pack


@dataclasses.dataclass(frozen=True, eq=False)
class TargetRows:
    """Rows of `seq_length` tokens.

    Attributes:
        tokens: int64, of all examples one behind the other.
        is_target: bool, of each token.
        rows: of each row its examples, as first token and number of tokens that are read.
        seq_length: tokens of a row.
        pad_token_id: fills a row up.
        num_cut: examples of which the end was left out.
        num_left_out: examples that had no target within a row, and are not there.
    """

    tokens: np.ndarray
    is_target: np.ndarray
    rows: Sequence[list[Piece]]
    seq_length: int
    pad_token_id: int
    num_cut: int
    num_left_out: int

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def num_targets(self) -> int:
        """Of all examples."""
        return int(self.is_target.sum())

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Row `row` as int64 arrays (seq_length,): input_ids, labels (-100 = no target), position_ids."""
        pieces = self.rows[row]
        filled = fill_row(
            [self.tokens[start : start + length + 1] for start, length in pieces], self.seq_length, self.pad_token_id
        )
        is_target = np.concatenate([self.is_target[start + 1 : start + length + 1] for start, length in pieces])
        filled["labels"][: len(is_target)][~is_target] = IGNORED
        return filled


def pack_examples(samples: Conversations, tokenizer: Any, seq_length: int) -> TargetRows:
    """Tokenise examples and pack them.

    One that is longer than a row loses its end: what is cut off would have to be predicted without what it answers.

    Args:
        samples: to pack.
        tokenizer: with a chat template, if they are messages.
        seq_length: tokens of a row.

    Raises:
        UsageError: the chat template does not take an example; it names the row.
    """
    from tqdm import tqdm

    stop, examples = stop_token(tokenizer) if samples.talks() else tokenizer.eos_token_id, []
    for row, record in enumerate(tqdm(samples.records, desc="tokenising", delay=2)):
        try:
            examples.append(encode_example(tokenizer, record, stop))
        except Exception as error:  # Jinja's errors, what a template raises, and UsageError have no common class
            reason = " ".join(str(error).split())
            raise UsageError(
                f"data: row {row}: expected a conversation that the chat template takes: {reason}"
            ) from error
    longest = seq_length + 1  # the last token is a target only
    kept = [Example(ids[:longest], is_target[:longest]) for ids, is_target in examples]
    with_targets = [example for example in kept if example.is_target[1:].any()]
    ends = np.cumsum([len(example.ids) for example in with_targets])
    return TargetRows(
        tokens=np.concatenate([example.ids for example in with_targets]) if with_targets else np.zeros(0, np.int64),
        is_target=np.concatenate([example.is_target for example in with_targets] or [np.zeros(0, bool)]),
        rows=list(pack(ends, seq_length, max_waste=1.0)),
        seq_length=seq_length,
        pad_token_id=tokenizer.eos_token_id,
        num_cut=sum(len(example.ids) > longest for example in examples),
        num_left_out=len(examples) - len(with_targets),
    )
