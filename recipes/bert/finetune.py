r"""Fine-tune a BERT, or any other encoder, on texts with labels: classes, numbers, or tags of words.

Papers: Devlin et al. 2019 (sections 4 and 5), Mosbach et al. 2021 (bias correction, and enough updates for few labels),
Howard and Ruder 2018 (rates by layer). With no arguments it starts from outputs/bert and learns which of 24 kinds of
thing a definition of WordNet is of; where that is not there, from a model that is shipped.

    accelerate launch recipes/bert/finetune.py
    accelerate launch recipes/bert/finetune.py --init google-bert/bert-base-uncased --task mnli
    accelerate launch recipes/bert/finetune.py --data my/reviews.csv --text_column review --label_column stars
"""

# Shapes: B texts of a micro-batch, T tokens of a row, C classes.
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, Natural, Share, ShareAboveZero, ShareInside

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.RunControl):
    """Fields of the method; RunControl has what every training stage has."""

    output_dir: Place = "outputs/bert_finetuned"
    eval_every: Natural = 250
    save_every: Natural = 250

    # Data
    task: Literal[
        *("supersenses", "hypernyms", "eras"),
        *("cola", "sst2", "mrpc", "qqp", "stsb", "mnli", "mnli_mismatched", "qnli", "rte", "wnli"),
    ] = "supersenses"
    """Embedded: supersenses (of a definition), hypernyms (is the first a kind of the second) or eras (when a president
    said it); or a task of GLUE."""
    data: Place = ""
    """A .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, with splits or without, or a Hub data set
    id.
    "" = that of `task`."""
    data_config: str = ""  # Configuration of a Hub data set. "" = its only one.
    data_split: str = "train"  # Split to train on.
    text_column: str = "text"  # Column of `data` with the text, or with lists of words whose labels are lists of tags.
    text_pair_column: str = ""  # Column of `data` with the second text. "" = there is none.
    label_column: str = "label"
    """Column of `data` with classes (names or whole numbers), numbers with a point, or lists of tags."""
    label_kind: Literal["auto", "classes", "numbers"] = "auto"
    """What labels are that are no lists: classes, numbers to predict, or auto = as they look."""
    labels_per_class: Natural = 0  # Labels of each class that there are, chosen by the seed. 0 = all.
    tokenizer: Place = ""  # Folder or Hub id. "" = the one of `init`.
    seq_length: Count = 128  # Most tokens of a row; what is longer is cut.

    # Model
    init: Place = ""
    """Run folder or Hub id of the encoder to start from; or scratch: new weights, of the sizes that the configuration
    beside `tokenizer` says. "" = outputs/bert, or the shipped model where that is not there."""
    keep_head: bool = False  # Begin with the head of `init` too, which was tuned on the same classes.
    dropout: Share = 0.1  # Dropout probability everywhere in the model. 0 = none.

    # Optimization
    global_batch_size: Count = 32  # Texts of one update, over all processes and micro-batches.
    max_steps: Count = 1000
    max_grad_norm: Amount = 1.0
    learning_rate: Amount = 0.0
    """Peak rate of AdamW. 0 = 3e-5 as for published BERTs, but 1e-3 for scratch and for a run folder that Muon trained,
    whose weights are large."""
    layer_decay: ShareAboveZero = 1.0  # Share of the next layer's rate that a layer has. 1 = one rate for all.
    weight_decay: Amount = 0.01  # Decoupled weight decay of all but biases and norms. 0 = none.
    warmup_steps: Natural = 100  # Updates over which the rate rises; then it falls linearly to 0.

    # Evaluation
    eval_data: Place = ""  # Data to evaluate on, in the same forms. "" = another split of `data`.
    eval_split: str = ""
    """Split to evaluate on, by which the best model is chosen; the one to train on: eval_fraction of its labels.
    "" = the first whose name begins with validation, val, dev or test, else all of eval_data, else eval_fraction."""
    eval_fraction: ShareInside = 0.1
    """Share of the samples, of each class where there are classes, held out where there is no split to evaluate on."""
    test_split: str = ""
    """Split on which the best model is tried, and which chooses nothing. "" = that of the task, none of other data."""
    probe: bool = False
    """Say before training how well the encoder as it is tells classes: by nearest neighbours, and linearly."""
    best_metric: str = ""
    """Metric whose best evaluation is exported, such as accuracy, macro_f1, pearson, loss; of equal ones that with the
    least loss. "" = the first that is logged."""
    patience: Natural = 0  # Evaluations without a better one after which the run ends. 0 = it does not.
    seeds: Count = 1  # Runs, with seeds from `seed` on, whose mean and standard error are told.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math
import os

import evaluate as evaluate_library
import numpy as np
import torch
import transformers
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from tqdm import tqdm

from shared.data import left_out
from shared.data.batches import IGNORED, to_device
from shared.data.length_groups import samples_of_update
from shared.data.local_files import usual_name
from shared.data.randomness import derive_seed
from shared.data.updates import load_updates
from shared.metrics import scores
from shared.metrics.confusions import describe_confusions
from shared.metrics.probe import linear_probe, nearest_neighbours
from shared.models.export import export_model
from shared.models.pretrained import label_numbers, load_encoder, load_errors, load_with_head
from shared.optim import schedules
from shared.optim.layer_rates import layer_groups
from shared.optim.optimizers import clip_and_step, set_learning_rates, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.seeds import each_seed, report_seeds
from shared.run.training_run import Run, start
from shared.runtime.collectives import equal_share, gather_objects, node_main_first, rank_of
from shared.runtime.signals import until_stopped
from shared.text import labelled
from shared.text.label_rows import LabelRows, encode
from shared.text.labelled import LabelledTexts
from shared.text.tables import validation_split
from shared.text.tokenization import load_fast
from shared.text.vocabulary import num_ids


class Task(NamedTuple):
    """A data set: Hub id or folder, configuration, columns, splits to evaluate and to test on, a metric of its own.

    To evaluate on train means on a part of it that is held out.
    """

    data: str
    config: str
    columns: tuple[str, ...]
    eval_split: str
    metric: str = ""
    test_split: str = ""


class Split(NamedTuple):
    """Texts, how metrics call them (eval or test), and their tokens."""

    name: str
    samples: LabelledTexts
    rows: LabelRows


class Tried(NamedTuple):
    """How a model did on a split: metrics, what it mistakes most often, and of each text row, label and answer."""

    metrics: dict[str, float]
    confusions: str
    rows: list[int]
    labels: list[Any]
    answers: list[Any]


TRAINED, SHIPPED = "outputs/bert", Path(__file__).parent / "assets" / "bert_1_hour"
GLUE = "nyu-mll/glue"
TASKS = {  # Wang et al. 2019, table 1, and the columns of its data set
    "supersenses": Task(str(labelled.SAMPLES / "supersenses"), "", ("text",), "train", test_split="test"),
    "eras": Task(str(labelled.SAMPLES / "eras"), "", ("text",), "train", test_split="test"),
    "hypernyms": Task(str(labelled.SAMPLES / "hypernyms"), "", ("sentence1", "sentence2"), "train", test_split="test"),
    "cola": Task(GLUE, "cola", ("sentence",), "validation", "matthews_correlation"),
    "sst2": Task(GLUE, "sst2", ("sentence",), "validation"),
    "mrpc": Task(GLUE, "mrpc", ("sentence1", "sentence2"), "validation", "f1"),
    "qqp": Task(GLUE, "qqp", ("question1", "question2"), "validation", "f1"),
    "stsb": Task(GLUE, "stsb", ("sentence1", "sentence2"), "validation"),
    "mnli": Task(GLUE, "mnli", ("premise", "hypothesis"), "validation_matched"),
    "mnli_mismatched": Task(GLUE, "mnli", ("premise", "hypothesis"), "validation_mismatched"),
    "qnli": Task(GLUE, "qnli", ("question", "sentence"), "validation"),
    "rte": Task(GLUE, "rte", ("sentence1", "sentence2"), "validation"),
    "wnli": Task(GLUE, "wnli", ("sentence1", "sentence2"), "validation"),
}
METRICS: dict[str, type[evaluate_library.Metric]] = {
    "accuracy": scores.Accuracy,
    "macro_f1": scores.MacroF1,
    "f1": scores.BinaryF1,
    "matthews_correlation": scores.MatthewsCorrelation,
    "pearson": scores.PearsonCorrelation,
    "spearman": scores.SpearmanCorrelation,
    "entity_f1": scores.EntityF1,
}
METRICS_OF = {
    "classes": ("accuracy", "macro_f1"),
    "numbers": ("pearson", "spearman"),
    "tags": ("entity_f1", "accuracy"),
}
MODEL_CLASSES = {
    "classes": transformers.AutoModelForSequenceClassification,
    "numbers": transformers.AutoModelForSequenceClassification,
    "tags": transformers.AutoModelForTokenClassification,
}
# Devlin et al. 2019, A.3; of 25 supersenses a class 45.1 % were right after 400 updates with 1e-3, 44.6 % with 3e-3.
PUBLISHED_RATE, LARGE_RATE = 3e-5, 1e-3
NO_CHOICE = "another split than the one that chooses the best model"
PIPELINE_TAGS = {"classes": "text-classification", "numbers": "text-classification", "tags": "token-classification"}
USAGE = """from transformers import pipeline

print(pipeline({!r}, "path/of/this/folder")({!r}))"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    is_other = usual_name(cfg.test_split) != usual_name(cfg.data_split)
    cli.expect(is_other, "test_split", cfg.test_split, "another split than the one to train on")
    evaluates = not cfg.patience or cfg.eval_every > 0
    cli.expect(evaluates, "patience", cfg.patience, "0 where eval_every is 0, since it counts evaluations")
    has_sizes = cfg.init != "scratch" or bool(cfg.tokenizer)
    cli.expect(has_sizes, "tokenizer", cfg.tokenizer, "the folder or Hub id of an encoder, for init scratch")
    has_head = cfg.init != "scratch" or not cfg.keep_head
    cli.expect(has_head, "keep_head", True, "a model to start from, not init scratch")
    known = cfg.best_metric in ("", "loss", *METRICS)
    cli.expect(known, "best_metric", cfg.best_metric, f"one of loss, {', '.join(METRICS)}")


def metrics_of(cfg: Config, task: Task, problem: str) -> tuple[str, ...]:
    """Names of the metrics to log, first the usual one to choose the best model by."""
    usual = tuple(dict.fromkeys(filter(None, (task.metric, *METRICS_OF[problem]))))
    fits = cfg.best_metric in ("", "loss", *usual)
    cli.expect(fits, "best_metric", cfg.best_metric, f"a metric of {problem}: loss, {', '.join(usual)}")
    return usual


def with_init(cfg: Config) -> Config:
    """The configuration with the encoder that it leaves open, as config.yaml records it."""
    record = Path(cfg.output_dir) / "config.yaml"  # of a run that goes on, wherever that is done
    before = (yaml.safe_load(record.read_text(encoding="utf-8")) or {}) if record.is_file() else {}
    found = TRAINED if (Path(TRAINED) / "config.json").is_file() else os.path.relpath(SHIPPED)
    return replace(cfg, init=cfg.init or before.get("init") or found)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config) -> tuple[Task, LabelledTexts, dict[str, LabelledTexts]]:
    """The task, the texts to train on, and those of eval and, if there is such a split, of test."""
    task, label_column = TASKS[cfg.task], "label"
    if cfg.data:
        columns = (cfg.text_column, *([cfg.text_pair_column] if cfg.text_pair_column else []))
        differ = len({*columns, cfg.label_column}) == len(columns) + 1
        cli.expect(differ, "label_column", cfg.label_column, f"another column than {', '.join(columns)}, each once")
        task, label_column = Task(cfg.data, cfg.data_config, columns, ""), cfg.label_column
    options: dict[str, Any] = {"config": task.config, "columns": task.columns, "label_column": label_column}
    options["label_kind"] = cfg.label_kind
    train = labelled.open_labelled(task.data, **options, split=cfg.data_split, like=None)
    source = cfg.eval_data or task.data
    options["like"] = train
    eval_split = cfg.eval_split or ("" if cfg.eval_data else task.eval_split)
    eval_split = eval_split or validation_split(source, task.config, cfg.test_split)
    eval_split = eval_split or ("train" if cfg.eval_data else "")
    is_free = usual_name(cfg.test_split) != usual_name(eval_split) or not eval_split
    cli.expect(is_free, "test_split", cfg.test_split, NO_CHOICE)
    is_own = usual_name(eval_split) == usual_name(cfg.data_split)
    chooses_by_own = source == task.data and is_own  # by labels that are to be few as well
    evals: dict[str, LabelledTexts] = {}
    if eval_split and not chooses_by_own:
        evals["eval"] = labelled.open_labelled(source, **options, split=eval_split, field="eval_split")
    elif not eval_split:
        train, evals["eval"] = labelled.hold_out(train, cfg.eval_fraction)
    if cfg.labels_per_class:
        has_classes = train.problem == "classes"
        cli.expect(has_classes, "labels_per_class", cfg.labels_per_class, "0 for labels that are not classes")
        train = labelled.few_of_each_class(train, cfg.labels_per_class, cfg.seed)
    if chooses_by_own:
        train, evals["eval"] = labelled.hold_out(train, cfg.eval_fraction)
    test_split = cfg.test_split or ("" if cfg.eval_data or task.test_split == eval_split else task.test_split)
    if test_split:
        evals["test"] = labelled.open_labelled(source, **options, split=test_split, field="test_split")
    return task, train, evals


def open_tokenizer(cfg: Config, problem: str) -> Any:
    """The tokenizer of the encoder; words that are given apart begin as words in a text do."""
    tokenizer = load_fast(cfg.tokenizer or cfg.init, **({"add_prefix_space": True} if problem == "tags" else {}))
    has_padding = tokenizer.pad_token_id is not None
    cli.expect(has_padding, "tokenizer", cfg.tokenizer or cfg.init, "one with a token for padding")
    return tokenizer


@dataclass(frozen=True)
class Updates(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step, whoever reads it.

    Attributes:
        rows: to train on.
        micro_batch_size: texts of a micro-batch.
        order: seed, global_batch_size, rank and num_processes.
    """

    rows: LabelRows
    micro_batch_size: int
    order: dict[str, int]

    def __getitem__(self, step: int) -> list[dict[str, np.ndarray]]:
        """The micro-batches of update `step`, of rows of about the same length."""
        indices = [index for _, index in samples_of_update(step, self.rows.lengths, **self.order)]
        starts = range(0, len(indices), self.micro_batch_size)
        return [self.rows.batch(indices[start : start + self.micro_batch_size]) for start in starts]


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, problem: str, class_names: tuple[str, ...], tokenizer: Any) -> Any:
    """The encoder with a new head, in float32."""
    model_class, name = MODEL_CLASSES[problem], cfg.tokenizer if cfg.init == "scratch" else cfg.init
    with load_errors("init" if name == cfg.init else "tokenizer", name):
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    known, longest = config.vocab_size, getattr(config, "max_position_embeddings", cfg.seq_length)
    cli.expect(
        num_ids(tokenizer) <= known, "tokenizer", tokenizer.name_or_path, f"at most the {known} tokens of the model"
    )
    cli.expect(
        cfg.seq_length <= longest, "seq_length", cfg.seq_length, f"at most {longest}, the longest row of the model"
    )
    dropouts = {field: cfg.dropout for field, value in config.to_dict().items() if is_dropout(field, value)}
    head = {"num_labels": 1} if problem == "numbers" else label_numbers(class_names)
    if problem != "tags":  # or a pipeline makes probabilities of numbers
        head["problem_type"] = "regression" if problem == "numbers" else "single_label_classification"
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.init == "scratch":
        model = model_class.from_config(
            transformers.AutoConfig.from_pretrained(name, **dropouts, **head), dtype=torch.float32
        )
    elif cfg.keep_head:
        model = load_with_head(model_class, name, class_names, **dropouts, **head)
    else:
        model = load_encoder(model_class, name, **dropouts, **head)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def begin_at_mean(model: Any, labels: np.ndarray) -> None:
    """Let a head with one output begin at the mean of the labels, from which small rates are far otherwise."""
    [bias] = [weight for name, weight in model.named_parameters() if name.endswith("bias") and weight.numel() == 1]
    torch.nn.init.constant_(bias, float(np.mean(labels)))


def is_dropout(field: str, value: Any) -> bool:
    """Whether a field of a configuration is a dropout probability: their names differ from encoder to encoder."""
    return "dropout" in field and isinstance(value, float | int) and not isinstance(value, bool)


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits: (B, C) of texts, (B, T, C) of their tokens, (B, 1) where labels are numbers."""
    return model(**{name: values for name, values in batch.items() if name != "labels"}).logits


def is_target(labels: Tensor) -> Tensor:
    """Which labels are to be learnt: all numbers, and all classes but -100."""
    return torch.ones_like(labels, dtype=torch.bool) if labels.is_floating_point() else labels != IGNORED


def loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over texts or tokens that have a class; of numbers the squared error."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return (logits.squeeze(-1) - labels).square().sum()
    return cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="sum")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(accelerator: Any, model: Any, split: Split, metrics: tuple[str, ...], batch_size: int) -> Tried:
    """Loss and metrics over every text once, under the name of the split."""
    model.eval()
    by_length = np.argsort(split.rows.lengths, kind="stable")
    share = equal_share(accelerator, math.ceil(len(by_length) / batch_size))
    loss, found = 0.0, {}  # found: of each text its labels and the answers, one or several
    is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
    bar = tqdm(share, desc="evaluating", delay=2, leave=False, disable=is_quiet)
    for number in until_stopped(accelerator, bar):
        mine = by_length[number * batch_size :][:batch_size].tolist()
        batch = to_device(split.rows.batch(mine or [0]), accelerator.device)  # all must run equally often
        logits = forward(model, batch).float()
        if mine:
            loss += loss_sum(logits, batch["labels"]).item()
            answers = logits.squeeze(-1) if split.samples.problem == "numbers" else logits.argmax(-1)
            columns = (batch["labels"], answers, is_target(batch["labels"]))
            rows = zip(mine, *(values.reshape(len(mine), -1).cpu().numpy() for values in columns), strict=True)
            found |= {text: (label[known], answer[known]) for text, label, answer, known in rows}
    model.train()
    gathered = gather_objects(accelerator, (loss, found))
    everything = {text: pair for _, of_process in gathered for text, pair in of_process.items()}
    labels, answers = zip(*(everything[text] for text in range(len(everything))), strict=True)
    flat = {"references": np.concatenate(labels), "predictions": np.concatenate(answers)}
    named = {"references": split.samples.named(labels), "predictions": split.samples.named(answers)}
    results = {f"{split.name}/loss": sum(of_process for of_process, _ in gathered) / len(flat["references"])}
    for name in metrics:
        results[f"{split.name}/{name}"] = METRICS[name]().compute(**(named if name == "entity_f1" else flat))[name]
    names = split.samples.class_names
    confusions = describe_confusions(flat["references"], flat["predictions"], names) if names else ""
    return Tried(results, confusions, split.samples.rows.tolist(), named["references"], named["predictions"])


@torch.no_grad()
def mean_features(accelerator: Any, model: Any, rows: LabelRows, batch_size: int) -> np.ndarray:
    """Of every text the mean over its tokens of the encoder's last layer, float32 (N, H), on every process."""
    model.eval()
    found = {}
    for number in equal_share(accelerator, math.ceil(len(rows) / batch_size)):
        mine = range(number * batch_size, len(rows))[:batch_size]
        batch = to_device(rows.batch(mine or [0]), accelerator.device)
        inputs = {name: values for name, values in batch.items() if name != "labels"}
        last = model(**inputs, output_hidden_states=True).hidden_states[-1].float()
        mask = batch["attention_mask"][:, :, None]
        if mine:
            found[number] = ((last * mask).sum(1) / mask.sum(1)).cpu().numpy()
    model.train()
    gathered = {place: part for of_process in gather_objects(accelerator, found) for place, part in of_process.items()}
    return np.concatenate([gathered[place] for place in sorted(gathered)])


def probe(accelerator: Any, model: Any, rows: LabelRows, eval_rows: LabelRows, batch_size: int) -> dict[str, float]:
    """Accuracies from frozen features, see `shared/metrics/probe.py`."""
    known, asked = (mean_features(accelerator, model, some, batch_size) for some in (rows, eval_rows))
    samples = (known, rows.labels, asked, eval_rows.labels)
    return {"knn_accuracy": nearest_neighbours(*samples), "linear_probe_accuracy": linear_probe(*samples)}


# ----------------------------------------------------------------------------------------------------------------------
# Training


def learning_rate_of(cfg: Config) -> float:
    """The peak rate; see the field."""
    record = Path(cfg.init) / "config.yaml"
    is_large = cfg.init == "scratch" or (
        record.is_file() and (yaml.safe_load(record.read_text()) or {}).get("optimizer") == "muon"
    )
    return cfg.learning_rate or (LARGE_RATE if is_large else PUBLISHED_RATE)


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """AdamW with bias correction, without which few labels are learnt badly (Mosbach et al. 2021, section 5)."""
    groups = layer_groups(model, learning_rate_of(cfg), cfg.layer_decay, cfg.weight_decay)
    return torch.optim.AdamW(groups, lr=learning_rate_of(cfg), betas=(0.9, 0.999), eps=1e-6, fused=True)


def train_update(cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], step: int) -> Any:
    """One optimizer update: its mean loss a target over all processes and micro-batches, and its gradient norm."""
    num_targets = accelerator.reduce(sum(is_target(batch["labels"]).sum() for batch in batches), "sum")
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / num_targets
    losses = []
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive_seed(cfg.seed, "dropout", step, micro_step, accelerator.process_index))
        with accelerator.accumulate(model):
            loss = loss_sum(forward(model, batch), batch["labels"])
            accelerator.backward(loss * scale)
        losses.append(loss.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(torch.stack(losses).sum(), "sum") / num_targets, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, and leave the best model as `from_pretrained` and `pipeline` load it."""
    check_config(cfg)
    cfg = with_init(cfg)
    accelerator, micro_batch_size = start(cfg)
    with node_main_first(accelerator):
        task, train, evals = open_data(cfg)
    metric_names = metrics_of(cfg, task, train.problem)
    cli.expect(train.problem == "classes" or not cfg.probe, "probe", cfg.probe, "False for labels that are not classes")
    tokenizer = open_tokenizer(cfg, train.problem)
    rows = encode(train, tokenizer, cfg.seq_length)
    splits = {name: Split(name, texts, encode(texts, tokenizer, cfg.seq_length)) for name, texts in evals.items()}
    held_out, test = splits["eval"], splits.get("test")
    order = {"seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    updates = Updates(rows, micro_batch_size, order)
    if cfg.dry_run:
        report_costs(cfg, accelerator, train, tokenizer, updates)
        return
    model = build_model(cfg, train.problem, train.class_names, tokenizer)
    if train.problem == "numbers" and not cfg.keep_head:
        begin_at_mean(model, train.labels)
    facts = describe(cfg, accelerator, model, {"train": rows, **{name: split.rows for name, split in splits.items()}})
    accelerator.print(summary.table(facts))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))
    if cfg.probe:
        facts |= (probed := probe(accelerator, model, rows, (test or held_out).rows, micro_batch_size))
        accelerator.print(summary.table(probed))

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best_metric = cfg.best_metric or metric_names[0]
    best, (due, metrics) = Best("eval/" + best_metric, run.state), run.owed
    run.is_over = best.has_waited(cfg.patience)
    loader = load_updates(updates, range(run.step, cfg.max_steps), cfg.num_workers, accelerator.device)
    fingerprints = [texts.fingerprint() for texts in (train, *evals.values())]
    run.record(Path(__file__), {"data": task.data, "data_fingerprint": fingerprints, "init": cfg.init, **facts})
    model.train()
    for step, batches in run.updates(loader, facts["flops_per_row"]):
        if batches:  # else the evaluation alone is left, which a signal had ended
            factor = schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, 1.0)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            tokens = sum(int(batch["attention_mask"].sum()) for batch in batches) * accelerator.num_processes
            batches = [to_device(batch, accelerator.device) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches, step)

            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=tokens)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": learning_rate_of(cfg) * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), **run.rates("tokens")}
        if due.evaluate:
            with run.evaluation(metrics):
                tried = evaluate(accelerator, model, held_out, metric_names, micro_batch_size)
                metrics |= tried.metrics
                run.write_samples(tried.confusions)
                if best.is_better(run.step, tried.metrics, tried.confusions):
                    export_model(accelerator, model, tokenizer, run.folder)
                    tried = evaluate(accelerator, model, test, metric_names, micro_batch_size) if test else tried
                    metrics |= tried.metrics
                    best.metrics |= tried.metrics
                    run.write_predictions(tried.rows, tried.labels, tried.answers)
                run.is_over = best.has_waited(cfg.patience)
        with run.pause():
            run.write(metrics)
            if due.save or run.is_over:
                run.save(best.state())
            if due.push and best.step:  # before the first evaluation there is no model to push
                run.push()

    cli.expect(best.step > 0, "best_metric", best_metric, "a finite value of it once; there is no model to export")
    results = {"training_flops": facts["flops_per_row"] * cfg.global_batch_size * run.step, "best_step": best.step}
    usage = USAGE.format(PIPELINE_TAGS[train.problem], example_of(held_out.samples))
    card = {"samples": best.samples, "figures": {}, "evaluation": best.metrics}
    run.finish(PIPELINE_TAGS[train.problem], usage, results=results, **card)


def example_of(samples: LabelledTexts) -> Any:
    """The first text as a pipeline takes it."""
    text = " ".join(samples.texts[0]) if samples.problem == "tags" else samples.texts[0]
    return text if samples.pairs is None else {"text": text, "text_pair": samples.pairs[0]}


def describe(cfg: Config, accelerator: Any, model: Any, rows: dict[str, LabelRows]) -> dict[str, Any]:
    """The numbers that follow from configuration and data, for the table at the start and run.json."""
    train = rows["train"]
    for use, some in rows.items():
        left_out.note("ends_of_long_texts", some.num_cut, where=f"the texts to {use} on")
        left_out.note("words_behind_the_last_token", some.num_words_left_out, where=f"the texts to {use} on")
    of_classes = isinstance(train.labels, np.ndarray) and train.labels.dtype == np.int64
    unseen = (
        len(set(train.labels.tolist()).difference(rows["eval"].labels.tolist())) if of_classes and "eval" in rows else 0
    )
    row = torch.zeros(1, mean_length := round(np.mean(train.lengths)), dtype=torch.int64)
    return {
        "parameters": model.num_parameters(),
        "labels": "numbers" if model.num_labels == 1 else f"{model.num_labels} classes",
        "texts": ", ".join(f"{len(some):,} to {use} on" for use, some in rows.items()),
        **({"classes_without_evaluation": unseen} if unseen else {}),
        "tokens_per_row": mean_length,
        "flops_per_row": training_flops(model, {"input_ids": row, "attention_mask": torch.ones_like(row)}),
        "rows_per_update": cfg.global_batch_size,
        "updates_per_epoch": round(len(train) / cfg.global_batch_size, 1),
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(cfg: Config, accelerator: Any, train: LabelledTexts, tokenizer: Any, updates: Updates) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    batch, seconds = to_device(updates[0][0], accelerator.device), None
    with dry_run.without_memory():
        model = build_model(cfg, train.problem, train.class_names, tokenizer)
        facts = describe(cfg, accelerator, model, {"train": updates.rows})
        costs = dry_run.costs(accelerator, model, batch, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_row"] * len(batch["input_ids"]), costs["memory: total"]):
        model = build_model(cfg, train.problem, train.class_names, tokenizer)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), batch)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    accelerator.print(f"first row: {tokenizer.decode(batch['input_ids'][0])}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        for config in each_seed(CONFIG, CONFIG.seeds):
            main(config)
        report_seeds(CONFIG, CONFIG.seeds)
