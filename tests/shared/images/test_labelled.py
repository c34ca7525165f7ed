import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from shared.command_line import UsageError
from shared.fields import Images
from shared.images import files as image_files
from shared.images import labelled
from shared.images.decoding import EncodedImage
from shared.images.labelled import SAMPLE
from tests.conftest import ROOT
from tests.hub_server import Repository, start_hub

OPTIONS = {"config": "", "image_column": "", "label_column": ""}


def read_colors(opened: labelled.LabelledImages) -> list[tuple[str, str]]:
    """Class and colour of each image."""
    shown = {(255, 0, 0): "red", (0, 0, 255): "blue", (0, 128, 0): "green"}
    pixels = [EncodedImage(opened.files.read(i)).center_crop(4, 1.0)[0, 0] for i in range(len(opened))]
    colors = [
        min(shown, key=lambda color: float(np.abs(np.subtract(color, pixel.astype(int))).sum())) for pixel in pixels
    ]
    return [(opened.class_names[label], shown[color]) for label, color in zip(opened.labels, colors, strict=True)]


def image(color: str, form: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (12, 10), color).save(stream, form)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Class folders below split folders, in three formats."""
    for split, number in (("train", 4), ("val", 2)):
        for color in ("red", "blue", "green"):
            for index in range(number):
                suffix, form = [(".png", "PNG"), (".JPEG", "JPEG"), (".webp", "WEBP")][index % 3]
                path = tmp_path / "folder" / split / f"class of {color}" / f"{index}{suffix}"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(image(color, form))
    return tmp_path / "folder"


def write_parquet(path: Path, rows: list[tuple[str, Any]], **features: Any) -> Path:
    import datasets

    names = features.get("names")
    label = datasets.ClassLabel(names=names) if names else None
    columns = {"image": [{"bytes": image(color), "path": None} for color, _ in rows]}
    dataset = datasets.Dataset.from_dict({**columns, "label": [label for _, label in rows]})
    dataset = dataset.cast_column("image", datasets.Image())
    if label:
        # What `cast_column` would refuse can stand in a file.
        table = dataset.data.table.replace_schema_metadata(
            datasets.Features({"image": datasets.Image(), "label": label}).arrow_schema.metadata
        )
        import pyarrow.parquet

        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        dataset.to_parquet(path)
    return path


def open_split(data: Any, split: str = "train", **options: str) -> labelled.LabelledImages:
    return labelled.open_images(str(data), split=split, **{**OPTIONS, **options})


def test_class_folders_with_splits(folder: Path) -> None:
    train = open_split(folder)
    assert len(train) == 12
    assert train.class_names == ("class of blue", "class of green", "class of red")
    assert all(name == f"class of {color}" for name, color in read_colors(train))
    assert image_files.validation_split(str(folder), "") == "validation"
    held_out = open_split(folder, "validation")
    assert len(held_out) == 6
    assert held_out.class_names == train.class_names
    assert "class of blue/0.png (row 0)" in train.files.name(0)


def test_class_folders_without_splits(folder: Path) -> None:
    assert image_files.list_splits(str(folder / "train"), "") == ["train"]
    assert image_files.validation_split(str(folder / "train"), "") == ""
    assert len(open_split(folder / "train")) == 12


def test_parquet_with_a_list_of_classes(tmp_path: Path) -> None:
    rows = [("red", 1), ("blue", 0), ("red", 1)]
    write_parquet(tmp_path / "data" / "train-00000-of-00001.parquet", rows, names=["blue", "red"])
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows[:2], names=["blue", "red"])
    assert read_colors(open_split(tmp_path / "data")) == [("red", "red"), ("blue", "blue"), ("red", "red")]
    assert image_files.validation_split(str(tmp_path / "data"), "") == "test"
    assert len(open_split(tmp_path / "data" / "train-00000-of-00001.parquet")) == 3


def test_parquet_whose_classes_are_text(tmp_path: Path) -> None:
    file = write_parquet(tmp_path / "train.parquet", [("red", "warm"), ("blue", "cold"), ("green", "cold")])
    opened = open_split(file)
    assert opened.class_names == ("cold", "warm")
    assert opened.labels.tolist() == [1, 0, 0]


def test_webdataset_tars(tmp_path: Path) -> None:
    for shard in range(2):
        with tarfile.open(tmp_path / f"train-{shard}.tar", "w") as tar:
            for number, color in enumerate(("red", "blue", "green")):
                for suffix, content in ((".jpg", image(color, "JPEG")), (".cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{shard}{number}{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    opened = open_split(tmp_path)
    assert read_colors(opened) == 2 * [("0", "red"), ("1", "blue"), ("2", "green")]


def test_the_embedded_images_are_whole() -> None:
    train, test = open_split(SAMPLE), open_split(SAMPLE, "test")
    assert np.bincount(train.labels).tolist() == [1000] * 10
    assert np.bincount(test.labels).tolist() == [200] * 10
    assert train.class_names[0] == "T-shirt/top"
    assert EncodedImage(train.files.read(0)).center_crop(28, 1.0).shape == (28, 28, 3)
    assert image_files.validation_split(str(SAMPLE), "") == "test"


def test_holding_out_takes_a_share_of_each_class() -> None:
    train = open_split(SAMPLE)
    rest, held_out = labelled.hold_out(train, 0.05)
    assert np.bincount(held_out.labels).tolist() == [50] * 10
    assert sorted([*rest.files.indices, *held_out.files.indices]) == list(range(10000))
    again = labelled.hold_out(train, 0.05)[1]
    assert np.array_equal(again.files.indices, held_out.files.indices)
    assert held_out.files.read(3) == train.files.read(int(held_out.files.indices[3]))


def test_a_split_to_evaluate_on_is_found_or_held_out(folder: Path) -> None:
    train, held_out = labelled.open_splits(Images(data=str(folder)), "", largest=10)
    assert (train.num_images, held_out.num_images) == (12, 6)
    assert held_out.class_names == train.class_names
    named = Images(data=str(folder), data_split="validation", eval_split="train")
    assert list(map(len, labelled.open_splits(named, "", largest=10))) == [6, 12]
    cut = Images(data=str(folder / "train"), eval_fraction=0.25)
    assert list(map(len, labelled.open_splits(cut, "", largest=10))) == [9, 3]
    with pytest.raises(UsageError, match="expected images of at least 11 pixels, the size of the crops"):
        labelled.open_splits(Images(data=str(folder)), "", largest=11)
    assert labelled.source_of("sample") == str(SAMPLE)


def test_the_fingerprint_is_that_of_the_content(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert open_split(folder).fingerprint == open_split(tmp_path / "copy").fingerprint
    (tmp_path / "copy" / "train" / "class of red" / "0.png").write_bytes(image("blue"))
    assert open_split(tmp_path / "copy").fingerprint != open_split(folder).fingerprint


def test_a_file_that_is_gone_is_empty(folder: Path) -> None:
    opened = open_split(folder)
    (folder / "train" / "class of blue" / "0.png").unlink()
    assert opened.files.read(0) == b""


def test_bad_input_gets_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "readme.txt").write_text("no image")
    one = tmp_path / "one" / "lonely"
    one.mkdir(parents=True)
    (one / "a.png").write_bytes(image("red"))
    names = ["blue", "red"]
    outside = write_parquet(tmp_path / "outside.parquet", [("red", 1), ("blue", 2), ("blue", 0)], names=names)
    unlabelled = write_parquet(tmp_path / "unlabelled.parquet", [("red", -1), ("red", 1), ("red", 0)], names=names)
    deep = tmp_path / "deep"
    for name in ("blood", "bone"):
        (deep / name).mkdir(parents=True)
        Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(deep / name / "a.png")
    missing = write_parquet(tmp_path / "missing.parquet", [("red", "b"), ("blue", None), ("blue", "a")])
    structures = write_parquet(tmp_path / "structures.parquet", [("red", {"is": "b"}), ("blue", {"is": "a"})])
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 not really")
    cases: list[tuple[str, dict[str, Any]]] = [
        ("data: 'no/such/folder/here': expected", {"data": "no/such/folder/here"}),
        ("expected a .parquet or .tar file, or a folder", {"data": tmp_path / "empty"}),
        ("expected a .parquet or .tar file, or a folder", {"data": tmp_path / "words"}),
        ("expected a label from 0 to 1 of each image, got label 2 of unnamed (row 1), 1 such", {"data": outside}),
        ("expected a label from 0 to 1 of each image, got none of unnamed (row 0), 1 such", {"data": unlabelled}),
        ("expected a label from 0 to 1 of each image, got none of unnamed (row 1), 1 such", {"data": missing}),
        ("label_column: 'label': expected a column of classes or of lists", {"data": structures}),
        ("expected grey images of 8 bits a pixel", {"data": deep}),
        ("expected a data set of images that can be read", {"data": tmp_path / "broken.parquet"}),
        ("data_split: 'test': expected one of train, validation", {"data": folder, "split": "test"}),
        ("image_column: 'photo': expected", {"data": folder, "image_column": "photo"}),
        ("label_column: 'breed': expected", {"data": folder, "label_column": "breed"}),
    ]
    for message, options in cases:
        with pytest.raises(UsageError) as caught:
            open_split(**options)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_class_without_images_is_found(tmp_path: Path) -> None:
    missing = write_parquet(tmp_path / "missing.parquet", [("red", 1), ("red", 1)], names=["blue", "red"])
    with pytest.raises(UsageError, match="data: 'name': expected images of each class, got none of blue"):
        labelled.check_every_class("name", open_split(missing))
    labelled.check_every_class("name", open_split(SAMPLE))
    one = open_split(write_parquet(tmp_path / "one.parquet", [("red", "a"), ("red", "a")]))
    with pytest.raises(UsageError, match="data: 'name': expected at least two classes, got 1: a"):
        labelled.check_classes("name", one.class_names)


def test_a_split_to_evaluate_on_may_lack_classes(tmp_path: Path) -> None:
    train = write_parquet(tmp_path / "train.parquet", [("red", "warm"), ("blue", "cold"), ("green", "mild")])
    some = open_split(write_parquet(tmp_path / "some.parquet", [("red", "warm"), ("green", "mild"), ("red", "warm")]))
    assert some.class_names == ("mild", "warm")
    numbered = labelled.number_alike(some, open_split(train).class_names, "some", has_several=False)
    assert numbered.class_names == ("cold", "mild", "warm")
    assert read_colors(numbered) == [("warm", "red"), ("mild", "green"), ("warm", "red")]
    with pytest.raises(UsageError, match="expected the 2 classes of training or some of them, not cold"):
        labelled.number_alike(open_split(train), some.class_names, "train", has_several=False)


def test_some_classes_are_chosen_and_numbered_anew(folder: Path) -> None:
    train = open_split(folder)
    some = labelled.of_classes(train, "classes", "2,0")
    assert some.class_names == (train.class_names[2], train.class_names[0])
    assert some.counts.tolist() == [train.counts[2], train.counts[0]]
    whole = {train.files.name(place): train.class_names[train.labels[place]] for place in range(len(train))}
    assert all(whole[some.files.name(place)] == some.class_names[some.labels[place]] for place in range(len(some)))
    for wrong in ("0", "0,0", "0,3", "a,b", "", "-1,2"):
        with pytest.raises(UsageError, match=f"classes: '{wrong}': expected "):
            labelled.of_classes(train, "classes", wrong)


def test_several_labels_are_read_from_lists_of_numbers_and_of_names(tmp_path: Path) -> None:
    image = Image.new("RGB", (4, 4))
    names = datasets.List(datasets.ClassLabel(names=["a", "b", "c"]))
    for feature, values in (
        (names, [[2, 0], [], [1]]),
        (datasets.List(datasets.Value("string")), [["c", "a"], [], ["b"]]),
    ):
        features = datasets.Features({"image": datasets.Image(), "tags": feature})
        rows = [{"image": image, "tags": row} for row in values]
        datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "train.parquet")
        options = {"config": "", "split": "train", "image_column": "", "label_column": "tags"}
        opened = labelled.open_images(str(tmp_path), **options)
        assert opened.class_names == ("a", "b", "c")
        assert opened.labels.tolist() == [[1, 0, 1], [0, 0, 0], [0, 1, 0]]
        assert opened.counts.tolist() == [1, 1, 1]
        with pytest.raises(UsageError, match=r"label_column: 'tags': expected a column with one class an image"):
            labelled.open_splits(Images(data=str(tmp_path)), "tags", largest=4)
    other = labelled.LabelledImages(opened.files, opened.labels[:, [1]], ("b",))
    with pytest.raises(UsageError, match="eval_split: 'test': expected one label for each image, as in training"):
        labelled.number_alike(other, ("a", "b"), "test", has_several=False)
    assert labelled.number_alike(other, ("a", "b"), "test", has_several=True).labels.tolist() == [
        [0, 0],
        [0, 0],
        [0, 1],
    ]


def test_classes_too_small_to_split_and_images_too_small_to_crop(folder: Path) -> None:
    train = open_split(folder)
    for few in (0.05, 0.99):
        assert all(min(side.counts) > 0 for side in labelled.hold_out(train, few))
    single = train.subset(np.flatnonzero((train.labels != 1) | (np.cumsum(train.labels == 1) < 2)))
    with pytest.raises(
        UsageError, match=r"eval_fraction: 0.05: expected two images of each of the 3 classes, .* class of green$"
    ):
        labelled.hold_out(single, 0.05)
    image_files.check_sides("name", train.files, 10)
    with pytest.raises(UsageError, match=r"data: 'name': expected .* at least 11 pixels, .* is 10"):
        image_files.check_sides("name", train.files, 11)


def test_images_too_small_for_their_buckets() -> None:
    """Each is held against its own bucket, that nearest to its aspect ratio; half of them may be smaller."""
    rows = []
    for width, height in ((16, 16), (12, 20), (20, 12), (19, 12), (20, 11), (40, 11)):
        stream = io.BytesIO()
        Image.new("RGB", (width, height)).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}})
    buckets = [(16, 16), (20, 12), (12, 20)]
    files = image_files.ImageFiles(rows, "image", np.arange(len(rows)))
    image_files.check_buckets("name", files, buckets)
    expected = "expected images that fill 16 x 16, 20 x 12, 12 x 20 pixels (height x width); 3 of 5 tried are smaller"
    with pytest.raises(UsageError, match=f"^data: 'name': {re.escape(expected)}$"):
        image_files.check_buckets("name", files.subset(np.arange(1, 6)), buckets)


READ_FROM_HUB = """
import json, sys
from shared.command_line import UsageError
from shared.images.labelled import open_images
from shared.images.files import list_splits, validation_split

data, split = sys.argv[1:]
try:
    opened = open_images(data, config="", split=split, image_column="", label_column="")
    sizes = [len(opened.files.read(index)) for index in range(len(opened))]
    found = [opened.class_names, opened.labels.tolist(), sizes]
    print(json.dumps([*found, list_splits(data, ""), validation_split(data, "")]))
except UsageError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow
def test_a_hub_data_set_is_read_like_the_files_it_is_made_of(tmp_path: Path) -> None:
    """Through the real client against a Hub on the loopback, in a process that may go online."""
    names = ["blue", "red"]
    train = write_parquet(tmp_path / "train.parquet", [("red", 1), ("blue", 0), ("red", 1)], names=names)
    test = write_parquet(tmp_path / "validation.parquet", [("blue", 0), ("red", 1)], names=names)
    hub = start_hub()
    repository = hub.repositories["datasets", "tester/colors"] = Repository(private=False)
    files = {"data/train-00000-of-00001.parquet": train, "data/validation-00000-of-00001.parquet": test}
    repository.commit({name: file.read_bytes() for name, file in files.items()}, "files")
    environment = {key: value for key, value in hub.environment().items() if key != "HF_HUB_OFFLINE"}
    environment = {**os.environ, **environment, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}

    def read(data: str, split: str) -> Any:
        command = [sys.executable, "-c", READ_FROM_HUB, data, split]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    local = open_split(train)
    sizes = [len(local.files.read(index)) for index in range(3)]
    assert read("tester/colors", "train") == [names, [1, 0, 1], sizes, ["train", "validation"], "validation"]
    assert read("tester/colors", "validation")[1] == [0, 1]
    assert read("tester/colors", "test").startswith("data_split: 'test': expected one of train, validation")
    assert read("tester/nothing", "train").startswith("data: 'tester/nothing': expected a data set of images")
    hub.stop()
