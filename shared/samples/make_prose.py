"""Write prose/train.parquet and prose/eval.parquet from the raw collection, one row a document.

    python shared/samples/make_prose.py pd_prose.jsonl.xz

The raw file has one JSON object a document with `id`, `source`, `title`, `author` and `paragraphs`. Paragraphs are
joined by an empty line. A document belongs to the eval split if the SHA-256 of its id is a multiple of 20, so the
split does not depend on the order of the file.
"""

import hashlib
import json
import lzma
import sys
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet

COLUMNS = ("id", "source", "title", "author")


def main(raw: Path) -> None:
    """Convert `raw` into the two Parquet files beside this script."""
    splits: dict[str, list[dict[str, str]]] = {"train": [], "eval": []}
    with lzma.open(raw, "rt", encoding="utf-8") as lines:
        for line in lines:
            record = json.loads(line)
            held_out = int(hashlib.sha256(record["id"].encode()).hexdigest(), 16) % 20 == 0
            row = {name: record[name] for name in COLUMNS} | {"text": "\n\n".join(record["paragraphs"])}
            splits["eval" if held_out else "train"].append(row)
    features = datasets.Features({name: datasets.Value("string") for name in (*COLUMNS, "text")})
    for split, rows in splits.items():
        target = Path(__file__).parent / "prose" / f"{split}.parquet"
        target.parent.mkdir(exist_ok=True)
        table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
        pyarrow.parquet.write_table(table, target, row_group_size=64, compression="zstd", compression_level=19)
        size = sum(len(row["text"].encode()) for row in rows)
        sys.stdout.write(f"{target}: {len(rows)} documents, {size:,} bytes of text\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
