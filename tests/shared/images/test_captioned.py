"""Captions belong to their images in every format; empty ones are left out, counted and refused beyond a share."""

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shared.command_line import UsageError
from shared.data import left_out
from shared.images.captioned import SAMPLE, CaptionedImages, open_captioned
from shared.images.decoding import EncodedImage
from shared.images.labelled import check_every_class, open_images

COLORS = {"a red square": (255, 0, 0), "a blue square": (0, 0, 255), "grün": (0, 128, 0)}


def png(color: tuple[int, int, int]) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(stream, "PNG")
    return stream.getvalue()


def open_split(data: Any, split: str = "train", **options: Any) -> CaptionedImages:
    defaults = {"config": "", "image_column": "", "caption_column": "", "max_bad_fraction": 0.01}
    return open_captioned(str(data), split=split, **{**defaults, **options})


def assert_captions_belong(opened: CaptionedImages) -> None:
    assert len(opened) == len(opened.captions)
    for index, caption in enumerate(opened.captions):
        pixels = EncodedImage(opened.files.read(index)).center_crop(4, 1.0)
        assert tuple(pixels[0, 0].tolist()) == COLORS[caption]


def write_folder(folder: Path, captions: list[str], **columns: list[str]) -> Path:
    """Images and metadata.jsonl, in another order than that of the file names."""
    folder.mkdir(parents=True)
    lines = []
    for number, caption in reversed(list(enumerate(captions))):
        (folder / f"{number}.png").write_bytes(png(COLORS.get(caption.strip(), (0, 0, 0))))
        more = {name: values[number] for name, values in columns.items()}
        lines.append(json.dumps({"file_name": f"{number}.png", "text": caption, **more}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def test_a_folder_with_metadata(tmp_path: Path) -> None:
    opened = open_split(write_folder(tmp_path / "data", [*COLORS, "grün"]))
    assert sorted(opened.captions) == sorted([*COLORS, "grün"])
    assert_captions_belong(opened)


def test_webdataset_tars(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for number, (caption, color) in enumerate(COLORS.items()):
            for suffix, content in ((".png", png(color)), (".txt", caption.encode())):
                member = tarfile.TarInfo(f"{number}{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    opened = open_split(tmp_path)
    assert list(opened.captions) == list(COLORS)
    assert_captions_belong(opened)


def test_the_embedded_emoji_are_whole() -> None:
    sizes = {"train": 4599, "test_unseen_concept": 300, "test_unseen_combination": 200}
    opened = {split: open_split(SAMPLE, split) for split in sizes}
    assert {split: len(images) for split, images in opened.items()} == sizes
    concepts = {split: {caption.split(", ", 1)[1] for caption in images.captions} for split, images in opened.items()}
    assert not concepts["train"] & concepts["test_unseen_concept"]
    assert concepts["test_unseen_combination"] <= concepts["train"]
    assert not set(opened["train"].captions) & set(opened["test_unseen_combination"].captions)
    first = EncodedImage(opened["train"].files.read(0))
    assert (first.width, first.height) == (64, 64)


def test_every_class_of_the_emoji_has_images() -> None:
    opened = open_images(str(SAMPLE), config="", split="train", image_column="", label_column="group_and_style")
    check_every_class("emoji", opened)
    assert len(opened.class_names) == 26


def test_a_subset_keeps_captions_and_images_together(tmp_path: Path) -> None:
    opened = open_split(write_folder(tmp_path / "data", list(COLORS)))
    part = opened.subset(np.array([2, 0]))
    assert list(part.captions) == [opened.captions[2], opened.captions[0]]
    assert_captions_belong(part)


def test_the_fingerprint_is_that_of_images_and_captions(tmp_path: Path) -> None:
    one, same = (open_split(write_folder(tmp_path / name, list(COLORS))) for name in ("one", "same"))
    assert one.fingerprint == same.fingerprint
    other = open_split(write_folder(tmp_path / "other", [*list(COLORS)[:2], "a red square"]))
    assert other.fingerprint != one.fingerprint


def test_empty_captions_are_left_out_and_counted(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", ["a red square", "  ", "a blue square", "grün"])
    with pytest.raises(UsageError, match=r"max_bad_fraction: 0.01: expected at least 0.250, the share of empty capt"):
        open_split(folder)
    opened = open_split(folder, max_bad_fraction=0.25)
    assert left_out.counts() == {"images_without_a_caption": 1}
    assert_captions_belong(opened)


def test_bad_input_gets_one_line(tmp_path: Path) -> None:
    empty = write_folder(tmp_path / "empty", ["", " "])
    two = write_folder(tmp_path / "two", list(COLORS), title=["a", "b", "c"])
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "0.png").write_bytes(png((0, 0, 0)))
    cases: list[tuple[str, dict[str, Any]]] = [
        ("expected captions in split train, all 2 are empty", {"data": empty}),
        (
            "caption_column: 'alt': expected a column of texts, there are: text, title",
            {"data": two, "caption_column": "alt"},
        ),
        ("expected captions: a metadata.jsonl with file_name and caption beside the images", {"data": alone}),
        ("data_split: 'dev': expected one of train", {"data": two, "split": "dev"}),
    ]
    for message, options in cases:
        with pytest.raises(UsageError) as caught:
            open_split(**options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
