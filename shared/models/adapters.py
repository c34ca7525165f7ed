"""Low-rank adapters (LoRA, Hu et al. 2021) of causal language models, through peft: added, saved, merged, loaded."""

import contextlib
import copy
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.command_line import UsageError, expect
from shared.models.export import move_files, whole_weights
from shared.models.pretrained import is_without_values, load_errors, load_pretrained

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_NAME = "default"  # peft's for the only adapter


def add_lora(model: Any, base: str, *, rank: int, alpha: int, dropout: float, targets: str) -> None:
    """Put an adapter beside matrices of the model, and leave nothing else to train.

    It begins as nothing: A is drawn, B is zero (section 4.1).

    Args:
        model: of transformers; changed in place.
        base: its run folder or Hub id, by which peft finds it again.
        rank: of the adapter.
        alpha: its product is scaled by alpha / rank.
        dropout: probability with which an input of it is dropped; 0 = none.
        targets: names of the layers, comma-separated; "all-linear" = all but embeddings and head.

    Raises:
        UsageError: no layer has such a name.
    """
    from peft import LoraConfig, inject_adapter_in_model

    folder = Path(base)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=targets if targets == "all-linear" else targets.split(","),
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(folder.absolute()) if folder.is_dir() else base,
    )
    try:
        with _where_it_is() if is_without_values() else contextlib.nullcontext():
            inject_adapter_in_model(config, model, _NAME)
    except ValueError as error:
        linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
        known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in linear))
        raise UsageError(f"lora_targets: {targets!r}: expected all-linear, or layers of init: {known}") from error
    model.peft_config = {_NAME: config}


def _where_it_is() -> Any:
    """A context in which modules stay where they are: peft moves adapters to the model, a dry run's cannot be moved."""
    return mock.patch.object(torch.nn.Module, "to", lambda module, *args, **options: module)


def load_with_adapter(auto_class: Any, name: str, field: str, **options: Any) -> Any:
    """`load_pretrained`, and where `name` is an adapter's folder, its base with the adapter merged into it.

    Raises:
        UsageError: it is not there, or the adapter's base is not.
    """
    if not (Path(name) / ADAPTER_CONFIG).is_file():
        return load_pretrained(auto_class, name, field, **options)
    from peft import PeftConfig, PeftModel

    with load_errors(field, name):
        base = PeftConfig.from_pretrained(name).base_model_name_or_path
    has_base = base and (Path(base).is_dir() or not Path(base).is_absolute())
    expect(bool(has_base), field, name, f"a model, or an adapter whose base is there, which {base!r} is not")
    model = load_pretrained(auto_class, base, field, **options)
    with load_errors(field, name):
        return PeftModel.from_pretrained(model, name).merge_and_unload().requires_grad_(True)


def export_adapter(accelerator: Any, model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write the adapter alone as peft and `AutoPeftModelForCausalLM` read it. Every process calls this."""
    from peft import get_peft_model_state_dict

    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        aside = run_dir / ".export"
        shutil.rmtree(aside, ignore_errors=True)
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        adapter = get_peft_model_state_dict(bare, state_dict=weights, adapter_name=_NAME)
        bare.peft_config[_NAME].save_pretrained(str(aside))
        named = {f"base_model.model.{name}": weight.contiguous() for name, weight in adapter.items()}
        save_file(named, aside / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(aside)
        move_files(aside, run_dir)
    accelerator.wait_for_everyone()


def export_merged(accelerator: Any, model: Any, tokenizer: Any, run_dir: Path) -> None:
    """Write the model with its adapter added to its matrices, as `export_model` does. Every process calls this."""
    weights = whole_weights(accelerator, model)
    if accelerator.is_main_process:
        aside = run_dir / ".export"
        shutil.rmtree(aside, ignore_errors=True)
        bare = accelerator.unwrap_model(model, keep_torch_compile=False)
        merged = _merge(bare, weights)
        for tied in bare.all_tied_weights_keys:
            merged.pop(tied, None)
        with torch.device("meta"):
            library_class = next(kind for kind in type(bare).__mro__ if kind.__module__.startswith("transformers."))
            whole = library_class(copy.deepcopy(bare.config))
        whole.generation_config = bare.generation_config
        whole.save_pretrained(aside, state_dict=merged)
        tokenizer.save_pretrained(aside)
        move_files(aside, run_dir)
    accelerator.wait_for_everyone()


def _merge(bare: Any, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names that they have without an adapter, W + alpha / rank x B A (section 4.1)."""
    from peft.tuners.lora import LoraLayer

    merged = {name.replace(".base_layer.", "."): weight for name, weight in weights.items() if ".lora_" not in name}
    for name, layer in bare.named_modules():
        if isinstance(layer, LoraLayer):
            down, up = (weights[f"{name}.lora_{side}.{_NAME}.weight"] for side in "AB")
            change = layer.scaling[_NAME] * (up @ down)
            is_transposed = getattr(layer, "fan_in_fan_out", False)  # GPT-2's matrices are stored as (in, out)
            merged[f"{name}.weight"] = weights[f"{name}.base_layer.weight"] + (change.T if is_transposed else change)
    return merged
