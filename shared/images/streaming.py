"""Labelled images that are read as they arrive, never stored; those of `labelled.py` are read by index.

Order and state are those of `shards.py`; a window of images is shuffled at a time.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shared.command_line import UsageError
from shared.data.randomness import derive_seed, shuffled_indices
from shared.data.shards import StreamState, deal_records
from shared.fields import Images
from shared.images.files import (
    ImageFiles,
    check_eight_bits,
    check_sides,
    encoded_bytes,
    open_split,
    validation_split,
    without_decoding,
)
from shared.images.labelled import LabelledImages, check_classes, number_alike, pick_label, source_of

HELD_OUT_FROM = 10_000  # images of a stream of which a share is held out; its later ones are not looked at for it
_LOOKED_AT = 16  # images of a stream to train on that are looked at before it is
WINDOW = 1024  # images that are shuffled at a time: about 110 MB of ImageNet's files in each process that reads


@dataclass(frozen=True)
class StreamedImage:
    """An image that has arrived.

    Attributes:
        data: bytes of the file; empty if it could not be read.
        label: its class.
        name: path of the file, or what the data set calls it.
        key: a whole number that depends on the file's bytes alone.
    """

    data: bytes
    label: int
    name: str
    key: int


class ImageStream:
    """A split of a data set, or the part of it whose files' bytes choose it.

    Args:
        name: of the data set, as the user gave it.
        shards: iterables of records of `datasets`, whose images are not decoded.
        columns: of the image and the class.
        class_names: by class.
        fingerprint: changes when the data set does.
        num_images: of the data set; 0 = it does not say.
        part: the images whose share by their bytes' hash is in this half-open range.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Iterable[dict[str, Any]]],
        columns: tuple[str, str],
        class_names: tuple[str, ...],
        fingerprint: str,
        num_images: int,
        part: tuple[float, float] = (0.0, 1.0),
    ) -> None:
        self._shards, self._columns, self._part = shards, columns, part
        self.name, self.class_names, self.num_images = name, class_names, num_images
        self.fingerprint = hashlib.sha256(repr((fingerprint, part)).encode()).hexdigest()[:16]

    def __len__(self) -> int:
        """Number of images of the data set; where it does not say, as many as `HELD_OUT_FROM`."""
        return self.num_images or HELD_OUT_FROM

    def __iter__(self) -> Iterator[StreamedImage]:
        return itertools.chain.from_iterable(self.shards())

    def shards(self) -> list["_Shard"]:
        """Iterables of the images of each shard."""
        return [_Shard(shard, *self._columns, self.class_names, self._part) for shard in self._shards]

    def between(self, start: float, end: float) -> "ImageStream":
        """The images whose share is in this range: a part of about that size, the same at every call."""
        common = (self.name, self._shards, self._columns, self.class_names, self.fingerprint, self.num_images)
        return ImageStream(*common, (start, end))

    def read(self, seed: int, rank: int, state: StreamState) -> Iterator[tuple[StreamedImage, StreamState]]:
        """This process's images without end, each with the state after it.

        Args:
            seed: of the order of shards and of the images in a window.
            rank: this process.
            state: where to go on.

        Raises:
            UsageError: there is none for this process, or a label is no class.
        """
        dealt = deal_records(self.shards(), seed, rank, state)
        start: StreamState = {**state, "used": 0}
        used = state["used"]
        while True:
            window = list(itertools.islice(dealt, WINDOW))
            window_seed = derive_seed(seed, "window", rank, start["epoch"], start["shard"], start["record"])
            order = shuffled_indices(np.arange(WINDOW), WINDOW, window_seed)
            for position in range(used, WINDOW):
                yield window[order[position]][0], {**start, "used": position + 1}
            start, used = window[-1][1], 0


class _Shard:
    def __init__(
        self,
        records: Iterable[dict[str, Any]],
        image_column: str,
        label_column: str,
        class_names: tuple[str, ...],
        part: tuple[float, float],
    ) -> None:
        self._records, self._image_column, self._label_column = records, image_column, label_column
        self._class_names, self._part = class_names, part

    def __iter__(self) -> Iterator[StreamedImage]:
        first, end = self._part
        for record in self._records:
            image, label = record[self._image_column], record[self._label_column]
            name = (image or {}).get("path") or "unnamed"
            if label is None or not 0 <= label < len(self._class_names):
                got = f"label {label}" if label not in (None, -1) else "none"
                expected = f"expected a label from 0 to {len(self._class_names) - 1} of each image"
                raise UsageError(f"data: {expected}, got {got} of {name}")
            data = encoded_bytes(image)
            digest = hashlib.blake2b(data, digest_size=8).digest()
            key = int.from_bytes(digest, "little") >> 1
            if first <= key / 2**63 < end:
                yield StreamedImage(data, label, name, key)


def open_splits(images: Images, label_column: str, largest: int) -> tuple[ImageStream, LabelledImages]:
    """The images to train on, and those to evaluate on, which are stored.

    Args:
        images: where they are.
        label_column: see `labelled.open_images`.
        largest: side in pixels of the largest crop that will be cut from them.

    Raises:
        UsageError: see `open_image_stream`, `store`, `labelled.number_alike`, `files.check_sides` and
            `files.check_eight_bits`.
    """
    source = source_of(images.data)
    columns = {"image_column": images.image_column, "label_column": label_column}
    train = open_image_stream(source, config=images.data_config, split=images.data_split, **columns)
    eval_split = images.eval_split or validation_split(source, images.data_config)
    if eval_split:
        whole = open_image_stream(source, config=images.data_config, split=eval_split, **columns)
        held_out = number_alike(store(whole, 0), train.class_names, eval_split, has_several=False)
    else:
        fraction = images.eval_fraction
        held_out = store(train.between(0, fraction), round(fraction * HELD_OUT_FROM))
        train = train.between(fraction, 1)
    check_sides(source, held_out.files, largest)
    for files in (held_out.files, store(train, _LOOKED_AT).files):
        check_eight_bits(source, files)
    return train, held_out


def open_image_stream(data: str, *, config: str, split: str, image_column: str, label_column: str) -> ImageStream:
    """Find labelled images without storing them; for the arguments see `open_images`.

    Raises:
        UsageError: nothing is there, the split or a column is not there, the classes are not listed, or there are
            fewer than two.
    """
    dataset, image = open_split(data, config, split, image_column, streaming=True)
    label = pick_label(dataset, label_column, image)
    names = getattr(dataset.features[label], "names", None)
    if names is None:
        expected = "a column with a list of classes, which a stream cannot find by itself"
        raise UsageError(f"label_column: {label!r}: expected {expected}")
    check_classes(data, names)
    dataset = without_decoding(dataset.select_columns([image, label]), image)
    size = (dataset.info.splits or {}).get(split)
    shards = [dataset.shard(dataset.num_shards, index) for index in range(dataset.num_shards)]
    version = repr((data, config, split, image, label, names, size and size.num_bytes, len(shards)))
    return ImageStream(data, shards, (image, label), tuple(names), version, size.num_examples if size else 0)


def store(stream: ImageStream, number: int) -> LabelledImages:
    """The first `number` images of a stream, in the cache of `datasets`, to be read by index; 0 = all.

    Raises:
        UsageError: there is none.
    """
    import datasets

    if next(iter(stream), None) is None:
        raise UsageError(f"data: {stream.name!r}: expected images to evaluate on, got none")
    classes = datasets.ClassLabel(names=list(stream.class_names))
    features = datasets.Features({"image": datasets.Image(decode=False), "label": classes})
    arguments = {"stream": stream, "number": number}
    fingerprint = hashlib.sha256(repr((stream.fingerprint, number)).encode()).hexdigest()[:16]
    stored = datasets.Dataset.from_generator(_records, features, gen_kwargs=arguments, fingerprint=fingerprint)
    labels = np.array(stored.with_format(None)["label"], dtype=np.int64)
    files = ImageFiles(stored.select_columns(["image"]), "image", np.arange(len(labels)))
    return LabelledImages(files, labels, stream.class_names)


def _records(stream: ImageStream, number: int) -> Iterator[dict[str, Any]]:
    for image in itertools.islice(stream, number or None):
        yield {"image": {"bytes": image.data, "path": image.name}, "label": image.label}
