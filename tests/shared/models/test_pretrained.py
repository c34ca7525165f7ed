"""Weights to start from load from safetensors alone, and everything else is one message."""

import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.command_line import UsageError
from shared.models.pretrained import check_saved_sizes, is_without_values, load_classifier, load_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=64, n_positions=16, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0, dtype="bfloat16"
    )
    folder = tmp_path_factory.mktemp("saved") / "model"
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of the saved model that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


def load(name: str | Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return load_pretrained(AutoModelForCausalLM, str(name), "init", **options)


def refusal(name: str | Path) -> str:
    with pytest.raises(UsageError) as caught:
        load(name)
    message = str(caught.value)
    assert message.startswith(f"init: {str(name)!r}: expected a run folder or a Hub id of such a model: ")
    assert "\n" not in message
    return message


def test_weights_are_loaded_in_float32(saved, caplog):
    from safetensors.torch import load_file

    with caplog.at_level(logging.WARNING):
        model = load(saved, attn_implementation="eager")
    assert caplog.text == ""
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    stored = load_file(saved / "model.safetensors")["transformer.wte.weight"]
    assert torch.equal(model.transformer.wte.weight, stored.float())
    assert model.config._attn_implementation == "eager"


def test_what_is_not_there(tmp_path):
    refusal(tmp_path / "nowhere")
    refusal("me/there-is-no-such-model")
    refusal("")
    assert "such.txt" in refusal("/no/such.txt")


def test_an_empty_folder_and_a_file(tmp_path):
    refusal(tmp_path)
    (tmp_path / "file").write_text("x")
    refusal(tmp_path / "file")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_a_missing_file(folder, name):
    (folder / name).unlink()
    refusal(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"{"),
        ("config.json", b"{}"),
        ("config.json", b"[]"),
        ("config.json", b'{"model_type": "no-such-type"}'),
        pytest.param("config.json", b'{"model_type": "vit"}', marks=pytest.mark.slow),  # the message takes seconds
        ("model.safetensors", b""),
        ("model.safetensors", b"garbage" * 100),
    ],
)
def test_a_damaged_file(folder, name, content):
    (folder / name).write_bytes(content)
    refusal(folder)


def test_truncated_weights(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-100])
    refusal(folder)


def test_weights_of_another_size(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_embd": 16}))
    refusal(folder)


class Payload:
    """Makes a folder when unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.canary),)


def test_pickled_weights_are_not_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    torch.save({"x": Payload(tmp_path / "canary")}, folder / "pytorch_model.bin")
    refusal(folder)
    assert not (tmp_path / "canary").exists()


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(tmp_path / 'canary')!r})\nclass Evil: pass\n")
    refusal(folder)
    assert not (tmp_path / "canary").exists()


class Tokenizer:
    """As many ids as it says."""

    name_or_path = "tokenizer"

    def __init__(self, size: int) -> None:
        self.size = size

    def get_vocab(self) -> dict[str, int]:
        return {str(number): number for number in range(self.size)}


def test_a_model_of_other_sizes_is_refused(saved: Path, tmp_path: Path) -> None:
    sizes = {"model_type": "gpt2", "n_embd": 8, "n_layer": 1}
    check_saved_sizes(str(saved), sizes, Tokenizer(64))
    for wrong, message in (
        ({"n_embd": 16}, "a model with n_embd 16, as configured, got 8"),
        ({"model_type": "bert"}, "a model with model_type bert, as configured, got gpt2"),
        ({"no_such_size": 3}, "got None"),
    ):
        with pytest.raises(UsageError, match=message):
            check_saved_sizes(str(saved), {**sizes, **wrong}, Tokenizer(64))
    with pytest.raises(UsageError, match="at most the 64 tokens of init, not 65"):
        check_saved_sizes(str(saved), sizes, Tokenizer(65))
    with pytest.raises(UsageError, match=f"init: '{tmp_path}': expected a run folder or a Hub id"):
        check_saved_sizes(str(tmp_path), sizes, Tokenizer(64))


def test_a_dry_run_reads_the_configuration_alone(folder: Path) -> None:
    """So what a model would need is known where its weights do not fit, or are not there yet."""
    from shared.performance.dry_run import without_memory

    (folder / "model.safetensors").unlink()
    with without_memory():
        assert is_without_values()
        model = load(folder, attn_implementation="sdpa")
    assert not is_without_values()
    assert (model.config.n_embd, model.config._attn_implementation) == (8, "sdpa")
    assert sum(weight.numel() for weight in model.parameters()) > 1000


@pytest.mark.parametrize(
    ("known", "is_new"), [(["cat", "dog"], False), (["LABEL_0", "LABEL_1"], False), (["cat", "cow"], True)]
)
def test_a_head_of_other_classes_is_new_also_where_they_are_as_many(
    tmp_path: Path, known: list[str], is_new: bool
) -> None:
    import transformers

    sizes: dict[str, Any] = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    config = transformers.ResNetConfig(**sizes, id2label=dict(enumerate(known)))
    before = transformers.ResNetForImageClassification(config)
    before.save_pretrained(tmp_path)
    after = load_classifier(transformers.ResNetForImageClassification, str(tmp_path), ["cat", "dog"])
    assert after.config.id2label == {0: "cat", 1: "dog"}
    weights = before.state_dict()
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, weights[name])}
    assert changed == ({"classifier.1.weight", "classifier.1.bias"} if is_new else set())
