import itertools
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin
from PIL import Image
from pyarrow import parquet

from shared import command_line as cli
from shared.data.batches import IGNORED
from shared.images import captioned, labelled
from shared.images.crops import CenterCrops
from shared.images.streaming import open_image_stream
from shared.models.batch_statistics import RunningStatistics
from shared.models.export import export_model
from shared.models.resnet import build_processor
from tests.conftest import ROOT
from tests.launching import preloaded_python
from tests.recipes.runs import (
    assert_same_weights,
    metrics_of,
    push_and_load,
    results_of,
    run,
    run_card,
    state_at,
    weights,
)

TINY = {
    "image_size": 12,
    "final_image_size": 16,
    "eval_image_size": 16,
    "min_crop_area": 0.5,
    "depths": "1,1",
    "hidden_sizes": "8,16",
    "embedding_size": 8,
    "global_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 0.2,
    "ema_decay": 0.5,
    "log_every": 1,
    "num_workers": 0,
}
NAMES = ("high", "low", "middle")


def config_of(resnet: ModuleType, data: Path, run_dir: Path, **fields: Any) -> Any:
    return resnet.Config(**{**TINY, "data": str(data), "output_dir": str(run_dir), **fields})


@pytest.fixture(scope="module")
def reference(resnet: ModuleType, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over more than two epochs that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(resnet, config_of(resnet, shapes, run_dir, save_every=1, keep_checkpoints=100))
    return run_dir


# -- data --------------------------------------------------------------------------------------------------------------


def test_the_side_grows_in_steps_and_ends_at_the_final_one(resnet: ModuleType) -> None:
    growth = {"size_multiple": 32, "grow_from": 0.6, "grow_until": 0.8}
    cfg = resnet.Config(image_size=160, final_image_size=192, max_steps=100, **growth)
    sides = [resnet.image_size_at(cfg, step) for step in range(100)]
    assert sides == [160] * 70 + [192] * 30
    small = [resnet.image_size_at(resnet.Config(max_steps=100), step) for step in range(100)]
    assert set(small) == {20, 24, 28}
    assert small[80:] == [28] * 20


def test_updates_are_a_function_of_seed_and_step(resnet: ModuleType, shapes: Path, tmp_path: Path) -> None:
    """From any step on the same crops come, in micro-batches, of the side of their update."""
    cfg = config_of(resnet, shapes, tmp_path, global_batch_size=13)
    accelerator = Accelerator(cpu=True)
    train, _ = resnet.open_data(cfg, accelerator)

    def updates(cfg: Any, step: int) -> list[list[torch.Tensor]]:
        opened = resnet.open_updates(cfg, accelerator, train, 4, step, [])
        return [[batch["pixel_values"] for batch in batches] for batches, _, _ in opened]

    whole, rest = updates(cfg, 0), updates(cfg, 7)
    assert (len(whole), len(rest)) == (12, 5)
    for step, batches in enumerate(whole):
        assert [len(pixels) for pixels in batches] == [4, 4, 4, 1]
        assert all(pixels.shape[1] == resnet.image_size_at(cfg, step) for pixels in batches)
    assert all(torch.equal(*pair) for a, b in zip(whole[7:], rest, strict=True) for pair in zip(a, b, strict=True))
    assert not torch.equal(updates(replace(cfg, seed=1), 0)[0][0], whole[0][0])


@pytest.mark.slow
def test_damaged_images_are_replaced_the_same_way(resnet: ModuleType, shapes: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    damaged = tmp_path / "data" / "train" / "high" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:200])
    (tmp_path / "data" / "test" / "high" / "0.png").write_bytes(b"")
    fields = {"max_bad_fraction": 0.1, "max_steps": 6}
    run_dirs = [tmp_path / "one", tmp_path / "workers"]
    for run_dir, workers in zip(run_dirs, (0, 2), strict=True):
        run(resnet, config_of(resnet, tmp_path / "data", run_dir, num_workers=workers, **fields))
    assert results_of(run_dirs[0]) == results_of(run_dirs[1])
    assert_same_weights(*run_dirs)
    last = metrics_of(run_dirs[0])[-1]
    assert (last["train/bad_images"], last["eval/skipped"]) == (1, 1)
    with pytest.raises(cli.UsageError, match=r"max_bad_fraction: 0.01: expected .*high/3.png \(row"):
        run(resnet, config_of(resnet, tmp_path / "data", tmp_path / "strict", max_steps=6))
    # What was trained is not lost: with another share the same command goes on.
    run(resnet, config_of(resnet, tmp_path / "data", tmp_path / "strict", **fields))
    assert results_of(tmp_path / "strict") == results_of(run_dirs[0])


# -- model and objective -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layer_type", "hidden_sizes"), [("basic", "8,16"), ("bottleneck", "32,64")])
def test_initial_loss_is_that_of_a_uniform_guess(resnet: ModuleType, layer_type: str, hidden_sizes: str) -> None:
    cfg = resnet.Config(**{**TINY, "layer_type": layer_type, "hidden_sizes": hidden_sizes})
    model = resnet.build_model(cfg, tuple("abcdefghij")).train()
    batch = uint8_batch(64, 32, 10)
    logits = resnet.forward(model, batch["pixel_values"], 1)
    loss = resnet.loss_sum(logits, batch["labels"], 0.0).item() / 64
    assert loss == pytest.approx(np.log(10), abs=0.35)


def uint8_batch(number: int, side: int, classes: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(256, (number, side, side, 3), generator=generator, dtype=torch.uint8)
    return {"pixel_values": pixels, "labels": torch.randint(classes, (number,), generator=generator)}


def test_what_ffcv_s_runs_have_otherwise(resnet: ModuleType) -> None:
    """Leclerc et al. 2023: a line from the end of the warm-up, plain momentum, norms that all begin at 1."""
    usual = resnet.Config(**TINY)
    cfg = replace(usual, schedule="linear", nesterov=False, zero_init_residual=False, max_steps=10, warmup_steps=2)
    assert [resnet.learning_rate_factor(cfg, step) for step in (2, 6, 10)] == [1.0, 0.5, 0.0]
    assert resnet.learning_rate_factor(replace(cfg, schedule="cosine"), 4) > 0.8
    model = resnet.build_model(cfg, NAMES)
    norms = [module.weight for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert all(bool((weight == 1).all()) for weight in norms)
    optimizers = [resnet.build_optimizer(some, model) for some in (cfg, usual)]
    assert [optimizer.param_groups[0]["nesterov"] for optimizer in optimizers] == [False, True]


def test_crops_are_enlarged_for_the_sample_alone_unless_told(resnet: ModuleType, resnet_rsb: ModuleType) -> None:
    for recipe in (resnet, resnet_rsb):
        cfgs = [recipe.Config(), recipe.Config(data="me/mine"), recipe.Config(data="me/mine", enlarge=3)]
        assert [recipe.enlargement(cfg) for cfg in cfgs] == [2, 1, 3]


def test_crops_are_not_mirrored_where_they_must_not_be(resnet: ModuleType, shapes: Path, tmp_path: Path) -> None:
    """The light of an image is on its left, in its mirror image on its right."""
    for mirrored in (True, False):
        cfg = config_of(resnet, shapes, tmp_path, mirrored=mirrored, min_crop_area=1.0)
        train, _ = resnet.open_data(cfg, Accelerator(cpu=True))
        opened = resnet.open_updates(cfg, Accelerator(cpu=True), train, 8, 0, [])
        pixels = [batch["pixel_values"].float() for batches, _, _ in opened for batch in batches]
        sides = torch.cat([some.mean((1, 3)) for some in pixels if some.shape[1] == 16])  # (N, 16) by column
        is_right = sides[:, 10:].mean(1) > sides[:, :6].mean(1)
        assert bool(is_right.any()) is mirrored


def test_blocks_begin_as_their_shortcuts(resnet: ModuleType) -> None:
    model = resnet.build_model(resnet.Config(**{**TINY, "depths": "2,2"}), NAMES)
    for stage in model.resnet.encoder.stages:
        block = stage.layers[1]
        pixels = torch.rand(2, block.layer[0].convolution.in_channels, 5, 5)
        assert torch.equal(block(pixels), pixels)  # no negative values, which the ReLU would cut


def test_weights_are_in_the_library_s_class_and_loss(resnet: ModuleType) -> None:
    """Against `ResNetForImageClassification`'s own loss on images of its own processor."""
    cfg = resnet.Config(**TINY)
    model = resnet.build_model(cfg, NAMES).eval()
    batch = uint8_batch(4, 32, 3)
    images = [Image.fromarray(pixels.numpy()) for pixels in batch["pixel_values"]]
    inputs = build_processor(32, 1.0)(images, return_tensors="pt")
    expected = model(**inputs, labels=batch["labels"])
    logits = resnet.forward(model, batch["pixel_values"], 1)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-5, atol=1e-5)
    loss = resnet.loss_sum(logits, batch["labels"], 0.0) / 4
    assert loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_smoothed_loss_is_that_of_the_paper(resnet: ModuleType) -> None:
    """Szegedy et al. 2016, section 7: the target is (1 - e) of the label and e spread over all classes."""
    logits, labels = torch.randn(6, 5), torch.tensor([0, 4, 2, IGNORED, 1, 3])
    target = torch.full((6, 5), 0.1 / 5)
    target[range(6), labels.clamp(min=0)] += 0.9
    expected = -(target * logits.log_softmax(-1)).sum(-1)[labels != IGNORED].sum()
    torch.testing.assert_close(resnet.loss_sum(logits, labels, 0.1), expected)


def test_decay_spares_norms_and_biases(resnet: ModuleType) -> None:
    model = resnet.build_model(resnet.Config(**TINY), NAMES)
    decayed, spared = resnet.build_optimizer(resnet.Config(**TINY), model).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 5e-4
    assert spared["weight_decay"] == 0
    assert all("convolution" in names[id(p)] or names[id(p)] == "classifier.1.weight" for p in decayed["params"])
    assert all("normalization" in names[id(p)] or names[id(p)] == "classifier.1.bias" for p in spared["params"])
    assert len(decayed["params"]) + len(spared["params"]) == len(names)


def prepared(resnet: ModuleType, cfg: Any, accumulation: int, dtype: torch.dtype) -> Any:
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = resnet.build_model(cfg, NAMES).to(dtype)
    return accelerator, *accelerator.prepare(model, resnet.build_optimizer(cfg, model))


def test_one_batch_is_overfitted(resnet: ModuleType) -> None:
    cfg = resnet.Config(**{**TINY, "label_smoothing": 0.0, "learning_rate": 0.05})
    accelerator, model, optimizer = prepared(resnet, cfg, 1, torch.float32)
    statistics, batch = RunningStatistics(model), uint8_batch(8, 32, 3)
    losses = [float(resnet.train_update(cfg, accelerator, model, optimizer, statistics, [batch])[0]) for _ in range(60)]
    assert losses[-1] < 0.02 < losses[0]


def test_accumulation_is_exact(resnet: ModuleType) -> None:
    """With statistics of the batch held still: a batch of 8 is two of 4 is 8 of 1, to 1e-12."""
    cfg = resnet.Config(**{**TINY, "max_grad_norm": 0.1})
    results = []
    for size in (8, 4, 1):
        accelerator, model, optimizer = prepared(resnet, cfg, 8 // size, torch.float64)
        model.eval()  # else batch normalisation sees its micro-batch: the stated exception
        batch = uint8_batch(8, 32, 3)
        batches = [{name: rows[start : start + size] for name, rows in batch.items()} for start in range(0, 8, size)]
        to_double(resnet, model)
        loss, norm = resnet.train_update(cfg, accelerator, model, optimizer, RunningStatistics(model), batches)
        results.append({"loss": loss, "norm": torch.tensor(norm), **model.state_dict()})
    for result in results[1:]:
        for name, value in result.items():
            if "running" not in name and "tracked" not in name:
                torch.testing.assert_close(value.double(), results[0][name].double(), rtol=1e-12, atol=1e-12)


def to_double(resnet: ModuleType, model: Any) -> None:
    """Pixels reach the model in float32."""
    model.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {"pixel_values": kwargs["pixel_values"].double()}), with_kwargs=True
    )


def test_non_finite_gradient_changes_nothing(resnet: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = resnet.Config(**TINY)
    accelerator, model, optimizer = prepared(resnet, cfg, 1, torch.float32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    forward = resnet.forward
    monkeypatch.setattr(resnet, "forward", lambda *args: forward(*args) * float("nan"))
    _, norm = resnet.train_update(cfg, accelerator, model, optimizer, RunningStatistics(model), [uint8_batch(8, 32, 3)])
    assert not np.isfinite(norm)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before if "tracked" not in name)


# -- the run -----------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_what_the_ecosystem_reads(reference: Path, shapes: Path) -> None:
    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert entries[-1]["train/loss"] < entries[0]["train/loss"] - 0.2
    assert [entry["train/image_size"] for entry in entries][::11] == [12, 16]
    processor = transformers.AutoImageProcessor.from_pretrained(reference)
    assert processor.crop_size == {"height": 16, "width": 16}
    model, loading = transformers.AutoModelForImageClassification.from_pretrained(reference, output_loading_info=True)
    assert type(model) is transformers.ResNetForImageClassification
    assert not loading["missing_keys"]
    assert model.config.id2label == dict(enumerate(NAMES))
    classify = transformers.pipeline("image-classification", str(reference))
    assert {answer["label"] for answer in classify(str(next((shapes / "test").rglob("*.png"))))} == set(NAMES)
    for name in ("README.md", "config.yaml", "run.json", "recipe.py", "figures/loss.png", "samples/step_00000012.txt"):
        assert (reference / name).stat().st_size > 0, name
    card = (reference / "README.md").read_text()
    assert f"{entries[-1]['eval/top1']:.4f}" in card
    for name in ("confusion_matrix.png", "surest_mistakes.png"):
        assert f"(figures/{name})" in card
        assert Image.open(reference / "figures" / name).size[0] > 100


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_evaluation_counts_every_image_once_as_the_pipeline_does(reference: Path, shapes: Path) -> None:
    """Against the library's own model and processor, one file at a time."""
    model = transformers.AutoModelForImageClassification.from_pretrained(reference)
    processor = transformers.AutoImageProcessor.from_pretrained(reference)
    loss, right, files = 0.0, 0, sorted((shapes / "test").rglob("*.png"))
    with torch.no_grad():
        for file in files:
            label = torch.tensor([NAMES.index(file.parent.name)])
            output = model(**processor(Image.open(file).convert("RGB"), return_tensors="pt"), labels=label)
            loss += output.loss.item()
            right += int(output.logits.argmax() == label)
    last = metrics_of(reference)[-1]
    assert len(files) == 21
    assert last["eval/loss"] == pytest.approx(loss / 21, rel=1e-4)
    assert last["eval/top1"] == pytest.approx(right / 21)
    assert last["eval/top5"] == 1
    assert last["eval/skipped"] == 0


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve images that are wider or higher than square, of every mode that becomes RGB, one turned by EXIF."""
    folder, draw = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    kinds = [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "png"), ("RGBA", "png"), ("RGB", "webp")]
    for index, (mode, suffix) in enumerate(kinds * 2):
        rough = Image.fromarray(draw.integers(0, 255, (6, 5, 3), dtype=np.uint8))
        image = rough.resize(((640, 400), (300, 550))[index % 2], Image.Resampling.BICUBIC).convert(mode)
        if mode == "RGBA":
            image.putalpha(image.getchannel("R"))
        exif = Image.Exif()
        exif[0x0112] = 6 if index == 0 else 1  # a quarter turn
        file = folder / "test" / NAMES[index % 3] / f"{index}.{suffix}"
        file.parent.mkdir(parents=True, exist_ok=True)
        image.save(file, exif=exif)
    return folder


@pytest.mark.parametrize(("size", "fraction"), [(24, 1.0), (176, 0.875), (224, 0.95), (384, 1.0), (512, 0.875)])
def test_the_exported_pipeline_answers_as_the_evaluation_does(
    resnet: ModuleType, photographs: Path, tmp_path: Path, size: int, fraction: float
) -> None:
    """To the image, at the sizes at which people train; the library's own processor warps from 384 pixels on."""
    accelerator, cfg = Accelerator(cpu=True), config_of(resnet, photographs, tmp_path, depths="1", hidden_sizes="8")
    columns = {"config": "", "image_column": "", "label_column": ""}
    held_out = labelled.open_images(str(photographs), split="test", **columns)
    model = resnet.build_model(cfg, NAMES)
    torch.nn.init.normal_(model.classifier[1].weight)
    _, answers = resnet.evaluate(cfg, accelerator, model, CenterCrops(held_out, size, fraction, 5))
    assert np.ptp(answers.probabilities) > 0.01  # or the same answer would do for all
    export_model(accelerator, model, build_processor(size, fraction), tmp_path)
    classify = transformers.pipeline("image-classification", str(tmp_path))
    for index, guess, probability in zip(answers.indices, answers.guesses[:, 0], answers.probabilities, strict=True):
        [name] = [file for file in photographs.rglob("*.*") if held_out.files.read(index) == file.read_bytes()]
        first = classify(str(name))[0]
        assert (first["label"], first["score"]) == (NAMES[guess], pytest.approx(probability, abs=1e-4))


def test_the_average_is_what_is_saved(resnet: ModuleType, shapes: Path, reference: Path, tmp_path: Path) -> None:
    run(resnet, config_of(resnet, shapes, tmp_path / "run", ema_decay=0.0))
    averaged, plain = weights(reference), weights(tmp_path / "run")
    assert [entry["train/loss"] for entry in metrics_of(reference)] == [
        entry["train/loss"] for entry in metrics_of(tmp_path / "run")
    ]
    names = ("resnet.embedder.embedder.convolution.weight", "resnet.embedder.embedder.normalization.running_mean")
    assert not any(torch.equal(averaged[name], plain[name]) for name in names)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_resuming_is_exact_to_the_bit(
    resnet: ModuleType, shapes: Path, reference: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    run(resnet, config_of(resnet, shapes, run_dir, save_every=1, keep_checkpoints=100, num_workers=workers))
    assert results_of(run_dir) == results_of(reference)
    assert_same_weights(run_dir, reference)


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_streaming_learns_and_resumes_to_the_bit(
    resnet: ModuleType, shapes: Path, tmp_path: Path, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With windows of 45 images, of which updates of 8 leave some; a damaged one is passed over and counted."""
    monkeypatch.setattr("shared.images.streaming.WINDOW", 45)
    shutil.copytree(shapes, tmp_path / "data")
    (tmp_path / "data" / "train" / "low" / "5.png").write_bytes(b"no image")
    fields = {"streaming": True, "max_steps": 40, "save_every": 1, "keep_checkpoints": 100, "num_workers": workers}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(resnet, config_of(resnet, tmp_path / "data", whole, **fields))
    state_at(whole, 7, stopped)
    run(resnet, config_of(resnet, tmp_path / "data", stopped, **fields))
    assert results_of(stopped) == results_of(whole)
    assert_same_weights(stopped, whole)
    entries = metrics_of(whole)
    assert np.mean([entry["train/loss"] for entry in entries[-5:]]) < 0.8 < entries[0]["train/loss"] - 0.2
    assert entries[-1]["train/bad_images"] == 1


def test_a_stream_of_no_images_ends(resnet: ModuleType, shapes: Path, tmp_path: Path) -> None:
    for file in (shapes / "train").rglob("*.png"):
        (tmp_path / "data" / "train" / file.parent.name).mkdir(parents=True, exist_ok=True)
        (tmp_path / "data" / "train" / file.parent.name / file.name).write_bytes(b"no image")
    broken = config_of(resnet, tmp_path / "data", tmp_path / "run", streaming=True)
    columns = {"image_column": "", "label_column": ""}
    stream = open_image_stream(broken.data, config="", split="train", **columns)
    with pytest.raises(cli.UsageError, match="expected images that can be decoded"):
        next(resnet.open_updates(broken, Accelerator(cpu=True), stream, 8, 0, []))


def test_a_stream_without_another_split_holds_some_out(resnet: ModuleType, shapes: Path, tmp_path: Path) -> None:
    cfg = config_of(resnet, shapes / "train", tmp_path, eval_fraction=0.2, streaming=True)
    train, held_out = resnet.open_data(cfg, Accelerator(cpu=True))
    files = {image.data for image in train}
    assert len(files) + len(held_out) == 39
    assert not files & {held_out.files.read(index) for index in range(len(held_out))}
    run(resnet, replace(cfg, dry_run=True))


def test_training_goes_on_from_weights_with_other_classes(
    resnet: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(shapes, tmp_path / "data")
    for split in ("train", "test"):
        shutil.rmtree(tmp_path / "data" / split / "middle")
    fields = {"init": str(reference), "max_steps": 1, "learning_rate": 1e-9, "ema_decay": 0.0}
    run(resnet, config_of(resnet, tmp_path / "data", tmp_path / "run", **fields))
    after, before = weights(tmp_path / "run"), weights(reference)
    assert after["classifier.1.weight"].shape == (2, 16)
    name = "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"
    torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-6)


def test_images_are_held_out_where_there_is_no_split(resnet: ModuleType, shapes: Path, tmp_path: Path) -> None:
    cfg = config_of(resnet, shapes / "train", tmp_path, eval_fraction=0.2)
    train, held_out = resnet.open_data(cfg, Accelerator(cpu=True))
    assert (len(train), len(held_out)) == (30, 9)
    files = [{images.files.name(index) for index in range(len(images))} for images in (train, held_out)]
    assert not files[0] & files[1]


def test_the_split_to_evaluate_on_may_lack_classes(resnet: ModuleType, tmp_path: Path) -> None:
    split = "test_unseen_combination"
    cfg = config_of(resnet, captioned.SAMPLE, tmp_path, label_column="name", eval_split=split)
    train, held_out = resnet.open_data(cfg, Accelerator(cpu=True))
    table = parquet.read_table(next((captioned.SAMPLE / "data").glob(f"{split}-*")), columns=["name"])
    assert [train.class_names[label] for label in held_out.labels] == table["name"].to_pylist()
    assert held_out.class_names == train.class_names
    assert len(set(held_out.labels.tolist())) < len(train.class_names)


@pytest.mark.parametrize("goes_on", [False, True])
def test_dry_run_leaves_nothing(
    resnet: ModuleType, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: Path, goes_on: bool
) -> None:
    fields = {"init": str(reference), "learning_rate": 0.01} if goes_on else {}
    run(resnet, config_of(resnet, shapes, tmp_path / "run", dry_run=True, **fields))
    printed = capsys.readouterr().out
    for row in ("parameters", "memory: total", "one checkpoint", "all updates", "one evaluation"):
        assert row in printed
    [grid_file] = re.findall("model sees them: (.*)", printed)
    grid = Path(grid_file)
    assert Image.open(grid).size[0] > 100
    shutil.rmtree(grid.parent)
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_goes_on(shapes: Path, tmp_path: Path) -> None:
    fields = {**TINY, "max_steps": 600, "data": shapes, "output_dir": tmp_path / "run", "num_workers": 1}
    command = [
        *preloaded_python(),
        str(ROOT / "recipes/resnet/pretrain.py"),
        *(f"--{k}={v}" for k, v in fields.items()),
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd="/") as process:
        assert process.stdout is not None
        assert any(line.startswith("step 3/") for line in process.stdout)
        process.send_signal(signal.SIGTERM)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == cli.EXIT_STOPPED
    assert errors.strip().splitlines()[-1].startswith("stopped: saved at step")
    saved = [entry["step"] for entry in metrics_of(tmp_path / "run")]
    assert saved == list(range(1, len(saved) + 1))


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    resnet: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    """The Hub refuses two commits on the way; the run is the same as without a push, and the token shows nowhere."""
    fields = {**TINY, "data": shapes, "push_every": 6}
    image = next((shapes / "test").rglob("*.png"))
    program = f"print(pipeline('image-classification', 'tester/mine')({str(image)!r})[0]['label'])"
    answer, pushed = push_and_load(resnet, fields, program, tmp_path)
    assert answer.strip() in NAMES
    assert_same_weights(tmp_path / "run", reference)
    figures = {"figures/loss.png", "figures/confusion_matrix.png", "figures/surest_mistakes.png"}
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md", *figures} <= pushed


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    resnet: ModuleType, shapes: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    one = tmp_path / "one" / "train"
    shutil.copytree(shapes / "train" / "high", one / "high")
    different = tmp_path / "different"
    shutil.copytree(shapes, different)
    (different / "test" / "high").rename(different / "test" / "up")
    cases = {
        "data: '/no/such/folder'": {"data": "/no/such/folder"},
        "expected a .parquet or .tar file, or a folder": {"data": str(tmp_path / "empty")},
        "expected at least two classes, got 1: high": {"data": str(one)},
        "expected images of at least 30 pixels, the size of the crops": {"final_image_size": 30},
        "data_split: 'dev': expected one of train, test": {"data_split": "dev"},
        "expected images of each class, got none of up": {"data": str(different)},
        "depths: '1,x': expected comma-separated whole numbers": {"depths": "1,x"},
        "hidden_sizes: '8': expected as many numbers as depths has: 2": {"hidden_sizes": "8"},
        "final_image_size: 8: expected at least image_size": {"final_image_size": 8},
        "min_crop_area: 0.0": {"min_crop_area": 0.0},
        "grow_from: 0.9: expected a share in [0, grow_until)": {"grow_from": 0.9},
        "gradient_checkpointing: True: expected False": {"gradient_checkpointing": True},
        "label_smoothing: 1.0": {"label_smoothing": 1.0},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "init: '/no/model'": {"init": "/no/model"},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(resnet, config_of(resnet, **{"data": shapes, "run_dir": tmp_path / "run", **fields_for(fields)}))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def fields_for(fields: dict[str, Any]) -> dict[str, Any]:
    """`output_dir` is the run folder of `config_of`."""
    return {("run_dir" if name == "output_dir" else name): value for name, value in fields.items()}


def test_help_is_quick() -> None:
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes/resnet/pretrain.py"), "--help"], capture_output=True, text=True, check=True
    )
    assert time.monotonic() - started < 30  # the README's number is 3 s; a loaded machine must not fail the test
    for field in itertools.chain(TINY, ("data", "max_bad_fraction")):
        assert field in done.stdout.replace("-", "_")
