"""Fine-tuning on images of other classes; what is exported is the best model, whatever stops the run."""

import io
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file, save_file

from shared import command_line as cli
from shared.data.batches import IGNORED
from shared.images.crops import CenterCrops
from shared.run.predictions import read_predictions
from tests.conftest import ROOT
from tests.hub_server import Repository, start_hub
from tests.recipes import engines
from tests.recipes.runs import Runs, assert_same, metric, metrics_of, push_and_load, run, run_card, weights

TINY: dict[str, Any] = {
    "image_size": 12,
    "eval_image_size": 16,
    "global_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 0.01,
    "log_every": 1,
    "eval_every": 3,
    "save_every": 3,
    "num_workers": 0,
}


def config_of(finetune: ModuleType, classifier: Path, images: Path, run_dir: Path, **fields: Any) -> Any:
    usual = {**TINY, "init": str(classifier), "data": str(images), "output_dir": str(run_dir)}
    return finetune.Config(**{**usual, **fields})


@pytest.fixture(scope="module")
def reference(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run over two epochs that kept every checkpoint."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(resnet_finetune, config_of(resnet_finetune, classifier, shapes, run_dir, save_every=1, keep_checkpoints=99))
    return run_dir


# -- learning ----------------------------------------------------------------------------------------------------------


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_other_classes_are_learnt_and_read_by_the_library(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path: Path
) -> None:
    fields = {"max_steps": 90, "eval_every": 30, "save_every": 0, "head_steps": 10, "layer_decay": 0.9}
    run(resnet_finetune, config_of(resnet_finetune, classifier, shapes, tmp_path, **fields))
    assert max(metric(tmp_path, "eval/accuracy")) >= 0.85
    pipeline = transformers.pipeline("image-classification", str(tmp_path))
    images = sorted((shapes / "test").glob("*/*.png"))
    right = [pipeline(str(image))[0]["label"] == image.parent.name for image in images]
    card = (tmp_path / "README.md").read_text()
    assert f"| `eval/accuracy` | {np.mean(right):.4f} |" in card
    assert np.mean(right) == max(metric(tmp_path, "eval/accuracy"))
    for name in ("figures/confusion_matrix.png", "figures/surest_mistakes.png", "figures/loss.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert "confusion_matrix.png" in card


def test_evaluation_counts_every_image_once(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, reference: Path
) -> None:
    """Against the library's model, one image at a time."""
    cfg = config_of(resnet_finetune, classifier, shapes, reference)
    held_out = resnet_finetune.open_data(cfg, Accelerator(cpu=True))[1]["eval"]
    model = transformers.AutoModelForImageClassification.from_pretrained(reference).eval()
    crops, losses, right = CenterCrops(held_out, 16, 1.0, 1), [], []
    statistics = resnet_finetune.statistics_of(cfg)
    with torch.no_grad():
        for index in range(len(held_out)):
            pixels = torch.from_numpy(crops.read(index)["pixel_values"].copy())[None]
            logits = resnet_finetune.forward(model, pixels, 1, statistics)[0]
            label = int(held_out.labels[index])
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(label)).item())
            right.append(int(logits.argmax()) == label)
    best = json.loads((reference / "run.json").read_text())["best_step"]
    [entry] = [entry for entry in metrics_of(reference) if entry["step"] == best]
    assert entry["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert entry["eval/accuracy"] == np.mean(right)
    assert entry["eval/balanced_accuracy"] == pytest.approx(np.mean(right))  # as many of each class


def test_the_head_learns_first(resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path: Path) -> None:
    fields = {"max_steps": 4, "warmup_steps": 0, "eval_every": 0, "save_every": 1, "keep_checkpoints": 9}
    run(resnet_finetune, config_of(resnet_finetune, classifier, shapes, tmp_path, head_steps=2, **fields))
    states = [load_file(tmp_path / f"checkpoints/step_{step:08d}/model.safetensors") for step in (1, 2, 3)]
    start = weights(classifier)
    for name, value in states[1].items():
        is_head, is_statistic = name.startswith("classifier"), "running" in name or "num_batches" in name
        if not is_statistic:
            changed = not torch.equal(states[0][name], value)
            assert changed == is_head, name
            if not is_head:
                assert torch.equal(start[name], value), name
                assert not torch.equal(value, states[2][name]), name


def test_scratch_has_the_sizes_of_init_and_other_weights(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path
) -> None:
    built = {}
    for scratch in (False, True):
        cfg = config_of(resnet_finetune, classifier, shapes, classifier, scratch=scratch)
        train, _ = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
        built[scratch] = resnet_finetune.build_model(cfg, train).state_dict()
    start = weights(classifier)
    for name, value in built[True].items():
        assert value.shape == built[False][name].shape
        if name.endswith("convolution.weight"):
            assert torch.equal(built[False][name], start[name])
            assert not torch.equal(value, start[name])
    assert built[False]["classifier.1.weight"].shape[0] == 3


def test_a_head_is_new_or_kept(resnet_finetune: ModuleType, classifier: Path, shapes: Path, reference: Path) -> None:
    """A model that was tuned on the same classes may go on with its head; by itself, as many classes are not enough."""
    start, name = weights(reference), "classifier.1.weight"
    for keep in (False, True):
        cfg = config_of(resnet_finetune, classifier, shapes, reference, init=str(reference), keep_head=keep)
        train, _ = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
        built = resnet_finetune.build_model(cfg, train).state_dict()
        assert torch.equal(built[name], start[name]) == keep
        assert all(torch.equal(built[other], start[other]) for other in start if not other.startswith("classifier"))


def test_class_weights_let_all_classes_count_the_same(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path
) -> None:
    cfg = config_of(resnet_finetune, classifier, shapes, classifier, class_weights=True)
    train, _ = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
    few = train.subset(np.flatnonzero((train.labels > 0) | (np.arange(len(train)) < 3)))
    counts = np.bincount(few.labels)
    assert counts[0] < counts[1]
    weights_of_classes = resnet_finetune.weights_of_classes(cfg, few)
    assert (weights_of_classes * torch.tensor(counts)).tolist() == pytest.approx([len(few) / 3] * 3)
    logits, labels = torch.randn(4, 3), torch.tensor([0, 1, 2, IGNORED])
    expected = torch.nn.CrossEntropyLoss(weights_of_classes, reduction="sum", ignore_index=IGNORED)(logits, labels)
    assert resnet_finetune.loss_sum(logits, labels, 0.0, weights_of_classes).item() == pytest.approx(expected.item())


def test_few_labels_are_chosen_by_the_seed(resnet_finetune: ModuleType, classifier: Path, shapes: Path) -> None:
    chosen = {}
    for few, seed in ((2, 0), (5, 0), (2, 1)):
        cfg = config_of(resnet_finetune, classifier, shapes, classifier, labels_per_class=few, seed=seed)
        train, evals = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
        assert np.bincount(train.labels).tolist() == [few] * 3
        assert {name: len(held_out) for name, held_out in evals.items()} == {"eval": 21}
        chosen[few, seed] = {train.files.name(index) for index in range(len(train))}
    assert chosen[2, 0] < chosen[5, 0]
    assert chosen[2, 0] != chosen[2, 1]


def test_the_embedded_groups_are_of_unseen_concepts(resnet_finetune: ModuleType, classifier: Path) -> None:
    cfg = resnet_finetune.Config(init=str(classifier))
    train, evals = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
    assert (len(train), len(evals["eval"]), len(evals["test"])) == (4599, 200, 300)
    assert "Food & Drink" in train.class_names
    assert len(train.class_names) == 9


@pytest.mark.parametrize("name", ["convnext", "vit"])
def test_other_classifiers_are_tuned_with_their_own_statistics(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path: Path, name: str
) -> None:
    sizes: dict[str, Any] = {
        "convnext": {"hidden_sizes": [8, 8], "depths": [1, 1], "num_stages": 2},
        "vit": {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
        | {"image_size": 16, "patch_size": 4},
    }[name]
    config = transformers.AutoConfig.for_model(name, **sizes, num_labels=5)
    transformers.AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "model")
    processor = transformers.ViTImageProcessorPil(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor.save_pretrained(tmp_path / "model")
    fields = {"init": str(tmp_path / "model"), "image_size": 16, "max_steps": 3, "layer_decay": 0.7}
    run(resnet_finetune, config_of(resnet_finetune, classifier, shapes, tmp_path / "run", **fields))
    tuned = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "run")
    assert tuned.config.model_type == name
    assert tuned.config.id2label == {0: "high", 1: "low", 2: "middle"}
    saved = json.loads((tmp_path / "run" / "preprocessor_config.json").read_text())
    assert (saved["image_mean"], saved["image_std"]) == ([0.5] * 3, [0.5] * 3)


@pytest.fixture(scope="session")
def shapes_and_colors(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each image has any number of three labels: which of its channels are bright."""
    folder, draw = tmp_path_factory.mktemp("colors"), np.random.default_rng(0)
    names = ["blue", "green", "red"]
    features = datasets.Features({"image": datasets.Image(), "colors": datasets.List(datasets.ClassLabel(names=names))})
    for split, number in (("train", 48), ("test", 16)):
        rows = []
        for _ in range(number):
            labels = np.flatnonzero(draw.random(3) < 0.4)
            pixels = np.full((16, 16, 3), 60) + draw.integers(0, 40, (16, 16, 3))
            pixels[:, :, 2 - labels] += 100
            rows.append({"image": Image.fromarray(pixels.astype(np.uint8)), "colors": labels.tolist()})
        datasets.Dataset.from_list(rows, features=features).to_parquet(folder / f"{split}.parquet")
    return folder


def test_several_labels_of_an_image_are_learnt_and_read_by_the_library(
    resnet_finetune: ModuleType, classifier: Path, shapes_and_colors: Path, tmp_path: Path
) -> None:
    fields = {"max_steps": 60, "eval_every": 30, "save_every": 0, "min_crop_area": 1.0, "class_weights": True}
    run(resnet_finetune, config_of(resnet_finetune, classifier, shapes_and_colors, tmp_path, **fields))
    best = json.loads((tmp_path / "run.json").read_text())["evaluation"]
    assert min(best["eval/auc"], best["eval/macro_f1"], best["eval/accuracy"]) >= 0.9
    test = datasets.load_dataset("parquet", data_files=str(shapes_and_colors / "test.parquet"), split="train")
    named = [[test.features["colors"].feature.names[label] for label in row] for row in test["colors"]]
    labels, answers = read_predictions(tmp_path)
    assert labels == named
    pipeline = transformers.pipeline("image-classification", str(tmp_path))
    said = [sorted(one["label"] for one in pipeline(image) if one["score"] >= 0.5) for image in test["image"]]
    assert said == answers
    assert np.mean([answer == label for answer, label in zip(answers, labels, strict=True)]) >= 0.8


def test_weights_of_several_labels_even_out_those_that_are_there_and_not(
    resnet_finetune: ModuleType, classifier: Path, shapes_and_colors: Path
) -> None:
    cfg = config_of(resnet_finetune, classifier, shapes_and_colors, classifier, class_weights=True)
    train, _ = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
    pos_weight = resnet_finetune.weights_of_classes(cfg, train)
    there = torch.tensor(train.counts)
    assert (pos_weight * there).tolist() == pytest.approx((len(train) - there).tolist())
    logits, labels = torch.randn(4, 3), torch.tensor([[0, 1, 0], [1, 1, 1], [0, 0, 0], [IGNORED] * 3])
    of_library = torch.nn.BCEWithLogitsLoss(pos_weight=pos_weight)(logits[:3], labels[:3].float()).item() * 3
    assert resnet_finetune.loss_sum(logits, labels, 0.0, pos_weight).item() == pytest.approx(of_library)


def test_balanced_sampling_shows_all_classes_equally_often(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path
) -> None:
    cfg = config_of(resnet_finetune, classifier, shapes, classifier, balanced_sampling=True, max_steps=512)
    train, _ = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
    uneven = train.subset(np.flatnonzero((train.labels == 2) | (np.arange(len(train)) % 5 == 0)))
    updates = resnet_finetune.open_updates(cfg, Accelerator(cpu=True), uneven, 8, 0)
    seen = np.concatenate([batch["labels"] for batches, _, _ in updates for batch in batches])
    assert uneven.counts[2] > 3 * uneven.counts[:2].max()
    assert np.bincount(seen) / len(seen) == pytest.approx([1 / 3] * 3, abs=0.001)


def test_the_best_model_is_tried_on_the_test_split_and_its_answers_are_kept(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path: Path
) -> None:
    """The best is chosen by a part of the few labels that there are."""
    fields = {"labels_per_class": 10, "eval_split": "train", "eval_fraction": 0.2, "test_split": "test", "probe": True}
    cfg = config_of(resnet_finetune, classifier, shapes, tmp_path, **fields)
    train, evals = resnet_finetune.open_data(cfg, Accelerator(cpu=True))
    assert (train.counts.tolist(), evals["eval"].counts.tolist()) == ([8, 8, 8], [2, 2, 2])
    run(resnet_finetune, cfg)
    record = json.loads((tmp_path / "run.json").read_text())
    labels, answers = read_predictions(tmp_path)
    assert labels == [evals["test"].class_names[label] for label in evals["test"].labels]
    assert record["evaluation"]["test/accuracy"] == np.mean(np.array(labels) == np.array(answers))
    assert {"knn_accuracy", "linear_probe_accuracy"} <= record.keys()
    pipeline = transformers.pipeline("image-classification", str(tmp_path))
    images = [Image.open(io.BytesIO(evals["test"].files.read(index))) for index in range(len(labels))]
    assert [pipeline(image)[0]["label"] for image in images] == answers
    assert f"| `test/accuracy` | {record['evaluation']['test/accuracy']:.4f} |" in (tmp_path / "README.md").read_text()


def test_a_run_that_gets_no_better_ends_and_stays_ended(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path: Path
) -> None:
    fields = {"learning_rate": 1e-9, "patience": 2, "eval_every": 1, "max_steps": 50, "save_every": 0}
    cfg = config_of(resnet_finetune, classifier, shapes, tmp_path, **fields)
    for _ in range(2):
        run(resnet_finetune, cfg)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["steps"] < 50
        assert metric(tmp_path, "step")[-1] == record["steps"]


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resuming_is_exact_and_keeps_the_best(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, reference: Path, tmp_path: Path, stop: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir, ignore=shutil.ignore_patterns("step_*", "*.safetensors"))
    shutil.copytree(reference / f"checkpoints/step_{stop:08d}", run_dir / f"checkpoints/step_{stop:08d}")
    best = json.loads((reference / "run.json").read_text())["best_step"]
    if best <= stop:  # then those of the best step were exported before the stop
        shutil.copy(reference / "model.safetensors", run_dir)
    fields = {"num_workers": stop % 2, "save_every": 1, "keep_checkpoints": 99}
    run(resnet_finetune, config_of(resnet_finetune, classifier, shapes, run_dir, **fields))
    assert_same(run_dir, reference)
    assert json.loads((run_dir / "run.json").read_text())["best_step"] == best


def test_dry_run_leaves_nothing(
    resnet_finetune: ModuleType,
    classifier: Path,
    shapes: Path,
    shapes_and_colors: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for images in (shapes, shapes_and_colors):
        run(resnet_finetune, config_of(resnet_finetune, classifier, images, tmp_path / "run", dry_run=True))
        printed = capsys.readouterr().out
        for expected in ("training images as the model sees", "memory: activations", "one update", "flops_per_image"):
            assert expected in printed
        assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def runs(resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Batch normalisation sees its micro-batch, so all runs have micro-batches of 4."""
    fields = {**TINY, "init": str(classifier), "max_steps": 6, "per_device_batch_size": 4, "learning_rate": 0.001}
    return Runs(resnet_finetune, {"all": fields}, shapes, tmp_path_factory.mktemp("engines"))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engine", "kind"), engines.pairs("resnet/finetune.py"))
def test_engine_equals_one_process(runs: Runs, engine: str, kind: str) -> None:
    run_dir, other = runs.of_engine(engine, kind), runs.of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    assert metric(run_dir, "eval/accuracy") == metric(other, "eval/accuracy")


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "init": classifier, "data": shapes, "push_every": 6}
    image = next((shapes / "test" / "high").glob("*.png"))
    program = f"print(pipeline('image-classification', 'tester/mine')({str(image)!r})[0]['label'])"
    answer, pushed = push_and_load(resnet_finetune, fields, program, tmp_path)
    assert answer.strip() in ("high", "low", "middle")
    assert {"model.safetensors", "config.json", "preprocessor_config.json", "README.md"} <= pushed


def files_of(names: list[str], splits: dict[str, list[int]], folder: Path) -> dict[str, bytes]:
    """Those of a data set on the Hub, with the columns `image` and `label`: an image of noise for each label."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    files, draw = {}, np.random.default_rng(0)
    for split, labels in splits.items():
        images = [Image.fromarray(draw.integers(0, 255, (28, 28, 3), dtype=np.uint8)) for _ in labels]
        table = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        table.to_parquet(folder / "one.parquet")
        files[f"data/{split}-00000-of-00001.parquet"] = (folder / "one.parquet").read_bytes()
    return files


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_commands_that_need_the_network_run_against_a_hub(classifier: Path, tmp_path: Path) -> None:
    """Those of the README, through the real client, with small data in the form of PathMNIST and of ImageNet."""
    hub = start_hub()
    known = [*range(9)] * 2
    for name, of_test in {"jafermarq/pathmnist": known, "ILSVRC/imagenet-1k": [-1] * 9}.items():
        files = files_of(
            [f"class {n}" for n in range(9)], {"train": known * 2, "validation": known, "test": of_test}, tmp_path
        )
        hub.repositories["datasets", name] = Repository(private=False)
        hub.repositories["datasets", name].commit(files, "files")
    # torch 2.13 crashes on some processors in the backward pass of fewer than 12 channels at this size.
    sizes_of = transformers.ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    transformers.ResNetForImageClassification(sizes_of).save_pretrained(tmp_path / "model")
    shutil.copy(classifier / "preprocessor_config.json", tmp_path / "model")
    weights_of = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    hub.repositories["models", "microsoft/resnet-50"] = Repository(private=False)
    hub.repositories["models", "microsoft/resnet-50"].commit(weights_of, "files")
    environment = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}

    lines = [line.strip() for line in (ROOT / "recipes/resnet/README.md").read_text().splitlines()]
    [tissue] = [line for line in lines if "recipes/resnet/finetune.py --init microsoft/resnet-50" in line]
    [photographs] = [line for line in lines if "recipes/resnet/pretrain.py --config" in line]
    few = "--max_steps 2 --warmup_steps 1 --global_batch_size 8 --eval_every 0 --save_every 0 --num_workers 0"
    sizes = "--depths 1,1 --hidden_sizes 16,32 --embedding_size 16 --no_compile"
    for command, fields in (
        (tissue, few),
        (photographs, f"{few} {sizes} --image_size 28 --final_image_size 28 --eval_image_size 28 --size_multiple 4"),
    ):
        words = shlex.split(f"{command} {fields} --output_dir {tmp_path}/run")
        program = next(at for at, word in enumerate(words) if word.endswith(".py"))
        done = subprocess.run(
            [sys.executable, *words[program:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr
        labels = json.loads((tmp_path / "run" / "config.json").read_text())["id2label"]
        assert list(labels.values()) == [f"class {n}" for n in range(9)]
        shutil.rmtree(tmp_path / "run")
    hub.stop()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    resnet_finetune: ModuleType,
    classifier: Path,
    shapes: Path,
    shapes_and_colors: Path,
    reference: Path,
    tmp_path: Path,
) -> None:
    shutil.copytree(classifier, tmp_path / "headless")
    save_file({"classifier.1.bias": torch.zeros(2)}, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    shutil.copytree(shapes, tmp_path / "unseen")
    (tmp_path / "unseen" / "test" / "high").rename(tmp_path / "unseen" / "test" / "other")
    shutil.copytree(shapes, tmp_path / "empty_class")
    for image in (tmp_path / "empty_class" / "train" / "low").iterdir():
        image.unlink()
    cases = {
        "data: '/no/such'": {"data": "/no/such"},
        "none of high": {"data": str(tmp_path / "unseen"), "data_split": "test", "eval_split": "train"},
        "low": {"data": str(tmp_path / "empty_class")},
        "init: '/no/such/model'": {"init": "/no/such/model"},
        "expected the weights of an encoder, of which": {"init": str(tmp_path / "headless")},
        "gradient_checkpointing: True: expected False": {"gradient_checkpointing": True},
        "expected images of at least 30 pixels": {"image_size": 30},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "test_split: 'train': expected another split": {"test_split": "train"},
        "test_split: 'test': expected another split": {"test_split": "test", "eval_split": "test"},
        "patience: 3: expected 0 where eval_every is 0": {"patience": 3, "eval_every": 0},
        "test_split: 'dev': expected one of train, test": {"test_split": "dev"},
        "eval_split: 'dev': expected one of train, test": {"eval_split": "dev"},
        "classes: '0,1': expected \"\" for images with several labels": {
            "data": str(shapes_and_colors),
            "classes": "0,1",
        },
        "classes: '0,5': expected different classes": {"classes": "0,5"},
        "expected init to have a head for those of the data, 3 classes (high, low, middle)": {"keep_head": True},
        "keep_head: True: expected False for new weights": {"keep_head": True, "scratch": True},
        "best_metric: 'auc': expected one that these labels have, such as accuracy": {"best_metric": "auc"},
        "labels_per_class: 2: expected 0": {"data": str(shapes_and_colors), "labels_per_class": 2},
        "balanced_sampling: True: expected False": {"data": str(shapes_and_colors), "balanced_sampling": True},
        "best_metric: 'balanced_accuracy'": {"data": str(shapes_and_colors), "best_metric": "balanced_accuracy"},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(resnet_finetune, config_of(resnet_finetune, classifier, shapes, tmp_path / "run", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_the_loss_of_a_new_head_is_that_of_a_uniform_guess(
    resnet_finetune: ModuleType, classifier: Path, shapes: Path, reference: Path
) -> None:
    assert metric(reference, "train/loss")[0] == pytest.approx(math.log(3), rel=0.25)
