"""Write dictionary/, supersenses/ and hypernyms/ from the raw collections of WordNet 3.0, one row an example.

    python shared/samples/make_wordnet.py FOLDER

FOLDER holds wordnet_glosses.jsonl.xz, a dictionary in alphabetical order without the definitions of both test sets,
and wordnet_{supersense,hypernym_pairs}_{train,test}.jsonl.gz. A document of the dictionary is forty entries, each a
line `word, word: definition. Example.`; it belongs to the eval split if the SHA-256 of its id is a multiple of 20.
"""

import gzip
import hashlib
import itertools
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

ENTRIES = 40  # of a document
TEXT = datasets.Value("string")


def main(raw: Path) -> None:
    """Convert the files of `raw` into Parquet files beside this script."""
    splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
    listed = entries(raw)
    for number in itertools.count():
        some = list(itertools.islice(listed, ENTRIES))
        if not some:
            break
        row = {"id": _id_of(number), "text": "\n".join(map(_entry, some))}
        splits["eval" if is_held_out(number) else "train"].append(row)
    _write("dictionary", splits, datasets.Features({"id": TEXT, "text": TEXT}))

    splits = {split: rows_of(raw, "supersense", split) for split in ("train", "test")}
    tested = {row["text"] for row in splits["test"]}  # WordNet has a few definitions twice
    splits["train"] = [row for row in splits["train"] if row["text"] not in tested]
    names = sorted({row["label"] for row in splits["train"]})
    _write("supersenses", splits, datasets.Features({"text": TEXT, "label": datasets.ClassLabel(names=names)}))

    splits = {split: rows_of(raw, "hypernym_pairs", split) for split in ("train", "test")}
    label = datasets.ClassLabel(names=["another", "a kind of"])
    _write("hypernyms", splits, datasets.Features({"sentence1": TEXT, "sentence2": TEXT, "label": label}))


def entries(raw: Path) -> Iterator[dict[str, Any]]:
    """The dictionary's entries in alphabetical order."""
    return _lines(raw / "wordnet_glosses.jsonl.xz", lzma.open)


def rows_of(raw: Path, name: str, split: str) -> list[dict[str, Any]]:
    """A split of supersense or hypernym_pairs."""
    return list(_lines(raw / f"wordnet_{name}_{split}.jsonl.gz", gzip.open))


def is_held_out(document: int) -> bool:
    """Whether a document of the dictionary belongs to the eval split."""
    return int(hashlib.sha256(_id_of(document).encode()).hexdigest(), 16) % 20 == 0


def _id_of(document: int) -> str:
    return f"dictionary-{document:04d}"


def _lines(file: Path, opened: Callable[..., Any]) -> Iterator[dict[str, Any]]:
    with opened(file, "rt", encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _entry(record: dict[str, Any]) -> str:
    sentences = [f"{', '.join(record['words'])}: {record['definition']}", *record["examples"]]
    return " ".join(_sentence(text) for text in sentences)


def _sentence(text: str) -> str:
    text = text.strip().strip('";').strip()
    return text if text.endswith((".", "!", "?")) else f"{text}."


def _write(name: str, splits: dict[str, list[dict[str, Any]]], features: datasets.Features) -> None:
    for split, rows in splits.items():
        target = Path(__file__).parent / name / f"{split}.parquet"
        target.parent.mkdir(exist_ok=True)
        encoded = [features.encode_example(row) for row in rows]
        table = pyarrow.Table.from_pylist(encoded, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, target, row_group_size=1024, compression="zstd", compression_level=19)
        sys.stdout.write(f"{target}: {len(rows)} rows, {target.stat().st_size:,} bytes\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
