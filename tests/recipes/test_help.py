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
