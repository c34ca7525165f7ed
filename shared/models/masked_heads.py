"""BERT's two heads for pre-training, the one over the vocabulary computed at masked positions only."""

from typing import Any

import transformers
from torch import Tensor
from torch.nn.functional import cross_entropy

from shared.data.batches import IGNORED


class AtMaskedPositions:
    """A library class with both heads, the large one computed at the masked positions only."""

    bert: Any
    cls: Any

    # FSDP2's units are to be the blocks, and all else together: the decoder shares its weight with the embeddings and
    # its bias with the head, and accelerate would put what these name into a unit without the head.
    get_input_embeddings: Any = lambda self: None
    get_output_embeddings: Any = lambda self: None

    def forward(
        self,
        input_ids: Tensor,
        token_type_ids: Tensor,
        attention_mask: Tensor,
        masked_positions: Tensor,
        labels: Tensor | None = None,
        next_sentence_label: Tensor | None = None,
    ) -> transformers.models.bert.modeling_bert.BertForPreTrainingOutput:
        """Logits (B, M, V) of the masked tokens and (B, 2) of the next sentence.

        Args:
            input_ids: (B, T)
            token_type_ids: (B, T), 0 in the first segment and 1 in the second.
            attention_mask: (B, T), 0 at padding.
            masked_positions: (B, M)
            labels: (B, M), -100 at places without a target; with them there is a loss, the library class's.
            next_sentence_label: (B,), 0 where the second segment continues the first.
        """
        encoded = self.bert(input_ids=input_ids, token_type_ids=token_type_ids, attention_mask=attention_mask)
        hidden = encoded.last_hidden_state  # (B, T, H)
        at_masks = hidden.gather(1, masked_positions[:, :, None].expand(-1, -1, hidden.shape[-1]))
        token_logits, next_logits = self.cls(at_masks, encoded.pooler_output)
        loss = None
        if labels is not None and next_sentence_label is not None:
            loss = cross_entropy(token_logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
            loss = loss + cross_entropy(next_logits, next_sentence_label)
        return transformers.models.bert.modeling_bert.BertForPreTrainingOutput(
            loss=loss, prediction_logits=token_logits, seq_relationship_logits=next_logits
        )


class BertForPreTraining(AtMaskedPositions, transformers.BertForPreTraining):
    """The library's class, under its name, which is what config.json will say."""

    _no_split_modules: Any = ("BertLayer",)


class MegatronBertForPreTraining(AtMaskedPositions, transformers.MegatronBertForPreTraining):
    """The library's class, under its name, which is what config.json will say."""

    _no_split_modules: Any = ("MegatronBertLayer",)
