"""The final model as the files that `from_pretrained` and `pipeline` read."""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor


def export_model(accelerator: Any, model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write weights, configuration and tokenizer into the run folder. Every process calls this.

    Files are written aside first and then moved one by one, the weights last. So every file is whole at any time, and
    weights are only there beside the configuration and tokenizer that they need. A run's exports differ in the weights
    alone, so one that is killed half way leaves the old weights or the new ones, and both load (a model above 50 GB
    has more than one weight file: killed between those, they are of two steps).

    Args:
        accelerator: knows how to gather sharded weights.
        model: prepared; its wrapper's prefix does not reach the file.
        tokenizer: saved beside the weights.
        run_dir: the run folder.
    """
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        aside = new_folder(run_dir / ".export")
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        for tied in bare.all_tied_weights_keys:  # a gathered copy of its own, which the library would save twice
            weights.pop(tied, None)
        with without_bar():
            bare.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        move_files(aside, run_dir)
    accelerator.wait_for_everyone()


def whole_weights(accelerator: Any, model: Any) -> dict[str, Tensor]:
    """The weights of a prepared model under the names that they have in a bare one. Every process calls this.

    Args:
        accelerator: knows how to gather sharded weights.
        model: prepared.

    Returns:
        Name -> tensor, which need be whole on the main process alone; ZeRO-3 gives the others none.
    """
    gathered = accelerator.get_state_dict(model) or {}
    return {name.replace("_orig_mod.", ""): tensor for name, tensor in gathered.items()}  # torch.compile's


def new_like(model_class: Any, trained: Any) -> Any:
    """A model of diffusers with new weights and the configuration of `trained`, which may be sharded.

    Args:
        model_class: of diffusers; an engine may have made another one of `type(trained)`.
        trained: not prepared, or unwrapped.
    """
    # With the list of defaults from_config forgets what was registered later; the name can be a path of this machine.
    left_out = ("_use_default_values", "_name_or_path")
    return model_class.from_config({name: value for name, value in trained.config.items() if name not in left_out})


def export_module(module: Any, run_dir: Path) -> None:
    """Write a model of diffusers, not prepared, into the run folder in the same way. The main process calls this."""
    aside = new_folder(run_dir / ".export")
    module.save_pretrained(aside)
    move_files(aside, run_dir)


def export_pipeline(pipeline: Any, run_dir: Path) -> None:
    """Write a pipeline of diffusers, with a folder for each of its parts, in the same way. The main process calls this.

    Killed between the weights of two parts, an export leaves parts of two steps.
    """
    aside = new_folder(run_dir / ".export")
    with without_bar():
        pipeline.save_pretrained(aside)
    move_files(aside, run_dir)


def new_folder(folder: Path) -> Path:
    """The folder, empty, whatever it held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


@contextlib.contextmanager
def without_bar() -> Iterator[None]:
    """No bar of transformers, which draws one over the run's own for a millisecond's work."""
    from transformers.utils import logging

    is_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if is_shown:
            logging.enable_progress_bar()


def move_files(aside: Path, run_dir: Path) -> None:
    """Move the files of an export into the run folder, the weights last, and remove `aside`."""
    files = [path for path in aside.rglob("*") if path.is_file()]
    usual = aside / ".usual"
    usual.touch()
    readable = usual.stat().st_mode  # weights come out for their owner alone
    for path in sorted(files, key=lambda path: (path.suffix == ".safetensors", path)):
        path.chmod(readable)
        target = run_dir / path.relative_to(aside)
        target.parent.mkdir(exist_ok=True)
        path.replace(target)
    shutil.rmtree(aside)
