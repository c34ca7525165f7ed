import math

import pytest
import torch

from shared.command_line import TooManyNonFiniteUpdates
from shared.run.skipped_updates import SkippedUpdates


def count(skipped: SkippedUpdates, *norms: float) -> None:
    for norm in norms:
        skipped.count(torch.tensor(norm))


def test_a_run_ends_after_so_many_in_a_row() -> None:
    skipped = SkippedUpdates({}, 3)
    for norm in (1.0, math.nan, math.inf, 0.5, math.nan, -math.inf):
        count(skipped, norm)
        skipped.check(1)
    assert skipped.total == 4
    assert not skipped.are_too_many
    count(skipped, math.nan)
    assert skipped.total == 5
    assert skipped.are_too_many
    with pytest.raises(TooManyNonFiniteUpdates, match="3 updates in a row had no finite gradient, up to step 7"):
        skipped.check(7)


def test_the_newest_update_is_looked_at_when_the_next_is_counted_or_when_it_is_asked_for() -> None:
    skipped = SkippedUpdates({}, 1)
    count(skipped, math.nan)
    assert not skipped.are_too_many
    count(skipped, math.nan)
    assert skipped.are_too_many
    assert skipped.state() == {"skipped": 2, "bad_in_a_row": 2}


def test_counting_goes_on_from_a_checkpoint() -> None:
    first = SkippedUpdates({}, 2)
    count(first, math.nan)
    second = SkippedUpdates({"training_seconds": 3.0, **first.state()}, 2)
    count(second, math.nan)
    assert (second.total, second.are_too_many) == (2, True)
