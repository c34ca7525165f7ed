"""From the bytes of a JPEG, PNG or WebP file to an RGB crop.

A JPEG is decoded at the smallest scale that covers the crop: libjpeg-turbo computes n/8 of the sides straight from the
coefficients. Grey, palette, 16-bit, CMYK and transparent pictures become RGB as `transformers.image_utils.load_image`
makes them, except that 16-bit ones are scaled, not clipped; EXIF rotation is applied; of an animation the first frame
counts. Sizes are checked before anything is allocated.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 0.25 GB of RGB
FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # EXIF tag
_EXIF_WITHIN = 1 << 16  # bytes of a file in which an EXIF block begins


class BadPicture(Exception):
    """The file is no picture that can be decoded, cut off, damaged or far too large."""


class EncodedPicture:
    """A picture whose size is known and whose pixels are not decoded yet.

    Args:
        data: bytes of a JPEG, PNG or WebP file.

    Attributes:
        width: in pixels, after EXIF rotation.
        height: in pixels, after EXIF rotation.

    Raises:
        BadPicture: the header cannot be read, or names more than `MAX_PIXELS`.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._image: Any = None  # Pillow's, of what simplejpeg cannot decode: other formats, EXIF rotation, CMYK
        with _decoding_errors():
            if data[:2] == b"\xff\xd8" and b"Exif\0\0" not in data[:_EXIF_WITHIN]:
                self.height, self.width, space, _ = simplejpeg.decode_jpeg_header(data)
                if space in ("YCbCr", "Gray", "RGB"):
                    _check_size(self.width, self.height)
                    return
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # ours has its own limit
                self._image = Image.open(io.BytesIO(self._data), formats=FORMATS)
            _check_size(*self._image.size)  # before EXIF, which a PNG may have after its pixels
            is_turned = self._image.getexif().get(_ORIENTATION, 1) != 1
            turned = ImageOps.exif_transpose(self._image) if is_turned else self._image
            self._image, (self.width, self.height) = turned, turned.size

    def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
        """Part of the picture, resized to a square (bilinear, with antialiasing).

        Args:
            box: left, top, right, bottom in pixels.
            size: side of the result in pixels.

        Returns:
            uint8 (size, size, 3).

        Raises:
            BadPicture: the file is damaged.
        """
        left, top, right, bottom = box
        scale = min(1.0, size / min(right - left, bottom - top))
        image = self._decode(scale)
        x, y = image.width / self.width, image.height / self.height
        part = (left * x, top * y, right * x, bottom * y)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=part))

    def center_crop(self, size: int, crop_fraction: float) -> np.ndarray:
        """The middle, as transformers' `ConvNextImageProcessor`, which ResNets use, cuts it.

        Args:
            size: side of the result in pixels.
            crop_fraction: of the shorter side that the crop keeps.

        Returns:
            uint8 (size, size, 3).

        Raises:
            BadPicture: the file is damaged.
        """
        image = self._decode(1.0)
        shorter = int(size / crop_fraction)
        longer = int(shorter * max(image.size) / min(image.size))
        sides = (shorter, longer) if image.width <= image.height else (longer, shorter)
        left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
        resized = image.resize(sides, Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + size, top + size)))

    def _decode(self, scale: float) -> Any:
        """The whole picture as RGB, at `scale` or the next larger one that the format offers."""
        with _decoding_errors():
            if self._image is None:
                least = {"min_height": int(self.height * scale) + 1, "min_width": int(self.width * scale) + 1}
                # Both flags change a pixel by a few of its 256 steps, where a picture is made smaller anyway.
                options = {**least, "fastdct": True, "fastupsample": True} if scale < 1 else {}
                return Image.fromarray(simplejpeg.decode_jpeg(self._data, "RGB", **options))
            image = self._image
            if image.mode.startswith("I"):  # 16 bits
                image = Image.fromarray((np.asarray(image, dtype=np.float64) / 257).round().astype(np.uint8))
            return image.convert("RGB")


@contextlib.contextmanager
def _decoding_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, struct.error, MemoryError, Image.DecompressionBombError) as error:
        raise BadPicture(" ".join(str(error).split())) from error


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise BadPicture(f"{width} x {height} pixels, expected 1 to {MAX_PIXELS:,}")
