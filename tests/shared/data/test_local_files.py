"""Which files a folder has and which splits: nothing is lost to a name, a link or a cycle."""

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.data import left_out
from shared.data.local_files import (
    SPLIT_WORDS,
    find_files,
    is_about_the_data,
    part_by_split,
    split_named,
    split_to_evaluate_on,
    usual_name,
)

PARTS = st.sampled_from(["train", "Test", "dev", "cat", "training_day", "b [v1]", "x y", "val"])
NAMES = st.sampled_from(
    ["train.jsonl", "test-00000-of-00002.jsonl", "photo of a train.jsonl", "trains.jsonl", "é,.jsonl"]
)
FOLDER = Path("/data")


@given(st.lists(st.tuples(st.lists(PARTS, max_size=3), NAMES), min_size=1, max_size=8), st.booleans())
def test_every_file_is_in_one_split(layout: list[tuple[list[str], str]], by_file_name: bool) -> None:
    files = sorted({FOLDER.joinpath(*parts, name) for parts, name in layout})
    try:
        splits = part_by_split(FOLDER, files, by_file_name=by_file_name)
    except UsageError:
        return
    assert sorted(file for of_one in splits.values() for file in of_one) == files
    assert all(splits.values())


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["train.jsonl", "test.jsonl"], {"train": 1, "test": 1}),
        (
            ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "dev.parquet"],
            {"train": 2, "validation": 1},
        ),
        (["train_a.txt", "train_b.txt", "Valid-3.txt"], {"train": 2, "validation": 1}),
        (["train.txt", "train_small.txt", "dev_a.txt"], {"train": 1, "train_small": 1, "dev_a": 1}),
        (["train-0-of-1-0ab9f.csv", "test-0-of-2-12ab.csv", "test-1-of-2-cd34.csv"], {"train": 1, "test": 2}),
        (["train.csv", "test-unseen.csv"], {"train": 1, "test-unseen": 1}),
        (["train.csv", "test.csv", "test_unseen-00000-of-00001.csv"], {"train": 1, "test": 1, "test_unseen": 1}),
        (["train/cat/1.jpg", "train/dog/1.jpg", "test/cat/2.jpg"], {"train": 2, "test": 1}),
        (["data/train/a.txt", "data/eval/b.txt"], {"train": 1, "test": 1}),
        # Not the whole layout says so.
        (["train.jsonl", "other.jsonl"], {"train": 2}),
        (["train/1.jpg", "car/1.jpg", "plane/1.jpg"], {"train": 3}),
        (["training_day.txt", "testament.txt"], {"train": 2}),
        (["train_station/1.txt", "test_tube/1.txt"], {"train": 2}),
        (["trains.txt", "trains2.txt"], {"train": 2}),
    ],
)
def test_a_layout_tells_splits(names: list[str], expected: dict[str, int]) -> None:
    splits = part_by_split(FOLDER, [FOLDER / name for name in names], by_file_name=True)
    assert [(split, len(files)) for split, files in splits.items()] == list(expected.items())


@pytest.mark.parametrize("odd", ["diagnostic.csv", "logo.png", "index.jsonl"])
def test_a_file_of_no_split_beside_splits_is_refused(odd: str) -> None:
    files = [FOLDER / name for name in ("train/1.png", "test/2.png", odd)]
    expected = f"data: '/data': expected each file or none to be of a split: train/1.png is of one, {odd} is of none"
    with pytest.raises(UsageError, match=re.escape(expected)):
        part_by_split(FOLDER, files, by_file_name=True)


def test_names_that_look_like_splits_and_are_none_are_said(caplog: pytest.LogCaptureFixture) -> None:
    folders = [FOLDER / "training_set" / "a.txt", FOLDER / "test_set" / "b.txt"]
    assert part_by_split(FOLDER, folders, by_file_name=True) == {"train": folders}
    assert "names such as training_set/a.txt tell none" in caplog.text
    caplog.clear()
    images = [FOLDER / "cat" / "3 test.png", FOLDER / "dog" / "train.png"]
    assert part_by_split(FOLDER, images, by_file_name=False) == {"train": images}
    assert caplog.text == ""


def test_names_of_images_tell_no_splits() -> None:
    files = [FOLDER / "cat" / "train_1.jpg", FOLDER / "dog" / "test_1.jpg"]
    assert part_by_split(FOLDER, files, by_file_name=False) == {"train": files}


def test_a_split_is_found_by_every_word_for_it() -> None:
    assert split_named("dev", ["train", "validation"]) == "validation"
    assert split_named("test_unseen", ["train", "test_unseen"]) == "test_unseen"
    assert split_named("dev", ["train", "test"]) == split_named("other", ["train"]) == ""
    assert split_to_evaluate_on(["train", "test", "validation_b"]) == "validation_b"
    assert split_to_evaluate_on(["train", "test"], apart_from="testing") == ""
    assert split_named("validation", ["dev", "train"]) == "dev"
    assert usual_name("Dev") == usual_name("validation") != usual_name("dev_b")
    assert set(SPLIT_WORDS.values()) == {"train", "validation", "test"}


def test_links_are_followed_once_and_a_cycle_ends(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for file in ("data/a.txt", "data/b [v1]/c.txt", "data/.hidden/d.txt", "elsewhere/e.txt", "elsewhere/deep/f.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    data = tmp_path / "data"
    (data / "linked").symlink_to(elsewhere)
    (data / "z again").symlink_to(elsewhere)
    (elsewhere / "deep" / "up").symlink_to(data)
    (data / "file.txt").symlink_to(elsewhere / "e.txt")
    (data / "broken.txt").symlink_to(tmp_path / "nowhere")
    (data / "loop").symlink_to(data / "loop")
    (data / "a link to b").symlink_to(data / "b [v1]")
    found = [str(file.relative_to(data)) for file in find_files(data, lambda name: name.endswith(".txt"))]
    assert found == ["a.txt", "b [v1]/c.txt", "file.txt", "linked/deep/f.txt", "linked/e.txt"]
    assert left_out.counts()["broken_links_and_locked_folders"] == 2


def test_what_is_about_the_data_is_none_of_it() -> None:
    assert [is_about_the_data(name) for name in ("README.txt", "License", "readme.md.gz", "notice.txt.xz")] == [
        True
    ] * 4
    assert not any(map(is_about_the_data, ("readmes.txt", "authors.jsonl", "license.csv.gz")))
