"""Weights to start from: a run folder or a Hub id, never anything that could run code."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._subclasses import FakeTensor

from shared.command_line import UsageError, expect, one_line
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
        if is_without_values() and not options.get("output_loading_info"):
            return _shaped_like(auto_class, name, **options)
        return auto_class.from_pretrained(
            name, dtype=torch.float32, use_safetensors=True, trust_remote_code=False, **options
        )


def is_without_values() -> bool:
    """Whether tensors that are made now have shapes alone, as in a dry run."""
    return isinstance(torch.empty(0), FakeTensor)


def _shaped_like(auto_class: Any, name: str, *, attn_implementation: str | None = None, **fields: Any) -> Any:
    """A new model of the configuration of `name`, for a dry run, into which no file's values can be read."""
    from transformers import AutoConfig

    fields.pop("ignore_mismatched_sizes", None)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False, **fields)
    new = getattr(auto_class, "from_config", None) or auto_class._from_config  # an Auto class, or one of one model
    return new(config, dtype=torch.float32, attn_implementation=attn_implementation)


def load_encoder(model_class: Any, name: str, **options: Any) -> Any:
    """Load a model with a new head, also where it has one of as many classes, as `load_pretrained` does.

    Layers between encoder and classes that were pre-trained are kept.

    Raises:
        UsageError: it is not there, or lacks weights of the encoder.
    """
    model, loading = _load_quietly(model_class, name, ignore_mismatched_sizes=True, **options)
    is_inside = model.base_model_prefix
    needed = [key for key in loading["missing_keys"] if key.startswith(is_inside) and "pooler" not in key]
    missing = f"the weights of an encoder, of which {len(needed)} are not there, such as {sorted(needed)[:1]}"
    expect(not needed, "init", name, missing)
    new = {*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])}
    if not new.intersection(_head_of(model)):  # it was fine-tuned already
        _renew_head(model)
    return model


def _head_of(model: Any) -> list[str]:
    """Names of the weights that are not the encoder's."""
    return [key for key in model.state_dict() if not key.startswith(model.base_model_prefix)]


def _renew_head(model: Any) -> None:
    """Give the head the weights of a new model."""
    values = type(model)(model.config).state_dict()
    model.load_state_dict({key: values[key] for key in _head_of(model)}, strict=False)


def load_with_head(model_class: Any, name: str, class_names: Sequence[str], **options: Any) -> Any:
    """Load a model that was fine-tuned already, head and all, as `load_pretrained` does.

    Args:
        model_class: such as `transformers.AutoModelForSequenceClassification`.
        name: see `load_pretrained`.
        class_names: of the data; () where labels are numbers.
        options: passed on to `from_pretrained`.

    Raises:
        UsageError: it is not there, or has no head of these classes.
    """
    from transformers import AutoConfig

    with load_errors("init", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    known = [config.id2label[label] for label in range(config.num_labels)]
    is_unnamed = known == [f"LABEL_{label}" for label in range(len(class_names) or 1)]
    has = f"a head of {len(known)} classes ({', '.join(known[:5])})"
    wants = (
        f"those of the data, {len(class_names)} classes ({', '.join(class_names[:5])})" if class_names else "numbers"
    )
    expect(
        is_unnamed or known == list(class_names), "keep_head", True, f"init to have a head for {wants}; it has {has}"
    )
    model, loading = _load_quietly(model_class, name, ignore_mismatched_sizes=True, **options)
    missing = [*loading["missing_keys"], *(key for key, *_ in loading["mismatched_keys"])]
    expect(not missing, "keep_head", True, f"init to have all weights, {name!r} lacks {sorted(missing)[:3]}")
    return model


def _load_quietly(model_class: Any, name: str, **options: Any) -> Any:
    """The model, and what was found of it, without the library's table of heads that come and go."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load_pretrained(model_class, name, "init", output_loading_info=True, **options)
    finally:
        logging.set_verbosity(verbosity)


def load_diffusion_model(model_class: Any, name: str, field: str, **options: Any) -> Any:
    """The same for a model of diffusers, such as `diffusers.AutoencoderKL`; `options` may have another dtype."""
    with load_errors(field, name):
        if is_without_values():
            return model_class.from_config(model_class.load_config(name, subfolder=options.get("subfolder")))
        return model_class.from_pretrained(name, use_safetensors=True, **{"dtype": torch.float32, **options})


def load_scheduler(scheduler_class: Any, name: str) -> Any:
    """The noise that the pipeline `init` was trained with, whichever sampler it makes images with.

    Args:
        scheduler_class: such as `diffusers.DDPMScheduler`.
        name: a run folder or a Hub id.

    Raises:
        UsageError: it is not there.
    """
    with load_errors("init", name):
        return scheduler_class.from_pretrained(name, subfolder="scheduler")


@contextlib.contextmanager
def load_errors(field: str, name: str) -> Iterator[None]:
    """Make one `UsageError` of whatever goes wrong while the block loads `name`."""
    try:
        yield
    except Exception as error:  # hub, format and shape errors have no common class
        reason = one_line(error)
        where = "" if os.path.exists(name) else "there is no such folder here, and as a Hub id: "
        expected = f"expected a run folder or a Hub id of such a model: {where}{reason}"
        raise UsageError(f"{field}: {name!r}: {expected}") from error


def label_numbers(class_names: Sequence[str]) -> dict[str, Any]:
    """What the configuration of a model that classifies says of its classes: id2label and label2id."""
    return {"id2label": dict(enumerate(class_names)), "label2id": {name: i for i, name in enumerate(class_names)}}


def load_classifier(model_class: Any, name: str, class_names: Sequence[str]) -> Any:
    """A model that classifies, in float32; where it knows other classes, by number or by name, its head is new.

    Classes that nobody named, LABEL_0 and so on, are taken for these.

    Args:
        model_class: such as `transformers.ResNetForImageClassification`.
        name: see `load_pretrained`.
        class_names: by class.

    Raises:
        UsageError: it is not there, or holds no such model.
    """
    from transformers import AutoConfig

    with load_errors("init", name):
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    known = [config.id2label[label] for label in range(config.num_labels)]
    model = load_pretrained(model_class, name, "init", ignore_mismatched_sizes=True, **label_numbers(class_names))
    is_unnamed = known == [f"LABEL_{label}" for label in range(len(known))]
    if len(known) == len(class_names) and known != list(class_names) and not is_unnamed and not is_without_values():
        _renew_head(model)
    return model


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
    check_tokenizer(tokenizer, config.vocab_size)


def check_tokenizer(tokenizer: Any, known: int) -> None:
    """Refuse a tokenizer with more ids than the `known` ones of `init`."""
    expected = f"at most the {known} tokens of init, not {num_ids(tokenizer)}"
    expect(num_ids(tokenizer) <= known, "tokenizer", tokenizer.name_or_path, expected)
