"""Low-rank adapters (LoRA, Hu et al. 2021) of causal language models, through peft: added, saved, merged, loaded."""

import contextlib
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from shared.command_line import expect
from shared.models.export import move_files, new_folder, whole_weights, without_bar
from shared.models.pretrained import is_without_values, load_errors, load_pretrained

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's for the only adapter


def add_lora(
    model: Any, base: str, *, rank: int, alpha: int, dropout: float, targets: str, tokens: Sequence[int]
) -> None:
    """Put an adapter beside matrices of the model, and leave nothing else to train.

    It begins as nothing: A is drawn, B is zero (section 4.1).

    Args:
        model: of transformers; changed in place.
        base: its run folder or Hub id, by which peft finds it again.
        rank: of the adapter.
        alpha: its product is scaled by alpha / rank.
        dropout: probability with which an input of it is dropped; 0 = none.
        targets: names of layers, with commas; "all-linear" = all but embeddings and head.
        tokens: ids that pre-training has not seen, whose rows of embeddings and head are trained too.

    Raises:
        UsageError: there is no such layer, or the rank is more than any matrix has.
    """
    from peft import LoraConfig
    from transformers.pytorch_utils import Conv1D  # of GPT-2

    wanted, head = [name.strip() for name in targets.split(",")], model.get_output_embeddings()
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear | Conv1D)]
    known = {name.rpartition(".")[2]: None for name in layers if model.get_submodule(name) is not head}
    expected = f"all-linear, or layers of init: {', '.join(known)}"
    expect(targets == "all-linear" or set(wanted) <= known.keys(), "lora_targets", targets, expected)
    largest = max(min(model.get_submodule(name).weight.shape) for name in layers)
    expect(rank <= largest, "lora_rank", rank, f"at most {largest}, the smaller side of the largest matrix of init")
    tables = [model.get_input_embeddings(), *([] if model.config.tie_word_embeddings else [head])]
    names = [name.rpartition(".")[2] for name, module in model.named_modules() if any(module is one for one in tables)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if targets == "all-linear" else wanted,
        trainable_token_indices={name: list(tokens) for name in names} if tokens else None,
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(Path(base).absolute()) if Path(base).is_dir() else base,
    )
    inject(config, model)


def inject(config: Any, model: Any) -> None:
    """Put an adapter into the model itself, so that it stays what it is, and leave nothing else to train.

    Args:
        config: `peft.LoraConfig`.
        model: of transformers or diffusers; changed in place, the configuration its `peft_config`.
    """
    from peft import inject_adapter_in_model

    with _where_they_are() if is_without_values() else contextlib.nullcontext():
        inject_adapter_in_model(config, model, _NAME)
    model.peft_config = {_NAME: config}


def adapter_of(model: Any, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of the model's adapter alone, among all `weights` of the model, whole, as peft names them."""
    from peft import get_peft_model_state_dict

    adapter = get_peft_model_state_dict(model, state_dict=weights, adapter_name=_NAME)
    return {name: weight.contiguous() for name, weight in adapter.items()}


def config_of(model: Any) -> Any:
    """The `peft.LoraConfig` of the model's adapter."""
    return model.peft_config[_NAME]


@contextlib.contextmanager
def _where_they_are() -> Iterator[None]:
    """Let modules not be moved: peft moves adapters to the model's device, and a dry run's cannot be moved."""
    to = torch.nn.Module.to
    # peft calls it at several places, and has no switch; for the length of one injection all modules stay.
    torch.nn.Module.to = lambda module, *args, **options: module  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.nn.Module.to = to  # type: ignore[method-assign]


def is_adapter(name: str) -> bool:
    """Whether a run folder, any folder, or a repository of the Hub holds an adapter instead of a model."""
    from transformers.utils import cached_file

    if Path(name).is_dir():
        return (Path(name) / ADAPTER_CONFIG).is_file()
    try:
        return cached_file(name, ADAPTER_CONFIG, _raise_exceptions_for_missing_entries=False) is not None
    except (OSError, ValueError):  # no such repository, no network, no such name: loading it will say
        return False


def load_with_adapter(auto_class: Any, name: str, field: str, **options: Any) -> Any:
    """`load_pretrained`, and where `name` is an adapter, its base with the adapter merged into it.

    Raises:
        UsageError: it is not there, or the adapter's base is not.
    """
    if not is_adapter(name):
        return load_pretrained(auto_class, name, field, **options)
    from peft import PeftConfig, PeftModel

    with load_errors(field, name):
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    has_base = bool(base) and (Path(base).is_dir() or not Path(base).is_absolute())
    expect(has_base, field, name, f"a model, or an adapter whose base is there, which {base!r} is not")
    model = load_with_adapter(auto_class, base, field, **options)
    if is_without_values():
        return model
    with load_errors(field, name):
        return PeftModel.from_pretrained(model, name).merge_and_unload().requires_grad_(True)


def export_adapter(accelerator: Any, model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write the adapter alone as peft and `AutoPeftModelForCausalLM` read it. Every process calls this."""
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        aside = new_folder(run_dir / ".export")
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        _write_adapter(bare, weights, aside)
        bare.generation_config.save_pretrained(aside)  # which tokens end an answer
        tokenizer.save_pretrained(aside)
        move_files(aside, run_dir)
    accelerator.wait_for_everyone()


def export_merged(accelerator: Any, model: Any, tokenizer: Any, run_dir: Path, base: str) -> None:
    """Write `base` with the model's adapter merged into it, as `export_model` does. Every process calls this."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        aside, adapter = new_folder(run_dir / ".export"), new_folder(run_dir / ".adapter")
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        _write_adapter(bare, weights, adapter)
        with without_bar():
            whole = load_with_adapter(AutoModelForCausalLM, base, "init")
            merged = PeftModel.from_pretrained(whole, adapter).merge_and_unload()
            merged.generation_config = bare.generation_config
            merged.save_pretrained(aside)
        shutil.rmtree(adapter)
        tokenizer.save_pretrained(aside)
        move_files(aside, run_dir)
    accelerator.wait_for_everyone()


def _write_adapter(bare: Any, weights: dict[str, torch.Tensor], folder: Path) -> None:
    config_of(bare).save_pretrained(str(folder))
    named = {f"base_model.model.{name}": weight for name, weight in adapter_of(bare, weights).items()}
    save_file(named, folder / ADAPTER_WEIGHTS, metadata={"format": "pt"})
