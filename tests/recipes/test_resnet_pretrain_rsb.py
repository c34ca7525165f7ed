"""What the long recipe has that the short one has not; test_resnet_pretrain.py tests what both share."""

from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator

from shared import command_line as cli
from shared.models.batch_statistics import RunningStatistics
from tests.recipes.runs import assert_same_weights, metrics_of, results_of, run, run_card, state_at
from tests.recipes.test_resnet_pretrain import NAMES, prepared, uint8_batch
from tests.recipes.test_resnet_pretrain import TINY as SHORT

OF_THE_SHORT = ("final_image_size", "ema_decay")
TINY: dict[str, Any] = {
    **{name: value for name, value in SHORT.items() if name not in OF_THE_SHORT},
    "image_size": 16,
    "learning_rate": 0.02,
    "repeats": 3,
    "stochastic_depth": 0.2,
}


def config_of(recipe: ModuleType, data: Path, run_dir: Path, **fields: Any) -> Any:
    return recipe.Config(**{**TINY, "data": str(data), "output_dir": str(run_dir), **fields})


@pytest.fixture(scope="module")
def reference(resnet_rsb: ModuleType, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(resnet_rsb, config_of(resnet_rsb, shapes, run_dir, save_every=1, keep_checkpoints=100))
    return run_dir


# -- data --------------------------------------------------------------------------------------------------------------


def test_updates_have_the_repeats_and_the_augmentation_asked_for(
    resnet_rsb: ModuleType, shapes: Path, tmp_path: Path
) -> None:
    """39 images, 9 crops an update: 13 updates are an epoch of 117 crops."""
    accelerator = Accelerator(cpu=True)
    fields = {"global_batch_size": 9, "max_steps": 13, "rand_augment_operations": 0}
    cfg = config_of(resnet_rsb, shapes, tmp_path, **fields)
    train, _ = resnet_rsb.open_data(cfg, accelerator)

    def updates(step: int, **changed: Any) -> list[list[dict[str, torch.Tensor]]]:
        opened = resnet_rsb.open_updates(replace(cfg, **changed), accelerator, train, 4, step, [])
        return [batches for batches, _, _ in opened]

    def labels(found: list[list[dict[str, torch.Tensor]]]) -> list[int]:
        return [label for batches in found for batch in batches for label in batch["labels"].tolist()]

    whole = updates(0)
    assert [len(batch["labels"]) for batch in whole[0]] == [4, 4, 1]
    in_order = labels(whole)
    assert in_order[::3] == in_order[1::3] == in_order[2::3]
    assert np.bincount(in_order).tolist() == [39] * 3
    assert labels(updates(9)) == in_order[9 * 9 :]
    augmented = updates(0, rand_augment_operations=2)
    assert labels(augmented) == in_order
    assert not torch.equal(augmented[0][0]["pixel_values"], whole[0][0]["pixel_values"])


# -- model and objective -----------------------------------------------------------------------------------------------


def test_mixup_blends_and_cutmix_pastes(resnet_rsb: ModuleType) -> None:
    pixels = uint8_batch(6, 16, 3)["pixel_values"]
    partners, shares = pixels.flip(0), []
    for seed in range(50):
        blended, share = resnet_rsb.mix(pixels, 0.5, 0.0, np.random.default_rng(seed))
        torch.testing.assert_close(blended, share * pixels.float() + (1 - share) * partners.float())
        pasted, share = resnet_rsb.mix(pixels, 0.0, 1.0, np.random.default_rng(seed))
        is_own, is_partner = (pasted == pixels).all(-1), (pasted == partners).all(-1)
        assert bool((is_own | is_partner).all())
        assert is_own.float().mean().item() == pytest.approx(share)
        shares.append(share)
    assert min(shares) < 0.3
    assert max(shares) > 0.9
    untouched, share = resnet_rsb.mix(pixels, 0.0, 0.0, np.random.default_rng(0))
    assert torch.equal(untouched, pixels)
    assert share == 1
    assert torch.equal(pixels, uint8_batch(6, 16, 3)["pixel_values"])


def test_both_kinds_of_mixing_happen(resnet_rsb: ModuleType) -> None:
    pixels = uint8_batch(2, 8, 3)["pixel_values"]
    kinds = [resnet_rsb.mix(pixels, 0.1, 1.0, np.random.default_rng(seed))[0].dtype for seed in range(200)]
    assert 0.5 - 0.15 < np.mean([kind == torch.uint8 for kind in kinds]) < 0.5 + 0.15


def test_targets_are_the_classes_above_the_threshold(resnet_rsb: ModuleType) -> None:
    labels = torch.tensor([0, 1, 2, 2])
    own, partner = torch.eye(3)[labels], torch.eye(3)[labels.flip(0)]
    assert torch.equal(resnet_rsb.mixed_targets(labels, 1.0, 3, 0.2), own)
    assert torch.equal(resnet_rsb.mixed_targets(labels, 0.9, 3, 0.2), own)
    assert torch.equal(resnet_rsb.mixed_targets(labels, 0.1, 3, 0.2), partner)
    assert torch.equal(resnet_rsb.mixed_targets(labels, 0.9, 3, 0.0), (own + partner).clamp(max=1))
    assert torch.equal(resnet_rsb.mixed_targets(labels, 0.3, 3, 0.2), (own + partner).clamp(max=1))


def test_loss_is_binary_cross_entropy_of_every_class(resnet_rsb: ModuleType) -> None:
    logits, targets = torch.randn(5, 4), (torch.rand(5, 4) < 0.4).float()
    likely = targets * 0.9 + 0.1 / 4
    expected = -(likely * logits.sigmoid().log() + (1 - likely) * (1 - logits.sigmoid()).log()).mean(-1).sum()
    torch.testing.assert_close(resnet_rsb.loss_sum(logits, targets, 0.1), expected)


def test_blocks_are_skipped_at_random_and_never_in_evaluation(resnet_rsb: ModuleType) -> None:
    depth, branch = resnet_rsb.StochasticDepth(0.25), torch.ones(20_000, 1, 2, 2)
    torch.manual_seed(0)
    skipped = depth.train()(branch)
    assert skipped.unique().tolist() == [0, pytest.approx(4 / 3)]
    assert torch.equal(skipped.amin((1, 2, 3)), skipped.amax((1, 2, 3)))
    assert skipped.mean().item() == pytest.approx(1, abs=0.02)
    assert torch.equal(depth.eval()(branch), branch)


def test_weights_are_those_of_the_library_s_class(resnet_rsb: ModuleType) -> None:
    cfg = resnet_rsb.Config(**{**TINY, "depths": "2,2"})
    model = resnet_rsb.build_model(cfg, NAMES)
    shares = [block.layer[-1]._share for stage in model.resnet.encoder.stages for block in stage.layers]
    assert shares == pytest.approx([0.05, 0.1, 0.15, 0.2])
    library = transformers.ResNetForImageClassification(model.config)
    library.load_state_dict(model.state_dict())
    batch = uint8_batch(4, 32, 3)
    model.eval()
    inputs = {"pixel_values": torch.rand(2, 3, 32, 32)}
    torch.testing.assert_close(model(**inputs).logits, library.eval()(**inputs).logits)
    assert resnet_rsb.forward(model, batch["pixel_values"], 2).shape == (4, 3)


def test_one_batch_is_overfitted(resnet_rsb: ModuleType) -> None:
    plain = {"mixup_alpha": 0.0, "cutmix_alpha": 0.0, "stochastic_depth": 0.0, "learning_rate": 0.05}
    cfg = resnet_rsb.Config(**{**TINY, **plain})
    accelerator, model, optimizer = prepared(resnet_rsb, cfg, 1, torch.float32)
    statistics, batch = RunningStatistics(model), uint8_batch(8, 32, 3)
    losses = [
        float(resnet_rsb.train_update(cfg, accelerator, model, optimizer, statistics, [batch], step)[0])
        for step in range(80)
    ]
    assert losses[-1] < 0.05 < losses[0]


# -- the run -----------------------------------------------------------------------------------------------------------


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_run_learns_and_loads(reference: Path, shapes: Path) -> None:
    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert np.mean([entry["train/loss"] for entry in entries[-4:]]) < entries[0]["train/loss"] - 0.05
    classify = transformers.pipeline("image-classification", str(reference))
    assert {answer["label"] for answer in classify(str(next((shapes / "test").rglob("*.png"))))} == set(NAMES)


@pytest.mark.parametrize(("stop", "workers"), [(1, 0), (5, 2), (10, 0)])
def test_resuming_is_exact_to_the_bit(
    resnet_rsb: ModuleType, shapes: Path, reference: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    run(resnet_rsb, config_of(resnet_rsb, shapes, run_dir, save_every=1, keep_checkpoints=100, num_workers=workers))
    assert results_of(run_dir) == results_of(reference)
    assert_same_weights(run_dir, reference)


def test_streaming_resumes_to_the_bit(
    resnet_rsb: ModuleType, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates of 8 end within the three crops of an image."""
    monkeypatch.setattr("shared.images.streaming.WINDOW", 10)
    fields = {"streaming": True, "save_every": 1, "keep_checkpoints": 100}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(resnet_rsb, config_of(resnet_rsb, shapes, whole, **fields))
    state_at(whole, 7, stopped)
    run(resnet_rsb, config_of(resnet_rsb, shapes, stopped, **fields, num_workers=1))
    assert results_of(stopped) == results_of(whole)
    assert_same_weights(stopped, whole)


@pytest.mark.parametrize("goes_on", [False, True])
def test_dry_run_leaves_nothing(
    resnet_rsb: ModuleType,
    shapes: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: Path,
    goes_on: bool,
) -> None:
    fields = {"init": str(reference), "learning_rate": 0.01} if goes_on else {}
    run(resnet_rsb, config_of(resnet_rsb, shapes, tmp_path / "run", dry_run=True, **fields))
    printed = capsys.readouterr().out
    for row in ("parameters", "memory: total", "one checkpoint", "all updates", "one evaluation", "model sees them"):
        assert row in printed
    assert not (tmp_path / "run").exists()


def test_bad_input_gets_one_line_and_writes_nothing(resnet_rsb: ModuleType, shapes: Path, tmp_path: Path) -> None:
    cases = {
        "repeats: 0: expected at least 1": {"repeats": 0},
        "rand_augment_magnitude: 11.0: expected from 0 to 10": {"rand_augment_magnitude": 11.0},
        "mixup_alpha: -0.1: expected at least 0": {"mixup_alpha": -0.1},
        "target_threshold: 0.5: expected a share in": {"target_threshold": 0.5},
        "stochastic_depth: 1.0: expected a share in": {"stochastic_depth": 1.0},
        "expected images of at least 30 pixels, the size of the crops": {"image_size": 30},
    }
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(resnet_rsb, config_of(resnet_rsb, shapes, tmp_path / "run", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()
