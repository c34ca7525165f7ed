"""Buckets of aspect ratios: images go in batches with others of about their shape, and little of them is cut away."""

from collections.abc import Sequence

from shared.command_line import expect


def aspect_ratio_buckets(image_size: int, multiple: int) -> list[tuple[int, int]]:
    """Heights and widths of about the area of one square, which comes first, from about 1:2 to 2:1.

    Podell et al. 2023 (section 2.3) have more of them, up to 1:4 and 4:1.

    Args:
        image_size: side of the square in pixels.
        multiple: what all sides are multiples of, in pixels; 64 in the paper, at 1,024 pixels.

    Raises:
        UsageError: the side of the square is none, or the square is the only such bucket.
    """
    from diffusers.training_utils import generate_aspect_ratio_buckets

    expect(image_size % multiple == 0, "bucket_multiple", multiple, f"a divisor of image_size, {image_size}")
    buckets = generate_aspect_ratio_buckets(image_size, divisibility=multiple)
    expected = f"less: of image_size {image_size} there is only the square"
    expect(len(buckets) > 1, "bucket_multiple", multiple, expected)
    return buckets


def nearest_bucket(height: int, width: int, buckets: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one whose aspect ratio is the nearest on a logarithmic scale; then the least of the image is cut away.

    Args:
        height: of the image.
        width: of the image.
        buckets: height and width of each; of equally near ones the first is taken.
    """

    # `diffusers.training_utils.find_nearest_bucket` compares abs(height * w - width * h), a difference of ratios times
    # the bucket's own width. So its borders are not where two buckets cut the same share away: near them, which is less
    # than a hundredth of all images, it cuts up to a hundredth more.
    def kept(bucket: tuple[int, int]) -> float:
        taller, wider = height * bucket[1], width * bucket[0]
        return min(taller, wider) / max(taller, wider)

    return max(buckets, key=kept)
