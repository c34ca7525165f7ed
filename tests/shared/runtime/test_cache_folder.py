"""The cache lies where it is asked for, else in HF_HOME, else among temporary files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shared.runtime.cache_folder import cache_folder, keep_caches_where_they_can_be_written
from tests.conftest import ROOT


def test_the_cache_lies_in_the_home_of_the_hub_where_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "home"))
    assert cache_folder("elsewhere") == Path("elsewhere")
    assert cache_folder("") == tmp_path / "home" / "pretraining_recipes"
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "file"))
    assert cache_folder("").name == f"pretraining_recipes_{os.getuid()}"


@pytest.mark.parametrize("is_imported", [pytest.param(False, marks=pytest.mark.slow), True])
def test_datasets_stores_among_temporary_files_where_its_own_folder_cannot_be_written(
    tmp_path: Path, is_imported: bool
) -> None:
    (tmp_path / "home").write_text("a file in the way")
    program = f"""
{"import datasets, evaluate" if is_imported else ""}
from shared.runtime.cache_folder import keep_caches_where_they_can_be_written
keep_caches_where_they_can_be_written()
import datasets
from shared.metrics.scores import Accuracy
assert Accuracy().compute(predictions=[1], references=[1]) == {{"accuracy": 1.0}}
made = datasets.Dataset.from_generator(lambda: iter([{{"a": 1}}]))
print(made[0], made.cache_files[0]["filename"])
"""
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.startswith(f"{{'a': 1}} {tmp_path}/pretraining_recipes_{os.getuid()}/datasets/")


def test_datasets_keeps_its_own_folder_where_that_can_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "own"))
    keep_caches_where_they_can_be_written()
    assert os.environ["HF_DATASETS_CACHE"] == str(tmp_path / "own")
