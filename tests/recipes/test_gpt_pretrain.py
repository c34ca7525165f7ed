import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import GradientState
from accelerate.utils import GradientAccumulationPlugin

from shared import command_line as cli
from shared.data.batches import IGNORED
from shared.runtime import launch as launch_shared
from shared.text import streaming, tokenization
from tests.conftest import ROOT
from tests.launching import PYTHON, odd_mount, preloaded_python
from tests.recipes.runs import (
    assert_same,
    assert_same_weights,
    metric,
    metrics_of,
    push_and_load,
    results_of,
    run,
    run_card,
    state_at,
    weights,
)

TINY = {
    "hidden_size": 32,
    "num_layers": 2,
    "num_heads": 2,
    "seq_length": 32,
    "vocab_size": 300,
    "global_batch_size": 4,
    "max_steps": 12,
    "warmup_steps": 2,
    "log_every": 1,
}


def config_of(gpt: ModuleType, corpus: Path, run_dir: Path, **fields: Any) -> Any:
    return gpt.Config(**{**TINY, "data": str(corpus), "output_dir": str(run_dir), **fields})


def launch(*arguments: str, start_new_session: bool = False, **environment: str) -> subprocess.Popen[str]:
    python = PYTHON if start_new_session else preloaded_python()  # whose programs are not in the caller's session
    command = [*python, str(ROOT / "recipes" / "gpt" / "pretrain.py"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, **environment}
    return subprocess.Popen(command, cwd="/", env=environment, start_new_session=start_new_session, **pipes)


def flags(**fields: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in fields.items()]


@pytest.fixture(scope="module")
def reference(gpt: ModuleType, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run over more than two epochs that kept a checkpoint of every update."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    run(gpt, config_of(gpt, corpus, run_dir, save_every=1, keep_checkpoints=100, dropout=0.1))
    return run_dir


# -- the method --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tokenization.train_byte_level_bpe(["the cat sees the dog " * 50], vocab_size=300, seq_length=32)


def test_the_rate_ends_at_its_final_fraction(gpt: ModuleType) -> None:
    """Brown et al. 2020 end at a tenth, llm.c at nothing."""
    for schedule in ("wsd", "cosine"):
        cfg = gpt.Config(max_steps=100, warmup_steps=10, schedule=schedule)
        factors = [gpt.learning_rate_factor(dataclasses.replace(cfg, final_fraction=end), 100) for end in (0.0, 0.1)]
        assert factors == pytest.approx([0.0, 0.1])
        assert gpt.learning_rate_factor(cfg, 10) == 1


@pytest.mark.parametrize("architecture", ["nanochat", "gpt2", "llama"])
def test_initial_loss_is_that_of_a_uniform_guess(gpt: ModuleType, tokenizer: Any, architecture: str) -> None:
    cfg = gpt.Config(**{**TINY, "architecture": architecture})
    model = gpt.build_model(cfg, tokenizer)
    ids = torch.randint(len(tokenizer), (8, 32), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(32).expand(8, 32)
    logits = gpt.forward(model, {"input_ids": ids, "position_ids": positions})
    loss = gpt.causal_lm_loss_sum(logits, ids.roll(-1, 1)).item() / ids.numel()
    zeros = [name for name, weight in model.named_parameters() if weight.ndim == 2 and not weight.any()]
    assert len(zeros) == (2 * cfg.num_layers + 1 if architecture == "nanochat" else 0)
    assert model.config.vocab_size % 64 == 0
    assert loss == pytest.approx(math.log(model.config.vocab_size), rel=0.02)


@pytest.mark.parametrize("architecture", ["nanochat", "gpt2", "llama"])
def test_loss_is_that_of_the_library(gpt: ModuleType, tokenizer: Any, architecture: str) -> None:
    model = without_zeros(gpt.build_model(gpt.Config(**{**TINY, "architecture": architecture}), tokenizer))
    ids = torch.randint(len(tokenizer), (3, 20), generator=torch.Generator().manual_seed(1))
    theirs = model(input_ids=ids, labels=ids, use_cache=False).loss.item()
    labels = torch.cat([ids[:, 1:], torch.full((3, 1), IGNORED)], dim=1)
    logits = gpt.forward(model, {"input_ids": ids, "position_ids": torch.arange(20).expand(3, 20)})
    ours = gpt.causal_lm_loss_sum(logits, labels).item() / (labels != IGNORED).sum().item()
    assert ours == pytest.approx(theirs, rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_one_batch_is_overfitted(gpt: ModuleType, tokenizer: Any, optimizer: str) -> None:
    cfg = gpt.Config(**{**TINY, "optimizer": optimizer, "learning_rate": 1e-2})
    accelerator, model, built = prepared(gpt, cfg, tokenizer, accumulation=1, dtype=torch.float32)
    batch = random_batch(rows=4, seed=2)
    losses = [gpt.train_update(cfg, accelerator, model, built, [batch], step)[0].item() for step in range(80)]
    assert losses[0] > 5
    assert losses[-1] < 0.1


@pytest.mark.parametrize("micro_batches", [(4, 4), (2, 2, 2, 2), (1,) * 8, (5, 3)])
def test_accumulation_is_exact(gpt: ModuleType, tokenizer: Any, micro_batches: tuple[int, ...]) -> None:
    """Rows have different numbers of targets, so a mean of means would differ in the second digit."""
    cfg = gpt.Config(**{**TINY, "optimizer": "adamw", "architecture": "gpt2"})  # the others norm in float32
    whole = random_batch(rows=8, seed=3)
    for row in range(8):
        whole["labels"][row, : 3 * row] = IGNORED
    results = []
    for sizes in ((8,), micro_batches):
        accelerator, model, built = prepared(gpt, cfg, tokenizer, accumulation=len(sizes), dtype=torch.float64)
        edges = np.cumsum([0, *sizes])
        parts = [
            {name: values[first:last] for name, values in whole.items()} for first, last in itertools.pairwise(edges)
        ]
        update = [gpt.train_update(cfg, accelerator, model, built, parts, step) for step in range(3)]
        (loss, norm), parameters = update[-1], [parameter.detach() for parameter in model.parameters()]
        results.append((loss.item(), norm.item(), parameters))
    (loss, norm, parameters), (other_loss, other_norm, other_parameters) = results
    assert loss == pytest.approx(other_loss, rel=1e-10)
    assert norm == pytest.approx(other_norm, rel=1e-10)
    for one, other in zip(parameters, other_parameters, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_gradient_checkpointing_changes_nothing(gpt: ModuleType, tokenizer: Any) -> None:
    cfg = gpt.Config(**TINY)
    losses = []
    for checkpointing in (False, True):
        accelerator, model, built = prepared(gpt, cfg, tokenizer, accumulation=1, dtype=torch.float32)
        if checkpointing:
            model.activation_checkpointing_enable()
        batch = random_batch(rows=4, seed=2)
        losses.append([gpt.train_update(cfg, accelerator, model, built, [batch], step)[0].item() for step in range(3)])
    assert losses[0] == losses[1]


def test_non_finite_gradient_changes_nothing(gpt: ModuleType, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = gpt.Config(**TINY)
    accelerator, model, built = prepared(gpt, cfg, tokenizer, accumulation=1, dtype=torch.float32)
    batch = random_batch(rows=4, seed=2)
    gpt.train_update(cfg, accelerator, model, built, [batch], 0)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    loss_sum = gpt.causal_lm_loss_sum
    monkeypatch.setattr(gpt, "causal_lm_loss_sum", lambda logits, labels: loss_sum(logits, labels) * math.nan)
    _, grad_norm = gpt.train_update(cfg, accelerator, model, built, [batch], 1)
    assert not math.isfinite(grad_norm)
    assert all(torch.equal(one, two) for one, two in zip(before, model.parameters(), strict=True))
    monkeypatch.undo()
    assert math.isfinite(gpt.train_update(cfg, accelerator, model, built, [batch], 2)[1])


def without_zeros(model: Any) -> Any:
    """With a head of zeros all losses are one, and all other gradients are zero."""
    torch.manual_seed(0)
    for weight in model.parameters():
        if weight.ndim == 2 and not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return model


def prepared(gpt: ModuleType, cfg: Any, tokenizer: Any, accumulation: int, dtype: torch.dtype) -> Any:
    GradientState._reset_state()
    plugin = GradientAccumulationPlugin(num_steps=accumulation, sync_with_dataloader=False)
    accelerator = Accelerator(cpu=True, gradient_accumulation_plugin=plugin)
    model = without_zeros(gpt.build_model(cfg, tokenizer)).to(dtype)
    return accelerator, *accelerator.prepare(model, gpt.build_optimizer(cfg, model))


def random_batch(rows: int, seed: int) -> dict[str, torch.Tensor]:
    ids = torch.randint(280, (rows, 33), generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(32).expand(rows, 32)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:].clone(), "position_ids": positions}


# -- the run -----------------------------------------------------------------------------------------------------------


def test_run_learns_and_leaves_what_the_ecosystem_reads(reference: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    entries = metrics_of(reference)
    assert [entry["step"] for entry in entries] == list(range(1, 13))
    assert entries[-1]["train/loss"] < entries[0]["train/loss"] - 1
    assert entries[-1]["eval/perplexity"] == pytest.approx(math.exp(entries[-1]["eval/loss"]))
    assert AutoModelForCausalLM.from_pretrained(reference).config.model_type == "nanochat"
    assert AutoTokenizer.from_pretrained(reference)("a cat")["input_ids"][0] == 0
    assert "the cat" in pipeline("text-generation", str(reference))("the cat", max_new_tokens=4)[0]["generated_text"]
    for name in ("README.md", "config.yaml", "run.json", "recipe.py", "figures/loss.png", "samples/step_00000012.txt"):
        assert (reference / name).stat().st_size > 0, name
    card = (reference / "README.md").read_text()
    assert f"{entries[-1]['eval/bits_per_byte']:.4f}" in card


@pytest.mark.parametrize("architecture", ["nanochat", "gpt2"])
def test_the_code_of_the_card_runs(gpt: ModuleType, corpus: Path, tmp_path: Path, architecture: str) -> None:
    """GPT-2 has no positions beyond those of a row, fewer than a pipeline makes tokens unless told."""
    fields = {"architecture": architecture, "optimizer": "adamw", "max_steps": 1}
    run(gpt, config_of(gpt, corpus, tmp_path / "run", **fields))
    run_card(tmp_path / "run", tmp_path)


def test_evaluation_counts_every_document_once(gpt: ModuleType, reference: Path, corpus: Path) -> None:
    """Against the plainest way: each held-out document alone, cut into rows, its targets summed."""
    from transformers import AutoModelForCausalLM

    cfg = config_of(gpt, corpus, reference)
    tokenizer, train, evals = gpt.open_data(cfg, Accelerator(cpu=True))
    model = AutoModelForCausalLM.from_pretrained(reference)
    [rows] = evals.values()
    cache, nll, targets, first = rows.cache, 0.0, 0, 0
    assert len(cache.ends) + len(train[0].cache.ends) == 20
    with torch.no_grad():
        for last in cache.ends.tolist():
            ids = torch.from_numpy(cache.tokens[first:last].astype(np.int64))
            for start in range(0, len(ids) - 1, cfg.seq_length):
                inputs, labels = ids[start : start + 32][: len(ids) - 1 - start], ids[start + 1 : start + 33]
                logits = model(input_ids=inputs[None], use_cache=False).logits[0]
                nll += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                targets += len(labels)
            first = last
    text_bytes = cache.num_bytes
    assert tokenizer.decode(cache.tokens[: cache.ends[0]], skip_special_tokens=True)
    assert metrics_of(reference)[-1]["eval/loss"] == pytest.approx(nll / targets, rel=1e-5)
    assert metrics_of(reference)[-1]["eval/bits_per_byte"] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5)
    both = gpt.evaluate(Accelerator(cpu=True), model, {"one": rows, "other": rows}, 3, by_windows=False)
    for key in ("eval/bits_per_byte", "eval/one/bits_per_byte", "eval/other/bits_per_byte"):
        assert both[key] == pytest.approx(nll / math.log(2) / text_bytes, rel=1e-5), key
    assert both["eval/loss"] == pytest.approx(nll / targets, rel=1e-5)
    assert "eval/window_loss" not in both
    some = gpt.evaluate(Accelerator(cpu=True), model, {"one": rows}, 3, by_windows=False, most=2)
    bits = some["eval/loss"] / math.log(2) * targets / text_bytes
    assert some["eval/loss"] != both["eval/loss"]
    assert some["eval/bits_per_byte"] == pytest.approx(bits)


def test_evaluation_by_windows_is_that_of_the_stream(gpt: ModuleType, reference: Path, corpus: Path) -> None:
    """Documents with one end token between them, cut at every row's length, whatever lies across a cut or a border."""
    from transformers import AutoModelForCausalLM

    cfg = config_of(gpt, corpus, reference)
    tokenizer, _, evals = gpt.open_data(cfg, Accelerator(cpu=True))
    model = AutoModelForCausalLM.from_pretrained(reference)
    [rows] = evals.values()
    documents = np.split(rows.cache.tokens.astype(np.int64), rows.cache.ends[:-1])
    stream = torch.from_numpy(np.concatenate([documents[0], *(ids[1:] for ids in documents[1:])]))
    assert (stream == tokenizer.eos_token_id).sum() == len(documents) + 1
    number = (len(stream) - 1) // 32
    assert number >= 2
    with torch.no_grad():
        logits = model(stream[: number * 32].view(number, 32), use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), stream[1 : number * 32 + 1])
    results = gpt.evaluate(Accelerator(cpu=True), model, evals, 3, by_windows=True)
    assert results["eval/window_loss"] == pytest.approx(expected.item(), rel=1e-5)
    assert results["eval/loss"] != pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 10])
def test_resuming_is_exact_to_the_bit(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path, stop: int, workers: int
) -> None:
    """The corpus has few rows, so 12 updates cross epoch borders; dropout is on; the corpus lies elsewhere by then."""
    run_dir = tmp_path / "run"
    (run_dir / "checkpoints").mkdir(parents=True)
    for name in ("config.yaml", "run.json", "metrics.jsonl"):
        shutil.copy(reference / name, run_dir)
    shutil.copytree(reference / f"checkpoints/step_{stop:08d}", run_dir / f"checkpoints/step_{stop:08d}")
    moved = Path(shutil.copy(corpus, tmp_path / corpus.name))
    run(gpt, config_of(gpt, moved, run_dir, dropout=0.1, num_workers=workers))
    assert_same_weights(run_dir, reference)
    assert results_of(run_dir) == results_of(reference)


def test_the_reference_crosses_epoch_borders(gpt: ModuleType, corpus: Path, reference: Path) -> None:
    """One stop lies before the first border, one after it: what the tests above claim."""
    _, train, _ = gpt.open_data(config_of(gpt, corpus, reference), Accelerator(cpu=True))
    assert 5 < len(train[0]) / TINY["global_batch_size"] < 10


def test_a_finished_run_trains_no_step_more(gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    run(gpt, config_of(gpt, corpus, run_dir, dropout=0.1))
    assert_same_weights(run_dir, reference)
    assert metrics_of(run_dir) == metrics_of(reference)


def test_a_damaged_checkpoint_is_passed_over(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    weights_file = run_dir / "checkpoints" / "step_00000012" / "model.safetensors"
    content = bytearray(weights_file.read_bytes())
    content[-5] ^= 0xFF
    weights_file.write_bytes(content)
    run(gpt, config_of(gpt, corpus, run_dir, dropout=0.1))
    assert "model.safetensors has another checksum" in caplog.text
    assert_same_weights(run_dir, reference)


@pytest.mark.parametrize(
    ("number", "workers"),
    [
        pytest.param(signal.SIGTERM, 0, marks=pytest.mark.slow),
        (signal.SIGTERM, 2),
        pytest.param(signal.SIGINT, 2, marks=pytest.mark.slow),
    ],
)
def test_signal_saves_and_the_same_command_goes_on(
    corpus: Path, tmp_path: Path, number: signal.Signals, workers: int
) -> None:
    """The signal goes to all processes of the run, as a terminal, `timeout` and batch systems send it."""
    run_dir = tmp_path / "run"
    options = {**TINY, "max_steps": 400, "data": corpus, "output_dir": run_dir, "num_workers": workers}
    process = launch(*flags(**options), start_new_session=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            os.killpg(process.pid, number)
            break
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_STOPPED, errors
    assert errors.strip().splitlines()[-1].startswith("stopped: saved at step")
    saved = [entry["step"] for entry in metrics_of(run_dir)]
    assert saved == list(range(1, len(saved) + 1))
    assert (run_dir / "checkpoints" / f"step_{saved[-1]:08d}" / "manifest.json").is_file()


def test_a_signal_between_two_micro_batches_waits_for_the_update(
    gpt: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of the second update's four; half of an update's gradient is never saved or lost."""
    fields = {"max_steps": 4, "per_device_batch_size": 1, "eval_every": 0}
    run(gpt, config_of(gpt, corpus, tmp_path / "whole", **fields))
    forward, calls = gpt.forward, itertools.count(1)

    def signalled(*values: Any) -> Any:
        if next(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(*values)

    monkeypatch.setattr(gpt, "forward", signalled)
    with pytest.raises(cli.RunStopped, match="saved at step 2 of 4"):
        run(gpt, config_of(gpt, corpus, tmp_path / "run", **fields))
    assert next(calls) == 9
    run(gpt, config_of(gpt, corpus, tmp_path / "run", **fields))
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_ends_the_run_at_once(tmp_path: Path, number: signal.Signals) -> None:
    """While a large corpus is tokenised; a terminal sends Ctrl-C to the tokenising processes too."""
    (tmp_path / "large.txt").write_text("a sentence of some words, and another one; " * 3_000_000)
    arguments = flags(**TINY, data=tmp_path / "large.txt", output_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    tokenizer = tokenization.train_byte_level_bpe(["a sentence of some words"], vocab_size=300, seq_length=32)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = launch(*arguments, f"--tokenizer={tmp_path / 'tokenizer'}", start_new_session=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "cache" / "tokens").glob("parts-*/*/.00000.*/tokens.bin")):
        assert time.monotonic() < deadline, process.poll()
        time.sleep(0.05)
    os.killpg(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == -number
    assert "Traceback" not in errors
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(corpus: Path, tmp_path: Path) -> None:
    command = flags(data=corpus, output_dir=tmp_path / "run", max_steps=2000, save_every=0, log_every=1)
    first = launch(*command)
    while first.poll() is None and not (tmp_path / "run" / "metrics.jsonl").is_file():
        time.sleep(0.05)
    second = launch(*command)
    _, said = second.communicate(timeout=60)
    assert second.returncode == 2
    assert (
        f"error: output_dir: {str(tmp_path / 'run')!r}: expected a folder that no other run writes into, proc" in said
    )
    first.terminate()
    _, said = first.communicate(timeout=60)
    assert first.returncode == 75
    assert "saved at step" in said
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))


def test_too_many_bad_updates_stop_the_run(
    gpt: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss_sum = gpt.causal_lm_loss_sum
    monkeypatch.setattr(gpt, "causal_lm_loss_sum", lambda logits, labels: loss_sum(logits, labels) * math.inf)
    with pytest.raises(cli.TooManyNonFiniteUpdates, match="4 updates in a row"):  # 3, and what came meanwhile
        run(gpt, config_of(gpt, corpus, tmp_path / "run", max_bad_updates=3))
    assert metrics_of(tmp_path / "run")[-1]["train/skipped_updates"] == 4


@pytest.mark.slow
@pytest.mark.parametrize("lacking", [("locks:ENOLCK", "flush:EINVAL", "links"), ("locks:ENOSYS", "flush:EOPNOTSUPP")])
def test_a_file_system_like_those_over_a_network_is_trained_on(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lacking: Any
) -> None:
    """Stopped there and resumed, equal to the bit."""
    train_update, updates = gpt.train_update, itertools.count()

    def stopped_update(*values: Any) -> Any:
        if next(updates) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_update(*values)

    monkeypatch.setattr(gpt, "train_update", stopped_update)
    with odd_mount(tmp_path, *lacking) as mount:
        cfg = config_of(gpt, corpus, mount / "run", dropout=0.1, save_every=2)
        with pytest.raises(cli.RunStopped, match="saved at step 5"):
            run(gpt, cfg)
        run(gpt, cfg)
        assert_same(mount / "run", reference)


def test_a_loss_fifty_times_as_large_once_leaves_no_trace(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradient is clipped, so the losses after it are those of a run without it, nearly."""
    loss_sum, calls = gpt.causal_lm_loss_sum, itertools.count()
    monkeypatch.setattr(gpt, "causal_lm_loss_sum", lambda *values: loss_sum(*values) * (50 if next(calls) == 5 else 1))
    run(gpt, config_of(gpt, corpus, tmp_path / "run", dropout=0.1, eval_every=0))
    losses, usual = metric(tmp_path / "run", "train/loss"), metric(reference, "train/loss")
    assert losses[5] == pytest.approx(50 * usual[5], rel=1e-5)
    assert losses[6:] == pytest.approx(usual[6:], rel=0.05)


JUMPING_CLOCK = """
import itertools, time
calls, now = itertools.count(), time.time
time.time = lambda: now() - 86400 * (next(calls) // 20)
"""


@pytest.mark.slow
def test_an_odd_machine_gives_the_same_run(corpus: Path, reference: Path, tmp_path: Path) -> None:
    """A clock that goes back a day again and again, another hash seed, the C locale, no home, no terminal, no Hub."""
    (tmp_path / "sitecustomize.py").write_text(JUMPING_CLOCK)
    odd = {"PYTHONPATH": str(tmp_path), "PYTHONHASHSEED": "7", "LC_ALL": "C", "LANG": "C", "HF_HUB_OFFLINE": "1"}
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HOME", "XDG_CACHE_HOME")}
    arguments = flags(**TINY, data=corpus, output_dir=tmp_path / "run", dropout=0.1)
    done = subprocess.run(
        [*PYTHON, str(ROOT / "recipes" / "gpt" / "pretrain.py"), *arguments],
        cwd=tmp_path,
        env={**environment, **odd, "HOME": "/dev/null/home", "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    assert_same(tmp_path / "run", reference)


def test_a_run_is_extended_and_branched_before_its_rate_falls(gpt: ModuleType, corpus: Path, tmp_path: Path) -> None:
    """Its weights are those of a run that was so long from the start; once the rate has fallen that cannot be."""
    long = {"max_steps": 12, "decay_fraction": 0.5, "save_every": 3, "keep_checkpoints": 9, "eval_every": 4}
    short = {**long, "max_steps": 8, "decay_fraction": 0.25}
    run(gpt, config_of(gpt, corpus, tmp_path / "long", **long))
    run(gpt, config_of(gpt, corpus, tmp_path / "short", **short))
    state_at(tmp_path / "short", 6, tmp_path / "extended")
    run(gpt, config_of(gpt, corpus, tmp_path / "extended", **long))
    assert_same_weights(tmp_path / "extended", tmp_path / "long")
    assert results_of(tmp_path / "extended") == results_of(tmp_path / "long")
    branch = {**long, "resume": str(tmp_path / "short" / "checkpoints" / "step_00000006")}
    run(gpt, config_of(gpt, corpus, tmp_path / "branch", **branch))
    assert_same_weights(tmp_path / "branch", tmp_path / "long")
    expected = "max_steps: 12: expected one with which the rates of the 8 updates done so far are what they were"
    with pytest.raises(cli.UsageError, match=expected):
        run(gpt, config_of(gpt, corpus, tmp_path / "short", **long))
    state_at(tmp_path / "short", 6, tmp_path / "hotter")
    with pytest.raises(cli.UsageError, match=r"it holds a run with another configuration \(learning_rate"):
        run(gpt, config_of(gpt, corpus, tmp_path / "hotter", **long, learning_rate=1.0))


@pytest.fixture
def in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerate does with fp16 on a GPU, on the CPU, which it refuses; the scale begins too large."""
    start_plainly = launch_shared.start_accelerator

    def start_accelerator(*values: Any) -> Any:
        accelerator = start_plainly(*values)
        accelerator.state._mixed_precision, accelerator.native_amp = "fp16", True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, growth_interval=4)
        return accelerator

    monkeypatch.setattr(launch_shared, "start_accelerator", start_accelerator)


@pytest.mark.slow
@pytest.mark.usefixtures("in_float16")
def test_float16_learns_and_resumes_with_its_scale(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Updates that overflow are skipped until the scale fits; those after them are near float32's."""
    fields = {"max_steps": 60, "save_every": 30, "keep_checkpoints": 9, "max_bad_updates": 40}
    run(gpt, config_of(gpt, corpus, tmp_path / "whole", **fields))
    skipped = metric(tmp_path / "whole", "train/skipped_updates")
    assert 5 < skipped[-1] < 40
    assert skipped[29] > skipped[0] == 1
    losses = metric(tmp_path / "whole", "train/loss")
    assert losses[0] == pytest.approx(metric(reference, "train/loss")[0], rel=1e-3)
    assert losses[-1] < losses[0] - 1
    state_at(tmp_path / "whole", 30, tmp_path / "resumed")
    run(gpt, config_of(gpt, corpus, tmp_path / "resumed", **fields))
    assert_same(tmp_path / "resumed", tmp_path / "whole")
    assert {tensor.dtype for tensor in weights(tmp_path / "whole").values()} == {torch.float32}
    monkeypatch.undo()  # the same run on a GPU with bfloat16, or here
    state_at(tmp_path / "whole", 30, tmp_path / "other")
    run(gpt, config_of(gpt, corpus, tmp_path / "other", **fields))
    assert metric(tmp_path / "other", "train/skipped_updates")[-1] == skipped[29]


@pytest.mark.parametrize("goes_on", [False, True])
def test_dry_run_leaves_nothing(
    gpt: ModuleType, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reference: Path, goes_on: bool
) -> None:
    fields = {"init": str(reference), "learning_rate": 0.01, "muon_learning_rate": 0.01} if goes_on else {}
    run(gpt, config_of(gpt, corpus, tmp_path / "run", dry_run=True, **fields))
    printed = capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    for expected in (
        "first row",
        "memory: activations",
        "one checkpoint",
        "parameters",
        "one update",
        "one evaluation",
    ):
        assert expected in printed


def test_dry_run_reads_only_the_beginning_of_the_data(
    gpt: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenization.train_byte_level_bpe(["a few words"], 300, 32).save_pretrained(tmp_path / "tokenizer")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("".join(json.dumps({"text": f"document {number} has words"}) + "\n" for number in range(50_000)))
    read = []
    monkeypatch.setattr(streaming, "is_held_out", lambda document, fraction: bool(read.append(document)))
    run(gpt, config_of(gpt, corpus, tmp_path / "run", dry_run=True, tokenizer=str(tmp_path / "tokenizer")))
    assert "first row" in capsys.readouterr().out
    assert 0 < len(read) < 5_000


def test_stacked_experts_are_refused_by_muon_and_taken_by_adamw(gpt: ModuleType) -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    with pytest.raises(cli.UsageError, match="optimizer: 'muon': expected adamw for mixtral, in which some weights"):
        gpt.build_optimizer(gpt.Config(), model)
    groups = gpt.build_optimizer(gpt.Config(optimizer="adamw"), model).param_groups
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


def test_muon_takes_the_gpt2_s_transposed_matrices_for_what_they_are(gpt: ModuleType, tokenizer: Any) -> None:
    """A layer (4 x width, width) moves by twice what it would as (width, 4 x width), however it is stored."""
    model = gpt.build_model(gpt.Config(**{**TINY, "architecture": "gpt2"}), tokenizer)
    optimizer = gpt.build_optimizer(gpt.Config(**TINY), model)
    up, down = model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[0].mlp.c_proj.weight
    before = [up.detach().clone(), down.detach().clone()]
    up.grad, down.grad = torch.randn(up.shape), torch.randn(down.shape)
    assert (up.shape, down.shape) == ((32, 128), (128, 32))
    optimizer.step()
    moved = [(after.detach() - earlier).norm() for after, earlier in zip((up, down), before, strict=True)]
    assert moved[0] / moved[1] == pytest.approx(2, rel=0.1)


def test_continued_pretraining_starts_where_the_run_ended(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    run(
        gpt,
        config_of(gpt, corpus, run_dir, init=str(reference), max_steps=2, learning_rate=1e-9, muon_learning_rate=1e-9),
    )
    assert metrics_of(run_dir)[-1]["eval/loss"] == pytest.approx(metrics_of(reference)[-1]["eval/loss"], rel=1e-4)


def test_mixture_of_two_corpora(gpt: ModuleType, corpus: Path, tmp_path: Path) -> None:
    assert gpt.weights_of(gpt.Config()) == [0.8, 0.2]
    assert gpt.weights_of(gpt.Config(data="prose")) == [1.0]
    cfg = config_of(gpt, corpus, tmp_path, data=f"{corpus},{corpus}", data_weights="3,1")
    accelerator = Accelerator(cpu=True)
    tokenizer, train, _ = gpt.open_data(cfg, accelerator)
    updates = gpt.open_updates(cfg, accelerator, tokenizer, train, 4, 0, [])
    first, _ = next(updates)
    assert first[0]["input_ids"].shape == (4, 32)
    for wrong in ("1", "1,0", "1,x", "1,2,3"):
        with pytest.raises(cli.UsageError, match="data_weights"):
            gpt.check_config(dataclasses.replace(cfg, data_weights=wrong))


def test_streaming_trains_and_resumes_exactly(gpt: ModuleType, corpus: Path, tmp_path: Path) -> None:
    options = {"streaming": True, "save_every": 1, "keep_checkpoints": 100, "max_steps": 8, "eval_fraction": 0.3}
    run(gpt, config_of(gpt, corpus, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole", tmp_path / "stopped")
    for step in (6, 7, 8):
        shutil.rmtree(tmp_path / "stopped" / "checkpoints" / f"step_{step:08d}")
    run(gpt, config_of(gpt, corpus, tmp_path / "stopped", num_workers=1, **options))
    assert_same_weights(tmp_path / "whole", tmp_path / "stopped")
    assert results_of(tmp_path / "whole") == results_of(tmp_path / "stopped")


def test_profile_and_tensorboard(gpt: ModuleType, corpus: Path, tmp_path: Path) -> None:
    run(gpt, config_of(gpt, corpus, tmp_path / "run", profile=True, report_to="tensorboard", max_steps=6))
    assert list((tmp_path / "run" / "profile").glob("*.json*"))
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))


@pytest.mark.slow
def test_push_reaches_the_hub_and_loads_in_a_clean_process(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    """The Hub refuses two commits on the way; the run is the same as without a push, and the token shows nowhere."""
    fields = {**TINY, "data": corpus, "dropout": 0.1, "push_every": 6}
    program = "print(pipeline('text-generation', 'tester/mine')('the cat', max_new_tokens=5)[0]['generated_text'])"
    answer, pushed = push_and_load(gpt, fields, program, tmp_path)
    assert answer.startswith("the cat")
    assert_same_weights(tmp_path / "run", reference)
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "figures/loss.png"} <= pushed


@pytest.mark.parametrize("dry_run", [False, True])
def test_a_hub_that_does_not_answer_stops_the_run_before_training(
    gpt: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dry_run: bool
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(cli.UsageError, match="push_to_hub: 'a/b'"):
        run(gpt, config_of(gpt, corpus, tmp_path / "run", push_to_hub="a/b", dry_run=dry_run))
    assert not (tmp_path / "run").exists()


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    gpt: ModuleType, corpus: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "file").write_text("in the way")
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    big = tokenization.train_byte_level_bpe([(ROOT / "README.md").read_text()], vocab_size=600, seq_length=32)
    big.save_pretrained(tmp_path / "tokenizer")
    run_dir = tmp_path / "run"
    cases = {
        "data: '/no/such.txt'": {"data": "/no/such.txt"},
        "expected at least one document": {"data": str(tmp_path / "empty.txt")},
        "text_column: 'words': expected": {"text_column": "words"},
        "global_batch_size: 4: expected a multiple of per_device_batch_size x processes": {"per_device_batch_size": 3},
        "seq_length: 1: expected at least 2": {"seq_length": 1},
        "it holds a run with another configuration": {"output_dir": str(other), "seed": 7},
        "expected a folder that can be written": {"output_dir": str(tmp_path / "file" / "run")},
        "expected at most the 320 tokens of init": {"init": str(reference), "tokenizer": str(tmp_path / "tokenizer")},
        "hidden_size: 33": {"hidden_size": 33},
        "report_to: 'paper': expected a tracker that is installed: ": {"report_to": "paper"},
        "eval_fraction: 0.0: expected more than 0": {"eval_fraction": 0.0},
        "data_weights": {"data_weights": "1,2"},
        "attention: 'flex_attention': expected sdpa on cpu": {"attention": "flex_attention"},
        "per_device_batch_size: -1: expected at least 0": {"per_device_batch_size": -1},
        "learning_rate: 0.0: expected more than 0": {"learning_rate": 0.0},
        "eval_windows: True: expected held-out text of more than seq_length tokens": {
            "eval_windows": True,
            "seq_length": 4096,
        },
        "hub_license: 'Apache 2.0': expected small letters, digits, - and .": {"hub_license": "Apache 2.0"},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        with pytest.raises(cli.UsageError) as caught:
            run(gpt, config_of(gpt, corpus, run_dir, **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before


def test_bad_input_exits_with_2_and_no_traceback(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("learning_rat: 1e-3\n")
    process = launch("--config", str(tmp_path / "bad.yaml"))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == cli.EXIT_USAGE
    assert errors.strip().splitlines()[-1].endswith("unknown key 'learning_rat'; did you mean learning_rate?")
    assert "Traceback" not in errors


def test_help_is_quick() -> None:
    started = time.perf_counter()
    process = launch("--help")
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "--muon_learning_rate" in printed
    assert time.perf_counter() - started < 30  # the README's number is 3 s; a loaded machine must not fail the test
