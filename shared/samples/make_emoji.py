"""Write the Parquet files of emoji/ from a zip of images and their metadata.jsonl, one row an image.

    python shared/samples/make_emoji.py emoji64.zip

Images keep their bytes. Their order is that of metadata.jsonl, whose `split` says which file a row goes to.
"""

import itertools
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

STYLES = ["noto", "fluent3d", "fluentflat"]
GROUPS = [
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
]
# Fluent's 3D emoji have no flags, and a class needs images.
GROUPS_AND_STYLES = [
    f"{group}, {style}" for group, style in itertools.product(GROUPS, STYLES) if (group, style) != ("Flags", "fluent3d")
]
SPLITS = ["train", "test_unseen_concept", "test_unseen_combination"]
ROWS_IN_GROUP = 500


def main(archive: Path) -> None:
    """Convert the zip into one Parquet file for each split, in emoji/data/ beside this script."""
    features = datasets.Features(
        {
            "image": datasets.Image(),
            "caption": datasets.Value("string"),
            "name": datasets.Value("string"),
            "keywords": datasets.List(datasets.Value("string")),
            "subgroup": datasets.Value("string"),
            "group": datasets.ClassLabel(names=GROUPS),
            "style": datasets.ClassLabel(names=STYLES),
            "group_and_style": datasets.ClassLabel(names=GROUPS_AND_STYLES),
        }
    )
    with zipfile.ZipFile(archive) as opened:
        described = [json.loads(line) for line in opened.read("metadata.jsonl").splitlines()]
        for split in SPLITS:
            rows = [to_row(entry, opened.read(entry["file"])) for entry in described if entry["split"] == split]
            # `datasets` takes a split's name from a file name of this form, and only of this form.
            target = Path(__file__).parent / "emoji" / "data" / f"{split}-00000-of-00001.parquet"
            target.parent.mkdir(parents=True, exist_ok=True)
            table = pyarrow.Table.from_pylist(rows, schema=features.arrow_schema)
            pyarrow.parquet.write_table(table, target, row_group_size=ROWS_IN_GROUP, compression="zstd")
            sys.stdout.write(f"{target}: {len(rows)} images, {target.stat().st_size:,} bytes\n")


def to_row(entry: dict[str, Any], image: bytes) -> dict[str, Any]:
    """The columns of one image."""
    group, style = GROUPS.index(entry["group"]), STYLES.index(entry["style"])
    copied = {name: entry[name] for name in ("caption", "name", "keywords", "subgroup")}
    both = GROUPS_AND_STYLES.index(f"{entry['group']}, {entry['style']}")
    return {"image": {"bytes": image, "path": entry["file"]}, **copied} | {
        "group": group,
        "style": style,
        "group_and_style": both,
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
