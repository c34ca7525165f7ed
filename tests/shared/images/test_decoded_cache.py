from pathlib import Path

import numpy as np
import pytest

from shared.images import decoded_cache
from shared.images.decoded_cache import ImageCache
from shared.images.labelled import SAMPLE, open_images


def test_small_images_are_decoded_once_and_only_while_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="")
    monkeypatch.setattr(decoded_cache, "MAX_BYTES", 2 * 28 * 28 * 3)
    cache = ImageCache(images.files)
    first = [cache.open(index) for index in (5, 6, 7)]
    again = [cache.open(index) for index in (5, 6, 7)]
    assert [one is other for one, other in zip(first, again, strict=True)] == [True, True, False]
    for one, other in zip(first, again, strict=True):
        assert np.array_equal(one.crop((2, 3, 20, 22), 16), other.crop((2, 3, 20, 22), 16))


def test_pixels_do_not_depend_on_whether_there_was_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else they would depend on the number of data workers, each of which has room of its own."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for name in ("one", "two"):
        (tmp_path / "train" / name).mkdir(parents=True)
        noise = draw.integers(0, 256, (40, 60, 3)).astype(np.uint8)
        Image.fromarray(noise).save(tmp_path / "train" / name / "0.jpg")
    images = open_images(str(tmp_path), config="", split="train", image_column="", label_column="")
    roomy, full = ImageCache(images.files), ImageCache(images.files)
    roomy.open(0)
    crops = [roomy.open(0).crop((3, 2, 50, 38), 24)]
    monkeypatch.setattr(decoded_cache, "MAX_BYTES", 0)
    crops += [full.open(0).crop((3, 2, 50, 38), 24) for _ in range(2)]
    assert np.array_equal(crops[0], crops[1])
    assert np.array_equal(crops[0], crops[2])


def test_large_images_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="")
    monkeypatch.setattr(decoded_cache, "SMALL", 28 * 28 - 1)
    cache = ImageCache(images.files)
    assert cache.open(5) is not cache.open(5)
