"""Tokenised documents on disk: written once by several processes, read memory-mapped ever after.

    CACHE_DIR/tokens/KEY/{train,eval}/tokens.bin       every document, begin token and end token included
                                     /documents.bin    int64 pairs: where the document ends in tokens.bin, its bytes
                        /summary.json

The key covers the data, the tokenizer and the settings. A folder is written aside and renamed, so it is complete or
absent; of several runs or nodes that want the same one, one builds it and the others wait. Memory stays flat: results
are appended to the files as they come back from the processes, in order.
"""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from shared.command_line import UsageError
from shared.data import left_out
from shared.runtime.atomic_folder import one_builder, written_aside
from shared.text import tokenization
from shared.text.document_pool import map_documents
from shared.text.vocabulary import num_ids, special_ids

FORMAT_VERSION = 3  # of what is stored, and of how files are read: 3 takes byte-order marks for no text
SPLITS = ("train", "eval")


@dataclasses.dataclass(frozen=True)
class TokenCache:
    """One split of a tokenised corpus.

    Attributes:
        folder: where it lies; row indices are kept beside the tokens.
        tokens: uint16 or uint32 (number of tokens,), memory-mapped.
        ends: int64 (number of documents,), memory-mapped; document d is tokens[ends[d - 1]:ends[d]].
        num_bytes: UTF-8 bytes of all documents, without the begin and end tokens.
    """

    folder: Path
    tokens: np.ndarray
    ends: np.ndarray
    num_bytes: int

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process maps the files itself; numpy would send it all tokens."""
        return open_token_cache, (self.folder.parent, self.folder.name)


def cache_key(*parts: object) -> str:
    """Name of a cache folder for data, tokenizer and settings."""
    return hashlib.sha256(repr((FORMAT_VERSION, *parts)).encode()).hexdigest()[:24]


def build_token_cache(
    folder: Path, documents: Iterable[str], tokenizer: Any, *, eval_fraction: float, num_processes: int
) -> None:
    """Tokenise `documents` into `folder` unless it is there already.

    Documents whose `content_share` is below `eval_fraction` go to the eval split, and so do the first one and its
    equals, so that it is never empty. Equal documents share a split, and neither the order of the others nor the
    number of processes matters; 0 keeps the eval split empty, 1 the train split.

    Args:
        folder: the cache folder to make.
        documents: texts; empty ones are passed over.
        tokenizer: a fast transformers tokenizer.
        eval_fraction: share of the documents held out, in [0, 1].
        num_processes: tokenising processes.

    Raises:
        UsageError: no document is there, or none is left to train on.
    """
    if folder.exists():
        return
    with one_builder(folder) as builds:
        if builds:
            _build(folder, documents, tokenizer, eval_fraction, num_processes)


def _build(folder: Path, documents: Iterable[str], tokenizer: Any, eval_fraction: float, num_processes: int) -> None:
    with written_aside(folder) as aside:
        writers = {split: _SplitWriter(aside / split, num_ids(tokenizer)) for split in SPLITS}
        first_share = None
        for ids, num_bytes, share in _tokenize(documents, tokenizer, num_processes):
            first_share = share if first_share is None else first_share
            held_out = eval_fraction > 0 and (share < eval_fraction or share == first_share)
            writers["eval" if held_out else "train"].add(ids, num_bytes)
        summary = {split: writer.close() for split, writer in writers.items()}
        if first_share is None:
            raise UsageError("data: expected at least one document, got none")
        if eval_fraction < 1 and not summary["train"]["documents"]:
            raise UsageError(
                f"data: expected documents to train on, but all {summary['eval']['documents']} (equal ones stay "
                "together) are held out; with a smaller eval_fraction, or with eval_data set, fewer or none are"
            )
        num_empty = left_out.of(getattr(documents, "place", "")).get("empty_documents", 0)
        (aside / "summary.json").write_text(json.dumps({**summary, "empty_documents": num_empty}))


def note_empty_documents(folder: Path, documents: Any) -> None:
    """Count the documents without text as they were when the cache was made, which may be long ago."""
    summary = json.loads((folder / "summary.json").read_text())
    number = summary.get("empty_documents", 0)  # caches of earlier versions do not say it
    left_out.note("empty_documents", number, where=getattr(documents, "place", ""))


def content_share(data: bytes) -> float:
    """A number in [0, 1) that depends on a document's content alone, uniform over documents."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") / 2**64


def open_token_cache(folder: Path, split: str) -> TokenCache:
    """Map one split of a cache folder into memory."""
    summary = json.loads((folder / "summary.json").read_text())[split]
    documents = map_file(folder / split / "documents.bin", np.int64).reshape(-1, 2)
    return TokenCache(
        folder=folder / split,
        tokens=map_file(folder / split / "tokens.bin", np.dtype(summary["dtype"])),
        ends=documents[:, 0],
        num_bytes=summary["bytes"],
    )


def map_file(path: Path, dtype: Any) -> np.ndarray:
    """A file of numbers as a read-only array; an empty file, which no system maps, as an empty array."""
    return np.memmap(path, dtype=dtype, mode="r") if path.stat().st_size else np.empty(0, dtype=dtype)


class _SplitWriter:
    def __init__(self, folder: Path, vocab_size: int) -> None:
        folder.mkdir()
        self.dtype = np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)
        self.tokens_file: IO[bytes] = (folder / "tokens.bin").open("wb")
        self.documents_file: IO[bytes] = (folder / "documents.bin").open("wb")
        self.documents = self.tokens = self.bytes = 0

    def add(self, ids: np.ndarray, num_bytes: int) -> None:
        self.tokens_file.write(ids.astype(self.dtype).tobytes())
        self.tokens += len(ids)
        self.documents += 1
        self.bytes += num_bytes
        self.documents_file.write(np.array([self.tokens, num_bytes], dtype=np.int64).tobytes())

    def close(self) -> dict[str, Any]:
        self.tokens_file.close()
        self.documents_file.close()
        return {"documents": self.documents, "tokens": self.tokens, "bytes": self.bytes, "dtype": self.dtype.name}


def _tokenize(documents: Iterable[str], tokenizer: Any, num_processes: int) -> Iterator[tuple[np.ndarray, int, float]]:
    """Yield (ids with begin and end token, number of bytes, content share) of each document, in order."""
    arguments = (tokenizer.backend_tokenizer.to_str(), *special_ids(tokenizer))
    return map_documents(
        _encode_batch,
        documents,
        start=_start_worker,
        arguments=arguments,
        num_processes=num_processes,
        description="tokenising",
    )


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_json: str, begin: int, end: int) -> None:
    from tokenizers import Tokenizer

    _worker.update(backend=Tokenizer.from_str(tokenizer_json), begin=begin, end=end)


def _encode_batch(documents: list[str]) -> list[tuple[np.ndarray, int, float]]:
    encoded = []
    for document in documents:
        data = tokenization.to_bytes(document)
        ids = np.concatenate(
            [[_worker["begin"]], tokenization.encode(_worker["backend"], document), [_worker["end"]]]
        ).astype(np.uint32)
        encoded.append((ids, len(data), content_share(data)))
    return encoded
