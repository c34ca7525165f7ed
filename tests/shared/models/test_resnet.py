import pytest
import torch
import transformers
from PIL import Image

from shared.command_line import UsageError
from shared.models.resnet import (
    STD,
    ResNetForImageClassification,
    activate_in_place,
    build_processor,
    normalize,
    stage_sizes,
)

SIZES = {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8, "layer_type": "basic", "num_labels": 3}


@pytest.mark.parametrize("enlarge", [1, 2, 3])
def test_images_are_enlarged_as_the_exported_processor_does(enlarge: int) -> None:
    """Its Pillow rounds to whole steps of 256, the device does not."""
    pixels = torch.randint(256, (4, 28, 28, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    images = [Image.fromarray(image.numpy()) for image in pixels]
    expected = build_processor(enlarge * 28, 1.0)(images, return_tensors="pt")["pixel_values"]
    found = normalize(pixels, enlarge)
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found, expected, rtol=0, atol=1.01 / 255 / min(STD))


def test_pixels_that_were_blended_are_taken_too() -> None:
    pixels = torch.randint(256, (2, 8, 8, 3), dtype=torch.uint8)
    assert torch.equal(normalize(pixels.to(torch.float32), 2), normalize(pixels, 2))


def test_activating_in_place_changes_no_gradient() -> None:
    torch.manual_seed(0)
    model = ResNetForImageClassification(transformers.ResNetConfig(**SIZES)).double()
    pixels, gradients = torch.rand(2, 3, 32, 32, dtype=torch.float64), []
    for _ in range(2):
        model.zero_grad()
        model(pixel_values=pixels).logits.square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        activate_in_place(model)
    assert all(module.inplace for module in model.modules() if isinstance(module, torch.nn.ReLU))
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_stages_have_both_sizes() -> None:
    assert stage_sizes("3,4", "64, 128") == {"depths": [3, 4], "hidden_sizes": [64, 128]}
    with pytest.raises(UsageError, match="hidden_sizes: '8': expected as many numbers as depths has: 2"):
        stage_sizes("1,1", "8")
    with pytest.raises(UsageError, match="depths: '1,x': expected comma-separated whole numbers"):
        stage_sizes("1,x", "8")
