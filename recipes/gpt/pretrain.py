"""Pre-train a GPT with a byte-level BPE tokenizer from scratch: causal language modelling.

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
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.RunControl):
    """Fields of the method; RunControl has those that every recipe shares."""

    output_dir: str = "outputs/gpt"
    """The run folder; on several nodes it must be one that all of them see."""
    eval_every: int = 250
    """Updates between two evaluations; 0 = only at the end."""
    save_every: int = 250
    """Updates between two checkpoints; 0 = only at the end and when a signal stops the run."""

    data: str = "sample"
    """sample, a .txt/.jsonl/.parquet file, a folder of them, or a Hub data set id; several with commas."""
    data_weights: str = ""
    """Share of the training rows from each of several data, such as 0.7,0.3. "" = equal shares."""
    data_config: str = ""
    """Configuration of a Hub data set. "" = its only one."""
    data_split: str = "train"
    """Split of a Hub data set."""
    eval_data: str = ""
    """Data to evaluate on, in the same forms. "" = hold out eval_fraction of the documents."""
    eval_split: str = "validation"
    """Split of eval_data if it is a Hub data set."""
    eval_fraction: float = 0.05
    """Share of the documents held out where eval_data is not given; chosen by their content."""
    streaming: bool = False
    """Read the data as it arrives instead of tokenising it once; see the README on order and resuming."""
    text_column: str = ""
    """Column of the text. "" = the only column that holds text, or the one called text."""
    tokenizer: str = ""
    """Folder or Hub id of a tokenizer. "" = the one of `init`, else a byte-level BPE trained on the data."""
    vocab_size: int = 4096
    """Tokens of a tokenizer trained here; the model's vocabulary is this, padded to a multiple of 64."""
    seq_length: int = 256
    """Tokens of a row."""

    architecture: Literal["nanochat", "gpt2", "llama"] = "nanochat"
    """Which block: nanochat (Karpathy 2025), gpt2 (Radford et al. 2019) or llama (Touvron et al. 2023)."""
    hidden_size: int = 128
    """Width of the residual stream."""
    intermediate_size: int = 0
    """Width inside the MLP. 0 = 4 x hidden_size."""
    num_layers: int = 3
    """Transformer blocks."""
    num_heads: int = 2
    """Attention heads."""
    num_kv_heads: int = 0
    """Key and value heads of nanochat and llama. 0 = num_heads."""
    dropout: float = 0.0
    """Dropout probability: everywhere in gpt2, of attention weights in the others. 0 = none."""
    attention: Literal["sdpa", "flex_attention"] = "sdpa"
    """Attention kernel; flex_attention, for GPUs, skips what other documents of a row hold."""
    init: str = "scratch"
    """scratch, or a run folder or Hub id to start from (continued pre-training): its weights, sizes and dropout."""

    global_batch_size: int = 12
    """Rows of one update, over all processes and micro-batches."""
    per_device_batch_size: int = 0
    """Rows of one micro-batch on one process. 0 = the process's whole share of the global batch."""
    max_steps: int = 850
    """Optimizer updates."""
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon = Muon for hidden matrices and AdamW for the rest; adamw = AdamW for all."""
    learning_rate: float = 0.02
    """Peak rate of AdamW."""
    muon_learning_rate: float = 0.016
    """Peak rate of Muon."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (adamw: of embeddings too, as Radford et al. do). 0 = none."""
    max_grad_norm: float = 1.0
    """Norm to which the update's gradient is clipped. 0 = no clipping."""
    schedule: Literal["wsd", "cosine"] = "wsd"
    """wsd = warm up, hold, fall linearly to 0 over decay_fraction; cosine = warm up, fall to a tenth."""
    warmup_steps: int = 20
    """Updates over which the rate rises. 0 = none."""
    decay_fraction: float = 1.0
    """Share of the updates over which wsd falls."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from shared.data.batches import IGNORED, micro_batches, to_device
from shared.data.randomness import derive_seed
from shared.data.updates import Updates, load_updates
from shared.models.export import export_model
from shared.models.pretrained import load_causal_lm
from shared.optim import schedules
from shared.optim.optimizers import MuonWithAdamW, set_learning_rates, state_bytes
from shared.performance import dry_run
from shared.performance.flops import peak, training_flops
from shared.performance.profiling import trace_updates
from shared.performance.throughput import Throughput
from shared.run import checkpoints, hub, summary
from shared.run import folder as run_folder
from shared.run.log import RunLog
from shared.run.report import finish_run
from shared.run.skipped_updates import SkippedUpdates
from shared.runtime import collectives, launch
from shared.runtime.cache_folder import cache_folder
from shared.runtime.signals import StopSignals
from shared.text import streaming, tokenization
from shared.text.documents import open_corpora
from shared.text.generation import continue_prompt
from shared.text.packing import PackedRows, fill_row, pack_corpus

PROMPTS = ("The President of the United States", "It was a truth", "In the year")
USAGE = """from transformers import pipeline

print(pipeline("text-generation", "path/of/this/folder")("The President of the United States"))"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what can be told wrong from the fields alone."""
    fields.check_run_control(cfg)
    cli.expect_at_least(cfg, 1, "num_layers", "num_heads", "hidden_size", "global_batch_size", "max_steps")
    cli.expect_at_least(cfg, 0, "num_kv_heads", "intermediate_size", "per_device_batch_size")
    cli.expect_at_least(cfg, 0, "warmup_steps", "weight_decay", "max_grad_norm")
    for field in ("learning_rate", "muon_learning_rate"):
        cli.expect(getattr(cfg, field) > 0, field, getattr(cfg, field), "more than 0")
    cli.expect(cfg.seq_length >= 2, "seq_length", cfg.seq_length, "at least 2, a token to see and one to predict")
    cli.expect(cfg.vocab_size > 256, "vocab_size", cfg.vocab_size, "more than the 256 bytes and the end token")
    is_even = cfg.hidden_size % (2 * cfg.num_heads) == 0  # RoPE turns pairs
    cli.expect(is_even, "hidden_size", cfg.hidden_size, "a multiple of 2 x num_heads")
    divides = cfg.num_heads % (cfg.num_kv_heads or cfg.num_heads) == 0
    cli.expect(divides, "num_kv_heads", cfg.num_kv_heads, "a divisor of num_heads, or 0")
    for field in ("eval_fraction", "dropout"):
        cli.expect(0 <= getattr(cfg, field) < 1, field, getattr(cfg, field), "a share in [0, 1)")
    has_eval = cfg.eval_fraction > 0 or cfg.eval_data or cfg.data == "sample"
    cli.expect(bool(has_eval), "eval_fraction", cfg.eval_fraction, "more than 0 where eval_data is not given")
    cli.positive_numbers("data_weights", cfg.data_weights, len(cfg.data.split(",")))
    cli.expect(0 < cfg.decay_fraction <= 1, "decay_fraction", cfg.decay_fraction, "a share in (0, 1]")


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[Any, list[Any], list[PackedRows]]:
    """The tokenizer, what to train on (packed rows, or streams), and packed rows to evaluate on."""
    columns = {"config": cfg.data_config, "text_column": cfg.text_column}
    open_training = streaming.open_streams if cfg.streaming else open_corpora
    texts = open_training(cfg.data, split=cfg.data_split, **columns)
    eval_data = cfg.eval_data or ("sample_eval" if cfg.data == "sample" else "")
    eval_texts = open_corpora(eval_data, split=cfg.eval_split, **columns) if eval_data else []
    fraction = 0.0 if eval_texts else cfg.eval_fraction
    with collectives.node_main_first(accelerator):
        name = cfg.tokenizer or ("" if cfg.init == "scratch" else cfg.init)
        options = {"cache_dir": cache_folder(cfg.cache_dir), "seq_length": cfg.seq_length}
        tokenizer = tokenization.load_or_train(name, texts, vocab_size=cfg.vocab_size, **options)
        options |= {"tokenizer": tokenizer, "num_processes": launch.usable_cores()}
        if cfg.streaming:
            train = [stream.leaving_out(fraction) for stream in texts]
            eval_texts = eval_texts or [stream.held_out(fraction) for stream in texts]
            evals = []
        else:
            train, evals = zip(
                *[pack_corpus(source, eval_fraction=fraction, **options) for source in texts], strict=True
            )
        if eval_texts and not cfg.dry_run:
            evals = [pack_corpus(source, eval_fraction=1.0, **options)[1] for source in eval_texts]
    return tokenizer, list(train), list(evals)


def open_updates(
    cfg: Config, accelerator: Any, tokenizer: Any, train: list[Any], batch_size: int, step: int, streams: list[Any]
) -> Any:
    """Updates from `step` on: each this process's micro-batches of at most (B, T), and its streams' states after it."""
    order = {
        "weights": cli.positive_numbers("data_weights", cfg.data_weights, len(train)),
        "seed": cfg.seed,
        "global_batch_size": cfg.global_batch_size,
        "rank": accelerator.process_index,
        "num_processes": accelerator.num_processes,
    }
    if cfg.streaming:
        dataset = streaming.StreamedUpdates(train, tokenizer, cfg.seq_length, batch_size, order, step, streams)
        return load_updates(dataset, None, min(1, cfg.num_workers), accelerator.device)
    steps = range(step, cfg.max_steps)
    return load_updates(Updates(train, batch_size, order), steps, cfg.num_workers, accelerator.device)


# ----------------------------------------------------------------------------------------------------------------------
# Model


def build_model(cfg: Config, tokenizer: Any) -> Any:
    """A model from `init`, or a new one of the chosen architecture, in float32."""
    sizes = {
        "vocab_size": math.ceil(tokenization.num_ids(tokenizer) / 64) * 64,  # tensor cores want multiples
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size or 4 * cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads or cfg.num_heads,
        "max_position_embeddings": cfg.seq_length,
        "bos_token_id": tokenization.special_ids(tokenizer)[0],
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
    """Karpathy 2025: RoPE, QK-norm, squared ReLU, norms without weights, logits capped at 15, untied head."""
    from transformers import NanoChatConfig, NanoChatForCausalLM

    return NanoChatForCausalLM(NanoChatConfig(**sizes, attention_dropout=cfg.dropout))


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


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """Muon for hidden matrices and AdamW for embeddings, head, norms and biases; or AdamW for all."""
    is_table = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    is_table.add(id(model.get_output_embeddings().weight))
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    tables = [parameter for parameter in model.parameters() if id(parameter) in is_table]
    hidden = [parameter for parameter in model.parameters() if parameter.ndim >= 2 and id(parameter) not in is_table]
    if cfg.optimizer == "adamw":
        # Decay on all but biases and gains (Radford et al. 2018, section 4.1); rates and betas of Brown et al. 2020, B.
        groups = [
            {"params": hidden + tables, "weight_decay": cfg.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ]
        kept = [group for group in groups if group["params"]]
        return torch.optim.AdamW(kept, lr=cfg.learning_rate, betas=(0.9, 0.95), fused=True)
    is_transposed = model.config.model_type == "gpt2"  # the library stores its matrices as (in, out)
    of_muon = {"use_muon": True, "stored_transposed": is_transposed}
    matrices = {"params": hidden, "lr": cfg.muon_learning_rate, "weight_decay": cfg.weight_decay, **of_muon}
    rest = {"params": tables + vectors, "lr": cfg.learning_rate, "weight_decay": 0.0, "use_muon": False}
    return MuonWithAdamW([matrices, rest])


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
def evaluate(accelerator: Any, model: Any, sources: list[PackedRows], batch_size: int) -> dict[str, float]:
    """Loss a token in nats, perplexity, and bits a byte of text, over every document of `sources` once."""
    model.eval()
    nll, num_targets = 0.0, 0
    for rows in sources:
        starts = range(0, len(rows), batch_size * accelerator.num_processes)
        is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
        for first in tqdm(starts, desc="evaluating", delay=2, leave=False, disable=is_quiet):
            mine = range(first + accelerator.process_index * batch_size, len(rows))[:batch_size]
            # A process that has no row left takes an empty one: all must run equally often.
            samples = [rows.read(row) for row in mine] or [fill_row([], rows.seq_length, rows.pad_token_id)]
            batch = to_device(micro_batches(samples, batch_size)[0], accelerator.device)
            nll += causal_lm_loss_sum(forward(model, batch), batch["labels"]).item()
            num_targets += int((batch["labels"] != IGNORED).sum())
    model.train()
    nll, num_targets = np.sum(collectives.gather_objects(accelerator, (nll, num_targets)), axis=0)
    bits_per_byte = nll / math.log(2) / sum(rows.cache.num_bytes for rows in sources)
    loss = float(nll / num_targets)
    return {"eval/loss": loss, "eval/perplexity": float(np.exp(loss)), "eval/bits_per_byte": float(bits_per_byte)}


def sample(cfg: Config, accelerator: Any, model: Any, tokenizer: Any) -> str:
    """A continuation of each of `PROMPTS`; every process takes part, since weights may be sharded."""
    bare, options = accelerator.unwrap_model(model), {"max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95}
    seeds = [derive_seed(cfg.seed, "sample", index) for index in range(len(PROMPTS))]
    return "\n\n".join(continue_prompt(bare, tokenizer, *pair, **options) for pair in zip(PROMPTS, seeds, strict=True))


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train_update(cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], step: int) -> Any:
    """One optimizer update: its mean loss a target (nats) over all processes and micro-batches, and its gradient norm.

    A gradient that is not finite changes nothing, on all processes alike; DeepSpeed, which steps inside the backward
    pass, finds that by itself.
    """
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
    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), cfg.max_grad_norm or math.inf))
    if math.isfinite(grad_norm):
        optimizer.step()
    optimizer.zero_grad()
    return accelerator.reduce(torch.stack(nlls).sum(), "sum") / num_targets, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave a model that `from_pretrained` loads."""
    check_config(cfg)
    run_dir = Path(cfg.output_dir)
    run_folder.check_run_folder(run_dir, cfg.resume, asdict(cfg))
    if cfg.dry_run:
        cfg = replace(cfg, streaming=True)  # the beginning of the data is enough
    launch.follow_launcher()
    accelerator = launch.start_accelerator(cfg.timeout_minutes, cfg.report_to, cfg.output_dir, cfg.deterministic)
    micro_batch_size = launch.set_accumulation(accelerator, cfg.global_batch_size, cfg.per_device_batch_size)
    launch.set_deepspeed_values(accelerator, micro_batch_size, cfg.max_grad_norm)
    if cfg.optimizer == "muon" and accelerator.distributed_type == "DEEPSPEED":
        raise cli.UsageError("optimizer: 'muon': ZeRO flattens the matrices that Muon needs, use --optimizer adamw")
    has_kernel = cfg.attention == "sdpa" or accelerator.device.type == "cuda"
    cli.expect(has_kernel, "attention", cfg.attention, f"sdpa on {accelerator.device.type}, which has no other")
    with collectives.raise_together(accelerator):
        hub_id = hub.check_login(cfg.push_to_hub if accelerator.is_main_process else "")

    tokenizer, train, eval_sources = open_data(cfg, accelerator)
    if cfg.dry_run:
        [batch, *_], _ = next(open_updates(cfg, accelerator, tokenizer, train, micro_batch_size, 0, []))
        report_costs(cfg, accelerator, tokenizer, train, to_device(batch, accelerator.device))
        return
    model = build_model(cfg, tokenizer)
    facts = describe(cfg, accelerator, model, train)
    accelerator.print(summary.table(facts))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, build_optimizer(cfg, model))

    step, state = checkpoints.resume_run(accelerator, run_dir, cfg.resume, previous_phase=None)
    skipped = SkippedUpdates(state, cfg.max_bad_updates)
    updates = open_updates(cfg, accelerator, tokenizer, train, micro_batch_size, step, state.get("streams", []))
    record = {"data": cfg.data, "data_fingerprint": [source.fingerprint for source in train], "init": cfg.init}
    with collectives.raise_together(accelerator):
        hub.check_push(hub_id, private=cfg.hub_private)
        if accelerator.is_main_process:
            run_folder.write_run_record(run_dir, fields.to_yaml(cfg), Path(__file__), {**record, **facts})
    log = RunLog(accelerator, run_dir, step, cfg.max_steps)
    pusher = hub.HubPusher(hub_id, cfg.hub_private)
    profiler = trace_updates(run_dir / "profile") if cfg.profile else None
    throughput = Throughput(facts["flops_per_row"], peak(accelerator) * accelerator.num_processes)
    seconds_before = state.get("training_seconds", 0.0)
    stop = StopSignals()  # before this one, a signal ends a run that has nothing to save
    model.train()
    while step < cfg.max_steps:
        with throughput.waiting_for_data():
            batches, streams = next(updates)
        factor = learning_rate_factor(cfg, step)
        set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
        batches = [to_device(batch, accelerator.device) for batch in batches]
        loss, grad_norm = train_update(cfg, accelerator, model, optimizer, batches, step)
        step += 1
        throughput.add(samples=cfg.global_batch_size, units=cfg.global_batch_size * cfg.seq_length)
        skipped.count(grad_norm)

        is_last = step == cfg.max_steps or skipped.are_too_many
        is_stopping = collectives.on_any_process(accelerator, stop.received)
        metrics = {}
        if is_last or step % cfg.log_every == 0:
            metrics = {"train/loss": loss.item(), "train/learning_rate": cfg.learning_rate * factor}
            metrics |= {"train/grad_norm": grad_norm, "train/skipped_updates": skipped.total}
            metrics |= throughput.read("tokens")
        seconds = seconds_before + throughput.training_seconds
        with throughput.pause():
            if step == cfg.max_steps or schedules.is_due(step, cfg.eval_every):
                metrics |= evaluate(accelerator, model, eval_sources, micro_batch_size)
                log.write_samples(step, sample(cfg, accelerator, model, tokenizer))
            log.write(step, metrics and {**metrics, "perf/training_seconds": seconds})
            if is_last or is_stopping or schedules.is_due(step, cfg.save_every):
                state = {"training_seconds": seconds, **skipped.state()}
                state["streams"] = collectives.gather_objects(accelerator, streams)
                checkpoints.save_checkpoint(accelerator, run_dir, step, state, cfg.keep_checkpoints)
            if schedules.is_due(step, cfg.push_every):
                export_model(accelerator, model, tokenizer, run_dir)
                pusher.push(run_dir, f"step {step}", f"step-{step}")
        if profiler:
            profiler.step()
        skipped.check(step)
        if is_stopping and step < cfg.max_steps:
            raise cli.RunStopped(f"saved at step {step} of {cfg.max_steps}; the same command goes on from there")

    export_model(accelerator, model, tokenizer, run_dir)
    flops = facts["flops_per_row"] * cfg.global_batch_size * step
    results = {"steps": step, "training_seconds": state["training_seconds"], "training_flops": flops}
    samples = sample(cfg, accelerator, model, tokenizer)
    shown = {"pipeline_tag": "text-generation", "usage": USAGE, "results": results, "samples": samples, "figures": {}}
    finish_run(log, pusher, run_dir, **shown, is_main_process=accelerator.is_main_process)
    log.say(f"generate: python recipes/gpt/generate.py --model {run_dir}")
    accelerator.end_training()


def learning_rate_factor(cfg: Config, step: int) -> float:
    """Share of the peak rate at `step`."""
    if cfg.schedule == "wsd":
        return schedules.warmup_stable_decay(step, cfg.max_steps, cfg.warmup_steps, cfg.decay_fraction)
    return schedules.warmup_cosine(step, cfg.max_steps, cfg.warmup_steps, final_fraction=0.1)  # Brown et al. 2020, B


def describe(cfg: Config, accelerator: Any, model: Any, train: list[Any]) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    row = torch.zeros(1, cfg.seq_length, dtype=torch.int64)
    rows = 0 if cfg.streaming else sum(len(source) for source in train)
    return {
        "parameters": model.num_parameters(),
        "flops_per_row": training_flops(model, {"input_ids": row, "use_cache": False}),
        "tokens_per_update": cfg.global_batch_size * cfg.seq_length,
        "updates_per_epoch": round(rows / cfg.global_batch_size, 1) if rows else "unknown, streamed",
        **summary.describe_engine(accelerator),
    }


def report_costs(cfg: Config, accelerator: Any, tokenizer: Any, train: list[Any], batch: dict[str, Tensor]) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    inputs = {**batch, "use_cache": False}
    with dry_run.without_memory():
        model = build_model(replace(cfg, attention="sdpa"), tokenizer)
        facts = describe(cfg, accelerator, model, train)
        optimizer_bytes = state_bytes(build_optimizer(cfg, model)) / facts["parameters"]
        costs = dry_run.costs(accelerator, model, inputs, optimizer_bytes)
    rows = {**facts, **{name: dry_run.human_bytes(size) for name, size in costs.items()}}
    if dry_run.can_time(accelerator, facts["flops_per_row"] * len(batch["input_ids"]), costs["memory: total"]):
        model = build_model(cfg, tokenizer)
        seconds = dry_run.time_update(accelerator, model, build_optimizer(cfg, model), inputs)
        rows["one update"] = dry_run.human_seconds(seconds) + (", not compiled" if cfg.compile else "")
        rows["all updates"] = dry_run.human_seconds(seconds * cfg.max_steps)
    accelerator.print(f"first row: {tokenizer.decode(batch['input_ids'][0])}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
