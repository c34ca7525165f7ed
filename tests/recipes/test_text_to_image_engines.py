"""The text-to-image recipes under every engine that two CPU processes can run, against one process."""

from pathlib import Path
from types import ModuleType
from typing import Any

import diffusers
import pytest
import torch

from tests.launching import assert_no_traceback
from tests.recipes import engines
from tests.recipes import test_text_to_image_finetune as finetuning
from tests.recipes import test_text_to_image_pretrain as diffusion
from tests.recipes import test_text_to_image_pretrain_transformer as flow
from tests.recipes import test_text_to_image_train_vae as autoencoder
from tests.recipes.runs import Runs, assert_same, metric, weights

# Adam makes a step of full size from a gradient that is zero but for rounding, so the rates are small.
COMMON: dict[str, Any] = {"max_steps": 6, "save_every": 3}
FIELDS = {
    "train_vae": {**autoencoder.TINY, **COMMON, "learning_rate": 0.002, "max_grad_norm": 0.5},
    "pretrain": {**diffusion.TINY, **COMMON, "learning_rate": 0.0002},
    "pretrain_transformer": {**flow.TINY, **COMMON, "learning_rate": 0.002},
}
ENGINES = engines.pairs("text_to_image/train_vae.py")  # the same in all three
OF_FINETUNING = {**finetuning.TINY, **COMMON, "eval_every": 0, "lora_dropout": 0.0, "learning_rate": 0.002}
METRICS = {
    "train_vae": ("eval/loss", "eval/psnr"),
    "pretrain": ("eval/loss", "eval/loss_test_band_0"),
    "pretrain_transformer": ("eval/loss", "eval/loss_test_band_0"),
}
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(
    vae: ModuleType,
    pretrain: ModuleType,
    pretrain_transformer: ModuleType,
    shapes: Path,
    latents: Path,
    tiny_vae: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, Runs]:
    """Runs of each recipe."""
    recipes = {"train_vae": vae, "pretrain": pretrain, "pretrain_transformer": pretrain_transformer}
    found = {}
    for name, recipe in recipes.items():
        own = {} if name == "train_vae" else {"vae": str(tiny_vae)}
        fields = {"ema": {**FIELDS[name], **own}}
        data = shapes if name == "train_vae" else latents
        found[name] = Runs(recipe, fields, data, tmp_path_factory.mktemp(name))
    return found


@pytest.mark.parametrize(("engine", "kind"), [pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES])
@pytest.mark.parametrize("recipe", FIELDS)
def test_engine_equals_one_process(runs: dict[str, Runs], recipe: str, engine: str, kind: str) -> None:
    run_dir, other = runs[recipe].of_engine(engine, kind), runs[recipe].of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", *METRICS[recipe]):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    assert metric(run_dir, "eval/ssim") == pytest.approx(metric(other, "eval/ssim"), abs=1e-4)  # of train_vae alone
    expected = weights(other)
    for name, value in weights(run_dir).items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding alone
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def tuned(
    text_to_image_finetune: ModuleType, tiny_pipeline: Path, captioned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    """Runs of fine-tuning, of an adapter or of all weights, of the text encoder too."""
    common = {**OF_FINETUNING, "init": str(tiny_pipeline)}
    fields = {"adapter": common, "all": {**common, "lora_rank": 0, "learning_rate": 0.0002}}
    return Runs(text_to_image_finetune, fields, captioned, tmp_path_factory.mktemp("finetune"))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), engines.pairs("text_to_image/finetune.py"))
def test_fine_tuning_under_an_engine_equals_one_process(tuned: Runs, engine: str, kind: str) -> None:
    run_dir, other = tuned.of_engine(engine, kind), tuned.of_one_process(kind)
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/loss_test_band_0"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    expected = weights(other)
    assert weights(run_dir).keys() == expected.keys()
    for name, value in weights(run_dir).items():
        if "k_proj" not in name:  # whose bias softmax does not see: its gradient is rounding alone
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
def test_fine_tuning_that_was_stopped_goes_on_to_the_bit(tuned: Runs, tmp_path: Path) -> None:
    [(engine, kind)], run_dir = engines.STOPPED["text_to_image/finetune.py"], tmp_path / "run"
    fields = {**tuned.fields[kind], "save_every": 0}
    status, output = tuned.run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert "stopped: saved at step 4 of 6" in output
    status, output = tuned.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, tuned.of_engine(engine, kind))


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), ENGINES)
def test_what_two_processes_export_is_the_librarys(runs: dict[str, Runs], engine: str, kind: str) -> None:
    run_dir = runs["train_vae"].of_engine(engine, kind)
    exported = diffusers.AutoencoderKL.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(run_dir).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "engine"),
    [(recipe, engine) for recipe in FIELDS for engine, _ in engines.STOPPED[f"text_to_image/{recipe}.py"]],
)
def test_stopping_and_going_on_is_exact(runs: dict[str, Runs], tmp_path: Path, recipe: str, engine: str) -> None:
    whole, run_dir = runs[recipe].of_engine(engine, "ema"), tmp_path / "run"
    fields = {**runs[recipe].fields["ema"], "save_every": 0}
    status, output = runs[recipe].run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 4 of 6" in output
    assert_no_traceback(output)
    status, output = runs[recipe].run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp2", "deepspeed_zero2"])
@pytest.mark.parametrize("recipe", FIELDS)
def test_bfloat16_differs_little(runs: dict[str, Runs], tmp_path: Path, recipe: str, engine: str) -> None:
    """Products have three digits; weights and their average stay in float32."""
    options: dict[str, Any] = {"launcher": ("--num_processes=2", "--mixed_precision=bf16")}
    if engine == "fsdp2":
        options["ACCELERATE_USE_CPU"] = "true"
    status, output = runs[recipe].run(engine, tmp_path / "run", runs[recipe].fields["ema"], **options)
    assert status == 0, output
    other = runs[recipe].of_one_process("ema")
    for name in ("train/loss", "eval/loss"):
        assert metric(tmp_path / "run", name) == pytest.approx(metric(other, name), rel=3e-3)
    expected = weights(other)
    assert all(value.dtype == expected[name].dtype for name, value in weights(tmp_path / "run").items())


@pytest.mark.slow
@pytest.mark.parametrize("recipe", FIELDS)
def test_bad_update_on_one_process_is_skipped_on_all(runs: dict[str, Runs], tmp_path: Path, recipe: str) -> None:
    status, output = runs[recipe].run("multi_cpu", tmp_path / "run", runs[recipe].fields["ema"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())
