"""One run in each tracker, whatever interrupts training, with configuration, metrics and samples."""

import time
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration
from PIL import Image

from shared.run.log import RunLog
from shared.run.trackers import start_trackers

CONFIG = {"data": "sample", "learning_rate": 0.1, "compile": False}


def log_steps(tracker: str, run_dir: Path, first: int, last: int, **names: str) -> None:
    """A start of the run that logs the steps after `first`, up to `last`."""
    options = ProjectConfiguration(logging_dir=str(run_dir))
    accelerator = Accelerator(cpu=True, log_with=[tracker], project_config=options)
    names = {"project": "", "name": "", "run_id": "ab12cd34", **names}
    start_trackers(accelerator, run_dir, CONFIG, **names, step=first)
    log = RunLog(accelerator, run_dir, first, 9)
    for step in range(first + 1, last + 1):
        log.write_samples(step, f"the cat at {step}")
        Image.new("RGB", (8, 6), (step, 0, 0)).save(run_dir / "samples" / f"step_{step:08d}.png")
        log.write(step, {"train/loss": 10.0 - step})
    for started in accelerator.trackers:
        started.finish()


def test_tensorboard_shows_each_step_once_after_a_kill(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log_steps("tensorboard", tmp_path, 0, 4)
    log_steps("tensorboard", tmp_path, 2, 5)  # from the checkpoint of step 2
    events = EventAccumulator(str(tmp_path / "pretraining"), {"scalars": 0, "tensors": 0, "images": 0}).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (step, 10.0 - step) for step in range(1, 6)
    ]
    texts = {(event.step, event.tensor_proto.string_val[0]) for event in events.Tensors("samples/text_summary")}
    assert texts == {(step, f"the cat at {step}".encode()) for step in range(1, 6)}
    images = events.Images("samples")
    assert [(image.step, image.width, image.height) for image in images] == [(step, 8, 6) for step in range(1, 6)]
    [settings] = tmp_path.rglob("hparams.yml")
    assert "learning_rate: 0.1" in settings.read_text()


def test_nothing_happens_without_trackers(tmp_path: Path) -> None:
    accelerator = Accelerator(cpu=True)
    start_trackers(accelerator, tmp_path, CONFIG, project="", name="", run_id="ab12cd34", step=0)
    assert (accelerator.trackers, list(tmp_path.iterdir())) == ([], [])


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"WANDB_PROJECT": "theirs", "WANDB_RUN_ID": "given", "WANDB_NAME": "shown"}])
def test_wandb_goes_on_with_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, Any]
) -> None:
    """Offline: a folder for each start, all of one run, which `wandb sync` brings together."""
    pytest.importorskip("wandb")
    for variable, value in {**variables, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(variable, value)
    run_dir = tmp_path / "my-run"
    run_dir.mkdir()
    log_steps("wandb", run_dir, 0, 3)
    log_steps("wandb", run_dir, 2, 4)
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    assert [file.name for file in files] == [f"run-{variables.get('WANDB_RUN_ID', 'ab12cd34')}.wandb"] * 2
    names = (variables.get("WANDB_PROJECT", "pretraining"), variables.get("WANDB_NAME", "my-run"), "learning_rate")
    until = time.monotonic() + 30  # wandb's own process writes
    while not all(name.encode() in file.read_bytes() for file in files for name in names):
        assert time.monotonic() < until
        time.sleep(0.1)
    assert len(list(run_dir.rglob("media/images/samples_*.png"))) == 5


def test_names_of_project_and_run_are_given(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    log_steps("tensorboard", tmp_path, 0, 1, project="mine")
    assert list((tmp_path / "mine").glob("events*"))
