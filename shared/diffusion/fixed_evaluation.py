"""Errors of a diffusion model on fixed samples: the mean of each split, over all times and in each band of them.

errors = BandErrors(fixed)
for place, batch in fixed_batches(accelerator, fixed, num_workers):
    errors.add(place, error_of_each_sample)
metrics = errors.metrics(accelerator, [data_split])
"""

from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shared.data.batches import to_device
from shared.data.updates import load_updates
from shared.diffusion.latent_updates import FixedSamples
from shared.runtime.collectives import equal_share, gather_objects


class Place(NamedTuple):
    """Where errors of a batch belong.

    Attributes:
        row: number of the split.
        band: of times.
        is_new: false where the batch came before, since all processes take equally many.
    """

    row: int
    band: int
    is_new: bool


def fixed_batches(
    accelerator: Any, splits: dict[str, FixedSamples], num_workers: int
) -> Iterator[tuple[Place, dict[str, Tensor]]]:
    """This process's share of the samples of all splits, on its device.

    Args:
        accelerator: knows the processes.
        splits: name -> samples.
        num_workers: data worker processes; 0 = read here.
    """
    for row, samples in enumerate(splits.values()):
        steps = equal_share(accelerator, len(samples))
        batches = load_updates(samples, steps, num_workers, accelerator.device)
        for number, batch in zip(steps, batches, strict=True):
            place = Place(row, number % samples.num_bands, number < len(samples))
            yield place, to_device(batch, accelerator.device)


class BandErrors:
    """Sums of errors.

    Args:
        splits: name -> samples, all of as many bands.
    """

    def __init__(self, splits: dict[str, FixedSamples]) -> None:
        [num_bands] = {samples.num_bands for samples in splits.values()}
        self._names = list(splits)
        self._totals = torch.zeros(len(splits), num_bands, 2, dtype=torch.float64)

    def add(self, place: Place, errors: Tensor) -> None:
        """Take in the errors (B,) of a batch."""
        counts = torch.tensor([errors.cpu().double().sum().item(), len(errors)], dtype=torch.float64)
        self._totals[place.row, place.band] += counts * place.is_new

    def metrics(self, accelerator: Any, trained: Collection[str]) -> dict[str, float]:
        """Means over all processes; eval/loss is that of the splits but those trained on. Every process calls this.

        Args:
            accelerator: knows the processes.
            trained: names of the splits that are trained on.
        """
        sums, numbers = torch.stack(gather_objects(accelerator, self._totals)).sum(0).unbind(-1)
        means = dict(zip(self._names, (sums.sum(1) / numbers.sum(1)).tolist(), strict=True))
        metrics = {"eval/loss": float(np.mean([mean for name, mean in means.items() if name not in trained]))}
        for row, (name, mean) in enumerate(means.items()):
            metrics[f"eval/loss_{name}"] = mean
            for band, value in enumerate((sums[row] / numbers[row]).tolist()):
                metrics[f"eval/loss_{name}_band_{band}"] = value
        return metrics
