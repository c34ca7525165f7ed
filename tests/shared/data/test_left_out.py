"""What is left out of data is counted once for each place, and said."""

import pytest

from shared.data import left_out


def test_places_are_added_and_a_second_look_at_one_counts_once(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        left_out.note("images_without_a_caption", 2, where="a", more="such as row 3")
    left_out.note("images_without_a_caption", 1_000, where="b")
    left_out.note("damaged_images", 0, where="a")
    assert left_out.counts() == {"images_without_a_caption": 1_002}
    expected = ["left out of a: 2 images without a caption, such as row 3"]
    assert [record.message for record in caplog.records] == [
        *expected,
        "left out of b: 1,000 images without a caption",
    ]
    left_out.note("images_without_a_caption", 0, where="b")
    assert left_out.counts() == {"images_without_a_caption": 2}
    left_out.forget()
    assert left_out.counts() == {}


def test_splits_are_left_out_until_they_are_read() -> None:
    for read, number in (("train", 3), ("train", 3), ("validation", 1), ("test", 0)):
        left_out.note_splits("a", {"train": 4, "validation": 2, "test": 1}, read=read)
        assert left_out.counts() == ({"files_of_other_splits": number} if number else {})
