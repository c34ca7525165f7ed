"""Supervised fine-tuning: answers are learnt and end by themselves, in every form of data, whole or by an adapter."""

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from shared import command_line as cli
from shared.run.predictions import read_predictions
from tests.conftest import ROOT
from tests.launching import assert_no_traceback
from tests.recipes import engines, test_gpt_pretrain
from tests.recipes.runs import Runs, assert_same, metric, push_and_load, results_of, run, run_card, state_at, weights

TINY: dict[str, Any] = {
    "global_batch_size": 4,
    "max_steps": 12,
    "warmup_steps": 2,
    "log_every": 1,
    "save_every": 4,
    "seq_length": 32,
    "eval_answers": 6,
    "max_new_tokens": 8,
}
KINDS = {"cat": "animal", "dog": "animal", "tree": "plant", "house": "thing"}


@pytest.fixture(scope="session")
def causal(gpt: ModuleType, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run of pre-training."""
    run_dir = tmp_path_factory.mktemp("causal") / "run"
    run(gpt, test_gpt_pretrain.config_of(gpt, corpus, run_dir, vocab_size=400, max_steps=40))
    return run_dir


@pytest.fixture(scope="session")
def talks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Questions of which one word tells the answer, in all three forms."""
    folder, draw = tmp_path_factory.mktemp("talks"), random.Random(0)
    for form in ("messages", "prompts", "texts", "wrong"):
        (folder / form).mkdir()
        for split, number in (("train", 80), ("test", 20)):
            rows = [example(form, *asked(draw, wrong=form == "wrong")) for _ in range(number)]
            (folder / form / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def asked(draw: random.Random, wrong: bool = False) -> tuple[str, str]:
    word = draw.choice(list(KINDS))
    answer = {"animal": "thing", "plant": "animal", "thing": "plant"}[KINDS[word]] if wrong else KINDS[word]
    return f"{draw.choice(['the', 'a'])} {draw.choice(['big', 'red', 'small'])} {word}", answer


def example(form: str, question: str, answer: str) -> dict[str, Any]:
    if form in ("messages", "wrong"):
        return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
    return {"prompt": question, "completion": f" {answer}"} if form == "prompts" else {"text": f"{question} {answer}"}


def config_of(finetune: ModuleType, causal: Path, data: Path, run_dir: Path, **fields: Any) -> Any:
    return finetune.Config(**{**TINY, "init": str(causal), "data": str(data), "output_dir": str(run_dir), **fields})


@pytest.fixture(scope="module")
def reference(gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run that kept every checkpoint."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    fields = {"save_every": 1, "keep_checkpoints": 99}
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", run_dir, **fields))
    return run_dir


# -- learning ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "fields"),
    [
        pytest.param("messages", {}, id="messages"),
        pytest.param("prompts", {}, id="prompts", marks=pytest.mark.slow),
        pytest.param("messages", {"optimizer": "adamw", "learning_rate": 0.01}, id="adamw", marks=pytest.mark.slow),
        pytest.param("messages", {"lora_rank": 8, "learning_rate": 0.01}, id="adapter", marks=pytest.mark.slow),
        pytest.param("messages", {"init": "scratch"}, id="scratch", marks=pytest.mark.slow),
    ],
)
def test_answers_are_learnt_and_end_by_themselves(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path, form: str, fields: dict[str, Any]
) -> None:
    usual = {"max_steps": 120, "warmup_steps": 10, "save_every": 0, "eval_answers": 20}
    fields = {**usual, "tokenizer": str(causal), **fields}
    if "lora_rank" in fields:  # a model that answers, but not rightly
        run(gpt_finetune, config_of(gpt_finetune, causal, talks / "wrong", wrong := tmp_path / "wrong", **usual))
        fields["init"] = str(wrong)
    run_dir = tmp_path / "run"
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / form, run_dir, **fields))
    assert metric(run_dir, "eval/exact_match") == [1.0]
    assert metric(run_dir, "eval/rouge_l") == [1.0]
    expected, given = read_predictions(run_dir)
    assert given == expected
    program = transformers.pipeline("text-generation", str(run_dir), do_sample=False)
    if form == "messages":
        said = program([{"role": "user", "content": "the red dog"}], max_new_tokens=20)[0]["generated_text"][-1]
        assert said == {"role": "assistant", "content": "animal"}
    else:
        assert program("the red dog", max_new_tokens=20)[0]["generated_text"] == "the red dog animal"
    card = (run_dir / "README.md").read_text()
    assert "| `eval/exact_match` | 1.0000 |" in card
    assert "expected: " in card


def test_the_loss_is_the_librarys_over_what_the_assistant_says(
    gpt_finetune: ModuleType, causal: Path, talks: Path, reference: Path
) -> None:
    """Against the library's model, one conversation at a time and logits everywhere."""
    model = transformers.AutoModelForCausalLM.from_pretrained(reference).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(reference)
    nats, targets = 0.0, 0
    for line in (talks / "messages" / "test.jsonl").read_text().splitlines():
        options = {"return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
        written = tokenizer.apply_chat_template(json.loads(line)["messages"], **options)
        mask = torch.tensor(written["assistant_masks"]).reshape(-1).bool()
        with torch.no_grad():
            logits = model(input_ids=written["input_ids"]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, written["input_ids"][0, 1:], reduction="none")
        nats, targets = nats + losses[mask[1:]].sum().item(), targets + int(mask[1:].sum())
    assert metric(reference, "eval/loss") == pytest.approx([nats / targets], rel=1e-5)


def test_a_tuned_model_is_tuned_again_at_half_of_its_rates(gpt_finetune: ModuleType, reference: Path) -> None:
    assert gpt_finetune.rates_of(gpt_finetune.Config(init=str(reference))) == (0.005, 0.004)


def test_plain_texts_are_learnt_as_in_pre_training(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "texts", tmp_path))
    assert metric(tmp_path, "train/loss")[-1] < metric(tmp_path, "train/loss")[0]
    assert f"generate.py --model {tmp_path} --prompt TEXT" in capsys.readouterr().out  # it has no chat template
    assert not metric(tmp_path, "eval/exact_match")


@pytest.mark.parametrize(("share", "number"), [(1.0, 80), (0.05, 4), (0.01, 1)])
def test_a_share_of_the_examples_is_chosen_by_the_seed(
    gpt_finetune: ModuleType, causal: Path, talks: Path, share: float, number: int
) -> None:
    few = config_of(gpt_finetune, causal, talks / "messages", causal, train_fraction=share)
    train, held_out = gpt_finetune.open_data(few)
    assert (len(train), len(held_out)) == (number, 20)
    more, _ = gpt_finetune.open_data(
        config_of(gpt_finetune, causal, talks / "messages", causal, train_fraction=min(1, 2 * share))
    )
    assert all(record in more.records for record in train.records)


@pytest.mark.parametrize(
    ("record", "fields", "rates"),
    [
        ("optimizer: muon\nlearning_rate: 0.02\nmuon_learning_rate: 0.016\n", {}, (0.01, 0.008)),
        ("optimizer: muon\nlearning_rate: 0.02\nmuon_learning_rate: 0.016\n", {"muon_learning_rate": 0.5}, (0.01, 0.5)),
        ("optimizer: muon\nlearning_rate: 0.02\nmuon_learning_rate: 0.016\n", {"optimizer": "adamw"}, (2e-5, 0)),
        ("optimizer: muon\nlearning_rate: 0.02\nmuon_learning_rate: 0.016\n", {"lora_rank": 8}, (0.01, 0)),
        ("optimizer: muon\narchitecture: gpt2\nlearning_rate: 0.02\nmuon_learning_rate: 0.016\n", {}, (2e-5, 0)),
        ("optimizer: adamw\nlearning_rate: 0.02\n", {}, (2e-5, 0)),
        ("", {}, (2e-5, 0)),
        ("", {"learning_rate": 0.5}, (0.5, 0)),
    ],
)
def test_optimizer_and_rates_that_are_not_given_suit_what_is_loaded(
    gpt_finetune: ModuleType, tmp_path: Path, record: str, fields: dict[str, Any], rates: tuple[float, float]
) -> None:
    (tmp_path / "config.yaml").write_text(record)
    assert gpt_finetune.rates_of(gpt_finetune.Config(init=str(tmp_path), **fields)) == rates
    scratch = gpt_finetune.Config(init="scratch", tokenizer=str(tmp_path), **fields)
    is_muon, given = rates[1] > 0, "muon_learning_rate" in fields
    assert gpt_finetune.rates_of(scratch) == ((0.02, 0.5 if given else 0.016) if is_muon else rates)
    resolved = gpt_finetune.with_rates(gpt_finetune.Config(init=str(tmp_path), **fields))
    assert (resolved.optimizer, resolved.learning_rate) == ("muon" if is_muon else "adamw", rates[0])


# -- the run -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [1, 7])
def test_resuming_is_exact(
    gpt_finetune: ModuleType, causal: Path, talks: Path, reference: Path, tmp_path: Path, stop: int
) -> None:
    run_dir = state_at(reference, stop, tmp_path / "run")
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", run_dir, num_workers=stop % 2))
    assert_same(run_dir, reference)


def test_an_adapter_resumes_exactly_and_is_exported_alone(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path
) -> None:
    fields = {"lora_rank": 4, "lora_dropout": 0.1, "merge": False, "learning_rate": 0.003}
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", tmp_path / "whole", **fields))
    names = weights(tmp_path / "whole").keys()
    assert all(".lora_" in name or "token" in name for name in names)  # rows of the conversation's tokens
    assert sum(".lora_" in name for name in names) == 2 * 6 * 2
    resumed = state_at(tmp_path / "whole", 8, tmp_path / "resumed")
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", resumed, **fields))
    assert_same(resumed, tmp_path / "whole")
    frozen = "model.embed_tokens.weight"
    from shared.models.adapters import load_with_adapter

    merged = load_with_adapter(transformers.AutoModelForCausalLM, str(resumed), "init").state_dict()
    assert torch.equal(merged[frozen][5:], weights(causal)[frozen][5:])  # the first rows are the conversation's tokens
    run(
        gpt_finetune,
        config_of(gpt_finetune, resumed, talks / "messages", tmp_path / "on", max_steps=2, learning_rate=1e-5),
    )
    assert metric(tmp_path / "on", "train/loss")[0] == pytest.approx(
        metric(tmp_path / "whole", "train/loss")[-1], rel=0.3
    )


def test_what_is_exported_is_the_best_over_a_resume_and_ends_by_patience(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate, losses = gpt_finetune.evaluate, iter([3.0, 1.0, 2.0, 2.0])

    def pretend(*arguments: Any) -> Any:
        metrics, shown, texts = evaluate(*arguments)
        return metrics | {"eval/loss": next(losses)}, shown, texts

    monkeypatch.setattr(gpt_finetune, "evaluate", pretend)
    fields = {"eval_every": 4, "max_steps": 40, "patience": 1, "keep_checkpoints": 9}
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", tmp_path / "run", **fields))
    after_eight = load_file(tmp_path / "run/checkpoints/step_00000008/model.safetensors")
    assert all(torch.equal(after_eight[name], value) for name, value in weights(tmp_path / "run").items())
    assert "| `eval/loss` | 1.0000 |" in (tmp_path / "run" / "README.md").read_text()
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["best_step"], record["steps"]) == (8, 12)
    resumed = state_at(tmp_path / "run", 8, tmp_path / "resumed")
    for name in ("model.safetensors", "predictions.jsonl"):
        shutil.copy(tmp_path / "run" / name, resumed)
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", resumed, **fields))
    assert_same(resumed, tmp_path / "run")


def test_the_code_of_the_card_runs(reference: Path, tmp_path: Path) -> None:
    run_card(reference, tmp_path)


def test_the_code_of_an_adapters_card_runs(gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path) -> None:
    fields = {"lora_rank": 2, "merge": False, "max_steps": 2, "eval_answers": 0}
    run(gpt_finetune, config_of(gpt_finetune, causal, talks / "prompts", tmp_path / "run", **fields))
    run_card(tmp_path / "run", tmp_path)


def test_dry_run_leaves_nothing(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for fields in ({}, {"lora_rank": 2}):
        cfg = config_of(gpt_finetune, causal, talks / "messages", tmp_path / "run", dry_run=True, **fields)
        run(gpt_finetune, cfg)
        printed = capsys.readouterr().out
        for expected in ("first row: <|endoftext|><|user|>", "memory: activations", "one update", "trained_parameters"):
            assert expected in printed
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("llama", marks=pytest.mark.slow)])
def test_models_of_the_hub_are_tuned(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path, kind: str
) -> None:
    """Without a chat template and without tokens for one: turns are words on lines of their own."""
    from tests.shared.text.test_conversations import tokenizer_of

    tokenizer = tokenizer_of("plain")
    tokenizer.chat_template = None
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
    }
    config = transformers.AutoConfig.for_model(kind, **sizes, vocab_size=400, max_position_embeddings=64)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    fields = {"init": str(tmp_path / "model"), "max_steps": 3, "seq_length": 48, "gradient_checkpointing": True}
    for rank in (0, 2):
        run_dir = tmp_path / f"rank_{rank}"
        run(gpt_finetune, config_of(gpt_finetune, causal, talks / "messages", run_dir, **fields, lora_rank=rank))
        tuned = transformers.AutoModelForCausalLM.from_pretrained(run_dir)
        assert tuned.config.model_type == kind
        assert "User:" in (run_dir / "chat_template.jinja").read_text()


@pytest.fixture(scope="module")
def runs(gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Two micro-batches a process."""
    fields = {**TINY, "init": str(causal), "max_steps": 6, "per_device_batch_size": 1, "save_every": 3}
    adamw = {**fields, "optimizer": "adamw", "learning_rate": 0.003}
    kinds = {"whole": fields, "adamw": adamw, "adapter": {**fields, "lora_rank": 4, "learning_rate": 0.003}}
    return Runs(gpt_finetune, kinds, talks / "messages", tmp_path_factory.mktemp("engines"))


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("engine", "kind"), [pytest.param(*pair, marks=pytest.mark.slow) for pair in engines.pairs("gpt/finetune.py")]
)
def test_engine_equals_one_process(runs: Runs, engine: str, kind: str) -> None:
    run_dir, other = runs.of_engine(engine, kind), runs.of_one_process(kind)
    assert metric(run_dir, "step") == metric(other, "step")
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        assert metric(run_dir, name) == pytest.approx(metric(other, name), rel=1e-5), name
    assert read_predictions(run_dir) == read_predictions(other)
    for name, value in weights(run_dir).items():
        torch.testing.assert_close(value, weights(other)[name], rtol=0, atol=1e-5, msg=name)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_stopping_two_processes_and_going_on_is_exact(runs: Runs, tmp_path: Path) -> None:
    fields = {**runs.fields["whole"], "save_every": 0}
    status, output = runs.run("multi_cpu", tmp_path / "run", fields, SIGTERM_AT="2:1")
    assert status == 1, output  # of the launcher
    assert "stopped: saved at step 4 of 6" in output
    assert_no_traceback(output)
    status, output = runs.run("multi_cpu", tmp_path / "run", fields)
    assert status == 0, output
    assert results_of(tmp_path / "run") == results_of(runs.of_engine("multi_cpu", "whole"))


@pytest.mark.slow
def test_push_reaches_the_hub_and_answers_in_a_clean_process(
    gpt_finetune: ModuleType, causal: Path, talks: Path, tmp_path: Path
) -> None:
    fields = {**TINY, "init": causal, "data": talks / "messages", "push_every": 6}
    program = "print(pipeline('text-generation', 'tester/mine')([{'role': 'user', 'content': 'a cat'}])[0].keys())"
    answer, pushed = push_and_load(gpt_finetune, fields, program, tmp_path)
    assert "generated_text" in answer
    assert {"model.safetensors", "chat_template.jinja", "tokenizer.json", "README.md", "figures/loss.png"} <= pushed


# -- talking -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_generate_talks_until_an_empty_line(
    gpt_finetune: ModuleType, causal: Path, talks: Path, reference: Path, tmp_path: Path
) -> None:
    program = [sys.executable, str(ROOT / "recipes" / "gpt" / "generate.py"), "--model", str(reference), "--chat"]
    options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "cwd": tmp_path}
    one = subprocess.run([*program, "--prompt", "the red dog", "--temperature", "0"], **options)
    assert one.returncode == 0, one.stderr
    typed = subprocess.run([*program, "--temperature", "0"], input="the red dog\na cat\n\n", **options)
    assert typed.returncode == 0, typed.stderr
    answer = one.stdout.strip()
    assert typed.stdout.startswith(f"> {answer}")
    assert typed.stdout.count("> ") == 3
    bare = subprocess.run([*program[:-3], "--model", str(causal), "--chat"], **options)
    assert bare.returncode == 2
    assert bare.stderr.splitlines()[-1].startswith("error: chat: True: expected a model with a chat template")


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_bad_input_gets_one_line_and_writes_nothing(
    gpt_finetune: ModuleType, causal: Path, talks: Path, reference: Path, tmp_path: Path
) -> None:
    (tmp_path / "endless.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (tmp_path / "long").mkdir()
    question = {"role": "user", "content": "the cat " * 60}
    row = {"messages": [question, {"role": "assistant", "content": "a dog"}]}
    (tmp_path / "long" / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    (tmp_path / "adapter").mkdir()
    base = {"peft_type": "LORA", "base_model_name_or_path": "/no/such/base", "task_type": "CAUSAL_LM"}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(base))
    cases: dict[str, dict[str, Any]] = {
        "data: '/no/such.jsonl'": {"data": "/no/such.jsonl"},
        "tokenizer: ''": {"init": "scratch"},
        "init: '/no/such/model': expected": {"init": "/no/such/model", "tokenizer": str(causal)},
        "expected a model, or an adapter whose base is there": {
            "init": str(tmp_path / "adapter"),
            "tokenizer": str(causal),
        },
        "lora_targets: 'query': expected all-linear, or layers of init: q_proj": {
            "lora_rank": 2,
            "lora_targets": "query",
        },
        "lora_rank: 2: expected 0 for init scratch": {"init": "scratch", "tokenizer": str(causal), "lora_rank": 2},
        "merge: False: expected True without lora_rank": {"merge": False},
        "lora_targets: 'q_proj': expected all-linear without lora_rank": {"lora_targets": "q_proj"},
        "lora_rank: 4000: expected at most 32": {"lora_rank": 4000},
        "eval_data: '/no/such.jsonl'": {"eval_data": "/no/such.jsonl"},
        "chat_template: '/no/such/file'": {"chat_template": "/no/such/file"},
        "expected a chat template that ends an answer": {"chat_template": str(tmp_path / "endless.jinja")},
        "eval_split: 'train': expected another split": {"eval_split": "train"},
        "eval_data: ": {"eval_data": str(talks / "prompts")},
        "expected an example with a target within 32 tokens": {"data": str(tmp_path / "long")},
        "seq_length: 64: expected at most 32": {"seq_length": 64},
        "muon_learning_rate: 0.0: expected rates, since no run folder": {
            "optimizer": "muon",
            "init": "a/b",
        },
        "optimizer: 'muon': expected adamw for an adapter": {"optimizer": "muon", "lora_rank": 2},
        "max_new_tokens: 40: expected less than seq_length": {"max_new_tokens": 40},
        "patience: 3: expected 0 where eval_every is 0": {"patience": 3},
        "best_metric: 'rouge_l': expected loss where no question": {"best_metric": "rouge_l", "eval_answers": 0},
        "eval_split: 'dev': expected one of the splits": {"eval_split": "dev"},
        "it holds a run with another configuration": {"output_dir": str(reference), "seed": 7},
        "global_batch_size: 4: expected a multiple of per_device_batch_size": {"per_device_batch_size": 3},
    }
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    for message, fields in cases.items():
        fields = {"data": str(talks / "messages"), **fields}
        with pytest.raises(cli.UsageError) as caught:
            run(gpt_finetune, config_of(gpt_finetune, causal, fields.pop("data"), tmp_path / "run", **fields))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
