"""Causal language models to go on from: what a packed row needs of them."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from shared.command_line import UsageError
from shared.models.causal_lm import load_causal_lm, new_causal_lm, set_dropout
from shared.performance.flops import training_flops
from shared.text.tokenization import train_byte_level_bpe
from tests.conftest import ROOT

SEE_EACH_OTHER = "another architecture than {}: documents of one row see each other in it"
NO_KERNEL = "of such a model: .*"
NO_CAUSAL = "of such a model: Unrecognized configuration class"
# Kinds of models by what becomes of them; recipes/gpt/README.md has the same table.
KINDS = {
    "": [
        "ctrl",
        "falcon",
        "falcon-alibi",
        "gemma3_text",
        "gpt2",
        "gpt_neox",
        "gptj",
        "llama",
        "mistral",
        "mixtral",
        "nanochat",
        "phi",
        "qwen2",
        "qwen3",
    ],
    "eager": ["gemma2", "gpt_neo"],
    SEE_EACH_OTHER: [
        "bamba",
        "bart",
        "bert",
        "camembert",
        "electra",
        "lfm2",
        "opt",
        "qwen3_next",
        "recurrent_gemma",
        "roberta",
        "roberta-decoder",
        "xlm-roberta",
    ],
    NO_KERNEL: [
        "big_bird",
        "bloom",
        "falcon_mamba",
        "mamba",
        "mamba2",
        "megatron-bert",
        "mpt",
        "openai-gpt",
        "rembert",
        "roformer",
        "rwkv",
        "xlnet",
    ],
    NO_CAUSAL: ["modernbert", "t5"],
}
FAST = ("bert", "bloom", "gemma2", "gpt2", "lfm2", "llama", "mixtral", "opt")
OWN_SIZES: dict[str, dict[str, Any]] = {  # where the usual names do not make a model small, or another kind of it
    "bart": {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "decoder_layers": 1, "encoder_layers": 1},
    "big_bird": {"is_decoder": True, "attention_type": "original_full"},
    "falcon-alibi": {"alibi": True, "new_decoder_architecture": False, "multi_query": False},
    "mamba2": {"state_size": 8, "num_heads": 4, "head_dim": 8, "n_groups": 1},
    "megatron-bert": {"is_decoder": True},
    "rembert": {"is_decoder": True, "input_embedding_size": 8, "output_embedding_size": 8},
    "roberta-decoder": {"is_decoder": True},
    "roformer": {"is_decoder": True},
    "xlnet": {"d_model": 16, "d_inner": 16, "n_layer": 1, "n_head": 2},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {
        "mamba_n_heads": 4,
        "mamba_d_head": 8,
        "mamba_d_state": 8,
        "mamba_n_groups": 1,
        "attn_layer_indices": [1],
    },
    "gemma2": {"head_dim": 8},
    "gemma3_text": {"head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_heads": 2, "num_layers": 2},
    "gptj": {"rotary_dim": 4},
    "mixtral": {"num_local_experts": 2},
    "phi": {"partial_rotary_factor": 0.5},
    "qwen3": {"head_dim": 8},
    "qwen3_next": {
        "head_dim": 8,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 16,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 16,
        "layer_types": ["linear_attention", "full_attention"],
    },
    "recurrent_gemma": {"lru_width": 16, "head_dim": 8, "attention_window_size": 32},
    "rwkv": {"attention_hidden_size": 16, "context_length": 32},
}


@pytest.mark.parametrize(
    ("model_type", "outcome"),
    [
        pytest.param(kind, outcome, marks=[] if kind in FAST else [pytest.mark.slow])
        for outcome, kinds in KINDS.items()
        for kind in kinds
    ],
)
def test_a_model_is_trained_or_refused_by_what_its_tokens_see(tmp_path: Path, model_type: str, outcome: str) -> None:
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": 0}
    sizes |= {"num_key_value_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32, "bos_token_id": 0}
    sizes |= {"pad_token_id": 0, **OWN_SIZES.get(model_type, {})}
    if model_type == "xlnet":
        del sizes["max_position_embeddings"]  # it has no longest row, and refuses to be told one
    config = AutoConfig.for_model(architecture := re.sub("-(alibi|decoder)$", "", model_type), **sizes)
    others = {"modernbert": "ModernBertForMaskedLM", "t5": "T5ForConditionalGeneration"}
    maker = getattr(transformers, others[model_type])._from_config if model_type in others else None
    (maker or AutoModelForCausalLM.from_config)(config).save_pretrained(tmp_path / "model")
    tokenizer = train_byte_level_bpe(["some words"], 300, 32)
    attention = "eager" if outcome == "eager" else "sdpa"
    if outcome in ("", "eager"):
        model = load_causal_lm(str(tmp_path / "model"), tokenizer, 32, attention)
        row = torch.zeros(1, 32, dtype=torch.int64)
        assert training_flops(model, {"input_ids": row, "use_cache": False}) > 0
        return
    with pytest.raises(UsageError) as caught:
        load_causal_lm(str(tmp_path / "model"), tokenizer, 32, attention)
    assert re.match(r"init: '.*/model': expected .*" + outcome.format(architecture), str(caught.value))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["weights as .bin", "code of its own", "nothing"])
def test_a_folder_is_refused_and_nothing_of_it_is_run(tmp_path: Path, kind: str) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, sizes = tmp_path / "model", {"vocab_size": 300, "hidden_size": 16, "num_hidden_layers": 1}
    if kind != "nothing":
        LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, intermediate_size=16)).save_pretrained(folder)
    if kind == "weights as .bin":
        (folder / "model.safetensors").unlink()
        torch.save({}, folder / "pytorch_model.bin")
    elif kind == "code of its own":
        config = json.loads((folder / "config.json").read_text())
        config |= {
            "model_type": "mine",
            "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')")
    expected = {"weights as .bin": "model.safetensors", "code of its own": "custom code", "nothing": "no such folder"}
    with pytest.raises(UsageError, match=f"init: '.*/model': expected a run folder or a Hub id.*{expected[kind]}"):
        load_causal_lm(str(folder), train_byte_level_bpe(["some words"], 300, 32), 32, "sdpa")
    assert not (tmp_path / "canary").exists()


def test_the_readme_has_the_kinds() -> None:
    text = (ROOT / "recipes" / "gpt" / "README.md").read_text()
    for kinds in KINDS.values():
        assert f"| {', '.join(sorted(kinds))} |" in text


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
