"""Low-rank adapters (LoRA, Hu et al. 2021) of text-to-image models: added, written as diffusers reads them, merged."""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from shared.command_line import expect
from shared.models.adapters import adapter_of, config_of, inject
from shared.models.export import move_files, new_folder

ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # by which `load_lora_weights` finds it in a folder
# Matrices of attention, as in diffusers' train_text_to_image_lora.py (queries, keys, values, outputs); PRX has three of
# them in one, and CLIP other names.
_TARGETS = {
    "UNet2DConditionModel": ["to_q", "to_k", "to_v", "to_out.0"],
    "PRXTransformer2DModel": ["img_qkv_proj", "txt_kv_proj", "to_out.0"],
    "CLIPTextModel": ["q_proj", "k_proj", "v_proj", "out_proj"],
}


def add_lora(network: nn.Module, *, rank: int, alpha: int, dropout: float) -> None:
    """Put an adapter beside the matrices of the network's attention, and leave nothing else of it to train.

    It begins as nothing: A is normal, B is zero (section 4.1).

    Args:
        network: a UNet or PRX transformer of diffusers, or a text encoder of CLIP; changed in place.
        rank: of the adapter.
        alpha: its product is scaled by alpha / rank.
        dropout: probability with which an input of it is dropped; 0 = none.

    Raises:
        UsageError: the rank is more than any of the matrices has.
    """
    from peft import LoraConfig

    targets = _TARGETS[type(network).__name__]
    adapted = [module for name, module in network.named_modules() if name.endswith(tuple(f".{one}" for one in targets))]
    largest = max(min(module.weight.shape) for module in adapted if isinstance(module, nn.Linear))
    expect(rank <= largest, "lora_rank", rank, f"at most {largest}, the smaller side of the largest matrix of init")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, init_lora_weights="gaussian", target_modules=targets
    )
    inject(config, network)


def write_lora(
    pipeline_class: Any, unet: nn.Module, text_encoder: nn.Module | None, weights: dict[str, Tensor], run_dir: Path
) -> None:
    """Write adapters into the run folder as `load_lora_weights` reads them. The main process calls this.

    Args:
        pipeline_class: of diffusers, whose format it is.
        unet: with an adapter.
        text_encoder: with an adapter; None = it has none.
        weights: of a module that holds both, as `network` and `text_encoder`.
        run_dir: the run folder.
    """
    parts = {"unet_lora_layers": adapter_of(unet, _below(weights, "network"))}
    parts["unet_lora_adapter_metadata"] = _config_to_load(unet)
    if text_encoder is not None:
        parts["text_encoder_lora_layers"] = adapter_of(text_encoder, _below(weights, "text_encoder"))
        parts["text_encoder_lora_adapter_metadata"] = _config_to_load(text_encoder)
    aside = new_folder(run_dir / ".export")
    pipeline_class.save_lora_weights(aside, **parts)
    move_files(aside, run_dir)


def merge_lora(network: nn.Module) -> None:
    """Add the product of the adapter to the matrices that it stands beside, and take it away."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.merge()
    recurse_remove_peft_layers(network)
    del network.peft_config


def _config_to_load(network: nn.Module) -> dict[str, Any]:
    """Without dropout: diffusers 0.42 leaves what it loads in training mode, and images would be drawn with it."""
    return {**config_of(network).to_dict(), "lora_dropout": 0.0}


def _below(weights: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights of a submodule, under the names that they have in it."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
