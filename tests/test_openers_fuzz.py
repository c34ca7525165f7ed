"""Files of every kind, sound and broken: an opener reads all that is there, or says in one line what is wrong.

FUZZ_CASES=4000 pytest -m slow -rP tests/test_openers_fuzz.py        # ten minutes of a core, and what came of them
"""

import io
import json
import os
import random
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.command_line import UsageError
from shared.images import captioned, files, labelled
from shared.text.documents import open_texts
from shared.text.labelled import open_labelled
from tests.shared.text.test_documents import COMPRESS

EXAMPLES = [
    pytest.param(15, id="some"),
    pytest.param(
        int(os.environ.get("FUZZ_CASES", "400")), id="many", marks=[pytest.mark.slow, pytest.mark.timeout(900)]
    ),
]
WORDS = ["cat", "naïve", "四", "🐈", "  ", "NA", "01", "0.5", "-3", "1e3", "", "\x00", "a,b", 'say "x"', "tab\there"]
FOLDERS = ["", "train/", "dev/", "test/", "a [v1]/", "b?/c, d/", "__x__/", "train/cat/", "train/dog/", ".hidden/"]
ENCODINGS = ["utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "cp1252"]


outcomes = Counter[str]()  # of what was opened since the test began


def fuzzed(number: int, check: Callable[[random.Random, Path], None]) -> None:
    """Run a check on `number` folders, of which hypothesis finds and keeps those that fail."""

    @settings(max_examples=number, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**32))
    def on_one(seed: int) -> None:
        with tempfile.TemporaryDirectory() as folder:
            check(random.Random(seed), Path(folder) / "data")

    outcomes.clear()
    on_one()
    sys.stdout.write(f"{number:,} cases, opened: {dict(outcomes)}\n")


def read_or_refused(read: Callable[[], Any]) -> tuple[Any, str]:
    """What is read, or None and the one line that says why not; anything but that line fails the test."""
    try:
        found = read()
    except UsageError as error:
        refusal = str(error)
    else:
        outcomes["read"] += 1
        return found, ""
    outcomes["refused"] += 1
    assert "\n" not in refusal
    assert ": expected " in refusal
    return None, refusal


def damaged(draw: random.Random, content: bytes) -> tuple[bytes, bool]:
    """The bytes of a file, now and then cut, changed or gone; whether they are as they were."""
    kind = draw.choice(["whole"] * 6 + ["cut", "changed", "empty"])
    if kind == "cut":
        content, before = content[: draw.randrange(len(content) + 1)], content
        return content, content == before
    if kind == "changed" and content:
        place = draw.randrange(len(content))
        return content[:place] + bytes([content[place] ^ (1 << draw.randrange(8))]) + content[place + 1 :], False
    return (b"", False) if kind == "empty" else (content, True)


def write(folder: Path, name: str, content: bytes) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content)


@pytest.mark.parametrize("number", EXAMPLES)
def test_texts(number: int) -> None:
    def check(draw: random.Random, folder: Path) -> None:
        there, is_sound, kind = 0, True, draw.choice(["jsonl", "parquet"])
        for place in range(draw.randint(1, 3)):
            documents = [" ".join(draw.choices(WORDS, k=3)) for _ in range(draw.randint(0, 5))]
            encoding = draw.choice(ENCODINGS) if kind == "jsonl" else "utf-8"
            if kind == "jsonl":
                lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in documents)
                content = COMPRESS[suffix := draw.choice(list(COMPRESS))](lines.encode(encoding, "replace"))
                is_sound &= encoding not in ("utf-16-le", "cp1252") or not documents
            else:
                column, suffix = pyarrow.array(documents, pyarrow.string()), ""
                table = pyarrow.table({"text": draw.choice([column, column.dictionary_encode()])})
                pyarrow.parquet.write_table(table, stream := io.BytesIO())
                content = stream.getvalue()
            content, is_whole = damaged(draw, content)
            is_sound, there = is_sound and is_whole, there + len(documents)
            write(folder, f"{draw.choice(FOLDERS[4:7])}{place}.{kind}{suffix}", content)
        options = {"config": "", "split": "train", "text_column": "text"}
        found, refusal = read_or_refused(lambda: len(list(open_texts(str(folder), **options))))
        if is_sound and there:
            assert (found, refusal) == (there, "")

    fuzzed(number, check)


@pytest.mark.parametrize("number", EXAMPLES)
def test_labelled_tables(number: int) -> None:
    def check(draw: random.Random, folder: Path) -> None:
        kind, labels = draw.choice(["csv", "jsonl"]), draw.choices(WORDS[5:], k=draw.randint(1, 6))
        rows = [{"text": draw.choice(WORDS[:4]), "label": label} for label in labels]
        if kind == "jsonl":
            lines = "".join(json.dumps(row) + "\n" for row in rows)
        else:
            quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in rows]
            lines = "text,label\n" + "".join(",".join(row) + "\n" for row in quoted)
        content, _ = damaged(draw, lines.encode(draw.choice(ENCODINGS), "replace"))
        write(folder, f"train.{kind}", content)
        options: dict[str, Any] = {"config": "", "split": "train", "columns": ("text",), "label_column": "label"}
        options["label_kind"] = draw.choice(["auto", "classes", "numbers"])
        opened, _ = read_or_refused(lambda: open_labelled(str(folder), **options, like=None))
        if opened and opened.problem == "classes" and content == lines.encode():
            assert [opened.class_names[label] for label in opened.labels] == labels
        assert opened is None or len(opened) == len(opened.labels) > 0

    fuzzed(number, check)


def picture(draw: random.Random) -> tuple[str, bytes]:
    suffix = draw.choice(["jpg", "png", "webp", "bmp", "gif", "tiff"])
    form = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    Image.new(draw.choice(["L", "RGB"]), (8, 8), draw.randrange(256)).save(stream := io.BytesIO(), form)
    return suffix, stream.getvalue()


@pytest.mark.parametrize("number", EXAMPLES)
def test_folders_and_tars_of_images(number: int) -> None:
    """A damaged file of an image is there still: training replaces it, and counts it."""

    def check(draw: random.Random, folder: Path) -> None:
        pictures = [(draw.choice(["cat", "dog", "train", "a [v1]"]), *picture(draw)) for _ in range(draw.randint(2, 8))]
        is_tar, is_sound = draw.random() < 0.5, len({name for name, *_ in pictures}) > 1
        if is_tar:
            with tarfile.open(fileobj=(stream := io.BytesIO()), mode="w") as tar:
                for place, (name, suffix, data) in enumerate(pictures):
                    for end, part in ((suffix, data), ("cls", name.encode()), ("txt", b"a caption")):
                        member = tarfile.TarInfo(f"x/photo.{place}.{end}")
                        member.size = len(part)
                        tar.addfile(member, io.BytesIO(part))
            content, is_whole = damaged(draw, stream.getvalue())
            write(folder, "train-0.tar", content)
            is_sound &= is_whole
        for place, (name, suffix, data) in enumerate([] if is_tar else pictures):
            write(folder, f"{name}/{place} test.{suffix}", damaged(draw, data)[0])
        options = {"config": "", "split": "train", "image_column": ""}
        opened, refusal = read_or_refused(lambda: labelled.open_images(str(folder), label_column="", **options))
        if is_sound:
            assert refusal == ""
            names = sorted(opened.class_names[label] for label in opened.labels)
            assert names == sorted(name for name, *_ in pictures)
            assert len(files.open_files(str(folder), "", "train", "")) == len(pictures)
        if is_tar and is_sound:
            texts = captioned.open_captioned(str(folder), caption_column="", max_bad_fraction=0.0, **options).captions
            assert list(texts) == ["a caption"] * len(pictures)

    fuzzed(number, check)
