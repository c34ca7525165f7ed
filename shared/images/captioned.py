"""Images and their captions: a folder with metadata.jsonl, Parquet, WebDataset tars, or a Hub data set."""

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shared.command_line import UsageError, expect
from shared.data import left_out
from shared.images.files import ImageFiles, open_split, without_decoding

SAMPLE = Path(__file__).parents[1] / "samples" / "emoji"
_USUAL_COLUMNS = ("caption", "text", "txt")


def source_of(data: str) -> str:
    """The data set that the field `data` means: the embedded one for sample."""
    return str(SAMPLE) if data == "sample" else data


@dataclass(frozen=True)
class CaptionedImages:
    """Encoded images and what they show.

    Args:
        files: the images.
        captions: of each, not empty.
    """

    files: ImageFiles
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.files)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes when captions or, as far as some of the images tell, images do."""
        digest = hashlib.sha256(self.files.fingerprint().encode())
        for caption in self.captions:
            digest.update(caption.encode() + b"\0")
        return digest.hexdigest()[:16]

    def subset(self, chosen: np.ndarray) -> "CaptionedImages":
        """Those at the given positions."""
        return CaptionedImages(self.files.subset(chosen), [self.captions[index] for index in chosen.tolist()])


def open_captioned(
    data: str,
    *,
    config: str,
    split: str,
    image_column: str,
    caption_column: str,
    max_bad_fraction: float,
    caption: str = "",
) -> CaptionedImages:
    """Find captioned images without decoding them; those whose caption is empty are left out, counted and named.

    Args:
        data: a .parquet or .tar file, a folder of them or of images with metadata.jsonl, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: such as train or validation.
        image_column: column of the images; "" = the only one that holds images.
        caption_column: column of the captions; "" = the one called caption, text or txt.
        max_bad_fraction: share of empty captions above which the data is refused.
        caption: of all images, whose own ones, if they have any, are not read; "" = each has its own.

    Raises:
        UsageError: nothing is there, the split or a column is not there, or too many captions are empty.
    """
    dataset, image = open_split(data, config, split, image_column, streaming=False)
    if caption:
        texts = [caption] * len(dataset)
    else:
        texts = list(dataset.with_format(None)[_pick_caption(dataset, data, caption_column, image)])
    captions = ["" if text is None else " ".join(text.split()) for text in texts]
    kept = np.array([row for row, caption in enumerate(captions) if caption], dtype=np.int64)
    files = ImageFiles(without_decoding(dataset.select_columns([image]), image), image, kept)
    number = len(captions) - len(kept)
    if not len(kept):
        raise UsageError(f"data: {data!r}: expected captions in split {split}, all {number} are empty")
    first = next((row for row, caption in enumerate(captions) if not caption), "")
    left_out.note("images_without_a_caption", number, where=f"{data} {split}", more=f"such as row {first}")
    if number:
        share = number / len(captions)
        expected = f"at least {share:.3f}, the share of empty captions"
        expect(share <= max_bad_fraction, "max_bad_fraction", max_bad_fraction, expected)
    return CaptionedImages(files, [captions[row] for row in kept.tolist()])


def _pick_caption(dataset: Any, data: str, asked: str, image: str) -> str:
    """The column of the captions; only text columns count."""
    import datasets

    texts = [
        name
        for name, feature in dataset.features.items()
        if isinstance(feature, datasets.Value) and feature.dtype in ("string", "large_string") and name != image
    ]
    if not asked and not texts:
        expected = "captions: a metadata.jsonl with file_name and caption beside the images, or a column of texts"
        others = ", ".join(name for name in dataset.features if name != image)
        got = f"columns that are no texts, {others}" if others else "images alone"
        raise UsageError(f"data: {data!r}: expected {expected}, got {got}")
    column = asked or next((name for name in _USUAL_COLUMNS if name in texts), "")
    expect(column in texts, "caption_column", asked, f"a column of texts, there are: {', '.join(texts) or 'none'}")
    return column
