"""LAMB against the formulas of the paper in float64, at published sizes, and cut in parts over two processes."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shared.optim.lamb import Lamb
from tests.launching import launch, preloaded_python

SHAPES = [(8, 8), (16, 4), (3, 2, 5, 5), (7,)]
# Weights of networks whose rates are published, as they begin: BERT-large (normal, 0.02), and ResNet-50's convolutions
# (He et al. 2015, normal by the outputs).
PUBLISHED = {
    "word embeddings of BERT-large": ((30522, 1024), 0.02),
    "attention of BERT-large": ((1024, 1024), 0.02),
    "feed-forward of BERT-large": ((4096, 1024), 0.02),
    "3x3 convolution of ResNet-50's last stage": ((512, 512, 3, 3), (2 / (512 * 9)) ** 0.5),
    "1x1 convolution of ResNet-50's last stage": ((2048, 512, 1, 1), (2 / 2048) ** 0.5),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def written_out(weights: Tensor, gradients: list[Tensor], lr: float, decay: float, adapts: bool) -> Tensor:
    """You et al. 2020, algorithm 2, in float64."""
    weights = weights.double()
    first, second = torch.zeros_like(weights), torch.zeros_like(weights)
    for number, gradient in enumerate((gradient.double() for gradient in gradients), start=1):
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        step = (first / (1 - 0.9**number)) / ((second / (1 - 0.999**number)).sqrt() + 1e-6) + decay * weights
        ratio = weights.norm() / step.norm() if adapts else 1.0
        weights = weights - lr * ratio * step
    return weights


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("adapts", [True, False])
def test_steps_are_those_of_the_formulas(shape: tuple[int, ...], adapts: bool) -> None:
    weights = nn.Parameter(20 * torch.randn(shape, dtype=torch.float64))  # longer than where others clamp the norm
    gradients = [torch.randn(shape, dtype=torch.float64) for _ in range(5)]
    expected = written_out(weights.detach(), gradients, 0.03, 0.1, adapts)
    group = {"params": [weights], "weight_decay": 0.1, "trust_ratio": adapts}
    optimizer = Lamb([group], 0.03)
    for gradient in gradients:
        weights.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weights.grad, gradient)
    torch.testing.assert_close(weights.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_relative_step_is_the_rate_at_published_sizes(name: str) -> None:
    shape, deviation = PUBLISHED[name]
    weights = nn.Parameter(deviation * torch.randn(shape))
    before = weights.detach().clone()
    weights.grad = torch.randn(shape) / weights.numel()
    Lamb([weights], 0.006, weight_decay=0.01).step()
    assert float((weights.detach() - before).norm() / before.norm()) == pytest.approx(0.006, rel=1e-3)


def test_weights_and_steps_of_zero_are_no_division_by_zero() -> None:
    new, still = nn.Parameter(torch.zeros(4, 3)), nn.Parameter(torch.ones(4, 3))
    optimizer = Lamb([new, still], 0.1)
    new.grad, still.grad = torch.ones(4, 3), torch.zeros(4, 3)
    optimizer.step()
    assert torch.equal(still, torch.ones(4, 3))
    torch.testing.assert_close(new.detach(), torch.full((4, 3), -0.1), rtol=1e-4, atol=0)  # Adam's step


def test_parameters_without_a_gradient_are_left_alone() -> None:
    used, unused = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(3, 3))
    optimizer = Lamb([{"params": [used]}, {"params": [unused]}], 0.1, weight_decay=0.1)
    used.grad = torch.ones(3, 3)
    optimizer.step()
    assert torch.equal(unused, torch.ones(3, 3))
    assert list(optimizer.state) == [used]


def test_a_state_dict_gives_the_same_next_steps() -> None:
    def step(weights: nn.Parameter, optimizer: Lamb, number: int) -> None:
        weights.grad = torch.randn(weights.shape, generator=torch.Generator().manual_seed(number))
        optimizer.step()

    weights = nn.Parameter(torch.randn(4, 3))
    optimizer = Lamb([weights], 0.1)
    for number in range(3):
        step(weights, optimizer, number)
    other = nn.Parameter(weights.detach().clone())
    resumed = Lamb([other], 0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step(weights, optimizer, 3)
    step(other, resumed, 3)
    assert torch.equal(weights, other)


SHARDED = """
import os, sys
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
sys.path.insert(0, os.getcwd())
from shared.optim.lamb import Lamb, whole_norms

torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()

def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1, bias=False))  # the last one is whole on the first process

def train(model, optimizer):
    for number in range(3):
        inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(number))
        model(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

whole = model()
train(whole, Lamb(whole.parameters(), 0.1, weight_decay=0.1))
cut = model()
fully_shard(cut, mesh=init_device_mesh("cpu", (2,)))
optimizer = Lamb(cut.parameters(), 0.1, weight_decay=0.1)
norms = whole_norms(list(cut.parameters()))
expected = whole_norms([parameter.full_tensor() for parameter in cut.parameters()])
torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
train(cut, optimizer)
for one, other in zip(cut.parameters(), whole.parameters(), strict=True):
    torch.testing.assert_close(one.full_tensor(), other, rtol=0, atol=1e-6)
print("equal", flush=True)
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_with_a_part_each_take_the_steps_of_one(tmp_path: Path) -> None:
    (tmp_path / "sharded.py").write_text(SHARDED)
    status, output = launch("multi_cpu", tmp_path / "sharded.py", python=preloaded_python())
    assert status == 0, output
    assert output.count("equal") == 2
