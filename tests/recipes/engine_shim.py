"""Run a recipe's `main` as `accelerate launch` would, after what a test asks for in the environment.

    accelerate launch ... tests/recipes/engine_shim.py recipes/gpt/pretrain.py --flags of the recipe

FSDP_ON_CPU=1   accelerate takes two gloo processes for GPUs, which is all that keeps FSDP2 from running on CPUs
POISON=2:1      the loss of update 2 is NaN on rank 1
SIGTERM_AT=2    during update 2 the launcher gets the SIGTERM that a scheduler sends; 2:1 = only rank 1 gets it
"""

import importlib.util
import os
import signal
import sys


def load_recipe(path):
    spec = importlib.util.spec_from_file_location("recipe", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipe"] = module
    spec.loader.exec_module(module)
    return module


def take_cpus_for_gpus():
    from accelerate.state import DistributedType, PartialState

    PartialState(cpu=True)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def event(name):
    """(step, rank) of VARIABLE=step:rank; rank -1 where none is given, step -1 where the variable is not set."""
    step, _, rank = os.environ.get(name, "-1").partition(":")
    return int(step), int(rank or -1)


def disturb(recipe):
    """Let the update at a given step be poisoned, or meet a signal; `train_update` and the loss are wrapped."""
    train_update, loss_sum = recipe.train_update, recipe.causal_lm_loss_sum
    (poison_step, poison_rank), (signal_step, signal_rank) = event("POISON"), event("SIGTERM_AT")
    own_rank, is_poisoned = int(os.environ.get("RANK", "0")), False

    def disturbed_loss_sum(*args):
        return loss_sum(*args) * (float("nan") if is_poisoned else 1.0)

    def disturbed_update(cfg, accelerator, model, optimizer, batches, step):
        nonlocal is_poisoned
        is_poisoned = step == poison_step and poison_rank in (-1, own_rank)
        if step == signal_step and (own_rank == signal_rank if signal_rank >= 0 else own_rank == 0):
            os.kill(os.getpid() if signal_rank >= 0 else os.getppid(), signal.SIGTERM)
        result = train_update(cfg, accelerator, model, optimizer, batches, step)
        is_poisoned = False
        return result

    recipe.train_update, recipe.causal_lm_loss_sum = disturbed_update, disturbed_loss_sum


if __name__ == "__main__":
    sys.argv = sys.argv[1:]
    recipe = load_recipe(sys.argv[0])
    disturb(recipe)
    with recipe.cli.exit_codes():
        cfg = recipe.cli.parse(recipe.Config)
        if os.environ.get("FSDP_ON_CPU"):
            take_cpus_for_gpus()
        recipe.main(cfg)
