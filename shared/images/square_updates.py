"""What update t sees where images are the largest squares that fit them, with noise for what a model draws."""

import math
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from shared.command_line import UsageError
from shared.data.randomness import derive_seed, normal_numbers, uniform_numbers
from shared.data.sample_order import samples_of_update
from shared.images.bad_images import candidates
from shared.images.crops import SQUARE_DRAWS, random_square
from shared.images.decoding import BadImage, EncodedImage
from shared.images.files import ImageFiles


class SquareUpdates(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step, whoever reads it.

    Args:
        train: images to train on.
        data: what the user called them, for the message.
        size: side of the squares in pixels.
        noise_shape: of each image's standard normal numbers.
        micro_batch_size: images of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
        mirrored: see `random_square`.
    """

    def __init__(
        self,
        train: ImageFiles,
        data: str,
        *,
        size: int,
        noise_shape: tuple[int, ...],
        micro_batch_size: int,
        order: dict[str, int],
        mirrored: bool,
    ) -> None:
        self._train, self._data, self._size, self._noise_shape = train, data, size, noise_shape
        self._mirrored = mirrored
        self._micro_batch_size, self._order, self._seed = micro_batch_size, order, order["seed"]

    def __getitem__(self, step: int) -> tuple[list[dict[str, np.ndarray]], list[str]]:
        """The micro-batches of update `step`, and the names of images that could not be decoded.

        A micro-batch is pixel_values uint8 (B, S, S, 3) and noise float32 (B, ...).

        Raises:
            UsageError: an image and all that could stand in for it cannot be decoded.
        """
        bad: list[str] = []
        order: dict[str, Any] = self._order
        _, epochs, indices = np.transpose(samples_of_update(step, [len(self._train)], [1.0], **order))
        draws = uniform_numbers(derive_seed(self._seed, "crop"), epochs, indices, count=SQUARE_DRAWS).tolist()
        drawn = zip(epochs.tolist(), indices.tolist(), draws, strict=True)
        pixels = np.stack([self._read(*where, bad) for where in drawn])
        count = math.prod(self._noise_shape)
        noise = normal_numbers(derive_seed(self._seed, "noise"), epochs, indices, count=count).astype(np.float32)
        update = {"pixel_values": pixels, "noise": noise.reshape(-1, *self._noise_shape)}
        starts = range(0, len(pixels), self._micro_batch_size)
        cuts = [slice(start, start + self._micro_batch_size) for start in starts]
        return [{name: values[cut] for name, values in update.items()} for cut in cuts], bad

    def _read(self, epoch: int, index: int, draws: list[float], bad: list[str]) -> np.ndarray:
        """A square of the image, or of the first replacement that can be decoded; what cannot goes to `bad`."""
        for candidate in candidates(index, len(self._train), self._seed, epoch):
            try:
                image = EncodedImage(self._train.read(candidate))
                return random_square(image, self._size, draws, self._mirrored)
            except BadImage:
                bad.append(self._train.name(candidate))
        raise UsageError(f"data: {self._data!r}: expected images that can be decoded")
