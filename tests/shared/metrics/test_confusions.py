import numpy as np

from shared.metrics.confusions import count_confusions, describe_confusions

LABELS = np.array([0, 0, 0, 1, 1, 2, 2])
GUESSES = np.array([0, 1, 1, 1, 2, 2, 2])
NAMES = ["cat", "dog", "cow", "hen"]


def test_confusions_are_counted_by_class_and_guess() -> None:
    assert count_confusions(LABELS, GUESSES, 4).tolist() == [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


def test_the_most_frequent_come_first() -> None:
    text = describe_confusions(LABELS, GUESSES, NAMES)
    assert text.splitlines() == ["cat taken for dog: 2 of 3", "dog taken for cow: 1 of 2"]
    assert describe_confusions(LABELS, LABELS, NAMES) == "no mistake"


def test_many_classes_need_no_memory_of_their_square() -> None:
    """A matrix of 200,000 classes would take 320 GB."""
    names = [str(number) for number in range(200_000)]
    labels = np.arange(200_000)
    assert describe_confusions(labels, labels, names) == "no mistake"
    guesses = np.where(labels % 50_000 == 7, 0, labels)
    assert describe_confusions(labels, guesses, names).splitlines()[-1] == "150007 taken for 0: 1 of 1"
