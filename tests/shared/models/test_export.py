"""The exported folder is what `from_pretrained` reads, at any moment and for every user."""

import json
import logging
import multiprocessing
import os
import signal
import stat
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from shared.models.export import export_model, whole_weights
from shared.text import tokenization

FORK = multiprocessing.get_context("fork")


@pytest.fixture(scope="module")
def small_tokenizer() -> Any:
    return tokenization.train_byte_level_bpe(["the cat sees the dog. " * 20], vocab_size=270, seq_length=16)


@pytest.fixture
def accelerator() -> Accelerator:
    return Accelerator(cpu=True)


def make_model(seed: int = 0, tied: bool = True) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    sizes = {"vocab_size": 320, "n_positions": 16, "n_embd": 8, "n_layer": 1, "n_head": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **ends, tie_word_embeddings=tied)).eval()


def load(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    expected = dict(one.named_parameters())
    found = dict(other.named_parameters())
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("tied", [True, False])
def test_the_libraries_load_what_was_exported(accelerator, small_tokenizer, tmp_path, caplog, tied):
    from transformers import AutoTokenizer

    model = make_model(tied=tied)
    prepared = accelerator.prepare(model)
    with caplog.at_level(logging.WARNING):
        export_model(accelerator, prepared, small_tokenizer, tmp_path)
        loaded = load(tmp_path)
    assert caplog.text == ""
    assert_same_weights(model, loaded)
    text = "the cat sees 123 ü"
    ids = AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"]
    assert ids == small_tokenizer(text)["input_ids"]
    ids = torch.tensor([ids[:16]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_a_compiled_model_leaves_no_prefix(accelerator, small_tokenizer, tmp_path, how):
    model = make_model()
    if how == "in place":
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    export_model(accelerator, accelerator.prepare(compiled), small_tokenizer, tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "_orig_mod" in name]  # noqa: SIM118 (it is no dict)
    assert_same_weights(make_model(), load(tmp_path))
    bare = make_model(seed=1)
    bare.load_state_dict(whole_weights(accelerator, accelerator.prepare(compiled)))
    assert_same_weights(make_model(), bare)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_files_are_as_readable_as_the_users_other_files(accelerator, small_tokenizer, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        export_model(accelerator, accelerator.prepare(make_model()), small_tokenizer, tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in tmp_path.iterdir()}
    assert set(modes.values()) == {oct(mode)}
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(modes)


def test_a_second_export_replaces_the_first_and_leaves_other_files(accelerator, small_tokenizer, tmp_path):
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / ".export").mkdir()
    (tmp_path / ".export" / "model.safetensors").write_text("of an export that was killed")
    (tmp_path / ".export" / "other.bin").write_text("x")
    for seed in (0, 1):
        export_model(accelerator, accelerator.prepare(make_model(seed)), small_tokenizer, tmp_path)
        assert_same_weights(make_model(seed), load(tmp_path))
    assert (tmp_path / "run.json").read_text() == "{}"
    assert not (tmp_path / "other.bin").exists()


def test_a_process_that_zero3_gives_no_weights_has_none():
    model = make_model()
    assert whole_weights(SimpleNamespace(get_state_dict=lambda _: None), model) == {}
    named = {"_orig_mod.lm_head.weight": model.lm_head.weight}
    assert list(whole_weights(SimpleNamespace(get_state_dict=lambda _: named), model)) == ["lm_head.weight"]


def test_no_bar_is_drawn_on_the_terminal(accelerator, small_tokenizer, tmp_path, capfd):
    from transformers.utils import logging

    logging.enable_progress_bar()
    export_model(accelerator, accelerator.prepare(make_model()), small_tokenizer, tmp_path)
    assert "model shards" not in "".join(capfd.readouterr())  # DeepSpeed may say that it was imported
    assert logging.is_progress_bar_enabled()


def export_and_die(folder: Path, tokenizer: Any, moves: int) -> None:
    """Export, and get SIGKILL before the file number `moves` is moved to its place."""
    moved, replace = [], Path.replace

    def replace_or_die(self: Path, target: Path) -> Path:
        if len(moved) == moves:
            os.kill(os.getpid(), signal.SIGKILL)
        moved.append(target.name)
        return replace(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign,assignment]
    torch.set_num_threads(1)
    export_model(Accelerator(cpu=True), make_model(seed=1), tokenizer, folder)


@pytest.mark.parametrize("moves", [0, 1, 2, 3, 4])
def test_killed_half_way_the_old_weights_or_the_new_ones_load(accelerator, small_tokenizer, tmp_path, moves):
    """Killed before each move of a file, over an older export and over nothing."""
    old, new = tmp_path / "old", tmp_path / "new"
    new.mkdir()
    export_model(accelerator, make_model(seed=0), small_tokenizer, old)
    num_files = len(list(old.iterdir()))
    for folder in (old, new):
        with warnings.catch_warnings(action="ignore"):
            process = FORK.Process(target=export_and_die, args=(folder, small_tokenizer, moves))
            process.start()
        process.join(60)
        assert process.exitcode == (-signal.SIGKILL if moves < num_files else 0)
    assert_same_weights(make_model(seed=0 if moves < num_files else 1), load(old))
    has_weights = (new / "model.safetensors").exists()
    assert has_weights == (moves >= num_files)
    if has_weights:
        assert_same_weights(make_model(seed=1), load(new))
