import torch
from hypothesis import given
from hypothesis import strategies as st

from shared.images.pixel_range import from_minus_one, to_uint8


@given(seed=st.integers(0, 2**31))
def test_bytes_come_back_exactly(seed: int) -> None:
    pixels = torch.randint(0, 256, (2, 3, 5, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    scaled = from_minus_one(pixels)
    assert scaled.shape == (2, 3, 3, 5)
    assert scaled.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(to_uint8(scaled), pixels)


def test_pixels_outside_their_range_are_cut() -> None:
    pixels = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=torch.bfloat16)[None, None, None].expand(1, 3, 2, 5)
    images = to_uint8(pixels)
    assert (images.dtype, images.shape) == (torch.uint8, (1, 2, 5, 3))
    assert images[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
