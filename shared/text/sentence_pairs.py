"""Sentence pairs for next sentence prediction, as in Devlin et al. 2019, appendix A.2, and its released code.

A document is walked through once an epoch: sentences are taken up to the target length and parted in two at random; the
second segment is the true continuation in half of the pairs, and otherwise sentences of another document from a
random one on, and what it replaced returns to the walk. The target is the whole row, in a tenth of the pairs a shorter
one at random. Pairs that are too long lose tokens from either end of the longer segment.

One thing differs from the released code: there a single sentence that fills a row always gets a random second segment,
so that fewer than half continue. Here the coin is thrown first: a true pair takes one sentence more, and where one
sentence is left of a document, the one before it goes first once more.
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shared.data.batches import IGNORED
from shared.data.randomness import derive_seed, shuffled_indices
from shared.runtime.atomic_folder import one_at_a_time, written_aside
from shared.text.sentence_cache import SentenceCache
from shared.text.token_cache import cache_key, map_file

NUM_SPECIAL = 3  # [CLS] A [SEP] B [SEP]
WINDOW_UPDATES = 64  # updates whose pairs are sorted by length together; more would pad less and mix less
FORMAT_VERSION = 1
_WRITTEN_AT_ONCE = 1 << 16

Pair = tuple[int, int, int, int, int]  # A's first sentence and end, B's first sentence and end, 1 where B follows A


def make_pairs(cache: SentenceCache, seq_length: int, short_fraction: float, seed: int) -> Iterator[Pair]:
    """All pairs of one epoch, document after document.

    Args:
        cache: documents of two sentences or more, at least two of them.
        seq_length: tokens of a row, the three special ones included.
        short_fraction: share of the pairs with a target below that.
        seed: of every draw; another seed for each epoch.
    """
    longest = seq_length - NUM_SPECIAL
    ends = cache.document_ends
    first = 0
    for document, last in enumerate(ends.tolist()):
        draw = random.Random(derive_seed(seed, document)).random
        token_ends = [int(cache.sentence_ends[first - 1]) if first else 0, *cache.sentence_ends[first:last].tolist()]
        start, count = 0, last - first
        while start < count:
            target = 2 + int(draw() * (longest - 1)) if draw() < short_fraction else longest
            is_next = draw() < 0.5
            if is_next and start == count - 1:
                start -= 1
            end = start + 1 + is_next
            while end < count and token_ends[end] - token_ends[start] < target:
                end += 1
            middle = start + 1 + int(draw() * (end - start - 1))
            if is_next:
                yield first + start, first + middle, first + middle, first + end, 1
                start = end
            else:
                room = target - (token_ends[middle] - token_ends[start])
                other = int(draw() * (len(ends) - 1))
                yield (
                    first + start,
                    first + middle,
                    *_random_segment(cache, other + (other >= document), room, draw()),
                    0,
                )
                start = middle
        first = last


def _random_segment(cache: SentenceCache, document: int, room: int, where: float) -> tuple[int, int]:
    """Sentences of `document` from a random one on until `room` tokens are filled: the first, and their end."""
    begin = int(cache.document_ends[document - 1]) if document else 0
    last = int(cache.document_ends[document])
    first = begin + int(where * (last - begin))
    used = int(cache.sentence_ends[first - 1]) if first else 0
    # The shortest stretch that fills the room: every sentence has a token at least, so this slice is long enough.
    token_ends = cache.sentence_ends[first : min(last, first + max(room, 1))]
    end = first + 1 + int(np.searchsorted(token_ends, used + room))
    return first, min(end, last)


@dataclasses.dataclass(frozen=True, eq=False)
class SentencePairs:
    """A corpus as pairs, other ones every epoch: a function of (corpus, settings, seed, epoch).

    An epoch's pairs are found once a node and kept beside the corpus, 40 bytes a pair.

    Attributes:
        cache: the corpus.
        tokenizer_ids: of [CLS], [SEP] and [PAD].
        seq_length: tokens of a row.
        short_fraction: share of the pairs that are made shorter.
        seed: of all draws.
    """

    cache: SentenceCache
    tokenizer_ids: tuple[int, int, int]
    seq_length: int
    short_fraction: float
    seed: int

    def epoch(self, epoch: int) -> np.ndarray:
        """The pairs of an epoch, int64 (pairs, 5), memory-mapped; see `Pair`."""
        return _open_epoch(self.cache, self.seq_length, self.short_fraction, derive_seed(self.seed, "pairs", epoch))

    def lengths(self, pairs: np.ndarray) -> np.ndarray:
        """Tokens in a row of each of the given pairs, int64 (pairs,)."""
        ends = self.cache.sentence_ends
        firsts = pairs[:, (0, 2)]
        segments = ends[pairs[:, (1, 3)] - 1] - np.where(firsts > 0, ends[firsts - 1], 0)
        return np.minimum(segments.sum(axis=1) + NUM_SPECIAL, self.seq_length)

    def updates_per_epoch(self, global_batch_size: int) -> int:
        """Whole batches of the first epoch, at least one; every epoch, a little longer or shorter, is given as many."""
        return max(1, len(self.epoch(0)) // global_batch_size)

    def samples_of_update(
        self, step: int, *, global_batch_size: int, rank: int, num_processes: int
    ) -> list[tuple[int, int]]:
        """(epoch, pair) of the samples of update `step` on process `rank`, found in constant time.

        Pairs of like length share an update, so that little is padded: an epoch is shuffled, windows of
        `WINDOW_UPDATES` whole updates are sorted by length, and the updates of a window are shuffled. Processes take
        equal, adjacent shares, so their number never changes what an update sees.
        """
        epoch, update = divmod(step, self.updates_per_epoch(global_batch_size))
        window, place = divmod(update, WINDOW_UPDATES)
        share = global_batch_size // num_processes
        mine = _window(self, epoch, window, global_batch_size)[place, rank * share : (rank + 1) * share]
        return [(epoch, pair) for pair in mine.tolist()]

    def read(self, epoch: int, pair: int) -> dict[str, np.ndarray]:
        """A pair as input_ids, token_type_ids and attention_mask (seq_length,), and next_sentence_label (), all int64.

        The label is 0 where the second segment continues the first and 1 where it does not, as transformers has it.
        """
        a_first, a_end, b_first, b_end, is_next = self.epoch(epoch)[pair].tolist()
        draw = random.Random(derive_seed(self.seed, "truncation", epoch, pair))
        longest = self.seq_length - NUM_SPECIAL
        a, b = truncate(self.cache.read(a_first, a_end), self.cache.read(b_first, b_end), longest, draw)
        cls, sep, pad = self.tokenizer_ids
        ids = np.concatenate([[cls], a, [sep], b, [sep]])
        row = {"input_ids": np.full(self.seq_length, pad, dtype=np.int64)}
        row["input_ids"][: len(ids)] = ids
        positions = np.arange(self.seq_length)
        row["token_type_ids"] = ((positions >= len(a) + 2) & (positions < len(ids))).astype(np.int64)
        row["attention_mask"] = (positions < len(ids)).astype(np.int64)
        row["next_sentence_label"] = np.array(1 - is_next)
        return row


def truncate(a: np.ndarray, b: np.ndarray, longest: int, draw: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Cut two segments to `longest` tokens together: always from the longer one, from either end with equal chance."""
    keep_a = min(len(a), max(longest - len(b), (longest + 1) // 2))
    keep_b = min(len(b), longest - keep_a)
    first_a = draw.getrandbits(len(a) - keep_a).bit_count()  # a fair coin for each token that goes
    first_b = draw.getrandbits(len(b) - keep_b).bit_count()
    return a[first_a : first_a + keep_a], b[first_b : first_b + keep_b]


@functools.lru_cache(maxsize=2)  # an update needs one, the next one the same
def _window(pairs: SentencePairs, epoch: int, window: int, global_batch_size: int) -> np.ndarray:
    """The updates of a window, int64 (updates, global_batch_size): indices of the epoch's pairs."""
    of_epoch = pairs.epoch(epoch)
    first = window * WINDOW_UPDATES
    num_updates = min(WINDOW_UPDATES, pairs.updates_per_epoch(global_batch_size) - first)
    positions = (first * global_batch_size + np.arange(num_updates * global_batch_size)) % len(of_epoch)
    indices = shuffled_indices(positions, len(of_epoch), derive_seed(pairs.seed, "order", epoch))
    by_length = indices[np.argsort(pairs.lengths(of_epoch[indices]), kind="stable")].reshape(num_updates, -1)
    order_seed = derive_seed(pairs.seed, "updates", epoch, window)
    return by_length[shuffled_indices(np.arange(num_updates), num_updates, order_seed)]


@functools.lru_cache(maxsize=4)
def _open_epoch(cache: SentenceCache, seq_length: int, short_fraction: float, seed: int) -> np.ndarray:
    folder = cache.folder / f"pairs_{cache_key(FORMAT_VERSION, seq_length, short_fraction, seed)}"
    file = folder / "pairs.bin"
    if not file.exists():
        with one_at_a_time(folder):
            if not file.exists():
                _write_epoch(folder, cache, seq_length, short_fraction, seed)
    return map_file(file, np.int64).reshape(-1, 5).view(np.ndarray)  # memmap's own indexing is slow


def _write_epoch(folder: Path, cache: SentenceCache, seq_length: int, short_fraction: float, seed: int) -> None:
    with written_aside(folder) as aside, (aside / "pairs.bin").open("wb") as file:
        pairs = make_pairs(cache, seq_length, short_fraction, seed)
        while block := list(itertools.islice(pairs, _WRITTEN_AT_ONCE)):
            file.write(np.array(block, dtype=np.int64).tobytes())


def cut_padding(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A batch of pairs, their tokens masked, without columns that none of its rows needs.

    Args:
        batch: input_ids, token_type_ids and attention_mask (B, T); masked_positions and labels (B, M).
    """
    ends = dict.fromkeys(("input_ids", "token_type_ids", "attention_mask"), int(batch["attention_mask"].sum(1).max()))
    ends |= dict.fromkeys(("masked_positions", "labels"), max(1, int((batch["labels"] != IGNORED).sum(1).max())))
    return {name: values[:, : ends[name]] if name in ends else values for name, values in batch.items()}


def without_targets(row: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The row of a pair, its tokens masked, with nothing to predict."""
    return {**row, **{name: np.full_like(row[name], IGNORED) for name in ("labels", "next_sentence_label")}}
