"""The tokenizer is CLIP's in form, knows every text, and is a function of the captions alone."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

from shared.command_line import UsageError
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from shared.images.captioned import SAMPLE, open_captioned

TEXTS = ["3D Fluent emoji, red apple", "A  cat's\n 12 hats!", "été 日本 👩🏽‍🚀", ""]
any_text = st.text() | st.text(st.characters(min_codepoint=0x10000)) | st.text(st.sampled_from("aA '!1<|>/w\n\u00e9"))


@pytest.fixture(scope="module")
def captions() -> list[str]:
    options: dict[str, Any] = {"config": "", "image_column": "", "caption_column": "", "max_bad_fraction": 0.0}
    splits = ("train", "test_unseen_concept", "test_unseen_combination")
    return [caption for split in splits for caption in open_captioned(str(SAMPLE), split=split, **options).captions]


@pytest.fixture(scope="module")
def tokenizer(captions: list[str]) -> Any:
    return train_clip_tokenizer(captions, vocab_size=2048, max_length=77)


def merges_of(tokenizer: Any) -> list[tuple[str, str]]:
    return [tuple(pair) for pair in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]


def merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """One pair joined, by way of a text whose symbols are between spaces."""
    text = f" {'  '.join(symbols)} ".replace(f" {pair[0]}  {pair[1]} ", f" {''.join(pair)} ")
    return text.split()


def naive_merges(captions: list[str], most: int) -> list[tuple[str, str]]:
    """BPE of lower-case words between spaces, with all pairs counted again at every merge."""
    counts = Counter(word for caption in captions for word in caption.split())
    spellings = {word: [*word[:-1], f"{word[-1]}</w>"] for word in counts}
    merges: list[tuple[str, str]] = []
    while len(merges) < most:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, symbols in spellings.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        spellings = {word: merged(symbols, merges[-1]) for word, symbols in spellings.items()}
    return merges


def naive_tokens(tokenizer: Any, merges: list[tuple[str, str]], text: str) -> list[str]:
    """Each word of the text with all merges applied, one after the other."""
    backend = tokenizer.backend_tokenizer
    tokens = []
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(text)):
        symbols = [*word[:-1], f"{word[-1]}</w>"]
        for pair in merges:
            symbols = merged(symbols, pair)
        tokens += symbols
    return tokens


def test_the_vocabulary_has_the_order_of_clip_s(tokenizer: Any) -> None:
    in_order = tokenizer.convert_ids_to_tokens(range(2048))
    characters = list(bytes_to_unicode().values())
    assert in_order[:512] == characters + [f"{character}</w>" for character in characters]
    assert in_order[512:2046] == ["".join(pair) for pair in merges_of(tokenizer)]
    assert in_order[2046:] == ["<|startoftext|>", "<|endoftext|>"]
    assert len(tokenizer) == len(set(in_order)) == 2048
    # Those of openai/clip-vit-large-patch14.
    assert tokenizer.convert_tokens_to_ids(["!", "a</w>", ",</w>", ".</w>"]) == [0, 320, 267, 269]


def test_its_settings_are_those_of_clip(tokenizer: Any) -> None:
    assert isinstance(tokenizer, CLIPTokenizer)
    assert tokenizer.model_max_length == 77
    assert tokenizer.pad_token == tokenizer.eos_token == "<|endoftext|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (2046, 2047)
    long = tokenizer("red apple " * 50, truncation=True).input_ids
    assert (len(long), long[0], long[-1]) == (77, 2046, 2047)


@settings(deadline=None, max_examples=300)
@given(text=any_text)
def test_nothing_is_unknown_and_all_comes_back(tokenizer: Any, text: str) -> None:
    backend = tokenizer.backend_tokenizer
    normal = backend.normalizer.normalize_str(text)
    words = [normal[start:end] for _, (start, end) in backend.pre_tokenizer.pre_tokenize_str(normal)]
    ids = tokenizer(text).input_ids
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert max(ids[1:-1], default=0) < tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:-1]) == " ".join(words).strip()


def test_text_comes_back_in_lower_case_as_words(tokenizer: Any) -> None:
    decoded = [tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) for text in TEXTS]
    assert decoded == ["3 d fluent emoji , red apple", "a cat 's 1 2 hats !", "été 日本 👩🏽‍🚀", ""]


@settings(deadline=None, max_examples=50)
@given(captions=st.lists(st.text("abc ", max_size=12), max_size=8), most=st.integers(0, 30))
def test_merges_are_those_of_counting_all_again(captions: list[str], most: int) -> None:
    trained = train_clip_tokenizer(captions, vocab_size=514 + most, max_length=77)
    expected = naive_merges(captions, most)
    assert merges_of(trained) == expected
    assert len(trained) == 514 + len(expected)


@settings(deadline=None, max_examples=50)
@given(text=any_text)
def test_ids_are_those_of_merging_in_order(tokenizer: Any, text: str) -> None:
    merges = merges_of(tokenizer)
    for known in (text, f"{text} flat fluent emojis"):
        assert tokenizer.tokenize(known) == naive_tokens(tokenizer, merges, known)


def test_captions_are_encoded_as_by_merging_in_order(tokenizer: Any, captions: list[str]) -> None:
    merges = merges_of(tokenizer)
    for caption in captions[::50]:
        assert tokenizer.tokenize(caption) == naive_tokens(tokenizer, merges, caption)


def test_frequent_words_become_one_token(tokenizer: Any, captions: list[str]) -> None:
    counts = Counter(word for caption in captions for word in caption.lower().split() if word.isalpha())
    frequent = [word for word, count in counts.items() if count >= 12]
    assert len(frequent) > 100
    assert [word for word in frequent if tokenizer.tokenize(word) != [f"{word}</w>"]] == []


def test_the_order_of_the_captions_does_not_matter(tokenizer: Any, captions: list[str]) -> None:
    trained = tokenizer.backend_tokenizer.to_str()
    assert train_clip_tokenizer(iter(captions), 2048, 77).backend_tokenizer.to_str() == trained
    shuffled = random.Random(0).sample(captions, len(captions))
    assert train_clip_tokenizer(shuffled, 2048, 77).backend_tokenizer.to_str() == trained


def test_another_process_trains_the_same(tokenizer: Any, captions: list[str]) -> None:
    program = (
        "import json, sys\n"
        "from shared.diffusion.clip_tokenizer import train_clip_tokenizer\n"
        "print(train_clip_tokenizer(json.load(sys.stdin), 2048, 77).backend_tokenizer.to_str())"
    )
    seed = "1" if os.environ.get("PYTHONHASHSEED") == "2" else "2"
    other = subprocess.run(
        [sys.executable, "-c", program],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONHASHSEED": seed},
        input=json.dumps(captions),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(other.stdout) == json.loads(tokenizer.backend_tokenizer.to_str())


@pytest.mark.parametrize("vocab_size", [514, 1000])
def test_it_survives_its_folder(captions: list[str], vocab_size: int, tmp_path: Path) -> None:
    trained = train_clip_tokenizer(captions, vocab_size, 20)
    trained.save_pretrained(tmp_path)
    loaded = CLIPTokenizer.from_pretrained(tmp_path)
    assert loaded.get_vocab() == trained.get_vocab()
    assert loaded.model_max_length == 20
    assert loaded(TEXTS + captions).input_ids == trained(TEXTS + captions).input_ids


def test_a_pipeline_s_folder_holds_it(tokenizer: Any, tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"block_out_channels": (32, 32), "layers_per_block": 1}
    unet = UNet2DConditionModel(
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=8,
        **sizes,
    )
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, latent_channels=4, **sizes
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder(tokenizer),
        tokenizer=tokenizer,
        unet=unet,
        scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(tmp_path)
    loaded = StableDiffusionPipeline.from_pretrained(tmp_path)
    assert isinstance(loaded.tokenizer, CLIPTokenizer)
    assert loaded.tokenizer(TEXTS).input_ids == tokenizer(TEXTS).input_ids
    embeddings, _ = loaded.encode_prompt(TEXTS[0], "cpu", 1, do_classifier_free_guidance=False)
    ids = tokenizer(TEXTS[0], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(embeddings, pipeline.text_encoder(ids).last_hidden_state)


def text_encoder(tokenizer: Any) -> CLIPTextModel:
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config).eval()


@torch.no_grad()
def test_a_text_encoder_takes_a_padded_batch(tokenizer: Any) -> None:
    encoder = text_encoder(tokenizer)
    batch = tokenizer(TEXTS, padding="max_length", return_tensors="pt")
    assert batch.input_ids.shape == (4, 77)
    output = encoder(batch.input_ids)
    for row, text in enumerate(TEXTS):
        alone = encoder(torch.tensor([tokenizer(text).input_ids]))
        # Attention is causal, so what comes after a row's first end token, its padding, changes nothing before it.
        length = alone.last_hidden_state.shape[1]
        torch.testing.assert_close(output.last_hidden_state[row, :length], alone.last_hidden_state[0])
        torch.testing.assert_close(output.pooler_output[row], alone.last_hidden_state[0, -1])


def test_a_vocabulary_without_room_for_the_bytes_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^vocab_size: 513: expected at least 514, for each byte inside and at the"):
        train_clip_tokenizer(["a red apple"], vocab_size=513, max_length=77)
    assert len(train_clip_tokenizer([], vocab_size=600, max_length=77)) == 514
