"""The card's metadata is what the Hub reads, its numbers are the record's, and no text breaks it."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from shared.run.model_card import write_model_card

RECORD = {
    "command": ["pretrain.py", "--seed", "3"],
    "data": "sample",
    "init": "scratch",
    "git_commit": "0123456789abcdef" * 2 + "01234567",
    "hardware": "2 cores of Some CPU (AVX2)",
    "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
    "parameters": 1234567,
    "steps": 4321,
    "training_seconds": 98.7,
    "training_flops": 1.5e16,
}
METRICS = {"eval/loss": 3.2171234, "eval/perplexity": 24.9566, "eval/bits_per_byte": 1.1234567}
USAGE = 'from transformers import pipeline\n\nprint(pipeline("text-generation", "x")("y"))'
SAMPLES = "The cat sat.\n\nThe dog ran."
EVIL = ["```", "````\n<b>", "`", "``", "|", "a|b`c", "<script>alert(1)</script>", "---", "\n---\n# x", "x: [", "{{y}}"]
EVIL += ["](javascript:alert(1))", "&lt;", "~~~", "\\", "'\"", "ünï \U0001f600", "%", "<!--", "- a\n- b", "", " "]


def write(folder: Path, samples: str = SAMPLES, metrics: dict[str, float] | None = None, **record: Any) -> str:
    title = record.pop("title", "my-run")
    content = copy.deepcopy({**RECORD, **record})
    metrics = METRICS if metrics is None else metrics
    write_model_card(folder, title, "text-generation", USAGE, content, metrics, samples, {})
    return (folder / "README.md").read_text(encoding="utf-8")


def body(card: str) -> str:
    return card.split("\n---\n", 1)[1]


def test_the_library_is_that_of_the_exported_model(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    write(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"
    (tmp_path / "config.json").write_text('{"_class_name": "AutoencoderKL", "_diffusers_version": "0.42.1"}')
    write(tmp_path)
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "diffusers"


def test_the_metadata_are_what_the_hub_reads(tmp_path):
    write(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.data.model_name == "my-run"
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {key: result.metric_value for key, result in results.items()} == {
        "loss": 3.217123,
        "perplexity": 24.9566,
        "bits_per_byte": 1.123457,
    }
    assert {result.dataset_name for result in results.values()} == {"sample"}
    assert {result.task_type for result in results.values()} == {"text-generation"}
    metadata = yaml.safe_load(write(tmp_path).split("---\n")[1])
    [model] = metadata["model-index"]
    assert model["name"] == "my-run"
    assert len(model["results"][0]["metrics"]) == 3


def test_what_it_was_made_of_is_linked_on_the_hub(tmp_path):
    (tmp_path / "outputs" / "gpt").mkdir(parents=True)
    data = f"sample,wikimedia/wikipedia:config=20231101.en,{tmp_path}/a.jsonl,shared/samples"
    write(tmp_path, data=data, init="openai-community/gpt2", license="apache-2.0", language="en")
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.datasets, card.base_model) == (["wikimedia/wikipedia"], "openai-community/gpt2")
    assert (card.license, card.language) == ("apache-2.0", "en")
    write(tmp_path, init=f"{tmp_path}/outputs/gpt", license="")
    card = ModelCard.load(tmp_path / "README.md").data
    assert (card.datasets, card.base_model, card.license, card.language) == (None, None, None, None)


def test_the_numbers_are_the_records(tmp_path):
    text = body(write(tmp_path))
    for expected in ("1,234,567 parameters", "4,321 updates", "99 s of training", "1.5e+16 floating-point"):
        assert expected in text
    assert "on 2 cores of Some CPU (AVX2)" in text
    assert "from `scratch` on `sample` with `pretrain.py`, commit `0123456789ab`:" in text
    assert "torch 2.13.0, transformers 5.23.0" in text
    rows = dict(re.findall(r"^\| `(eval/\w+)` \| (\S+) \|$", text, flags=re.M))
    assert {key: float(value) for key, value in rows.items()} == pytest.approx(METRICS, abs=5e-5)
    assert f"```python\n{USAGE}\n```" in text
    assert f"```text\n{SAMPLES}\n```" in text
    assert "![Loss over the updates](figures/loss.png)" in text


def test_no_commit_and_no_metrics(tmp_path):
    text = write(tmp_path, git_commit="", metrics={})
    assert "commit" not in text
    assert ModelCard.load(tmp_path / "README.md").data.library_name == "transformers"


def test_a_record_as_written_and_read(tmp_path):
    assert write(tmp_path, **json.loads(json.dumps(RECORD))) == write(tmp_path)


def blocks(text: str) -> tuple[str, list[str]]:
    """What is outside of fenced code, and the contents of the fences, as CommonMark reads them."""
    outside, inside, fence = [], [], ""
    for line in text.split("\n"):
        match = re.fullmatch(r" {0,3}(`{3,}|~{3,})([^`]*)", line)
        if not fence and match:
            fence = match[1]
            inside.append([])
        elif fence and match and match[1].startswith(fence) and not match[2].strip():
            fence = ""
        else:
            (inside[-1] if fence else outside).append(line)
    assert not fence
    return "\n".join(outside), ["\n".join(lines) for lines in inside]


@pytest.mark.parametrize("evil", EVIL)
def test_samples_stay_in_their_block(tmp_path, evil):
    samples = f"before {evil}\n{evil}\nafter"
    outside, inside = blocks(body(write(tmp_path, samples=samples)))
    assert inside == [USAGE, samples]
    assert outside == blocks(body(write(tmp_path)))[0]
    assert ModelCard.load(tmp_path / "README.md").data.pipeline_tag == "text-generation"


def code_spans(text: str) -> list[str]:
    """Contents of the code spans, as CommonMark reads them."""
    spans = re.findall(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", text)
    return [content[1:-1] if content.strip() and content[0] == content[-1] == " " else content for _, content in spans]


@pytest.mark.parametrize("evil", EVIL)
@pytest.mark.parametrize("field", ["data", "init", "command"])
def test_names_stay_in_their_code_span(tmp_path, field, evil):
    value = f"x{evil}y {evil}"
    card = write(tmp_path, **{field: [value] if field == "command" else value})
    outside, inside = blocks(body(card))
    assert inside == [USAGE, SAMPLES]
    line = next(line for line in outside.split("\n") if line.startswith("Pre-trained from"))
    names = {"init": "scratch", "data": "sample", "command": "pretrain.py"} | {field: " ".join(value.split())}
    assert code_spans(line)[:3] == list(names.values())
    without = re.sub(r"(`+).+?(?<!`)\1(?!`)", "", line)
    assert without == "Pre-trained from  on  with , commit :"
    if field == "data":
        [name] = {result.dataset_name for result in ModelCard.load(tmp_path / "README.md").data.eval_results}
        assert name == value


@pytest.mark.parametrize("evil", EVIL)
def test_a_title_is_text(tmp_path, evil):
    title = f"run {evil} 1"
    text = body(write(tmp_path, title=title))
    heading = next(line for line in text.split("\n") if line.startswith("# "))
    plain = re.sub(r"\\(.)", r"\1", heading[2:])
    assert plain == " ".join(title.split())
    assert not re.search(r"(?<!\\)[<>`*_\[\]|&]", re.sub(r"\\\\", "", heading))
    assert ModelCard.load(tmp_path / "README.md").data.model_name == title


def test_an_ordinary_title_is_left_as_it_is(tmp_path):
    assert "\n# gpt-124m.v2 (1)\n" in write(tmp_path, title="gpt-124m.v2 (1)")
