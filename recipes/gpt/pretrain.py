r"""Pre-train a GPT with a byte-level BPE tokenizer from scratch: causal language modelling.

Papers: Radford et al. 2019 (GPT-2), Touvron et al. 2023 (Llama), Karpathy 2025 (nanochat, the default: RoPE, QK-norm,
squared ReLU, soft-capped logits), Jordan et al. 2024 (Muon). With no arguments it trains on the embedded prose on two
CPU cores in minutes; recipes/gpt/README.md has the measured results and what differs from the papers.

    accelerate launch recipes/gpt/pretrain.py
    accelerate launch --config_file accelerate_configs/single_gpu.yaml recipes/gpt/pretrain.py \
        --config recipes/gpt/configs/gpt2_124m.yaml
    accelerate launch --config_file accelerate_configs/fsdp2.yaml recipes/gpt/pretrain.py \
        --config recipes/gpt/configs/llama_1b.yaml
"""

# Shapes: B rows of a micro-batch, T tokens of a row, V vocabulary.
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place, Places, Several
from shared.fields import Amount, Count, Natural, RateOfNewWeights, RateOfNewWeightsByMuon, Share, ShareAboveZero

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.Corpus, fields.HeldOut, fields.RunControl):
    """Fields of the method; Corpus and HeldOut say where the text is, RunControl what every training stage has."""

    output_dir: Place = "outputs/gpt"
    eval_every: Natural = 250
    save_every: Natural = 250

    # Data
    data: Places = "prose,dictionary"
    data_weights: Several = ""
    """Share of the rows from each of several data, such as 0.7,0.3. "" = 0.8,0.2 of the default, else equal shares."""
    streaming: bool = False  # Read the data as it arrives instead of tokenising it once; see the README.
    tokenizer: Place = ""  # Folder or Hub id. "" = the one of `init`, else a byte-level BPE trained on the data.
    vocab_size: Annotated[int, fields.at_least(261)] = 4096
    """Tokens of a tokenizer trained here: first the end token, four for conversations (which pre-training does not use)
    and the 256 bytes; the model's are padded to 64's."""
    seq_length: Annotated[int, fields.at_least(2)] = 256  # Tokens of a row.

    # Model
    architecture: Literal["nanochat", "gpt2", "llama"] = "nanochat"
    """Which block: nanochat (Karpathy 2025), gpt2 (Radford et al. 2019) or llama (Touvron et al. 2023)."""
    hidden_size: Count = 128  # Width of the residual stream.
    intermediate_size: Natural = 0  # Width inside the MLP. 0 = 4 x hidden_size.
    num_layers: Count = 3  # Transformer blocks.
    num_heads: Count = 2  # Attention heads.
    num_kv_heads: Natural = 0  # Key and value heads of nanochat and llama. 0 = num_heads.
    dropout: Share = 0.0  # Dropout probability: everywhere in gpt2, of attention weights in the others. 0 = none.
    attention: Literal["sdpa", "flex_attention", "eager"] = "sdpa"
    """Attention kernel; flex_attention, for GPUs, skips what other documents of a row hold; eager is slow, for models
    of the Hub that have no other."""
    init: Place = "scratch"
    """scratch, or a run folder or Hub id to start from (continued pre-training): its weights, sizes and dropout."""

    # Optimization
    global_batch_size: Count = 16  # Rows of one update, over all processes and micro-batches.
    max_steps: Count = 800
    max_grad_norm: Amount = 1.0
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon = Muon for hidden matrices and AdamW for the rest; adamw = AdamW for all."""
    learning_rate: RateOfNewWeights = 0.02  # Peak rate of AdamW.
    muon_learning_rate: RateOfNewWeightsByMuon = 0.016  # Peak rate of Muon.
    weight_decay: Amount = 0.0
    """Decoupled weight decay of matrices (adamw: of embeddings too, as Radford et al. do). 0 = none."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """wsd = warm up, hold, fall linearly over decay_fraction; cosine = warm up, fall as half a cosine."""
    warmup_steps: Natural = 20  # Updates over which the rate rises. 0 = none.
    decay_fraction: ShareAboveZero = 1.0  # Share of the updates over which wsd falls. 1 = from the end of the warm-up.
    final_fraction: Share = 0.0  # Share of the peak rate at which the fall ends; 0.1 in Brown et al. 2020. 0 = no rate.

    # Evaluation
    eval_windows: bool = False
    """Also report eval/window_loss, over windows of seq_length tokens in which documents see each other (llm.c)."""
    best_metric: Literal["", "loss", "perplexity", "bits_per_byte"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last model alone."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared.data import left_out
from shared.data.batches import IGNORED, to_device
from shared.data.randomness import derive_seed
from shared.data.sample_order import SMALLEST_SHARE
from shared.data.updates import Updates, load_updates
from shared.models.causal_lm import load_causal_lm
from shared.models.export import export_model
from shared.optim import schedules
from shared.optim.muon import MuonWithAdamW, for_engine
from shared.optim.optimizers import clip_and_step, set_learning_rates, split_weights, state_bytes_per_parameter
from shared.performance import dry_run
from shared.performance.flops import training_flops
from shared.run import summary
from shared.run.best import Best
from shared.run.training_run import Run, start
from shared.runtime.cache_folder import cache_folder
from shared.runtime.collectives import gather_objects, node_main_first, rank_of
from shared.runtime.launch import usable_cores
from shared.runtime.signals import until_stopped
from shared.text import streaming, tokenization
from shared.text.documents import entries_of, open_corpora, open_held_out, short_names
from shared.text.generation import continue_prompt
from shared.text.packing import PackedRows, Windows, in_batches, pack_corpus, windows
from shared.text.vocabulary import num_ids, special_ids

PROMPTS = ("The President of the United States", "It was a truth", "In the year")
USAGE = """from transformers import pipeline

generate = pipeline("text-generation", "path/of/this/folder")
print(generate("The", max_new_tokens={}))"""
OF_SCHEDULE = ("max_steps", "schedule", "decay_fraction", "final_fraction")  # may change before the rate falls
NEXT = "generate: python recipes/gpt/generate.py --model {}"


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    fields.check_corpus(cfg)
    weights_of(cfg)
    is_even = cfg.hidden_size % (2 * cfg.num_heads) == 0  # RoPE turns pairs
    cli.expect(is_even, "hidden_size", cfg.hidden_size, "a multiple of 2 x num_heads")
    divides = cfg.num_heads % (cfg.num_kv_heads or cfg.num_heads) == 0
    cli.expect(divides, "num_kv_heads", cfg.num_kv_heads, "a divisor of num_heads, or 0")


def check_engine(cfg: Config, accelerator: Any) -> None:
    """Raise `UsageError` for what this engine or device cannot do."""
    if cfg.optimizer == "muon" and accelerator.distributed_type == "DEEPSPEED":
        expected = "0 for Muon under DeepSpeed, which would clip not its gradient but its update"
        cli.expect(cfg.max_grad_norm == 0, "max_grad_norm", cfg.max_grad_norm, expected)
        expected = "adamw under DeepSpeed for gpt2, whose matrices are stored as (in, out) and three in one"
        cli.expect(cfg.architecture != "gpt2", "optimizer", cfg.optimizer, expected)
    has_kernel = cfg.attention != "flex_attention" or accelerator.device.type == "cuda"
    cli.expect(has_kernel, "attention", cfg.attention, f"sdpa on {accelerator.device.type}, which has no other")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def weights_of(cfg: Config) -> list[float]:
    """How often rows come from each of `data`; the dictionary's are there for its words, not for its style."""
    usual = "0.8,0.2" if cfg.data == Config.data else ""
    weights = cli.positive_numbers("data_weights", cfg.data_weights or usual, len(entries_of(cfg.data)))
    expected = "shares of at least a millionth, what is less would not be read"
    cli.expect(min(weights) >= SMALLEST_SHARE * sum(weights), "data_weights", cfg.data_weights, expected)
    return weights


def open_data(cfg: Config, accelerator: Any) -> tuple[Any, list[Any], dict[str, PackedRows]]:
    """The tokenizer, what to train on (packed rows, or streams), and packed rows of each source to evaluate on."""
    columns = {"config": cfg.data_config, "text_column": cfg.text_column}
    open_training = streaming.open_streams if cfg.streaming else open_corpora
    with node_main_first(accelerator):
        texts = open_training(cfg.data, split=cfg.data_split, **columns)
        eval_texts, fraction = open_held_out(cfg)
        name = cfg.tokenizer or ("" if cfg.init == "scratch" else cfg.init)
        options = {"cache_dir": cache_folder(cfg.cache_dir), "seq_length": cfg.seq_length}
        tokenizer = tokenization.load_or_train(name, texts, vocab_size=cfg.vocab_size, **options)
        options |= {"tokenizer": tokenizer, "num_processes": usable_cores()}
        if cfg.streaming:
            train, evals = [stream.leaving_out(fraction) for stream in texts], []
            eval_texts = eval_texts or [stream.held_out(fraction) for stream in texts]
        else:
            pairs = [pack_corpus(source, eval_fraction=fraction, **options) for source in texts]
            train, evals = map(list, zip(*pairs, strict=True))
        if eval_texts and not cfg.dry_run:
            evals = [pack_corpus(source, eval_fraction=1.0, **options)[1] for source in eval_texts]
    has_windows = not cfg.eval_windows or cfg.dry_run or any(len(windows(rows)) for rows in evals)
    cli.expect(has_windows, "eval_windows", cfg.eval_windows, "held-out text of more than seq_length tokens")
    names = short_names([source.name for source in eval_texts or texts])
    return tokenizer, train, dict(zip(names, evals, strict=True)) if evals else {}  # a dry run has none


def open_updates(
    cfg: Config, accelerator: Any, tokenizer: Any, train: list[Any], batch_size: int, step: int, streams: list[Any]
) -> Any:
    """Updates from `step` on: each this process's micro-batches of at most (B, T), and its streams' states after it."""
    order = {
        "weights": weights_of(cfg),
        "seed": cfg.seed,
        "global_batch_size": cfg.global_batch_size,
        **rank_of(accelerator),
    }
    if cfg.streaming:
        dataset = streaming.StreamedUpdates(train, tokenizer, cfg.seq_length, batch_size, order, step, streams)
        return load_updates(dataset, None, min(1, cfg.num_workers), accelerator.device)
    updates = Updates(train, batch_size, order)
    return load_updates(updates, range(step, cfg.max_steps), cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, tokenizer: Any) -> Any:
    """A model from `init`, or a new one of the chosen architecture, in float32."""
    sizes = {
        "vocab_size": math.ceil(num_ids(tokenizer) / 64) * 64,  # tensor cores want multiples
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size or 4 * cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads or cfg.num_heads,
        "max_position_embeddings": cfg.seq_length,
        "bos_token_id": special_ids(tokenizer)[0],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
        "attn_implementation": cfg.attention,
    }
    builders = {"nanochat": build_nanochat, "gpt2": build_gpt2, "llama": build_llama}
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.init == "scratch":
        model = builders[cfg.architecture](cfg, sizes)
    else:
        model = load_causal_lm(cfg.init, tokenizer, cfg.seq_length, cfg.attention)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


def build_nanochat(cfg: Config, sizes: dict[str, Any]) -> Any:
    """Karpathy 2025: RoPE, QK-norm, squared ReLU, norms without weights, logits capped at 15, untied head.

    Blocks add nothing at first and all tokens are as likely (init_weights in its gpt.py).
    """
    from transformers import NanoChatConfig, NanoChatForCausalLM

    model = NanoChatForCausalLM(NanoChatConfig(**sizes, attention_dropout=cfg.dropout))
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "fc2.weight", "lm_head.weight")):
            torch.nn.init.zeros_(weight)
    return model


def build_gpt2(cfg: Config, sizes: dict[str, Any]) -> Any:
    """Radford et al. 2019: learned positions, GELU, pre-norm, tied head."""
    from transformers import GPT2Config, GPT2LMHeadModel

    dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), cfg.dropout)
    others = {name: size for name, size in sizes.items() if name not in ("intermediate_size", "num_key_value_heads")}
    return GPT2LMHeadModel(GPT2Config(**others, n_inner=sizes["intermediate_size"], **dropouts))


def build_llama(cfg: Config, sizes: dict[str, Any]) -> Any:
    """Touvron et al. 2023: RoPE, RMSNorm, SwiGLU, untied head; shared keys and values as in Ainslie et al. 2023."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**sizes, attention_dropout=cfg.dropout))


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def causal_lm_loss_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood of all targets: (B, T, V), (B, T) -> scalar in nats; label -100 is no target."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits (B, T, V). Positions restart at each document: with neither mask nor cache, none attends to another."""
    return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


@torch.no_grad()
def nats_of(
    accelerator: Any, model: Any, rows: PackedRows | Windows, batch_size: int, most: int
) -> tuple[float, float]:
    """Negative log-likelihood in nats over every row once, at most so many (0 = all), and the number of its targets."""
    model.eval()
    found = np.zeros(2)
    share = in_batches(rows, batch_size, accelerator.process_index, accelerator.num_processes, most)
    for batch in until_stopped(accelerator, share):
        batch = to_device(batch, accelerator.device)
        nll = causal_lm_loss_sum(forward(model, batch), batch["labels"])
        found += [nll.item(), int((batch["labels"] != IGNORED).sum())]
    model.train()
    return tuple(np.sum(gather_objects(accelerator, found), axis=0).tolist())


def evaluate(
    accelerator: Any, model: Any, sources: dict[str, PackedRows], batch_size: int, by_windows: bool, most: int = 0
) -> dict[str, float]:
    """Loss a token in nats, perplexity, and bits a byte of text, over every document once; bits of each source too.

    At most so many rows of each source are read, 0 = all; their bytes are then told from their number of tokens. With
    `by_windows` also the loss over windows of the stream, see `packing.Windows`.
    """
    pairs = [nats_of(accelerator, model, rows, batch_size, most) for rows in sources.values()]
    nats, numbers = zip(*pairs, strict=True)
    shares = [number / rows.num_targets for number, rows in zip(numbers, sources.values(), strict=True)]
    sizes = [share * rows.cache.num_bytes for share, rows in zip(shares, sources.values(), strict=True)]
    loss = sum(nats) / sum(numbers)
    results = {"eval/loss": loss, "eval/perplexity": float(np.exp(loss))}
    results["eval/bits_per_byte"] = sum(nats) / math.log(2) / sum(sizes)
    if len(sources) > 1:
        bits = (nat / math.log(2) / size for nat, size in zip(nats, sizes, strict=True))
        results |= {f"eval/{name}/bits_per_byte": of_source for name, of_source in zip(sources, bits, strict=True)}
    if by_windows:
        pairs = [nats_of(accelerator, model, windows(rows), batch_size, most) for rows in sources.values()]
        results["eval/window_loss"] = sum(nats for nats, _ in pairs) / sum(number for _, number in pairs)
    return results


def sample(cfg: Config, accelerator: Any, model: Any, tokenizer: Any) -> str:
    """A continuation of each of `PROMPTS`; every process takes part, since weights may be sharded."""
    bare, options = accelerator.unwrap_model(model), {"max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95}
    seeds = [derive_seed(cfg.seed, "sample", index) for index in range(len(PROMPTS))]
    return "\n\n".join(continue_prompt(bare, tokenizer, *pair, **options) for pair in zip(PROMPTS, seeds, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """Muon for hidden matrices and AdamW for embeddings, head, norms and biases; or AdamW for all."""
    hidden, tables, vectors = split_weights(model, model.get_output_embeddings().weight)
    if cfg.optimizer == "adamw":
        # Decay on all but biases and gains (Radford et al. 2018, section 4.1); rates and betas of Brown et al. 2020, B.
        groups = [
            {"params": hidden + tables, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        kept = [group for group in groups if group["params"]]
        return torch.optim.AdamW(kept, lr=cfg.learning_rate, betas=(0.9, 0.95), fused=True)
    is_of_matrices = all(weight.ndim == 2 for weight in hidden)
    expected = f"adamw for {model.config.model_type}, in which some weights are no matrices"
    cli.expect(is_of_matrices, "optimizer", cfg.optimizer, expected)
    # Query, key and value are matrices of their own (Jordan et al. 2024); GPT-2 has them in one, stored as (in, out).
    is_gpt2 = model.config.model_type == "gpt2"
    joined = {id(weight) for name, weight in model.named_parameters() if is_gpt2 and name.endswith("c_attn.weight")}
    of_muon = {"lr": cfg.muon_learning_rate, "weight_decay": cfg.weight_decay, "use_muon": True}
    of_muon["stored_transposed"] = is_gpt2
    groups = [
        {**of_muon, "params": [weight for weight in hidden if id(weight) not in joined]},
        {**of_muon, "params": [weight for weight in hidden if id(weight) in joined], "num_parts": 3},
        {"params": tables + vectors, "lr": cfg.learning_rate, "weight_decay": 0.0, "use_muon": False},
    ]
    # Betas of AdamW in the code of Karpathy 2025; with 0.9 the default run ends 0.013 bits a byte higher.
    return MuonWithAdamW([group for group in groups if group["params"]], betas=(0.8, 0.95))


def learning_rate_factor(cfg: Config, step: int) -> float:
    """Share of the peak rate at `step`."""
    run = (step, cfg.max_steps, cfg.warmup_steps)
    if cfg.schedule == "wsd":
        return schedules.warmup_stable_decay(*run, cfg.decay_fraction, cfg.final_fraction)
    return schedules.warmup_cosine(*run, cfg.final_fraction)


def train_update(cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], step: int) -> Any:
    """One optimizer update: its mean loss a target (nats) over processes and micro-batches, and its gradient norm."""
    num_targets = accelerator.reduce(sum((batch["labels"] != IGNORED).sum() for batch in batches), "sum")
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scale = accelerator.gradient_accumulation_steps * accelerator.num_processes / num_targets
    nlls = []
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive_seed(cfg.seed, "dropout", step, micro_step, accelerator.process_index))
        with accelerator.accumulate(model):
            micro_nll = causal_lm_loss_sum(forward(model, batch), batch["labels"])
            accelerator.backward(micro_nll * scale)
        nlls.append(micro_nll.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(torch.stack(nlls).sum(), "sum") / num_targets, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave a model that `from_pretrained` loads."""
    check_config(cfg)
    accelerator, micro_batch_size = start(cfg, OF_SCHEDULE)
    check_engine(cfg, accelerator)
    if cfg.dry_run:
        cfg = replace(cfg, streaming=True)  # the beginning of the data is enough
    tokenizer, train, held_out = open_data(cfg, accelerator)
    if cfg.dry_run:
        [batch, *_], _ = next(open_updates(cfg, accelerator, tokenizer, train, micro_batch_size, 0, []))
        report_costs(cfg, accelerator, tokenizer, train, to_device(batch, accelerator.device))
        return
    model = build_model(cfg, tokenizer)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, for_engine(accelerator, build_optimizer(cfg, model)))

    rates = [learning_rate_factor(cfg, step) for step in range(cfg.max_steps)]
    run = Run(cfg, accelerator, schedule=(OF_SCHEDULE, rates))  # a run that was stopped goes on here
    best, (due, metrics) = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed
    saved = run.state.get("streams", [])
    updates = open_updates(cfg, accelerator, tokenizer, train, micro_batch_size, run.step, saved)
    fingerprints = [source.fingerprint for source in train]
    data = {"data": cfg.data, "data_fingerprint": fingerprints, "init": cfg.init}
    data["eval_data_fingerprint"] = [rows.fingerprint for rows in held_out.values()]
    run.record(Path(__file__), {**data, **facts})
    model.train()
    for step, update in run.updates(updates, facts["flops_per_row"]):
        if update:  # else the evaluation alone is left, which a signal had ended
            batches, streams = update
            factor = learning_rate_factor(cfg, step)
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
                metrics |= evaluate(accelerator, model, held_out, micro_batch_size, cfg.eval_windows, cfg.eval_rows)
                run.write_samples(shown := sample(cfg, accelerator, model, tokenizer))
                if best.is_better(run.step, metrics, shown):
                    export_model(accelerator, model, tokenizer, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save:
                run.save({"streams": gather_objects(accelerator, streams), **best.state()})
            if due.push:
                export_model(accelerator, model, tokenizer, run.folder)
                run.push()

    export_model(accelerator, model, tokenizer, run.folder)
    results = {"training_flops": facts["flops_per_row"] * cfg.global_batch_size * run.step, **best.kept()}
    shown = {"samples": sample(cfg, accelerator, model, tokenizer), "figures": {}}
    next_command = NEXT.format(shlex.quote(str(run.folder)))
    room = max(1, cfg.seq_length - len(tokenizer("The")["input_ids"]))  # GPT-2 has no positions beyond a row's
    run.finish("text-generation", USAGE.format(min(256, room)), results=results, **shown, next_command=next_command)


def describe(cfg: Config, accelerator: Any, model: Any, train: list[Any]) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    row = torch.zeros(1, cfg.seq_length, dtype=torch.int64)
    rows = 0 if cfg.streaming else sum(len(source) for source in train)
    return {
        "parameters": model.num_parameters(),
        "flops_per_row": training_flops(model, {"input_ids": row, "use_cache": False}),
        "tokens_per_update": cfg.global_batch_size * cfg.seq_length,
        "updates_per_epoch": round(rows / cfg.global_batch_size, 1) if rows else "unknown, streamed",
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(cfg: Config, accelerator: Any, tokenizer: Any, train: list[Any], batch: dict[str, Tensor]) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    inputs, seconds = {**batch, "use_cache": False}, None
    with dry_run.without_memory():
        is_countable = cfg.attention != "flex_attention"
        model = build_model(cfg if is_countable else replace(cfg, attention="sdpa"), tokenizer)
        facts = describe(cfg, accelerator, model, train)
        costs = dry_run.costs(accelerator, model, inputs, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_row"] * len(batch["input_ids"]), costs["memory: total"]):
        model = build_model(cfg, tokenizer)
        seconds = dry_run.time_update(accelerator, model, for_engine(accelerator, build_optimizer(cfg, model)), inputs)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    if cfg.eval_rows:
        numbers = [cfg.eval_rows] * (1 + cfg.eval_windows) * len(entries_of(cfg.eval_data or cfg.data))
        batches = dry_run.num_batches(accelerator, numbers, len(batch["input_ids"]))
        rows |= dry_run.evaluation_rows(cfg, seconds, batches)
    else:
        rows["one evaluation"] = "not known, reads all that is held out; --eval_rows limits it"
    accelerator.print(f"first row: {tokenizer.decode(batch['input_ids'][0])}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
