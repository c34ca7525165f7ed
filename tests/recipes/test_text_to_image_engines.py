"""The text-to-image recipes under every engine that two CPU processes can run, against one process."""

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.launching import assert_no_traceback
from tests.recipes.runs import Runs, assert_same, metric, weights
from tests.recipes.test_text_to_image_pretrain import TINY as DIFFUSION_SIZES
from tests.recipes.test_text_to_image_pretrain_transformer import TINY as TRANSFORMER_SIZES
from tests.recipes.test_text_to_image_train_vae import TINY as SIZES

# Adam makes a step of full size from a gradient that is zero but for rounding, so the rate is small.
TINY: dict[str, Any] = {**SIZES, "max_steps": 6, "save_every": 3, "learning_rate": 0.002, "max_grad_norm": 0.5}
DIFFUSION: dict[str, Any] = {**DIFFUSION_SIZES, "max_steps": 6, "save_every": 3, "learning_rate": 0.0002}
TRANSFORMER: dict[str, Any] = {**TRANSFORMER_SIZES, "max_steps": 6, "save_every": 3, "learning_rate": 0.002}
# The average needs whole weights, which ZeRO-3 has not.
FIELDS = {"ema": TINY, "plain": {**TINY, "ema_decay": 0.0}}
DIFFUSION_FIELDS = {"ema": DIFFUSION, "plain": {**DIFFUSION, "ema_decay": 0.0}}
TRANSFORMER_FIELDS = {"ema": TRANSFORMER, "plain": {**TRANSFORMER, "ema_decay": 0.0}}
ENGINES = [("multi_cpu", "ema"), ("fsdp2", "ema"), ("deepspeed_zero2", "ema"), ("deepspeed_zero3", "plain")]
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def runs(vae: ModuleType, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(vae, FIELDS, shapes, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def diffusion_runs(
    pretrain: ModuleType, latents: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    fields = {kind: {**values, "vae": str(tiny_vae)} for kind, values in DIFFUSION_FIELDS.items()}
    return Runs(pretrain, fields, latents, tmp_path_factory.mktemp("diffusion_engines"))


@pytest.fixture(scope="module")
def transformer_runs(
    pretrain_transformer: ModuleType, latents: Path, tiny_vae: Path, tmp_path_factory: pytest.TempPathFactory
) -> Runs:
    fields = {kind: {**values, "vae": str(tiny_vae)} for kind, values in TRANSFORMER_FIELDS.items()}
    return Runs(pretrain_transformer, fields, latents, tmp_path_factory.mktemp("transformer_engines"))


@pytest.mark.parametrize(
    ("engine", "kind"), [ENGINES[0], *(pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES[1:])]
)
def test_engine_equals_one_process(runs: Runs, engine: str, kind: str) -> None:
    import diffusers

    run_dir = runs.of_engine(engine, kind)
    other = runs.of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/psnr"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    assert metric(run_dir, "eval/ssim") == pytest.approx(metric(other, "eval/ssim"), abs=1e-4)
    for name, value in weights(run_dir).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=1e-5)
    exported = diffusers.AutoencoderKL.from_pretrained(run_dir).state_dict()
    assert all(torch.equal(exported[name], value) for name, value in weights(run_dir).items())


@pytest.mark.parametrize(
    ("engine", "kind"), [ENGINES[0], *(pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES[1:])]
)
def test_diffusion_under_an_engine_equals_one_process(diffusion_runs: Runs, engine: str, kind: str) -> None:
    run_dir, other = diffusion_runs.of_engine(engine, kind), diffusion_runs.of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/loss_test_band_0"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    expected = weights(other)
    for name, value in weights(run_dir).items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding alone
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), [("multi_cpu", "ema"), ("fsdp2", "ema"), ("deepspeed_zero2", "ema")])
def test_stopping_and_going_on_is_exact(runs: Runs, tmp_path: Path, engine: str, kind: str) -> None:
    whole, run_dir = runs.of_engine(engine, kind), tmp_path / "run"
    fields = {**FIELDS[kind], "save_every": 0}
    status, output = runs.run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 3 of 6" in output
    assert_no_traceback(output)
    status, output = runs.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_bad_update_on_one_process_is_skipped_on_all(runs: Runs, tmp_path: Path) -> None:
    status, output = runs.run("multi_cpu", tmp_path / "run", FIELDS["ema"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), [("multi_cpu", "ema"), ("fsdp2", "ema"), ("deepspeed_zero2", "ema")])
def test_stopping_diffusion_and_going_on_is_exact(diffusion_runs: Runs, tmp_path: Path, engine: str, kind: str) -> None:
    whole, run_dir = diffusion_runs.of_engine(engine, kind), tmp_path / "run"
    fields = {**diffusion_runs.fields[kind], "save_every": 0}
    status, output = diffusion_runs.run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 3 of 6" in output
    assert_no_traceback(output)
    status, output = diffusion_runs.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_bad_diffusion_update_on_one_process_is_skipped_on_all(diffusion_runs: Runs, tmp_path: Path) -> None:
    status, output = diffusion_runs.run("multi_cpu", tmp_path / "run", diffusion_runs.fields["ema"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())


@pytest.mark.parametrize(
    ("engine", "kind"), [ENGINES[0], *(pytest.param(*engine, marks=pytest.mark.slow) for engine in ENGINES[1:])]
)
def test_the_transformer_under_an_engine_equals_one_process(transformer_runs: Runs, engine: str, kind: str) -> None:
    run_dir, other = transformer_runs.of_engine(engine, kind), transformer_runs.of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss", "eval/loss_test_band_0"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    expected = weights(other)
    for name, value in weights(run_dir).items():
        if not name.endswith("k_proj.bias"):  # softmax does not see it: its gradient is rounding alone
            torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.parametrize(("engine", "kind"), [("multi_cpu", "ema"), ("fsdp2", "ema"), ("deepspeed_zero2", "ema")])
def test_stopping_the_transformer_and_going_on_is_exact(
    transformer_runs: Runs, tmp_path: Path, engine: str, kind: str
) -> None:
    whole, run_dir = transformer_runs.of_engine(engine, kind), tmp_path / "run"
    fields = {**transformer_runs.fields[kind], "save_every": 0}
    status, output = transformer_runs.run(engine, run_dir, fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 3 of 6" in output
    assert_no_traceback(output)
    status, output = transformer_runs.run(engine, run_dir, fields)
    assert status == 0, output
    assert_same(run_dir, whole)


@pytest.mark.slow
def test_bad_transformer_update_on_one_process_is_skipped_on_all(transformer_runs: Runs, tmp_path: Path) -> None:
    status, output = transformer_runs.run("multi_cpu", tmp_path / "run", transformer_runs.fields["ema"], POISON="2:1")
    assert status == 0, output
    assert metric(tmp_path / "run", "train/skipped_updates") == [0, 0, 1, 1, 1, 1]
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "run").values())
