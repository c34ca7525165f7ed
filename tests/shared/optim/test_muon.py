"""Muon against its formulas written out, AdamW against torch's, and both through checkpoints."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from shared.command_line import UsageError
from shared.optim.muon import MuonWithAdamW, for_engine, orthogonalize
from shared.optim.optimizers import set_learning_rates
from tests.launching import launch, preloaded_python

SHAPES = [(8, 8), (16, 4), (4, 16), (64, 48), (48, 64), (1, 5), (5, 1), (1, 1)]


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def muon(*parameters: nn.Parameter, lr: float = 0.02, **options: Any) -> MuonWithAdamW:
    return MuonWithAdamW([{"params": list(parameters), "lr": lr, "use_muon": True}], **options)


def newton_schulz(matrix: Tensor) -> Tensor:
    """Five steps on one matrix in float64, as in Jordan et al. 2024, with the shorter side first."""
    if matrix.shape[0] > matrix.shape[1]:
        return newton_schulz(matrix.T).T
    x = matrix.double() / matrix.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
    return x


# Orthogonalization


@pytest.mark.parametrize("shape", [(16, 4), (4, 16), (64, 48), (48, 64), (128, 32), (1, 5), (5, 1), (1, 1)])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_singular_values_move_to_about_one(shape, scale):
    values = torch.linalg.svdvals(orthogonalize(scale * torch.randn(1, *shape))[0])
    assert values.min() > 0.6
    assert values.max() < 1.3


def test_singular_values_of_a_square_matrix_stay_below_and_nearly_all_come_to_one():
    values = torch.linalg.svdvals(orthogonalize(torch.randn(8, 32, 32)))
    assert values.max() < 1.3
    assert (values > 0.6).float().mean() > 0.9


def test_directions_are_kept():
    matrix = torch.randn(12, 7)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    rotated = left.T @ orthogonalize(matrix[None])[0] @ right.T
    assert torch.allclose(rotated, torch.diag(rotated.diag()), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalize_is_newton_schulz(shape):
    matrix = torch.randn(1, *shape)
    assert torch.allclose(orthogonalize(matrix)[0].double(), newton_schulz(matrix[0]), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_batch_equals_one_by_one(shape):
    matrices = torch.randn(5, *shape)
    single = torch.cat([orthogonalize(matrix[None]) for matrix in matrices])
    assert torch.allclose(orthogonalize(matrices), single, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_transposed_matrix_gives_the_transposed_result(shape):
    matrices = torch.randn(2, *shape)
    assert torch.allclose(orthogonalize(matrices.mT).mT, orthogonalize(matrices), atol=1e-5)


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalize(torch.zeros(2, 3, 4)), torch.zeros(2, 3, 4))


def test_bfloat16_matrices_are_orthogonalized_in_float32_on_cpu():
    assert orthogonalize(torch.randn(1, 4, 6, dtype=torch.bfloat16)).dtype == torch.float32


# One step against the formulas


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_equals_its_formulas_written_out(shape):
    weights = parameter(*shape)
    optimizer = muon(weights, lr=0.03, momentum=0.9, weight_decay=0.1)
    expected, buffer = weights.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        gradient = torch.randn(shape)
        weights.grad = gradient.clone()
        optimizer.step()
        buffer = 0.9 * buffer + 0.1 * gradient.double()
        nesterov = 0.1 * gradient.double() + 0.9 * buffer
        scale = max(1.0, shape[0] / shape[1]) ** 0.5
        expected = expected * (1 - 0.03 * 0.1) - 0.03 * scale * newton_schulz(nesterov)
        assert torch.allclose(weights.detach().double(), expected, atol=1e-5)
        assert torch.equal(weights.grad, gradient)


def test_a_matrix_stored_transposed_moves_as_the_matrix_does():
    matrix = parameter(16, 4)
    stored = nn.Parameter(matrix.detach().T.contiguous())
    matrix.grad = torch.randn(16, 4)
    stored.grad = matrix.grad.T.contiguous()
    groups = [
        {"params": [matrix], "lr": 0.02, "use_muon": True},
        {"params": [stored], "lr": 0.02, "use_muon": True, "stored_transposed": True},
    ]
    MuonWithAdamW(groups).step()
    torch.testing.assert_close(stored.T, matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("stored_transposed", [False, True])
def test_matrices_joined_in_one_move_as_they_would_alone(stored_transposed):
    """Query, key and value of 6 numbers each from 10 inputs."""
    apart = [parameter(6, 10) for _ in range(3)]
    for weights in apart:
        weights.grad = torch.randn(6, 10)
    joined = nn.Parameter(torch.cat([weights.detach() for weights in apart]))
    joined.grad = torch.cat([weights.grad for weights in apart])
    if stored_transposed:
        gradient = joined.grad.T.contiguous()
        joined = nn.Parameter(joined.detach().T.contiguous())
        joined.grad = gradient
    group = {"params": [joined], "lr": 0.02, "use_muon": True, "num_parts": 3, "stored_transposed": stored_transposed}
    MuonWithAdamW([group]).step()
    muon(*apart).step()
    expected = torch.cat([weights.detach() for weights in apart])
    torch.testing.assert_close(joined.detach(), expected.T if stored_transposed else expected, rtol=0, atol=1e-6)


SHARDED = """
import os, sys
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
sys.path.insert(0, os.getcwd())
from shared.optim import muon

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

# More matrices than processes and fewer; rows that do not divide, and fewer rows than processes.
SHAPES = [(7, 5)] * 4 + [(6, 9)] + [(9, 4)] * 3 + [(2, 8)] + [(12, 6), (5, 12)]
MESH = tuple(map(int, sys.argv[1:]))
calls = []
orthogonalize = muon.orthogonalize
muon.orthogonalize = lambda matrices: calls.append(len(matrices)) or orthogonalize(matrices)

def model():
    torch.manual_seed(0)
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])

def train(weights):
    of_muon = {"lr": 0.1, "use_muon": True}
    groups = [{**of_muon, "params": weights[:-2], "weight_decay": 0.1}]
    groups += [{**of_muon, "params": weights[-2:-1], "num_parts": 3}]
    groups += [{**of_muon, "params": weights[-1:], "num_parts": 3, "stored_transposed": True}]
    optimizer = muon.MuonWithAdamW(groups)
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        loss = sum((weight.square() * torch.randn(weight.shape, generator=draw)).sum() for weight in gathered(weights))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

def gathered(weights):
    return [weight.full_tensor() if hasattr(weight, "full_tensor") else weight for weight in weights]

whole, cut = model(), model()
train(list(whole))
of_one, calls[:] = sum(calls), []
names = ("replicate", "shard")[-len(MESH):]
fully_shard(cut, mesh=init_device_mesh("cpu", MESH, mesh_dim_names=names))
train(list(cut.parameters()))
for one, other in zip(gathered(cut.parameters()), whole, strict=True):
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)
together = torch.tensor(sum(calls))
torch.distributed.all_reduce(together)
replicas = MESH[0] if len(MESH) == 2 else 1
assert together == of_one * replicas, (together, of_one)  # within a replica no product is computed twice
print("equal", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(3,), (2, 2)], ids=["cut in three", "two replicas cut in two"])
def test_processes_with_rows_of_each_matrix_take_the_steps_of_one(tmp_path: Path, mesh: tuple[int, ...]) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    program = (tmp_path / "sharded.py", *map(str, mesh))
    processes = math.prod(mesh)
    launcher = (f"--num_processes={processes}",)
    status, output = launch("multi_cpu", *program, launcher=launcher, python=preloaded_python())
    assert status == 0, output
    assert output.count("equal") == processes


def test_matrices_of_one_shape_do_not_mix():
    together = [parameter(6, 4) for _ in range(3)] + [parameter(4, 6)]
    apart = copy.deepcopy(together)
    gradients = [torch.randn_like(weights) for weights in together]
    optimizers = [muon(*together), *(muon(weights) for weights in apart)]
    for weights, gradient in zip([*together, *apart], gradients * 2, strict=True):
        weights.grad = gradient
    for optimizer in optimizers:
        optimizer.step()
    for one, other in zip(together, apart, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_adamw_part_equals_torchs(weight_decay):
    ours = [parameter(5), parameter(3, 4), parameter(2, 3, 4)]
    theirs = copy.deepcopy(ours)
    options = {"betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": weight_decay}
    optimizer = MuonWithAdamW([{"params": ours, "lr": 0.01, "use_muon": False}], **options)
    reference = torch.optim.AdamW(theirs, lr=0.01, **options)
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6, rtol=0)


def test_groups_bring_their_own_settings():
    first, second = parameter(4, 4), parameter(4)
    groups = [
        {"params": [first], "lr": 0.0, "use_muon": True, "momentum": 0.5},
        {"params": [second], "lr": 0.1, "weight_decay": 0.5},
    ]
    optimizer = MuonWithAdamW(groups, weight_decay=0.25)
    kept = [(group["momentum"], group["weight_decay"], group["use_muon"]) for group in optimizer.param_groups]
    assert kept == [(0.5, 0.25, True), (0.95, 0.5, False)]
    before = first.detach().clone()
    for weights in (first, second):
        weights.grad = torch.ones_like(weights)
    optimizer.step()
    assert torch.equal(first, before)


# DeepSpeed's


def of_deepspeed() -> Any:
    config: dict[str, Any] = {"zero_optimization": {"stage": 3, "reduce_scatter": True}}
    plugin = SimpleNamespace(deepspeed_config=config)
    return SimpleNamespace(distributed_type="DEEPSPEED", state=SimpleNamespace(deepspeed_plugin=plugin))


def test_deepspeeds_own_takes_the_same_steps(monkeypatch: pytest.MonkeyPatch):
    """Outside of ZeRO, in float32, where it would take bfloat16; matrices of all shapes, decay, and what AdamW has."""
    original = pytest.importorskip("deepspeed.runtime.zero.muon.original_muon")
    monkeypatch.setattr(original, "ns_compute_dtype", lambda method: torch.float32)
    ours = [parameter(*shape) for shape in SHAPES] + [parameter(7, 3), parameter(5)]
    theirs = copy.deepcopy(ours)
    accelerator, optimizers = of_deepspeed(), []
    for weights in (ours, theirs):
        matrices = {"params": weights[:-2], "lr": 0.02, "weight_decay": 0.1, "use_muon": True}
        optimizers.append(MuonWithAdamW([matrices, {"params": weights[-2:], "lr": 0.01, "use_muon": False}]))
    optimizers[1] = for_engine(accelerator, optimizers[1])
    assert not accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]["reduce_scatter"]
    with torch.compiler.set_stance("force_eager"):
        for step in range(5):
            for one, other in zip(ours, theirs, strict=True):
                one.grad = torch.randn_like(one)
                other.grad = one.grad.clone()
            for optimizer in optimizers:
                set_learning_rates(optimizer, 1 / (step + 1))
                optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


def test_only_deepspeed_has_its_own():
    optimizer = muon(parameter(4, 4))
    assert for_engine(SimpleNamespace(distributed_type="FSDP"), optimizer) is optimizer
    adamw = torch.optim.AdamW([parameter(4, 4)])
    assert for_engine(of_deepspeed(), adamw) is adamw
    for form in ({"stored_transposed": True}, {"num_parts": 3}):
        joined = MuonWithAdamW([{"params": [parameter(6, 6)], "lr": 0.1, "use_muon": True, **form}])
        with pytest.raises(UsageError, match="optimizer: 'muon': expected adamw under DeepSpeed, whose Muon"):
            for_engine(of_deepspeed(), joined)


# Edges


@pytest.mark.parametrize("use_muon", [True, False])
@pytest.mark.parametrize(("gradient", "lr"), [(0.0, 0.1), (1.0, 0.0), (0.0, 0.0)])
def test_a_zero_gradient_and_a_zero_rate_change_nothing(use_muon, gradient, lr):
    weights = parameter(4, 6)
    before = weights.detach().clone()
    optimizer = MuonWithAdamW([{"params": [weights], "lr": lr, "use_muon": use_muon}])
    for _ in range(3):
        weights.grad = torch.full_like(weights, gradient)
        optimizer.step()
    assert torch.equal(weights, before)
    assert all(torch.isfinite(value).all() for value in optimizer.state[weights].values())


def test_parameters_without_a_gradient_are_left_alone():
    used, unused, vector = parameter(3, 3), parameter(3, 3), parameter(3)
    groups = [{"params": [used, unused], "lr": 0.1, "use_muon": True}, {"params": [vector], "lr": 0.1}]
    optimizer = MuonWithAdamW(groups, weight_decay=0.1)
    before = unused.detach().clone(), vector.detach().clone()
    used.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(unused, before[0])
    assert torch.equal(vector, before[1])
    assert list(optimizer.state) == [used]


@pytest.mark.parametrize("shape", [(5,), (2, 3, 4), ()])
def test_a_muon_group_takes_matrices_only(shape):
    with pytest.raises(ValueError, match="matrices only"):
        muon(parameter(3, 3), nn.Parameter(torch.zeros(shape)))


def test_a_linear_regression_is_learned():
    truth = torch.randn(16, 4)
    model = nn.Linear(16, 4)
    groups = [{"params": [model.weight], "lr": 0.2, "use_muon": True}, {"params": [model.bias], "lr": 0.05}]
    optimizer = MuonWithAdamW(groups)
    losses = []
    for step in range(60):
        set_learning_rates(optimizer, 1 - step / 60)
        x = torch.randn(64, 16)
        loss = (model(x) - x @ truth).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.02 * sum(losses[:5])


# State


def trained(steps: int) -> tuple[nn.Module, MuonWithAdamW]:
    model = nn.Linear(6, 3)
    groups = [{"params": [model.weight], "lr": 0.05, "use_muon": True}, {"params": [model.bias], "lr": 0.05}]
    optimizer = MuonWithAdamW(groups, weight_decay=0.1)
    train(model, optimizer, range(steps))
    return model, optimizer


def train(model: Any, optimizer: Any, steps: range) -> None:
    for step in steps:
        set_learning_rates(optimizer, 1 - step / 20)
        x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()


def same(one: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_a_state_dict_gives_the_same_next_steps():
    model, optimizer = trained(5)
    other, resumed = trained(0)
    other.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(model, other)
    train(model, optimizer, range(5, 10))
    train(other, resumed, range(5, 10))
    assert same(model, other)


def test_a_loaded_step_counter_goes_where_the_fused_kernel_wants_it():
    """Torch moves it to the parameter's device, and to float32, for groups that say that they are fused."""
    _, optimizer = trained(2)
    state = copy.deepcopy(optimizer.state_dict())
    state["state"][1]["step"] = state["state"][1]["step"].double()
    other, resumed = trained(0)
    resumed.load_state_dict(state)
    assert resumed.state[other.bias]["step"].dtype == torch.float32


def test_save_state_and_load_state_are_exact(tmp_path: Path):
    accelerator = Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(*trained(3))
    accelerator.save_state(str(tmp_path))
    train(model, optimizer, range(3, 6))
    expected = copy.deepcopy(accelerator.unwrap_model(model))
    accelerator.load_state(str(tmp_path))
    assert not same(model, expected)
    train(model, optimizer, range(3, 6))
    assert same(model, expected)


def test_a_copy_with_fresh_moments_differs_so_the_tests_above_can_fail():
    model, optimizer = trained(5)
    other, fresh = trained(0)
    other.load_state_dict(model.state_dict())
    train(model, optimizer, range(5, 10))
    train(other, fresh, range(5, 10))
    assert not same(model, other)
