import contextlib
import dataclasses
import resource
import sys
import time
import types

import pytest
import torch
import transformers
from accelerate import Accelerator
from safetensors.torch import save_model
from torch import nn

from shared.fields import RunControl
from shared.performance.dry_run import (
    SavedForBackward,
    Seconds,
    checkpoint_bytes,
    costs,
    evaluation_rows,
    human_bytes,
    human_seconds,
    memory_per_device,
    num_batches,
    time_update,
    without_memory,
)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}


def bert():
    return transformers.BertForPreTraining(transformers.BertConfig(**SIZES))


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=300, n_embd=64, n_layer=2, n_head=4, n_positions=128, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def nanochat():
    return transformers.NanoChatForCausalLM(transformers.NanoChatConfig(**SIZES, num_key_value_heads=2))


def resnet():
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=10)
    return transformers.ResNetForImageClassification(config)


def bert_batch():
    words = torch.zeros(2, 96, dtype=torch.long)
    mask = (torch.arange(96) < 90).long().expand(2, 96)
    return {
        "input_ids": words,
        "attention_mask": mask,
        "labels": words,
        "next_sentence_label": torch.zeros(2, dtype=torch.long),
    }


def packed_batch():
    """Rows of two documents each."""
    words = torch.zeros(2, 96, dtype=torch.long)
    return {
        "input_ids": words,
        "position_ids": torch.arange(48).repeat(2, 2),
        "labels": words,
        "use_cache": False,
    }


def image_batch():
    return {"pixel_values": torch.zeros(2, 3, 32, 32), "labels": torch.zeros(2, dtype=torch.long)}


def saved_bytes(build, batch, within=contextlib.nullcontext):
    """Bytes saved for backward, and a check that backward still works."""
    model = build().train()
    with SavedForBackward(model) as saved, within():
        loss = model(**batch()).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    return saved.num_bytes


@pytest.mark.parametrize(
    ("build", "batch"),
    [(bert, bert_batch), (gpt2, packed_batch), (nanochat, packed_batch), (resnet, image_batch)],
    ids=["bert", "gpt2", "nanochat", "resnet"],
)
def test_activations_without_memory_equal_those_of_a_real_run(build, batch):
    real = saved_bytes(build, batch)
    with without_memory():
        assert saved_bytes(build, batch) == real > 0


def test_activations_under_autocast_equal_those_of_a_real_run():
    def autocast():
        return torch.autocast("cpu", torch.bfloat16)

    real = saved_bytes(nanochat, packed_batch, autocast)
    with without_memory():
        assert saved_bytes(nanochat, packed_batch, autocast) == real


def test_gradient_checkpointing_keeps_less():
    def checkpointed():
        model = nanochat()
        model.activation_checkpointing_enable()
        return model

    real = saved_bytes(checkpointed, packed_batch)
    with without_memory():
        assert saved_bytes(checkpointed, packed_batch) == real < saved_bytes(nanochat, packed_batch) / 2


def test_activations_counted_by_hand():
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))
    with SavedForBackward(model) as saved:
        hidden = model(torch.zeros(3, 10))
        # The same storage, kept twice more and as a view.
        (hidden * hidden.T.reshape(3, 5)).sum()
    # Input, output of ReLU (saved by it and by the next layer), output, and the copy that reshape makes.
    assert saved.num_bytes == 4 * (3 * 10 + 3 * 20 + 3 * 5 + 3 * 5)


def test_memory_of_a_real_model_is_exact():
    model = resnet()
    optimizer = torch.optim.AdamW(model.parameters())
    model(**image_batch()).loss.backward()
    optimizer.step()
    memory = memory_per_device(model, activations=7, optimizer_bytes_per_parameter=8)
    tensors = [*model.parameters(), *model.buffers()]
    assert memory["weights"] == sum(t.untyped_storage().nbytes() for t in tensors)
    assert memory["gradients"] == sum(p.grad.untyped_storage().nbytes() for p in model.parameters())
    state = [v for s in optimizer.state.values() for k, v in s.items() if k != "step"]
    assert memory["optimizer"] == sum(v.untyped_storage().nbytes() for v in state)
    assert memory["activations"] == 7


def test_sharding_divides_and_rounds_up():
    model = nn.BatchNorm1d(5)  # 10 parameters of 4 bytes; buffers of 5 x 4, 5 x 4 and 8 bytes, which nobody shares
    assert memory_per_device(model, activations=1, optimizer_bytes_per_parameter=8) == {
        "weights": 40 + 48,
        "gradients": 40,
        "optimizer": 80,
        "activations": 1,
    }
    zero_2 = memory_per_device(
        model, activations=1, optimizer_bytes_per_parameter=8, gradients_shared_by=3, optimizer_shared_by=3
    )
    assert zero_2 == {"weights": 88, "gradients": 14, "optimizer": 27, "activations": 1}
    fsdp2 = memory_per_device(
        model,
        activations=1,
        optimizer_bytes_per_parameter=8,
        weights_shared_by=4,
        gradients_shared_by=4,
        optimizer_shared_by=4,
    )
    assert fsdp2 == {"weights": 10 + 48, "gradients": 10, "optimizer": 20, "activations": 1}


def test_frozen_and_tied_weights():
    model = gpt2()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    model.transformer.wpe.requires_grad_(False)
    memory = memory_per_device(model, activations=0, optimizer_bytes_per_parameter=4)
    assert memory["weights"] == 4 * num_parameters + sum(b.numel() * b.element_size() for b in model.buffers())
    assert memory["gradients"] == memory["optimizer"] == 4 * (num_parameters - 128 * 64)


@pytest.mark.parametrize("build", [gpt2, nanochat, resnet])
def test_checkpoint_has_the_size_of_a_real_one(build, tmp_path):
    model = build()
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    save_model(model, str(tmp_path / "model.safetensors"))
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.bin")
    on_disk = sum(path.stat().st_size for path in tmp_path.iterdir())
    num_tensors = 4 * len(model.state_dict())
    expected = checkpoint_bytes(model, optimizer_bytes_per_parameter=8)
    assert expected < on_disk < expected + 1000 * num_tensors
    with without_memory():
        assert checkpoint_bytes(build(), optimizer_bytes_per_parameter=8) == expected


def test_a_billion_parameters_in_seconds_and_no_memory():
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        use_cache=False,
    )
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with without_memory():
        model = transformers.LlamaForCausalLM(config)
        input_ids = torch.zeros(8, 2048, dtype=torch.long)
        with SavedForBackward(model) as saved:
            loss = model(input_ids=input_ids, labels=input_ids).loss
    memory = memory_per_device(
        model,
        activations=saved.num_bytes,
        optimizer_bytes_per_parameter=8,
        weights_shared_by=8,
        gradients_shared_by=8,
        optimizer_shared_by=8,
    )
    assert time.process_time() - started < 8
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak
    assert grown * (1 if sys.platform == "darwin" else 1024) < 500 * 2**20
    assert loss.shape == ()
    assert memory["optimizer"] == 2 * memory["gradients"] > 1e9
    hidden_states = 8 * 2048 * 2048 * 4
    assert memory["activations"] > 22 * 10 * hidden_states


def test_costs_are_those_of_the_parts():
    accelerator = Accelerator(cpu=True)
    with without_memory():
        found = costs(accelerator, gpt2(), packed_batch(), 8)
    model = gpt2()
    with SavedForBackward(model) as saved:
        model(**packed_batch())
    memory = memory_per_device(model, activations=saved.num_bytes, optimizer_bytes_per_parameter=8)
    assert {name: found[f"memory: {name}"] for name in memory} == memory
    assert found["memory: total"] == sum(memory.values())
    assert found["one checkpoint"] == checkpoint_bytes(model, 8)


def test_an_update_is_timed_with_all_its_micro_batches():
    class Slow(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, **inputs):
            time.sleep(0.1)
            return types.SimpleNamespace(loss=self.weight.sum())

    accelerator, model = Accelerator(cpu=True), Slow()
    accelerator.gradient_accumulation_steps = 5
    seconds = time_update(accelerator, model, torch.optim.SGD(model.parameters(), lr=0.1), {})
    assert 0.5 <= seconds.update < 2
    assert 0.1 <= seconds.forward < 0.4
    assert accelerator.gradient_accumulation_steps == 5


def test_evaluations_are_told_with_how_often_they_come():
    control = RunControl(global_batch_size=1, max_steps=10, max_grad_norm=0.0, eval_every=4)
    two = types.SimpleNamespace(num_processes=2)
    assert num_batches(two, [9, 8], 4) == 3
    rows = {"one evaluation": "6 s", "all 3 evaluations": "18 s"}
    assert evaluation_rows(control, Seconds(9.0, 2.0), 3) == rows
    once = dataclasses.replace(control, eval_every=0)
    assert evaluation_rows(once, Seconds(9.0, 2.0), 3, is_least=True) == {"one evaluation": "at least 6 s"}
    assert evaluation_rows(control, None, 3) == {}


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (80 * 2**30, "80 GiB"), (2**60, "1.15e+18 B")],
)
def test_human_bytes(value, text):
    assert human_bytes(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.25, "0.25 s"),
        (59.94, "59.9 s"),
        (59.97, "1 min 00 s"),
        (200, "3 min 20 s"),
        (3599.7, "1 h 00 min"),
        (7500, "2 h 05 min"),
        (86399, "1 d 0 h"),
        (100 * 3600, "4 d 4 h"),
    ],
)
def test_human_seconds(seconds, text):
    assert human_seconds(seconds) == text
