"""Folders of images: every image counted once, whatever names, links and metadata there are."""

import io
import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from shared.command_line import UsageError
from shared.data import left_out
from shared.images import captioned, files, labelled

OPTIONS = {"config": "", "split": "train", "image_column": "", "label_column": ""}


def picture() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4)).save(stream, "PNG")
    return stream.getvalue()


def write(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(picture())
    return folder


def classes_of(folder: Path, **options: str) -> dict[str, int]:
    opened = labelled.open_images(str(folder), **{**OPTIONS, **options})
    assert all(opened.files.read(index) == picture() for index in range(len(opened)))
    return dict(zip(opened.class_names, opened.counts.tolist(), strict=True))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["cat/train_1.png", "cat/test 2.png", "dog/val.png", "dog/3.PNG"], {"cat": 2, "dog": 2}),
        (["car/1.png", "plane/1.png", "train/1.png", "train/2.png"], {"car": 1, "plane": 1, "train": 2}),
        (
            ["__background__/1.png", "cat/1.png", "dog/.hidden.png", "dog/1.png"],
            {"__background__": 1, "cat": 1, "dog": 1},
        ),
        (["a [v1]/x*.png", "b?/1.jpg", "c, d/1.png"], {"a [v1]": 1, "b?": 1, "c, d": 1}),
        (["train/test/1.png", "train/b/1.png", "test/b/2.png"], {"b": 1, "test": 1}),
    ],
)
def test_every_image_is_of_its_folders_class(tmp_path: Path, names: list[str], expected: dict[str, int]) -> None:
    assert classes_of(write(tmp_path / "data [2]", *names)) == expected


def test_links_and_names_that_are_not_utf8_are_read(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere", "1.png", "deep/2.png")
    data = write(tmp_path / "data", "cat/caf\udce9.png", "dog/1.png")
    (data / "owl").symlink_to(tmp_path / "elsewhere")
    assert classes_of(data) == {"cat": 1, "deep": 1, "dog": 1, "owl": 1}


def test_images_in_split_folders_have_no_class(tmp_path: Path) -> None:
    data = write(tmp_path, "train/1.png", "train/2.png", "dev/3.png")
    assert files.list_splits(str(data), "") == ["train", "validation"]
    assert len(files.open_files(str(data), "", "dev", "")) == 1
    with pytest.raises(UsageError, match="label_column: '': expected the column of the classes, there are: no column"):
        classes_of(data)


@pytest.mark.parametrize("form", ["jsonl", "csv", "parquet"])
def test_images_that_the_metadata_does_not_name_are_left_out_and_counted(
    tmp_path: Path, form: str, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, "train/photo of a train.png", "train/x/2.png", "train/3.png", "test/4.png")
    rows = [{"file_name": "x/2.png", "label": "NA"}, {"file_name": "photo of a train.png", "label": "dog"}]
    for split, of_split in (("train", rows), ("test", [{"file_name": "4.png", "label": "dog"}])):
        if form == "jsonl":
            text = "\ufeff" + "".join(json.dumps(row) + "\r\n" for row in of_split)
            (tmp_path / split / "metadata.jsonl").write_text(text, encoding="utf-8", newline="")
        elif form == "csv":
            lines = ["file_name,label", *(",".join(row.values()) for row in of_split)]
            (tmp_path / split / "metadata.csv").write_text("\n".join(lines))
        else:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(of_split), tmp_path / split / "metadata.parquet")
    assert classes_of(tmp_path) == {"NA": 1, "dog": 1}
    assert f"1 images without metadata, such as {tmp_path}/train/3.png" in caplog.text
    assert left_out.counts() == {"images_without_metadata": 1, "files_of_other_splits": 1}


def test_every_row_of_the_metadata_is_a_sample(tmp_path: Path) -> None:
    """Several captions of an image, letters that some take for ends of lines, and rows without an image, counted."""
    write(tmp_path, "1.png", "x/2.png")
    rows = [("1.png", "a\u2028b"), ("./1.png", "b\x0b"), ("x/../x/2.png", "c"), ("gone.png", "d")]
    lines = (json.dumps({"file_name": name, "text": text}, ensure_ascii=False) for name, text in rows)
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    options = {"config": "", "split": "train", "image_column": "", "caption_column": "", "max_bad_fraction": 0.0}
    assert list(captioned.open_captioned(str(tmp_path), **options).captions) == ["a b", "b", "c"]
    assert left_out.counts() == {"metadata_rows_without_an_image": 1}


def test_metadata_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "1.png")
    for content, expected in {
        '{"file_name": ': "expected rows that can be read in metadata.jsonl",
        '{"label": "a"}': "expected the name of an image, file_name, in row 0 of metadata.jsonl, got None",
        '{"file_name": "2.png"}': "expected images of train that metadata.jsonl names, it names none of 1.png",
        '{"file_name": "1.png", "image": "x"}': "expected no column called image in metadata.jsonl",
        "[1]": "expected a JSON object in each line of metadata.jsonl",
    }.items():
        (tmp_path / "metadata.jsonl").write_text(content)
        with pytest.raises(UsageError, match=expected) as caught:
            classes_of(tmp_path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["structures", "bytes", "library"])
def test_images_in_parquet_are_found_with_and_without_the_librarys_type(tmp_path: Path, kind: str) -> None:
    """A row without an image is there as one that cannot be decoded, which training counts."""
    images: list[Any] = [{"bytes": picture(), "path": "a.png"}, None, {"bytes": picture(), "path": None}]
    if kind == "bytes":
        images = [image and image["bytes"] for image in images]
    table = {"id": [1, 2, 3], "image": images, "label": ["a", "b", "b"]}
    if kind == "library":
        columns = datasets.Dataset.from_dict(table).cast_column("image", datasets.Image())
        columns.to_parquet(tmp_path / "train.parquet")
    else:
        pyarrow.parquet.write_table(pyarrow.table(table), tmp_path / "train.parquet")
    opened = labelled.open_images(str(tmp_path), **OPTIONS)
    assert [opened.files.read(index) for index in range(3)] == [picture(), b"", picture()]
    assert opened.files.name(1) == "unnamed (row 1)"
    assert opened.labels.tolist() == [0, 1, 1]


def test_files_of_two_kinds_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "c.png")
    assert len(files.open_files(str(tmp_path), "", "train", "")) == 1
    (tmp_path / "a.parquet").touch()
    (tmp_path / "b.tar").touch()
    with pytest.raises(UsageError, match=r"expected files of one kind, got a\.parquet, b\.tar"):
        files.list_splits(str(tmp_path), "")
