"""Runs of a recipe in this process or under an engine, and what they leave."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from safetensors.torch import load_file

from tests.hub_server import TOKEN, start_hub
from tests.launching import finish, preloaded_python, start

SHIM = Path(__file__).with_name("engine_shim.py")


def reset_accelerate() -> None:
    """accelerate keeps its state in the process; a run begins without it."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(recipe: ModuleType, cfg: Any) -> None:
    """One run in this process, as a fresh process would begin it."""
    reset_accelerate()
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGTERM, signal.SIGINT)]
    try:
        recipe.main(cfg)
    finally:
        for number, handler in handlers:
            signal.signal(number, handler)


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    """The exported model's; those of a pipeline's parts by the part's name and their own."""
    files = [*run_dir.glob("*.safetensors"), *run_dir.glob("*/*.safetensors")]
    assert files
    parts = {file: "" if file.parent == run_dir else f"{file.parent.name}." for file in files}
    return {f"{part}{name}": tensor for file, part in parts.items() for name, tensor in load_file(file).items()}


def exported(run_dir: Path) -> Path:
    """The only file of weights beside the card."""
    [file] = run_dir.glob("*.safetensors")
    return file


def assert_same_weights(one: Path, other: Path) -> None:
    """Equal to the bit."""
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    for name in first:
        assert torch.equal(first[name], second[name]), name


def run_card(run_dir: Path, folder: Path) -> None:
    """Run the code of a run's card as written, from a folder that has an image."""
    [code] = re.findall(r"^```python\n(.*?)^```", (run_dir / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert "path/of/this/folder" in code
    Image.new("RGB", (40, 30)).save(folder / "image.jpg")
    with contextlib.chdir(folder):
        exec(code.replace("path/of/this/folder", str(run_dir)), {})


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """All entries of metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def results_of(run_dir: Path) -> list[dict[str, float]]:
    """Metrics without those that measure the machine."""
    return [
        {key: value for key, value in entry.items() if not key.startswith("perf/")} for entry in metrics_of(run_dir)
    ]


def metric(run_dir: Path, name: str) -> list[float]:
    """One metric of all entries that have it."""
    return [entry[name] for entry in metrics_of(run_dir) if name in entry]


def assert_same(run_dir: Path, other: Path) -> None:
    """Equal to the bit: every entry of the metrics, and the exported weights."""
    assert results_of(run_dir) == results_of(other)
    assert_same_weights(run_dir, other)


def state_at(run_dir: Path, step: int, copy: Path) -> Path:
    """A copy of a run as it was after `step`."""
    shutil.copytree(run_dir, copy)
    for checkpoint in (copy / "checkpoints").iterdir():
        if checkpoint.name != f"step_{step:08d}":
            shutil.rmtree(checkpoint)
    for file in [*copy.glob("*.safetensors"), *copy.glob("*/*.safetensors")]:
        file.unlink()
    return copy


def push_and_load(recipe: ModuleType, fields: dict[str, Any], program: str, folder: Path) -> tuple[str, set[str]]:
    """Run a recipe that pushes to the private tester/mine on a Hub that refuses two commits, and read it from there.

    Args:
        recipe: its module.
        fields: its configuration.
        program: Python, run in a clean process where `pipeline` is imported.
        folder: for the run and both homes.

    Returns:
        What the program printed, and the names of the files pushed.
    """
    hub = start_hub()
    hub.fail("POST .*/commit/", times=2, status=500)
    online = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(folder / "hf")}
    options = {**fields, "output_dir": folder / "run", "push_to_hub": "mine"}
    command = [sys.executable, str(recipe.__file__), *flags_of(options)]
    done = subprocess.run(command, cwd="/", env=online, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert "pushed to tester/mine" in done.stdout
    assert hub.model("tester/mine").private
    pushed = set(hub.files("tester/mine"))
    assert not [name for name in pushed if "checkpoint" in name or name.endswith((".bin", ".pkl"))]
    written = [path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()]
    for text in (done.stdout.encode(), done.stderr.encode(), *written):
        assert TOKEN.encode() not in text
    program, clean = f"from transformers import pipeline\n{program}", {**online, "HF_HOME": str(folder / "other_hf")}
    loaded = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, timeout=200)
    hub.stop()
    assert loaded.returncode == 0, loaded.stderr
    return loaded.stdout, pushed


def flags_of(fields: dict[str, Any]) -> list[str]:
    """A configuration as flags."""

    def flag(name: str, value: Any) -> str:
        if isinstance(value, bool):
            return f"--{name}" if value else f"--no_{name}"
        return f"--{name}={value}"

    return [flag(name, value) for name, value in fields.items()]


class Runs:
    """Runs of one recipe that several tests look at, each made once.

    Args:
        recipe: its module.
        fields: configuration by optimizer.
        data: what all runs train on.
        folder: where they go.
    """

    def __init__(self, recipe: ModuleType, fields: dict[str, dict[str, Any]], data: Path, folder: Path) -> None:
        self.recipe, self.fields, self.folder = recipe, fields, folder
        self.common = {"data": str(data), "cache_dir": str(folder / "cache")}

    def start(self, engine: str, run_dir: Path, fields: dict[str, Any], **options: Any) -> subprocess.Popen[str]:
        """Start the recipe under an engine; through the shim where `options` ask for what only that can do."""
        if engine == "fsdp2":
            options["FSDP_ON_CPU"] = "1"
        shim = [SHIM] if {"FSDP_ON_CPU", "POISON", "SIGTERM_AT", "KILL_AT"} & options.keys() else []
        flags = flags_of({**fields, **self.common, "output_dir": run_dir})
        return start(engine, *shim, str(self.recipe.__file__), *flags, python=preloaded_python(), **options)

    def run(self, engine: str, run_dir: Path, fields: dict[str, Any], **options: Any) -> tuple[int, str]:
        """Run to the end: exit status and output."""
        process = self.start(engine, run_dir, fields, **options)
        output = finish(process)
        return process.returncode, output

    def of_engine(self, engine: str, optimizer: str) -> Path:
        """The run folder under an engine; that of one process is made meanwhile."""
        run_dir = self.folder / f"{engine}-{optimizer}"
        if not run_dir.exists():
            process = self.start(engine, run_dir, self.fields[optimizer])
            self.of_one_process(optimizer)
            output = finish(process)
            assert process.returncode == 0, output
        return run_dir

    def of_one_process(self, optimizer: str, **fields: Any) -> Path:
        """The run folder of one process, with some fields changed."""
        run_dir = self.folder / "-".join(["one", optimizer, *map(str, fields.values())])
        if not run_dir.exists():
            self.run_here(run_dir, {**self.fields[optimizer], **fields})
        return run_dir

    def run_here(self, run_dir: Path, fields: dict[str, Any]) -> None:
        """Run in this process."""
        run(self.recipe, self.recipe.Config(**fields, **self.common, output_dir=str(run_dir)))
