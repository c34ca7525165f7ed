import logging

import pytest
from accelerate import Accelerator

from shared.command_line import UsageError
from shared.images.bad_images import BadImages, candidates


def of_run(known: list[str], max_fraction: float) -> BadImages:
    return BadImages(Accelerator(cpu=True), 2000, max_fraction, known)


def test_replacements_are_the_same_at_every_call() -> None:
    first = list(candidates(3, 50, seed=1, epoch=0))
    assert first[0] == 3
    assert first == list(candidates(3, 50, seed=1, epoch=0))
    assert first != list(candidates(3, 50, seed=2, epoch=0))
    assert first[1:] != list(candidates(4, 50, seed=1, epoch=0))[1:]
    assert len(first) == 101
    assert set(first) <= set(range(50))


def test_each_bad_image_counts_and_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    bad = of_run(["5.png"], max_fraction=0.5)
    with caplog.at_level(logging.WARNING):
        bad.add(["7.png", "7.png", "5.png"])
        bad.add(["7.png"])
    assert [record.getMessage() for record in caplog.records] == ["an image that cannot be decoded is replaced: 7.png"]
    assert bad.number() == 2
    assert bad.gather() == ["5.png", "7.png"]


def test_more_than_the_stated_share_stops_the_run() -> None:
    bad = of_run(["3.png"], max_fraction=0.001)
    bad.add(["1.png"])
    assert bad.number() == 2
    bad.check()
    bad.add(["4.png"])
    bad.number()
    with pytest.raises(UsageError, match=r"max_bad_fraction: 0.001: expected .* 3 are, such as 1.png"):
        bad.check()
