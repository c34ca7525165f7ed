"""The command line of every recipe: one frozen dataclass, a YAML of differences, and flags.

A value is read as its field's type asks, whether it stands in the YAML or in a flag, so a wrong key, type or value
fails in the same way in both. Everything a user can get wrong ends as one `UsageError`: one line that names the
field, the value and what was expected, exit status 2, no traceback. `tyro` writes `--help`: of each field the comment
behind it or the text below it, what its value must be, and its default, in groups by the headings in the dataclass.
"""

import ast
import contextlib
import dataclasses
import difflib
import errno
import inspect
import math
import os
import re
import signal
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml

EXIT_USAGE = 2
EXIT_DISK = 74  # EX_IOERR of sysexits.h
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: a scheduler may requeue the same command
EXIT_NON_FINITE = 76
EXIT_NO_CHECKPOINT = 77

ConfigT = TypeVar("ConfigT")

_ACCESS_TOKEN = re.compile(r"hf_[A-Za-z0-9]{20,}")
_GROUPS = ("Data", "Model", "Objective", "Optimization", "Evaluation", "Run")  # of --help, in this order
_YAML_TAG = "tag:yaml.org,2002:"


class UsageError(Exception):
    """Something the user asked for cannot be done; the message is all that is shown."""


class RunStopped(Exception):
    """A signal arrived; the run was saved and the same command continues it."""


class TooManyNonFiniteUpdates(Exception):
    """Updates with a non-finite gradient came too many times in a row."""


class DiskError(Exception):
    """A disk cannot be read for now; what is on it may be whole."""


class NoUsableCheckpoint(Exception):
    """Checkpoints are there, and every one of them is damaged."""


@dataclasses.dataclass(frozen=True)
class Limit:
    """What a field's value must be; it stands in the field's annotation, as `Annotated[int, Limit(...)]`.

    Attributes:
        holds: whether a value is so.
        expected: the same in words, for messages and --help.
    """

    holds: Callable[[Any], bool]
    expected: str


@dataclasses.dataclass(frozen=True)
class Given:
    """Where a field's default does not fit and the user must say a value; it stands in the annotation, like `Limit`.

    Attributes:
        where: tells of a configuration whether it is so.
        words: the same in words, for messages and --help, such as "with init".
    """

    where: Callable[[Any], bool]
    words: str


_SEVERAL, _PLACE = "several", "place"
Several = Annotated[str, _SEVERAL]  # values with commas between them, which YAML may have as a list
Place = Annotated[str, _PLACE]  # a file or folder, or a name of something else; a ~ before it is the home folder
Places = Annotated[str, _SEVERAL, _PLACE]


def one_line(error: BaseException) -> str:
    """What an error says, or its name where it says nothing."""
    return " ".join(str(error).split()) or type(error).__name__


def expect(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise `UsageError` naming the field, its value and what was expected, unless `condition` holds."""
    if not condition:
        raise UsageError(f"{field}: {value!r}: expected {expected}")


def check_limits(config: object) -> None:
    """Check each field by its annotation.

    Raises:
        UsageError: it names the field, its value and what was expected.
    """
    for name, kind in get_type_hints(type(config), include_extras=True).items():
        for limit in _parts(kind, Limit):
            expect(limit.holds(getattr(config, name)), name, getattr(config, name), limit.expected)
        if get_origin(kind) is Literal:
            expect(getattr(config, name) in get_args(kind), name, getattr(config, name), _expectation(kind))


def expand_home(text: str) -> str:
    """`text` with the home folder where it, or a part of it behind a comma, begins with ~ as in a shell."""
    return ",".join(os.path.expanduser(part) for part in text.split(","))


def positive_numbers(field: str, text: str, count: int) -> list[float]:
    """Comma-separated numbers above 0; "" = as many ones.

    Args:
        field: name for the message.
        text: such as "0.7,0.3".
        count: how many there must be.

    Raises:
        UsageError: it holds something else, or another number of them.
    """
    try:
        numbers = [float(part) for part in text.split(",")] if text else [1.0] * count
    except ValueError:
        numbers = []
    is_right = len(numbers) == count and all(0 < number < float("inf") for number in numbers)
    expect(is_right, field, text, f"{count} comma-separated numbers above 0")
    return numbers


def whole_numbers(field: str, text: str, least: int = 1) -> list[int]:
    """Comma-separated whole numbers.

    Args:
        field: name for the message.
        text: such as "3,4,6,3".
        least: that each of them may be.

    Raises:
        UsageError: it holds something else, or nothing.
    """
    parts = [part.strip() for part in text.split(",")]
    is_right = all(part.isascii() and part.isdecimal() and int(part) >= least for part in parts)
    expect(is_right, field, text, f"comma-separated whole numbers, {least} or more")
    return [int(part) for part in parts]


def parse(config_class: type[ConfigT], argv: Sequence[str] | None = None) -> ConfigT:
    """Build `config_class` from its defaults, the YAML that `--config` names, and flags, the later winning.

    Fields are bool, int, float, str or a Literal of texts. `--field value` and `--field=value` are the same, so are
    dashes and underscores in names; a bool is `--field` or `--no-field`; of a flag given twice the last counts.

    Raises:
        SystemExit: with status 0 after `--help`.
        UsageError: a flag or the YAML is wrong, or neither says a value that must be `Given`.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if "-h" in arguments or "--help" in arguments:
        _show_help(config_class)
    hints = get_type_hints(config_class)
    kinds = {field.name: hints[field.name] for field in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    flags = _read_flags(arguments, kinds)
    kinds.pop("config", None)
    annotated = get_type_hints(config_class, include_extras=True)
    several, places = (
        [name for name, kind in annotated.items() if mark in getattr(kind, "__metadata__", ())]
        for mark in (_SEVERAL, _PLACE)
    )
    values = _read_yaml(Path(expand_home(flags["config"])), kinds, several) if flags.get("config") else {}
    values |= flags
    values |= {name: expand_home(values[name]) for name in places if name in values}
    config = config_class(**values)
    for name, kind in annotated.items():
        for given in _parts(kind, Given):
            is_there = name in values or not given.where(config)
            expect(
                is_there, name, getattr(config, name), f"a value of your own {given.words}, where this one does not fit"
            )
    return config


@contextlib.contextmanager
def exit_codes() -> Iterator[None]:
    """Turn the exceptions above, and a full disk, into one line on stderr and the exit status of CONTRIBUTING's table.

    Ctrl-C ends the process at once, without a traceback, unless something else is set up inside; also later, while the
    program imports what it needs. Output that cannot be printed or written does not end it. Windows is refused, since
    signals, locks and flushed folders are those of POSIX.
    """
    if sys.platform == "win32":
        print("error: Windows: expected Linux or macOS; WSL has a Linux", file=sys.stderr)  # noqa: T201 (before all else)
        sys.exit(EXIT_USAGE)
    message, status = "", 0
    on_interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)
    outputs = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (stream and _Unbreakable(stream) for stream in outputs)
    try:
        yield
        if sys.stdout:
            sys.stdout.flush()
    except UsageError as error:
        # One raised in a data worker comes with that process's traceback as a part of its text.
        message, status = f"error: {str(error).strip().rpartition('UsageError: ')[2]}", EXIT_USAGE
        if _is_disk_full(error):
            message, status = f"error: the disk is full: {error}", EXIT_DISK
    except RunStopped as error:
        message, status = f"stopped: {error}", EXIT_STOPPED
    except TooManyNonFiniteUpdates as error:
        message, status = f"error: {error}", EXIT_NON_FINITE
    except NoUsableCheckpoint as error:
        message, status = f"error: {error}", EXIT_NO_CHECKPOINT
    except DiskError as error:
        message, status = f"error: {error}", EXIT_DISK
    except Exception as error:  # what libraries make of a full disk has no common class; all else is raised again
        if not _is_disk_full(error):
            raise
        expected = "with room on the disk the same command goes on from the newest checkpoint"
        message, status = f"error: the disk is full: {error}: {expected}", EXIT_DISK
    else:
        _leave_process_group()
    finally:
        if status and is_speaking_process():
            line = redact(" ".join(message.splitlines()))
            print(line, file=sys.stderr, flush=True)  # noqa: T201 (the accelerator may not exist yet)
        sys.stdout, sys.stderr = outputs
        if on_interrupt is not signal.default_int_handler:
            signal.signal(signal.SIGINT, on_interrupt)
    if status:
        sys.exit(status)


class _Unbreakable:
    """A stream that goes on where its reader is gone or its disk is full, and escapes characters that it has not.

    A run is worth more than the line that could not be printed.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        with contextlib.suppress(AttributeError, OSError):  # of what is no text file, or cannot be flushed
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write as the stream does."""
        try:
            return self._stream.write(text)
        except BlockingIOError:  # a reader that is slow, not gone
            return 0
        except OSError:
            self._let_go()
            return len(text)

    def flush(self) -> None:
        """Flush as the stream does."""
        try:
            self._stream.flush()
        except BlockingIOError:
            pass
        except OSError:
            self._let_go()

    def writelines(self, lines: Iterable[str]) -> None:
        """Write as the stream does."""
        self.write("".join(lines))

    def _let_go(self) -> None:
        """Send to nowhere what is left of this output, what is in its buffer too."""
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, self._stream.fileno())
        os.close(null)


def _is_disk_full(error: BaseException | None) -> bool:
    """Whether that is behind an exception; torch, which finds a file shorter than what it wrote, does not say so."""
    if error is None:
        return False
    is_said = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    is_said |= "No space left on device" in str(error)
    is_said |= isinstance(error, RuntimeError) and "unexpected pos" in str(error)
    return is_said or _is_disk_full(error.__cause__ or error.__context__)


def _leave_process_group() -> None:
    """End what joins this process to the others, if it was ever begun; nothing is imported for it."""
    distributed = sys.modules.get("torch.distributed")
    if distributed and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def is_speaking_process() -> bool:
    """Whether this process is the one of its node that prints; known before any accelerator exists."""
    return os.environ.get("LOCAL_RANK", "0") in ("0", "-1")


def redact(text: str) -> str:
    """`text` with the Hub's access tokens blotted out."""
    return _ACCESS_TOKEN.sub("hf_***", text)


def _parts(kind: Any, part_class: type) -> list[Any]:
    return [part for part in getattr(kind, "__metadata__", ()) if isinstance(part, part_class)]


def _show_help(config_class: type) -> None:
    import tyro

    kinds, texts = get_type_hints(config_class, include_extras=True), _field_texts(config_class)
    groups: dict[str, list[Any]] = {}
    for field in dataclasses.fields(config_class):
        heading, text = texts[field.name]
        words = [
            text,
            *(f"{limit.expected[0].upper()}{limit.expected[1:]}." for limit in _parts(kinds[field.name], Limit)),
        ]
        words += [f"Must be given {given.words}." for given in _parts(kinds[field.name], Given)]
        kind: Any = Annotated[kinds[field.name], tyro.conf.arg(help=" ".join(words))]
        groups.setdefault(heading or _GROUPS[-1], []).append(
            (field.name, kind, dataclasses.field(default=field.default))
        )
    ordered = [heading for heading in _GROUPS if heading in groups]
    named = [(heading.lower(), dataclasses.make_dataclass(heading, groups[heading])) for heading in ordered]
    boxes = [(name, group, dataclasses.field(default_factory=group)) for name, group in named]
    if is_speaking_process():
        # tyro would fill the lines up, and no command in them could be copied.
        print(inspect.cleandoc(sys.modules[config_class.__module__].__doc__ or ""), end="\n\n")  # noqa: T201
    tyro.cli(
        dataclasses.make_dataclass("Options", boxes),
        args=["--help"],
        description="",
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
        console_outputs=is_speaking_process(),
    )


def _field_texts(config_class: type) -> dict[str, tuple[str, str]]:
    """Field -> its heading and its text, from the source of the dataclass and of those that it inherits from.

    A heading is a line `# Data`, `# Model` and so on above fields. A field that is declared again without one of both
    keeps what it inherits.
    """
    found: dict[str, tuple[str, str]] = {}
    for part in reversed(config_class.__mro__[:-1]):
        source = textwrap.dedent(inspect.getsource(part))
        lines, heading = source.splitlines(), ""
        body = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)).body
        for before, node, after in zip([None, *body], body, [*body[1:], None], strict=False):
            for line in lines[before.end_lineno if before else 0 : node.lineno - 1]:
                word = line.strip().removeprefix("# ")
                heading = word if word in _GROUPS else heading
            if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
                continue
            name, text = node.target.id, ""
            if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
                text = " ".join(str(after.value.value).split())
            elif "#" in (rest := lines[(node.end_lineno or 0) - 1].encode()[node.end_col_offset or 0 :].decode()):
                text = rest.partition("#")[2].strip()
            inherited = found.get(name, ("", ""))
            found[name] = (heading or inherited[0], text or inherited[1])
    return found


def _read_flags(arguments: list[str], kinds: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(reversed(arguments))
    while rest:
        flag, equals, text = rest.pop().partition("=")
        if not flag.startswith("--"):
            raise UsageError(f"{flag + equals + text!r}: expected a flag, such as --seed 1")
        name = flag[2:].replace("-", "_")
        is_off = name not in kinds and kinds.get(name.removeprefix("no_")) is bool
        name = name.removeprefix("no_") if is_off else name
        if name not in kinds:
            raise UsageError(f"unknown flag {flag}{_suggestion(name, kinds)}")
        if kinds[name] is bool:
            if equals or (rest and not rest[-1].startswith("-")):
                value = text if equals else rest[-1]
                raise UsageError(f"{name}: {value!r}: expected --{name} or --no_{name}, without a value")
            values[name] = not is_off
            continue
        if not equals:
            if not rest or rest[-1].startswith("--"):
                raise UsageError(f"{name}: expected {_expectation(kinds[name])} after {flag}")
            text = rest.pop()
        values[name] = _convert(name, text, kinds[name])
    return values


def _read_yaml(path: Path, kinds: dict[str, Any], several: Collection[str]) -> dict[str, Any]:
    """The fields in a YAML file.

    Values are taken as they are written, before YAML makes numbers of them: 1e-3 is a text to YAML 1.1, and the text
    1.10 would become 1.1. Nothing is constructed, so no tag can run code and no anchor can grow.
    """
    try:
        with path.open(encoding="utf-8") as stream:
            document = yaml.compose(stream, yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"config: {str(path)!r}: expected a YAML file, got {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"config: {str(path)!r}: expected YAML, got {' '.join(str(error).split())}") from error
    if document is None or document.tag == f"{_YAML_TAG}null":
        return {}
    if not isinstance(document, yaml.MappingNode):
        raise UsageError(f"config: {str(path)!r}: expected a mapping of field to value, got {_kind_of(document)}")
    values: dict[str, Any] = {}
    for key_node, node in document.value:
        key = str(key_node.value)
        if key in values:
            raise UsageError(f"{path}: key {key!r} is given twice")
        if key not in kinds:
            raise UsageError(f"{path}: unknown key {key!r}{_suggestion(key, kinds)}")
        try:
            is_list = key in several and isinstance(node, yaml.SequenceNode)
            values[key] = _join_list(key, node) if is_list else _convert_node(key, node, kinds[key])
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
    return values


def _join_list(name: str, node: yaml.SequenceNode) -> str:
    """Several texts as the command line has them."""
    values = [_convert_node(name, item, str) for item in node.value]
    expect(not any("," in value for value in values), name, values, "values without commas in a list")
    return ",".join(values)


def _convert_node(name: str, node: yaml.Node, kind: Any) -> Any:
    if not isinstance(node, yaml.ScalarNode):
        raise UsageError(f"{name}: expected {_expectation(kind)}, got {_kind_of(node)}")
    tag = node.tag.removeprefix(_YAML_TAG)
    if kind is bool:
        value = yaml.SafeLoader.bool_values.get(node.value.lower()) if tag == "bool" else None
        expect(value is not None, name, node.value, _expectation(kind))
        return value
    # A bare no is false to YAML and a bare ~ is null: which was meant is not guessed.
    is_plain = tag in ("str", "int", "float", "timestamp")
    expect(is_plain, name, node.value, "text in quotes" if kind is str else _expectation(kind))
    return _convert(name, node.value, kind)


def _kind_of(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return "a single value"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"


def _convert(name: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if get_origin(kind) is Literal:
        expect(text in get_args(kind), name, text, _expectation(kind))
        return text
    try:
        value = kind(text)
        is_number = math.isfinite(value)
    except (ValueError, OverflowError):
        is_number = False
    expect(is_number, name, text, _expectation(kind))
    return value


def _expectation(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _suggestion(name: str, kinds: dict[str, Any]) -> str:
    close = difflib.get_close_matches(name, kinds, n=1)
    return f"; did you mean {close[0]}?" if close else ""
