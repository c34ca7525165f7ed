"""Images that cannot be decoded: what stands in for them, how many there were, and when there are too many."""

import logging
from collections.abc import Iterable, Iterator
from typing import Any

from shared.command_line import UsageError
from shared.data import left_out
from shared.data.randomness import derive_seed
from shared.runtime.collectives import gather_objects

logger = logging.getLogger(__name__)

_MAX_REPLACEMENTS = 100  # of an image, then the data set is taken for unreadable


def candidates(index: int, size: int, seed: int, epoch: int) -> Iterator[int]:
    """An image and those that stand in for it, in order, the same at every call.

    Args:
        index: the image that is wanted.
        size: number of images.
        seed: another one gives other replacements.
        epoch: likewise.
    """
    yield index
    for attempt in range(_MAX_REPLACEMENTS):
        yield derive_seed(seed, "replacement", epoch, index, attempt) % size


class BadImages:
    """The images of a run that could not be decoded.

    Args:
        accelerator: knows the processes.
        num_images: of the data to train on.
        max_fraction: share of them above which `check` stops the run.
        known: what `gather` gave, of the run that goes on.
    """

    def __init__(self, accelerator: Any, num_images: int, max_fraction: float, known: Iterable[str]) -> None:
        self._accelerator, self._num_images, self._max_fraction = accelerator, num_images, max_fraction
        self._found = set(known)
        self._known: list[str] = []  # on all processes, at the newest `number`

    def add(self, names: Iterable[str]) -> None:
        """Note the names of an update's bad images on this process; new ones are logged."""
        for name in sorted(set(names) - self._found):
            self._found.add(name)
            logger.warning("an image that cannot be decoded is replaced: %s", name)

    def gather(self) -> list[str]:
        """All that were found so far, on any process. Every process calls this."""
        return sorted(set().union(*gather_objects(self._accelerator, self._found)))

    def number(self) -> int:
        """How many there are so far, over all processes. Every process calls this."""
        self._known = self.gather()
        left_out.note("damaged_images", len(self._known), where="the images to train on")
        return len(self._known)

    @property
    def are_too_many(self) -> bool:
        """Whether `check` will end the run, by the newest `number`."""
        return len(self._known) > self._max_fraction * self._num_images

    def check(self) -> None:
        """End a run whose data is too bad.

        Raises:
            UsageError: by the newest `number`, they are more than the stated share.
        """
        if self.are_too_many:
            expected = f"at most this share of {self._num_images} images to be damaged"
            found = f"{len(self._known)} are, such as {self._known[0]}"
            raise UsageError(f"max_bad_fraction: {self._max_fraction}: expected {expected}, {found}")
