r"""How many labels is pre-training worth? Fine-tuning with few labels and with many, against all that could explain it.

Arms, all on the same labels and seeds: the pre-trained model fine-tuned; the same network from new weights, tuned as
much and trained for as many updates; new weights that get pre-training's compute as well (He et al. 2019); weights
shuffled within each tensor, which have the scale of pre-trained ones and none of their features (Raghu et al. 2019);
frozen features of the pre-trained and of the new weights; a classical classifier; the most frequent class. What
pre-training is worth is said in labels (Hernandez et al. 2021: effective data transferred).

Each cell of the grid is a run of finetune.py, a line of index.jsonl. First those that choose the rates, then the
others, they may be run in any order, also on other machines that see the folder; what is there is not run again.

    python recipes/label_efficiency.py
    python recipes/label_efficiency.py --family resnet --output_dir outputs/emoji_labels
    python recipes/label_efficiency.py --cell $SLURM_ARRAY_TASK_ID
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared.command_line import Limit, Place
from shared.fields import Count, Natural

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config:
    """What is compared, and how much of it."""

    config: Place = ""
    """YAML file with some of the fields below."""
    output_dir: Place = "outputs/label_efficiency"
    """Folder for the cells, the table and the picture."""

    # Data
    family: Literal["bert", "resnet"] = "bert"
    """Whose finetune.py runs the cells."""
    task: str = ""
    """Fields of finetune.py that say what is learnt, such as "data=my.csv label_column=stars". "" = the embedded
    supersenses, or the emoji's groups."""
    test_split: str = ""
    """Split that scores are of; no choice is made by it. "" = test, of the emoji test_unseen_concept."""
    labels_per_class: str = "2,5,10,25,100,0"  # Numbers of labels of each class, rising. 0 = all, the last one.
    compute_labels: str = "25,0"  # Those of them at which new weights get pre-training's compute too. "" = none.

    # Model
    init: Place = ""  # Run folder of the pre-trained model. "" = outputs/bert or outputs/resnet.

    # Optimization
    max_steps: Count = 300  # Updates of fine-tuning, however many labels there are.
    all_steps: Count = 1000  # The same where all labels are taken.
    learning_rates: str = "3e-4,1e-3,3e-3"  # From which each arm chooses, by a fifth of the labels that there are.
    seeds: Annotated[int, Limit(lambda value: value >= 2, "at least 2")] = 5
    """Seeds, each with labels, order and new weights of its own."""

    # Run
    cell: Annotated[int, Limit(lambda value: value >= -1, "a line of index.jsonl from 0, or -1")] = -1
    """The only cell to run, such as that of a Slurm task. -1 = all that are missing, and then the report."""
    jobs: Natural = 0  # Cells side by side. 0 = one on each GPU, or on each core where it can be kept to it.
    readme: Place = ""
    """File that gets the table between the lines <!-- label efficiency NAME --> and <!-- /label efficiency NAME -->,
    where NAME is the last part of output_dir. "" = none."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import hashlib
import importlib.util
import json
import os
import queue
import shlex
import shutil
import subprocess
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor

import accelerate
import numpy as np
import torch
import transformers
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from shared.data.batches import IGNORED
from shared.data.randomness import derive_seed
from shared.data.subsets import held_out_of_each
from shared.images.crops import CenterCrops
from shared.metrics import figures
from shared.metrics.transfer import Interval, Worth, labels_worth, paired_bootstrap, t_interval
from shared.models.pretrained import load_pretrained
from shared.run.folder import hardware, write_json, write_text
from shared.run.predictions import read_predictions
from shared.runtime.atomic_folder import one_at_a_time

TUNING_SEEDS, TUNING_FRACTION = 2, 0.2
TASKS = {  # fields, and the split to test on
    "bert": ("data={samples}/supersenses", "test"),
    "resnet": ("data={samples}/emoji label_column=group", "test_unseen_concept"),
}
STRENGTHS = {"bert": (1.0, 10.0, 100.0), "resnet": (0.001, 0.01, 0.1)}  # of logistic regression, to choose from
CLASSICAL = {"bert": "TF-IDF and logistic regression", "resnet": "pixels and logistic regression"}
SMALL_IMAGE = 16  # side in pixels of what logistic regression sees
PATIENCE, EVALUATIONS = 10, 100  # of the arm with pre-training's compute: evaluations it waits, and has in all
ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "shared" / "samples"


class Cell(NamedTuple):
    """One run of finetune.py; its rate is 0 where tuning chooses it."""

    number: int
    arm: str
    labels: int
    seed: int
    rate: float


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say."""
    cli.check_limits(cfg)
    numbers, longer = sizes_of(cfg)
    is_rising = numbers == sorted(numbers, key=lambda number: number or np.inf) and len(set(numbers)) == len(numbers)
    is_right = is_rising and 1 not in numbers  # of one label a class none can be held out to choose a rate
    cli.expect(is_right, "labels_per_class", cfg.labels_per_class, "rising numbers from 2 on, 0 = all the last one")
    cli.expect(set(longer) <= set(numbers), "compute_labels", cfg.compute_labels, "some of labels_per_class")
    is_named = all("=" in field and field[0] != "-" for field in shlex.split(cfg.task))
    cli.expect(is_named, "task", cfg.task, "name=value for each field, with blanks between them")
    cli.positive_numbers("learning_rates", cfg.learning_rates, cfg.learning_rates.count(",") + 1)
    record = Path(init_of(cfg)) / "run.json"
    is_finished = record.is_file() and "training_flops" in json.loads(record.read_text(encoding="utf-8"))
    cli.expect(is_finished, "init", init_of(cfg), "the folder of a finished pre-training run")
    if cfg.readme:
        parts_around(Path(cfg.readme), f"label efficiency {Path(cfg.output_dir).name}")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    cli.expect(processes == 1, "WORLD_SIZE", processes, "one process, which starts those of the cells: use python")


def sizes_of(cfg: Config) -> tuple[list[int], list[int]]:
    """Numbers of labels of each class, and those of them at which new weights get pre-training's compute."""
    numbers = cli.whole_numbers("labels_per_class", cfg.labels_per_class, least=0)
    return numbers, cli.whole_numbers("compute_labels", cfg.compute_labels, least=0) if cfg.compute_labels else []


def init_of(cfg: Config) -> str:
    """The run folder that fine-tuning starts from."""
    return cfg.init or f"outputs/{cfg.family}"


# ----------------------------------------------------------------------------------------------------------------------
# The grid


def plan(cfg: Config) -> list[Cell]:
    """All cells: first those by which the rates are chosen, then those that are compared."""
    (sizes, longer), rates = sizes_of(cfg), cfg.learning_rates.split(",")
    tuning = [
        (f"{arm} tuning", labels, seed, float(rate))
        for labels in sizes
        for arm in ("pretrained", "scratch")
        for rate in rates
        for seed in range(TUNING_SEEDS)
    ]
    compared = [
        (arm, labels, seed, 0.0)
        for labels in sizes
        for arm in ("pretrained", "scratch", "shuffled")
        for seed in range(cfg.seeds)
    ]
    compared += [("scratch with compute", labels, seed, 0.0) for labels in longer for seed in range(cfg.seeds)]
    return [Cell(number, *rest) for number, rest in enumerate(tuning + compared)]


def steps_of(cfg: Config, cell: Cell) -> int:
    """Updates of a cell, without those of pre-training's compute."""
    return cfg.max_steps if cell.labels else cfg.all_steps


def command(cfg: Config, cell: Cell, rate: str, max_steps: int) -> list[str]:
    """The program of a cell, without its output folder."""
    pretrained, (embedded, split) = init_of(cfg), TASKS[cfg.family]
    task, split = (cfg.task, "test") if cfg.task else (embedded.format(samples=shlex.quote(str(SAMPLES))), split)
    test_split = cfg.test_split or split
    new = (
        ["--init", "scratch", "--tokenizer", pretrained]
        if cfg.family == "bert"
        else ["--init", pretrained, "--scratch"]
    )
    start = {
        "pretrained": ["--init", pretrained],
        "shuffled": ["--init", str(Path(cfg.output_dir) / "shuffled")],
    }.get(cell.arm.removesuffix(" tuning"), new)
    flags = {"seed": cell.seed, "learning_rate": rate}
    flags |= {"max_steps": max_steps, "warmup_steps": steps_of(cfg, cell) // 10}
    flags |= {"labels_per_class": cell.labels, "eval_every": 0, "save_every": 0}
    own_labels = {"eval_split": "train", "eval_fraction": TUNING_FRACTION}
    if cell.arm == "scratch with compute":
        every = max(1, max_steps // EVALUATIONS)
        flags |= {**own_labels, "test_split": test_split, "eval_every": every, "patience": PATIENCE}
    elif cell.arm.endswith("tuning"):
        flags |= own_labels
    else:
        flags["eval_split"] = test_split  # evaluated once, at the end, so that nothing is chosen by it
    probe = ["--probe"] if cell.arm in ("pretrained", "scratch") else []
    named = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    return [f"recipes/{cfg.family}/finetune.py", *(f"--{field}" for field in shlex.split(task)), *start, *named, *probe]


def write_index(cfg: Config, cells: list[Cell]) -> None:
    """Write index.jsonl, or see that the folder's is the same."""
    weights = hashlib.sha256((Path(init_of(cfg)) / "model.safetensors").read_bytes()).hexdigest()[:16]
    lines = []
    for cell in cells:
        program = command(cfg, cell, f"{cell.rate or 'CHOSEN'}", steps_of(cfg, cell))
        lines.append(json.dumps({**cell._asdict(), "weights_of_init": weights, "command": shlex.join(program)}))
    text, file = "".join(f"{line}\n" for line in lines), Path(cfg.output_dir) / "index.jsonl"
    with one_at_a_time(file, "output_dir"):
        if not file.is_file():
            write_text(file, text)
        same = file.read_text(encoding="utf-8") == text
    cli.expect(same, "output_dir", cfg.output_dir, "an empty folder, it holds another study, or one of other weights")


# ----------------------------------------------------------------------------------------------------------------------
# Cells


def result_file(cfg: Config, cell: Cell) -> Path:
    """Where what a cell found is kept; there once it is done."""
    return Path(cfg.output_dir) / "cells" / f"{cell.number:04}.json"


def read_result(cfg: Config, cell: Cell) -> dict[str, Any]:
    """What a cell found: score, probe, seconds, and of each item of the test split whether the answer is right."""
    return json.loads(result_file(cfg, cell).read_text(encoding="utf-8"))


def run_cell(cfg: Config, cells: list[Cell], cell: Cell, environment: dict[str, str]) -> None:
    """Run a cell, or find it done, and keep what it found. A cell that was stopped goes on where it was.

    Raises:
        UsageError: cells by which its rate is chosen are missing, or the program failed.
    """
    file, folder = result_file(cfg, cell), Path(cfg.output_dir) / "running" / f"{cell.number:04}"
    with one_at_a_time(folder, "output_dir") as lock:
        if file.is_file():
            return
        rate = cell.rate or chosen_rate(cfg, cells, cell)
        more = steps_of_compute(cfg, cells, cell) if cell.arm == "scratch with compute" else 0
        program = [sys.executable, *command(cfg, cell, f"{rate:g}", steps_of(cfg, cell) + more)]
        program[1] = str(ROOT / program[1])
        program += ["--output_dir", str(folder.absolute())]
        # The program holds the lock too, so that one that outlives its parent is not started twice.
        shared = {"pass_fds": [lock.fileno()]} if os.name == "posix" else {}
        done = subprocess.run(program, capture_output=True, text=True, check=False, env=environment, **shared)
        if done.returncode:
            said = " ".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-1:])
            raise cli.UsageError(
                f"cell {cell.number} ended with status {done.returncode}: {said}: {shlex.join(program)}"
            )
        record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        labels, answers = read_predictions(folder)
        found = {name: record[name] for name in ("knn_accuracy", "linear_probe_accuracy", "steps") if name in record}
        found["flops_of_update"] = record["training_flops"] / record["steps"]
        found["right"] = "".join(str(int(label == answer)) for label, answer in zip(labels, answers, strict=True))
        score = record["evaluation"]["test/accuracy" if more else "eval/accuracy"]  # tuning sees held-out labels alone
        file.parent.mkdir(exist_ok=True)
        write_json(file, {**cell._asdict(), "chosen_rate": rate, "accuracy": score, **found})
        shutil.rmtree(folder)
    amount = cell.labels or "all"
    sys.stdout.write(f"cell {cell.number} of {len(cells)}: {cell.arm}, {amount} labels a class: {score:.3f}\n")
    sys.stdout.flush()


def chosen_rate(cfg: Config, cells: list[Cell], cell: Cell) -> float:
    """The rate with the best mean score on held-out labels; shuffled weights take that of pre-trained ones."""
    arm = "pretrained" if cell.arm in ("pretrained", "shuffled") else "scratch"
    tuning = [other for other in cells if other.arm == f"{arm} tuning" and other.labels == cell.labels]
    missing = [other.number for other in tuning if not result_file(cfg, other).is_file()]
    cli.expect(not missing, "cell", cell.number, f"cells {missing} to be done first, which choose its rate")
    scores: dict[float, list[float]] = {}
    for other in tuning:
        scores.setdefault(other.rate, []).append(read_result(cfg, other)["accuracy"])
    return max(scores, key=lambda rate: (np.mean(scores[rate]), -rate))


def steps_of_compute(cfg: Config, cells: list[Cell], cell: Cell) -> int:
    """Updates of fine-tuning that cost as many floating-point operations as pre-training did."""
    tuning = next(other for other in cells if other.arm == "scratch tuning" and other.labels == cell.labels)
    record = json.loads((Path(init_of(cfg)) / "run.json").read_text(encoding="utf-8"))
    return round(record["training_flops"] / read_result(cfg, tuning)["flops_of_update"])


def write_shuffled(cfg: Config) -> None:
    """A copy of the pre-trained model whose weights are permuted within each tensor."""
    folder = Path(cfg.output_dir) / "shuffled"
    if (folder / "config.yaml").is_file():
        return
    aside = folder.with_name(f".shuffled_{uuid.uuid4().hex}")
    shutil.copytree(
        init_of(cfg), aside, ignore=shutil.ignore_patterns("checkpoints", "samples", "figures", "tensorboard")
    )
    classes = {"bert": transformers.AutoModelForPreTraining, "resnet": transformers.AutoModelForImageClassification}
    model = load_pretrained(classes[cfg.family], str(aside), "init")
    draw = torch.Generator().manual_seed(derive_seed(0, "shuffled weights"))
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=draw)].view_as(weight))
    model.save_pretrained(aside)
    try:
        aside.rename(folder)
    except OSError:  # another machine was faster
        shutil.rmtree(aside)


def run_cells(cfg: Config, cells: list[Cell], chosen: list[Cell]) -> None:
    """Run cells side by side, each on a GPU of its own, or on its share of the cores."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else [str(number) for number in range(torch.cuda.device_count())]
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    jobs = min(cfg.jobs or len(gpus) or len(cores) or 1, len(chosen))
    places: queue.Queue[int] = queue.Queue()
    for place in range(jobs):
        places.put(place)

    def run_there(cell: Cell) -> None:
        place = places.get()
        if cores and not gpus:
            os.sched_setaffinity(0, cores[place::jobs] or cores)  # of this thread, and of the program it starts
        try:
            device = {"CUDA_VISIBLE_DEVICES": gpus[place % len(gpus)]} if gpus else {}
            run_cell(cfg, cells, cell, {**os.environ, **device})
        finally:
            places.put(place)

    if any(cell.arm == "shuffled" for cell in chosen):
        write_shuffled(cfg)
    with ThreadPoolExecutor(jobs) as pool:
        started = [pool.submit(run_there, cell) for cell in chosen]
        try:
            for running in started:
                running.result()
        finally:
            pool.shutdown(cancel_futures=True)


# ----------------------------------------------------------------------------------------------------------------------
# Classical classifiers


def classical_scores(cfg: Config, cells: list[Cell]) -> dict[str, Any]:
    """Accuracies of logistic regression on words or pixels, a list for each number of labels, and of the majority."""
    file = Path(cfg.output_dir) / "classical.json"
    if not file.is_file():
        found: dict[str, Any] = {}
        for cell in (cell for cell in cells if cell.arm == "pretrained"):
            if not cell.labels and cell.seed:  # the same labels for every seed
                found["0"].append(found["0"][0])
                continue
            known, known_labels, asked, asked_labels = classical_samples(cfg, cell)
            fitted = fit_classical(cfg.family, known, known_labels)
            found.setdefault(str(cell.labels), []).append(float(fitted.score(asked, asked_labels)))
            found["majority"] = float(np.bincount(asked_labels).max() / len(asked_labels))
            found[f"labels {cell.labels}"] = len(known_labels) / len(np.unique(known_labels))
        write_json(file, found)
    return json.loads(file.read_text(encoding="utf-8"))


def classical_samples(cfg: Config, cell: Cell) -> tuple[Any, np.ndarray, Any, np.ndarray]:
    """What a cell trains on and what it is tested on: texts or pixels, and classes."""
    program, *flags = command(cfg, cell, "1", 1)
    specification = importlib.util.spec_from_file_location("finetune", ROOT / program)
    finetune = importlib.util.module_from_spec(specification)
    sys.modules["finetune"] = finetune
    specification.loader.exec_module(finetune)
    config = cli.parse(finetune.Config, flags)
    if cfg.family == "bert":
        _, train, evals = finetune.open_data(config)
        both = (train, evals["eval"])
        texts = [
            [" ".join(parts) for parts in (zip(some.texts, some.pairs, strict=True) if some.pairs else zip(some.texts))]
            for some in both
        ]
        return texts[0], train.labels, texts[1], evals["eval"].labels
    train, evals = finetune.open_data(config, accelerate.Accelerator())
    crops = [CenterCrops(some, SMALL_IMAGE, 1.0, len(some))[0] for some in (train, evals["eval"])]
    whole = [batch["labels"] != IGNORED for batch in crops]  # those that could be decoded
    labels = [batch["labels"][kept] for batch, kept in zip(crops, whole, strict=True)]
    pixels = [batch["pixel_values"][kept] / np.float32(255) for batch, kept in zip(crops, whole, strict=True)]
    known, asked = (images.reshape(len(images), -1) for images in pixels)
    return known, labels[0], asked, labels[1]


def fit_classical(family: str, samples: Any, labels: np.ndarray) -> Any:
    """Logistic regression, its strength of regularisation chosen as the rates are: by a fifth of the labels."""
    begin = TfidfVectorizer(ngram_range=(1, 2), sublinear_tf=True) if family == "bert" else StandardScaler()
    candidates = [make_pipeline(begin, LogisticRegression(C=strength, max_iter=1000)) for strength in STRENGTHS[family]]
    is_out = held_out_of_each(labels, TUNING_FRACTION)
    chosen = np.array(samples, dtype=object if family == "bert" else None)
    # Of two labels a class half of all classes are more than half of the samples, which it takes for numbers.
    warnings.filterwarnings("ignore", message="The number of unique classes")
    scores = [fit.fit(chosen[~is_out], labels[~is_out]).score(chosen[is_out], labels[is_out]) for fit in candidates]
    return candidates[int(np.argmax(scores))].fit(samples, labels)


# ----------------------------------------------------------------------------------------------------------------------
# Report


def report(cfg: Config, cells: list[Cell]) -> None:
    """Draw the picture, write table.md and summary.json, and say the table."""
    folder, name = Path(cfg.output_dir), Path(cfg.output_dir).name
    results = [read_result(cfg, cell) for cell in cells if not cell.arm.endswith("tuning")]
    (sizes, longer), classical = sizes_of(cfg), classical_scores(cfg, cells)
    labels = [classical[f"labels {size}"] for size in sizes]  # of each class, on average where all are taken

    def of(arm: str, size: int, value: str = "accuracy") -> list[Any]:
        return [result[value] for result in results if (result["arm"], result["labels"]) == (arm, size)]

    curves = {
        "pre-trained, fine-tuned": np.array([of("pretrained", size) for size in sizes]),
        "new weights, as many updates": np.array([of("scratch", size) for size in sizes]),
        "pre-trained weights shuffled within each tensor": np.array([of("shuffled", size) for size in sizes]),
    }
    for arm, features in (("pretrained", "pre-trained features"), ("scratch", "features of new weights")):
        for kind, value in (("linear probe", "linear_probe_accuracy"), ("20 nearest neighbours", "knn_accuracy")):
            curves[f"{features}, {kind}"] = np.array([of(arm, size, value) for size in sizes])
    curves[CLASSICAL[cfg.family]] = np.array([classical[str(size)] for size in sizes])
    ours, theirs, *_ = curves.values()
    right = {arm: [of(arm, size, "right") for size in sizes] for arm in ("pretrained", "scratch")}
    gains = [
        compare(labels, place, ours, theirs, right["pretrained"][place], right["scratch"][place])
        for place in range(len(sizes))
    ]
    rows = {row: [f"{scores.mean():.3f}" for scores in curve] for row, curve in curves.items()}
    of_longer = {size: (of("scratch with compute", size), of("scratch with compute", size, "steps")) for size in longer}
    if longer:
        rows["new weights, pre-training's compute too (updates until ended early, median)"] = [
            f"{np.mean(of_longer[size][0]):.3f} ({np.median(of_longer[size][1]):,.0f})" if size in longer else ""
            for size in sizes
        ]
    rows["the most frequent class"] = [f"{classical['majority']:.3f}"] * len(sizes)
    rows["pre-trained less new weights, over seeds"] = [describe_interval(gain["of_seeds"]) for gain in gains]
    rows["the same, over test items"] = [describe_interval(gain["of_items"]) for gain in gains]
    rows["seeds in which it is better"] = [f"{gain['better']} of {cfg.seeds}" for gain in gains]
    rows["worth, times the labels"] = [describe_worth(gain["worth"], labels, place) for place, gain in enumerate(gains)]
    heading = [f"{size}" if size else f"all ({number:.0f})" for size, number in zip(sizes, labels, strict=True)]
    table = "\n".join(
        f"| {' | '.join(row)} |"
        for row in (["labels a class", *heading], ["---"] * (len(sizes) + 1), *([row, *rows[row]] for row in rows))
    )
    write_text(folder / "table.md", f"{table}\n")
    finite = [{**gain, "worth": [factor if factor < np.inf else None for factor in gain["worth"]]} for gain in gains]
    write_json(folder / "summary.json", {"labels_per_class": labels, "gains": finite, "hardware": hardware()})
    needed = [(few, few * gain["worth"].factor, gain["mean"]) for few, gain in zip(labels, gains, strict=True)]
    gaps = [(few, many, score) for few, many, score in needed if few < many < np.inf]
    figures.label_curves(labels, curves, classical["majority"], gaps, folder / f"{name}.png")
    if cfg.readme:
        before, after = parts_around(Path(cfg.readme), f"label efficiency {name}")
        write_text(Path(cfg.readme), f"{before}\n{table}\n\n{after}")
    sys.stdout.write(f"{table}\npicture, table and summary: {folder}/\n")


def compare(
    labels: list[float], place: int, ours: np.ndarray, theirs: np.ndarray, our_right: list[str], their_right: list[str]
) -> dict[str, Any]:
    """What the pre-trained arm gains on new weights at one number of labels.

    Args:
        labels: of each class, of all sizes.
        place: of this one.
        ours: accuracies of the pre-trained arm (sizes, seeds).
        theirs: of new weights.
        our_right: of each seed, for each test item 1 where the answer is right, else 0.
        their_right: likewise.
    """
    right = [np.array([list(row) for row in rows]) == "1" for rows in (our_right, their_right)]
    differences = ours[place] - theirs[place]
    return {
        "mean": float(ours[place].mean()),
        "differences": differences.tolist(),
        "better": int((differences > 0).sum()),
        "of_seeds": t_interval(differences),
        "of_items": paired_bootstrap(*right),
        "worth": labels_worth(labels, theirs, place, ours[place]),
    }


def describe_interval(interval: Interval) -> str:
    """A difference and its bounds at 95 %."""
    return f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]"


def describe_worth(worth: Worth, labels: list[float], place: int) -> str:
    """A factor and its bounds; what lies beyond the numbers of labels that were measured is more or less than them."""
    least, most = labels[0] / labels[place], labels[-1] / labels[place]
    shown = [
        f"> {most:.1f}" if factor == np.inf else f"< {least:.1f}" if factor == 0 else f"{factor:.1f}"
        for factor in worth
    ]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def parts_around(file: Path, name: str) -> tuple[str, str]:
    """A file up to and with the line <!-- NAME -->, and from <!-- /NAME --> on.

    Raises:
        UsageError: they are not there, each once.
    """
    content, begin, end = file.read_text(encoding="utf-8"), f"<!-- {name} -->\n", f"<!-- /{name} -->"
    is_right = content.count(begin) == content.count(end) == 1
    cli.expect(is_right, "readme", str(file), f"a file with the lines {begin.strip()} and {end}")
    before, _, rest = content.partition(begin)
    return before + begin, end + rest.partition(end)[2]


def main(cfg: Config) -> None:
    """Run what is missing of the grid, and report on it."""
    check_config(cfg)
    cells = plan(cfg)
    write_index(cfg, cells)
    if cfg.cell >= 0:
        cli.expect(cfg.cell < len(cells), "cell", cfg.cell, f"a line of index.jsonl, from 0 to {len(cells) - 1}")
        run_cells(cfg, cells, [cells[cfg.cell]])
        return
    for is_tuning in (True, False):
        run_cells(cfg, cells, [cell for cell in cells if cell.arm.endswith("tuning") == is_tuning])
    report(cfg, cells)


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
