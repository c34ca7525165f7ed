"""--help of every program: each flag in a group, with its off value and its limits, and commands that can be copied."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest

from shared import command_line
from tests.conftest import ROOT, load_recipe

PROGRAMS = sorted((ROOT / "recipes").glob("*/*.py"))
# Numbers of which 0 turns nothing off: it is a value like others.
ORDINARY_AT_ZERO = {"seed", "logit_mean", "grow_from", "target_threshold", "rand_augment_magnitude"}
ORDINARY_AT_ZERO |= {"rand_augment_spread", "temperature", "kl_weight", "perceptual_weight", "warmup_steps"}

NO_FILES = {"push_to_hub", "data_split", "eval_split"}  # though their texts have the word


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_flag_has_a_group_and_says_what_turns_it_off(program: Path) -> None:
    config = load_recipe(f"{program.parent.name}/{program.name}").Config
    texts, kinds = command_line._field_texts(config), get_type_hints(config, include_extras=True)
    for field in dataclasses.fields(config):
        heading, text = texts[field.name]
        assert heading in command_line._GROUPS, field.name
        assert text.endswith((".", ".)")), f"{field.name}: {text!r}"
        assert len(text) >= 8, f"{field.name}: {text!r}"
        if field.default == "" and field.type is not bool:
            assert '"" =' in text, f"{field.name}: {text!r}"
        limits = command_line._parts(kinds[field.name], command_line.Limit)
        is_number = limits and not isinstance(field.default, str)
        if is_number and limits[0].holds(0) and field.name not in ORDINARY_AT_ZERO:
            assert "0 =" in text, f"{field.name}: {text!r}"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_tilde_is_the_home_folder_in_every_field_that_can_name_a_file(
    program: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_recipe(f"{program.parent.name}/{program.name}").Config
    texts, kinds = command_line._field_texts(config), get_type_hints(config, include_extras=True)
    names = [field.name for field in dataclasses.fields(config) if field.name != "config"]
    is_text = {name: get_type_hints(config)[name] is str for name in names}
    can_name_a_file = [
        name
        for name in names
        if is_text[name] and name not in NO_FILES and re.search(r"\b([Ff]older|[Ff]ile|Hub id)\b", texts[name][1])
    ]
    assert "output_dir" in names or program.name == "generate.py"
    places = [name for name in names if command_line._PLACE in getattr(kinds[name], "__metadata__", ())]
    assert places == [name for name in names if name in {*can_name_a_file, *places}]
    (tmp_path / "c.yaml").write_text("".join(f"{name}: '~/in yaml'\n" for name in places))
    rates = [f"--{name}=0.1" for name in names if command_line._parts(kinds[name], command_line.Given)]  # with init
    parsed = command_line.parse(config, ["--config", "~/c.yaml", f"--{places[0]}=~/in a flag", *rates])
    assert [getattr(parsed, name) for name in places[1:]] == [f"{tmp_path}/in yaml"] * (len(places) - 1)
    assert getattr(parsed, places[0]) == f"{tmp_path}/in a flag"


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_help_shows_every_flag_its_limit_and_commands_as_they_are_written(program: Path) -> None:
    options = {**os.environ, "COLUMNS": "110"}
    done = subprocess.run(
        [sys.executable, str(program), "--help"], env=options, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    recipe = load_recipe(f"{program.parent.name}/{program.name}")
    kinds, words = (
        get_type_hints(recipe.Config, include_extras=True),
        " ".join(re.sub(r"[│╭╮╰╯─]", " ", done.stdout).split()),
    )
    for field in dataclasses.fields(recipe.Config):
        assert f"--{field.name}" in words
        for limit in command_line._parts(kinds[field.name], command_line.Limit):
            assert limit.expected[1:] in words
    # The commands of the page's docstring stand there line by line, each end of a line with it.
    written = re.findall(
        r"^ *((?:accelerate launch|python) recipes/[^\n]*(?:\\\n[^\n]*)*)", program.read_text(), re.MULTILINE
    )
    assert written
    for command in written:
        lines = [line.strip() for line in command.splitlines()]
        assert "\n".join(lines) in "\n".join(line.strip() for line in done.stdout.splitlines())
