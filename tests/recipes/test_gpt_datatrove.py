"""A corpus that tasks of a datatrove pipeline tokenised: the page finds the cache that it would have made itself."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from shared.text import token_cache
from shared.text.tokenization import train_byte_level_bpe
from tests.conftest import ROOT
from tests.recipes.runs import run
from tests.recipes.test_gpt_pretrain import config_of

pytestmark = pytest.mark.slow
pytest.importorskip("datatrove", reason="pip install -r .ci/slow-requirements.txt")
KILLED_AT_THE_THIRD_TASK = """
import os
from shared.text import token_cache
calls, tokenize = [], token_cache._tokenize

def tokenize_or_die(documents, **options):
    calls.append(len(calls))
    yield from tokenize(documents, **options)
    if len(calls) == 3:
        os.kill(os.getpid(), 9)

token_cache._tokenize = tokenize_or_die
"""


def test_four_tasks_one_killed_and_run_again_give_the_local_cache(
    gpt: ModuleType, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program of the README, in one process at a time, of which the third dies, and then in two."""
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    (tmp_path / "texts").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": text}) + "\n" for text in ["", *texts[number::6]]]
        (tmp_path / "texts" / f"{number}.jsonl").write_text("".join(lines))
    train_byte_level_bpe(texts, 300, 32).save_pretrained(tmp_path / "tokenizer")

    readme = (ROOT / "recipes" / "gpt" / "README.md").read_text()
    program = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)[0]
    for name in ("texts", "tokenizer", "cache"):
        program = program.replace(f'"my_{name}"', repr(str(tmp_path / name)))
    program = program.replace("outputs/tokenising", str(tmp_path / "logs")).replace("tasks=64", "tasks=4")
    status, _ = pipeline(tmp_path, KILLED_AT_THE_THIRD_TASK + program.replace("workers=8", "workers=1"))
    assert status == -signal.SIGKILL
    status, said = pipeline(tmp_path, program.replace("workers=8", "workers=2"))
    assert status == 0, said
    assert "Skipping 2 already completed tasks" in said

    fields = {"data": str(tmp_path / "texts"), "tokenizer": str(tmp_path / "tokenizer"), "max_steps": 2}
    run(gpt, config_of(gpt, corpus, tmp_path / "alone", **fields, cache_dir=str(tmp_path / "local")))
    monkeypatch.setattr(token_cache, "_tokenize", refuse)
    run(gpt, config_of(gpt, corpus, tmp_path / "merged", **fields, cache_dir=str(tmp_path / "cache")))
    assert files(tmp_path / "cache" / "tokens") == files(tmp_path / "local" / "tokens")


def pipeline(folder: Path, program: str) -> tuple[int, str]:
    """Run a program's text; its exit status, and what it said."""
    (folder / "program.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(folder / "program.py")]
    with (folder / "said").open("w") as said:  # no pipe: datatrove's manager outlives a kill, and would keep it open
        done = subprocess.Popen(command, env=environment, stdout=said, stderr=said, start_new_session=True)
        done.wait(200)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(done.pid, signal.SIGKILL)
    return done.returncode, (folder / "said").read_text()


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("tokenised again")
