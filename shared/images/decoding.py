"""From the bytes of a JPEG, PNG, WebP, BMP, GIF or TIFF file to an RGB crop.

A JPEG is decoded at the smallest of the scales 1/1, 1/2, 1/4 and 1/8 that covers the crop, which libjpeg-turbo computes
straight from the coefficients. Grey, palette, 16-bit, CMYK and transparent images become RGB as transformers'
`load_image` and its processors make them, except that 16-bit ones are scaled, not clipped; EXIF rotation is applied;
of an animation the first frame counts. Sizes are checked before anything is allocated.
"""

import contextlib
import io
import struct
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.nn.functional import interpolate

MAX_PIXELS = 89_478_485  # Pillow's own limit for a decompression bomb: 0.25 GB of RGB
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF")
PngImagePlugin.MAX_TEXT_CHUNK = 1 << 26  # bytes of a text or colour profile beside the pixels; Pillow's 1 MB is too few
_ORIENTATION = 0x0112  # EXIF tag
_EXIF_WITHIN = 1 << 16  # bytes of a file in which an EXIF block begins


class BadImage(Exception):
    """The file is no image that can be decoded, cut off, damaged or far too large."""


class EncodedImage:
    """An image whose size is known and whose pixels are not decoded yet.

    Args:
        data: bytes of a file.

    Attributes:
        width: in pixels, after EXIF rotation.
        height: in pixels, after EXIF rotation.
        has_16_bits: whether it is grey with 16 bits a pixel.

    Raises:
        BadImage: the header cannot be read, or names more than `MAX_PIXELS`.
    """

    def __init__(self, data: bytes) -> None:
        self._data, self.has_16_bits = data, False
        self._pixels: torch.Tensor | None = None
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
            self.has_16_bits = turned.mode.startswith("I")
            if turned.mode == "F":
                raise BadImage("pixels are floating-point numbers, of which nothing says what is white")

    def of_eight_bits(self) -> "EncodedImage":
        """This image, where pipelines of the library see what is decoded here: they clip 16 bits to white.

        Raises:
            BadImage: it has 16 bits a pixel.
        """
        if self.has_16_bits:
            raise BadImage("grey with 16 bits a pixel, expected 8")
        return self

    def keep_pixels(self) -> None:
        """Decode the image now and keep its pixels instead of its file.

        Raises:
            BadImage: the file is damaged.
        """
        self._pixels = _channels_first(self._decode(1.0))
        self._data, self._image = b"", None

    def crop(self, box: tuple[int, int, int, int], size: int) -> np.ndarray:
        """Part of the image, resized to a square (bilinear, with antialiasing).

        Args:
            box: left, top, right, bottom in pixels.
            size: side of the result in pixels.

        Returns:
            uint8 (size, size, 3).

        Raises:
            BadImage: the file is damaged.
        """
        left, top, right, bottom = box
        pixels = self._pixels
        if pixels is None:
            pixels = _channels_first(self._decode(size / min(right - left, bottom - top)))
        x, y = pixels.shape[3] / self.width, pixels.shape[2] / self.height
        rows, columns = slice(round(top * y), round(bottom * y)), slice(round(left * x), round(right * x))
        part = pixels[:, :, rows, columns]
        # torch's kernel for this type and layout takes half of Pillow's time or less.
        resized = interpolate(part, size=(size, size), mode="bilinear", antialias=True)
        return resized.numpy()[0].transpose(1, 2, 0)

    def center_crop(self, size: int, crop_fraction: float) -> np.ndarray:
        """The middle, as image processors of transformers cut it that resize the shorter side and crop.

        Args:
            size: side of the result in pixels.
            crop_fraction: of the shorter side that the crop keeps.

        Returns:
            uint8 (size, size, 3).

        Raises:
            BadImage: the file is damaged.
        """
        shorter = int(size / crop_fraction)
        longer = int(shorter * max(self.width, self.height) / min(self.width, self.height))
        sides = (shorter, longer) if self.width <= self.height else (longer, shorter)
        return self._middle(sides, size, size)

    def cover(self, height: int, width: int) -> np.ndarray:
        """The image, resized until it just covers a rectangle, and cut to it in the middle.

        Args:
            height: of the result in pixels.
            width: of the result in pixels. A square is the same as by `center_crop` with a fraction of 1.

        Returns:
            uint8 (height, width, 3).

        Raises:
            BadImage: the file is damaged.
        """
        if self.width * height <= self.height * width:
            return self._middle((width, int(width * self.height / self.width)), height, width)
        return self._middle((int(height * self.width / self.height), height), height, width)

    def _middle(self, sides: tuple[int, int], height: int, width: int) -> np.ndarray:
        """Resize to `sides`, width and height, and cut."""
        with _decoding_errors():
            _check_size(*sides)  # a line of pixels, resized to the height of an image, can take all memory
        image = Image.fromarray(self._decode(1.0) if self._pixels is None else self._pixels[0].permute(1, 2, 0).numpy())
        left, top = (sides[0] - width) // 2, (sides[1] - height) // 2
        resized = image.resize(sides, Image.Resampling.BILINEAR)
        return np.asarray(resized.crop((left, top, left + width, top + height)))

    def _decode(self, scale: float) -> np.ndarray:
        """The whole image, uint8 (H, W, 3), at 1/1, 1/2, 1/4 or 1/8, whichever is the smallest that has `scale`."""
        with _decoding_errors():
            if self._image is None:
                # libjpeg-turbo has vector code for these scales only: 5/8 takes longer than the whole.
                factor = next(factor for factor in (8, 4, 2, 1) if factor * scale <= 1 or factor == 1)
                if factor == 1:
                    # Both flags change a pixel by a few of its 256 steps: not where an image is evaluated.
                    is_fast = scale != 1
                    return _decode_jpeg(self._data, fastdct=is_fast, fastupsample=is_fast)
                least = {"min_height": self.height // factor, "min_width": self.width // factor}
                return _decode_jpeg(self._data, fastdct=True, fastupsample=True, **least)
            if self.has_16_bits:
                grey = (np.asarray(self._image, dtype=np.float64) / 257).round().astype(np.uint8)
                return np.repeat(grey[:, :, None], 3, axis=2)
            rgb = self._image.convert("RGB")
            if rgb.info.get("transparency") is not None:  # one colour of it, which transformers lays on white
                white = Image.new("RGBA", rgb.size, (255, 255, 255, 255))
                rgb = Image.alpha_composite(white, rgb.convert("RGBA")).convert("RGB")
            return np.array(rgb)


def _decode_jpeg(data: bytes, **options: Any) -> np.ndarray:
    """Pixels of a JPEG, also of one with stray bytes between its parts, which some cameras write."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **options)
    except ValueError as error:
        if "extraneous bytes before marker" not in str(error):
            raise
        return simplejpeg.decode_jpeg(data, "RGB", strict=False, **options)


@contextlib.contextmanager
def _decoding_errors() -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, SyntaxError, struct.error, MemoryError, Image.DecompressionBombError) as error:
        raise BadImage(" ".join(str(error).split())) from error


def _check_size(width: int, height: int) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise BadImage(f"{width} x {height} pixels, expected 1 to {MAX_PIXELS:,}")


def _channels_first(pixels: np.ndarray) -> torch.Tensor:
    """A view of (H, W, 3) as (1, 3, H, W)."""
    return torch.from_numpy(pixels).permute(2, 0, 1)[None]
