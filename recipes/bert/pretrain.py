r"""Pre-train BERT with a WordPiece tokenizer from scratch: masked language modelling and next sentence prediction.

Papers: Devlin et al. 2019 (BERT), Shoeybi et al. 2020 (the pre-norm block of Megatron, the default), Wettig et al. 2023
(how much to mask), You et al. 2020 (LAMB). With no arguments it trains on the embedded prose on two CPU cores in
minutes; recipes/bert/README.md has the measured results and what differs from the papers.

    accelerate launch recipes/bert/pretrain.py
    accelerate launch --config_file accelerate_configs/multi_gpu.yaml recipes/bert/pretrain.py \
        --config recipes/bert/configs/bert_base_phase1.yaml
"""

# Shapes: B pairs of a micro-batch, T tokens of a row, M masked positions of a row, H width, V vocabulary.
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

sys.path.insert(0, str(next(folder for folder in Path(__file__).resolve().parents if (folder / "shared").is_dir())))

from shared import command_line as cli
from shared import fields
from shared.command_line import Place
from shared.fields import Amount, Count, Natural, RateOfNewWeights, RateOfNewWeightsByMuon, Share, ShareInside

# ----------------------------------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True, kw_only=True)
class Config(fields.Corpus, fields.HeldOut, fields.RunControl):
    """Fields of the method; Corpus and HeldOut say where the text is, RunControl what every training stage has."""

    output_dir: Place = "outputs/bert"
    eval_every: Natural = 500
    save_every: Natural = 500

    # Data
    language: str = "en"  # Code of the language, for splitting text into sentences.
    one_sentence_per_line: bool = False  # The text is split already, and a blank line ends a document.
    tokenizer: Place = ""  # Folder or Hub id. "" = the one of `init`, else a WordPiece trained on the data.
    vocab_size: Count = 8192  # Tokens of a tokenizer trained here; the model's vocabulary is padded to 64's.
    lowercase: bool = True  # Whether a tokenizer trained here ignores case and accents.
    limit_alphabet: Count = 1000  # Characters that a tokenizer trained here knows, the most frequent ones.
    min_frequency: Count = 2  # Occurrences of a token that a tokenizer trained here makes of two.
    seq_length: Annotated[int, fields.at_least(8)] = 64
    """Tokens of a row: [CLS] A [SEP] B [SEP], two segments and three special tokens."""

    # Model
    architecture: Literal["megatron", "bert"] = "megatron"
    """Which block: megatron (pre-norm, Shoeybi et al. 2020) or bert (post-norm, Devlin et al. 2019)."""
    hidden_size: Count = 128  # Width of the residual stream.
    intermediate_size: Natural = 0  # Width inside the MLP. 0 = 4 x hidden_size.
    num_layers: Count = 3  # Transformer blocks.
    num_heads: Count = 4  # Attention heads.
    max_positions: Count = 128  # Rows of the table of positions: the longest row of this model or of a next phase.
    neighbour_heads: bool = True
    """Let two thirds of the attention heads begin by looking at the tokens beside, see the README."""
    dropout: Share = 0.0  # Dropout probability of attention weights and of each block's outputs. 0 = none.
    init: Place = "scratch"
    """scratch, or a run folder or Hub id to start from (next phase, continued pre-training): its weights and sizes."""
    init_optimizer: bool = False
    """Start with the optimizer's state of `init` too, a run folder with a checkpoint; the step begins at 0."""

    # Objective
    mask_fraction: ShareInside = 0.25
    """Share of the tokens to predict in training (Geiping and Goldstein 2022); evaluation always has 0.15."""
    whole_word_masking: bool = True
    """Mask all tokens of a word together in training; evaluation always masks tokens one by one."""

    # Optimization
    global_batch_size: Count = 32  # Pairs of one update, over all processes and micro-batches.
    max_steps: Count = 3000
    max_grad_norm: Amount = 1.0
    optimizer: Literal["muon", "adamw", "lamb"] = "muon"
    """muon = Muon for hidden matrices and AdamW for the rest; adamw or lamb = that one for all."""
    learning_rate: RateOfNewWeights = 0.002  # Peak rate of AdamW or LAMB.
    muon_learning_rate: RateOfNewWeightsByMuon = 0.008  # Peak rate of Muon.
    weight_decay: Amount = 0.0
    """Decoupled weight decay of all but biases and norms (muon: of its matrices only). 0 = none."""
    warmup_steps: Natural = 50  # Updates over which the rate rises; then it falls linearly. 0 = none.
    decay_from: Literal["start", "warmup"] = "start"
    """start = on the line from the peak at update 0, which it joins after the warm-up; warmup = from the peak."""
    schedule_steps: Natural = 0
    """Updates after which the rate is 0, more than max_steps where a next phase goes on. 0 = max_steps."""

    # Evaluation
    best_metric: Literal["", "loss", "mlm_loss", "mlm_accuracy", "nsp_loss", "nsp_accuracy"] = ""
    """Metric whose best evaluation is kept too, in best/ of the run folder. "" = the last model alone."""


if __name__ == "__main__":  # before the slow imports, so that --help and a wrong flag answer at once
    with cli.exit_codes():
        CONFIG = cli.parse(Config)

import math

import numpy as np
import torch
import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import Dataset
from tqdm import tqdm

from shared.data import left_out
from shared.data.batches import IGNORED, micro_batches, to_device
from shared.data.randomness import derive_seed
from shared.data.subsets import fixed_choice
from shared.data.updates import load_updates
from shared.metrics.scores import Accuracy
from shared.models.export import export_model
from shared.models.masked_heads import BertForPreTraining, MegatronBertForPreTraining
from shared.models.neighbour_heads import attend_to_neighbours
from shared.models.pretrained import check_saved_sizes, load_pretrained
from shared.optim import schedules
from shared.optim.lamb import Lamb
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
from shared.text import wordpiece
from shared.text.documents import Beginning, open_corpora, open_held_out, short_names
from shared.text.filled_masks import show_answer, show_filled
from shared.text.sentence_cache import join_caches, split_corpus
from shared.text.sentence_pairs import NUM_SPECIAL, SentencePairs, cut_padding, without_targets
from shared.text.vocabulary import num_ids

SHORT_FRACTION = 0.1  # of the pairs are made shorter, to a random length (Devlin et al. 2019, released code)
EVAL_MASK_FRACTION = 0.15  # Devlin et al. 2019, section 3.1: what published accuracies are measured at
EVAL_SEED = 0  # of the pairs and masks to evaluate on, so that runs of any seed compare
DRY_RUN_CHARACTERS = 1 << 22  # of the corpus that a dry run reads
NUM_SAMPLES = 4
USAGE = """from transformers import pipeline

print(pipeline("fill-mask", "path/of/this/folder")("The President of the United [MASK]."))"""


def check_config(cfg: Config) -> None:
    """Raise `UsageError` for what fields say against each other; their own limits stand beside them."""
    fields.check_run_control(cfg)
    fields.check_corpus(cfg)
    cli.expect(cfg.seq_length <= cfg.max_positions, "seq_length", cfg.seq_length, "at most max_positions")
    cli.expect(cfg.hidden_size % cfg.num_heads == 0, "hidden_size", cfg.hidden_size, "a multiple of num_heads")
    is_long = not cfg.schedule_steps or cfg.schedule_steps >= cfg.max_steps
    cli.expect(is_long, "schedule_steps", cfg.schedule_steps, "0, or at least max_steps")
    is_code = 2 <= len(cfg.language) <= 3 and cfg.language.isalpha()
    cli.expect(is_code, "language", cfg.language, "a code of two or three letters, such as en")
    has_run = cfg.init != "scratch" or not cfg.init_optimizer
    cli.expect(has_run, "init", cfg.init, "a run folder with checkpoints, for init_optimizer")


def check_engine(cfg: Config, accelerator: Any) -> None:
    """Raise `UsageError` for what this engine cannot do."""
    if accelerator.distributed_type == "DEEPSPEED":
        expected = "adamw or muon, for ZeRO flattens the matrices that LAMB needs"
        cli.expect(cfg.optimizer != "lamb", "optimizer", cfg.optimizer, expected)
        expected = "0 for Muon under DeepSpeed, which would clip not its gradient but its update"
        cli.expect(cfg.optimizer != "muon" or cfg.max_grad_norm == 0, "max_grad_norm", cfg.max_grad_norm, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Data


def open_data(cfg: Config, accelerator: Any) -> tuple[Any, SentencePairs, dict[str, SentencePairs]]:
    """The tokenizer, the pairs to train on, and those of each source to evaluate on."""
    columns = {"config": cfg.data_config, "text_column": cfg.text_column}
    with node_main_first(accelerator):
        texts: list[Any] = open_corpora(cfg.data, split=cfg.data_split, **columns)
        eval_texts, fraction = open_held_out(cfg)
        names = short_names([source.name for source in eval_texts or texts])
        if cfg.dry_run:
            texts = [Beginning(source, DRY_RUN_CHARACTERS) for source in texts]
            eval_texts = [Beginning(source, DRY_RUN_CHARACTERS) for source in eval_texts]
        name = cfg.tokenizer or ("" if cfg.init == "scratch" else cfg.init)
        sizes = {"vocab_size": cfg.vocab_size, "seq_length": cfg.max_positions, "lowercase": cfg.lowercase}
        sizes |= {"limit_alphabet": cfg.limit_alphabet, "min_frequency": cfg.min_frequency}
        cache_dir = cache_folder(cfg.cache_dir)
        tokenizer = wordpiece.load_or_train(name, texts, **sizes, cache_dir=cache_dir)
        knows_words = not cfg.whole_word_masking or wordpiece.tells_words(tokenizer)
        expected = "False with a tokenizer whose tokens do not tell where words begin"
        cli.expect(knows_words, "whole_word_masking", cfg.whole_word_masking, expected)
        options = {"language": cfg.language, "one_sentence_per_line": cfg.one_sentence_per_line}
        options |= {"cache_dir": cache_dir, "num_processes": usable_cores()}
        splits = [split_corpus(source, tokenizer, eval_fraction=fraction, **options) for source in texts]
        train = join_caches([of_source for of_source, _ in splits], cache_dir)
        held_out = [of_source for _, of_source in splits]
        if eval_texts:
            held_out = [split_corpus(source, tokenizer, eval_fraction=1.0, **options)[1] for source in eval_texts]
        ids = (tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)
        pairs = SentencePairs(train, ids, cfg.seq_length, SHORT_FRACTION, cfg.seed)
        evals = [SentencePairs(source, ids, cfg.seq_length, SHORT_FRACTION, EVAL_SEED) for source in held_out]
        for needed_by_all in (pairs, *evals):
            needed_by_all.epoch(0)
    return tokenizer, pairs, dict(zip(names, evals, strict=True))


def mask_tokens(
    row: dict[str, np.ndarray], vocabulary: wordpiece.Vocabulary, fraction: float, whole_words: bool, seed: int
) -> dict[str, np.ndarray]:
    """Hide `fraction` of a pair's tokens (Devlin et al. 2019, section 3.1 and appendix A.1).

    Of the chosen tokens 80 % become [MASK], 10 % a random token, 10 % stay. With `whole_words` the tokens of a word are
    chosen together: words in random order, each if it still fits, as in the released code.

    Returns:
        The row with input_ids (T,) changed, masked_positions (M,) and their labels (M,). M is the same for all rows; a
        place that is left has the label -100.
    """
    draw = np.random.Generator(np.random.Philox(key=seed))
    ids = row["input_ids"].copy()
    texts = np.flatnonzero((row["attention_mask"] == 1) & ~vocabulary.is_special[ids])
    follows_text = np.diff(texts, prepend=-1) == 1
    begins_word = ~(vocabulary.continues_word[ids[texts]] & follows_text) if whole_words else np.full(len(texts), True)
    words = [*np.flatnonzero(begins_word).tolist(), len(texts)]  # where each begins in texts, and the end
    number = max(1, round(len(texts) * fraction))
    chosen: list[int] = []
    for word in draw.permutation(len(words) - 1).tolist():
        if len(chosen) + words[word + 1] - words[word] <= number:
            chosen.extend(range(words[word], words[word + 1]))
        if len(chosen) == number:
            break
    positions = texts[sorted(chosen)]
    num_places = max(1, round((len(ids) - NUM_SPECIAL) * fraction))
    masked_positions, labels = np.zeros(num_places, dtype=np.int64), np.full(num_places, IGNORED, dtype=np.int64)
    masked_positions[: len(positions)], labels[: len(positions)] = positions, ids[positions]
    fate = draw.random(len(positions))
    random_ids = vocabulary.ordinary_ids[draw.integers(len(vocabulary.ordinary_ids), size=len(positions))]
    ids[positions] = np.where(fate < 0.8, vocabulary.mask_token_id, np.where(fate < 0.9, random_ids, ids[positions]))
    return {**row, "input_ids": ids, "masked_positions": masked_positions, "labels": labels}


@dataclass(frozen=True)
class MaskedUpdates(Dataset):
    """Item `step` is what update `step` sees on this process: a function of seed and step, whoever reads it.

    Attributes:
        cfg: of the run.
        pairs: to train on.
        vocabulary: of the tokenizer.
        micro_batch_size: pairs of a micro-batch.
        order: global_batch_size, rank and num_processes.
    """

    cfg: Config
    pairs: SentencePairs
    vocabulary: wordpiece.Vocabulary
    micro_batch_size: int
    order: dict[str, int]

    def __getitem__(self, step: int) -> list[dict[str, np.ndarray]]:
        """The micro-batches of update `step`."""
        fraction, whole_words, seed = self.cfg.mask_fraction, self.cfg.whole_word_masking, self.cfg.seed
        rows = []
        for epoch, pair in self.pairs.samples_of_update(step, **self.order):
            row, draw = self.pairs.read(epoch, pair), derive_seed(seed, "mask", epoch, pair)
            rows.append(mask_tokens(row, self.vocabulary, fraction, whole_words, draw))
        return [cut_padding(batch) for batch in micro_batches(rows, self.micro_batch_size)]


# ----------------------------------------------------------------------------------------------------------------------
# Model

MODEL_CLASSES = {"bert": BertForPreTraining, "megatron-bert": MegatronBertForPreTraining}


def build_model(cfg: Config, tokenizer: Any) -> Any:
    """A model from `init`, or a new one of the chosen architecture, in float32."""
    model_type = {"bert": "bert", "megatron": "megatron-bert"}[cfg.architecture]
    dropouts = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob"), cfg.dropout)
    sizes = {
        "model_type": model_type,
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size or 4 * cfg.hidden_size,
        "num_hidden_layers": cfg.num_layers,
        "num_attention_heads": cfg.num_heads,
        "max_position_embeddings": cfg.max_positions,
    }
    torch.manual_seed(derive_seed(cfg.seed, "init"))
    if cfg.init == "scratch":
        vocab_size = math.ceil(num_ids(tokenizer) / 64) * 64  # tensor cores want multiples
        others = {"vocab_size": vocab_size, "pad_token_id": tokenizer.pad_token_id, **dropouts}
        model = MODEL_CLASSES[model_type](transformers.AutoConfig.for_model(**sizes, **others))
        if cfg.neighbour_heads:
            heads = [layer.attention.self for layer in model.bert.encoder.layer]
            blocks = [(head.query.weight, head.key.weight) for head in heads]
            table, std = model.bert.embeddings.position_embeddings.weight, model.config.initializer_range
            attend_to_neighbours(table, blocks, cfg.num_heads, std, derive_seed(cfg.seed, "positions"))
    else:
        check_saved_sizes(cfg.init, sizes, tokenizer)
        model = load_pretrained(MODEL_CLASSES[model_type], cfg.init, "init", **dropouts)
    if cfg.gradient_checkpointing:
        model.activation_checkpointing_enable()
    return model


# ----------------------------------------------------------------------------------------------------------------------
# Objective


def forward(model: Any, batch: dict[str, Tensor]) -> Any:
    """Logits of the masked tokens and of the next sentence, see `masked_heads`."""
    inputs = ("input_ids", "token_type_ids", "attention_mask", "masked_positions")
    return model(**{name: batch[name] for name in inputs})


def loss_sums(output: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats: of all masked tokens, and of all answers whether the next sentence is one."""
    both = (output.prediction_logits, output.seq_relationship_logits)
    token_logits, next_logits = (logits.to(torch.promote_types(logits.dtype, torch.float32)) for logits in both)
    mlm = cross_entropy(token_logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=IGNORED, reduction="sum")
    return mlm, cross_entropy(next_logits, batch["next_sentence_label"], reduction="sum")


# ----------------------------------------------------------------------------------------------------------------------
# Evaluation


def row_to_evaluate(pairs: SentencePairs, pair: int, vocabulary: wordpiece.Vocabulary) -> dict[str, np.ndarray]:
    """A pair with the same tokens hidden at every call, one by one, whatever the training masks are."""
    seed = derive_seed(EVAL_SEED, "mask", pair)
    return mask_tokens(pairs.read(0, pair), vocabulary, EVAL_MASK_FRACTION, whole_words=False, seed=seed)


def evaluate(
    accelerator: Any,
    model: Any,
    sources: dict[str, SentencePairs],
    vocabulary: wordpiece.Vocabulary,
    batch_size: int,
    most: int = 0,
) -> dict[str, float]:
    """Losses (nats) and accuracies of both objectives, of all together and of each source.

    Over every pair once, at most so many of each source, 0 = all.
    """
    size = (batch_size, most)
    found = {name: answers_to(accelerator, model, pairs, vocabulary, *size) for name, pairs in sources.items()}
    nlls = sum(nlls for nlls, *_ in found.values())
    together = (np.concatenate([of_source[kind] for of_source in found.values()], axis=1) for kind in (1, 2))
    results = losses_and_accuracies(nlls, *together)
    for source in found if len(found) > 1 else ():
        of_source = {key.removeprefix("eval/"): value for key, value in losses_and_accuracies(*found[source]).items()}
        results |= {f"eval/{source}/{name}": value for name, value in of_source.items()}
    return results


def losses_and_accuracies(nlls: np.ndarray, tokens: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Means over what `answers_to` found."""
    mlm_loss, nsp_loss = nlls[0].item() / tokens.shape[1], nlls[1].item() / answers.shape[1]
    return {
        "eval/loss": mlm_loss + nsp_loss,
        "eval/mlm_loss": mlm_loss,
        "eval/mlm_accuracy": Accuracy().compute(predictions=tokens[0], references=tokens[1])["accuracy"],
        "eval/nsp_loss": nsp_loss,
        "eval/nsp_accuracy": Accuracy().compute(predictions=answers[0], references=answers[1])["accuracy"],
    }


@torch.no_grad()
def answers_to(
    accelerator: Any, model: Any, pairs: SentencePairs, vocabulary: wordpiece.Vocabulary, batch_size: int, most: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both losses (2,), summed over every pair once; of masked tokens and of sentences (2, N) guesses and targets."""
    model.eval()
    chosen = fixed_choice(len(pairs.epoch(0)), most)
    by_length = chosen[np.argsort(pairs.lengths(pairs.epoch(0)[chosen]), kind="stable")]
    starts = range(0, len(by_length), batch_size * accelerator.num_processes)
    nlls, tokens, answers = np.zeros(2), [], []
    is_quiet = not accelerator.is_main_process or None  # None: where there is no terminal
    bar = tqdm(starts, desc="evaluating", delay=2, leave=False, disable=is_quiet)
    for first in until_stopped(accelerator, bar):
        mine = by_length[first + accelerator.process_index * batch_size :][:batch_size]
        rows = [row_to_evaluate(pairs, pair, vocabulary) for pair in mine.tolist()]
        # A process that has no pair left takes one without a target: all must run equally often.
        rows = rows or [without_targets(row_to_evaluate(pairs, 0, vocabulary))]
        batch = to_device(cut_padding(micro_batches(rows, batch_size)[0]), accelerator.device)
        output = forward(model, batch)
        nlls += [nll.item() for nll in loss_sums(output, batch)]
        tokens.append(torch.stack([output.prediction_logits.argmax(-1), batch["labels"]]).flatten(1))
        answers.append(torch.stack([output.seq_relationship_logits.argmax(-1), batch["next_sentence_label"]]))
    model.train()
    gathered = gather_objects(accelerator, [nlls, *(torch.cat(both, 1).cpu().numpy() for both in (tokens, answers))])
    nlls = np.sum([process[0] for process in gathered], axis=0)
    tokens, answers = (np.concatenate([process[kind] for process in gathered], axis=1) for kind in (1, 2))
    return nlls, *(both[:, both[1] != IGNORED] for both in (tokens, answers))


@torch.no_grad()
def sample(
    accelerator: Any, model: Any, tokenizer: Any, sources: dict[str, SentencePairs], vocabulary: wordpiece.Vocabulary
) -> str:
    """What the model fills into the masks of `NUM_SAMPLES` pairs and answers about them; every process takes part."""
    model.eval()
    pairs, texts = next(iter(sources.values())), []
    for pair in np.linspace(0, len(pairs.epoch(0)) - 1, NUM_SAMPLES, dtype=np.int64).tolist():
        batch = cut_padding(micro_batches([row_to_evaluate(pairs, pair, vocabulary)], 1)[0])
        output = forward(model, to_device(batch, accelerator.device))
        hidden = [batch[name][0] for name in ("input_ids", "masked_positions", "labels")]
        filled = show_filled(tokenizer, *hidden, output.prediction_logits[0].argmax(-1).cpu())
        answers = (output.seq_relationship_logits[0].argmax(), batch["next_sentence_label"][0])
        texts.append(f"{filled}\n=> {show_answer(*map(int, answers))}")
    model.train()
    return "\n\n".join(texts)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def build_optimizer(cfg: Config, model: Any) -> torch.optim.Optimizer:
    """Muon for hidden matrices and AdamW for embeddings, heads, norms and biases; or AdamW or LAMB for all."""
    hidden, tables, vectors = split_weights(model, model.cls.seq_relationship.weight)
    if cfg.optimizer == "muon":
        matrices = {"params": hidden, "lr": cfg.muon_learning_rate, "weight_decay": cfg.weight_decay, "use_muon": True}
        rest = {"params": tables + vectors, "lr": cfg.learning_rate, "weight_decay": 0.0, "use_muon": False}
        return MuonWithAdamW([matrices, rest])
    # No decay of norms and biases: released code of Devlin et al. 2019, optimization.py; epsilon from there too.
    groups = [
        {"params": hidden + tables, "weight_decay": cfg.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    if cfg.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=cfg.learning_rate, betas=(0.9, 0.999), eps=1e-6, fused=True)
    # Where there is no decay, a step is as long as Adam's: released code of You et al. 2020.
    groups[1]["trust_ratio"] = False
    return Lamb(groups, cfg.learning_rate, betas=(0.9, 0.999), eps=1e-6)


def learning_rate_factor(cfg: Config, step: int) -> float:
    """Share of the peak rate at `step`; it is 0 at schedule_steps."""
    max_steps = cfg.schedule_steps or cfg.max_steps
    if cfg.decay_from == "start":  # released code of Devlin et al. 2019, optimization.py
        return schedules.warmup_line_from_start(step, max_steps, cfg.warmup_steps)
    return schedules.warmup_stable_decay(step, max_steps, cfg.warmup_steps, decay_fraction=1.0)


def train_update(cfg: Config, accelerator: Any, model: Any, optimizer: Any, batches: list[Any], step: int) -> Any:
    """One optimizer update: its losses (nats: MLM a masked token, NSP a pair) over all processes and micro-batches.

    The objective is the sum of both means (Devlin et al. 2019, appendix A.2).

    Returns:
        The two losses (2,), and the gradient norm.
    """
    num_masked = accelerator.reduce(sum((batch["labels"] != IGNORED).sum() for batch in batches), "sum")
    num_targets = torch.stack([num_masked, torch.full_like(num_masked, cfg.global_batch_size)])
    # accelerate and DeepSpeed divide by the accumulation, and all engines average over processes.
    scales = accelerator.gradient_accumulation_steps * accelerator.num_processes / num_targets
    nlls = []
    for micro_step, batch in enumerate(batches):
        torch.manual_seed(derive_seed(cfg.seed, "dropout", step, micro_step, accelerator.process_index))
        with accelerator.accumulate(model):
            micro_nlls = torch.stack(loss_sums(forward(model, batch), batch))
            accelerator.backward((micro_nlls * scales).sum())
        nlls.append(micro_nlls.detach())
    grad_norm = clip_and_step(accelerator, model, optimizer, cfg.max_grad_norm)
    return accelerator.reduce(torch.stack(nlls).sum(0), "sum") / num_targets, grad_norm


def main(cfg: Config) -> None:
    """Train, evaluate, save, and leave a model that `from_pretrained` loads."""
    check_config(cfg)
    accelerator, micro_batch_size = start(cfg)
    check_engine(cfg, accelerator)
    tokenizer, pairs, eval_pairs = open_data(cfg, accelerator)
    vocabulary = wordpiece.look_up_vocabulary(tokenizer)
    order = {"global_batch_size": cfg.global_batch_size, **rank_of(accelerator)}
    updates = MaskedUpdates(cfg, pairs, vocabulary, micro_batch_size, order)
    if cfg.dry_run:
        report_costs(cfg, accelerator, tokenizer, pairs, eval_pairs, to_device(updates[0][0], accelerator.device))
        return
    model = build_model(cfg, tokenizer)
    facts = describe(cfg, accelerator, model, pairs)
    accelerator.print(summary.table(facts))
    if cfg.compile:
        model.compile()
    model, optimizer = accelerator.prepare(model, for_engine(accelerator, build_optimizer(cfg, model)))

    run = Run(cfg, accelerator, Path(cfg.init) if cfg.init_optimizer else None)
    best, (due, metrics) = Best(cfg.best_metric and f"eval/{cfg.best_metric}", run.state), run.owed
    loader = load_updates(updates, range(run.step, cfg.max_steps), cfg.num_workers, accelerator.device)
    data = {"data": cfg.data, "data_fingerprint": [pairs.cache.fingerprint], "init": cfg.init}
    data["eval_data_fingerprint"] = [source.cache.fingerprint for source in eval_pairs.values()]
    data["language"] = "" if cfg.one_sentence_per_line else cfg.language  # by whose rules the text was split
    run.record(Path(__file__), {**data, **facts})
    model.train()
    for step, batches in run.updates(loader, facts["flops_per_pair"]):
        if batches:  # else the evaluation alone is left, which a signal had ended
            # Of this process; others' are nearly as many.
            own_tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)
            factor = learning_rate_factor(cfg, step)
            set_learning_rates(optimizer, factor)  # before the backward pass: DeepSpeed steps inside it
            batches = [to_device(batch, accelerator.device) for batch in batches]
            losses, grad_norm = train_update(cfg, accelerator, model, optimizer, batches, step)

            tokens = own_tokens * accelerator.num_processes
            due = run.count_update(grad_norm, samples=cfg.global_batch_size, units=tokens)
            metrics = {}
            if due.log:
                mlm_loss, nsp_loss = losses.tolist()
                metrics = {"train/loss": mlm_loss + nsp_loss, "train/mlm_loss": mlm_loss, "train/nsp_loss": nsp_loss}
                metrics |= {"train/learning_rate": cfg.learning_rate * factor, "train/grad_norm": grad_norm.item()}
                metrics |= run.rates("tokens")
        if due.evaluate:
            with run.evaluation(metrics):
                metrics |= evaluate(accelerator, model, eval_pairs, vocabulary, micro_batch_size, cfg.eval_rows)
                run.write_samples(shown := sample(accelerator, model, tokenizer, eval_pairs, vocabulary))
                if best.is_better(run.step, metrics, shown):
                    export_model(accelerator, model, tokenizer, run.folder / best.FOLDER)
        with run.pause():
            run.write(metrics)
            if due.save:
                run.save(best.state())
            if due.push:
                export_model(accelerator, model, tokenizer, run.folder)
                run.push()

    export_model(accelerator, model, tokenizer, run.folder)
    results = {"training_flops": facts["flops_per_pair"] * cfg.global_batch_size * run.step, **best.kept()}
    samples = sample(accelerator, model, tokenizer, eval_pairs, vocabulary)
    run.finish("fill-mask", USAGE, results=results, samples=samples, figures={})


def describe(cfg: Config, accelerator: Any, model: Any, pairs: SentencePairs) -> dict[str, Any]:
    """The numbers that follow from the configuration, for the table at the start and run.json."""
    row = torch.zeros(1, cfg.seq_length, dtype=torch.int64)
    num_places = max(1, round((cfg.seq_length - NUM_SPECIAL) * cfg.mask_fraction))
    inputs = {"input_ids": row, "token_type_ids": row, "attention_mask": row, "masked_positions": row[:, :num_places]}
    return {
        "parameters": model.num_parameters(),
        "flops_per_pair": training_flops(model, inputs),
        "pairs_per_update": cfg.global_batch_size,
        "updates_per_epoch": "unknown" if cfg.dry_run else pairs.updates_per_epoch(cfg.global_batch_size),
        "left_out": left_out.counts(),
        **summary.describe_engine(accelerator),
    }


def report_costs(
    cfg: Config, accelerator: Any, tokenizer: Any, pairs: Any, eval_pairs: dict[str, Any], batch: dict[str, Tensor]
) -> None:
    """The dry run: what the model sees, what one device holds and, where an update is quick, how long the run takes."""
    seconds = None
    with dry_run.without_memory():
        model = build_model(cfg, tokenizer)
        facts = describe(cfg, accelerator, model, pairs)
        costs = dry_run.costs(accelerator, model, batch, state_bytes_per_parameter(build_optimizer(cfg, model)))
    if dry_run.can_time(accelerator, facts["flops_per_pair"] * len(batch["input_ids"]), costs["memory: total"]):
        model = build_model(cfg, tokenizer)
        seconds = dry_run.time_update(accelerator, model, for_engine(accelerator, build_optimizer(cfg, model)), batch)
    rows = {**facts, **dry_run.cost_rows(costs, seconds, cfg.max_steps, compiles=cfg.compile)}
    numbers = [len(fixed_choice(len(some.epoch(0)), cfg.eval_rows)) for some in eval_pairs.values()]
    num_batches = dry_run.num_batches(accelerator, numbers, len(batch["input_ids"]))
    is_least = any(number != cfg.eval_rows for number in numbers)  # of the beginning of the data
    rows |= dry_run.evaluation_rows(cfg, seconds, num_batches, is_least=is_least)
    accelerator.print(f"first row: {tokenizer.decode(batch['input_ids'][0])}\n\n{summary.table(rows)}")


if __name__ == "__main__":
    with cli.exit_codes():
        main(CONFIG)
