"""Causal language models whose head, the product with the whole vocabulary, is computed at chosen positions only."""

import functools
from typing import Any

from torch import Tensor
from torch.nn.functional import cross_entropy


def head_at_targets(model: Any) -> Any:
    """Let `forward` take `target_positions`, and give logits of those alone.

    What comes behind the head, such as a cap on the logits, is left to the library: it only sees fewer rows. Without
    `target_positions` all is as it was, so `generate` works. The model keeps the name of its class, which is what
    config.json says.

    Args:
        model: a causal language model of transformers; changed in place.
    """
    library_class = type(model)

    @functools.wraps(library_class.forward)  # `generate` looks at what it takes
    def forward(self: Any, *args: Any, target_positions: Tensor | None = None, **inputs: Any) -> Any:
        """Logits (N, V) at `target_positions`, int64 (N,) places in the flattened (B x T); the library's without.

        With labels (B, T) there is the mean loss at those positions too.
        """
        self._target_positions = target_positions
        labels = inputs.pop("labels", None) if target_positions is not None else None
        output = library_class.forward(self, *args, **inputs)
        if labels is not None:
            output.loss = cross_entropy(output.logits.float(), labels.flatten()[target_positions])
        return output

    def keep_targets(head: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        del head
        if model._target_positions is None:
            return None
        hidden, *rest = inputs
        return (hidden.flatten(0, 1)[model._target_positions], *rest)

    model._target_positions = None
    model.__class__ = type(library_class.__name__, (library_class,), {"forward": forward})
    model.get_output_embeddings().register_forward_pre_hook(keep_targets)
    return model
