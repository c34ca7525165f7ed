"""What test_launch.py runs by `accelerate launch`: start up, wait for one process, and say what is there.

    accelerate launch ... tests/shared/runtime/launch_program.py [SECONDS [ERROR]]

SECONDS is how long the process that goes first takes, under a time-out of three seconds; ERROR is where it then fails.
"""

import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from shared.command_line import UsageError, exit_codes
from shared.runtime import collectives, launch

seconds, error = float(sys.argv[1]) if len(sys.argv) > 1 else 0.0, sys.argv[2:]
with exit_codes():
    accelerator = launch.start_accelerator(0.05 if seconds else 5, "", "", False)
    with collectives.node_main_first(accelerator) as is_first:
        if is_first:
            time.sleep(seconds)
            if error == ["first"] or (error == ["second"] and accelerator.process_index == 1):
                raise UsageError("data: expected some")
        order = time.time()
    with collectives.raise_together(accelerator):
        if accelerator.is_main_process and error == ["main"]:
            raise UsageError("run_dir: expected another")
    facts = collectives.gather_objects(accelerator, (is_first, order, torch.get_num_threads()))
    accelerator.print(
        f"processes {accelerator.num_processes} engine {accelerator.distributed_type.value} facts {facts}"
    )
    accelerator.end_training()
