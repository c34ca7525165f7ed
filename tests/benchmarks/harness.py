"""What the benchmarks share: children with memory of their own, rates, and the tables of the READMEs."""

import json
import os
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


def speed(times: list[float]) -> dict[str, float]:
    """Seconds an update between the end of the last warm-up update and the end of the last one."""
    seconds = times[-1] - times[WARM_UPDATES - 1]
    return {"updates": len(times), "seconds_per_update": seconds / (len(times) - WARM_UPDATES)}


def peak_bytes() -> int:
    """Largest resident memory of this program; getrusage would count what its parent had before it started."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def commit_of_the_tree() -> str:
    """Short name of the commit, marked where files differ from it."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(describe, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


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
