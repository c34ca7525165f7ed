import numpy as np
import pytest

from shared import picture_cache
from shared.picture_cache import PictureCache
from shared.pictures import open_pictures


def test_small_pictures_are_decoded_once_and_only_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = open_pictures("sample", config="", split="test", image_column="", label_column="")
    monkeypatch.setattr(picture_cache, "MAX_BYTES", 2 * 28 * 28 * 3)
    cache = PictureCache(pictures)
    first = [cache.open(index) for index in (5, 6, 7)]
    again = [cache.open(index) for index in (5, 6, 7)]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True, False]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.crop((2, 3, 20, 22), 16), other.crop((2, 3, 20, 22), 16))


def test_large_pictures_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    pictures = open_pictures("sample", config="", split="test", image_column="", label_column="")
    monkeypatch.setattr(picture_cache, "SMALL", 28 * 28 - 1)
    cache = PictureCache(pictures)
    assert cache.open(5) is not cache.open(5)
