r"""Fine-tune a GPT to answer: supervised fine-tuning on conversations, prompts with completions, or plain texts.

Papers: Ouyang et al. 2022 (section 3.5, the supervised stage), Hu et al. 2021 (LoRA), Karpathy 2025 (nanochat: tokens
of a conversation that pre-training keeps free). With no arguments it starts from outputs/gpt and learns to define
words, to name and to class things, and to summarise. recipes/gpt/README.md has what pre-training is worth here.

    accelerate launch recipes/gpt/finetune.py
    accelerate launch recipes/gpt/finetune.py --init HuggingFaceTB/SmolLM2-135M --data HuggingFaceTB/smoltalk \
        --data_config everyday-conversations --lora_rank 16 --seq_length 2048
    python recipes/gpt/generate.py --model outputs/gpt_finetuned --chat
"""

# Shapes: B rows of a micro-batch, T tokens of a row, N targets, V vocabulary.
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place, Several
from shared.fields import Amount, Count, Natural, Share, ShareAboveZero, ShareInside

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.RunControl):
    """Fields of the method; RunControl has what every training stage has."""

    output_dir: Place = "outputs/gpt_finetuned"
    eval_every: Natural = 0
    save_every: Natural = 250

    # Data
    data: Place = "answers"
    """answers (embedded), a .jsonl, .json, .csv, .tsv or .parquet file, a folder of them, with splits or without, or a
    Hub data set id, with a column messages, or prompt and completion, or text."""
    data_config: str = ""  # Configuration of a Hub data set. "" = its only one.
    data_split: str = "train"  # Split to train on.
    task_column: str = ""
    """Column by whose values answers are scored apart too. "" = none, of the embedded answers task."""
    train_fraction: ShareAboveZero = 1.0  # Share of the examples to train on, chosen by the seed. 1 = all.
    tokenizer: Place = ""  # Folder or Hub id. "" = the one of `init`.
    chat_template: Place = ""
    """File with a chat template (Jinja). "" = the tokenizer's own, or where it has none that of this repository."""
    seq_length: Annotated[int, fields.at_least(2)] = 256  # Tokens of a row; an example's end beyond it is left out.

    # Model
    init: Place = "outputs/gpt"
    """Run folder or Hub id of the model to start from; or scratch: new weights, of the sizes that the configuration
    beside `tokenizer` says."""
    dropout: Share = 0.0  # Dropout probability, where the model has dropout. 0 = none.
    attention: Literal["sdpa", "flex_attention", "eager"] = "sdpa"
    """Attention kernel; flex_attention, for GPUs, skips what other examples of a row hold; eager is slow, for models of
    the Hub that have no other."""
    lora_rank: Natural = 0
    """Rank of an adapter that is trained beside the frozen model. 0 = the model itself is trained."""
    lora_alpha: Natural = 0  # The adapter's product is scaled by lora_alpha / lora_rank. 0 = 2 x lora_rank.
    lora_dropout: Share = 0.0  # Probability with which an input of the adapter is dropped. 0 = none.
    lora_targets: Several = "all-linear"
    """Layers that get an adapter, by name, with commas; all-linear = all but embeddings and head."""
    merge: bool = True  # Export the whole model, the adapter added to its matrices; else the adapter alone.

    # Optimization
    global_batch_size: Count = 16  # Rows of one update, over all processes and micro-batches.
    max_steps: Count = 400
    max_grad_norm: Amount = 1.0
    optimizer: Literal["auto", "muon", "adamw"] = "auto"
    """muon = Muon for hidden matrices and AdamW for the rest; adamw = AdamW for all; auto = what trained the run folder
    of `init` (of scratch: of `tokenizer`), adamw for published models and adapters."""
    learning_rate: Amount = 0.0
    """Peak rate of AdamW. 0 = 2e-5 for a model and 2e-4 for an adapter as is usual; for a run folder of muon, also
    with an adapter, half of that run's, for scratch as much."""
    muon_learning_rate: Amount = 0.0  # Peak rate of Muon. 0 = likewise.
    weight_decay: Amount = 0.0  # Decoupled weight decay of matrices (adamw: of embeddings too). 0 = none.
    warmup_steps: Natural = 20  # Updates over which the rate rises; then it falls linearly to 0.

    # Evaluation
    eval_data: Place = ""  # Data to evaluate on, in the same forms. "" = another split of `data`.
    eval_split: str = ""
    """Split to evaluate on. "" = the first whose name begins with validation, val, dev or test, else all of eval_data,
    else eval_fraction."""
    eval_fraction: ShareInside = 0.05  # Share of the examples held out where there is no split to evaluate on.
    eval_answers: Natural = 200  # Held-out questions that are answered. 0 = none.
    max_new_tokens: Count = 64  # Tokens of an answer at most.
    best_metric: Literal["loss", "exact_match", "rouge_l"] = "loss"
    """Metric whose best evaluation is exported: loss (the least), or of the answers exact_match or rouge_l."""
    patience: Natural = 0  # Evaluations without a better one after which the run ends. 0 = it does not.
    seeds: Count = 1  # Runs, with seeds from `seed` on, whose mean and standard error are told.


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math

import numpy as np
import torch
import yaml
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared.data import left_out
from shared.data.batches import IGNORED, to_device
from shared.data.local_files import usual_name
from shared.data.randomness import derive_seed, shuffled_indices
from shared.data.updates import Updates, load_updates
from shared.metrics.scores import ExactMatch, RougeL
from shared.models.adapters import add_lora, export_adapter, export_merged, is_adapter
from shared.models.causal_lm import load_causal_lm, new_causal_lm, set_dropout
from shared.models.export import export_model
from shared.models.target_head import head_at_targets
from shared.optim import schedules
from shared.optim.muon import MuonWithAdamW, for_engine
from shared.optim.optimizers import clip_and_step, set_learning_rates, split_weights, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.seeds import each_seed, report_seeds
from shared.run.training_run import Run, start
from shared.runtime.cache_folder import cache_folder
from shared.runtime.collectives import equal_share, gather_objects, node_main_first, rank_of
from shared.runtime.launch import usable_cores
from shared.runtime.signals import until_stopped
from shared.text import conversations
from shared.text.conversations import Conversations
from shared.text.generation import answer_prompts
from shared.text.packing import in_batches
from shared.text.tables import validation_split
from shared.text.target_rows import TargetRows, pack_examples
from shared.text.tokenization import kept_tokens, load_tokenizer

PUBLISHED_RATE, ADAPTER_RATE = 2e-5, 2e-4  # what people use for published models, all weights or an adapter
# After 400 updates at half of pre-training's rates 9.0 % of 1,000 answers were exact, at a fifth 7.5 %; of 200 answers
# 4.5 % by AdamW at 3e-3 and 2.0 % at 1e-3.
SHARE_OF_RATE = 0.5
SHOWN_ANSWERS = 5
EVAL_SEED = 0  # of the questions to answer, so that runs of any seed compare
NO_EVAL_SPLIT = "another split than the one to train on"
USAGE = """from transformers import pipeline

answer = pipeline("text-generation", "path/of/this/folder")
print(answer({!r}, max_new_tokens={}))"""
USAGE_OF_ADAPTER = """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer, pipeline

model = AutoPeftModelForCausalLM.from_pretrained("path/of/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
answer = pipeline("text-generation", model, tokenizer=tokenizer)
print(answer({!r}, max_new_tokens={}))"""
NEXT = "talk to it: python recipes/gpt/generate.py --model {} --chat"
NEXT_OF_TEXTS = "let it go on: python recipes/gpt/generate.py --model {} --prompt TEXT"


class Answers(NamedTuple):
    """Held-out questions as tokens, what was expected, how the questions read, and the task of each, if there are."""

    prompts: list[np.ndarray]
    expected: list[str]
    questions: list[str]
    tasks: list[str]


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    has_sizes = cfg.init != "scratch" or bool(cfg.tokenizer)
    cli.expect(has_sizes, "tokenizer", cfg.tokenizer, "the folder or Hub id of a causal model, for init scratch")
    adapts = cfg.init != "scratch" or not cfg.lora_rank
    cli.expect(adapts, "lora_rank", cfg.lora_rank, "0 for init scratch, in which there is nothing to adapt")
    of_adapter = {"lora_alpha": 0, "lora_dropout": 0.0, "lora_targets": "all-linear"}
    for name, unset in of_adapter.items():
        is_used = cfg.lora_rank > 0 or getattr(cfg, name) == unset
        cli.expect(is_used, name, getattr(cfg, name), f"{unset} without lora_rank, which makes an adapter")
    by_adamw = not cfg.lora_rank or cfg.optimizer != "muon"
    cli.expect(by_adamw, "optimizer", cfg.optimizer, "adamw for an adapter")
    cli.expect(cfg.merge or cfg.lora_rank > 0, "merge", cfg.merge, "True without lora_rank, which makes an adapter")
    whole = cfg.merge or not is_adapter(cfg.init)
    cli.expect(whole, "merge", cfg.merge, "True where init is an adapter itself")
    base = not cfg.push_to_hub or cfg.merge or not Path(cfg.init).is_dir()
    cli.expect(base, "merge", cfg.merge, "True where init is a folder, which those who get the pushed adapter lack")
    evaluates = not cfg.patience or cfg.eval_every > 0
    cli.expect(evaluates, "patience", cfg.patience, "0 where eval_every is 0, since it counts evaluations")
    fits = cfg.max_new_tokens < cfg.seq_length or not cfg.eval_answers
    cli.expect(fits, "max_new_tokens", cfg.max_new_tokens, f"less than seq_length, {cfg.seq_length}")


def check_engine(cfg: Config, accelerator: Any) -> None:
    """Raise `UsageError` for what this engine or device cannot do."""
    if cfg.optimizer == "muon" and accelerator.distributed_type == "DEEPSPEED":
        expected = "0 for Muon under DeepSpeed, which would clip not its gradient but its update"
        cli.expect(cfg.max_grad_norm == 0, "max_grad_norm", cfg.max_grad_norm, expected)
    has_kernel = cfg.attention != "flex_attention" or accelerator.device.type == "cuda"
    cli.expect(has_kernel, "attention", cfg.attention, f"sdpa on {accelerator.device.type}, which has no other")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config) -> tuple[Conversations, Conversations]:
    """The examples to train on, and those to evaluate on."""
    is_other = usual_name(cfg.eval_split) != usual_name(cfg.data_split) or bool(cfg.eval_data)
    cli.expect(is_other, "eval_split", cfg.eval_split, NO_EVAL_SPLIT)
    data = str(conversations.SAMPLES / "answers") if cfg.data == "answers" else cfg.data
    column = cfg.task_column or ("task" if cfg.data == "answers" else "")
    train = conversations.open_conversations(data, config=cfg.data_config, split=cfg.data_split, task_column=column)
    source, config, field = (cfg.eval_data, "", "eval_data") if cfg.eval_data else (data, cfg.data_config, "data")
    eval_split = cfg.eval_split or validation_split(source, config, cfg.data_split, field)
    eval_split = eval_split or ("train" if cfg.eval_data else "")
    if eval_split:
        options = {"config": config, "split": eval_split, "task_column": column, "field": "eval_split", "source": field}
        held_out = conversations.open_conversations(source, **options)
    else:
        train, held_out = conversations.hold_out(train, cfg.eval_fraction)
    same = train.talks() == held_out.talks() and (train.talks() or train.form == held_out.form)
    name, value = ("eval_data", cfg.eval_data) if cfg.eval_data else ("eval_split", eval_split)
    cli.expect(same, name, value, f"{train.form} as in training, got {held_out.form}")
    order = shuffled_indices(np.arange(len(train)), len(train), derive_seed(cfg.seed, "few examples"))
    return train.subset(np.sort(order[: math.ceil(cfg.train_fraction * len(train))])), held_out


def open_tokenizer(cfg: Config, samples: Conversations) -> Any:
    """The tokenizer of the model, with a chat template where the examples are messages."""
    tokenizer = load_tokenizer(cfg.tokenizer or cfg.init)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # padding is never a target
    template = conversations.read_template(cfg.chat_template) if cfg.chat_template else ""
    if not (template or samples.talks()):
        return tokenizer
    return conversations.with_template(tokenizer, template, cfg.chat_template)


def open_answers(cfg: Config, samples: Conversations, tokenizer: Any) -> Answers:
    """Questions of `samples` that leave room for an answer, as many as are to be answered, the same for every seed."""
    if samples.form == "text" or not cfg.eval_answers:
        return Answers([], [], [], [])
    order = shuffled_indices(np.arange(len(samples)), len(samples), derive_seed(EVAL_SEED, "questions")).tolist()
    prompts: dict[int, np.ndarray] = {}
    for place in order:
        prompt = conversations.prompt_ids(tokenizer, samples.records[place])
        if len(prompt) <= cfg.seq_length - cfg.max_new_tokens:
            prompts[place] = prompt
        if len(prompts) == cfg.eval_answers:
            break
    asked = [samples.records[place] for place in prompts]
    tasks = [samples.tasks[place] for place in prompts] if samples.tasks else []
    expected, questions = map(conversations.answer_of, asked), map(conversations.question_of, asked)
    return Answers(list(prompts.values()), list(expected), list(questions), tasks)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, tokenizer: Any, talks: bool) -> Any:
    """The model in float32, with an adapter or without, whose head is computed at targets only.

    What ends its answers depends on whether it `talks`, in messages.
    """
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.init == "scratch":
        model = new_causal_lm(cfg.tokenizer, tokenizer, cfg.seq_length, cfg.attention)
    else:
        model = load_causal_lm(cfg.init, tokenizer, cfg.seq_length, cfg.attention)
    by_adamw = cfg.optimizer == "adamw" or model.config.model_type != "gpt2"
    cli.expect(by_adamw, "optimizer", cfg.optimizer, "adamw for gpt2, which has query, key and value in one matrix")
    set_dropout(model, cfg.dropout)
    stop = conversations.stop_token(tokenizer) if talks else tokenizer.eos_token_id
    if cfg.lora_rank:
        options = {"alpha": cfg.lora_alpha or 2 * cfg.lora_rank, "dropout": cfg.lora_dropout}
        options |= {"targets": cfg.lora_targets, "tokens": kept_tokens(tokenizer)}
        add_lora(model, cfg.init, rank=cfg.lora_rank, **options)
    model.generation_config.eos_token_id = conversations.end_tokens(model, tokenizer, stop)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return head_at_targets(model)


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (N, V) of targets. Positions restart at each example: with neither mask nor cache, none sees another."""
    places = (batch["labels"].flatten() != IGNORED).nonzero().squeeze(-1)
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    return model(**inputs, use_cache=False, target_positions=places).logits


def nll_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood in nats of the targets among labels (B, T), whose logits are (N, V)."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, labels[labels != IGNORED], reduction="sum")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def evaluate(
    cfg: Config, accelerator: Any, model: Any, rows: TargetRows, answers: Answers, tokenizer: Any, size: int
) -> tuple[dict[str, float], str, list[str]]:
    """Loss a target in nats over every example once; answers given greedily against those expected; some of them."""
    model.eval()
    found = np.zeros(2)
    share = in_batches(rows, size, accelerator.process_index, accelerator.num_processes)
    for batch in until_stopped(accelerator, share):
        batch = to_device(batch, accelerator.device)
        found += [nll_sum(forward(model, batch), batch["labels"]).item(), int((batch["labels"] != IGNORED).sum())]
    model.train()
    nats, targets = np.sum(gather_objects(accelerator, found), axis=0).tolist()
    metrics = {"eval/loss": nats / targets}
    if not answers.prompts:
        return metrics, "", []
    found_answers: dict[int, str] = {}
    bare = accelerator.unwrap_model(model)
    for number in until_stopped(accelerator, equal_share(accelerator, math.ceil(len(answers.prompts) / size))):
        mine = range(number * size, len(answers.prompts))[:size]
        prompts = [answers.prompts[place] for place in mine or [0]]  # all must run equally often
        texts = answer_prompts(bare, tokenizer, prompts, max_new_tokens=cfg.max_new_tokens)
        found_answers |= dict(zip(mine, texts, strict=False))
    everything = {place: text for part in gather_objects(accelerator, found_answers) for place, text in part.items()}
    texts = [everything[place] for place in range(len(everything))]
    exact, overlap = score(texts, answers.expected)
    metrics |= {"eval/exact_match": exact, "eval/rouge_l": overlap}
    for task in sorted(set(answers.tasks)):
        places = [place for place, name in enumerate(answers.tasks) if name == task]
        exact, overlap = score(*([column[place] for place in places] for column in (texts, answers.expected)))
        metrics |= {f"eval/{task}/exact_match": exact, f"eval/{task}/rouge_l": overlap}
    rows_shown = zip(answers.questions, texts, answers.expected, strict=True)
    shown = [f"{asked}\n> {given}\nexpected: {wanted}" for asked, given, wanted in rows_shown][:SHOWN_ANSWERS]
    return metrics, "\n\n".join(shown), texts


def score(given: list[str], expected: list[str]) -> tuple[float, float]:
    """How near answers are to those expected: exact match, and ROUGE-L."""
    pairs = {"predictions": given, "references": expected}
    return ExactMatch().compute(**pairs)["exact_match"], RougeL().compute(**pairs)["rouge_l"]


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Rates(NamedTuple):
    """Peak rates; that of Muon is 0 where AdamW trains everything."""

    adamw: float
    muon: float


def rates_of(cfg: Config) -> Rates:
    """The peak rates; see the fields."""
    is_new = cfg.init == "scratch"
    record = Path(cfg.tokenizer if is_new else cfg.init) / "config.yaml"
    before: dict[str, Any] = (yaml.safe_load(record.read_text(encoding="utf-8")) or {}) if record.is_file() else {}
    is_of_muon = before.get("optimizer") == "muon" and before.get("architecture") != "gpt2"
    if cfg.optimizer == "muon" or (cfg.optimizer == "auto" and is_of_muon and not cfg.lora_rank):
        share = 1.0 if is_new else SHARE_OF_RATE
        usual = [share * before.get(name, 0.0) for name in ("learning_rate", "muon_learning_rate")]
        rates = Rates(cfg.learning_rate or usual[0], cfg.muon_learning_rate or usual[1])
        expected = "rates, since no run folder of Muon says any"
        cli.expect(min(rates) > 0, "muon_learning_rate", cfg.muon_learning_rate, expected)
        return rates
    usual_rate = ADAPTER_RATE if cfg.lora_rank else PUBLISHED_RATE
    if cfg.lora_rank and is_of_muon:  # beside weights as large as Muon's
        usual_rate = SHARE_OF_RATE * before["learning_rate"]
    return Rates(cfg.learning_rate or usual_rate, 0.0)


def with_rates(cfg: Config) -> Config:
    """The configuration with the optimizer and the rates that it leaves open, as config.yaml records them."""
    rates = rates_of(cfg)
    optimizer: Literal["muon", "adamw"] = "muon" if rates.muon else "adamw"
    return replace(cfg, optimizer=optimizer, learning_rate=rates.adamw, muon_learning_rate=rates.muon)


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """Muon for hidden matrices and AdamW for embeddings, head, norms and biases; or AdamW for all that is trained."""
    hidden, tables, vectors = split_weights(model, model.get_output_embeddings().weight)
    if cfg.optimizer == "muon":
        is_of_matrices = all(weight.ndim == 2 for weight in hidden)
        expected = f"adamw for {model.config.model_type}, in which some weights are no matrices"
        cli.expect(is_of_matrices, "optimizer", cfg.optimizer, expected)
        matrices = {"params": hidden, "lr": cfg.muon_learning_rate, "weight_decay": cfg.weight_decay, "use_muon": True}
        rest = {"params": tables + vectors, "lr": cfg.learning_rate, "weight_decay": 0.0, "use_muon": False}
        return MuonWithAdamW([matrices, rest], betas=(0.8, 0.95))  # as in pre-training
    groups = [
        {"params": hidden + tables, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], lr=cfg.learning_rate, betas=(0.9, 0.95), fused=True
    )


def train_update(cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], step: int) -> Any:
    """One optimizer update: its mean loss a target (nats) over processes and micro-batches, and its gradient norm."""
    num_targets = accelerator.reduce(sum((batch["labels"] != IGNORED).sum() for batch in batches), "sum")
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / num_targets
    nlls = []
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive_seed(cfg.seed, "dropout", step, micro_step, accelerator.process_index))
        with accelerator.accumulate(model):
            micro_nll = nll_sum(forward(model, batch), batch["labels"])
            accelerator.backward(micro_nll * scale)
        nlls.append(micro_nll.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(torch.stack(nlls).sum(), "sum") / num_targets, grad_norm


def export(cfg: Config, accelerator: Any, model: Any, tokenizer: Any, folder: Path) -> None:
    """The model for `from_pretrained`, or the adapter for peft."""
    if cfg.lora_rank and cfg.merge:
        export_merged(accelerator, model, tokenizer, folder, cfg.init)
        return
    write = export_adapter if cfg.lora_rank else export_model
    write(accelerator, model, tokenizer, folder)


def main(cfg: Config) -> None:
    """Train, evaluate, and leave the best model as `from_pretrained` loads it, which answers by its chat template."""
    check_config(cfg)
    cfg = with_rates(cfg)
    accelerator, micro_batch_size = start(cfg)
    check_engine(cfg, accelerator)
    with node_main_first(accelerator):
        train, held_out = open_data(cfg)
        tokenizer = open_tokenizer(cfg, train)
        options = {"seq_length": cfg.seq_length, "cache_dir": cache_folder(cfg.cache_dir)}
        options |= {"num_processes": usable_cores()}
        rows, eval_rows = (pack_examples(samples, tokenizer, **options) for samples in (train, held_out))
    for name, packed in (("data", rows), ("eval_data", eval_rows)):
        expected = f"an example with a target within {cfg.seq_length} tokens"
        cli.expect(len(packed) > 0, name, getattr(cfg, name) or cfg.data, expected)
    answers = open_answers(cfg, held_out, tokenizer)
    answers_some = cfg.best_metric == "loss" or bool(answers.prompts)
    cli.expect(answers_some, "best_metric", cfg.best_metric, "loss where no question is answered")
    order = {"weights": [1.0], "seed": cfg.seed, "global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    updates = Updates([rows], micro_batch_size, order)
    if cfg.dry_run:
        report_costs(cfg, accelerator, tokenizer, train, rows, updates)
        return
    model = build_model(cfg, tokenizer, train.talks())
    facts = describe(cfg, accelerator, model, rows)
    accelerator.print(summary.table(facts))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, for_engine(accelerator, build_optimizer(cfg, model)))

    run = Run(cfg, accelerator)  # a run that was stopped goes on here
    best, (due, metrics) = Best(f"eval/{cfg.best_metric}", run.state), run.owed
    run.is_over = best.has_waited(cfg.patience)
    loader = load_updates(updates, range(run.step, cfg.max_steps), cfg.num_workers, accelerator.device)
    fingerprints = [train.fingerprint(), held_out.fingerprint()]
    run.record(Path(__file__), {"data": cfg.data, "data_fingerprint": fingerprints, "init": cfg.init, **facts})
    model.train()
    for step, update in run.updates(loader, facts["flops_per_row"]):
        if update:  # else the evaluation alone is left, which a signal had ended
            batches, _ = update
            factor = schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, 1.0)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            batches = [to_device(batch, accelerator.device) for batch in batches]
            loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches, step)

            tokens = cfg.global_batch_size * cfg.seq_length
            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=tokens)
            metrics = {}
            if due.log:
                metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
                metrics |= {"train/grad_norm": grad_norm.item(), **run.rates("tokens")}
        if due.evaluate:
            with run.evaluation(metrics):
                found, shown, texts = evaluate(cfg, accelerator, model, eval_rows, answers, tokenizer, micro_batch_size)
                metrics |= found
                run.write_samples(shown)
                if best.is_better(run.step, found, shown):
                    export(cfg, accelerator, model, tokenizer, run.folder)
                    run.write_predictions(answers.questions, answers.expected, texts)
                run.is_over = best.has_waited(cfg.patience)
        with run.pause():
            run.write(metrics)
            if due.save or run.is_over:
                run.save(best.state())
            if due.push and best.step:  # before the first evaluation there is no model to push
                run.push()

    cli.expect(best.step > 0, "best_metric", cfg.best_metric, "a finite value of it once; there is no model to export")
    results = {"training_flops": facts["flops_per_row"] * cfg.global_batch_size * run.step, "best_step": best.step}
    usage = USAGE_OF_ADAPTER if cfg.lora_rank and not cfg.merge else USAGE
    usage = usage.format(conversations.example_of(held_out), cfg.max_new_tokens)
    next_command = (NEXT if train.talks() else NEXT_OF_TEXTS).format(shlex.quote(str(run.folder)))
    card = {"samples": best.samples, "figures": {}, "evaluation": best.metrics}
    run.finish("text-generation", usage, results=results, next_command=next_command, **card)


def describe(cfg: Config, accelerator: Any, model: Any, rows: TargetRows) -> dict[str, Any]:
    """The numbers that follow from configuration and data, for the table at the start and run.json."""
    row, targets = torch.zeros(1, cfg.seq_length, dtype=torch.int64), round(rows.num_targets / len(rows))
    places = torch.zeros(max(1, targets), dtype=torch.int64)
    flops = training_flops(model, {"input_ids": row, "use_cache": False, "target_positions": places})
    return {
        "parameters": model.num_parameters(),
        "trained_parameters": model.num_parameters(only_trainable=True),
        "flops_per_row": flops * 2 / 3 if cfg.lora_rank else flops,  # frozen matrices have no gradient
        "rows": len(rows),
        "targets_per_row": targets,
        "rows_per_update": cfg.global_batch_size,
        "updates_per_epoch": round(len(rows) / cfg.global_batch_size, 1),
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(
    cfg: Config, accelerator: Any, tokenizer: Any, train: Conversations, rows: TargetRows, updates: Updates
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    [batch, *_], _ = updates[0]
    batch = to_device(batch, accelerator.device)
    places = (batch["labels"].flatten() != IGNORED).nonzero().squeeze(-1)
    inputs, seconds = {**batch, "use_cache": False, "target_positions": places}, None
    with dry_run.without_memory():
        model = build_model(cfg, tokenizer, train.talks())
        facts = describe(cfg, accelerator, model, rows)
        costs = dry_run.costs(accelerator, model, inputs, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_row"] * len(batch["input_ids"]), costs["memory: total"]):
        model = build_model(cfg, tokenizer, train.talks())
        seconds = dry_run.time_update(accelerator, model, for_engine(accelerator, build_optimizer(cfg, model)), inputs)
    table = summary.table({**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)})
    accelerator.print(f"first row: {tokenizer.decode(batch['input_ids'][0])}\n\n{table}")


if __name__ == "__main__":
    with cli.exit_codes():
        for config in each_seed(CONFIG, CONFIG.seeds):
            main(config)
        report_seeds(CONFIG, CONFIG.seeds)
