"""A loop like those of the recipes, with nothing to train, and what it must do, for test_training_run.py.

    accelerate launch ... tests/shared/run/loops.py FOLDER SEED NUMBER

drives NUMBER random cases through `Run` and writes what each process did to FOLDER/RANK.json.
"""

import json
import math
import os
import random
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

import torch

from shared.command_line import RunStopped, TooManyNonFiniteUpdates
from shared.fields import RunControl
from shared.run.training_run import Run
from shared.runtime.signals import until_stopped

Event = tuple[Any, ...]
BATCHES = 4  # of an evaluation


@dataclass(frozen=True)
class Case:
    """Cadences of a run, and what happens in its updates, which are numbered from 0.

    Attributes:
        signals: updates in which SIGTERM arrives, at each start of the run that gets so far.
        eval_signals: updates in whose evaluation it arrives, at the first start that gets so far, before a batch.
        bad: updates whose gradient is not finite.
    """

    max_steps: int
    log_every: int
    eval_every: int
    save_every: int
    push_every: int
    max_bad_updates: int
    signals: frozenset[int]
    bad: frozenset[int]
    eval_signals: frozenset[int] = frozenset()


def random_case(seed: int) -> Case:
    """A case in which about a third of the runs stop, and some end early."""
    draw = random.Random(seed)
    max_steps = draw.randint(1, 9)
    cadences = [draw.randint(1, 4), *(draw.randint(0, 4) for _ in range(3))]
    signals = {step for step in range(max_steps) if draw.random() < 0.15}
    bad = {step for step in range(max_steps) if draw.random() < 0.3}
    bad_updates = draw.randint(1, 3)
    in_evaluation = {step for step in range(max_steps) if draw.random() < 0.3}
    return Case(max_steps, *cadences, bad_updates, frozenset(signals), frozenset(bad), frozenset(in_evaluation))


def drive(case: Case, folder: Path, accelerator: Any, signalled_rank: int) -> list[Event]:
    """One start of the run: what was done, in order, and how it ended."""
    events: list[Event] = []
    control = RunControl(
        output_dir=str(folder),
        global_batch_size=4,
        max_grad_norm=1.0,
        max_steps=case.max_steps,
        log_every=case.log_every,
        eval_every=case.eval_every,
        save_every=case.save_every,
        push_every=case.push_every,
        max_bad_updates=case.max_bad_updates,
    )
    model = torch.nn.Linear(1, 1)
    model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=1.0))
    run = Run(control, accelerator)
    run.record(Path(__file__), {"data": "none", "data_fingerprint": [], "init": "scratch"})
    events.append(("start", run.step, run.state.get("number", -1)))
    due, metrics = run.owed
    try:
        for step, update in run.updates(iter(range(run.step, case.max_steps)), 1.0):
            if update is not None:
                assert update == step
                if step in case.signals and accelerator.process_index == signalled_rank:
                    os.kill(os.getpid(), signal.SIGTERM)
                grad_norm = torch.tensor(math.nan if step in case.bad else 1.0)
                due = run.count_update(grad_norm, samples=4, units=8)
                metrics = {"train/loss": float(step), **run.rates("tokens")} if due.log else {}
                events.append(("log", run.step, metrics.get("train/skipped_updates", -1)))
            if due.evaluate:
                with run.evaluation(metrics):
                    for batch in until_stopped(accelerator, range(BATCHES)):
                        mark = folder / f"signalled_{step}"
                        is_here = step in case.eval_signals and batch == 1 and not mark.exists()
                        if is_here and accelerator.process_index == signalled_rank:
                            mark.touch()
                            os.kill(os.getpid(), signal.SIGTERM)
                    metrics |= {"eval/loss": float(step)}
                    events.append(("evaluate", run.step))
            with run.pause():
                run.write(metrics)
                events.append(("write", run.step, bool(metrics) and due.evaluate <= ("eval/loss" in metrics)))
                if due.save:
                    run.save({"number": step})
                    events.append(("save", run.step))
                if due.push:
                    run.push()
                    events.append(("push", run.step))
        events.append(("finished", run.step))
    except (RunStopped, TooManyNonFiniteUpdates) as error:
        events.append((type(error).__name__, run.step))
    accelerator.free_memory()
    return events


def expected(case: Case, processes: int = 1) -> list[list[Event]]:
    """The same of every start of a run, to its end, said plainly.

    Updates without a finite gradient, and where there are several processes signals, are known when the next update is
    counted; a checkpoint and the last update have the former at once. A signal that is there when an evaluation begins,
    or comes in it, ends it, on all processes; then the run is saved and leaves, and evaluates first when it goes on.
    """
    starts, saved, owed = [], (0, 0, 0, -1), 0  # step, skipped, in a row, number
    fired: set[int] = set()
    while not starts or starts[-1][-1][0] == "RunStopped":
        step, skipped, in_a_row, number = saved
        events: list[Event] = [("start", step, number)]
        end, signalled = "finished", False
        while (step < case.max_steps or owed) and end == "finished":
            if not owed:
                is_stopping, signalled = signalled, signalled or step in case.signals
                if processes == 1:
                    is_stopping = signalled
                is_bad, too_many = step in case.bad, in_a_row >= case.max_bad_updates
                step, skipped, in_a_row = step + 1, skipped + is_bad, in_a_row + 1 if is_bad else 0
                if step == case.max_steps:
                    too_many = in_a_row >= case.max_bad_updates
                is_last = step == case.max_steps or too_many
                logs = is_last or step % case.log_every == 0
                evaluates = step == case.max_steps or (case.eval_every > 0 and step % case.eval_every == 0)
                saves = is_last or is_stopping or (case.save_every > 0 and step % case.save_every == 0)
                events.append(("log", step, skipped if logs else -1))
            else:
                is_stopping, too_many, evaluates, saves = False, in_a_row >= case.max_bad_updates, True, False
            comes = evaluates and not signalled and step - 1 in case.eval_signals and step - 1 not in fired
            if comes:
                fired.add(step - 1)
            if evaluates and (signalled or comes):
                events.append(("write", step, False))
                if not owed:
                    saved = (step, skipped, in_a_row, step - 1)
                    events.append(("save", step))
                owed, end = step, "RunStopped"
                continue
            if evaluates:
                events.append(("evaluate", step))
            events.append(("write", step, logs or evaluates))
            if saves:
                saved = (step, skipped, in_a_row, step - 1)
                events.append(("save", step))
            owed = 0
            if case.push_every > 0 and step % case.push_every == 0:
                events.append(("push", step))
            if too_many and in_a_row >= case.max_bad_updates:
                end = "TooManyNonFiniteUpdates"
            elif is_stopping and step < case.max_steps:
                end = "RunStopped"
        starts.append([*events, (end, step)])
    return starts


def main(folder: Path, seed: int, number: int) -> None:
    """Drive cases on all processes; the signal goes to one of them."""
    from shared.runtime.launch import start_accelerator

    accelerator, done = start_accelerator(5, "", "", False), []
    for index in range(seed, seed + number):
        case, starts = random_case(index), []
        while not starts or starts[-1][-1][0] == "RunStopped":
            starts.append(drive(case, folder / str(index), accelerator, index % accelerator.num_processes))
        done.append(starts)
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(done))
    accelerator.end_training()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *map(int, sys.argv[2:]))
