"""The run folder: whether this command may use it, what it records, and its metrics.

config.yaml  run.json  metrics.jsonl  checkpoints/  recipe.py  and the final model beside them
"""

import json
import os
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from shared.command_line import UsageError

# Fields that change where and how often a run reports, not what it computes.
FREE_FIELDS = (
    *("config", "output_dir", "resume", "log_every", "eval_every", "save_every", "keep_checkpoints", "num_workers"),
    *("max_bad_updates", "profile", "dry_run", "push_to_hub", "hub_private", "push_every", "report_to"),
    *("timeout_minutes", "cache_dir", "per_device_batch_size"),
)
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "diffusers", "deepspeed", "numpy")


def check_run_folder(folder: Path, resume: str, fields: dict[str, Any]) -> None:
    """Refuse a folder that this command must not write to; writes nothing itself.

    Args:
        folder: the run folder, which need not exist.
        resume: auto, never, or a checkpoint folder.
        fields: the resolved configuration.

    Raises:
        UsageError: it cannot be written, holds something else, holds a run and `resume` is never, or holds a run of
            another configuration (the message names the fields that differ).
    """
    name = f"output_dir: {str(folder)!r}"
    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UsageError(f"{name}: expected a folder that can be written, {str(parent)!r} is not one")
    if resume not in ("auto", "never") and not (Path(resume) / "manifest.json").is_file():
        raise UsageError(f"resume: {resume!r}: expected auto, never or a checkpoint folder")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    recorded_file = folder / "config.yaml"
    if not recorded_file.is_file():
        raise UsageError(f"{name}: expected an empty folder or one of an earlier run, it holds other files")
    if resume == "never":
        raise UsageError(f"{name}: expected an empty folder with resume never, it holds a run")
    recorded = yaml.safe_load(recorded_file.read_text())
    different = [key for key, value in fields.items() if key not in FREE_FIELDS and recorded.get(key) != value]
    if different:
        changes = ", ".join(f"{key} {recorded.get(key)!r} -> {fields[key]!r}" for key in different)
        raise UsageError(f"{name}: it holds a run with another configuration ({changes}); choose another folder")


def write_run_record(folder: Path, config_yaml: str, recipe: Path, facts: dict[str, Any]) -> None:
    """Write config.yaml, a copy of the recipe, and run.json with versions, command, commit, hardware and `facts`.

    Raises:
        UsageError: the folder holds a run on other data (`facts["data_fingerprint"]` differs).
    """
    record_file = folder / "run.json"
    if record_file.is_file():
        recorded = json.loads(record_file.read_text()).get("data_fingerprint")
        if recorded != facts["data_fingerprint"]:
            raise UsageError(f"output_dir: {str(folder)!r}: it holds a run on other data, or the data has changed")
    (folder / "config.yaml").write_text(config_yaml)
    (folder / "recipe.py").write_text(recipe.read_text())
    record = {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(recipe.parent),
        "hardware": hardware(),
        "python": platform.python_version(),
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        **facts,
    }
    record_file.write_text(json.dumps(record, indent=2) + "\n")


def update_run_record(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Add to run.json and return all of it."""
    record_file = folder / "run.json"
    record = {**json.loads(record_file.read_text()), **facts}
    record_file.write_text(json.dumps(record, indent=2) + "\n")
    return record


def hardware() -> str:
    """One phrase for the machine: its accelerators, or its processor and the number of cores."""
    import torch

    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    return f"{torch.get_num_threads()} cores of {processor} ({torch.backends.cpu.get_cpu_capability()})"


def _git_commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""
