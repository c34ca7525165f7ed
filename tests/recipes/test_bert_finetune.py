"""Fine-tuning on classes, pairs, numbers and tags; what is exported is the best model, whatever stops the run."""

import json
import math
import os
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
from safetensors.torch import load_file, save_file

from shared import command_line as cli
from shared.metrics.probe import linear_probe, nearest_neighbours
from shared.run.predictions import read_predictions
from shared.text.documents import open_texts
from shared.text.labelled import SAMPLES
from tests.conftest import ROOT
from tests.hub_server import Repository, start_hub
from tests.launching import assert_no_traceback
from tests.recipes import engines
from tests.recipes.runs import Runs, assert_same, metric, metrics_of, push_and_load, results_of, run, run_card, weights

TINY: dict[str, Any] = {
    "global_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "learning_rate": 0.003,
    "log_every": 1,
    "eval_every": 3,
    "save_every": 3,
    "seq_length": 32,
}


def config_of(finetune: ModuleType, encoder: Path, labelled: Path, run_dir: Path, **fields: Any) -> Any:
    usual = {**TINY, "init": str(encoder), "data": str(labelled), "output_dir": str(run_dir)}
    return finetune.Config(**{**usual, **fields})


@pytest.fixture(scope="module")
def reference(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """An uninterrupted run over two epochs that kept every checkpoint."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, run_dir, save_every=1, keep_checkpoints=99))
    return run_dir


# -- learning ----------------------------------------------------------------------------------------------------------

PROBLEMS: dict[str, dict[str, Any]] = {
    "classes": {},
    "pairs": {"text_pair_column": "other"},
    "numbers": {"label_column": "score"},
    "tags": {"text_column": "words", "label_column": "tags"},
}
REACHED = {
    "classes": ("accuracy", 0.9),
    "pairs": ("accuracy", 0.9),
    "numbers": ("pearson", 0.8),
    "tags": ("entity_f1", 0.9),
}


@pytest.mark.parametrize("problem", PROBLEMS)
def test_every_kind_of_label_is_learnt_and_read_by_the_library(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, problem: str
) -> None:
    fields = {**PROBLEMS[problem], "max_steps": 150, "warmup_steps": 10, "eval_every": 50, "save_every": 0}
    fields |= {"dropout": 0.0}
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path, **fields))
    name, least = REACHED[problem]
    assert max(metric(tmp_path, f"eval/{name}")) >= least
    program = transformers.pipeline(
        "token-classification" if problem == "tags" else "text-classification", str(tmp_path)
    )
    if problem == "classes":
        assert program("the big dog sees a")[0]["label"] == "animal"
        assert program.model.config.label2id == {"animal": 0, "plant": 1}
    if problem == "pairs":
        assert program({"text": "the big dog", "text_pair": "dog big the"})["label"] == "animal"
    if problem == "tags":
        assert {found["word"] for found in program("the cat sees") if found["entity"] == "B-LIVING"} == {"cat"}
    card = (tmp_path / "README.md").read_text()
    assert program.task in card
    assert f"| `eval/{name}` | {max(metric(tmp_path, f'eval/{name}')):.4f} |" in card


def test_initial_loss_is_that_of_a_uniform_guess(bert_finetune: ModuleType, encoder: Path, labelled: Path) -> None:
    cfg = config_of(bert_finetune, encoder, labelled, encoder, dropout=0.0)
    _, train, _ = bert_finetune.open_data(cfg)
    tokenizer = bert_finetune.open_tokenizer(cfg, "classes")
    model = bert_finetune.build_model(cfg, "classes", train.class_names, tokenizer)
    batch = bert_finetune.encode(train, tokenizer, 32).batch(range(124))
    batch = {name: torch.from_numpy(values) for name, values in batch.items()}
    logits = bert_finetune.forward(model, batch)
    assert bert_finetune.loss_sum(logits, batch["labels"]).item() / 124 == pytest.approx(math.log(2), rel=0.1)
    assert model(**batch).loss.item() * 124 == pytest.approx(bert_finetune.loss_sum(logits, batch["labels"]).item())


def test_evaluation_counts_every_text_once(bert_finetune: ModuleType, labelled: Path, reference: Path) -> None:
    """Against the library's model, one text at a time."""
    model = transformers.AutoModelForSequenceClassification.from_pretrained(reference).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference)
    rows = [json.loads(line) for line in (labelled / "test.jsonl").read_text().splitlines()]
    losses, right = [], []
    with torch.no_grad():
        for row in rows:
            logits = model(**tokenizer(row["text"], return_tensors="pt")).logits[0]
            label = model.config.label2id[row["label"]]
            losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor(label)).item())
            right.append(int(logits.argmax()) == label)
    best = json.loads((reference / "run.json").read_text())["best_step"]
    [entry] = [entry for entry in metrics_of(reference) if entry["step"] == best]
    assert entry["eval/loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert entry["eval/accuracy"] == np.mean(right)


def test_scratch_has_the_sizes_of_the_encoder_beside_its_tokenizer(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    fields = {"init": "scratch", "tokenizer": str(encoder), "max_steps": 3}
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path, **fields))
    one, other = weights(tmp_path), weights(encoder)
    shared = [name for name in one if name in other and one[name].ndim == 2]
    assert len(shared) > 10
    assert all(one[name].shape == other[name].shape for name in shared)
    assert not any(torch.equal(one[name], other[name]) for name in shared)


def test_few_labels_are_chosen_by_the_seed(bert_finetune: ModuleType, encoder: Path, labelled: Path) -> None:
    chosen = {}
    for few, seed in ((2, 0), (5, 0), (2, 1)):
        cfg = config_of(bert_finetune, encoder, labelled, encoder, labels_per_class=few, seed=seed)
        _, train, evals = bert_finetune.open_data(cfg)
        assert (len(train), len(evals["eval"]), len(evals)) == (2 * few, 41, 1)
        chosen[few, seed] = set(train.texts)
    assert chosen[2, 0] < chosen[5, 0]
    assert chosen[2, 0] != chosen[2, 1]


def test_a_file_to_evaluate_on_is_taken_whole(bert_finetune: ModuleType, encoder: Path, labelled: Path) -> None:
    """A single file has no split to be found by its name."""
    files = {"data": str(labelled / "train.jsonl"), "eval_data": str(labelled / "test.jsonl")}
    _, train, evals = bert_finetune.open_data(config_of(bert_finetune, encoder, labelled, encoder, **files))
    assert (len(train), len(evals["eval"])) == (124, 41)
    del files["eval_data"]
    _, train, evals = bert_finetune.open_data(config_of(bert_finetune, encoder, labelled, encoder, **files))
    assert len(train) + len(evals["eval"]) == 124
    assert len(evals["eval"]) in (12, 13)


@pytest.mark.parametrize("task", ["supersenses", "hypernyms", "eras"])
def test_the_embedded_tasks_are_there(bert_finetune: ModuleType, encoder: Path, task: str) -> None:
    _, train, evals = bert_finetune.open_data(bert_finetune.Config(task=task))
    known, test = len(train) + len(evals["eval"]), evals["test"]
    assert (known, len(test), len(train.class_names)) == {
        "supersenses": (11036, 2760, 24),
        "hypernyms": (10000, 2000, 2),
        "eras": (6400, 1600, 8),
    }[task]
    assert len(evals["eval"]) == pytest.approx(0.1 * known, abs=12)
    texts = [set(zip(some.texts, some.pairs or some.texts, strict=True)) for some in (train, evals["eval"], test)]
    assert not texts[0] & texts[2]
    assert not texts[1] & texts[2]


def test_no_message_that_eras_asks_of_is_in_the_books() -> None:
    passages = datasets.load_dataset("parquet", data_dir=str(SAMPLES / "eras"), split="train+test")["text"]
    read = {name: open_texts(name, config="", split="", text_column="text") for name in ("sample", "books")}
    sample, books = (" ".join(" ".join(texts).split()) for texts in read.values())
    some = passages[::100]
    assert sum(passage in sample for passage in some) > 0.8 * len(some)  # the others are of held-out messages
    assert not any(passage in books for passage in some)


def test_no_definition_to_be_tested_on_is_in_the_dictionary_to_pre_train_on() -> None:
    read = datasets.load_dataset("parquet", data_dir=str(SAMPLES / "dictionary"), split="train")
    lines = {line.partition(": ")[2] for text in read["text"] for line in text.splitlines()}
    tests = datasets.load_dataset("parquet", data_files=str(SAMPLES / "supersenses" / "test.parquet"), split="train")
    assert len(lines) > 90_000
    assert not lines & {f"{text}." for text in tests["text"]}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_rate_that_is_not_given_suits_what_is_loaded(
    bert_finetune: ModuleType, tmp_path: Path, optimizer: str
) -> None:
    (tmp_path / "config.yaml").write_text(f"optimizer: {optimizer}\n")
    rate = {"muon": 1e-3, "adamw": 3e-5}[optimizer]
    assert bert_finetune.learning_rate_of(bert_finetune.Config(init=str(tmp_path))) == rate
    assert bert_finetune.learning_rate_of(bert_finetune.Config(init="google-bert/bert-base-uncased")) == 3e-5
    assert bert_finetune.learning_rate_of(bert_finetune.Config(init="scratch", tokenizer="x")) == 1e-3
    assert bert_finetune.learning_rate_of(bert_finetune.Config(init=str(tmp_path), learning_rate=0.5)) == 0.5


@pytest.mark.parametrize("name", ["bert", "roberta", "modernbert"])
def test_other_encoders_are_tuned(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, name: str
) -> None:
    """As the Hub has them: a masked language model and its tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder)
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(name, **sizes, intermediate_size=16, vocab_size=len(tokenizer) + 8)
    transformers.AutoModelForMaskedLM.from_config(config).save_pretrained(tmp_path / "model")
    if name == "modernbert":
        tokenizer.model_input_names = ["input_ids", "attention_mask"]
    tokenizer.save_pretrained(tmp_path / "model")
    fields = {"init": str(tmp_path / "model"), "max_steps": 3, "layer_decay": 0.7}
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path / "run", **fields))
    tuned = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run")
    assert tuned.config.model_type == name
    assert tuned.config.id2label == {0: "animal", 1: "plant"}


# -- the run -----------------------------------------------------------------------------------------------------------


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_resuming_is_exact_and_keeps_the_best(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, reference: Path, tmp_path: Path, stop: int
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir, ignore=shutil.ignore_patterns("step_*", "*.safetensors"))
    shutil.copytree(reference / f"checkpoints/step_{stop:08d}", run_dir / f"checkpoints/step_{stop:08d}")
    best = json.loads((reference / "run.json").read_text())["best_step"]
    if best <= stop:  # then those of the best step were exported before the stop
        shutil.copy(reference / "model.safetensors", run_dir)
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, run_dir, num_workers=stop % 2))
    assert_same(run_dir, reference)
    assert json.loads((run_dir / "run.json").read_text())["best_step"] == best
    assert (run_dir / "README.md").read_text().split("## Results")[1] == (
        (reference / "README.md").read_text().split("## Results")[1]
    )


def test_what_is_exported_is_the_best_by_the_named_metric(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, f1 = bert_finetune.evaluate, iter([0.1, 0.9, 0.2, 0.3])

    def pretend(*arguments: Any) -> Any:
        tried = evaluate(*arguments)
        return tried._replace(metrics={**tried.metrics, "eval/macro_f1": next(f1)})

    monkeypatch.setattr(bert_finetune, "evaluate", pretend)
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path / "run", best_metric="macro_f1"))
    short = config_of(
        bert_finetune, encoder, labelled, tmp_path / "short", eval_every=0, save_every=6, keep_checkpoints=9
    )
    monkeypatch.setattr(bert_finetune, "evaluate", evaluate)
    run(bert_finetune, short)
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run").state_dict()
    after_six = load_file(tmp_path / "short/checkpoints/step_00000006/model.safetensors")
    assert all(torch.equal(after_six[name], value) for name, value in saved.items())
    assert "| `eval/macro_f1` | 0.9000 |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_head_is_new_or_kept(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, problem: str
) -> None:
    """A model that was tuned on the same classes may go on with its head; by itself, as many classes are not enough."""
    fields = {**PROBLEMS[problem], "max_steps": 2, "learning_rate": 1e-9, "eval_every": 0, "save_every": 0}
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path / "tuned", **fields))
    fields |= {"init": str(tmp_path / "tuned")}
    heads = {"tuned": weights(tmp_path / "tuned")}
    for keep in (False, True):
        run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path / f"{keep}", keep_head=keep, **fields))
        heads[keep] = weights(tmp_path / f"{keep}")
    name = next(name for name in heads["tuned"] if name.startswith("classifier") and name.endswith("weight"))
    assert torch.allclose(heads[True][name], heads["tuned"][name], atol=1e-6)
    assert not torch.allclose(heads[False][name], heads["tuned"][name], atol=1e-3)
    inside = next(name for name in heads["tuned"] if "layer.0.attention" in name)
    assert torch.allclose(heads[False][inside], heads["tuned"][inside], atol=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_the_best_model_is_tried_on_the_test_split_and_its_answers_are_kept(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, problem: str
) -> None:
    """The best is chosen by a part of the split to train on."""
    fields = {**PROBLEMS[problem], "eval_split": "train", "test_split": "test", "eval_every": 4, "save_every": 0}
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path, **fields))
    record = json.loads((tmp_path / "run.json").read_text())
    labels, answers = read_predictions(tmp_path)
    rows = [json.loads(line) for line in (labelled / "test.jsonl").read_text().splitlines()]
    column = fields.get("label_column", "label")
    expected = [row[column] for row in rows]
    assert labels == (pytest.approx(expected) if problem == "numbers" else expected)
    score, name = record["evaluation"], REACHED[problem][0]
    if problem == "numbers":
        assert score["test/pearson"] == pytest.approx(np.corrcoef(labels, answers)[0, 1], abs=1e-5)
        program = transformers.pipeline("text-classification", str(tmp_path))
        assert program(rows[0]["text"])[0]["score"] == pytest.approx(answers[0], abs=1e-4)
    elif problem != "tags":
        assert score["test/accuracy"] == np.mean(np.array(labels) == np.array(answers))
    assert f"| `test/{name}` | {score[f'test/{name}']:.4f} |" in (tmp_path / "README.md").read_text()
    assert f"eval/{name}" in score


def test_the_best_is_chosen_by_a_share_of_the_few_labels_there_are(
    bert_finetune: ModuleType, encoder: Path, labelled: Path
) -> None:
    fields = {"labels_per_class": 10, "eval_split": "train", "eval_fraction": 0.2}
    _, train, evals = bert_finetune.open_data(config_of(bert_finetune, encoder, labelled, encoder, **fields))
    assert np.bincount(train.labels).tolist() == [8, 8]
    assert np.bincount(evals["eval"].labels).tolist() == [2, 2]
    _, all_ten, _ = bert_finetune.open_data(
        config_of(bert_finetune, encoder, labelled, encoder, labels_per_class=10, eval_split="test")
    )
    assert {*train.texts, *evals["eval"].texts} == {*all_ten.texts}


def test_a_run_that_gets_no_better_ends_and_stays_ended(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    fields = {"learning_rate": 1e-9, "patience": 2, "eval_every": 1, "max_steps": 50, "save_every": 0}
    cfg = config_of(bert_finetune, encoder, labelled, tmp_path, **fields)
    for _ in range(2):
        run(bert_finetune, cfg)
        record = json.loads((tmp_path / "run.json").read_text())
        assert record["steps"] == 3
        assert metric(tmp_path, "step") == [1, 2, 3]


def test_a_run_without_a_finite_metric_says_that_there_is_no_model(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = bert_finetune.evaluate

    def pretend(*arguments: Any) -> Any:
        tried = evaluate(*arguments)
        return tried._replace(metrics={**tried.metrics, "eval/accuracy": math.nan})

    monkeypatch.setattr(bert_finetune, "evaluate", pretend)
    with pytest.raises(cli.UsageError, match="best_metric: 'accuracy': expected a finite value of it once"):
        run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path, max_steps=3))
    assert not (tmp_path / "model.safetensors").exists()


def test_the_split_to_be_tried_on_does_not_choose(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    """Where test is the only other split, a part of the one to train on chooses."""
    _, train, evals = bert_finetune.open_data(config_of(bert_finetune, encoder, labelled, tmp_path, test_split="test"))
    assert len(train) + len(evals["eval"]) == 124
    assert len(evals["test"]) == 41
    _, _, evals = bert_finetune.open_data(bert_finetune.Config(eval_split="test"))
    assert list(evals) == ["eval"]
    both = config_of(bert_finetune, encoder, labelled, tmp_path, eval_split="test", test_split="test")
    with pytest.raises(cli.UsageError, match="test_split: 'test': expected another split than the one that chooses"):
        bert_finetune.open_data(both)


def test_a_number_that_equals_the_ignored_class_is_learnt_like_any_other(bert_finetune: ModuleType) -> None:
    logits = torch.zeros(3, 1)
    assert bert_finetune.loss_sum(logits, torch.tensor([-100.0, 1.0, 2.0])).item() == 10005.0
    assert bert_finetune.is_target(torch.tensor([-100.0, 1.0])).all()
    assert bert_finetune.is_target(torch.tensor([-100, 1])).tolist() == [False, True]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_several_seeds_are_run_by_two_processes_and_told_as_one(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    flags = {**TINY, "init": encoder, "data": labelled, "output_dir": tmp_path, "seeds": 3, "max_steps": 3}
    command = [
        str(bert_finetune.__file__),
        *(part for name, value in flags.items() for part in (f"--{name}", str(value))),
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    config = str(ROOT / "accelerate_configs" / "multi_cpu.yaml")
    done = subprocess.run([*launch, config, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "seeds.json").read_text())
    values = [
        json.loads((tmp_path / f"seed_{seed}" / "run.json").read_text())["evaluation"]["eval/loss"] for seed in range(3)
    ]
    assert summary["eval/loss"]["values"] == values
    assert len(set(values)) == 3
    assert summary["eval/loss"]["standard_error"] == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert f"eval/loss {np.mean(values):.4f} +- " in done.stdout


def test_a_probe_of_the_encoder_is_in_the_record(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    """Against features one text at a time, without padding."""
    run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path, probe=True, max_steps=2))
    tokenizer, model = (
        transformers.AutoTokenizer.from_pretrained(encoder),
        transformers.AutoModel.from_pretrained(encoder),
    )
    features, labels = {}, {}
    for split in ("train", "test"):
        rows = [json.loads(line) for line in (labelled / f"{split}.jsonl").read_text().splitlines()]
        inputs = [tokenizer(row["text"], truncation=True, max_length=32, return_tensors="pt") for row in rows]
        with torch.no_grad():
            last = [model(**text, output_hidden_states=True).hidden_states[-1][0] for text in inputs]
        features[split] = np.stack([states.mean(0).numpy() for states in last])
        labels[split] = np.array([["animal", "plant"].index(row["label"]) for row in rows])
    record = json.loads((tmp_path / "run.json").read_text())
    samples = (features["train"], labels["train"], features["test"], labels["test"])
    assert record["knn_accuracy"] == nearest_neighbours(*samples)
    assert record["linear_probe_accuracy"] == pytest.approx(linear_probe(*samples), abs=0.03)


def test_dry_run_leaves_nothing(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for problem in PROBLEMS.values():
        fields = {**problem, "dry_run": True}
        run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path / "run", **fields))
        printed = capsys.readouterr().out
        for expected in ("first row: [CLS]", "memory: activations", "one update", "flops_per_row"):
            assert expected in printed
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def runs(bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two micro-batches a process; without dropout, whose masks are a process's own."""
    fields = {**TINY, "init": str(encoder), "max_steps": 6, "per_device_batch_size": 2, "dropout": 0.0}
    tags = {**fields, "text_column": "words", "label_column": "tags"}
    return Runs(bert_finetune, {"classes": fields, "tags": tags}, labelled, tmp_path_factory.mktemp("engines"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "kind"), [pytest.param(*pair, marks=pytest.mark.slow) for pair in engines.pairs("bert/finetune.py")]
)
def test_engine_equals_one_process(runs: Runs, engine: str, kind: str) -> None:
    run_dir, other = runs.of_engine(engine, kind), runs.of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    for name in ("eval/accuracy", "eval/entity_f1"):
        assert metric(run_dir, name) == metric(other, name), name
    for name, value in weights(run_dir).items():
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is rounding alone
            torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopping_two_processes_and_going_on_is_exact(runs: Runs, tmp_path: Path) -> None:
    fields = {**runs.fields["tags"], "save_every": 0}
    status, output = runs.run("multi_cpu", tmp_path / "run", fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 3 of 6, which is evaluated when" in output
    assert_no_traceback(output)
    status, output = runs.run("multi_cpu", tmp_path / "run", fields)
    assert status == 0, output
    assert results_of(tmp_path / "run") == results_of(runs.of_engine("multi_cpu", "tags"))


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "init": encoder, "data": labelled, "push_every": 6}
    program = "print(pipeline('text-classification', 'tester/mine')('the dog')[0]['label'])"
    answer, pushed = push_and_load(bert_finetune, fields, program, tmp_path)
    assert answer in ("animal\n", "plant\n")
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "figures/loss.png"} <= pushed


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    bert_finetune: ModuleType, encoder: Path, labelled: Path, reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(encoder, tmp_path / "no_tokenizer", ignore=shutil.ignore_patterns("token*", "vocab*"))
    shutil.copytree(encoder, tmp_path / "headless")
    save_file({"classifier.bias": torch.zeros(2)}, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    cases = {
        "data: '/no/such.csv'": {"data": "/no/such.csv"},
        "text_column: 'body': expected a column of": {"text_column": "body"},
        "text_pair_column: 'body': expected a column of": {"text_pair_column": "body"},
        "label_column: 'body': expected a column of": {"label_column": "body"},
        "tokenizer: ''": {"init": "scratch"},
        "expected a tokenizer's folder or Hub id": {"init": str(tmp_path / "no_tokenizer")},
        "init: '/no/such/model': expected": {"init": "/no/such/model", "tokenizer": str(encoder)},
        "expected the weights of an encoder, of which": {"init": str(tmp_path / "headless")},
        "seq_length: 64: expected at most 48": {"seq_length": 64},
        "probe: True: expected False": {"probe": True, "label_column": "score"},
        "labels_per_class: 2: expected 0": {"labels_per_class": 2, "label_column": "score"},
        "best_metric: 'perplexity': expected one of": {"best_metric": "perplexity"},
        "best_metric: 'pearson': expected a metric of classes": {"best_metric": "pearson"},
        "eval_split: 'dev': expected one of the splits": {"eval_split": "dev"},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "test_split: 'train': expected another split": {"test_split": "train"},
        "test_split: 'dev': expected one of the splits": {"test_split": "dev"},
        "label_column: 'text': expected another column than text": {"label_column": "text"},
        "label_column: 'label': expected another column than text, label": {"text_pair_column": "label"},
        "patience: 3: expected 0 where eval_every is 0": {"patience": 3, "eval_every": 0},
        "keep_head: True: expected init to have all weights": {"keep_head": True},
        "2 classes (B-LIVING, O); it has a head of 2 classes (animal, plant)": {
            **PROBLEMS["tags"],
            "init": str(reference),
            "keep_head": True,
        },
        "keep_head: True: expected init to have a head for numbers; it has a head of 2 classes": {
            **PROBLEMS["numbers"],
            "init": str(reference),
            "keep_head": True,
        },
        "keep_head: True: expected a model to start from": {
            "init": "scratch",
            "tokenizer": str(encoder),
            "keep_head": True,
        },
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(bert_finetune, config_of(bert_finetune, encoder, labelled, tmp_path / "run", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


# -- GLUE --------------------------------------------------------------------------------------------------------------

READ_GLUE = """
import json, os
from tests.conftest import load_recipe
os.environ["HF_HUB_OFFLINE"] = "0"
finetune = load_recipe("bert/finetune.py")
for name, task in finetune.TASKS.items():
    if task.data == finetune.GLUE:
        _, train, evals = finetune.open_data(finetune.Config(task=name))
        [held_out] = evals.values()
        assert held_out.class_names == train.class_names
        names = finetune.metrics_of(finetune.Config(task=name), task, train.problem)
        print(json.dumps([name, train.problem, list(train.class_names), train.pairs is not None, len(held_out), names]))
"""
COLUMNS = {  # of the data set on the Hub, in its order, and its classes
    "cola": (["sentence"], ["unacceptable", "acceptable"]),
    "sst2": (["sentence"], ["negative", "positive"]),
    "mrpc": (["sentence1", "sentence2"], ["not_equivalent", "equivalent"]),
    "qqp": (["question1", "question2"], ["not_duplicate", "duplicate"]),
    "stsb": (["sentence1", "sentence2"], []),
    "mnli": (["premise", "hypothesis"], ["entailment", "neutral", "contradiction"]),
    "qnli": (["question", "sentence"], ["entailment", "not_entailment"]),
    "rte": (["sentence1", "sentence2"], ["entailment", "not_entailment"]),
    "wnli": (["sentence1", "sentence2"], ["not_entailment", "entailment"]),
}


def glue_files(folder: Path) -> dict[str, bytes]:
    """Small data of the same form: a configuration for each task, Parquet, labels of -1 in the test splits."""
    files, configs = {}, []
    for task, (columns, names) in COLUMNS.items():
        label = datasets.ClassLabel(names=names) if names else datasets.Value("float32")
        features = {**dict.fromkeys(columns, datasets.Value("string")), "label": label, "idx": datasets.Value("int32")}
        evals = ["validation_matched", "validation_mismatched"] if task == "mnli" else ["validation"]
        configs.append(f"- config_name: {task}\n  data_files:")
        for split, number in (("train", 12), *((split, 6) for split in evals), ("test", 3)):
            labels = [-1 if split == "test" else n % len(names) if names else n / 3 for n in range(number)]
            texts = {column: [f"{column} {n} {n % 3}" for n in range(number)] for column in columns}
            table = datasets.Dataset.from_dict(
                {**texts, "label": labels, "idx": list(range(number))}, features=datasets.Features(features)
            )
            table.to_parquet(folder / "one.parquet")
            files[f"{task}/{split}-00000-of-00001.parquet"] = (folder / "one.parquet").read_bytes()
            configs.append(f"  - split: {split}\n    path: {task}/{split}-*")
    return {**files, "README.md": ("---\nconfigs:\n" + "\n".join(configs) + "\n---\n").encode()}


@pytest.mark.slow
def test_every_task_of_glue_is_read_from_the_hub_and_trained_on(
    bert_finetune: ModuleType, encoder: Path, tmp_path: Path
) -> None:
    """Through the real client, against a Hub on loopback that has small data in the form of nyu-mll/glue."""
    hub = start_hub()
    hub.repositories["datasets", bert_finetune.GLUE] = Repository(private=False)
    hub.repositories["datasets", bert_finetune.GLUE].commit(glue_files(tmp_path), "files")
    environment = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    options: dict[str, Any] = {"cwd": ROOT, "env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([sys.executable, "-c", READ_GLUE], **options)
    assert done.returncode == 0, done.stderr
    found = {line[0]: line[1:] for line in map(json.loads, done.stdout.splitlines())}
    assert found.keys() == {*COLUMNS, "mnli_mismatched"}
    for task, (problem, names, has_pairs, number, metrics) in found.items():
        columns, expected = COLUMNS[task.removesuffix("_mismatched")]
        assert (names, has_pairs, number) == (expected, len(columns) == 2, 6)
        assert problem == ("classes" if expected else "numbers")
        assert metrics == {
            "stsb": ["pearson", "spearman"],
            "cola": ["matthews_correlation", "accuracy", "macro_f1"],
            "mrpc": ["f1", "accuracy", "macro_f1"],
            "qqp": ["f1", "accuracy", "macro_f1"],
        }.get(task, ["accuracy", "macro_f1"])
    fields = {**TINY, "task": "stsb", "init": encoder, "output_dir": tmp_path / "run"}
    flags = [f"--{name}={value}" for name, value in fields.items()]
    done = subprocess.run([sys.executable, str(bert_finetune.__file__), *flags], **options)
    hub.stop()
    assert done.returncode == 0, done.stderr
    assert "| `eval/spearman` |" in (tmp_path / "run" / "README.md").read_text()
