"""A start for encoders with a table of positions: attention heads that see a neighbour from the first update on.

With random weights attention is uniform at first, and a masked language model stays long on a plateau where it only
knows how frequent tokens are, until some heads have found the tokens beside a mask. The table of positions can be
sinusoids, where a step to another position is a rotation, a linear map (Vaswani et al. 2017, section 3.5); so query and
key matrices exist that make a head attend to the token at a fixed distance, as a convolution does (Cordonnier et al.
2020, "On the Relationship between Self-Attention and Convolutional Layers"). Here they are what training starts from.
Nothing is held fixed, and the model's class and files are the library's.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

SHARPNESS = 8.0  # logit of the neighbour above the mean of the others: 0.98 of the attention in a row of 64
POSITION_SCALE = 2.0  # sinusoids' amplitude beside the token embeddings' standard deviation


@torch.no_grad()
def attend_to_neighbours(
    positions: Tensor, blocks: Sequence[tuple[Tensor, Tensor]], num_heads: int, token_std: float, seed: int
) -> None:
    """Fill a table of positions with sinusoids, and let the heads of each block begin with neighbours, in place.

    The first two thirds of a block's heads look at distances -1, 1, -2, 2, ..., the others stay as they are. Blocks
    must see the sum of token and position embeddings normalised (to mean square 1), as pre-norm encoders' first block
    does; in later blocks, which see the outputs of the ones before as well, the neighbour gets less.

    Args:
        positions: (rows, H), the table's weight.
        blocks: weights of query and key of each block, (H, H) as `torch.nn.Linear` has them.
        num_heads: heads of a block.
        token_std: standard deviation of the token embeddings.
        seed: of the frequencies; regular ones would make distant positions look alike.
    """
    num_rows, width = positions.shape
    head_width = width // num_heads
    num_waves = head_width // 2
    generator = torch.Generator().manual_seed(seed)
    waves = math.pi * (torch.arange(num_waves) + torch.rand(num_waves, generator=generator)) / num_waves
    amplitude = POSITION_SCALE * token_std
    angles = torch.arange(num_rows)[:, None] * waves
    positions.zero_()
    positions[:, : 2 * num_waves] = amplitude * torch.cat([angles.sin(), angles.cos()], dim=1)
    normalised = amplitude**2 / (token_std**2 + amplitude**2 * num_waves / width)  # amplitude squared after the norm
    gain = math.sqrt(SHARPNESS * math.sqrt(head_width) / (normalised * num_waves))
    for query, key in blocks:
        for head in range(2 * num_heads // 3):
            distance = (head // 2 + 1) * (1 if head % 2 else -1)
            rows = slice(head * head_width, head * head_width + 2 * num_waves)
            query[rows], key[rows] = 0.0, 0.0
            query[rows, : 2 * num_waves] = gain * _rotation(distance * waves)
            key[rows, : 2 * num_waves] = gain * torch.eye(2 * num_waves)


def _rotation(angles: Tensor) -> Tensor:
    """The matrix (2N, 2N) that takes sines and cosines of N waves to those `angles` later."""
    sine, cosine = torch.diag(angles.sin()), torch.diag(angles.cos())
    return torch.cat([torch.cat([cosine, sine], dim=1), torch.cat([-sine, cosine], dim=1)])
