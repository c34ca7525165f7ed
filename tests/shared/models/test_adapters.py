"""LoRA: what is trained, what peft and the library load, what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import transformers

from shared.command_line import UsageError
from shared.models.adapters import add_lora, export_adapter, export_merged, load_with_adapter
from shared.text import tokenization
from tests.recipes.runs import reset_accelerate
from tests.shared.models.test_target_head import model_of

OPTIONS: dict[str, Any] = {"rank": 2, "alpha": 8, "dropout": 0.0, "targets": "all-linear", "tokens": []}
IDS = torch.tensor([[5, 6, 7, 8]])
LOAD = """
import sys, torch
from {module} import {name} as Auto
model = Auto.from_pretrained(sys.argv[1]).eval()
print(model(input_ids=torch.tensor([[5, 6, 7, 8]])).logits.flatten()[:50].tolist())
"""


def adapted(kind: str, base: Path) -> Any:
    """A model whose adapter has been trained, so to say."""
    model_of(kind).save_pretrained(base)
    model = transformers.AutoModelForCausalLM.from_pretrained(base).eval()
    add_lora(model, str(base), **{**OPTIONS, "tokens": [5, 6]})
    for name, weight in model.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(weight, std=0.1)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["nanochat", "gpt2", "llama"])
def test_a_clean_process_gets_the_same_logits_from_adapter_and_merged_model(kind: str, tmp_path: Path) -> None:
    """GPT-2 has its matrices as (in, out), and a tied head."""
    reset_accelerate()
    model, tokenizer = adapted(kind, tmp_path / "base"), tokenization.train_byte_level_bpe(["a cat"], 300, 32)
    logits = model(input_ids=IDS).logits
    before = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")(input_ids=IDS).logits
    assert (logits - before).abs().max() > 1e-3
    accelerator = accelerate.Accelerator(cpu=True)
    for folder in ("adapter", "merged"):
        (tmp_path / folder).mkdir()
    export_adapter(accelerator, model, tokenizer, tmp_path / "adapter")
    export_merged(accelerator, model, tokenizer, tmp_path / "merged", str(tmp_path / "base"))
    assert {"adapter_config.json", "adapter_model.safetensors"} <= {f.name for f in (tmp_path / "adapter").iterdir()}
    assert not list((tmp_path / "merged").glob("adapter*"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").stat().st_size < 40_000
    loaders = {"adapter": ("peft", "AutoPeftModelForCausalLM"), "merged": ("transformers", "AutoModelForCausalLM")}
    for folder, (module, name) in loaders.items():
        program = LOAD.format(module=module, name=name)
        done = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / folder)],
            cwd="/",
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout) == pytest.approx(logits.flatten()[:50].tolist(), abs=1e-5)
    again = load_with_adapter(transformers.AutoModelForCausalLM, str(tmp_path / "adapter"), "init")
    torch.testing.assert_close(again(input_ids=IDS).logits, logits, rtol=0, atol=1e-5)
    again.save_pretrained(tmp_path / "again")  # it is a whole model
    assert (tmp_path / "again" / "config.json").is_file()


def test_only_the_adapter_is_trained_and_begins_as_nothing(tmp_path: Path) -> None:
    model = model_of("nanochat")
    before = model(input_ids=IDS).logits
    add_lora(model, "some/model", **OPTIONS)
    torch.testing.assert_close(model(input_ids=IDS).logits, before)
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trained
    assert all(".lora_" in name for name in trained)
    assert not any("lm_head" in name or "embed" in name for name in trained)
    other = model_of("nanochat")
    add_lora(other, "some/model", **{**OPTIONS, "tokens": [1, 2]})
    torch.testing.assert_close(other(input_ids=IDS).logits, before)
    more = [weight.numel() for name, weight in other.named_parameters() if weight.requires_grad and "lora" not in name]
    assert more == [2 * 16, 2 * 16]
    assert model.peft_config["default"].base_model_name_or_path == "some/model"


def test_names_that_match_nothing_and_an_adapter_without_its_base_are_refused(tmp_path: Path) -> None:
    for kind, targets in (
        ("llama", "query"),
        ("llama", "q_proj,query"),
        ("llama", "embed_tokens"),
        ("gpt2", "lm_head"),
    ):
        known = {"llama": "q_proj", "gpt2": "c_attn"}[kind]
        expected = f"lora_targets: '{targets}': expected all-linear, or layers of init: {known}"
        with pytest.raises(UsageError, match=expected) as caught:
            add_lora(model_of(kind), "x", **{**OPTIONS, "targets": targets})
        assert "\n" not in str(caught.value)
    add_lora(model := model_of("llama"), "x", **{**OPTIONS, "targets": "q_proj, v_proj"})
    assert len([name for name, _ in model.named_parameters() if "lora_A" in name]) == 4
    reset_accelerate()
    model, tokenizer = adapted("llama", tmp_path / "base"), tokenization.train_byte_level_bpe(["a cat"], 300, 32)
    (tmp_path / "adapter").mkdir()
    export_adapter(accelerate.Accelerator(cpu=True), model, tokenizer, tmp_path / "adapter")
    (tmp_path / "base").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"init: .*adapter': expected a model, or an adapter whose base is there"):
        load_with_adapter(transformers.AutoModelForCausalLM, str(tmp_path / "adapter"), "init")


def test_an_adapter_of_an_adapter_is_merged_twice(tmp_path: Path) -> None:
    reset_accelerate()
    model, tokenizer = adapted("llama", tmp_path / "base"), tokenization.train_byte_level_bpe(["a cat"], 300, 32)
    accelerator = accelerate.Accelerator(cpu=True)
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    export_adapter(accelerator, model, tokenizer, tmp_path / "first")
    second = load_with_adapter(transformers.AutoModelForCausalLM, str(tmp_path / "first"), "init")
    add_lora(second, str(tmp_path / "first"), **OPTIONS)
    for name, weight in second.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    export_adapter(accelerator, second, tokenizer, tmp_path / "second")
    loaded = load_with_adapter(transformers.AutoModelForCausalLM, str(tmp_path / "second"), "init")
    torch.testing.assert_close(loaded(input_ids=IDS).logits, second.eval()(input_ids=IDS).logits, rtol=0, atol=1e-5)
