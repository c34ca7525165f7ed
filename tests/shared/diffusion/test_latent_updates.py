"""Updates of latents: a function of seed and step, each sample once an epoch, with noise of its own."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from accelerate import Accelerator

from shared.diffusion import latent_cache
from shared.diffusion.captions import token_ids
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from shared.diffusion.latent_cache import Latents
from shared.diffusion.latent_updates import FixedSamples, LatentUpdates, open_updates
from shared.fields import RunControl

SHAPES = [(2, 4, 4), (2, 4, 6), (2, 6, 4)]
CAPTIONS = [f"image {number}" for number in range(48)]


@pytest.fixture(scope="module")
def cached(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 rows of three shapes in turn, with embeddings of captions; a row's means are its number."""
    folder, draw = tmp_path_factory.mktemp("cached"), np.random.default_rng(0)
    identity: dict[str, Any] = {"latent_channels": 2, "text_shape": [3, 5], "data": {"train": ""}}
    identity |= {"mirrored": True, "sampled": False}
    latent_cache.begin_cache(folder, identity)
    [shard] = latent_cache.plan_shards({"train": 48}, 48)
    rows = []
    for number, caption in enumerate(CAPTIONS):
        shape = SHAPES[number % 3]
        arrays = {"mean": np.full(shape, number), "std": np.full(shape, 0.5), "text": draw.normal(size=(3, 5))}
        arrays |= {"mirrored_mean": np.full(shape, -number - 1), "mirrored_std": np.full(shape, 0.25)}
        rows.append({"index": number, "caption": caption, "height": shape[1], "width": shape[2], **arrays})
    latent_cache.write_shard(folder, shard, rows, list(arrays))
    latent_cache.finish_cache(folder, identity, [shard], 0.0)
    return folder


@pytest.fixture(scope="module")
def train(cached: Path) -> Latents:
    return Latents(cached, latent_cache.read_manifest(cached, "data"), "train")


@pytest.fixture(scope="module")
def reading() -> dict[str, Any]:
    tokenizer = train_clip_tokenizer(CAPTIONS, 600, 8)
    return {"scaling_factor": 2.0, "tokenizer": tokenizer, "empty": None}


def updates_of(train: Latents, reading: dict[str, Any], **options: Any) -> LatentUpdates:
    order = {"global_batch_size": 8, "rank": options.pop("rank", 0), "num_processes": options.pop("processes", 1)}
    usual = {"caption_dropout": 0.25, "seed": 0, "micro_batch_size": 4}
    return LatentUpdates(train, reading, **{**usual, **options}, order=order)


def rows_of(batches: list[dict[str, np.ndarray]]) -> list[bytes]:
    return [b"".join(values[row].tobytes() for values in batch.values()) for batch in batches for row in range(4)]


def test_two_processes_see_what_one_sees(train: Latents, reading: dict[str, Any]) -> None:
    for step in (0, 3, 17, 500):
        whole = rows_of(updates_of(train, reading)[step])
        parts = [rows_of(updates_of(train, reading, rank=rank, processes=2)[step]) for rank in (0, 1)]
        assert len(set(whole)) == 8
        assert whole == parts[0] + parts[1]
        assert not set(whole) & set(rows_of(updates_of(train, reading, seed=1)[step]))


def test_a_run_gets_its_updates_from_any_step_on(train: Latents, reading: dict[str, Any]) -> None:
    control = RunControl(global_batch_size=8, max_steps=5, max_grad_norm=0.0, seed=3, num_workers=1)
    options: dict[str, Any] = {"caption_dropout": 0.25, "micro_batch_size": 4}
    found = list(open_updates(Accelerator(cpu=True), control, train, reading, **options, step=2))
    expected = [updates_of(train, reading, seed=3)[step] for step in (2, 3, 4)]
    plain = [[{name: values.numpy() for name, values in batch.items()} for batch in batches] for batches in found]
    assert [rows_of(batches) for batches in plain] == [rows_of(batches) for batches in expected]


def test_the_squarest_shape_is_one_that_occurs(train: Latents) -> None:
    assert train.squarest_shape() == (2, 4, 4)
    assert train.subset(np.array([1, 2, 4])).squarest_shape() in ((2, 4, 6), (2, 6, 4))
    assert train.subset(np.array([2])).squarest_shape() == (2, 6, 4)


def test_updates_are_of_one_shape_and_shapes_come_by_their_numbers(train: Latents, reading: dict[str, Any]) -> None:
    updates, seen = updates_of(train, reading), []
    for step in range(300):
        shapes = {batch["latents"].shape[1:] for batch in updates[step]}
        assert len(shapes) == 1
        seen.append(shapes.pop())
    counts = [seen.count(shape) for shape in SHAPES]
    assert sum(counts) == 300
    assert min(counts) > 70


def test_an_epoch_has_every_sample_once_with_other_noise_each_time(train: Latents, reading: dict[str, Any]) -> None:
    """Of one shape, told by the deviation of the posterior alone: the mean of a row is its number."""
    square = train.subset(np.arange(0, 48, 3))
    updates = updates_of(square, reading, caption_dropout=0.0)
    epochs = []
    for epoch in range(3):
        batches = [batch for step in (2 * epoch, 2 * epoch + 1) for batch in updates[step]]
        texts = [text.tobytes() for batch in batches for text in batch["text"]]
        assert len(set(texts)) == 16
        epochs.append(
            {
                text: batch["noise"][row]
                for batch in batches
                for row, text in enumerate(batch["text"])
                for text in [text.tobytes()]
            }
        )
    for text, noise in epochs[0].items():
        assert not np.allclose(noise, epochs[1][text])
        assert not np.allclose(epochs[1][text], epochs[2][text])


def test_latents_are_drawn_from_the_posterior_and_scaled(train: Latents, reading: dict[str, Any]) -> None:
    """Of mirror images half of the time; noise is standard normal and has nothing to do with the draw."""
    updates, deviations, noises, mirrored = updates_of(train, reading), [], [], []
    for step in range(400):
        for batch in updates[step]:
            unscaled = batch["latents"] / 2
            number = np.round(unscaled.mean((1, 2, 3)))
            is_mirrored = unscaled.mean((1, 2, 3)) < -0.5
            mirrored += is_mirrored.tolist()
            scale = np.where(is_mirrored, 0.25, 0.5)[:, None, None, None]
            deviations.append(((unscaled - number[:, None, None, None]) / scale).ravel())
            noises.append(batch["noise"].ravel())
    drawn, noise = np.concatenate(deviations), np.concatenate(noises)
    assert 0.45 < np.mean(mirrored) < 0.55
    for values in (drawn, noise):
        assert abs(values.mean()) < 0.02
        assert values.std() == pytest.approx(1, abs=0.02)
    assert abs(np.corrcoef(drawn, noise)[0, 1]) < 0.02


def test_times_are_spread_over_an_update(train: Latents, reading: dict[str, Any]) -> None:
    updates, everywhere = updates_of(train, reading), []
    for step in range(50):
        times = np.concatenate([batch["uniform"] for batch in updates[step]])
        assert sorted((times * 8).astype(int).tolist()) == list(range(8))
        everywhere += times.tolist()
    assert len({round(time, 4) for time in everywhere}) > 350
    assert 0 <= min(everywhere) < 0.01 < 0.99 < max(everywhere) < 1


def test_some_captions_are_empty(train: Latents, reading: dict[str, Any]) -> None:
    empty = token_ids(reading["tokenizer"], [""])[0][0]
    texts = np.concatenate([batch["text"] for step in range(200) for batch in updates_of(train, reading)[step]])
    assert (texts == empty).all(1).mean() == pytest.approx(0.25, abs=0.03)
    kept = np.concatenate(
        [b["text"] for step in range(50) for b in updates_of(train, reading, caption_dropout=0.0)[step]]
    )
    assert not (kept == empty).all(1).any()


def test_embeddings_come_from_the_cache(train: Latents, reading: dict[str, Any]) -> None:
    empty = np.full((3, 5), 7.0)
    batches = [b for step in range(60) for b in updates_of(train, {**reading, "empty": empty})[step]]
    texts = np.concatenate([batch["text"] for batch in batches])
    assert texts.dtype == np.float32
    known = {train.read(row, mirrored=False)["text"].astype(np.float32).tobytes() for row in range(48)}
    found = {text.tobytes() for text in texts}
    assert found == known | {empty.astype(np.float32).tobytes()}


def test_masks_belong_to_the_captions_that_are_seen(train: Latents, reading: dict[str, Any]) -> None:
    """Also to empty ones, and where the text is embeddings."""
    batches = [b for step in range(20) for b in updates_of(train, reading)[step]]
    embedded = [b for step in range(20) for b in updates_of(train, {**reading, "empty": np.zeros((3, 5))})[step]]
    samples = FixedSamples(train, 24, 4, reading, batch_size=3)
    end, lengths = reading["tokenizer"].eos_token_id, set()
    for batch in [*batches, *(samples[number] for number in range(len(samples)))]:
        for text, mask in zip(batch["text"].tolist(), batch["text_mask"].tolist(), strict=True):
            length = text.index(end) + 1
            assert mask == [place < length for place in range(8)]
            lengths.add(length)
    assert min(lengths) == 2 < max(lengths)
    for one, other in zip(batches, embedded, strict=True):
        assert (one["text_mask"] == other["text_mask"]).all()


def test_evaluation_has_every_sample_once_in_each_band(train: Latents, reading: dict[str, Any]) -> None:
    samples = FixedSamples(train, 24, 4, reading, batch_size=3)
    seen: list[tuple[int, float]] = []
    for number in range(len(samples)):
        batch = samples[number]
        assert ((batch["uniform"] * 4).astype(int) == number % 4).all()
        rows = np.round(batch["latents"].mean((1, 2, 3)) / 2).astype(int).tolist()
        seen += zip(rows, batch["uniform"].tolist(), strict=True)
    assert len({row for row, _ in seen}) == 24
    assert len(seen) == 24 * 4
    again = samples[len(samples) + 2]
    assert all((values == samples[2][name]).all() for name, values in again.items())
    assert len(FixedSamples(train, 1000, 4, reading, batch_size=100)) == 3 * 4
