"""What the benchmarks share: children with memory of their own, rates, and the tables of the READMEs."""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
MARKERS = ("<!-- benchmark -->", "<!-- /benchmark -->")
WARM_UPDATES = 5  # not counted in rates
GPU_WARM_UPDATES = 10
EMBEDDED_PROSE = {"data": "prose", "data_config": "", "text_column": "", "tokenizer": ""}  # needs no network
OUTPUT = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
Row = tuple[str, str, str]  # what, measured, goal


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)  # noqa: T201 (the output of a command)


def environment() -> dict[str, str]:
    """The environment of every child: a CPU benchmark, also where there is a GPU."""
    return {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1"}


def in_child(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Call a function of the program that runs in a new process; the program must pass --child to `answer_child`."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder, "answer.json")
        request = json.dumps([function.__name__, arguments, str(answer)])
        execute([sys.executable, sys.argv[0], "--child", request])
        return json.loads(answer.read_text())


def answer_child(request: str, functions: list[Callable]) -> None:
    """The other end of `in_child`."""
    name, arguments, answer = json.loads(request)
    result = {function.__name__: function for function in functions}[name](**arguments)
    Path(answer).write_text(json.dumps(result))


def execute(command: list[str]) -> float:
    """Run to the end and return the seconds it took; show the output of a command that fails."""
    started = time.perf_counter()
    done = subprocess.run(command, **OUTPUT, env=environment(), check=False)
    if done.returncode:
        raise SystemExit(f"{done.stdout[-4000:]}\nexit status {done.returncode}: {' '.join(command)}")
    return time.perf_counter() - started


def load_recipe(path: Path, flags: list[str]) -> tuple[Any, Any]:
    """A recipe as a module, and its config from `flags`."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)
    return recipe, recipe.cli.parse(recipe.Config, flags)


class EnoughUpdates(Exception):
    """Leaves a recipe's loop."""


def update_times(recipe: Any, cfg: Any, updates: int) -> list[float]:
    """When each update of the recipe's own `main()` ended; it is left after so many, and runs to its end with 0.

    Raises:
        SystemExit: it ended before.
    """
    times: list[float] = []
    train_update = recipe.train_update

    def counted(*args: Any) -> Any:
        result = train_update(*args)
        times.append(time.perf_counter())
        if len(times) == updates:
            raise EnoughUpdates
        return result

    recipe.train_update = counted
    with contextlib.suppress(EnoughUpdates):
        recipe.main(cfg)
    if len(times) < updates:
        raise SystemExit(f"the recipe ended before {updates} updates")
    return times


def speed(times: list[float]) -> dict[str, float]:
    """Seconds an update between the end of the last warm-up update and the end of the last one."""
    seconds = times[-1] - times[WARM_UPDATES - 1]
    return {"updates": len(times), "seconds_per_update": seconds / (len(times) - WARM_UPDATES)}


def peak_bytes() -> int:
    """Largest resident memory of this program; getrusage would count what its parent had before it started."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def run_on_gpu(family: str, config: str, updates: int, per_device_batch_size: int, **flags: Any) -> dict[str, Any]:
    """Run a configuration of a recipe on one GPU.

    Args:
        family: of the recipe.
        config: in its configs/.
        updates: more than `GPU_WARM_UPDATES`.
        per_device_batch_size: of a micro-batch; 0 = the configuration's.
        flags: fields to change, the data among them.

    Returns:
        What run.json says, and the medians of perf/ metrics and of the seconds of an update, over the updates after
        `GPU_WARM_UPDATES`, which compile and warm up.
    """
    recipe = ROOT / "recipes" / family / "pretrain.py"
    launch = [sys.executable, "-m", "accelerate.commands.launch"]
    launch += ["--config_file", str(ROOT / "accelerate_configs" / "single_gpu.yaml"), str(recipe)]
    with tempfile.TemporaryDirectory(prefix=f"{family}_gpu_") as folder:
        run_dir = Path(folder, config)
        flags |= {"config": recipe.parent / "configs" / f"{config}.yaml", "output_dir": run_dir}
        flags |= {"max_steps": 10 * updates, "warmup_steps": 5, "log_every": 1, "eval_every": 0, "save_every": 0}
        if per_device_batch_size:
            flags["per_device_batch_size"] = per_device_batch_size
        lines = first_lines([*launch, *(f"--{name}={value}" for name, value in flags.items())], run_dir, updates)
        record = json.loads((run_dir / "run.json").read_text())
    entries = [json.loads(line) for line in lines]
    ends = [entry["perf/training_seconds"] for entry in entries]
    seconds = [ended - begun for begun, ended in itertools.pairwise(ends[GPU_WARM_UPDATES - 1 :])]
    warm = entries[GPU_WARM_UPDATES:]
    medians = {key: statistics.median(entry[key] for entry in warm) for key in warm[-1] if key.startswith("perf/")}
    return {**record, **medians, "seconds_per_update": statistics.median(seconds)}


def first_lines(command: list[str], run_dir: Path, number: int) -> list[str]:
    """Run a recipe until it has logged so often; it is killed then, since its checkpoint may take minutes to write."""
    metrics, lines = run_dir / "metrics.jsonl", []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        while len(lines) < number:
            if process.poll() is not None:
                raise SystemExit(f"exit status {process.returncode}: {' '.join(command)}")
            time.sleep(1)
            lines = metrics.read_text().splitlines() if metrics.exists() else []
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return lines[:number]


def measure_parts(
    readme: Path, parts: dict[str, Callable], facts: dict[str, Any], options: argparse.Namespace, folder: Path
) -> None:
    """Measure `options.parts`, print their rows, and keep them in the README and the raw numbers in a file.

    Args:
        readme: has the markers between which its table stands.
        parts: by name, what measures one: facts, options, folder -> raw numbers, rows.
        facts: what the parts need; hardware among them.
        options: of the command line: parts, and seconds, for which a run is scaled down.
        folder: for runs and the raw numbers.
    """
    commit, program = commit_of_the_tree(), Path(sys.argv[0]).name
    program += f" --family {options.family}" if hasattr(options, "family") else ""
    say(f"{facts['hardware']}, commit {commit}, {facts['parameters']} parameters")
    raw: dict[str, Any] = {"commit": commit, "facts": facts}
    lines = {}
    for part in options.parts.split(","):
        raw[part], rows = parts[part](facts, options, folder)
        (folder / "benchmark.json").write_text(json.dumps(raw, indent=1))
        for what, measured, goal in rows:
            command = f"`python tests/benchmarks/{program} --parts {part}`"
            lines[what] = f"| {what} | {measured} | {goal} | {command} | {commit} | {facts['hardware']} |"
            say(f"{what}: {measured}, goal {goal}")
    if options.seconds:
        say("scaled down by --seconds: the README is left alone")
    elif not write_readme(readme, lines):
        say(f"{readme} has no {' and '.join(MARKERS)}: nothing written there")
    say(f"raw numbers: {folder / 'benchmark.json'}")


def read_options(about: str, parts: dict[str, Callable], learning_rates: str) -> argparse.Namespace:
    """The command line of a benchmark that compares a recipe with another loop."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(parts), help="which to measure, with commas; default: %(default)s")
    parser.add_argument("--seconds", type=float, default=0.0, help="training seconds of a run, to try this out")
    parser.add_argument("--learning_rates", default=learning_rates, help="of the other loop; default: %(default)s")
    parser.add_argument("--child", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.parts.split(",")) - set(parts):
        parser.error(f"--parts: no such part: {', '.join(sorted(unknown))}; expected some of {', '.join(parts)}")
    return options


def commit_of_the_tree() -> str:
    """Short name of the commit, marked where files differ from it."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    with contextlib.suppress(OSError):  # there is no git
        return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"
    return "unknown"


def write_readme(readme: Path, lines: dict[str, str]) -> bool:
    """Put table lines, by their first cell, between the README's markers; those of other parts stay."""
    text = readme.read_text() if readme.is_file() else ""
    if any(marker not in text for marker in MARKERS):
        return False
    before, rest = text.split(MARKERS[0], 1)
    table, after = rest.split(MARKERS[1], 1)
    old = {line.split("|")[1].strip(): line for line in table.splitlines()[1:] if line.startswith("| ")}
    old = {what: line for what, line in old.items() if what != "what"}
    header = "| what | measured | goal | command | commit | hardware |\n|---|---|---|---|---|---|"
    body = "\n".join({**old, **lines}.values())
    readme.write_text(f"{before}{MARKERS[0]}\n\n{header}\n{body}\n\n{MARKERS[1]}{after}")
    return True
