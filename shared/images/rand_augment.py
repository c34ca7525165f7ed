"""RandAugment (Cubuk et al. 2020): a few operations drawn at random, all of one strength.

The fifteen operations and their ranges are timm's "increasing" set, in which a larger magnitude always changes more;
ResNet Strikes Back (Wightman et al. 2021) uses them. kornia's are for batches of float tensors and draw from torch's
generator; these are for one uint8 image in a data worker and draw from a generator that is given.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0
PROBABILITY = 0.5  # that a drawn operation is applied: timm's default
FILL = (124, 116, 104)  # ImageNet's mean colour, where an image was moved away


def rand_augment(
    pixels: np.ndarray, operations: int, magnitude: float, spread: float, draw: np.random.Generator
) -> np.ndarray:
    """The image after some operations.

    Args:
        pixels: uint8 (H, W, 3).
        operations: how many are drawn, with repetition.
        magnitude: mean strength, from 0 to 10.
        spread: standard deviation of the strength of one operation.
        draw: where the randomness comes from.

    Returns:
        uint8 (H, W, 3).
    """
    image = Image.fromarray(pixels)
    for _ in range(operations):
        operation = OPERATIONS[int(draw.integers(len(OPERATIONS)))]
        strength = float(np.clip(draw.normal(magnitude, spread), 0, MAX_MAGNITUDE)) / MAX_MAGNITUDE
        is_applied, is_negative = draw.random(2) < (PROBABILITY, 0.5)
        if is_applied:
            image = operation(image, strength, -1.0 if is_negative else 1.0)
    return np.asarray(image)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR, fillcolor=FILL)


def _rotate(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return image.rotate(sign * 30 * strength, Image.Resampling.BILINEAR, fillcolor=FILL)


def _shear_x(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, 1, sign * 0.3 * strength, 0, 0, 1, 0)


def _shear_y(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, 1, 0, 0, sign * 0.3 * strength, 1, 0)


def _translate_x(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, 1, 0, sign * 0.45 * strength * image.width, 0, 1, 0)


def _translate_y(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return _affine(image, 1, 0, 0, 0, 1, sign * 0.45 * strength * image.height)


def _posterize(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return ImageOps.posterize(image, 4 - int(4 * strength))


def _solarize(image: Image.Image, strength: float, sign: float) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * strength))


def _solarize_add(image: Image.Image, strength: float, sign: float) -> Image.Image:
    added = [level + int(110 * strength) if level < 128 else level for level in range(256)]
    return image.point([min(255, level) for level in added] * 3)


def _enhance(enhancer: Callable[[Image.Image], ImageEnhance._Enhance]) -> Callable[..., Image.Image]:
    return lambda image, strength, sign: enhancer(image).enhance(1 + sign * 0.9 * strength)


OPERATIONS: tuple[Callable[[Image.Image, float, float], Image.Image], ...] = (
    lambda image, strength, sign: ImageOps.autocontrast(image),
    lambda image, strength, sign: ImageOps.equalize(image),
    lambda image, strength, sign: ImageOps.invert(image),
    _rotate,
    _posterize,
    _solarize,
    _solarize_add,
    _enhance(ImageEnhance.Color),
    _enhance(ImageEnhance.Contrast),
    _enhance(ImageEnhance.Brightness),
    _enhance(ImageEnhance.Sharpness),
    _shear_x,
    _shear_y,
    _translate_x,
    _translate_y,
)
