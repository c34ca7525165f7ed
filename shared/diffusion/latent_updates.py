"""What an update of a latent diffusion model sees, and what it is evaluated on: latents, noise, times and texts.

Everything random is a function of the seed, the epoch and the sample, or of the step; the recipe turns uniform numbers
into the timesteps of its own noise schedule.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from shared.data.randomness import derive_seed, normal_numbers, uniform_numbers
from shared.data.sample_order import mixture_sources, positions_of_update, samples_at
from shared.data.updates import load_updates
from shared.diffusion.captions import text_masks, token_ids
from shared.diffusion.latent_cache import Latents
from shared.fields import RunControl
from shared.images.files import spread
from shared.runtime.collectives import rank_of

_MIRRORED, _DROPPED = 0, 1  # columns of a sample's uniform numbers


class LatentUpdates(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step, whoever reads it.

    All samples of an update have latents of one shape; the shapes take turns by their numbers of samples.

    Args:
        train: latents to train on.
        reading: scaling_factor, by which the latents have variance one; tokenizer; and empty, the embeddings of the
            empty caption (L, D), or None where texts are to be tokens.
        caption_dropout: share of the captions that are replaced by the empty one.
        seed: of the run.
        micro_batch_size: samples of a micro-batch.
        order: global_batch_size, rank and num_processes.
    """

    def __init__(
        self,
        train: Latents,
        reading: dict[str, Any],
        *,
        caption_dropout: float,
        seed: int,
        micro_batch_size: int,
        order: dict[str, int],
    ) -> None:
        self._train, self._reading, self._caption_dropout, self._seed = train, reading, caption_dropout, seed
        self._micro_batch_size, self._order = micro_batch_size, order
        self._buckets = [rows for _, rows in train.buckets()]

    def __getitem__(self, step: int) -> list[dict[str, np.ndarray]]:
        """Micro-batches: latents and noise (B, C, h, w), uniform (B,) in [0, 1), text (B, L) or (B, L, D), text_mask.

        The mask (B, L) is false where a caption is padding.
        """
        shares, seed = [float(len(rows)) for rows in self._buckets], derive_seed(self._seed, "buckets")
        [bucket], [number] = (values.tolist() for values in mixture_sources(np.array([step]), shares, seed))
        positions, rows = positions_of_update(number, **self._order), self._buckets[bucket]
        drawn = samples_at(positions, [len(rows)], [1.0], derive_seed(self._seed, "bucket", bucket))
        _, epochs, places = np.transpose(drawn)
        indices = rows[places]
        draws = uniform_numbers(derive_seed(self._seed, "sample"), epochs, indices, count=2)
        mirrored = (draws[:, _MIRRORED] < 0.5) & self._train.has_mirrored
        pairs = zip(indices.tolist(), mirrored.tolist(), strict=True)
        samples = [self._train.read(index, mirrored=flag) for index, flag in pairs]
        mean, std = (np.stack([sample[name] for sample in samples]).astype(np.float32) for name in ("mean", "std"))
        numbers = normal_numbers(derive_seed(self._seed, "noise"), epochs, indices, count=2 * mean[0].size)
        of_posterior, noise = numbers.astype(np.float32).reshape(-1, 2, *mean[0].shape).swapaxes(0, 1)
        update = {
            "latents": (mean + std * of_posterior) * np.float32(self._reading["scaling_factor"]),
            "noise": noise,
            "uniform": self._spread_numbers(step, positions),
            **_texts(samples, self._reading, draws[:, _DROPPED] < self._caption_dropout),
        }
        starts = range(0, len(samples), self._micro_batch_size)
        cuts = [slice(start, start + self._micro_batch_size) for start in starts]
        return [{name: values[cut] for name, values in update.items()} for cut in cuts]

    def _spread_numbers(self, step: int, positions: np.ndarray) -> np.ndarray:
        """Evenly spread over an update from a random start, so that losses vary less (Kingma et al. 2021, I.1)."""
        size = self._order["global_batch_size"]
        [[start]] = uniform_numbers(derive_seed(self._seed, "times"), np.array([step]), count=1)
        return ((start + positions % size) / size % 1).astype(np.float32)


def open_updates(
    accelerator: Any,
    control: RunControl,
    train: Latents,
    reading: dict[str, Any],
    *,
    caption_dropout: float,
    micro_batch_size: int,
    step: int,
) -> Iterator[list[dict[str, Tensor]]]:
    """Updates from `step` on: each this process's micro-batches, see `LatentUpdates`.

    Args:
        accelerator: knows the processes.
        control: of the run.
        train: latents to train on.
        reading: see `LatentUpdates`.
        caption_dropout: share of the captions that are replaced by the empty one.
        micro_batch_size: samples of a micro-batch.
        step: number of the first update, from 0.
    """
    order = {"global_batch_size": control.global_batch_size, **rank_of(accelerator)}
    draws: dict[str, Any] = {"caption_dropout": caption_dropout, "seed": control.seed}
    updates = LatentUpdates(train, reading, **draws, micro_batch_size=micro_batch_size, order=order)
    return load_updates(updates, range(step, control.max_steps), control.num_workers, accelerator.device)


class FixedSamples(Dataset):
    """Item `number` is some samples in one band of times with noise, the same whenever and whoever evaluates.

    Every sample is there once in each band; item `number` is of the band `number % num_bands`.

    Args:
        latents: of a split.
        size: samples that are taken, evenly spread; 0, or where there are fewer, all.
        num_bands: equal parts of the times from 0 to 1.
        reading: see `LatentUpdates`.
        batch_size: samples of an item, at most.

    Attributes:
        num_bands: as given.
    """

    def __init__(
        self, latents: Latents, size: int, num_bands: int, reading: dict[str, Any], *, batch_size: int
    ) -> None:
        self._latents, self.num_bands, self._reading = latents, num_bands, reading
        chosen = np.array(spread(len(latents), size or len(latents)))
        buckets = [np.intersect1d(rows, chosen) for _, rows in latents.buckets()]
        self._parts = [
            rows[first : first + batch_size] for rows in buckets for first in range(0, len(rows), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._parts) * self.num_bands

    def __getitem__(self, number: int) -> dict[str, np.ndarray]:
        """As a micro-batch of `LatentUpdates`; beyond the last item the first ones come again."""
        part, band = divmod(number % len(self), self.num_bands)
        indices = self._parts[part]
        bands = np.full(len(indices), band)
        samples = [self._latents.read(index, mirrored=False) for index in indices.tolist()]
        latents = np.stack([sample["mean"] for sample in samples]).astype(np.float32)
        noise = normal_numbers(derive_seed("evaluation noise"), indices, bands, count=latents[0].size)
        times = bands + uniform_numbers(derive_seed("evaluation times"), indices, bands, count=1)[:, 0]
        return {
            "latents": latents * np.float32(self._reading["scaling_factor"]),
            "noise": noise.astype(np.float32).reshape(latents.shape),
            "uniform": (times / self.num_bands).astype(np.float32),
            **_texts(samples, self._reading, np.zeros(len(samples), dtype=bool)),
        }


def _texts(samples: Sequence[dict[str, Any]], reading: dict[str, Any], dropped: np.ndarray) -> dict[str, np.ndarray]:
    """Tokens (N, L) of the captions, or their embeddings (N, L, D), as `text`, and where they are no padding (N, L)."""
    pairs = list(zip(samples, dropped, strict=True))
    ids, _ = token_ids(reading["tokenizer"], ["" if drop else sample["caption"] for sample, drop in pairs])
    masks = text_masks(reading["tokenizer"], ids)
    if reading["empty"] is None:
        return {"text": ids, "text_mask": masks}
    embeddings = np.stack([reading["empty"] if drop else sample["text"] for sample, drop in pairs])
    return {"text": embeddings.astype(np.float32), "text_mask": masks}
