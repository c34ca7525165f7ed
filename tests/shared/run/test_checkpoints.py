"""What kills, damage, full disks and foreign files do to checkpoints, with a real accelerator and tiny models.

Training programs run in children of a fork server that has imported the libraries once. A program that was killed at
any point and run again must end with the weights of the one that never was.
"""

import dataclasses
import errno
import hashlib
import json
import logging
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from torch import nn

from shared.command_line import (
    EXIT_NO_CHECKPOINT,
    EXIT_USAGE,
    DiskError,
    NoUsableCheckpoint,
    UsageError,
    exit_codes,
)
from shared.optim.muon import MuonWithAdamW
from shared.optim.optimizers import set_learning_rates
from shared.run import checkpoints
from shared.run.checkpoints import (
    damage,
    find_checkpoint,
    has_gone_on_from,
    list_checkpoints,
    load_checkpoint,
    newest_usable_checkpoint,
    resume_run,
    save_checkpoint,
)

ROOT = Path(__file__).parents[3]
STEPS, EVERY, KEEP = 10, 2, 2
POINTS = ("before_save", "after_state", "before_manifest", "before_rename", "after_rename", "mid_prune")
FILES = ("model.safetensors", "optimizer.bin", "state.json")

FORK_SERVER = multiprocessing.get_context("forkserver")
FORK_SERVER.set_forkserver_preload(
    ["torch._dynamo", "torch._inductor", "torch.distributed.checkpoint.api", "accelerate", "safetensors.torch"]
)


# -- the training program ----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Program:
    """A run of `STEPS` updates with dropout; what an update sees depends on its number alone."""

    run_dir: Path
    fault: str = ""
    keep: int = KEEP
    resume: str = "auto"
    full_disk_at: int = 0
    room: int = 0
    pause_seconds: float = 0.0

    def __call__(self) -> None:
        torch.set_num_threads(1)
        os.environ["FAULT"] = self.fault
        with exit_codes():
            self.train()

    def train(self) -> None:
        accelerator = Accelerator(cpu=True)
        model, optimizer = prepared(accelerator)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        checkpoint = find_checkpoint(accelerator, self.run_dir, self.resume)
        step, state = load_checkpoint(accelerator, checkpoint) if checkpoint else (0, {"losses": []})
        losses = state["losses"]
        with (self.run_dir / "trained.txt").open("a") as trained:
            while step < STEPS:
                losses.append(update(accelerator, model, optimizer, step))
                step += 1
                print(step, file=trained, flush=True)
                time.sleep(self.pause_seconds)
                if step == self.full_disk_at:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.room))
                if step % EVERY == 0:
                    save_checkpoint(accelerator, self.run_dir, step, {"losses": losses}, self.keep, self.resume)
        (self.run_dir / "result.json").write_text(json.dumps([weights_sum(model), losses]))


def prepared(accelerator: Accelerator, width: int = 12, lr: float = 1e-2, kind: str = "muon") -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, width), nn.Dropout(0.2), nn.ReLU(), nn.Linear(width, 1))
    if kind == "adamw":
        return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=lr))
    matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "lr": 2 * lr, "use_muon": True}, {"params": vectors, "lr": lr}]
    return accelerator.prepare(model, MuonWithAdamW(groups, weight_decay=0.01))


def update(accelerator: Accelerator, model: Any, optimizer: Any, step: int) -> float:
    set_learning_rates(optimizer, 1 - step / STEPS)
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(step))
    torch.manual_seed(1000 + step)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def weights_sum(model: Any) -> str:
    content = b"".join(parameter.detach().numpy().tobytes() for parameter in model.parameters())
    return hashlib.sha256(content).hexdigest()


def start(program: Program) -> BaseProcess:
    process = FORK_SERVER.Process(target=program)
    process.start()
    return process


def run(program: Program) -> int:
    """Exit status; minus the signal's number for a process that was killed."""
    process = start(program)
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


def steps_of(run_dir: Path) -> list[int]:
    return [int(path.name[5:]) for path in list_checkpoints(run_dir)]


def hidden_of(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob(".*"))


def trained(run_dir: Path) -> list[int]:
    return [int(line) for line in (run_dir / "trained.txt").read_text().split()]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nothing happened to, with all its checkpoints."""
    run_dir = tmp_path_factory.mktemp("reference") / "run"
    assert run(Program(run_dir, keep=STEPS)) == 0
    assert steps_of(run_dir) == [10, 8, 6, 4, 2]
    assert trained(run_dir) == list(range(1, STEPS + 1))
    return run_dir


def assert_same_result(run_dir: Path, reference: Path) -> None:
    assert json.loads((run_dir / "result.json").read_text()) == json.loads((reference / "result.json").read_text())


@pytest.fixture
def stopped(reference: Path, tmp_path: Path) -> Path:
    """A run that holds the checkpoints of steps 2, 4 and 6, and no result."""
    run_dir = tmp_path / "run"
    for step in (2, 4, 6):
        shutil.copytree(checkpoint_of(reference, step), checkpoint_of(run_dir, step))
    return run_dir


def checkpoint_of(run_dir: Path, step: int) -> Path:
    return run_dir / "checkpoints" / f"step_{step:08d}"


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


# -- kills -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("point", POINTS)
def test_sigkill_at_every_point_of_a_save_loses_nothing(reference: Path, tmp_path: Path, point: str, keep: int) -> None:
    run_dir = tmp_path / "run"
    assert run(Program(run_dir, keep=keep, fault=f"{point}:6")) == -signal.SIGKILL
    usable = newest_usable_checkpoint(run_dir)
    assert usable == checkpoint_of(run_dir, 6 if point in ("after_rename", "mid_prune") else 4)
    assert len([path for path in list_checkpoints(run_dir) if not damage(path)]) >= min(keep, 2)
    assert run(Program(run_dir, keep=keep)) == 0
    assert_same_result(run_dir, reference)
    assert steps_of(run_dir) == [10, 8][:keep]
    assert hidden_of(run_dir) == []


@pytest.mark.parametrize("point", ["before_save", "before_rename", "after_rename"])
def test_sigkill_in_the_first_save(reference: Path, tmp_path: Path, point: str) -> None:
    run_dir = tmp_path / "run"
    assert run(Program(run_dir, fault=point)) == -signal.SIGKILL
    assert steps_of(run_dir) == ([2] if point == "after_rename" else [])
    assert run(Program(run_dir)) == 0
    assert_same_result(run_dir, reference)
    assert trained(run_dir)[2:4] == ([3, 4] if point == "after_rename" else [1, 2])


def test_killed_in_every_save_one_after_the_other(reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for step in range(EVERY, STEPS + 1, EVERY):
        assert run(Program(run_dir, fault=f"{POINTS[step % 5]}:{step}")) == -signal.SIGKILL
    assert run(Program(run_dir)) == 0
    assert_same_result(run_dir, reference)


@pytest.mark.slow
def test_sigkill_at_random_times(reference: Path, tmp_path: Path) -> None:
    draw, run_dir = random.Random(0), tmp_path / "run"
    for _ in range(20):
        process = start(Program(run_dir, pause_seconds=0.05))
        time.sleep(draw.uniform(0.1, 1.0))
        process.kill()
        process.join(60)
        assert all(not damage(path) for path in list_checkpoints(run_dir))
    assert run(Program(run_dir)) == 0
    assert_same_result(run_dir, reference)


def test_a_finished_run_is_left_as_it_is(reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    before = {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")}
    assert run(Program(run_dir)) == 0
    assert {path: path.stat().st_mtime_ns for path in (run_dir / "checkpoints").rglob("*")} == before
    assert trained(run_dir) == list(range(1, STEPS + 1))


@pytest.mark.parametrize("stops", [(2,), (4, 6, 8)])
def test_resuming_again_and_again(reference: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    run_dir = tmp_path / "run"
    for step in stops:
        run(Program(run_dir, fault=f"after_rename:{step}"))
    assert run(Program(run_dir)) == 0
    assert_same_result(run_dir, reference)
    assert trained(run_dir) == list(range(1, STEPS + 1))


# -- what a save leaves ------------------------------------------------------------------------------------------------


def test_a_checkpoint_has_weights_optimizer_state_and_a_manifest_of_all_of_them(reference: Path) -> None:
    checkpoint = checkpoint_of(reference, 10)
    assert sorted(path.name for path in checkpoint.iterdir()) == sorted([*FILES, "manifest.json"])
    files = json.loads((checkpoint / "manifest.json").read_text())["files"]
    assert sorted(files) == sorted(FILES)
    for name, (size, digest) in files.items():
        content = (checkpoint / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (size, digest)
    about = json.loads((checkpoint / "state.json").read_text())
    assert (about["step"], about["processes"], about["engine"]) == (10, 1, "NO")
    assert len(about["state"]["losses"]) == 10


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_newest_are_kept(accelerator: Accelerator, tmp_path: Path, keep: int) -> None:
    prepared(accelerator)
    for step in range(1, 6):
        save_checkpoint(accelerator, tmp_path, step, {}, keep)
        assert steps_of(tmp_path) == list(range(step, 0, -1))[:keep]
        assert all(not damage(path) for path in list_checkpoints(tmp_path))
    assert hidden_of(tmp_path) == []


def test_tensors_of_the_state_come_back_as_tensors(accelerator: Accelerator, tmp_path: Path) -> None:
    tensors = {"average": torch.arange(4.0), "other": torch.ones(2, 3)}
    prepared(accelerator)
    save_checkpoint(accelerator, tmp_path, 1, {"seen": 3, "tensors": tensors}, keep=2)
    save_checkpoint(accelerator, tmp_path, 2, {"seen": 4, "tensors": {}}, keep=2)
    step, state = load_checkpoint(accelerator, tmp_path / "checkpoints" / "step_00000001")
    assert (step, state["seen"]) == (1, 3)
    assert state["tensors"].keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in state["tensors"].items())
    assert load_checkpoint(accelerator, tmp_path / "checkpoints" / "step_00000002") == (2, {"seen": 4})
    (tmp_path / "checkpoints" / "step_00000001" / "tensors.safetensors").write_bytes(b"damaged")
    assert "tensors.safetensors" in damage(tmp_path / "checkpoints" / "step_00000001")


def test_saving_a_step_again_replaces_it(accelerator: Accelerator, stopped: Path) -> None:
    prepared(accelerator)
    save_checkpoint(accelerator, stopped, 6, {"losses": ["new"]}, 3)
    assert steps_of(stopped) == [6, 4, 2]
    assert hidden_of(stopped) == []
    assert load_checkpoint(accelerator, checkpoint_of(stopped, 6)) == (6, {"losses": ["new"]})


def test_what_an_interrupted_save_left_is_removed_before_the_next_is_written(
    accelerator: Accelerator, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = stopped / "checkpoints"
    for name in (".tmp_step_00000003", ".tmp_step_00000008", ".trash_step_00000001"):
        (folder / name / "deep").mkdir(parents=True)
    prepared(accelerator)
    save_state, seen = accelerator.save_state, []

    def look_and_save(*arguments: Any, **options: Any) -> None:
        seen.extend(hidden_of(stopped))
        save_state(*arguments, **options)

    monkeypatch.setattr(accelerator, "save_state", look_and_save)
    save_checkpoint(accelerator, stopped, 8, {}, 2)
    assert seen == [".tmp_step_00000008"]
    assert hidden_of(stopped) == []


def test_two_hundred_saves_and_resumes_leave_nothing_behind(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither memory, nor descriptors, threads, or files; a copy of the model that stays is 250 kB a cycle."""
    model, optimizer = prepared(accelerator, width=6000)
    for_temporary = tmp_path / "temporary"  # of this test alone: other workers come and go in the system's folder
    for_temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(for_temporary))
    monkeypatch.setattr(checkpoints, "_flush", lambda _: None)  # a third of the time
    process, seen = psutil.Process(), []
    for step in range(1, 201):
        save_checkpoint(accelerator, tmp_path, step, {"losses": []}, 2)
        assert load_checkpoint(accelerator, find_checkpoint(accelerator, tmp_path, "auto"))[0] == step
        if step == 1:
            update(accelerator, model, optimizer, 0)  # from here on there is a state of the optimizer
        files = [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()]
        seen.append((process.memory_info().rss, process.num_fds(), process.num_threads(), len(files), sum(files)))
    slopes = np.polyfit(np.arange(150), np.array(seen[50:], dtype=float), 1)[0]
    assert slopes[0] < 25_000, "bytes of memory in a cycle"
    assert np.abs(slopes[1:4]).max() < 1e-3, "descriptors, threads and files in a cycle"
    assert abs(slopes[4]) < 1, "bytes on the disk in a cycle"
    assert os.listdir(for_temporary) == []


def test_a_file_system_that_cannot_flush_folders_has_checkpoints_all_the_same(
    accelerator: Accelerator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many of FUSE and over networks; an error of a device is none of these."""
    fsync, code = os.fsync, errno.EINVAL

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    prepared(accelerator)
    save_checkpoint(accelerator, tmp_path, 1, {}, 2)
    assert newest_usable_checkpoint(tmp_path) == checkpoint_of(tmp_path, 1)
    code = errno.EIO
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        save_checkpoint(accelerator, tmp_path, 2, {}, 2)
    assert newest_usable_checkpoint(tmp_path) == checkpoint_of(tmp_path, 1)


# -- damage ------------------------------------------------------------------------------------------------------------


def rewrite(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGES: dict[str, Callable[[Path], Any]] = {
    "truncated": rewrite(lambda content: content[:-7]),
    "half": rewrite(lambda content: content[: len(content) // 2]),
    "zero-length": rewrite(lambda content: b""),
    "bit-flipped": rewrite(lambda content: content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]),
    "grown": rewrite(lambda content: content + b"\0"),
    "missing": Path.unlink,
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a symlink loop": lambda path: (path.unlink(), path.symlink_to(path.name)),
}
MANIFEST_DAMAGES: dict[str, Callable[[Path], Any]] = {
    **{name: DAMAGES[name] for name in ("truncated", "half", "zero-length", "missing", "a folder")},
    "no JSON": lambda path: path.write_bytes(b"\xff\xfe"),
    "a list": lambda path: path.write_text("[]"),
    "null": lambda path: path.write_text("null"),
    "nothing in it": lambda path: path.write_text("{}"),
    "no file in it": lambda path: path.write_text('{"files": {}}'),
    "files in a list": lambda path: path.write_text('{"files": ["model.safetensors"]}'),
    "no sums": lambda path: path.write_text('{"files": {"state.json": null}}'),
    "another sum": rewrite(lambda content: content.replace(b'"0', b'"1').replace(b'"a', b'"b').replace(b'"c', b'"d')),
}


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_found_named_and_passed_over(
    stopped: Path, caplog: pytest.LogCaptureFixture, name: str, kind: str
) -> None:
    newest = checkpoint_of(stopped, 6)
    DAMAGES[kind](newest / name)
    assert name in damage(newest)
    with caplog.at_level(logging.WARNING):
        assert newest_usable_checkpoint(stopped) == checkpoint_of(stopped, 4)
    [record] = caplog.records
    assert record.levelname == "WARNING"
    assert name in record.getMessage()
    assert str(newest) in record.getMessage()
    assert hidden_of(stopped) == [".bad_step_00000006"]
    assert steps_of(stopped) == [4, 2]


@pytest.mark.parametrize("kind", MANIFEST_DAMAGES)
def test_a_damaged_manifest_is_found_and_passed_over(
    stopped: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    newest = checkpoint_of(stopped, 6)
    manifest = newest / "manifest.json"
    before = manifest.read_bytes()
    MANIFEST_DAMAGES[kind](manifest)
    assert not manifest.is_file() or manifest.read_bytes() != before
    assert newest_usable_checkpoint(stopped) == checkpoint_of(stopped, 4)
    if kind != "another sum":
        assert "manifest.json" in caplog.text
    assert hidden_of(stopped) == [".bad_step_00000006"]


def test_every_single_flipped_bit_of_a_manifest_is_found_or_harmless(stopped: Path) -> None:
    manifest = checkpoint_of(stopped, 6) / "manifest.json"
    content, unnoticed = manifest.read_bytes(), []
    for position in range(len(content)):
        manifest.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        if not damage(manifest.parent):
            unnoticed.append(content[position : position + 1])
    assert set(unnoticed) <= {b" "}


def test_two_damaged_ones_are_both_passed_over(stopped: Path, caplog: pytest.LogCaptureFixture) -> None:
    DAMAGES["truncated"](checkpoint_of(stopped, 6) / "optimizer.bin")
    DAMAGES["missing"](checkpoint_of(stopped, 4) / "model.safetensors")
    assert newest_usable_checkpoint(stopped) == checkpoint_of(stopped, 2)
    assert "optimizer.bin has" in caplog.text
    assert "model.safetensors is missing" in caplog.text
    assert hidden_of(stopped) == [".bad_step_00000004", ".bad_step_00000006"]


@pytest.mark.parametrize("name", FILES)
def test_the_run_that_passed_a_damaged_one_over_ends_the_same(reference: Path, stopped: Path, name: str) -> None:
    DAMAGES["bit-flipped"](checkpoint_of(stopped, 6) / name)
    assert run(Program(stopped)) == 0
    assert_same_result(stopped, reference)
    assert trained(stopped) == [5, 6, 7, 8, 9, 10]
    assert hidden_of(stopped) == [".bad_step_00000006"]
    assert steps_of(stopped) == [10, 8]


@pytest.mark.parametrize("name", ["manifest.json", "optimizer.bin"])
@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EACCES])
def test_a_disk_that_fails_for_now_damages_nothing(
    stopped: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: int
) -> None:
    """It is waited for; where it stays away the run ends, and no older checkpoint is gone on from."""
    newest, opened, pauses = checkpoint_of(stopped, 6), Path.open, []
    monkeypatch.setattr("time.sleep", pauses.append)

    def fail(times: int) -> None:
        left = iter(range(times))

        def open_badly(path: Path, *values: Any, **options: Any) -> Any:
            if path == newest / name and next(left, None) is not None:
                raise OSError(code, os.strerror(code), str(path))
            return opened(path, *values, **options)

        monkeypatch.setattr(Path, "open", open_badly)

    fail(3)
    assert newest_usable_checkpoint(stopped) == newest
    assert pauses == [1, 2, 4]
    fail(99)
    with pytest.raises(DiskError, match=f"{name} cannot be read: {os.strerror(code)}: the checkpoint may be whole"):
        newest_usable_checkpoint(stopped)
    assert steps_of(stopped) == [6, 4, 2]
    assert hidden_of(stopped) == []


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(stopped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the run would begin anew."""
    monkeypatch.setattr("time.sleep", lambda _: None)
    listed = os.listdir

    def list_badly(folder: Any) -> list[str]:
        if str(folder).endswith("checkpoints"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(folder))
        return listed(folder)

    monkeypatch.setattr(os, "listdir", list_badly)
    with pytest.raises(DiskError, match="checkpoints cannot be read: Permission denied"):
        newest_usable_checkpoint(stopped)


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_a_disk_that_fails_while_a_checkpoint_is_found_ends_all_processes_in_one_line(
    accelerator: Accelerator, stopped: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)

    def fail(_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "listdir", fail)
    with pytest.raises(DiskError, match=os.strerror(code)):
        checkpoints.find_checkpoint(accelerator, stopped, "auto")


def test_the_same_step_damaged_twice(stopped: Path) -> None:
    for _ in range(2):
        DAMAGES["zero-length"](checkpoint_of(stopped, 6) / "model.safetensors")
        newest_usable_checkpoint(stopped)
        shutil.copytree(checkpoint_of(stopped, 4), checkpoint_of(stopped, 6))
    assert hidden_of(stopped) == [".bad_step_00000006"]


def test_all_damaged_stops_the_run_now_and_at_the_next_start(stopped: Path) -> None:
    for step in (2, 4, 6):
        DAMAGES["truncated"](checkpoint_of(stopped, step) / "model.safetensors")
    with pytest.raises(NoUsableCheckpoint) as caught:
        newest_usable_checkpoint(stopped)
    message = str(caught.value)
    assert str(stopped) in message
    assert "another output_dir" in message
    assert all(f"step_{step:08d}: model.safetensors has" in message for step in (2, 4, 6))
    with pytest.raises(NoUsableCheckpoint, match=r"every checkpoint is damaged .*step_00000002.*another output_dir"):
        newest_usable_checkpoint(stopped)
    assert run(Program(stopped)) == EXIT_NO_CHECKPOINT
    assert not (stopped / "trained.txt").exists()


# -- what else lies in the folder --------------------------------------------------------------------------------------


def test_foreign_names_are_ignored(stopped: Path, reference: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = stopped / "checkpoints"
    for name in ("step_abc", "step_", "step_-1", "step_1e3", "other", "step_00000099.bak", "STEP_00000099"):
        (folder / name).mkdir()
    (folder / "step_00000098").write_text("a file")
    (folder / "step_00000097").symlink_to("step_00000097")
    (folder / "step_00000096").symlink_to(folder)
    (folder / "loop").symlink_to(folder)
    before = sorted(path.name for path in folder.iterdir())
    assert newest_usable_checkpoint(stopped) == checkpoint_of(stopped, 6)
    assert sorted(path.name for path in folder.iterdir()) == before
    assert caplog.text == ""
    assert run(Program(stopped)) == 0
    assert_same_result(stopped, reference)
    left = {path.name for path in folder.iterdir()}
    assert left == (set(before) - {f"step_{step:08d}" for step in (2, 4, 6)}) | {"step_00000008", "step_00000010"}


def test_no_folder_and_an_empty_folder_hold_no_checkpoint(accelerator: Accelerator, tmp_path: Path) -> None:
    for resume in ("auto", "never"):
        assert find_checkpoint(accelerator, tmp_path / "nowhere", resume) is None
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        assert find_checkpoint(accelerator, tmp_path, resume) is None


class Payload:
    """Makes a file when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def renew_manifest(checkpoint: Path) -> None:
    files = [path for path in checkpoint.rglob("*") if path.is_file() and path.name != "manifest.json"]
    sums = {
        path.relative_to(checkpoint).as_posix(): (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in files
    }
    (checkpoint / "manifest.json").write_text(json.dumps({"files": sums}))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("writer", ["pickle", "torch"])
def test_a_pickle_in_the_optimizer_state_never_runs(
    accelerator: Accelerator, stopped: Path, tmp_path: Path, writer: str
) -> None:
    canary, checkpoint = tmp_path / "canary", checkpoint_of(stopped, 6)
    content = {"state": Payload(canary), "param_groups": []}
    if writer == "pickle":
        (checkpoint / "optimizer.bin").write_bytes(pickle.dumps(content))
    else:
        torch.save(content, checkpoint / "optimizer.bin")
    assert "optimizer.bin" in damage(checkpoint)
    renew_manifest(checkpoint)
    assert damage(checkpoint) == ""
    prepared(accelerator)
    with pytest.raises(UsageError, match=r"resume: .*step_00000006.*: expected a checkpoint of this model"):
        load_checkpoint(accelerator, checkpoint)
    assert not canary.exists()


@pytest.mark.parametrize(
    "name", ["random_states_0.pkl", "custom_checkpoint_0.pkl", "pytorch_model.bin", "scheduler.bin", "sampler.bin"]
)
def test_files_that_the_manifest_does_not_name_are_not_read(
    accelerator: Accelerator, stopped: Path, tmp_path: Path, name: str
) -> None:
    canary, checkpoint = tmp_path / "canary", checkpoint_of(stopped, 6)
    torch.save({"step": 3, "payload": Payload(canary)}, checkpoint / name)
    assert damage(checkpoint) == ""
    prepared(accelerator)
    assert load_checkpoint(accelerator, checkpoint)[0] == 6
    assert not canary.exists()
    assert accelerator.step == 0


def test_a_random_state_that_could_be_loaded_changes_nothing(accelerator: Accelerator, stopped: Path) -> None:
    accelerator.step = 3
    model, _ = prepared(accelerator)
    accelerator.save_state(str(stopped / "other"))
    shutil.copy(stopped / "other" / "random_states_0.pkl", checkpoint_of(stopped, 6))
    accelerator.step = 0
    torch.manual_seed(5)
    before = torch.get_rng_state()
    load_checkpoint(accelerator, checkpoint_of(stopped, 6))
    assert accelerator.step == 0
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training


def test_a_manifest_cannot_point_outside(accelerator: Accelerator, stopped: Path, tmp_path: Path) -> None:
    checkpoint, outside = checkpoint_of(stopped, 6), tmp_path / "outside.txt"
    outside.write_text("x")
    renew_manifest(checkpoint)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    sums = (1, hashlib.sha256(b"x").hexdigest())
    manifest["files"].update({f"../../../{outside.name}": sums, str(outside): sums})
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    prepared(accelerator)
    before = sorted(str(path) for path in tmp_path.rglob("*"))
    assert load_checkpoint(accelerator, checkpoint)[0] == 6
    assert sorted(str(path) for path in tmp_path.rglob("*")) == before
    assert not outside.is_symlink()


# -- a full disk -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, 300, 1500, 3000])
def test_a_full_disk_leaves_the_checkpoint_before(reference: Path, tmp_path: Path, room: int) -> None:
    """The limit hits the weights, the optimizer state or the manifest; SIGXFSZ is ignored by Python itself."""
    run_dir = tmp_path / "run"
    assert run(Program(run_dir, keep=1, full_disk_at=4, room=room)) == 1
    assert newest_usable_checkpoint(run_dir) == checkpoint_of(run_dir, 2)
    assert run(Program(run_dir)) == 0
    assert_same_result(run_dir, reference)
    assert trained(run_dir) == [1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9, 10]
    assert hidden_of(run_dir) == []


def test_the_limits_above_hit_different_files(reference: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in checkpoint_of(reference, 4).iterdir()}
    assert sizes["manifest.json"] > 300
    assert 300 < sizes["model.safetensors"] < 1500
    assert sizes["optimizer.bin"] > 3000


# -- which one to go on from -------------------------------------------------------------------------------------------


def test_auto_takes_the_newest(accelerator: Accelerator, stopped: Path) -> None:
    assert find_checkpoint(accelerator, stopped, "auto") == checkpoint_of(stopped, 6)


def test_going_back_to_an_earlier_one_drops_the_later_ones_at_the_next_save(reference: Path, tmp_path: Path) -> None:
    """The same command then goes on from there, instead of going back again, also once that one is pruned."""
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    (run_dir / "result.json").unlink()
    command = Program(run_dir, resume=str(checkpoint_of(run_dir, 4)))
    DAMAGES["truncated"](checkpoint_of(run_dir, 10) / "model.safetensors")
    DAMAGES["truncated"](checkpoint_of(run_dir, 8) / "model.safetensors")
    assert run(dataclasses.replace(command, fault="before_save:8")) == -signal.SIGKILL
    assert steps_of(run_dir) == [6, 4]
    assert not damage(checkpoint_of(run_dir, 6))
    assert run(command) == 0
    assert_same_result(run_dir, reference)
    assert steps_of(run_dir) == [10, 8]
    assert trained(run_dir)[10:] == [5, 6, 7, 8, 7, 8, 9, 10]
    assert not checkpoint_of(run_dir, 4).exists()
    assert has_gone_on_from(run_dir, command.resume)
    assert not has_gone_on_from(run_dir, str(checkpoint_of(run_dir, 2)))
    assert run(command) == 0
    assert trained(run_dir)[18:] == []
    assert run(dataclasses.replace(command, resume=str(checkpoint_of(run_dir, 8)))) == 0
    assert trained(run_dir)[18:] == [9, 10]


def test_one_of_another_run_starts_this_run_and_is_then_left_alone(
    accelerator: Accelerator, reference: Path, stopped: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "new"
    resume = str(checkpoint_of(stopped, 4))
    assert find_checkpoint(accelerator, run_dir, resume) == Path(resume)
    command = Program(run_dir, resume=resume)
    assert run(dataclasses.replace(command, fault="after_rename:8")) == -signal.SIGKILL
    assert trained(run_dir) == [5, 6, 7, 8]
    assert run(command) == 0
    assert trained(run_dir) == [5, 6, 7, 8, 9, 10]
    assert_same_result(run_dir, reference)
    assert steps_of(stopped) == [6, 4, 2]
    assert find_checkpoint(accelerator, run_dir, resume) == checkpoint_of(run_dir, 10)
    assert f"not from {resume}" in caplog.text


def test_a_damaged_one_that_was_asked_for_is_refused(accelerator: Accelerator, stopped: Path, tmp_path: Path) -> None:
    checkpoint = checkpoint_of(stopped, 4)
    DAMAGES["truncated"](checkpoint / "model.safetensors")
    for run_dir in (stopped, tmp_path / "new"):
        with pytest.raises(UsageError, match=r"resume: .*step_00000004': expected .* whole: model.safetensors has"):
            find_checkpoint(accelerator, run_dir, str(checkpoint))
    assert checkpoint.is_dir()
    assert run(Program(stopped, resume=str(checkpoint))) == EXIT_USAGE


def test_a_phase_begins_with_the_newest_checkpoint_of_the_one_before(
    accelerator: Accelerator, stopped: Path, tmp_path: Path
) -> None:
    model, _ = prepared(accelerator)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert resume_run(accelerator, tmp_path / "none", "auto", None) == (0, {})
    assert all(torch.equal(one, other) for one, other in zip(before, model.parameters(), strict=True))
    assert resume_run(accelerator, tmp_path / "new", "auto", stopped) == (0, {})
    saved = load_file(checkpoint_of(stopped, 6) / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    save_checkpoint(accelerator, tmp_path / "new", 3, {"losses": []}, 2)
    assert resume_run(accelerator, tmp_path / "new", "auto", stopped) == (3, {"losses": []})
    with pytest.raises(UsageError, match="expected a run folder with checkpoints, for init_optimizer"):
        resume_run(accelerator, tmp_path / "newer", "auto", tmp_path / "nowhere")
    sharded: Any = SimpleNamespace(is_main_process=True, num_processes=1, distributed_type=DistributedType.FSDP)
    with pytest.raises(UsageError, match="init_optimizer: True: expected False under FSDP"):
        resume_run(sharded, tmp_path / "newer", "auto", stopped)
    assert not (tmp_path / "newer").exists()


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_sharded_checkpoint_is_taken_from_this_run_only(stopped: Path, tmp_path: Path, engine: str) -> None:
    resume = str(checkpoint_of(stopped, 4))
    with pytest.raises(UsageError, match="expected one of this run's own, a sharded checkpoint can run code"):
        checkpoints._find(tmp_path / "new", resume, engine)
    assert checkpoints._find(stopped, resume, engine) == Path(resume)
    relative = os.path.relpath(resume)
    assert checkpoints._find(stopped, relative, engine) == Path(relative)


# -- loading -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "kind"), [(13, "muon"), (12, "adamw")])
def test_a_checkpoint_of_another_model_or_optimizer_is_one_message(
    accelerator: Accelerator, stopped: Path, width: int, kind: str
) -> None:
    prepared(accelerator, width=width, kind=kind)
    with pytest.raises(UsageError) as caught:
        load_checkpoint(accelerator, checkpoint_of(stopped, 6))
    message = str(caught.value)
    assert message.startswith(f"resume: {str(checkpoint_of(stopped, 6))!r}: expected a checkpoint of this model and")
    assert "\n" not in message
    assert len(message) < 600
    assert "/checkpoint_" not in message.replace(str(stopped), "")


@pytest.mark.parametrize("engine", ["FSDP", "DEEPSPEED"])
def test_a_checkpoint_of_another_engine_is_refused(accelerator: Accelerator, stopped: Path, engine: str) -> None:
    checkpoint = checkpoint_of(stopped, 6)
    about = json.loads((checkpoint / "state.json").read_text())
    (checkpoint / "state.json").write_text(json.dumps({**about, "engine": engine}))
    renew_manifest(checkpoint)
    prepared(accelerator)
    with pytest.raises(UsageError, match=f"step_00000006': expected a checkpoint of NO, got {engine}"):
        load_checkpoint(accelerator, checkpoint)


def test_the_learning_rates_and_settings_are_the_configurations(accelerator: Accelerator, stopped: Path) -> None:
    _, optimizer = prepared(accelerator, lr=0.5)
    load_checkpoint(accelerator, checkpoint_of(stopped, 6))
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.5]
    assert len(optimizer.state) == 4
    set_learning_rates(optimizer, 0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.05])


def test_loading_gives_back_weights_and_optimizer_state(accelerator: Accelerator, tmp_path: Path) -> None:
    model, optimizer = prepared(accelerator)
    for step in range(3):
        update(accelerator, model, optimizer, step)
    save_checkpoint(accelerator, tmp_path, 3, {"a": [1, "x", None]}, 1)
    update(accelerator, model, optimizer, 3)
    expected = weights_sum(model)
    assert load_checkpoint(accelerator, checkpoint_of(tmp_path, 3)) == (3, {"a": [1, "x", None]})
    assert weights_sum(model) != expected
    update(accelerator, model, optimizer, 3)
    assert weights_sum(model) == expected


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.table.weight


def test_tied_weights_stay_tied(accelerator: Accelerator, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Tied()
    model, _ = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    save_checkpoint(accelerator, tmp_path, 1, {}, 1)
    expected = model.table.weight.detach().clone()
    with torch.no_grad():
        model.table.weight.zero_()
    load_checkpoint(accelerator, checkpoint_of(tmp_path, 1))
    assert torch.equal(model.head.weight, expected)
    assert model.head.weight is model.table.weight


# -- two processes -----------------------------------------------------------------------------------------------------

DISTRIBUTED = """
import os, sys, torch
sys.path.insert(0, {root!r})
from pathlib import Path
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from shared.run.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from shared.command_line import exit_codes
from tests.shared.run.test_checkpoints import prepared, update

run_dir, engine, goal = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
plugin = None
if engine != "DDP":
    # accelerate refuses FSDP without a GPU by this field alone.
    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="no_wrap", state_dict_type=engine)
accelerator = Accelerator(cpu=engine == "DDP", fsdp_plugin=plugin)
assert accelerator.distributed_type.value == ("FSDP" if plugin else accelerator.distributed_type.value)
model, optimizer = prepared(accelerator)
with exit_codes():
    checkpoint = find_checkpoint(accelerator, run_dir, "auto")
    step = load_checkpoint(accelerator, checkpoint)[0] if checkpoint else 0
    while step < goal:
        update(accelerator, model, optimizer, step)
        step += 1
    save_checkpoint(accelerator, run_dir, step, {{}}, 2)
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
if accelerator.is_main_process:
    print("weights", accelerator.num_processes, [p.double().sum().item() for p in whole], flush=True)
accelerator.end_training()
os._exit(0)  # torch's threads were seen to abort a process that ended after all was done (gloo, FSDP2)
"""


def launch(folder: Path, run_dir: Path, engine: str, goal: int, processes: int) -> list[str]:
    program = folder / "distributed.py"
    program.write_text(DISTRIBUTED.format(root=str(ROOT)))
    command = [sys.executable, "-m", "torch.distributed.run", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    command = [*command, f"--nproc-per-node={processes}"] if processes > 1 else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true" if engine == "DDP" else "false"}
    done = subprocess.run(
        [*command, str(program), str(run_dir), engine, str(goal)],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("weights")]


@pytest.mark.slow
def test_ddp_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    for goal, processes in ((2, 2), (4, 1), (6, 2)):
        assert launch(tmp_path, run_dir, "DDP", goal, processes)[0].startswith(f"weights {processes} ")
    assert steps_of(run_dir) == [6, 4]
    about = json.loads((checkpoint_of(run_dir, 6) / "state.json").read_text())
    assert (about["processes"], about["engine"]) == (2, "MULTI_CPU")
    assert sorted(path.name for path in checkpoint_of(run_dir, 6).iterdir()) == sorted([*FILES, "manifest.json"])
    whole = launch(tmp_path, tmp_path / "whole", "DDP", 6, 2)
    assert whole == launch(tmp_path, run_dir, "DDP", 6, 2)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["SHARDED_STATE_DICT", "FULL_STATE_DICT"])
def test_fsdp2_goes_on_exactly(tmp_path: Path, kind: str) -> None:
    run_dir = tmp_path / "run"
    launch(tmp_path, run_dir, kind, 3, 2)
    resumed = launch(tmp_path, run_dir, kind, 6, 2)
    assert resumed
    assert resumed == launch(tmp_path, tmp_path / "whole", kind, 6, 2)
