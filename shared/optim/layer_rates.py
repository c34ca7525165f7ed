"""Learning rates that fall from the head of a network to its first layer (Howard and Ruder 2018, section 3.2)."""

import re
from typing import Any

import torch

# A block of the library's encoders: bert.encoder.layer.3, resnet.encoder.stages.1.layers.0, model.layers.7, ...
_BLOCK = re.compile(r".*?\b(?:stages\.\d+\.layers|layers?|blocks|h)\.\d+(?=\.)")


def layer_depths(model: torch.nn.Module) -> list[int]:
    """Which block each parameter is of, from 1; 0 for embeddings and stem, one more than all blocks for the head."""
    blocks: dict[str, int] = {}
    depths = []
    for name, _ in model.named_parameters():
        if block := _BLOCK.match(name):
            depths.append(blocks.setdefault(block[0], len(blocks) + 1))
        else:
            depths.append(len(blocks) + 1 if blocks else 0)
    return depths


def layer_groups(
    model: torch.nn.Module, learning_rate: float, layer_decay: float, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups, of which each block's have a rate `layer_decay` times that of the next one.

    Args:
        model: embeddings or stem first, the head last.
        learning_rate: of the head.
        layer_decay: share of its successor's rate that a block has; 1 = the same rate for all.
        weight_decay: of matrices; norms, biases and other vectors have none.

    Returns:
        The groups, with the key `depth` of `layer_depths`.
    """
    depths = layer_depths(model)
    groups: dict[tuple[int, bool], dict[str, Any]] = {}
    for depth, parameter in zip(depths, model.parameters(), strict=True):
        decays = parameter.ndim >= 2
        rate = learning_rate * layer_decay ** (max(depths) - depth)
        new = {"params": [], "depth": depth, "lr": rate, "weight_decay": weight_decay if decays else 0.0}
        groups.setdefault((depth, decays), new)["params"].append(parameter)
    return list(groups.values())
