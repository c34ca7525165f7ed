import numpy as np
import pytest

from shared.images.rand_augment import FILL, OPERATIONS, rand_augment

DOWN, ACROSS = np.mgrid[0:20, 0:24]
# Slopes, so that the farther a part is moved the more it changes, and some grain, which sharpening changes.
SLOPES = np.stack([40 + 8 * DOWN, 30 + 7 * ACROSS, 60 + 3 * (DOWN + ACROSS)], axis=-1)
PIXELS = (SLOPES + np.random.default_rng(0).integers(-9, 10, SLOPES.shape)).astype(np.uint8)


def augment(seed: int, **changed: float) -> np.ndarray:
    options = {"operations": 2, "magnitude": 7.0, "spread": 0.5, **changed}
    return rand_augment(PIXELS, draw=np.random.default_rng(seed), **options)


def test_it_is_a_function_of_its_generator() -> None:
    first, again = ([augment(seed).tobytes() for seed in range(40)] for _ in range(2))
    assert first == again
    assert len(set(first)) > 25


def test_without_operations_nothing_changes() -> None:
    assert np.array_equal(augment(0, operations=0), PIXELS)


def test_each_of_two_operations_is_applied_half_of_the_time() -> None:
    unchanged = np.mean([np.array_equal(augment(seed), PIXELS) for seed in range(800)])
    assert 0.25 - 0.06 < unchanged < 0.25 + 0.06


@pytest.mark.parametrize("place", range(len(OPERATIONS)))
@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_operations_change_more_with_their_strength(place: int, sign: float) -> None:
    from PIL import Image

    image = Image.fromarray(PIXELS)
    results = [np.asarray(OPERATIONS[place](image, strength, sign)) for strength in (0.2, 0.9)]
    assert all(result.shape == PIXELS.shape and result.dtype == np.uint8 for result in results)
    weak, strong = (np.abs(result.astype(float) - PIXELS).mean() for result in results)
    assert strong > 1
    assert strong == weak if place < 3 else strong > weak  # the first three have no strength


def test_what_was_moved_away_has_the_mean_colour() -> None:
    from PIL import Image

    moved = np.asarray(OPERATIONS[-2](Image.fromarray(PIXELS), 1.0, 1.0))
    assert np.array_equal(moved[:, -5:], np.broadcast_to(FILL, (20, 5, 3)))
    assert not np.array_equal(moved[:, :5], np.broadcast_to(FILL, (20, 5, 3)))
