"""Text from a causal language model."""

from typing import Any

import torch

from shared.text import tokenization
from shared.text.vocabulary import special_ids


@torch.no_grad()
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
    longest = getattr(model.config, "max_position_embeddings", None) or len(ids) + max_new_tokens
    ids = ids[-max(longest - max_new_tokens, longest // 2) :]
    input_ids = torch.tensor([ids], device=model.device)
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
    return tokenizer.decode(output[0], skip_special_tokens=True)
