import numpy as np

from shared.confusions import count_confusions, describe_confusions, surest_mistakes

LABELS = np.array([0, 0, 0, 1, 1, 2, 2])
GUESSES = np.array([0, 1, 1, 1, 2, 2, 2])


def test_confusions_are_counted_by_class_and_guess() -> None:
    assert count_confusions(LABELS, GUESSES, 4).tolist() == [[1, 2, 0, 0], [0, 1, 1, 0], [0, 0, 2, 0], [0, 0, 0, 0]]


def test_the_most_frequent_come_first() -> None:
    text = describe_confusions(LABELS, GUESSES, ["cat", "dog", "cow", "hen"])
    assert text.splitlines() == ["cat taken for dog: 2 of 3", "dog taken for cow: 1 of 2"]
    assert describe_confusions(LABELS, LABELS, ["cat", "dog", "cow", "hen"]) == "no mistake"


def test_the_surest_mistakes_come_first() -> None:
    probabilities = np.array([0.9, 0.4, 0.8, 0.7, 0.6, 1.0, 0.5])
    assert surest_mistakes(LABELS, GUESSES, probabilities, 5).tolist() == [2, 4, 1]
    assert surest_mistakes(LABELS, GUESSES, probabilities, 2).tolist() == [2, 4]
