"""Generated JPEGs of the size that ImageNet's images have on average."""

import io

import numpy as np
from PIL import Image

JPEG_SIZE = (500, 375)


def make_jpeg(seed: int) -> bytes:
    """An image with detail at all scales, as photographs have: noise whose amplitude falls with its frequency."""
    draw, (width, height) = np.random.default_rng(seed), JPEG_SIZE
    pixels = np.zeros((height, width, 3))
    for octave in range(8):
        coarse = draw.integers(0, 256, (max(2, height >> octave), max(2, width >> octave), 3)).astype(np.uint8)
        layer = Image.fromarray(coarse).resize(JPEG_SIZE, Image.Resampling.BICUBIC)
        pixels += (np.asarray(layer, dtype=float) - 127.5) * 2.0 ** (0.3 * (octave - 7))
    stream = io.BytesIO()
    Image.fromarray((127.5 + pixels / 4).clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90)
    return stream.getvalue()
