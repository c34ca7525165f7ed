"""Labelled texts as rows of tokens, and batches of them that are no longer than their longest row."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from shared.data.batches import IGNORED
from shared.text.labelled import LabelledTexts


@dataclasses.dataclass(frozen=True, eq=False)
class LabelRows:
    """N rows of tokens and their labels.

    Attributes:
        columns: of each input of the model, such as input_ids, the values of every row.
        labels: int64 (N,) classes, float32 (N,) numbers, or of each row a class for every token, -100 where it has
            none.
        padding: of each input, the value that fills a row up.
        num_cut: texts, or pairs, that are longer than a row.
        num_words_left_out: words behind a row's end, which have labels and are not there.
    """

    columns: dict[str, list[list[int]]]
    labels: Any
    padding: dict[str, int]
    num_cut: int
    num_words_left_out: int

    def __len__(self) -> int:
        return len(self.labels)

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        return tuple(map(len, self.columns["input_ids"]))

    def batch(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Rows as the inputs of a model, int64 (B, T), and their labels (B,), of tokens (B, T)."""
        batch = {
            name: _padded([rows[index] for index in indices], self.padding[name]) for name, rows in self.columns.items()
        }
        chosen = [self.labels[index] for index in indices]
        batch["labels"] = _padded(chosen, IGNORED) if isinstance(self.labels, list) else np.stack(chosen)
        return batch


def encode(samples: LabelledTexts, tokenizer: Any, seq_length: int) -> LabelRows:
    """Tokenise texts, each row cut to `seq_length` tokens; of a pair the longer text is cut first.

    The class of a word is that of its first token; the others have none, as Devlin et al. 2019 have it (section 5.3).

    Args:
        samples: texts and labels.
        tokenizer: a fast transformers tokenizer.
        seq_length: tokens of a row, special ones included.
    """
    options = {"truncation": True, "max_length": seq_length, "return_attention_mask": True}
    if samples.problem == "tags":
        encoded = tokenizer(list(samples.texts), is_split_into_words=True, **options)
        words = [encoded.word_ids(row) for row in range(len(samples))]
        labels: Any = [_first_tokens(*row) for row in zip(words, samples.labels, strict=True)]
    else:
        encoded = tokenizer(list(samples.texts), samples.pairs and list(samples.pairs), **options)
        labels, words = samples.labels, []
    padding = {"input_ids": tokenizer.pad_token_id, "token_type_ids": 0, "attention_mask": 0}
    columns = {name: list(encoded[name]) for name in padding if name in encoded}
    num_cut = sum(bool(encoding.overflowing) for encoding in encoded.encodings)
    # Words come in order, and a row has those up to its last one.
    last_words = [max((word for word in row if word is not None), default=-1) for row in words]
    lengths = map(len, samples.texts if words else [])
    num_left_out = sum(length - last - 1 for length, last in zip(lengths, last_words, strict=True))
    return LabelRows(columns, labels, padding, num_cut, num_left_out)


def _first_tokens(words: list[int | None], labels: list[int]) -> list[int]:
    """The label of each token: its word's where the word begins."""
    before = [None, *words]
    return [
        IGNORED if word is None or word == last else labels[word] for word, last in zip(words, before, strict=False)
    ]


def _padded(rows: list[list[int]], value: int) -> np.ndarray:
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = row
    return padded
