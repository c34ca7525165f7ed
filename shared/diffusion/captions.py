"""Captions as a diffusion model reads them: CLIP's text encoder, frozen or trained along, and its tokenizer.

What is conditioned on is the whole last hidden state, padding included: Stable Diffusion's UNet masks none of it
(Rombach et al. 2022, code). A caption of 77 tokens and 768 numbers, CLIP ViT-L/14's, takes 118 KB in float16.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shared.command_line import expect
from shared.data import left_out
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from shared.diffusion.latent_cache import weights_digest
from shared.models.pretrained import check_sizes, load_errors, load_pretrained
from shared.runtime import precision
from shared.text.vocabulary import num_ids

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


def build_text_encoder(init: str, tokenizer: Any, sizes: dict[str, Any]) -> Any:
    """A text encoder of CLIP that trains along: that of `init`, or a new one.

    Args:
        init: scratch, or see `load_text_encoder`.
        tokenizer: whose ids it will see.
        sizes: what its configuration says, such as hidden_size.

    Returns:
        `transformers.CLIPTextModel`, in float32.

    Raises:
        UsageError: see `load_text_encoder`; or it has other sizes.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if init == "scratch":
        names = ("bos_token_id", "eos_token_id", "pad_token_id")
        return CLIPTextModel(CLIPTextConfig(**sizes, **{name: getattr(tokenizer, name) for name in names}))
    _, encoder = load_text_encoder(init, "init")
    check_sizes(init, "a text encoder", encoder.config, sizes)
    return encoder.train().requires_grad_(True)


def new_text_encoder(trained: Any) -> Any:
    """A `transformers.CLIPTextModel` of the configuration of `trained`, which may be sharded; its weights are new."""
    from transformers import CLIPTextModel

    return CLIPTextModel(trained.config)


def load_or_train_tokenizer(init: str, captions: Iterable[str], vocab_size: int, caption_length: int) -> Any:
    """The tokenizer of a text encoder that trains along: that of `init`, or one trained on the captions.

    Args:
        init: scratch, or see `load_text_encoder`.
        captions: the text to count on.
        vocab_size: see `train_clip_tokenizer`.
        caption_length: tokens of a caption with start and end.

    Raises:
        UsageError: see `load_text_encoder` and `train_clip_tokenizer`.
    """
    if init != "scratch":
        return load_text_encoder(init, "init")[0]
    return train_clip_tokenizer(captions, vocab_size, caption_length)


def note_cut_captions(tokenizer: Any, captions: Sequence[str]) -> None:
    """Count which of some captions are longer than what the text encoder takes, as left out."""
    _, num_cut = token_ids(tokenizer, captions)
    more = f"of {len(captions):,} looked at, after {tokenizer.model_max_length} tokens"
    left_out.note("long_captions_in_a_sample", num_cut, where="the captions", more=more)


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
        return self._tokenizer(list(clean_captions(captions)), **form)


def clean_captions(captions: Iterable[str]) -> Iterator[str]:
    """Captions as `diffusers.PRXPipeline` cleans prompts, each when it is asked for."""
    import ftfy  # noqa: F401 (diffusers takes it for given)
    from diffusers.pipelines.prx.pipeline_prx import TextPreprocessor

    yield from map(TextPreprocessor().clean_text, captions)


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
        encoder: frozen; None = the model sees tokens.

    Returns:
        text: int64 tokens (N, L), or embeddings (N, L, D). text_mask: bool (N, L), see `text_masks`.
    """
    ids, _ = token_ids(tokenizer, captions)
    text, mask = torch.from_numpy(ids), torch.from_numpy(text_masks(tokenizer, ids))
    embeddings = text if encoder is None else encode_text(encoder, text.to(encoder.device)).cpu()
    return {"text": embeddings, "text_mask": mask}


def embed_captions(accelerator: Any, batch: dict[str, Tensor], encoder: Any) -> dict[str, Tensor]:
    """A batch whose `text` is embeddings (B, L, D), for a frozen encoder that runs in training.

    Args:
        accelerator: knows the precision; its own autocast does nothing under DeepSpeed.
        batch: on the encoder's device, its `text` int64 tokens (B, L).
        encoder: `transformers.CLIPTextModel`; None = the batch stays as it is.
    """
    if encoder is None:
        return batch
    with precision.autocast(accelerator, encoder.device.type):
        return {**batch, "text": encode_text(encoder, batch["text"]).float()}


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
