"""Start programs by `accelerate launch` as users do, and leave none behind."""

import atexit
import contextlib
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.conftest import ROOT

PYTHON = [sys.executable]
ACCELERATE = [*PYTHON, "-m", "accelerate.commands.launch"]
# What the tests change in the configurations for GPUs: two processes, and float32, which shows real differences.
ON_CPUS = ("--num_processes=2", "--mixed_precision=no")


@functools.cache
def preloaded_python() -> list[str]:
    """What to put in the place of `PYTHON` where a new interpreter is not what a test is about, see fork_server.py."""
    path = str(Path(tempfile.mkdtemp(prefix="fork_server_")) / "socket")
    server = subprocess.Popen(
        [*PYTHON, str(ROOT / "tests/fork_server.py"), path],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    atexit.register(server.kill)
    return [*PYTHON, "-S", str(ROOT / "tests/fork_client.py"), path]


def start(
    config: str,
    *program: str | Path,
    launcher: tuple[str, ...] = ON_CPUS,
    cwd: Path = ROOT,
    python: list[str] = PYTHON,
    **environment: str,
) -> subprocess.Popen[str]:
    """Start `accelerate launch` with accelerate_configs/`config`.yaml; its output and errors go into one pipe.

    Args:
        config: name of the file.
        program: the program and its flags.
        launcher: flags that override the file.
        cwd: where it runs.
        python: `PYTHON`, or `preloaded_python()`.
        environment: variables to add.
    """
    command = [
        *python,
        *("-m", "accelerate.commands.launch"),
        "--config_file",
        str(ROOT / "accelerate_configs" / f"{config}.yaml"),
        "--main_process_port=0",
    ]
    command += [*launcher, *map(str, program)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env={**os.environ, **environment}, **pipes)


def finish(process: subprocess.Popen[str], timeout: float = 480) -> str:
    """Wait for the end and return the output; after the time-out the process and its descendants are killed.

    The first run under DeepSpeed on a machine compiles a library for a minute or two.
    """
    try:
        return process.communicate(timeout=timeout)[0]
    except subprocess.TimeoutExpired:
        for descendant in psutil.Process(process.pid).children(recursive=True):
            descendant.kill()
        process.kill()
        output = process.communicate()[0]
        raise AssertionError(f"not done after {timeout} s:\n{output}") from None


def launch(config: str, *program: str | Path, **options: Any) -> tuple[int, str]:
    """Run to the end: exit status and output."""
    process = start(config, *program, **options)
    output = finish(process)
    return process.returncode, output


def assert_no_traceback(output: str) -> None:
    """Of the program; the launcher's own comes after the program has ended."""
    assert "Traceback" not in output.partition("torch/distributed/elastic")[0], output


@contextlib.contextmanager
def odd_mount(folder: Path, *lacking: str) -> Iterator[Path]:
    """A mount of odd_file_system.py, which lacks that; the test is skipped where nobody may make one."""
    mount, source = folder / "mount", folder / "disk"
    for made in (mount, source):
        made.mkdir()
    command = [*PYTHON, "-S", str(ROOT / "tests/odd_file_system.py"), str(source), str(mount), *lacking]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True}
    with subprocess.Popen(command, **pipes) as server:
        assert server.stdout is not None
        if server.stdout.readline() != "ready\n":
            pytest.skip("needs Linux's FUSE and the right to mount")
        try:
            yield mount
        finally:
            subprocess.run(["umount", "--lazy", str(mount)], check=True)
            server.kill()


def wait_for(condition: Callable[[], bool], seconds: float) -> None:
    """Return when `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)
