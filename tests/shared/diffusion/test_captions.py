"""Captions become what Stable Diffusion's pipeline makes of them, and only a whole CLIP text encoder is loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from shared.command_line import UsageError
from shared.data import left_out
from shared.diffusion.captions import (
    CleanedCaptions,
    build_text_encoder,
    clean_captions,
    encode_captions,
    encode_text,
    load_or_train_tokenizer,
    load_text_encoder,
    note_cut_captions,
    text_identity,
    token_ids,
)
from shared.diffusion.clip_tokenizer import train_clip_tokenizer
from tests.conftest import ROOT
from tests.hub_server import Repository, start_hub

CAPTIONS = ["train image 3", "A cat!", "a", "image of many cats, cut here"]


@pytest.fixture(scope="module")
def loaded(tiny_text_encoder: Path) -> tuple[Any, Any]:
    return load_text_encoder(str(tiny_text_encoder), "text_encoder")


@pytest.fixture
def folder(tiny_text_encoder: Path, tmp_path: Path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(tiny_text_encoder, tmp_path / "mine"))


def pipeline_of(tokenizer: Any, encoder: Any) -> Any:
    import diffusers

    parts = ("vae", "unet", "scheduler", "safety_checker", "feature_extractor")
    others: dict[str, Any] = dict.fromkeys(parts)
    pipeline = diffusers.StableDiffusionPipeline
    return pipeline(**others, tokenizer=tokenizer, text_encoder=encoder, requires_safety_checker=False)


def embeddings(loaded: tuple[Any, Any]) -> torch.Tensor:
    return encode_text(loaded[1], torch.from_numpy(token_ids(loaded[0], CAPTIONS)[0]))


def test_embeddings_are_those_of_the_library_s_pipeline(loaded: tuple[Any, Any]) -> None:
    ids, cut = token_ids(loaded[0], CAPTIONS)
    assert (ids.dtype, ids.shape, cut) == (np.int64, (4, 6), 1)
    found = embeddings(loaded)
    assert found.shape == (4, 6, 16)
    assert found.dtype == torch.float32
    expected, of_nothing = pipeline_of(*loaded).encode_prompt(CAPTIONS, "cpu", 1, do_classifier_free_guidance=True)
    assert torch.equal(found, expected)
    empty = encode_text(loaded[1], torch.from_numpy(token_ids(loaded[0], [""])[0]))
    torch.testing.assert_close(empty[0], of_nothing[0])


@given(captions=st.lists(st.text(st.sampled_from("cat image!7é"), max_size=20), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_ids_are_padded_cut_and_counted(loaded: tuple[Any, Any], captions: list[str]) -> None:
    tokenizer = loaded[0]
    ids, cut = token_ids(tokenizer, captions)
    whole = [tokenizer(caption, truncation=False)["input_ids"] for caption in captions]
    assert cut == sum(len(row) > 6 for row in whole)
    for row, full in zip(ids.tolist(), whole, strict=True):
        end = tokenizer.eos_token_id
        expected = [*full[:5], end] if len(full) > 6 else full + [tokenizer.pad_token_id] * (6 - len(full))
        assert row == expected


@given(captions=st.lists(st.text(st.sampled_from("cat image!7é"), max_size=20), min_size=1, max_size=6))
@settings(max_examples=60, deadline=None)
def test_masks_are_the_tokenizers(loaded: tuple[Any, Any], captions: list[str]) -> None:
    """Of one that pads with a token of captions, and of one that pads with the end token."""
    for tokenizer in (loaded[0], train_clip_tokenizer(["cat image"], 514, 8)):
        form = {"padding": "max_length", "truncation": True, "max_length": tokenizer.model_max_length}
        found = encode_captions(captions, tokenizer, None)
        assert found["text"].tolist() == tokenizer(captions, **form)["input_ids"]
        assert found["text_mask"].int().tolist() == tokenizer(captions, **form)["attention_mask"]


def test_captions_are_cleaned_as_the_library_cleans_prompts(loaded: tuple[Any, Any]) -> None:
    """What the pipeline feeds the model, of which padding is masked."""
    import diffusers

    tokenizer, encoder = loaded
    pipeline = diffusers.PRXPipeline(None, None, encoder, tokenizer)
    captions = ["A (cat) #12 — https://example.com", "train &amp; test image", "a"]
    found = encode_captions(captions, CleanedCaptions(tokenizer), encoder)
    expected, mask, *_ = pipeline.encode_prompt(captions, "cpu", do_classifier_free_guidance=False)
    assert torch.equal(found["text_mask"], mask)
    torch.testing.assert_close(found["text"][mask], expected[mask])
    plain = encode_captions(captions, tokenizer, encoder)
    assert not torch.equal(plain["text_mask"], mask)
    expected, mask, *_ = pipeline.encode_prompt(["train image"], "cpu", skip_text_cleaning=True)
    torch.testing.assert_close(encode_captions(["train image"], tokenizer, encoder)["text"][mask], expected[mask])


def test_captions_are_cleaned_when_they_are_asked_for() -> None:
    def captions() -> Any:
        yield "A (cat)"
        raise AssertionError("nobody asked")

    assert next(clean_captions(captions())) == "a cat"


def test_a_text_encoder_that_trains_is_new_or_that_of_init(loaded: tuple[Any, Any], tiny_text_encoder: Path) -> None:
    tokenizer, frozen = loaded
    config = frozen.config
    sizes = {name: getattr(config, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    sizes |= {name: getattr(config, name) for name in ("num_hidden_layers", "num_attention_heads")}
    sizes["max_position_embeddings"] = config.max_position_embeddings
    new = build_text_encoder("scratch", tokenizer, sizes)
    assert {name: getattr(new.config, name) for name in sizes} == sizes
    assert (new.config.eos_token_id, new.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    old = build_text_encoder(str(tiny_text_encoder), tokenizer, sizes)
    for encoder in (new, old):
        assert encoder.training
        assert all(weight.requires_grad for weight in encoder.parameters())
    same = [torch.equal(weight, frozen.state_dict()[name]) for name, weight in old.state_dict().items()]
    assert all(same)
    with pytest.raises(UsageError, match="a text encoder with num_hidden_layers 9, as configured, got "):
        build_text_encoder(str(tiny_text_encoder), tokenizer, {**sizes, "num_hidden_layers": 9})


def test_a_tokenizer_is_trained_or_that_of_init(tiny_text_encoder: Path, loaded: tuple[Any, Any]) -> None:
    trained = load_or_train_tokenizer("scratch", iter(CAPTIONS), 530, 7)
    assert trained.model_max_length == 7
    assert trained.get_vocab() == train_clip_tokenizer(CAPTIONS, 530, 7).get_vocab()
    found = load_or_train_tokenizer(str(tiny_text_encoder), iter(CAPTIONS), 530, 7)
    assert found.get_vocab() == loaded[0].get_vocab()


def test_cut_captions_are_counted(loaded: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    note_cut_captions(loaded[0], CAPTIONS[:3])
    assert caplog.text == ""
    note_cut_captions(CleanedCaptions(loaded[0]), CAPTIONS)
    assert [record.getMessage() for record in caplog.records] == [
        "left out of the captions: 1 long captions in a sample, of 4 looked at, after 6 tokens"
    ]
    assert left_out.counts() == {"long_captions_in_a_sample": 1}


def test_the_encoder_is_frozen_and_in_float32(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    _, encoder = load_text_encoder(str(folder), "text_encoder")
    assert not encoder.training
    assert {(weight.dtype, weight.requires_grad) for weight in encoder.parameters()} == {(torch.float32, False)}


def test_a_pipeline_and_a_whole_clip_have_the_same_encoder(
    loaded: tuple[Any, Any], tiny_text_encoder: Path, tmp_path: Path
) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPVisionConfig

    pipeline_of(*loaded).save_pretrained(tmp_path / "pipeline")
    vision = CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    whole = CLIPModel(CLIPConfig(text_config=loaded[1].config.to_dict(), vision_config=vision.to_dict()))
    whole.text_model.load_state_dict(loaded[1].state_dict())
    shutil.copytree(tiny_text_encoder, tmp_path / "whole", ignore=shutil.ignore_patterns("model.*", "config.json"))
    whole.save_pretrained(tmp_path / "whole")
    for name in ("pipeline", "whole"):
        other = load_text_encoder(str(tmp_path / name), "text_encoder")
        assert torch.equal(embeddings(other), embeddings(loaded))
        assert text_identity(*other) == text_identity(*loaded)


def test_files_of_a_tokenizer_as_stable_diffusion_has_them(loaded: tuple[Any, Any], folder: Path) -> None:
    """There is no tokenizer.json, and what pads is in a file of its own."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"])]))
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    (folder / "special_tokens_map.json").write_text(json.dumps({**special, "pad_token": "!"}))
    config = {**special, "tokenizer_class": "CLIPTokenizer", "model_max_length": 6, "pad_token": "<|endoftext|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert torch.equal(embeddings(load_text_encoder(str(folder), "text_encoder")), embeddings(loaded))


def test_a_tokenizer_that_names_no_length_gets_the_encoder_s(folder: Path) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["model_max_length"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, _ = load_text_encoder(str(folder), "text_encoder")
    assert token_ids(tokenizer, ["cat " * 9])[0].shape == (1, 6)


def test_the_identity_is_that_of_weights_and_tokenizer(loaded: tuple[Any, Any], tiny_text_encoder: Path) -> None:
    def identity(**changed: Any) -> dict[str, Any]:
        tokenizer, encoder = load_text_encoder(str(tiny_text_encoder), "text_encoder")
        if "weight" in changed:
            encoder.final_layer_norm.weight[0] += changed["weight"]
        if "activation" in changed:
            encoder.config.hidden_act = changed["activation"]
        if "word" in changed:
            tokenizer.add_tokens(changed["word"])
        for name in ("pad_token", "model_max_length"):
            setattr(tokenizer, name, changed.get(name, getattr(tokenizer, name)))
        return text_identity(tokenizer, encoder)

    same = identity()
    assert same == text_identity(*loaded)
    assert same["text_shape"] == [6, 16]
    token_ids(loaded[0], CAPTIONS)  # which leaves its way of padding in the tokenizer
    assert same == text_identity(*loaded)
    changes = {"weight": 1e-3, "activation": "gelu", "word": "dog", "pad_token": "<|endoftext|>", "model_max_length": 5}
    others = [identity(**{name: value}) for name, value in changes.items()]
    assert len({json.dumps(one) for one in (same, *others)}) == 6
    assert len({one["text_encoder"] for one in (same, *others)}) == 6


def test_what_is_no_text_encoder_gets_one_line(folder: Path, tmp_path: Path) -> None:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=600, **sizes)).save_pretrained(tmp_path / "bert")
    names = ("alone", "pickled", "part", "small", "long")
    alone, pickled, part, small, other = (Path(shutil.copytree(folder, tmp_path / name)) for name in names)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (alone / name).unlink()
    weights = load_file(folder / "model.safetensors")
    (pickled / "model.safetensors").unlink()
    torch.save(weights, pickled / "pytorch_model.bin")
    save_file({name: value for name, value in weights.items() if "final" not in name}, part / "model.safetensors")
    tokenizer, _ = load_text_encoder(str(folder), "text_encoder")
    tokenizer.add_tokens(["dog"])
    tokenizer.save_pretrained(small)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "model_type": "clip", "text_config": config}))
    (other / "tokenizer.json").unlink()
    (other / "tokenizer_config.json").unlink()
    cases = {
        "/no/such": "expected a run folder or a Hub id of such a model: ",
        "me/there-is-no-such-model": "expected a run folder or a Hub id of such a model: ",
        str(tmp_path / "bert"): "expected a text encoder of CLIP, got bert",
        str(alone): "expected a run folder or a Hub id of such a model: ",
        str(other): "expected a tokenizer beside the text encoder",
        str(pickled): "expected a run folder or a Hub id of such a model: ",
        str(part): "expected all weights of a text encoder, ['final_layer_norm.bias'] and so on are not there",
        str(small): "expected a tokenizer of the text encoder's 527 tokens, got one of 528",
    }
    for name, expected in cases.items():
        with pytest.raises(UsageError) as caught:
            load_text_encoder(name, "text_encoder")
        assert str(caught.value).startswith(f"text_encoder: {name!r}: {expected}")
        assert "\n" not in str(caught.value)


LOAD_FROM_HUB = """
import sys
import torch
from shared.diffusion.captions import encode_text, load_text_encoder, token_ids
for name in ("tester/pipeline", "tester/clip"):
    tokenizer, encoder = load_text_encoder(name, "text_encoder")
    ids, _ = token_ids(tokenizer, ["A cat!"])
    print(encode_text(encoder, torch.from_numpy(ids)).double().sum().item())
"""


@pytest.mark.slow
def test_the_hub_and_what_is_kept_of_it_without_a_network(
    loaded: tuple[Any, Any], tiny_text_encoder: Path, tmp_path: Path
) -> None:
    hub = start_hub()
    pipeline_of(*loaded).save_pretrained(tmp_path / "pipeline")
    for name, source in (("pipeline", tmp_path / "pipeline"), ("clip", tiny_text_encoder)):
        files = {str(path.relative_to(source)): path.read_bytes() for path in source.rglob("*") if path.is_file()}
        repository = hub.repositories["models", f"tester/{name}"] = Repository(private=False)
        repository.commit(files, "all")
    environment = {**os.environ, **hub.environment(), "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hf")}
    command = [sys.executable, "-c", LOAD_FROM_HUB]
    outputs = []
    for offline in ("0", "1"):
        env = {**environment, "HF_HUB_OFFLINE": offline}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout.split())
        if offline == "0":
            hub.stop()
    ids, _ = token_ids(loaded[0], ["A cat!"])
    expected = encode_text(loaded[1], torch.from_numpy(ids)).double().sum().item()
    assert [float(value) for output in outputs for value in output] == pytest.approx([expected] * 4)
