"""Run a recipe's `main` as `accelerate launch` would, after what a test asks for in the environment.

    accelerate launch ... tests/recipes/engine_shim.py recipes/gpt/pretrain.py --flags of the recipe

FSDP_ON_CPU=1     accelerate takes the gloo processes for GPUs, which is all that keeps FSDP2 from running on CPUs
POISON=2:1        the logits of update 2 are not numbers on rank 1, in the first micro-batch
SIGTERM_AT=2      in update 2 the launcher gets the SIGTERM that a scheduler sends; 2:1 = rank 1 gets it, and no other.
                  Several processes stop after the update that follows, the fourth
KILL_AT=2:1       in update 2 rank 1 gets SIGKILL, unless the launcher has started it again before
"""

import importlib.util
import os
import signal
import sys
from types import ModuleType
from typing import Any


def load_recipe(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module
    spec.loader.exec_module(module)
    return module


def take_cpus_for_gpus() -> None:
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def event(name: str) -> tuple[int, int]:
    """(step, rank) of VARIABLE=step:rank; -1 for what is not given."""
    step, _, rank = os.environ.get(name, "-1").partition(":")
    return int(step), int(rank or -1)


def disturb(recipe: ModuleType) -> None:
    """Wrap `train_update` and `forward`, so that something happens in a given update of this process, from 0."""
    train_update, forward = recipe.train_update, recipe.forward
    (poison_step, poison_rank), (signal_step, signal_rank) = event("POISON"), event("SIGTERM_AT")
    killed = event("KILL_AT") if os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0" else (-1, -1)
    own_rank = int(os.environ.get("RANK", "0"))
    is_poisoned, updates = False, 0

    def disturbed_forward(*args: Any, **options: Any) -> Any:
        nonlocal is_poisoned
        output = forward(*args, **options)
        if is_poisoned:
            is_poisoned = False
            parts = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else [output]
            next(iter(parts)).mul_(float("nan"))
        return output

    def disturbed_update(*args: Any) -> Any:
        nonlocal is_poisoned, updates
        step, updates = updates, updates + 1
        is_poisoned = step == poison_step and poison_rank in (-1, own_rank)
        if (step, own_rank) == killed:
            os.kill(os.getpid(), signal.SIGKILL)
        if step == signal_step and own_rank == max(signal_rank, 0):
            launcher = int(os.environ.get("LAUNCHER_PID", os.getppid()))  # which fork_client.py knows
            os.kill(launcher if signal_rank < 0 else os.getpid(), signal.SIGTERM)
        return train_update(*args)

    recipe.train_update, recipe.forward = disturbed_update, disturbed_forward  # type: ignore[attr-defined]


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    recipe = load_recipe(sys.argv[0])
    disturb(recipe)
    with recipe.cli.exit_codes():
        cfg = recipe.cli.parse(recipe.Config)
        if os.environ.get("FSDP_ON_CPU"):
            take_cpus_for_gpus()
        recipe.main(cfg)
