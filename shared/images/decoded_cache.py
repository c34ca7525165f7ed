"""Pictures that stay decoded in memory where they are small, so that an epoch after the first costs no decoding."""

from shared.images.decoding import EncodedPicture
from shared.images.files import PictureFiles

SMALL = 64 * 64  # pixels up to which decoding costs more than the memory is worth
MAX_BYTES = 1 << 27  # in each process that reads pictures


class PictureCache:
    """Opens pictures by index.

    Args:
        pictures: where they are read.
    """

    def __init__(self, pictures: PictureFiles) -> None:
        self._pictures = pictures
        self._kept: dict[int, EncodedPicture] = {}
        self._bytes = 0

    def open(self, index: int) -> EncodedPicture:
        """A picture, the same object again if it is kept.

        Raises:
            BadPicture: it cannot be opened.
        """
        if kept := self._kept.get(index):
            return kept
        picture = EncodedPicture(self._pictures.read(index))
        size = picture.width * picture.height
        if size <= SMALL:
            picture.keep_pixels()  # also without room, or pixels of a JPEG would depend on what else was read
            if self._bytes + 3 * size <= MAX_BYTES:
                self._kept[index] = picture
                self._bytes += 3 * size
        return picture
