import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from shared.data.batches import IGNORED
from shared.images.crops import CenterCrops
from shared.images.labelled import SAMPLE, open_images
from shared.metrics.classification import (
    Answers,
    answers_of,
    draw_answers,
    draw_batch,
    gather_answers,
    join_answers,
    load_held_out,
    make_card,
    surest_mistakes,
)

LABELS = np.array([0, 0, 0, 1, 1, 2, 2])
GUESSES = np.array([0, 1, 1, 1, 2, 2, 2])
PROBABILITIES = np.array([0.9, 0.4, 0.8, 0.7, 0.6, 1.0, 0.5])
NAMES = ["cat", "dog", "cow", "hen"]


def answers(labels: np.ndarray, guesses: np.ndarray) -> Answers:
    return Answers(np.arange(7), labels, guesses[:, None], PROBABILITIES)


def test_the_surest_mistakes_come_first() -> None:
    assert surest_mistakes(answers(LABELS, GUESSES), 5).tolist() == [2, 4, 1]
    assert surest_mistakes(answers(LABELS, GUESSES), 2).tolist() == [2, 4]


@pytest.mark.parametrize("classes", [3, 8])
def test_answers_of_batches_are_those_of_all_images(classes: int) -> None:
    probabilities = torch.rand(9, classes, generator=torch.Generator().manual_seed(0)).softmax(-1)
    labels = torch.tensor([0, 1, 2, IGNORED, 0, 1, 2, 0, IGNORED])
    whole = {"indices": torch.arange(9), "labels": labels}
    halves = [{name: values[part] for name, values in whole.items()} for part in (slice(0, 4), slice(4, 9))]
    joined = join_answers([answers_of(probabilities[:4], halves[0]), answers_of(probabilities[4:], halves[1])])
    assert joined.indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert joined.guesses.shape == (7, min(5, classes))
    assert joined.guesses[:, 0].tolist() == probabilities.argmax(-1)[joined.indices].tolist()
    right = [int(probabilities[i].argmax()) == int(labels[i]) for i in joined.indices]
    assert joined.top1() == pytest.approx(np.mean(right))
    ranks = (probabilities > probabilities.gather(1, labels.clamp(min=0)[:, None])).sum(-1)[joined.indices]
    assert joined.top5() == pytest.approx((ranks < 5).float().mean().item())


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_processes_share_the_images_and_have_equally_many_batches(processes: int) -> None:
    """Five images in batches of two: three batches, and grey ones where a process has none left."""
    images = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="")
    crops = CenterCrops(images.subset(np.arange(5)), 28, 1.0, 2)
    assert (len(crops), crops.num_images) == (3, 5)
    parts = []
    for rank in range(processes):
        known = {"num_processes": processes, "process_index": rank, "is_main_process": False}
        accelerator = SimpleNamespace(**known, device=torch.device("cpu"))
        parts.append(list(load_held_out(accelerator, crops, num_workers=0)))
    assert {len(batches) for batches in parts} == {-(-3 // processes)}
    every = [batch for batches in parts for batch in batches]
    kept = torch.cat([batch["indices"][batch["labels"] != IGNORED] for batch in every])
    assert sorted(kept.tolist()) == list(range(5))
    assert all(batch["pixel_values"].dtype == torch.uint8 for batch in every)


def test_what_has_no_answer_was_skipped() -> None:
    found = [answers(LABELS, GUESSES)] * 2
    metrics, joined = gather_answers(Accelerator(cpu=True), found, 28.0, 17)
    expected = {"eval/loss": 2.0, "eval/top1": 4 / 7, "eval/top5": 4 / 7, "eval/skipped": 3}
    assert metrics == pytest.approx(expected)
    assert list(metrics) == list(expected)
    assert joined.labels.tolist() == [*LABELS, *LABELS]


def test_the_main_process_draws_the_card(tmp_path: Path) -> None:
    images = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="")
    crops, guesses = CenterCrops(images, 28, 1.0, 2), answers(LABELS, GUESSES)
    for is_main in (False, True):
        card = make_card(SimpleNamespace(is_main_process=is_main), guesses, NAMES, crops, tmp_path / "figures")
        assert card["samples"] == guesses.describe_confusions(NAMES)
        assert card["pipeline_tag"] in card["usage"]
        assert set(card["figures"].values()) == {path.name for path in tmp_path.glob("figures/*")}
    assert len(card["figures"]) == 2


def test_a_matrix_of_too_many_classes_is_not_drawn(tmp_path: Path) -> None:
    images = open_images(str(SAMPLE), config="", split="test", image_column="", label_column="")
    names = [str(number) for number in range(50_000)]
    drawn = draw_answers(answers(LABELS, GUESSES), names, CenterCrops(images, 28, 1.0, 2), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == list(drawn.values()) == ["surest_mistakes.png"]


def test_a_batch_is_drawn_into_a_new_folder() -> None:
    batch = {"pixel_values": torch.zeros(20, 8, 8, 3, dtype=torch.uint8), "labels": torch.arange(20) % 4}
    path, other = draw_batch(batch, NAMES), draw_batch(batch, NAMES)
    assert path.parent != other.parent
    assert Image.open(path).size[0] > 100
    for file in (path, other):
        shutil.rmtree(file.parent)
