"""Crops are functions of seed and step, on any number of processes; each image comes as often as it should."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shared.command_line import UsageError
from shared.images import streaming
from shared.images.bad_images import candidates
from shared.images.labelled import LabelledImages, open_images
from shared.images.labelled_updates import (
    GrowingCrops,
    RepeatedCrops,
    StreamedGrowingCrops,
    StreamedRepeatedCrops,
)
from shared.images.streaming import ImageStream, open_image_stream

WHERE = {"config": "", "split": "train", "image_column": "", "label_column": ""}
SIZES = [8] * 3 + [12] * 57
AUGMENTATION = (2, 2.0, 0.5)


@pytest.fixture(scope="module")
def train(shapes: Path) -> LabelledImages:
    """39 images, 13 of each of three classes."""
    return open_images(str(shapes), **WHERE)


@pytest.fixture(scope="module")
def stream(shapes: Path) -> ImageStream:
    return open_image_stream(str(shapes), **WHERE)


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "WINDOW", 10)


def order(batch_size: int, rank: int = 0, processes: int = 1, seed: int = 0) -> dict[str, int]:
    return {"seed": seed, "global_batch_size": batch_size, "rank": rank, "num_processes": processes}


def growing(train: LabelledImages, *of_order: int) -> GrowingCrops:
    return GrowingCrops("shapes", train, SIZES, 0.5, True, 2, order(*of_order))


def test_groups_are_drawn_from_equally_often_whatever_the_processes(train: LabelledImages) -> None:
    groups = [np.array([0]), np.arange(1, len(train))]
    seen = []
    for processes in (1, 2):
        shares = [
            GrowingCrops("shapes", train, [16] * 40, 0.5, True, 2, order(8, rank, processes), groups)
            for rank in range(processes)
        ]
        seen.append([[row for share in shares for row in rows_of(share[step])] for step in range(40)])
    assert seen[0] == seen[1]
    of_first = [label == train.labels[0] for update in seen[0] for _, label in update]
    others = np.mean(train.labels[1:] == train.labels[0])
    assert np.mean(of_first) == pytest.approx(0.5 + 0.5 * others, abs=0.08)


def repeated(train: LabelledImages, repeats: int, *of_order: int, augmentation: Any = AUGMENTATION) -> RepeatedCrops:
    return RepeatedCrops("shapes", train, 16, 0.5, True, repeats, augmentation, 2, order(*of_order))


def streamed(stream: ImageStream, repeats: int, *of_order: int, states: Any = ()) -> StreamedRepeatedCrops:
    return StreamedRepeatedCrops(
        "shapes", stream, 16, 0.5, True, repeats, AUGMENTATION, 2, order(*of_order), list(states)
    )


def rows_of(update: Any) -> list[tuple[bytes, int]]:
    """Pixels and label of each image of an update, none of which is bad."""
    batches, bad, _ = update
    assert bad == []
    pairs = [zip(batch["pixel_values"], batch["labels"].tolist(), strict=True) for batch in batches]
    return [(pixels.tobytes(), label) for pixels, label in itertools.chain(*pairs)]


def spoilt(train: LabelledImages, bad: set[int]) -> LabelledImages:
    """The images, some of whose files are empty."""

    class Files(type(train.files)):  # type: ignore[misc]
        def read(self, index: int) -> bytes:
            return b"" if index in bad else super().read(index)

    files = Files(train.files.dataset, train.files.image_column, train.files.indices)
    return LabelledImages(files, train.labels, train.class_names)


def test_growing_crops_are_a_function_of_seed_and_step(train: LabelledImages) -> None:
    """Two processes see the global batch of one; an epoch has every image once, the next one another crop of it."""
    for step in (0, 3, 11):
        whole = rows_of(growing(train, 8, 0, 1)[step])
        assert whole == rows_of(growing(train, 8, 0, 2)[step]) + rows_of(growing(train, 8, 1, 2)[step])
        assert whole != rows_of(growing(train, 8, 0, 1, 1)[step])
    one = growing(train, 13)
    epochs = [[label for step in range(3 * e, 3 * e + 3) for _, label in rows_of(one[step])] for e in range(2)]
    assert [np.bincount(labels).tolist() for labels in epochs] == [[13, 13, 13]] * 2
    assert epochs[0] != epochs[1]
    assert not set(rows_of(growing(train, 39)[0])) & set(rows_of(growing(train, 39)[1]))


def test_crops_grow_by_update(train: LabelledImages, stream: ImageStream) -> None:
    shapes = [growing(train, 4)[step][0][0]["pixel_values"].shape for step in (2, 3)]
    assert shapes == [(2, 8, 8, 3), (2, 12, 12, 3)]
    arriving = list(StreamedGrowingCrops("shapes", stream, SIZES[:5], 0.5, True, 2, order(4), 1, []))
    assert [len(batches[0]["pixel_values"][0]) for batches, _, _ in arriving] == [8, 8, 12, 12]


def test_each_image_comes_three_times_in_a_row(train: LabelledImages) -> None:
    """39 images, 9 crops an update: 13 updates are an epoch of 117 crops, cut in the middle of none."""
    updates = repeated(train, 3, 9, augmentation=(0, 0.0, 0.0))
    rows = [row for step in range(13) for row in rows_of(updates[step])]
    labels = [label for _, label in rows]
    assert labels[::3] == labels[1::3] == labels[2::3]
    assert np.bincount(labels).tolist() == [39] * 3
    assert len({pixels for pixels, _ in rows}) > 110  # a few of the same image may be equal


def test_repeated_crops_are_shared_by_processes(train: LabelledImages) -> None:
    """Updates of 8 end within the three crops of an image."""
    whole = rows_of(repeated(train, 3, 8)[5])
    assert whole == rows_of(repeated(train, 3, 8, 0, 2)[5]) + rows_of(repeated(train, 3, 8, 1, 2)[5])
    assert whole != rows_of(repeated(train, 3, 8, augmentation=(0, 0.0, 0.0))[5])


@pytest.mark.parametrize("make", [growing, lambda train, *of_order: repeated(train, 1, *of_order)])
def test_what_cannot_be_decoded_is_replaced(train: LabelledImages, make: Any) -> None:
    """By the first of its replacements; the other images stay what they are."""
    whole, bad = rows_of(make(train, 39)[0]), {4, 7}
    batches, names, _ = make(spoilt(train, bad), 39)[0]
    assert set(names) == {train.files.name(index) for index in bad}
    rows = rows_of((batches, [], None))
    differing = [place for place in range(39) if rows[place] != whole[place]]
    assert len(differing) == 2
    stand_ins = [next(c for c in candidates(index, 39, 0, 0) if c not in bad) for index in sorted(bad)]
    found = sorted(rows[place][1] for place in differing)
    assert found == sorted(train.labels[stand_ins].tolist())


@pytest.mark.parametrize("make", [growing, lambda train, *of_order: repeated(train, 1, *of_order)])
def test_data_without_an_image_ends(train: LabelledImages, make: Any) -> None:
    with pytest.raises(UsageError, match="data: 'shapes': expected images that can be decoded"):
        make(spoilt(train, set(range(39))), 8)[0]


def test_a_stream_goes_on_where_it_was(stream: ImageStream) -> None:
    """Also within a window and where an update has left crops of an image out."""
    whole = list(itertools.islice(streamed(stream, 3, 8), 12))
    for stop in (1, 5, 11):
        rest = streamed(stream, 3, 8, states=[whole[stop - 1][2]])
        assert [rows_of(update) for update in itertools.islice(rest, 12 - stop)] == list(map(rows_of, whole[stop:]))
    grown = list(StreamedGrowingCrops("shapes", stream, SIZES, 0.5, True, 2, order(8), 0, []))
    rest = StreamedGrowingCrops("shapes", stream, SIZES, 0.5, True, 2, order(8), 7, [grown[6][2]])
    assert list(map(rows_of, rest)) == list(map(rows_of, grown[7:]))


def test_crops_of_a_stream_come_in_a_row(stream: ImageStream) -> None:
    rows = [row for update in itertools.islice(streamed(stream, 3, 9), 10) for row in rows_of(update)]
    labels = [label for _, label in rows]
    assert labels[::3] == labels[1::3] == labels[2::3]
    assert len({pixels for pixels, _ in rows}) > 80  # 30 images of a pass; a few crops of the same may be equal


@pytest.mark.parametrize("number", [1, 2])
def test_a_stream_without_an_image_ends(shapes: Path, tmp_path: Path, number: int) -> None:
    for file in (shapes / "train").rglob("*.png"):
        (tmp_path / "train" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / file.parent.name / file.name).write_bytes(b"no image")
    broken = open_image_stream(str(tmp_path), **WHERE)
    crops = [StreamedGrowingCrops("shapes", broken, SIZES, 0.5, True, 2, order(8), 0, []), streamed(broken, 2, 8)]
    with pytest.raises(UsageError, match="data: 'shapes': expected images that can be decoded"):
        next(iter(crops[number - 1]))
