"""The head at chosen positions: the library's logits there, and nothing else changed."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy

from shared.models.target_head import head_at_targets

SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
# Caps and scales on the logits come behind the head: nanochat's, Cohere's.
KINDS = ["nanochat", "gpt2", "llama", "cohere"]


def model_of(kind: str) -> Any:
    torch.manual_seed(0)
    sizes = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32}
    if kind == "gpt2":
        sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 64, "n_positions": 32}
    config = transformers.AutoConfig.for_model(kind, **sizes, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_and_gradients_are_the_librarys_at_these_positions(kind: str) -> None:
    model, other = model_of(kind), head_at_targets(model_of(kind))
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "position_ids": torch.arange(12).repeat(3, 1) % 7, "use_cache": False}
    places = torch.tensor([0, 5, 11, 12, 20, 35])
    expected = model(**inputs).logits.flatten(0, 1)[places]
    found = other(**inputs, target_positions=places).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    for logits in (expected, found):
        cross_entropy(logits, ids.flatten()[places]).backward()
    for one, same in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, same.grad, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(other(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", KINDS[:2])
def test_it_generates_and_is_saved_as_before(kind: str, tmp_path: Path) -> None:
    model, other = model_of(kind), head_at_targets(model_of(kind))
    prompt = torch.tensor([[5, 6, 7]])
    assert torch.equal(*(one.generate(prompt, max_new_tokens=6, do_sample=False) for one in (model, other)))
    model.save_pretrained(tmp_path / "one")
    other.save_pretrained(tmp_path / "other")
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_no_target_is_no_loss_and_no_error() -> None:
    model = head_at_targets(model_of("nanochat"))
    logits = model(input_ids=torch.tensor([[5, 6]]), target_positions=torch.zeros(0, dtype=torch.int64)).logits
    assert logits.shape == (0, 64)
    logits.sum().backward()
    assert all(weight.grad is None or not weight.grad.any() for weight in model.parameters())
