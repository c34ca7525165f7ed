"""The study: cells in any order, their rates chosen by tuning alone, and a report of all of them."""

import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from shared import command_line as cli
from tests.conftest import ROOT, load_recipe
from tests.recipes.runs import weights


@pytest.fixture(scope="session")
def study() -> ModuleType:
    return load_recipe("label_efficiency.py")


def config_of(study: ModuleType, encoder: Path, labelled: Path, folder: Path, **fields: Any) -> Any:
    usual: dict[str, Any] = {
        "init": str(encoder),
        "task": f"data={labelled} seq_length=32",
        "jobs": 1,
        "output_dir": str(folder),
        "labels_per_class": "4,10,0",
        "compute_labels": "10",
        "seeds": 2,
        "max_steps": 4,
        "all_steps": 6,
        "learning_rates": "1e-3,1e-2",
    }
    return study.Config(**{**usual, **fields})


def pretend(program: list[str], **options: Any) -> Any:
    """A cell's program, which leaves at once what a run leaves: answers that are better the more labels there are."""
    flags = dict(itertools.pairwise(program))
    folder = Path(flags["--output_dir"])
    folder.mkdir(parents=True)
    labels, is_pretrained = int(flags["--labels_per_class"]) or 40, flags["--init"] != "scratch"
    share = min(1.0, 0.02 * labels + 0.2 * is_pretrained + 0.1 * (flags["--learning_rate"] == "0.01"))
    draw = np.random.default_rng(int(flags["--seed"]))
    score = "test/accuracy" if "--test_split" in flags else "eval/accuracy"
    answers = ["a" if draw.random() < share else "b" for _ in range(400)]
    lines = "".join(json.dumps({"label": "a", "prediction": answer}) + "\n" for answer in answers)
    (folder / "predictions.jsonl").write_text(lines)
    record: dict[str, Any] = {"steps": int(flags["--max_steps"]), "training_flops": 10.0 * int(flags["--max_steps"])}
    record["evaluation"] = {score: answers.count("a") / len(answers)}
    if "--probe" in program:
        record |= {"knn_accuracy": 0.3, "linear_probe_accuracy": 0.4}
    (folder / "run.json").write_text(json.dumps(record))
    return subprocess.CompletedProcess(program, 0, "", "")


@pytest.fixture
def quick(study: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Programs that were started; none of them is."""
    started: list[list[str]] = []

    def run(program: list[str], **options: Any) -> Any:
        started.append(program)
        return pretend(program, **options)

    monkeypatch.setattr(study.subprocess, "run", run)
    return started


def test_the_report_says_what_the_cells_found(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, quick: list[list[str]]
) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- label efficiency study -->\nold\n<!-- /label efficiency study -->\nafter\n")
    cfg = config_of(study, encoder, labelled, tmp_path / "study", readme=str(readme))
    study.main(cfg)
    cells = [json.loads(line) for line in (tmp_path / "study" / "index.jsonl").read_text().splitlines()]
    assert len(quick) == len(cells) == 3 * 2 * 2 * 2 + 3 * 3 * 2 + 2
    summary = json.loads((tmp_path / "study" / "summary.json").read_text())
    assert summary["labels_per_class"] == [4, 10, 62]
    assert all(gain["of_seeds"][0] == pytest.approx(0.2, abs=0.06) for gain in summary["gains"][:2])
    # 10 labels a class and 0.2 are as good as 20 without; the line over the logarithm is not straight.
    assert summary["gains"][1]["worth"][0] == pytest.approx(2.2, abs=0.8)
    text = readme.read_text()
    assert text.startswith("before\n<!-- label efficiency study -->\n\n| labels a class | 4 | 10 | all (62) |\n| --- |")
    assert text.endswith("\n<!-- /label efficiency study -->\nafter\n")
    assert "old" not in text
    assert (tmp_path / "study" / "study.png").read_bytes().startswith(b"\x89PNG")
    study.main(cfg)
    assert len(quick) == len(cells)  # nothing runs twice
    assert readme.read_text() == text


def test_rates_are_chosen_by_held_out_labels_and_the_test_split_chooses_nothing(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, quick: list[list[str]]
) -> None:
    study.main(config_of(study, encoder, labelled, tmp_path / "study"))
    cells = [json.loads(line) for line in (tmp_path / "study" / "index.jsonl").read_text().splitlines()]
    of_cell = {int(Path(program[-1]).name): dict(itertools.pairwise(program)) for program in quick}
    for cell in cells:
        flags = of_cell[cell["number"]]
        if cell["arm"].endswith("tuning"):
            assert (flags["--eval_split"], flags["--eval_fraction"]) == ("train", "0.2")
            assert "--test_split" not in flags
        else:
            is_tied = cell["labels"] == 0 and flags["--init"] != "scratch"  # all are right at both, then the lower
            assert flags["--learning_rate"] == ("0.001" if is_tied else "0.01")
            is_longer = cell["arm"] == "scratch with compute"
            assert flags["--eval_split"] == ("train" if is_longer else "test")
            assert flags["--eval_every"] != "0" or not is_longer
    pretraining = json.loads((encoder / "run.json").read_text())["training_flops"]
    longer = [of_cell[cell["number"]]["--max_steps"] for cell in cells if cell["arm"] == "scratch with compute"]
    assert longer == [str(4 + round(pretraining / 10))] * 2


def test_a_cell_by_itself_waits_for_those_that_choose_its_rate(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, quick: list[list[str]]
) -> None:
    with pytest.raises(cli.UsageError, match=r"cell: 30: expected cells \[.*\] to be done first"):
        study.main(config_of(study, encoder, labelled, tmp_path / "study", cell=30))
    study.main(config_of(study, encoder, labelled, tmp_path / "study", cell=3))
    assert [file.name for file in (tmp_path / "study" / "cells").iterdir()] == ["0003.json"]
    assert not [path for path in (tmp_path / "study" / "running").iterdir() if path.is_dir()]


def test_shuffled_weights_are_the_same_numbers_in_other_places(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    cfg = config_of(study, encoder, labelled, tmp_path / "study")
    (tmp_path / "study").mkdir()
    study.write_shuffled(cfg)
    shuffled, start = weights(tmp_path / "study" / "shuffled"), weights(encoder)
    assert shuffled.keys() == start.keys()
    moved = 0
    for name, weight in start.items():
        assert torch.equal(shuffled[name].flatten().sort().values, weight.flatten().sort().values), name
        moved += not torch.equal(shuffled[name], weight)
    assert moved > len(start) / 3  # norms begin as ones and zeros
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "study" / "shuffled").vocab_size > 0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_small_study_runs_as_a_program(classifier: Path, shapes: Path, tmp_path: Path) -> None:
    task = f"data={shapes} image_size=12 eval_image_size=16 global_batch_size=8 num_workers=0"
    flags = {"family": "resnet", "init": classifier, "task": task}
    flags |= {"output_dir": tmp_path / "study", "labels_per_class": "4", "compute_labels": "4", "seeds": 2}
    flags |= {"max_steps": 20, "learning_rates": "1e-2"}
    command = [sys.executable, "recipes/label_efficiency.py"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "| labels a class | 4 |" in done.stdout
    assert len(list((tmp_path / "study" / "cells").iterdir())) == 4 + 6 + 2
    [gain] = json.loads((tmp_path / "study" / "summary.json").read_text())["gains"]
    assert len(gain["differences"]) == 2


def test_bad_input_gets_one_line(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, quick: list[list[str]]
) -> None:
    study.main(config_of(study, encoder, labelled, tmp_path / "study", cell=0))
    unfinished = tmp_path / "unfinished"
    shutil.copytree(encoder, unfinished)
    record = json.loads((unfinished / "run.json").read_text())
    del record["training_flops"]
    (unfinished / "run.json").write_text(json.dumps(record))
    cases = {
        "labels_per_class: '10,4': expected rising": {"labels_per_class": "10,4"},
        "labels_per_class: '0,4': expected rising": {"labels_per_class": "0,4"},
        "labels_per_class: '1,4': expected rising numbers from 2 on": {"labels_per_class": "1,4"},
        "expected a file with the lines <!-- label efficiency study -->": {"readme": str(labelled / "test.jsonl")},
        "labels_per_class: 'few'": {"labels_per_class": "few"},
        "compute_labels: '7': expected some of labels_per_class": {"compute_labels": "7"},
        "learning_rates: '1e-3,x'": {"learning_rates": "1e-3,x"},
        "task: '--data x': expected name=value": {"task": "--data x"},
        "seeds: 1: expected at least 2": {"seeds": 1},
        "cell: 999: expected a line of index.jsonl": {"cell": 999},
        "init: '/no/such': expected the folder of a finished pre-training run": {"init": "/no/such"},
        f"init: '{unfinished}'": {"init": str(unfinished)},
        "it holds another study, or one of other weights": {"max_steps": 5},
    }
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            study.main(config_of(study, encoder, labelled, tmp_path / "study", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_a_cell_that_fails_is_named_with_its_last_line(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(program: list[str], **options: Any) -> Any:
        return subprocess.CompletedProcess(program, 2, "", "one\nerror: data: 'x': expected y\n")

    monkeypatch.setattr(study.subprocess, "run", fail)
    with pytest.raises(cli.UsageError, match=r"cell 0 ended with status 2: error: data: 'x': expected y: "):
        study.main(config_of(study, encoder, labelled, tmp_path / "study", cell=0))
    assert not (tmp_path / "study" / "cells").exists()


def test_the_same_folder_is_not_taken_for_a_model_that_was_trained_anew(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, quick: list[list[str]]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(encoder, model)
    study.main(config_of(study, model, labelled, tmp_path / "study", cell=0))
    with (model / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"?")
    with pytest.raises(cli.UsageError, match="or one of other weights"):
        study.main(config_of(study, model, labelled, tmp_path / "study", cell=1))


def test_tuning_is_by_held_out_labels_also_where_the_task_has_a_test_split(
    study: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the test split says of a rate stands in the run's record beside the held-out labels."""

    def run(program: list[str], **options: Any) -> Any:
        done = pretend(program, **options)
        record_file = Path(program[-1]) / "run.json"
        record = json.loads(record_file.read_text())
        record["evaluation"] = {"eval/accuracy": 0.25, "test/accuracy": 0.75}
        record_file.write_text(json.dumps(record))
        return done

    monkeypatch.setattr(study.subprocess, "run", run)
    cfg = config_of(study, encoder, labelled, tmp_path / "study", task="task=supersenses", cell=0)
    study.main(cfg)
    assert study.read_result(cfg, study.plan(cfg)[0])["accuracy"] == 0.25
