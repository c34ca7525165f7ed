"""Counter-based randomness: orders are permutations, found anywhere at once, and differ between seeds."""

import collections
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.data.randomness import derive_seed, normal_numbers, shuffled_indices, uniform_numbers

SEEDS = st.integers(0, 2**63 - 1)


def order(size: int, seed: int) -> list[int]:
    return shuffled_indices(np.arange(size), size, seed).tolist()


@pytest.mark.parametrize("size", [*range(1, 70), *(2**n + d for n in range(7, 17) for d in (-1, 0, 1))])
def test_an_order_is_a_permutation(size: int) -> None:
    assert sorted(order(size, derive_seed("size", size))) == list(range(size))


@given(st.integers(1, 3000), SEEDS)
def test_an_order_of_any_size_and_seed_is_a_permutation(size: int, seed: int) -> None:
    assert sorted(order(size, seed)) == list(range(size))


@given(st.integers(1, 2**62), SEEDS, st.sets(st.integers(0, 2**62), min_size=1, max_size=50))
def test_places_of_a_huge_order_are_distinct_and_inside(size: int, seed: int, places: set[int]) -> None:
    positions = np.array(sorted({place % size for place in places}))
    indices = shuffled_indices(positions, size, seed)
    assert indices.dtype == np.int64
    assert len(set(indices.tolist())) == len(positions)
    assert 0 <= indices.min() <= indices.max() < size


@given(st.integers(1, 3000), SEEDS, st.data())
def test_a_place_does_not_depend_on_what_is_asked_with_it(size: int, seed: int, data: st.DataObject) -> None:
    places = data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=6))
    whole = order(size, seed)
    assert shuffled_indices(np.array(places), size, seed).tolist() == [whole[place] for place in places]
    assert shuffled_indices(np.array([places]), size, seed).shape == (1, len(places))


def test_no_place_gives_no_index() -> None:
    assert shuffled_indices(np.arange(0), 5, 0).tolist() == []


def test_seeds_give_different_orders() -> None:
    assert len({tuple(order(50, seed)) for seed in range(500)}) == 500


@pytest.mark.parametrize("size", [2, 3, 4, 7, 16, 33])
def test_every_index_comes_equally_often_to_every_place(size: int) -> None:
    number = 1200
    counts = np.zeros((size, size))
    for seed in range(number):
        counts[np.arange(size), order(size, seed)] += 1
    expected = number / size
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_all_orders_of_three_come_equally_often() -> None:
    found = collections.Counter(tuple(order(3, derive_seed(seed))) for seed in range(3000))
    assert len(found) == 6
    assert all(abs(count - 500) < 5 * 500**0.5 for count in found.values())


def test_neighbours_do_not_stay_neighbours() -> None:
    size = 4096
    steps = np.diff(shuffled_indices(np.arange(size), size, 1))
    assert np.mean(np.abs(steps) == 1) < 0.005
    assert abs(np.mean(np.abs(steps)) / size - 1 / 3) < 0.02


@given(st.lists(st.integers() | st.text(), max_size=4), st.lists(st.integers() | st.text(), max_size=4))
def test_seeds_depend_on_every_part(left: list[int | str], right: list[int | str]) -> None:
    assert (derive_seed(*left) == derive_seed(*right)) == (left == right)


def test_seeds_tell_numbers_from_text_and_do_not_mind_numpy() -> None:
    assert derive_seed(1) != derive_seed("1")
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed(np.int64(3), np.uint8(4), "x") == derive_seed(3, 4, "x")


@given(st.integers(), st.text())
def test_seeds_are_taken_by_every_generator(number: int, text: str) -> None:
    seed = derive_seed(number, text)
    assert 0 <= seed < 2**63
    torch.Generator().manual_seed(seed)
    np.random.Philox(key=seed)


def test_seeds_and_orders_never_change() -> None:
    # A run resumed with a newer version must go on with the same data.
    assert derive_seed(0, "order", 1) == 2002067703672271585
    assert order(10, 0) == [1, 5, 4, 6, 7, 0, 2, 9, 8, 3]


def test_uniform_numbers_are_splitmix64() -> None:
    """Against a plain program in whole numbers; Steele et al. 2014, figure 16."""

    def mix(value: int) -> int:
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) % 2**64
        return value ^ (value >> 31)

    golden, seed = 0x9E3779B97F4A7C15, derive_seed("seed")
    found = uniform_numbers(seed, np.array([0, 7]), np.array([12, 2**40]), count=3)
    for row, (epoch, index) in zip(found, ((0, 12), (7, 2**40)), strict=True):
        key = mix((mix((seed + (epoch + 1) * golden) % 2**64) + (index + 1) * golden) % 2**64)
        expected = [(mix((key + place * golden) % 2**64) >> 11) / 2**53 for place in (1, 2, 3)]
        assert row.tolist() == expected


def test_uniform_numbers_are_uniform_and_not_alike_in_neighbours() -> None:
    numbers = uniform_numbers(3, np.repeat(np.arange(50), 400), np.tile(np.arange(400), 50), count=4)
    assert numbers.shape == (20_000, 4)
    assert 0 <= numbers.min() < numbers.max() < 1
    counts = np.stack([np.histogram(column, bins=20, range=(0, 1))[0] for column in numbers.T])
    chi_squared = ((counts - 1000) ** 2 / 1000).sum(1)  # of 19 degrees of freedom: beyond 44 once in a thousand
    assert (chi_squared < 44).all()
    flat = numbers.reshape(50, 400, 4)
    pairs = [(flat[1:], flat[:-1]), (flat[:, 1:], flat[:, :-1]), (flat[..., 1:], flat[..., :-1])]
    for one, other in pairs:
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert len(np.unique(numbers)) == numbers.size


def test_uniform_numbers_do_not_depend_on_what_is_asked_with_them() -> None:
    whole = uniform_numbers(1, np.arange(9), count=5)
    assert np.array_equal(uniform_numbers(1, np.array([7, 2]), count=5), whole[[7, 2]])
    assert np.array_equal(uniform_numbers(1, np.arange(9), count=2), whole[:, :2])
    assert not np.array_equal(uniform_numbers(2, np.arange(9), count=5), whole)


def test_normal_numbers_are_normal_and_depend_on_their_counters_alone() -> None:
    numbers = normal_numbers(3, np.repeat(np.arange(50), 80), np.tile(np.arange(80), 50), count=5)
    assert numbers.shape == (4000, 5)
    assert np.array_equal(normal_numbers(3, np.array([7]), np.array([11]), count=5)[0], numbers[7 * 80 + 11])
    ordered = np.sort(numbers.ravel())
    share_below = np.array([statistics.NormalDist().cdf(value) for value in ordered])
    # Kolmogorov and Smirnov's distance; beyond 1.95 by the root of their number once in a thousand.
    assert np.abs(share_below - (np.arange(ordered.size) + 0.5) / ordered.size).max() < 1.95 / ordered.size**0.5
    correlations = np.corrcoef(numbers.T) - np.eye(5)  # the two that come of one pair of uniform numbers among them
    assert np.abs(correlations).max() < 0.06
