"""Images that stay decoded in memory where they are small, so that an epoch after the first costs no decoding."""

from shared.images.decoding import EncodedImage
from shared.images.files import ImageFiles

SMALL = 64 * 64  # pixels up to which decoding costs more than the memory is worth
MAX_BYTES = 1 << 27  # in each process that reads images


class ImageCache:
    """Opens images by index.

    Args:
        images: where they are read.
    """

    def __init__(self, images: ImageFiles) -> None:
        self._images = images
        self._kept: dict[int, EncodedImage] = {}
        self._bytes = 0

    def open(self, index: int) -> EncodedImage:
        """An image, the same object again if it is kept.

        Raises:
            BadImage: it cannot be opened.
        """
        if kept := self._kept.get(index):
            return kept
        image = EncodedImage(self._images.read(index)).of_eight_bits()
        size = image.width * image.height
        if size <= SMALL:
            image.keep_pixels()  # also without room, or pixels of a JPEG would depend on what else was read
            if self._bytes + 3 * size <= MAX_BYTES:
                self._kept[index] = image
                self._bytes += 3 * size
        return image
