"""Causal language models to go on from, checked for what packed rows need."""

from typing import Any

import torch

from shared.command_line import expect
from shared.models.adapters import load_with_adapter
from shared.models.pretrained import check_tokenizer, is_without_values, load_errors

_PROBED_TOKENS = 8  # of each of two documents


def set_dropout(model: Any, probability: float) -> None:
    """Let all dropout of a model of transformers, of activations and of attention weights, have one probability."""
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
        for name in ("attention_dropout", "dropout"):  # of attention layers, which hand it to their kernel
            value = getattr(module, name, None)
            if isinstance(value, float | int) and not isinstance(value, bool):
                setattr(module, name, probability)


def load_causal_lm(name: str, tokenizer: Any, seq_length: int, attention: str) -> Any:
    """The causal language model that `init` names, or an adapter's base with it merged, in float32.

    Args:
        name: see `load_pretrained`.
        tokenizer: whose ids it will see.
        seq_length: tokens of a row.
        attention: transformers' name of the attention kernel.

    Raises:
        UsageError: it is not there, or the tokenizer or the rows do not fit it, or a token sees more than the ones
            before it in its document.
    """
    from transformers import AutoModelForCausalLM

    model = load_with_adapter(AutoModelForCausalLM, name, "init", attn_implementation=attention)
    _check(model, name, tokenizer, seq_length)
    return model


def new_causal_lm(name: str, tokenizer: Any, seq_length: int, attention: str) -> Any:
    """A model of the sizes of `name`, a run folder or Hub id, with weights as the library begins them, in float32.

    Raises:
        UsageError: see `load_causal_lm`.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    with load_errors("tokenizer", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    _check(model, name, tokenizer, seq_length)
    return model


def _check(model: Any, name: str, tokenizer: Any, seq_length: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", seq_length)
    check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    expect(seq_length <= longest, "seq_length", seq_length, f"at most {longest}, the longest row of init")
    if not is_without_values():
        _check_what_tokens_see(model, name)


@torch.no_grad()
def _check_what_tokens_see(model: Any, name: str) -> None:
    """Refuse a model in which documents of a packed row, or later tokens, change what an earlier token predicts.

    Positions that begin anew part documents in most models of transformers; in those with recurrent or convolutional
    layers, or with positions of their own, they do not.
    """
    length = min(_PROBED_TOKENS, getattr(model.config, "max_position_embeddings", _PROBED_TOKENS))
    positions = torch.arange(length).repeat(2)[None]
    ids = torch.arange(2 * length)[None]
    others = [ids.index_fill(1, changed, 0) for changed in (torch.arange(length), torch.tensor([2 * length - 1]))]
    attention = model.config._attn_implementation
    with load_errors("init", name):  # one that takes no positions, or has no sdpa, or needs other inputs
        model.set_attn_implementation("sdpa" if attention == "flex_attention" else attention)  # which CPUs lack
        logits, other_first, other_last = (
            model(input_ids=row, position_ids=positions, use_cache=False).logits for row in (ids, *others)
        )
    model.set_attn_implementation(attention)
    leaks = {
        "documents of one row see each other in it": (other_first - logits)[:, length:],
        "tokens see those behind them in it": (other_last - logits)[:, :-1],
    }
    for leak, differences in leaks.items():
        is_apart = differences.abs().max() <= 1e-5 * logits.abs().max()
        expect(bool(is_apart), "init", name, f"another architecture than {model.config.model_type}: {leak}")
