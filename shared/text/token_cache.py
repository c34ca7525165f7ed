"""Tokenised documents on disk: written once by several processes, read memory-mapped ever after.

    CACHE_DIR/tokens/KEY/{train,eval}/tokens.bin       every document, begin token and end token included
                                     /documents.bin    int64 pairs: where the document ends in tokens.bin, its bytes
                        /summary.json

The key covers the data, the tokenizer and the settings. A folder is complete or absent; it is merged from parts, so
that a build that was killed goes on (`corpus_parts`). Of several runs or nodes that want the same one, one builds it
and the others wait. Memory stays flat: results are appended to files as they come back from the processes, in order.
"""

import dataclasses
import functools
import hashlib
import json
import shutil
from collections.abc import Generator, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError
from shared.data import left_out
from shared.text import tokenization
from shared.text.corpus_parts import Encoded, EncodeShare, Merge, one_encoder, write_all_parts
from shared.text.document_pool import map_documents
from shared.text.documents import Texts
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
    folder: Path, parts: Path, documents: Any, tokenizer: Any, *, eval_fraction: float, num_processes: int
) -> None:
    """Tokenise `documents` into `folder` unless it is there already; what was killed at it goes on.

    Documents whose `content_share` is below `eval_fraction` go to the eval split, and so do the first one and its
    equals, so that it is never empty. Equal documents share a split, and neither the order of the others nor the
    number of processes matters; 0 keeps the eval split empty, 1 the train split.

    Args:
        folder: the cache folder to make.
        parts: folder beside it for what is tokenised so far, whatever `eval_fraction`; see `corpus_parts`.
        documents: texts; empty ones are passed over. Where tasks wrote parts, with a `share`.
        tokenizer: a fast transformers tokenizer.
        eval_fraction: share of the documents held out, in [0, 1].
        num_processes: tokenising processes.

    Raises:
        UsageError: no document is there, or none is left to train on.
    """
    if folder.exists():
        return
    with one_encoder(folder, parts) as builds:
        if builds:
            encode = functools.partial(_tokenize, tokenizer=tokenizer, num_processes=num_processes)
            tasks = write_all_parts(parts, documents, encode, folder)
            _merge(parts, tasks, folder, eval_fraction)


def _merge(parts: Path, tasks: int, folder: Path, eval_fraction: float) -> None:
    nothing = dict.fromkeys(("documents", "tokens", "bytes"), 0)
    merge = Merge(parts, tasks, folder, {"first_share": None, **{split: {**nothing} for split in SPLITS}})
    for part in merge.parts():
        shares, documents = part["shares"], part["documents"].reshape(-1, 2)
        if merge.state["first_share"] is None:
            merge.state["first_share"] = float(shares[0])
        held_out = (eval_fraction > 0) & ((shares < eval_fraction) | (shares == merge.state["first_share"]))
        arrays = {}
        for split, chosen in zip(SPLITS, (~held_out, held_out), strict=True):
            counts, (lengths, num_bytes) = merge.state[split], documents[chosen].T
            ends = counts["tokens"] + np.cumsum(lengths)
            arrays[f"{split}/tokens"] = part["tokens"][np.repeat(chosen, documents[:, 0])]
            arrays[f"{split}/documents"] = np.stack([ends, num_bytes], axis=1)
            counts["documents"] += len(lengths)
            counts["tokens"] += int(lengths.sum())
            counts["bytes"] += int(num_bytes.sum())
            counts["dtype"] = part["tokens"].dtype.name
        merge.append(arrays)
    try:
        _check(merge.state, eval_fraction)
    except UsageError:  # what is merged is of no other share
        shutil.rmtree(parts)
        raise
    splits = {split: merge.state[split] for split in SPLITS}
    merge.finish({**splits, "empty_documents": merge.empty_documents})


def _check(state: dict[str, Any], eval_fraction: float) -> None:
    if state["first_share"] is None:
        raise UsageError("data: expected at least one document, got none")
    if eval_fraction < 1 and not state["train"]["documents"]:
        raise UsageError(
            f"data: expected documents to train on, but all {state['eval']['documents']} (equal ones stay "
            "together) are held out; with a smaller eval_fraction, or with eval_data set, fewer or none are"
        )


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


def tokenizing_step(documents: Texts, tokenizer: Any, cache_dir: Path, num_processes: int = 1) -> EncodeShare:
    """A step of a datatrove pipeline whose tasks tokenise a corpus into parts that `packing.pack_corpus` then merges.

    Args:
        documents: `documents.LocalTexts`, of which a task reads whole files, or `HubTexts`.
        tokenizer: a fast transformers tokenizer.
        cache_dir: folder for tokenised data that all tasks see, and the runs that are to read it.
        num_processes: tokenising processes of a task.
    """
    parts = parts_folder(cache_dir, documents, tokenizer)
    return EncodeShare(parts, documents, functools.partial(_tokenize, tokenizer=tokenizer, num_processes=num_processes))


def parts_folder(cache_dir: Path, documents: Texts, tokenizer: Any) -> Path:
    """Where the parts of a corpus are, whatever is held out of it."""
    return cache_dir / "tokens" / f"parts-{cache_key(documents.fingerprint, tokenization.fingerprint(tokenizer))}"


def _tokenize(documents: Iterable[str], tokenizer: Any, num_processes: int) -> Generator[Encoded, None, None]:
    """Yield what batches of documents become, in order.

    tokens: with begin and end tokens; documents: int64 pairs of tokens and bytes; shares: float64, of the content.
    """
    dtype = np.uint16 if num_ids(tokenizer) <= 1 << 16 else np.uint32
    return map_documents(
        _encode_batch,
        documents,
        start=_start_worker,
        arguments=(tokenizer.backend_tokenizer.to_str(), *special_ids(tokenizer), dtype),
        num_processes=num_processes,
        description="tokenising",
    )


_worker: dict[str, Any] = {}


def _start_worker(tokenizer_json: str, begin: int, end: int, dtype: Any) -> None:
    from tokenizers import Tokenizer

    _worker.update(backend=Tokenizer.from_str(tokenizer_json), begin=[begin], end=[end], dtype=dtype)


def _encode_batch(documents: list[str]) -> list[Encoded]:
    tokens, sizes, shares = [], [], []
    for document in documents:
        data, ids = tokenization.to_bytes(document), tokenization.encode(_worker["backend"], document)
        tokens += [_worker["begin"], ids, _worker["end"]]
        sizes.append((len(ids) + 2, len(data)))
        shares.append(content_share(data))
    arrays = {
        "tokens": np.concatenate(tokens).astype(_worker["dtype"]),
        "documents": np.array(sizes, dtype=np.int64),
        "shares": np.array(shares),
    }
    return [Encoded(len(documents), sum(map(len, documents)), arrays)]
