"""Checkpoints that are complete or absent: written aside, flushed, named by a manifest, renamed, and only then pruned.

`accelerator.save_state` writes what the engine needs; this module puts a manifest of sizes and SHA-256 sums around it,
so that a torn or altered file is found before it is loaded, and nothing else is loaded. Generator states are left out:
training is a function of (config, data, step), and those files are pickles.
"""

import errno
import hashlib
import json
import logging
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException  # of BaseException, which `except Exception` misses

from shared.command_line import DiskError, NoUsableCheckpoint, UsageError, expect, one_line
from shared.runtime.collectives import SHARDED_ENGINES, check_shared_folder, gather_objects

logger = logging.getLogger(__name__)

Read = TypeVar("Read")

MANIFEST = "manifest.json"
STATE = "state.json"
TENSORS = "tensors.safetensors"
# Errors that tell nothing of what is on a disk: of devices, of file systems over a network, of rights.
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EBUSY, errno.EACCES, errno.EPERM}
_PASSING |= {errno.ENOTCONN, errno.ECONNREFUSED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
_NO_FLUSH = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP}  # of folders, on FUSE, 9p and others over a network
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds between two tries
SCALER = "scaler.pt"  # as accelerate calls it


def resume_run(accelerator: Any, run_dir: Path, resume: str, previous_phase: Path | None) -> tuple[int, dict[str, Any]]:
    """Fill the prepared model and optimizer from the checkpoint to go on from. Every process calls this.

    Args:
        accelerator: its prepared model and optimizer are filled.
        run_dir: the run folder, which all nodes must see; made here.
        resume: see `find_checkpoint`.
        previous_phase: run folder whose newest checkpoint this run begins with, at step 0; None = with the model and
            optimizer as they are.

    Returns:
        step: optimizer updates done; 0 at the beginning.
        state: what `save_checkpoint` was given; empty at the beginning.

    Raises:
        NoUsableCheckpoint, UsageError: see `find_checkpoint`, `load_checkpoint` and `check_shared_folder`.
    """
    checkpoint = find_checkpoint(accelerator, run_dir, resume)
    before = None
    if previous_phase and not checkpoint:
        engine, before = accelerator.distributed_type.value, find_checkpoint(accelerator, previous_phase, "auto")
        expect(bool(before), "init", str(previous_phase), "a run folder with checkpoints, for init_optimizer")
        expect(engine not in SHARDED_ENGINES, "init_optimizer", True, f"False under {engine}, whose files can run code")
    check_shared_folder(accelerator, run_dir)
    if before:
        load_checkpoint(accelerator, before)
    return load_checkpoint(accelerator, checkpoint) if checkpoint else (0, {})


def save_checkpoint(
    accelerator: Any, run_dir: Path, step: int, state: dict[str, Any], keep: int, resume: str = "auto"
) -> None:
    """Write `checkpoints/step_XXXXXXXX`, then remove the oldest beyond `keep`. Every process calls this.

    Checkpoints of later steps, which are there after training went back to an earlier one, are removed as well.

    Args:
        accelerator: its prepared model and optimizer are what is saved.
        run_dir: the run folder.
        step: optimizer updates done so far.
        state: anything else that resuming needs: JSON, and under the key tensors a dict of tensors.
        keep: number of newest checkpoints to keep, this one included.
        resume: how the run was told to go on, see `find_checkpoint`.
    """
    folder = run_dir / "checkpoints"
    aside = folder / f".tmp_step_{step:08d}"
    if accelerator.is_main_process:
        for left_over in (*folder.glob(".tmp_step_*"), *folder.glob(".trash_step_*")):
            shutil.rmtree(left_over, ignore_errors=True)  # of a save that was cut short; the disk may be full
        aside.mkdir(parents=True)
    accelerator.wait_for_everyone()
    _fault("before_save", step)
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # it warns of tied weights, which it saves once
    accelerator.save_state(str(aside), safe_serialization=True)
    _fault("after_state", step)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        for generator_state in aside.glob("random_states_*.pkl"):
            generator_state.unlink()
        engine = accelerator.distributed_type.value
        about = {"step": step, "processes": accelerator.num_processes, "engine": engine, "resume": resume}
        if tensors := state.get("tensors"):
            save_file(tensors, aside / TENSORS)
        plain = {key: value for key, value in state.items() if key != "tensors"}
        (aside / STATE).write_text(json.dumps({**about, "state": plain}))
    files = _flush_and_sum(accelerator, aside)
    if accelerator.is_main_process:
        _fault("before_manifest", step)
        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1))
        _flush(aside / MANIFEST)
        _flush(aside)
        _fault("before_rename", step)
        target = folder / f"step_{step:08d}"
        if target.exists():
            target.rename(folder / f".trash_{target.name}")
        aside.rename(target)
        _flush(folder)
        _fault("after_rename", step)
        _prune(run_dir, step, keep)
    accelerator.wait_for_everyone()


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, newest first, damaged ones included."""
    folder = run_dir / "checkpoints"
    return sorted(_patiently(folder, lambda: _step_folders(folder)), key=_step, reverse=True)


def _step_folders(folder: Path) -> list[Path]:
    try:
        names = os.listdir(folder)  # `glob` takes what it may not read for empty
    except (FileNotFoundError, NotADirectoryError):
        return []
    paths = [folder / name for name in names if name.startswith("step_") and name[5:].isdecimal()]
    return [path for path in paths if path.is_dir() and not path.is_symlink()]


def _patiently(path: Path, read: Callable[[], Read]) -> Read:
    """What `read` finds at `path`; while a disk fails in passing it is asked again for 15 seconds.

    Raises:
        DiskError: the disk stays away.
    """
    for pause in (*_PAUSES, None):
        try:
            return read()
        except OSError as error:
            if error.errno not in _PASSING:
                raise
            if pause is None:
                name = error.filename or path
                said = f"{name} cannot be read: {error.strerror}: the checkpoint may be whole, so nothing was done; "
                raise DiskError(said + "the same command tries again") from error
            time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, or "" if every file is as its manifest says.

    Raises:
        DiskError: it cannot be read for now, so nobody knows.
    """
    return _patiently(checkpoint, lambda: _damage(checkpoint))


def _damage(checkpoint: Path) -> str:
    try:
        files = dict(_manifest(checkpoint))
        expected = [(name, int(size), str(digest)) for name, (size, digest) in files.items()]
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        _raise_if_passing(error)
        return f"{MANIFEST} cannot be read ({error})"
    if STATE not in files:
        return f"{MANIFEST} does not name {STATE}"
    for name, size, digest in expected:
        try:
            found = (checkpoint / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes, not {size}"
            if _sha256(checkpoint / name) != digest:
                return f"{name} has another checksum"
        except FileNotFoundError:
            return f"{name} is missing"
        except (OSError, ValueError) as error:
            _raise_if_passing(error)
            return f"{name} cannot be read ({error})"
    return ""


def _raise_if_passing(error: BaseException) -> None:
    if isinstance(error, OSError) and error.errno in _PASSING:
        raise error


def newest_usable_checkpoint(run_dir: Path) -> Path | None:
    """The newest checkpoint whose manifest holds; damaged ones are named in a warning and set aside as `.bad_*`.

    Raises:
        NoUsableCheckpoint: there are checkpoints, and all are damaged.
        DiskError: see `damage`.
    """
    problems = []
    for checkpoint in list_checkpoints(run_dir):
        problem = damage(checkpoint)
        if not problem:
            return checkpoint
        problems.append(f"{checkpoint.name}: {problem}")
        logger.warning("checkpoint %s is damaged and passed over: %s", checkpoint, problem)
        bad = checkpoint.with_name(f".bad_{checkpoint.name}")
        shutil.rmtree(bad, ignore_errors=True)
        checkpoint.rename(bad)
    set_aside = sorted(path.name for path in (run_dir / "checkpoints").glob(".bad_step_*"))
    if set_aside:
        raise NoUsableCheckpoint(
            f"{run_dir}: every checkpoint is damaged ({'; '.join(problems or set_aside)}); "
            "to start anew, choose another output_dir"
        )
    return None


def has_gone_on_from(run_dir: Path, resume: str) -> bool:
    """Whether a run's newest checkpoint was written after it had been told to go on from `resume`, a checkpoint."""
    if Path(resume).resolve().parent.parent != run_dir.resolve():
        return False
    for checkpoint in list_checkpoints(run_dir):
        try:
            before = json.loads(_patiently(checkpoint, (checkpoint / STATE).read_text))["resume"]
        except (OSError, ValueError):  # damaged, the one before may tell
            continue
        except (KeyError, TypeError):  # of an earlier version
            return False
        return Path(before).name == Path(resume).name  # of this folder, wherever it lay then
    return False


def find_checkpoint(accelerator: Any, run_dir: Path, resume: str) -> Path | None:
    """The checkpoint to go on from, the same on every process.

    Args:
        accelerator: the main process looks, the others are told.
        run_dir: the run folder.
        resume: auto, never, or a checkpoint folder; it counts only until this run has one of its own that came after
            it, so that the same command goes on after an interruption.

    Raises:
        NoUsableCheckpoint: there are checkpoints, and all are damaged.
        UsageError: the checkpoint folder is damaged, or is a sharded engine's (which holds pickles) from elsewhere.
        DiskError: see `damage`.
    """
    found: Path | Exception | None = None
    if accelerator.is_main_process:
        try:
            found = _find(run_dir, resume, accelerator.distributed_type.value)
        except (NoUsableCheckpoint, UsageError, DiskError) as error:
            found = error
        except OSError as error:
            found = DiskError(f"{run_dir}: its checkpoints cannot be read: {one_line(error)}")
    found = gather_objects(accelerator, found)[0]
    if isinstance(found, Exception):
        raise found
    return found


def load_checkpoint(accelerator: Any, checkpoint: Path) -> tuple[int, dict[str, Any]]:
    """Load model and optimizer into the prepared objects. Every process calls this.

    The optimizer keeps the learning rates and other settings that it was built with: they are the configuration's.
    Files that the manifest does not name are not seen.

    Args:
        accelerator: its prepared model and optimizer are filled.
        checkpoint: a folder in which `damage` found none.

    Returns:
        step: optimizer updates done.
        state: what `save_checkpoint` was given.

    Raises:
        UsageError: it was written by another engine, by another number of processes under DeepSpeed, or for a model
            or optimizer of another shape.
    """
    about = json.loads(_patiently(checkpoint, (checkpoint / STATE).read_text))
    name = f"resume: {str(checkpoint)!r}"
    engine, processes = accelerator.distributed_type.value, accelerator.num_processes
    if about["engine"] != engine and {about["engine"], engine} & set(SHARDED_ENGINES):
        raise UsageError(f"{name}: expected a checkpoint of {engine}, got {about['engine']}")
    if engine == "DEEPSPEED" and about["processes"] != processes:
        raise UsageError(
            f"{name}: expected a checkpoint of {processes} processes, got one of {about['processes']}; "
            "DeepSpeed's ds_to_universal converts it, unless it is Muon's"
        )
    settings, scaler = _optimizer_settings(accelerator), accelerator.scaler
    if SCALER not in _manifest(checkpoint):  # written in another precision: the scale of float16 begins anew
        accelerator.scaler = None
    with tempfile.TemporaryDirectory(prefix="checkpoint_") as view:
        _link_named_files(checkpoint, Path(view))
        try:
            accelerator.load_state(view)
        except (RuntimeError, ValueError, KeyError, OSError, pickle.UnpicklingError, CheckpointException) as error:
            if isinstance(error, OSError) and error.errno in _PASSING:
                raise DiskError(
                    f"{checkpoint} cannot be read: {error.strerror}; the same command tries again"
                ) from error
            reason = " ".join(str(error).replace(view, "").split())
            raise UsageError(f"{name}: expected a checkpoint of this model and optimizer: {reason[:300]}") from error
        finally:
            accelerator.scaler = scaler
    for group, built in zip(_optimizer_groups(accelerator), settings, strict=True):
        group.update(built)
    if (checkpoint / TENSORS).is_file() and TENSORS in _manifest(checkpoint):
        about["state"]["tensors"] = load_file(checkpoint / TENSORS)
    return about["step"], about["state"]


def _find(run_dir: Path, resume: str, engine: str) -> Path | None:
    if resume in ("auto", "never"):
        return newest_usable_checkpoint(run_dir)
    checkpoint = Path(resume)
    if checkpoint.resolve().parent.parent != run_dir.resolve():
        if own := newest_usable_checkpoint(run_dir):
            logger.warning("going on from %s, not from %s, where this run began", own, checkpoint)
            return own
        if engine in SHARDED_ENGINES:
            raise UsageError(f"resume: {resume!r}: expected one of this run's own, a sharded checkpoint can run code")
    elif has_gone_on_from(run_dir, resume):
        own = newest_usable_checkpoint(run_dir)
        logger.warning("going on from %s, since this run went back to %s before", own, checkpoint)
        return own
    if problem := damage(checkpoint):
        raise UsageError(f"resume: {resume!r}: expected a checkpoint that is whole: {problem}")
    return checkpoint


def _optimizer_groups(accelerator: Any) -> list[dict[str, Any]]:
    return [group for optimizer in accelerator._optimizers for group in optimizer.param_groups]


def _optimizer_settings(accelerator: Any) -> list[dict[str, Any]]:
    """What the configuration says of each group; `initial_lr` is torch's name for the rate before any schedule."""
    groups = _optimizer_groups(accelerator)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return [{"initial_lr": group["lr"], **group} for group in settings]


def _link_named_files(checkpoint: Path, view: Path) -> None:
    named = _manifest(checkpoint)
    for path in checkpoint.rglob("*"):
        name = path.relative_to(checkpoint)
        if name.as_posix() in named:
            (view / name).parent.mkdir(parents=True, exist_ok=True)
            (view / name).symlink_to(path.resolve())


def _manifest(checkpoint: Path) -> dict[str, tuple[int, str]]:
    return json.loads((checkpoint / MANIFEST).read_text())["files"]


def _flush_and_sum(accelerator: Any, folder: Path) -> dict[str, tuple[int, str]]:
    """Size and sum of each file, by name; each process reads a share of them, for all of them wait meanwhile."""
    sizes: dict[str, int] = {}
    if accelerator.is_main_process:  # others might not see all of them yet on a network's file system
        for path in sorted(folder.rglob("*")):
            _flush(path)
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    sizes = gather_objects(accelerator, sizes)[0]
    by_size = sorted(sizes, key=lambda name: (-sizes[name], name))
    mine = by_size[accelerator.process_index :: accelerator.num_processes]
    parts = gather_objects(accelerator, {name: _sha256(folder / name) for name in mine})
    sums = {name: digest for part in parts for name, digest in part.items()}
    return {name: (size, sums[name]) for name, size in sizes.items()}


def _prune(run_dir: Path, step: int, keep: int) -> None:
    checkpoints = list_checkpoints(run_dir)
    later = [path for path in checkpoints if _step(path) > step]
    for old in later + checkpoints[len(later) + keep :]:
        trash = old.with_name(f".trash_{old.name}")
        old.rename(trash)
        _fault("mid_prune", step)
    for trash in (run_dir / "checkpoints").glob(".trash_step_*"):
        shutil.rmtree(trash, ignore_errors=True)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name[5:])


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut, as far as the file system can."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FLUSH:
            raise
    finally:
        os.close(descriptor)


def _fault(point: str, step: int) -> None:
    """Die here when FAULT is the point, or point:step; how the tests show that a save survives SIGKILL anywhere."""
    if os.environ.get("FAULT") in (point, f"{point}:{step}"):
        os.kill(os.getpid(), signal.SIGKILL)
