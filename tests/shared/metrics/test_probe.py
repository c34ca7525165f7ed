import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from shared.metrics.probe import NEIGHBOURS, TEMPERATURE, linear_probe, nearest_neighbours


def blobs(seed: int, spread: float) -> tuple[np.ndarray, np.ndarray]:
    """Three classes around directions of their own."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, 3, 150)
    return np.eye(3, 8)[labels] * 3 + draw.normal(0, spread, (150, 8)), labels


@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_neighbours_vote_as_scikit_learn_s(spread: float) -> None:
    (features, labels), (held_out, expected) = blobs(0, spread), blobs(1, spread)

    def weights(distances: np.ndarray) -> np.ndarray:
        return np.exp((1 - distances) / TEMPERATURE)

    theirs = KNeighborsClassifier(NEIGHBOURS, weights=weights, metric="cosine").fit(features, labels)
    assert nearest_neighbours(features, labels, held_out, expected) == pytest.approx(theirs.score(held_out, expected))


def test_features_that_tell_the_class_are_better_than_noise() -> None:
    (features, labels), (held_out, expected) = blobs(0, 0.5), blobs(1, 0.5)
    noise = np.random.default_rng(2).normal(size=(2, 150, 8))
    for probe in (nearest_neighbours, linear_probe):
        assert probe(features, labels, held_out, expected) > 0.95
        assert probe(noise[0], labels, noise[1], expected) < 0.5


def test_fewer_samples_than_neighbours() -> None:
    features = np.array([[1.0, 0.0], [0.0, 1.0]])
    assert nearest_neighbours(features, np.array([0, 1]), np.array([[0.1, 2.0]]), np.array([1])) == 1
