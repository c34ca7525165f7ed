"""The run folder: whether this command may use it, what it records, and its metrics.

config.yaml  run.json  metrics.jsonl  checkpoints/  recipe.py  and the final model beside them
"""

import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from shared.command_line import UsageError, expect, redact
from shared.run.checkpoints import has_gone_on_from

# Fields that change where and how often a run reports, not what it computes.
FREE_FIELDS = (
    *("config", "output_dir", "resume", "log_every", "eval_every", "save_every", "keep_checkpoints", "num_workers"),
    *(
        "max_bad_updates",
        "profile",
        "dry_run",
        "push_to_hub",
        "hub_private",
        "hub_license",
        "push_every",
        "eval_windows",
    ),
    *(
        "report_to",
        "tracker_project",
        "run_name",
        "timeout_minutes",
        "cache_dir",
        "per_device_batch_size",
        "gradient_checkpointing",
    ),
    *("max_bad_fraction", "seeds"),
)
_LIBRARIES = ("torch", "transformers", "accelerate", "datasets", "tokenizers", "diffusers", "deepspeed", "numpy")


def check_run_folder(
    folder: Path,
    resume: str,
    fields: dict[str, Any],
    defaults: dict[str, Any] | None = None,
    checked_later: Sequence[str] = (),
) -> None:
    """Refuse a folder that this command must not write to; writes nothing itself.

    Args:
        folder: the run folder, which need not exist.
        resume: auto, never, or a checkpoint folder.
        fields: the resolved configuration.
        defaults: of its fields, which a run had that is older than a field; None = there are none.
        checked_later: names of fields that may differ as far as this goes.

    Raises:
        UsageError: it cannot be written, holds something else, holds a run and `resume` is never, or holds a run of
            another configuration (the message names the fields that differ).
    """
    name = f"output_dir: {str(folder)!r}"
    is_there = resume in ("auto", "never") or os.path.isfile(Path(resume) / "manifest.json")
    if not is_there and not has_gone_on_from(folder, resume):  # then it may be pruned by now
        raise UsageError(f"resume: {resume!r}: expected auto, never or a checkpoint folder")
    check_writable(folder)
    # Hidden files may be of a start that was killed before it wrote its first file.
    if not os.path.isdir(folder) or all(path.name.startswith(".") for path in folder.iterdir()):
        return
    recorded_file = folder / "config.yaml"
    if not recorded_file.is_file():
        raise UsageError(f"{name}: expected an empty folder or one of an earlier run, it holds other files")
    if resume == "never":
        raise UsageError(f"{name}: expected an empty folder with resume never, it holds a run")
    recorded = _read_mapping(recorded_file, yaml.safe_load)
    recorded = {**(defaults or {}), **recorded}
    # Files may lie elsewhere now; whether they are the same `write_run_record` sees by their content.
    free = {*FREE_FIELDS, *checked_later, *(key for key in ("data", "eval_data") if _are_files(fields.get(key, "")))}
    different = [key for key, value in fields.items() if key not in free and recorded.get(key) != value]
    if different:
        changes = ", ".join(f"{key} {recorded.get(key)!r} -> {fields[key]!r}" for key in different)
        raise UsageError(f"{name}: it holds a run with another configuration ({changes}); choose another folder")


def changed_fields(folder: Path, fields: dict[str, Any], names: Sequence[str]) -> list[str]:
    """Those of `names` whose values differ from those that the folder's run was begun or last gone on with."""
    file = folder / "config.yaml"
    recorded = _read_mapping(file, yaml.safe_load) if file.is_file() else {}
    return [name for name in names if recorded.get(name, fields[name]) != fields[name]]


def _are_files(names: str) -> bool:
    """Whether comma-separated names, each maybe with options behind a colon, are of files or folders that are here."""
    entries = [names] if os.path.exists(os.path.expanduser(names)) else names.split(",")
    return all(os.path.exists(os.path.expanduser(entry.split(":")[0].strip())) for entry in entries)


def check_writable(folder: Path) -> None:
    """Refuse a folder that can neither be written nor made; makes and writes nothing itself.

    Raises:
        UsageError: naming the folder as output_dir, and what is in the way.
    """
    parent = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not parent.is_dir() or not os.access(parent, os.R_OK | os.W_OK | os.X_OK):
        expected = f"expected a folder that can be written, {str(parent)!r} is not one"
        raise UsageError(f"output_dir: {str(folder)!r}: {expected}")


def check_room(folder: Path, num_bytes: int) -> None:
    """Refuse a folder on whose disk so many bytes more do not fit.

    Raises:
        UsageError: naming the folder as output_dir, and both sizes.
    """
    from shared.performance.dry_run import human_bytes

    parent = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    expected = f"a disk with {human_bytes(num_bytes)} of room, it has {human_bytes(free)}"
    expect(num_bytes <= free, "output_dir", str(folder), expected)


def recorded_commits(folder: Path) -> dict[str, str]:
    """The commits of data sets on the Hub with which a folder's run began, by what `--data` said; none, no run."""
    record_file = folder / "run.json"
    return _read_mapping(record_file, json.loads).get("data_commits", {}) if record_file.is_file() else {}


def write_run_record(folder: Path, config_yaml: str, recipe: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Write config.yaml, a copy of the recipe, and run.json with versions, command, commit, hardware and `facts`.

    run.json and the model card made from it name neither the user's home folder nor an access token.

    Returns:
        What run.json holds, also run_id, which stays the same when the run goes on.

    Raises:
        UsageError: the folder holds a run on other data (one of the facts called ..._fingerprint differs).
    """
    record_file = folder / "run.json"
    recorded = _read_mapping(record_file, json.loads) if record_file.is_file() else {}
    # A run of an earlier version may not say some of them.
    known = [name for name in facts if name.endswith("_fingerprint") and name in recorded]
    for name in ["data_fingerprint", *known] if recorded else []:
        if recorded.get(name) != facts[name]:
            what = name.removesuffix("_fingerprint").replace("_", " ")
            raise UsageError(f"output_dir: {str(folder)!r}: it holds a run on other {what}, or the {what} has changed")
    write_text(folder / "config.yaml", config_yaml)
    write_text(folder / "recipe.py", recipe.read_text(encoding="utf-8"))
    record = {
        "run_id": recorded.get("run_id") or secrets.token_hex(4),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": _git_commit(recipe.parent),
        "hardware": hardware(facts.get("processes", 0), facts.get("device", "")),
        "python": platform.python_version(),
        "versions": {name: version for name in _LIBRARIES if (version := _version(name))},
        **facts,
    }
    write_json(record_file, record)
    return record


def update_run_record(folder: Path, facts: dict[str, Any]) -> dict[str, Any]:
    """Add to run.json and return all of it."""
    record_file = folder / "run.json"
    write_json(record_file, {**_read_mapping(record_file, json.loads), **facts})
    return _read_mapping(record_file, json.loads)


def write_json(file: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all, and that names neither the user's home folder nor a token."""
    text, home = json.dumps(content, indent=2), json.dumps(os.path.expanduser("~"))[1:-1]
    if home not in ("/", "~"):  # none, or not known
        text = re.sub(rf"(?<![\w.-]){re.escape(home)}(?![\w.-])", "~", text)
    write_text(file, redact(text) + "\n")


def hardware(processes: int = 0, device: str = "") -> str:
    """One phrase for the machine: its accelerators, one for each process (0 = all), or its processor and its cores.

    Where `device` is cpu, accelerators were not used.
    """
    import torch

    if torch.cuda.is_available() and device != "cpu":
        return f"{processes or torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    processor = platform.processor() or platform.machine()
    cpu_info = Path("/proc/cpuinfo")
    if cpu_info.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpu_info.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    number = torch.get_num_threads()
    return f"{number} {'core' if number == 1 else 'cores'} of {processor} ({torch.backends.cpu.get_cpu_capability()})"


def _read_mapping(file: Path, read: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = read(file.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise UsageError(f"output_dir: {str(file.parent)!r}: expected a run, but its {file.name} cannot be read")
    return content


def write_text(file: Path, text: str) -> None:
    """Write a file that is there whole or not at all."""
    aside = file.with_name(f".{file.name}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(file)


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
