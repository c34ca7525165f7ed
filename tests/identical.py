"""Run the training pages of this checkout and of another one, and say where their results are not equal to the bit.

    python tests/identical.py ../before
    python tests/identical.py ../before --pages gpt/pretrain.py bert/pretrain.py --keep /tmp/identical

Each page makes six updates with its own defaults (those that fine-tune start from an update of the page that
pre-trains) in three ways: with one process, killed after update 3 and continued;
with two processes, stopped by SIGTERM and continued; and as a dry run. Compared are exit statuses, last lines, the
table before training, and all of the run folder but clocks, rates and versions: metrics, weights, optimizer, samples,
images, card. The runs go side by side, each on a core of its own, so that all add numbers up in the same order. With
--keep they stay, and those of a clean checkout are not made again. Tokenizers are common to both sides, for the trainer
of WordPiece numbers its tokens in another order each time.
"""

import argparse
import hashlib
import json
import os
import queue
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import yaml

HERE = Path(__file__).resolve().parents[1]
# Page -> samples of a quarter of its global batch, so that one process accumulates and two do so less.
PAGES = {
    "gpt/pretrain.py": 3,
    "bert/pretrain.py": 8,
    "resnet/pretrain.py": 32,
    "resnet/pretrain_rsb.py": 32,
    "text_to_image/train_vae.py": 2,
    "text_to_image/pretrain.py": 4,
    "text_to_image/pretrain_transformer.py": 4,
    "bert/finetune.py": 8,
    "gpt/finetune.py": 4,
    "resnet/finetune.py": 8,
}
CADENCE = ("--max_steps=6", "--warmup_steps=2", "--log_every=1", "--eval_every=3", "--save_every=3")
# Of run.json, of a checkpoint's state and of metrics.jsonl: what no two runs have alike.
VOLATILE = ("run_id", "started", "git_commit", "training_seconds", "versions", "hardware", "command")
RATES = ("perf/",)
SIGNALLED_AT = 1  # entries of metrics.jsonl after which SIGTERM is sent


def run_page(checkout: Path, page: str, folder: Path, core: int) -> None:
    """Make the page's runs of one checkout below `folder`, on one core."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)
    flags = [*CADENCE, f"--per_device_batch_size={PAGES[page]}"]
    home = {"HF_HOME": str(folder.parent / "home"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    start = Starter(checkout, home, core)
    own, common = folder.parent / "home/pretraining_recipes/tokenizers", folder.parents[1] / "tokenizers"
    if not own.is_symlink():
        own.parent.mkdir(parents=True, exist_ok=True)
        common.mkdir(parents=True, exist_ok=True)
        own.symlink_to(common)
    recipe = str(checkout / "recipes" / page)
    if page.endswith("finetune.py"):
        pretrain, trained = recipe.replace("finetune", "pretrain"), f"--output_dir={folder / 'init'}"
        once = ["--max_steps=1", "--warmup_steps=0", "--eval_every=0", "--save_every=0", trained]
        start([sys.executable, pretrain, *once], folder / "init.log")
        flags.append(f"--init={folder / 'init'}")

    flags_of = {name: [*flags, f"--output_dir={folder / name}"] for name in ("one", "two", "dry")}
    start([sys.executable, recipe, *flags_of["one"]], folder / "one killed.log", FAULT="after_rename:3")
    start([sys.executable, recipe, *flags_of["one"]], folder / "one.log")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port=0"]
    launch += ["--config_file", str(checkout / "accelerate_configs/multi_cpu.yaml"), "--num_processes=2", recipe]
    metrics = folder / "two" / "metrics.jsonl"
    start([*launch, *flags_of["two"]], folder / "two stopped.log", until=lambda: num_lines(metrics) >= SIGNALLED_AT)
    start([*launch, *flags_of["two"]], folder / "two.log")
    start([sys.executable, recipe, "--dry_run", *flags_of["dry"]], folder / "dry.log")


class Starter:
    """Runs commands in an empty folder, on one core, and writes exit status and output to a file."""

    def __init__(self, checkout: Path, environment: dict[str, str], core: int) -> None:
        self._checkout, self._environment, self._core = checkout, environment, core

    def __call__(
        self, command: list[str], log: Path, until: Callable[[], bool] = lambda: False, **environment: str
    ) -> None:
        """Run to the end, or send SIGTERM once `until` holds and wait for the end."""
        log.parent.mkdir(parents=True, exist_ok=True)
        everything = {**os.environ, **self._environment, **environment}
        with tempfile.TemporaryDirectory() as empty, tempfile.TemporaryFile("w+") as output:
            process = subprocess.Popen(
                command, cwd=empty, env=everything, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT
            )
            psutil.Process(process.pid).cpu_affinity([self._core])
            while process.poll() is None and not until():
                time.sleep(0.02)
            if process.poll() is None:
                process.terminate()
            status = process.wait(timeout=600)
            output.seek(0)
            log.write_text(f"exit status {status}\n{output.read()}")


def num_lines(file: Path) -> int:
    """Lines of a file that may not be there yet."""
    return len(file.read_text().splitlines()) if file.is_file() else 0


# ----------------------------------------------------------------------------------------------------------------------
# Comparing


def content(folder: Path, translate: Callable[[str], str]) -> dict[str, Any]:
    """What is compared of a page's runs: name -> value."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = translate(file.relative_to(folder).as_posix())
        found |= {f"{name}: {part}": value for part, value in parts(file, folder, translate)}
    return found


def parts(file: Path, folder: Path, translate: Callable[[str], str]) -> Iterator[tuple[str, Any]]:
    """Parts of a file and what they hold, without what no two runs have alike."""

    def read(text: Path) -> str:
        return translate(text.read_text().replace(str(folder), "RUNS"))

    if file.name == "metrics.jsonl":
        for entry in map(json.loads, read(file).splitlines()):
            kept = {key: value for key, value in entry.items() if not key.startswith(RATES)}
            yield f"step {entry['step']}", (sorted(entry), kept)
    elif file.name in ("run.json", "state.json"):
        entry = json.loads(read(file))
        yield from without_volatile(entry.get("state", {}) | {key: entry[key] for key in entry if key != "state"})
    elif file.name == "config.yaml" and file.parent.name in ("init", "one", "two"):
        entry = yaml.safe_load(read(file))
        yield from ((key, value) for key, value in entry.items() if key != "output_dir")
    elif file.suffix == ".log":
        yield "lines", said(read(file))
    elif file.name == "README.md":
        yield "text", clockless(read(file))
    elif file.suffix == ".txt":
        yield "text", read(file)
    elif file.name in ("config.json", "model_index.json"):
        entry = json.loads(read(file))
        yield "content", {key: value for key, value in entry.items() if key != "_name_or_path"}  # of the checkout
    elif file.name in ("manifest.json", "recipe.py", "loss.png", ".lock") or "profile" in file.parts:
        yield "is there", True  # sums of state.json, whose clocks differ; the page; drawn with the same numbers
    else:
        yield "sha256", hashlib.sha256(file.read_bytes()).hexdigest()


def without_volatile(entry: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """The entry, of volatile keys that they are there."""
    yield from ((key, "is there" if key in VOLATILE else value) for key, value in entry.items())


def said(log: str) -> list[str]:
    """Exit status, the table before training, and the last line, without clocks and what libraries say."""
    lines = log.splitlines()
    ours = [
        line for line in lines if re.match(r"(error|stopped|exit status|flops|parameters|engine|\w+_per_\w+) ?", line)
    ]
    stopped = [re.sub(r"step \d+ of", "step N of", " ".join(line.split())) for line in ours]
    return [line for line in stopped if "time" not in line]


def clockless(card: str) -> str:
    """A model card without clocks, commit and versions."""
    for pattern in (r"[\d,]+ s of training", r",\s+commit\s+`\w+`", r"(?m)^Versions: .*$", r"on \d+ cores of .*"):
        card = re.sub(pattern, "", card)
    return card


def translator(words: list[str]) -> Callable[[str], str]:
    """Puts new words in the place of old ones, given as old=new."""
    pairs = [tuple(word.split("=", 1)) for word in words]

    def translate(text: str) -> str:
        for old, new in pairs:
            text = text.replace(old, new).replace(old.capitalize(), new.capitalize())
        return text

    return translate


def compare(page: str, ours: dict[str, Any], others: dict[str, Any]) -> list[str]:
    """A line for each difference."""
    lines = []
    for name in sorted(ours.keys() | others.keys()):
        if (value := ours.get(name, "absent")) != (other := others.get(name, "absent")):
            lines.append(f"{page}: {name}:\n    here  {str(value)[:200]}\n    there {str(other)[:200]}")
    return lines


def main() -> int:
    """Run both checkouts and print the table; 1 if something differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other checkout")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES), help="those to compare")
    parser.add_argument("--keep", type=Path, help="folder in which the runs stay; runs of clean checkouts are kept")
    parser.add_argument("--words", nargs="*", default=[], help="what was renamed, as old=new")
    arguments = parser.parse_args()
    base = (arguments.keep or Path(tempfile.mkdtemp(prefix="identical_"))).resolve()
    checkouts = (HERE, arguments.other.resolve())
    runs = {checkout: base / runs_name(checkout, place) for place, checkout in enumerate(checkouts)}
    translate, problems = translator(arguments.words), []
    cores: queue.SimpleQueue[int] = queue.SimpleQueue()
    for core in sorted(os.sched_getaffinity(0)):
        cores.put(core)

    def make(checkout: Path, page: str) -> dict[str, Any]:
        folder = runs[checkout] / page.replace("/", "-")
        if runs[checkout].name.startswith("changed") or not (folder / "dry.log").is_file():
            core = cores.get()
            run_page(checkout, page, folder, core)
            cores.put(core)
        return content(folder, translate)

    with ThreadPoolExecutor(cores.qsize()) as pool:
        waiting = {page: [pool.submit(make, checkout, page) for checkout in checkouts] for page in arguments.pages}
        for page, both in waiting.items():
            ours, others = (each.result() for each in both)
            differences = compare(page, ours, others)
            print(f"{page:<40} {len(ours):>4} parts  {len(differences) or 'none'} differ", flush=True)  # noqa: T201
            problems += differences
    print(*problems, sep="\n")  # noqa: T201
    return int(bool(problems))


def runs_name(checkout: Path, place: int) -> str:
    """Name of the folder for a checkout's runs: its commit if it is clean, else one that says that it is not."""
    git = ["git", "-C", str(checkout)]
    changes = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout.strip()
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    return commit[:12] if commit and not changes else f"changed-{place}"


if __name__ == "__main__":
    sys.exit(main())
