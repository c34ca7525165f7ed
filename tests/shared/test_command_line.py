"""Flags and YAML give the same configuration or the same one line, whatever a user writes."""

import contextlib
import dataclasses
import errno
import os
import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shared import command_line
from shared.command_line import (
    EXIT_DISK,
    EXIT_NO_CHECKPOINT,
    EXIT_NON_FINITE,
    EXIT_STOPPED,
    EXIT_USAGE,
    DiskError,
    Given,
    NoUsableCheckpoint,
    Place,
    Places,
    RunStopped,
    Several,
    TooManyNonFiniteUpdates,
    UsageError,
    exit_codes,
    expect,
    is_speaking_process,
    parse,
    redact,
)
from shared.fields import RunControl, to_yaml

ROOT = Path(__file__).parents[2]
TOKEN = "hf_" + "a1B2" * 9


@dataclass(frozen=True, kw_only=True)
class Config(RunControl):
    """Fields of a method."""

    global_batch_size: int = 8
    max_steps: int = 5
    max_grad_norm: float = 1.0
    data: str = "sample"
    """Where the text is."""
    learning_rate: float = 4e-3
    """Peak rate."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """Shape of the rate."""
    hub_private: bool = True
    """On by default."""


def from_yaml(folder: Path, text: str, *flags: str) -> Config:
    path = folder / "c.yaml"
    path.write_bytes(text.encode())
    return parse(Config, ["--config", str(path), *flags])


def message(argv: list[str]) -> str:
    with pytest.raises(UsageError) as caught:
        parse(Config, argv)
    return str(caught.value)


def yaml_message(folder: Path, text: str) -> str:
    with pytest.raises(UsageError) as caught:
        from_yaml(folder, text)
    return str(caught.value).replace(str(folder), "")


# Flags


def test_no_flags_give_the_defaults():
    assert parse(Config, []) == Config()


def test_sys_argv_is_the_default(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--seed", "3"])
    assert parse(Config).seed == 3


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--seed", "7"], {"seed": 7}),
        (["--seed=7"], {"seed": 7}),
        (["--seed=7", "--seed", "8"], {"seed": 8}),
        (["--seed", "-7"], {"seed": -7}),
        (["--learning_rate", "1e-3"], {"learning_rate": 1e-3}),
        (["--learning-rate", "-1e-3"], {"learning_rate": -1e-3}),
        (["--learning_rate", "1"], {"learning_rate": 1.0}),
        (["--schedule", "cosine"], {"schedule": "cosine"}),
        (["--compile"], {"compile": True}),
        (["--compile", "--no-compile"], {"compile": False}),
        (["--no_hub_private"], {"hub_private": False}),
        (["--no-hub-private", "--seed", "1"], {"hub_private": False, "seed": 1}),
        (["--data", ""], {"data": ""}),
        (["--data="], {"data": ""}),
        (["--data", "-"], {"data": "-"}),
        (["--data", "a=b"], {"data": "a=b"}),
        (["--data=--seed"], {"data": "--seed"}),
        (["--data=a=b c"], {"data": "a=b c"}),
        (["--data", "no"], {"data": "no"}),
    ],
)
def test_flags(argv, expected):
    config = parse(Config, argv)
    assert config == Config(**expected)
    assert {name: type(getattr(config, name)) for name in expected} == {
        name: type(value) for name, value in expected.items()
    }


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--learning_rat", "1e-3"], "unknown flag --learning_rat; did you mean learning_rate?"),
        (["--no-compil"], "unknown flag --no-compil; did you mean compile?"),
        (["--qqqqq"], "unknown flag --qqqqq"),
        (["--no-seed"], "unknown flag --no-seed"),
        (["--seed", "1.5"], "seed: '1.5': expected a whole number"),
        (["--seed="], "seed: '': expected a whole number"),
        (["--seed", "9" * 400], f"seed: '{'9' * 400}': expected a whole number"),
        (["--learning_rate", "fast"], "learning_rate: 'fast': expected a number"),
        (["--learning_rate", "nan"], "learning_rate: 'nan': expected a number"),
        (["--learning_rate", "1e999"], "learning_rate: '1e999': expected a number"),
        (["--schedule", "linear"], "schedule: 'linear': expected one of wsd, cosine"),
        (["--compile", "yes"], "compile: 'yes': expected --compile or --no_compile, without a value"),
        (["--compile=true"], "compile: 'true': expected --compile or --no_compile, without a value"),
        (["--learning_rate"], "learning_rate: expected a number after --learning_rate"),
        (["--data", "--seed", "1"], "data: expected text after --data"),
        (["sample"], "'sample': expected a flag, such as --seed 1"),
        (["-x"], "'-x': expected a flag, such as --seed 1"),
    ],
)
def test_a_wrong_flag_is_named_with_what_was_expected(argv, expected):
    shown = message(argv)
    if "no-seed" in expected:
        assert shown.startswith(expected)
    else:
        assert shown == expected


# YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# only a comment\n", {}),
        ("---\n", {}),
        ("learning_rate: 1e-3", {"learning_rate": 1e-3}),
        ("learning_rate: 1.0e-3", {"learning_rate": 1e-3}),
        ("learning_rate: '1e-3'", {"learning_rate": 1e-3}),
        ("learning_rate: 1", {"learning_rate": 1.0}),
        ("seed: 010", {"seed": 10}),
        ("data: 1.10", {"data": "1.10"}),
        ("data: 010", {"data": "010"}),
        ("data: 2020-01-01", {"data": "2020-01-01"}),
        ("data: 'no'", {"data": "no"}),
        ("data: ''", {"data": ""}),
        ("data: '--seed'", {"data": "--seed"}),
        ("data: |\n  two\n  lines\n", {"data": "two\nlines\n"}),
        ("compile: yes\nhub_private: no", {"compile": True, "hub_private": False}),
        ("compile: TRUE\nhub_private: off", {"compile": True, "hub_private": False}),
        ("seed: &one 1\nlog_every: *one", {"seed": 1, "log_every": 1}),
        ("\ufeffseed: 1", {"seed": 1}),
        ("schedule: cosine", {"schedule": "cosine"}),
        ("data: über/ñ", {"data": "über/ñ"}),
    ],
)
def test_yaml(tmp_path, text, expected):
    config = from_yaml(tmp_path, text)
    assert dataclasses.replace(config, config="") == Config(**expected)
    assert all(type(getattr(config, name)) is type(value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("learning_rat: 1", "/c.yaml: unknown key 'learning_rat'; did you mean learning_rate?"),
        ("qqqqq: 1", "/c.yaml: unknown key 'qqqqq'"),
        ("config: other.yaml", "/c.yaml: unknown key 'config'"),
        ("seed: 1\ndata: x\nseed: 1", "/c.yaml: key 'seed' is given twice"),
        ("seed: 1.5", "/c.yaml: seed: '1.5': expected a whole number"),
        ("seed: many", "/c.yaml: seed: 'many': expected a whole number"),
        ("seed:", "/c.yaml: seed: '': expected a whole number"),
        ("seed: yes", "/c.yaml: seed: 'yes': expected a whole number"),
        ("learning_rate: .inf", "/c.yaml: learning_rate: '.inf': expected a number"),
        ("learning_rate: [1, 2]", "/c.yaml: learning_rate: expected a number, got a list"),
        ("data: {a: 1}", "/c.yaml: data: expected text, got a mapping"),
        ("data: no", "/c.yaml: data: 'no': expected text in quotes"),
        ("data: ~", "/c.yaml: data: '~': expected text in quotes"),
        ("data:", "/c.yaml: data: '': expected text in quotes"),
        ("compile: 1", "/c.yaml: compile: '1': expected true or false"),
        ("compile: 'true'", "/c.yaml: compile: 'true': expected true or false"),
        ("compile: !!bool maybe", "/c.yaml: compile: 'maybe': expected true or false"),
        ("schedule: linear", "/c.yaml: schedule: 'linear': expected one of wsd, cosine"),
        ("schedule: [wsd]", "/c.yaml: schedule: expected one of wsd, cosine, got a list"),
        ("- seed", "config: '/c.yaml': expected a mapping of field to value, got a list"),
        ("seed", "config: '/c.yaml': expected a mapping of field to value, got a single value"),
        ("? [a, b]\n: 1", None),
        ("<<: {seed: 1}", "/c.yaml: unknown key '<<'"),
    ],
)
def test_a_wrong_yaml_is_named_with_what_was_expected(tmp_path, text, expected):
    shown = yaml_message(tmp_path, text)
    assert "\n" not in shown
    if expected is None:
        assert shown.startswith("/c.yaml: unknown key")
    else:
        assert shown == expected


@pytest.mark.parametrize(
    "text", ["seed:\t1\n\tdata: x", "seed: [1", "a: b: c", "seed: 1\n---\nseed: 2", "seed: *nowhere", "\x00", "@"]
)
def test_what_is_no_yaml_is_one_line_that_names_the_file(tmp_path, text):
    shown = yaml_message(tmp_path, text)
    assert shown.startswith("config: '/c.yaml': expected YAML, got ")
    assert "\n" not in shown


def test_bytes_that_are_no_utf8(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_bytes(b"data: \xff\xfe\n")
    assert message(["--config", str(path)]).startswith(f"config: {str(path)!r}: expected YAML, got ")


def test_a_missing_file_and_a_folder(tmp_path):
    assert (
        message(["--config", "/nowhere/c.yaml"])
        == "config: '/nowhere/c.yaml': expected a YAML file, got No such file or directory"
    )
    assert message([f"--config={tmp_path}"]) == f"config: {str(tmp_path)!r}: expected a YAML file, got Is a directory"


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch {canary}']",
        "!!python/object/new:os.system ['touch {canary}']",
        "!!python/name:os.system",
        "!!python/object/apply:subprocess.check_output [['touch', '{canary}']]",
        "!!binary aGVsbG8=",
        "!mine x",
    ],
)
def test_tags_run_nothing_and_are_refused(tmp_path, value):
    canary = tmp_path / "canary"
    for field in ("data", "seed", "compile", "schedule"):
        shown = yaml_message(tmp_path, f"{field}: {value.format(canary=canary)}")
        assert shown.startswith(f"/c.yaml: {field}: ")
    assert not canary.exists()


@pytest.mark.timeout(10)
def test_twenty_levels_of_anchors_cost_nothing(tmp_path):
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 20)]
    assert yaml_message(tmp_path, "\n".join(levels)).startswith("/c.yaml: unknown key 'a0'")
    bomb = "data: " + "&a0 [x, x]".join("[]") + "\n"
    assert yaml_message(tmp_path, bomb) == "/c.yaml: data: expected text, got a list"
    assert yaml_message(tmp_path, "data: &a [*a]") == "/c.yaml: data: expected text, got a list"


def test_a_value_that_must_be_given_may_stand_in_either(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Own:
        config: str = ""
        init: str = "scratch"
        learning_rate: Annotated[float, Given(lambda config: config.init != "scratch", "with init")] = 0.02

    path = tmp_path / "c.yaml"
    path.write_text("learning_rate: 0.02\n")
    assert parse(Own, []).learning_rate == 0.02
    assert parse(Own, ["--init", "x", "--config", str(path)]).learning_rate == 0.02
    assert parse(Own, ["--init", "x", "--learning_rate", "0.02"]).learning_rate == 0.02
    with pytest.raises(
        UsageError, match=r"^learning_rate: 0.02: expected a value of your own with init, where this one"
    ):
        parse(Own, ["--init", "x"])


def test_a_tilde_is_the_home_folder_before_each_of_several_places(monkeypatch):
    @dataclasses.dataclass(frozen=True)
    class Placed:
        config: Place = ""
        data: Places = ""
        prompt: str = ""

    monkeypatch.setenv("HOME", "/home/me")
    placed = parse(Placed, ["--data", "~/a,b/~/c,~,~no_such_user/d", "--prompt", "~/"])
    assert placed == Placed(data="/home/me/a,b/~/c,/home/me,~no_such_user/d", prompt="~/")


def test_several_values_are_a_list_in_yaml_and_have_commas_on_the_command_line(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Listed:
        config: str = ""
        data: Several = ""

    path = tmp_path / "c.yaml"
    path.write_text("data:\n- a/b:config=2.10\n- c\n")
    assert parse(Listed, ["--config", str(path)]).data == "a/b:config=2.10,c"
    for text, expected in {
        "[a, ~]": "'~': expected text in quotes",
        "['a,b', c]": "expected values without commas",
    }.items():
        path.write_text(f"data: {text}")
        with pytest.raises(UsageError, match=expected):
            parse(Listed, ["--config", str(path)])
    assert yaml_message(tmp_path, "data: [a, b]") == "/c.yaml: data: expected text, got a list"


def test_flags_override_yaml_whatever_their_order(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("seed: 1\ncompile: true\nlog_every: 3\n")
    for argv in (
        ["--config", str(path), "--seed", "2", "--no-compile"],
        ["--seed", "2", "--no-compile", "--config", str(path)],
        ["--seed=2", f"--config={path}", "--no_compile"],
    ):
        config = parse(Config, argv)
        assert (config.seed, config.compile, config.log_every) == (2, False, 3)
        assert config.config == str(path)


def test_the_last_config_flag_counts(tmp_path):
    (tmp_path / "a.yaml").write_text("seed: 1")
    (tmp_path / "b.yaml").write_text("log_every: 5")
    config = parse(Config, ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.yaml")])
    assert (config.seed, config.log_every) == (0, 5)


PLAIN = ("", " ", "no", "~", "1e-3", "--seed", "-", "'", '"', "#x", "a: b", "{x}", "? a", "- a", "=", "<<", "x " * 100)
MARKED = (
    "!x",
    "&x",
    "*x",
    "%x",
    "@x",
    "`x",
    "a\nb\n",
    "\t",
    "\r\n",
    "\x85 \u2028",
    "\ufeff",
    "\x00",
    "ünï",
    "\U0001f600",
)
TEXTS = st.text() | st.sampled_from(PLAIN + MARKED)
PLACES = TEXTS.filter(lambda text: not any(part.startswith("~") for part in text.split(",")))
CONFIGS = st.builds(
    Config,
    data=PLACES,
    output_dir=PLACES,
    report_to=TEXTS,
    seed=st.integers(),
    learning_rate=st.floats(allow_nan=False, allow_infinity=False),
    schedule=st.sampled_from(["wsd", "cosine"]),
    compile=st.booleans(),
    hub_private=st.booleans(),
)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(config=CONFIGS)
def test_to_yaml_gives_the_same_config_back(tmp_path, config):
    path = tmp_path / "config.yaml"
    path.write_bytes(to_yaml(config).encode())
    assert parse(Config, ["--config", str(path), "--config="]) == Config()
    assert dataclasses.replace(parse(Config, ["--config", str(path)]), config="") == config


@settings(max_examples=300, deadline=None)
@given(config=CONFIGS)
def test_flags_give_the_same_config_back(config):
    argv = []
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, bool):
            argv.append(f"--{name}" if value else f"--no-{name}")
        else:
            argv.append(f"--{name}={value}")
    assert parse(Config, argv) == config


def test_to_yaml_holds_every_field_but_the_file_and_the_dry_run():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert set(yaml.safe_load(to_yaml(Config(dry_run=True, config="c.yaml")))) == fields - {"config", "dry_run"}


def test_expect():
    expect(True, "seed", 1, "anything")
    with pytest.raises(UsageError, match=r"^seed: 'x': expected a whole number$"):
        expect(False, "seed", "x", "a whole number")


def test_redact():
    assert redact(f"Bearer {TOKEN}!") == "Bearer hf_***!"
    assert redact("hf_transfer, hf-internal-testing/x") == "hf_transfer, hf-internal-testing/x"


# Exit codes


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UsageError("seed: 'x': expected y"), EXIT_USAGE, "error: seed: 'x': expected y\n"),
        (RunStopped("saved at step 3"), EXIT_STOPPED, "stopped: saved at step 3\n"),
        (TooManyNonFiniteUpdates("10 updates"), EXIT_NON_FINITE, "error: 10 updates\n"),
        (NoUsableCheckpoint("all damaged"), EXIT_NO_CHECKPOINT, "error: all damaged\n"),
        (DiskError("a file cannot be read"), EXIT_DISK, "error: a file cannot be read\n"),
        (UsageError(f"two\nlines {TOKEN}"), EXIT_USAGE, "error: two lines hf_***\n"),
    ],
)
def test_exit_codes(capsys, monkeypatch, error, status, line):
    for rank, expected in (("", line), ("0", line), ("-1", line), ("1", ""), ("7", "")):
        monkeypatch.setenv("LOCAL_RANK", rank) if rank else monkeypatch.delenv("LOCAL_RANK", raising=False)
        assert is_speaking_process() == bool(expected)
        with pytest.raises(SystemExit) as caught, exit_codes():
            raise error
        assert caught.value.code == status
        assert capsys.readouterr() == ("", expected)


class _Refusing(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> None:
        raise UsageError("data: 'x': expected documents")


def test_an_error_of_a_data_worker_is_one_line_too(capsys):
    with pytest.raises(SystemExit) as caught, exit_codes():
        list(torch.utils.data.DataLoader(_Refusing(), batch_size=None, num_workers=1))
    assert caught.value.code == EXIT_USAGE
    assert capsys.readouterr() == ("", "error: data: 'x': expected documents\n")


def test_ctrl_c_ends_a_program_at_once_until_something_else_is_set_up(capsys):
    for before in (signal.default_int_handler, lambda number, frame: None):
        for error in (None, ValueError("x"), UsageError("y")):
            signal.signal(signal.SIGINT, before)
            with contextlib.suppress(ValueError, SystemExit), exit_codes():
                assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
                if error:
                    raise error
            is_programs = before is signal.default_int_handler  # which goes on to import what it needs
            assert signal.getsignal(signal.SIGINT) == (signal.SIG_DFL if is_programs else before)


def test_the_status_is_right_where_nobody_hears_the_line(tmp_path):
    program = f"import sys; sys.path.insert(0, {str(ROOT)!r})\nfrom shared import command_line\n"
    program += "with command_line.exit_codes():\n    raise command_line.UsageError('x')"
    command = f"({shlex.quote(sys.executable)} -c {shlex.quote(program)} 2>&1; echo $? > {tmp_path}/status) | true"
    subprocess.run(["bash", "-c", command], check=True, timeout=60)
    assert (tmp_path / "status").read_text() == "2\n"


def _fail(error, *, while_cleaning_up):
    if not while_cleaning_up:
        raise error
    try:
        raise error
    finally:
        raise KeyError("another")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device", "/a/file"),
        RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 51840 vs 51732"),
        ValueError("I/O error: No space left on device (os error 28)"),
        UsageError("data: 'x': expected files that can be read: [Errno 28] No space left on device"),
    ],
)
def test_a_full_disk_is_one_line_and_a_status_of_its_own(capsys, error):
    for wrapped in (False, True):
        with pytest.raises(SystemExit) as caught, exit_codes():
            _fail(error, while_cleaning_up=wrapped)
        assert caught.value.code == EXIT_DISK
        out, err = capsys.readouterr()
        assert out == ""
        assert re.fullmatch(r"error: the disk is full: [^\n]*\n", err)


def test_what_cannot_be_printed_ends_nothing(tmp_path):
    program = """
import sys
sys.path.insert(0, {root!r})
from shared.command_line import exit_codes
with exit_codes():
    for number in range(20000):
        print("äöü 四 a line that fills the pipe")
    print("done", file=sys.stderr)
"""
    (tmp_path / "program.py").write_text(program.format(root=str(ROOT)))
    python = f"{shlex.quote(sys.executable)} {tmp_path}/program.py"
    commands = [f"{python} > /dev/full", f"({python}; echo status $? >&2) | head -1", f"{python} > {tmp_path}/out"]
    for command in (*commands, f"{python} >&-"):
        options = {"env": {**os.environ, "PYTHONIOENCODING": "ascii"}, "capture_output": True, "text": True}
        done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], timeout=60, **options)
        assert (done.returncode, done.stderr.replace("status 0\n", "")) == (0, "done\n")
    assert (tmp_path / "out").read_text().count("\\xe4\\xf6\\xfc \\u56db") == 20000


def test_windows_is_refused_in_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(SystemExit) as caught, exit_codes():
        pytest.fail("it went on")
    assert caught.value.code == EXIT_USAGE
    assert capsys.readouterr().err == "error: Windows: expected Linux or macOS; WSL has a Linux\n"


def test_the_exit_statuses_differ():
    assert len({0, 1, EXIT_USAGE, EXIT_DISK, EXIT_STOPPED, EXIT_NON_FINITE, EXIT_NO_CHECKPOINT}) == 7
    assert EXIT_USAGE == 2


@pytest.mark.parametrize("error", [ValueError("x"), GeneratorExit(), SystemExit(5), OSError("no such thing")])
def test_other_exceptions_pass(capsys, error):
    with pytest.raises(type(error)) as caught, exit_codes():
        raise error
    assert caught.value is error
    assert capsys.readouterr() == ("", "")


def test_no_exception_no_exit(capsys):
    with exit_codes():
        pass
    assert capsys.readouterr() == ("", "")


# The program


PROGRAM = """
\"\"\"What the program does.\"\"\"
import sys
sys.path.insert(0, {root!r})
from dataclasses import dataclass
from shared.command_line import exit_codes, parse
from shared.fields import RunControl

@dataclass(frozen=True, kw_only=True)
class Config(RunControl):
    global_batch_size: int = 8
    max_steps: int = 5
    max_grad_norm: float = 1.0

if __name__ == "__main__":
    with exit_codes():
        print(parse(Config).max_steps)
"""


def run_program(folder: Path, *flags: str, **environment: str) -> subprocess.CompletedProcess:
    path = folder / "program.py"
    path.write_text(PROGRAM.lstrip().format(root=str(ROOT)))
    return subprocess.run(
        [sys.executable, str(path), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "100", **environment},
    )


def test_help_names_every_field_with_underscores(tmp_path):
    done = run_program(tmp_path, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for field in dataclasses.fields(RunControl):
        assert f"--{field.name}" in done.stdout
    for text in ("What the program does.", "--max_steps INT", "Optimizer updates.", "--no_compile", "(default: 5)"):
        assert text in done.stdout


def test_a_wrong_flag_ends_the_program_with_one_line_and_status_2(tmp_path):
    done = run_program(tmp_path, "--max_steps", "many")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: max_steps: 'many': expected a whole number\n"
    silent = run_program(tmp_path, "--max_steps", "many", LOCAL_RANK="1")
    assert (silent.returncode, silent.stdout, silent.stderr) == (2, "", "")


def test_a_right_flag(tmp_path):
    done = run_program(tmp_path, "--max-steps=7")
    assert (done.returncode, done.stdout, done.stderr) == (0, "7\n", "")


def test_nothing_slow_is_imported():
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {command_line.__name__}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert not {"torch", "transformers", "accelerate", "numpy", "tyro"} & set(done.stdout.split())
