"""Causal language models to go on from: what a packed row needs of them."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.command_line import UsageError
from shared.models.causal_lm import load_causal_lm, new_causal_lm, set_dropout
from shared.text.tokenization import train_byte_level_bpe


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("gpt2", ""),
        ("llama", ""),
        ("mixtral", ""),
        ("opt", "another architecture than opt: documents of one row see each other in it"),
        ("lfm2", "another architecture than lfm2: documents of one row see each other in it"),
        ("bloom", "of such a model: "),  # has no sdpa
        ("bert", "another architecture than bert: documents of one row see each other in it"),
    ],
)
def test_a_model_in_which_documents_of_a_row_see_each_other_is_refused(
    tmp_path: Path, model_type: str, reason: str
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "bos_token_id": 0}
    sizes |= {"ffn_dim": 32, "word_embed_proj_dim": 16} if model_type == "opt" else {}
    sizes |= {"layer_types": ["conv", "full_attention"]} if model_type == "lfm2" else {}
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **sizes)).save_pretrained(tmp_path / "model")
    tokenizer = train_byte_level_bpe(["some words"], 300, 32)
    if not reason:
        load_causal_lm(str(tmp_path / "model"), tokenizer, 32, "sdpa")
        return
    with pytest.raises(UsageError) as caught:
        load_causal_lm(str(tmp_path / "model"), tokenizer, 32, "sdpa")
    assert re.match(r"init: '.*/model': expected .*" + reason, str(caught.value))
    assert "\n" not in str(caught.value)


def test_a_new_model_has_the_sizes_and_is_checked_likewise(tmp_path: Path) -> None:
    from transformers import LlamaConfig, OPTConfig

    sizes: dict[str, Any] = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = train_byte_level_bpe(["some words"], 300, 32)
    LlamaConfig(**sizes, intermediate_size=32, max_position_embeddings=32).save_pretrained(tmp_path / "llama")
    assert new_causal_lm(str(tmp_path / "llama"), tokenizer, 32, "sdpa").config.hidden_size == 16
    with pytest.raises(UsageError, match="seq_length: 64: expected at most 32"):
        new_causal_lm(str(tmp_path / "llama"), tokenizer, 64, "sdpa")
    OPTConfig(**sizes, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=32).save_pretrained(tmp_path / "opt")
    with pytest.raises(UsageError, match="documents of one row see each other"):
        new_causal_lm(str(tmp_path / "opt"), tokenizer, 32, "sdpa")


def test_all_dropout_is_set() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=8, n_layer=1, n_head=2))
    set_dropout(gpt2, 0.3)
    assert {module.p for module in gpt2.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=16, attention_dropout=0))
    set_dropout(llama, 0.3)  # the configuration's 0 is an int
    assert llama.model.layers[0].self_attn.attention_dropout == 0.3
