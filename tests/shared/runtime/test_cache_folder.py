"""The cache lies where it is asked for, else in HF_HOME, else among temporary files."""

import os
from pathlib import Path

import pytest

from shared.runtime.cache_folder import cache_folder


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
