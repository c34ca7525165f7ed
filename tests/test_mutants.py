"""What the checkpointer promises is told from five ways to break it: each is made in a copy, and a check must fail.

A mutant is the source of shared/run/checkpoints.py with some lines replaced, as another module. Nothing is killed: the
fault points raise, after which nothing more of a save happens, as after SIGKILL.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from shared.command_line import NoUsableCheckpoint
from shared.optim.optimizers import set_learning_rates
from shared.run import checkpoints

POINTS = ("before_save", "after_state", "before_manifest", "before_rename", "after_rename", "mid_prune")
RATES = (1.0, 0.9, 0.5, 0.2)


class Killed(BaseException):
    """Of a fault point, in the place of SIGKILL."""


@contextlib.contextmanager
def killed_at(module: ModuleType, point: str) -> Iterator[None]:
    """A save in the block ends at this point, and the block with it."""

    def fault(at: str, step: int) -> None:
        if at == point:
            raise Killed

    before, module._fault = module._fault, fault  # type: ignore[attr-defined]
    try:
        with contextlib.suppress(Killed):
            yield
    finally:
        module._fault = before  # type: ignore[attr-defined]


class Training:
    """A model of 20 weights that trains by AdamW at a falling rate; what an update sees depends on its number alone."""

    def __init__(self) -> None:
        self.accelerator = Accelerator(cpu=True)
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.step = 0

    def update(self) -> None:
        set_learning_rates(self.optimizer, RATES[self.step])
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(self.step))
        self.accelerator.backward((self.model(x) - x.flip(1)).square().mean())
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1

    def save(self, module: ModuleType, folder: Path, keep: int = 2) -> None:
        module.save_checkpoint(self.accelerator, folder, self.step, {}, keep)

    def resume(self, module: ModuleType, folder: Path) -> None:
        self.step, _ = module.resume_run(self.accelerator, folder, "auto", None)

    def to_end(self) -> list[float]:
        """The weights after all updates."""
        while self.step < len(RATES):
            self.update()
        return self.model.weight.flatten().tolist()


def check_that_names_come_after_content(module: ModuleType, folder: Path) -> None:
    """All bytes of a checkpoint are flushed when it gets its name, and the name is flushed after that."""
    flushed, fsync, fault = set[int](), os.fsync, module._fault

    def recorded(descriptor: int) -> None:
        flushed.add(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    def look(point: str, step: int) -> None:
        if point == "before_rename":
            [aside] = (folder / "checkpoints").iterdir()
            missing = [path.name for path in (aside, *aside.iterdir()) if path.stat().st_ino not in flushed]
            assert not missing, f"not flushed: {missing}"
            flushed.clear()
        elif point == "after_rename":
            assert (folder / "checkpoints").stat().st_ino in flushed, "the new name is not flushed"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", recorded)
        patch.setattr(module, "_fault", look)
        Training().save(module, folder)
    assert module._fault is fault


def check_that_a_name_means_whole(module: ModuleType, folder: Path) -> None:
    """Whatever point a save is killed at, each folder called step_... is a whole checkpoint."""
    for point in POINTS:
        training = Training()
        training.save(module, folder / point, keep=1)
        training.update()
        with killed_at(module, point):
            training.save(module, folder / point, keep=1)
        problems = [checkpoints.damage(found) for found in module.list_checkpoints(folder / point)]
        assert not any(problems), (point, problems)


def check_that_one_is_always_there(module: ModuleType, folder: Path) -> None:
    """After the first save there is a checkpoint to go on from, whatever point the next one is killed at."""
    for point in POINTS:
        training = Training()
        training.save(module, folder / point, keep=1)
        training.update()
        with killed_at(module, point):
            training.save(module, folder / point, keep=1)
        assert checkpoints.newest_usable_checkpoint(folder / point), point


def check_that_damage_is_found(module: ModuleType, folder: Path) -> None:
    """A bit that flipped in the weights is found by the manifest, and the checkpoint before is gone on from."""
    training = Training()
    for _ in range(2):
        training.update()
        training.save(module, folder)
    weights = folder / "checkpoints" / "step_00000002" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    training.resume(module, folder)
    assert training.step == 1


def check_that_going_on_is_exact(module: ModuleType, folder: Path) -> None:
    """A run that was stopped after its second update ends with the weights of one that was not."""
    first, whole = Training(), Training().to_end()
    for _ in range(2):
        first.update()
    first.save(module, folder)
    second = Training()
    second.resume(module, folder)
    assert second.step == 2
    assert second.to_end() == whole


def check_that_rates_are_the_configuration_s(module: ModuleType, folder: Path) -> None:
    """The saved rate, which a schedule has changed, replaces none of those that the optimizer was built with."""
    first = Training()
    first.update()
    first.update()
    first.save(module, folder)
    second = Training()
    second.resume(module, folder)
    assert [group["lr"] for group in second.optimizer.param_groups] == [0.1]


Check = Callable[[ModuleType, Path], None]
CHECKS: list[Check] = [
    check_that_names_come_after_content,
    check_that_a_name_means_whole,
    check_that_one_is_always_there,
    check_that_damage_is_found,
    check_that_going_on_is_exact,
    check_that_rates_are_the_configuration_s,
]
FLUSH_FILES = "            _flush(path)\n            if path.is_file():"
FLUSH_NAME = "        aside.rename(target)\n        _flush(folder)\n"
ASIDE = 'folder / f".tmp_step_{step:08d}"'
RENAME = """\
        if target.exists():
            target.rename(folder / f".trash_{target.name}")
        aside.rename(target)
"""
MANIFEST = (
    '        (aside / MANIFEST).write_text(json.dumps({"files": files}, indent=1))\n        _flush(aside / MANIFEST)\n'
)
LOAD = "            accelerator.load_state(view)\n"
WITHOUT_OPTIMIZER = (
    "            late, accelerator._optimizers = accelerator._optimizers, []\n"
    f"{LOAD}"
    "            accelerator._optimizers = late\n"
)
KEEP_RATES = "        group.update(built)\n"
# What is broken -> lines and what stands in their place, and the check that must fail.
MUTANTS: dict[str, tuple[dict[str, str], Check]] = {
    "skip the flush of the files": (
        {FLUSH_FILES: FLUSH_FILES.partition("\n")[2]},
        check_that_names_come_after_content,
    ),
    "skip the flush of the name": (
        {FLUSH_NAME: FLUSH_NAME.partition("        _flush")[0]},
        check_that_names_come_after_content,
    ),
    "skip the rename": ({ASIDE: 'folder / f"step_{step:08d}"', RENAME: ""}, check_that_a_name_means_whole),
    "drop the manifest": ({MANIFEST: ""}, check_that_one_is_always_there),
    "drop the look at the manifest": (
        {"def _damage(checkpoint: Path) -> str:\n": 'def _damage(checkpoint: Path) -> str:\n    return ""\n'},
        check_that_damage_is_found,
    ),
    "delete the older one first": (
        {
            '    accelerator.wait_for_everyone()\n    _fault("before_save", step)\n': (
                "    accelerator.wait_for_everyone()\n"
                "    if accelerator.is_main_process:\n"
                "        _prune(run_dir, step, keep - 1)\n"
                '    _fault("before_save", step)\n'
            )
        },
        check_that_one_is_always_there,
    ),
    "restore the optimizer's state too late": ({LOAD: WITHOUT_OPTIMIZER}, check_that_going_on_is_exact),
    "restore the saved rates": ({KEEP_RATES: "        pass\n"}, check_that_rates_are_the_configuration_s),
    "forget the position": (
        {'return about["step"], about["state"]': 'return 0, about["state"]'},
        check_that_going_on_is_exact,
    ),
}


def mutant(replaced: dict[str, str]) -> ModuleType:
    """The checkpointer with lines replaced, as a module of its own."""
    source = Path(str(checkpoints.__file__)).read_text(encoding="utf-8")
    for lines, others in replaced.items():
        assert source.count(lines) == 1, f"the checkpointer has changed, mend this mutant: {lines}"
        source = source.replace(lines, others)
    module = ModuleType("mutant")
    exec(compile(source, "mutant.py", "exec"), module.__dict__)
    return module


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_checkpointer_keeps_its_promises(check: Any, tmp_path: Path) -> None:
    check(checkpoints, tmp_path / "run")


@pytest.mark.parametrize("name", MUTANTS)
def test_a_broken_checkpointer_is_found_out(name: str, tmp_path: Path) -> None:
    replaced, check = MUTANTS[name]
    with pytest.raises((AssertionError, NoUsableCheckpoint)):
        check(mutant(replaced), tmp_path / "run")
