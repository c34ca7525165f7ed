"""The flow-matching recipe: its objective, routing and evaluation against other computations, resume, its folder."""

import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin
from hypothesis import given
from hypothesis import strategies as st

from shared import command_line as cli
from shared.data.randomness import derive_seed, normal_numbers
from shared.diffusion import latent_cache, latent_encoding
from shared.diffusion.captions import CleanedCaptions, encode_captions, load_text_encoder
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from shared.diffusion.latent_updates import FixedSamples
from tests.conftest import ROOT
from tests.recipes.conftest import cache_flags
from tests.recipes.runs import (
    assert_same,
    assert_same_weights,
    metrics_of,
    push_and_load,
    results_of,
    run,
    run_card,
    state_at,
    weights,
)

TINY: dict[str, Any] = {
    "patch_size": 2,
    "hidden_size": 16,
    "mlp_ratio": 2.0,
    "num_layers": 3,
    "num_heads": 2,
    "routed_layers": "2,2",
    "vocab_size": 600,
    "caption_length": 8,
    "text_hidden_size": 16,
    "text_num_layers": 1,
    "text_num_heads": 2,
    "global_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "ema_decay": 0.5,
    "log_every": 1,
    "num_workers": 0,
    "sample_steps": 2,
    "guidance_scale": 2.0,
}


def config_of(recipe: ModuleType, latents: Path, tiny_vae: Path, run_dir: Path, **fields: Any) -> Any:
    paths = {"data": str(latents), "vae": str(tiny_vae), "output_dir": str(run_dir)}
    return recipe.Config(**{**TINY, **paths, **fields})


@pytest.fixture(scope="module")
def reference(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run over more than two epochs that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    fields = {"save_every": 1, "keep_checkpoints": 100}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, run_dir, **fields))
    return run_dir


def batch_of(recipe: ModuleType, cfg: Any, number: int) -> dict[str, torch.Tensor]:
    """Random samples with noise, captions of 3 to 8 tokens and, if some are routed, kept tokens."""
    draw = torch.Generator().manual_seed(0)
    batch = {
        "latents": torch.randn(number, 2, 8, 8, generator=draw),
        "noise": torch.randn(number, 2, 8, 8, generator=draw),
        "uniform": torch.arange(number) / number,
        "text": torch.randint(300, (number, 8), generator=draw),
        "text_mask": torch.arange(8) < torch.randint(3, 9, (number, 1), generator=draw),
    }
    return recipe.choose_kept(cfg, batch)


def new_model(recipe: ModuleType, cfg: Any) -> Any:
    tokenizer = train_clip_tokenizer(["train image 1"], cfg.vocab_size, cfg.caption_length)
    model = recipe.build_model(cfg, tokenizer, None, 2)
    with torch.no_grad():  # in a new model the blocks' gates are shut
        for name, weight in model.named_parameters():
            if "modulation" in name:
                weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


# -- objective ---------------------------------------------------------------------------------------------------------


@given(mean=st.floats(-2, 2), std=st.floats(0.1, 2), shift=st.floats(0.2, 5))
def test_trained_times_have_the_papers_density(
    pretrain_transformer: ModuleType, mean: float, std: float, shift: float
) -> None:
    """Esser et al. 2024, equation 19 for evenly spread numbers; the shift is what the library's sampler does."""
    spread = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    times = pretrain_transformer.trained_times(spread, mean, std, 1.0)
    logits = torch.log(times / (1 - times))
    standard = torch.distributions.Normal(0.0, 1.0)
    torch.testing.assert_close(standard.cdf((logits - mean) / std), spread, rtol=1e-6, atol=1e-9)
    shifted = pretrain_transformer.trained_times(spread, mean, std, shift)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=times.flip(0).tolist())
    torch.testing.assert_close(scheduler.sigmas[:-1].flip(0).double(), shifted, rtol=1e-4, atol=1e-6)


def test_trained_times_are_numbers_at_the_ends(pretrain_transformer: ModuleType) -> None:
    times = pretrain_transformer.trained_times(torch.tensor([0.0, 1e-45, 1 - 2**-24, 1.0]), 0.0, 1.0, 3.0)
    assert ((times >= 0) & (times <= 1)).all()


def test_noise_and_target_are_a_line(pretrain_transformer: ModuleType) -> None:
    """Noisy latents against diffusers' scheduler; following the target from there leads to the latents."""
    cfg = pretrain_transformer.Config(**TINY)
    batch, seen = batch_of(pretrain_transformer, cfg, 4), {}

    class Recorder(torch.nn.Module):
        def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, **others: Any) -> torch.Tensor:
            seen.update({"noisy": latents, "times": timesteps, **others})
            return torch.zeros_like(latents)

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0)
    times = scheduler.sigmas[[900, 500, 250, 0]]
    errors = pretrain_transformer.errors(Recorder(), batch, times)
    expected = scheduler.scale_noise(batch["latents"], times * 1000, batch["noise"])
    torch.testing.assert_close(seen["noisy"], expected)
    torch.testing.assert_close(errors, (batch["noise"] - batch["latents"]).square().mean((1, 2, 3)))
    share = times[:, None, None, None]
    torch.testing.assert_close(seen["noisy"] - share * (batch["noise"] - batch["latents"]), batch["latents"])
    assert torch.equal(seen["times"], times)
    assert seen.keys() == {"noisy", "times", "text", "text_mask", "kept"}


# -- model -------------------------------------------------------------------------------------------------------------


def test_without_routing_the_model_is_the_librarys(pretrain_transformer: ModuleType) -> None:
    """To the bit; and routing that keeps all tokens, in whatever order, changes no more than rounding."""
    cfg = pretrain_transformer.Config(**{**TINY, "routed_fraction": 0.0})
    model, batch = new_model(pretrain_transformer, cfg), batch_of(pretrain_transformer, cfg, 4)
    assert "kept" not in batch
    library = diffusers.PRXTransformer2DModel.from_config(model.transformer.config)
    library.load_state_dict(model.transformer.state_dict())
    times, texts = batch["uniform"], {name: batch[name] for name in ("text", "text_mask")}
    mask = texts["text_mask"].long()
    states = model.text_encoder(input_ids=batch["text"], attention_mask=mask).last_hidden_state  # as the pipeline
    expected = library(batch["latents"], times, states, texts["text_mask"]).sample
    found = model(batch["latents"], times, **texts)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # padding aside, which the mask leaves out
    plain = model.text_encoder(input_ids=batch["text"]).last_hidden_state
    assert torch.equal(found, library(batch["latents"], times, plain, texts["text_mask"]).sample)
    kept = torch.stack([torch.randperm(16) for _ in range(4)])
    torch.testing.assert_close(model(batch["latents"], times, **texts, kept=kept), expected, rtol=1e-5, atol=1e-6)


def test_routed_tokens_skip_the_blocks_and_nothing_else(pretrain_transformer: ModuleType) -> None:
    """Each block is seen to get the kept tokens with their places, and the others to pass by it untouched."""
    cfg = pretrain_transformer.Config(**{**TINY, "num_layers": 4, "routed_layers": "2,3", "routed_fraction": 0.25})
    model, batch = new_model(pretrain_transformer, cfg), batch_of(pretrain_transformer, cfg, 3)
    blocks, seen = model.transformer.blocks, []
    for block in blocks:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], inputs[3], output)))
    pretrain_transformer.errors(model, batch, batch["uniform"])
    kept = batch["kept"]
    assert kept.shape == (3, 12)
    assert all(len(set(row)) == 12 and max(row) < 16 for row in kept.tolist())
    assert len({tuple(row) for row in kept.tolist()}) == 3
    (_, places, first), (second_in, second_places, _), (third_in, _, third), (last_in, last_places, _) = seen
    for row in range(3):
        assert torch.equal(second_in[row], first[row, kept[row]])
        assert torch.equal(second_places[row], places[row, :, kept[row]])
        skipped = sorted(set(range(16)) - set(kept[row].tolist()))
        assert torch.equal(last_in[row, skipped], first[row, skipped])
        assert torch.equal(last_in[row, kept[row]], third[row])
    assert torch.equal(third_in, seen[1][2])
    assert torch.equal(last_places, places)


def test_kept_tokens_are_a_function_of_seed_and_sample(pretrain_transformer: ModuleType) -> None:
    """Whatever batch a sample is in; all places are kept about as often, and noise does not decide it."""
    cfg = pretrain_transformer.Config(**TINY)
    whole = batch_of(pretrain_transformer, cfg, 8)
    part = {name: rows[4:] for name, rows in whole.items() if name != "kept"}
    assert torch.equal(pretrain_transformer.choose_kept(cfg, part)["kept"], whole["kept"][4:])
    other = pretrain_transformer.choose_kept(pretrain_transformer.Config(**TINY, seed=1), part)
    assert not torch.equal(other["kept"], whole["kept"][4:])
    many = {"latents": torch.zeros(4096, 2, 8, 8), "uniform": torch.arange(4096) / 4096}
    counts = pretrain_transformer.choose_kept(cfg, many)["kept"].flatten().bincount(minlength=16)
    assert (counts / 4096 - 0.5).abs().max() < 0.05


@pytest.mark.parametrize("fraction", [0.0, 0.5])
def test_gradients_reach_all_weights(pretrain_transformer: ModuleType, fraction: float) -> None:
    cfg = pretrain_transformer.Config(**{**TINY, "routed_fraction": fraction})
    model, batch = new_model(pretrain_transformer, cfg), batch_of(pretrain_transformer, cfg, 4)
    pretrain_transformer.errors(model, batch, batch["uniform"]).sum().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not missing
    model.enable_gradient_checkpointing()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    pretrain_transformer.errors(model, batch, batch["uniform"]).sum().backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_caption_matters_and_its_padding_does_not(pretrain_transformer: ModuleType) -> None:
    cfg = pretrain_transformer.Config(**TINY)
    model, batch = new_model(pretrain_transformer, cfg), batch_of(pretrain_transformer, cfg, 4)
    inputs = {"latents": batch["latents"], "timesteps": batch["uniform"], "text_mask": batch["text_mask"]}
    one, padded = (model(**inputs, text=text) for text in (batch["text"], batch["text"] * batch["text_mask"]))
    torch.testing.assert_close(one, padded, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one, model(**inputs, text=batch["text"].flip(0)), atol=1e-3)


def prepared(recipe: ModuleType, cfg: Any, accumulation: int, dtype: torch.dtype) -> Any:
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = new_model(recipe, cfg).to(dtype)
    return accelerator, *accelerator.prepare(model, recipe.build_optimizer(cfg, model))


@pytest.mark.slow
def test_one_batch_is_overfitted(pretrain_transformer: ModuleType) -> None:
    """With its noise, times and kept tokens, from the error of an empty prediction to a tenth of it."""
    cfg = pretrain_transformer.Config(**{**TINY, "hidden_size": 32, "mlp_ratio": 4.0})
    accelerator, model, optimizer = prepared(pretrain_transformer, cfg, 1, torch.float32)
    batch = batch_of(pretrain_transformer, cfg, 8)
    update = (cfg, accelerator, model, optimizer, [batch])
    losses = [float(pretrain_transformer.train_update(*update)[0]) for _ in range(300)]
    assert losses[-1] < 0.2 < 1.5 < losses[0]


def test_accumulation_is_exact(pretrain_transformer: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 a batch of 8 is two of 4 is 8 of 1."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    cfg = pretrain_transformer.Config(**{**TINY, "max_grad_norm": 0.1})
    results = []
    for size in (8, 4, 1):
        accelerator, model, optimizer = prepared(pretrain_transformer, cfg, 8 // size, torch.float64)
        batch = batch_of(pretrain_transformer, cfg, 8)
        batch = {name: rows.double() if rows.is_floating_point() else rows for name, rows in batch.items()}
        batches = [{name: rows[start : start + size] for name, rows in batch.items()} for start in range(0, 8, size)]
        update = (cfg, accelerator, model, optimizer, batches)
        norms = [pretrain_transformer.train_update(*update)[1] for _ in range(2)]
        results.append({"norm": norms[-1], **model.state_dict()})
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value.double(), results[0][name].double(), rtol=1e-9, atol=1e-9)


def test_non_finite_gradient_changes_nothing(pretrain_transformer: ModuleType) -> None:
    cfg = pretrain_transformer.Config(**TINY)
    accelerator, model, optimizer = prepared(pretrain_transformer, cfg, 1, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {**batch_of(pretrain_transformer, cfg, 8), "noise": torch.full((8, 2, 8, 8), float("nan"))}
    _, norm = pretrain_transformer.train_update(cfg, accelerator, model, optimizer, [batch])
    assert not math.isfinite(norm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- evaluation and images -------------------------------------------------------------------------------------------


def test_evaluation_equals_one_sample_at_a_time(
    pretrain_transformer: ModuleType, latents: Path, reference: Path
) -> None:
    """With the exported pipeline's own networks and text, and diffusers' noise; no token is routed."""
    pipeline = diffusers.PRXPipeline.from_pretrained(reference)
    held_out = latent_cache.Latents(latents, latent_cache.read_manifest(latents, "data"), "test")
    captions, bands = held_out.captions(), pretrain_transformer.NUM_BANDS
    reading = {"scaling_factor": pipeline.vae.config.scaling_factor, "tokenizer": pipeline.tokenizer, "empty": None}
    samples = FixedSamples(held_out, 200, bands, reading, batch_size=1)
    assert len(samples) == 7 * bands
    errors: dict[int, list[float]] = {band: [] for band in range(bands)}
    for number in range(len(samples)):
        item = {name: torch.from_numpy(value) for name, value in samples[number].items()}
        states, mask, _, _ = pipeline.encode_prompt(captions[number // bands], do_classifier_free_guidance=False)
        times = item["uniform"]
        noisy = times * item["noise"] + (1 - times) * item["latents"]
        with torch.no_grad():
            predicted = pipeline.transformer(noisy, times, states, mask).sample
        wanted = item["noise"] - item["latents"]
        errors[int(times * bands)].append((predicted - wanted).square().mean().item())
    last = metrics_of(reference)[-1]
    for band, values in errors.items():
        assert len(values) == 7
        assert last[f"eval/loss_test_band_{band}"] == pytest.approx(np.mean(values), rel=1e-4)
    assert last["eval/loss_test"] == pytest.approx(np.mean(list(errors.values())), rel=1e-4)
    assert last["eval/loss"] == last["eval/loss_test"]
    assert last["eval/loss_train"] > 0


def images_of_both(
    recipe: ModuleType, run_dir: Path, captions: list[str], *, is_frozen: bool, **options: Any
) -> tuple[np.ndarray, np.ndarray]:
    """From the same noise, by the recipe's own loop and by PRXPipeline, which can guide one prompt at a time alone."""
    pipeline = diffusers.PRXPipeline.from_pretrained(run_dir)
    pipeline.set_progress_bar_config(disable=True)
    cfg = recipe.Config(**{**TINY, "sample_steps": 5, "shift": pipeline.scheduler.config.shift})
    frozen = pipeline.text_encoder.eval() if is_frozen else None
    reader = pipeline.tokenizer if is_frozen else CleanedCaptions(pipeline.tokenizer)
    model = recipe.Denoiser(pipeline.transformer, None if is_frozen else pipeline.text_encoder, range(0))
    texts, empty = (encode_captions(some, reader, frozen) for some in (captions, [""]))
    made = recipe.make_images(cfg, Accelerator(cpu=True), model, pipeline.vae, texts, empty, (2, 8, 8))
    noise = normal_numbers(derive_seed(0, "pictures"), np.arange(len(captions)), count=2 * 8 * 8)
    start = torch.from_numpy(noise.astype(np.float32)).reshape(-1, 1, 2, 8, 8)
    options |= {"num_inference_steps": 5, "guidance_scale": 2.0, "use_resolution_binning": False, "output_type": "np"}
    theirs = [
        pipeline(caption, latents=latents, **options).images[0]
        for caption, latents in zip(captions, start, strict=True)
    ]
    return np.stack(made) / 255, np.stack(theirs)


def test_images_are_the_pipelines(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    """With a caption that the pipeline cleans, and steps that are shifted."""
    fields = {"shift": 3.0, "max_steps": 30}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", **fields))
    captions = ["train image 1", "Test (image) #2 — https://example.com/test"]
    made, theirs = images_of_both(pretrain_transformer, tmp_path / "run", captions, is_frozen=False)
    assert np.abs(made - theirs).max() < 0.01
    assert np.abs(theirs[0] - theirs[1]).max() > 0.02


@pytest.mark.slow
def test_a_frozen_text_encoder_equals_its_cached_embeddings(
    pretrain_transformer: ModuleType,
    cache_latents: ModuleType,
    captioned: Path,
    latents: Path,
    tiny_vae: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    """The pipeline has the encoder as it was, and makes the recipe's images of captions that it does not clean.

    Where the cache has no embeddings, the encoder makes them in training.
    """
    flags = {**cache_flags(captioned, tiny_vae, tmp_path / "latents"), "text_encoder": str(tiny_text_encoder)}
    run(cache_latents, cache_latents.Config(**flags))
    fields = {"text_encoder": str(tiny_text_encoder), "routed_fraction": 0.0}
    cfg = config_of(pretrain_transformer, tmp_path / "latents", tiny_vae, tmp_path / "run", **fields)
    run(pretrain_transformer, cfg)
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "along", **fields))
    entries, expected = (metrics_of(tmp_path / name) for name in ("along", "run"))
    for name in ("train/loss", "train/grad_norm"):  # cached embeddings are float16
        assert [entry[name] for entry in entries] == pytest.approx([entry[name] for entry in expected], rel=1e-3)
    assert entries[-1]["eval/loss_test"] == pytest.approx(expected[-1]["eval/loss_test"], rel=1e-3)
    pipeline = diffusers.PRXPipeline.from_pretrained(tmp_path / "run")
    _, encoder = load_text_encoder(str(tiny_text_encoder), "text_encoder")
    for name, value in encoder.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[name], value)
    captions, options = ["train image 1", "Test (cat)"], {"skip_text_cleaning": True}
    made, theirs = images_of_both(pretrain_transformer, tmp_path / "run", captions, is_frozen=True, **options)
    assert np.abs(made - theirs).max() < 0.01
    cache = latent_cache.Latents(tmp_path / "latents", latent_cache.read_manifest(tmp_path / "latents", "data"), "test")
    reading = {"scaling_factor": 1.0, "tokenizer": pipeline.tokenizer, "empty": np.zeros((6, 16), dtype=np.float32)}
    item = FixedSamples(cache, 200, 1, reading, batch_size=7)[0]
    expected = encode_captions(cache.captions(), pipeline.tokenizer, encoder)
    torch.testing.assert_close(torch.from_numpy(item["text"]), expected["text"], rtol=1e-2, atol=1e-2)  # of float16
    assert torch.equal(torch.from_numpy(item["text_mask"]), expected["text_mask"])


# -- the run -----------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_what_the_ecosystem_reads(reference: Path) -> None:
    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    losses = [entry["train/loss"] for entry in entries]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert (reference / "samples" / "step_00000012.png").stat().st_size > 0
    for name in ("README.md", "config.yaml", "run.json", "recipe.py", "figures/loss.png", "figures/images.png"):
        assert (reference / name).stat().st_size > 0, name
    index = json.loads((reference / "model_index.json").read_text())
    assert index["transformer"] == ["diffusers", "PRXTransformer2DModel"]
    assert index["default_sample_size"] == 16
    card = (reference / "README.md").read_text()
    assert f"{entries[-1]['eval/loss']:.4f}" in card
    assert "library_name: diffusers" in card
    assert "(figures/images.png)" in card
    assert "test image 0" in card


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_the_average_is_what_is_saved(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", ema_decay=0.0))
    losses = [[entry["train/loss"] for entry in metrics_of(folder)] for folder in (reference, tmp_path / "run")]
    assert losses[0] == losses[1]
    name = "transformer.img_in.weight"
    assert not torch.equal(weights(reference)[name], weights(tmp_path / "run")[name])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_resuming_is_exact_to_the_bit(
    pretrain_transformer: ModuleType,
    latents: Path,
    tiny_vae: Path,
    reference: Path,
    tmp_path: Path,
    stop: int,
    workers: int,
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    fields = {"save_every": 1, "keep_checkpoints": 100, "num_workers": workers}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, run_dir, **fields))
    assert results_of(run_dir) == results_of(reference)
    assert_same_weights(run_dir, reference)


def test_muon_has_the_matrices_of_layers_and_resumes_to_the_bit(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    cfg = pretrain_transformer.Config(**TINY, optimizer="muon")
    model = new_model(pretrain_transformer, cfg)
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = pretrain_transformer.build_optimizer(cfg, model).param_groups
    optimized = [names[id(weight)] for group in groups for weight in group["params"]]
    assert sorted(optimized) == sorted(names.values())
    parts = {
        names[id(weight)]: group["num_parts"] for group in groups if group["use_muon"] for weight in group["params"]
    }
    block = {"img_qkv_proj": 3, "txt_kv_proj": 2, "to_out.0": 1}
    expected = {f"transformer.blocks.0.attention.{name}.weight": number for name, number in block.items()}
    expected |= {f"transformer.blocks.0.{name}_proj.weight": 1 for name in ("gate", "up", "down")}
    assert {name: number for name, number in parts.items() if ".blocks.0." in name} == expected
    assert sum("text_encoder" in name for name in parts) == 6  # of its one layer; neither tables nor positions
    assert len(parts) == 6 * cfg.num_layers + 6

    fields: dict[str, Any] = {"optimizer": "muon", "max_steps": 4, "save_every": 1, "keep_checkpoints": 100}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "whole", **fields))
    run_dir = state_at(tmp_path / "whole", 2, tmp_path / "run")
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, run_dir, **fields))
    assert results_of(run_dir) == results_of(tmp_path / "whole")
    assert_same_weights(run_dir, tmp_path / "whole")


def test_training_goes_on_from_an_exported_pipeline(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    fields = {"init": str(reference), "max_steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", **fields))
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, weights(reference)[name], rtol=0, atol=1e-6)


def test_gradient_checkpointing_changes_nothing_but_memory(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    fields = {"gradient_checkpointing": True}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", **fields))
    one, other = (metrics_of(folder)[-1]["eval/loss"] for folder in (tmp_path / "run", reference))
    assert one == pytest.approx(other, rel=1e-4)


def test_latents_of_several_shapes_are_trained_on(
    pretrain_transformer: ModuleType, cache_latents: ModuleType, tiny_vae: Path, tmp_path: Path
) -> None:
    """Wide, tall and square images; the pipeline's own size is the square one."""
    from PIL import Image

    draw = np.random.default_rng(0)
    for split, number in (("train", 30), ("test", 5)):
        (tmp_path / "data" / split).mkdir(parents=True)
        entries = []
        for index in range(number):
            size = ((32, 20), (20, 32), (24, 24))[index % 3]
            pixels = draw.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / split / f"{index}.png")
            entries.append(json.dumps({"file_name": f"{index}.png", "caption": f"image {index}"}))
        (tmp_path / "data" / split / "metadata.jsonl").write_text("\n".join(entries))
    flags = cache_flags(tmp_path / "data", tiny_vae, tmp_path / "latents")
    run(cache_latents, cache_latents.Config(**{**flags, "bucket_multiple": 4}))
    manifest = latent_cache.read_manifest(tmp_path / "latents", "data")
    shapes = [shape for shape, _ in latent_cache.Latents(tmp_path / "latents", manifest, "train").buckets()]
    assert len(shapes) == 3
    cfg = config_of(pretrain_transformer, tmp_path / "latents", tiny_vae, tmp_path / "run", max_steps=6)
    run(pretrain_transformer, cfg)
    assert metrics_of(tmp_path / "run")[-1]["eval/loss"] > 0
    [side] = {height for _, height, width in shapes if height == width}
    assert json.loads((tmp_path / "run" / "model_index.json").read_text())["default_sample_size"] == 2 * side


@pytest.mark.slow
def test_the_embedded_emoji_are_encoded_once(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no cache in outputs/; one that is there and of other images is refused. Captions are the pipeline's."""
    some = {name: images.subset(np.arange(12)) for name, images in latent_encoding.sample_splits().items()}
    monkeypatch.setattr(latent_encoding, "sample_splits", lambda: some)
    forward, texts = pretrain_transformer.forward, set()

    def recorded(model: Any, noisy: torch.Tensor, timesteps: torch.Tensor, batch: dict[str, torch.Tensor]) -> Any:
        texts.update(
            (tuple(row), sum(mask))
            for row, mask in zip(batch["text"].tolist(), batch["text_mask"].tolist(), strict=True)
        )
        return forward(model, noisy, timesteps, batch)

    monkeypatch.setattr(pretrain_transformer, "forward", recorded)
    monkeypatch.chdir(tmp_path)
    fields = {"data": "sample", "cache_dir": str(tmp_path / "cache"), "max_steps": 1, "vocab_size": 514}
    fields["caption_length"] = 77
    seen = []
    for name in ("one", "other"):
        run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / name, **fields))
        [folder] = (tmp_path / "cache").glob("latents-*")
        seen.append((folder / "manifest.json").stat().st_mtime_ns)
    assert seen[0] == seen[1]
    assert_same(tmp_path / "one", tmp_path / "other")
    assert "eval/loss_test_unseen_combination" in metrics_of(tmp_path / "one")[-1]
    pipeline = diffusers.PRXPipeline.from_pretrained(tmp_path / "one")
    captions = [caption for images in some.values() for caption in images.captions]
    assert "Noto emoji, keycap: #" in captions  # of which cleaning leaves less
    ids, masks = pipeline._tokenize_prompts([*captions, ""], torch.device("cpu"))
    assert texts == {(tuple(row), sum(mask)) for row, mask in zip(ids.tolist(), masks.tolist(), strict=True)}
    card = (tmp_path / "one" / "README.md").read_text()
    shown = [caption for images in some.values() for caption in images.captions if caption in card]
    splits = [sum(caption in images.captions for caption in shown) for images in some.values()]
    assert sorted(splits) == [0, 4, 4]
    (tmp_path / "outputs").mkdir()
    shutil.copytree(latents, tmp_path / "outputs" / "latents")
    with pytest.raises(cli.UsageError, match="data: 'outputs/latents': expected a cache as configured, not data "):
        run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "third", **fields))


@pytest.mark.parametrize("goes_on", [False, True])
def test_dry_run_leaves_nothing(
    pretrain_transformer: ModuleType,
    latents: Path,
    tiny_vae: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: Path,
    goes_on: bool,
) -> None:
    fields = {"init": str(reference), "learning_rate": 0.01} if goes_on else {}
    run(
        pretrain_transformer,
        config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", dry_run=True, **fields),
    )
    printed = capsys.readouterr().out
    for row in (
        "first caption: train image 0",
        "parameters",
        "memory: total",
        "one checkpoint",
        "all updates",
        "one evaluation",
    ):
        assert row in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "millions"), [("transformer_300m_256", 300), ("transformer_1b_256", 1000)])
def test_configs_have_the_size_of_their_name(
    pretrain_transformer: ModuleType, tiny_text_encoder: Path, name: str, millions: int
) -> None:
    file = ROOT / "recipes" / "text_to_image" / "configs" / f"{name}.yaml"
    cfg = cli.parse(pretrain_transformer.Config, ["--config", str(file)])
    tokenizer, encoder = load_text_encoder(str(tiny_text_encoder), "text_encoder")
    encoder.config.hidden_size = 768  # CLIP ViT-L/14's
    with pretrain_transformer.dry_run.without_memory():
        model = pretrain_transformer.build_model(cfg, tokenizer, encoder, 4)
    number = sum(parameter.numel() for parameter in model.parameters())
    assert number / 1e6 == pytest.approx(millions, rel=0.2)
    assert f"{number / 1e6:.0f}M" in file.read_text()


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "data": latents, "vae": tiny_vae, "push_every": 6}
    program = """from diffusers import PRXPipeline
pipeline = PRXPipeline.from_pretrained("tester/mine")
print(pipeline("train image 1", num_inference_steps=2, use_resolution_binning=False).images[0].size)"""
    answer, pushed = push_and_load(pretrain_transformer, fields, program, tmp_path)
    assert answer.strip().endswith("(16, 16)")
    assert_same_weights(tmp_path / "run", reference)
    parts = {f"{part}/config.json" for part in ("transformer", "vae", "text_encoder")}
    assert {"model_index.json", "README.md", "figures/loss.png", "figures/images.png", *parts} <= pushed


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    pretrain_transformer: ModuleType,
    latents: Path,
    tiny_vae: Path,
    tiny_text_encoder: Path,
    reference: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(tiny_vae, tmp_path / "other_vae")
    other = diffusers.AutoencoderKL.from_pretrained(tmp_path / "other_vae")
    other.encoder.conv_in.bias.data += 1
    other.save_pretrained(tmp_path / "other_vae")
    (tmp_path / "empty").mkdir()
    cases: dict[str, dict[str, Any]] = {
        "data: '/no/such/folder': expected a cache of latents": {"data": "/no/such/folder"},
        "there is no manifest.json": {"data": str(tmp_path / "empty")},
        "expected a cache as configured, not vae ": {"vae": str(tmp_path / "other_vae")},
        "vae: '/no/vae'": {"vae": "/no/vae"},
        "text_encoder: '/no/encoder'": {"text_encoder": "/no/encoder"},
        "data_split: 'dev': expected a split of the latents, there are: ": {"data_split": "dev"},
        "vocab_size: 100: expected at least 514": {"vocab_size": 100},
        "patch_size: 3: expected a divisor of the latents' sides, [8, 8]": {"patch_size": 3},
        "hidden_size: 20: expected a multiple of 4 x num_heads 2": {"hidden_size": 20},
        "routed_layers: '2,4': expected the first and the last block that are": {"routed_layers": "2,4"},
        "routed_layers: '3,2': expected the first and the last block that are": {"routed_layers": "3,2"},
        "routed_layers: '2': expected the first and": {"routed_layers": "2", "routed_fraction": 0.0},
        "routed_fraction: 1.0: expected a share in [0, 1)": {"routed_fraction": 1.0},
        "logit_std: 0.0: expected more than 0": {"logit_std": 0.0},
        "shift: -1.0: expected more than 0": {"shift": -1.0},
        "guidance_scale: 2.0: expected 1 with caption_dropout 0": {"caption_dropout": 0.0},
        "text_hidden_size: 15: expected a multiple of text_num_heads 2": {"text_hidden_size": 15},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "init: '/no/model'": {"init": "/no/model"},
        "a transformer with depth 4, as configured, got 3": {"init": str(reference), "num_layers": 4},
        "a text encoder with num_hidden_layers 2, as": {"init": str(reference), "text_num_layers": 2},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_long_captions_are_cut_and_it_is_said(
    pretrain_transformer: ModuleType,
    latents: Path,
    tiny_vae: Path,
    tmp_path: Path,
) -> None:
    fields = {"caption_length": 4, "max_steps": 1}
    run(pretrain_transformer, config_of(pretrain_transformer, latents, tiny_vae, tmp_path / "run", **fields))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["left_out"]["long_captions_in_a_sample"] > 0
    assert "long captions in a sample" in (tmp_path / "run" / "README.md").read_text()


def test_help_shows_every_field_at_once(pretrain_transformer: ModuleType) -> None:
    command, started = [sys.executable, str(pretrain_transformer.__file__), "--help"], time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 6
    for field in pretrain_transformer.Config.__dataclass_fields__:
        assert field in done.stdout.replace("-", "_")
