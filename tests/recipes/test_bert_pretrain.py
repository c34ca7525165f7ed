import itertools
import json
import math
import random
import re
import shutil
import signal
import subprocess
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
from hypothesis import given, settings
from hypothesis import strategies as st

from shared import command_line as cli
from shared.data.batches import IGNORED, micro_batches
from shared.text.wordpiece import train_wordpiece
from tests.conftest import ROOT, WORDS, load_recipe
from tests.launching import preloaded_python
from tests.recipes.runs import assert_same_weights, metrics_of, push_and_load, results_of, run, run_card, weights

TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seq_length": 32,
    "max_positions": 48,
    "vocab_size": 100,
    "global_batch_size": 8,
    "max_steps": 12,
    "warmup_steps": 2,
    "log_every": 1,
    "eval_fraction": 0.2,
    "learning_rate": 0.01,
    "muon_learning_rate": 0.02,
}


def config_of(bert: ModuleType, corpus: Path, run_dir: Path, **fields: Any) -> Any:
    return bert.Config(**{**TINY, "data": str(corpus), "output_dir": str(run_dir), **fields})


@pytest.fixture(scope="module")
def reference(bert: ModuleType, sentences_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over more than two epochs that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(bert, config_of(bert, sentences_file, run_dir, save_every=1, keep_checkpoints=100, dropout=0.1))
    return run_dir


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return train_wordpiece([" ".join(WORDS)] * 20, vocab_size=100, seq_length=32, lowercase=True)


def test_the_rate_falls_from_the_peak_or_on_the_line_from_the_start(bert: ModuleType) -> None:
    cfg = bert.Config(max_steps=50, schedule_steps=100, warmup_steps=20)
    assert [bert.learning_rate_factor(cfg, step) for step in (20, 60)] == pytest.approx([0.8, 0.4])
    cfg = bert.Config(max_steps=100, warmup_steps=20, decay_from="warmup")
    assert [bert.learning_rate_factor(cfg, step) for step in (20, 60, 100)] == pytest.approx([1.0, 0.5, 0.0])


# -- masking -----------------------------------------------------------------------------------------------------------


def row_of(tokenizer: Any, first: str, second: str, seq_length: int = 48) -> dict[str, np.ndarray]:
    encoded = tokenizer(first, second, padding="max_length", truncation=True, max_length=seq_length)
    return {name: np.array(values) for name, values in encoded.items()}


texts = st.lists(st.sampled_from([*WORDS, "believable", "treehouse", "catdog"]), min_size=1, max_size=16).map(" ".join)


@given(texts, texts, st.sampled_from([0.15, 0.3, 0.5]), st.booleans(), st.integers(0, 2**62))
@settings(max_examples=300, deadline=None)
def test_masking_hides_the_asked_share_of_the_text(
    first: str, second: str, fraction: float, whole_words: bool, seed: int
) -> None:
    bert = load_recipe("bert/pretrain.py")
    tokenizer = train_wordpiece([" ".join(WORDS)] * 20, vocab_size=60, seq_length=32, lowercase=True)
    row, vocabulary = row_of(tokenizer, first, second), bert.wordpiece.look_up_vocabulary(tokenizer)
    masked = bert.mask_tokens(row, vocabulary, fraction, whole_words, seed)
    again = bert.mask_tokens(row, vocabulary, fraction, whole_words, seed)
    assert all(np.array_equal(masked[name], again[name]) for name in masked)
    is_text = (row["attention_mask"] == 1) & ~np.isin(row["input_ids"], tokenizer.all_special_ids)
    is_target = masked["labels"] != IGNORED
    positions = masked["masked_positions"][is_target]
    assert len(masked["labels"]) == round(45 * fraction)
    assert is_text[positions].all()
    assert len(set(positions.tolist())) == len(positions)
    assert np.array_equal(masked["labels"][is_target], row["input_ids"][positions])
    changed = masked["input_ids"] != row["input_ids"]
    assert set(np.flatnonzero(changed)) <= set(positions.tolist())
    assert not set(masked["input_ids"][changed].tolist()) & (set(tokenizer.all_special_ids) - {4})
    asked = max(1, round(int(is_text.sum()) * fraction))
    if not whole_words:
        assert len(positions) == asked
        return
    # Whole words, and so many that none of the others fits.
    words: list[list[int]] = []
    for position in np.flatnonzero(is_text).tolist():
        piece = tokenizer.convert_ids_to_tokens(int(row["input_ids"][position]))
        if piece.startswith("##") and is_text[position - 1]:
            words[-1].append(position)
        else:
            words.append([position])
    chosen = set(positions.tolist())
    assert all(set(word) <= chosen or not set(word) & chosen for word in words)
    left = [len(word) for word in words if not set(word) & chosen]
    assert len(positions) <= asked
    assert not left or min(left) > asked - len(positions)


def test_eight_of_ten_hidden_tokens_are_masks(bert: ModuleType, tokenizer: Any) -> None:
    row, vocabulary = row_of(tokenizer, " ".join(WORDS), " ".join(WORDS)), bert.wordpiece.look_up_vocabulary(tokenizer)
    fates = np.zeros(3)
    for seed in range(1500):
        masked = bert.mask_tokens(row, vocabulary, 0.3, False, seed)
        is_target = masked["labels"] != IGNORED
        seen = masked["input_ids"][masked["masked_positions"][is_target]]
        labels = masked["labels"][is_target]
        fates += [(seen == tokenizer.mask_token_id).sum(), (seen == labels).sum(), len(seen)]
    is_mask, is_kept, number = fates
    random_hits = 0.1 / len(vocabulary.ordinary_ids)  # a random token can be the right one
    assert abs(is_mask / number - 0.8) < 3 * (0.16 / number) ** 0.5
    assert abs(is_kept / number - 0.1 - random_hits) < 3 * (0.09 / number) ** 0.5


# -- the method --------------------------------------------------------------------------------------------------------


def random_batch(bert: ModuleType, tokenizer: Any, rows: int, seed: int) -> dict[str, torch.Tensor]:
    """Pairs of different lengths, with 1 to 8 masked tokens each: a mean of means would differ in the second digit."""
    draw, vocabulary = random.Random(seed), bert.wordpiece.look_up_vocabulary(tokenizer)
    samples = []
    for row in range(rows):
        first, second = (" ".join(draw.choices(WORDS, k=draw.randint(1, 2 + row))) for _ in range(2))
        sample = bert.mask_tokens(row_of(tokenizer, first, second, 32), vocabulary, 0.3, False, seed + row)
        samples.append({**sample, "next_sentence_label": np.array(draw.randint(0, 1))})
    [batch] = micro_batches(samples, rows)
    return {name: torch.from_numpy(values) for name, values in bert.cut_padding(batch).items()}


@pytest.mark.parametrize("architecture", ["bert", "megatron"])
def test_initial_loss_is_that_of_a_uniform_guess(bert: ModuleType, tokenizer: Any, architecture: str) -> None:
    model = bert.build_model(bert.Config(**{**TINY, "architecture": architecture}), tokenizer)
    batch = random_batch(bert, tokenizer, rows=64, seed=0)
    mlm, nsp = bert.loss_sums(bert.forward(model, batch), batch)
    assert model.config.vocab_size % 64 == 0
    assert mlm.item() / (batch["labels"] != IGNORED).sum() == pytest.approx(math.log(model.config.vocab_size), rel=0.05)
    assert nsp.item() / 64 == pytest.approx(math.log(2), rel=0.05)


@pytest.mark.parametrize("architecture", ["bert", "megatron"])
def test_loss_and_weights_are_those_of_the_library_s_class(
    bert: ModuleType, tokenizer: Any, tmp_path: Path, architecture: str
) -> None:
    model = bert.build_model(bert.Config(**{**TINY, "architecture": architecture}), tokenizer)
    model.save_pretrained(tmp_path)
    library_class = getattr(transformers, json.loads((tmp_path / "config.json").read_text())["architectures"][0])
    theirs, loading = library_class.from_pretrained(tmp_path, output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    assert type(theirs).__module__.startswith("transformers.")
    batch = random_batch(bert, tokenizer, rows=6, seed=1)
    dense = torch.full_like(batch["input_ids"], IGNORED)
    is_target = batch["labels"] != IGNORED
    rows = torch.arange(6)[:, None].expand_as(is_target)
    dense[rows[is_target], batch["masked_positions"][is_target]] = batch["labels"][is_target]
    inputs = {name: batch[name] for name in ("input_ids", "token_type_ids", "attention_mask", "next_sentence_label")}
    expected = theirs(**inputs, labels=dense).loss.item()
    mlm, nsp = bert.loss_sums(bert.forward(model, batch), batch)
    assert mlm.item() / is_target.sum().item() + nsp.item() / 6 == pytest.approx(expected, rel=1e-5)
    assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "optimizer", ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "lamb"))]
)
def test_one_batch_is_overfitted(bert: ModuleType, tokenizer: Any, optimizer: str) -> None:
    rate = {"muon": 3e-3, "adamw": 1e-2, "lamb": 5e-3}[optimizer]
    cfg = bert.Config(**{**TINY, "optimizer": optimizer, "learning_rate": rate})
    accelerator, model, built = prepared(bert, cfg, tokenizer, accumulation=1, dtype=torch.float32)
    batch = random_batch(bert, tokenizer, rows=8, seed=2)
    losses = [bert.train_update(cfg, accelerator, model, built, [batch], step)[0].sum().item() for step in range(300)]
    assert losses[0] > 4
    assert losses[-1] < 0.2


@pytest.mark.parametrize("sizes", [(4, 4), (2, 2, 2, 2), (1,) * 8, (5, 3)])
def test_accumulation_is_exact(bert: ModuleType, tokenizer: Any, sizes: tuple[int, ...]) -> None:
    cfg = bert.Config(**{**TINY, "optimizer": "adamw"})
    whole = random_batch(bert, tokenizer, rows=8, seed=3)
    results = []
    for parts in ((8,), sizes):
        accelerator, model, built = prepared(bert, cfg, tokenizer, accumulation=len(parts), dtype=torch.float64)
        edges = itertools.pairwise(np.cumsum([0, *parts]))
        batches = [{name: values[first:last] for name, values in whole.items()} for first, last in edges]
        updates = [bert.train_update(cfg, accelerator, model, built, batches, step) for step in range(3)]
        results.append(
            (updates[-1][0], updates[-1][1].item(), [parameter.detach() for parameter in model.parameters()])
        )
    (losses, norm, parameters), (other_losses, other_norm, other_parameters) = results
    torch.testing.assert_close(losses, other_losses, rtol=1e-10, atol=0)
    assert norm == pytest.approx(other_norm, rel=1e-10)
    for one, other in zip(parameters, other_parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_gradient_checkpointing_changes_nothing(bert: ModuleType, tokenizer: Any) -> None:
    losses = []
    for checkpointing in (False, True):
        cfg = bert.Config(**TINY, gradient_checkpointing=checkpointing)
        accelerator, model, built = prepared(bert, cfg, tokenizer, accumulation=1, dtype=torch.float32)
        batch = random_batch(bert, tokenizer, rows=4, seed=2)
        updates = [bert.train_update(cfg, accelerator, model, built, [batch], step)[0].tolist() for step in range(3)]
        losses.append(updates)
        assert model.bert.encoder.layer[0].gradient_checkpointing == checkpointing
    assert losses[0] == losses[1]


def test_non_finite_gradient_changes_nothing(bert: ModuleType, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = bert.Config(**TINY)
    accelerator, model, built = prepared(bert, cfg, tokenizer, accumulation=1, dtype=torch.float32)
    batch = random_batch(bert, tokenizer, rows=4, seed=2)
    bert.train_update(cfg, accelerator, model, built, [batch], 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_sums = bert.loss_sums
    monkeypatch.setattr(bert, "loss_sums", lambda *args: [nll * math.nan for nll in loss_sums(*args)])
    _, grad_norm = bert.train_update(cfg, accelerator, model, built, [batch], 1)
    assert not math.isfinite(grad_norm)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))


def prepared(bert: ModuleType, cfg: Any, tokenizer: Any, accumulation: int, dtype: torch.dtype) -> Any:
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = bert.build_model(cfg, tokenizer).to(dtype)
    return accelerator, *accelerator.prepare(model, bert.build_optimizer(cfg, model))


# -- the run -----------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_what_the_ecosystem_reads(reference: Path) -> None:
    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert entries[-1]["train/loss"] < entries[0]["train/loss"] - 1
    for name in ("PreTraining", "MaskedLM", "NextSentencePrediction", "SequenceClassification"):
        model, loading = getattr(transformers, f"AutoModelFor{name}").from_pretrained(
            reference, output_loading_info=True
        )
        assert type(model).__name__ == f"MegatronBertFor{name}"
        assert {key.split(".")[0] for key in loading["missing_keys"]} <= {"classifier"}
    fill = transformers.pipeline("fill-mask", str(reference))
    assert fill("The [MASK] sees the dog.")[0]["token_str"] in [*WORDS, ".", "un"]
    for name in ("README.md", "config.yaml", "run.json", "recipe.py", "figures/loss.png", "samples/step_00000012.txt"):
        assert (reference / name).stat().st_size > 0, name
    samples = (reference / "samples/step_00000012.txt").read_text()
    assert samples.count("second segment") == 4
    assert samples.count("not ") > 3
    assert f"{entries[-1]['eval/mlm_accuracy']:.4f}" in (reference / "README.md").read_text()


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_evaluation_counts_every_pair_once(bert: ModuleType, reference: Path, sentences_file: Path) -> None:
    """Against the plainest way: the library's model, one pair at a time, logits at every position."""
    cfg = config_of(bert, sentences_file, reference)
    tokenizer, _, sources = bert.open_data(cfg, Accelerator(cpu=True))
    [pairs] = sources.values()
    vocabulary = bert.wordpiece.look_up_vocabulary(tokenizer)
    model = transformers.AutoModelForPreTraining.from_pretrained(reference)
    mlm = nsp = 0.0
    right = next_right = targets = 0
    with torch.no_grad():
        for pair in range(len(pairs.epoch(0))):
            row = {name: torch.as_tensor(x) for name, x in bert.row_to_evaluate(pairs, pair, vocabulary).items()}
            names = ("input_ids", "token_type_ids", "attention_mask")
            output = model(**{name: row[name][None] for name in names})
            is_target = row["labels"] != IGNORED
            labels, logits = row["labels"][is_target], output.prediction_logits[0, row["masked_positions"][is_target]]
            mlm += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            nsp += torch.nn.functional.cross_entropy(output.seq_relationship_logits, row["next_sentence_label"][None])
            right += int((logits.argmax(-1) == labels).sum())
            next_right += int(output.seq_relationship_logits[0].argmax() == row["next_sentence_label"])
            targets += len(labels)
    found, number = metrics_of(reference)[-1], len(pairs.epoch(0))
    assert found["eval/mlm_loss"] == pytest.approx(mlm / targets, rel=1e-5)
    assert found["eval/nsp_loss"] == pytest.approx(float(nsp) / number, rel=1e-5)
    assert found["eval/loss"] == pytest.approx(found["eval/mlm_loss"] + found["eval/nsp_loss"])
    assert found["eval/mlm_accuracy"] == pytest.approx(right / targets)
    assert found["eval/nsp_accuracy"] == pytest.approx(next_right / number)
    own = bert.MODEL_CLASSES[model.config.model_type].from_pretrained(reference)
    both = bert.evaluate(Accelerator(cpu=True), own, {"one": pairs, "other": pairs}, vocabulary, 4)
    for name in ("loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"):
        for key in (f"eval/{name}", f"eval/one/{name}", f"eval/other/{name}"):
            assert both[key] == pytest.approx(found[f"eval/{name}"], rel=1e-5), key


def test_no_pair_crosses_the_split(bert: ModuleType, sentences_file: Path, tmp_path: Path) -> None:
    """Two corpora, one of them with a column of its own: trained on together, each evaluated by itself."""
    other = tmp_path / "others.jsonl"
    lines = [json.loads(line)["text"] for line in sentences_file.read_text().splitlines()[:9]]
    other.write_text("".join(json.dumps({"body": f"A tree. {text}", "text": "x"}) + "\n" for text in lines))
    fields = {"data": f"{sentences_file},{other}:text_column=body", "cache_dir": str(tmp_path / "cache")}
    _, train, sources = bert.open_data(config_of(bert, sentences_file, tmp_path, **fields), Accelerator(cpu=True))
    assert list(sources) == ["sentences", "others"]
    documents = [
        {tuple(cache.read(first, last)) for first, last in itertools.pairwise([0, *cache.document_ends.tolist()])}
        for cache in (train.cache, *(pairs.cache for pairs in sources.values()))
    ]
    assert not documents[0] & (documents[1] | documents[2])
    assert sum(map(len, documents)) == 14 + 9
    assert min(map(len, documents)) >= 2


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_resuming_is_exact_to_the_bit(
    bert: ModuleType, sentences_file: Path, reference: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    """The corpus has few pairs, so 12 updates cross epoch borders; dropout is on."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        shutil.copy(reference / name, run_dir)
    shutil.copytree(reference / f"checkpoints/step_{stop:08d}", run_dir / f"checkpoints/step_{stop:08d}")
    run(bert, config_of(bert, sentences_file, run_dir, dropout=0.1, num_workers=workers))
    assert_same_weights(run_dir, reference)
    assert results_of(run_dir) == results_of(reference)


def test_the_reference_crosses_epoch_borders(bert: ModuleType, sentences_file: Path, reference: Path) -> None:
    _, pairs, _ = bert.open_data(config_of(bert, sentences_file, reference), Accelerator(cpu=True))
    assert 1 < pairs.updates_per_epoch(8) < 6


@pytest.mark.parametrize("optimizer", ["lamb", "adamw"])
def test_other_optimizers_resume_exactly(
    bert: ModuleType, sentences_file: Path, tmp_path: Path, optimizer: str
) -> None:
    options = {"optimizer": optimizer, "save_every": 2, "keep_checkpoints": 9, "max_steps": 6, "weight_decay": 0.01}
    run(bert, config_of(bert, sentences_file, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}")
    run(bert, config_of(bert, sentences_file, tmp_path / "stopped", **options))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert results_of(tmp_path / "whole") == results_of(tmp_path / "stopped")


def test_second_phase_takes_weights_and_optimizer(
    bert: ModuleType, sentences_file: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With longer rows. At a rate of nearly 0 the model stays; the optimizer begins with the first phase's state."""
    begun = []
    train_update = bert.train_update

    def look_and_train(cfg: Any, accelerator: Any, model: Any, optimizer: Any, batches: Any, step: int) -> Any:
        states = optimizer.state_dict()["state"].values()
        begun.append([state["momentum_buffer"].clone() for state in states if "momentum_buffer" in state])
        return train_update(cfg, accelerator, model, optimizer, batches, step)

    monkeypatch.setattr(bert, "train_update", look_and_train)
    options = {"init": str(reference), "max_steps": 2, "learning_rate": 1e-12, "muon_learning_rate": 1e-12}
    for init_optimizer in (True, False):
        run_dir = tmp_path / str(init_optimizer)
        fields = {**options, "seq_length": 48, "init_optimizer": init_optimizer}
        run(bert, config_of(bert, sentences_file, run_dir, **fields))
        assert [entry["step"] for entry in metrics_of(run_dir)] == [1, 2]
        for name, value in weights(run_dir).items():
            torch.testing.assert_close(value, weights(reference)[name], rtol=0, atol=1e-6)
    saved = torch.load(reference / "checkpoints/step_00000012/optimizer.bin", weights_only=True)["state"].values()
    expected = [state["momentum_buffer"] for state in saved if "momentum_buffer" in state]
    assert len(expected) > 10
    assert all(torch.equal(one, two) for one, two in zip(begun[0], expected, strict=True))
    assert begun[2] == []


@pytest.mark.parametrize("goes_on", [False, True])
def test_dry_run_leaves_nothing(
    bert: ModuleType,
    sentences_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    reference: Path,
    goes_on: bool,
) -> None:
    fields = {"init": str(reference), "learning_rate": 0.01, "muon_learning_rate": 0.01} if goes_on else {}
    run(bert, config_of(bert, sentences_file, tmp_path / "run", dry_run=True, **fields))
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for expected in ("first row: [CLS]", "memory: activations", "one checkpoint", "parameters", "one evaluation"):
        assert expected in printed


def test_dry_run_reads_only_the_beginning_of_the_data(
    bert: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    lines = (json.dumps({"text": f"The cat saw {number} dogs. It ran."}) + "\n" for number in range(20_000))
    corpus.write_text("".join(lines))
    monkeypatch.setattr(bert, "DRY_RUN_CHARACTERS", 3000)
    read = []
    monkeypatch.setattr(bert, "split_corpus", split_and_count(bert.split_corpus, read))
    run(bert, config_of(bert, corpus, tmp_path / "run", dry_run=True))
    assert "updates_per_epoch    unknown" in re.sub(" +", "    ", capsys.readouterr().out)
    assert 80 < read[0] < 130  # of 20,000


def split_and_count(split_corpus: Any, read: list[int]) -> Any:
    def split(documents: Any, *args: Any, **options: Any) -> Any:
        read.append(len(list(documents)))
        return split_corpus(documents, *args, **options)

    return split


def test_a_stopped_run_goes_on(sentences_file: Path, tmp_path: Path) -> None:
    fields = {**TINY, "max_steps": 600, "data": sentences_file, "output_dir": tmp_path / "run"}
    command = [*preloaded_python(), str(ROOT / "recipes/bert/pretrain.py"), *(f"--{k}={v}" for k, v in fields.items())]
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
    bert: ModuleType, sentences_file: Path, reference: Path, tmp_path: Path
) -> None:
    """The Hub refuses two commits on the way; the run is the same as without a push, and the token shows nowhere."""
    fields = {**TINY, "data": sentences_file, "dropout": 0.1, "push_every": 6}
    program = "print(pipeline('fill-mask', 'tester/mine')('the [MASK] sees a house')[0]['sequence'])"
    answer, pushed = push_and_load(bert, fields, program, tmp_path)
    assert answer.endswith("sees a house\n")
    assert_same_weights(tmp_path / "run", reference)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "figures/loss.png"} <= pushed


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    bert: ModuleType, sentences_file: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "one.txt").write_text("One document. Of two sentences.\n")
    (tmp_path / "lone.jsonl").write_text('{"text": "Alone."}\n' * 3)
    big = train_wordpiece([(ROOT / "README.md").read_text()], vocab_size=400, seq_length=32, lowercase=True)
    big.save_pretrained(tmp_path / "tokenizer")
    run_dir, alien = tmp_path / "run", tmp_path / "alien"
    transformers.GPT2Config().save_pretrained(alien)
    cases = {
        "data: '/no/such.txt'": {"data": "/no/such.txt"},
        "expected at least one document": {"data": str(tmp_path / "empty.txt")},
        "expected at least 2 documents of 2 sentences or more": {"data": str(tmp_path / "one.txt")},
        "got 0 (3 have no two": {"data": str(tmp_path / "lone.jsonl")},
        "vocab_size: 10: expected at least": {"vocab_size": 10},
        "seq_length: 64: expected at most max_positions": {"seq_length": 64},
        "seq_length: 4: expected at least 8": {"seq_length": 4},
        "hidden_size: 33: expected a multiple of num_heads": {"hidden_size": 33},
        "mask_fraction: 0.0": {"mask_fraction": 0.0},
        "expected a model with hidden_size 64, as configured, got 32": {"init": str(reference), "hidden_size": 64},
        "expected a model with max_position_embeddings 64": {"init": str(reference), "max_positions": 64},
        "expected a model with model_type bert, as": {"init": str(reference), "architecture": "bert"},
        "got gpt2": {"init": str(alien), "tokenizer": str(reference)},
        "expected at most the 128 tokens of init": {"init": str(reference), "tokenizer": str(tmp_path / "tokenizer")},
        "init: 'scratch': expected a run folder with checkpoints": {"init_optimizer": True},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "global_batch_size: 8: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
        "eval_fraction: 0.0: expected more than 0": {"eval_fraction": 0.0},
        "language: 'English': expected a code": {"language": "English"},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(bert, config_of(bert, sentences_file, run_dir, **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
