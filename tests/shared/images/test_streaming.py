"""Streams of images: exact resume, every image once a pass, the same parts at every call, no endless search."""

import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.command_line import UsageError
from shared.data.shards import start_of_stream
from shared.fields import Images
from shared.images import streaming
from shared.images.labelled import SAMPLE, open_images
from shared.images.streaming import ImageStream, open_image_stream, store
from tests.conftest import ROOT
from tests.hub_server import Repository, start_hub

COLUMNS = {"image_column": "", "label_column": ""}


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 255 - value)).save(stream, "PNG")
    return stream.getvalue()


def write_shards(folder: Path, number: int, each: int = 8, labels: Any = None) -> list[bytes]:
    """Parquet files of `each` different images; their bytes in order."""
    classes = datasets.ClassLabel(names=["blue", "red"]) if labels is None else datasets.Value(labels)
    features = datasets.Features({"image": datasets.Image(), "label": classes})
    folder.mkdir()
    images = [png(index) for index in range(number * each)]
    for shard in range(number):
        mine = images[shard * each : (shard + 1) * each]
        rows = {"image": [{"bytes": image, "path": None} for image in mine], "label": [0, 1] * each}
        rows["label"] = rows["label"][:each]
        datasets.Dataset.from_dict(rows, features).to_parquet(folder / f"train-{shard}.parquet")
    return images


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    folder = tmp_path_factory.mktemp("shards") / "data"
    return folder, write_shards(folder, 5)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 4)


def open_stream(folder: Path) -> ImageStream:
    return open_image_stream(str(folder), config="", split="train", **COLUMNS)


@pytest.mark.parametrize("processes", [1, 2, 5, 7])
def test_every_image_comes_once_a_pass(shards: tuple[Path, list[bytes]], processes: int) -> None:
    stream, found = open_stream(shards[0]), []
    for rank in range(processes):
        arriving = stream.read(0, rank, start_of_stream(processes))
        # Windows of 4 cross the end of a pass; what each window holds is what was dealt.
        pairs = list(itertools.islice(arriving, 40))
        windows = [pairs[start : start + 4] for start in range(0, 40, 4)]
        dealt = streaming.deal_records(stream.shards(), 0, rank, start_of_stream(processes))
        for window in windows:
            expected = sorted(next(dealt)[0].data for _ in range(4))
            assert sorted(image.data for image, _ in window) == expected
        first_pass = streaming.deal_records(stream.shards(), 0, rank, start_of_stream(processes))
        mine = itertools.takewhile(lambda pair: pair[1]["epoch"] == 0, first_pass)
        found += [image.data for image, _ in mine]
    assert sorted(found) == sorted(shards[1])


@given(stop=st.integers(0, 60), processes=st.integers(1, 6), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_resuming_anywhere_gives_the_same_images(
    shards: tuple[Path, list[bytes]], stop: int, processes: int, seed: int
) -> None:
    stream, rank = open_stream(shards[0]), processes - 1
    whole = list(itertools.islice(stream.read(seed, rank, start_of_stream(processes)), stop + 12))
    state = whole[stop - 1][1] if stop else start_of_stream(processes)
    state = json.loads(json.dumps(state))  # as a checkpoint keeps it
    assert list(itertools.islice(stream.read(seed, rank, state), 12)) == whole[stop:]


def test_parts_are_disjoint_complete_and_chosen_by_content(shards: tuple[Path, list[bytes]]) -> None:
    stream = open_stream(shards[0])
    first, rest = ({image.data for image in stream.between(*ends)} for ends in ((0, 0.3), (0.3, 1)))
    assert first | rest == set(shards[1])
    assert not first & rest
    assert 4 <= len(first) <= 22
    assert stream.between(0, 0.3).fingerprint != stream.fingerprint


def test_what_is_stored_is_read_by_index(shards: tuple[Path, list[bytes]]) -> None:
    stored = store(open_stream(shards[0]), 7)
    assert [stored.files.read(index) for index in range(len(stored))] == shards[1][:7]
    assert stored.labels.tolist() == [0, 1, 0, 1, 0, 1, 0]
    assert stored.class_names == ("blue", "red")
    assert len(store(open_stream(shards[0]), 0)) == 40


def test_the_size_is_that_of_the_data_set_or_assumed(shards: tuple[Path, list[bytes]]) -> None:
    sample = open_image_stream(str(SAMPLE), config="", split="test", **COLUMNS)
    by_index = open_images(str(SAMPLE), config="", split="test", **COLUMNS)
    assert len(sample) in (2000, 10_000)
    assert [image.data for image in itertools.islice(sample, 3)] == [by_index.files.read(index) for index in range(3)]
    assert sample.class_names == by_index.class_names


def test_a_split_to_evaluate_on_is_stored_or_held_out(shards: tuple[Path, list[bytes]], shapes: Path) -> None:
    train, held_out = streaming.open_splits(Images(data=str(shapes)), "", largest=20)
    assert len(list(train)) == 39
    assert sorted(held_out.labels.tolist()) == [0] * 7 + [1] * 7 + [2] * 7
    train, held_out = streaming.open_splits(Images(data=str(shards[0]), eval_fraction=0.3), "", largest=4)
    images = [held_out.files.read(index) for index in range(len(held_out))]
    assert images
    assert sorted([*images, *(image.data for image in train)]) == sorted(shards[1])
    with pytest.raises(UsageError, match="expected images of at least 5 pixels, the size of the crops"):
        streaming.open_splits(Images(data=str(shards[0]), eval_fraction=0.3), "", largest=5)


@pytest.mark.parametrize("deep", ["train", "test"])
def test_a_split_of_sixteen_bits_is_refused(shapes: Path, tmp_path: Path, deep: str) -> None:
    """Whichever of the two it is; the other one has 8."""
    shutil.copytree(shapes, tmp_path / "data")
    for file in (tmp_path / "data" / deep).glob("*/*.png"):
        Image.fromarray(np.full((20, 24), 40_000, np.uint16)).save(file)
    with pytest.raises(UsageError, match=r"expected grey images of 8 bits a pixel, .* has 16"):
        streaming.open_splits(Images(data=str(tmp_path / "data")), "", largest=20)


def test_class_folders_are_streamed(shapes: Path) -> None:
    stream = open_image_stream(str(shapes), config="", split="test", **COLUMNS)
    assert stream.class_names == ("high", "low", "middle")
    images = list(stream)
    assert len(images) == 21
    assert sorted(image.data for image in images) == sorted(file.read_bytes() for file in shapes.glob("test/*/*"))
    assert all(Path(image.name).parent.name == stream.class_names[image.label] for image in images)


def test_what_cannot_be_streamed_is_refused(shards: tuple[Path, list[bytes]], tmp_path: Path) -> None:
    write_shards(tmp_path / "numbers", 1, labels="int64")
    with pytest.raises(UsageError, match="label_column: 'label': expected a column with a list of classes"):
        open_stream(tmp_path / "numbers")
    with pytest.raises(UsageError, match="data_split: 'dev': expected one of train"):
        open_image_stream(str(shards[0]), config="", split="dev", **COLUMNS)
    with pytest.raises(UsageError, match="expected images to evaluate on, got none"):
        store(open_stream(shards[0]).between(0, 1e-9), 0)
    nothing = open_stream(shards[0]).between(0, 1e-9)
    with pytest.raises(UsageError, match="got none for process 0 of 1"):
        next(nothing.read(0, 0, start_of_stream(1)))


STREAM_FROM_HUB = """
import itertools, json, sys
from shared.images.streaming import open_image_stream, store
columns = {"image_column": "", "label_column": ""}
train = open_image_stream("tester/colors", config="", split="train", **columns)
held_out = store(open_image_stream("tester/colors", config="", split="validation", **columns), 0)
print(json.dumps([train.class_names, [len(image.data) for image in train], held_out.labels.tolist()]))
"""


def test_a_hub_data_set_is_not_downloaded(tmp_path: Path) -> None:
    """Through the real client against a Hub on the loopback, in a process that may go online."""
    images = write_shards(tmp_path / "files", 2)
    hub = start_hub()
    repository = hub.repositories["datasets", "tester/colors"] = Repository(private=False)
    files = {
        f"data/train-0000{shard}-of-00002.parquet": tmp_path / f"files/train-{shard}.parquet" for shard in range(2)
    }
    files["data/validation-00000-of-00001.parquet"] = tmp_path / "files/train-1.parquet"
    repository.commit({name: file.read_bytes() for name, file in files.items()}, "files")
    environment = {key: value for key, value in hub.environment().items() if key != "HF_HUB_OFFLINE"}
    environment = {**os.environ, **environment, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", STREAM_FROM_HUB]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    hub.stop()
    assert done.returncode == 0, done.stderr
    expected = [["blue", "red"], [len(image) for image in images], [0, 1] * 4]
    assert json.loads(done.stdout.splitlines()[-1]) == expected
    assert not list((tmp_path / "hf").rglob("*train*.parquet"))
