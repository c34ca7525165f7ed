"""The autoencoder's recipe: its data, objective and evaluation against other computations, exact resume, its folder."""

import json
import math
import re
import shutil
import subprocess
import sys
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
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio

from shared import command_line as cli
from tests.conftest import ROOT
from tests.recipes.runs import (
    assert_same,
    assert_same_weights,
    exported,
    metrics_of,
    push_and_load,
    results_of,
    run,
    run_card,
    state_at,
    weights,
)

TINY: dict[str, Any] = {
    "image_size": 16,
    "block_out_channels": "8,8",
    "norm_num_groups": 4,
    "latent_channels": 2,
    "global_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "ema_decay": 0.5,
    "log_every": 1,
    "num_workers": 0,
}


def config_of(vae: ModuleType, data: Path, run_dir: Path, **fields: Any) -> Any:
    return vae.Config(**{**TINY, "data": str(data), "output_dir": str(run_dir), **fields})


@pytest.fixture(scope="module")
def reference(vae: ModuleType, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over more than two epochs that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(vae, config_of(vae, shapes, run_dir, save_every=1, keep_checkpoints=100))
    return run_dir


# -- data --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_damaged_images_are_replaced_the_same_way(vae: ModuleType, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    damaged = tmp_path / "data" / "train" / "high" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (tmp_path / "data" / "test" / "high" / "0.png").write_bytes(b"")
    run_dirs = [tmp_path / "one", tmp_path / "workers"]
    for run_dir, workers in zip(run_dirs, (0, 2), strict=True):
        fields = {"max_bad_fraction": 0.1, "max_steps": 6, "num_workers": workers}
        run(vae, config_of(vae, tmp_path / "data", run_dir, **fields))
    assert_same(*run_dirs)
    last = metrics_of(run_dirs[0])[-1]
    assert (last["train/bad_images"], last["eval/skipped"]) == (1, 1)
    with pytest.raises(cli.UsageError, match=r"max_bad_fraction: 0.01: expected .*high/3.png \(row"):
        run(vae, config_of(vae, tmp_path / "data", tmp_path / "strict", max_steps=6))


# -- model and objective -----------------------------------------------------------------------------------------------


def test_the_kl_weight_is_the_papers(vae: ModuleType) -> None:
    """CompVis: absolute errors summed over an image, plus 1e-6 times the divergence, here both a channel's share."""
    pixels, made = torch.rand(3, 3, 16, 16) * 2 - 1, torch.rand(3, 3, 16, 16) * 2 - 1
    mean, deviation = torch.randn(3, 2, 8, 8), torch.rand(3, 2, 8, 8) + 0.1
    posterior = torch.distributions.Normal(mean, deviation)
    kl = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3))
    expected = ((made - pixels).abs().sum((1, 2, 3)) + 1e-6 * kl) / (3 * 16 * 16)
    torch.testing.assert_close(vae.losses(pixels, made, kl, vae.Config().kl_weight), expected)
    logvar = 2 * deviation.log()
    found = diffusers.models.autoencoders.vae.DiagonalGaussianDistribution(torch.cat([mean, logvar], 1)).kl()
    torch.testing.assert_close(found, kl, rtol=1e-4, atol=1e-4)


def test_forward_is_the_librarys_with_our_noise(vae: ModuleType) -> None:
    model = vae.build_model(vae.Config(**TINY)).eval()
    pixels, noise = torch.rand(2, 3, 16, 16) * 2 - 1, torch.randn(2, 2, 8, 8)
    made, kl, latents = vae.forward(model, pixels, noise)
    library = diffusers.AutoencoderKL.from_config(model.config)
    library.load_state_dict(model.state_dict())
    posterior = library.eval().encode(pixels).latent_dist
    torch.testing.assert_close(latents, posterior.mean + posterior.std * noise)
    torch.testing.assert_close(made, library.decode(latents).sample)
    torch.testing.assert_close(kl, posterior.kl())


def test_the_perceptual_distance_sees_what_the_judge_sees(vae: ModuleType, reference: Path, tmp_path: Path) -> None:
    """Zero for the same image, larger for more noise, and its gradient leads back to the image."""
    import transformers

    sizes = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic"}
    torch.manual_seed(0)
    transformers.ResNetForImageClassification(transformers.ResNetConfig(**sizes)).save_pretrained(tmp_path / "judge")
    cfg = vae.Config(**TINY, perceptual_model=str(tmp_path / "judge"))
    judge = vae.load_judge(cfg, torch.device("cpu"))
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    assert vae.perceptual_losses(judge, pixels, pixels).abs().max() == 0
    noise = torch.randn(2, 3, 16, 16)
    small, large = (vae.perceptual_losses(judge, pixels, pixels + share * noise) for share in (0.05, 0.5))
    assert (small < large).all()
    made = (pixels + 0.5 * noise).requires_grad_()
    for _ in range(30):
        [gradient] = torch.autograd.grad(vae.perceptual_losses(judge, pixels, made).sum(), made)
        made = (made - gradient).detach().requires_grad_()
    assert (vae.perceptual_losses(judge, pixels, made) < 0.9 * large).all()


def prepared(vae: ModuleType, cfg: Any, accumulation: int, dtype: torch.dtype) -> Any:
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = vae.build_model(cfg).to(dtype)
    return accelerator, *accelerator.prepare(model, vae.build_optimizer(cfg, model))


def random_batch(number: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (number, 4, 4, 3), generator=generator, dtype=torch.uint8)
    pixels = pixels.repeat_interleave(4, 1).repeat_interleave(4, 2)
    return {"pixel_values": pixels, "noise": torch.randn(number, 2, 8, 8, generator=generator)}


def test_one_batch_is_overfitted(vae: ModuleType) -> None:
    cfg = vae.Config(**TINY)
    accelerator, model, optimizer = prepared(vae, cfg, 1, torch.float32)
    batch = random_batch(8)
    losses = [float(vae.train_update(cfg, accelerator, model, None, optimizer, [batch])[0]) for _ in range(150)]
    assert losses[-1] < 0.2 < 0.4 < losses[0]


def test_accumulation_is_exact(vae: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float64 a batch of 8 is two of 4 is 8 of 1."""
    monkeypatch.setattr(vae, "from_minus_one", lambda pixels: pixels.permute(0, 3, 1, 2).double() / 127.5 - 1)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: tensor)
    cfg = vae.Config(**{**TINY, "max_grad_norm": 0.1})
    results = []
    for size in (8, 4, 1):
        accelerator, model, optimizer = prepared(vae, cfg, 8 // size, torch.float64)
        batch = {**random_batch(8), "noise": random_batch(8)["noise"].double()}
        batches = [{name: rows[start : start + size] for name, rows in batch.items()} for start in range(0, 8, size)]
        norms = [vae.train_update(cfg, accelerator, model, None, optimizer, batches)[1] for _ in range(2)]
        results.append({"norm": norms[-1], **model.state_dict()})
    for result in results[1:]:
        for name, value in result.items():
            torch.testing.assert_close(value.double(), results[0][name].double(), rtol=1e-9, atol=1e-9)


def test_non_finite_gradient_changes_nothing(vae: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = vae.Config(**TINY)
    accelerator, model, optimizer = prepared(vae, cfg, 1, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    losses = vae.losses
    monkeypatch.setattr(vae, "losses", lambda *args: losses(*args) * float("nan"))
    _, norm = vae.train_update(cfg, accelerator, model, None, optimizer, [random_batch(8)])
    assert not math.isfinite(norm)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


# -- the run -----------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_what_the_ecosystem_reads(reference: Path) -> None:
    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert entries[-1]["train/loss"] < 0.8 * entries[0]["train/loss"]
    model, loading = diffusers.AutoencoderKL.from_pretrained(reference, output_loading_info=True)
    assert type(model) is diffusers.AutoencoderKL
    assert not loading["missing_keys"]
    for name in ("README.md", "config.yaml", "run.json", "recipe.py", "figures/loss.png", "figures/images.png"):
        assert (reference / name).stat().st_size > 0, name
    card = (reference / "README.md").read_text()
    assert f"{entries[-1]['eval/psnr']:.4f}" in card
    assert "library_name: diffusers" in card
    assert "(figures/images.png)" in card


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_exported_latents_have_mean_zero_and_variance_one(vae: ModuleType, reference: Path, shapes: Path) -> None:
    """Through the library alone, and what is decoded is what was trained, in spite of the moved mean."""
    model = diffusers.AutoencoderKL.from_pretrained(reference).eval()
    train, _ = vae.open_data(vae.Config(**TINY, data=str(shapes)), Accelerator(cpu=True))
    pixels = torch.from_numpy(vae.Squares(train, 16, len(train))[0]["pixel_values"])
    with torch.no_grad():
        latents = model.encode(vae.from_minus_one(pixels)).latent_dist.mean * model.config.scaling_factor
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(2), rtol=0, atol=1e-4)
    assert latents.var((0, 2, 3), unbiased=False).mean().item() == pytest.approx(1, rel=1e-3)
    record = json.loads((reference / "run.json").read_text())
    assert record["latents_std"] == pytest.approx(1 / model.config.scaling_factor)
    assert np.abs(record["latents_mean"]).max() > 0.01  # there was something to move


def test_evaluation_counts_every_image_once(vae: ModuleType, reference: Path, shapes: Path) -> None:
    """Against torchmetrics on the exported model, one image at a time."""
    model = diffusers.AutoencoderKL.from_pretrained(reference).eval()
    _, held_out = vae.open_data(vae.Config(**TINY, data=str(shapes)), Accelerator(cpu=True))
    assert len(held_out) == 21
    metric, errors = PeakSignalNoiseRatio(data_range=255.0, reduction="none", dim=(1, 2, 3)), []
    for index in range(21):
        pixels = torch.from_numpy(vae.Squares(held_out, 16, 1)[index]["pixel_values"])
        with torch.no_grad():
            made = model(vae.from_minus_one(pixels)).sample
        metric.update(vae.to_uint8(made).float(), pixels.float())
        errors.append((made - vae.from_minus_one(pixels)).abs().mean().item())
    last = metrics_of(reference)[-1]
    assert last["eval/psnr"] == pytest.approx(metric.compute().mean().item(), abs=0.01)
    assert last["eval/loss"] == pytest.approx(np.mean(errors), rel=0.01)
    assert 0 < last["eval/ssim"] < 1
    assert last["eval/skipped"] == 0


def test_the_average_is_what_is_saved(vae: ModuleType, shapes: Path, reference: Path, tmp_path: Path) -> None:
    run(vae, config_of(vae, shapes, tmp_path / "run", ema_decay=0.0))
    averaged, plain = weights(reference), weights(tmp_path / "run")
    losses = [[entry["train/loss"] for entry in metrics_of(folder)] for folder in (reference, tmp_path / "run")]
    assert losses[0] == losses[1]
    assert not torch.equal(averaged["encoder.conv_in.weight"], plain["encoder.conv_in.weight"])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_resuming_is_exact_to_the_bit(
    vae: ModuleType, shapes: Path, reference: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    run(vae, config_of(vae, shapes, run_dir, save_every=1, keep_checkpoints=100, num_workers=workers))
    assert results_of(run_dir) == results_of(reference)
    assert_same_weights(run_dir, reference)


def test_training_goes_on_from_an_exported_model(
    vae: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    """Its latents have mean zero already, so little is moved again; statistics that it came with are out of date."""
    init = tmp_path / "init"
    shutil.copytree(reference, init, ignore=shutil.ignore_patterns("checkpoints"))
    config = json.loads((init / "config.json").read_text())
    (init / "config.json").write_text(json.dumps({**config, "shift_factor": 0.5, "latents_mean": [1.0, 2.0]}))
    fields = {"init": str(init), "max_steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0}
    run(vae, config_of(vae, shapes, tmp_path / "run", **fields))
    for name, value in weights(tmp_path / "run").items():
        torch.testing.assert_close(value, weights(reference)[name], rtol=0, atol=1e-4)
    exported = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (exported["shift_factor"], exported["latents_mean"]) == (None, None)
    assert str(init) not in json.dumps(exported)


def test_gradient_checkpointing_changes_nothing_but_memory(
    vae: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    run(vae, config_of(vae, shapes, tmp_path / "run", gradient_checkpointing=True))
    one, other = (metrics_of(folder)[-1]["eval/loss"] for folder in (tmp_path / "run", reference))
    assert one == pytest.approx(other, rel=1e-5)


def test_images_are_held_out_where_there_is_no_split(vae: ModuleType, shapes: Path, tmp_path: Path) -> None:
    cfg = config_of(vae, shapes / "train", tmp_path, eval_fraction=0.2)
    train, held_out = vae.open_data(cfg, Accelerator(cpu=True))
    assert (len(train), len(held_out)) == (31, 8)
    names = [{images.name(index) for index in range(len(images))} for images in (train, held_out)]
    assert not names[0] & names[1]


@pytest.mark.parametrize("goes_on", [False, True])
def test_dry_run_leaves_nothing(
    vae: ModuleType, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: Path, goes_on: bool
) -> None:
    fields = {"init": str(reference), "learning_rate": 0.01} if goes_on else {}
    run(vae, config_of(vae, shapes, tmp_path / "run", dry_run=True, **fields))
    printed = capsys.readouterr().out
    for row in ("parameters", "latents", "memory: total", "one checkpoint", "all updates", "one evaluation"):
        assert row in printed
    [grid_file] = re.findall("model sees them: (.*)", printed)
    assert Image.open(grid_file).size[0] > 100
    shutil.rmtree(Path(grid_file).parent)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    vae: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "data": shapes, "push_every": 6}
    program = "import diffusers; print(diffusers.AutoencoderKL.from_pretrained('tester/mine').config.latent_channels)"
    answer, pushed = push_and_load(vae, fields, program, tmp_path)
    assert answer.strip() == "2"
    assert_same_weights(tmp_path / "run", reference)
    assert {exported(reference).name, "config.json", "README.md", "figures/loss.png", "figures/images.png"} <= pushed


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    vae: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    uncentred = diffusers.AutoencoderKL.from_config(
        {**diffusers.AutoencoderKL.load_config(reference), "use_quant_conv": False}
    )
    uncentred.save_pretrained(tmp_path / "uncentred")
    cases: dict[str, dict[str, Any]] = {
        "data: '/no/such/folder'": {"data": "/no/such/folder"},
        "expected a .parquet or .tar file, or a folder": {"data": str(tmp_path / "empty")},
        "expected images of at least 32 pixels": {"image_size": 32},
        "image_size: 15: expected a multiple of 2": {"image_size": 15},
        "data_split: 'dev': expected one of train, test": {"data_split": "dev"},
        "block_out_channels: '8,x': expected comma-separated whole numbers": {"block_out_channels": "8,x"},
        "block_out_channels: '8,6': expected multiples of norm_num_groups 4": {"block_out_channels": "8,6"},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "init: '/no/model'": {"init": "/no/model"},
        "with latent_channels 4, as configured, got 2": {"init": str(reference), "latent_channels": 4},
        "an autoencoder with use_quant_conv True, as configured, got False": {"init": str(tmp_path / "uncentred")},
        "perceptual_model: '/no/judge'": {"perceptual_model": "/no/judge"},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        options = {"data": str(shapes), "output_dir": str(tmp_path / "run"), **fields}
        with pytest.raises(cli.UsageError) as caught:
            run(vae, vae.Config(**{**TINY, **options}))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_help_shows_every_field(vae: ModuleType) -> None:
    command = [sys.executable, str(ROOT / "recipes/text_to_image/train_vae.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for field in (*TINY, "perceptual_model", "max_bad_fraction"):
        assert field in done.stdout.replace("-", "_")


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_shipped_autoencoder_is_as_good_as_the_readme_says(vae: ModuleType) -> None:
    """On both held-out splits; latents of the training images have mean zero and variance one."""
    shipped = ROOT / "recipes" / "text_to_image" / "assets" / "vae"
    accelerator, readme = Accelerator(cpu=True), (ROOT / "recipes" / "text_to_image" / "README.md").read_text()
    model = vae.load_diffusion_model(vae.AutoencoderKL, str(shipped), "vae")
    for split, size in (("test_unseen_concept", 300), ("", 200)):
        cfg = vae.Config(num_workers=0, eval_split=split)
        train, held_out = vae.open_data(cfg, accelerator)
        assert len(held_out) == size
        metrics, _ = vae.evaluate(cfg, accelerator, model, held_out, 50)
        assert metrics["eval/psnr"] >= 24
        assert f"{metrics['eval/psnr']:.1f} dB" in readme
    recorded = json.loads((shipped / "run.json").read_text())
    some = train.subset(np.arange(0, len(train), 10))
    mean, deviation = vae.latent_statistics(cfg, accelerator, model, some, 50)
    assert mean.abs().max() < 0.1 * deviation
    assert deviation == pytest.approx(recorded["latents_std"], rel=0.05)
    assert model.config.scaling_factor == pytest.approx(1 / recorded["latents_std"])
