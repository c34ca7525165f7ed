"""A frozen pretrained text encoder of CLIP: captions as the embeddings that Stable Diffusion is conditioned on.

What is conditioned on is the whole last hidden state, padding included: Stable Diffusion's UNet masks none of it
(Rombach et al. 2022, code). A caption of 77 tokens and 768 numbers, CLIP ViT-L/14's, takes 118 KB in float16.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.command_line import expect
from shared.diffusion.latent_cache import weights_digest
from shared.models.pretrained import load_errors, load_pretrained
from shared.text.tokenization import num_ids

_CLIP_KINDS = ("clip", "clip_text_model")  # a whole CLIP and its text half, as config.json calls them


def load_text_encoder(name: str, field: str) -> tuple[Any, Any]:
    """The tokenizer and the encoder, which is in float32, frozen and in evaluation mode.

    Args:
        name: folder or Hub id of a CLIP, such as openai/clip-vit-large-patch14, or of a pipeline that has the folders
            `tokenizer` and `text_encoder`, such as stabilityai/stable-diffusion-2-base.
        field: the configuration field that `name` comes from, for the message.

    Returns:
        A fast tokenizer, whose `model_max_length` the encoder takes, and `transformers.CLIPTextModel`.

    Raises:
        UsageError: it is not there, is no CLIP, or its tokenizer is lost or of another model.
    """
    from transformers import AutoConfig, AutoTokenizer, CLIPTextModel

    with load_errors(field, name):
        in_tokenizer, in_encoder = ("tokenizer", "text_encoder") if _is_pipeline(name) else ("", "")
        kind = AutoConfig.from_pretrained(name, subfolder=in_encoder, trust_remote_code=False).model_type
    expect(kind in _CLIP_KINDS, field, name, f"a text encoder of CLIP, got {kind}")
    with load_errors(field, name):
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=in_tokenizer, trust_remote_code=False)
    # Of a folder without a tokenizer transformers makes one that knows nothing but its special tokens.
    expect(len(tokenizer) > len(set(tokenizer.all_special_ids)), field, name, "a tokenizer beside the text encoder")
    expect(tokenizer.is_fast and tokenizer.pad_token is not None, field, name, "a fast tokenizer that pads")
    encoder, loading = load_pretrained(CLIPTextModel, name, field, subfolder=in_encoder, output_loading_info=True)
    missing = sorted(loading["missing_keys"])  # which transformers makes up
    expect(not missing, field, name, f"all weights of a text encoder, {missing[:1]} and so on are not there")
    known = encoder.config.vocab_size
    expected = f"a tokenizer of the text encoder's {known} tokens, got one of {num_ids(tokenizer)}"
    expect(num_ids(tokenizer) <= known, field, name, expected)
    tokenizer.model_max_length = min(tokenizer.model_max_length, encoder.config.max_position_embeddings)
    return tokenizer, encoder.eval().requires_grad_(False)


def text_identity(tokenizer: Any, encoder: Any) -> dict[str, Any]:
    """What a cache of embeddings says of how they were made.

    Args:
        tokenizer: see `load_text_encoder`.
        encoder: see `load_text_encoder`.

    Returns:
        text_encoder: changes with anything that changes the embeddings. text_shape: [L, D], of one caption.
    """
    backend, config = tokenizer.backend_tokenizer, encoder.config
    backend.no_truncation()  # else the text of the tokenizer would tell how it was last called
    backend.no_padding()
    length = tokenizer.model_max_length
    parts = [weights_digest(encoder), config.hidden_act, config.num_attention_heads]
    parts += [backend.to_str(), tokenizer.pad_token_id, length]
    digest = hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]
    return {"text_encoder": digest, "text_shape": [length, config.hidden_size]}


class CleanedCaptions:
    """A tokenizer that cleans captions first, as `diffusers.PRXPipeline` cleans prompts.

    The cleaning, DeepFloyd IF's, leaves out addresses, brackets and other things that few captions have.

    Args:
        tokenizer: see `load_text_encoder`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.model_max_length, self.eos_token_id = tokenizer.model_max_length, tokenizer.eos_token_id

    def __call__(self, captions: list[str], **form: Any) -> Any:
        """What the tokenizer makes of the cleaned captions."""
        return self._tokenizer(clean_captions(captions), **form)


def clean_captions(captions: Iterable[str]) -> list[str]:
    """Captions as `diffusers.PRXPipeline` cleans prompts."""
    import ftfy  # noqa: F401 (diffusers takes it for given)
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

    clean = TextPreprocessor().clean_text
    return [clean(caption) for caption in captions]


def token_ids(tokenizer: Any, captions: Sequence[str]) -> tuple[np.ndarray, int]:
    """Captions as ids with start and end token, padded and cut to the length that the encoder takes.

    Args:
        tokenizer: see `load_text_encoder`.
        captions: at least one.

    Returns:
        int64 (N, L), and how many captions were cut.
    """
    length = tokenizer.model_max_length
    form = {"padding": "max_length", "truncation": True, "max_length": length, "return_overflowing_tokens": True}
    encoded = tokenizer(list(captions), **form)
    source = np.array(encoded["overflow_to_sample_mapping"])  # of each row its caption; one that is cut has more rows
    is_first = np.diff(source, prepend=-1) > 0
    return np.array(encoded["input_ids"], dtype=np.int64)[is_first], len(np.unique(source[~is_first]))


def text_masks(tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """Which tokens are the caption's, start and end included; what follows the first end token is padding.

    Args:
        tokenizer: see `load_text_encoder`; it may pad with the end token or with another.
        ids: int64 (N, L), of `token_ids`.

    Returns:
        bool (N, L).
    """
    is_end = ids == tokenizer.eos_token_id
    return np.cumsum(is_end, axis=1) - is_end == 0


def encode_captions(captions: Sequence[str], tokenizer: Any, encoder: Any) -> dict[str, Tensor]:
    """What a model of text to image sees of captions, on the CPU.

    Args:
        captions: at least one.
        tokenizer: see `load_text_encoder`.
        encoder: frozen, on the CPU; None = the model sees tokens.

    Returns:
        text: int64 tokens (N, L), or embeddings (N, L, D). text_mask: bool (N, L), see `text_masks`.
    """
    ids, _ = token_ids(tokenizer, captions)
    text, mask = torch.from_numpy(ids), torch.from_numpy(text_masks(tokenizer, ids))
    return {"text": text if encoder is None else encode_text(encoder, text), "text_mask": mask}


@torch.no_grad()
def encode_text(encoder: Any, ids: Tensor) -> Tensor:
    """Embeddings as `StableDiffusionPipeline.encode_prompt` makes them.

    Args:
        encoder: `transformers.CLIPTextModel`.
        ids: int64 (B, L), on its device.

    Returns:
        (B, L, D).
    """
    return encoder(ids).last_hidden_state


def _is_pipeline(name: str) -> bool:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    if Path(name).is_dir():
        return (Path(name) / "model_index.json").is_file()
    try:
        hf_hub_download(name, "model_index.json")
    except EntryNotFoundError:  # without a network, also where the cache does not have it
        return False
    return True
