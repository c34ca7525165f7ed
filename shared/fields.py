"""Fields that several recipes share."""

import dataclasses
import math

import yaml

from shared.command_line import expect, expect_at_least, redact


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunControl:
    """What every training stage shares: where it writes, how it resumes, how often it reports."""

    config: str = ""
    """YAML file with differences from the defaults; flags override it. "" = none."""
    output_dir: str = "outputs/run"
    """The run folder; on several nodes it must be one that all of them see."""
    seed: int = 0
    """The one integer that all randomness derives from."""
    resume: str = "auto"
    """auto = go on from this folder's newest checkpoint; never = refuse a folder that holds a run; or a checkpoint
    folder to go on from, one of another run only until this run has checkpoints of its own."""
    log_every: int = 10
    """Updates between two log entries."""
    eval_every: int = 0
    """Updates between two evaluations; 0 = only at the end."""
    save_every: int = 0
    """Updates between two checkpoints; 0 = only at the end and when a signal stops the run."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints that are kept."""
    max_bad_updates: int = 10
    """Updates in a row with a non-finite gradient after which the run stops."""
    num_workers: int = 0
    """Data worker processes for each training process; never changes the result. 0 = load in the training process."""
    deterministic: bool = False
    """Only deterministic GPU kernels, so that a resumed run is equal to the bit; slower by 10 to 30 % on GPUs."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    compile: bool = False
    """Compile the model with torch.compile; worth its first minutes on GPUs only."""
    profile: bool = False
    """Write a torch trace of three updates to OUTPUT_DIR/profile/."""
    dry_run: bool = False
    """Check everything, say what the run would cost, train nothing, leave nothing in output_dir."""
    push_to_hub: str = ""
    """Hub repository id to push the model to, such as me/my-gpt. "" = do not push."""
    hub_private: bool = True
    """Whether a repository that the push creates is private."""
    push_every: int = 0
    """Updates between two pushes of a loadable model; 0 = only at the end."""
    report_to: str = ""
    """Trackers, comma-separated: tensorboard, wandb, ... metrics.jsonl is always written. "" = none."""
    timeout_minutes: float = 30
    """Minutes that one process waits for another in a collective before the run fails."""
    cache_dir: str = ""
    """Folder for tokenised or encoded data, one for each node. "" = HF_HOME/pretraining_recipes."""


def check_run_control(config: RunControl) -> None:
    """Check the fields that every recipe shares.

    Raises:
        UsageError: a number is out of range, or a field holds an access token, which would end up in files.
    """
    expect_at_least(config, 1, "log_every", "keep_checkpoints", "max_bad_updates")
    expect_at_least(config, 0, "seed", "eval_every", "save_every", "push_every", "num_workers")
    expect(config.timeout_minutes > 0, "timeout_minutes", config.timeout_minutes, "more than 0")
    expect(
        not config.push_every or bool(config.push_to_hub),
        "push_every",
        config.push_every,
        "push_to_hub to be set as well",
    )
    for field, value in dataclasses.asdict(config).items():
        shown = redact(str(value))
        expect(shown == str(value), field, shown, "no access token; use `hf auth login` or HF_TOKEN")


def to_yaml(config: RunControl) -> str:
    """Every field of `config` as YAML that `--config` takes back."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("config", "dry_run")}
    return yaml.safe_dump(fields, sort_keys=False, width=math.inf)
