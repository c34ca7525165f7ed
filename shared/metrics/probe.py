"""How much frozen features tell of classes, before anything is tuned: nearest neighbours and a linear classifier."""

import numpy as np

from shared.metrics.scores import Accuracy

NEIGHBOURS, TEMPERATURE = 20, 0.07  # Wu et al. 2018, section 3.4, whose k of 200 is for ImageNet; 20 as in DINO
_AT_ONCE = 1024  # samples whose similarities are held in memory


def nearest_neighbours(
    features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray
) -> float:
    """Accuracy on held-out samples of a vote of their nearest neighbours, weighted by exp(cosine / temperature).

    Args:
        features: float (N, D), of labelled samples.
        labels: int64 (N,), their classes.
        held_out: float (M, D).
        held_out_labels: int64 (M,).
    """
    known, asked = (
        rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12) for rows in (features, held_out)
    )
    number, guesses = min(NEIGHBOURS, len(known)), []
    for first in range(0, len(asked), _AT_ONCE):
        cosines = asked[first : first + _AT_ONCE] @ known.T
        nearest = np.argpartition(-cosines, number - 1, axis=1)[:, :number]
        weights = np.exp(np.take_along_axis(cosines, nearest, axis=1) / TEMPERATURE)
        votes = np.zeros((len(cosines), int(labels.max()) + 1))
        np.add.at(votes, (np.arange(len(cosines))[:, None], labels[nearest]), weights)
        guesses.append(votes.argmax(1))
    return Accuracy().compute(predictions=np.concatenate(guesses), references=held_out_labels)["accuracy"]


def linear_probe(features: np.ndarray, labels: np.ndarray, held_out: np.ndarray, held_out_labels: np.ndarray) -> float:
    """Accuracy on held-out samples of logistic regression on features of unit variance; see `nearest_neighbours`."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    classifier = make_pipeline(StandardScaler(), LogisticRegression(max_iter=300)).fit(features, labels)
    return Accuracy().compute(predictions=classifier.predict(held_out), references=held_out_labels)["accuracy"]
