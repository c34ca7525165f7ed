"""Crops of images: random squares to train on, the middle to evaluate on, or to encode in its aspect ratio."""

import contextlib
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset

from shared.data.batches import IGNORED, micro_batches
from shared.images.aspect_ratios import nearest_bucket
from shared.images.decoding import BadImage, EncodedImage
from shared.images.files import ImageFiles
from shared.images.labelled import LabelledImages


class Croppable(Protocol):
    """An image whose size is known, such as `EncodedImage`."""

    width: int
    height: int

    def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
        """Part of the image, uint8 (size, size, 3)."""


CROP_DRAWS = 23  # uniform numbers that a random crop takes: two for each of ten sizes, two for its place, one to mirror


def random_crop(image: Croppable, size: int, min_area: float, draws: Sequence[float], mirrored: bool) -> np.ndarray:
    """A random part of the image (Szegedy et al. 2015, section 6).

    Where ten draws do not fit into the image, it is the largest square in the middle.

    Args:
        image: to cut from.
        size: side of the result in pixels.
        min_area: the crop has this share of the image's area to all of it, and an aspect ratio of 3/4 to 4/3.
        draws: `CROP_DRAWS` numbers, uniform in [0, 1).
        mirrored: whether half of the crops are mirror images.

    Returns:
        uint8 (size, size, 3).

    Raises:
        BadImage: the file is damaged.
    """
    width, height = image.width, image.height
    across, down, mirror, *sizes = draws
    for of_area, of_ratio in zip(sizes[::2], sizes[1::2], strict=True):
        area = (min_area + of_area * (1 - min_area)) * width * height
        ratio = (4 / 3) ** (2 * of_ratio - 1)
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left, top = int(across * (width - crop_width + 1)), int(down * (height - crop_height + 1))
            break
    else:
        crop_width = crop_height = min(width, height)
        left, top = (width - crop_width) // 2, (height - crop_height) // 2
    pixels = image.crop((left, top, left + crop_width, top + crop_height), size)
    return pixels[:, ::-1] if mirrored and mirror < 0.5 else pixels


SQUARE_DRAWS = 2  # uniform numbers that a random square takes: one for its place, one to mirror


def random_square(image: Croppable, size: int, draws: Sequence[float], mirrored: bool) -> np.ndarray:
    """The largest square at a random place of the image.

    Args:
        image: to cut from.
        size: side of the result in pixels.
        draws: `SQUARE_DRAWS` numbers, uniform in [0, 1).
        mirrored: whether half of the squares are mirror images.

    Returns:
        uint8 (size, size, 3).

    Raises:
        BadImage: the file is damaged.
    """
    where, mirror = draws
    side = min(image.width, image.height)
    left, top = int(where * (image.width - side + 1)), int(where * (image.height - side + 1))
    pixels = image.crop((left, top, left + side, top + side), size)
    return pixels[:, ::-1] if mirrored and mirror < 0.5 else pixels


class CenterCrops(Dataset):
    """Item `batch` is the middle of each of its images, as the exported image processor cuts it.

    Args:
        held_out: images to evaluate on.
        size: side of the crops in pixels.
        crop_fraction: of the shorter side that a crop keeps.
        batch_size: images of a batch.

    Attributes:
        num_images: over all batches.
    """

    def __init__(self, held_out: LabelledImages, size: int, crop_fraction: float, batch_size: int) -> None:
        self._held_out, self._size, self._crop_fraction = held_out, size, crop_fraction
        self._batch_size, self.num_images = batch_size, len(held_out)
        self._no_label = np.full(held_out.labels.shape[1:], IGNORED)

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.num_images // self._batch_size)

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        """Images that cannot be decoded, and the one of a batch beyond the last, are grey and have no label."""
        first = batch * self._batch_size
        rows = [self.read(index) for index in range(first, min(first + self._batch_size, self.num_images))]
        return micro_batches(rows or [self._blank(0)], self._batch_size)[0]

    def read(self, index: int) -> dict[str, Any]:
        """One image: pixel_values uint8 (S, S, 3), labels, indices."""
        try:
            pixels = (
                EncodedImage(self._held_out.files.read(index))
                .of_eight_bits()
                .center_crop(self._size, self._crop_fraction)
            )
        except BadImage:
            return self._blank(index)
        return {"pixel_values": pixels, "labels": self._held_out.labels[index], "indices": np.array(index)}

    def _blank(self, index: int) -> dict[str, Any]:
        grey = np.full((self._size, self._size, 3), 128, dtype=np.uint8)
        return {"pixel_values": grey, "labels": self._no_label, "indices": np.array(index)}


class Squares(Dataset):
    """Item `batch` is the largest square in the middle of each of its images.

    Args:
        images: to cut from.
        size: side of the squares in pixels.
        batch_size: images of a batch.
    """

    def __init__(self, images: ImageFiles, size: int, batch_size: int) -> None:
        self._images, self._size, self._batch_size = images, size, batch_size

    def __getitem__(self, batch: int) -> dict[str, np.ndarray]:
        """pixel_values uint8 (B, S, S, 3) and indices int64 (B,), -1 where an image is grey: damaged, or beyond."""
        positions = range(batch * self._batch_size, (batch + 1) * self._batch_size)
        rows = [self._read(index) for index in positions]
        pixels, indices = zip(*rows, strict=True)
        return {"pixel_values": np.stack(pixels), "indices": np.array(indices)}

    def _read(self, index: int) -> tuple[np.ndarray, int]:
        try:
            if index < len(self._images):
                return EncodedImage(self._images.read(index)).center_crop(self._size, 1.0), index
        except BadImage:
            pass
        return np.full((self._size, self._size, 3), 128, dtype=np.uint8), -1


class BucketCrops(Dataset):
    """Item `batch` is the middle of each of its images, cut to the bucket nearest to the image's aspect ratio.

    Args:
        images: to cut from.
        buckets: heights and widths in pixels.
        batch_size: images of an item.
    """

    def __init__(self, images: ImageFiles, buckets: Sequence[tuple[int, int]], batch_size: int) -> None:
        self._images, self._buckets, self._batch_size = images, buckets, batch_size

    def __len__(self) -> int:
        return -(-len(self._images) // self._batch_size)

    def __getitem__(self, batch: int) -> list[dict[str, np.ndarray]]:
        """For each size that occurs: pixel_values uint8 (B, H, W, 3) and indices int64 (B,); no damaged images."""
        found: dict[tuple[int, ...], list[tuple[np.ndarray, int]]] = {}
        first = batch * self._batch_size
        for index in range(first, min(first + self._batch_size, len(self._images))):
            with contextlib.suppress(BadImage):
                image = EncodedImage(self._images.read(index))
                bucket = nearest_bucket(image.height, image.width, self._buckets)
                found.setdefault(bucket, []).append((image.cover(*bucket), index))
        parts = [zip(*rows, strict=True) for rows in found.values()]
        return [{"pixel_values": np.stack(pixels), "indices": np.array(indices)} for pixels, indices in parts]
