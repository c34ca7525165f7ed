"""Fields that several recipes share, and words for what the value of a field must be.

A recipe's `Config` inherits the groups that it needs and adds the fields of its method. A group has no method, and a
helper that takes one reads the fields of that group alone. A field whose annotation is one of the words below is
checked by `check_limits`, and `--help` says what it must be.
"""

import dataclasses
import math
import string
from typing import Annotated

import yaml

from shared.command_line import Given, Limit, Place, Places, Several, check_limits, expect, redact

_OF_LICENSES = {*string.ascii_lowercase, *string.digits, "-", "."}


def at_least(least: float) -> Limit:
    """The limit of a number that must not be less."""
    return Limit(lambda value: value >= least, f"at least {least:g}")


Count = Annotated[int, at_least(1)]
Natural = Annotated[int, at_least(0)]
Positive = Annotated[float, Limit(lambda value: value > 0, "more than 0")]
Amount = Annotated[float, at_least(0)]
FromOne = Annotated[float, at_least(1)]
Share = Annotated[float, Limit(lambda value: 0 <= value < 1, "a share in [0, 1)")]
ShareInside = Annotated[float, Limit(lambda value: 0 < value < 1, "a share in (0, 1)")]
ShareAboveZero = Annotated[float, Limit(lambda value: 0 < value <= 1, "a share in (0, 1]")]
RateOfNewWeights = Annotated[Positive, Given(lambda config: config.init != "scratch", "with init")]
RateOfNewWeightsByMuon = Annotated[
    Positive, Given(lambda config: config.init != "scratch" and config.optimizer == "muon", "with init and muon")
]
ShareToOne = Annotated[float, Limit(lambda value: 0 <= value <= 1, "a share in [0, 1]")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunControl:
    """What every training stage has: how much an update is, where it writes, how it resumes, how often it reports."""

    # Optimization
    global_batch_size: Count
    """Samples of one update, over all processes and micro-batches."""
    per_device_batch_size: Natural = 0
    """Samples of one micro-batch on one process. 0 = the process's whole share of the global batch."""
    max_steps: Count
    """Optimizer updates."""
    max_grad_norm: Amount
    """Norm to which the update's gradient is clipped. 0 = no clipping."""
    max_bad_updates: Count = 10
    """Updates in a row with a non-finite gradient after which the run stops, when it has done one more."""

    # Evaluation
    eval_every: Natural = 0
    """Updates between two evaluations. 0 = only at the end."""

    # Run
    config: Place = ""
    """YAML file with differences from the defaults; flags override it. "" = none."""
    output_dir: Place = "outputs/run"
    """The run folder; on several nodes it must be one that all of them see."""
    seed: Natural = 0
    """The one integer that all randomness derives from."""
    resume: Place = "auto"
    """auto = go on from this folder's newest checkpoint; never = refuse a folder that holds a run; or a checkpoint
    folder to go on from, one of another run only until this run has checkpoints of its own."""
    log_every: Count = 10
    """Updates between two log entries."""
    save_every: Natural = 0
    """Updates between two checkpoints. 0 = only at the end and when a signal stops the run."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints that are kept."""
    num_workers: Natural = 0
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
    hub_license: Annotated[
        str, Limit(lambda value: not set(value) - _OF_LICENSES, "small letters, digits, - and .")
    ] = ""
    """License of the model as the Hub abbreviates it, for the card, such as apache-2.0. "" = none is named."""
    push_every: Natural = 0
    """Updates between two pushes of a loadable model. 0 = only at the end."""
    report_to: Several = ""
    """Trackers, comma-separated: tensorboard, wandb, ... metrics.jsonl is always written. "" = none."""
    tracker_project: str = ""
    """Project under which trackers keep the run. "" = what WANDB_PROJECT says, else pretraining."""
    run_name: str = ""
    """Name of the run in trackers. "" = what WANDB_NAME says, else that of output_dir."""
    timeout_minutes: Positive = 30
    """Minutes that one process waits for another in a collective before the run fails."""
    cache_dir: Place = ""
    """Folder for tokenised or encoded data, one for each node. "" = HF_HOME/pretraining_recipes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where text comes from; `shared/text/documents.py` opens it."""

    # Data
    data: Places = "sample"
    """sample (prose and dictionary), prose (presidents' messages and novels), dictionary, books (novels and
    dictionary), a .txt/.jsonl/.parquet file, a folder of them, or a Hub data set id; several with commas, in YAML as a
    list. One may have its own config, split or text_column:
    wikimedia/wikipedia:config=20231101.en,my_books:text_column=body. A Hub id may end in @ and a branch, tag or
    commit."""
    data_config: str = ""
    """Configuration of a Hub data set. "" = its only one."""
    data_split: str = "train"
    """Split of a Hub data set, or of a folder that has splits."""
    text_column: str = ""
    """Column of the text. "" = the only column that holds text, or the one called text."""

    # Evaluation
    eval_data: Places = ""
    """Data to evaluate on, in the same forms. "" = of folders with splits the one to validate or to test on, else hold
    out eval_fraction of the documents."""
    eval_split: str = "validation"
    """Split of eval_data if it is a Hub data set or a folder with splits."""
    eval_fraction: Share = 0.05
    """Share of the documents held out, by their content, where eval_data is not given. 0 = none, with eval_data."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How much of what is held out pre-training evaluates on; `shared/data/subsets.py` chooses it."""

    # Evaluation
    eval_rows: Natural = 0
    """Rows or images that are evaluated, at most, of text those of each source; drawn once, the same for every seed.
    0 = all."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Images:
    """Where images come from; `shared/images/files.py` opens them."""

    # Data
    data: Place = "sample"
    """sample, a .parquet or .tar file, a folder of them or of images, or a Hub data set id, also with @ and a branch,
    tag or commit."""
    data_config: str = ""
    """Configuration of a Hub data set. "" = its only one."""
    data_split: str = "train"
    """Split to train on."""
    image_column: str = ""
    """Column of the images. "" = the only one that holds images."""
    max_bad_fraction: Share = 0.01
    """Share of the images that may turn out damaged before the run stops; they are replaced, and named in the log.
    0 = not one."""

    # Evaluation
    eval_split: str = ""
    """Split to evaluate on. "" = the first whose name begins with validation, val or test, else eval_fraction is
    held out."""
    eval_fraction: ShareInside = 0.05
    """Share of the images, of each class where there are classes, held out where there is no split to evaluate on."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LatentData:
    """Where latents come from; `shared/diffusion/latent_cache.py` opens them."""

    # Data
    data: Place = "sample"
    """Folder that cache_latents.py made, or sample: outputs/latents, which must be of the embedded emoji, or, if it is
    not there, their latents made in cache_dir."""
    data_split: str = "train"
    """Split to train on."""
    captions_with: str = ""
    """Take only samples whose caption has this text, also to evaluate on. "" = all."""
    captions_without: str = ""
    """Leave out samples whose caption has this text, also to evaluate on. "" = none."""

    # Evaluation
    eval_splits: str = ""
    """Splits to evaluate on, comma-separated. "" = those whose names begin with validation, val or test, else
    eval_fraction is held out."""
    eval_fraction: ShareInside = 0.05
    """Share of the samples held out where there is no split to evaluate on."""
    eval_rows: Natural = 200
    """Samples of each split that are evaluated, at most, evenly spread. 0 = all."""


def check_run_control(control: RunControl) -> None:
    """Check each field by its annotation, and what the shared ones say against each other.

    Raises:
        UsageError: a value is not what it must be, or holds an access token, which would end up in files.
    """
    check_limits(control)
    needs_hub = not control.push_every or bool(control.push_to_hub)
    expect(needs_hub, "push_every", control.push_every, "push_to_hub to be set as well")
    for field, value in dataclasses.asdict(control).items():
        shown = redact(str(value))
        expect(shown == str(value), field, shown, "no access token; use `hf auth login` or HF_TOKEN")


def check_corpus(corpus: Corpus) -> None:
    """Check what the fields of a corpus say against each other.

    Raises:
        UsageError: there is nothing to evaluate on.
    """
    embedded = {"sample", "prose", "dictionary", "books"}  # which have held-out parts of their own
    names = {name.strip() for name in corpus.data.split(",")}
    has_eval = corpus.eval_fraction > 0 or corpus.eval_data or names <= embedded
    expect(bool(has_eval), "eval_fraction", corpus.eval_fraction, "more than 0 where eval_data is not given")


def to_yaml(control: RunControl) -> str:
    """Every field as YAML that `--config` takes back."""
    fields = {name: value for name, value in dataclasses.asdict(control).items() if name not in ("config", "dry_run")}
    return yaml.safe_dump(fields, sort_keys=False, width=math.inf)
