"""What a run says of itself before it begins."""

import pytest
import transformers
from accelerate import Accelerator

from shared.run.summary import describe_classifier, table


@pytest.mark.parametrize(("num_images", "epoch"), [(100, 12.5), (0, "unknown, streamed")])
def test_a_classifier_is_described(num_images, epoch):
    config = transformers.ResNetConfig(depths=[1], hidden_sizes=[8], embedding_size=8, num_labels=3)
    model, accelerator = transformers.ResNetForImageClassification(config), Accelerator(cpu=True)
    found = describe_classifier(accelerator, model, 32, num_images, 8)
    assert list(found)[:3] == ["parameters", "classes", "flops_per_image"]
    assert (found["parameters"], found["classes"]) == (sum(p.numel() for p in model.parameters()), 3)
    assert (found["images_per_update"], found["updates_per_epoch"], found["processes"]) == (8, epoch, 1)
    larger = describe_classifier(accelerator, model, 64, num_images, 8)
    assert larger["flops_per_image"] == pytest.approx(4 * found["flops_per_image"], rel=0.01)


def test_table_aligns_values():
    lines = table({"parameters": "1.8M", "a checkpoint": "21.6 MiB", "note": ""}).splitlines()
    assert lines == ["parameters    1.8M", "a checkpoint  21.6 MiB", "note"]
    assert table({}) == ""
