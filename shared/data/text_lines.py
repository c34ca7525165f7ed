"""Lines of text files: compressed or not, in UTF-8, or in an encoding that a byte-order mark tells."""

import codecs
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.command_line import UsageError, expect, one_line

_MARKS = {  # the longer first: the mark of UTF-32 begins with one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
_READ_AT_ONCE = 1 << 14  # compressed bytes, of which some make a thousand times as many
_ARROWS_WINDOW, _LARGEST_WINDOW = 1 << 27, 1 << 31  # bytes; `zstd --long=31` writes the latter
_LOOKED_AT = 1 << 12  # bytes of a file's beginning that tell its encoding
_LEAST_NULS = 8  # one zero byte in so many is no text in UTF-8; in UTF-16 of English every other byte is


def read_lines(file: Path, longest: int = -1, field: str = "data") -> Iterator[str]:
    """Lines of a file, maybe compressed, with their ends, every byte kept.

    Args:
        file: to read.
        longest: characters, a line of more comes in several parts; -1 = none does.
        field: that names it, for the message.

    Raises:
        UsageError: it cannot be read.
    """
    with _read_errors(file, field), io.BufferedReader(_open(file)) as data:
        encoding, errors = encoding_of(file, data.peek(_LOOKED_AT), field)
        with io.TextIOWrapper(data, encoding=encoding, errors=errors, newline="\n") as stream:
            while line := stream.readline(longest):
                yield line


def encoding_of(file: Path, beginning: bytes, field: str = "data") -> tuple[str, str]:
    """How a file that begins so is decoded, and what becomes of other bytes; only UTF-8 can hold these.

    Raises:
        UsageError: it looks like UTF-16 or UTF-32 and has no byte-order mark.
    """
    for mark, encoding in _MARKS.items():
        if beginning.startswith(mark):
            return encoding, "surrogateescape" if encoding == "utf-8-sig" else "strict"
    is_text = beginning.count(0) * _LEAST_NULS < len(beginning) or not beginning
    expect(is_text, field, str(file), "text in UTF-8, or with a byte-order mark; it is full of zero bytes")
    return "utf-8", "surrogateescape"


@contextlib.contextmanager
def _read_errors(file: Path, field: str) -> Iterator[None]:
    import zstandard

    try:
        yield
    except (OSError, EOFError, lzma.LZMAError, zlib.error, zstandard.ZstdError, UnicodeError) as error:
        raise UsageError(f"{field}: {str(file)!r}: expected a readable file, got {one_line(error)}") from error


def _open(file: Path) -> Any:
    """Decompressed bytes, with `readinto`."""
    import pyarrow

    suffix = file.suffix.lower()
    if suffix == ".zst" and _zstd_window(file) <= _ARROWS_WINDOW:
        # It notices that a file was cut off, and takes no names that are not UTF-8.
        return pyarrow.input_stream(file.open("rb"), compression="zstd")
    if suffix == ".zst":
        return _Blocks(_zstd_blocks(file))
    if suffix == ".xz":
        return lzma.open(file)
    if suffix == ".gz":
        return gzip.open(file)  # passes over zeros behind the end
    return file.open("rb", buffering=0)


def _zstd_window(file: Path) -> int:
    """Bytes that the first frame looks back, 0 where nothing says it."""
    import zstandard

    with file.open("rb") as stream, contextlib.suppress(zstandard.ZstdError):
        return zstandard.get_frame_parameters(stream.read(18)).window_size  # a header's longest
    return 0


def _zstd_blocks(file: Path) -> Iterator[bytes]:
    """Decompressed pieces of a file with any window.

    Raises:
        EOFError: the file was cut off, which zstandard's own reader takes for the end.
    """
    import zstandard

    frame = None
    with file.open("rb") as stream:
        while data := stream.read(_READ_AT_ONCE):
            while data:
                frame = frame or zstandard.ZstdDecompressor(max_window_size=_LARGEST_WINDOW).decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
                frame = None if frame.eof else frame
    if frame:
        raise EOFError("a compressed file that was cut off")


class _Blocks(io.RawIOBase):
    """Pieces of bytes as a file."""

    def __init__(self, blocks: Iterator[bytes]) -> None:
        self._blocks, self._left = blocks, memoryview(b"")

    def readable(self) -> bool:
        """See `io.IOBase`."""
        return True

    def readinto(self, buffer: Any) -> int:
        """See `io.RawIOBase`."""
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size
