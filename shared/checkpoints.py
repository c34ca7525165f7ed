"""Checkpoints that are complete or absent: written aside, flushed, named by a manifest, renamed, and only then pruned.

`accelerator.save_state` writes what the engine needs; this module puts a manifest of sizes and SHA-256 sums around it,
so that a torn or altered file is found before it is loaded. Generator states are left out: training is a function of
(config, data, step), and those files are pickles.
"""

import hashlib
import json
import logging
import os
import shutil
import signal
from pathlib import Path
from typing import Any

from shared.command_line import NoUsableCheckpoint, UsageError
from shared.launch import gather_objects

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"


def save_checkpoint(accelerator: Any, run_dir: Path, step: int, state: dict[str, Any], keep: int) -> None:
    """Write `checkpoints/step_XXXXXXXX`, then remove the oldest beyond `keep`. Every process calls this.

    Args:
        accelerator: its prepared model and optimizer are what is saved.
        run_dir: the run folder.
        step: optimizer updates done so far.
        state: anything else that resuming needs, as JSON.
        keep: number of newest checkpoints to keep, this one included.
    """
    folder = run_dir / "checkpoints"
    aside = folder / f".tmp_step_{step:08d}"
    if accelerator.is_main_process:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _fault("before_save")
    accelerator.save_state(str(aside), safe_serialization=True)
    _fault("after_state")
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for generator_state in aside.glob("random_states_*.pkl"):
            generator_state.unlink()
        (aside / "state.json").write_text(json.dumps(state))
        _write_manifest(aside, step, accelerator.num_processes, accelerator.distributed_type.value)
        _fault("before_rename")
        target = folder / f"step_{step:08d}"
        shutil.rmtree(target, ignore_errors=True)
        aside.rename(target)
        _sync(folder)
        _fault("after_rename")
        _prune(folder, keep)
    accelerator.wait_for_everyone()


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, damaged ones included."""
    names = (path for path in (run_dir / "checkpoints").glob("step_*") if path.name[5:].isdecimal() and path.is_dir())
    return sorted(names, key=lambda path: int(path.name[5:]), reverse=True)


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or "" if every file is as its manifest says."""
    try:
        files = json.loads((checkpoint / MANIFEST).read_text())["files"]
        for name, (size, digest) in files.items():
            if (checkpoint / name).stat().st_size != size:
                return f"{name} has {(checkpoint / name).stat().st_size} bytes, not {size}"
            if _sha256(checkpoint / name) != digest:
                return f"{name} has another checksum"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return ""


def newest_usable_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; damaged ones are named in a warning and set aside as `.bad_*`.

    Raises:
        NoUsableCheckpoint: there are checkpoints, and all are damaged.
    """
    problems = []
    for checkpoint in list_checkpoints(run_dir):
        problem = damage(checkpoint)
        if not problem:
            return checkpoint
        problems.append(f"{checkpoint.name}: {problem}")
        logger.warning("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
        shutil.rmtree(checkpoint.with_name(f".bad_{checkpoint.name}"), ignore_errors=True)
        checkpoint.rename(checkpoint.with_name(f".bad_{checkpoint.name}"))
    if problems or any((run_dir / "checkpoints").glob(".bad_step_*")):
        raise NoUsableCheckpoint(
            f"{run_dir}: every checkpoint is damaged ({'; '.join(problems) or 'see checkpoints/.bad_*'}); "
            "to start anew, choose another output_dir"
        )
    return None


def find_checkpoint(accelerator: Any, run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, the same on every process.

    Args:
        accelerator: the main process looks, the others are told.
        run_dir: the run folder.
        resume: auto, never, or a checkpoint folder.

    Raises:
        NoUsableCheckpoint: there are checkpoints, and all are damaged.
        UsageError: the checkpoint folder is damaged, or is a sharded engine's (which holds pickles) from elsewhere.
    """
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if problem := damage(checkpoint):
            raise UsageError(f"resume: {resume!r}: expected a checkpoint that is whole: {problem}")
        is_foreign = checkpoint.resolve().parent.parent != run_dir.resolve()
        if is_foreign and accelerator.distributed_type.value in ("DEEPSPEED", "FSDP"):
            raise UsageError(f"resume: {resume!r}: expected one of this run's own, a sharded checkpoint can run code")
        return checkpoint
    found: tuple[Path | None, str] = (None, "")
    if accelerator.is_main_process:
        try:
            found = newest_usable_checkpoint(run_dir), ""
        except NoUsableCheckpoint as error:
            found = None, str(error)
    checkpoint_found, problem = gather_objects(accelerator, found)[0]
    if problem:
        raise NoUsableCheckpoint(problem)
    return checkpoint_found


def load_checkpoint(accelerator: Any, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Load model and optimizer into the prepared objects. Every process calls this.

    Returns:
        step: optimizer updates done.
        state: what `save_checkpoint` was given.

    Raises:
        UsageError: it was written by another engine, or by another number of processes under DeepSpeed.
    """
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    engine, processes = accelerator.distributed_type.value, accelerator.num_processes
    sharded = ("DEEPSPEED", "FSDP")
    if manifest["engine"] != engine and (manifest["engine"] in sharded or engine in sharded):
        raise UsageError(f"resume: {str(checkpoint)!r}: expected a checkpoint of {engine}, got {manifest['engine']}")
    if engine == "DEEPSPEED" and manifest["processes"] != processes:
        raise UsageError(
            f"resume: {str(checkpoint)!r}: expected a checkpoint of {processes} processes, got one of "
            f"{manifest['processes']}; DeepSpeed's ds_to_universal converts it"
        )
    accelerator.load_state(str(checkpoint))
    return manifest["step"], json.loads((checkpoint / "state.json").read_text())


def _write_manifest(folder: Path, step: int, processes: int, engine: str) -> None:
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        _sync(path)
        files[str(path.relative_to(folder))] = (path.stat().st_size, _sha256(path))
    _fault("before_manifest")
    manifest = {"step": step, "processes": processes, "engine": engine, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _sync(folder / MANIFEST)
    _sync(folder)


def _prune(folder: Path, keep: int) -> None:
    for old in list_checkpoints(folder.parent)[keep:]:
        trash = old.with_name(f".trash_{old.name}")
        old.rename(trash)
        _fault("mid_prune")
        shutil.rmtree(trash)
    for left in (*folder.glob(".trash_*"), *folder.glob(".tmp_step_*")):
        shutil.rmtree(left, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _fault(point: str) -> None:
    """Die here when the environment says so; how the tests show that a save survives SIGKILL at each point."""
    if os.environ.get("FAULT") == point:
        os.kill(os.getpid(), signal.SIGKILL)
