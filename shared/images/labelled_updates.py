"""What update t sees of labelled images: random crops, of images that are read by index or as they arrive.

A crop is a function of the seed and of what tells it from others, whoever reads it. Growing crops have a side for each
update; repeated ones come several times in a row, each after a RandAugment of its own.
"""

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import numpy as np
from torch.utils.data import Dataset, IterableDataset

from shared.command_line import UsageError, expect
from shared.data.batches import micro_batches
from shared.data.randomness import derive_seed, uniform_numbers
from shared.data.sample_order import positions_of_update, samples_at, samples_of_update
from shared.data.shards import StreamState, resumed_state
from shared.images.bad_images import candidates
from shared.images.crops import CROP_DRAWS, random_crop
from shared.images.decoded_cache import ImageCache
from shared.images.decoding import BadImage, EncodedImage
from shared.images.labelled import LabelledImages
from shared.images.rand_augment import rand_augment
from shared.images.streaming import ImageStream

Row: TypeAlias = dict[str, np.ndarray]  # pixel_values uint8 (S, S, 3) and labels int64 (), of batches (B, ...)


class GrowingCrops(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step.

    Args:
        data: name of the data set, as the user gave it.
        train: images to train on.
        sizes: side of the crops of each update, in pixels.
        min_area: see `random_crop`.
        mirrored: likewise.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
        groups: positions of images that are drawn from equally often, such as those of each class; none = all in one.
    """

    def __init__(
        self,
        data: str,
        train: LabelledImages,
        sizes: Sequence[int],
        min_area: float,
        mirrored: bool,
        micro_batch_size: int,
        order: dict[str, int],
        groups: Sequence[np.ndarray] = (),
    ) -> None:
        self._groups, self._sizes = groups or [np.arange(len(train))], sizes
        self._images = _Replaceable(data, train, min_area, mirrored, order["seed"])
        self._micro_batch_size, self._order = micro_batch_size, order

    def __getitem__(self, step: int) -> tuple[list[Row], list[str], None]:
        """The micro-batches of update `step`, the names of images that could not be decoded, and no state.

        Raises:
            UsageError: no image that stands in for another one can be decoded.
        """
        sizes, shares = list(map(len, self._groups)), [1.0] * len(self._groups)
        sources, epochs, places = np.transpose(samples_of_update(step, sizes, shares, **self._order))
        indices = np.array([self._groups[source][place] for source, place in zip(sources, places, strict=True)])
        draws = _crop_draws(self._order["seed"], epochs, indices)
        drawn = zip(epochs.tolist(), indices.tolist(), draws, strict=True)
        bad: list[str] = []
        rows = [self._images.crop(*where, self._sizes[step], bad) for where in drawn]
        return micro_batches(rows, self._micro_batch_size), bad, None


class RepeatedCrops(Dataset):
    """The same for crops of one size, several of each image in a row, after RandAugment.

    An image stands in the order once for all of its crops (Berman et al. 2019).

    Args:
        data: name of the data set, as the user gave it.
        train: images to train on.
        size: side of the crops in pixels.
        min_area: see `random_crop`.
        mirrored: likewise.
        repeats: crops of an image.
        augmentation: operations, magnitude and spread of `rand_augment`.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
    """

    def __init__(
        self,
        data: str,
        train: LabelledImages,
        size: int,
        min_area: float,
        mirrored: bool,
        repeats: int,
        augmentation: tuple[int, float, float],
        micro_batch_size: int,
        order: dict[str, int],
    ) -> None:
        self._number, self._size, self._repeats, self._augmentation = len(train), size, repeats, augmentation
        self._images = _Replaceable(data, train, min_area, mirrored, order["seed"])
        self._micro_batch_size, self._order = micro_batch_size, order

    def __getitem__(self, step: int) -> tuple[list[Row], list[str], None]:
        """The micro-batches of update `step`, the names of images that could not be decoded, and no state.

        Raises:
            UsageError: no image that stands in for another one can be decoded.
        """
        order, bad, rows = dict(self._order), list[str](), list[Row]()
        seed = order.pop("seed")
        places, copies = np.divmod(positions_of_update(step, **order), self._repeats)
        _, epochs, indices = np.transpose(samples_at(places, [self._number], [1.0], seed))
        draws = _crop_draws(seed, epochs, indices, copies)
        for epoch, index, copy, numbers in zip(epochs.tolist(), indices.tolist(), copies.tolist(), draws, strict=True):
            row = self._images.crop(epoch, index, numbers, self._size, bad)
            row["pixel_values"] = _augment(row["pixel_values"], self._augmentation, seed, epoch, index, copy)
            rows.append(row)
        return micro_batches(rows, self._micro_batch_size), bad, None


class StreamedGrowingCrops(IterableDataset):
    """What the updates from `step` to the last see on this process, of images that are read as they arrive.

    Args:
        data: name of the data set, as the user gave it.
        train: images to train on.
        sizes: side of the crops of each update, in pixels.
        min_area: see `random_crop`.
        mirrored: likewise.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
        step: first update.
        states: of every process, as a checkpoint kept them; empty = from the start.
    """

    def __init__(
        self,
        data: str,
        train: ImageStream,
        sizes: Sequence[int],
        min_area: float,
        mirrored: bool,
        micro_batch_size: int,
        order: dict[str, int],
        step: int,
        states: list[StreamState],
    ) -> None:
        self._data, self._train, self._sizes, self._min_area = data, train, sizes[step:], min_area
        self._micro_batch_size, self._share = micro_batch_size, order["global_batch_size"] // order["num_processes"]
        self._seed, self._rank = order["seed"], order["rank"]
        self._state, self._mirrored = resumed_state(states, order["rank"], order["num_processes"]), mirrored

    def __iter__(self) -> Iterator[tuple[list[Row], list[str], StreamState]]:
        """The micro-batches of each update, the names of images that could not be decoded, the state after it.

        Raises:
            UsageError: of so many images none can be decoded that it looks as if none could.
        """
        state = self._state
        arriving = self._train.read(derive_seed(self._seed, "stream"), self._rank, state)
        for size in self._sizes:
            bad, rows = list[str](), list[Row]()
            while len(rows) < self._share:
                image, state = next(arriving)
                [draws] = _crop_draws(self._seed, np.array([state["epoch"]]), np.array([image.key]))
                try:
                    pixels = random_crop(
                        EncodedImage(image.data).of_eight_bits(), size, self._min_area, draws, self._mirrored
                    )
                except BadImage:
                    bad.append(image.name)
                    _check_not_endless(bad, self._share, self._data)
                    continue
                rows.append({"pixel_values": pixels, "labels": np.array(image.label)})
            yield micro_batches(rows, self._micro_batch_size), bad, state


class StreamedRepeatedCrops(IterableDataset):
    """The same for crops of one size, several of each image in a row, after RandAugment; without end.

    The crops that an update has no room for are left out, so each update begins with another image.

    Args:
        data: name of the data set, as the user gave it.
        train: images to train on.
        size: side of the crops in pixels.
        min_area: see `random_crop`.
        mirrored: likewise.
        repeats: crops of an image.
        augmentation: operations, magnitude and spread of `rand_augment`.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
        states: of every process, as a checkpoint kept them; empty = from the start.
    """

    def __init__(
        self,
        data: str,
        train: ImageStream,
        size: int,
        min_area: float,
        mirrored: bool,
        repeats: int,
        augmentation: tuple[int, float, float],
        micro_batch_size: int,
        order: dict[str, int],
        states: list[StreamState],
    ) -> None:
        self._data, self._train, self._size, self._min_area = data, train, size, min_area
        self._repeats, self._augmentation = repeats, augmentation
        self._micro_batch_size, self._share = micro_batch_size, order["global_batch_size"] // order["num_processes"]
        self._seed, self._rank = order["seed"], order["rank"]
        self._state, self._mirrored = resumed_state(states, order["rank"], order["num_processes"]), mirrored

    def __iter__(self) -> Iterator[tuple[list[Row], list[str], StreamState]]:
        """The micro-batches of each update, the names of images that could not be decoded, the state after it.

        Raises:
            UsageError: of so many images none can be decoded that it looks as if none could.
        """
        state = self._state
        arriving = self._train.read(derive_seed(self._seed, "stream"), self._rank, state)
        while True:
            bad, rows = list[str](), list[Row]()
            while len(rows) < self._share:
                image, state = next(arriving)
                try:
                    crops = list(self._crops(image.data, state["epoch"], image.key))
                except BadImage:
                    bad.append(image.name)
                    _check_not_endless(bad, self._share, self._data)
                    continue
                rows += [{"pixel_values": pixels, "labels": np.array(image.label)} for pixels in crops]
            yield micro_batches(rows[: self._share], self._micro_batch_size), bad, state

    def _crops(self, data: bytes, epoch: int, key: int) -> Iterator[np.ndarray]:
        for copy in range(self._repeats):
            [draws] = _crop_draws(self._seed, np.array([epoch]), np.array([key]), np.array([copy]))
            pixels = random_crop(EncodedImage(data).of_eight_bits(), self._size, self._min_area, draws, self._mirrored)
            yield _augment(pixels, self._augmentation, self._seed, epoch, key, copy)


class _Replaceable:
    """Crops of images that are read by index, of others where one cannot be decoded."""

    def __init__(self, data: str, train: LabelledImages, min_area: float, mirrored: bool, seed: int) -> None:
        self._data, self._train, self._seed = data, train, seed
        self._min_area, self._mirrored = min_area, mirrored
        self._cache = ImageCache(train.files)

    def crop(self, epoch: int, index: int, draws: list[float], size: int, bad: list[str]) -> Row:
        """A crop of the image, or of the first replacement that can be decoded; what cannot goes to `bad`."""
        for candidate in candidates(index, len(self._train), self._seed, epoch):
            try:
                image = self._cache.open(candidate)
                pixels = random_crop(image, size, self._min_area, draws, self._mirrored)
            except BadImage:
                bad.append(self._train.files.name(candidate))
                continue
            return {"pixel_values": pixels, "labels": self._train.labels[candidate]}
        raise UsageError(f"data: {self._data!r}: expected images that can be decoded")


def _crop_draws(seed: int, *counters: np.ndarray) -> list[list[float]]:
    return uniform_numbers(derive_seed(seed, "crop"), *counters, count=CROP_DRAWS).tolist()


def _augment(pixels: np.ndarray, augmentation: tuple[int, float, float], seed: int, *where: int) -> np.ndarray:
    draw = np.random.Generator(np.random.Philox(key=derive_seed(seed, "augment", *where)))
    return rand_augment(pixels, *augmentation, draw)


def _check_not_endless(bad: list[str], share: int, data: str) -> None:
    expect(len(bad) <= 100 + share, "data", data, "images that can be decoded")
