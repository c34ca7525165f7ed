"""A run on a data set of the Hub goes on with the commit that it began with."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.hub_server import Repository, start_hub
from tests.recipes.runs import metric
from tests.recipes.test_gpt_pretrain import TINY
from tests.recipes.test_resnet_pretrain import TINY as TINY_IMAGES

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("family", "streams"), [("gpt", True), ("resnet", False)])
def test_a_push_to_the_data_set_ends_no_run(
    request: pytest.FixtureRequest, corpus: Path, shapes: Path, tmp_path: Path, family: str, streams: bool
) -> None:
    hub, page = start_hub(), request.getfixturevalue(family)
    repository = hub.repositories["datasets", "tester/mine"] = Repository(private=False)
    if family == "gpt":
        fields: dict[str, Any] = TINY
        files = {"train.jsonl": corpus.read_bytes()}
        other = {"train.jsonl": corpus.read_bytes().replace(b"cat", b"bird")}
    else:
        fields, images = TINY_IMAGES, sorted(shapes.rglob("*.png"))
        files = {path.relative_to(shapes).as_posix(): path.read_bytes() for path in images}
        other = {name: files[name] for name in list(files)[::2]}
    first = repository.commit(files, "files")
    environment = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    common = {**fields, "streaming": streams, "data": "tester/mine", "save_every": 3, "log_every": 1, "max_steps": 6}

    def start(name: str, fault: str = "", **changed: Any) -> subprocess.CompletedProcess[str]:
        options = {**common, "output_dir": tmp_path / name, "cache_dir": tmp_path / "cache", **changed}
        flags = [f"--{key}={value}" for key, value in options.items() if not isinstance(value, bool)]
        flags += [f"--{key}" for key, value in options.items() if value is True]
        command = [sys.executable, str(page.__file__), *flags]
        variables = {**environment, "FAULT": fault}
        return subprocess.run(command, cwd="/", env=variables, capture_output=True, text=True, timeout=200)

    assert start("run", "after_rename:3").returncode == -9
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["data_commits"] == {"tester/mine": first}
    second = repository.commit({**other, "README.md": b"# Of another version\n"}, "a push")
    done = start("run")
    assert done.returncode == 0, done.stderr
    assert metric(tmp_path / "run", "step") == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data_commits"] == {"tester/mine": first}
    name, revision, commit = {"gpt": ("old", f"@{first}", first), "resnet": ("new", "", second)}[family]
    done = start(name, data=f"tester/mine{revision}", max_steps=1, warmup_steps=0)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / name / "run.json").read_text())
    assert record["data_commits"] == {f"tester/mine{revision}": commit}
    card = (tmp_path / name / "README.md").read_text()
    assert "- tester/mine\n" in card.partition("\n---\n")[0]  # its metadata, which the Hub links
    hub.stop()
