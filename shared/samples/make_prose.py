"""Write messages/ and novels/, one row a document, and eras/, one row a passage, from the raw collection.

    python shared/samples/make_prose.py pd_prose.jsonl.xz

The raw file has one JSON object a document with `id`, `source`, `title`, `author` and `paragraphs`. Paragraphs are
joined by an empty line. A document belongs to the eval split if the SHA-256 of its id is a multiple of 20, so the
split does not depend on the order of the file.

eras/ asks in which of eight eras of thirty years a passage of a president's message was written. Its test split is of
the messages of which that SHA-256 is a multiple of 4, so that no message is in both. A passage is forty words of a
paragraph, so that length tells nothing, and names no year; of each era as many are drawn.
"""

import hashlib
import json
import lzma
import random
import re
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

COLUMNS = ("id", "source", "title", "author")
FOLDERS = {"sotu": "messages", "austen": "novels"}  # by source
FIRST_YEAR, YEARS, ERAS = 1790, 30, 8
WORDS = 40  # of a passage
OF_EACH_ERA = {"train": 800, "test": 200}
TEXT = datasets.Value("string")


def main(raw: Path) -> None:
    """Convert `raw` into Parquet files beside this script."""
    read = records(raw)
    features = datasets.Features(dict.fromkeys((*COLUMNS, "text"), TEXT))
    for source, folder in FOLDERS.items():
        splits: dict[str, list[dict[str, Any]]] = {"train": [], "eval": []}
        for record in (record for record in read if record["source"] == source):
            row = {name: record[name] for name in COLUMNS} | {"text": "\n\n".join(record["paragraphs"])}
            splits["eval" if is_held_out(record["id"]) else "train"].append(row)
        _write(folder, splits, features)

    names = [f"{first}-{first + YEARS - 1}" for first in range(FIRST_YEAR, FIRST_YEAR + ERAS * YEARS, YEARS)]
    found: dict[tuple[str, int], list[str]] = {(split, era): [] for split in OF_EACH_ERA for era in range(ERAS)}
    for record in (record for record in read if record["source"] == "sotu"):
        era = (int(record["title"].split()[-1]) - FIRST_YEAR) // YEARS
        split = "test" if _is_multiple(record["id"], 4) else "train"
        found[split, era] += [passage for paragraph in record["paragraphs"] for passage in _passages(paragraph)]
    splits, draw = {split: [] for split in OF_EACH_ERA}, random.Random(0)
    for (split, era), passages in found.items():
        drawn = draw.sample(sorted(set(passages)), OF_EACH_ERA[split])
        splits[split] += [{"text": passage, "label": names[era]} for passage in drawn]
    for rows in splits.values():
        draw.shuffle(rows)
    _write("eras", splits, datasets.Features({"text": TEXT, "label": datasets.ClassLabel(names=names)}))


def records(raw: Path) -> list[dict[str, Any]]:
    """The documents of the raw file."""
    with lzma.open(raw, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def is_held_out(name: str) -> bool:
    """Whether the document of this id belongs to the eval split."""
    return _is_multiple(name, 20)


def _is_multiple(name: str, of: int) -> bool:
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % of == 0


def _passages(paragraph: str) -> list[str]:
    words = paragraph.split()
    passages = [" ".join(words[at : at + WORDS]) for at in range(0, len(words) - WORDS + 1, WORDS)]
    return [passage for passage in passages if not re.search(r"\b(1[6789]|20)\d\d\b", passage)]


def _write(name: str, splits: dict[str, list[dict[str, Any]]], features: datasets.Features) -> None:
    for split, rows in splits.items():
        target = Path(__file__).parent / name / f"{split}.parquet"
        target.parent.mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist([features.encode_example(row) for row in rows], schema=features.arrow_schema)
        group = 1024 if name == "eras" else 64
        pyarrow.parquet.write_table(table, target, row_group_size=group, compression="zstd", compression_level=19)
        size = sum(len(row["text"].encode()) for row in rows)
        sys.stdout.write(f"{target}: {len(rows)} rows, {size:,} bytes of text\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
