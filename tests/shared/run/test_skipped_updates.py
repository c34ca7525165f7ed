import math

import pytest

from shared.command_line import TooManyNonFiniteUpdates
from shared.run.skipped_updates import SkippedUpdates


def test_a_run_ends_after_so_many_in_a_row() -> None:
    skipped = SkippedUpdates({}, 3)
    for norm in (1.0, math.nan, math.inf, 0.5, math.nan, -math.inf):
        skipped.count(norm)
        skipped.check(1)
    assert skipped.total == 4
    assert not skipped.are_too_many
    skipped.count(math.nan)
    assert skipped.are_too_many
    with pytest.raises(TooManyNonFiniteUpdates, match="3 updates in a row had no finite gradient, up to step 7"):
        skipped.check(7)


def test_counting_goes_on_from_a_checkpoint() -> None:
    first = SkippedUpdates({}, 2)
    first.count(math.nan)
    second = SkippedUpdates({"training_seconds": 3.0, **first.state()}, 2)
    second.count(math.nan)
    assert (second.total, second.are_too_many) == (2, True)
