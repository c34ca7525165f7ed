import copy

import pytest
import torch
from accelerate import Accelerator
from torch import nn
from transformers import ResNetConfig

from shared.models.batch_statistics import RunningStatistics
from shared.models.resnet import ResNetForImageClassification
from tests.host_reads import HostReads


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1), nn.BatchNorm2d(2))


def test_one_batch_an_update_is_torch_s_own_average() -> None:
    ours, torchs = model(), model()
    statistics, accelerator = RunningStatistics(ours), Accelerator(cpu=True)
    for step in range(5):
        batch = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        statistics.begin_update()
        ours(batch)
        statistics.add_micro_batch()
        statistics.end_update(accelerator, torch.tensor(1.0))
        torchs(batch)
    for name, value in torchs.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(ours.state_dict()[name], value)


def test_order_and_repetition_of_micro_batches_change_nothing() -> None:
    """Gradient checkpointing sees each micro-batch once more, on the way back."""
    accelerator = Accelerator(cpu=True)
    batches = [torch.randn(4, 3, 6, 6) for _ in range(3)]
    results = []
    for order in ((0, 1, 2), (2, 0, 1), (0, -1, 1, -2, 2, -3)):
        network = model()
        statistics = RunningStatistics(network)
        statistics.begin_update()
        for index in order:
            network(batches[index])
            if index >= 0:
                statistics.add_micro_batch()
        statistics.end_update(accelerator, torch.tensor(1.0))
        results.append(network.state_dict())
    for other in results[1:]:
        for name in ("1.running_mean", "1.running_var", "4.running_mean"):
            torch.testing.assert_close(other[name], results[0][name])


@pytest.mark.parametrize("grad_norm", [float("nan"), float("inf")])
def test_an_update_without_a_finite_gradient_changes_nothing(grad_norm: float) -> None:
    network = model()
    before = copy.deepcopy(network.state_dict())
    statistics = RunningStatistics(network)
    statistics.begin_update()
    network(torch.full((2, 3, 6, 6), torch.nan))
    statistics.add_micro_batch()
    statistics.end_update(Accelerator(cpu=True), torch.tensor(grad_norm))
    assert all(torch.equal(network.state_dict()[name], before[name]) for name in before if "running" in name)


@pytest.mark.slow
def test_no_forward_pass_reads_on_the_host_or_breaks_the_graph() -> None:
    sizes = {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [1, 2]}
    network = ResNetForImageClassification(ResNetConfig(**sizes)).train()
    statistics, pixels = RunningStatistics(network), torch.randn(2, 3, 32, 32)
    with HostReads() as reads:
        statistics.begin_update()
        network(pixels).logits.sum().backward()
        statistics.add_micro_batch()
        statistics.end_update(Accelerator(cpu=True), torch.tensor(1.0))
    assert reads.number == 0
    assert torch._dynamo.explain(network)(pixels).graph_break_count == 0

    layer = next(layer for layer in network.modules() if isinstance(layer, nn.BatchNorm2d))
    layer.momentum = None  # torch's mean over all batches
    with HostReads() as reads:
        network(pixels)
    assert reads.number == 1
    torch._dynamo.reset()
    assert torch._dynamo.explain(network)(pixels).graph_break_count > 0
