"""A training run but for its training: it starts, resumes, counts, records, stops and reports. The recipe has the loop.

    accelerator, micro_batch_size = start(cfg)               # processes are up, nothing is written
    ...                                                      # data, model, accelerator.prepare
    run = Run(cfg, accelerator)                              # model and optimizer are filled from the checkpoint
    run.record(Path(__file__), facts)                        # from here on there are files
    due, metrics = run.owed                                  # of an evaluation that a signal ended, if there is one
    for step, batches in run.updates(loader, flops_per_sample):
        if batches:                                          # none where that evaluation is all there is to do
            loss, grad_norm = ...                            # one optimizer update
            due = run.count_update(grad_norm, samples=..., units=...)
            metrics = {"train/loss": loss.item(), **run.rates("tokens")} if due.log else {}
        if due.evaluate:
            with run.evaluation(metrics):                    # a signal ends the block between two batches
                metrics |= ...                               # of `until_stopped(accelerator, batches)`
        with run.pause():
            run.write(metrics)                               # before the checkpoint: no step is lost, none comes twice
            if due.save:
                run.save({...})
            if due.push:
                ...                                          # export the model
                run.push()
    run.finish(...)

Every process makes every call. What is `due` is the same on all of them, so a block under it may hold collectives.
"""

import contextlib
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

from shared.command_line import RunStopped, expect
from shared.data import hub_data, left_out
from shared.fields import RunControl, to_yaml
from shared.performance.flops import peak
from shared.performance.profiling import trace_updates
from shared.performance.throughput import Throughput
from shared.run import checkpoints, hub
from shared.run import predictions as predictions_file
from shared.run.folder import changed_fields, check_run_folder, recorded_commits, write_run_record
from shared.run.lock import lock_folder
from shared.run.log import RunLog
from shared.run.report import finish_run
from shared.run.skipped_updates import SkippedUpdates
from shared.run.trackers import start_trackers
from shared.runtime import collectives, launch
from shared.runtime.late_number import LateNumber
from shared.runtime.signals import StopSignals

Update = TypeVar("Update")


@dataclass
class Due:
    """What happens after an update, the same on all processes.

    Attributes:
        log: metrics of the training.
        evaluate: metrics on held-out data.
        save: a checkpoint; also where a signal ended the evaluation.
        push: the exported model goes to the Hub; not where a signal ended the evaluation.
    """

    log: bool
    evaluate: bool
    save: bool
    push: bool


def start(control: RunControl, schedule_fields: Sequence[str] = ()) -> tuple[Any, int]:
    """Check the run folder, start the processes, derive accumulation, and see that the Hub knows who pushes.

    Nothing is written.

    Args:
        control: of the run; all of its fields are compared with those that the folder may hold.
        schedule_fields: names of those that may change when a run goes on, as far as `Run` finds its `rates` unchanged.

    Returns:
        The `Accelerator`, and the samples of one micro-batch on one process.

    Raises:
        UsageError: see `check_run_folder`, `launch` and `hub.check_login`.
    """
    left_out.forget()
    defaults = {field.name: field.default for field in dataclass_fields(control)}
    check_run_folder(Path(control.output_dir), control.resume, asdict(control), defaults, schedule_fields)
    hub_data.pin(recorded_commits(Path(control.output_dir)))
    launch.follow_launcher()
    accelerator = launch.start_accelerator(
        control.timeout_minutes, control.report_to, control.output_dir, control.deterministic
    )
    micro_batch_size = launch.set_accumulation(accelerator, control.global_batch_size, control.per_device_batch_size)
    launch.set_deepspeed_values(accelerator, micro_batch_size, control.max_grad_norm)
    with collectives.raise_together(accelerator):
        hub.check_login(control.push_to_hub if accelerator.is_main_process else "")
    return accelerator, micro_batch_size


class Run:
    """What goes on beside the updates of a run.

    Args:
        control: of the run.
        accelerator: its prepared model and optimizer are filled from the checkpoint to go on from, if there is one.
        previous_phase: run folder whose newest checkpoint a new run begins with, at step 0; None = as they are.
        schedule: fields of `control` that may differ from those that the run was begun with, and the learning rate's
            factor at each update up to max_steps: at the updates that are done it must be what it was.

    Attributes:
        folder: of the run.
        step: updates done so far.
        state: what `save` was given, of the run that goes on; empty at the beginning.
        owed: what is due, and the metrics of the training, after the update at which the run was saved since a signal
            ended its evaluation; nothing and no metrics where that was not so.
        is_over: set it after an evaluation to make that update the last one.

    Raises:
        NoUsableCheckpoint, UsageError: see `checkpoints.resume_run` and `lock_folder`; or the schedule has changed.
    """

    def __init__(
        self,
        control: RunControl,
        accelerator: Any,
        previous_phase: Path | None = None,
        schedule: tuple[Sequence[str], Sequence[float]] = ((), ()),
    ) -> None:
        self._control, self._accelerator, self.folder = control, accelerator, Path(control.output_dir)
        with collectives.raise_together(accelerator):  # before it is looked into, or two could begin at step 0
            self._lock = lock_folder(self.folder) if accelerator.is_main_process else None
        self.step, self.state = checkpoints.resume_run(accelerator, self.folder, control.resume, previous_phase)
        names, self._rates = schedule
        changed = changed_fields(self.folder, asdict(control), names)
        if changed and self.state.get("rates") != self._rates_so_far():
            expected = f"one with which the rates of the {self.step} updates done so far are what they were"
            expect(self.step == 0, changed[0], getattr(control, changed[0]), expected)
        self._skipped = SkippedUpdates(self.state, control.max_bad_updates)
        self._seconds: float = self.state.get("training_seconds", 0.0)  # at the newest checkpoint
        self.is_over = False
        self._owes = "owed" in self.state
        pushes = self._owes and _is_due(self.step, control.push_every)
        self.owed = Due(log=False, evaluate=self._owes, save=False, push=pushes), self.state.pop("owed", {})
        self._owed: dict[str, float] | None = None  # of this step, once a signal has ended its evaluation
        self._saved = self.step  # the newest step of the checkpoints, and of the metrics:
        self._written = self.step - self._owes

    def record(self, recipe: Path, facts: dict[str, Any]) -> None:
        """Write what the run is made of, see that it may push, and open its log.

        Args:
            recipe: the program, of which the folder keeps a copy.
            facts: for run.json: data, data_fingerprint, init, and what follows from the configuration.

        Raises:
            UsageError: data differs between processes; see `hub.check_push` and `write_run_record`.
        """
        control, accelerator, hub_id, run_id = self._control, self._accelerator, "", ""
        fingerprints = {name: value for name, value in facts.items() if name.endswith("_fingerprint")}
        for rank, others in enumerate(collectives.gather_objects(accelerator, fingerprints)):
            is_same = others == fingerprints
            expect(is_same, "data", facts["data"], f"the same data on all nodes, what process {rank} found differs")
        with collectives.raise_together(accelerator):
            if accelerator.is_main_process:
                hub_id = hub.check_push(control.push_to_hub, private=control.hub_private)
                facts = {**facts, "data_commits": hub_data.commits(), "license": control.hub_license}
                run_id = write_run_record(self.folder, to_yaml(control), recipe, facts)["run_id"]
        names = {"project": control.tracker_project, "name": control.run_name, "run_id": run_id}
        start_trackers(accelerator, self.folder, asdict(control), **names, step=self._written)
        self._log = RunLog(accelerator, self.folder, self._written, control.max_steps)
        self._pusher = hub.HubPusher(hub_id, control.hub_private)

    def updates(self, loader: Iterator[Update], flops_per_sample: float) -> Iterator[tuple[int, Update | None]]:
        """What each update sees, with its number from 0, from the next one to the last.

        First there is None, with the number of the last update, where a signal ended the evaluation after it: the
        evaluation is then done, and no update. A signal ends the run after an update, once it is saved; so do too many
        updates without a finite gradient.

        Args:
            loader: gives the updates from `step` on.
            flops_per_sample: floating-point operations of one sample's forward and backward pass.

        Raises:
            RunStopped, TooManyNonFiniteUpdates: the run has ended, and is saved.
        """
        control, accelerator = self._control, self._accelerator
        profiler = trace_updates(self.folder / "profile") if control.profile else None
        self._throughput = Throughput(flops_per_sample, peak(accelerator) * accelerator.num_processes)
        self._seconds_before = self._seconds
        self._stop = StopSignals()  # before this one, a signal ends a run that has nothing to save
        self._stops_before: LateNumber | None = None
        if self._owes:
            self._due, self._is_stopping, self._were_too_many = self.owed[0], False, self._skipped.are_too_many
            yield self.step - 1, None
            self._end_update(self.step - 1)
        while self.step < control.max_steps and not self.is_over:
            number = self.step
            with self._throughput.waiting_for_data():
                update = next(loader)
            yield number, update
            if profiler:
                profiler.step()
            self._end_update(number)

    def count_update(self, grad_norm: Tensor, *, samples: float, units: int) -> Due:
        """Note that an update was done, and say what is due after it.

        Args:
            grad_norm: scalar, the same on all processes; an update whose norm is not finite counts as skipped. That,
                and another process's signal, are looked at after the next update, so no device is waited for.
            samples: over all processes, in units of `flops_per_sample`.
            units: tokens or images, over all processes.
        """
        control = self._control
        self.step += 1
        self._throughput.add(samples=samples, units=units)
        self._skipped.count(grad_norm)
        self._is_stopping = self._is_any_process_stopping()
        is_finished = self.step == control.max_steps
        if is_finished:
            self._skipped.look_at_all()
        self._were_too_many = self._skipped.are_too_many
        is_last = is_finished or self._were_too_many
        self._due = Due(
            log=is_last or _is_due(self.step, control.log_every),
            evaluate=is_finished or _is_due(self.step, control.eval_every),
            save=is_last or self._is_stopping or _is_due(self.step, control.save_every),
            push=_is_due(self.step, control.push_every),
        )
        return self._due

    def rates(self, unit: str) -> dict[str, float]:
        """Updates skipped so far, and the rates since the last call, see `Throughput.read`.

        Call it after something that waits for the device, such as `loss.item()`.
        """
        return {"train/skipped_updates": self._skipped.total, **self._throughput.read(unit)}

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Do not count the block's time as training: evaluation, saving."""
        return self._throughput.pause()

    @contextlib.contextmanager
    def evaluation(self, metrics: dict[str, float]) -> Iterator[None]:
        """Do not count the block's time as training. A signal ends the block between two batches of `until_stopped`.

        Then a save is due, and the run leaves; when it goes on, the evaluation comes first, see `owed`.

        Args:
            metrics: of this update so far, which are written together with those of the evaluation.
        """
        so_far = dict(metrics)
        with self._throughput.pause():
            try:
                yield
            except RunStopped:
                self._owed = so_far
                self._due.save, self._due.push = self._saved < self.step, False

    def write(self, metrics: dict[str, float]) -> None:
        """Record this update's metrics, if there are any, and move the bar. Once an update, before `save`.

        Where a signal ended the evaluation nothing is recorded yet.
        """
        if self._owed is not None:
            metrics = {}
        self._log.write(self.step, metrics and {**metrics, "perf/training_seconds": self._training_seconds()})
        self._written = self.step

    def write_samples(self, text: str) -> None:
        """Keep what the model made after this update in samples/."""
        self._log.write_samples(self.step, text)

    def write_predictions(self, samples: Iterable[Any], labels: Sequence[Any], predictions: Sequence[Any]) -> None:
        """See `predictions.write_predictions`; the main process writes."""
        if self._accelerator.is_main_process:
            predictions_file.write_predictions(self.folder, samples, labels, predictions)

    def save(self, state: dict[str, Any]) -> None:
        """Write a checkpoint.

        Args:
            state: what else resuming needs: JSON, and under the key tensors a dict of tensors.
        """
        assert self._written == self.step, "metrics are written before the checkpoint, or a kill could lose them"
        self._seconds = self._training_seconds()
        everything = {
            **(self.state if self._saved == self.step else {}),  # of what no update came after
            "training_seconds": self._seconds,
            "rates": self._rates_so_far(),
            **self._skipped.state(),
            **state,
        }
        if self._owed is not None:
            everything["owed"] = self._owed
        checkpoints.save_checkpoint(
            self._accelerator, self.folder, self.step, everything, self._control.keep_checkpoints, self._control.resume
        )
        self._saved = self.step

    def push(self) -> None:
        """Push the exported model in the background, if the run is to be pushed."""
        self._pusher.push(self.folder, f"step {self.step}", f"step-{self.step}")

    def finish(
        self,
        pipeline_tag: str,
        usage: str,
        *,
        results: dict[str, Any],
        samples: str,
        figures: dict[str, str],
        evaluation: dict[str, float] | None = None,
        next_command: str = "",
    ) -> None:
        """Report on the run, whose model is exported, and push it.

        Args:
            pipeline_tag: the Hub's task name, such as text-generation.
            usage: Python that loads the model.
            results: training_flops and what else run.json is to say.
            samples: what the model made, as plain text.
            figures: heading -> file name in figures/, of images beside the loss curve.
            evaluation: of the weights that were exported; None = the run's last one.
            next_command: what the user may want to type now; "" = nothing.
        """
        accelerator = self._accelerator
        finish_run(
            self._log,
            self._pusher,
            self.folder,
            pipeline_tag=pipeline_tag,
            usage=usage,
            results={"steps": self.step, "training_seconds": self._seconds, "left_out": left_out.counts(), **results},
            samples=samples,
            figures=figures,
            evaluation=evaluation,
            is_main_process=accelerator.is_main_process,
        )
        if next_command:
            self._log.say(next_command)
        for tracker in accelerator.trackers:
            tracker.finish()
        self._stop.restore()
        if self._lock:
            self._lock.close()

    def _end_update(self, number: int) -> None:
        """Check that everything was done after update `number`, and end the run where it is to end."""
        assert self.step == self._written == number + 1, "each update is to be counted and written, once"
        is_saved = self._saved == self.step or not (self._due.save or self.is_over)
        assert is_saved, "a checkpoint was due and is not there"
        where = f"saved at step {self.step} of {self._control.max_steps}"
        if self._owed is not None:
            self._stop.leave_off()
            raise RunStopped(f"{where}, which is evaluated when the same command goes on from there")
        if self._were_too_many or self.is_over:  # it is saved, and by now the newest update was looked at too
            self._skipped.check(self.step)
        if self._is_stopping and self.step < self._control.max_steps and not self.is_over:
            self._stop.leave_off()
            raise RunStopped(f"{where}; the same command goes on from there")

    def _rates_so_far(self) -> str:
        """Changes when the rates of the updates done so far would have been others; "" where none were given."""
        rates = np.array(self._rates[: self.step], dtype=np.float64)
        return hashlib.sha256(rates.tobytes()).hexdigest()[:16] if len(self._rates) else ""

    def _is_any_process_stopping(self) -> bool:
        """Whether one of them was to stop when it had done the update before; alone, whether this one is."""
        if self._accelerator.num_processes == 1:
            return self._stop.received
        before, self._stops_before = self._stops_before, collectives.count_of(self._accelerator, self._stop.received)
        return before is not None and before.read() > 0

    def _training_seconds(self) -> float:
        return self._seconds_before + self._throughput.training_seconds


def _is_due(step: int, every: int) -> bool:
    """Whether something that happens every so many steps, 0 = never, happens after `step`."""
    return every > 0 and step % every == 0
