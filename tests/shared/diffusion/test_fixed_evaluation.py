"""Means of errors over splits and bands count every sample once, on any number of processes."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator

from shared.diffusion import fixed_evaluation
from shared.diffusion.fixed_evaluation import BandErrors, fixed_batches

SIZES = {"train": 5, "test": 7, "other": 1}


class Numbers(torch.utils.data.Dataset):
    """Like `FixedSamples`: item `number` is two samples, or one at the end, in band `number % 3`."""

    num_bands = 3

    def __init__(self, size: int) -> None:
        self._parts = [np.arange(first, min(first + 2, size)) for first in range(0, size, 2)]

    def __len__(self) -> int:
        return 3 * len(self._parts)

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        part, band = divmod(number % len(self), 3)
        return {"value": self._parts[part] + 100.0 * band}


def process(rank: int, processes: int) -> Any:
    return SimpleNamespace(process_index=rank, num_processes=processes, device=torch.device("cpu"))


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_every_sample_counts_once(processes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    splits: Any = {name: Numbers(size) for name, size in SIZES.items()}
    found, taken = [], []
    for rank in range(processes):
        errors, places = BandErrors(splits), []
        for place, batch in fixed_batches(process(rank, processes), splits, 0):
            errors.add(place, batch["value"])
            places.append(place)
        found.append(errors)
        taken.append(len(places))
    assert len(set(taken)) == 1  # all take part equally often
    monkeypatch.setattr(fixed_evaluation, "gather_objects", lambda _, __: [errors._totals for errors in found])
    metrics = found[0].metrics(process(0, processes), "train")
    for name, size in SIZES.items():
        values = np.arange(size)
        for band in range(3):
            assert metrics[f"eval/loss_{name}_band_{band}"] == pytest.approx((values + 100 * band).mean())
        assert metrics[f"eval/loss_{name}"] == pytest.approx(values.mean() + 100)
    assert metrics["eval/loss"] == pytest.approx((metrics["eval/loss_test"] + metrics["eval/loss_other"]) / 2)


def test_it_gathers_over_processes() -> None:
    splits: Any = {"train": Numbers(2), "test": Numbers(2)}
    accelerator, errors = Accelerator(cpu=True), BandErrors(splits)
    for place, batch in fixed_batches(accelerator, splits, 1):
        errors.add(place, batch["value"])
    assert errors.metrics(accelerator, "train")["eval/loss"] == 100.5
