import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.image_transforms import convert_to_rgb
from transformers.image_utils import load_image

from shared.images import decoding
from shared.images.decoding import BadImage, EncodedImage


def photograph(width: int = 200, height: int = 150) -> Image.Image:
    """Smooth colours, as a JPEG keeps them."""
    x, y = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([255 * x, 255 * y, 127 + 120 * np.sin(6 * x + 4 * y)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encode(image: Image.Image, form: str = "JPEG", **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def difference(one: np.ndarray, other: Any) -> float:
    """Mean over all values, in steps of 256."""
    return float(np.abs(one.astype(float) - np.asarray(other, dtype=float)).mean())


@given(
    size=st.integers(16, 120),
    left=st.integers(0, 60),
    top=st.integers(0, 60),
    width=st.integers(40, 140),
    height=st.integers(40, 90),
)
@settings(max_examples=60, deadline=None)
def test_a_crop_at_a_smaller_scale_is_the_crop(size: int, left: int, top: int, width: int, height: int) -> None:
    data, box = encode(photograph(), quality=95), (left, top, left + width, top + height)
    expected = Image.open(io.BytesIO(data)).crop(box).resize((size, size), Image.Resampling.BILINEAR)
    found = EncodedImage(data).crop(box, size)
    assert found.shape == (size, size, 3)
    assert found.dtype == np.uint8
    assert difference(found, expected) < 5  # a box is rounded to pixels of the smaller image


def test_a_jpeg_is_decoded_at_the_smallest_scale_that_covers_the_crop(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = decoding.simplejpeg.decode_jpeg
    monkeypatch.setattr(
        decoding.simplejpeg, "decode_jpeg", lambda *a, **k: decoded.append(original(*a, **k)) or decoded[-1]
    )
    image = EncodedImage(encode(photograph(800, 600)))
    for size in (20, 50, 51, 100, 199, 200, 201, 400, 500):
        image.crop((0, 0, 400, 500), size)
    assert [image.shape[0] for image in decoded] == [75, 75, 150, 150, 300, 300, 600, 600, 600]


def test_kept_pixels_give_the_same_crops() -> None:
    for data in (encode(photograph(60, 40), "PNG"), encode(photograph(60, 40))):
        image, kept = EncodedImage(data), EncodedImage(data)
        kept.keep_pixels()
        for _ in range(2):
            assert np.array_equal(kept.center_crop(24, 0.9), image.center_crop(24, 0.9))
            # Kept pixels of a JPEG were decoded with care, those of a crop at once.
            assert difference(kept.crop((5, 6, 45, 36), 32), image.crop((5, 6, 45, 36), 32)) < 3


MODES = {
    "grey": ("L", "JPEG"),
    "grey png": ("L", "PNG"),
    "grey with alpha": ("LA", "PNG"),
    "palette": ("P", "PNG"),
    "cmyk": ("CMYK", "JPEG"),
    "alpha": ("RGBA", "WEBP"),
    "one bit": ("1", "PNG"),
}


@pytest.mark.parametrize("name", MODES)
def test_every_mode_becomes_rgb(name: str) -> None:
    mode, form = MODES[name]
    image = photograph().convert(mode)
    found = EncodedImage(encode(image, form)).center_crop(100, 1.0)
    expected = image.convert("RGB").resize((133, 100), Image.Resampling.BILINEAR).crop((16, 0, 116, 100))
    assert difference(found, expected) < 4


@pytest.mark.parametrize(("mode", "form"), [("P", "PNG"), ("P", "GIF"), ("RGB", "PNG"), ("L", "PNG")])
def test_a_transparent_colour_is_what_a_pipeline_sees(mode: str, form: str) -> None:
    """The library's loader keeps which colour it is, and its processors lay that on white."""
    pixels = np.random.default_rng(0).integers(0, 3, (9, 7, 3), dtype=np.uint8) * 100
    image, stream = Image.fromarray(pixels).convert(mode), io.BytesIO()
    image.save(stream, form, transparency=image.getpixel((0, 0)))
    loaded = load_image(Image.open(io.BytesIO(stream.getvalue())))
    expected = convert_to_rgb(loaded, return_numpy=True)
    assert (expected == 255).all(-1).any()
    crop = EncodedImage(stream.getvalue()).cover(9, 7)
    np.testing.assert_array_equal(crop, expected)


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    ramp = np.linspace(0, 65535, 100 * 100).reshape(100, 100).astype(np.uint16)
    found = EncodedImage(encode(Image.fromarray(ramp), "PNG")).center_crop(100, 1.0)
    assert difference(found, np.repeat((ramp / 257)[:, :, None], 3, axis=2)) < 1


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(form: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(), form, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    image = EncodedImage(data)
    assert (image.width, image.height) == upright.size
    found = image.crop((0, 0, upright.width, upright.height), 60)
    assert difference(found, upright.resize((60, 60), Image.Resampling.BILINEAR)) < 3


@pytest.mark.parametrize("form", ["WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    frames = [Image.new("RGB", (40, 40), color) for color in ("red", "blue")]
    data = encode(frames[0], form, save_all=True, append_images=frames[1:], lossless=True, duration=100)
    assert EncodedImage(data).center_crop(10, 1.0).reshape(-1, 3).mean(0).tolist() == [255, 0, 0]


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_a_decompression_bomb_costs_no_memory() -> None:
    """A PNG and a JPEG of a few hundred bytes that say that they have billions of pixels."""
    import tracemalloc

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1000))
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    small = encode(photograph())
    place = small.index(b"\xff\xc0") + 5
    jpeg = small[:place] + struct.pack(">HH", 65000, 65000) + small[place + 4 :]
    tracemalloc.start()
    for data in (png, jpeg):
        with pytest.raises(BadImage, match="pixels"):
            EncodedImage(data)
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_damaged_files_are_bad_images(form: str) -> None:
    data = encode(photograph(), form)
    for damaged in (b"", b"no image", data[:20], data[: len(data) // 2], data[:-200]):
        with pytest.raises(BadImage):
            EncodedImage(damaged).crop((0, 0, 200, 150), 50)


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_bytes_give_a_image_or_a_bad_image(data: st.DataObject) -> None:
    content = bytearray(encode(photograph(60, 40), data.draw(st.sampled_from(["JPEG", "PNG", "WEBP"]))))
    for _ in range(data.draw(st.integers(1, 8))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    try:
        image = EncodedImage(bytes(content))
        assert image.crop((0, 0, image.width, image.height), 16).shape == (16, 16, 3)
    except BadImage:
        pass


@pytest.mark.parametrize("form", ["GIF", "BMP", "TIFF"])
@pytest.mark.parametrize("mode", ["L", "RGB", "P", "1"])
def test_what_microscopes_and_satellites_write_is_read(form: str, mode: str) -> None:
    original = photograph().convert(mode)
    image = EncodedImage(encode(original, form))
    expected = Image.open(io.BytesIO(encode(original, form))).convert("RGB")
    assert (image.width, image.height) == original.size
    assert np.array_equal(image.cover(original.height, original.width), np.asarray(expected))


def test_a_jpeg_with_stray_bytes_is_read_and_a_cut_one_is_not() -> None:
    whole = encode(photograph(), "JPEG")
    stray = whole[:-2] + bytes(4) + whole[-2:]
    box = (0, 0, *photograph().size)
    assert np.array_equal(EncodedImage(stray).crop(box, 32), EncodedImage(whole).crop(box, 32))
    with pytest.raises(BadImage):
        EncodedImage(whole[: len(whole) // 2]).crop(box, 32)


def test_floating_point_pixels_and_other_formats_are_not_opened() -> None:
    for data in (encode(photograph().convert("F"), "TIFF"), encode(photograph(), "PPM")):
        with pytest.raises(BadImage):
            EncodedImage(data)


@pytest.mark.parametrize(("size", "fraction"), [(56, 1.0), (96, 0.875), (64, 0.95), (400, 0.9)])
@pytest.mark.parametrize("sides", [(200, 150), (150, 200), (131, 131)])
def test_the_middle_crop_is_that_of_the_library_s_processor(
    tmp_path: Path, size: int, fraction: float, sides: tuple[int, int]
) -> None:
    from transformers import BitImageProcessorPil

    data = encode(photograph(*sides), "PNG")
    sizes = {"size": {"shortest_edge": int(size / fraction)}, "crop_size": {"height": size, "width": size}}
    processor = BitImageProcessorPil(**sizes, resample=2)
    pixels = processor(Image.open(io.BytesIO(data)), do_normalize=False, do_rescale=False)["pixel_values"][0]
    assert np.array_equal(EncodedImage(data).center_crop(size, fraction), pixels.transpose(1, 2, 0))


@pytest.mark.parametrize("size", [(160, 90), (90, 160), (101, 77), (33, 32), (64, 64), (7, 5), (5, 200)])
@pytest.mark.parametrize("bucket", [(48, 32), (32, 48), (40, 40), (24, 12)])
def test_covering_is_resizing_and_cutting_the_middle(size: tuple[int, int], bucket: tuple[int, int]) -> None:
    (width, height), data = size, encode(photograph(*size), "PNG")
    scale = max(bucket[0] / height, bucket[1] / width)
    sides = (int(round(width * scale, 6)), int(round(height * scale, 6)))
    left, top = (sides[0] - bucket[1]) // 2, (sides[1] - bucket[0]) // 2
    resized = photograph(*size).resize(sides, Image.Resampling.BILINEAR)
    expected = np.asarray(resized)[top : top + bucket[0], left : left + bucket[1]]
    found = EncodedImage(data).cover(*bucket)
    assert found.shape == (*bucket, 3)
    assert np.array_equal(found, expected)


@given(width=st.integers(1, 90), height=st.integers(1, 90), size=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_covering_a_square_is_the_middle_crop(width: int, height: int, size: int) -> None:
    image = EncodedImage(encode(photograph(width, height), "PNG"))
    assert np.array_equal(image.cover(size, size), image.center_crop(size, 1.0))


def test_a_line_of_pixels_costs_no_memory() -> None:
    """Resized to a height of 64 it would take 48 GB."""
    image = EncodedImage(encode(Image.new("L", (2_000_000, 1)), "PNG"))
    for cut in (lambda: image.cover(64, 64), lambda: image.center_crop(64, 1.0)):
        with pytest.raises(BadImage, match="128000000 x 64 pixels, expected 1 to"):
            cut()
