"""Rows of several documents: documents are cut into pieces of at most a row, pieces are packed best-fit.

A piece is a stretch of one document's tokens; its targets are the same stretch one token later, so every token but a
document's first is a target exactly once, also where a document is cut. A row holds pieces of one or more documents;
positions restart at each piece, which is how transformers' models keep them from attending to each other.

Best-fit within a bounded window of open rows (Ding et al. 2024, "Fewer Truncations Improve Language Modeling", with
the bound in place of the sort over the whole corpus): memory stays flat and little of a row is left empty. Where many
documents are a bit longer than half a row, no packing of whole ones would be good: there some are cut to fill a row.
Held-out documents never are, whatever that leaves empty, so that each is seen with all of its context.
"""

import dataclasses
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shared.data.batches import IGNORED, micro_batches
from shared.data.subsets import fixed_choice
from shared.runtime.atomic_folder import written_aside
from shared.text import tokenization
from shared.text.documents import Texts
from shared.text.token_cache import (
    SPLITS,
    TokenCache,
    build_token_cache,
    cache_key,
    map_file,
    note_empty_documents,
    open_token_cache,
    parts_folder,
)

OPEN_ROWS = 1024
MAX_WASTE = 0.02  # share of the tokens of training rows that may stay empty before documents are cut
Piece = tuple[int, int]  # (first input token, number of input tokens)


@dataclasses.dataclass
class BestFitPacker:
    """Puts each piece into the fullest open row that has room for it, and cuts pieces where too much would stay empty.

    Attributes:
        seq_length: tokens a row has room for.
        max_waste: share of the tokens of all closed rows, the last one apart, that may be empty; 1 = cut no piece.
        open_rows: free tokens -> rows with exactly that much room, at most `OPEN_ROWS` in all.
    """

    seq_length: int
    max_waste: float
    open_rows: dict[int, list[list[Piece]]] = dataclasses.field(default_factory=dict)
    num_open: int = 0
    _rooms: int = 0  # bit r is set while a row with r free tokens is open
    _num_closed: int = 0
    _num_empty: int = 0

    def add(self, piece: Piece) -> list[list[Piece]]:
        """Place a piece of at most `seq_length` tokens; return the rows that this closes, two at most."""
        start, length = piece
        closed = []
        if self.num_open == OPEN_ROWS and not self._rooms >> length:
            room, row = self._take_fullest()
            if self._wastes_too_much(room):
                row.append((start, room))
                start, length, room = start + room, length - room, 0
            closed.append(self._close(row, room))
        return closed + self._place(start, length)

    def flush(self) -> Iterator[list[Piece]]:
        """Close all open rows, the fullest first; where they are too empty, fill them with pieces of the emptiest."""
        while self._rooms:
            room, row = self._take_fullest()
            if not self.num_open or not self._wastes_too_much(room):
                yield self._close(row, room)
                continue
            self._put(room, row)
            for start, length in self._take(self._rooms.bit_length() - 1):
                while self._rooms and not self._rooms >> length:
                    room, row = self._take_fullest()
                    yield self._close([*row, (start, room)], 0)
                    start, length = start + room, length - room
                yield from self._place(start, length)

    def _place(self, start: int, length: int) -> list[list[Piece]]:
        """Put a piece into the fullest row with room for it, or a new one; return the row if it is full now."""
        fitting = self._rooms >> length
        room = length + _lowest_bit(fitting) if fitting else self.seq_length
        row = self._take(room) if fitting else []
        row.append((start, length))
        if room == length:
            return [self._close(row, 0)]
        self._put(room - length, row)
        return []

    def _wastes_too_much(self, room: int) -> bool:
        return self._num_empty + room > self.max_waste * self.seq_length * (self._num_closed + 1)

    def _close(self, row: list[Piece], room: int) -> list[Piece]:
        self._num_closed += 1
        self._num_empty += room
        return row

    def _take_fullest(self) -> tuple[int, list[Piece]]:
        room = _lowest_bit(self._rooms)
        return room, self._take(room)

    def _take(self, room: int) -> list[Piece]:
        rows = self.open_rows[room]
        row = rows.pop(0)
        self.num_open -= 1
        if not rows:
            del self.open_rows[room]
            self._rooms &= ~(1 << room)
        return row

    def _put(self, room: int, row: list[Piece]) -> None:
        self.open_rows.setdefault(room, []).append(row)
        self._rooms |= 1 << room
        self.num_open += 1


def _lowest_bit(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def cut(first: int, last: int, seq_length: int) -> Iterator[Piece]:
    """Pieces of the document tokens[first:last]; its last token is a target only."""
    for start in range(first, last - 1, seq_length):
        yield start, min(seq_length, last - 1 - start)


def pack(document_ends: Iterable[int], seq_length: int, max_waste: float) -> Iterator[list[Piece]]:
    """Rows of pieces for documents that lie one behind the other and end at `document_ends`; see `BestFitPacker`."""
    packer = BestFitPacker(seq_length, max_waste)
    first = 0
    for last in document_ends:
        for piece in cut(first, int(last), seq_length):
            yield from packer.add(piece)
        first = int(last)
    yield from packer.flush()


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """A corpus as rows of `seq_length` tokens, read from the memory-mapped cache one row at a time."""

    cache: TokenCache
    seq_length: int
    pad_token_id: int
    pieces: np.ndarray  # int64 (pieces, 2), memory-mapped: first token, number of tokens
    row_ends: np.ndarray  # int64 (rows,), memory-mapped: where the row's pieces end

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself; numpy would send it all of them."""
        return open_packed_rows, (self.cache, self.seq_length, self.pad_token_id)

    def __len__(self) -> int:
        return len(self.row_ends)

    @property
    def num_targets(self) -> int:
        """Of all rows together: each token but the first of its document."""
        return len(self.cache.tokens) - len(self.cache.ends)

    @property
    def fingerprint(self) -> str:
        """Name of the cache folder, which changes with data, tokenizer and settings."""
        return self.cache.folder.parent.name

    def read(self, row: int) -> dict[str, np.ndarray]:
        """Row `row` as int64 arrays (seq_length,): input_ids, labels (-100 = padding), position_ids."""
        first = int(self.row_ends[row - 1]) if row else 0
        pieces = self.pieces[first : int(self.row_ends[row])].tolist()
        stretches = [self.cache.tokens[start : start + length + 1] for start, length in pieces]
        return fill_row(stretches, self.seq_length, self.pad_token_id)


@dataclasses.dataclass(frozen=True)
class Windows:
    """Rows of `seq_length` tokens, one behind the other over a whole corpus: documents see each other across borders.

    This is how llm.c and others evaluate; here as there one end token lies between two documents. What is left behind
    the last whole row is left out.
    """

    tokens: np.ndarray  # (tokens of the cache,), memory-mapped
    left_out: np.ndarray  # int64 (documents - 1,): before which token of the stream one of the cache is left out
    seq_length: int
    pad_token_id: int

    def __len__(self) -> int:
        return max(0, len(self.tokens) - len(self.left_out) - 1) // self.seq_length

    def read(self, row: int) -> dict[str, np.ndarray]:
        """See `PackedRows.read`."""
        places = np.arange(row * self.seq_length, (row + 1) * self.seq_length + 1)
        places += np.searchsorted(self.left_out, places, side="right")
        return fill_row([self.tokens[places]], self.seq_length, self.pad_token_id)


def windows(rows: PackedRows) -> Windows:
    """The documents of `rows` as windows."""
    begins = rows.cache.ends[:-1]  # of all documents but the first; a begin token there follows an end token
    return Windows(rows.cache.tokens, begins - np.arange(len(begins)), rows.seq_length, rows.pad_token_id)


def in_batches(
    rows: PackedRows | Windows, batch_size: int, rank: int, processes: int, most: int = 0
) -> Iterator[dict[str, np.ndarray]]:
    """A process's share of the rows, at most `most` (0 = all), in batches of (B, T), with a bar on a terminal.

    All processes get as many batches: where no row is left for one, it has one of padding.
    """
    chosen = fixed_choice(len(rows), most)
    starts = range(0, len(chosen), batch_size * processes)
    is_quiet = rank > 0 or None  # None: where there is no terminal
    for first in tqdm(starts, desc="evaluating", delay=2, leave=False, disable=is_quiet):
        mine = chosen[first + rank * batch_size :][:batch_size].tolist()
        found = [rows.read(row) for row in mine] or [fill_row([], rows.seq_length, rows.pad_token_id)]
        yield micro_batches(found, batch_size)[0]


def fill_row(stretches: list[np.ndarray], seq_length: int, pad_token_id: int) -> dict[str, np.ndarray]:
    """Lay out stretches of tokens, each one token longer than its piece, as the tensors of one row."""
    input_ids = np.full(seq_length, pad_token_id, dtype=np.int64)
    labels = np.full(seq_length, IGNORED, dtype=np.int64)
    position_ids = np.empty(seq_length, dtype=np.int64)
    at = 0
    for stretch in stretches:
        end = at + len(stretch) - 1
        input_ids[at:end] = stretch[:-1]
        labels[at:end] = stretch[1:]
        position_ids[at:end] = np.arange(end - at)
        at = end
    position_ids[at:] = np.arange(seq_length - at)  # padding is a document of its own
    return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def pack_corpus(
    documents: Texts, tokenizer: Any, *, seq_length: int, eval_fraction: float, cache_dir: Path, num_processes: int
) -> tuple[PackedRows, PackedRows]:
    """Tokenise and pack a corpus, or find that done: rows to train on and rows to evaluate on.

    Args:
        documents: texts with a `fingerprint`.
        tokenizer: a fast transformers tokenizer.
        seq_length: tokens of a row.
        eval_fraction: share of the documents held out for evaluation; 1 = all.
        cache_dir: this node's folder for tokenised data.
        num_processes: tokenising processes.

    Raises:
        UsageError: the corpus is empty, unreadable, or too small to hold a document out.
    """
    key = cache_key(documents.fingerprint, tokenization.fingerprint(tokenizer), eval_fraction)
    folder = cache_dir / "tokens" / key
    parts = parts_folder(cache_dir, documents, tokenizer)
    build_token_cache(folder, parts, documents, tokenizer, eval_fraction=eval_fraction, num_processes=num_processes)
    note_empty_documents(folder, documents)
    caches = [open_token_cache(folder, split) for split in SPLITS]
    for cache, max_waste in zip(caches, (MAX_WASTE, 1.0), strict=True):
        build_row_index(cache, seq_length, max_waste)
    train, held_out = (open_packed_rows(cache, seq_length, tokenizer.eos_token_id) for cache in caches)
    return train, held_out


def build_row_index(cache: TokenCache, seq_length: int, max_waste: float) -> None:
    """Pack `cache` for rows of `seq_length` tokens, unless that was done before; see `BestFitPacker`."""
    from tqdm import tqdm

    folder = _index_folder(cache, seq_length)
    if folder.exists():
        return
    num_pieces = 0
    with (
        written_aside(folder) as aside,
        (aside / "pieces.bin").open("wb") as pieces,
        (aside / "row_ends.bin").open("wb") as row_ends,
    ):
        for row in pack(tqdm(cache.ends, desc="packing", unit="doc", delay=2), seq_length, max_waste):
            num_pieces += len(row)
            pieces.write(np.array(row, dtype=np.int64).tobytes())
            row_ends.write(np.array(num_pieces, dtype=np.int64).tobytes())


def open_packed_rows(cache: TokenCache, seq_length: int, pad_token_id: int) -> PackedRows:
    """Map the row index of `build_row_index` into memory."""
    folder = _index_folder(cache, seq_length)
    return PackedRows(
        cache=cache,
        seq_length=seq_length,
        pad_token_id=pad_token_id,
        pieces=map_file(folder / "pieces.bin", np.int64).reshape(-1, 2),
        row_ends=map_file(folder / "row_ends.bin", np.int64),
    )


def _index_folder(cache: TokenCache, seq_length: int) -> Path:
    return cache.folder / f"rows_{seq_length}"
