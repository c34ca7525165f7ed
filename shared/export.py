"""The final model as the files that `from_pretrained` and `pipeline` read."""

import shutil
from pathlib import Path
from typing import Any


def export_model(accelerator: Any, model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write weights, configuration and tokenizer into the run folder. Every process calls this.

    Files are written aside first and moved one by one, so a reader never meets half a weight file.

    Args:
        accelerator: knows how to gather sharded weights.
        model: prepared; its wrapper's prefix does not reach the file.
        tokenizer: saved beside the weights.
        run_dir: the run folder.
    """
    state_dict = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        aside = run_dir / ".export"
        shutil.rmtree(aside, ignore_errors=True)
        accelerator.unwrap_model(model, keep_torch_compile=False).save_pretrained(aside, state_dict=state_dict)
        tokenizer.save_pretrained(aside)
        for path in aside.iterdir():
            path.replace(run_dir / path.name)
        aside.rmdir()
    accelerator.wait_for_everyone()
