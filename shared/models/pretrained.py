"""Weights to start from: a run folder or a Hub id, never anything that could run code."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from shared.command_line import UsageError, expect
from shared.text.vocabulary import num_ids


def load_pretrained(auto_class: Any, name: str, field: str, **options: Any) -> Any:
    """Load `name` in float32 from safetensors, with no remote code.

    Args:
        auto_class: such as `transformers.AutoModelForCausalLM`.
        name: a run folder, any folder of `save_pretrained`, or a Hub id.
        field: the configuration field that `name` comes from, for the message.
        options: passed on to `from_pretrained`.

    Raises:
        UsageError: it is not there, or holds no such model.
    """
    with load_errors(field, name):
        return auto_class.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
        )


def load_encoder(auto_class: Any, name: str, **options: Any) -> Any:
    """Load a model whose head, and whose pooler in front of it, may be new, as `load_pretrained` does.

    Raises:
        UsageError: it is not there, or lacks weights of the encoder.
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table of the heads that come and go
    try:
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, loading = load_pretrained(auto_class, name, "init", **options)
    finally:
        logging.set_verbosity(verbosity)
    needed = [key for key in loading["missing_keys"] if key.startswith(model.base_model_prefix) and "pooler" not in key]
    missing = f"the weights of an encoder, of which {len(needed)} are not there, such as {sorted(needed)[:1]}"
    expect(not needed, "init", name, missing)
    return model


def load_diffusion_model(model_class: Any, name: str, field: str, **options: Any) -> Any:
    """The same for a model of diffusers, such as `diffusers.AutoencoderKL`."""
    with load_errors(field, name):
        return model_class.from_pretrained(name, dtype=torch.float32, use_safetensors=True, **options)


@contextlib.contextmanager
def load_errors(field: str, name: str) -> Iterator[None]:
    """Make one `UsageError` of whatever goes wrong while the block loads `name`."""
    try:
        yield
    except Exception as error:  # hub, format and shape errors have no common class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(f"{field}: {name!r}: expected a run folder or a Hub id of such a model: {reason}") from error


def load_causal_lm(name: str, tokenizer: Any, seq_length: int, attention: str) -> Any:
    """The causal language model that `init` names, in float32.

    Args:
        name: see `load_pretrained`.
        tokenizer: whose ids it will see.
        seq_length: tokens of a row.
        attention: transformers' name of the attention kernel.

    Raises:
        UsageError: it is not there, or the tokenizer or the rows do not fit it.
    """
    from transformers import AutoModelForCausalLM

    model = load_pretrained(AutoModelForCausalLM, name, "init", attn_implementation=attention)
    longest = model.config.max_position_embeddings
    _check_tokenizer(tokenizer, model.get_input_embeddings().num_embeddings)
    expect(seq_length <= longest, "seq_length", seq_length, f"at most {longest}, the longest row of init")
    return model


def label_numbers(class_names: Sequence[str]) -> dict[str, Any]:
    """What the configuration of a model that classifies says of its classes: id2label and label2id."""
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def load_classifier(model_class: Any, name: str, class_names: Sequence[str]) -> Any:
    """A model that classifies, in float32; where it knows another number of classes, its head is new.

    Args:
        model_class: such as `transformers.ResNetForImageClassification`.
        name: see `load_pretrained`.
        class_names: by class.

    Raises:
        UsageError: it is not there, or holds no such model.
    """
    return load_pretrained(model_class, name, "init", ignore_mismatched_sizes=True, **label_numbers(class_names))


def check_sizes(name: str, network: str, config: Any, sizes: dict[str, Any]) -> None:
    """Refuse a model to start from whose sizes are not the configuration's.

    Args:
        name: of `init`, see `load_pretrained`.
        network: what it is, with its article, for the message.
        config: the model's.
        sizes: what that must say.

    Raises:
        UsageError: it says something else.
    """
    for size, value in sizes.items():
        found: Any = getattr(config, size, None)
        found = tuple(found) if isinstance(value, tuple) else found  # files know lists alone
        expect(found == value, "init", name, f"{network} with {size} {value}, as configured, got {found}")


def check_saved_sizes(name: str, sizes: dict[str, Any], tokenizer: Any) -> None:
    """The same before a model is loaded, and that it knows all tokens.

    Args:
        name: see `load_pretrained`.
        sizes: what its config.json must say, such as model_type and hidden_size.
        tokenizer: whose ids it will see.

    Raises:
        UsageError: it is not there, or says something else, or has too few token embeddings.
    """
    from transformers import AutoConfig

    with load_errors("init", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    check_sizes(name, "a model", config, sizes)
    _check_tokenizer(tokenizer, config.vocab_size)


def _check_tokenizer(tokenizer: Any, known: int) -> None:
    expected = f"at most the {known} tokens of init, not {num_ids(tokenizer)}"
    expect(num_ids(tokenizer) <= known, "tokenizer", tokenizer.name_or_path, expected)
