"""What every optimizer needs: the bytes of its state, rates, and what decays."""

import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from shared.optim.lamb import Lamb
from shared.optim.muon import MuonWithAdamW
from shared.optim.optimizers import (
    clip_and_step,
    decay_of_matrices,
    set_learning_rates,
    split_weights,
    state_bytes_per_parameter,
    step_if_finite,
)
from tests.host_reads import HostReads


def parameter(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape))


def layer() -> tuple[nn.Module, MuonWithAdamW]:
    """A linear layer and its optimizer, both groups at 0.05."""
    model = nn.Linear(3, 4)
    groups = [{"params": [model.weight], "lr": 0.05, "use_muon": True}, {"params": [model.bias], "lr": 0.05}]
    return model, MuonWithAdamW(groups)


def test_bytes_of_the_state_are_those_that_it_takes():
    matrix, vector = parameter(6, 4), parameter(5)
    groups = [{"params": [matrix], "lr": 0.02, "use_muon": True}, {"params": [vector], "lr": 0.01}]
    of_sgd = [torch.optim.SGD([matrix, vector], momentum=momentum) for momentum in (0.0, 0.9)]
    for optimizer in (MuonWithAdamW(groups), torch.optim.AdamW([matrix, vector]), *of_sgd):
        expected = state_bytes_per_parameter(optimizer) * (6 * 4 + 5)
        matrix.grad, vector.grad = torch.ones(6, 4), torch.ones(5)
        optimizer.step()
        tensors = [
            value for state in optimizer.state.values() for value in state.values() if value is not None and value.ndim
        ]
        assert expected == sum(tensor.numel() * 4 for tensor in tensors)


def rates(optimizer: torch.optim.Optimizer) -> list[float]:
    return [group["lr"] for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", ["ours", "adamw", "sgd"])
def test_every_group_is_set_to_a_share_of_its_own_rate(kind):
    groups = [{"params": [parameter(2, 2)], "lr": 0.5}, {"params": [parameter(2)], "lr": 0.1}]
    optimizer = {"ours": MuonWithAdamW, "adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[kind](groups)
    for factor in (0.5, 0.0, 1.0, 0.25, 0.25):
        set_learning_rates(optimizer, factor)
        assert rates(optimizer) == pytest.approx([0.5 * factor, 0.1 * factor])


def test_the_rate_it_was_built_with_survives_a_state_dict():
    _, optimizer = layer()
    set_learning_rates(optimizer, 0.1)
    for set_before_loading in (False, True):
        _, resumed = layer()
        if set_before_loading:
            set_learning_rates(resumed, 0.7)
        resumed.load_state_dict(optimizer.state_dict())
        set_learning_rates(resumed, 0.5)
        assert rates(resumed) == pytest.approx([0.025, 0.025])


def test_rates_of_a_prepared_optimizer():
    accelerator = Accelerator(cpu=True)
    _, optimizer = accelerator.prepare(*layer())
    set_learning_rates(optimizer, 0.5)
    assert rates(optimizer.optimizer) == pytest.approx([0.025, 0.025])


def test_matrices_and_convolutions_alone_decay() -> None:
    """Of every parameter once; embeddings are told by their names, also where they are linear layers."""
    parts = {"linear": nn.Linear(3, 4), "conv": nn.Conv2d(2, 2, 3), "norm": nn.LayerNorm(4)}
    parts |= {"token_embedding": nn.Embedding(5, 4), "time_embedding": nn.Linear(4, 4)}
    model = nn.ModuleDict(parts)
    model.register_parameter("places", nn.Parameter(torch.zeros(3, 4)))
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = [[names[id(weight)] for weight in group["params"]] for group in decay_of_matrices(model, 0.1)]
    assert [group["weight_decay"] for group in decay_of_matrices(model, 0.1)] == [0.1, 0.0]
    assert groups[0] == ["linear.weight", "conv.weight"]
    assert sorted(groups[0] + groups[1]) == sorted(names.values())


@pytest.mark.parametrize("is_tied", [False, True])
def test_weights_of_a_language_model_are_hidden_tables_or_vectors(is_tied):
    """Each that is trained once, whether the head is the table of embeddings or not."""
    table, hidden, head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, 5, bias=False)
    experts, norm = nn.ParameterList([parameter(2, 4, 4)]), nn.LayerNorm(4)
    if is_tied:
        head.weight = table.weight
    norm.bias.requires_grad = False
    model = nn.ModuleList([table, hidden, experts, norm, head])
    found = split_weights(model, head.weight)
    expected = ([hidden.weight, experts[0]], [table.weight] if is_tied else [table.weight, head.weight])
    expected += ([hidden.bias, norm.weight],)
    assert [list(map(id, weights)) for weights in found] == [list(map(id, weights)) for weights in expected]


def builders() -> dict[str, Any]:
    """Every optimizer of the recipes, of a matrix and a vector."""

    def of_muon(matrix: nn.Parameter, vector: nn.Parameter) -> torch.optim.Optimizer:
        groups = [{"params": [matrix], "lr": 0.02, "use_muon": True}, {"params": [vector], "lr": 0.01}]
        return MuonWithAdamW(groups, weight_decay=0.1)

    return {
        "muon": of_muon,
        "lamb": lambda *weights: Lamb(weights, 0.01, weight_decay=0.1),
        "adamw": lambda *weights: torch.optim.AdamW(weights, lr=0.01, fused=True),
        "sgd": lambda *weights: torch.optim.SGD(weights, lr=0.1, momentum=0.9, nesterov=True, fused=True),
        "any other": lambda *weights: torch.optim.RMSprop(weights, lr=0.01),
    }


@pytest.mark.parametrize("kind", list(builders()))
@pytest.mark.parametrize("bad", [{0}, {1, 2}, {0, 3}])
def test_updates_without_a_finite_gradient_change_neither_weights_nor_state(kind: str, bad: set[int]) -> None:
    """The others give, to the bit, what they give alone, also those after a first update that was skipped."""

    def train(numbers: list[int], asks: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        weights = [parameter(6, 4), parameter(5)]
        optimizer = builders()[kind](*weights)
        for number in numbers:
            draw = torch.Generator().manual_seed(number)
            for weight in weights:
                weight.grad = torch.randn(weight.shape, generator=draw)
                weight.grad[0] = math.nan if number in bad else weight.grad[0]
            norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
            step_if_finite(optimizer, norm) if asks else optimizer.step()
        state = [value for state in optimizer.state.values() for value in state.values() if value is not None]
        return [weight.detach() for weight in weights] + state

    found, expected = train(list(range(5)), True), train(sorted(set(range(5)) - bad), False)
    assert all(map(torch.equal, found, expected))
    assert len(found) == len(expected)


@pytest.mark.parametrize("kind", [kind for kind in builders() if kind != "any other"])
def test_a_scaler_of_gradients_asks_the_optimizer_and_not_the_host(kind: str) -> None:
    """As under float16: the first update overflows, changes nothing, and halves the scale."""
    weights = [parameter(6, 4), parameter(5)]
    before = [weight.detach().clone() for weight in weights]
    optimizer, scaler = builders()[kind](*weights), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    for factor, moves in ((math.inf, False), (1.0, True)):
        scaler.scale(sum(weight.sum() for weight in weights) * factor).backward()
        scaler.unscale_(optimizer)
        with HostReads() as reads:
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert reads.number == 0
        assert all(torch.equal(*pair) != moves for pair in zip(weights, before, strict=True))
    assert scaler.get_scale() == 2.0**15


def test_an_optimizer_that_asks_the_host_goes_on_after_an_overflow_of_float16() -> None:
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    model = nn.Linear(3, 1)
    model, optimizer = accelerator.prepare(model, torch.optim.RMSprop(model.parameters(), lr=0.1))
    before = model.weight.detach().clone()
    for factor, moves in ((math.inf, False), (1.0, True), (1.0, True)):
        accelerator.backward(model(torch.ones(2, 3)).sum() * factor)
        clip_and_step(accelerator, model, optimizer, 1.0)
        assert torch.equal(model.weight, before) != moves
    assert accelerator.scaler.get_scale() == 2.0**15


def test_a_counter_of_lamb_lies_where_the_weights_do_also_from_older_files() -> None:
    """Elsewhere each step of each tensor would make the host wait."""
    weights = nn.Parameter(torch.ones(2))
    optimizer = Lamb([weights], 0.1)
    weights.grad = torch.ones(2)
    optimizer.step()
    state = optimizer.state_dict()
    other = Lamb([nn.Parameter(torch.ones(2, device="meta"))], 0.1)
    other.load_state_dict(state)
    assert next(iter(other.state.values()))["step"].device.type == "meta"
