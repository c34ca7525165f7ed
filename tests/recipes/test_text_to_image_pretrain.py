"""The diffusion recipe: its data, objective and evaluation against other computations, exact resume, its folder."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin

from shared import command_line as cli
from shared.data.randomness import derive_seed, normal_numbers
from shared.diffusion import latent_cache, latent_encoding
from shared.diffusion.captions import encode_captions, load_text_encoder
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from shared.diffusion.latent_updates import FixedSamples
from shared.performance import dry_run
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
    "block_out_channels": "8,8",
    "attention_stages": "2",
    "norm_num_groups": 4,
    "num_heads": 2,
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


def config_of(pretrain: ModuleType, latents: Path, tiny_vae: Path, run_dir: Path, **fields: Any) -> Any:
    paths = {"data": str(latents), "vae": str(tiny_vae), "output_dir": str(run_dir)}
    return pretrain.Config(**{**TINY, **paths, **fields})


@pytest.fixture(scope="module")
def reference(pretrain: ModuleType, latents: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over more than two epochs that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(pretrain, config_of(pretrain, latents, tiny_vae, run_dir, save_every=1, keep_checkpoints=100))
    return run_dir


def batch_of(number: int, tokens: int = 600) -> dict[str, torch.Tensor]:
    """Random samples with noise and captions."""
    draw = torch.Generator().manual_seed(0)
    return {
        "latents": torch.randn(number, 2, 8, 8, generator=draw),
        "noise": torch.randn(number, 2, 8, 8, generator=draw),
        "uniform": torch.arange(number) / number,
        "text": torch.randint(tokens, (number, 8), generator=draw),
    }


def new_model(pretrain: ModuleType, cfg: Any) -> Any:
    tokenizer = train_clip_tokenizer(["train image 1"], cfg.vocab_size, cfg.caption_length)
    return pretrain.build_model(cfg, tokenizer, None, (2, 8, 8))


# -- objective ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_zero", [False, True], ids=["", "zero_terminal_snr"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_the_librarys(pretrain: ModuleType, prediction_type: str, is_zero: bool) -> None:
    """Against diffusers' DDPM scheduler, which has its own formulas for both."""
    batch, timesteps = batch_of(16), torch.arange(999, -1, -63)
    library = diffusers.DDPMScheduler(**pretrain.NOISE, prediction_type=prediction_type, rescale_betas_zero_snr=is_zero)
    kept = pretrain.build_scheduler(pretrain.Config(zero_terminal_snr=is_zero)).alphas_cumprod[timesteps]
    # The library's sampler keeps a signal of 2^-24 in the last timestep, where its own division by it would fail.
    kept[0] -= 2**-24 if is_zero else 0
    noisy = pretrain.add_noise(batch["latents"], batch["noise"], kept)
    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(noisy, library.add_noise(batch["latents"], batch["noise"], timesteps), **close)
    wanted = pretrain.targets(batch["latents"], batch["noise"], kept, prediction_type)
    velocity = library.get_velocity(batch["latents"], batch["noise"], timesteps)
    torch.testing.assert_close(wanted, batch["noise"] if prediction_type == "epsilon" else velocity, **close)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_weights_make_the_error_of_the_latents_count_up_to_gamma(pretrain: ModuleType, prediction_type: str) -> None:
    """An error of the prediction, told as an error of the latents: its weight is min(SNR, gamma) (Hang et al. 2023)."""
    kept = torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 0.998 + 0.001
    latents, noise, wrong = (torch.randn(50, 2, 4, 4, dtype=torch.float64) for _ in range(3))
    noisy = pretrain.add_noise(latents, noise, kept)
    error = (wrong - pretrain.targets(latents, noise, kept, prediction_type)).square().mean((1, 2, 3))
    signal, rest = kept[:, None, None, None].sqrt(), (1 - kept)[:, None, None, None].sqrt()
    estimate = (noisy - rest * wrong) / signal if prediction_type == "epsilon" else signal * noisy - rest * wrong
    of_latents = (estimate - latents).square().mean((1, 2, 3))
    weighted = error * pretrain.timestep_weights(kept, 5.0, prediction_type)
    torch.testing.assert_close(weighted, (kept / (1 - kept)).clamp(max=5.0) * of_latents, rtol=1e-6, atol=1e-9)
    assert (pretrain.timestep_weights(kept, 0.0, prediction_type) == 1).all()


def test_timesteps_are_within_the_schedule(pretrain: ModuleType) -> None:
    cfg, seen = pretrain.Config(**TINY), []

    class Recorder(torch.nn.Module):
        def forward(self, latents: torch.Tensor, timesteps: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
            seen.extend(timesteps.tolist())
            return latents

    signal = pretrain.build_scheduler(cfg).alphas_cumprod
    batch = {**batch_of(4), "uniform": torch.tensor([0.0, 0.0009, 0.9995, 0.99999997])}
    pretrain.errors(cfg, Recorder(), batch, signal)
    assert seen == [0, 0, 999, 999]


def test_the_caption_matters_and_reaches_the_text_encoder(pretrain: ModuleType) -> None:
    model = new_model(pretrain, pretrain.Config(**TINY))
    batch = batch_of(4, tokens=300)
    inputs = {"latents": batch["latents"], "timesteps": torch.tensor([1, 300, 600, 999])}
    one = model(**inputs, text=batch["text"])
    assert not torch.allclose(one, model(**inputs, text=batch["text"].flip(0)))
    one.square().mean().backward()
    missing = [name for name, weight in model.named_parameters() if weight.grad is None]
    assert not missing
    assert model.text_encoder.embeddings.token_embedding.weight.grad.abs().sum() > 0


def prepared(pretrain: ModuleType, cfg: Any, accumulation: int, dtype: torch.dtype) -> Any:
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = new_model(pretrain, cfg).to(dtype)
    signal = pretrain.build_scheduler(cfg).alphas_cumprod.to(dtype)
    return accelerator, *accelerator.prepare(model, pretrain.build_optimizer(cfg, model)), signal


def test_one_batch_is_overfitted(pretrain: ModuleType) -> None:
    """With its noise and timesteps, from the weighted error of an empty prediction, to a third of it."""
    cfg = pretrain.Config(**{**TINY, "caption_dropout": 0.0, "guidance_scale": 1.0})
    accelerator, model, optimizer, signal = prepared(pretrain, cfg, 1, torch.float32)
    batch = batch_of(8, tokens=300)
    losses = [float(pretrain.train_update(cfg, accelerator, model, optimizer, [batch], signal)[0]) for _ in range(200)]
    assert losses[-1] < losses[0] / 3


def test_accumulation_is_exact(pretrain: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 a batch of 8 is two of 4 is 8 of 1."""
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    cfg = pretrain.Config(**{**TINY, "max_grad_norm": 0.1})
    results = []
    for size in (8, 4, 1):
        accelerator, model, optimizer, signal = prepared(pretrain, cfg, 8 // size, torch.float64)
        batch = {name: rows if name == "text" else rows.double() for name, rows in batch_of(8, 300).items()}
        batches = [{name: rows[start : start + size] for name, rows in batch.items()} for start in range(0, 8, size)]
        update = (cfg, accelerator, model, optimizer, batches, signal)
        norms = [pretrain.train_update(*update)[1] for _ in range(2)]
        results.append({"norm": norms[-1], **model.state_dict()})
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value.double(), results[0][name].double(), rtol=1e-9, atol=1e-9)


def test_non_finite_gradient_changes_nothing(pretrain: ModuleType) -> None:
    cfg = pretrain.Config(**TINY)
    accelerator, model, optimizer, signal = prepared(pretrain, cfg, 1, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    batch = {**batch_of(8, 300), "noise": torch.full((8, 2, 8, 8), float("nan"))}
    _, norm = pretrain.train_update(cfg, accelerator, model, optimizer, [batch], signal)
    assert not math.isfinite(norm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_config_has_stable_diffusions_sizes(pretrain: ModuleType) -> None:
    """Its UNet is known to have 859,520,964 parameters."""
    path = ROOT / "recipes" / "text_to_image" / "configs" / "sd1_256.yaml"
    cfg = cli.parse(pretrain.Config, ["--config", str(path)])
    tokenizer = train_clip_tokenizer(["a"], 514, 77)
    clip = SimpleNamespace(config=SimpleNamespace(hidden_size=768))
    with dry_run.without_memory():
        model = pretrain.build_model(cfg, tokenizer, clip, (4, 32, 32))
    assert sum(weight.numel() for weight in model.parameters()) == 859_520_964


# -- evaluation and images -------------------------------------------------------------------------------------------


def test_evaluation_equals_one_sample_at_a_time(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    """With the exported pipeline's own networks and diffusers' schedule."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(reference)
    scheduler = diffusers.DDPMScheduler.from_config(pipeline.scheduler.config)
    held_out = latent_cache.Latents(latents, latent_cache.read_manifest(latents, "data"), "test")
    factor = pipeline.vae.config.scaling_factor
    reading = {"scaling_factor": factor, "tokenizer": pipeline.tokenizer, "empty": None}
    samples = FixedSamples(held_out, 200, pretrain.NUM_BANDS, reading, batch_size=1)
    assert len(samples) == 7 * pretrain.NUM_BANDS
    bands: dict[int, list[float]] = {band: [] for band in range(pretrain.NUM_BANDS)}
    for number in range(len(samples)):
        item = {name: torch.from_numpy(value) for name, value in samples[number].items()}
        timesteps = (item["uniform"] * 1000).long()
        noisy = scheduler.add_noise(item["latents"], item["noise"], timesteps)
        with torch.no_grad():
            states = pipeline.text_encoder(item["text"]).last_hidden_state
            predicted = pipeline.unet(noisy, timesteps, states).sample
        velocity = scheduler.get_velocity(item["latents"], item["noise"], timesteps)
        bands[int(timesteps) * pretrain.NUM_BANDS // 1000].append((predicted - velocity).square().mean().item())
    last = metrics_of(reference)[-1]
    for band, errors in bands.items():
        assert len(errors) == 7
        assert last[f"eval/loss_test_band_{band}"] == pytest.approx(np.mean(errors), rel=1e-4)
    assert last["eval/loss_test"] == pytest.approx(np.mean(list(bands.values())), rel=1e-4)
    assert last["eval/loss"] == last["eval/loss_test"]
    assert last["eval/loss_train"] > 0


@pytest.mark.parametrize("is_zero", [False, True], ids=["", "zero_terminal_snr"])
def test_images_are_the_pipelines(pretrain: ModuleType, reference: Path, is_zero: bool) -> None:
    """The recipe's own loop makes what StableDiffusionPipeline makes from the same noise."""
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(reference)
    pipeline.set_progress_bar_config(disable=True)
    cfg = pretrain.Config(**{**TINY, "sample_steps": 5, "zero_terminal_snr": is_zero})
    pipeline.scheduler = pretrain.build_scheduler(cfg)
    pipeline.scheduler.set_timesteps(5)
    assert pipeline.scheduler.timesteps[0] == 999
    assert (pipeline.scheduler.alphas_cumprod[-1] < 1e-7) == is_zero
    model = pretrain.Denoiser(pipeline.unet, pipeline.text_encoder)
    captions = ["train image 1", "test image 2"]
    texts = encode_captions(captions, pipeline.tokenizer, None)["text"]
    empty = encode_captions([""], pipeline.tokenizer, None)["text"][0]
    made = pretrain.make_images(cfg, Accelerator(cpu=True), model, pipeline.vae, texts, empty, (2, 8, 8))
    noise = normal_numbers(derive_seed(0, "pictures"), np.arange(2), count=2 * 8 * 8)
    start = torch.from_numpy(noise.astype(np.float32)).reshape(2, 2, 8, 8)
    model.eval()
    theirs = pipeline(captions, latents=start, num_inference_steps=5, guidance_scale=2.0, output_type="np").images
    assert np.abs(np.stack(made) / 255 - theirs).max() < 0.01
    assert np.abs(theirs[0] - theirs[1]).max() > 0.02


# -- the run -----------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_what_the_ecosystem_reads(reference: Path) -> None:
    made = diffusers.DDIMScheduler.from_pretrained(reference / "scheduler")
    assert (made.config.clip_sample, made.config.set_alpha_to_one) == (False, False)  # latents are no pixels
    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    losses = [entry["train/loss"] for entry in entries]
    assert np.mean(losses[-3:]) < 0.9 * np.mean(losses[:3])
    assert (reference / "samples" / "step_00000012.png").stat().st_size > 0
    for name in ("README.md", "config.yaml", "run.json", "recipe.py", "figures/loss.png", "figures/images.png"):
        assert (reference / name).stat().st_size > 0, name
    card = (reference / "README.md").read_text()
    assert f"{entries[-1]['eval/loss']:.4f}" in card
    assert "library_name: diffusers" in card
    assert "(figures/images.png)" in card
    assert "test image 0" in card


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_the_average_is_what_is_saved(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", ema_decay=0.0))
    losses = [[entry["train/loss"] for entry in metrics_of(folder)] for folder in (reference, tmp_path / "run")]
    assert losses[0] == losses[1]
    name = "unet.conv_in.weight"
    assert not torch.equal(weights(reference)[name], weights(tmp_path / "run")[name])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_resuming_is_exact_to_the_bit(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    fields = {"save_every": 1, "keep_checkpoints": 100, "num_workers": workers}
    run(pretrain, config_of(pretrain, latents, tiny_vae, run_dir, **fields))
    assert results_of(run_dir) == results_of(reference)
    assert_same_weights(run_dir, reference)


def test_training_goes_on_from_an_exported_pipeline(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    fields = {"init": str(reference), "max_steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0}
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", **fields))
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, weights(reference)[name], rtol=0, atol=1e-6)


def test_a_model_without_zero_terminal_snr_is_brought_to_it(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    """As Lin et al. 2024 bring Stable Diffusion to it; from there it goes on with the field alone."""
    zero = {"zero_terminal_snr": True, "snr_gamma": 0.0, "max_steps": 1}
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "one", init=str(reference), **zero))
    made = diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path / "one" / "scheduler")
    assert (made.config.rescale_betas_zero_snr, made.config.timestep_spacing) == (True, "trailing")
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "two", init=str(tmp_path / "one"), **zero))
    expected = "a scheduler with rescale_betas_zero_snr False, as configured, got True"
    with pytest.raises(cli.UsageError, match=expected):
        run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "three", init=str(tmp_path / "two")))


def test_a_network_goes_on_as_the_one_it_was_whatever_its_configuration(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    """What no field of the recipe says: linear projections, and heads of each stage, as in Stable Diffusion 2."""
    own = {"use_linear_projection": True, "attention_head_dim": (2, 4), "time_cond_proj_dim": 8}
    own |= {"flip_sin_to_cos": False, "center_input_sample": True, "resnet_time_scale_shift": "scale_shift"}
    folder = tmp_path / "other"
    shutil.copytree(reference, folder, ignore=shutil.ignore_patterns("checkpoints"))
    config = {**json.loads((folder / "unet" / "config.json").read_text()), **own}
    torch.manual_seed(1)
    before = diffusers.UNet2DConditionModel.from_config(config)
    before.save_pretrained(folder / "unet")
    fields = {"init": str(folder), "max_steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0}
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", **fields))
    after = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "run").unet
    assert {name: after.config[name] for name in own} == {**own, "attention_head_dim": [2, 4]}
    assert str(folder) not in (tmp_path / "run" / "unet" / "config.json").read_text()
    inputs = (torch.randn(2, 2, 8, 8), torch.tensor([3, 900]), torch.randn(2, 8, before.config.cross_attention_dim))
    torch.testing.assert_close(after(*inputs).sample, before(*inputs).sample, rtol=0, atol=1e-5)


def test_a_pipeline_makes_images_of_the_size_that_it_went_on_with(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path
) -> None:
    cfg = config_of(pretrain, latents, tiny_vae, reference, init=str(reference))
    tokenizer, _ = load_text_encoder(str(reference), "init")
    assert pretrain.build_model(cfg, tokenizer, None, (2, 16, 16)).unet.config.sample_size == 16


def test_gradient_checkpointing_changes_nothing_but_memory(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", gradient_checkpointing=True))
    one, other = (metrics_of(folder)[-1]["eval/loss"] for folder in (tmp_path / "run", reference))
    assert one == pytest.approx(other, rel=1e-4)


def test_a_frozen_text_encoder_equals_its_cached_embeddings(
    pretrain: ModuleType,
    cache_latents: ModuleType,
    captioned: Path,
    latents: Path,
    tiny_vae: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
) -> None:
    """The pipeline has the encoder as it was; where the cache has no embeddings, it makes them in training."""
    flags = {**cache_flags(captioned, tiny_vae, tmp_path / "latents"), "text_encoder": str(tiny_text_encoder)}
    run(cache_latents, cache_latents.Config(**flags))
    cfg = config_of(pretrain, tmp_path / "latents", tiny_vae, tmp_path / "run", text_encoder=str(tiny_text_encoder))
    run(pretrain, cfg)
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "along", text_encoder=str(tiny_text_encoder)))
    entries, expected = (metrics_of(tmp_path / name) for name in ("along", "run"))
    for name in ("train/loss", "train/grad_norm"):  # cached embeddings are float16
        assert [entry[name] for entry in entries] == pytest.approx([entry[name] for entry in expected], rel=1e-3)
    assert entries[-1]["eval/loss_test"] == pytest.approx(expected[-1]["eval/loss_test"], rel=1e-3)
    assert weights(tmp_path / "run").keys() == weights(tmp_path / "along").keys()
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "along")
    _, encoder = load_text_encoder(str(tiny_text_encoder), "text_encoder")
    for name, value in encoder.state_dict().items():
        assert torch.equal(pipeline.text_encoder.state_dict()[name], value)
    images = pipeline(["train image 1"], num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 16, 16, 3)


def test_latents_of_several_shapes_are_trained_on(
    pretrain: ModuleType, cache_latents: ModuleType, tiny_vae: Path, tmp_path: Path
) -> None:
    """Wide and tall images; every update is of one shape, and evaluation counts every sample."""
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
    train = latent_cache.Latents(tmp_path / "latents", manifest, "train")
    shapes = [shape for shape, _ in train.buckets()]
    assert len(shapes) == 3
    run(pretrain, config_of(pretrain, tmp_path / "latents", tiny_vae, tmp_path / "run", max_steps=6))
    assert metrics_of(tmp_path / "run")[-1]["eval/loss"] > 0


def test_samples_are_held_out_where_there_is_no_split(
    pretrain: ModuleType, cache_latents: ModuleType, captioned: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    flags = {**cache_flags(captioned, tiny_vae, tmp_path / "latents"), "data_splits": "train"}
    run(cache_latents, cache_latents.Config(**flags))
    run(pretrain, config_of(pretrain, tmp_path / "latents", tiny_vae, tmp_path / "run", eval_fraction=0.2, max_steps=2))
    assert metrics_of(tmp_path / "run")[-1]["eval/loss_held_out"] > 0
    manifest = latent_cache.read_manifest(tmp_path / "latents", "data")
    train, held_out = latent_cache.open_splits(tmp_path / "latents", manifest, "train", "", 0.2)
    one, other = set(train.captions()), set(held_out["held_out"].captions())
    assert (len(one), len(other), len(one & other)) == (32, 8, 0)


@pytest.mark.slow
def test_the_embedded_emoji_are_encoded_once(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no cache in outputs/; one that is there and of other images is refused."""
    some = {name: images.subset(np.arange(12)) for name, images in latent_encoding.sample_splits().items()}
    monkeypatch.setattr(latent_encoding, "sample_splits", lambda: some)
    monkeypatch.chdir(tmp_path)
    fields = {"data": "sample", "cache_dir": str(tmp_path / "cache"), "max_steps": 1, "vocab_size": 514}
    fields["caption_length"] = 77
    seen = []
    for name in ("one", "other"):
        run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / name, **fields))
        [folder] = (tmp_path / "cache").glob("latents-*")
        seen.append((folder / "manifest.json").stat().st_mtime_ns)
    assert seen[0] == seen[1]
    assert_same(tmp_path / "one", tmp_path / "other")
    assert "eval/loss_test_unseen_combination" in metrics_of(tmp_path / "one")[-1]
    (tmp_path / "outputs").mkdir()
    shutil.copytree(latents, tmp_path / "outputs" / "latents")
    with pytest.raises(cli.UsageError, match="data: 'outputs/latents': expected a cache as configured, not data "):
        run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "third", **fields))


@pytest.mark.parametrize("kind", ["trained", "frozen", "init"])
def test_dry_run_leaves_nothing(
    pretrain: ModuleType,
    latents: Path,
    tiny_vae: Path,
    tiny_text_encoder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: Path,
    kind: str,
) -> None:
    """With a text encoder trained along, with a frozen one that would run in training, and going on from a run."""
    fields = {
        "trained": {},
        "frozen": {"text_encoder": str(tiny_text_encoder)},
        "init": {"init": str(reference), "learning_rate": 0.01},
    }[kind]
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", dry_run=True, **fields))
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


def test_dry_run_knows_of_checkpointing_and_of_the_average(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def sizes(**fields: Any) -> dict[str, str]:
        run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", dry_run=True, **fields))
        rows = re.findall(r"^(memory: \w+|one checkpoint) +(.+)$", capsys.readouterr().out, re.MULTILINE)
        return dict(rows)

    plain, checkpointed, alone = sizes(), sizes(gradient_checkpointing=True), sizes(ema_decay=0.0)
    assert [name for name in plain if plain[name] != checkpointed[name]] == ["memory: activations", "memory: total"]
    others = {name for name in plain if plain[name] != alone[name]}
    assert others == {"memory: optimizer", "memory: total", "one checkpoint"}


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, reference: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "data": latents, "vae": tiny_vae, "push_every": 6}
    program = """from diffusers import StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained("tester/mine")
print(pipeline("train image 1", num_inference_steps=2).images[0].size)"""
    answer, pushed = push_and_load(pretrain, fields, program, tmp_path)
    assert answer.strip().endswith("(16, 16)")
    assert_same_weights(tmp_path / "run", reference)
    parts = {f"{part}/config.json" for part in ("unet", "vae", "text_encoder")}
    assert {"model_index.json", "README.md", "figures/loss.png", "figures/images.png", *parts} <= pushed


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    pretrain: ModuleType,
    vae: ModuleType,
    latents: Path,
    tiny_vae: Path,
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
        "eval_splits: 'dev': expected": {"eval_splits": "test,dev"},
        "vocab_size: 100: expected at least 514": {"vocab_size": 100},
        "prediction_type: 'x': expected one of epsilon, v_prediction": {"prediction_type": "x"},
        "prediction_type: 'epsilon': expected v_prediction with zero_terminal_snr": {
            "prediction_type": "epsilon",
            "zero_terminal_snr": True,
        },
        "snr_gamma: 5.0: expected 0 with zero_terminal_snr": {"zero_terminal_snr": True},
        "guidance_scale: 2.0: expected 1 with caption_dropout 0": {"caption_dropout": 0.0},
        "block_out_channels: '8,6': expected multiples of norm_num_groups 4": {"block_out_channels": "8,6"},
        "attention_stages: '3': expected numbers of stages from 1 to 2": {"attention_stages": "3"},
        "text_hidden_size: 15: expected a multiple of text_num_heads 2": {"text_hidden_size": 15},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "init: '/no/model'": {"init": "/no/model"},
        "a unet with layers_per_block 2, as configured, got 1": {"init": str(reference), "layers_per_block": 2},
        "a scheduler with prediction_type epsilon, as configured, got v_prediction": {
            "init": str(reference),
            "prediction_type": "epsilon",
        },
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_long_captions_are_cut_and_it_is_said(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, tmp_path: Path
) -> None:
    fields = {"caption_length": 4, "max_steps": 1}
    run(pretrain, config_of(pretrain, latents, tiny_vae, tmp_path / "run", **fields))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["left_out"]["long_captions_in_a_sample"] > 0
    assert "long captions in a sample" in (tmp_path / "run" / "README.md").read_text()


def test_help_shows_every_field() -> None:
    command = [sys.executable, str(ROOT / "recipes/text_to_image/pretrain.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for field in (*TINY, "text_encoder", "snr_gamma"):
        assert field in done.stdout.replace("-", "_")
