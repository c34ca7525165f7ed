"""The outside evaluation: lm-evaluation-harness reads a run folder, and counts the bits that the recipe counts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.conftest import ROOT
from tests.recipes.runs import metric, run
from tests.recipes.test_gpt_pretrain import config_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
pytest.importorskip("lm_eval", reason="pip install -r recipes/gpt/tasks/requirements.txt")
END = "<|endoftext|>"


def evaluated(model: Path, task: str, folder: Path, options: str = "", tasks: Path | None = None) -> dict[str, float]:
    """What lm_eval finds, offline."""
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}{options}"]
    command += ["--device", "cpu", "--include_path", str(tasks or ROOT / "recipes" / "gpt" / "tasks"), "--tasks", task]
    command += ["--output_path", str(folder / "results.json"), "--batch_size", "16"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    [file] = folder.rglob("results*.json")
    return json.loads(file.read_text())["results"][task]


def test_bits_a_byte_are_those_of_the_recipe(gpt: ModuleType, corpus: Path, tmp_path: Path) -> None:
    """Documents shorter than a row; their end token is spelled for lm_eval, which counts its 13 bytes."""
    texts = [f"the {word} sees the {other}." for word in ("cat", "dog") for other in ("tree", "house", "é ü")]
    (tmp_path / "eval.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    cfg = config_of(gpt, corpus, tmp_path / "run", eval_data=str(tmp_path / "eval.jsonl"))
    run(gpt, cfg)
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "ended.jsonl").write_text("".join(json.dumps({"text": text + END}) + "\n" for text in texts))
    own = (ROOT / "recipes" / "gpt" / "tasks" / "prose_bits_per_byte.yaml").read_text()
    own = own.replace("recipes/gpt/tasks/prose.jsonl", str(tasks / "ended.jsonl"))
    (tasks / "task.yaml").write_text(own.replace("prose_bits_per_byte", "ended"))
    found = evaluated(tmp_path / "run", "ended", tmp_path, ",add_bos_token=False", tasks)["bits_per_byte,none"]
    num_bytes = sum(len(text.encode()) for text in texts)
    found *= (num_bytes + len(END) * len(texts)) / num_bytes
    assert metric(tmp_path / "run", "eval/bits_per_byte")[-1] == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize(
    ("task", "options", "names"),
    [
        ("wordnet_class", ",add_bos_token=True", ["acc,none", "acc_norm,none"]),
        ("prose_bits_per_byte", ",add_bos_token=False", ["bits_per_byte,none"]),
    ],
)
def test_the_tasks_here_run_offline(
    gpt: ModuleType, corpus: Path, tmp_path: Path, task: str, options: str, names: list[str]
) -> None:
    run(gpt, config_of(gpt, corpus, tmp_path / "run", seq_length=512, max_steps=2))
    found: dict[str, Any] = evaluated(tmp_path / "run", task, tmp_path, options)
    assert all(0 <= found[name] < 20 for name in names)
    if task == "wordnet_class":
        assert found["sample_len"] == 500
        assert 0.1 < found["acc,none"] < 0.4  # of four
