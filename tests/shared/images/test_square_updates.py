"""Updates of squares are a function of seed and step, and damaged images are replaced the same way by all."""

from pathlib import Path

import numpy as np
import pytest

from shared.command_line import UsageError
from shared.images.files import ImageFiles, open_files
from shared.images.square_updates import SquareUpdates


@pytest.fixture
def train(shapes: Path) -> ImageFiles:
    return open_files(str(shapes), "", "train", "")


def updates_of(train: ImageFiles, rank: int = 0, processes: int = 1, seed: int = 0) -> SquareUpdates:
    order = {"seed": seed, "global_batch_size": 8, "rank": rank, "num_processes": processes}
    return SquareUpdates(
        train, "me/mine", size=16, noise_shape=(2, 8, 8), micro_batch_size=2, order=order, mirrored=True
    )


def rows(updates: SquareUpdates, step: int) -> list[bytes]:
    batches, bad = updates[step]
    assert bad == []
    assert all(len(batch["pixel_values"]) == len(batch["noise"]) == 2 for batch in batches)
    pairs = [zip(batch["pixel_values"], batch["noise"], strict=True) for batch in batches]
    return [pixels.tobytes() + noise.tobytes() for pair in pairs for pixels, noise in pair]


def test_updates_are_a_function_of_seed_and_step(train: ImageFiles) -> None:
    """Two processes with two micro-batches see the images and the noise of one."""
    for step in (0, 3, 11):
        whole = rows(updates_of(train), step)
        assert len(set(whole)) == 8
        assert whole == rows(updates_of(train, 0, 2), step) + rows(updates_of(train, 1, 2), step)
        assert not set(whole) & set(rows(updates_of(train, seed=1), step))
    assert not set(rows(updates_of(train), 0)) & set(rows(updates_of(train), 5))


def test_squares_and_noise_have_their_forms(train: ImageFiles) -> None:
    [batch, *_], _ = updates_of(train)[0]
    assert (batch["pixel_values"].dtype, batch["pixel_values"].shape) == (np.uint8, (2, 16, 16, 3))
    assert (batch["noise"].dtype, batch["noise"].shape) == (np.float32, (2, 2, 8, 8))
    noise = np.stack([batch["noise"] for step in range(50) for batch in updates_of(train)[step][0]])
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)


class Damaged:
    """Images of which only some can be decoded."""

    def __init__(self, images: ImageFiles, whole: set[int]) -> None:
        self._images, self._whole = images, whole

    def __len__(self) -> int:
        return len(self._images)

    def name(self, index: int) -> str:
        return f"image {index}"

    def read(self, index: int) -> bytes:
        return self._images.read(index) if index in self._whole else b""


def test_damaged_images_are_named_and_replaced_by_others(train: ImageFiles) -> None:
    damaged = Damaged(train, {3, 5, 8})
    batches, bad = updates_of(damaged)[0]  # type: ignore[arg-type]
    assert sum(len(batch["pixel_values"]) for batch in batches) == 8
    assert len(bad) >= 5
    assert not {"image 3", "image 5", "image 8"} & set(bad)
    again, _ = updates_of(damaged)[0]  # type: ignore[arg-type]
    for batch, other in zip(batches, again, strict=True):
        assert (batch["pixel_values"] == other["pixel_values"]).all()
    with pytest.raises(UsageError, match="data: 'me/mine': expected images that can be decoded"):
        updates_of(Damaged(train, set()))[0]  # type: ignore[arg-type]
