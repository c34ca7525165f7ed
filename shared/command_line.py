"""The command line of every recipe: one frozen dataclass, a YAML of differences, and flags.

A YAML's keys become flags placed before the user's own, so a wrong key, type or value fails in the same way
wherever it was written. Everything a user can get wrong ends as one `UsageError`: one line that names the
field, the value and what was expected, exit status 2, no traceback.
"""

import contextlib
import dataclasses
import difflib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import yaml

EXIT_USAGE = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may requeue the same command
EXIT_NON_FINITE = 76
EXIT_NO_CHECKPOINT = 77

ConfigT = TypeVar("ConfigT")


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is all that is shown."""


class RunStopped(Exception):
    """A signal arrived; the run was saved and the same command continues it."""


class TooManyNonFiniteUpdates(Exception):
    """Updates with a non-finite gradient came too many times in a row."""


class NoUsableCheckpoint(Exception):
    """Checkpoints are there, and every one of them is damaged."""


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
    folder to go on from."""
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
    """Compile the model with torch.compile; worth its first minute on GPUs only."""
    profile: bool = False
    """Write a torch trace of three updates to OUTPUT_DIR/profile/."""
    dry_run: bool = False
    """Check everything, say what the run would cost, train nothing, leave nothing."""
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
    """Folder for tokenised data, one for each node. "" = HF_HOME/pretraining_recipes."""


def expect(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise `UsageError` naming the field, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise UsageError(f"{field}: {value!r}: expected {expected}")


def check_run_control(config: RunControl) -> None:
    """Check the fields that every recipe shares.

    Raises:
        UsageError: a number is out of range.
    """
    for field in ("log_every", "keep_checkpoints", "max_bad_updates"):
        value = getattr(config, field)
        expect(value >= 1, field, value, "at least 1")
    for field in ("seed", "eval_every", "save_every", "push_every", "num_workers"):
        value = getattr(config, field)
        expect(value >= 0, field, value, "0 or more")
    expect(config.timeout_minutes > 0, "timeout_minutes", config.timeout_minutes, "more than 0")
    expect(
        not config.push_every or bool(config.push_to_hub),
        "push_every",
        config.push_every,
        "push_to_hub to be set as well",
    )


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Build `config_class` from its defaults, the YAML that `--config` names, and flags, the later winning.

    Raises:
        SystemExit: with status 0 after `--help` and 2 after a wrong flag.
        UsageError: the YAML is missing, not a mapping, or holds a wrong key or type.
    """
    import tyro

    arguments = list(sys.argv[1:] if argv is None else argv)
    config_file = _value_of_flag(arguments, "--config")
    flags = _flags_from_yaml(Path(config_file), config_class) if config_file else []
    return tyro.cli(
        config_class,
        args=[*flags, *arguments],
        description=sys.modules[config_class.__module__].__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
        use_underscores=True,
        console_outputs=is_speaking_process(),
    )


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the exceptions above into one line on stderr and the exit status of CONTRIBUTING's table."""
    status = 0
    try:
        yield
    except UsageError as error:
        message, status = f"error: {error}", EXIT_USAGE
    except RunStopped as error:
        message, status = f"stopped: {error}", EXIT_STOPPED
    except TooManyNonFiniteUpdates as error:
        message, status = f"error: {error}", EXIT_NON_FINITE
    except NoUsableCheckpoint as error:
        message, status = f"error: {error}", EXIT_NO_CHECKPOINT
    if status:
        if is_speaking_process():
            sys.stdout.flush()
            print(message, file=sys.stderr, flush=True)  # noqa: T201 (the accelerator may not exist yet)
        sys.exit(status)


def is_speaking_process() -> bool:
    """Whether this process is the one of its node that prints; known before any accelerator exists."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def to_yaml(config: RunControl) -> str:
    """Every field of `config` as YAML that `--config` takes back."""
    fields = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("config", "dry_run")}
    return yaml.safe_dump(fields, sort_keys=False)


def _value_of_flag(arguments: list[str], flag: str) -> str:
    for index, argument in enumerate(arguments):
        if argument == flag and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(f"{flag}="):
            return argument.split("=", 1)[1]
    return ""


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a key given twice, which YAML's own rule forbids and PyYAML lets pass."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise UsageError(f"{self.name}: key {key!r} is given twice")
        return super().construct_mapping(node, deep)


def _flags_from_yaml(path: Path, config_class: type) -> list[str]:
    if not path.is_file():
        raise UsageError(f"config: {str(path)!r}: expected a YAML file that exists")
    try:
        with path.open(encoding="utf-8") as stream:
            content = yaml.load(stream, _UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {path}: expected YAML, got {' '.join(str(error).split())}") from error
    if content is None:
        return []
    if not isinstance(content, dict):
        raise UsageError(f"config: {path}: expected a mapping of field to value, got {type(content).__name__}")
    types = {field.name: field.type for field in dataclasses.fields(config_class) if field.name != "config"}
    flags = []
    for key, value in content.items():
        if key not in types:
            close = difflib.get_close_matches(str(key), types, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise UsageError(f"{path}: unknown key {key!r}{hint}")
        flags += _flag(path, key, value, is_bool=types[key] in (bool, "bool"))
    return flags


def _flag(path: Path, key: str, value: object, *, is_bool: bool) -> list[str]:
    if is_bool:
        if not isinstance(value, bool):
            raise UsageError(f"{path}: {key}: {value!r}: expected true or false")
        return [f"--{key}" if value else f"--no-{key}"]
    if value is None or isinstance(value, bool | dict | list):
        raise UsageError(f"{path}: {key}: {value!r}: expected one number or text")
    return [f"--{key}={value}"]
