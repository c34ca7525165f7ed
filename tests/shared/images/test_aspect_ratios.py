"""Buckets have about the area of a square, and an image goes where the least of it is cut away."""

import math

import pytest
from diffusers.training_utils import find_nearest_bucket
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from shared.command_line import UsageError
from shared.images.aspect_ratios import aspect_ratio_buckets, nearest_bucket

SIDES = st.integers(1, 5000)
BUCKETS = aspect_ratio_buckets(512, 64)


def distance(height: int, width: int, bucket: tuple[int, int]) -> float:
    return abs(math.log(height / width) - math.log(bucket[0] / bucket[1]))


def kept(height: int, width: int, bucket: tuple[int, int]) -> float:
    """Share of an image that is not cut away when it covers the bucket."""
    scale = max(bucket[0] / height, bucket[1] / width)
    return bucket[0] * bucket[1] / (scale * height * scale * width)


@given(multiple=st.sampled_from([8, 16, 32, 64]), times=st.integers(2, 20))
@settings(deadline=None)
def test_buckets_are_of_about_the_square_s_area(multiple: int, times: int) -> None:
    size = multiple * times
    buckets = aspect_ratio_buckets(size, multiple)
    assert buckets[0] == (size, size)
    assert len(set(buckets)) == len(buckets) > 1
    assert {(width, height) for height, width in buckets} == set(buckets)
    assert all(side % multiple == 0 for bucket in buckets for side in bucket)
    for height, width in buckets:  # each side is rounded by half a multiple at most
        assert math.sqrt(height * width) == pytest.approx(size, abs=0.75 * multiple)


@given(height=SIDES, width=SIDES)
@settings(max_examples=500, deadline=None)
def test_the_nearest_on_a_logarithmic_scale_is_taken_and_the_least_cut_away(height: int, width: int) -> None:
    chosen = nearest_bucket(height, width, BUCKETS)
    assert distance(height, width, chosen) == pytest.approx(min(distance(height, width, one) for one in BUCKETS))
    assert kept(height, width, chosen) == pytest.approx(max(kept(height, width, one) for one in BUCKETS))
    assert kept(height, width, chosen) == pytest.approx(math.exp(-distance(height, width, chosen)))


def test_the_library_s_choice_cuts_more_away_near_its_borders() -> None:
    """Why there is one of our own: 1.617 lies between 1.429 and 1.833, and its logarithm is nearer to the first's."""
    buckets = [(640, 448), (704, 384)]
    height, width = 1617, 1000
    ours, theirs = nearest_bucket(height, width, buckets), buckets[find_nearest_bucket(height, width, buckets)]
    assert (ours, theirs) == ((640, 448), (704, 384))
    assert kept(height, width, ours) > kept(height, width, theirs)


@given(height=SIDES, width=SIDES)
@settings(max_examples=300, deadline=None)
def test_elsewhere_the_library_chooses_the_same(height: int, width: int) -> None:
    nearest, second = sorted(distance(height, width, bucket) for bucket in BUCKETS)[:2]
    assume(second - nearest > 0.02)
    assert nearest_bucket(height, width, BUCKETS) == BUCKETS[find_nearest_bucket(height, width, BUCKETS)]


def test_bad_input_gets_one_line() -> None:
    with pytest.raises(UsageError, match=r"^bucket_multiple: 48: expected a divisor of image_size, 64$"):
        aspect_ratio_buckets(64, 48)
    with pytest.raises(UsageError, match=r"^bucket_multiple: 64: expected less: of image_size 64 there is only the sq"):
        aspect_ratio_buckets(64, 64)
