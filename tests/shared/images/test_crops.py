import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shared.data.batches import IGNORED
from shared.images.crops import CROP_DRAWS, SQUARE_DRAWS, BucketCrops, CenterCrops, Squares, random_crop, random_square
from shared.images.decoding import EncodedImage
from shared.images.files import ImageFiles
from shared.images.labelled import SAMPLE, open_images


@given(width=st.integers(8, 60), height=st.integers(8, 60), min_area=st.floats(0.08, 1), seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_crops_are_inside_the_image_and_large_enough(width: int, height: int, min_area: float, seed: int) -> None:
    boxes = []

    class Image:
        def __init__(self) -> None:
            self.width, self.height = width, height

        def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
            boxes.append(box)
            return np.zeros((size, size, 3), dtype=np.uint8)

    random_crop(Image(), 16, min_area, np.random.default_rng(seed).random(CROP_DRAWS), True)
    [(left, top, right, bottom)] = boxes
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    across, down = right - left, bottom - top
    is_middle = across == down == min(width, height)
    # Sides are rounded to whole pixels, each by half of one at most.
    assert is_middle or (across + 0.5) * (down + 0.5) >= min_area * width * height
    assert is_middle or (across - 0.5) / (down + 0.5) <= 4 / 3
    assert is_middle or (across + 0.5) / (down - 0.5) >= 3 / 4


def test_half_of_the_crops_are_mirrored() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[:, 8:] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    image = EncodedImage(stream.getvalue())
    draws = [np.random.default_rng(seed).random(CROP_DRAWS) for seed in range(400)]
    crops = [random_crop(image, 12, 0.9, of_one, True) for of_one in draws]
    is_white_right = [crop[:, 6:].mean() > crop[:, :6].mean() for crop in crops]
    assert 0.5 - 4 * 0.025 < np.mean(is_white_right) < 0.5 + 4 * 0.025
    assert all(
        crop[:, 6:].mean() > crop[:, :6].mean()
        for crop in (random_crop(image, 12, 0.9, of_one, False) for of_one in draws)
    )


def test_areas_are_uniform() -> None:
    areas = []

    class Image:
        width = height = 1000

        def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
            areas.append((box[2] - box[0]) * (box[3] - box[1]) / 1e6)
            return np.zeros((size, size, 3), dtype=np.uint8)

    for seed in range(2000):
        random_crop(Image(), 8, 0.2, np.random.default_rng(seed).random(CROP_DRAWS), True)
    below = [np.mean(np.array(areas) < area) for area in (0.3, 0.4, 0.5)]  # above, some do not fit
    assert np.diff([0, *below])[1:] == pytest.approx(below[0], rel=0.25)


def test_batches_hold_each_image_once_and_say_which_cannot_be_read() -> None:
    images = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="")
    first = images.subset(np.arange(7))
    crops = CenterCrops(first, 28, 1.0, 3)
    batches = [crops[number] for number in range(4)]
    assert [batch["indices"].tolist() for batch in batches] == [[0, 1, 2], [3, 4, 5], [6], [0]]
    assert np.concatenate([batch["labels"] for batch in batches[:3]]).tolist() == first.labels.tolist()
    assert batches[3]["labels"].tolist() == [IGNORED]
    assert set(batches[3]["pixel_values"].flatten()) == {128}


@given(width=st.integers(1, 60), height=st.integers(1, 60), seed=st.integers(0, 10**6))
@settings(max_examples=200, deadline=None)
def test_squares_are_the_largest_and_anywhere_in_the_image(width: int, height: int, seed: int) -> None:
    boxes = []

    class Image:
        def __init__(self) -> None:
            self.width, self.height = width, height

        def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
            boxes.append(box)
            return np.arange(size * size * 3).reshape(size, size, 3)

    draws = np.random.default_rng(seed).random(SQUARE_DRAWS)
    pixels = random_square(Image(), 4, draws, True)
    [(left, top, right, bottom)] = boxes
    assert right - left == bottom - top == min(width, height)
    assert 0 <= left <= right <= width
    assert 0 <= top <= bottom <= height
    unmirrored = np.arange(48).reshape(4, 4, 3)
    assert np.array_equal(pixels, unmirrored[:, ::-1] if draws[1] < 0.5 else unmirrored)
    assert np.array_equal(random_square(Image(), 4, draws, False), unmirrored)


def test_every_place_of_a_square_comes() -> None:
    class Image:
        width, height = 5, 3

        def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
            return np.full((size, size, 3), box[0])

    draws = np.random.default_rng(0).random((300, SQUARE_DRAWS))
    places = [int(random_square(Image(), 1, of_one, True)[0, 0, 0]) for of_one in draws]
    assert np.bincount(places).min() > 70


def test_batches_of_squares_say_what_is_no_image() -> None:
    files = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="").files
    squares = Squares(files.subset(np.arange(5)), 28, 4)
    assert squares[0]["indices"].tolist() == [0, 1, 2, 3]
    assert squares[1]["indices"].tolist() == [4, -1, -1, -1]
    assert np.array_equal(squares[1]["pixel_values"][0], EncodedImage(files.read(4)).center_crop(28, 1.0))
    assert set(squares[1]["pixel_values"][1:].flatten()) == {128}


def test_crops_of_buckets_are_together_with_those_of_their_size() -> None:
    """Sizes are height x width; the fifth file is no image."""
    sizes = [(20, 20), (20, 30), (31, 20), (20, 34), (1, 1), (40, 41), (50, 30)]
    draw, rows = np.random.default_rng(0), []
    for size in sizes:
        stream = io.BytesIO()
        Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(stream, "PNG")
        rows.append({"image": {"bytes": stream.getvalue(), "path": None}})
    rows[4] = {"image": {"bytes": b"no image", "path": None}}
    files = ImageFiles(rows, "image", np.arange(len(rows)))
    crops = BucketCrops(files, [(16, 16), (20, 12), (12, 20)], 4)
    assert len(crops) == 2
    items = [[(part["pixel_values"].shape, part["indices"].tolist()) for part in crops[item]] for item in range(2)]
    first = [((1, 16, 16, 3), [0]), ((2, 12, 20, 3), [1, 3]), ((1, 20, 12, 3), [2])]
    assert items == [first, [((1, 16, 16, 3), [5]), ((1, 20, 12, 3), [6])]]
    assert np.array_equal(crops[0][1]["pixel_values"][1], EncodedImage(files.read(3)).cover(12, 20))
