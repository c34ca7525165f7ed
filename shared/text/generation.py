"""Text from a causal language model."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shared.text import tokenization
from shared.text.vocabulary import special_ids


def continue_prompt(
    model: Any,
    tokenizer: Any,
    prompt: str,
    seed: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    **options: Any,
) -> str:
    """Sample a continuation of `prompt` (nucleus sampling, Holtzman et al. 2020); the same seed gives the same text.

    Args:
        model: unwrapped, in any mode; its mode is restored.
        tokenizer: the begin token is put before the prompt as it was before every training document.
        prompt: may be empty; its beginning, and what would be beyond the model's longest row, are dropped.
        seed: of the draws.
        max_new_tokens: at most so many tokens are added; the end token ends earlier.
        temperature: 0 takes the likeliest token every time.
        top_p: smallest probability mass to draw from.
        options: passed on to `generate`, such as a streamer.

    Returns:
        Prompt and continuation.
    """
    ids = [special_ids(tokenizer)[0], *tokenization.encode(tokenizer.backend_tokenizer, prompt)]
    ids = ids[-room_for_prompt(model, max_new_tokens) :]
    options |= {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    added = continue_ids(model, tokenizer, ids, seed, **options)
    return tokenizer.decode([*ids, *added], skip_special_tokens=True)


def room_for_prompt(model: Any, max_new_tokens: int) -> int:
    """Tokens that a prompt may have, half of the model's longest row at least; the continuation gets what is left."""
    longest = getattr(model.config, "max_position_embeddings", None) or sys.maxsize
    return max(longest - max_new_tokens, longest // 2)


@torch.no_grad()
def continue_ids(
    model: Any,
    tokenizer: Any,
    ids: Sequence[int],
    seed: int,
    *,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    **options: Any,
) -> list[int]:
    """The tokens that follow `ids`, of which there are at most `room_for_prompt`; see `continue_prompt`."""
    longest = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    input_ids = torch.tensor([list(ids)], device=model.device)
    drawing: dict[str, Any] = {"do_sample": False}
    if temperature:  # without top_k = 0, generate would draw from the 50 likeliest
        drawing = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    was_training = model.training
    model.eval()
    torch.manual_seed(seed)
    with torch.compiler.set_stance("force_eager"):  # growing lengths would be compiled one by one
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=min(max_new_tokens, longest - len(ids)),
            pad_token_id=tokenizer.eos_token_id,
            synced_gpus=torch.distributed.is_initialized(),  # with sharded weights all processes run equally often
            **drawing,
            **options,
        )
    model.train(was_training)
    return output[0, len(ids) :].tolist()


@torch.no_grad()
def answer_prompts(model: Any, tokenizer: Any, prompts: Sequence[np.ndarray], *, max_new_tokens: int) -> list[str]:
    """The likeliest answer to each prompt, token by token, up to an end or stop token.

    Args:
        model: unwrapped, in any mode; its mode is restored, and its generation_config says which tokens end an answer.
        tokenizer: of the model.
        prompts: token ids, with the begin token or as the chat template writes them; none is cut.
        max_new_tokens: of an answer at most.
    """
    from transformers import GenerationConfig

    longest = max(map(len, prompts))
    input_ids = torch.full((len(prompts), longest), tokenizer.pad_token_id, device=model.device)
    mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):  # to the left, so that all answers begin at the same place
        input_ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
        mask[row, longest - len(prompt) :] = 1
    was_training = model.training
    model.eval()
    with torch.compiler.set_stance("force_eager"):
        kept = model.generation_config
        output = model.generate(
            input_ids,
            attention_mask=mask,
            generation_config=GenerationConfig(  # not what a published model samples with, or punishes
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=kept.eos_token_id,
                pad_token_id=kept.pad_token_id,
            ),
            synced_gpus=torch.distributed.is_initialized(),
        )
    model.train(was_training)
    return tokenizer.batch_decode(output[:, longest:], skip_special_tokens=True)
