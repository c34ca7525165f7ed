import time
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from shared.performance import flops
from shared.performance.dry_run import without_memory
from shared.performance.flops import peak_flops, training_flops

ROWS, TOKENS, LAYERS, HIDDEN, VOCAB = 3, 128, 2, 64, 512


def llama(**changes):
    sizes = {
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": 160,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "max_position_embeddings": 2048,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes)))


def nanochat():
    config = transformers.NanoChatConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return transformers.NanoChatForCausalLM(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=4, n_positions=TOKENS, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def matrix_weights(model):
    """Weights of matrix products: all matrices but the embeddings, and the head even where it is tied to one."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in embeddings and p is not head]
    return sum(p.numel() for p in matrices) + head.numel()


@pytest.mark.parametrize("build", [llama, nanochat, gpt2])
def test_equals_six_operations_a_weight_and_attention(build):
    model = build()
    inputs = {"input_ids": torch.zeros(ROWS, TOKENS, dtype=torch.long), "use_cache": False}
    per_token = training_flops(model, inputs) / (ROWS * TOKENS)
    assert per_token == 6 * matrix_weights(model) + 12 * LAYERS * TOKENS * HIDDEN


@pytest.mark.parametrize(
    "extra",
    [
        {"position_ids": torch.arange(TOKENS // 2).repeat(ROWS, 2)},
        {"attention_mask": torch.ones(ROWS, TOKENS, dtype=torch.long)},
        {"labels": torch.zeros(ROWS, TOKENS, dtype=torch.long)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_packing_masks_and_labels_do_not_change_the_count(extra):
    inputs = {"input_ids": torch.zeros(ROWS, TOKENS, dtype=torch.long), "use_cache": False}
    model = llama()
    assert training_flops(model, inputs | extra) == training_flops(model, inputs)


def test_resnet_50_needs_three_times_its_published_multiply_adds():
    with torch.device("meta"):
        model = transformers.ResNetForImageClassification(transformers.ResNetConfig(num_labels=1000))
    count = training_flops(model, {"pixel_values": torch.empty(2, 3, 224, 224, device="meta")})
    # 4.09 G multiply-adds: torchvision's table for the same net, stride in the 3x3 convolution.
    assert count / (2 * 3 * 2) == pytest.approx(4.09e9, rel=0.002)


def test_gradient_checkpointing_does_not_change_the_count():
    model = llama().train()
    inputs = {"input_ids": torch.zeros(ROWS, TOKENS, dtype=torch.long), "use_cache": False}
    without = training_flops(model, inputs)
    model.activation_checkpointing_enable()
    assert training_flops(model, inputs) == without


def test_leaves_weights_buffers_mode_and_generator_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.LazyLinear(2))
    pixels = torch.randn(2, 3, 8, 8)
    model(pixels)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    parameters = list(model.parameters())
    generator = torch.get_rng_state()
    training_flops(model, {"input": pixels})
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(now is then for now, then in zip(model.parameters(), parameters, strict=True))
    assert all(parameter.grad is None for parameter in parameters)
    assert model.training
    assert torch.equal(torch.get_rng_state(), generator)


def test_a_billion_parameters_take_under_two_seconds_and_no_memory():
    with torch.device("meta"):
        model = llama(vocab_size=32000, hidden_size=2048, intermediate_size=5632, num_hidden_layers=22)
    assert sum(parameter.numel() for parameter in model.parameters()) > 1e9
    started = time.process_time()
    count = training_flops(model, {"input_ids": torch.zeros(8, 2048, dtype=torch.long), "use_cache": False})
    assert time.process_time() - started < 2
    assert count == 8 * 2048 * (6 * matrix_weights(model) + 12 * 22 * 2048 * 2048)


def test_a_model_built_without_memory_gives_the_same_count():
    inputs = {"input_ids": torch.zeros(ROWS, TOKENS, dtype=torch.long), "use_cache": False}
    with without_memory():
        model = llama()
        inside = training_flops(model, inputs)
    assert inside == training_flops(model, inputs) == training_flops(llama(), inputs)


def test_shapes_that_depend_on_values_are_refused():
    class Picking(nn.Module):
        def forward(self, values):
            return values[values > 0]

    with pytest.raises(RuntimeError):
        training_flops(Picking(), {"values": torch.ones(4)})


@pytest.mark.parametrize(
    ("name", "dtype", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", torch.bfloat16, 312e12),
        ("NVIDIA A100 80GB PCIe", torch.float16, 312e12),
        ("NVIDIA H100 80GB HBM3", torch.bfloat16, 989e12),
        ("NVIDIA H100 PCIe", torch.bfloat16, 756e12),
        ("NVIDIA H200", torch.bfloat16, 989e12),
        ("NVIDIA L4", torch.bfloat16, 121e12),
        ("NVIDIA L40S", torch.bfloat16, 362e12),
        ("NVIDIA GeForce RTX 4090", torch.bfloat16, 165e12),
        ("Tesla V100-SXM2-16GB", torch.float16, 125e12),
        ("NVIDIA H100 80GB HBM3", torch.float32, 67e12),
        # Slower relatives of known cards, and types that a card has no units for: measured.
        ("NVIDIA A100-SXM4-40GB MIG 3g.20gb", torch.bfloat16, 0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", torch.bfloat16, 0),
        ("Tesla V100-SXM2-16GB", torch.bfloat16, 0),
        ("NVIDIA H200", torch.float64, 0),
        ("AMD Instinct MI300X", torch.bfloat16, 0),
        ("", torch.float32, 0),
    ],
)
def test_data_sheet_peaks(name, dtype, peak):
    assert flops._data_sheet_peak(name, dtype) == peak


@pytest.mark.parametrize(("name", "peak"), [("NVIDIA H200", 494e12), ("Tesla V100-SXM2-16GB", 15.7e12)])
def test_float32_peak_follows_the_tf32_setting(name, peak):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert flops._data_sheet_peak(name, torch.float32) == peak
    finally:
        torch.set_float32_matmul_precision(before)


def test_convolutions_use_tf32_by_default():
    """A ResNet in float32 on an A100 is measured by what its convolutions could do, or it would reach 300 %."""
    assert flops._data_sheet_peak("NVIDIA A100-SXM4-80GB", torch.float32, of_convolutions=True) == 156e12
    assert flops._data_sheet_peak("Tesla V100-SXM2-16GB", torch.float32, of_convolutions=True) == 15.7e12
    accelerator = SimpleNamespace(device=torch.device("cuda"), mixed_precision="no", _models=[torch.nn.Linear(2, 2)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
        assert flops.peak(accelerator) == 67e12
        accelerator._models = [torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3), torch.nn.Linear(50, 50))]
        assert flops.peak(accelerator) == 67e12  # a vision transformer's patches
        accelerator._models = [torch.nn.Sequential(torch.nn.Conv2d(8, 8, 3), torch.nn.Linear(8, 10))]
        assert flops.peak(accelerator) == 494e12


def test_known_card_is_looked_up_not_measured(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert peak_flops("cuda:1", torch.bfloat16) == 989e12


def test_cpu_peak_is_measured_in_a_short_time():
    generator = torch.get_rng_state()
    started = time.perf_counter()
    peak = peak_flops("cpu", torch.float32)
    assert time.perf_counter() - started < 3
    left, right = torch.ones(512, 512), torch.ones(512, 512)
    started = time.perf_counter()
    for _ in range(3):
        left @ right
    plain = 3 * 2 * 512**3 / (time.perf_counter() - started)
    assert 0.3 * plain < peak < 1e14
    assert torch.equal(torch.get_rng_state(), generator)
