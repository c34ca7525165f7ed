"""Where images come from: files in folders, Parquet, WebDataset tars, or a Hub data set, read by index.

Folders are read by `folders.py`, local tars by `tars.py`, the others by `datasets`; splits of local data are told by
`shared/data/local_files.py`. What belongs to an image is read elsewhere: its class in `labelled.py`, its caption in
`captioned.py`.
"""

import contextlib
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shared.command_line import UsageError, expect, one_line
from shared.data import left_out
from shared.data.hub_data import is_hub_id, resolve
from shared.data.local_files import find_files, part_by_split, split_named, split_to_evaluate_on
from shared.data.parquet import with_rows
from shared.data.randomness import derive_seed, shuffled_indices
from shared.images.aspect_ratios import nearest_bucket
from shared.images.decoding import BadImage, EncodedImage
from shared.images.folders import IMAGE_SUFFIXES, is_image, is_metadata, open_image_folder
from shared.images.tars import open_tars

_SHARD_SUFFIXES = (".parquet", ".tar")
HELD_OUT_SEED = 0  # of the images held out, so that runs of any seed compare
_SAMPLED_IMAGES = 64
_STREAMED_SHARDS = 64  # into which a folder of images is dealt where it is streamed


@dataclass(frozen=True)
class ImageFiles:
    """Encoded images.

    Args:
        dataset: of `datasets`; its image column is not decoded.
        image_column: name of that column.
        indices: int64 (N,), the row of each in `dataset`.
    """

    dataset: Any
    image_column: str
    indices: np.ndarray

    def __len__(self) -> int:
        return len(self.indices)

    def read(self, index: int) -> bytes:
        """The bytes of a file; empty if it cannot be read."""
        return encoded_bytes(self.dataset[int(self.indices[index])][self.image_column])

    def name(self, index: int) -> str:
        """Path of the file, or what the data set calls it, and its row."""
        row = int(self.indices[index])
        return f"{(self.dataset[row][self.image_column] or {}).get('path') or 'unnamed'} (row {row})"

    def fingerprint(self) -> str:
        """Changes when images do, as far as some of them tell."""
        some = [self.read(index) for index in spread(len(self), _SAMPLED_IMAGES)]
        return hashlib.sha256(repr((len(self), some)).encode()).hexdigest()[:16]

    def subset(self, chosen: np.ndarray) -> "ImageFiles":
        """Those at the given positions."""
        return ImageFiles(self.dataset, self.image_column, self.indices[chosen])


def encoded_bytes(image: dict[str, Any] | None) -> bytes:
    """The bytes of an image that is not decoded; empty if there is none, or its file cannot be read."""
    import fsspec

    if image is None or image["bytes"] is not None or not image["path"]:
        return (image or {}).get("bytes") or b""
    try:
        with fsspec.open(image["path"], "rb") if "://" in image["path"] else open(image["path"], "rb") as stream:
            return stream.read()
    except OSError:
        return b""


def open_files(data: str, config: str, split: str, image_column: str) -> ImageFiles:
    """The images of a split, without decoding them.

    Args:
        data: a .parquet or .tar file, a folder of them or of images, or a Hub id.
        config: configuration of a Hub data set; "" = its only one.
        split: such as train or validation.
        image_column: column of the images; "" = the only one that holds images.

    Raises:
        UsageError: nothing is there, or the split or the column is not there.
    """
    dataset, image = open_split(data, config, split, image_column, streaming=False)
    kept = without_decoding(dataset, image).select_columns([image])
    return ImageFiles(kept, image, np.arange(len(kept), dtype=np.int64))


def open_split(
    data: str, config: str, split: str, image_column: str, *, streaming: bool, field: str = "data_split"
) -> tuple[Any, str]:
    """A split as `datasets` has it, with all columns, and the name of the one that holds images; see `open_files`.

    `field` names the split in messages.
    """
    import datasets

    path = Path(os.path.expanduser(data))
    check_config(data, config)
    with _load_errors(data):
        listing = _list_files(data, path) if path.exists() else None
        splits = list(listing.splits) if listing else _hub_splits(data, config)
    name = split_named(split, splits)
    expect(bool(name), field, split, f"one of {', '.join(splits)}, the splits of {data!r}")
    if listing:
        left_out.note_splits(data, {other: len(files) for other, files in listing.splits.items()}, read=name)
    with _load_errors(data):
        if listing is None:
            of_hub, configuration, commit = resolve(data, config)
            dataset = datasets.load_dataset(of_hub, configuration, split=name, streaming=streaming, revision=commit)
        elif listing.are_shards:
            dataset = _open_shards(listing.splits[name], streaming)
        else:
            dataset = open_image_folder(data, path, listing.images, listing.metadata, name)
            dataset = dataset.to_iterable_dataset(min(len(dataset), _STREAMED_SHARDS)) if streaming else dataset
    column = _pick_image(dataset, image_column)
    return dataset.cast_column(column, datasets.Image()), column


def without_decoding(dataset: Any, image: str) -> Any:
    """The data set with its image column as bytes and paths."""
    import datasets

    return dataset.cast_column(image, datasets.Image(decode=False))


def list_splits(data: str, config: str) -> list[str]:
    """The splits of a data set, in the form of `open_files`, found without loading it."""
    path = Path(os.path.expanduser(data))
    check_config(data, config)
    with _load_errors(data):
        return list(_list_files(data, path).splits) if path.exists() else _hub_splits(data, config)


def check_config(data: str, config: str) -> None:
    """Refuse a configuration of what is no Hub data set, which would be ignored."""
    is_local = Path(os.path.expanduser(data)).exists()
    expect(not (config and is_local), "data_config", config, f'"" for {data!r}, which is no Hub data set')


def _hub_splits(data: str, config: str) -> list[str]:
    import datasets

    name, configuration, commit = resolve(data, config)
    return datasets.get_dataset_split_names(name, configuration, revision=commit)


def validation_split(data: str, config: str, test_split: str = "") -> str:
    """The split to evaluate on, another one than `test_split`; "" if the data set has none."""
    return split_to_evaluate_on(list_splits(data, config), test_split)


def hold_out(images: ImageFiles, fraction: float) -> tuple[ImageFiles, ImageFiles]:
    """Split at random, the same way at every call: all but `fraction` of the images, and these.

    Raises:
        UsageError: one of the two would be empty.
    """
    number = round(len(images) * fraction)
    expect(0 < number < len(images), "eval_fraction", fraction, f"to split {len(images)} images in two")
    is_held_out = np.zeros(len(images), dtype=bool)
    is_held_out[shuffled_indices(np.arange(number), len(images), derive_seed(HELD_OUT_SEED, "held out"))] = True
    return images.subset(np.flatnonzero(~is_held_out)), images.subset(np.flatnonzero(is_held_out))


def spread(size: int, number: int) -> list[int]:
    """At most `number` positions, evenly over `range(size)`."""
    return np.unique(np.linspace(0, size - 1, min(size, number), dtype=np.int64)).tolist()


def check_sides(data: str, images: ImageFiles, least: int) -> None:
    """Refuse a data set most of whose images are smaller than the crops, as far as some of them tell.

    A few small ones, as ImageNet has, are enlarged.

    Raises:
        UsageError: the median of the shorter sides is below `least` pixels, or none of these can be decoded.
    """
    median = int(np.median([min(sides) for sides in _some_sides(data, images)]))
    expected = f"images of at least {least} pixels, the size of the crops; the median of the shorter sides is {median}"
    expect(median >= least, "data", data, expected)


def check_eight_bits(data: str, images: ImageFiles) -> None:
    """Refuse 16 bits a pixel, as far as some images tell: the library's pipelines clip all but the darkest to white.

    Raises:
        UsageError: it names such an image.
    """
    for index in spread(len(images), _SAMPLED_IMAGES):
        with contextlib.suppress(BadImage):
            is_deep = EncodedImage(images.read(index)).has_16_bits
            expect(not is_deep, "data", data, f"grey images of 8 bits a pixel, {images.name(index)} has 16")


def check_buckets(data: str, images: ImageFiles, buckets: Sequence[tuple[int, int]]) -> None:
    """Refuse a data set most of whose images do not fill their buckets, as far as some of them tell.

    A few small ones are enlarged.

    Args:
        data: for the message.
        images: of a split.
        buckets: heights and widths in pixels.

    Raises:
        UsageError: more than half of those tried would be enlarged, or none of them can be decoded.
    """
    tried = _some_sides(data, images)
    nearest = [nearest_bucket(*sides, buckets) for sides in tried]
    small = sum(sides[0] < bucket[0] or sides[1] < bucket[1] for sides, bucket in zip(tried, nearest, strict=True))
    sizes = ", ".join(f"{height} x {width}" for height, width in buckets)
    expected = f"images that fill {sizes} pixels (height x width); {small} of {len(tried)} tried are smaller"
    expect(2 * small <= len(tried), "data", data, expected)


def _some_sides(data: str, images: ImageFiles) -> list[tuple[int, int]]:
    """Heights and widths of some of the images."""
    sides = []
    for index in spread(len(images), _SAMPLED_IMAGES):
        with contextlib.suppress(BadImage):
            image = EncodedImage(images.read(index))
            sides.append((image.height, image.width))
    expect(bool(sides), "data", data, "images that can be decoded, none of those tried could be")
    return sides


class _Listing(NamedTuple):
    """What is at a path, found by going through it once."""

    splits: dict[str, list[Path]]
    are_shards: bool  # Parquet files or tars, else images
    images: Sequence[Path]
    metadata: Sequence[Path]


def _list_files(data: str, path: Path) -> _Listing:
    """The Parquet files, tars or images of each split.

    Raises:
        UsageError: there is nothing of a known kind, or there are Parquet files and tars.
    """

    def is_wanted(name: str) -> bool:
        return name.lower().endswith((*IMAGE_SUFFIXES, *_SHARD_SUFFIXES)) or is_metadata(name)

    files = [path] if path.is_file() else find_files(path, is_wanted)
    metadata = [file for file in files if is_metadata(file.name)]
    shards = [file for file in files if file.name.lower().endswith(_SHARD_SUFFIXES) and not is_metadata(file.name)]
    images = [file for file in files if is_image(file.name)]
    expected = "a .parquet or .tar file, or a folder of such files or of one folder of images for each class"
    is_known = bool(shards) or (bool(images) and path.is_dir())
    expect(is_known, "data", data, f"{expected}, found none in it")
    shown = ", ".join(file.name for file in shards[:5])
    expect(len({file.suffix.lower() for file in shards}) < 2, "data", data, f"files of one kind, got {shown}")
    if path.is_file():
        return _Listing({"train": files}, True, [], [])
    beside = [*images, *metadata] if shards else []
    left_out.note("files_beside_shards", len(beside), where=data, more=f"such as {next(iter(beside), '')}")
    splits = part_by_split(path, shards or images, by_file_name=bool(shards))
    return _Listing(splits, bool(shards), images, metadata)


def _open_shards(files: Sequence[Path], streaming: bool) -> Any:
    """Parquet files or tars, as `datasets` has them."""
    import datasets

    if files[0].suffix.lower() == ".tar":
        return open_tars(files, streaming=streaming)
    # The library takes names for patterns, follows no links where it looks for one, and refuses some names of splits.
    files, features = with_rows(files)
    names = [glob.escape(os.path.realpath(file)) for file in files]
    options = {"data_files": {"train": names}, "features": features, "split": "train"}
    return datasets.load_dataset("parquet", **options, streaming=streaming)


@contextlib.contextmanager
def _load_errors(data: str) -> Iterator[None]:
    if not (data and Path(os.path.expanduser(data)).exists()) and not is_hub_id(data):
        raise UsageError(f"data: {data!r}: expected sample, a file or folder that exists, or a Hub data set id")
    try:
        yield
    except UsageError:
        raise
    except Exception as error:  # network, cache and format errors have no common class
        reason = one_line(error.__cause__ or error)
        raise UsageError(f"data: {data!r}: expected a data set of images that can be read: {reason}") from error


def _pick_image(dataset: Any, asked: str) -> str:
    """The column that holds images: of that type, or where none is, bytes or structures of bytes and path."""
    import datasets

    features = dataset.features
    columns = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
    columns = columns or [name for name, feature in features.items() if _holds_bytes(feature)]
    column = asked or (columns[0] if len(columns) == 1 else "")
    there = ", ".join(columns) or "none does"
    expect(column in columns, "image_column", asked, f"a column that holds images, of which there are: {there}")
    return column


def _holds_bytes(feature: Any) -> bool:
    content = feature.get("bytes") if isinstance(feature, dict) and feature.keys() == {"bytes", "path"} else feature
    return getattr(content, "dtype", "") in ("binary", "large_binary")
