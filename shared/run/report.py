"""What a finished run says of itself: run.json completed, loss curve, model card, and a summary on the terminal."""

from pathlib import Path
from typing import Any

from shared.metrics.figures import loss_curve
from shared.run.folder import update_run_record
from shared.run.hub import HubPusher
from shared.run.log import RunLog
from shared.run.model_card import write_model_card

PUSH_SECONDS = 600  # that the end of a run waits for its last push


def finish_run(
    log: RunLog,
    pusher: HubPusher,
    run_dir: Path,
    *,
    pipeline_tag: str,
    usage: str,
    results: dict[str, Any],
    samples: str,
    figures: dict[str, str],
    evaluation: dict[str, float] | None,
    is_main_process: bool,
) -> None:
    """Report on a run whose model is exported, and push it, if it is to be pushed; every process calls this.

    Args:
        log: has the run's metrics; closed here.
        pusher: closed here.
        run_dir: the run folder.
        pipeline_tag: see `write_report`.
        usage: see `write_report`.
        results: see `write_report`.
        samples: see `write_report`.
        figures: see `write_report`.
        evaluation: see `write_report`.
        is_main_process: whether this process is the one that writes.
    """
    if is_main_process:
        write_report(log, run_dir, pipeline_tag, usage, results, samples, figures, evaluation)
        pusher.push(run_dir, f"step {results['steps']}")
    if pusher.repo_id:
        log.say(pusher.close(timeout_seconds=PUSH_SECONDS) or f"pushed to {pusher.repo_id}")
    log.close()


def write_report(
    log: RunLog,
    run_dir: Path,
    pipeline_tag: str,
    usage: str,
    results: dict[str, Any],
    samples: str,
    figures: dict[str, str],
    evaluation: dict[str, float] | None,
) -> None:
    """Write it all from the run's own measurements. The main process calls this.

    Args:
        log: has the run's metrics.
        run_dir: the run folder; run.json and the exported model are there already.
        pipeline_tag: the Hub's task name, such as text-generation.
        usage: Python that loads the model.
        results: steps, training_seconds and training_flops, added to run.json; so is the evaluation.
        samples: what the model made, as plain text.
        figures: heading -> file name in figures/, of images beside the loss curve.
        evaluation: of the exported weights, metric key to value; None = the last one of the log.
    """
    evaluation = log.last_evaluation() if evaluation is None else evaluation
    record = update_run_record(run_dir, {**results, "evaluation": evaluation})
    loss_curve(log.read(), run_dir / "figures" / "loss.png")
    write_model_card(run_dir, run_dir.name, pipeline_tag, usage, record, evaluation, samples, figures)
    shown = "  ".join(f"{key} {value:.4f}" for key, value in evaluation.items())
    log.say(f"\n{samples}\n\n{shown}\nmodel, card, loss curve and metrics: {run_dir}/")
