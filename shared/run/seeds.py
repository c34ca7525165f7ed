"""The same run with several seeds: what differs between them is chance, and says how far one result may be trusted."""

import dataclasses
import json
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np

from shared.command_line import expect
from shared.fields import RunControl
from shared.run.folder import write_json

Control = TypeVar("Control", bound=RunControl)


def each_seed(control: Control, number: int) -> Iterator[Control]:
    """The configuration of each of `number` runs: seeds from `seed` on, in folders of their own in `output_dir`.

    A single run stays in `output_dir`, and a dry run is one.

    Raises:
        UsageError: several runs would go on from one checkpoint, or be pushed to one repository.
    """
    if number == 1 or control.dry_run:
        yield control
        return
    expect(control.resume in ("auto", "never"), "resume", control.resume, "auto or never with several seeds")
    expect(not control.push_to_hub, "push_to_hub", control.push_to_hub, '"" with several seeds')
    for seed in range(control.seed, control.seed + number):
        folder = str(Path(control.output_dir) / f"seed_{seed}")
        yield dataclasses.replace(control, seed=seed, output_dir=folder)


def report_seeds(control: RunControl, number: int) -> None:
    """Say mean and standard error over the runs of `each_seed` of what they measured, and keep it in seeds.json.

    Nothing for a single run. The first process writes.
    """
    if number == 1 or control.dry_run or int(os.environ.get("RANK", "0")):
        return
    records = [
        json.loads((Path(run.output_dir) / "run.json").read_text(encoding="utf-8"))["evaluation"]
        for run in each_seed(control, number)
    ]
    summary = {
        name: {
            "mean": float(np.mean(values := [record[name] for record in records])),
            "standard_error": float(np.std(values, ddof=1) / math.sqrt(number)),
            "values": values,
        }
        for name in records[0]
    }
    write_json(Path(control.output_dir) / "seeds.json", summary)
    lines = [f"{name} {row['mean']:.4f} +- {row['standard_error']:.4f}" for name, row in summary.items()]
    sys.stdout.write("\n".join([f"mean and standard error over {number} seeds:", *lines, ""]))
