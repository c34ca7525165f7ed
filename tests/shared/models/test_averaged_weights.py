import torch
from torch import nn

from shared.models.averaged_weights import AveragedWeights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def change(model: nn.Module, step: int) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(step)))
    model(torch.randn(8, 3, generator=torch.Generator().manual_seed(step)))  # moves the running statistics


def test_the_average_is_that_of_the_formula() -> None:
    model = network()
    average = AveragedWeights(model, 0.5, {})
    expected = {name: value.double() for name, value in model.state_dict().items()}
    for step in range(1, 9):
        change(model, step)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, value in model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value.double()
    found = average.tensors()
    assert set(found) == {"0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"}
    for name, value in found.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)


def test_the_model_has_the_average_inside_the_block_only() -> None:
    model = network()
    average = AveragedWeights(model, 0.9, {})
    change(model, 1)
    average.update(1)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    with average.in_place():
        assert torch.equal(model.state_dict()["0.weight"], average.tensors()["0.weight"])
        assert not torch.equal(model.state_dict()["0.weight"], own["0.weight"])
    assert all(torch.equal(value, own[name]) for name, value in model.state_dict().items())


def test_the_average_goes_on_from_what_was_saved() -> None:
    whole, first, second = network(), network(), network()
    uninterrupted = AveragedWeights(whole, 0.9, {})
    before = AveragedWeights(first, 0.9, {})
    for step in (1, 2):
        change(whole, step)
        uninterrupted.update(step)
    change(first, 1)
    before.update(1)
    second.load_state_dict(first.state_dict())
    after = AveragedWeights(nn.DataParallel(second), 0.9, before.tensors())
    change(second, 2)
    after.update(2)
    expected = uninterrupted.tensors()
    assert all(torch.equal(value, expected[name]) for name, value in after.tensors().items())


def test_without_decay_there_is_no_average() -> None:
    model = network()
    average = AveragedWeights(model, 0.0, {})
    change(model, 1)
    average.update(1)
    own = model.state_dict()["0.weight"].clone()
    with average.in_place():
        assert torch.equal(model.state_dict()["0.weight"], own)
    assert average.tensors() == {}
