import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from shared.data.subsets import few_of_each, fixed_choice, held_out_of_each


@given(st.lists(st.integers(0, 3), min_size=4, max_size=60), st.integers(0, 9), st.integers(1, 9), st.integers(0, 9))
@settings(deadline=None)
def test_few_are_balanced_and_among_the_more(labels: list[int], seed: int, few: int, more: int) -> None:
    array = np.array(labels)
    chosen, larger = few_of_each(array, few, seed), few_of_each(array, few + more, seed)
    assert set(chosen.tolist()) <= set(larger.tolist())
    assert chosen.tolist() == sorted(set(chosen.tolist()))
    for label in set(labels):
        assert (array[chosen] == label).sum() == min(few, labels.count(label))


def test_another_seed_chooses_others() -> None:
    labels = np.array([0, 1] * 50)
    assert set(few_of_each(labels, 5, 0).tolist()) != set(few_of_each(labels, 5, 1).tolist())


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.floats(0.01, 0.99))
@settings(deadline=None)
def test_a_share_of_each_class_is_held_out_and_both_sides_get_some(labels: list[int], fraction: float) -> None:
    array = np.array(labels)
    held_out = held_out_of_each(array, fraction)
    assert np.array_equal(held_out, held_out_of_each(array, fraction))
    for label in set(labels):
        number, of_class = labels.count(label), held_out[array == label].sum()
        assert (of_class > 0) == (number > 1)
        assert of_class < number
        assert abs(of_class - fraction * number) <= 1


@given(st.integers(1, 200), st.integers(0, 220), st.integers(0, 20))
@settings(deadline=None)
def test_a_fixed_choice_is_among_a_larger_one(number: int, most: int, more: int) -> None:
    chosen = fixed_choice(number, most).tolist()
    assert len(chosen) == min(most or number, number)
    assert chosen == sorted(set(chosen) & set(range(number)))
    assert most == 0 or set(chosen) <= set(fixed_choice(number, most + more).tolist())


def test_a_fixed_choice_of_sorted_classes_has_all_of_them() -> None:
    """Also where classes take turns, which an even spread would meet in step."""
    for labels in (np.repeat(np.arange(10), 100), np.tile(np.arange(10), 100)):
        assert np.bincount(labels[fixed_choice(1000, 100)], minlength=10).min() >= 3
