"""The ids of a tokenizer: how many a model must know, and those around a document."""

from typing import Any


def num_ids(tokenizer: Any) -> int:
    """One more than the largest id, which is more than `len(tokenizer)` where ids have gaps."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: Any) -> tuple[int, int]:
    """The ids put before and after each document: the begin token if there is one, and the end token."""
    begin = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    return begin, tokenizer.eos_token_id
